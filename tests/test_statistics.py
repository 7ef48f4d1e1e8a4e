"""The mathematics of batch statistics, against numpy and automatic differentiation."""

import numpy as np
import pytest
import tensorflow as tf

from tf_dpbn.normalization import moments

HALF = {"float16": 2e-3, "bfloat16": 2e-2}


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape) * 2.0 + 1.0


def other_axes(shape, axes):
    kept = {axis % len(shape) for axis in axes}
    return tuple(axis for axis in range(len(shape)) if axis not in kept)


def broadcast(statistic, shape, axes):
    return np.reshape(statistic, [n if k not in other_axes(shape, axes) else 1 for k, n in enumerate(shape)])


@pytest.mark.parametrize("dtype", HALF)
def test_moments_of_half_precision_are_computed_in_float32(dtype):
    z = tf.cast(random(4096, 3) * 30.0 + 200.0, dtype)  # sums and squares overflow float16
    mean, variance = moments.moments(z)
    assert mean.dtype == variance.dtype == tf.float32
    exact = tf.cast(z, tf.float64).numpy()
    np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-5)
    np.testing.assert_allclose(variance, exact.var(0), rtol=1e-4)


def test_moments_are_stable_far_from_zero_and_take_batches_of_unknown_size():
    traced = tf.function(moments.moments, input_signature=[tf.TensorSpec((None, 2))])
    z = random(1000, 2).astype("float32") + 1e4
    np.testing.assert_allclose(traced(z)[1], z.astype("float64").var(0), rtol=1e-3)


MASKED = [((6, 7, 3), (-1,), 1), ((6, 4, 3), (1,), 2), *(((6, 5, 7, 3), (-1,), rank) for rank in (1, 2, 3))]


@pytest.mark.parametrize(("shape", "axes", "mask_rank"), MASKED)
def test_masked_moments_leave_positions_out(shape, axes, mask_rank):
    z = random(*shape)
    mask = np.random.default_rng(1).random(shape[:mask_rank]) < 0.6
    mask[(0,) * mask_rank] = False
    if axes == (1,):
        mask[1] = True  # every channel has a position left
    weights = mask.reshape(mask.shape + (1,) * (len(shape) - mask_rank)) * np.ones(shape)
    poisoned = np.where(weights > 0, z, 1e6)
    mean, variance = moments.moments(tf.constant(poisoned), axes, tf.constant(mask))
    reduced = other_axes(shape, axes)
    expected = np.average(z, reduced, weights)
    centered = np.square(z - broadcast(expected, shape, axes))
    np.testing.assert_allclose(mean, expected, rtol=1e-6)
    np.testing.assert_allclose(variance, np.average(centered, reduced, weights), rtol=1e-4)


# ---------------------------------------------------------------- derivatives by the statistics

EPSILON, CHANNELS = 1e-3, 3


def test_statistics_cotangents_complete_the_gradient_of_batch_normalization():
    """Frozen statistics' gradient by z, plus c_mu and c_v through the moments, is the full one."""
    shape = (6, 4, CHANNELS)
    z, weights = tf.constant(random(*shape)), tf.constant(random(*shape, seed=1))
    gamma, beta = tf.constant(random(CHANNELS, seed=2)), tf.constant(random(CHANNELS, seed=3))

    def loss(z, mean, variance):
        y = moments.normalize(z, mean, variance, gamma, beta, EPSILON)
        return tf.reduce_sum(tf.sin(y * weights))

    with tf.GradientTape() as tape:
        tape.watch(z)
        value = loss(z, *moments.moments(z))
    full = tape.gradient(value, z)
    mean, variance = moments.moments(z)
    with tf.GradientTape() as tape:
        tape.watch([z, gamma, beta])
        value = loss(z, mean, variance)
    frozen, d_gamma, d_beta = tape.gradient(value, [z, gamma, beta])
    c_mu, c_v = moments.statistics_cotangents(d_gamma, d_beta, gamma, variance, EPSILON)
    n = shape[0] * shape[1]
    np.testing.assert_allclose(full, frozen + c_mu / n + 2.0 * c_v * (z - mean) / n, rtol=1e-9, atol=1e-9)
    assert np.abs(full - frozen).max() > 0.1


@pytest.mark.parametrize("signal, low, high", [(0.0, 0.0, 0.25), (0.3, 0.25, 0.9), (3.0, 0.95, 1.0)])
def test_share_of_signal_is_that_of_a_vectors_square(signal, low, high):
    rng = np.random.default_rng(0)
    vectors = signal + 0.4 * rng.normal(size=(200, 12))
    entries, vector = tf.constant(vectors.ravel(), tf.float32), np.repeat(np.arange(200), 12)
    shares = moments.shares_of_signal(entries, tf.constant(0.16), vector)
    np.testing.assert_allclose(shares, np.maximum(0.0, 1.0 - 12 * 0.16 / np.sum(vectors**2, 1)), atol=1e-5)
    assert low <= np.mean(shares) <= high


def test_share_of_signal_is_one_without_noise_and_defined_without_signal():
    assert moments.shares_of_signal(tf.zeros([2]), tf.constant(0.0), np.zeros(2, int)) == [1.0]
    assert np.isfinite(moments.shares_of_signal(tf.zeros([2]), tf.constant(1.0), np.zeros(2, int)))
