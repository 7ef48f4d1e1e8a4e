"""Behaviours that users of tensorflow-privacy rely on, where no other test asserts them of this library.

docs/migration.md lists all such behaviours and where each is tested.
"""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

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


@pytest.mark.parametrize("weighted", [False, True])
def test_every_example_is_clipped_alone_and_weighted_before(weighted):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 2)).astype("float32"), rng.normal(size=(5, 1)).astype("float32") * 3
    weight = rng.uniform(0.1, 2.0, 5).astype("float32") if weighted else None
    gradients = -2 * x * y * (1.0 if weight is None else weight[:, None])
    norms = np.linalg.norm(gradients, axis=1, keepdims=True)
    assert norms.min() < 1.5 < norms.max()
    update, _ = trained(linear(bias=False), x, y, weight, l2_norm_clip=1.5)
    np.testing.assert_allclose(update, (gradients * np.minimum(1, 1.5 / norms)).mean(0), rtol=1e-5)


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


@pytest.mark.parametrize("units", [1, 4])
def test_losses_of_outputs_with_several_dimensions_are_averaged_by_example(units):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 3, 2)).astype("float32")  # three positions
    y = rng.normal(size=(4, 3, units)).astype("float32")
    inputs = keras.Input((3, 2))
    model = tf_dpbn.DPModel(inputs, layers.Dense(units, use_bias=False, kernel_initializer="zeros")(inputs))
    update, loss = trained(model, x, y, l2_norm_clip=1e9)
    expected = np.mean([-2 * a.T @ b / (3 * units) for a, b in zip(x, y, strict=True)], 0)
    np.testing.assert_allclose(update, expected.ravel(), rtol=1e-4)
    assert loss == pytest.approx(np.mean(y**2), rel=1e-5)


def test_regularizers_reach_weights_that_have_no_other_gradient():
    inputs = keras.Input((10,))
    dense = layers.Dense(1, use_bias=False, kernel_initializer="ones", kernel_regularizer=keras.regularizers.L2(0.025))
    outputs = layers.Rescaling(0.0)(dense(inputs))
    x, y = np.ones((2, 10), "float32"), np.zeros((2, 1), "float32")
    update, _ = trained(tf_dpbn.DPModel(inputs, outputs), x, y, l2_norm_clip=1e-3)  # a clip that would show
    np.testing.assert_allclose(update, 2 * 0.025, rtol=1e-5)


def test_a_saved_model_goes_on_as_the_one_that_was_saved(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(8, 2)).astype("float32"), np.ones((8, 1), "float32")
    model, cls = linear(), tf_dpbn.optimizers.VectorizedDPKerasAdamOptimizer
    model.compile(cls(l2_norm_clip=0.5, noise_multiplier=0.0, num_microbatches=8, learning_rate=0.1), loss="mse")
    model.fit(x, y, batch_size=8, epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is cls and loaded.optimizer.l2_norm_clip == 0.5
    for each in (model, loaded):
        each.fit(x, y, batch_size=8, verbose=0)
    assert loaded.ledger.steps == model.ledger.steps == 3
    for one, other in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [{"num_microbatches": 2, "expected_batch_size": 4}, {"noise_multiplier": -0.1}, {"l2_norm_clip": True}],
    ids=["microbatches of two", "negative noise", "a flag for a number"],
)
def test_arguments_of_another_meaning_are_refused(arguments):
    given = {"l2_norm_clip": 1.0, "noise_multiplier": 1.0, "num_microbatches": 4, **arguments}
    with pytest.raises(ValueError, match="Received: "):
        tf_dpbn.optimizers.VectorizedDPKerasSGDOptimizer(**given)


def test_gradients_that_did_not_go_through_clipping_and_noise_are_not_applied():
    optimizer = tf_dpbn.optimizers.VectorizedDPKerasSGDOptimizer(1.0, 1.0, 4, learning_rate=0.1)
    variable = tf.Variable([1.0])
    with pytest.raises(TypeError, match="clipped and noised gradients"):
        optimizer.apply_gradients([(tf.constant([1.0]), variable)])
    assert variable.numpy() == 1.0
