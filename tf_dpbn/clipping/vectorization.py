"""Runs a function of one example on all examples of a microbatch at once.

tf.vectorized_map turns the operations of one example's graph into operations on all examples, so that no example can
see another one, whatever the function computes. This file adds what keeps the result safe and fast on TensorFlow's
kernels: it refuses graphs that mix examples or that a kernel is known to compute wrongly, and mends three patterns
that vectorizing leaves behind.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from tf_dpbn import _graph
from tf_dpbn._devices import has_accelerator

_RowFunction = Callable[[Any], Any]


def vectorize(function: _RowFunction, rows: Any) -> Any:
    """Traces `function` for all rows at once.

    Args:
      function: maps one row, a nest of tensors, to a nest of tensors.
      rows: a nest of tensors with a leading axis of rows, of the shapes to trace for.

    Returns:
      A tf.function of all rows, or None where they must be looped over instead.
    """
    specs = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), rows)

    def mapped(rows: Any) -> Any:
        return _mend(tf.vectorized_map(function, rows))

    with _quiet_fallbacks():
        try:
            traceable = tf.function(mapped, autograph=False)
            traced = traceable.get_concrete_function(specs)
        except (TypeError, ValueError, NotImplementedError) as error:
            # Loops over tensor lists (tf_keras' recurrent layers), for one. An error of the model itself comes
            # back when the loop is traced.
            _tell_of_loop(f"TensorFlow cannot vectorize them ({str(error).strip().splitlines()[-1].strip()})")
            return None
    reason = _unsafe(traced.graph)
    if reason:
        _tell_of_loop(reason)
        return None
    return traceable


@functools.cache
def _tell_of_loop(reason: str) -> None:
    """Says once for each reason that steps are slow, however often they are traced."""
    tf.get_logger().warning("Examples are looped over one by one, which is slow: %s.", reason)


def loop(function: _RowFunction, rows: Any) -> Any:
    """Runs `function` on one row after the other; arguments as for `vectorize`, returns the stacked results."""
    specs = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape[1:], t.dtype), rows)
    traced = tf.function(function, autograph=False).get_concrete_function(specs)
    signature = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), traced.structured_outputs)
    # One after the other: oneDNN kernels that run at the same time on tiny inputs corrupt memory (TensorFlow 2.21).
    return tf.map_fn(function, rows, parallel_iterations=1, fn_output_signature=signature)


def _unsafe(graph: tf.Graph) -> str:
    """Why examples must not be vectorized, or an empty string."""
    if _graph.has_segment_sums(graph):
        return "vectorized segment sums mix examples where ids lie outside their range"
    if any(_is_unsafe_product(op) and op.outputs[0].consumers() for op in graph.get_operations()):
        return "broadcast matrix products corrupt memory on CPUs"
    return ""


def _is_unsafe_product(operation: tf.Operation) -> bool:
    """Whether an operation multiplies batches of matrices of unequal rank, four or more, on a CPU.

    oneDNN's kernel for that corrupts memory (seen with TensorFlow 2.21: [4, 1, 7, 4] x [4, 6] aborts within a few
    hundred calls). Vectorizing a product by a weight of rank two yields it.
    """
    if not operation.type.startswith("BatchMatMul") or has_accelerator():
        return False
    left, right = (tensor.shape.rank for tensor in operation.inputs)
    return None in (left, right) or (left != right and max(left, right) >= 4)


def _mend(outputs: Any) -> Any:
    """Rewrites, in the current graph, what vectorizing left behind; returns the outputs after it."""
    graph = tf.compat.v1.get_default_graph()
    replaced: dict[int, tf.Tensor] = {}
    for operation in graph.get_operations():
        if operation.type == "MaxPoolGrad":
            _join_pooling(operation)
        better = _replacement(operation)
        if better is not None:
            _graph.redirect(operation.outputs[0], better)
            replaced[id(operation.outputs[0])] = better
    return tf.nest.map_structure(lambda t: replaced.get(id(t), t), outputs)


def _replacement(operation: tf.Operation) -> tf.Tensor | None:
    """What yields the same as an operation that does badly, or None."""
    if _is_unsafe_product(operation):
        return _flat_product(operation)
    if operation.type == "BiasAdd" and has_accelerator():
        return _plain_sum(operation)
    return None


def _flat_product(operation: tf.Operation) -> tf.Tensor | None:
    """The product of many rows by one matrix, as an ordinary matrix product; None where it is something else."""
    rows, matrix = operation.inputs
    if operation.get_attr("adj_x") or matrix.shape.rank != 2 or rows.shape.rank is None:
        return None
    flat = tf.reshape(rows, [-1, rows.shape[-1] or tf.shape(rows)[-1]])
    product = tf.matmul(flat, matrix, transpose_b=operation.get_attr("adj_y"))
    shape = tf.concat([tf.shape(rows)[:-1], tf.shape(product)[-1:]], 0)
    return tf.ensure_shape(tf.reshape(product, shape), operation.outputs[0].shape)


def _plain_sum(operation: tf.Operation) -> tf.Tensor | None:
    """What adds a bias to images in all rows, as an ordinary sum; None where it is something else.

    TensorFlow's layout optimizer takes images with a further axis for volumes and moves their channels, for nothing.
    """
    images, bias = operation.inputs
    if images.shape.rank != 5 or operation.get_attr("data_format") != b"NHWC":
        return None
    return tf.ensure_shape(images + bias, operation.outputs[0].shape)


def _join_pooling(operation: tf.Operation) -> None:
    """Hands MaxPoolGrad the very tensor that MaxPool returned, where only reshapes lie between them.

    Vectorizing splits and merges the leading axes in between, which hides from TensorFlow that the two belong together;
    its kernel for a MaxPoolGrad on its own takes twenty times as long (tutorial CNN, 6.3 ms against 0.3 ms).
    """
    given = source = operation.inputs[1]
    while source.op.type == "Reshape":
        source = source.op.inputs[0]
    if source.op.type == "MaxPool" and source is not given and _same_shape_but_rows(source, given):
        _graph.replace_input(operation, 1, source)


def _same_shape_but_rows(one: tf.Tensor, other: tf.Tensor) -> bool:
    """Whether two tensors of equal data have equal shapes: all axes but the first are known and the same."""
    shapes = one.shape.as_list()[1:], other.shape.as_list()[1:]
    return None not in shapes[0] and shapes[0] == shapes[1]


@contextlib.contextmanager
def _quiet_fallbacks() -> Iterator[None]:
    """Keeps TensorFlow from telling users to fix its own conversions, and from pages on those that fail."""

    def wanted(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(text in message for text in ("a while_loop", "Got error while pfor", "\ncreated at:\n"))

    logger = tf.get_logger()
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)
