"""The layer in stock models that tensorflow-privacy's optimizers train."""

from __future__ import annotations

import functools
import math
import types
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf

import tf_dpbn
from tests import helpers, neighbours
from tests import tensorflow_privacy as tfp
from tf_dpbn import interop
from tf_dpbn._keras import IS_KERAS_3, keras
from tf_dpbn.interop import statistics_scope

pytestmark = [pytest.mark.tensorflow_privacy, pytest.mark.filterwarnings("ignore:A noise multiplier is 0")]

layers = keras.layers
ROWS = tfp.ROWS


def normalization(statistics, **kwargs):
    return functools.partial(tf_dpbn.DPBatchNormalization, statistics=statistics, **kwargs)


def stock(statistics="public", optimizer=None, depth=2, **kwargs):
    """A compiled stock model with random weights."""
    model = helpers.bn_stack(depth, normalization(statistics))
    helpers.randomize(model)
    return helpers.compiled(model, tfp.LOSS, optimizer or tfp.optimizer(**kwargs))


def plan(**kwargs):
    given = {"noise_multiplier": 1.0, "delta": 1e-3, "num_examples": 40, "expected_batch_size": 8, "epochs": 2}
    return tf_dpbn.PrivacyPlan(**{**given, **kwargs})


def padded(rows=ROWS, examples=4, seed=0):
    """x, y, weight; the last rows are padding."""
    x, y = helpers.images(rows, seed=seed)
    weight = (np.arange(rows) < examples).astype("float32")
    x[weight == 0], y[weight == 0] = 0, 0
    return x, y, weight


# ------------------------------------------------------------------ training


@pytest.mark.parametrize(("name", "statistics"), [("SGD", "noised"), ("Adam", "noised"), ("Adagrad", "public")])
def test_compile_and_fit_train_with_every_optimizer(name, statistics):
    optimizer = tfp.optimizer(name, noise_multiplier=1.2, learning_rate=0.1)
    model, the_plan = stock(statistics, optimizer, depth=1), plan()
    batch = tf_dpbn.public_data.uniform_noise((6, 6, 2), 16) if statistics == "public" else None
    callback = interop.StatisticsCallback.from_plan(the_plan, public_batch=batch)
    before = model.get_weights()
    data = the_plan.poisson_dataset(*helpers.images(40))
    history = model.fit(data, epochs=2, callbacks=[callback], verbose=0).history
    assert callback.ledger.steps == the_plan.steps == 10
    assert history["epsilon"][-1] == callback.epsilon() > history["epsilon"][0] > 0
    assert all(np.all(np.isfinite(w)) for w in model.get_weights())
    for one, other in zip(before, model.get_weights(), strict=True):
        assert np.any(one != other)  # biases before a normalization too: they get noise


@pytest.mark.parametrize(("statistics", "clip"), [("public", 0.1), ("public", 1e6), ("noised", 0.1)])
def test_a_step_is_that_of_a_dp_model_with_the_local_correction(statistics, clip):
    """Every row's gradient flows through the statistics before it is clipped.

    With noised statistics that holds for the first step: released means of the layers' inputs start at zero.
    """
    model = stock(statistics, tfp.optimizer(l2_norm_clip=clip))
    batch = tf_dpbn.public_data.uniform_noise((6, 6, 2), 16, seed=0)
    x, y, weight = padded()
    found = tfp.Stepper(model, tfp.callback(public_batch=batch)).sums(x, y, weight)

    ours = helpers.bn_stack(2, normalization(statistics), model=tf_dpbn.DPModel)
    helpers.randomize(ours)
    if statistics == "public":
        ours.set_public_batch(batch)
    helpers.compiled(ours, optimizer=helpers.dp_optimizer(l2_norm_clip=clip))
    sums, _ = helpers.clipped_sum_function(ours)(x, y, weight)
    assert helpers.relative_error([found], sums) < 1e-4


def test_released_statistics_without_noise_are_those_of_the_rows():
    model = stock("noised", depth=1)
    conv, layer = model.layers[1], model.layers[2]
    x, y, weight = padded(examples=ROWS)
    with pytest.warns(tf_dpbn.PrivacyWarning, match="A noise multiplier is 0"):
        stepper = tfp.Stepper(model, tfp.callback(statistics_noise_multiplier=0.0))
    mean, variance = layer.moving_mean.numpy(), layer.moving_variance.numpy()
    z = conv(x).numpy()
    stepper.sums(x, y, weight)
    r = 1 / np.sqrt(variance + layer.epsilon)
    u = np.stack(
        [np.concatenate([((e - mean) * r).mean((0, 1)), (((e - mean) ** 2 - variance) * r**2).mean((0, 1))]) for e in z]
    )
    bound = layer.statistics_clip * math.sqrt(10)
    norms = np.linalg.norm(u, axis=1, keepdims=True)
    m, s = np.split((u * np.minimum(1, bound / norms)).mean(0), 2)
    np.testing.assert_allclose(layer.moving_mean, mean + m / r, rtol=1e-4, atol=1e-5)
    wide = (variance + layer.epsilon) * np.maximum(1 + s, 0.25)
    np.testing.assert_allclose(layer.moving_variance, wide - layer.epsilon, rtol=1e-4, atol=1e-5)


def test_public_statistics_follow_the_weights():
    model, batch = stock(noise_multiplier=1.0, depth=1), tf_dpbn.public_data.uniform_noise((6, 6, 2), 16)
    x, y, weight = padded()
    seen = []

    def moments():
        z = model.layers[1](batch).numpy()
        return z.mean((0, 1, 2)), z.var((0, 1, 2))

    look = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda *_: seen.append((moments()[0], model.layers[2].moving_mean.numpy()))
    )
    data = tf.data.Dataset.from_tensors((x, y, weight)).repeat(2)
    model.fit(data, verbose=0, callbacks=[tfp.callback(public_batch=batch), look])
    assert len(seen) == 2 and np.any(seen[0][0] != seen[1][0])
    for expected, found in [*seen, (moments()[0], model.layers[2].moving_mean)]:
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.layers[2].moving_variance, moments()[1], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ privacy


def replacements(row):
    """What may stand in the place of a row."""
    values = [0.0, 7.0, 1e3, 1e15, 3e38, np.inf, np.nan, -1e30]
    return [np.full_like(row, value) for value in values] + [-row, 1e-3 * row]


def test_released_sums_move_by_no_more_than_the_declared_sensitivity():
    layer = tf_dpbn.DPBatchNormalization(statistics="noised", statistics_clip=0.7)
    rng = np.random.default_rng(0)
    z = (rng.normal(size=(ROWS, 3, 3, 4)) * 10.0 ** rng.uniform(-2, 2, (ROWS, 1, 1, 1))).astype("float32")
    layer.build(z.shape)
    mean, variance = tf.random.normal([4]), tf.random.uniform([4], 0.5, 2.0)
    run = tf.function(lambda z: statistics_scope.clipped_residuals(layer, z, None, mean, variance).tensors[0])
    declared = statistics_scope.clipped_residuals(layer, tf.constant(z), None, mean, variance).l2_sensitivity
    bound = 0.7 * math.sqrt(8)
    assert declared == pytest.approx(2 * bound)
    worst = 0.0
    for position in range(ROWS):
        totals = []
        for row in [z[position], *replacements(z[position])]:
            changed = z.copy()
            changed[position] = row
            totals.append(run(tf.constant(changed)).numpy().astype(np.float64))
        assert np.all(np.isfinite(totals))
        moves = [np.linalg.norm(one - other) for one in totals for other in totals]
        worst = max(worst, *moves)
        dropped = totals[6]  # infinite: contributes nothing
        assert max(np.linalg.norm(each - dropped) for each in totals) <= bound * neighbours.SLACK
    assert bound * 1.2 < worst <= declared * neighbours.SLACK  # one bound would not do


@pytest.mark.parametrize("statistics", ["public", "noised"])
def test_a_row_moves_the_gradient_by_at_most_the_clip_norm_and_no_other_output(statistics):
    clip = 0.5
    model = stock(statistics, l2_norm_clip=clip)
    stepper = tfp.Stepper(model, tfp.callback())
    x, y, weight = padded(examples=5)
    rng = np.random.default_rng(1)
    moves = []
    for position in (0, 3):
        without = weight.copy()
        without[position] = 0
        reference, outputs = stepper.sums(x, y, without), stepper.outputs(x)
        for scale in (0.0, 1e-3, 1.0, 30.0):
            changed = x.copy()
            changed[position] = scale * rng.normal(size=x[0].shape)
            moves.append(np.linalg.norm(stepper.sums(changed, y, weight) - reference) / clip)
            others = np.arange(ROWS) != position
            np.testing.assert_allclose(stepper.outputs(changed)[others], outputs[others], rtol=1e-6, atol=1e-6)
        x[-1] = rng.normal(size=x[0].shape)  # in the place of padding
        moves.append(np.linalg.norm(stepper.sums(x, y, without + (np.arange(ROWS) == ROWS - 1)) - reference) / clip)
        x[-1] = 0
    assert 0.9 < max(moves) <= neighbours.SLACK


def test_noise_of_released_statistics_has_the_promised_scale():
    layer = tf_dpbn.DPBatchNormalization(statistics="noised", statistics_clip=0.5)
    model = types.SimpleNamespace(optimizer=None)
    scope = statistics_scope.StockPass(model, (), ROWS, 1, 1.7, noise_seed=3)
    z = tf.random.normal([ROWS, 500])
    layer.build(z.shape)
    release = tf.function(lambda: scope.release(layer, z, None, tf.zeros([500]), tf.ones([500])))
    draws = np.stack([release().numpy() for _ in range(40)])
    promised = 1.7 * 2 * 0.5 * math.sqrt(1000) / ROWS

    def accepts(scale):
        return abs(draws.std(0, ddof=1).mean() / (scale * promised) - 1) < 0.03

    assert accepts(1.0) and not accepts(0.9) and not accepts(1.1)


def test_multipliers_fold_to_the_plan_and_the_ledger_counts_what_is_drawn(monkeypatch):
    model, the_plan = stock("noised"), plan(target_epsilon=4.0, noise_multiplier=None)
    sigmas = interop.noise_multipliers(the_plan, model)
    assert len(sigmas) == 3 and sigmas[0] > the_plan.noise_multiplier
    draw = mock.Mock(wraps=statistics_scope.add_gaussian_noise)
    monkeypatch.setattr(statistics_scope, "add_gaussian_noise", draw)
    helpers.compiled(model, tfp.LOSS, tfp.optimizer(noise_multiplier=sigmas[0], learning_rate=0.1))
    callback = interop.StatisticsCallback.from_plan(the_plan)
    model.fit(the_plan.poisson_dataset(*helpers.images(40)), epochs=2, callbacks=[callback], verbose=0)
    assert callback.noise_multipliers == sigmas
    assert [call.args[1:3] for call in draw.mock_calls] == [(sigma, the_plan.max_batch_size) for sigma in sigmas[1:]]
    assert callback.effective_noise_multiplier == pytest.approx(the_plan.noise_multiplier, rel=1e-9)
    assert callback.effective_noise_multiplier == pytest.approx(sum(s**-2 for s in sigmas) ** -0.5)
    assert callback.epsilon() == pytest.approx(the_plan.epsilon) and callback.epsilon() <= 4.0
    statement = callback.privacy_statement()
    assert "10 steps" in statement and "PROVIDED" in statement


# ------------------------------------------------------------------ what releases, and when


def test_nothing_is_released_outside_of_training():
    model, callback = stock("noised", noise_multiplier=1.0), tfp.callback()
    x, y, weight = padded()
    data = tf.data.Dataset.from_tensors((x, y, weight))
    model.fit(data, validation_data=data, callbacks=[callback], verbose=0)
    updates = [layer.statistic_updates.numpy() for layer in model.layers if hasattr(layer, "statistic_updates")]
    assert updates == [1.0, 1.0] and callback.ledger.steps == 1
    weights = model.get_weights()
    model.evaluate(data, callbacks=[callback], verbose=0)
    model.predict(x, verbose=0)
    for one, other in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert callback.ledger.steps == 1


def test_a_frozen_layer_releases_nothing_and_a_shared_one_once_a_call():
    shared, frozen = (tf_dpbn.DPBatchNormalization(statistics="noised") for _ in range(2))
    frozen.trainable = False
    inputs = keras.Input((6, 6, 2))
    h = shared(layers.Conv2D(3, 3)(inputs))
    h = frozen(shared(layers.Conv2D(3, 3)(layers.ReLU()(h))))
    model = keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(h)))
    helpers.compiled(model, tfp.LOSS, tfp.optimizer(noise_multiplier=1.0, learning_rate=0.1))
    callback = tfp.callback()
    model.fit(tf.data.Dataset.from_tensors(padded()).repeat(3), callbacks=[callback], verbose=0)
    assert callback.noise_multipliers == (1.0, 1.0, 1.0) and callback.ledger.steps == 3
    assert (shared.statistic_updates.numpy(), frozen.statistic_updates.numpy()) == (6.0, 0.0)


def test_without_the_callback_the_layers_refuse_to_train():
    model, data = stock("noised", noise_multiplier=1.0), tf.data.Dataset.from_tensors(padded())
    with pytest.raises(RuntimeError, match="interop.StatisticsCallback"):
        model.fit(data, verbose=0)
    callback = tfp.callback()
    model.fit(data, callbacks=[callback], verbose=0)
    with pytest.raises(RuntimeError, match="interop.StatisticsCallback"):
        model.fit(data, verbose=0)
    model.fit(data, epochs=2, callbacks=[callback], verbose=0)
    assert callback.ledger.steps == 3
    assert tf_dpbn.Ledger.from_json(callback.ledger.to_json()).steps == 3


class Hook(keras.callbacks.Callback):
    """Runs a function of the model at one of Keras' hooks."""

    def __init__(self, hook, function):
        super().__init__()
        setattr(self, hook, lambda *_, **__: function(self.model))


def test_tensorflows_mixed_precision_is_refused():
    model, data = stock(noise_multiplier=5.0, depth=1), tf.data.Dataset.from_tensors(padded(examples=0))
    tf.config.optimizer.set_experimental_options({"auto_mixed_precision": True})
    try:
        with pytest.raises(RuntimeError, match="'auto_mixed_precision'"):
            model.fit(data, callbacks=[tfp.callback()], verbose=0)
    finally:
        tf.config.optimizer.set_experimental_options({"auto_mixed_precision": False})


@pytest.mark.parametrize("seed", [lambda: tf.random.set_seed(3), lambda: keras.utils.set_random_seed(0)])
def test_a_global_seed_is_refused_because_noise_would_be_drawn_twice(seed):
    model, data = stock(noise_multiplier=5.0, depth=1), tf.data.Dataset.from_tensors(padded(examples=0))
    later = Hook("on_train_begin", lambda _: seed())
    with pytest.raises(RuntimeError, match=r"`fit` would draw the same noise again.*tf.random.set_seed\(None\)"):
        model.fit(data, callbacks=[tfp.callback(), later], verbose=0)
    tf.random.set_seed(None)
    updates = []
    for _ in range(2):
        before = model.layers[-1].kernel.numpy()
        model.fit(data, callbacks=[tfp.callback()], verbose=0)
        updates.append(model.layers[-1].kernel.numpy() - before)
    assert np.all(updates[0] != 0) and np.all(np.abs(updates[0] - updates[1]) > 1e-6)


def test_two_callbacks_in_one_fit_are_refused():
    model, data = stock("noised", noise_multiplier=1.0), tf.data.Dataset.from_tensors(padded())
    with pytest.raises(RuntimeError, match="Pass one StatisticsCallback"):
        model.fit(data, callbacks=[tfp.callback(), tfp.callback()], verbose=0)


def _interrupt(model):
    raise KeyboardInterrupt


def test_an_interrupted_fit_leaves_nothing_open():
    model, data = stock("noised", noise_multiplier=1.0), tf.data.Dataset.from_tensors(padded()).repeat(4)
    callback = tfp.callback()
    with pytest.raises(KeyboardInterrupt):
        model.fit(data, callbacks=[callback, Hook("on_train_batch_begin", _interrupt)], verbose=0)
    before = model.layers[2].statistic_updates.numpy()
    with pytest.raises(tf.errors.InvalidArgumentError, match="trained without its callback"):
        model.fit(data, verbose=0)
    assert model.layers[2].statistic_updates.numpy() - before <= callback.ledger.steps == 1  # the one that was counted
    helpers.compiled(model, tfp.LOSS, keras.optimizers.SGD(0.1))
    with pytest.raises(RuntimeError, match="trained without its callback"):
        model.fit(data, verbose=0)  # compiled with an optimizer without noise


def own_step():
    class Mixing(keras.Model):
        def train_step(self, data):
            x, y, weight = data
            return super().train_step((0.5 * x + 0.5 * x[::-1], y, weight))

    return helpers.compiled(helpers.bn_stack(1, normalization("noised"), model=Mixing), tfp.LOSS, tfp.optimizer())


def by_pixel():
    """Scores [rows, 6, 6] of images, labels alike: Keras would take weights of rows for weights of columns."""
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(3, 3, padding="same")(inputs)
    outputs = layers.Conv2D(3, 1)(normalization("public")()(x))
    return keras.Model(inputs, outputs), tfp.LOSS, np.random.default_rng(0).integers(0, 3, (ROWS, 6, 6))


def by_mixing_loss():
    """A loss of the user's that takes the mean over rows."""

    class Mean(keras.losses.Loss):
        def call(self, y_true, y_pred):
            y_true = tf.one_hot(tf.cast(tf.reshape(y_true, [-1]), tf.int32), 3)
            return tf.reduce_sum(tf.square(y_pred + tf.reduce_mean(y_pred, 0) - y_true), -1)

    model = helpers.bn_stack(1, normalization("public"))
    return model, Mean(reduction="none"), np.random.default_rng(0).integers(0, 3, ROWS)


@pytest.mark.parametrize("case", [by_pixel, by_mixing_loss])
def test_no_loss_lets_rows_meet(case):
    model, loss, y = case()
    helpers.randomize(model)
    helpers.compiled(model, loss, tfp.optimizer(l2_norm_clip=0.1))
    stepper = tfp.Stepper(model, tfp.callback())
    x, _ = helpers.images(ROWS)
    ones = np.ones(ROWS, "float32")
    rows = [stepper.sums(x, y, one) for one in np.eye(ROWS, dtype="float32")]
    assert all(0.05 < np.linalg.norm(row) < 0.1 * neighbours.SLACK for row in rows)
    np.testing.assert_allclose(stepper.sums(x, y, ones), sum(rows), atol=1e-5)
    x[3], y[3] = 7.0, y[0]
    ones[3] = 0.0
    np.testing.assert_allclose(stepper.sums(x, y, ones), sum(rows) - rows[3], atol=1e-5)


def test_weights_must_tell_padding():
    x, y, _ = padded()
    model = stock("noised", noise_multiplier=1.0)
    with pytest.raises(ValueError, match="tell padding from the examples"):
        model.fit(tf.data.Dataset.from_tensors((x, y)), callbacks=[tfp.callback()], verbose=0)
    with pytest.raises(ValueError, match="one number a row"):
        weight = np.ones((ROWS, 3), "float32")
        model.fit(tf.data.Dataset.from_tensors((x, y, weight)), callbacks=[tfp.callback()], verbose=0)
    with pytest.warns(tf_dpbn.PrivacyWarning, match="do not come from PrivacyPlan.poisson_dataset"):
        callback = tfp.callback(expected_batch_size=ROWS)
        model.fit(tf.data.Dataset.from_tensors((x, y)), callbacks=[callback], verbose=0)


def test_the_loss_is_logged_over_real_rows():
    model = stock(noise_multiplier=1.0, depth=1)
    x, y, weight = padded()
    logged = []
    look = Hook("on_train_batch_begin", lambda m: logged.append(float(np.mean(tfp.LOSS(y[:4], m(x[:4]))))))
    history = model.fit(tf.data.Dataset.from_tensors((x, y, weight)), callbacks=[tfp.callback(), look], verbose=0)
    assert history.history["loss"][0] == pytest.approx(logged[0], rel=1e-4)


def test_batches_of_another_size_are_refused():
    model = stock("noised", noise_multiplier=1.0)
    with pytest.raises(ValueError, match="Received: max_batch_size=6, 5 rows"):
        model.fit(tf.data.Dataset.from_tensors(padded(5)), callbacks=[tfp.callback()], verbose=0)
    with pytest.raises(tf.errors.InvalidArgumentError, match="drop_remainder=True"):
        x, y, weight = padded(8)
        model.fit(x, y, sample_weight=weight, batch_size=ROWS, callbacks=[tfp.callback()], verbose=0)


# ------------------------------------------------------------------ errors


@pytest.mark.skipif(not IS_KERAS_3, reason="tf_keras is supported")
def test_keras_3_is_refused_with_the_remedy():
    with pytest.raises(NotImplementedError, match="TF_USE_LEGACY_KERAS=1"):
        tfp.callback()


@pytest.mark.skipif(IS_KERAS_3, reason="tf_keras only")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"expected_batch_size": 7}, "at most max_batch_size=6.*expected_batch_size=7"),
        ({"num_examples": 3}, "at most num_examples=3.*expected_batch_size=4"),
        ({"statistics_noise_multiplier": -1.0}, "statistics_noise_multiplier=-1.0"),
        ({"delta": 1.0}, "delta=1.0"),
        ({}, "`delta` must be given"),  # for epsilon
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tfp.callback(**arguments).epsilon()


def begins(model, callback):
    callback.set_model(model)
    callback.on_train_begin()


def recompiled(**kwargs):
    model = stock()
    model.compile(**{"optimizer": tfp.optimizer(), "loss": tfp.LOSS, **kwargs})
    return model


def sequential(*stack):
    return helpers.compiled(keras.Sequential([*stack, layers.Dense(3)]), tfp.LOSS, tfp.optimizer())


def with_layer(*extra, statistics="public", **kwargs):
    inputs = keras.Input((6, 6, 2))
    h = tf_dpbn.DPBatchNormalization(statistics=statistics, **kwargs)(layers.Conv2D(3, 3)(inputs))
    for layer in extra:
        h = layer(h)
    model = keras.Model(inputs, layers.Dense(3)(layers.Flatten()(h)))
    return helpers.compiled(model, tfp.LOSS, tfp.optimizer(noise_multiplier=1.0))


def swapped():
    """A model whose normalization sees another axis first, one as long as the batch."""
    inputs, swap = keras.Input((ROWS, 2)), layers.Lambda(lambda t: tf.transpose(t, [1, 0, 2]))
    h = swap(tf_dpbn.DPBatchNormalization(statistics="noised")(swap(inputs)))
    model = keras.Model(inputs, layers.Dense(3)(layers.Flatten()(h)))
    return helpers.compiled(model, tfp.LOSS, tfp.optimizer(noise_multiplier=1.0))


REFUSALS = {
    "plain optimizer": (lambda: recompiled(optimizer=keras.optimizers.SGD(0.1)), TypeError, "SGD'"),
    "microbatches": (lambda: stock(num_microbatches=3), ValueError, "6.*num_microbatches=3"),
    "reduction": (lambda: recompiled(loss="mse"), ValueError, "Reduction.NONE.*loss='mse'"),
    "xla": (lambda: recompiled(jit_compile=True), ValueError, "jit_compile=True"),
    "execution": (lambda: recompiled(steps_per_execution=2), ValueError, "steps_per_execution=2"),
    "stock layer": (lambda: with_layer(layers.BatchNormalization()), ValueError, "Stock BatchNormalization"),
    "anchored": (
        lambda: with_layer(statistics="anchored"),
        ValueError,
        '"public", "noised" or.*statistics=\'anchored\'',
    ),
    "half precision": (lambda: with_layer(dtype="mixed_float16"), ValueError, "dtype='float16'"),
    "regularizer": (lambda: with_layer(layers.Dense(2, kernel_regularizer="l2")), ValueError, "weight regularizers"),
    "activity": (lambda: with_layer(layers.Dense(2, activity_regularizer="l2")), ValueError, "neither clipped"),
    "coupled rows": (
        lambda: with_layer(layers.Lambda(lambda t: t - tf.reduce_mean(t, 0, keepdims=True))),
        ValueError,
        "would void the guarantee",
    ),
    "axes swapped": (swapped, ValueError, r"examples in the first axis.*\(6, 1009, 2\) for a batch of 1009"),
    "own step": (own_step, ValueError, "train by the step of tf.keras.Model"),
    "not compiled": (lambda: helpers.bn_stack(1, normalization("public")), RuntimeError, r"compile\(optimizer="),
    "no normalization": (lambda: sequential(keras.Input((4,))), ValueError, "have a DPBatchNormalization"),
    "unknown shape": (lambda: sequential(tf_dpbn.DPBatchNormalization()), ValueError, "know the shape of its inputs"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_would_not_be_private_is_refused_before_training(case):
    tfp.optimizer()  # or skip
    make, kind, message = REFUSALS[case]
    with pytest.raises(kind, match=message):
        begins(make(), tfp.callback())


def test_missing_statistics_and_an_optimizer_with_less_noise_than_planned_are_refused():
    model = stock("noised", noise_multiplier=1.0)
    with pytest.raises(ValueError, match="`public_batch` must be given"):
        begins(stock(), tfp.callback(public_batch=None))
    with pytest.raises(ValueError, match="`statistics_noise_multiplier` must be given"):
        begins(model, tfp.callback(statistics_noise_multiplier=None))
    with pytest.raises(ValueError, match=r"at least 1\.05.*noise_multipliers\(plan, model\)\[0\].*=1\.0"):
        begins(model, interop.StatisticsCallback.from_plan(plan()))
