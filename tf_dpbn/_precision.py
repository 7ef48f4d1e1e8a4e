"""Products in full float32 while private steps run.

Recent GPUs round the operands of float32 products to 10 bits of mantissa (TensorFloat-32), TPUs to 7 (bfloat16), unless
they are told not to. A norm and the clipped sum multiply in different orders: rounded so coarsely, a contribution could
exceed the clip norm by more than the noise allows for (docs/privacy.md).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import tensorflow as tf

from tf_dpbn.clipping.vectorization import has_accelerator

_LOCK = threading.Lock()
_blocks = 0  # how many `full_float32` blocks are open, in all threads
_was_rounding = False


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """TensorFlow multiplies in full float32 until this block, and each one open in another thread, has ended."""
    global _blocks, _was_rounding
    with _LOCK:
        if not _blocks:
            _was_rounding = tf.config.experimental.tensor_float_32_execution_enabled()
        _blocks += 1
        tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        with _LOCK:
            _blocks -= 1
            if not _blocks:
                tf.config.experimental.enable_tensor_float_32_execution(_was_rounding)


def check_full_float32() -> None:
    """Refuses to trace a private step for a device that would round its products.

    Raises:
      RuntimeError: with the remedy.
    """
    if has_accelerator() and tf.config.experimental.tensor_float_32_execution_enabled():
        raise RuntimeError(
            "A private step needs products in full float32, which GPUs and TPUs round to fewer bits by default. `fit` "
            "and `train_on_batch` see to it; before a loop of your own call "
            "tf.config.experimental.enable_tensor_float_32_execution(False)."
        )
