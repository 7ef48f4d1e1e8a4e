"""DPModel as a Keras model: ways to build and run it, what a step does to the weights, fresh moving statistics."""

import gc

import numpy as np
import pytest
import tensorflow as tf

import tf_dpbn
from tests import helpers
from tf_dpbn._keras import IS_KERAS_3, keras
from tf_dpbn.clipping import ENGINES
from tf_dpbn.sampling import poisson_dataset

pytestmark = pytest.mark.both

layers = keras.layers
EXAMPLES, EXPECTED, CLASSES, STEPS = 12, 4, 3, 4


def vectors(seed=0, n=EXAMPLES):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 5)).astype("float32"), rng.integers(0, CLASSES, n)


PUBLIC = vectors(seed=1, n=7)[0]


def draws(steps=STEPS, seed=5):
    return poisson_dataset(*vectors(), expected_batch_size=EXPECTED, max_batch_size=8, steps_per_epoch=steps, seed=seed)


def compiled(model, compile_options=None, **options):
    options = {"expected_batch_size": EXPECTED, "l2_norm_clip": 0.7, **options}
    return helpers.compiled(model, optimizer=helpers.dp_optimizer(**options), **(compile_options or {}))


def dense(units, seed):
    """The same initial weights in every model."""
    return layers.Dense(units, kernel_initializer=keras.initializers.GlorotUniform(seed=seed))


def stack(dropout=0.0):
    first, second = tf_dpbn.DPBatchNormalization(), tf_dpbn.DPBatchNormalization()
    tail = [layers.Activation("tanh"), dense(4, 2), second, layers.Activation("tanh"), dense(CLASSES, 3)]
    return [dense(6, 1), *([layers.Dropout(dropout)] if dropout else []), first, *tail]


class Subclass(tf_dpbn.DPModel):
    def __init__(self):
        super().__init__()
        self.stack = stack()

    def call(self, x, training=None):
        for layer in self.stack:
            x = layer(x, training=training) if isinstance(layer, tf_dpbn.DPBatchNormalization) else layer(x)
        return x


def functional(dropout=0.0):
    inputs = x = keras.Input((5,))
    for layer in stack(dropout):
        x = layer(x)
    return tf_dpbn.DPModel(inputs, x)


def called(model):
    model(vectors()[0])
    return model


KINDS = {
    "functional": functional,
    "sequential": lambda: tf_dpbn.DPSequential([keras.Input((5,)), *stack()]),
    "subclass": lambda: called(Subclass()),
    "unbuilt_sequential": lambda: tf_dpbn.DPSequential(stack()),
    "unbuilt_subclass": Subclass,
}
STUB = {"stub": True}


def trained(model, callbacks=(), compile_options=None, **options):
    model.set_public_batch(PUBLIC)
    compiled(model, compile_options, **options)
    model.fit(draws(), callbacks=[*callbacks], verbose=0)
    return model


def by_name(model):
    return [np.asarray(variable) for variable in model.trainable_variables], moving(model)


def moving(model):
    """Moving mean and variance of each normalization."""
    found = [layer for layer in model.layers if isinstance(layer, tf_dpbn.DPBatchNormalization)]
    return [np.asarray(v) for layer in found for v in (layer.moving_mean, layer.moving_variance)]


@pytest.mark.filterwarnings("ignore:The batches:tf_dpbn.PrivacyWarning")
def test_a_public_batch_with_rows_of_the_training_data_is_refused_unless_allowed(tmp_path):
    model, loaded = (compiled(functional(), STUB, num_examples=EXAMPLES) for _ in range(2))
    batch = np.concatenate([PUBLIC, vectors()[0][:2]])
    model.set_public_batch(batch)
    for data in ((draws(),), (draws().cache(),), vectors()):
        with pytest.raises(ValueError, match="not contain private .* may_contain_training_rows=True.*2 of 9 rows"):
            model.fit(*data, batch_size=EXPECTED if len(data) > 1 else None, verbose=0)
    assert model.ledger.steps == 0
    model.set_public_batch(batch, may_contain_training_rows=True)
    model.save_weights(tmp_path / "w.weights.h5")
    loaded.load_weights(tmp_path / "w.weights.h5")
    loaded.fit(draws(), verbose=0)
    assert "rows of the training data in the public batch" in " ".join(loaded.privacy_statement(1e-3).split())


@pytest.fixture(scope="module")
def reference():
    return by_name(trained(functional()))


@pytest.mark.parametrize(
    "kind, options",
    [
        ("sequential", {"run_eagerly": True}),
        ("subclass", {"steps_per_execution": 2}),
        ("unbuilt_sequential", {"jit_compile": True}),
        ("unbuilt_subclass", {"engine": "loop"}),
    ],
    ids=str,
)
def test_all_ways_to_build_and_to_run_a_model_train_alike(kind, options, reference):
    model = trained(KINDS[kind](), compile_options=options)
    assert model.private_steps == STEPS
    for found, expected in zip(by_name(model), reference, strict=True):
        assert helpers.relative_error(found, expected) < 1e-4


# ---------------------------------------------------------------- what a step does


def linear(model=tf_dpbn.DPModel, units=CLASSES):
    inputs = keras.Input((5,))
    return model(inputs, layers.Dense(units)(inputs))


def test_denominator_is_the_expected_batch_size_whatever_is_drawn():
    x, y = vectors()
    model = compiled(linear(), l2_norm_clip=1e6)
    for rows in (0, 1, 3):
        before = [v.numpy() for v in model.trainable_variables]
        kernel = x[:rows].T @ (tf.nn.softmax(model(x[:rows])).numpy() - np.eye(CLASSES)[y[:rows]])
        weight = np.array([1.0] * rows + [0.0] * (6 - rows), "float32")
        logs = model.train_on_batch(x[:6], y[:6], sample_weight=weight, return_dict=True)
        np.testing.assert_allclose(before[0] - model.trainable_variables[0].numpy(), kernel / EXPECTED, atol=1e-6)
        if rows == 0:
            assert logs["loss"] == 0.0 and model.private_steps == 1
            np.testing.assert_array_equal(model.trainable_variables[0], before[0])


class WithUnusedWeights(tf_dpbn.DPModel):
    def __init__(self):
        super().__init__()
        self.used, self.unused = layers.Dense(CLASSES), layers.Dense(300)

    def call(self, x):
        self.unused(x)
        return tf.tile(self.used(x), [1, 300])


def test_every_variable_gets_noise_of_the_stated_scale_also_one_without_gradient():
    multiplier, clip = 2.0, 0.5
    exact, noised = (
        called(compiled(WithUnusedWeights(), l2_norm_clip=clip, noise_multiplier=m, noise_seed=3))
        for m in (0.0, multiplier)
    )
    x, y = vectors()
    scale = clip * multiplier / EXPECTED
    for rows in (0, 6):
        noised.set_weights(exact.get_weights())
        weight = np.array([1.0] * rows + [0.0] * (EXAMPLES - rows), "float32")
        for model in (exact, noised):
            model.train_on_batch(x, y, sample_weight=weight)
        pairs = zip(exact.trainable_variables, noised.trainable_variables, strict=True)
        noise = [a.numpy() - b.numpy() for a, b in pairs]
        for each in noise:
            assert (each != 0).all()
            spread = np.sqrt(np.mean(np.square(each / scale)))
            assert abs(spread - 1.0) < 5.0 / np.sqrt(2 * each.size)  # five standard errors
    largest = max(noise, key=np.size)
    assert largest.size == 1500
    for wrong in (EXPECTED, 1 / clip, multiplier):  # a factor left out or used twice
        assert abs(np.sqrt(np.mean(np.square(largest / scale))) / wrong - 1.0) > 5.0 / np.sqrt(2 * largest.size)


# ---------------------------------------------------------------- moving statistics


def forward(model, x, statistics=None):
    """The net of `stack` by hand, without dropout: logits, all moments in order, and what was normalized last."""
    found = []
    for layer in model.layers:
        if isinstance(layer, layers.Dense):
            x = x @ np.asarray(layer.kernel) + np.asarray(layer.bias)
        elif isinstance(layer, tf_dpbn.DPBatchNormalization):
            normalized, k = x, len(found)
            mean, variance = (x.mean(0), x.var(0)) if statistics is None else statistics[k : k + 2]
            found += [mean, variance]
            x = (x - mean) / np.sqrt(variance + layer.epsilon) * np.asarray(layer.gamma) + np.asarray(layer.beta)
        elif isinstance(layer, layers.Activation):
            x = np.tanh(x)
    return x, found, normalized


def assert_fresh(model):
    expected = forward(model, PUBLIC)[1]
    for found, value in zip(moving(model), expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-5)


def moved(model, callbacks=(), **options):
    """Trained by noise alone, which moves the weights as well as gradients do."""
    model.set_public_batch(PUBLIC)
    compiled(model, STUB, noise_multiplier=0.5)
    model.fit(draws(), callbacks=[*callbacks], verbose=0, **options)
    return model


def test_after_fit_moving_statistics_are_the_public_moments_at_the_final_weights():
    assert_fresh(moved(functional(dropout=0.9)))  # dropout is off when they are made


def call_it(model, x):
    return model(x).numpy()


def predict(model, x):
    return model.predict(x, verbose=0)


def evaluate(model, x):
    loss = model.evaluate(x, vectors()[1], verbose=0)
    logits = forward(model, x, forward(model, PUBLIC)[1])[0]
    expected = tf.nn.sparse_softmax_cross_entropy_with_logits(vectors()[1], logits)
    assert loss == pytest.approx(float(np.mean(expected)), rel=1e-4)
    return logits


def test_use_at_the_end_of_an_epoch_has_statistics_of_the_weights():
    uses, checked = [call_it, predict, evaluate], []

    class Use(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.before_update = moving(self.model)

        def on_epoch_end(self, epoch, logs=None):
            x = vectors()[0]
            found = uses[epoch](self.model, x)
            assert_fresh(self.model)
            assert helpers.relative_error(self.before_update, moving(self.model)) > 1e-3
            expected = forward(self.model, x, forward(self.model, PUBLIC)[1])[0]
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
            checked.append(epoch)

    assert_fresh(moved(functional(), [Use()], epochs=len(uses)))
    assert len(checked) == len(uses)


def test_a_frozen_normalization_keeps_its_statistics():
    model = functional()
    helpers.randomize(model)
    next(layer for layer in model.layers if isinstance(layer, tf_dpbn.DPBatchNormalization)).trainable = False
    kept = moving(model)[:2]
    moved(model)
    np.testing.assert_array_equal(moving(model)[:2], kept)
    second = forward(model, PUBLIC, [*kept, np.zeros(4), np.ones(4)])[2]
    np.testing.assert_allclose(moving(model)[2:], [second.mean(0), second.var(0)], rtol=1e-4, atol=1e-5)


def test_statistics_match_averaged_weights_that_keras_writes_at_the_end_of_fit():
    model = functional()
    model.set_public_batch(PUBLIC)
    compiled(model, STUB, inner=keras.optimizers.SGD(1.0, use_ema=True, ema_momentum=0.5), noise_multiplier=0.5)
    model.fit(draws(), epochs=2, validation_data=vectors(), verbose=0)
    assert_fresh(model)


def test_statistics_can_be_refreshed_before_any_training():
    inputs = keras.Input((5,))
    frozen = tf_dpbn.DPBatchNormalization(trainable=False)
    outputs = layers.Dense(CLASSES)(frozen(tf_dpbn.DPBatchNormalization()(inputs)))
    model = tf_dpbn.DPModel(inputs, outputs)
    model.set_public_batch(PUBLIC)
    before = model.predict(vectors()[0], verbose=0)
    model.refresh_statistics()
    expected = [PUBLIC.mean(0), PUBLIC.var(0), np.zeros(5), np.ones(5)]
    np.testing.assert_allclose(moving(model), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(model.predict(vectors()[0], verbose=0) - before).max() > 1e-2


def test_refreshing_needs_a_public_batch_and_weights():
    with pytest.raises(ValueError, match="public_batch=None"):
        functional().refresh_statistics()
    model = tf_dpbn.DPSequential()
    with pytest.raises(RuntimeError, match="Build the model"):
        model.refresh_statistics()


def test_what_is_in_training_counts_from_compile_to_compile():
    model = functional()
    model.set_public_batch(PUBLIC)
    first = next(each for each in model.layers if isinstance(each, tf_dpbn.DPBatchNormalization))
    compiled(model, STUB, noise_multiplier=0.5).train_on_batch(*vectors(n=EXPECTED))
    first.trainable = False
    compiled(model, STUB)
    settled = np.asarray(first.moving_mean)  # those of the step before
    assert np.abs(settled).max() > 0.0
    first.moving_mean.assign(np.full(6, 7.0))
    model.train_on_batch(*vectors(n=EXPECTED))
    model.predict(vectors()[0], verbose=0)
    np.testing.assert_array_equal(first.moving_mean, np.full(6, 7.0))
    first.trainable = True
    compiled(model, STUB)
    model.refresh_statistics()
    assert np.abs(np.asarray(first.moving_mean) - 7.0).min() > 1e-3


def several_outputs():
    x = keras.Input((5,))
    return tf_dpbn.DPModel(x, {"a": layers.Dense(CLASSES, name="a")(x), "b": layers.Dense(CLASSES, name="b")(x)})


@pytest.mark.parametrize(
    "build, correction",
    [
        *((build, "adaptive") for build in KINDS.values()),
        (KINDS["unbuilt_subclass"], "local"),
        (several_outputs, "auto"),
    ],
)
def test_a_step_is_traced_once_with_metrics_by_name(build, correction, monkeypatch):
    metrics, batches = ["accuracy"], draws()
    if build is several_outputs:
        metrics = {"a": ["accuracy"], "b": ["accuracy"]}
        batches = draws_for({"a": vectors()[1], "b": vectors()[1]})
    model = compiled(build(), {"metrics": metrics, "correction": correction, **STUB})
    if build is not several_outputs:
        model.set_public_batch(PUBLIC)
    traced = []
    inner = tf_dpbn.DPModel.train_step
    monkeypatch.setattr(tf_dpbn.DPModel, "train_step", lambda self, data: traced.append(1) or inner(self, data))
    logs = model.fit(batches, verbose=0).history
    assert any(name.endswith("accuracy") for name in logs), logs
    assert len(traced) == 1


class OneSided(tf_dpbn.DPModel):
    """Has a layer in training only, and one in inference only."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.more, self.other = dense(4, 1), dense(CLASSES, 2), dense(4, 3), dense(4, 4)
        self.norm = tf_dpbn.DPBatchNormalization()

    def call(self, x, training=None):
        x = self.first(x)
        return self.last(x + (self.norm(self.more(x), training=True) if training else self.other(x)))


@pytest.mark.filterwarnings(r"ignore:`build\(\)` was called:UserWarning")
def test_layers_in_training_only_and_in_inference_only_train_after_use_and_after_another_compile():
    model = compiled(OneSided(), STUB)
    model.set_public_batch(PUBLIC)
    model.evaluate(*vectors(), verbose=0)
    model.refresh_statistics()
    model.fit(draws(), verbose=0)
    assert len(model.trainable_variables) == 10
    helpers.compiled(model, optimizer=model.optimizer, stub=True)
    model.fit(draws(), verbose=0)
    assert model.ledger.steps == 2 * STEPS


def test_a_sequential_model_that_fit_built_takes_public_batches_of_any_size(tmp_path):
    model = moved(tf_dpbn.DPSequential(stack()))
    model.set_public_batch(vectors(seed=2, n=11)[0])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.public_batch.shape == (11, 5)


@pytest.mark.parametrize(
    "engine", ["book_keeping", *(pytest.param(e, marks=pytest.mark.thorough) for e in ENGINES[1:])]
)
def test_a_model_that_is_gone_leaves_no_graph_behind(engine):
    def train():
        inputs = keras.Input((5,))
        x = layers.Activation("tanh")(tf_dpbn.DPBatchNormalization()(dense(6, 1)(inputs)))
        x = layers.Add()([x, tf_dpbn.DPBatchNormalization(statistics="noised")(dense(6, 2)(x))])
        model = compiled(tf_dpbn.DPModel(inputs, dense(CLASSES, 3)(x)), {"engine": engine, "correction": "full"})
        model.set_public_batch(PUBLIC)
        model.fit(draws(), verbose=0)

    def graphs():
        gc.collect()
        return sum(isinstance(each, tf.Graph) for each in gc.get_objects())

    train()
    for _ in range(3):  # what TensorFlow keeps once, it keeps at any of the first; a leak grows each time
        before = graphs()
        train()
        if graphs() <= before:
            return
    pytest.fail("each training left graphs behind")


@pytest.mark.parametrize("outputs", ["ab", "a"])
def test_targets_by_the_name_of_outputs_train(outputs):
    """As Keras allows; outputs are a list, or a single one, for which Keras 3 refuses names."""
    if IS_KERAS_3 and outputs == "a":
        pytest.skip("Keras 3 wants the target of a single output without a name")
    x = keras.Input((5,))
    tensors = [layers.Dense(CLASSES, name=name)(x) for name in outputs]
    model = tf_dpbn.DPModel(x, tensors if len(tensors) > 1 else tensors[0])
    loss = {name: keras.losses.SparseCategoricalCrossentropy(from_logits=True) for name in outputs}
    for metrics in (None, {"a": ["accuracy"]}):
        optimizer = helpers.dp_optimizer(expected_batch_size=EXPECTED)
        helpers.compiled(model, loss, optimizer, metrics=metrics, stub=True)
        logs = model.fit(draws_for({name: vectors()[1] for name in outputs}), verbose=0).history
        assert np.isfinite(logs["loss"][0])


def test_all_layers_keep_averages_those_of_one_name_too():
    def block(width):
        inputs = keras.Input((5,))
        x = layers.Activation("tanh")(tf_dpbn.DPBatchNormalization(name="bn")(dense(width, 1)(inputs)))
        return keras.Model(inputs, dense(5, 2)(x))

    inputs = keras.Input((5,))
    model = tf_dpbn.DPModel(inputs, layers.Dense(CLASSES)(block(6)(block(4)(inputs))))
    compiled(model, {"correction": "adaptive", **STUB}).set_public_batch(PUBLIC)
    model.fit(draws(), verbose=0)
    assert [mean.shape[0] for mean in model._record.released_means.variables.values()] == [2 * (4 + 6) + 1]


def draws_for(targets):
    x, _ = vectors()
    return poisson_dataset(x, targets, expected_batch_size=EXPECTED, max_batch_size=8, steps_per_epoch=2, seed=1)
