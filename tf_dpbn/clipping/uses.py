"""Where an example's forward pass uses each trainable variable.

Book-keeping needs to know, for each variable, the operations that consume it. They are found in the graph of one
example's forward pass, so that it does not matter which layer, subclass or bare function created them, and how often.
An operation without a rule, or one that sees the variable through anything but a change of shape or type, makes the
variable's gradient be computed directly: slower, never wrong.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

import tensorflow as tf

from tf_dpbn import _graph
from tf_dpbn.clipping.rules import find_rule
from tf_dpbn.clipping.rules.base import Found, PartRule, Rule

# A variable may pass through these on its way to the operation that uses it; its elements keep their order.
_VIEWS = frozenset(["Cast", "ExpandDims", "Identity", "Reshape", "Squeeze"])


@dataclasses.dataclass(frozen=True)
class Use:
    """One operation that consumes a trainable variable, in the forward pass of one example.

    Attributes:
      index: position of the variable among the trainable variables.
      rule: computes per-example gradients of the operation's operand, which has the variable's elements in their order.
      inputs: the operation's data, as the rule wants it.
      output: the operation's result.
    """

    index: int
    rule: Rule
    inputs: tuple[tf.Tensor, ...]
    output: tf.Tensor


FindRule = Callable[[tf.Operation, int, tf.TensorShape], Found]


def find_uses(
    operations: Iterable[tf.Operation], variables: Sequence[tf.Variable], find: FindRule = find_rule
) -> tuple[tuple[Use, ...], tuple[int, ...]]:
    """Finds the uses of each variable among `operations`.

    Args:
      operations: of the current graph, a whole forward pass.
      variables: the trainable variables.
      find: chooses the rule of a use, see `find_rule`.

    Returns:
      (the uses of the variables that only operations with rules use, or none at all; the other variables).
    """
    graph = tf.compat.v1.get_default_graph()
    handles = _graph.captured_variables(graph, variables)
    index = {id(variable): i for i, variable in enumerate(variables)}
    found: dict[int, list[Use | None]] = {i: [] for i in range(len(variables))}
    for operation in operations:
        for position, tensor in enumerate(operation.inputs):
            if id(tensor) in handles:
                i = index[id(handles[id(tensor)])]
                found[i] += _uses_of_handle(operation, position, i, variables[i].shape, find)
    others = tuple(i for i, uses in found.items() if None in uses)
    return tuple(use for i, uses in found.items() if i not in others for use in uses if use is not None), others


def _uses_of_handle(
    operation: tf.Operation, position: int, index: int, shape: tf.TensorShape, find: FindRule
) -> list[Use | None]:
    """The uses of a variable by way of one operation on its handle; None for one without a rule."""
    if operation.type == "ReadVariableOp":
        return _uses_of_value(operation.outputs[0], index, shape, find)
    return [_use(operation, position, index, shape, find)]


def _uses_of_value(value: tf.Tensor, index: int, shape: tf.TensorShape, find: FindRule) -> list[Use | None]:
    uses: list[Use | None] = []
    for consumer in value.consumers():
        positions = [position for position, tensor in enumerate(consumer.inputs) if tensor is value]
        if consumer.type in _VIEWS and positions == [0]:
            uses += _uses_of_value(consumer.outputs[0], index, shape, find)
        elif (consumer.type, positions) in (("Unpack", [0]), ("Split", [1])):
            is_split = consumer.type == "Split"
            axis = int(tf.get_static_value(consumer.inputs[0])) if is_split else consumer.get_attr("axis")
            for k, part in enumerate(consumer.outputs):
                rule = functools.partial(
                    PartRule, shape=value.shape, axis=axis, position=k, parts=len(consumer.outputs)
                )
                of_part = _uses_of_value(part, index, part.shape, find)
                uses += [use and dataclasses.replace(use, rule=rule(use.rule)) for use in of_part]
        elif consumer.type != "StopGradient":
            uses += [_use(consumer, position, index, shape, find) for position in positions]
    return uses


def _use(operation: tf.Operation, position: int, index: int, shape: tf.TensorShape, find: FindRule) -> Use | None:
    found = find(operation, position, shape)
    return None if found is None else Use(index, *found, operation.outputs[0])
