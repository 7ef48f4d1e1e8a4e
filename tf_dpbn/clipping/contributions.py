"""One variable's part of every example's vector: its squared norm, and its clipped sum.

Norm and sum must be those of the same vector, or clipping bounds nothing. Where gradients are kept, both read the same
numbers. Where the norm comes from inner products instead, rounding is bounded and added to the norm.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from tf_dpbn import _graph
from tf_dpbn.clipping.rows import by_row, reshape_rows, row_sums, sum_of_squares, weighted_sum
from tf_dpbn.normalization import LocalTerm

# (term, cotangents by mean and variance, [rows, channels] each)
BoundTerm = tuple[LocalTerm, tf.Tensor, tf.Tensor]
Pair = tuple[tf.Tensor, tf.Tensor]
# Where terms cancel, so many units in the last place of the product of the factors' norms are added to a squared norm:
# that bounds how large the terms of a clipped sum are, and what rounding does to it.
_UNITS = 8.0
# At most so many terms of an inner product are added one to the other.
_TERMS = 256


class Contribution(abc.ABC):
    """One variable's part of every example's vector.

    Attributes:
      shape: of the variable.
      operands: the tensors [rows, ...] that the weighted sum reads.
    """

    shape: Sequence[int]
    operands: tuple[tf.Tensor, ...]

    @abc.abstractmethod
    def squared_norms(self) -> tf.Tensor:
        """[rows]; non-finite where a gradient is."""

    @abc.abstractmethod
    def weighted_sum(self, weights: tf.Tensor, operands: Sequence[tf.Tensor]) -> tf.Tensor:
        """Sum over rows of weight times gradient, float64, of the variable's shape.

        Args:
          weights: [rows], zero where a gradient is non-finite.
          operands: `operands`, with zeros in the rows of non-finite gradients.
        """


class Kept(Contribution):
    """Gradients held in memory, as the blocks of a rule or whole.

    Args:
      shape: of the variable.
      blocks: tensors [rows, ...].
      join: makes of blocks, [1, ...], one tensor with the variable's elements in their order; None where one block does
        so as it is.
    """

    def __init__(
        self,
        shape: Sequence[int],
        blocks: Sequence[tf.Tensor],
        join: Callable[[tuple[tf.Tensor, ...]], tf.Tensor] | None = None,
    ) -> None:
        self.shape = shape
        self.operands = tuple(blocks)
        self.is_whole = join is None
        self._join = join or (lambda blocks: blocks[0])

    def squared_norms(self) -> tf.Tensor:
        """See `Contribution`."""
        return tf.add_n([sum_of_squares(block) for block in self.operands])

    def weighted_sum(self, weights: tf.Tensor, operands: Sequence[tf.Tensor]) -> tf.Tensor:
        """See `Contribution`."""
        sums = [weighted_sum(weights, block) for block in operands]
        if not self.is_whole:
            sums = [self._join(tuple(tf.expand_dims(each, 0) for each in sums))]
        return _graph.reshape(sums[0], self.shape)


class Products(Contribution):
    """Gradients that are matrix products sum_t a_t g_t^T, never formed (docs/algorithm.md, section 4).

    Their norms come from inner products of all pairs of positions, their weighted sum from one large product.

    Args:
      shape: of the variable.
      matrices: (a, g), [rows, groups, positions, inputs or outputs].
      corrections: the local correction is the sum of these Jacobians times cotangents, [rows or 1, groups, inputs or 1,
        outputs].
      from_matrix: makes of [1, groups, inputs, outputs] one tensor with the variable's elements in their order.
    """

    def __init__(
        self,
        shape: Sequence[int],
        matrices: Pair,
        corrections: Sequence[Pair],
        from_matrix: Callable[[tf.Tensor], tf.Tensor],
    ) -> None:
        self.shape = shape
        self._a, self._g = matrices
        self._corrections = corrections
        self.operands = (*matrices, *[cotangent for _, cotangent in corrections])
        self._from_matrix = from_matrix

    def squared_norms(self) -> tf.Tensor:
        """See `Contribution`; never below the true value by more than rounding.

        In float64, as the sum, and of nothing wider than float32: gradients are products, which may be large where
        squares of a factor leave float32, and positions may cancel but for less than float32 rounds. Only what is
        multiplied by Jacobians, which takes most of the time, is float32, and the most that this can cost is added.
        """
        a, g = (tf.cast(each, tf.float64) for each in (self._a, self._g))
        corrections = [(jacobian, tf.cast(cotangent, tf.float64)) for jacobian, cotangent in self._corrections]
        of_g = sum_of_squares(g)
        size = sum_of_squares(a) * of_g
        single = a.shape[1] == a.shape[2] == 1
        squared = size if single else row_sums(_gram(a) * _gram(g))
        if single and not corrections:
            return squared
        scale = tf.sqrt(size)
        for k, (jacobian, cotangent) in enumerate(corrections):
            # <K[:, o], J[:, o]> = sum_t g_to (a_t . J[:, o])
            squared += 2.0 * tf.reduce_sum(g * _times(self._a, jacobian) * cotangent, [1, 2, 3])
            for other, (jacobian_2, cotangent_2) in enumerate(corrections):
                pairs = _by_column(jacobian, jacobian_2) * cotangent * cotangent_2
                squared += tf.reduce_sum(pairs, [1, 2, 3])
                if other == k:
                    of_correction = tf.sqrt(tf.reduce_sum(pairs, [1, 2, 3]))
                    of_c = sum_of_squares(cotangent)
                    # An inner product of n terms is off by at most n units of the product of norms (Cauchy, Schwarz),
                    # and by n times the smallest number, below which products vanish.
                    units = _longest_sum(a.shape[3]) * np.finfo(jacobian.dtype.as_numpy_dtype).eps
                    squared += units * (tf.sqrt(size) + len(corrections) * of_correction) * of_correction
                    vanished = 4.0 * len(corrections) * a.shape[3] * np.finfo(np.float32).tiny
                    squared += vanished * (tf.sqrt(a.shape[2] * of_g * of_c) + of_c)
                    scale += of_correction
        rounding = _UNITS * np.finfo(self._a.dtype.as_numpy_dtype).eps
        # What is negative is so by rounding, or by products that left float32: then it must stay infinite.
        return tf.abs(squared) + rounding * tf.square(scale)

    def weighted_sum(self, weights: tf.Tensor, operands: Sequence[tf.Tensor]) -> tf.Tensor:
        """See `Contribution`."""
        weights = tf.cast(weights, tf.float64)
        a, g = (tf.cast(each, tf.float64) for each in operands[:2])
        left, right = (_positions_of_all_rows(t) for t in (a, by_row(weights, g) * g))
        total = tf.matmul(left, right, transpose_a=True)
        for (jacobian, _), cotangent in zip(self._corrections, operands[2:], strict=True):
            total += tf.cast(tf.squeeze(jacobian, 0), tf.float64) * weighted_sum(weights, cotangent)
        return _graph.reshape(self._from_matrix(tf.expand_dims(total, 0)), self.shape)


class Lookups(Contribution):
    """Gradients of a table, as the few entries that each example touches.

    Args:
      shape: of the table.
      ids: int [rows, ids], all inside the table.
      values: [rows, ids, entry size]; for each entry all but one of an example's values are zero.
    """

    def __init__(self, shape: Sequence[int], ids: tf.Tensor, values: tf.Tensor) -> None:
        self.shape = shape
        self._ids = ids
        self.operands = (values,)

    def squared_norms(self) -> tf.Tensor:
        """See `Contribution`."""
        return sum_of_squares(self.operands[0])

    def weighted_sum(self, weights: tf.Tensor, operands: Sequence[tf.Tensor]) -> tf.Tensor:
        """See `Contribution`."""
        (values,) = operands
        weighted = tf.cast(tf.cast(by_row(weights, values), values.dtype) * values, tf.float64)
        entries = tf.reshape(weighted, [-1, values.shape[-1]])
        summed = tf.math.unsorted_segment_sum(entries, tf.reshape(self._ids, [-1]), self.shape[0])
        return tf.reshape(summed, self.shape)


def merged(contributions: Sequence[Contribution]) -> tuple[list[int], Contribution | None]:
    """Puts the parts of small variables, which are many, side by side.

    Returns:
      (the positions of what is put together, the part that they make; None where there are not several).
    """

    def is_small(each: Contribution) -> bool:
        is_whole = isinstance(each, Kept) and each.is_whole and each.operands[0].dtype == tf.float32
        return is_whole and math.prod(each.shape) <= _graph.SMALL

    small = [i for i, each in enumerate(contributions) if is_small(each)]
    if len(small) < 2:
        return [], None
    flat = [reshape_rows(contributions[i].operands[0], [math.prod(contributions[i].shape)]) for i in small]
    return small, Kept([sum(each.shape[1] for each in flat)], [tf.concat(flat, 1)])


def corrected(
    blocks: Sequence[tf.Tensor],
    terms: Sequence[BoundTerm],
    shape: Sequence[int],
    split: Callable[[tf.Tensor], tuple[tf.Tensor, ...]] = lambda operand: (operand,),
) -> Sequence[tf.Tensor]:
    """Adds local terms to gradients: K_i' = K_i + pbar (x) c_mu_i + V * c_v_i (docs/algorithm.md, section 3a).

    Args:
      blocks: tensors [rows, ...].
      terms: of the variable.
      shape: of the gradients as a whole.
      split: arranges [rows or 1, *shape] as blocks, axes of size one kept.
    """
    parts = [[block] for block in blocks]
    for pair in factors(terms, shape, blocks[0].dtype):
        for part, jacobian, cotangent in zip(parts, *map(split, pair), strict=True):
            part.append(jacobian * cotangent)
    return [tf.add_n(part) for part in parts]  # at once: each addition of its own reads and writes all of them


def factors(terms: Sequence[BoundTerm], shape: Sequence[int], dtype: tf.DType) -> list[Pair]:
    """Pairs whose products add up to the local correction: Jacobian and cotangent, [rows or 1, *shape or ones]."""

    def aligned(tensor: tf.Tensor, inner: Sequence[int], rows: int | None) -> tf.Tensor:
        """Gives a tensor axes of one until its rank is that of [rows, *shape]."""
        return reshape_rows(tf.cast(tensor, dtype), [*[1] * (len(shape) - len(inner)), *inner], tensor, rows)

    return [
        (aligned(jacobian, jacobian.shape, 1), aligned(cotangent, term.spread_shape, None))
        for term, *cotangents in terms
        for jacobian, cotangent in zip((term.d_mean, term.d_variance), cotangents, strict=True)
    ]


def _times(a: tf.Tensor, jacobian: tf.Tensor) -> tf.Tensor:
    """a_t . J[:, o], float64 [rows, groups, positions, outputs]: in each group one product for all rows."""
    groups, positions, inputs = a.shape[1:]
    blocks = _blocks(inputs)
    left, right = _positions_of_all_rows(a), tf.squeeze(jacobian, 0)
    if blocks > 1:
        left = tf.transpose(tf.reshape(left, [groups, -1, blocks, inputs // blocks]), [0, 2, 1, 3])
        right = tf.reshape(right, [groups, blocks, inputs // blocks, right.shape[2]])
        product = tf.reduce_sum(tf.matmul(left, right), 1)
    else:
        product = tf.matmul(left, right)
    if groups == 1:
        product = reshape_rows(product, [1, positions, product.shape[2]], a)
    else:
        product = tf.transpose(tf.reshape(product, [groups, -1, positions, product.shape[2]]), [1, 0, 2, 3])
    return tf.cast(product, tf.float64)


def _by_column(jacobian: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
    """J[:, o] . J'[:, o], float64 [1, groups, 1, outputs]."""
    _, groups, inputs, outputs = jacobian.shape
    products = tf.reshape(jacobian * other, [groups, _blocks(inputs), -1, outputs])
    return tf.reduce_sum(tf.cast(tf.reduce_sum(products, 2), tf.float64), 1)[None, :, None]


def _blocks(inputs: int) -> int:
    """Into how many equal parts an inner product is divided; one if that takes many more than necessary."""
    fewest = -(-inputs // _TERMS)
    return next((blocks for blocks in range(fewest, 4 * fewest) if inputs % blocks == 0), 1)


def _longest_sum(inputs: int) -> int:
    """How many roundings a term of an inner product goes through, at most."""
    return inputs // _blocks(inputs) + _blocks(inputs) + 1


def _gram(values: tf.Tensor) -> tf.Tensor:
    return tf.matmul(values, values, transpose_b=True)


def _positions_of_all_rows(values: tf.Tensor) -> tf.Tensor:
    """Arranges [rows, groups, positions, n] as [groups, rows * positions, n]."""
    groups, size = values.shape[1], values.shape[3]
    swapped = tf.transpose(values, [1, 0, 2, 3]) if groups > 1 else values
    return tf.reshape(swapped, [groups, -1, size])
