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
        """
        if self.parts == 1:
            release(clipped)
            return
        tensors = [each.tensors for each in clipped]
        self._create(tf.nest.flatten(tensors))
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
            self.reset()
            raise

    def reset(self) -> None:
        """Forgets the parts so far."""
        self._count.assign(0)
        for variable in self._sums:
            variable.assign(tf.zeros_like(variable))

    @property
    def pending(self) -> int:
        """How many parts of an unfinished logical batch have been added."""
        return int(self._count)


class EpochBoundaries(keras.callbacks.Callback):
    """Keeps a logical batch from reaching over the end of an epoch, where the same example could enter it twice."""

    def __init__(self, accumulator: Accumulator) -> None:
        super().__init__()
        self._accumulator = accumulator

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Begins a new logical batch."""
        self._accumulator.reset()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Tells if batches at the end of the epoch were too few for a logical batch."""
        if self._accumulator.pending:
            warnings.warn(
                f"The last {self._accumulator.pending} batches of the epoch are not used: they are fewer than "
                f"accumulation_steps={self._accumulator.parts}, and a logical batch must not contain examples of two "
                "epochs. Make steps_per_epoch a multiple of it.",
                PrivacyWarning,
                stacklevel=2,
            )
            self._accumulator.reset()
