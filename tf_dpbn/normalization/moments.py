"""The mathematics of batch statistics: pure functions on tensors, no layers, no models.

Names follow docs/algorithm.md: z is the input of a normalization, mu and v its mean and variance by channel,
r = 1 / sqrt(v + epsilon).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tf_dpbn import _graph


@dataclasses.dataclass(frozen=True)
class LocalTerm:
    """How the statistics of one normalization call depend on one variable of the layer that feeds it."""

    index: int  # of the variable among the trainable variables
    channel_axes: tuple[int, ...]  # of the variable: flattened, they enumerate the normalization's channels
    d_mean: tf.Tensor  # d mean_o / d variable[.., o], of the variable's shape, float32 or wider
    d_variance: tf.Tensor  # d variance_o / d variable[.., o], likewise
    # Whether d_mean is the same for all o of a group, as where the normalization's input is linear in the variable.
    alike: bool = False

    def pull_back(self, c_mean: tf.Tensor, c_variance: tf.Tensor) -> tf.Tensor:
        """pbar (x) c_mu + V * c_v, [..., *variable.shape], for cotangents of mean and variance, [..., channels]."""
        c_mean, c_variance = (tf.cast(c, self.d_mean.dtype) for c in (c_mean, c_variance))
        return self.spread(c_mean) * self.d_mean + self.spread(c_variance) * self.d_variance

    def spread(self, cotangent: tf.Tensor) -> tf.Tensor:
        """Reshapes [..., channels] so that it broadcasts against the variable."""
        leading = cotangent.shape[:-1]
        if leading.is_fully_defined():
            return _graph.reshape(cotangent, [*leading, *self.spread_shape])
        return tf.reshape(cotangent, tf.concat([tf.shape(cotangent)[:-1], self.spread_shape], 0))

    @property
    def spread_shape(self) -> list[int]:
        """The shape of the variable with all axes but the channels of size one."""
        shape = [1] * self.d_variance.shape.rank
        for axis in self.channel_axes:
            shape[axis] = self.d_variance.shape[axis]
        return shape


def _reduction_axes(rank: int, axes: Sequence[int]) -> list[int]:
    kept = {axis % rank for axis in axes}
    return [axis for axis in range(rank) if axis not in kept]


def broadcast_shape(rank: int, axes: Sequence[int], statistic: tf.Tensor) -> list[int]:
    """The shape in which a statistic, of the shape of the channel axes, is broadcast against such a rank."""
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

    Examples:
      >>> mean, variance = moments(tf.constant([[1.0, 0.0], [3.0, 0.0]]))
      >>> mean.numpy().tolist(), variance.numpy().tolist()
      ([2.0, 0.0], [1.0, 0.0])
    """
    z = widen(z)
    reduce = _reduction_axes(z.shape.rank, axes)
    if mask is None:
        return _plain_moments(z, reduce)
    return tf.nn.weighted_moments(z, reduce, _weights(mask, z))


def _weights(mask: tf.Tensor, z: tf.Tensor) -> tf.Tensor:
    """1 for each element of z at a position that counts, 0 at the others."""
    shape = tf.concat([tf.shape(mask), [1] * (z.shape.rank - mask.shape.rank)], 0)
    return tf.broadcast_to(tf.reshape(tf.cast(mask, z.dtype), shape), tf.shape(z))


def _plain_moments(z: tf.Tensor, reduce: list[int]) -> tuple[tf.Tensor, tf.Tensor]:
    """tf.nn.moments with fewer passes over z in its gradient: it divides by channel, not by element.

    Not by a tf.custom_gradient, which TensorFlow keeps for the life of the process with the graph around it.
    """
    is_last = reduce == list(range(z.shape.rank - 1))  # then the mean broadcasts as it is
    total = tf.reduce_sum(z, reduce, keepdims=not is_last)
    if z.shape.is_fully_defined():
        share = total.shape.num_elements() / z.shape.num_elements()
    else:
        share = tf.cast(tf.size(total), z.dtype) / tf.cast(tf.size(z), z.dtype)
    mean = share * total
    # Moving the mean does not change the variance, to first order.
    squares = tf.math.squared_difference(z, tf.stop_gradient(mean))
    return mean if is_last else tf.squeeze(mean, reduce), share * tf.reduce_sum(squares, reduce)


def widen(tensor: tf.Tensor) -> tf.Tensor:
    """Casts what is narrower to float32, in which statistics, norms and sums are computed."""
    return tensor if tensor.dtype == tf.float64 else tf.cast(tensor, tf.float32)


def normalize(
    z: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    epsilon: float,
    axes: Sequence[int] = (-1,),
) -> tf.Tensor:
    """gamma * (z - mean) * r + beta, by channel; z is [batch, ...], float32 or wider, gamma and beta may be None."""
    shape = broadcast_shape(z.shape.rank, axes, mean)
    is_last = all(size == 1 for size in shape[:-1]) and mean.shape.rank == 1

    def fit(statistic: tf.Tensor | None) -> tf.Tensor | None:
        if statistic is None or is_last:
            return None if statistic is None else tf.cast(statistic, z.dtype)
        return tf.reshape(tf.cast(statistic, z.dtype), shape)

    return tf.nn.batch_normalization(z, fit(mean), fit(variance), fit(beta), fit(gamma), epsilon)


def statistics_cotangents(
    d_gamma: tf.Tensor, d_beta: tf.Tensor, gamma: tf.Tensor, variance: tf.Tensor, epsilon: tf.Tensor | float
) -> tuple[tf.Tensor, tf.Tensor]:
    """Derivatives of the loss by mean and variance, from those by gamma and beta.

        c_mu = -gamma r d_beta,    c_v = -1/2 gamma r^2 d_gamma        (docs/algorithm.md, section 3)

    Linear in (d_gamma, d_beta): it holds for one example and for any weighted, noised sum of examples, which is what
    makes the non-local correction free post-processing. All are [..., channels], of the layer and its forward pass, or
    of several side by side.
    """
    r = tf.math.rsqrt(variance + epsilon)
    return -gamma * r * d_beta, -0.5 * gamma * tf.square(r) * d_gamma


def joined(tensors: Sequence[tf.Tensor | tf.Variable], dtype: tf.DType) -> tf.Tensor:
    """The elements of tensors of static shape side by side, [elements]."""
    return tf.concat([tf.cast(_graph.reshape(each, [each.shape.num_elements()]), dtype) for each in tensors], 0)


def shares_of_signal(average: tf.Tensor, variance: tf.Tensor, vector: np.ndarray) -> tf.Tensor:
    """By how much to scale noised vectors so that what follows from them linearly has the least squared error.

        share = max(0, 1 - size * variance / |average|^2)        (positive-part shrinkage)

    Args:
      average: [entries], noised vectors, or weighted sums of several where the noise of one is averaged out later.
      variance: scalar, that of the noise in each entry of `average`.
      vector: [entries]: to which vector, counted from 0, each entry belongs.

    Returns:
      [vectors], each in [0, 1]; 1 without noise.

    Source: James and Stein, "Estimation with Quadratic Loss", 1961; with `size` for their size - 2.

    Examples:
      >>> shares_of_signal(tf.constant([2.0, 0.0, 1.0]), tf.constant(0.5), np.array([0, 0, 1])).numpy().tolist()
      [0.75, 0.5]
    """
    sizes = np.bincount(vector)
    squares = tf.math.unsorted_segment_sum(tf.square(average), tf.constant(vector), len(sizes))
    return tf.maximum(0.0, 1.0 - tf.math.divide_no_nan(tf.cast(sizes, average.dtype) * variance, squares))


# A release never shrinks a variance to less than this part of it: noise must not make one vanish.
_LEAST_FACTOR = 0.25
# Bound on the logarithm of a private over a public variance.
_LARGEST_LOG_SCALE = 10.0


def residuals(
    z: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    epsilon: float,
    axes: Sequence[int] = (-1,),
    mask: tf.Tensor | None = None,
) -> tf.Tensor:
    """How one example's moments differ from the statistics in use, relative to them: u_i = [m_i; s_i].

        m_i = mean_t (z_t - mu) r,    s_i = mean_t ((z_t - mu)^2 - v) r^2        (docs/algorithm.md, section 5)

    Both are zero on average where mu and v are the moments of the data.

    Args:
      z: [..., channels], one example, with any leading axes.
      mean, variance: of the shape of the channel axes.
      epsilon, axes, mask: as for `moments` and `normalize`.

    Returns:
      [2 * channels], float32 or wider.

    Examples:
      >>> residuals(tf.constant([[1.0], [3.0]]), tf.zeros([1]), tf.ones([1]), 0.0).numpy().tolist()
      [2.0, 4.0]
    """
    z = widen(z)
    shape = broadcast_shape(z.shape.rank, axes, mean)
    centered = z - tf.reshape(tf.cast(mean, z.dtype), shape)
    reduce = _reduction_axes(z.shape.rank, axes)
    if mask is None:
        first, second = tf.reduce_mean(centered, reduce), tf.reduce_mean(tf.square(centered), reduce)
    else:
        weights = _weights(mask, z)
        total = tf.reduce_sum(weights, reduce)
        first = tf.math.divide_no_nan(tf.reduce_sum(weights * centered, reduce), total)
        second = tf.math.divide_no_nan(tf.reduce_sum(weights * tf.square(centered), reduce), total)
        second = tf.where(total > 0, second, tf.cast(variance, z.dtype))
    variance = tf.cast(variance, z.dtype)
    r = tf.math.rsqrt(variance + epsilon)
    return tf.concat([tf.reshape(first * r, [-1]), tf.reshape((second - variance) * tf.square(r), [-1])], 0)


def updated(
    mean: tf.Tensor, variance: tf.Tensor, released: tf.Tensor, rate: tf.Tensor, epsilon: float
) -> tuple[tf.Tensor, tf.Tensor]:
    """Moves statistics by the released, noised mean of residuals.

        mu += rate m~ / r,    v + epsilon *= 1 + rate s~, at least by a factor of 1/4 and to no less than v = 0

    Args:
      mean, variance: [channels].
      released: [2 * channels], see `residuals`.
      rate: scalar in (0, 1], one minus the momentum.
    """
    m, s = tf.split(tf.cast(released, mean.dtype), 2)
    rate = tf.cast(rate, mean.dtype)
    wide = variance + epsilon
    factor = tf.maximum(1.0 + rate * s, _LEAST_FACTOR)
    return mean + rate * m * tf.sqrt(wide), tf.maximum(wide * factor - epsilon, 0.0)


def anchored(
    mean: tf.Tensor, variance: tf.Tensor, shift: tf.Tensor, log_scale: tf.Tensor, epsilon: float
) -> tuple[tf.Tensor, tf.Tensor]:
    """Private statistics from those of a public batch.

        mu = mu_P + sd_P shift,    v + epsilon = (v_P + epsilon) exp(log_scale),    but v >= 0

    Args:
      mean, variance: mu_P and v_P, [channels]; sd_P = sqrt(v_P + epsilon).
      shift, log_scale: [channels], slow averages of released residuals.
    """
    shift, log_scale = tf.cast(shift, mean.dtype), tf.cast(log_scale, mean.dtype)
    wide = variance + epsilon
    return mean + tf.sqrt(wide) * shift, tf.maximum(wide * tf.exp(log_scale) - epsilon, 0.0)


def anchored_cotangents(
    c_mean: tf.Tensor,
    c_variance: tf.Tensor,
    variance: tf.Tensor,
    shift: tf.Tensor,
    log_scale: tf.Tensor,
    epsilon: float,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Carries the loss' derivatives by anchored statistics to the public ones, by the chain rule.

        c_mu_P = c_mu,    c_v_P = exp(log_scale) c_v + shift / (2 sd_P) c_mu        (docs/algorithm.md, section 5)

    without the part by c_v where v is held at 0. Cotangents are [..., channels], the others as for `anchored`.
    """
    shift, log_scale = tf.cast(shift, variance.dtype), tf.cast(log_scale, variance.dtype)
    wide = variance + epsilon
    scale = tf.where(wide * tf.exp(log_scale) > epsilon, tf.exp(log_scale), tf.zeros_like(log_scale))
    return c_mean, scale * c_variance + 0.5 * shift * tf.math.rsqrt(wide) * c_mean


def updated_anchor(
    shift: tf.Tensor, log_scale: tf.Tensor, released: tf.Tensor, rate: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Moves shift and log_scale of `anchored` by the released, noised mean of residuals, as `updated` moves moments."""
    m, s = tf.split(tf.cast(released, shift.dtype), 2)
    shift = shift + rate * m * tf.exp(0.5 * log_scale)  # sd / sd_P
    log_scale = log_scale + tf.math.log(tf.maximum(1.0 + rate * s, _LEAST_FACTOR))
    return shift, tf.clip_by_value(log_scale, -_LARGEST_LOG_SCALE, _LARGEST_LOG_SCALE)


def update_rate(momentum: float, updates: tf.Tensor, layers: int) -> tf.Tensor:
    """One minus the momentum of the next update: max(1 - momentum, 1 / (1 + updates / layers)).

    The first updates count fully: statistics start from arbitrary values, and those of a layer mean something only once
    the layers before it have theirs, so that a network of n layers takes about n updates to settle.

    Args:
      momentum: of the moving average, in [0, 1).
      updates: scalar, how many updates there were.
      layers: how many normalizations there are one after the other.

    Examples:
      >>> [round(float(update_rate(0.75, tf.constant(t), 2)), 2) for t in (0, 2, 100)]
      [1.0, 0.5, 0.25]
    """
    return tf.maximum(1.0 - momentum, layers / (layers + tf.cast(updates, tf.float32)))
