"""Half precision: what is clipped is float32, and loss scaling changes its range only."""

import numpy as np
import pytest
import tensorflow as tf

import tf_dpbn
from tests import helpers
from tf_dpbn._keras import keras

pytestmark = pytest.mark.both

layers = keras.layers


def network(policy, scale_down=1.0):
    keras.mixed_precision.set_global_policy(policy)
    try:
        inputs = keras.Input((6, 6, 2))
        x = layers.Conv2D(4, 3, padding="same")(inputs)
        x = layers.Activation("relu")(tf_dpbn.DPBatchNormalization()(x))
        x = layers.Dense(5)(layers.Flatten()(layers.Conv2D(3, 3, strides=2)(x)))
        outputs = layers.Dense(3, dtype="float32")(layers.Rescaling(scale_down)(x))
        model = tf_dpbn.DPModel(inputs, outputs)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    helpers.randomize(model)
    model.set_public_batch(helpers.images(8, seed=1)[0])
    return model


def clipped(model, clip=0.05, n=6, **kwargs):
    helpers.compiled(model, optimizer=helpers.dp_optimizer(l2_norm_clip=clip), **kwargs)
    sums, result = helpers.clipped_sum_function(model)(*helpers.images(n))
    return helpers.flat(sums), result


TOLERANCES = {"mixed_float16": 0.02, "mixed_bfloat16": 0.1}


@pytest.fixture(scope="module")
def expected():
    return clipped(network("float32"))[0]


@pytest.mark.parametrize("policy, method", helpers.spread(list(TOLERANCES), ["instantiate", "gram"]))
def test_clipped_sums_are_close_to_those_of_single_precision_and_one_example_is_clipped(policy, method, expected):
    optimizer = helpers.dp_optimizer(l2_norm_clip=0.05)
    model = helpers.compiled(network(policy), optimizer=optimizer, norm_method=method)
    run, (x, y) = helpers.clipped_sum_function(model), helpers.images(6)
    found, result = run(x, y, np.ones(6, "float32"))
    assert helpers.relative_error(found, [expected]) < TOLERANCES[policy]
    assert result.loss.dtype == tf.float32
    for scale in (1.0, 30.0):
        for alone in np.eye(6, dtype="float32"):
            assert np.linalg.norm(helpers.flat(run(x * scale, y, alone)[0])) <= 0.05 * (1 + 1e-5)


def test_sums_are_accumulated_in_single_precision():
    """In half precision 4,096 equal terms of a bias' gradient would stop growing at 2,048."""
    keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        inputs = keras.Input((4096, 1))
        model = tf_dpbn.DPModel(inputs, layers.Dense(1, use_bias=True)(inputs))
    finally:
        keras.mixed_precision.set_global_policy("float32")
    model.set_weights([np.zeros((1, 1)), np.zeros(1)])
    model.compile(
        helpers.dp_optimizer(l2_norm_clip=1e9), lambda y, p: tf.reduce_sum(tf.cast(p, "float32")), loss_scale=1
    )
    sums, _ = helpers.clipped_sum_function(model)(np.ones((1, 4096, 1), "float32"), np.zeros((1, 1)))
    np.testing.assert_allclose(helpers.flat(sums), [4096.0, 4096.0])


def test_loss_scale_saves_small_gradients_in_half_precision():
    expected, _ = clipped(network("float32", scale_down=2.0**-20), clip=1e6)
    expected = expected[:12]  # the first kernel, below a factor that half precision cannot hold
    scaled, _ = clipped(network("mixed_float16", scale_down=2.0**-20), clip=1e6)
    lost, _ = clipped(network("mixed_float16", scale_down=2.0**-20), clip=1e6, loss_scale=1)
    assert helpers.relative_error([scaled[:12]], [expected]) < 0.1
    assert helpers.relative_error([lost[:12]], [expected]) > 0.2


def test_an_overflow_drops_that_example_alone():
    model = network("mixed_float16")
    x, y = helpers.images(4)
    x[1] *= 3e4
    run = helpers.clipped_sum_function(helpers.compiled(model, loss_scale=2.0**14))
    sums, result = run(x, y, np.array([1.0, 1.0, 1.0, 1.0], "float32"))
    others, _ = run(x, y, np.array([1.0, 0.0, 1.0, 1.0], "float32"))
    assert int(result.non_finite) == 1
    np.testing.assert_allclose(helpers.flat(sums), helpers.flat(others), atol=1e-6)


def test_refuses_loss_scales_that_would_round():
    model = network("float32")
    for value in (0, -2, 3, 1.5, float("inf"), "8"):
        with pytest.raises(ValueError, match="loss_scale"):
            helpers.compiled(model, loss_scale=value)
