"""Tensors whose first axis are the rows of a batch, and gradients as such."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tf_dpbn import _graph
from tf_dpbn._devices import has_accelerator
from tf_dpbn.normalization.moments import widen

# Into how many groups of rows, at most, a sum is divided on CPUs.
_GROUPS = 8
# From how many values on a sum is compiled: compiling takes a tenth of a second for each shape.
_MANY = 2**20
# The squares of a row are added up in blocks of at most so many numbers, and those in float64.
_BLOCK = 256


def densify(gradient: Any, like: tf.Tensor) -> tf.Tensor:
    """Turns the sparse gradient of a table lookup into a tensor; lookups outside the table count for nothing.

    TensorFlow's own conversion, once vectorized, adds row * table size to the ids, so that under XLA, which does not
    check ids, an id outside the table would land in the next example's gradient.
    """
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    inside = tf.logical_and(gradient.indices >= 0, gradient.indices < like.shape[0])
    indices = tf.where(inside, gradient.indices, tf.zeros_like(gradient.indices))
    values = tf.where(by_row(inside, gradient.values), gradient.values, tf.zeros_like(gradient.values))
    return tf.scatter_nd(indices[:, None], values, like.shape)


def by_row(vector: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """Reshapes [rows] so that it broadcasts against `like`, [rows, ...]."""
    return reshape_rows(vector, [1] * (like.shape.rank - 1))


def finite_only(finite: tf.Tensor | None, values: tf.Tensor) -> tf.Tensor:
    """Replaces rows that are not `finite`, bool [rows, ones or nothing], by zeros: a weight of 0 silences no NaN."""
    return values if finite is None else tf.where(by_row(finite, values), values, tf.zeros([], values.dtype))


def unscaled(gradient: tf.Tensor, loss_scale: float) -> tf.Tensor:
    """The gradient, float32 or wider, of a loss that was multiplied by `loss_scale`."""
    wide = widen(gradient)
    return wide if loss_scale == 1.0 else wide / loss_scale


def weighted_sum(weights: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """Sum over rows of weight times value, in float64, whose rounding no batch is large enough to make visible.

    Args:
      weights: [rows].
      values: [rows, ...].
    """
    if has_accelerator():
        # XLA makes one pass over the values of it; products of float64 matrices are slow on most accelerators.
        return tf.reduce_sum(tf.cast(tf.cast(by_row(weights, values), values.dtype) * values, tf.float64), 0)
    if values.shape.is_fully_defined() and values.shape.num_elements() >= _MANY:
        return _in_one_pass(weights, values)
    rows, *shape = values.shape if values.shape.is_fully_defined() else tf.unstack(tf.shape(values))
    # In groups: TensorFlow works on a single product of a vector by a matrix in one thread.
    groups = math.gcd(rows, _GROUPS) if isinstance(rows, int) else 1
    left = tf.reshape(tf.cast(weights, tf.float64), [groups, 1, -1])
    right = tf.reshape(tf.cast(values, tf.float64), [groups, rows // groups, -1])
    return tf.reshape(tf.reduce_sum(tf.matmul(left, right), [0, 1]), shape)


def sum_of_squares(values: tf.Tensor) -> tf.Tensor:
    """[rows] squares of all that a row holds; of long rows in float64 over blocks.

    XLA adds up a row on CPUs one number after the other: of 10^7 equal ones float32 lost 1.4e-4 of the sum.
    """
    squares, size = tf.square(values), values.shape[1:].num_elements()
    if size is None or size <= _BLOCK or values.dtype == tf.float64:
        return tf.reduce_sum(squares, list(range(1, values.shape.rank)))
    return row_sums(squares)


def row_sums(values: tf.Tensor) -> tf.Tensor:
    """[rows] sums of all that a row holds, in float64 over blocks."""
    size = values.shape[1:].num_elements()
    block = math.gcd(size, _BLOCK) if size else 1
    blocks = tf.reduce_sum(tf.reshape(values, [-1, (size or 0) // block, block]), 2) if size else values
    wide = tf.reduce_sum(tf.cast(blocks, tf.float64), list(range(1, blocks.shape.rank)))
    return tf.cast(wide, values.dtype)


@tf.function(jit_compile=True, autograph=False, reduce_retracing=False)
def _in_one_pass(weights: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """The weighted sum, compiled by XLA: without it large values would be read and written in float64 as well."""
    return tf.reduce_sum(tf.cast(by_row(weights, values), tf.float64) * tf.cast(values, tf.float64), 0)


def window_of(tensor: tf.Tensor, window: Sequence[slice]) -> tf.Tensor:
    """The leading axes cut to slices, the others whole.

    Every axis is named: TensorFlow's layout optimizer for GPUs moves the channels of images and crashes where a slice
    says nothing of some axes (2.21).
    """
    return tensor[tuple(window) + (slice(None),) * (tensor.shape.rank - len(window))]


def reshape_rows(
    tensor: tf.Tensor, shape: Sequence[int], like: tf.Tensor | None = None, rows: int | None = None
) -> tf.Tensor:
    """Reshapes a tensor to [rows, *shape], with as many rows as `like` (itself if None) where `rows` does not say."""
    like = tensor if like is None else like
    rows = like.shape[0] if rows is None else rows
    return _graph.reshape(tensor, [tf.shape(like)[0] if rows is None else rows, *shape])
