"""Constraints on weights, for training under noise; post-processing of what is released, so they cost no privacy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tf_dpbn import _validate
from tf_dpbn._keras import keras


@keras.saving.register_keras_serializable(package="tf_dpbn")
class WeightStandardization(keras.constraints.Constraint):
    """Keeps each output channel of a kernel at mean 0 and variance 1 / fan-in.

    Use it as `Conv2D(..., kernel_constraint=tf_dpbn.constraints.WeightStandardization())`, with group normalization
    above all. It projects the kernel after each update, where the source computes the standardized kernel anew in each
    forward pass: the layer stays an ordinary one, for which per-example norms are cheap.

    Source: Qiao et al. 2019, "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization", arXiv
    1903.10520; De et al. 2022, arXiv 2204.13650, for its use under differential privacy.

    Args:
      axis: axes of the kernel over which mean and variance are taken; fan-in is their size. None takes all but the
        last: right for Dense and Conv. Use (0, 1) for DepthwiseConv2D and (0, 1, 3) for Conv2DTranspose.
      epsilon: added to the variance; > 0.

    Raises:
      ValueError: if epsilon is not positive.
    """

    def __init__(self, axis: Sequence[int] | None = None, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.axis = None if axis is None else tuple(axis)
        self.epsilon = _validate.positive("epsilon", epsilon)

    def __call__(self, w: Any) -> Any:
        """The kernel standardized; same shape and dtype."""
        kernel = tf.convert_to_tensor(w)
        axis = range(kernel.shape.rank - 1) if self.axis is None else self.axis
        mean, variance = tf.nn.moments(kernel, list(axis), keepdims=True)
        fan_in = kernel.shape.num_elements() // mean.shape.num_elements()
        return (kernel - mean) * tf.math.rsqrt(fan_in * (variance + self.epsilon))

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"axis": self.axis, "epsilon": self.epsilon}
