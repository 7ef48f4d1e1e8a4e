"""Rules of the book-keeping engine: per-example gradients of one kind of operation, from its input and output gradient.

A rule is chosen by the exact type of the operation that consumes a variable. Whatever has no rule here, or a form that
its rule does not cover, is left to the generic differentiation: the registry fails closed.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from tf_dpbn.clipping.rules import convolution, einsum, elementwise, embedding, matmul
from tf_dpbn.clipping.rules.base import Found

__all__ = ["find_rule"]

# Operation type -> (operation, position of the variable among its inputs, shape of the variable) -> (rule, data), or
# None for a form that is not covered.
_FACTORIES: dict[str, Callable[[tf.Operation, int, tf.TensorShape], Found]] = {
    "MatMul": matmul.from_operation,
    "BatchMatMulV2": matmul.from_operation,
    "Einsum": einsum.from_operation,
    "Conv2D": convolution.from_operation,
    "Conv3D": convolution.from_operation,
    "DepthwiseConv2dNative": convolution.from_operation,
    "Conv2DBackpropInput": convolution.from_operation,
    "Conv3DBackpropInputV2": convolution.from_operation,
    "GatherV2": embedding.from_gather,
    "ResourceGather": embedding.from_resource_gather,
    "BiasAdd": elementwise.from_bias_add,
    "AddV2": elementwise.from_broadcast,
    "Mul": elementwise.from_broadcast,
}


def find_rule(operation: tf.Operation, position: int, shape: tf.TensorShape) -> Found:
    """Chooses the rule for one use of a variable.

    Args:
      operation: consumes the variable, in the graph of one example's forward pass.
      position: which of the operation's inputs the variable is.
      shape: of the variable.

    Returns:
      (the rule, the tensors of the forward pass that it needs), or None if there is no rule for this form.
    """
    factory = _FACTORIES.get(operation.type)
    return None if factory is None else factory(operation, position, shape)
