"""Noised and anchored statistics: what is released, with how much noise, and what the layers make of it."""

import contextlib
import functools
import re

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

import tf_dpbn
from tests import helpers
from tf_dpbn import accounting
from tf_dpbn._keras import keras
from tf_dpbn.normalization import GivenStatistics, PublicPass, moments

layers = keras.layers
MODES = ["noised", "anchored"]


def normalization(mode, **kwargs):
    return functools.partial(tf_dpbn.DPBatchNormalization, statistics=mode, **kwargs)


def dense_net(mode, width=5, features=4, **kwargs):
    inputs = keras.Input((features,))
    x = layers.Dense(width)(inputs)
    x = layers.Activation("tanh")(normalization(mode, **kwargs)()(x))
    model = tf_dpbn.DPModel(inputs, layers.Dense(3)(x))
    model.set_public_batch(np.random.default_rng(1).normal(size=(9, features)).astype("float32"))
    return model


def stack(*modes, seed=0):
    """Convolutions with normalizations of these modes, the first of them behind the first convolution."""
    each = iter(modes)
    model = helpers.bn_stack(len(modes), lambda: normalization(next(each))(), model=tf_dpbn.DPModel)
    model.set_public_batch(np.random.default_rng(1).normal(size=(9, 6, 6, 2)).astype("float32"))
    helpers.randomize(model, seed)
    return model


def normalizations(model):
    return [layer for layer in model.layers if isinstance(layer, tf_dpbn.DPBatchNormalization)]


def train(model, x, y, steps, **optimizer):
    arguments = {"inner": keras.optimizers.SGD(0.0), "expected_batch_size": len(x), **optimizer}
    helpers.compiled(model, optimizer=helpers.dp_optimizer(**arguments))
    batch = tf.data.Dataset.from_tensors((x, y)).repeat(steps)
    with pytest.warns(accounting.PrivacyWarning, match="Poisson"):
        model.fit(batch, epochs=1, verbose=0)
    return model


# ---------------------------------------------------------------------- pure functions


def test_mean_residual_at_full_rate_lands_on_the_moments():
    rng = np.random.default_rng(0)
    z = tf.constant(rng.normal(2.0, 3.0, (50, 4, 6)), tf.float64)
    mean, variance = tf.constant(rng.normal(size=6)), tf.constant(rng.uniform(0.5, 30.0, 6))
    each = tf.stack([moments.residuals(row, mean, variance, 1e-3) for row in z])
    found = moments.updated(mean, variance, tf.reduce_mean(each, 0), tf.constant(1.0, tf.float64), 1e-3)
    expected = np.mean(z, (0, 1)), np.mean((z - mean) ** 2, (0, 1))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-9)
    np.testing.assert_allclose(found[1], np.maximum(expected[1], 0.25 * (variance + 1e-3) - 1e-3), rtol=1e-9)


def test_anchored_update_moves_the_statistics_as_the_plain_one():
    rng = np.random.default_rng(0)
    mean_p, variance_p = tf.constant(rng.normal(size=6)), tf.constant(rng.uniform(0.5, 3.0, 6))
    shift, log_scale = tf.constant(rng.normal(size=6)), tf.constant(rng.normal(size=6))
    released, rate = tf.constant(rng.normal(size=12) * 0.1), tf.constant(0.5, tf.float64)
    before = moments.anchored(mean_p, variance_p, shift, log_scale, 0.0)
    after = moments.updated_anchor(shift, log_scale, released, rate)
    found = moments.anchored(mean_p, variance_p, *after, 0.0)
    for one, other in zip(found, moments.updated(*before, released, rate, 0.0), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9)


def test_masked_positions_are_left_out_of_residuals():
    z = np.random.default_rng(0).normal(size=(1, 5, 3)).astype("float32")
    mask = np.array([[True, True, False, True, False]])
    given = tf.zeros([3]), tf.ones([3])
    found = moments.residuals(tf.constant(z), *given, 1e-3, (-1,), tf.constant(mask))
    np.testing.assert_allclose(found, moments.residuals(tf.constant(z[mask]), *given, 1e-3), atol=1e-6)
    nothing = moments.residuals(tf.constant(z), *given, 1e-3, (-1,), tf.constant(np.zeros_like(mask)))
    np.testing.assert_array_equal(nothing, np.zeros(6))


def test_variance_survives_any_release():
    released = tf.constant([0.0, -1e9])
    _, variance = moments.updated(tf.zeros([1]), tf.ones([1]), released, tf.constant(1.0), 0.0)
    assert float(variance[0]) == 0.25


# ---------------------------------------------------------------------- layers in training


@pytest.mark.parametrize("mode", MODES)
def test_statistics_approach_the_moments_of_the_data(mode):
    x, y = np.random.default_rng(0).normal(1.0, 2.0, (64, 4)).astype("float32"), np.zeros(64, int)
    model = dense_net(mode, momentum=0.5, statistics_clip=100.0)
    train(model, x, y, 12)
    z = model.layers[1](x)
    (layer,) = normalizations(model)
    model.evaluate(x, y, verbose=0)  # refreshes
    np.testing.assert_allclose(layer.moving_mean, np.mean(z, 0), atol=1e-3)
    np.testing.assert_allclose(layer.moving_variance, np.var(z, 0), rtol=2e-3)


def test_deep_stack_settles_in_as_many_updates_as_it_has_layers():
    x, y = helpers.images(64)
    model = stack(*["noised"] * 4)
    for layer in normalizations(model):
        layer.statistics_clip = 100.0
    train(model, 3.0 * x, y, 6)
    expected = keras.Model(model.inputs[0], [layer.input for layer in normalizations(model)])(3.0 * x)
    for layer, z in zip(normalizations(model), expected, strict=True):
        np.testing.assert_allclose(layer.moving_mean, np.mean(z, (0, 1, 2)), atol=0.05)


def test_anchored_statistics_need_a_public_batch_and_noised_ones_do_not():
    for mode in MODES:
        model = helpers.bn_stack(1, normalization(mode), model=tf_dpbn.DPModel)
        with pytest.raises(ValueError, match="no public batch") if mode == "anchored" else contextlib.nullcontext():
            train(model, *helpers.images(8), 2)


@pytest.mark.parametrize("clip", [0.0, 1e-25, 1e30])
def test_refuses_bad_statistics_clip(clip):
    with pytest.raises(ValueError, match=re.escape(f"Received: statistics_clip={clip!r}")):
        tf_dpbn.DPBatchNormalization(statistics="noised", statistics_clip=clip)


@pytest.mark.parametrize("mode", MODES)
def test_layer_called_twice_averages_its_releases(mode):
    inputs = keras.Input((5,))
    norm, dense = normalization(mode, statistics_clip=100.0)(), layers.Dense(5, kernel_initializer="orthogonal")
    outputs = layers.Dense(3)(norm(dense(norm(dense(inputs)))))
    model = tf_dpbn.DPModel(inputs, outputs)
    x = np.random.default_rng(0).normal(0.0, 2.0, (32, 5)).astype("float32")
    model.set_public_batch(x[:9])
    train(model, x, np.zeros(32, int), 8)
    assert model.ledger.entries[0].noise_multipliers == (0.0, 0.0, 0.0)
    assert float(norm.statistic_updates) == 8.0
    assert np.isfinite(model.predict(x, verbose=0)).all()


# ---------------------------------------------------------------------- noise and ledger


def noise_of_one_step(mode, sigma, fraction):
    """What a step on padding alone adds to the averages, in units of its promised standard deviation."""
    channels, clip, expected = 4000, 0.7, 50
    model = dense_net(mode, width=channels, momentum=0.0, statistics_clip=clip)
    optimizer = helpers.dp_optimizer(
        inner=keras.optimizers.SGD(0.0),
        noise_multiplier=sigma,
        statistics_fraction=fraction,
        expected_batch_size=expected,
    )
    helpers.compiled(model, optimizer=optimizer)
    model.train_on_batch(np.zeros((8, 4), "float32"), np.zeros(8, int), sample_weight=np.zeros(8, "float32"))
    (layer,) = normalizations(model)
    size = 2 * channels + (4 if mode == "noised" else 0)
    promised = sigma * np.sqrt(1.0 / fraction) * clip * np.sqrt(size) / expected
    average = layer.moving_mean if mode == "noised" else layer.shift
    return np.asarray(average, np.float64) / promised / (np.sqrt(1.0 + layer.epsilon) if mode == "noised" else 1.0)


@pytest.mark.parametrize("mode", MODES)
def test_released_statistics_have_the_promised_noise(mode):
    values = noise_of_one_step(mode, 0.8, 0.2)
    assert stats.kstest(values, "norm").pvalue > 1e-4
    # The same test rejects a tenth more or less: a chi-square of 4,000 values.
    square = np.sum(values**2)
    interval = stats.chi2.interval(1 - 1e-6, len(values))
    assert interval[0] < square < interval[1]
    for wrong in (0.9, 1.1):
        assert not interval[0] < square / wrong**2 < interval[1]


@pytest.mark.parametrize("modes, releases", [(["public"], 0), (["noised", "anchored"], 2)])
def test_ledger_holds_every_release_and_epsilon_is_that_of_the_plan(modes, releases):
    plan = tf_dpbn.PrivacyPlan(
        target_epsilon=3.0, delta=1e-3, num_examples=64, expected_batch_size=16, epochs=1, statistics_fraction=0.3
    )
    model = stack(*modes)
    x, y = helpers.images(64)
    optimizer = tf_dpbn.optimizers.VectorizedDPKerasSGDOptimizer.from_plan(plan, l2_norm_clip=1.0, learning_rate=0.1)
    helpers.compiled(model, optimizer=optimizer)
    model.fit(plan.poisson_dataset(x, y), verbose=0, callbacks=[tf_dpbn.callbacks.PrivacyBudget(3.0)])
    (entry,) = model.ledger.entries
    assert entry.steps == plan.steps
    assert entry.noise_multipliers == accounting.split_noise_multiplier(plan.noise_multiplier, 0.3, releases)
    assert entry.effective_noise_multiplier == pytest.approx(plan.noise_multiplier, rel=1e-12)
    assert model.epsilon(1e-3) <= 3.0


def test_split_noise_never_costs_more_than_the_whole():
    for sigma in (0.3, 1.0, 1.5063696532677078, 17.0):
        for releases in (1, 3, 20):
            parts = accounting.split_noise_multiplier(sigma, 0.1, releases)
            assert len(parts) == releases + 1
            assert sigma <= accounting.effective_noise_multiplier(parts) <= sigma * (1 + 1e-12)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_refuses_bad_statistics_fraction(fraction):
    with pytest.raises(ValueError, match=f"Received: statistics_fraction={fraction!r}"):
        helpers.dp_optimizer(statistics_fraction=fraction)


# ---------------------------------------------------------------------- gradients


def whole_gradient(model, x, y):
    """The gradient of the mean loss, through the anchored statistics, by differentiating all of it at once."""
    variables = model.trainable_variables
    with tf.GradientTape() as tape:
        with PublicPass() as public:
            model(tf.constant(model.public_batch), training=True)
        values = [(call.mean, call.variance) for call in public.calls]
        with GivenStatistics(public.calls, values):
            logits = model(x, training=True)
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(tf.constant(y), logits))
    return tape.gradient(loss, [getattr(v, "value", v) if hasattr(v, "path") else v for v in variables])


def test_anchored_corrections_add_up_to_the_whole_gradient():
    x, y = helpers.images(8)
    model = stack(*["anchored"] * 3)
    helpers.compiled(model, optimizer=helpers.dp_optimizer(l2_norm_clip=1e6), correction="full")
    before = [np.asarray(v) for v in model.trainable_variables]
    model.train_on_batch(x, y)
    step = [a - np.asarray(v) for a, v in zip(before, model.trainable_variables, strict=True)]
    model_again = stack(*["anchored"] * 3)
    assert helpers.relative_error(step, [np.asarray(g) for g in whole_gradient(model_again, x, y)]) < 1e-3


def test_noised_local_term_removes_the_bias_and_the_length_of_the_kernel():
    x, y = helpers.images(8)
    model = helpers.bn_stack(1, normalization("noised"), model=tf_dpbn.DPModel)
    helpers.randomize(model)
    kernel = model.trainable_variables[0]
    helpers.compiled(model, optimizer=helpers.dp_optimizer(l2_norm_clip=1e6))
    gradient, bias_gradient = helpers.clipped_sum_function(model)(x, y)[0][:2]
    scale = np.linalg.norm(gradient)
    np.testing.assert_allclose(bias_gradient, np.zeros(5), atol=1e-5 * scale)
    along = np.sum(gradient * np.asarray(kernel), (0, 1, 2)) / np.linalg.norm(kernel)
    np.testing.assert_allclose(along, np.zeros(5), atol=2e-4 * scale)
    helpers.compiled(model, optimizer=helpers.dp_optimizer(l2_norm_clip=1e6), correction="none")
    uncorrected = helpers.clipped_sum_function(model)(x, y)[0][1]
    assert np.linalg.norm(uncorrected) > 1e-2 * scale


@functools.cache
def sums_of_every_release(engine, jit_compile=False):
    model = stack("noised", "anchored")
    helpers.compiled(model, engine=engine, microbatch_size=4)
    weight = np.array([1, 1, 0, 1, 0.5, 1], "float32")
    return helpers.clipped_sum_function(model, jit_compile, all_releases=True)(*helpers.images(6), weight)[0]


@pytest.mark.parametrize("engine, jit_compile", [("loop", False), ("vectorized", False), ("book_keeping", True)])
def test_engines_agree_on_every_release(engine, jit_compile):
    expected = sums_of_every_release("book_keeping")
    found = sums_of_every_release(engine, jit_compile)
    assert len(expected) == 3
    for one, other in zip(found, expected, strict=True):
        assert helpers.relative_error(one, other) < 1e-4


# ---------------------------------------------------------------------- inputs of any kind


def test_large_inputs_do_not_crowd_out_the_moments():
    x = np.random.default_rng(0).uniform(0.0, 255.0, (256, 8)).astype("float32")
    model = dense_net("noised", width=4, features=8, statistics_clip=10.0)
    train(model, x, np.zeros(256, int), 150)
    (layer,), z = normalizations(model), model.layers[1](x)
    np.testing.assert_allclose(layer.moving_variance, np.var(z, 0), rtol=0.1)
    np.testing.assert_allclose(layer.moving_mean, np.mean(z, 0), atol=0.1 * np.std(z, 0).max())
    ((_, mean),) = model._record.released_means.variables.items()
    np.testing.assert_allclose(mean, np.mean(x, 0), rtol=0.1)


def test_channel_without_public_variance_is_normalized_all_the_same():
    inputs = keras.Input((2,))
    norm = normalization("anchored", momentum=0.5, statistics_clip=100.0)()
    model = tf_dpbn.DPModel(inputs, layers.Dense(3)(norm(layers.Dense(2, kernel_initializer="identity")(inputs))))
    rng = np.random.default_rng(0)
    model.set_public_batch(np.stack([rng.normal(size=16), np.full(16, 3.0)], 1).astype("float32"))
    x = rng.normal(0.0, 2.0, (64, 2)).astype("float32")
    train(model, x, np.zeros(64, int), 30)
    model.refresh_statistics()
    np.testing.assert_allclose(norm.moving_variance, np.var(x, 0), rtol=0.01)


@pytest.mark.parametrize("mode, policy", helpers.spread(MODES, ["mixed_bfloat16", "mixed_float16"]))
def test_half_precision_trains(mode, policy):
    keras.mixed_precision.set_global_policy(policy)
    try:
        model = dense_net(mode, statistics_clip=10.0)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    x = np.random.default_rng(0).normal(1.0, 2.0, (64, 4)).astype("float32")
    train(model, x, np.zeros(64, int), 30)
    (layer,), z = normalizations(model), np.asarray(model.layers[1](x), "float32")
    model.refresh_statistics()
    np.testing.assert_allclose(layer.moving_variance, np.var(z, 0), rtol=0.1)
    assert "float32" in str(layer.statistic_updates.dtype)
