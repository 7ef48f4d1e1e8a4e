"""Standardized kernels."""

import numpy as np
import pytest

import tf_dpbn
from tests import helpers
from tf_dpbn._keras import keras
from tf_dpbn.constraints import WeightStandardization

layers = keras.layers


@pytest.mark.parametrize("options, axes, fan_in", [({}, (0, 1, 2), 36), ({"axis": (0, 1)}, (0, 1), 9)])
def test_every_output_channel_has_mean_zero_and_variance_one_over_fan_in(options, axes, fan_in):
    kernel = np.random.default_rng(0).normal(1.0, 3.0, (3, 3, 4, 5)).astype("float32")
    found = np.asarray(WeightStandardization(**options)(kernel))
    np.testing.assert_allclose(found.mean(axes), 0.0, atol=1e-6)
    np.testing.assert_allclose(found.var(axes), 1 / fan_in, rtol=1e-3)
    np.testing.assert_allclose(WeightStandardization(**options)(found), found, atol=1e-3)


def test_training_keeps_kernels_standardized_and_the_engine_its_rules():
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(5, 3, kernel_constraint=WeightStandardization())(inputs)
    x = layers.GlobalAveragePooling2D()(layers.ReLU()(layers.GroupNormalization(1)(x)))
    model = helpers.compiled(
        tf_dpbn.DPModel(inputs, layers.Dense(3)(x)), optimizer=helpers.dp_optimizer(noise_multiplier=1.0)
    )
    x, y = helpers.images(8)
    before = np.asarray(model.layers[1].kernel)
    model.train_on_batch(x, y)
    after = np.asarray(model.layers[1].kernel)
    assert not np.allclose(before, after)
    np.testing.assert_allclose(after.reshape(-1, 5).var(0), 1 / 18, rtol=1e-3)


def test_survives_serialization():
    layer = layers.Dense(3, kernel_constraint=WeightStandardization(axis=[0], epsilon=1e-3))
    again = layers.Dense.from_config(layer.get_config()).kernel_constraint
    assert isinstance(again, WeightStandardization)
    assert (again.axis, again.epsilon) == ((0,), 1e-3)


def test_refuses_an_epsilon_that_is_not_positive():
    with pytest.raises(ValueError, match="epsilon"):
        WeightStandardization(epsilon=0.0)
