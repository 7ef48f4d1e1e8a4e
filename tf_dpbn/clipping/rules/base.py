"""What every rule of the book-keeping engine provides."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence

import tensorflow as tf

from tf_dpbn.clipping.contributions import BoundTerm, Contribution, Kept, Products, corrected, factors
from tf_dpbn.clipping.rows import reshape_rows

Shape = Sequence[int]
Inputs = Sequence[tf.Tensor]
Blocks = tuple[tf.Tensor, ...]
NORM_METHODS = ("auto", "instantiate", "gram")
# How many multiplications take as long as moving one number to memory and back, about (measured on CPUs).
_OPERATIONS_PER_NUMBER = 40


class Rule(abc.ABC):
    """Per-example gradients of one operation with respect to an operand that has a variable's elements.

    A rule may keep gradients as blocks: tensors [rows, ...] that together hold each element of the operand's gradient
    once, in whatever order its computation yields. What must see the operand's own order converts.

    Args:
      shape: of the operand.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = tuple(shape)

    @abc.abstractmethod
    def instantiate(self, inputs: Inputs, cotangent: tf.Tensor) -> Blocks:
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

    @property
    def is_whole(self) -> bool:
        """Whether there is one block, the operand itself."""
        return type(self).join is Rule.join

    def contribution(
        self, shape: Shape, inputs: Inputs, cotangent: tf.Tensor, terms: Sequence[BoundTerm], norm_method: str
    ) -> Contribution:
        """What a variable that the operation alone uses adds to every example's vector.

        Args:
          shape: of the variable.
          inputs, cotangent: as for `instantiate`.
          terms: the variable's local corrections.
          norm_method: one of NORM_METHODS, where the rule has a choice.
        """
        del norm_method
        blocks = corrected(self.instantiate(inputs, cotangent), terms, self.shape, self.split)
        return Kept(shape, blocks, None if self.is_whole else self.join)

    def numbers_kept(self, has_terms: bool, norm_method: str) -> int:
        """How many numbers an example's contribution holds beside the operation's inputs and cotangent."""
        del has_terms, norm_method
        return math.prod(self.shape)


Found = tuple[Rule, tuple[tf.Tensor, ...]] | None


class PartRule(Rule):
    """A use of one of the equal parts into which a variable is split or unstacked.

    Args:
      rule: of the part.
      shape: of the whole.
      axis, position, parts: along which axis it is divided, which part it is, and of how many.
    """

    def __init__(self, rule: Rule, shape: Shape, axis: int, position: int, parts: int) -> None:
        super().__init__(shape)
        self._rule = rule
        self._axis, self._position, self._parts = axis % len(self.shape), position, parts

    def instantiate(self, inputs: Inputs, cotangent: tf.Tensor) -> Blocks:
        """[rows, *shape]; see `Rule`."""
        part = list(self.shape)
        size = part[self._axis] = part[self._axis] // self._parts
        paddings = [[0, 0] for _ in range(len(part) + 1)]
        paddings[self._axis + 1] = [size * self._position, size * (self._parts - self._position - 1)]
        gradient = self._rule.join(self._rule.instantiate(inputs, cotangent))
        return (tf.pad(reshape_rows(gradient, part), paddings),)


class MatrixRule(Rule):
    """A rule for an operation that is a matrix product: gradient = sum over positions t of a_t g_t^T.

    Args:
      shape: of the operand.
      groups: how many independent products there are.
      positions, inputs, outputs: the number of positions, and the lengths of a_t and g_t.
      outputs_are_channels: whether (group, output) enumerates the channels of the operation's result.
    """

    def __init__(
        self, shape: Shape, groups: int, positions: int, inputs: int, outputs: int, outputs_are_channels: bool
    ) -> None:
        super().__init__(shape)
        self.groups, self.positions, self.inputs, self.outputs = groups, positions, inputs, outputs
        self.outputs_are_channels = outputs_are_channels

    @abc.abstractmethod
    def matrices(self, inputs: Inputs, cotangent: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """(a, g) as [rows, groups, positions, inputs] and [rows, groups, positions, outputs]."""

    @abc.abstractmethod
    def to_matrix(self, operand: tf.Tensor) -> tf.Tensor:
        """Arranges [rows, *shape] as [rows, groups, inputs, outputs]; axes of size one are kept."""

    @abc.abstractmethod
    def from_matrix(self, matrix: tf.Tensor) -> tf.Tensor:
        """The inverse of `to_matrix`."""

    def contribution(
        self, shape: Shape, inputs: Inputs, cotangent: tf.Tensor, terms: Sequence[BoundTerm], norm_method: str
    ) -> Contribution:
        """See `Rule`; gradients are formed where that is cheaper, and in float64, which has no wider type for norms."""
        if cotangent.dtype == tf.float64 or not self._prefers_products(bool(terms), norm_method):
            return super().contribution(shape, inputs, cotangent, terms, norm_method)
        a, g = self.matrices(inputs, cotangent)
        pairs = factors(terms, self.shape, a.dtype)
        corrections = [(self.to_matrix(jacobian), self.to_matrix(c)) for jacobian, c in pairs]
        left, right = [a], [g]
        for k in reversed(range(len(terms))):
            if terms[k][0].alike:  # pbar (x) c_mu is one more position
                jacobian, c = corrections.pop(2 * k)
                row = tf.reshape(jacobian[..., 0], [1, self.groups, 1, self.inputs])
                rows = tf.shape(a)[0] if a.shape[0] is None else a.shape[0]
                left.append(tf.broadcast_to(row, [rows, *row.shape[1:]]))
                right.append(c)
        if len(left) > 1:
            a, g = tf.concat(left, 2), tf.concat(right, 2)
        return Products(shape, (a, g), corrections, self.from_matrix)

    def numbers_kept(self, has_terms: bool, norm_method: str) -> int:
        """See `Rule`."""
        return 0 if self._prefers_products(has_terms, norm_method) else super().numbers_kept(has_terms, norm_method)

    def _prefers_products(self, has_terms: bool, norm_method: str) -> bool:
        """Whether norms are cheaper from inner products than from gradients."""
        if has_terms and not self.outputs_are_channels:
            return False
        if norm_method != "auto":
            return norm_method == "gram"
        if self.positions == 1 and self.groups == 1:
            return True
        multiplications = self.positions**2 * (self.inputs + self.outputs)
        moved = self.positions * self.inputs - self.inputs * self.outputs
        return multiplications + _OPERATIONS_PER_NUMBER * moved < 0
