"""Gradient accumulation: several batches of fit make one logical batch, with one noise draw and one ledger entry."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from tf_dpbn import _validate
from tf_dpbn._keras import keras
from tf_dpbn.accounting import PrivacyWarning
from tf_dpbn.mechanisms import ClippedSum

_NOT_DUE = (
    "A logical batch of accumulation_steps={} needs one step on each of its batches, and there was none or several on "
    "one of them: batches of another draw would take their place. Let `train_step` take exactly one on every batch."
)


class Accumulator:
    """Adds up the clipped sums of the parts of one logical batch: the gradient's, and those of statistics.

    Its variables hold private sums without noise, so it is deliberately not trackable: they are in no checkpoint, and a
    loaded model begins a new logical batch.

    Args:
      parts: how many batches make one logical batch.

    Raises:
      ValueError: if parts is not a whole number >= 1.
    """

    def __init__(self, parts: int) -> None:
        self.parts = _validate.positive_int("accumulation_steps", parts)
        self._sums: list[tf.Variable] = []
        with tf.init_scope():
            self._count = tf.Variable(0, dtype=tf.int64, trainable=False, name="accumulated")
            self._begun = tf.Variable(0, dtype=tf.int64, trainable=False, name="begun")

    def begin_batch(self, counts: tf.Tensor) -> None:
        """Notes that the next part is due: a batch without a step would make the next draw's batch a part of this one.

        Args:
          counts: bool scalar; without it nothing is noted.
        """
        if self.parts > 1:
            self._begun.assign_add(tf.cast(counts, tf.int64))

    def add(
        self,
        clipped: tuple[ClippedSum, ...],
        release: Callable[[tuple[ClippedSum, ...]], None],
        is_part: tf.Tensor,
    ) -> None:
        """Adds one part; calls `release` with the sums of all if it was the last of a logical batch.

        The parts of a logical batch hold different examples, so that the sensitivity of their sum is that of each.

        Args:
          clipped: the sums of this part.
          release: what to do with the sums of a logical batch.
          is_part: bool scalar; without it nothing is added. A batch that is not split is always released.

        Fails with InvalidArgumentError where a part is missing or there already. XLA leaves assertions out; nothing is
        added then, and the logical batch is never released.
        """
        if self.parts == 1:
            release(clipped)
            return
        tensors = [each.tensors for each in clipped]
        self._create(tf.nest.flatten(tensors))
        is_due = tf.equal(self._count, self._begun - 1)
        with tf.control_dependencies([tf.debugging.Assert(is_due, [_NOT_DUE.format(self.parts)])]):
            is_part = tf.logical_and(is_part, is_due)
        for variable, tensor in zip(self._sums, tf.nest.flatten(tensors), strict=True):
            variable.assign_add(tf.where(is_part, tensor, tf.zeros_like(tensor)))
        full = tf.logical_and(is_part, tf.equal(self._count.assign_add(tf.cast(is_part, tf.int64)), self.parts))

        def finish() -> tf.Tensor:
            totals = tf.nest.pack_sequence_as(tensors, [v.read_value() for v in self._sums])
            pairs = zip(totals, clipped, strict=True)
            release(tuple(ClippedSum(tuple(total), part.l2_sensitivity) for total, part in pairs))
            self.reset()
            return tf.constant(True)

        tf.cond(full, finish, lambda: tf.constant(False))

    def _create(self, tensors: Sequence[tf.Tensor]) -> None:
        if not self._sums:
            with tf.init_scope():
                self._sums = [tf.Variable(tf.zeros(t.shape, t.dtype), trainable=False) for t in tensors]

    def completed_by(self, batches: int) -> int:
        """How many logical batches the next batches will complete."""
        return batches if self.parts == 1 else (self.pending + batches) // self.parts

    @contextlib.contextmanager
    def forgetting_failures(self) -> Iterator[None]:
        """A scope whose failure begins a new logical batch: repeated, it would add the same examples twice."""
        try:
            yield
        except BaseException:
            if self.parts > 1:
                with tf.init_scope():  # what failed may be a trace
                    self.reset()
            raise

    def reset(self) -> None:
        """Forgets the parts so far."""
        self._count.assign(0)
        self._begun.assign(0)
        for variable in self._sums:
            variable.assign(tf.zeros_like(variable))

    @property
    def pending(self) -> int:
        """How many parts of an unfinished logical batch have been added."""
        return int(self._count)


class EpochBoundaries(keras.callbacks.Callback):
    """Keeps a logical batch from reaching over the end of an epoch, where the same example could enter it twice.

    Args:
      accumulator: that of the step.
      ends_with_logical_batch: whether epochs consist of whole logical batches, and may go on where the last one ended.
      is_stopped: whether training stops, so that the last logical batch may be unfinished.
    """

    def __init__(self, accumulator: Accumulator, ends_with_logical_batch: bool, is_stopped: Callable[[], bool]) -> None:
        super().__init__()
        self._accumulator = accumulator
        self._ends_with_logical_batch = ends_with_logical_batch
        self._is_stopped = is_stopped

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Begins a new logical batch."""
        self._accumulator.reset()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Tells if batches at the end of the epoch were too few for a logical batch.

        Raises:
          RuntimeError: where the next epoch could begin with the rest of that logical batch.
        """
        if self._accumulator.pending:
            if self._ends_with_logical_batch and not self._is_stopped():
                raise RuntimeError(
                    f"The epoch ended within a logical batch of accumulation_steps={self._accumulator.parts} batches, "
                    "and the next one could begin with the rest of it. Let epochs consist of whole logical batches, "
                    "and resume at the beginning of an epoch."
                )
            warnings.warn(
                f"The last {self._accumulator.pending} batches of the epoch are not used: they are fewer than "
                f"accumulation_steps={self._accumulator.parts}, and a logical batch must not contain examples of two "
                "epochs. Make steps_per_epoch a multiple of it.",
                PrivacyWarning,
                stacklevel=2,
            )
            self._accumulator.reset()
