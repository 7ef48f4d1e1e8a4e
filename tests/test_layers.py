"""DPBatchNormalization: stock in inference; public or given statistics in training."""

import re
import threading

import numpy as np
import pytest
import tensorflow as tf

import tf_dpbn
from tf_dpbn._keras import IS_KERAS_3, keras
from tf_dpbn.normalization import GivenStatistics, PublicPass, current_scope

pytestmark = pytest.mark.both

Stock = keras.layers.BatchNormalization
serialize, deserialize = keras.saving.serialize_keras_object, keras.saving.deserialize_keras_object
DPBN = tf_dpbn.DPBatchNormalization

# (input, axis)
SHAPES = [((8, 5), -1), ((6, 7, 5), 1), ((4, 3, 6, 5), -1), ((4, 3, 6, 5), -2), ((4, 2, 3, 2, 5), 4)]
if not IS_KERAS_3:
    SHAPES += [((4, 3, 6, 5), [1, 3]), ((4, 3, 6, 5), [-1, 1])]
DTYPES = {"float32": 2e-5, "mixed_float16": 4e-3, "mixed_bfloat16": 4e-2, "float64": 1e-11}
OPTIONS = [{}, dict(center=False), dict(scale=False), dict(center=False, scale=False), dict(epsilon=0.3, momentum=0.5)]


def random(shape, dtype="float32", seed=0):
    kind = dtype if dtype == "float64" else "float32"
    return tf.constant(np.random.default_rng(seed).normal(size=shape) * 2.0 + 1.0, kind)


def pair(shape, seed=1, **kwargs):
    """A stock layer and ours with the same random weights, handed over by get_weights."""
    layers = [Stock(**kwargs), DPBN(**kwargs)]
    for layer in layers:
        layer.build(shape)
    rng = np.random.default_rng(seed)
    layers[0].set_weights([rng.uniform(0.5, 2.0, w.shape) for w in layers[0].get_weights()])
    layers[1].set_weights(layers[0].get_weights())
    return layers


def assert_same(found, expected, tolerance=0.0):
    assert found.dtype == expected.dtype
    found, expected = (tf.cast(t, tf.float64) for t in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- inference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_inference_is_that_of_the_stock_layer(shape, axis, dtype):
    stock, ours = pair(shape, axis=axis, dtype=dtype)
    x = random(shape, dtype)
    # To float rounding: tf_keras' stock layer may use a fused kernel, ours never does. Keras 3 has but one.
    fused = not IS_KERAS_3 and len(shape) in (4, 5) and dtype != "float64"
    tolerance = (2e-6 if dtype == "float32" else 1e-2) if fused else 0.0
    assert_same(ours(x, training=False), stock(x, training=False), tolerance)
    assert_same(ours(x), stock(x), tolerance)
    with PublicPass():
        assert_same(ours(x, training=False), stock(x, training=False), tolerance)


@pytest.mark.parametrize("options", OPTIONS)
def test_options_have_their_meaning_and_weights_the_order_of_the_stock_layer(options):
    shape = (8, 3, 5)
    stock, ours = pair(shape, **options)
    x = random(shape)
    assert_same(ours(x), stock(x))
    for group in ("weights", "trainable_weights", "non_trainable_weights"):
        names = [[v.name.split("/")[-1] for v in getattr(layer, group)] for layer in (stock, ours)]
        assert names[0] == names[1]
    made = DPBN.from_config(stock.get_config())
    made.build(shape)
    made.set_weights(stock.get_weights())
    assert_same(made(x), stock(x))
    with PublicPass():
        assert_same(ours(x, training=True), stock(x, training=True), 2e-5)


def test_masks_pass_through_and_do_not_change_inference():
    stock, ours = pair((4, 6, 5))
    x, mask = random((4, 6, 5)), tf.constant(np.arange(24).reshape(4, 6) % 5 > 1)
    assert_same(ours(x, mask=mask), stock(x, mask=mask))
    assert ours.supports_masking
    inputs = keras.Input((None,), dtype="int32")
    embedded = keras.layers.Embedding(9, 5, mask_zero=True)(inputs)
    model = keras.Model(inputs, keras.layers.LSTM(2)(ours(embedded)))
    padded = model(np.array([[1, 2, 3, 0, 0, 0]]))
    np.testing.assert_allclose(padded, model(np.array([[1, 2, 3]])), rtol=1e-5)


# ---------------------------------------------------------------- training needs a scope

OUTSIDE = "(?s)DPBatchNormalization '{}' was called with training=True outside.*tf_dpbn.DPModel"
OUTSIDE += ".*Received: training=True"


def test_a_stock_model_may_predict_and_evaluate_but_not_train():
    model = keras.Sequential([keras.Input((5,)), DPBN(name="norm_2"), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x, before = np.ones((4, 5), "float32"), model.get_weights()
    assert model.predict(x, verbose=0).shape == (4, 1)
    model.evaluate(x, x[:, :1], verbose=0)
    with pytest.raises(RuntimeError, match=OUTSIDE.format("norm_2")):
        model.fit(x, x[:, :1], verbose=0)
    for found, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_frozen_layer_uses_its_moving_statistics():
    stock, ours = pair((8, 5))
    x = random((8, 5))
    for layer in (stock, ours):
        layer.trainable = False
    before = ours.get_weights()
    assert_same(ours(x, training=True), stock(x, training=True))
    with PublicPass() as scope:
        assert_same(ours(x, training=True), stock(x, training=True))
    assert scope.calls == []
    with GivenStatistics([], []):
        assert_same(ours(x, training=True), stock(x, training=True))
    for found, expected in zip(ours.get_weights(), before, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_fixed_statistics_are_the_moving_ones_in_training_too(shape, axis, dtype):
    center, scale = OPTIONS[len(shape) % 4].get("center", True), OPTIONS[len(shape) % 4].get("scale", True)
    stock = pair(shape, axis=axis, dtype=dtype, center=center, scale=scale)[0]
    ours = DPBN.from_config({**stock.get_config(), "statistics": "fixed"})
    ours.build(shape)
    ours.set_weights(stock.get_weights())
    x = random(shape, dtype)
    expected = stock(x, training=False)
    with PublicPass() as scope:
        assert_same(ours(x, training=True), expected, DTYPES[dtype])
    assert scope.calls == []
    for training in (True, False):  # outside of any scope too: nothing couples examples
        assert_same(ours(x, training=training), expected, DTYPES[dtype])
    for found, given in zip(ours.get_weights(), stock.get_weights(), strict=True):
        np.testing.assert_array_equal(found, given)


# ---------------------------------------------------------------- constructor


@pytest.mark.parametrize(
    ("option", "value"),
    [("renorm", True), ("synchronized", True), ("virtual_batch_size", 2), ("adjustment", "shift")],
)
def test_refuses_options_that_couple_examples(option, value):
    message = f"`{option}` must be left out. .*private examples. Received: {option}={value!r}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        DPBN(**{option: value})


def test_refuses_unknown_statistics():
    message = "`statistics` must be one of 'public', 'noised', 'anchored', 'fixed'. Received: statistics='private'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        DPBN(statistics="private")


ARGUMENTS = dict(
    axis=1,
    momentum=0.7,
    epsilon=1e-2,
    center=True,
    scale=False,
    beta_initializer=keras.initializers.Constant(0.5),
    beta_regularizer=keras.regularizers.L2(0.1),
    gamma_regularizer=keras.regularizers.L1(0.2),
    gamma_constraint=keras.constraints.NonNeg(),
    name="mine",
    dtype="float64",
    trainable=False,
)


def test_configuration_round_trip():
    layer = DPBN(statistics="public", **ARGUMENTS)
    layer.build((4, 3, 5))
    clone = deserialize(serialize(layer))
    assert type(clone) is DPBN
    assert serialize(clone)["config"] == serialize(layer)["config"]
    config = clone.get_config()
    assert config["statistics"] == "public"
    assert config["axis"] in (1, [1])  # tf_keras makes it a list
    for argument in ("momentum", "epsilon", "center", "scale", "name", "trainable"):
        assert config[argument] == ARGUMENTS[argument]
    assert type(clone.beta_regularizer) is keras.regularizers.L2
    assert type(clone.gamma_constraint) is keras.constraints.NonNeg


def test_configuration_adds_only_statistics_to_the_stock_one():
    coupling = {"synchronized", "renorm", "renorm_clipping", "renorm_momentum"}
    stock = Stock(name="same").get_config()
    expected = {k: v for k, v in stock.items() if k not in coupling}
    assert DPBN(name="same").get_config() == {**expected, "statistics": "public", "statistics_clip": 1.0}


# ---------------------------------------------------------------- public statistics


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_a_public_pass_gives_the_training_output_of_the_stock_layer(shape, axis, dtype):
    stock, ours = pair(shape, axis=axis, dtype=dtype)
    x = random(shape, dtype)
    before = ours.get_weights()
    with PublicPass() as scope:
        out = ours(x, training=True)
    assert_same(out, stock(x, training=True), DTYPES[dtype])
    (call,) = scope.calls
    assert call.layer is ours
    kept = {a % len(shape) for a in ours.channel_axes}
    other = tuple(a for a in range(len(shape)) if a not in kept)
    exact = tf.cast(call.inputs, tf.float64).numpy()
    np.testing.assert_allclose(call.mean, exact.mean(other), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(call.variance, exact.var(other), rtol=1e-4)
    for found, expected in zip(ours.get_weights(), before, strict=True):
        np.testing.assert_array_equal(found, expected)  # the layer itself updates nothing


def test_masked_positions_do_not_enter_public_statistics():
    stock, ours = pair((6, 7, 5))
    x, mask = random((6, 7, 5)), np.random.default_rng(0).random((6, 7)) < 0.6
    with PublicPass() as scope:
        out = ours(x, training=True, mask=tf.constant(mask))
    assert_same(out, stock(x, training=True, mask=tf.constant(mask)), 1e-4)
    np.testing.assert_allclose(scope.calls[0].mean, x.numpy()[mask].mean(0), rtol=1e-4)


def test_a_refresh_repeats_the_calls_that_were_in_training():
    a, b = DPBN(), DPBN()
    x = random((6, 3))

    def run(training):
        return b(a(a(x, training=training), training=False), training=training)

    with PublicPass() as first:
        run(training=True)
    assert [call.layer for call in first.calls] == [a, b]
    assert first.active == {(id(a), 0), (id(b), 0)}
    with PublicPass(frozenset(first.active)) as second:
        run(training=False)
    assert second.active == first.active
    np.testing.assert_allclose(second.calls[1].mean, first.calls[1].mean)


# ---------------------------------------------------------------- given statistics


def public_calls(*layers):
    with PublicPass() as scope:
        for layer in layers:
            layer(random((4, 3)), training=True)
    return scope.calls


def test_given_statistics_are_used_call_by_call():
    layer = DPBN(epsilon=0.0)
    calls = public_calls(layer, layer)
    values = [(tf.constant([1.0, 2.0, 3.0]), tf.fill([3], 4.0)), (tf.zeros([3]), tf.ones([3]))]
    x = random((5, 3), seed=9)
    with GivenStatistics(calls, values):
        first, second = layer(x, training=True), layer(x, training=True)
    np.testing.assert_allclose(first, (x - values[0][0]) / 2.0, rtol=1e-5)
    np.testing.assert_allclose(second, x, rtol=1e-5)


def test_another_order_of_calls_is_an_error():
    a, b = DPBN(name="first"), DPBN(name="second")
    x, values = random((4, 3)), [(tf.zeros([3]), tf.ones([3]))] * 2
    calls = public_calls(a, b)
    message = "DPBatchNormalization 'first' is not called in the same order"
    with pytest.raises(RuntimeError, match=message), GivenStatistics(calls, values):
        a(x, training=True)
        b(x, training=True)
        a(x, training=True)


# ---------------------------------------------------------------- scopes


def test_scopes_are_local_to_a_thread_and_left_on_errors():
    layer, seen = DPBN(), []
    layer.build((4, 3))

    def other_thread():
        with pytest.raises(RuntimeError, match="outside a private step"):
            layer(random((4, 3)), training=True)
        seen.append(current_scope())

    with PublicPass() as scope:
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
        with pytest.raises(KeyError), PublicPass():
            raise KeyError
        assert current_scope() is scope
    assert seen == [None] and scope.calls == [] and current_scope() is None
