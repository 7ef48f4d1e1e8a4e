"""What every rule of the book-keeping engine provides, and the parts they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import tensorflow as tf

Blocks = tuple[tf.Tensor, ...]


class Rule(Protocol):
    """Per-example gradients of one operation with respect to an operand that has a variable's elements.

    A rule may keep gradients as blocks: tensors [rows, ...] that together hold each element of the operand's gradient
    once, in whatever order its computation yields. All that must see the operand's own order converts.

    Attributes:
      shape: of the operand.
    """

    shape: tuple[int, ...]

    def instantiate(self, inputs: Sequence[tf.Tensor], cotangent: tf.Tensor) -> Blocks:
        """Every example's gradient.

        Args:
          inputs: the operation's data, each [rows, ...].
          cotangent: [rows, ...], derivative of each example's loss by the operation's output.

        Returns:
          Blocks, float32 (or float64 if the data is).
        """

    def split(self, operand: tf.Tensor) -> Blocks:
        """Arranges [rows, *shape] as blocks; axes of size one, to be broadcast over, are kept."""

    def join(self, blocks: Blocks) -> tf.Tensor:
        """The inverse of `split`: [rows, *shape]."""


class MatrixRule(Rule, Protocol):
    """A rule for an operation that is a matrix product: gradient = sum over positions of a_t g_t^T.

    Attributes:
      positions, inputs, outputs: the numbers of t, and the lengths of a_t and g_t.
      groups: how many independent products there are.
      outputs_are_channels: whether (group, output) enumerates the channels of the operation's result.
    """

    outputs_are_channels: bool
    groups: int
    positions: int
    inputs: int
    outputs: int

    def matrices(self, inputs: Sequence[tf.Tensor], cotangent: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """(a, g) as [rows, groups, positions, inputs] and [rows, groups, positions, outputs]."""

    def from_matrix(self, matrix: tf.Tensor) -> tf.Tensor:
        """Arranges [rows, groups, inputs, outputs] as [rows, *shape]."""

    def to_matrix(self, operand: tf.Tensor) -> tf.Tensor:
        """Arranges [rows, *shape] as [rows, groups, inputs, outputs]; axes of size one are kept."""


def widen(tensor: tf.Tensor) -> tf.Tensor:
    """Casts to float32 what is narrower: norms and sums are accumulated in it."""
    return tensor if tensor.dtype == tf.float64 else tf.cast(tensor, tf.float32)


def reshape_rows(tensor: tf.Tensor, shape: Sequence[int], like: tf.Tensor | None = None) -> tf.Tensor:
    """Reshapes a tensor with as many rows as `like` (itself if None) to [rows, *shape]."""
    like = tensor if like is None else like
    rows = like.shape[0]
    return tf.reshape(tensor, [tf.shape(like)[0] if rows is None else rows, *shape])
