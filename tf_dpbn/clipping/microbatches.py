"""What all engines share: a logical batch is worked through in slices, whose sums are added up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tf_dpbn import _validate
from tf_dpbn._devices import has_accelerator
from tf_dpbn.clipping.clip_norms import ClipAt, count_release
from tf_dpbn.clipping.rows import finite_only, weighted_sum
from tf_dpbn.clipping.task import Batch, BatchResult, Task
from tf_dpbn.mechanisms import ClippedSum, ClipRule, clip_weights, sensitivity_of
from tf_dpbn.normalization import StatisticsRelease

# What the examples of one microbatch keep takes about this many bytes unless microbatch_size is given. On CPUs a small
# working set costs no time, but fewer than 64 examples at a time do.
_CPU_MEMORY, _ACCELERATOR_MEMORY = 2**24, 2**30
FEWEST, _MEMORY_OF_FEWEST = 64, 2**30
# Slices of padding alone are skipped, so where a batch may hold padding they are kept small.
_MOST_IF_PADDED = 128
# Rows are worked on in multiples of so many: the last numbers of a tensor that do not fill a processor's register are
# computed by other instructions, and how an example is rounded must not depend on where in the batch it lies.
ROWS_OF_REGISTERS = 16
_MEMORY_OF_REGISTERS = 2**32  # where so many would take more than this, they are worked on one by one


class MicrobatchedEngine:
    """Sums clipped examples one microbatch after the other.

    Args:
      microbatch_size: how many examples are worked on at a time, 1 or rounded up to a multiple of 16; does not change
        the result. None chooses.

    Raises:
      ValueError: if microbatch_size is not a whole number >= 1.
    """

    def __init__(self, microbatch_size: int | None = None) -> None:
        if microbatch_size is not None:
            _validate.positive_int("microbatch_size", microbatch_size, "Leave it out to choose one.")
        self._microbatch_size = microbatch_size

    def prepared(self, task: Task) -> Task:
        """The task with what the engine needs to know of it for slices of any size."""
        return task

    def bytes_per_example(self, task: Task, rows: Any) -> int:
        """How much memory one example of a microbatch takes, about."""
        raise NotImplementedError

    def sum_slice(self, task: Task, rows: Any, l2_norm_clip: float | ClipRule) -> Any:
        """Clips and sums one microbatch.

        Args:
          task: the model.
          rows: (x, y, weight, index, mask), everything with a batch axis; a missing weight is an empty tuple.
          l2_norm_clip: bound on the norm of each example's vector, or how it is scaled.

        Returns:
          (sums, one float64 tensor a variable, then one a release and an adaptive clip norm's count; (loss, parts,
          y_pred, non_finite), each by row).
        """
        raise NotImplementedError

    def __call__(
        self, task: Task, batch: Batch, l2_norm_clip: float | ClipRule
    ) -> tuple[tuple[ClippedSum, ...], BatchResult]:
        """Clips and sums the examples of a batch.

        Returns:
          The sums, the gradient's with the sensitivity `l2_norm_clip`, those of the task's releases and then the count
          of an adaptive clip norm; and the un-noised by-products.
        """
        task = self.prepared(task)
        releases = (*task.releases, *count_release(l2_norm_clip))
        rows, count = to_rows(batch), _batch_size(batch)
        if not isinstance(count, int):  # may be 0, and a slice needs a row to read
            rows = tf.nest.map_structure(_with_spare_row, rows)
        size = self._slice_size(task, rows, count, batch.mask is not None)
        slices = _ceil_divide(count, size) if isinstance(count, int) else tf.maximum(1, _ceil_divide(count, size))
        if isinstance(count, int) and count == size:
            sums, by_products = self.sum_slice(task, rows, l2_norm_clip)
        else:
            order = _examples_first(batch.mask, count)
            positions = tf.math.invert_permutation(order)
            examples = count if batch.mask is None else tf.reduce_sum(tf.cast(batch.mask, tf.int32))

            def clipped_slice(i: Any) -> Any:
                return self.sum_slice(task, _take(rows, order, i * size, size, examples), l2_norm_clip)

            if isinstance(slices, int) and slices == 1:
                sums, by_products = clipped_slice(0)
            else:
                shapes = [*[v.shape for v in task.variables], *[release.size for release in releases]]
                sums = tuple(tf.zeros(shape, tf.float64) for shape in shapes)
                sums, by_products = _accumulate(clipped_slice, slices, _ceil_divide(examples, size), sums)
            by_products = tf.nest.map_structure(lambda t: tf.gather(t, positions), by_products)

        rows_of_batch = count if isinstance(count, int) else None
        loss, parts, y_pred = tf.nest.map_structure(
            lambda values: tf.ensure_shape(values, [rows_of_batch, *values.shape[1:]]), by_products[:3]
        )
        non_finite = tf.reduce_sum(tf.cast(by_products[3], tf.int64))
        clipped = [ClippedSum(tuple(sums[: len(task.variables)]), sensitivity_of(l2_norm_clip))]
        for release, total in zip(releases, sums[len(task.variables) :], strict=True):
            clipped.append(ClippedSum((total,), release.l2_norm_clip))
        return tuple(clipped), BatchResult(loss, parts, y_pred, non_finite)

    def _slice_size(self, task: Task, rows: Any, count: Any, padded: bool) -> Any:
        limit = self._microbatch_size
        if limit is None:
            bytes_per_example = max(1, self.bytes_per_example(task, rows))
            memory = _ACCELERATOR_MEMORY if has_accelerator() else _CPU_MEMORY
            limit = max(1, min(FEWEST, _MEMORY_OF_FEWEST // bytes_per_example), memory // bytes_per_example)
            if ROWS_OF_REGISTERS * bytes_per_example > _MEMORY_OF_REGISTERS:
                limit = 1
            if padded and not has_accelerator():
                limit = min(limit, _MOST_IF_PADDED)
        if not isinstance(count, int):
            size = limit if task.expected_rows is None else min(limit, task.expected_rows)
        else:
            count = max(1, count)
            size = _ceil_divide(count, _ceil_divide(count, limit))  # all equal, so that little filler is computed
        return rounded_up(size)


def rounded_up(rows: int) -> int:
    """The multiple of ROWS_OF_REGISTERS that holds so many rows; one row is always in the same place."""
    return rows if rows == 1 else ROWS_OF_REGISTERS * _ceil_divide(rows, ROWS_OF_REGISTERS)


def residual_sums(
    releases: Sequence[StatisticsRelease], residuals: Sequence[tf.Tensor], mask: tf.Tensor
) -> tuple[tf.Tensor, ...]:
    """Clips and sums what is released of the statistics.

    Args:
      releases: their bounds.
      residuals: for each of them, [rows, size].
      mask: bool [rows], False for padding.

    Returns:
      For each release a float64 vector, to which a row contributes at most its l2_norm_clip, and one that is not
      finite nothing.
    """
    sums = []
    for release, rows in zip(releases, residuals, strict=True):
        squared = tf.reduce_sum(tf.square(rows), 1)
        weights = clip_weights(squared, release.l2_norm_clip, mask)
        sums.append(weighted_sum(weights, finite_only(tf.math.is_finite(tf.sqrt(squared)), rows)))
    return tuple(sums)


def clip_counts(l2_norm_clip: Any, squared_norms: tf.Tensor, mask: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """The sum that an adaptive clip norm releases, as `residual_sums` has it; () for other clip norms."""
    counts = [l2_norm_clip.counts(squared_norms)] if isinstance(l2_norm_clip, ClipAt) else []
    return residual_sums(count_release(l2_norm_clip), counts, mask)


def to_rows(batch: Batch) -> tuple[Any, Any, Any, tf.Tensor, tf.Tensor]:
    """(x, y, weight, index, mask): everything with a batch axis. A missing weight is an empty tuple."""
    count = tf.shape(tf.nest.flatten(batch.x)[0])[0]
    context = tf.distribute.get_replica_context()
    replicas, replica = (1, 0) if context is None else (context.num_replicas_in_sync, context.replica_id_in_sync_group)
    # No two examples of a step share one, on whatever replica.
    index = tf.range(count) * replicas + tf.cast(replica, tf.int32)
    mask = tf.ones([_batch_size(batch)], tf.bool) if batch.mask is None else batch.mask
    weight = () if batch.sample_weight is None else batch.sample_weight
    return batch.x, batch.y, weight, index, mask


def _batch_size(batch: Batch) -> Any:
    first = tf.nest.flatten(batch.x)[0]
    return first.shape[0] if first.shape[0] is not None else tf.shape(first)[0]


def _ceil_divide(count: Any, size: Any) -> Any:
    return -(-count // size)


def _with_spare_row(rows: tf.Tensor) -> tf.Tensor:
    return tf.concat([rows, tf.zeros(tf.concat([[1], tf.shape(rows)[1:]], 0), rows.dtype)], 0)


def _examples_first(mask: tf.Tensor | None, count: Any) -> tf.Tensor:
    """The order of rows in which padding comes last: its slices need not be worked on."""
    if mask is None:
        return tf.range(count)
    return tf.argsort(tf.cast(tf.logical_not(mask), tf.int32), stable=True)


def _take(rows: Any, order: tf.Tensor, start: Any, size: Any, examples: Any) -> Any:
    """A slice of the rows in that order; the mask is False from the number of examples on, and beyond the last row."""
    positions = start + tf.range(size)
    last = tf.shape(order)[0] - 1
    chosen = tf.gather(tf.concat([order, [0]], 0), tf.minimum(positions, tf.maximum(last, 0)))
    *data, _ = tf.nest.map_structure(lambda t: tf.gather(t, chosen), rows)
    return (*data, positions < examples)


def _accumulate(clipped_slice: Any, slices: Any, needed: Any, zero: tuple[tf.Tensor, ...]) -> Any:
    """Loops over slices: adds up their sums, concatenates their by-products.

    Args:
      clipped_slice: maps the number of a slice to its sums and by-products.
      slices: how many there are.
      needed: how many hold examples; the by-products of the others are zeros.
      zero: what the sums begin with.
    """
    # Traced once, for the loop and for the shapes of what it yields.
    traced = tf.function(clipped_slice, autograph=False).get_concrete_function(tf.TensorSpec([], tf.int32))
    like = traced.structured_outputs[1]
    specs = tf.nest.flatten(like)
    if not all(spec.shape.is_fully_defined() for spec in specs):
        needed = slices  # the shape of the zeros is unknown
    arrays = [tf.TensorArray(t.dtype, size=slices, element_shape=t.shape) for t in specs]

    def body(i: tf.Tensor, sums: Any, arrays: Any) -> Any:
        added, by_products = traced(i)
        sums = tuple(a + b for a, b in zip(sums, added, strict=True))
        flat = tf.nest.flatten(by_products)
        return i + 1, sums, [a.write(i, t) for a, t in zip(arrays, flat, strict=True)]

    _, sums, arrays = tf.while_loop(lambda i, *_: i < needed, body, (0, zero, arrays), parallel_iterations=1)
    joined = [_join(array.stack()) for array in arrays]
    return sums, tf.nest.pack_sequence_as(like, joined)


def _join(stacked: tf.Tensor) -> tf.Tensor:
    shape = tf.shape(stacked)
    out = tf.reshape(stacked, tf.concat([[shape[0] * shape[1]], shape[2:]], 0))
    static = stacked.shape
    known = static[0] is not None and static[1] is not None
    return tf.ensure_shape(out, [static[0] * static[1] if known else None, *static[2:]])
