"""Behaviours that users of tensorflow-privacy rely on, where no other test asserts them of this library.

docs/migration.md lists all such behaviours and where each is tested.
"""

from __future__ import annotations

import numpy as np
import pytest

import tf_dpbn
from tests import helpers
from tf_dpbn._keras import keras

pytestmark = pytest.mark.filterwarnings("ignore:The batches do not come from PrivacyPlan")

layers = keras.layers
# A linear model at weights 0 on x = (2, -1), y = 3: the loss (w x + b - y)^2 has the gradient (-12, 6, -6).
X, Y, GRADIENT = np.array([[2.0, -1.0]], "float32"), np.array([[3.0]], "float32"), np.array([-12.0, 6.0, -6.0])
OPTIMIZERS = ("SGD", "Adam", "Adagrad")


def linear(bias=True, inputs=2):
    """A model of one dense layer whose weights are zero."""
    return tf_dpbn.DPSequential([keras.Input((inputs,)), layers.Dense(1, use_bias=bias, kernel_initializer="zeros")])


def trained(model, x, y, weight=None, loss="mse", **kwargs):
    """What one step of SGD at rate 1 takes from the trainable weights, flat, and the logged loss."""
    arguments = {"expected_batch_size": len(x), **kwargs}
    model.compile(helpers.dp_optimizer(**arguments), loss=loss)
    before = helpers.flat(v.numpy() for v in model.trainable_variables)
    history = model.fit(x, y, sample_weight=weight, batch_size=len(x), shuffle=False, verbose=0).history
    return before - helpers.flat(v.numpy() for v in model.trainable_variables), history["loss"][0]


@pytest.mark.parametrize("weight", [None, 0.25])
@pytest.mark.parametrize("clip", [2.0, 9.0, 1e6])
def test_the_clip_norm_bounds_the_gradient_over_all_variables_together(clip, weight):
    expected = GRADIENT * (weight or 1.0)
    expected = expected * min(1.0, clip / np.linalg.norm(expected))  # sqrt(12^2 + 6^2 + 6^2) = 14.7
    weights = None if weight is None else np.array([weight], "float32")
    update, loss = trained(linear(), X, Y, weights, l2_norm_clip=clip)
    np.testing.assert_allclose(update, expected, rtol=1e-5)
    assert loss == pytest.approx(9.0 * (weight or 1.0))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_noise_and_clipping_the_optimizers_are_those_of_keras(name):
    x, y = np.random.default_rng(0).normal(size=(8, 2)).astype("float32"), np.arange(8, dtype="float32")[:, None]
    ours, plain = linear(), keras.Sequential([keras.Input((2,)), layers.Dense(1, kernel_initializer="zeros")])
    cls = getattr(tf_dpbn.optimizers, f"VectorizedDPKeras{name}Optimizer")
    ours.compile(cls(l2_norm_clip=1e9, noise_multiplier=0.0, num_microbatches=4, learning_rate=0.1), loss="mse")
    plain.compile(getattr(keras.optimizers, name)(learning_rate=0.1), loss="mse")
    for model in (ours, plain):
        model.fit(x, y, batch_size=4, epochs=3, shuffle=False, verbose=0)
    for one, other in zip(ours.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("clip", "multiplier", "batch"), [(3.0, 2.0, 1), (5.0, 4.0, 4)])
def test_noise_is_the_clip_norm_times_the_multiplier_over_the_batch_size(clip, multiplier, batch):
    x, y = np.zeros((batch, 4000), "float32"), np.zeros((batch, 1), "float32")  # gradient zero
    model = linear(bias=False, inputs=4000)
    update, _ = trained(model, x, y, l2_norm_clip=clip, noise_multiplier=multiplier)

    def accepts(stddev):
        return abs(update.std() / stddev - 1.0) < 5.0 / np.sqrt(2 * update.size)

    promised = clip * multiplier / batch
    assert accepts(promised) and not accepts(0.9 * promised) and not accepts(1.1 * promised)
