"""The book-keeping engine: clipped sums from each operation's input and output gradient.

One forward pass and one backward pass give, for every example, the data that enters each kernel and the gradient of
its result; no filter gradients are computed for the batch. Rules (clipping/rules) turn these into per-example norms and
into the clipped sum.

The examples run through the model as one batch, where `independence` proves that no operation lets one see another.
Where it does not, an example runs as a batch of one and the runs are vectorized; there, variables without a rule are
differentiated directly, example by example.

Source: Bu et al. 2022, "Differentially Private Optimization on Large Model at Small Cost", arXiv 2210.00038 (the name
and the idea of reweighted output gradients); docs/algorithm.md, section 4, for batch normalization.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tf_dpbn import _graph, _validate
from tf_dpbn._devices import has_accelerator
from tf_dpbn.clipping.batch_trace import BatchTrace, Records
from tf_dpbn.clipping.contributions import BoundTerm, Contribution, Kept, corrected, merged
from tf_dpbn.clipping.independence import NotProvedError
from tf_dpbn.clipping.microbatches import FEWEST, MicrobatchedEngine, clip_counts, residual_sums, rounded_up
from tf_dpbn.clipping.per_example import PerExampleEngine
from tf_dpbn.clipping.rows import densify, finite_only, reshape_rows, unscaled, widen
from tf_dpbn.clipping.rules import matmul
from tf_dpbn.clipping.rules.base import NORM_METHODS
from tf_dpbn.clipping.task import Task
from tf_dpbn.clipping.uses import Use, find_uses
from tf_dpbn.clipping.vectorization import vectorize
from tf_dpbn.mechanisms import ClipRule, clip_weights


class Vectors:
    """The corrected gradients of a microbatch, one vector a row, in whatever form is cheapest.

    Args:
      contributions: each variable's part.
      uses: the operations that rules cover.
      results: (loss, parts, y_pred) by row.
      residuals: of the statistics, by release and row.
    """

    def __init__(
        self,
        contributions: Sequence[Contribution],
        uses: tuple[Use, ...],
        results: tuple[Any, Any, Any],
        residuals: Sequence[tf.Tensor],
    ) -> None:
        self.contributions, self.uses, self.results, self.residuals = contributions, uses, results, residuals
        self._small, together = merged(contributions)
        self._parts = [each for i, each in enumerate(contributions) if i not in self._small]
        self._parts += [] if together is None else [together]

    def squared_norms(self) -> tf.Tensor:
        """float32 [rows]; non-finite where the vector is."""
        return tf.add_n([tf.cast(each.squared_norms(), tf.float32) for each in self._parts])

    def weighted_sums(self, weights: tf.Tensor, finite: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """Sum over rows of weight times vector, one float64 tensor a variable.

        Args:
          weights: [rows], zero where a vector is non-finite.
          finite: bool [rows], which vectors are finite.
        """
        operands = [each.operands for each in self._parts]

        def finite_ones() -> Any:
            ranks = {t.shape.rank for t in tf.nest.flatten(operands)}
            by_rank = {rank: reshape_rows(finite, [1] * (rank - 1)) for rank in ranks}
            return tf.nest.map_structure(lambda t: finite_only(by_rank[t.shape.rank], t), operands)

        if has_accelerator():  # XLA fuses it with what reads it
            operands = finite_ones()
        else:
            operands = tf.cond(tf.reduce_all(finite), lambda: operands, finite_ones)
        sums = [each.weighted_sum(weights, o) for each, o in zip(self._parts, operands, strict=True)]
        if self._small:
            sums = _graph.put_back(sums[:-1], sums[-1], {i: self.contributions[i].shape for i in self._small})
        return tuple(sums)


class BookKeepingEngine(MicrobatchedEngine):
    """Clipped sums by book-keeping.

    Args:
      microbatch_size: how many examples are worked on at a time, 1 or rounded up to a multiple of 16; does not change
        the result. None chooses by what an example keeps: about 16 MiB at a time (on accelerators 1 GiB), or 64
        examples if that is at most 1 GiB; at least 16, or one where 16 keep more than 4 GiB.
      norm_method: how the norm of a matrix product's gradient is found: "instantiate" (form each example's gradient),
        "gram" (from inner products of all pairs of positions) or "auto" (the cheaper one, operation by operation).

    Raises:
      ValueError: if microbatch_size is not a whole number >= 1, or norm_method is unknown.
    """

    def __init__(self, microbatch_size: int | None = None, norm_method: str = "auto") -> None:
        super().__init__(microbatch_size)
        self._norm_method = _validate.one_of("norm_method", norm_method, NORM_METHODS)
        self._fallback = PerExampleEngine(microbatch_size, vectorize=False)

    def prepared(self, task: Task) -> Task:
        """See MicrobatchedEngine."""
        return dataclasses.replace(task, batch_trace=BatchTrace(task))

    def bytes_per_example(self, task: Task, rows: Any) -> int:
        """The size of what is kept of one example: gradients, and the data and cotangents of each operation."""
        count = rounded_up(min(rows[-1].shape[0] or task.expected_rows or FEWEST, FEWEST))
        try:
            specs = tf.nest.map_structure(lambda t: tf.TensorSpec([count, *t.shape[1:]], t.dtype), rows)
            records = task.batch_trace.records(specs)
        except NotProvedError:
            count = 1
            traced: list[Records] = []
            specs = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape[1:], t.dtype), rows)
            tf.function(lambda row: _record(task, traced, row), autograph=False).get_concrete_function(specs)
            (records,) = traced
        with_terms = {term.index for call in task.calls for term in call.local_terms}
        numbers = sum(task.variables[i].shape.num_elements() for i in records.whole)
        for use in records.uses:
            numbers += sum((tensor.shape.num_elements() or 0) // count for tensor in (*use.inputs, use.output))
            numbers += use.rule.numbers_kept(use.index in with_terms, self._norm_method)
        return 4 * numbers

    def vectors(self, task: Task, rows: Any) -> Vectors | None:
        """The rows' vectors, or None where examples cannot be vectorized; arguments as for `sum_slice`."""
        try:
            records = (task.batch_trace or BatchTrace(task))(rows)
        except NotProvedError as error:
            tf.get_logger().info("Examples are vectorized one by one: %s.", error)
            records = _trace_examples(task, rows)
        if records is None:
            return None
        return Vectors(self._contributions(task, records), records.uses, records.results, records.residuals)

    def sum_slice(self, task: Task, rows: Any, l2_norm_clip: float | ClipRule) -> Any:
        """See MicrobatchedEngine."""
        vectors = self.vectors(task, rows)
        if vectors is None:
            return self._fallback.sum_slice(task, rows, l2_norm_clip)
        squared, mask = vectors.squared_norms(), rows[-1]
        finite = tf.math.is_finite(tf.sqrt(squared))
        sums = vectors.weighted_sums(clip_weights(squared, l2_norm_clip, mask), finite)
        sums += residual_sums(task.releases, vectors.residuals, mask) + clip_counts(l2_norm_clip, squared, mask)
        return sums, (*vectors.results, tf.logical_and(mask, tf.logical_not(finite)))

    def _contributions(self, task: Task, records: Records) -> list[Contribution]:
        """Each variable's part of the vectors, in the order of the variables."""
        terms: dict[int, list[BoundTerm]] = {}
        for k, call in enumerate(task.calls):
            for term in call.local_terms:
                terms.setdefault(term.index, []).append((term, *records.cotangents[2 * k : 2 * k + 2]))
        found: list[Contribution] = []
        for i, variable in enumerate(task.variables):
            shape, bound, whole = variable.shape, terms.get(i, ()), list(records.whole.get(i, ()))
            used = [(use.rule, *data) for use, data in zip(records.uses, records.data, strict=True) if use.index == i]
            if len(used) > 1:
                used = matmul.merged(used)
            if len(used) == 1 and not whole:
                ((rule, inputs, cotangent),) = used
                found.append(rule.contribution(shape, inputs, cotangent, bound, self._norm_method))
                continue
            for rule, inputs, cotangent in used:  # the sum over uses, for each example
                whole.append(reshape_rows(rule.join(rule.instantiate(inputs, cotangent)), shape))
            if not whole:  # the loss does not depend on it
                whole.append(tf.zeros([tf.shape(records.results[0])[0], *shape]))
            found.append(Kept(shape, corrected([tf.add_n(whole)], bound, shape)))
        return found


def _trace_examples(task: Task, rows: Any) -> Records | None:
    """The records of all rows, an example as a batch of one, vectorized; None where that is impossible."""
    traced: list[Records] = []
    vectorized = vectorize(lambda row: _record(task, traced, row), rows)
    if vectorized is None:
        return None
    return traced[-1].with_tensors(vectorized(rows))


def _record(task: Task, traced: list[Records], row: Any) -> Any:
    """The tensors of one example's records; what else there is to know is appended to `traced`."""
    x, y, weight, index, _ = row
    graph = tf.compat.v1.get_default_graph()
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        statistics = tf.nest.map_structure(tf.identity, task.statistics)
        tape.watch([*task.variables, *tf.nest.flatten(statistics)])
        before = len(graph.get_operations())
        result = task.run_example(x, y, weight, index, statistics)
        scaled = task.loss_scale * widen(result.loss)
        operations = graph.get_operations()[before:]
        uses, others = find_uses(operations, task.variables)
    direct = [task.variables[i] for i in others]
    sources = [*direct, *tf.nest.flatten(statistics), *[use.output for use in uses]]
    found = [unscaled(each, task.loss_scale) for each in _gradients(tape, operations, scaled, sources)]
    first, last = len(direct), len(found) - len(uses)
    data = [(use.inputs, cotangent) for use, cotangent in zip(uses, found[last:], strict=True)]
    loss, parts = result.logged()
    whole = {i: [gradient] for i, gradient in zip(others, found[:first], strict=True)}
    records = Records(uses, data, whole, found[first:last], (loss, parts, result.y_pred), result.residuals)
    traced.append(records)
    return records.tensors()


def _gradients(tape: tf.GradientTape, operations: Sequence[tf.Operation], target: tf.Tensor, sources: Any) -> list[Any]:
    """The gradients of what `operations` compute, in the scope of the tape, zeros where there are none.

    Not by the tape, if possible: where two of the gradients are one tensor, TensorFlow 2.21 never frees the graph after
    it (the tensor is counted once too often). But only the tape knows what a ForwardAccumulator made of a function.
    """
    if any(_graph.calls_functions(operation) for operation in operations):
        found = tape.gradient(target, sources, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    else:
        found = [
            tf.zeros_like(source) if gradient is None else gradient
            for gradient, source in zip(tf.gradients(target, sources), sources, strict=True)
        ]
    return [densify(gradient, source) for gradient, source in zip(found, sources, strict=True)]
