"""Sums of products in index notation: EinsumDense, and attention through it."""

from __future__ import annotations

import string
from collections.abc import Sequence

import tensorflow as tf

from tf_dpbn.clipping.rows import widen
from tf_dpbn.clipping.rules.base import Blocks, Found, Inputs, Rule, Shape


class EinsumRule(Rule):
    """z = einsum(equation, a, K) or einsum(equation, K, a).

    Args:
      shape: of K.
      data, output, kernel: the labels of a, z and K, one letter an axis.
    """

    def __init__(self, shape: Shape, data: str, output: str, kernel: str) -> None:
        super().__init__(shape)
        row = next(letter for letter in string.ascii_letters if letter not in data + output + kernel)
        self._gradient = f"{row}{data},{row}{output}->{row}{kernel}"

    def instantiate(self, inputs: Inputs, cotangent: tf.Tensor) -> Blocks:
        """[rows, *shape]; see `base.Rule`."""
        return (tf.einsum(self._gradient, widen(inputs[0]), widen(cotangent)),)


def from_operation(operation: tf.Operation, position: int, shape: tf.TensorShape) -> Found:
    """The rule for Einsum of two operands, in which no label of the variable occurs only there."""
    if len(operation.inputs) != 2:
        return None
    terms, output = operation.get_attr("equation").decode().split("->")
    labels = terms.split(",")
    tensors = [*operation.inputs, operation.outputs[0]]
    named = _without_ellipsis([*labels, output], tensors)
    if named is None or any(len(set(each)) != len(each) for each in named):
        return None
    data, kernel, output = named[1 - position], named[position], named[2]
    if set(kernel) - set(data + output) or set(data) - set(kernel + output):
        return None
    operand = operation.inputs[position]
    return EinsumRule(operand.shape.as_list(), data, output, kernel), (operation.inputs[1 - position],)


def _without_ellipsis(labels: Sequence[str], tensors: Sequence[tf.Tensor]) -> list[str] | None:
    """Gives the axes of an ellipsis letters of their own, aligned from the right; None where they are broadcast."""
    free = [letter for letter in string.ascii_uppercase if letter not in "".join(labels)]
    named, shapes = [], set()
    for label, tensor in zip(labels, tensors, strict=True):
        if "..." in label:
            number = tensor.shape.rank - len(label) + 3
            start = label.index("...")
            shapes.add(tuple(tensor.shape[start : start + number]))
            label = label.replace("...", "".join(free[:number]))
        named.append(label)
    return named if len(shapes) <= 1 else None
