"""The ledger of a model: what is booked when, and what epsilon comes of it."""

import contextlib
import dataclasses
import math

import numpy as np
import pytest
import tensorflow as tf

import tf_dpbn
from tests import helpers
from tf_dpbn import _books, accounting
from tf_dpbn._keras import IS_KERAS_3, keras

layers = keras.layers
DELTA = 1e-3
X, _ = helpers.images(16, (3,))
Y = X[:, :2]


def make_plan(**kwargs):
    arguments = {"noise_multiplier": 2.0, "delta": DELTA, "num_examples": 16, "expected_batch_size": 4, "epochs": 4}
    return tf_dpbn.PrivacyPlan(**{**arguments, **kwargs})


def make_model(plan=None, optimizer=None, model=None, **kwargs):
    if model is None:
        inputs = keras.Input((3,))
        model = tf_dpbn.DPModel(inputs, layers.Dense(2)(inputs))
    optimizer = optimizer or tf_dpbn.DPOptimizer.from_plan(plan or make_plan(), keras.optimizers.SGD(0.01), 1.0)
    return helpers.compiled(model, "mse", optimizer, **kwargs)


def poisson_record(steps, noise_multiplier=2.0):
    return make_plan(noise_multiplier=noise_multiplier).record(steps)


def assumed_record(steps, noise_multiplier=2.0):
    return accounting.StepRecord(
        sampling_probability=0.25, noise_multipliers=(noise_multiplier,), steps=steps, num_examples=16
    )


@pytest.fixture(scope="module")
def trained():
    """One fit over Poisson batches, 8 steps, and one over arrays, 4 steps."""
    plan = make_plan()
    model = make_model(plan)
    model.fit(plan.poisson_dataset(X, Y), epochs=2, verbose=0)
    with pytest.warns(tf_dpbn.PrivacyWarning, match="assumes Poisson sampling"):
        model.fit(X, Y, batch_size=4, verbose=0)
    return model


def test_a_new_model_has_spent_nothing():
    model = make_model()
    assert model.ledger == tf_dpbn.Ledger()
    assert model.epsilon(DELTA) == 0.0


def test_fits_are_booked_by_their_sampling(trained):
    assert trained.ledger == tf_dpbn.Ledger([poisson_record(8), assumed_record(4)])


def test_the_ledger_is_a_copy(trained):
    trained.ledger.record(poisson_record(100))
    assert trained.ledger.steps == 12


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_epsilon_is_that_of_accounting_by_hand(trained, accountant):
    truncation = 8 * accounting.truncation_probability(
        num_examples=16, sampling_probability=0.25, max_batch_size=make_plan().max_batch_size
    )
    record = accounting.StepRecord(sampling_probability=0.25, noise_multipliers=(2.0,), steps=12)
    by_hand = accounting.Ledger([record]).epsilon(DELTA - truncation, accountant)
    assert trained.epsilon(DELTA, accountant) == pytest.approx(by_hand, rel=1e-6)
    assert 0.1 < by_hand < 10.0


def test_the_statement_names_what_was_assumed(trained):
    statement = " ".join(trained.privacy_statement(DELTA).split())
    for part in ("12", "0.25", "2", "ASSUMED", "add", f"{trained.epsilon(DELTA):.3g}"[:3]):
        assert part in statement, part


def test_the_statement_of_poisson_batches_assumes_nothing():
    plan = make_plan()
    model = make_model(plan)
    model.fit(plan.poisson_dataset(X, Y), verbose=0)
    statement = model.privacy_statement(DELTA)
    assert "ASSUMED" not in statement
    assert "Poisson" in statement


def test_train_on_batch_is_booked_as_assumed_even_after_a_poisson_fit():
    plan = make_plan()
    model = make_model(plan)
    model.fit(plan.poisson_dataset(X, Y), verbose=0)
    model.train_on_batch(X[:4], Y[:4])
    model.train_on_batch(X[:4], Y[:4])
    assert model.ledger == tf_dpbn.Ledger([poisson_record(4), assumed_record(2)])


class Subclassed(tf_dpbn.DPModel):
    def __init__(self):
        super().__init__()
        self.last = layers.Dense(2)

    def call(self, x):
        return self.last(x)


class SharedGraph(Subclassed):
    """Its step is one graph, whoever runs it."""

    @tf.function
    def train_step(self, data):
        return super().train_step(data)


class TrainsBeside(keras.callbacks.Callback):
    """Takes steps on batches of its own: by Keras, by hand, and by a graph of its own."""

    def on_train_begin(self, logs=None):
        self.own_graph = tf.function(self.model.train_step)
        self.train()

    def on_epoch_end(self, epoch, logs=None):
        self.train()

    def train(self):
        batch = batch_like(make_plan().poisson_dataset(X, Y))
        self.model.train_on_batch(*batch)
        self.model.train_step(batch)
        self.own_graph(batch)


@pytest.mark.parametrize("shared, run_eagerly", [(False, False), (False, True), (True, False), (True, True)])
def test_steps_that_a_callback_takes_are_booked_as_assumed_within_a_poisson_fit(shared, run_eagerly):
    plan = make_plan()
    model = make_model(plan, model=SharedGraph() if shared else None, run_eagerly=run_eagerly)
    model.fit(plan.poisson_dataset(X, Y), epochs=2, verbose=0, callbacks=[TrainsBeside()])
    assert model.ledger == tf_dpbn.Ledger([poisson_record(8), assumed_record(9)])
    assert "ASSUMED" in model.privacy_statement(DELTA)


@pytest.mark.parametrize("shared", [False, True])
def test_steps_by_any_way_outside_of_fit_are_booked_as_assumed(shared):
    model = make_model(model=SharedGraph() if shared else None)
    beside = TrainsBeside()
    beside.set_model(model)
    beside.on_train_begin()
    beside.train()
    assert model.ledger == tf_dpbn.Ledger([assumed_record(6)])


def test_a_fit_within_a_fit_is_booked_by_its_own_sampling():
    plan = make_plan()
    model = make_model(plan)
    inner = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: model.fit(X, Y, batch_size=4, verbose=0))
    with pytest.warns(tf_dpbn.PrivacyWarning, match="assumes Poisson sampling"):
        model.fit(plan.poisson_dataset(X, Y), epochs=2, verbose=0, callbacks=[inner])
    assert [(each.sampling, each.steps) for each in model.ledger.entries] == [("poisson", 8), ("assumed", 8)]
    model.train_on_batch(X[:4], Y[:4])
    assert model.ledger.entries[-1].steps == 9


@pytest.mark.parametrize("train", helpers.WAYS_TO_TRAIN)
def test_a_callback_adds_no_part_to_a_logical_batch_of_fit(train):
    plan = make_plan()
    model = make_model(plan, accumulation_steps=2)
    beside = keras.callbacks.LambdaCallback(on_epoch_begin=lambda *_: helpers.WAYS_TO_TRAIN[train](model, X[:4], Y[:4]))
    with pytest.raises(RuntimeError, match="accumulation_steps=2.*within `fit`"):
        model.fit(plan.poisson_dataset(X, Y, accumulation_steps=2), verbose=0, callbacks=[beside])
    assert model.ledger.steps == 0
    model.train_on_batch(X[:4], Y[:4])  # afterwards it may


def batch_like(data):
    """As many rows as the batches of `fit`, whose graph it may then share."""
    rows = data.element_spec[0].shape[0]
    return tf.constant(np.resize(X, (rows, 3))), tf.constant(np.resize(Y, (rows, 2))), tf.ones(rows)


@pytest.mark.parametrize("shared", [False, True])
def test_a_graph_that_was_traced_before_fit_adds_no_part_to_its_logical_batch(shared):
    plan = make_plan()
    model = make_model(plan, model=SharedGraph() if shared else None, accumulation_steps=2)
    batch = batch_like(plan.poisson_dataset(X, Y, accumulation_steps=2))
    graph = tf.function(model.train_step)
    graph(batch), graph(batch)
    assert model.ledger.steps == 1
    beside = keras.callbacks.LambdaCallback(on_train_batch_begin=lambda *_, **__: graph(batch))
    with pytest.raises(tf.errors.InvalidArgumentError, match="accumulation_steps=2.*within `fit`"):
        model.fit(plan.poisson_dataset(X, Y, accumulation_steps=2), verbose=0, callbacks=[beside])
    assert model.ledger.steps == 1
    graph(batch), graph(batch)
    assert model.ledger.steps == 2


def test_xla_which_cannot_refuse_adds_no_part_to_a_logical_batch_of_fit():
    plan = make_plan()
    model = make_model(plan, accumulation_steps=2)
    batch = tf.constant(X[:4]), tf.constant(Y[:4])
    graph = tf.function(model.train_step, jit_compile=True)
    graph(batch), graph(batch)
    pending = []

    def step_beside(*_, **__):
        graph(batch)
        pending.append(model._accumulator.pending)

    beside = keras.callbacks.LambdaCallback(on_train_batch_begin=step_beside)
    model.fit(plan.poisson_dataset(X, Y, accumulation_steps=2), verbose=0, callbacks=[beside])
    assert pending == [0, 1] * 4
    assert [(each.sampling, each.steps) for each in model.ledger.entries] == [("assumed", 1), ("poisson", 4)]


class Interruption(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 2:
            raise KeyboardInterrupt


def test_an_interrupted_logical_batch_is_not_the_beginning_of_another():
    plan = make_plan()
    model = make_model(plan, accumulation_steps=2)
    with pytest.raises(KeyboardInterrupt):  # the third batch is the first part of a logical batch
        model.fit(plan.poisson_dataset(X, Y, accumulation_steps=2), verbose=0, callbacks=[Interruption()])
    model.train_on_batch(X[:4], Y[:4])
    assert model.ledger.steps == 1
    model.train_on_batch(X[4:8], Y[4:8])
    assert model.ledger.steps == 2


@pytest.mark.parametrize("train", ["train_on_batch", "train_step"])
def test_a_failed_part_is_not_added_once_more(train):
    calls = []

    def failing_once(y_true, y_pred):
        def check(value):
            calls.append(value)
            assert len(calls) > 1, "the first call"
            return value

        return tf.reshape(tf.py_function(check, [tf.reduce_mean(y_pred)], tf.float32), [1])

    model = make_model(accumulation_steps=2, metrics=[failing_once])
    batch = tf.constant(X[:4]), tf.constant(Y[:4])
    step = helpers.WAYS_TO_TRAIN[train]
    with pytest.raises(Exception, match="the first call"):
        step(model, *batch)
    step(model, *batch)
    assert model.ledger.steps == 0
    step(model, tf.constant(X[4:8]), tf.constant(Y[4:8]))
    assert model.ledger.steps == 1


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (2, 3)])
def test_compile_within_fit_does_not_change_what_a_logical_batch_is(before, after):
    plan = make_plan()
    model = make_model(plan, accumulation_steps=before)
    compiling = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda *_: helpers.compiled(model, "mse", model.optimizer, accumulation_steps=after)
    )
    data = plan.poisson_dataset(X, Y, accumulation_steps=before)
    with pytest.raises(RuntimeError, match="within `fit`"):
        model.fit(data, verbose=0, callbacks=[compiling])
    model.fit(data, verbose=0)
    assert model.ledger == tf_dpbn.Ledger([poisson_record(4)])


class StepsTwice(Subclassed):
    """Takes two steps on each batch that `fit` gives it."""

    def train_step(self, data):
        super().train_step(data)
        return super().train_step(data)


class StepsInLoop(Subclassed):
    """Its two steps are one in the graph."""

    def train_step(self, data):
        def step(i):
            tf_dpbn.DPModel.train_step(self, data)
            return [i + 1]

        tf.while_loop(lambda i: i < 2, step, [0])
        return self.get_metrics_result()


class StepsTwiceBySuper(StepsTwice):
    def train_step(self, data):
        return super().train_step(data)


TWICE = {"twice": StepsTwice, "loop": StepsInLoop, "super": StepsTwiceBySuper}


@pytest.mark.parametrize("options", [{}, {"steps_per_execution": 3}, {"run_eagerly": True}], ids=str)
@pytest.mark.parametrize("kind", TWICE)
def test_a_second_step_on_a_batch_of_fit_is_not_sampled_anew(kind, options):
    plan = make_plan()
    model = make_model(plan, model=TWICE[kind](), **options)
    model.fit(plan.poisson_dataset(X, Y), epochs=2, verbose=0)
    assert model.ledger == tf_dpbn.Ledger([poisson_record(8), assumed_record(8)])
    assert "ASSUMED" in model.privacy_statement(DELTA)


@pytest.mark.parametrize("options", [{}, {"steps_per_execution": 2}, {"run_eagerly": True}], ids=str)
def test_a_second_step_on_a_batch_of_fit_is_no_part_of_a_logical_batch(options):
    plan = make_plan()
    model = make_model(plan, model=StepsTwice(), accumulation_steps=2, **options)
    with pytest.raises(tf.errors.InvalidArgumentError, match="an example could then be twice"):
        model.fit(plan.poisson_dataset(X, Y, accumulation_steps=2), verbose=0)
    assert model.ledger.steps == 0


@pytest.mark.parametrize("stride", [1, 4])
def test_xla_which_cannot_refuse_leaves_a_second_step_on_a_batch_out_of_the_logical_batch(stride):
    plan = make_plan()
    model = make_model(plan, model=StepsTwice(), accumulation_steps=2, steps_per_execution=stride, jit_compile=True)
    model.fit(plan.poisson_dataset(X, Y, accumulation_steps=2), verbose=0)
    assert model.ledger == tf_dpbn.Ledger([poisson_record(4)])


class Recursive(Subclassed):
    def train_step(self, data, again=True):
        return self.train_step(data, again=False) if again else tf_dpbn.DPModel.train_step(self, data)


def test_a_train_step_may_call_itself():
    plan = make_plan()
    model = make_model(plan, model=Recursive(), steps_per_execution=2, accumulation_steps=2)
    model.fit(plan.poisson_dataset(X, Y, accumulation_steps=2), verbose=0)
    assert model.ledger == tf_dpbn.Ledger([poisson_record(4)])


@pytest.mark.parametrize("parts, records", [(1, [assumed_record(16)]), (2, [])])
def test_a_train_step_of_the_instance_is_not_known_to_be_fits(parts, records):
    def twice(data):
        tf_dpbn.DPModel.train_step(model, data)
        return tf_dpbn.DPModel.train_step(model, data)

    plan = make_plan()
    model = make_model(plan, accumulation_steps=parts, steps_per_execution=2)
    model.train_step = twice
    outcome = pytest.raises(tf.errors.InvalidArgumentError) if parts > 1 else contextlib.nullcontext()
    with outcome:
        model.fit(plan.poisson_dataset(X, Y, accumulation_steps=parts), epochs=2, verbose=0)
    assert model.ledger == tf_dpbn.Ledger(records)


class SkipsSome(Subclassed):
    """Takes no step on the second part of a draw."""

    def __init__(self):
        super().__init__()
        self.seen = tf.Variable(0, trainable=False)

    def train_step(self, data):
        def step():
            tf_dpbn.DPModel.train_step(self, data)
            return True

        tf.cond(self.seen.assign_add(1) == 2, lambda: False, step)
        return self.get_metrics_result()


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_batch_without_a_step_does_not_join_parts_of_two_draws(jit_compile, stride):
    plan = make_plan()
    model = make_model(
        plan, model=SkipsSome(), accumulation_steps=2, steps_per_execution=stride, jit_compile=jit_compile
    )
    # XLA cannot refuse, and the unfinished logical batch is found at the end of the epoch
    error, words = (
        (RuntimeError, "whole logical") if jit_compile else (tf.errors.InvalidArgumentError, "one step on each")
    )
    with pytest.raises(error, match=words):
        model.fit(plan.poisson_dataset(X, Y, accumulation_steps=2), verbose=0)
    assert model.ledger.steps == 0


class FailsOnce(Subclassed):
    """Goes on after a step that failed."""

    failed = False

    def train_step(self, data):
        if not self.failed:
            self.failed = True
            with pytest.raises(ValueError):
                super().train_step((data[0][:, :2], *data[1:]))
            return self.get_metrics_result()
        return super().train_step(data)


def test_a_failure_within_fit_keeps_the_place_in_the_draw():
    plan = make_plan()
    model = make_model(plan, model=FailsOnce(), accumulation_steps=2, run_eagerly=True)
    model(X[:1])
    with pytest.raises(tf.errors.InvalidArgumentError, match="one step on each"):
        model.fit(plan.poisson_dataset(X, Y, accumulation_steps=2), verbose=0)
    assert model.ledger.steps == 0


@pytest.mark.skipif(not IS_KERAS_3, reason="tf_keras has no such setting")
def test_an_epoch_that_keras_cuts_within_a_logical_batch_is_refused(monkeypatch):
    plan = make_plan()
    model = make_model(plan, accumulation_steps=2)
    monkeypatch.setattr(keras.config, "max_steps_per_epoch", lambda: 3)
    with pytest.raises(ValueError, match="steps_per_epoch=3"):
        model.fit(plan.poisson_dataset(X, Y, accumulation_steps=2), verbose=0)
    assert model.ledger.steps == 0


def test_an_epoch_that_began_late_ends_within_no_logical_batch():
    """As where tf_keras resumes within an epoch."""
    plan = make_plan()
    model = make_model(plan, accumulation_steps=2)
    data = plan.poisson_dataset(X, Y, accumulation_steps=2)
    losing = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: batch == 0 and model._accumulator.reset()
    )
    with pytest.raises(RuntimeError, match="within a logical batch"):
        model.fit(data, verbose=0, callbacks=[losing])


def test_a_train_step_of_ones_own_that_steps_once_is_nothing_special():
    class Logging(tf_dpbn.DPSequential):
        def train_step(self, data):
            return {**super().train_step(data), "twice": 2.0}

    plan = make_plan()
    model = make_model(plan, model=Logging([keras.Input((3,)), layers.Dense(2)]), steps_per_execution=3)
    history = model.fit(plan.poisson_dataset(X, Y), epochs=2, verbose=0)
    assert history.history["twice"] == [2.0, 2.0]
    assert model.ledger == tf_dpbn.Ledger([poisson_record(8)])
    model.train_step(batch_like(plan.poisson_dataset(X, Y)))
    assert model.ledger == tf_dpbn.Ledger([poisson_record(8), assumed_record(1)])


@pytest.mark.parametrize("shared", [False, True])
def test_a_graph_from_before_compile_does_not_run_with_its_noise(shared):
    plan = make_plan(noise_multiplier=0.5)
    model = make_model(plan, model=SharedGraph() if shared else None)
    kept = model.optimizer, model.metrics  # else TensorFlow may find their variables deleted
    batch = batch_like(plan.poisson_dataset(X, Y))
    graph = tf.function(model.train_step)
    graph(batch)
    helpers.compiled(model, "mse", tf_dpbn.DPOptimizer.from_plan(make_plan(), "sgd", 1.0))
    with pytest.raises(tf.errors.InvalidArgumentError, match="traced before the last `compile`"):
        graph(batch)
    assert model.ledger == tf_dpbn.Ledger([assumed_record(1, 0.5)])
    assert kept


def test_a_grant_that_an_interrupt_left_behind_ends_with_the_next_fit():
    plan = make_plan()
    model = make_model(plan)
    model._books._granted.assign(1)
    model.fit(plan.poisson_dataset(X, Y), epochs=2, verbose=0, callbacks=[TrainsBeside()])
    assert model.ledger == tf_dpbn.Ledger([poisson_record(8), assumed_record(9)])


def test_steps_while_the_ledger_is_read_are_booked(monkeypatch):
    """Another thread's steps, between the reads of the counters."""
    model = make_model()
    model.train_on_batch(X[:4], Y[:4])
    read = _books.count_of

    def read_and_step(variable):
        value = read(variable)
        variable.assign_add(1)
        return value

    monkeypatch.setattr(_books, "count_of", read_and_step)
    model._books.take_over(_books.Books())
    monkeypatch.undo()
    assert model.ledger.steps == 2


def test_functions_that_tensorflow_runs_eagerly_are_refused():
    model = make_model()
    tf.config.run_functions_eagerly(True)
    try:
        with pytest.raises(RuntimeError, match=r"run_functions_eagerly\(False\)"):
            model.train_on_batch(X[:4], Y[:4])
    finally:
        tf.config.run_functions_eagerly(False)
    assert model.ledger.steps == 0


@pytest.mark.parametrize("options", [{"steps_per_execution": 3}, {"run_eagerly": True}], ids=str)
def test_every_step_counts_however_keras_runs_them(options):
    plan = make_plan()
    model = make_model(plan, **options)
    model.fit(plan.poisson_dataset(X, Y), epochs=2, verbose=0)
    assert model.ledger == tf_dpbn.Ledger([poisson_record(8)])
    assert int(model.optimizer.iterations) == 8


def test_prefetching_leaves_the_sampling_known():
    plan = make_plan()
    model = make_model(plan)
    model.fit(plan.poisson_dataset(X, Y).prefetch(2).with_options(tf.data.Options()), verbose=0)
    assert model.ledger == tf_dpbn.Ledger([poisson_record(4)])


@pytest.mark.parametrize(
    "derive",
    [
        lambda d: d.map(lambda x, y, weight: (2 * x, y, weight)),
        lambda d: d.cache().take(4),
        lambda d: d.shuffle(4).repeat(1),
    ],
)
def test_a_data_set_derived_from_a_poisson_one_trains_with_the_warning(derive):
    plan = make_plan()
    model = make_model(plan)
    with pytest.warns(tf_dpbn.PrivacyWarning, match="were changed .* assumes Poisson sampling"):
        model.fit(derive(plan.poisson_dataset(X, Y)), verbose=0)
    record = dataclasses.replace(poisson_record(4), sampling="assumed")  # truncation is charged
    assert model.ledger == tf_dpbn.Ledger([record])
    model.train_on_batch(X[:4], Y[:4])
    assert model.ledger == tf_dpbn.Ledger([record, assumed_record(1)])


def test_batches_of_other_sizes_made_of_poisson_ones_are_checked_as_any_others():
    plan = make_plan()
    data = plan.poisson_dataset(X, Y).unbatch().batch(5, drop_remainder=True)
    with (
        pytest.warns(tf_dpbn.PrivacyWarning, match="do not come from"),
        pytest.raises(ValueError, match="equal the size of the batches, 5"),
    ):
        make_model(plan).fit(data, verbose=0)


@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
@pytest.mark.parametrize("options", [{}, {"jit_compile": True}], ids=str)
def test_a_batch_beyond_the_end_of_the_data_is_no_step(options):
    def batches():
        for start in range(0, 16, 4):
            yield X[start : start + 4], Y[start : start + 4]

    specs = tf.TensorSpec((4, 3)), tf.TensorSpec((4, 2))
    model = make_model(**options)
    with pytest.warns(tf_dpbn.PrivacyWarning, match="assumes Poisson sampling"):
        model.fit(tf.data.Dataset.from_generator(batches, output_signature=specs), epochs=2, verbose=0)
        model.fit(batches(), verbose=0)
    assert model.ledger.steps == int(model.optimizer.iterations) == 12


def test_an_exception_in_a_callback_loses_no_steps():
    plan = make_plan()
    model = make_model(plan)
    with pytest.raises(KeyboardInterrupt):
        model.fit(plan.poisson_dataset(X, Y), verbose=0, callbacks=[Interruption()])
    assert model.ledger == tf_dpbn.Ledger([poisson_record(3)])
    model.train_on_batch(X[:4], Y[:4])
    assert model.ledger == tf_dpbn.Ledger([poisson_record(3), assumed_record(1)])


def test_a_step_that_changed_the_weights_is_booked_though_its_metric_raises():
    def failing(y_true, y_pred):
        import tensorflow as tf

        with tf.control_dependencies([tf.debugging.assert_less(tf.reduce_max(tf.abs(y_true)), -1.0)]):
            return tf.reduce_mean(y_pred, -1)

    plan = make_plan()
    model = make_model(plan, metrics=[failing])
    before = model.get_weights()
    with pytest.raises(Exception, match="assert"):
        model.fit(plan.poisson_dataset(X, Y), verbose=0)
    changed = any(np.any(a != b) for a, b in zip(before, model.get_weights(), strict=True))
    assert model.ledger.steps == 1 or not changed


def test_another_noise_multiplier_is_another_record():
    model = make_model(plan := make_plan())
    model.fit(plan.poisson_dataset(X, Y), verbose=0)
    other = make_plan(noise_multiplier=3.0)
    helpers.compiled(model, "mse", tf_dpbn.DPOptimizer.from_plan(other, "sgd", 1.0))
    assert model.ledger == tf_dpbn.Ledger([poisson_record(4)])
    with pytest.warns(
        tf_dpbn.PrivacyWarning, match="take 4 steps after 4 so far and reach"
    ):  # the plan is for all of it
        model.fit(other.poisson_dataset(X, Y), verbose=0)
    assert model.ledger == tf_dpbn.Ledger([poisson_record(4), poisson_record(4, 3.0)])


@pytest.mark.parametrize(
    "argument", ["l2_norm_clip", "noise_multiplier", "expected_batch_size", "num_examples", "delta"]
)
def test_privacy_arguments_of_an_optimizer_are_read_only(argument):
    optimizer = helpers.dp_optimizer()
    with pytest.raises(AttributeError):
        setattr(optimizer, argument, 0.5)


def test_an_optimizer_that_compile_did_not_get_is_refused():
    model = make_model(plan := make_plan())
    quiet = make_plan(noise_multiplier=0.01)
    model.optimizer = tf_dpbn.DPOptimizer.from_plan(quiet, "sgd", 1.0)
    with pytest.raises(RuntimeError, match=r"Call compile\("):
        model.fit(plan.poisson_dataset(X, Y), verbose=0)
    with pytest.raises(RuntimeError, match=r"Call compile\("):
        model.train_on_batch(X[:4], Y[:4])
    assert model.ledger.steps == 0


def test_no_noise_is_no_privacy():
    optimizer = helpers.dp_optimizer(expected_batch_size=4, num_examples=16)
    model = make_model(optimizer=optimizer)
    assert model.epsilon(DELTA) == 0.0
    model.train_on_batch(X[:4], Y[:4])
    assert model.epsilon(DELTA) == math.inf
    assert "infinite" in model.privacy_statement(DELTA)


def test_without_the_number_of_examples_there_is_no_epsilon_and_the_error_says_what_to_do():
    model = make_model(optimizer=helpers.dp_optimizer(noise_multiplier=2.0, expected_batch_size=4))
    model.train_on_batch(X[:4], Y[:4])
    with pytest.raises(ValueError, match=r"Pass `num_examples` to the optimizer.*sampling_probability=None"):
        model.epsilon(DELTA)
    filled = model.ledger.with_sampling_probability(0.25)
    assert filled.epsilon(DELTA) == accounting.Ledger([assumed_record(1)]).epsilon(DELTA)


def test_delta_must_leave_room(trained):
    with pytest.raises(ValueError, match="delta=1.5"):
        trained.epsilon(1.5)
