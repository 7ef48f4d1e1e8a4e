"""Scales and biases: a variable that is broadcast against data, added or multiplied."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from tf_dpbn.clipping.rows import reshape_rows, widen
from tf_dpbn.clipping.rules.base import Blocks, Found, Inputs, Rule, Shape


class BroadcastRule(Rule):
    """z = a + K or z = a * K, K broadcast to z.

    Args:
      shape: of K.
      aligned: the shape of K with axes of one inserted, of the rank of one example's z.
      scale: whether K is multiplied.
    """

    def __init__(self, shape: Shape, aligned: Sequence[int], scale: bool) -> None:
        super().__init__(shape)
        self._aligned = tuple(aligned)
        self._scale = scale

    def instantiate(self, inputs: Inputs, cotangent: tf.Tensor) -> Blocks:
        """[rows, *shape]; see `base.Rule`."""
        products = widen(cotangent) * widen(inputs[0]) if self._scale else widen(cotangent)
        axes = [1 + axis for axis, size in enumerate(self._aligned) if size == 1]
        return (reshape_rows(tf.reduce_sum(products, axes), self.shape),)


def from_bias_add(operation: tf.Operation, position: int, shape: tf.TensorShape) -> Found:
    """The rule for BiasAdd."""
    rank = operation.outputs[0].shape.rank
    if position != 1 or rank is None:
        return None
    size = operation.inputs[1].shape[0]
    aligned = [1] * rank
    aligned[1 if operation.get_attr("data_format") == b"NCHW" else -1] = size
    return BroadcastRule([size], aligned, scale=False), ()


def from_broadcast(operation: tf.Operation, position: int, shape: tf.TensorShape) -> Found:
    """The rule for AddV2 and Mul."""
    parameter, data = operation.inputs[position], operation.inputs[1 - position]
    out = operation.outputs[0].shape
    if not out.is_fully_defined() or parameter is data or data.shape.rank != out.rank:
        return None
    if any(size not in (1, whole) for size, whole in zip(data.shape, out, strict=True)):
        return None
    size = parameter.shape.as_list()
    aligned = [1] * (out.rank - len(size)) + size
    scale = operation.type == "Mul"
    return BroadcastRule(size, aligned, scale), (data,) if scale else ()
