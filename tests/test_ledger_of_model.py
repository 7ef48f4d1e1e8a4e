"""The ledger of a model: what is recorded when, and what epsilon comes of it."""

import copy
import dataclasses
import functools
import math

import pytest
import tensorflow as tf

import tf_dpbn
from tests import helpers
from tf_dpbn import accounting
from tf_dpbn._keras import keras

layers = keras.layers
DELTA = 1e-3
X, _ = helpers.images(16, (3,))
Y = X[:, :2]


def make_plan(**kwargs):
    arguments = {"noise_multiplier": 2.0, "delta": DELTA, "num_examples": 16, "expected_batch_size": 4, "epochs": 4}
    return tf_dpbn.PrivacyPlan(**{**arguments, **kwargs})


PLAN = make_plan()


def make_model(optimizer=None, model=None, **kwargs):
    if model is None:
        inputs = keras.Input((3,))
        model = tf_dpbn.DPModel(inputs, layers.Dense(2)(inputs))
    optimizer = optimizer or tf_dpbn.DPOptimizer.from_plan(PLAN, keras.optimizers.SGD(0.01), 1.0)
    return helpers.compiled(model, "mse", optimizer, **{"stub": True, **kwargs})


_shared = functools.cache(make_model)


@pytest.fixture
def model():
    """One for all tests, with nothing in its ledger."""
    return helpers.forget(_shared())


def fit(model, data=None, **kwargs):
    return model.fit(PLAN.poisson_dataset(X, Y) if data is None else data, verbose=0, **kwargs)


def poisson_record(steps, noise_multiplier=2.0):
    return make_plan(noise_multiplier=noise_multiplier).record(steps)


def assumed_record(steps, noise_multiplier=2.0):
    return accounting.StepRecord(
        sampling_probability=0.25, noise_multipliers=(noise_multiplier,), steps=steps, num_examples=16
    )


@pytest.fixture(scope="module")
def trained():
    """One fit over Poisson batches, 8 steps, and one over arrays, 4 steps."""
    model = make_model()
    fit(model, epochs=2)
    with pytest.warns(tf_dpbn.PrivacyWarning, match="assumes Poisson sampling"):
        model.fit(X, Y, batch_size=4, verbose=0)
    return model


@pytest.mark.both
def test_fits_are_recorded_by_their_sampling(trained):
    trained.ledger.record(poisson_record(100))  # of a copy
    assert trained.ledger == tf_dpbn.Ledger([poisson_record(8), assumed_record(4)])


def test_epsilon_is_that_of_accounting_by_hand(trained):
    truncation = 8 * accounting.truncation_probability(
        num_examples=16, sampling_probability=0.25, max_batch_size=PLAN.max_batch_size
    )
    record = accounting.StepRecord(sampling_probability=0.25, noise_multipliers=(2.0,), steps=12)
    by_hand = accounting.Ledger([record]).epsilon(DELTA - truncation)
    assert trained.epsilon(DELTA) == pytest.approx(by_hand, rel=1e-6)
    assert 0.1 < by_hand < 10.0


def test_the_statement_names_what_was_assumed(model, trained):
    statement = " ".join(trained.privacy_statement(DELTA).split())
    for part in ("12", "0.25", "2", "ASSUMED", "add", f"{trained.epsilon(DELTA):.3g}"[:3]):
        assert part in statement, part
    fit(model)
    statement = model.privacy_statement(DELTA)
    assert "ASSUMED" not in statement
    assert "Poisson" in statement


def test_train_on_batch_is_recorded_as_assumed_even_after_a_poisson_fit(model):
    fit(model)
    model.train_on_batch(X[:4], Y[:4])
    model.train_on_batch(X[:4], Y[:4])
    assert model.ledger == tf_dpbn.Ledger([poisson_record(4), assumed_record(2)])


WAYS = {
    "fit": lambda model: model.fit(X, Y, verbose=0),
    "train_on_batch": lambda model: model.train_on_batch(X[:4], Y[:4]),
    "compile": lambda model: helpers.compiled(model, "mse", model.optimizer),
    "train_step": lambda model: model.train_step((tf.constant(X[:4]), tf.constant(Y[:4]))),
}


@pytest.mark.parametrize("when, done", [("on_train_begin", 0), ("on_train_batch_end", 1), ("on_epoch_end", 4)])
def test_a_callback_may_not_train_or_compile(when, done, model):
    for name, way in WAYS.items():
        callback = keras.callbacks.LambdaCallback(**{when: lambda *_, way=way, **__: way(model)})
        message = "taken by `fit` and `train_on_batch`" if name == "train_step" else f"`{name}` cannot .* by a callback"
        with pytest.raises(RuntimeError, match=message):
            fit(model, callbacks=[callback])
    assert model.ledger.steps == len(WAYS) * done
    fit(helpers.forget(model))  # afterwards it may
    assert model.ledger == tf_dpbn.Ledger([poisson_record(4)])


@pytest.mark.parametrize("wrap", [lambda step: step, tf.function, lambda s: tf.function(s, jit_compile=True)])
def test_a_step_from_elsewhere_is_refused(wrap, model):
    with pytest.raises(RuntimeError, match="taken by `fit` and `train_on_batch` alone.*instead of train_step"):
        wrap(model.train_step)((tf.constant(X[:4]), tf.constant(Y[:4])))
    assert model.ledger.steps == 0


class OwnStep(tf_dpbn.DPSequential):
    def train_step(self, data):
        return super().train_step(data)


class OwnLoss(tf_dpbn.DPSequential):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return tf.reduce_mean(y_pred)


@pytest.mark.parametrize("kind, method", [(OwnStep, "train_step"), (OwnLoss, "compute_loss")])
def test_a_step_or_loss_of_the_models_own_is_refused(kind, method):
    with pytest.raises(NotImplementedError, match=f"overrides {method}"):
        make_model(model=kind([keras.Input((3,)), layers.Dense(2)]))
    model = make_model()
    setattr(model, method, lambda *args, **kwargs: None)
    for train in ("fit", "train_on_batch"):
        with pytest.raises(NotImplementedError, match=f"overrides {method}"):
            WAYS[train](model)
    assert model.ledger.steps == 0


def test_a_deep_copy_is_refused(model):
    with pytest.raises(TypeError, match="copy.deepcopy cannot copy a DPModel.*Received: model="):
        copy.deepcopy(model)


def test_steps_while_the_ledger_is_read_are_recorded(monkeypatch):
    """Another thread's steps, between two reads of the optimizer's counter."""
    model = make_model()
    helpers.spend(model, 1)
    counted = model.optimizer.counted_steps

    def count_and_step():
        found = counted()
        model.optimizer._steps.count(0)
        return found

    monkeypatch.setattr(model.optimizer, "counted_steps", count_and_step)
    model._record.open(model.optimizer)
    monkeypatch.undo()
    assert model.ledger.steps == sum(counted().values()) > 1


def test_functions_that_tensorflow_runs_eagerly_are_refused(model):
    tf.config.run_functions_eagerly(True)
    try:
        with pytest.raises(RuntimeError, match=r"run_functions_eagerly\(False\)"):
            model.train_on_batch(X[:4], Y[:4])
    finally:
        tf.config.run_functions_eagerly(False)
    assert model.ledger.steps == 0


@pytest.mark.both
@pytest.mark.parametrize("options", [{"steps_per_execution": 3}, {"run_eagerly": True}], ids=str)
def test_every_step_counts_however_keras_runs_them(options):
    model = make_model(**options)
    fit(model, epochs=2)
    assert model.ledger == tf_dpbn.Ledger([poisson_record(8)])
    assert int(model.optimizer.iterations) == 8


def test_data_sets_derived_from_a_poisson_one_train_with_the_warning(model):
    ways = [
        lambda d: d.map(lambda x, y, weight: (x[::-1], y, weight)),
        lambda d: d.cache().take(4),
        lambda d: d.shuffle(4).repeat(1),
    ]
    for derive in ways:
        with pytest.warns(tf_dpbn.PrivacyWarning, match="were changed .* assumes Poisson sampling"):
            fit(model, derive(PLAN.poisson_dataset(X, Y)))
    record = dataclasses.replace(poisson_record(12), sampling="assumed")  # truncated batches are charged
    assert model.ledger == tf_dpbn.Ledger([record])


@pytest.mark.both
@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
@pytest.mark.parametrize("options", [{}, {"jit_compile": True}], ids=str)
def test_a_batch_beyond_the_end_of_the_data_is_no_step(options):
    def batches():
        for start in range(0, 16, 4):
            yield X[start : start + 4], Y[start : start + 4]

    specs = tf.TensorSpec((4, 3)), tf.TensorSpec((4, 2))
    model = make_model(**options)
    with pytest.warns(tf_dpbn.PrivacyWarning, match="assumes Poisson sampling"):
        fit(model, tf.data.Dataset.from_generator(batches, output_signature=specs), epochs=2)
        if not options:
            fit(model, batches())
    assert model.ledger.steps == int(model.optimizer.iterations) == (8 if options else 12)


def test_an_exception_in_a_callback_loses_no_steps(model):
    interruption = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: 1 // (2 - batch))
    with pytest.raises(ZeroDivisionError):
        fit(model, callbacks=[interruption])
    assert model.ledger == tf_dpbn.Ledger([poisson_record(3)])
    helpers.spend(model, 1)
    assert model.ledger == tf_dpbn.Ledger([poisson_record(3), assumed_record(1)])


def test_a_step_that_changed_the_weights_is_recorded_though_its_metric_raises():
    def failing(y_true, y_pred):
        with tf.control_dependencies([tf.debugging.assert_less(tf.reduce_max(tf.abs(y_true)), -1.0)]):
            return tf.reduce_mean(y_pred, -1)

    model = make_model(metrics=[failing])
    before = helpers.flat(model.get_weights())
    with pytest.raises(Exception, match="assert"):
        fit(model)
    assert model.ledger.steps == 1 or (helpers.flat(model.get_weights()) == before).all()


def test_another_noise_multiplier_is_another_record():
    model, other = make_model(), make_plan(noise_multiplier=3.0)
    helpers.spend(model, 4)
    make_model(tf_dpbn.DPOptimizer.from_plan(other, "sgd", 1.0), model)
    assert model.ledger == tf_dpbn.Ledger([assumed_record(4)])
    # The plan is for all of it.
    with pytest.warns(tf_dpbn.PrivacyWarning, match="take 4 steps after 4 so far and reach"):
        fit(model, other.poisson_dataset(X, Y))
    assert model.ledger == tf_dpbn.Ledger([assumed_record(4), poisson_record(4, 3.0)])


def test_privacy_arguments_of_an_optimizer_are_read_only():
    optimizer = helpers.dp_optimizer()
    for argument in ("l2_norm_clip", "noise_multiplier", "expected_batch_size", "num_examples", "delta"):
        with pytest.raises(AttributeError):
            setattr(optimizer, argument, 0.5)


def test_an_optimizer_that_compile_did_not_get_is_refused():
    model = make_model()
    model.optimizer = tf_dpbn.DPOptimizer.from_plan(make_plan(noise_multiplier=0.01), "sgd", 1.0)
    for train in ("fit", "train_on_batch"):
        with pytest.raises(RuntimeError, match=r"Call compile\("):
            WAYS[train](model)
    assert model.ledger.steps == 0


def test_no_noise_is_no_privacy():
    optimizer = helpers.dp_optimizer(expected_batch_size=4, num_examples=16)
    model = make_model(optimizer=optimizer)
    assert model.epsilon(DELTA) == 0.0
    helpers.spend(model, 1)
    assert model.epsilon(DELTA) == math.inf
    assert "infinite" in model.privacy_statement(DELTA)


def test_without_the_number_of_examples_there_is_no_epsilon_and_the_error_says_what_to_do():
    model = make_model(optimizer=helpers.dp_optimizer(noise_multiplier=2.0, expected_batch_size=4))
    helpers.spend(model, 1)
    with pytest.raises(ValueError, match=r"Pass `num_examples` to the optimizer.*sampling_probability=None"):
        model.epsilon(DELTA)
    filled = model.ledger.with_sampling_probability(0.25)
    assert filled.epsilon(DELTA) == accounting.Ledger([assumed_record(1)]).epsilon(DELTA)
