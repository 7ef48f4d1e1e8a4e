"""What floating point leaves of the guarantee: how far the noise reaches, and how far one example moves a large sum.

Prints one JSON object, and fails if a bound does not hold. It uses what every version of the library has, so that an
older one can be held against it:

    git worktree add /tmp/before 3ca502e && PYTHONPATH=/tmp/before python benchmarks/floating_point.py

The batches are crafted: every example's contribution lies within the clip norm, and the others bring the accumulator of
a float32 sum to a rounding boundary, where one example more decides how each later addition is rounded.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from absl import app, flags

import tf_dpbn
from tf_dpbn._keras import keras
from tf_dpbn.auditing import clipped_sums
from tf_dpbn.mechanisms import ROUNDING, NoiseSource

# The largest number that tf.random.stateless_normal can yield, and how often a normal number is larger.
END_OF_TENSORFLOWS_NORMALS, BEYOND = 5.6777, 1.366e-8
BATCH_SIZES = (1024, 4096, 16384)
ENGINES = ("book_keeping", "vectorized")
# What the engines choose on CPUs, where a batch may hold padding, and another size.
_MICROBATCHES = (128, 64)

_DRAWS = flags.DEFINE_integer("draws", 1_000_000_000, "How many normal numbers to draw.", lower_bound=1)
_AT_ONCE = 20_000_000


def tail(draws: int, seed: int) -> tuple[float, int]:
    """(the largest size, how many are beyond TensorFlow's) of that many numbers of the library's noise."""
    source = NoiseSource(seed)

    @tf.function(autograph=False)
    def draw() -> tuple[tf.Tensor, tf.Tensor]:
        sizes = tf.abs(source.standard_normal([tf.TensorShape([min(draws, _AT_ONCE)])])[0])
        return tf.reduce_max(sizes), tf.reduce_sum(tf.cast(sizes > END_OF_TENSORFLOWS_NORMALS, tf.int64))

    found = [draw() for _ in range(-(-draws // _AT_ONCE))]
    return max(float(largest) for largest, _ in found), sum(int(beyond) for _, beyond in found)


def sum_of(engine: str) -> Callable[[np.ndarray, np.ndarray], float]:
    """A function (contributions, weights) -> the clipped sum of a model whose gradients are the contributions."""
    inputs = keras.Input((1,))
    layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
    model = tf_dpbn.DPModel(inputs, layer(inputs))
    optimizer = tf_dpbn.DPOptimizer("sgd", l2_norm_clip=1.0, noise_multiplier=1.0, expected_batch_size=256)
    model.compile(optimizer, loss="mse", engine=engine)
    sums = clipped_sums(model)

    def call(contributions: np.ndarray, weights: np.ndarray) -> float:
        # The gradient of (0 - y)^2 by the kernel is -2 y.
        (found,) = sums(np.ones((len(contributions), 1), "float32"), -contributions[:, None] / 2.0, weights)
        return float(found.tensors[0][0, 0])

    return call


def crafted(batch_size: int, microbatch: int) -> np.ndarray:
    """Contributions, float32 [batch_size], the first of which moves a float32 sum by more than 1.

    With the first, halves sum to just above a power of two, where floats are twice as far apart as below it. The rest
    adds three quarters of a unit of below in every microbatch: rounded down on one side, up on the other.
    """
    top = 2.0 ** np.floor(np.log2(batch_size / 4))
    halves = int(2 * top) - 1
    end = -(-halves // microbatch) * microbatch
    small = np.zeros(batch_size - end)
    small[::microbatch] = -0.75 * top * 2.0**-24
    return np.concatenate([[1.0], np.full(halves, 0.5), np.zeros(end - halves), small])[:batch_size].astype("float32")


def largest_move(run: Callable[[np.ndarray, np.ndarray], float], batch_size: int) -> float:
    """How far the first example moves the sum: against padding, and against a gradient of zero in its place."""
    everyone, others = np.ones(batch_size, "float32"), (np.arange(batch_size) > 0).astype("float32")
    found = []
    for microbatch in _MICROBATCHES:
        contributions = crafted(batch_size, microbatch)
        with_it = run(contributions, everyone)
        found += [with_it - run(contributions, others), with_it - run(contributions * others, everyone)]
    return max(abs(move) for move in found)


def main(argv: list[str]) -> None:
    del argv
    warnings.simplefilter("ignore")
    largest, beyond = tail(_DRAWS.value, seed=0)
    expected = _DRAWS.value * BEYOND
    found = {}
    for engine in ENGINES:
        run = sum_of(engine)
        found[engine] = {size: largest_move(run, size) for size in BATCH_SIZES}
    worst = max(max(each.values()) for each in found.values())
    holds = {"tail": beyond > expected / 4 or expected < 4, "sums": worst <= 1.0 + ROUNDING}
    noise = {"draws": _DRAWS.value, "largest": largest, "beyond": beyond, "expected_beyond": round(expected, 1)}
    print(json.dumps({"noise": noise, "moves_over_clip_norm": found, "holds": holds}))
    raise SystemExit(0 if all(holds.values()) else 1)


if __name__ == "__main__":
    app.run(main)
