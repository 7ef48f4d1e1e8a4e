"""Products in full float32 while private steps run.

Recent GPUs round the operands of float32 products to 10 bits of mantissa (TensorFloat-32), TPUs to 7 (bfloat16), unless
they are told not to. A norm and the clipped sum multiply in different orders: rounded so coarsely, a contribution could
exceed the clip norm by more than the noise allows for (docs/privacy.md).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from tf_dpbn.clipping.vectorization import has_accelerator

# Environment variables with which libraries round operands whatever TensorFlow is told, and their harmless values:
# oneDNN on CPUs; cuBLASLt keeps the plan of a product, rounding included, for later ones of its shape.
_ROUNDING = {
    "TF_SET_ONEDNN_FPMATH_MODE": ("", "STRICT"),
    "ONEDNN_DEFAULT_FPMATH_MODE": ("", "STRICT"),
    "DNNL_DEFAULT_FPMATH_MODE": ("", "STRICT"),
    "TF_USE_CUBLASLT": ("", "0", "FALSE"),
}
_LOCK = threading.Lock()
_blocks = 0  # how many `full_float32` blocks are open, in all threads
_was_rounding = False


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """TensorFlow multiplies in full float32 until this block, and each one open in another thread, has ended.

    Raises:
      RuntimeError: see `check_rounding`.
    """
    global _blocks, _was_rounding
    check_rounding()
    with _LOCK:
        if not _blocks:
            _was_rounding = tf.config.experimental.tensor_float_32_execution_enabled()
        _blocks += 1
        tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
        if not tf.config.experimental.get_synchronous_execution():
            tf.test.experimental.sync_devices()  # what was started here runs to its end
    finally:
        with _LOCK:
            _blocks -= 1
            if not _blocks:
                tf.config.experimental.enable_tensor_float_32_execution(_was_rounding)


def in_full_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, each call of which is a `full_float32` block."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with full_float32():
            return function(*args, **kwargs)

    return call


def check_rounding() -> None:
    """Refuses settings that narrow the operands of products whatever a step asks for, or remove its assertions.

    Raises:
      RuntimeError: with the remedy.
    """
    for option, value in tf.config.optimizer.get_experimental_options().items():
        if option.startswith("auto_mixed_precision") and value:
            raise RuntimeError(
                f"TensorFlow's option {option!r} would narrow the products that clipping relies on. Call "
                f"tf.config.optimizer.set_experimental_options({{{option!r}: False}}), and for half precision use "
                "keras.mixed_precision, whose norms and sums are float32."
            )
        if option == "debug_stripper" and value:
            raise RuntimeError(
                "TensorFlow's option 'debug_stripper' removes assertions by which private steps refuse to run. Call "
                "tf.config.optimizer.set_experimental_options({'debug_stripper': False})."
            )
    for name, harmless in _ROUNDING.items():
        if os.environ.get(name, "").upper() not in harmless:
            raise RuntimeError(
                f"The environment variable {name} lets products that clipping relies on be rounded. Start Python "
                f"without it. Received: {name}={os.environ[name]!r}"
            )


def check_full_float32() -> None:
    """Refuses to trace a private step for a device that would round its products.

    Raises:
      RuntimeError: with the remedy.
    """
    check_rounding()
    if has_accelerator() and tf.config.experimental.tensor_float_32_execution_enabled():
        raise RuntimeError(
            "A private step needs products in full float32, which GPUs and TPUs round to fewer bits by default. `fit` "
            "and `train_on_batch` see to it; before a loop of your own call "
            "tf.config.experimental.enable_tensor_float_32_execution(False), and leave it so while the loop runs."
        )
