"""The book-keeping engine: clipped sums from each operation's input and output gradient.

One forward pass and one backward pass give, for every example, the data that each kernel met and the gradient of its
result; no filter gradients are computed for the batch. Rules (clipping/rules) turn these into per-example norms and
into the clipped sum. As in the generic engine an example runs as a batch of one and the runs are vectorized, so that no
operation can see another example. Variables without a rule are differentiated directly, example by example.

Source: Bu et al. 2022, "Differentially Private Optimization on Large Model at Small Cost", arXiv 2210.00038 (the name
and the idea of reweighted output gradients); docs/algorithm.md, section 4, for batch normalization.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tf_dpbn import _graph, _validate
from tf_dpbn.clipping.contributions import BoundTerm, Contribution, Kept, Lookups, Products, aligned
from tf_dpbn.clipping.microbatches import MicrobatchedEngine, residual_sums
from tf_dpbn.clipping.per_example import PerExampleEngine
from tf_dpbn.clipping.rows import densify, unscaled, widen
from tf_dpbn.clipping.rules import AnyRule
from tf_dpbn.clipping.rules.base import MatrixRule, Rule
from tf_dpbn.clipping.rules.embedding import LookupRule
from tf_dpbn.clipping.task import Task
from tf_dpbn.clipping.uses import Use, find_uses
from tf_dpbn.clipping.vectorization import vectorize
from tf_dpbn.mechanisms import clip_weights

NORM_METHODS = ("auto", "instantiate", "gram")
# How many multiplications take as long as moving one number to memory and back, about (measured on CPUs).
_OPERATIONS_PER_NUMBER = 40


@dataclasses.dataclass
class _Books:
    """What the trace of one example found.

    Attributes:
      uses: the operations with rules, in the order of their records.
      direct: variables to differentiate directly.
    """

    uses: tuple[Use, ...] = ()
    direct: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Vectors:
    """The corrected gradients of a microbatch, one vector a row, in whatever form is cheapest.

    Attributes:
      contributions: each variable's part.
      uses: the operations that rules cover.
      results: (loss, parts, y_pred) by row.
      residuals: of the statistics, by release and row.
    """

    contributions: Sequence[Contribution]
    uses: tuple[Use, ...]
    results: tuple[Any, Any, Any]
    residuals: Sequence[tf.Tensor]

    def squared_norms(self) -> tf.Tensor:
        """float32 [rows]; not finite where the vector is not."""
        return tf.add_n([tf.cast(each.squared_norms(), tf.float32) for each in self.contributions])

    def weighted_sums(self, weights: tf.Tensor, finite: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """Sum over rows of weight times vector, one float64 tensor a variable.

        Args:
          weights: [rows], zero where a vector is not finite.
          finite: bool [rows], which vectors are finite.
        """

        def sums(finite: tf.Tensor | None) -> list[tf.Tensor]:
            return [each.weighted_sum(weights, finite) for each in self.contributions]

        return tuple(tf.cond(tf.reduce_all(finite), lambda: sums(None), lambda: sums(finite)))


class BookKeepingEngine(MicrobatchedEngine):
    """Clipped sums by book-keeping.

    Args:
      microbatch_size: how many examples are worked on at a time; it does not change the result. None chooses by what
        an example keeps: about 16 MiB at a time (on accelerators 1 GiB), or 64 examples if that is at most 512 MiB.
      norm_method: how the norm of a matrix product's gradient is found: "instantiate" (form each example's gradient),
        "gram" (from inner products of all pairs of positions) or "auto" (the cheaper one, operation by operation).

    Raises:
      ValueError: if microbatch_size is not a whole number >= 1, or norm_method is unknown.
    """

    def __init__(self, microbatch_size: int | None = None, norm_method: str = "auto") -> None:
        super().__init__(microbatch_size)
        self._norm_method = _validate.one_of("norm_method", norm_method, NORM_METHODS)
        self._fallback = PerExampleEngine(microbatch_size, vectorize=False)

    def bytes_per_example(self, task: Task, rows: Any) -> int:
        """The size of what is kept of one example: gradients, and the data and cotangents of each operation."""
        books = _Books()
        specs = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape[1:], t.dtype), rows)
        tf.function(lambda row: _record(task, books, *row[:-1]), autograph=False).get_concrete_function(specs)
        with_terms = {term.index for call in task.calls for term in call.local_terms}
        numbers = sum(task.variables[i].shape.num_elements() for i in books.direct)
        for use in books.uses:
            numbers += sum(tensor.shape.num_elements() or 0 for tensor in (*use.inputs, use.output))
            if not self._is_compact(use.rule, use.index in with_terms):
                numbers += math.prod(use.rule.shape)
        return 4 * numbers

    def _is_compact(self, rule: AnyRule, has_terms: bool) -> bool:
        """Whether no gradient of the whole operand is formed."""
        return isinstance(rule, LookupRule) or isinstance(rule, MatrixRule) and self._prefers_products(rule, has_terms)

    def vectors(self, task: Task, rows: Any) -> Vectors | None:
        """The rows' vectors, or None where examples cannot be vectorized; arguments as for `sum_slice`."""
        books = _Books()
        vectorized = vectorize(lambda row: _record(task, books, *row[:-1]), rows)
        if vectorized is None:
            return None
        loss, parts, y_pred, gradients, cotangents, records, residuals = vectorized(rows)
        contributions = self._contributions(task, books, gradients, cotangents, records)
        return Vectors(contributions, books.uses, (loss, parts, y_pred), residuals)

    def sum_slice(self, task: Task, rows: Any, l2_norm_clip: float) -> Any:
        """See MicrobatchedEngine."""
        vectors = self.vectors(task, rows)
        if vectors is None:
            return self._fallback.sum_slice(task, rows, l2_norm_clip)
        squared, mask = vectors.squared_norms(), rows[-1]
        finite = tf.math.is_finite(tf.sqrt(squared))
        sums = vectors.weighted_sums(clip_weights(squared, l2_norm_clip, mask), finite)
        sums += residual_sums(task.releases, vectors.residuals, mask)
        return sums, (*vectors.results, tf.logical_and(mask, tf.logical_not(finite)))

    def _contributions(
        self, task: Task, books: _Books, gradients: Any, cotangents: Any, records: Any
    ) -> list[Contribution]:
        """Each variable's part of the vectors, in the order of the variables."""
        terms: dict[int, list[BoundTerm]] = {}
        for k, call in enumerate(task.calls):
            for term in call.local_terms:
                terms.setdefault(term.index, []).append((term, cotangents[2 * k], cotangents[2 * k + 1]))
        found: list[Contribution] = []
        for i, variable in enumerate(task.variables):
            used = [(use.rule, *record) for use, record in zip(books.uses, records, strict=True) if use.index == i]
            if used:
                found.append(self._contribution(variable.shape, used, terms.get(i, ())))
            else:
                whole = _corrected([gradients[books.direct.index(i)]], None, terms.get(i, ()))
                found.append(Kept(variable.shape, whole))
        return found

    def _contribution(
        self, shape: tf.TensorShape, used: Sequence[tuple[AnyRule, Any, tf.Tensor]], terms: Sequence[BoundTerm]
    ) -> Contribution:
        if len(used) > 1:  # the sum over uses, for each example
            whole = [_instantiate_whole(rule, inputs, cotangent, shape) for rule, inputs, cotangent in used]
            return Kept(shape, _corrected([tf.add_n(whole)], None, terms))
        ((rule, inputs, cotangent),) = used
        if isinstance(rule, LookupRule):
            return Lookups(rule, *rule.entries(inputs, cotangent))
        if isinstance(rule, MatrixRule) and self._prefers_products(rule, bool(terms)):
            return Products(shape, rule, rule.matrices(inputs, cotangent), terms)
        return Kept(shape, _corrected(rule.instantiate(inputs, cotangent), rule, terms), rule)

    def _prefers_products(self, rule: MatrixRule, has_terms: bool) -> bool:
        """Whether norms are cheaper from inner products than from gradients (see `norm_method`)."""
        if has_terms and not rule.outputs_are_channels:
            return False
        if self._norm_method != "auto":
            return self._norm_method == "gram"
        if rule.positions == 1 and rule.groups == 1:
            return True
        multiplications = rule.positions**2 * (rule.inputs + rule.outputs)
        moved = rule.positions * rule.inputs - rule.inputs * rule.outputs
        return multiplications + _OPERATIONS_PER_NUMBER * moved < 0


def _record(task: Task, books: _Books, x: Any, y: Any, weight: Any, index: tf.Tensor) -> Any:
    """One example's loss and prediction, direct gradients, cotangents of statistics, records of uses, residuals."""
    graph = tf.compat.v1.get_default_graph()
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        statistics = tf.nest.map_structure(tf.identity, task.statistics)
        tape.watch([*task.variables, *tf.nest.flatten(statistics)])
        before = len(graph.get_operations())
        result = task.run_example(x, y, weight, index, statistics)
        scaled = task.loss_scale * widen(result.loss)
        operations = graph.get_operations()[before:]
        uses, books.direct = find_uses(operations, task.variables)
    books.uses = tuple(use for uses_of_variable in uses.values() for use in uses_of_variable)
    direct = [task.variables[i] for i in books.direct]
    sources = [*direct, *tf.nest.flatten(statistics), *[use.output for use in books.uses]]
    found = _gradients(tape, operations, scaled, sources)
    found = [unscaled(gradient, task.loss_scale) for gradient in found]
    first, last = len(direct), len(found) - len(books.uses)
    records = [(use.inputs, cotangent) for use, cotangent in zip(books.uses, found[last:], strict=True)]
    parts = tuple(tf.cast(part, tf.float32) for part in result.parts)
    loss = tf.cast(result.loss, tf.float32)
    return loss, parts, result.y_pred, found[:first], found[first:last], records, result.residuals


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


def _corrected(blocks: Sequence[tf.Tensor], rule: Rule | None, terms: Sequence[BoundTerm]) -> Sequence[tf.Tensor]:
    """Adds local terms: K_i' = K_i + pbar (x) c_mu_i + V * c_v_i (docs/algorithm.md, section 3a)."""
    parts = [[block] for block in blocks]
    for term, *cotangents in terms:
        for jacobian, cotangent in zip((term.d_mean, term.d_variance), cotangents, strict=True):
            factors = [tf.cast(each, blocks[0].dtype) for each in (jacobian[None], term.spread(cotangent))]
            if rule is not None:
                factors = [rule.split(aligned(factor, rule.shape)) for factor in factors]
            else:
                factors = [(factor,) for factor in factors]
            for part, j, c in zip(parts, *factors, strict=True):
                part.append(j * c)
    return [tf.add_n(part) for part in parts]  # at once: each addition of its own reads and writes all of them


def _instantiate_whole(rule: AnyRule, inputs: Any, cotangent: tf.Tensor, shape: tf.TensorShape) -> tf.Tensor:
    """Every example's gradient by the variable, [rows, *shape]."""
    if isinstance(rule, LookupRule):
        whole = rule.densify(*rule.entries(inputs, cotangent))
    else:
        whole = rule.join(rule.instantiate(inputs, cotangent))
    return tf.reshape(whole, tf.concat([tf.shape(whole)[:1], shape], 0))
