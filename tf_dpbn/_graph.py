"""Reading TensorFlow graphs: what depends on data, what writes to variables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

_READS = frozenset(["ReadVariableOp", "ResourceGather", "ResourceGatherNd", "VariableShape", "VarHandleOp"])


def data_tensors(graph: tf.Graph, sources: Sequence[tf.Tensor]) -> set[int]:
    """Ids of the tensors of `graph` that depend on `sources`, the sources included."""
    found = {id(tensor) for tensor in sources}
    for operation in graph.get_operations():
        if any(id(tensor) in found for tensor in operation.inputs):
            found.update(id(tensor) for tensor in operation.outputs)
    return found


def captured_variables(graph: Any, variables: Iterable[tf.Variable]) -> dict[int, tf.Variable]:
    """Maps the id of each tensor that stands for a variable's handle inside `graph` to the variable."""
    by_handle = {id(variable.handle): variable for variable in variables}
    pairs = [(outside, inside) for outside, inside in graph.captures if id(outside) in by_handle]
    return {id(inside): by_handle[id(outside)] for outside, inside in pairs}


def written_handles(graph: tf.Graph) -> list[tuple[tf.Tensor, tf.Operation]]:
    """Every (resource handle, operation) of `graph` where the operation may write to the handle.

    An operation that calls a function (a loop, say) counts if the function writes to any resource.
    """
    writers = _writing_functions(graph)
    found = []
    for operation in graph.get_operations():
        called = set(_called_functions(operation.node_def))
        if _writes(operation.type) or called & writers:
            handles = [tensor for tensor in operation.inputs if tensor.dtype == tf.resource]
            found += [(handle, operation) for handle in handles]
    return found


def _writes(operation_type: str) -> bool:
    if operation_type in _READS:
        return False
    return operation_type.startswith("Resource") or (
        operation_type.startswith("Assign") and operation_type.endswith("VariableOp")
    )


def _called_functions(node: Any) -> list[str]:
    names = []
    for attribute in node.attr.values():
        if attribute.func.name:
            names.append(attribute.func.name)
        names += [function.name for function in attribute.list.func]
    return names


def _writing_functions(graph: tf.Graph) -> set[str]:
    functions = {f.signature.name: f for f in graph.as_graph_def().library.function}
    writing = {name for name, f in functions.items() if any(_writes(n.op) for n in f.node_def)}
    calls = {name: {c for n in f.node_def for c in _called_functions(n)} for name, f in functions.items()}
    while True:
        more = {name for name, called in calls.items() if called & writing} - writing
        if not more:
            return writing
        writing |= more
