"""Table lookups: each example touches a few rows of the table, so that its gradient is kept as those rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import tensorflow as tf

from tf_dpbn.clipping.contributions import BoundTerm, Contribution, Lookups
from tf_dpbn.clipping.rows import reshape_rows, widen
from tf_dpbn.clipping.rules.base import Blocks, Found, Inputs, Rule, Shape


class LookupRule(Rule):
    """z = rows of a table, by ids.

    Args:
      shape: of the table, [entries, ...].
      ids: how many ids one example looks up.
    """

    def __init__(self, shape: Shape, ids: int) -> None:
        super().__init__(shape)
        self._ids = ids

    def contribution(
        self, shape: Shape, inputs: Inputs, cotangent: tf.Tensor, terms: Sequence[BoundTerm], norm_method: str
    ) -> Contribution:
        """See `base.Rule`; no table feeds a normalization, so that there are no terms."""
        del terms, norm_method
        return Lookups(shape, *self._entries(inputs, cotangent))

    def numbers_kept(self, has_terms: bool, norm_method: str) -> int:
        """See `base.Rule`."""
        return 0

    def instantiate(self, inputs: Inputs, cotangent: tf.Tensor) -> Blocks:
        """[rows, *shape]; see `base.Rule`."""
        ids, values = self._entries(inputs, cotangent)
        rows, entries = tf.shape(ids)[0], self.shape[0]
        flat = tf.reshape(tf.cast(ids, tf.int32) + tf.range(rows)[:, None] * entries, [-1])
        summed = tf.math.unsorted_segment_sum(tf.reshape(values, [-1, values.shape[-1]]), flat, rows * entries)
        return (reshape_rows(tf.reshape(summed, [rows, -1]), self.shape),)

    def _entries(self, inputs: Inputs, cotangent: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Every example's gradient as distinct table entries: the ids, and their gradients.

        An id that an example looks up several times has its whole gradient at the first of them and zero at the others.
        Ids outside the table are looked up nowhere: gradient zero.

        Returns:
          (int [rows, ids], all inside the table; float [rows, ids, entry size]).
        """
        ids = reshape_rows(inputs[0], [self._ids])
        values = reshape_rows(widen(cotangent), [self._ids, math.prod(self.shape[1:])])
        inside = tf.logical_and(ids >= 0, ids < self.shape[0])
        same = tf.logical_and(ids[:, :, None] == ids[:, None, :], inside[:, None, :])
        positions = tf.range(self._ids)
        earlier = tf.reduce_any(tf.logical_and(same, positions[:, None] > positions), -1)
        first = tf.logical_and(inside, tf.logical_not(earlier))
        summed = tf.matmul(tf.cast(same, values.dtype), values)
        return tf.where(inside, ids, tf.zeros_like(ids)), tf.where(first[..., None], summed, tf.zeros_like(summed))


def from_gather(operation: tf.Operation, position: int, shape: tf.TensorShape) -> Found:
    """The rule for GatherV2 on the first axis of a table."""
    table, ids, axis = operation.inputs
    if position != 0 or operation.get_attr("batch_dims") or tf.get_static_value(axis) != 0:
        return None
    return _lookup(table.shape, ids)


def from_resource_gather(operation: tf.Operation, position: int, shape: tf.TensorShape) -> Found:
    """The rule for ResourceGather, which looks up in the variable itself."""
    return None if operation.get_attr("batch_dims") else _lookup(shape, operation.inputs[1])


def _lookup(table: tf.TensorShape, ids: tf.Tensor) -> Found:
    if not ids.shape.is_fully_defined():
        return None
    return LookupRule(table.as_list(), ids.shape.num_elements()), (ids,)
