"""Below real numbers: the noise has a tail, and sums of many examples move by no more than the clip norm."""

import numpy as np
import pytest
import tensorflow as tf

import floating_point
from tests import neighbours
from tf_dpbn.clipping.rows import sum_of_squares, weighted_sum
from tf_dpbn.mechanisms import ROUNDING, normal_from_bits


@pytest.mark.parametrize("engine", floating_point.ENGINES)
def test_one_example_of_many_moves_the_sum_by_at_most_the_clip_norm(engine):
    run = floating_point.sum_of(engine)
    for batch_size in floating_point.BATCH_SIZES:
        assert 0.999 <= floating_point.largest_move(run, batch_size) <= neighbours.SLACK


@pytest.mark.parametrize("shape", [(7, 3), (16, 5, 4), (8, 300, 500)])  # the last one is compiled
def test_weighted_sums_are_those_of_float64(shape):
    rng = np.random.default_rng(0)
    values, weights = rng.normal(size=shape).astype("float32"), rng.uniform(size=shape[0]).astype("float32")
    values[0], values[1] = 2.0**24, -(2.0**24)
    weights[:2] = 1.0
    found = tf.function(weighted_sum, autograph=False)(tf.constant(weights), tf.constant(values))
    assert found.dtype == tf.float64
    np.testing.assert_allclose(found, np.tensordot(weights.astype(float), values.astype(float), 1), atol=1e-7)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_norms_of_long_rows_are_right_to_within_the_margin(jit_compile):
    for shape in ((2, 10**7), (2, 3, 3, 500, 300), (3, 131_101), (2, 5000)):
        values = tf.fill(shape, 0.1)  # equal numbers: all roundings of a running sum are alike
        found = tf.function(sum_of_squares, jit_compile=jit_compile)(values).numpy()
        expected = float(np.float32(0.1)) ** 2 * np.prod(shape[1:])
        np.testing.assert_allclose(np.sqrt(found), np.sqrt(expected), rtol=ROUNDING / 2)


def test_crafted_batches_break_a_float32_sum():
    """What the test above would find in an engine that adds up microbatches in float32."""

    def run(contributions, weights):
        total = np.float32(0.0)
        order = np.argsort(weights == 0, kind="stable")
        for part in np.split((contributions * weights)[order], len(weights) // 128):
            total += part.sum(dtype=np.float32)
        return float(total)

    for batch_size in floating_point.BATCH_SIZES:
        assert floating_point.largest_move(run, batch_size) > 1 + 4e-5


@pytest.mark.parametrize("jit_compile", [False, True])
def test_extreme_bits_give_the_ends_of_the_normal_distribution(jit_compile):
    full, half = 2**32 - 1, 2**31
    words = np.array(
        [  # high, middle, low, angle
            (0, 0, 0, 0),  # the smallest uniform number, 2^-97
            (0, 0, full, 0),
            (0, 1, 0, half),
            (1, 0, 0, 0),
            (full, full, full, 0),  # the largest, 1
            (full, full, full, full),
        ],
        "uint32",
    ).T
    found = tf.function(normal_from_bits, jit_compile=jit_compile)(tf.constant(words)).numpy()
    first = found[:6]
    np.testing.assert_allclose(
        first[:4], np.sqrt(2 * np.log(2) * np.array([97, 64, 64, 32])) * [1, 1, -1, 1], rtol=1e-4
    )
    assert (first[4:] == 0).all() and np.isfinite(found).all()


def test_the_tail_has_its_probability_by_construction():
    """The radius exceeds t where the 96 bits are below 2^96 exp(-t^2/2): counted at powers of two, exactly."""
    for bits in (1, 8, 24, 31, 32, 40, 64, 90):
        edge = 2 ** (96 - bits)  # the uniform number 2^-bits
        below, above = edge - 2 ** max(0, 72 - bits), edge  # as close as floats tell apart
        words = [[n >> 64, n >> 32 & 0xFFFFFFFF, n & 0xFFFFFFFF, 0] for n in (below, above)]
        radius = normal_from_bits(tf.constant(np.array(words, "uint32").T)).numpy()[:2]
        t = np.sqrt(2 * bits * np.log(2))
        assert radius[0] >= t * (1 - 1e-6) and radius[1] <= t * (1 + 1e-6)


def test_noise_goes_beyond_where_tensorflows_ends():
    largest, beyond = floating_point.tail(300_000_000, seed=3)  # 4.1 are expected; none in one seed of 60
    assert largest > floating_point.END_OF_TENSORFLOWS_NORMALS and beyond >= 1
    assert beyond <= 12  # more in one seed of 2,000
