"""The mathematics of batch statistics: pure functions on tensors, no layers, no models.

Names follow docs/algorithm.md: z is the input of a normalization, mu and v its mean and variance by channel,
r = 1 / sqrt(v + epsilon).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf


def _reduction_axes(rank: int, axes: Sequence[int]) -> list[int]:
    kept = {axis % rank for axis in axes}
    return [axis for axis in range(rank) if axis not in kept]


def _broadcast_shape(rank: int, axes: Sequence[int], statistic: tf.Tensor) -> list[int]:
    shape = [1] * rank
    for axis, size in zip(sorted(axis % rank for axis in axes), statistic.shape, strict=True):
        shape[axis] = size
    return shape


def moments(z: tf.Tensor, axes: Sequence[int] = (-1,), mask: tf.Tensor | None = None) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and (biased) variance of z by channel, in float32 or wider.

    Args:
      z: [batch, ...], any float type.
      axes: the channel axes; all others are averaged over.
      mask: bool, of the shape of the first axes of z; False positions are left out.

    Returns:
      (mean, variance), each of the shape of the channel axes.

    >>> mean, variance = moments(tf.constant([[1.0, 0.0], [3.0, 0.0]]))
    >>> mean.numpy().tolist(), variance.numpy().tolist()
    ([2.0, 0.0], [1.0, 0.0])
    """
    z = widen(z)
    reduce = _reduction_axes(z.shape.rank, axes)
    if mask is None:
        return _plain_moments(z, reduce)
    weights = tf.cast(mask, z.dtype)
    while weights.shape.rank < z.shape.rank:
        weights = weights[..., None]
    return tf.nn.weighted_moments(z, reduce, tf.broadcast_to(weights, tf.shape(z)))


def _plain_moments(z: tf.Tensor, reduce: list[int]) -> tuple[tf.Tensor, tf.Tensor]:
    """tf.nn.moments with its gradient in one multiplication and one addition by channel (half as many passes over z)."""

    @tf.custom_gradient
    def compute(z: tf.Tensor) -> Any:
        mean, variance = tf.nn.moments(z, reduce, keepdims=True)
        count = tf.cast(tf.size(z), z.dtype) / tf.cast(tf.size(mean), z.dtype)

        def gradient(d_mean: tf.Tensor, d_variance: tf.Tensor) -> tf.Tensor:
            d_mean, d_variance = (tf.reshape(d, tf.shape(mean)) / count for d in (d_mean, d_variance))
            return z * (2.0 * d_variance) + (d_mean - 2.0 * d_variance * mean)

        return (tf.squeeze(mean, reduce), tf.squeeze(variance, reduce)), gradient

    return compute(z)


def widen(z: tf.Tensor) -> tf.Tensor:
    """Casts half precision to float32, in which statistics are computed; leaves wider types alone."""
    return tf.cast(z, tf.float32) if z.dtype in (tf.float16, tf.bfloat16) else z


def normalize(
    z: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    epsilon: float,
    axes: Sequence[int] = (-1,),
) -> tf.Tensor:
    """gamma * (z - mean) * r + beta, by channel.

    Args:
      z: [batch, ...], float32 or wider.
      mean, variance, gamma, beta: of the shape of the channel axes; gamma and beta may be None.
      epsilon: added to the variance.
      axes: the channel axes.
    """
    shape = _broadcast_shape(z.shape.rank, axes, mean)

    def fit(statistic: tf.Tensor | None) -> tf.Tensor | None:
        return None if statistic is None else tf.reshape(tf.cast(statistic, z.dtype), shape)

    return tf.nn.batch_normalization(z, fit(mean), fit(variance), fit(beta), fit(gamma), epsilon)


def statistics_cotangents(
    d_gamma: tf.Tensor, d_beta: tf.Tensor, gamma: tf.Tensor, variance: tf.Tensor, epsilon: float
) -> tuple[tf.Tensor, tf.Tensor]:
    """Derivatives of the loss by mean and variance, from those by gamma and beta.

        c_mu = -gamma r d_beta,    c_v = -1/2 gamma r^2 d_gamma        (docs/algorithm.md, section 3)

    Linear in (d_gamma, d_beta): it holds for one example and for any weighted, noised sum of examples, which is what
    makes the non-local correction free post-processing.

    Args:
      d_gamma, d_beta: gradients of the scale and offset, shape [channels].
      gamma, variance: the scale and the variance used in the forward pass, shape [channels].
      epsilon: the layer's epsilon.
    """
    r = tf.math.rsqrt(variance + epsilon)
    return -gamma * r * d_beta, -0.5 * gamma * tf.square(r) * d_gamma
