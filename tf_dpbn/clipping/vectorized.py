"""The generic engine: exact per-example gradients of any Keras model, one example at a time.

Each example runs through the model as a batch of one, so no operation in the model can see another example, whatever it
computes. The runs are vectorized over a microbatch (tf.vectorized_map; operations that do not vectorize fall back to a
loop of their own) or looped over one by one. It is the oracle of every faster rule.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from tf_dpbn import _validate
from tf_dpbn.clipping import Batch, BatchResult, ExampleResult, Task
from tf_dpbn.mechanisms import ClippedSum, clip_weights

# Per-example gradients of one microbatch take at most this many bytes unless microbatch_size is given.
_DEFAULT_MEMORY = 256 * 2**20


class PerExampleEngine:
    """Clipped sums by differentiating each example's loss separately.

    Args:
      microbatch_size: how many examples' gradients are held in memory at a time; it does not change the result. None
        chooses so that they take at most 256 MiB.
      vectorize: run the examples of a microbatch at once; False runs them one after the other, which needs the least
        memory and works for operations that cannot be vectorized at all.

    Raises:
      ValueError: if microbatch_size is not a whole number >= 1.
    """

    def __init__(self, microbatch_size: int | None = None, vectorize: bool = True) -> None:
        if microbatch_size is not None:
            _validate.positive_int("microbatch_size", microbatch_size, "Leave it out to choose one.")
        self._microbatch_size = microbatch_size
        self._vectorize = vectorize

    def __call__(self, task: Task, batch: Batch, l2_norm_clip: float) -> tuple[ClippedSum, BatchResult]:
        """Returns the clipped sum, of sensitivity `l2_norm_clip`, and the un-noised by-products."""
        size = self._slice_size(task, batch)
        rows, count = _to_rows(batch), _batch_size(batch)
        slices = _ceil_divide(count, size)
        sums = tuple(tf.zeros(v.shape, tf.float32) for v in task.variables)
        padded = tf.nest.map_structure(lambda t: _pad(t, slices * size), rows)

        def clipped_slice(i: Any) -> Any:
            rows = tf.nest.map_structure(lambda t: _slice(t, i * size, size), padded)
            return self._sum_slice(task, rows, l2_norm_clip)

        if isinstance(slices, int) and slices == 1:
            sums, by_products = clipped_slice(0)
        else:
            sums, by_products = _accumulate(clipped_slice, slices, sums)

        def without_filler(values: tf.Tensor) -> tf.Tensor:
            return tf.ensure_shape(values[:count], [_static(count), *values.shape[1:]])

        loss, parts, y_pred = tf.nest.map_structure(without_filler, by_products[:3])
        not_finite = tf.reduce_sum(tf.cast(by_products[3], tf.int64))
        return ClippedSum(tuple(sums), float(l2_norm_clip)), BatchResult(loss, parts, y_pred, not_finite)

    def _slice_size(self, task: Task, batch: Batch) -> Any:
        parameters = sum(v.shape.num_elements() for v in task.variables)
        limit = self._microbatch_size or max(1, _DEFAULT_MEMORY // (4 * max(1, parameters)))
        count = _batch_size(batch)
        if isinstance(count, int):
            return max(1, min(limit, count))
        return tf.clip_by_value(count, 1, limit)

    def _sum_slice(self, task: Task, rows: Any, l2_norm_clip: float) -> Any:
        """Clips and sums one microbatch; also returns (loss, parts, y_pred, not_finite) by row."""
        results, gradients, cotangents = self._run(task, rows)
        gradients = _add_local_terms(task, gradients, cotangents)
        squared = tf.add_n([_squared_norms(g) for g in gradients])
        mask = rows[-1]
        weights = clip_weights(squared, l2_norm_clip, mask)
        finite = tf.math.is_finite(tf.sqrt(squared))
        sums = tuple(_weighted_sum(weights, finite, g) for g in gradients)
        not_finite = tf.logical_and(mask, tf.logical_not(finite))
        return sums, (results.loss, results.parts, results.y_pred, not_finite)

    def _run(self, task: Task, rows: Any) -> tuple[ExampleResult, list[tf.Tensor], list[tf.Tensor]]:
        """Runs and differentiates every row; all results gain a leading axis."""

        def run_row(row: Any) -> Any:
            return _differentiate(task, *row[:-1])

        vectorized = _trace_vectorized(run_row, rows) if self._vectorize else None
        if vectorized is not None:
            outputs = vectorized(rows)
        else:
            spec = _output_signature(run_row, rows)
            outputs = tf.map_fn(run_row, rows, fn_output_signature=spec)
        loss, parts, y_pred, gradients, cotangents = outputs
        return ExampleResult(loss, parts, y_pred), gradients, cotangents


def _trace_vectorized(run_row: Any, rows: Any) -> Any:
    """Traces the vectorized run of all rows, or returns None where it must be looped over instead."""
    specs = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), rows)
    with _quiet_fallbacks():
        try:
            mapped = tf.function(lambda rows: tf.vectorized_map(run_row, rows), autograph=False)
            traced = mapped.get_concrete_function(specs)
        except (TypeError, ValueError, NotImplementedError) as error:
            # Loops over tensor lists (tf_keras' recurrent layers), for one. An error of the model itself comes
            # back when the loop is traced.
            tf.get_logger().info("Examples are looped over one by one, they cannot be vectorized: %s", error)
            return None
    reason = _unsafe_to_vectorize(traced.graph)
    if reason:
        tf.get_logger().info("Examples are looped over one by one: %s.", reason)
        return None
    return mapped


def _unsafe_to_vectorize(graph: tf.Graph) -> str:
    """Why examples must not be vectorized, or an empty string."""
    if any(op.type.startswith(("UnsortedSegment", "SparseSegment", "SegmentSum")) for op in graph.get_operations()):
        return "vectorized segment sums mix examples where ids lie outside their range"
    return "broadcast matrix products corrupt memory on CPUs" if _has_unsafe_matmul(graph) else ""


def _has_unsafe_matmul(graph: tf.Graph) -> bool:
    """Whether a graph multiplies batches of matrices of unequal rank, four or more, on a CPU.

    oneDNN's kernel for that corrupts memory (seen with TensorFlow 2.21: [4, 1, 7, 4] x [4, 6] aborts within a few
    hundred calls). Vectorizing a product by a weight of rank two yields it.
    """
    if tf.config.list_logical_devices("GPU") + tf.config.list_logical_devices("TPU"):
        return False
    products = [op for op in graph.get_operations() if op.type.startswith("BatchMatMul")]
    ranks = [[tensor.shape.rank for tensor in op.inputs] for op in products]
    return any(None in pair or (pair[0] != pair[1] and max(pair) >= 4) for pair in ranks)


@contextlib.contextmanager
def _quiet_fallbacks() -> Iterator[None]:
    """Keeps TensorFlow from telling users to fix its own conversion of filter gradients."""

    def wanted(record: logging.LogRecord) -> bool:
        return "uses a while_loop" not in record.getMessage()

    logger = tf.get_logger()
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


def _differentiate(task: Task, x: Any, y: Any, weight: Any, index: tf.Tensor) -> Any:
    """Loss, prediction, gradients by the variables and by the statistics, of one example."""
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        statistics = tf.nest.map_structure(tf.identity, task.statistics)
        tape.watch([*task.variables, *tf.nest.flatten(statistics)])
        result = task.run_example(x, y, weight, index, statistics)
    sources = [*task.variables, *tf.nest.flatten(statistics)]
    found = tape.gradient(result.loss, sources, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    dense = [tf.cast(_densify(g, v), tf.float32) for g, v in zip(found, sources, strict=True)]
    number = len(task.variables)
    loss = tf.cast(result.loss, tf.float32)
    parts = tuple(tf.cast(part, tf.float32) for part in result.parts)
    return loss, parts, result.y_pred, dense[:number], dense[number:]


def _densify(gradient: Any, like: tf.Tensor) -> tf.Tensor:
    """Turns the sparse gradient of a table look-up into a tensor; look-ups outside the table count for nothing.

    TensorFlow's own conversion, once vectorized, adds row * table size to the ids, so that under XLA, which does not
    check ids, an id outside the table would land in the next example's gradient.
    """
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    inside = tf.logical_and(gradient.indices >= 0, gradient.indices < like.shape[0])
    indices = tf.where(inside, gradient.indices, tf.zeros_like(gradient.indices))
    values = tf.where(_by_row(inside, gradient.values), gradient.values, tf.zeros_like(gradient.values))
    return tf.scatter_nd(indices[:, None], values, like.shape)


def _add_local_terms(task: Task, gradients: list[tf.Tensor], cotangents: list[tf.Tensor]) -> list[tf.Tensor]:
    """K_i' = K_i + pbar (x) c_mu_i + V * c_v_i (docs/algorithm.md, section 3a)."""
    gradients = list(gradients)
    for k, terms in enumerate(task.local_terms):
        for term in terms:
            correction = term.pull_back(cotangents[2 * k], cotangents[2 * k + 1])
            gradients[term.index] += tf.cast(correction, tf.float32)
    return gradients


def _output_signature(run_row: Any, rows: Any) -> Any:
    specs = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape[1:], t.dtype), rows)
    traced = tf.function(run_row, autograph=False).get_concrete_function(specs)
    return tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), traced.structured_outputs)


def _squared_norms(gradients: tf.Tensor) -> tf.Tensor:
    axes = list(range(1, gradients.shape.rank))
    return tf.reduce_sum(tf.square(gradients), axes)


def _weighted_sum(weights: tf.Tensor, finite: tf.Tensor, gradients: tf.Tensor) -> tf.Tensor:
    # A weight of 0 does not silence a NaN: rows that are not finite are replaced, not scaled.
    kept = tf.where(_by_row(finite, gradients), gradients, tf.zeros_like(gradients))
    # Not a matrix product: accelerators round those to fewer bits, which could push a row above the clip norm.
    return tf.reduce_sum(_by_row(weights, gradients) * kept, 0)


def _by_row(vector: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """Reshapes [rows] so that it broadcasts against `like`, [rows, ...]."""
    return tf.reshape(vector, tf.concat([tf.shape(vector), tf.ones([like.shape.rank - 1], tf.int32)], 0))


def _to_rows(batch: Batch) -> tuple[Any, Any, Any, tf.Tensor, tf.Tensor]:
    """(x, y, weight, index, mask): everything with a batch axis. A missing weight is an empty tuple."""
    count = tf.shape(tf.nest.flatten(batch.x)[0])[0]
    mask = tf.ones([_batch_size(batch)], tf.bool) if batch.mask is None else batch.mask
    weight = () if batch.sample_weight is None else batch.sample_weight
    return batch.x, batch.y, weight, tf.range(count), mask


def _batch_size(batch: Batch) -> Any:
    first = tf.nest.flatten(batch.x)[0]
    return first.shape[0] if first.shape[0] is not None else tf.shape(first)[0]


def _static(count: Any) -> int | None:
    return count if isinstance(count, int) else None


def _ceil_divide(count: Any, size: Any) -> Any:
    return -(-count // size)


def _pad(rows: tf.Tensor, count: Any) -> tf.Tensor:
    missing = count - (rows.shape[0] if rows.shape[0] is not None else tf.shape(rows)[0])
    if isinstance(missing, int) and missing == 0:
        return rows
    filler = tf.zeros(tf.concat([[missing], tf.shape(rows)[1:]], 0), rows.dtype)
    return tf.concat([rows, filler], 0)


def _slice(rows: tf.Tensor, start: Any, size: Any) -> tf.Tensor:
    rank = rows.shape.rank
    begin = tf.concat([[start], tf.zeros([rank - 1], tf.int32)], 0)
    if isinstance(size, int) and rows.shape[1:].is_fully_defined():
        return tf.slice(rows, begin, [size, *rows.shape[1:]])
    out = tf.slice(rows, begin, tf.concat([[size], tf.shape(rows)[1:]], 0))
    return tf.ensure_shape(out, [_static(size), *rows.shape[1:]])


def _accumulate(clipped_slice: Any, slices: Any, zero: tuple[tf.Tensor, ...]) -> Any:
    """Loops over slices: adds up their sums, concatenates their by-products."""
    traced = tf.function(lambda: clipped_slice(0)[1], autograph=False).get_concrete_function()
    like = traced.structured_outputs
    arrays = [tf.TensorArray(t.dtype, size=slices, element_shape=t.shape) for t in tf.nest.flatten(like)]

    def body(i: tf.Tensor, sums: Any, arrays: Any) -> Any:
        added, by_products = clipped_slice(i)
        sums = tuple(a + b for a, b in zip(sums, added, strict=True))
        flat = tf.nest.flatten(by_products)
        return i + 1, sums, [a.write(i, t) for a, t in zip(arrays, flat, strict=True)]

    _, sums, arrays = tf.while_loop(lambda i, *_: i < slices, body, (0, zero, arrays), parallel_iterations=1)
    joined = [_join(array.stack()) for array in arrays]
    return sums, tf.nest.pack_sequence_as(like, joined)


def _join(stacked: tf.Tensor) -> tf.Tensor:
    shape = tf.shape(stacked)
    out = tf.reshape(stacked, tf.concat([[shape[0] * shape[1]], shape[2:]], 0))
    static = stacked.shape
    known = static[0] is not None and static[1] is not None
    return tf.ensure_shape(out, [static[0] * static[1] if known else None, *static[2:]])
