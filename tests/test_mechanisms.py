"""The privacy boundary: what may cross it, and the law of the noise that is added there."""

import math
import re

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from tests import helpers
from tf_dpbn._keras import keras
from tf_dpbn.mechanisms import ROUNDING, ClippedSum, NoisedGradients, NoiseSource, add_gaussian_noise, clip_weights

# Statistical tests use seeded noise, so nothing here is flaky. The right noise fails a test at this
# level with probability 1e-3 at writing; the planted wrong one falls far below `REJECTED`.
ACCEPTED, REJECTED = 1e-3, 1e-6

INF, NAN = math.inf, math.nan

CLIP_WEIGHTS = [
    # squared norm, clip, weight
    (0.0, 1.0, 1.0),
    (0.25, 1.0, 1.0),
    (1.0, 1.0, 1.0),
    (4.0, 1.0, 0.5),
    (16.0, 2.0, 0.5),
    (3e38, 1.0, 1.0 / math.sqrt(3e38)),
    (INF, 1.0, 0.0),
    (NAN, 1.0, 0.0),
    (0.0, INF, 1.0),
    (INF, INF, 0.0),
]


def clipped_zeros(*shapes, sensitivity=1.0):
    return ClippedSum(tuple(tf.zeros(shape) for shape in shapes), sensitivity)


def noise_of(source, *shapes, multiplier=1.0, sensitivity=1.0, denominator=1.0):
    """The noise alone: what is released of sums that are zero."""
    clipped = clipped_zeros(*shapes, sensitivity=sensitivity)
    released = add_gaussian_noise(clipped, multiplier, denominator, source)
    return [tensor.numpy() for tensor in released.tensors]


# ---------------------------------------------------------------- clipping


@pytest.mark.parametrize(("squared_norm", "clip", "weight"), CLIP_WEIGHTS)
def test_clip_weights(squared_norm, clip, weight):
    squared_norms = tf.constant([squared_norm, 1.0])
    found = clip_weights(squared_norms, clip, None)
    assert found.dtype == tf.float32
    np.testing.assert_allclose(found[0], weight, rtol=1e-6)
    masked = clip_weights(squared_norms, clip, tf.constant([False, True])).numpy()
    assert masked[0] == 0.0
    assert masked[1] == found[1]


# ---------------------------------------------------------------- ClippedSum is not a tensor

SECRET = 1234.5

MISUSES = [
    list,
    len,
    float,
    tf.convert_to_tensor,
    tf.reduce_sum,
    lambda c: c + 1.0,
    lambda c: tf.zeros([2]) + c,
    lambda c: c[0],
    lambda c: keras.optimizers.SGD().apply_gradients(c),
    lambda c: tf.function(lambda: c)(),
]


def test_clipped_sum_is_not_a_tensor_and_shows_no_data():
    for misuse in MISUSES:
        with pytest.raises((TypeError, ValueError)):
            misuse(ClippedSum((tf.constant([SECRET, 1.0]),), 1.0))
    clipped = ClippedSum((tf.constant([SECRET]), tf.zeros([3])), 2.5)
    for text in (repr(clipped), str(clipped), f"{clipped}"):
        assert text == "ClippedSum(2 tensors, l2_sensitivity=2.5)"


# ------------------------------------------------------------ add_gaussian_noise: values and errors


def test_without_noise_the_mean_is_exact_and_the_sum_may_be_unbounded():
    sums = (tf.constant([3.0, -1.5]), tf.constant([[0.1]]))
    released = add_gaussian_noise(ClippedSum(sums, 1.0), 0.0, 3.0, NoiseSource())
    assert isinstance(released, NoisedGradients)
    for found, each in zip(released.tensors, sums, strict=True):
        np.testing.assert_array_equal(found, each / 3.0)
    released = add_gaussian_noise(clipped_zeros([2], sensitivity=INF), 0, 1, NoiseSource())
    np.testing.assert_array_equal(released.tensors[0], [0.0, 0.0])


BAD_ARGUMENTS = [
    (dict(multiplier=-0.5), r"noise_multiplier.*Received: noise_multiplier=-0\.5"),
    (dict(multiplier=INF), r"noise_multiplier.*Received: noise_multiplier=inf"),
    (dict(denominator=0.0), r"denominator.*Received: denominator=0\.0"),
    (dict(sensitivity=INF), r"l2_sensitivity.*Received: l2_sensitivity=inf"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_refuses_bad_numbers(arguments, message):
    with pytest.raises(ValueError, match=message):
        noise_of(NoiseSource(), [2], **arguments)


@pytest.mark.parametrize("gradients", [[1.0], (tf.zeros([2]),), NoisedGradients(()), None])
def test_refuses_anything_but_a_clipped_sum(gradients):
    with pytest.raises(TypeError, match=rf"be a ClippedSum.*{re.escape(repr(gradients))}"):
        add_gaussian_noise(gradients, 1.0, 1.0, NoiseSource())


def test_plus_adds_terms_and_none():
    gradients = NoisedGradients((tf.constant([1.0]), tf.constant([2.0])))
    found = gradients.plus([None, tf.constant([0.5], tf.float64)])
    assert [t.numpy().tolist() for t in found.tensors] == [[1.0], [2.5]]
    with pytest.raises(ValueError, match="zip"):
        gradients.plus([None])


# ---------------------------------------------------------------- the law of the noise


def scale_p_value(draws, stddev):
    """Two-sided chi-square test of the variance of N(0, stddev^2) draws."""
    statistic = np.sum(np.square(draws / stddev))
    return 2.0 * min(stats.chi2.cdf(statistic, draws.size), stats.chi2.sf(statistic, draws.size))


@pytest.mark.parametrize(("multiplier", "sensitivity", "denominator"), [(1.3, 1.0, 1.0), (0.7, 3.0, 64.0)])
def test_noise_is_gaussian_of_the_right_scale(multiplier, sensitivity, denominator):
    source, shapes = NoiseSource(7), ([100, 30], [500], [])
    calls = [
        noise_of(source, *shapes, multiplier=multiplier, sensitivity=sensitivity, denominator=denominator)
        for _ in range(4)
    ]
    draws = np.concatenate([each.ravel() for call in calls for each in call]).astype("float64")
    stddev = multiplier * sensitivity / denominator
    assert stats.kstest(draws, "norm", (0.0, stddev)).pvalue > ACCEPTED
    assert scale_p_value(draws, stddev) > ACCEPTED
    for wrong in (0.9, 1.1):
        assert stats.kstest(wrong * draws, "norm", (0.0, stddev)).pvalue < REJECTED
        assert scale_p_value(wrong * draws, stddev) < REJECTED


def correlation_p_value(a, b):
    return stats.pearsonr(a.ravel(), b.ravel()).pvalue


def test_noise_is_independent_across_variables_calls_and_elements():
    source, n = NoiseSource(11), 20_000
    first, second = noise_of(source, [n], [n])
    third, fourth = noise_of(source, [n], [n])
    for a, b in [(first, second), (third, fourth), (first, third), (second, fourth), (second, third)]:
        assert correlation_p_value(a, b) > ACCEPTED
        assert correlation_p_value(a**2, b**2) > ACCEPTED
        assert np.intersect1d(a, b).size < n / 100  # some float32 draws meet by chance
    for lag in (1, 2, 3, 4, 128):
        assert correlation_p_value(first[lag:], first[:-lag]) > ACCEPTED
    mixed = np.sqrt(0.99) * second + 0.1 * first  # a planted dependence
    assert correlation_p_value(first, mixed) < REJECTED


def test_first_draws_of_consecutive_steps_are_independent():
    """A poor seed schedule shows in the first elements, as the counter moves by one."""
    source = NoiseSource(5)
    steps = tf.function(lambda: source.standard_normal([tf.TensorShape([2])])[0])
    draws = np.array([steps().numpy() for _ in range(2000)])
    assert stats.kstest(draws[:, 0], "norm").pvalue > ACCEPTED
    assert correlation_p_value(draws[1:, 0], draws[:-1, 0]) > ACCEPTED
    assert correlation_p_value(draws[:, 0], draws[:, 1]) > ACCEPTED


# ---------------------------------------------------------------- no draw repeats


def test_global_seeds_do_not_make_noise_repeat():
    draws = []
    for _ in range(2):
        keras.utils.set_random_seed(1)
        tf.random.set_seed(1)
        np.random.seed(1)
        source = NoiseSource()
        draws += [*noise_of(source, [50])]
        tf.random.set_seed(1)
        draws += [*noise_of(source, [50])]
    assert len({draw.tobytes() for draw in draws}) == 4


def test_a_given_seed_repeats():
    draws = [noise_of(NoiseSource(seed), [4], [2, 3]) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(helpers.flat(draws[0]), helpers.flat(draws[1]))
    assert not np.intersect1d(helpers.flat(draws[0]), helpers.flat(draws[2])).size


@pytest.mark.parametrize("jit_compile", [False, True])
def test_no_draw_repeats_in_a_function(jit_compile):
    source = NoiseSource()

    @tf.function(jit_compile=jit_compile)
    def loop(x):
        draws = tf.TensorArray(tf.float32, 5)
        for step in tf.range(5):
            a, b = source.standard_normal([tf.TensorShape([4]), tf.TensorShape([4])])
            draws = draws.write(step, tf.stack([a, b]))
        return draws.stack() + 0.0 * tf.reduce_sum(x)

    traces = [loop(tf.zeros([1])), loop(tf.zeros([1])), loop(tf.zeros([2]))]
    rows = tf.concat(traces, 0).numpy().reshape(-1, 4)
    assert len({row.tobytes() for row in rows}) == 30


def test_seeds_of_draws_keep_all_their_bits(monkeypatch):
    """A seed of 32 bits would repeat after some 65,000 steps, and could be found by search."""
    seeds, draw = [], tf.random.stateless_uniform

    def recorded(shape, seed, dtype, **kwargs):
        if dtype == tf.uint32:  # the bits of the noise, not the seed that they are drawn by
            seeds.append(seed.numpy())
        return draw(shape, seed, dtype=dtype, **kwargs)

    monkeypatch.setattr(tf.random, "stateless_uniform", recorded)
    source = NoiseSource(0)
    for _ in range(50):
        source.standard_normal([tf.TensorShape([1])] * 3)
    words = np.array(seeds)
    assert words.dtype == np.int64
    assert len(np.unique(words[:, 0])) == len(np.unique(words[:, 1])) == 50
    for word in words.T:
        assert np.bitwise_or.reduce(word) == -1  # each bit is set in some seed
        assert np.bitwise_and.reduce(word) == 0  # and clear in another


def test_noise_is_added_to_the_sum_and_covers_the_rounding_of_clipped_vectors():
    source, other = NoiseSource(seed=3), NoiseSource(seed=3)
    (drawn,) = source.standard_normal([tf.TensorShape([1000])])
    found = add_gaussian_noise(clipped_zeros([1000], sensitivity=2.0), 1.5, 1.0, other).tensors[0]
    np.testing.assert_allclose(found.numpy() / drawn.numpy(), 3.0 * (1 + ROUNDING), rtol=5e-7)
    moved = add_gaussian_noise(ClippedSum((tf.fill([1000], 100.0),), 2.0), 1.5, 4.0, NoiseSource(seed=3)).tensors[0]
    np.testing.assert_allclose(moved, 25.0 + found / 4.0, rtol=1e-6)
