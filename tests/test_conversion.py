"""Bring your own model: what `validate` finds, what `convert` and `to_stock` keep, and what they refuse."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tensorflow as tf

import tf_dpbn
from tests import helpers, programs, zoo
from tf_dpbn._keras import IS_KERAS_3, BatchNormalizationBase, flatten_layers, keras
from tf_dpbn.conversion import Finding, Findings

pytestmark = pytest.mark.both
layers = keras.layers
register = keras.saving.register_keras_serializable(package="tests")
IMAGE, SERIES, VECTOR = (6, 6, 2), (7, 4), (6,)


def network(*middle, shape=VECTOR, dtype="float32", **options):
    """Layers or functions in a row, and a dense head."""
    inputs = x = keras.Input(shape, dtype=dtype, **options)
    for layer in middle:
        x = layer(x)
    return keras.Model(inputs, layers.Dense(3)(x))


def sequential(*middle, shape=VECTOR):
    return keras.Sequential([keras.Input(shape), *middle, layers.Dense(3)])


def norm(**options):
    return layers.BatchNormalization(**{"name": "culprit", **options})


class Function(layers.Layer):
    """Any function as a layer."""

    def __init__(self, function, name="culprit", in_inference=True):
        super().__init__(name=name)
        self._function, self._in_inference = function, in_inference

    def call(self, x, training=False):
        return self._function(x) if training or self._in_inference else x


@register
class Pair(layers.Layer):
    """Two layers, in the order of the configuration."""

    def __init__(self, first, second, **kwargs):
        super().__init__(**kwargs)
        self.first, self.second = first, second

    def build(self, shape):
        for layer in (self.first, self.second):
            if not layer.built:
                layer.build(shape)
        super().build(shape)

    def call(self, x):
        return self.first(x) - 2.0 * self.second(x)

    def get_config(self):
        parts = {"first": self.first, "second": self.second}
        parts = {name: keras.saving.serialize_keras_object(layer) for name, layer in parts.items()}
        return {**super().get_config(), **parts}

    @classmethod
    def from_config(cls, config):
        parts = {name: keras.saving.deserialize_keras_object(config.pop(name)) for name in ("first", "second")}
        return cls(**parts, **config)


@register
class Holder(layers.Layer):
    """A layer whose configuration says which normalization it holds."""

    def __init__(self, inner=None, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner
        self.dense = layers.Dense(4, name="dense_inside")

    def build(self, shape):
        self.dense.build(shape)
        self.inner.build((*shape[:-1], 4))
        super().build(shape)

    def call(self, x, training=False):
        return self.inner(self.dense(x), training=training)

    def get_config(self):
        return {**super().get_config(), "inner": keras.saving.serialize_keras_object(self.inner)}

    @classmethod
    def from_config(cls, config):
        inner = keras.saving.deserialize_keras_object(config.pop("inner"))
        return cls(inner, **config)


class Maker(layers.Layer):
    """A layer that makes its normalization itself."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = layers.BatchNormalization(name="made")

    def call(self, x, training=False):
        return self.norm(x, training=training)


class Subclassed(keras.Model):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, layers.Dense(3)

    def call(self, x, training=False):
        return self.head(self.layer(x, training=training))


def batch_norm_by_hand(x):
    mean, variance = tf.nn.moments(x, [0])
    return (x - mean) * tf.math.rsqrt(variance + 1e-3)


# name -> (model, the layer at fault)
UNSAFE = {
    "batch_norm": lambda: network(norm()),
    "batch_norm_nested": lambda: network(sequential(norm())),
    "batch_norm_called_in_training": lambda: network(lambda x: norm()(x, training=True)),
    "batch_norm_for_each_step": lambda: network(layers.TimeDistributed(norm()), layers.Flatten(), shape=SERIES),
    "batch_norm_in_a_layer": lambda: network(Holder(norm())),
    "batch_norm_by_hand": lambda: network(Function(batch_norm_by_hand)),
    "batch_mean": lambda: network(layers.Dense(5), Function(lambda x: x - tf.reduce_mean(x, 0, keepdims=True))),
    "batch_softmax": lambda: network(layers.Softmax(axis=0, name="culprit")),
    "batch_attention": lambda: network(Function(lambda x: tf.nn.softmax(tf.matmul(x, x, transpose_b=True)) @ x)),
    "mixup": lambda: network(Function(lambda x: 0.9 * x + 0.1 * tf.reverse(x, [0]), in_inference=False)),
    "shuffled_batch": lambda: network(Function(tf.random.shuffle)),
    "stateful_lstm": lambda: network(
        layers.LSTM(3, stateful=True, name="culprit"), shape=None, batch_shape=(4, *SERIES)
    ),
    "running_mean": lambda: network(zoo.RunningMean(name="culprit")),
    "activity_regularizer": lambda: network(layers.Dense(3, activity_regularizer="l2", name="culprit")),
    "add_loss": lambda: network(zoo.AddsLoss(name="culprit")),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_validate_names_the_layer_at_fault(name):
    findings = tf_dpbn.validate(UNSAFE[name]())
    assert [finding.layer for finding in findings] == ["culprit"]
    assert findings and not findings.ok
    assert findings[0].severity == "error" and findings[0].reason and findings[0].remedy


def frozen(layer):
    layer.trainable = False
    return layer


def two_inputs():
    a, b = keras.Input((3,), name="a"), keras.Input((4,), name="b", dtype="int32")
    x = layers.Concatenate()([a, layers.Flatten()(layers.Embedding(2, 3)(b))])
    return keras.Model({"a": a, "b": b}, {"one": layers.Dense(2)(x), "two": layers.Dense(3)(x)})


SAFE = {
    "frozen_batch_norm": lambda: network(norm(trainable=False)),
    "frozen_batch_norm_called_in_training": lambda: network(lambda x: norm(trainable=False)(x, training=True)),
    "frozen_nested_batch_norm": lambda: network(frozen(sequential(norm()))),
    "dropout": lambda: network(layers.Dropout(0.5)),
    "noise_of_tensorflow": lambda: network(Function(lambda x: x + tf.random.normal(tf.shape(x)))),
    "masked_lstm": lambda: network(layers.Embedding(5, 4, mask_zero=True), layers.LSTM(3), shape=(7,), dtype="int32"),
    "spectral_normalization": lambda: network(layers.SpectralNormalization(layers.Dense(4))),
    "counter": lambda: network(zoo.Counter()),
    "kernel_regularizer": lambda: network(layers.Dense(3, kernel_regularizer="l2")),
    "rescaling_and_normalization": lambda: network(layers.Rescaling(0.5), layers.Normalization(mean=1.0, variance=2.0)),
    "random_flip": lambda: network(layers.RandomFlip(), layers.Flatten(), shape=IMAGE),
    "two_inputs": two_inputs,
    "anchored_batch_norm": lambda: helpers.bn_stack(2, lambda: tf_dpbn.DPBatchNormalization(statistics="anchored")),
    **{f"zoo_{name}": (lambda name=name: zoo.build(name, keras.Model)) for name in zoo.BODIES},
}


@pytest.mark.parametrize("name", SAFE)
def test_validate_passes_safe_models(name):
    findings = tf_dpbn.validate(SAFE[name]())
    assert list(findings) == [] and findings.ok and not findings


def test_randomness_in_a_loop_is_no_coupling():
    findings = tf_dpbn.validate(network(layers.GRU(3, dropout=0.3, recurrent_dropout=0.3, name="gru"), shape=SERIES))
    assert findings.ok
    assert [(finding.layer, finding.severity) for finding in findings] == ([] if IS_KERAS_3 else [("gru", "warning")])


def test_validate_finds_all_that_is_wrong_in_the_order_of_the_layers():
    inputs = keras.Input(VECTOR)
    x = Function(lambda x: x - tf.reduce_mean(x, 0), name="third")(norm(name="first")(inputs))
    x = layers.Dense(3, activity_regularizer="l2", name="fourth")(x)
    findings = tf_dpbn.validate(keras.Model(inputs, x))
    assert [finding.layer for finding in findings] == ["first", "third", "fourth"]
    assert findings[0].remedy.startswith("tf_dpbn.convert(model)")


def test_a_dp_model_works_on_each_example_alone_whatever_its_layers_do():
    inputs = keras.Input(VECTOR)
    centered = Function(lambda x: x - tf.reduce_mean(x, 0, keepdims=True))(layers.Dense(5)(inputs))
    clipped_sum = helpers.clipped_sum_function(
        helpers.compiled(tf_dpbn.DPModel(inputs, layers.Dense(3)(layers.Add()([centered, layers.Dense(5)(inputs)]))))
    )
    x, y = helpers.images(3, VECTOR)
    alone = [clipped_sum(x[k : k + 1], y[k : k + 1])[0] for k in range(3)]
    together = [sum(parts) for parts in zip(*alone, strict=True)]
    assert helpers.relative_error(clipped_sum(x, y)[0], together) < 1e-5


class Centered(Subclassed):
    def call(self, x, training=False):
        x = super().call(x, training=training)
        return x - tf.reduce_mean(x, 0)


class Inference(Subclassed):
    """Keras' idiom for transfer learning, in a class."""

    def call(self, x):
        return self.head(self.layer(x, training=False))


def test_validate_takes_examples_for_a_model_without_inputs_and_names_layers_inside_it():
    x = helpers.images(4, VECTOR)[0]
    with pytest.raises(ValueError, match="does not know the shape of its input. Pass `x`"):
        tf_dpbn.validate(Subclassed(norm()))
    assert tf_dpbn.validate(Subclassed(layers.Dropout(0.5)), x).ok
    (finding,) = tf_dpbn.validate(Subclassed(norm()), x)
    assert (finding.layer, finding.severity) == ("culprit", "error")
    assert "in a subclassed model use tf_dpbn.DPBatchNormalization" in finding.remedy
    (finding,) = tf_dpbn.validate(Inference(norm()), x)
    assert (finding.layer, finding.severity) == ("culprit", "warning")
    model = Centered(layers.Dropout(0.5))  # an operation outside its layers
    assert [finding.layer for finding in tf_dpbn.validate(model, x)] == [model.name]


def test_validate_refuses_one_example_and_examples_that_do_not_fit():
    with pytest.raises(ValueError, match=r"two examples or more.*\(1, 6\)"):
        tf_dpbn.validate(network(), np.ones((1, 6)))
    with pytest.raises(ValueError, match="does not run on the examples"):
        tf_dpbn.validate(network(), np.ones((2, 5), "float32"))


@pytest.mark.parametrize("name", ["batch_norm", "running_mean", "stateful_lstm"])
def test_validate_leaves_the_model_as_it_was(name):
    model = UNSAFE[name]()
    helpers.randomize(model)
    before = model.get_weights()
    flags = [layer.trainable for layer in model.layers]
    tf_dpbn.validate(model)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert [layer.trainable for layer in model.layers] == flags
    assert not model.losses


def test_findings_print_as_a_table():
    first = Finding("bn", "error", "It couples examples. " * 3, "Replace it.")
    findings = Findings([first, Finding("other", "warning", "odd", "look")])
    assert len(findings) == 2 and findings and not findings.ok
    alike = [Finding(f"bn{k}", "error", "It couples examples.", "Replace it.") for k in range(9)]
    assert "bn0, bn1, bn2, bn3 and 5" in str(Findings(alike)) and len(str(Findings(alike)).splitlines()) < 5
    lines = str(findings).splitlines()
    assert lines[0].split() == ["layer", "severity", "reason", "remedy"]
    assert len(lines) == 4 and max(map(len, lines)) <= 126
    assert not Findings([findings[1]]) and "No findings" in str(Findings())


# ---------------------------------------------------------------------- convert and to_stock


def many_arguments():
    options = {"axis": 1, "epsilon": 0.01, "momentum": 0.7, "gamma_regularizer": "l2", "beta_initializer": "ones"}
    return network(layers.Conv2D(3, 2), norm(**options), norm(name="b", scale=False), layers.Flatten(), shape=IMAGE)


def shared():
    inputs = keras.Input(VECTOR)
    block = keras.Sequential([keras.Input(VECTOR), layers.Dense(6), layers.BatchNormalization()], name="block")
    normalize = layers.BatchNormalization()
    x = normalize(block(normalize(block(inputs))))
    return keras.Model(inputs, layers.Dense(3)(x + 1.0))


def several_inputs_and_outputs():
    a, b = keras.Input((3,), name="a"), keras.Input((4,), name="b")
    x = layers.BatchNormalization()(layers.Concatenate()([a, b]))
    y = layers.BatchNormalization()(layers.Dense(4)(x) * 2.0)
    return keras.Model({"a": a, "b": b}, {"x": layers.Dense(2)(x), "y": layers.Dense(3)(y)})


def partly_frozen():
    base = keras.Sequential([keras.Input(VECTOR), layers.Dense(6), layers.BatchNormalization()], name="base")
    base.trainable = False
    return network(base, layers.Dense(4, name="tuned"), layers.BatchNormalization(name="tuned_norm"))


def lazily_built():
    model = keras.Sequential([layers.Dense(4), layers.BatchNormalization(), layers.Dense(3)])
    model(np.zeros((1, *VECTOR), "float32"))
    return model


def has_a_dp_model_inside():
    inputs = keras.Input(VECTOR)
    inner = tf_dpbn.DPSequential([keras.Input(VECTOR), layers.Dense(4), tf_dpbn.DPBatchNormalization(name="dp")])
    return keras.Model(inputs, layers.Dense(3)(layers.BatchNormalization()(inner(inputs))))


def is_a_dp_model():
    stack = [layers.Dense(4), tf_dpbn.DPBatchNormalization(), layers.ReLU(), tf_dpbn.DPBatchNormalization(scale=False)]
    return tf_dpbn.DPModel(*(lambda model: (model.inputs, model.outputs))(network(*stack)))


def tiny_resnet():
    inputs = x = keras.Input((8, 8, 2))
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(4, 3, padding="same", use_bias=False)(x)))
    for k in range(2):
        h = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(4, 3, padding="same", use_bias=False)(x)))
        h = layers.BatchNormalization()(layers.Conv2D(4, 3, padding="same", use_bias=False)(h))
        x = layers.ReLU(name=f"end{k}")(layers.Add()([x, h]))
    x = layers.DepthwiseConv2D(3)(layers.Normalization(mean=0.5, variance=2.0)(x))
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(layers.BatchNormalization()(x))))


def with_live_objects():
    """Functions, and a class, that no file could bring back; inside other layers too."""
    slope = tf.constant(3.0)
    inputs = keras.Input((7, 4))
    h = layers.Lambda(lambda t, by: t * slope * by, arguments={"by": 2.0}, output_shape=(7, 4), name="scaled")(inputs)
    h = layers.TimeDistributed(layers.Dense(4, activation=lambda t: t * slope), name="each")(h)
    h = layers.TimeDistributed(layers.Lambda(lambda t: t - slope, output_shape=(4,)), name="shifted")(h)
    h = layers.Dense(3, activation=lambda t: tf.nn.relu(t) * slope)(layers.BatchNormalization()(h))
    return keras.Model(inputs, h)


def attention():
    """Keras numbers the layers inside of it anew."""
    inputs = keras.Input(SERIES)
    h = layers.BatchNormalization()(layers.MultiHeadAttention(2, 3)(inputs, inputs))
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(h)))


CONVERTIBLE = {
    "attention": attention,
    "with_live_objects": with_live_objects,
    "many_arguments": many_arguments,
    "shared": shared,
    "several_inputs_and_outputs": several_inputs_and_outputs,
    "partly_frozen": partly_frozen,
    "lazily_built": lazily_built,
    "has_a_dp_model_inside": has_a_dp_model_inside,
    "is_a_dp_model": is_a_dp_model,
    "tiny_resnet": tiny_resnet,
    "holder": lambda: network(Holder(layers.BatchNormalization(name="inside"), name="holder")),
    "sequential": lambda: sequential(layers.Dense(4), layers.BatchNormalization(), layers.Dropout(0.5)),
}


def example(model, n=4):
    rng = np.random.default_rng(1)
    symbolic = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    return tf.nest.map_structure(lambda t: rng.uniform(size=(n, *t.shape[1:])).astype("float32"), symbolic)


def assert_same_predictions(model, other, x):
    tf.nest.map_structure(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        model(x, training=False),
        other(x, training=False),
    )


def normalizations(model):
    return [layer for layer in flatten_layers(model) if isinstance(layer, BatchNormalizationBase)]


def of_package(model):
    return [each for each in [model, *flatten_layers(model)] if type(each).__module__.startswith("tf_dpbn")]


def random_model(name):
    model = CONVERTIBLE[name]()
    helpers.randomize(model)
    return model


@pytest.mark.parametrize("name", CONVERTIBLE)
@pytest.mark.filterwarnings("ignore:.*lambda")
def test_models_predict_the_same_in_all_forms_and_share_nothing(name):
    model = random_model(name)
    before = model.get_weights()
    kinds = [type(layer) for layer in flatten_layers(model)]
    converted = tf_dpbn.convert(model)
    assert isinstance(converted, tf_dpbn.DPModel) and converted.name == model.name
    assert isinstance(converted, keras.Sequential) == isinstance(model, keras.Sequential)
    assert all(isinstance(n, tf_dpbn.DPBatchNormalization) or not n.trainable for n in normalizations(converted))
    assert sorted(n.name for n in normalizations(converted)) == sorted(n.name for n in normalizations(model))
    assert len(converted.weights) == len(model.weights)  # shared layers stay shared
    if name in ("shared", "several_inputs_and_outputs", "partly_frozen", "holder", "is_a_dp_model"):
        assert tf_dpbn.validate(converted).ok
    x = example(model)
    assert_same_predictions(model, converted, x)
    stock = tf_dpbn.to_stock(converted)
    assert not of_package(stock) and isinstance(stock, keras.Sequential) == isinstance(model, keras.Sequential)
    assert len(normalizations(stock)) == len(normalizations(model))
    assert_same_predictions(model, stock, x)

    for other in (converted, stock):
        other.set_weights([weight + 1.0 for weight in other.get_weights()])
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert [type(layer) for layer in flatten_layers(model)] == kinds


def test_sublayers_that_changed_places_keep_their_weights():
    def swapped(layer):
        layer.first, layer.second = layer.second, layer.first
        return layer

    model = network(swapped(Pair(layers.Dense(6), layers.Dense(6))), layers.BatchNormalization())
    helpers.randomize(model)
    assert_same_predictions(model, tf_dpbn.convert(model), example(model))


def test_vocabularies_that_were_adapted_go_over():
    text = layers.TextVectorization(output_mode="int", output_sequence_length=3, standardize=None)
    text.adapt(["a b c", "d a\x0b"])
    words = layers.StringLookup(output_mode="tf_idf" if IS_KERAS_3 else "multi_hot")
    words.adapt([["x", "y\nz"], ["z", "x"], ["x", "x"]])
    inputs = keras.Input((), dtype="string"), keras.Input((2,), dtype="string")
    h = layers.Concatenate()([layers.Flatten()(layers.Embedding(9, 4)(text(inputs[0]))), words(inputs[1])])
    model = keras.Model(inputs, layers.BatchNormalization()(layers.Dense(3)(h)))
    x = tf.constant(["a d", "c unknown b", ""]), tf.constant([["x", "z"], ["y\nz", "y"], ["unknown", "x"]])
    converted = tf_dpbn.convert(model)
    assert_same_predictions(model, converted, x)
    assert_same_predictions(model, tf_dpbn.to_stock(converted), x)


def test_stock_models_run_in_front_of_a_tanh():
    model = tf_dpbn.convert(helpers.bn_stack(2, layers.BatchNormalization))
    helpers.randomize(model)
    x = example(model)
    stock = tf_dpbn.to_stock(model).predict(x, verbose=0)  # fused kernels of tf_keras fail here
    np.testing.assert_allclose(stock, model.predict(x, verbose=0), rtol=1e-5, atol=1e-5)


def test_arguments_survive_both_ways():
    model = many_arguments()
    stock = tf_dpbn.to_stock(tf_dpbn.convert(model))
    for old, new in zip(normalizations(model), normalizations(stock), strict=True):
        assert old.get_config() == new.get_config()
    first = normalizations(tf_dpbn.convert(model))[0]
    assert (first.channel_axes, first.epsilon, first.momentum, first.statistics) == ((1,), 0.01, 0.7, "public")
    noised = normalizations(tf_dpbn.convert(model, statistics="noised", statistics_clip=2.0))
    assert {(n.momentum, n.statistics, n.statistics_clip) for n in noised} == {(0.95, "noised", 2.0)}
    assert normalizations(tf_dpbn.convert(model, statistics="anchored", momentum=0.8))[0].momentum == 0.8


def test_statistics_may_be_chosen_by_the_names_of_layers():
    model = sequential(norm(name="a", momentum=0.7), sequential(norm(name="b")), norm(name="c", trainable=False))
    converted = tf_dpbn.convert(model, statistics={"a": "fixed", "b": "noised"})
    found = {n.name: (getattr(n, "statistics", "stock"), n.momentum) for n in normalizations(converted)}
    assert found == {"a": ("fixed", 0.7), "b": ("noised", 0.95), "c": ("stock", 0.99)}
    others = tf_dpbn.convert(model, statistics={"a": "fixed"})
    assert [getattr(n, "statistics", "stock") for n in normalizations(others)] == ["fixed", "public", "stock"]
    for name in ("c", "missing"):
        with pytest.raises(ValueError, match=f"trainable=False are copied.*Received: statistics='{name}'"):
            tf_dpbn.convert(model, statistics={name: "fixed"})
    with pytest.raises(ValueError, match="one of 'public'.*Received: statistics='private'"):
        tf_dpbn.convert(model, statistics={"a": "private"})


def test_layers_stay_frozen_as_they_are():
    model = partly_frozen()
    if IS_KERAS_3:
        model.get_layer("tuned").bias.trainable = False
    converted = tf_dpbn.convert(model)
    kinds = {n.name: (type(n), n.trainable) for n in normalizations(converted)}
    assert kinds.pop("tuned_norm") == (tf_dpbn.DPBatchNormalization, True)
    assert set(kinds.values()) == {(layers.BatchNormalization, False)}
    assert [w.shape for w in converted.trainable_weights] == [w.shape for w in model.trainable_weights]
    assert not converted.get_layer("base").trainable and converted.get_layer("tuned").trainable
    model.get_layer("base").layers[0].trainable = True  # one layer of a frozen base can be tuned
    converted = tf_dpbn.convert(model)
    flags = [[layer.trainable for layer in flatten_layers(each.get_layer("base"))] for each in (model, converted)]
    assert flags[0] == flags[1] and len(converted.trainable_weights) == len(model.trainable_weights)


def trained(model, **options):
    """Two steps of DP-SGD."""
    shape = model.input_shape[1:]
    optimizer = helpers.dp_optimizer(inner=keras.optimizers.SGD(0.1), noise_multiplier=0.3, num_examples=16, delta=1e-3)
    model.set_public_batch(tf_dpbn.public_data.uniform_noise(shape, 6, seed=0))
    helpers.compiled(model, optimizer=optimizer, **options)
    data = helpers.images(16, shape)
    plan = tf_dpbn.sampling.poisson_dataset(*data, expected_batch_size=8, max_batch_size=16, steps_per_epoch=2)
    model.fit(plan, verbose=0)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name, statistics", [("has_a_dp_model_inside", "anchored"), ("sequential", "noised")])
def test_a_converted_model_trains_and_goes_back(name, statistics, tmp_path):
    model = random_model(name)
    converted = trained(tf_dpbn.convert(model, statistics=statistics), microbatch_size=4)
    assert converted.ledger.steps == 2
    x = example(model)
    moved = np.abs(converted.predict(x, verbose=0) - model.predict(x, verbose=0)).max()
    assert np.isfinite(moved) and moved > 1e-3
    assert_same_predictions(converted, tf_dpbn.to_stock(converted), x)
    converted.save(tmp_path / "m.keras")
    assert_same_predictions(converted, keras.models.load_model(tmp_path / "m.keras"), x)


def pretrained(seed):
    """A backbone with normalizations, as keras.applications has them, and a head; random weights."""
    inputs = keras.Input(IMAGE)
    x = layers.ReLU()(norm(name="a")(layers.Conv2D(4, 3)(inputs)))
    x = layers.ReLU()(norm(name="b")(layers.DepthwiseConv2D(3)(x)))
    backbone = keras.Model(inputs, layers.GlobalAveragePooling2D()(x), name="backbone")
    inputs = keras.Input(IMAGE)
    model = keras.Model(inputs, layers.Dense(3, name="head")(backbone(inputs)))
    helpers.randomize(model, seed)
    return model


def test_a_pretrained_network_trains_its_head_and_then_all_with_one_epsilon(tmp_path):
    pretrained(1).save_weights(tmp_path / "stock.weights.h5")
    model = tf_dpbn.convert(pretrained(2), statistics="fixed")
    model.load_weights(tmp_path / "stock.weights.h5")
    backbone, head = model.get_layer("backbone"), model.get_layer("head")
    phases = [{"expected_batch_size": 8, "epochs": 1}, {"expected_batch_size": 8, "epochs": 2}]
    plans = tf_dpbn.PrivacyPlan.phases(phases, target_epsilon=3.0, delta=1e-3, num_examples=16)
    data, weights = helpers.images(16, IMAGE), [[w.copy() for w in model.get_weights()]]
    inner = [keras.optimizers.Adam(0.1), keras.optimizers.SGD(0.1)]
    for plan, optimizer, backbone.trainable in zip(plans, inner, (False, True), strict=True):
        helpers.compiled(model, optimizer=tf_dpbn.DPOptimizer.from_plan(plan, optimizer, 1.0))
        model.fit(plan.poisson_dataset(*data), epochs=plan.steps // plan.steps_per_epoch, verbose=0)
        weights.append([w.copy() for w in model.get_weights()])
    names = [w.path if IS_KERAS_3 else w.name for w in model.weights]
    of_head = {id(w) for w in head.weights}
    for name, variable, *values in zip(names, model.weights, *weights, strict=True):
        moved = [not np.array_equal(one, other) for one, other in itertools.pairwise(values)]
        expected = [id(variable) in of_head, "moving" not in name]
        assert moved == expected, name
    assert model.ledger == plans[-1].ledger() and 2.99 < model.epsilon(1e-3) == plans[-1].epsilon <= 3.0
    model.save_weights(tmp_path / "private.weights.h5")
    stock = pretrained(3)
    stock.load_weights(tmp_path / "private.weights.h5")
    assert_same_predictions(model, stock, data[0])


_LOAD = """
import sys
sys.modules["tf_dpbn"] = None
import numpy as np
import tensorflow as tf
model = tf.keras.models.load_model(sys.argv[1])
data = np.load(sys.argv[2])
np.testing.assert_allclose(model.predict(data["x"], verbose=0), data["y"], rtol=1e-5, atol=1e-5)
print("reproduced", type(model).__module__.split(".")[0])
"""


@pytest.mark.slow
def test_a_stock_file_loads_where_the_package_cannot_be_imported(tmp_path):
    converted = tf_dpbn.convert(random_model("has_a_dp_model_inside"))
    x = example(converted)
    np.savez(tmp_path / "data.npz", x=x, y=converted.predict(x, verbose=0))
    tf_dpbn.to_stock(converted).save(tmp_path / "m.keras")
    printed = programs.last_line("-c", _LOAD, str(tmp_path / "m.keras"), str(tmp_path / "data.npz"))
    assert printed == f"reproduced {'keras' if IS_KERAS_3 else 'tf_keras'}"


def test_ledger_public_batch_and_released_averages_go_over():
    stock = sequential(layers.Dense(4), layers.BatchNormalization())
    model = trained(tf_dpbn.convert(stock, statistics="anchored"), engine="vectorized")
    again = tf_dpbn.convert(model)
    (old,), (new,) = normalizations(model), normalizations(again)
    assert float(new.statistic_updates) == 2.0 and np.any(np.asarray(new.shift))
    np.testing.assert_array_equal(new.shift, old.shift)
    assert again.ledger == model.ledger and again.ledger.steps == 2
    np.testing.assert_array_equal(again.public_batch, model.public_batch)
    trained(again, engine="vectorized")
    assert again.ledger.steps == 4 and model.ledger.steps == 2
    assert tf_dpbn.convert(keras.Sequential([again])).ledger.steps == 4
    assert tf_dpbn.validate(again).ok
    given = tf_dpbn.public_data.uniform_noise(VECTOR, 3, seed=1)
    np.testing.assert_array_equal(tf_dpbn.convert(model, public_batch=given).public_batch, given)


def test_the_correction_report_tells_local_from_non_local():
    model = tf_dpbn.convert(tiny_resnet(), public_batch=tf_dpbn.public_data.uniform_noise((8, 8, 2), 4, seed=0))
    helpers.compiled(model)
    # The last normalization follows a depthwise convolution, those in the blocks convolutions.
    assert [kind for _, kind in model.correction_report()] == ["local"] * 6
    before = helpers.bn_stack(1, layers.ReLU, model=keras.Model)
    pre_activation = keras.Sequential([before, *[layers.BatchNormalization(name=name) for name in "ab"]])
    model = tf_dpbn.convert(pre_activation, public_batch=tf_dpbn.public_data.uniform_noise((6, 6, 2), 4, seed=0))
    helpers.compiled(model, correction="full")
    assert model.correction_report() == [("a", "both"), ("b", "non-local")]
    helpers.compiled(model, correction="none")
    assert model.correction_report() == [("a", "none"), ("b", "none")]


@pytest.mark.parametrize("frozen, kind", [(0, "both"), (1, "local")])
def test_from_eight_normalizations_on_that_train_the_default_correction_is_the_adaptive_one(frozen, kind):
    stack = [each for _ in range(8) for each in (layers.Dense(4, use_bias=False), tf_dpbn.DPBatchNormalization())]
    model = tf_dpbn.DPSequential([keras.Input((3,)), *stack, layers.Dense(2)])
    for layer in stack[1 : 2 * frozen : 2]:
        layer.trainable = False
    model.set_public_batch(np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32))
    helpers.compiled(model)
    assert [found for _, found in model.correction_report()] == [kind] * (8 - frozen)


def test_a_compiled_model_is_converted_uncompiled_and_one_that_has_met_no_data_as_it_is():
    model = sequential(layers.BatchNormalization())
    model.compile("sgd", "mse")
    with pytest.raises(RuntimeError, match="Call compile"):
        tf_dpbn.convert(model).fit(*helpers.images(4, VECTOR))
    converted = tf_dpbn.convert(keras.Sequential([layers.Dense(3), layers.BatchNormalization()]))
    assert converted(np.ones((2, 4), "float32")).shape == (2, 3)
    assert isinstance(converted.layers[1], tf_dpbn.DPBatchNormalization)


# ---------------------------------------------------------------------- refusals


class OwnNormalization(layers.BatchNormalization):
    pass


class Functional(keras.Model):
    def train_step(self, data):
        raise NotImplementedError


def functional_with_behaviour():
    inputs = keras.Input(VECTOR)
    return Functional(inputs, layers.BatchNormalization()(inputs))


DERIVE = r"class Subclassed.*Derive the class from tf_dpbn.DPModel and use tf_dpbn.DPBatchNormalization"
REFUSED = {
    "subclassed": (lambda: Subclassed(norm()), TypeError, DERIVE),
    "subclassed_inside": (lambda: keras.Sequential([Subclassed(norm())]), TypeError, DERIVE),
    "own_train_step": (functional_with_behaviour, TypeError, "class Functional, which defines 'train_step'"),
    "own_normalization": (
        lambda: network(OwnNormalization(name="own")),
        ValueError,
        "'own' is a OwnNormalization, whose own behaviour would be lost",
    ),
    "synchronized": (lambda: network(norm(synchronized=True)), ValueError, "'culprit' .*ynchronized|SyncBatch"),
    "maker": (
        lambda: network(Maker(name="maker")),
        ValueError,
        "'maker' .class Maker. makes the BatchNormalization 'made' itself.*Let its constructor take",
    ),
    "no_config": (
        lambda: network(Function(tf.identity, name="bare")),
        ValueError,
        "'bare' .class Function. cannot be rebuilt from its configuration",
    ),
}
if not IS_KERAS_3:
    REFUSED["renorm"] = (lambda: network(norm(renorm=True)), ValueError, "'culprit' has renorm.*Build it without")


@pytest.mark.parametrize("name", REFUSED)
def test_convert_refuses_with_the_remedy(name):
    make, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        tf_dpbn.convert(make())


def test_unknown_statistics_and_a_subclassed_private_model_are_refused():
    with pytest.raises(TypeError, match="`model` must be a keras.Model. Load a file.*Received: model='file.keras'"):
        tf_dpbn.convert("file.keras")
    with pytest.raises(ValueError, match="Received: statistics='private'"):
        tf_dpbn.convert(sequential(), statistics="private")

    class Own(tf_dpbn.DPModel):
        def call(self, x):
            return x

    with pytest.raises(TypeError, match="class Own.*`export` makes a SavedModel"):
        tf_dpbn.to_stock(Own())


# ---------------------------------------------------------------- what findings advise


def test_batch_normalization_is_judged_by_whether_training_moves_its_statistics():
    """Keras 3 overrules the `training=False` of a functional graph in `fit`, tf_keras does not."""
    base = sequential(norm(), layers.Dense(4))
    inputs = keras.Input(VECTOR)
    h = layers.BatchNormalization(name="direct")(base(inputs, training=False), training=False)
    model = keras.Model(inputs, layers.Dense(2)(h))
    findings = tf_dpbn.validate(model)
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).normal(1.0, 1.0, (8, *VECTOR)).astype("float32")
    model.fit(x, x[:, :2], verbose=0)
    moved = bool(np.any(np.asarray(base.get_layer("culprit").moving_mean)))
    assert [each.severity for each in findings] == 2 * ["error" if moved else "warning"]
    assert findings.ok == (not moved)


def test_a_model_made_plain_has_the_statistics_of_the_last_weights_and_is_ready_for_export(tmp_path):
    model = tf_dpbn.DPSequential([layers.Dense(4), tf_dpbn.DPBatchNormalization(), layers.Dense(2)])
    x = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
    model.set_public_batch(x[:6] * 2.0)
    helpers.compiled(model, "mse", engine="vectorized").train_on_batch(x, x[:, :2])
    plain = tf_dpbn.to_stock(model)
    mean = tf.reduce_mean(plain.layers[0](model.public_batch), 0)
    np.testing.assert_allclose(normalizations(plain)[0].moving_mean, mean, rtol=1e-5, atol=1e-6)
    plain.export(str(tmp_path / "served"))
    loaded = tf.saved_model.load(str(tmp_path / "served"))
    np.testing.assert_allclose(loaded.serve(x[:3]), model(x[:3]), rtol=1e-4, atol=1e-6)
