"""The generic engine: exact per-example gradients of any Keras model, one example at a time.

Each example runs through the model as a batch of one, so no operation in the model can see another example, whatever it
computes. The runs are vectorized over a microbatch (operations that do not vectorize fall back to a loop of their own)
or looped over one by one. It is the oracle of every faster rule.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tf_dpbn.clipping.microbatches import MicrobatchedEngine, clip_counts, residual_sums
from tf_dpbn.clipping.rows import densify, finite_only, sum_of_squares, unscaled, weighted_sum, widen
from tf_dpbn.clipping.task import ExampleResult, Task
from tf_dpbn.clipping.vectorization import loop, vectorize
from tf_dpbn.mechanisms import ClipRule, clip_weights


class PerExampleEngine(MicrobatchedEngine):
    """Clipped sums by differentiating each example's loss separately.

    Args:
      microbatch_size: how many examples' gradients are held in memory at a time; it does not change the result. None
        chooses, see `microbatches`.
      vectorize: run the examples of a microbatch at once; False runs them one after the other, which needs the least
        memory and works for operations that cannot be vectorized at all.

    Raises:
      ValueError: if microbatch_size is not a whole number >= 1.
    """

    def __init__(self, microbatch_size: int | None = None, vectorize: bool = True) -> None:
        super().__init__(microbatch_size)
        self._vectorize = vectorize

    def bytes_per_example(self, task: Task, rows: Any) -> int:
        """The size of one example's gradient."""
        return 4 * sum(v.shape.num_elements() for v in task.variables)

    def sum_slice(self, task: Task, rows: Any, l2_norm_clip: float | ClipRule) -> Any:
        """Clips and sums one microbatch; also returns (loss, parts, y_pred, non_finite) by row."""
        results, gradients, cotangents = self._run(task, rows)
        gradients = _add_local_terms(task, gradients, cotangents)
        squared = tf.add_n([sum_of_squares(g) for g in gradients])
        mask = rows[-1]
        weights = clip_weights(squared, l2_norm_clip, mask)
        finite = tf.math.is_finite(tf.sqrt(squared))
        sums = tuple(weighted_sum(weights, finite_only(finite, g)) for g in gradients)
        sums += residual_sums(task.releases, results.residuals, mask) + clip_counts(l2_norm_clip, squared, mask)
        non_finite = tf.logical_and(mask, tf.logical_not(finite))
        return sums, (results.loss, results.parts, results.y_pred, non_finite)

    def _run(self, task: Task, rows: Any) -> tuple[ExampleResult, list[tf.Tensor], list[tf.Tensor]]:
        """Runs and differentiates every row; all results gain a leading axis."""

        def run_row(row: Any) -> Any:
            return _differentiate(task, *row[:-1])

        vectorized = vectorize(run_row, rows) if self._vectorize else None
        outputs = vectorized(rows) if vectorized is not None else loop(run_row, rows)
        loss, parts, y_pred, gradients, cotangents, residuals = outputs
        return ExampleResult(loss, parts, y_pred, residuals), gradients, cotangents


def _differentiate(task: Task, x: Any, y: Any, weight: Any, index: tf.Tensor) -> Any:
    """Loss, prediction, gradients by the variables and by the statistics, and residuals, of one example."""
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        statistics = tf.nest.map_structure(tf.identity, task.statistics)
        tape.watch([*task.variables, *tf.nest.flatten(statistics)])
        result = task.run_example(x, y, weight, index, statistics)
        scaled = task.loss_scale * widen(result.loss)
    sources = [*task.variables, *tf.nest.flatten(statistics)]
    found = tape.gradient(scaled, sources, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    dense = [tf.cast(unscaled(densify(g, v), task.loss_scale), tf.float32) for g, v in zip(found, sources, strict=True)]
    number = len(task.variables)
    loss, parts = result.logged()
    return loss, parts, result.y_pred, dense[:number], dense[number:], result.residuals


def _add_local_terms(task: Task, gradients: list[tf.Tensor], cotangents: list[tf.Tensor]) -> list[tf.Tensor]:
    """K_i' = K_i + pbar (x) c_mu_i + V * c_v_i (docs/algorithm.md, section 3a)."""
    gradients = list(gradients)
    for k, call in enumerate(task.calls):
        for term in call.local_terms:
            correction = term.pull_back(cotangents[2 * k], cotangents[2 * k + 1])
            gradients[term.index] += tf.cast(correction, tf.float32)
    return gradients
