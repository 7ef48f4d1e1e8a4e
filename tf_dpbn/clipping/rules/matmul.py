"""Dense layers: data @ kernel, for data of any rank."""

from __future__ import annotations

import math
from collections.abc import Sequence

import tensorflow as tf

from tf_dpbn.clipping.rows import reshape_rows, widen
from tf_dpbn.clipping.rules.base import Blocks, Found, Inputs, MatrixRule, Rule, Shape


class MatMulRule(MatrixRule):
    """z = a K, or z = a K^T, for a matrix K; the leading axes of a are positions.

    Args:
      shape: of K.
      positions: product of the leading axes of one example's a.
      transposed: whether K enters transposed.
      transposed_data: whether a matrix a enters transposed.
    """

    def __init__(self, shape: Shape, positions: int, transposed: bool, transposed_data: bool) -> None:
        inputs, outputs = reversed(shape) if transposed else shape
        super().__init__(shape, 1, positions, inputs, outputs, outputs_are_channels=True)
        self._transposed = transposed
        self._transposed_data = transposed_data

    def _operands(self, inputs: Inputs, cotangent: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        data = widen(inputs[0])
        if self._transposed_data:
            data = tf.linalg.matrix_transpose(data)
        data = reshape_rows(data, [self.positions, self.inputs])
        return data, reshape_rows(widen(cotangent), [self.positions, self.outputs])

    def instantiate(self, inputs: Inputs, cotangent: tf.Tensor) -> Blocks:
        """[rows, *shape]; see `base.Rule`."""
        data, cotangent = self._operands(inputs, cotangent)
        left, right = (cotangent, data) if self._transposed else (data, cotangent)
        return (tf.matmul(left, right, transpose_a=True),)

    def matrices(self, inputs: Inputs, cotangent: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """See `base.MatrixRule`."""
        data, cotangent = self._operands(inputs, cotangent)
        return data[:, None], cotangent[:, None]

    def from_matrix(self, matrix: tf.Tensor) -> tf.Tensor:
        """See `base.MatrixRule`."""
        operand = tf.squeeze(matrix, 1)
        return tf.linalg.matrix_transpose(operand) if self._transposed else operand

    def to_matrix(self, operand: tf.Tensor) -> tf.Tensor:
        """See `base.MatrixRule`."""
        return (tf.linalg.matrix_transpose(operand) if self._transposed else operand)[:, None]


def merged(used: Sequence[tuple[Rule, Inputs, tf.Tensor]]) -> list[tuple[Rule, Inputs, tf.Tensor]]:
    """One product in place of several by the same matrix, as a recurrent layer has at each step in time.

    Args:
      used: (rule, inputs, cotangent) of each use of a variable.
    """
    groups: dict[tuple[Shape, bool], list[tuple[Rule, Inputs, tf.Tensor]]] = {}
    others = []
    for rule, *data in used:
        if isinstance(rule, MatMulRule):
            groups.setdefault((rule.shape, rule._transposed), []).append((rule, *data))
        else:
            others.append((rule, *data))
    for (shape, transposed), group in groups.items():
        operands = [rule._operands(*data) for rule, *data in group]  # type: ignore[attr-defined]
        a, g = (tf.concat(each, 1) for each in zip(*operands, strict=True))
        whole = MatMulRule(shape, a.shape[1], transposed, transposed_data=False)
        others.append((whole, (a,), g) if len(group) > 1 else group[0])
    return others


def from_operation(operation: tf.Operation, position: int, shape: tf.TensorShape) -> Found:
    """The rule for MatMul or BatchMatMulV2 with the variable on the right."""
    if position != 1:
        return None
    data, kernel = operation.inputs
    names = ("transpose_a", "transpose_b") if operation.type == "MatMul" else ("adj_x", "adj_y")
    transposed_data, transposed = (operation.get_attr(name) for name in names)
    if kernel.shape.rank != 2 or not data.shape.is_fully_defined() or (transposed_data and data.shape.rank != 2):
        return None
    axes = data.shape.as_list()
    positions = axes[1] if transposed_data else math.prod(axes[:-1])
    return MatMulRule(kernel.shape.as_list(), positions, transposed, transposed_data), (data,)
