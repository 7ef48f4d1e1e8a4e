"""What every rule of the book-keeping engine provides."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import tensorflow as tf

Blocks = tuple[tf.Tensor, ...]


class Rule(abc.ABC):
    """Per-example gradients of one operation with respect to an operand that has a variable's elements.

    A rule may keep gradients as blocks: tensors [rows, ...] that together hold each element of the operand's gradient
    once, in whatever order its computation yields. What must see the operand's own order converts.

    Args:
      shape: of the operand.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)

    @abc.abstractmethod
    def instantiate(self, inputs: Sequence[tf.Tensor], cotangent: tf.Tensor) -> Blocks:
        """Every example's gradient.

        Args:
          inputs: the operation's data, each [rows, ...].
          cotangent: [rows, ...], derivative of each example's loss by the operation's output.

        Returns:
          Blocks, float32 (float64 if the data is).
        """

    def split(self, operand: tf.Tensor) -> Blocks:
        """Arranges [rows, *shape] as blocks; axes of size one, to be broadcast over, are kept."""
        return (operand,)

    def join(self, blocks: Blocks) -> tf.Tensor:
        """The inverse of `split`: [rows, *shape]."""
        return blocks[0]


class MatrixRule(Rule):
    """A rule for an operation that is a matrix product: gradient = sum over positions t of a_t g_t^T.

    Args:
      shape: of the operand.
      groups: how many independent products there are.
      positions, inputs, outputs: the number of positions, and the lengths of a_t and g_t.
      outputs_are_channels: whether (group, output) enumerates the channels of the operation's result.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        groups: int,
        positions: int,
        inputs: int,
        outputs: int,
        outputs_are_channels: bool,
    ) -> None:
        super().__init__(shape)
        self.groups = groups
        self.positions = positions
        self.inputs = inputs
        self.outputs = outputs
        self.outputs_are_channels = outputs_are_channels

    @abc.abstractmethod
    def matrices(self, inputs: Sequence[tf.Tensor], cotangent: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """(a, g) as [rows, groups, positions, inputs] and [rows, groups, positions, outputs]."""

    @abc.abstractmethod
    def to_matrix(self, operand: tf.Tensor) -> tf.Tensor:
        """Arranges [rows, *shape] as [rows, groups, inputs, outputs]; axes of size one are kept."""

    @abc.abstractmethod
    def from_matrix(self, matrix: tf.Tensor) -> tf.Tensor:
        """The inverse of `to_matrix`."""
