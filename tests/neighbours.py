"""The check of sensitivity: all subsets of a batch go through a model's step, and each two neighbours are compared.

A batch of n rows has 2^n subsets (by the mask), of which n 2^(n-1) pairs differ by one example: 448 pairs for 128
evaluations of 7 rows. Each evaluation is a whole step, public pass included, in one traced function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tf_dpbn.model import step

ROWS = 7
PAIRS = ROWS * 2 ** (ROWS - 1)
# Float32 rounding in a sum of a few terms; docs/privacy.md states the bound.
SLACK, ROUNDING = 1 + 1e-5, 1e-6
# What a row may hold instead of ordinary numbers.
EXTREMES = (np.nan, np.inf, -np.inf, 3e38, 1e30, 1e15, 0.0, 1e-42)


@dataclasses.dataclass(frozen=True)
class Moves:
    """How far one example moves each release, over its declared sensitivity.

    Attributes:
      pairs: how many pairs of neighbouring batches were compared.
      worst: [releases], the largest move.
      typical: [releases], the median.
      padding: the largest move when what lies in padding rows is replaced.
    """

    pairs: int
    worst: np.ndarray
    typical: np.ndarray
    padding: float

    @property
    def excess(self) -> float:
        """The largest move of all, infinite where a sum was not finite."""
        worst = float(np.max(self.worst))
        return worst if np.isfinite(worst) else np.inf

    @property
    def within_bounds(self) -> bool:
        """Whether the check passes."""
        return self.excess <= SLACK and self.padding <= ROUNDING

    def __add__(self, other: Moves) -> Moves:
        worst, typical = np.maximum(self.worst, other.worst), np.maximum(self.typical, other.typical)
        return Moves(self.pairs + other.pairs, worst, typical, max(self.padding, other.padding))


def subsets(rows: int = ROWS) -> np.ndarray:
    """bool [2^rows, rows]: subset k holds row i if bit i of k is set."""
    return (np.arange(2**rows)[:, None] >> np.arange(rows)) % 2 == 1


def neighbouring(rows: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the subsets of each neighbouring pair: without and with one row."""
    pairs = [(k, k | 1 << i) for k in range(2**rows) for i in range(rows) if not k >> i & 1]
    return tuple(np.array(pairs).T)


def sums_of_subsets(model: Any, within: np.ndarray | None = None) -> Callable[..., list[np.ndarray]]:
    """A function (x, y, weights [subsets, rows]) -> for each release [subsets, size], through the model's own step.

    The sums are divided by their declared sensitivity. Rows that are users have examples with the weights `within`,
    [rows, examples].
    """
    released: list[tuple[int, float]] = []  # size and sensitivity of each, known once a step is traced

    def one(x: Any, y: Any, weight: tf.Tensor) -> tf.Tensor:
        batch = step.read_batch(model, (x, y, weight if within is None else weight[:, None] * within))
        found, _ = step.clipped_sums(model, batch, step.public_forward(model, batch))
        released[:] = [(sum(t.shape.num_elements() for t in each.tensors), each.l2_sensitivity) for each in found]
        return tf.concat([tf.reshape(t, [-1]) for each in found for t in each.tensors], 0)

    def run(x: Any, y: Any, weights: tf.Tensor) -> tf.Tensor:
        return tf.map_fn(lambda w: one(x, y, w), weights, fn_output_signature=tf.float64, parallel_iterations=1)

    traced = tf.function(run, autograph=False)

    def call(x: Any, y: Any, weights: np.ndarray) -> list[np.ndarray]:
        x, y = tf.nest.map_structure(tf.convert_to_tensor, (x, y))
        specs = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), (x, y))
        any_number = traced.get_concrete_function(*specs, tf.TensorSpec([None, weights.shape[1]], tf.float32))
        found = any_number(x, y, tf.constant(weights)).numpy().astype(np.float64)
        parts = np.split(found, np.cumsum([size for size, _ in released])[:-1], axis=1)
        return [part / sensitivity for part, (_, sensitivity) in zip(parts, released, strict=True)]

    return call


def hard_batch(
    rng: np.random.Generator, shape: tuple[int, ...], targets: Any, rows: int = ROWS, extremes: bool = True
) -> tuple[Any, ...]:
    """(x, y, weight) with mixed scales, and often a duplicate, extreme and tiny weights, and an extreme row."""
    scale = 10.0 ** rng.uniform(-3, 3, (rows, *[1] * len(shape)))
    x = (rng.normal(size=(rows, *shape)) * scale).astype("float32")
    y = targets(rows)
    weight = rng.exponential(2.0, rows).astype("float32")
    weight[rng.integers(rows)] = rng.choice([1e-6, 30.0, 1e6])
    if rng.random() < 0.5:
        one, other = rng.choice(rows, 2, replace=False)
        x[one], weight[one] = x[other], weight[other]
        y = tf.nest.map_structure(lambda t: _copied(t, one, other), y)
    if extremes and rng.random() < 0.5:
        x[rng.integers(rows)] = rng.choice(EXTREMES)
    if extremes and rng.random() < 0.5:  # one bad number in an ordinary row
        row = x[rng.integers(rows)]
        row[tuple(rng.integers(0, n) for n in shape)] = rng.choice(EXTREMES)
    return x, y, weight


def _copied(values: np.ndarray, to: int, source: int) -> np.ndarray:
    values = values.copy()
    values[to] = values[source]
    return values


def moves_of(run: Callable[..., list[np.ndarray]], x: Any, y: Any, weight: np.ndarray) -> Moves:
    """Compares all neighbouring subsets of one batch; `run` is of `sums_of_subsets`."""
    rows = len(weight)
    chosen = subsets(rows)
    weights = np.where(chosen, weight, 0).astype("float32")
    sums = run(x, y, weights)
    without, with_row = neighbouring(rows)
    with np.errstate(invalid="ignore"):
        distances = np.array([np.linalg.norm(each[with_row] - each[without], axis=1) for each in sums])
    distances = np.where(np.isfinite(distances), distances, np.inf)
    return Moves(len(without), distances.max(1), np.median(distances, 1), _padding_move(run, x, y, weights, sums))


def _padding_move(run: Any, x: Any, y: Any, weights: np.ndarray, sums: list[np.ndarray]) -> float:
    """How far the sum of half of the rows moves, in norm, when the other rows hold other data."""
    half = 2 ** (weights.shape[1] // 2) - 1
    padding = weights[half] == 0
    other = np.array(x)
    other[padding] = 7.0 if np.issubdtype(other.dtype, np.floating) else 0
    again = run(other, y, weights[half : half + 1])
    return max(float(np.linalg.norm(one[0] - each[half])) for one, each in zip(again, sums, strict=True))


def check(
    model: Any,
    rng: np.random.Generator,
    shape: tuple[int, ...],
    targets: Any,
    batches: int = 1,
    extremes: bool = True,
    run: Any = None,
    rows: int = ROWS,
) -> Moves:
    """Compares all pairs of neighbouring subsets of some batches for a compiled model.

    Args:
      model, rng: compiled; and what draws the batches.
      shape, targets: of one example; and a function from their number to labels.
      batches: how many batches, with all their subsets.
      extremes: whether some rows are extreme.
      run: `sums_of_subsets(model)`, if at hand.
      rows: of a batch.
    """
    run = run or sums_of_subsets(model)
    return sum_moves(moves_of(run, *hard_batch(rng, shape, targets, rows, extremes)) for _ in range(batches))


def sum_moves(moves: Any) -> Moves:
    first, *others = moves
    for each in others:
        first += each
    return first
