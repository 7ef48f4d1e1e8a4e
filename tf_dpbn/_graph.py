"""TensorFlow graphs: what depends on data, what writes to variables; and how they stay small."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import tensorflow as tf

# Tensors of at most this many elements are joined to one vector where the same is done to each: deep networks have
# hundreds, and every operation on one of its own takes time, in building graphs too.
SMALL = 4096
_READS = frozenset(
    "ReadVariableOp ResourceGather ResourceGatherNd VariableShape VarHandleOp VarIsInitializedOp "
    "LookupTableFind LookupTableFindV2 LookupTableSize LookupTableSizeV2 LookupTableExport LookupTableExportV2".split()
)
# Stateful only in that two calls differ or that they print: random draws, checks.
_HARMLESS = ("Random", "Truncated", "Parameterized", "Multinomial", "Stateful", "Assert", "Print", "TensorArray")
_RANDOM = ("Random", "Truncated", "Parameterized", "Multinomial", "Stateful", "StatelessRandom", "StatelessTruncated")
# What writes, by the beginning of its name; the bodies of functions are known by operation names alone.
_WRITERS = tuple(
    "Assign Barrier ConditionalAccumulator EagerPyFunc LookupTableImport LookupTableInsert LookupTableRemove "
    "MutableHash PyFunc QueueEnqueue QueueDequeue Resource ScatterAdd ScatterUpdate StackPush".split()
)


def reshape(tensor: tf.Tensor, shape: Sequence[int | None]) -> tf.Tensor:
    """tf.reshape, but no operation where the shape is that already: the first step takes as long as a graph is large.

    Args:
      tensor: any.
      shape: static.
    """
    if tensor.shape.rank == len(shape) and tensor.shape.as_list() == list(shape):
        return tensor
    return tf.reshape(tensor, shape)


def put_back(others: Sequence[tf.Tensor], vector: tf.Tensor, shapes: Mapping[int, Sequence[int]]) -> list[tf.Tensor]:
    """Takes apart tensors that were joined to one vector, and puts them back among the others.

    Args:
      others: the tensors that were not joined, in order.
      vector: the elements of the others side by side.
      shapes: by its position among all tensors, in order, the shape of each that was joined.
    """
    found = list(others)
    parts = tf.split(vector, [math.prod(shape) for shape in shapes.values()])
    for (position, shape), part in zip(shapes.items(), parts, strict=True):
        found.insert(position, reshape(part, shape))
    return found


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


def has_segment_sums(graph: tf.Graph) -> bool:
    """Whether `graph` sums segments: vectorized over rows, ids outside their range would reach another row."""
    return any(op.type.startswith(("UnsortedSegment", "SparseSegment", "SegmentSum")) for op in graph.get_operations())


def state_changes(graph: tf.Graph) -> list[tf.Operation]:
    """The operations of `graph` that may change state: a variable, a table, or Python's.

    An operation that calls a function (a loop, say) counts if the function, or one that it calls, does so.
    """
    changing = _functions_with(graph, _writes)
    return [
        operation
        for operation in graph.get_operations()
        if set(_called_functions(operation.node_def)) & changing or _changes_state(operation)
    ]


def is_random(operation: tf.Operation) -> bool:
    """Whether an operation draws random numbers."""
    return operation.type.startswith(_RANDOM) and not calls_functions(operation)


def calls_with_random_state(graph: tf.Graph) -> list[tf.Operation]:
    """Operations that call a function (a loop's body, say) in which random numbers are drawn from a state."""
    random = _functions_with(graph, lambda kind: kind.startswith(_RANDOM) and not kind.startswith("State"))
    return [operation for operation in graph.get_operations() if set(_called_functions(operation.node_def)) & random]


def calls_functions(operation: tf.Operation) -> bool:
    """Whether an operation calls a function: a loop, a branch, a traced function."""
    return bool(_called_functions(operation.node_def))


def _changes_state(operation: tf.Operation) -> bool:
    """Fails closed: any stateful operation counts that is not known to be harmless."""
    if calls_functions(operation):
        return False
    return _writes(operation.type) or (
        operation.op_def.is_stateful and operation.type not in _READS and not operation.type.startswith(_HARMLESS)
    )


def _writes(operation_type: str) -> bool:
    return operation_type not in _READS and operation_type.startswith(_WRITERS)


def _called_functions(node: Any) -> list[str]:
    names = []
    for attribute in node.attr.values():
        if attribute.func.name:
            names.append(attribute.func.name)
        names += [function.name for function in attribute.list.func]
    return names


def _functions_with(graph: tf.Graph, searched: Callable[[str], bool]) -> set[str]:
    """Names of the functions in which, or in functions that they call, there is an operation of a searched type."""
    functions = {f.signature.name: f for f in graph.as_graph_def().library.function}
    found = {name for name, f in functions.items() if any(searched(n.op) for n in f.node_def)}
    calls = {name: {c for n in f.node_def for c in _called_functions(n)} for name, f in functions.items()}
    while True:
        more = {name for name, called in calls.items() if called & found} - found
        if not more:
            return found
        found |= more


def replace_input(operation: tf.Operation, position: int, tensor: tf.Tensor) -> None:
    """Makes `tensor` an input of an operation that is already in the graph under construction."""
    operation._update_input(position, tensor)


def redirect(old: tf.Tensor, new: tf.Tensor) -> None:
    """Makes every consumer of `old`, in the graph under construction, consume `new` instead."""
    for consumer in old.consumers():
        for position, tensor in enumerate(consumer.inputs):
            if tensor is old:
                replace_input(consumer, position, new)


def call_again(operation: tf.Operation, old: tf.Tensor, new: tf.Tensor, **changed: Any) -> tf.Tensor:
    """The first output of the same operation with its input `old` replaced by `new`, and with changed attributes."""
    definition = operation.op_def
    inputs = {
        argument.name: new if tensor is old else tensor
        for argument, tensor in zip(definition.input_arg, operation.inputs, strict=True)
    }
    attributes = {a.name: operation.get_attr(a.name) for a in definition.attr if a.type != "type"} | changed
    return getattr(tf.raw_ops, operation.type)(**inputs, **attributes)
