"""Accelerators, and products in full float32 on them.

Recent GPUs round the operands of float32 products to 10 bits of mantissa (TensorFloat-32), TPUs to 7 (bfloat16), unless
they are told not to. A norm and the clipped sum multiply in different orders: rounded so coarsely, a contribution could
exceed the clip norm by more than the noise allows for (docs/privacy.md).
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator

import tensorflow as tf

# Environment variables with which libraries round operands whatever TensorFlow is told, and their harmless values:
# oneDNN on CPUs; cuBLASLt keeps the plan of a product, rounding included, for later ones of its shape.
_ROUNDING = {
    "TF_SET_ONEDNN_FPMATH_MODE": ("", "STRICT"),
    "ONEDNN_DEFAULT_FPMATH_MODE": ("", "STRICT"),
    "DNNL_DEFAULT_FPMATH_MODE": ("", "STRICT"),
    "TF_USE_CUBLASLT": ("", "0", "FALSE"),
}


def has_accelerator() -> bool:
    """Whether TensorFlow sees a GPU or a TPU."""
    return bool(tf.config.list_logical_devices("GPU") + tf.config.list_logical_devices("TPU"))


class _Tracing(threading.local):
    compiled = False


_TRACING = _Tracing()


@contextlib.contextmanager
def traced_for_xla(compiled: bool) -> Iterator[None]:
    """Says whether XLA will compile what is traced on this thread."""
    before, _TRACING.compiled = _TRACING.compiled, compiled
    try:
        yield
    finally:
        _TRACING.compiled = before


def has_cpu_kernels() -> bool:
    """Whether what is traced will run in TensorFlow's own kernels for CPUs."""
    return not has_accelerator() and not _TRACING.compiled


@functools.cache
def has_grouped_filter_gradients() -> bool:
    """Whether TensorFlow's kernels have filter gradients of convolutions in groups; on CPUs oneDNN's do."""
    with tf.init_scope():
        try:
            tf.raw_ops.Conv2DBackpropFilter(
                input=tf.zeros([1, 4, 4, 4]),
                filter_sizes=[2, 2, 2, 4],
                out_backprop=tf.zeros([1, 3, 3, 4]),
                strides=[1, 1, 1, 1],
                padding="VALID",
            )
        except tf.errors.OpError:
            return False
    return True


def require_full_float32() -> None:
    """Has TensorFlow multiply in full float32, from here on and in all of the process, or refuses what prevents it."""
    for option, value in tf.config.optimizer.get_experimental_options().items():
        if option.startswith("auto_mixed_precision") and value:
            raise RuntimeError(
                f"TensorFlow's option {option!r} would narrow the products that clipping relies on. Call "
                f"tf.config.optimizer.set_experimental_options({{{option!r}: False}}), and for half precision use "
                "keras.mixed_precision, whose norms and sums are float32."
            )
    for name, harmless in _ROUNDING.items():
        if os.environ.get(name, "").upper() not in harmless:
            raise RuntimeError(
                f"The environment variable {name} lets products that clipping relies on be rounded. Start Python "
                f"without it. Received: {name}={os.environ[name]!r}"
            )
    tf.config.experimental.enable_tensor_float_32_execution(False)
