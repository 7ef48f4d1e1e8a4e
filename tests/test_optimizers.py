"""DP optimizers: a Keras optimizer that accepts nothing but clipped and noised gradients."""

import inspect
import json
import math
import re

import numpy as np
import pytest
import tensorflow as tf

import tf_dpbn
from tests import helpers
from tf_dpbn import optimizers
from tf_dpbn._keras import IS_KERAS_3, keras, raw
from tf_dpbn.mechanisms import ClippedSum

pytestmark = pytest.mark.both

SGD = keras.optimizers.SGD
serialize, deserialize = keras.saving.serialize_keras_object, keras.saving.deserialize_keras_object


def decay():
    return keras.optimizers.schedules.ExponentialDecay(0.5, 2, 0.7)


INNER = {
    "momentum": lambda: SGD(0.3, momentum=0.9, nesterov=True),
    "schedule": lambda: SGD(decay()),
    "adam_schedule": lambda: keras.optimizers.Adam(decay(), beta_1=0.8, amsgrad=True),
    "name": lambda: "rmsprop",
}

PRIVACY = dict(l2_norm_clip=1.5, noise_multiplier=0.7, expected_batch_size=8, num_examples=50, delta=1e-3)

OPTIMIZERS = {
    "generic": lambda **kw: optimizers.DPOptimizer(INNER["momentum"](), **kw),
    "generic_schedule": lambda **kw: optimizers.DPOptimizer(INNER["schedule"](), **kw),
    "sgd": lambda **kw: optimizers.VectorizedDPKerasSGDOptimizer(**{"learning_rate": 0.3, "momentum": 0.9, **kw}),
    "adam": lambda **kw: optimizers.VectorizedDPKerasAdamOptimizer(**{"learning_rate": decay(), "beta_1": 0.8, **kw}),
    "adagrad": lambda **kw: optimizers.VectorizedDPKerasAdagradOptimizer(
        **{"learning_rate": 0.2, "initial_accumulator_value": 0.3, **kw}
    ),
}


def make_layer(seed=0):
    keras.utils.set_random_seed(seed)
    layer = keras.layers.Dense(2, bias_initializer="random_normal")
    layer.build((None, 3))
    return layer


def clipped_sums(count, seed=0):
    """`count` sums for the variables of `make_layer`, as if clipped to 1.5."""
    rng = np.random.default_rng(seed)
    shapes = [(3, 2), (2,)]
    return [ClippedSum(tuple(tf.constant(rng.normal(size=s), tf.float32) for s in shapes), 1.5) for _ in range(count)]


def step(optimizer, layer, clipped):
    """One update of `layer`; returns the gradients that were released."""
    noised = optimizer.release((clipped,))[0]
    optimizer.apply_gradients(noised, layer.trainable_variables)
    return noised


# ---------------------------------------------------------------- updates


@pytest.mark.parametrize("noise_multiplier", [0.0, 1.1])
@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_the_inner_optimizer_gets_the_released_mean(inner, noise_multiplier):
    ours, theirs = make_layer(), make_layer()
    optimizer = helpers.dp_optimizer(inner=inner(), noise_multiplier=noise_multiplier)
    reference = keras.optimizers.get(inner())
    for k, clipped in enumerate(clipped_sums(4)):
        released = step(optimizer, ours, clipped).tensors
        means = [tensor / 8.0 for tensor in clipped.tensors]
        if noise_multiplier == 0:
            np.testing.assert_array_equal(helpers.flat(released), helpers.flat(means))
        else:
            assert np.abs(helpers.flat(released) - helpers.flat(means)).min() > 0
        reference.apply_gradients(zip(released, theirs.trainable_variables, strict=True))
        np.testing.assert_array_equal(helpers.flat(ours.get_weights()), helpers.flat(theirs.get_weights()))
        assert int(optimizer.iterations) == k + 1
    assert not np.allclose(ours.get_weights()[0], make_layer().get_weights()[0])


# ---------------------------------------------------------------- refusing ordinary gradients

REFUSED = {
    "apply_gradients": lambda o, g, v: o.apply_gradients(zip(g, v, strict=True)),
    "apply_gradients_clipped": lambda o, g, v: o.apply_gradients(ClippedSum(tuple(g), 1.0), v),
    "apply": lambda o, g, v: o.apply(g, v),
    "minimize": lambda o, g, v: o.minimize(lambda: tf.reduce_sum(raw(v[0])), v),
    "compute_gradients": lambda o, g, v: o.compute_gradients(lambda: tf.reduce_sum(raw(v[0])), v),
    "stateless_apply": lambda o, g, v: o.stateless_apply([], g, v),
    "update_step": lambda o, g, v: o.update_step(g[0], v[0], 0.1),
}
TRAIN_WITH = "accepts only clipped and noised gradients.*Train with tf_dpbn.DPModel.*tf_dpbn.convert"


@pytest.mark.parametrize("optimizer", ["generic", "adam"])
def test_refuses_ordinary_gradients(optimizer):
    layer, optimizer = make_layer(), OPTIMIZERS[optimizer](**PRIVACY)
    before = layer.get_weights()
    gradients = [tf.ones(v.shape) for v in layer.trainable_variables]
    for call in REFUSED.values():
        with pytest.raises(TypeError, match=f"{type(optimizer).__name__} {TRAIN_WITH}"):
            call(optimizer, gradients, layer.trainable_variables)
    np.testing.assert_array_equal(layer.get_weights()[0], before[0])


@pytest.mark.parametrize("optimizer", ["generic", "adam", "loss_scale"])
def test_refuses_to_train_a_stock_model(optimizer):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    if optimizer == "loss_scale":  # in mixed precision Keras wraps the compiled optimizer
        optimizer = keras.mixed_precision.LossScaleOptimizer(OPTIMIZERS["generic"](**PRIVACY))
    else:
        optimizer = OPTIMIZERS[optimizer](**PRIVACY)
    before = model.get_weights()
    model.compile(optimizer, "mse")
    with pytest.raises(TypeError, match=f"(?s){TRAIN_WITH}"):
        model.fit(np.ones((4, 3), "float32"), np.ones((4, 2), "float32"))
    np.testing.assert_array_equal(model.get_weights()[0], before[0])


# ---------------------------------------------------------------- constructor errors

BAD = [
    (dict(noise_multiplier=-0.1), r"noise_multiplier.*PrivacyPlan.*noise_multiplier=-0\.1"),
    (dict(noise_multiplier=math.inf), r"noise_multiplier.*noise_multiplier=inf"),
    (dict(l2_norm_clip=0.0), r"l2_norm_clip.*l2_norm_clip=0\.0"),
    (dict(l2_norm_clip=math.inf), r"l2_norm_clip.*l2_norm_clip=inf"),
    (dict(expected_batch_size=None), r"expected_batch_size.*from_plan.*expected_batch_size=None"),
    (dict(expected_batch_size=51), r"num_examples=50.*expected_batch_size=51"),
    (dict(num_examples=7.5), r"num_examples.*num_examples=7\.5"),
    (dict(delta=0.0), r"delta.*delta=0\.0"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_refuses_bad_arguments(arguments, message):
    requirement, received = message.rsplit(".*", 1)
    with pytest.raises(ValueError, match=f"^`.*{requirement}.*Received: {received}$|^`{requirement}.*: {received}$"):
        OPTIMIZERS["generic"](**{**PRIVACY, **arguments})


@pytest.mark.parametrize(
    "inner",
    [lambda: helpers.dp_optimizer(), lambda: keras.mixed_precision.LossScaleOptimizer(SGD())],
    ids=["private", "loss_scale"],
)
def test_refuses_to_wrap_a_wrapper(inner):
    inner = inner()
    message = f"`inner` must be an ordinary.*Received: inner=.*{type(inner).__name__}"
    with pytest.raises(ValueError, match=message):
        optimizers.DPOptimizer(inner, **PRIVACY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_microbatches=4), r"expected_batch_size=8\..*on its own.*num_microbatches=4"),
        (dict(num_microbatches=2.5), r"num_microbatches=2\.5"),
        (dict(expected_batch_size=None), r"expected_batch_size=None"),
    ],
)
def test_refuses_other_numbers_of_microbatches(arguments, message):
    with pytest.raises(ValueError, match=message):
        OPTIMIZERS["sgd"](**{**PRIVACY, **arguments})


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_configuration_round_trip(optimizer):
    for extra in ({}, {"name": "mine"}, {"num_examples": None, "delta": None}):
        original = optimizer(**{**PRIVACY, **extra, "noise_seed": 4242})
        text = json.dumps(serialize(original))
        assert "4242" not in text
        for clone in (type(original).from_config(original.get_config()), deserialize(json.loads(text))):
            assert type(clone) is type(original)
            assert type(clone.inner) is type(original.inner)
            assert clone.get_config() == original.get_config()
            assert clone.name == original.name
            assert clone.sampling_probability == original.sampling_probability
            for argument, value in {**PRIVACY, **extra}.items():
                assert getattr(clone, argument) == value
            draws = [o._noise_source.standard_normal([tf.TensorShape([4])])[0] for o in (original, clone)]
            assert not np.array_equal(*draws)


# ---------------------------------------------------------------- use as a Keras optimizer


def test_learning_rate_is_that_of_the_inner_optimizer():
    optimizer = OPTIMIZERS["sgd"](**PRIVACY)
    assert float(optimizer.learning_rate) == pytest.approx(0.3)
    optimizer.learning_rate = 0.05
    assert float(optimizer.learning_rate) == pytest.approx(0.05)
    assert float(optimizer.inner.learning_rate) == pytest.approx(0.05)
    assert serialize(optimizer.inner)["config"]["learning_rate"] == pytest.approx(0.05)


def test_learning_rate_scheduler_callback():
    model = helpers.compiled(tf_dpbn.DPSequential([keras.Input((3,)), keras.layers.Dense(2)]))
    callback = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    callback.set_model(model)
    callback.on_epoch_begin(0)
    assert float(model.optimizer.inner.learning_rate) == 0.5


def test_iterations_and_variables_are_those_of_the_inner_optimizer():
    optimizer, layer = OPTIMIZERS["generic"](**PRIVACY), make_layer()
    optimizer.build(layer.trainable_variables)
    step(optimizer, layer, clipped_sums(1)[0])
    assert int(optimizer.iterations) == int(optimizer.inner.iterations) == 1
    assert [id(v) for v in optimizer.variables] == [id(v) for v in optimizer.inner.variables]
    assert any(v.shape == (3, 2) for v in optimizer.variables)  # the momentum


def test_averaged_weights_are_written_back():
    inner = SGD(1.0, use_ema=True, ema_momentum=0.5)
    optimizer, layer = helpers.dp_optimizer(inner=inner), make_layer()
    optimizer.build(layer.trainable_variables)
    for clipped in clipped_sums(3):
        step(optimizer, layer, clipped)
    last = layer.get_weights()[0]
    optimizer.finalize_variable_values(layer.trainable_variables)
    assert not np.allclose(layer.get_weights()[0], last)


# ------------------------------------------------------------ plans, tensorflow-privacy's arguments


@pytest.mark.skipif(not IS_KERAS_3, reason="as the documentation of Keras 3 has it")
def test_variables_of_an_optimizer_of_the_users_own_are_built_once():
    class Momentum(keras.optimizers.Optimizer):
        def build(self, variables):
            super().build(variables)
            self.sums = [self.add_variable_from_reference(each, name="sum") for each in variables]

    layer, inner = make_layer(), Momentum(0.1)
    optimizer = optimizers.DPOptimizer(inner, **PRIVACY)
    for _ in range(2):  # as each `fit` does
        optimizer.build(layer.trainable_variables)
        inner.sums[0].assign(np.ones(inner.sums[0].shape))
    assert len(inner.variables) == 2 + len(layer.trainable_variables)


def make_plan():
    return tf_dpbn.PrivacyPlan(noise_multiplier=1.2, delta=1e-4, num_examples=400, expected_batch_size=20, epochs=1)


def test_from_plan():
    for optimizer in OPTIMIZERS.values():
        cls = type(optimizer(**PRIVACY))
        inner = dict(inner=SGD(0.3)) if cls is tf_dpbn.DPOptimizer else dict(learning_rate=0.3)
        optimizer = cls.from_plan(make_plan(), l2_norm_clip=2.0, **inner)
        assert type(optimizer) is cls
        assert optimizer.noise_multiplier == 1.2
        assert (optimizer.expected_batch_size, optimizer.num_examples) == (20, 400)
        assert (optimizer.delta, optimizer.sampling_probability) == (1e-4, 0.05)
        assert optimizer.l2_norm_clip == 2.0
        assert float(optimizer.learning_rate) == pytest.approx(0.3)


def test_from_plan_says_that_the_plan_comes_first():
    with pytest.raises(TypeError, match=r"`plan` must be a PrivacyPlan. It comes first: from_plan\(plan, inner"):
        tf_dpbn.DPOptimizer.from_plan(keras.optimizers.Adam(1e-3), make_plan(), l2_norm_clip=1.0)
    with pytest.raises(TypeError, match=r"`plan` must be a PrivacyPlan. It comes first: from_plan\(plan, l2_norm"):
        optimizers.VectorizedDPKerasSGDOptimizer.from_plan(1.0, l2_norm_clip=make_plan())
    assert list(inspect.signature(tf_dpbn.DPOptimizer.from_plan).parameters)[:3] == ["plan", "inner", "l2_norm_clip"]


def test_from_plan_refuses_what_the_plan_decides():
    decided = {"noise_multiplier": 1.1, "expected_batch_size": 20, "num_examples": 400, "delta": 1e-5}
    for argument, value in {**decided, "num_microbatches": 20}.items():
        message = f"`{argument}` must be left out. The plan decides it. Received: {argument}={value}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            optimizers.VectorizedDPKerasSGDOptimizer.from_plan(make_plan(), l2_norm_clip=1.0, **{argument: value})


@pytest.mark.parametrize(("name", "argument"), [("SGD", "nesterov"), ("Adam", "beta_1"), ("Adagrad", "epsilon")])
def test_arguments_of_tensorflow_privacy_and_of_the_inner_optimizer(name, argument):
    cls = getattr(optimizers, f"VectorizedDPKeras{name}Optimizer")
    parameters = inspect.signature(cls).parameters
    assert list(parameters)[:4] == ["l2_norm_clip", "noise_multiplier", "num_microbatches", "learning_rate"]
    assert {argument, "expected_batch_size"} <= set(parameters)
    optimizer = cls(1.5, 0.7, 8, 0.25)
    assert (optimizer.l2_norm_clip, optimizer.noise_multiplier) == (1.5, 0.7)
    assert optimizer.expected_batch_size == 8.0
    assert optimizer.sampling_probability is None
    assert float(optimizer.learning_rate) == pytest.approx(0.25)


@pytest.mark.skipif(not IS_KERAS_3, reason="tf_keras optimizers do neither")
@pytest.mark.parametrize(
    "option, remedy", [("gradient_accumulation_steps", "microbatch_size="), ("loss_scale_factor", "Pass loss_scale to")]
)
def test_refuses_an_inner_optimizer_that_accumulates_or_scales(option, remedy):
    with pytest.raises(ValueError, match=f"`inner` must not.*{remedy}.*{option}=2"):
        helpers.dp_optimizer(inner=keras.optimizers.SGD(1.0, **{option: 2}))
