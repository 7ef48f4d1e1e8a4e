"""One variable's part of every example's vector: its squared norm, and its clipped sum.

Norm and sum must be those of the same vector, or clipping bounds nothing. Where gradients are kept, both read the same
numbers. Where the norm comes from inner products instead, rounding is bounded and added to the norm.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tf_dpbn.clipping.rows import by_row, sum_of_squares, weighted_sum
from tf_dpbn.clipping.rules.base import MatrixRule, Rule
from tf_dpbn.clipping.rules.embedding import LookupRule
from tf_dpbn.normalization import LocalTerm

# (term, cotangents by mean and variance, [rows, channels] each)
BoundTerm = tuple[LocalTerm, tf.Tensor, tf.Tensor]
# Inner products are off by a few units in the last place of the product of the vectors' norms.
_UNITS = 8.0


class Contribution(abc.ABC):
    """One variable's part of every example's vector."""

    @abc.abstractmethod
    def squared_norms(self) -> tf.Tensor:
        """[rows]; not finite where a gradient is not."""

    @abc.abstractmethod
    def weighted_sum(self, weights: tf.Tensor, finite: tf.Tensor | None) -> tf.Tensor:
        """Sum over rows of weight times gradient, float64, of the variable's shape.

        Args:
          weights: [rows], zero where a gradient is not finite.
          finite: bool [rows]; None where all gradients are finite.
        """


class Kept(Contribution):
    """Gradients held in memory, as the blocks of a rule or whole.

    Args:
      shape: of the variable.
      blocks: tensors [rows, ...].
      rule: what the blocks are; None for a single block in the variable's shape.
    """

    def __init__(self, shape: Sequence[int], blocks: Sequence[tf.Tensor], rule: Rule | None = None) -> None:
        self._shape = shape
        self._blocks = blocks
        self._rule = rule

    def squared_norms(self) -> tf.Tensor:
        """See `Contribution`."""
        return tf.add_n([sum_of_squares(block) for block in self._blocks])

    def weighted_sum(self, weights: tf.Tensor, finite: tf.Tensor | None) -> tf.Tensor:
        """See `Contribution`."""
        sums = tuple(weighted_sum(weights, _only(finite, block))[None] for block in self._blocks)
        return tf.reshape(self._rule.join(sums) if self._rule else sums[0], self._shape)


class Products(Contribution):
    """Gradients that are matrix products sum_t a_t g_t^T, never formed (docs/algorithm.md, section 4).

    Their norms come from inner products of all pairs of positions, their weighted sum from one large product.

    Args:
      shape: of the variable.
      rule: of the operation.
      matrices: (a, g), [rows, groups, positions, inputs or outputs].
      terms: local corrections.
    """

    def __init__(
        self,
        shape: Sequence[int],
        rule: MatrixRule,
        matrices: tuple[tf.Tensor, tf.Tensor],
        terms: Sequence[BoundTerm] = (),
    ) -> None:
        self._shape = shape
        self._rule = rule
        self._a, self._g = matrices
        # The correction is the sum of Jacobian times cotangent, both [rows or 1, groups, inputs, outputs].
        self._corrections: list[tuple[tf.Tensor, tf.Tensor]] = []
        for term, *cotangents in terms:
            for jacobian, cotangent in zip((term.d_mean, term.d_variance), cotangents, strict=True):
                pair = [tf.cast(each, self._a.dtype) for each in (jacobian[None], term.spread(cotangent))]
                left, right = (rule.to_matrix(aligned(each, rule.shape)) for each in pair)
                self._corrections.append((left, right))

    def squared_norms(self) -> tf.Tensor:
        """See `Contribution`; never below the true value by more than rounding."""
        size = sum_of_squares(self._a) * sum_of_squares(self._g)
        single = self._rule.positions == 1 and self._rule.groups == 1
        squared = size if single else tf.reduce_sum(_gram(self._a) * _gram(self._g), [1, 2, 3])
        if single and not self._corrections:
            return squared
        scale = tf.sqrt(size)
        for k, (jacobian, cotangent) in enumerate(self._corrections):
            # <K[:, o], J[:, o]> = sum_t g_to (a_t . J[:, o])
            inner = tf.reduce_sum(self._g * tf.matmul(self._a, tf.broadcast_to(jacobian, self._like(jacobian))), 2)
            squared += 2.0 * tf.reduce_sum(inner * cotangent[:, :, 0], [1, 2])
            for other, (jacobian_2, cotangent_2) in enumerate(self._corrections):
                pairs = tf.reduce_sum(jacobian * jacobian_2, 2) * cotangent[:, :, 0] * cotangent_2[:, :, 0]
                squared += tf.reduce_sum(pairs, [1, 2])
                if other == k:
                    scale += tf.sqrt(tf.reduce_sum(pairs, [1, 2]))
        rounding = _UNITS * np.finfo(squared.dtype.as_numpy_dtype).eps
        return tf.where(squared < 0.0, tf.zeros_like(squared), squared) + rounding * tf.square(scale)

    def _like(self, jacobian: tf.Tensor) -> tf.Tensor:
        return tf.concat([tf.shape(self._a)[:1], tf.shape(jacobian)[1:]], 0)

    def weighted_sum(self, weights: tf.Tensor, finite: tf.Tensor | None) -> tf.Tensor:
        """See `Contribution`."""
        weights = tf.cast(weights, tf.float64)
        a, g = (tf.cast(_only(finite, each), tf.float64) for each in (self._a, self._g))
        left, right = (_positions_of_all_rows(t) for t in (a, _times(weights, g)))
        total = tf.matmul(left, right, transpose_a=True)[None]
        for jacobian, cotangent in self._corrections:
            total += tf.cast(jacobian, tf.float64) * weighted_sum(weights, _only(finite, cotangent))[None]
        return tf.reshape(self._rule.from_matrix(total), self._shape)


class Lookups(Contribution):
    """Gradients of a table, as the few entries that each example touches.

    Args:
      rule: of the look-up.
      ids: int [rows, ids].
      values: [rows, ids, entry size]; for each entry all but one of an example's values are zero.
    """

    def __init__(self, rule: LookupRule, ids: tf.Tensor, values: tf.Tensor) -> None:
        self._rule = rule
        self._ids = ids
        self._values = values

    def squared_norms(self) -> tf.Tensor:
        """See `Contribution`."""
        return sum_of_squares(self._values)

    def weighted_sum(self, weights: tf.Tensor, finite: tf.Tensor | None) -> tf.Tensor:
        """See `Contribution`."""
        return self._rule.scatter(self._ids, tf.cast(_times(weights, _only(finite, self._values)), tf.float64))


def aligned(tensor: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
    """Gives [rows, ...] axes of one until its rank is that of [rows, *shape]."""
    missing = len(shape) + 1 - tensor.shape.rank
    return tf.reshape(tensor, tf.concat([tf.shape(tensor)[:1], [1] * missing, tensor.shape[1:]], 0))


def _only(finite: tf.Tensor | None, values: tf.Tensor) -> tf.Tensor:
    """Replaces rows that are not finite by zeros: a weight of 0 does not silence a NaN."""
    return values if finite is None else tf.where(by_row(finite, values), values, tf.zeros_like(values))


def _times(weights: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    return tf.cast(by_row(weights, values), values.dtype) * values


def _gram(values: tf.Tensor) -> tf.Tensor:
    return tf.matmul(values, values, transpose_b=True)


def _positions_of_all_rows(values: tf.Tensor) -> tf.Tensor:
    """Arranges [rows, groups, positions, n] as [groups, rows * positions, n]."""
    groups, size = values.shape[1], values.shape[3]
    swapped = tf.transpose(values, [1, 0, 2, 3]) if groups > 1 else values
    return tf.reshape(swapped, [groups, -1, size])
