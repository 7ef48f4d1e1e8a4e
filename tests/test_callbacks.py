"""Callbacks: epsilon in the logs, and training that stops at the last step that the budget allows."""

import csv
import functools
import math
import sys

import pytest
import tensorflow as tf

import tf_dpbn
from tests import helpers
from tf_dpbn import accounting
from tf_dpbn._keras import IS_KERAS_3, keras
from tf_dpbn.callbacks import PrivacyBudget, PrivacyLogger, plot_history
from tf_dpbn.model import progress

pytestmark = pytest.mark.both

layers = keras.layers
DELTA = 1e-3
X, _ = helpers.images(16, (3,))
Y = X[:, :2]
PLAN = tf_dpbn.PrivacyPlan(noise_multiplier=2.0, delta=DELTA, num_examples=16, expected_batch_size=4, epochs=4)


def epsilon_of(steps):
    return accounting.Ledger([PLAN.record(steps)]).epsilon(DELTA)


def budget_for(steps):
    """An epsilon that allows `steps` steps and not one more."""
    return (epsilon_of(steps) + epsilon_of(steps + 1)) / 2


def make_model(optimizer=None, **kwargs):
    inputs = keras.Input((3,))
    model = tf_dpbn.DPModel(inputs, layers.Dense(2)(inputs))
    optimizer = optimizer or tf_dpbn.DPOptimizer.from_plan(PLAN, keras.optimizers.SGD(0.01), 1.0)
    return helpers.compiled(model, "mse", optimizer, stub=True, **kwargs)


_shared = functools.cache(make_model)


@pytest.fixture
def model():
    """One for all tests, with nothing in its ledger."""
    return helpers.forget(_shared())


def fit(model, *callbacks, epochs=1, **kwargs):
    return model.fit(PLAN.poisson_dataset(X, Y), epochs=epochs, callbacks=list(callbacks), **{"verbose": 0, **kwargs})


def scalars(directory, tag):
    """What TensorBoard's files say of a tag, by step; summaries of both Kerases are tensors of rank 0."""
    files = map(str, directory.glob("*.tfevents*"))
    events = [event for file in files for event in tf.compat.v1.train.summary_iterator(file)]
    return {e.step: float(tf.make_ndarray(v.tensor)) for e in events for v in e.summary.value if v.tag == tag}


# ---------------------------------------------------------------------- what `fit` tells


@pytest.mark.parametrize("logger", [None, PrivacyLogger()])
def test_epsilon_reaches_everything_that_reads_the_logs(logger, model, tmp_path, capsys):
    seen = []
    reader = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(logs["epsilon"]))
    readers = [reader, keras.callbacks.CSVLogger(tmp_path / "log.csv"), keras.callbacks.TensorBoard(tmp_path / "board")]
    history = fit(model, *readers, *([logger] if logger else []), epochs=2, verbose=2).history
    expected = [epsilon_of(4), epsilon_of(8)]
    assert seen == history["epsilon"] == expected
    told = [("epsilon", expected)]
    told += [("planned_epsilon", [PLAN.epsilon] * 2)] if logger is None else []
    assert {*history} & {"epsilon", "planned_epsilon"} == {name for name, _ in told}
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for name, values in told:
        assert [float(row[name]) for row in rows] == pytest.approx(values)
        assert scalars(tmp_path / "board" / "train", f"epoch_{name}") == pytest.approx(dict(enumerate(values)))
    planned = "" if logger else f" - planned_epsilon: {PLAN.epsilon:.4f}"
    out = capsys.readouterr().out
    assert f"epsilon: {expected[0]:.4f}{planned}" in out and (logger is None or "planned_epsilon" not in out)
    assert fit(model).history["epsilon"] == [epsilon_of(12)]  # what ran before counts


def test_a_line_at_the_end_tells_epsilon_of_the_planned_one(model, capsys):
    shown = accounting.statement.shown_epsilon
    fit(model, epochs=2, verbose=2)
    of_plan = f"of {shown(PLAN.epsilon)} planned, at delta 0.001, after 8 private steps."
    assert capsys.readouterr().out.splitlines()[-1] == f"Epsilon {shown(epsilon_of(8))} {of_plan}"
    with pytest.warns(tf_dpbn.PrivacyWarning, match="assumes Poisson sampling"):
        model.fit(X, Y, batch_size=4, verbose=2)
    steps = "after 12 private steps, of Poisson samples as is assumed."
    last = f"Epsilon {shown(model.epsilon(DELTA))}, at delta 0.001, {steps}"
    assert capsys.readouterr().out.splitlines()[-1] == last
    fit(model)
    assert capsys.readouterr().out == ""


def test_no_epsilon_is_told_that_is_not_known_or_takes_long(capsys):
    unknown = make_model(helpers.dp_optimizer(expected_batch_size=4, noise_multiplier=2.0, delta=DELTA))
    with pytest.warns(tf_dpbn.PrivacyWarning, match="assumes Poisson sampling"):
        assert "epsilon" not in unknown.fit(X, Y, batch_size=4, verbose=2).history
    assert "psilon" not in capsys.readouterr().out
    fields = {"delta": DELTA, "num_examples": 16, "expected_batch_size": 4, "epochs": 1}
    plan = tf_dpbn.PrivacyPlan(noise_multiplier=2.0, accountant="pld", **fields)
    model = make_model(tf_dpbn.DPOptimizer.from_plan(plan, keras.optimizers.SGD(0.01), 1.0))
    assert "epsilon" not in model.fit(plan.poisson_dataset(X, Y), verbose=2).history
    assert f"Epsilon {accounting.statement.shown_epsilon(plan.epsilon)} of" in capsys.readouterr().out


def test_a_first_step_that_takes_long_is_told_of_before_it(capsys, monkeypatch):
    def told(**kwargs):
        fit(model, **kwargs)
        return [line for line in capsys.readouterr().out.splitlines() if "Tracing" in line]

    model = make_model()
    assert told(verbose=2) == []  # it takes no seconds
    helpers.compiled(model, "mse", tf_dpbn.DPOptimizer.from_plan(PLAN, keras.optimizers.SGD(0.01), 1.0), stub=True)
    monkeypatch.setattr(progress, "_SECONDS_PER_VARIABLE", 9.0)
    assert told(verbose=2) == ["Tracing the private step of 1 layers: the first step takes about 20 s."]
    assert told(verbose=2) == []
    model.compile(tf_dpbn.DPOptimizer.from_plan(PLAN, keras.optimizers.SGD(0.01), 1.0), "mse")
    assert told(verbose=0) == []
    setattr(model, "jit_compile" if IS_KERAS_3 else "_jit_compile", True)
    model.make_train_function(force=True)
    assert progress.first_step_message(model).endswith("about 20 s, and XLA's compilation follows.")


# ---------------------------------------------------------------------- plot_history


def curves(figure):
    """Of each panel the curves' names and points, and the labels of the axes."""
    found = []
    for axes in figure.axes:
        lines = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}
        found.append((lines, axes.get_xlabel(), axes.get_ylabel()))
    return found


def test_a_plot_shows_a_metric_and_epsilon_over_the_epochs(model, tmp_path):
    log = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    history = fit(model, log, epochs=3, initial_epoch=1, validation_data=(X, Y), verbose=0)
    left, right = curves(plot_history(history, tmp_path / "run.png"))
    losses = history.history
    expected = {name: list(zip((2, 3), losses[name], strict=True)) for name in ("loss", "val_loss")}
    assert left == (expected, "epoch", "loss")
    expected = {"spent": [(2, epsilon_of(4)), (3, epsilon_of(8))], "planned": [(2, PLAN.epsilon), (3, PLAN.epsilon)]}
    assert right == (expected, "epoch", "epsilon")
    assert curves(plot_history(history, delta=DELTA))[1][2] == "epsilon at delta = 0.001"
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    (values, *_), _ = curves(plot_history(tmp_path / "log.csv"))
    assert [epoch for epoch, _ in values["loss"]] == [2, 3]
    assert [value for _, value in values["val_loss"]] == pytest.approx(losses["val_loss"])
    logs = {"loss": [2.0], "my_accuracy": [0.5], "epsilon": [float("inf")]}
    (left, _, label), (right, *_) = curves(plot_history(logs))
    assert left == {"my_accuracy": [(1, 0.5)]} and label == "my_accuracy" and math.isnan(right["spent"][0][1])
    assert curves(plot_history(logs, metric="loss"))[0][0] == {"loss": [(1, 2.0)]}


def test_what_cannot_be_plotted_is_named(monkeypatch):
    with pytest.raises(ValueError, match=r"have 'epsilon'.*PrivacyLogger.*Received: history=\['loss'\]"):
        plot_history({"loss": [1.0]})
    with pytest.raises(ValueError, match=r"have 'auc'\. Received"):
        plot_history({"loss": [1.0], "epsilon": [1.0]}, metric="auc")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'tf_dpbn\[plot\]'"):
        plot_history({"loss": [1.0], "epsilon": [1.0]})


# ---------------------------------------------------------------------- PrivacyLogger


def test_delta_is_the_optimizers_or_given():
    model = make_model(helpers.dp_optimizer(noise_multiplier=2.0, expected_batch_size=4, num_examples=16))
    for callback in (PrivacyLogger(), PrivacyBudget(budget_for(3))):
        with pytest.raises(ValueError, match=r"delta.*PrivacyPlan.*Received: delta=None"):
            fit(model, callback)
    assert fit(model, PrivacyLogger(0.01, "pld")).history["epsilon"] == [model.epsilon(0.01, "pld")]
    assert model.epsilon(0.01, "pld") < model.epsilon(0.01)


@pytest.mark.parametrize("callback", [PrivacyLogger(DELTA), PrivacyBudget(1.0, DELTA)])
def test_stock_models_are_refused(callback):
    inputs = keras.Input((3,))
    model = keras.Model(inputs, layers.Dense(2)(inputs))
    model.compile("sgd", "mse")
    with pytest.raises(TypeError, match=r"DPModel.*Received: model='?(Functional|Model)"):
        model.fit(X, Y, verbose=0, callbacks=[callback])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PrivacyLogger(0.0), "delta=0.0"),
        (lambda: PrivacyBudget(-1.0), "epsilon=-1.0"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------------- PrivacyBudget


def test_training_stops_at_the_last_step_that_fits_over_several_fits(model):
    budget = PrivacyBudget(budget_for(7))
    fit(model, budget)
    assert model.ledger.steps == 4
    fit(model, budget, epochs=5)
    assert model.ledger.steps == 7
    assert model.epsilon(DELTA) <= budget_for(7) < epsilon_of(8)
    with pytest.raises(ValueError, match=r"after 7 steps, which have cost .*Stop here.*Received: epsilon="):
        fit(model, budget)
    fit(model, PrivacyBudget(budget_for(8)), epochs=5)
    assert model.ledger.steps == 8


@pytest.mark.parametrize(
    "epochs,allowed,verbose,told",
    [
        (4, 6, 1, "in epoch 2 of 4, after 6 private steps"),
        (2, 8, 1, None),
        (4, 6, 0, None),
    ],
)
def test_a_stop_before_the_end_is_told_in_one_line(model, epochs, allowed, verbose, told, capsys):
    budget = budget_for(allowed)
    fit(model, PrivacyBudget(budget), epochs=epochs, verbose=verbose)
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if "PrivacyBudget" in line]
    assert len(lines) == (told is not None)
    assert ("Epsilon" in printed) == (bool(verbose) and told is None)  # once
    if told is not None:
        assert told in lines[0]
        assert f"epsilon {epsilon_of(allowed):.4g} of {budget:g} at delta 0.001" in lines[0]


def test_a_fit_beyond_the_plan_of_its_data_is_warned_of_before_its_first_step(model):
    message = (
        rf"20 steps after 0 so far and reach epsilon {epsilon_of(20):.4g} at delta 0.001; "
        rf"the plan of its data set is for 16 steps and epsilon {PLAN.epsilon:.4g}"
    )
    with pytest.warns(tf_dpbn.PrivacyWarning, match=message), pytest.raises(ZeroDivisionError):
        fit(model, keras.callbacks.LambdaCallback(on_train_begin=lambda logs: 1 / 0), epochs=5)
    assert model.ledger.steps == 0
    fit(model, epochs=3)  # within the plan, as what follows
    fit(model, initial_epoch=3, epochs=4)
    with pytest.warns(tf_dpbn.PrivacyWarning, match=f"2 steps after 16 so far and reach epsilon {epsilon_of(18):.4g}"):
        fit(model, steps_per_epoch=2)


def test_phases_are_warned_of_where_they_go_beyond_what_all_may_cost():
    fields = [{"expected_batch_size": 4, "epochs": 1}, {"expected_batch_size": 8, "epochs": 2}]
    shared = {"delta": 1e-3, "num_examples": 16}
    head, whole = tf_dpbn.PrivacyPlan.phases(fields, target_epsilon=3.0, **shared)
    model = make_model()
    for plan, epochs in ((head, 1), (whole, 2)):
        optimizer = tf_dpbn.DPOptimizer.from_plan(plan, keras.optimizers.SGD(0.01), 1.0)
        helpers.compiled(model, "mse", optimizer, stub=True)
        model.fit(plan.poisson_dataset(X, Y), epochs=epochs, verbose=0)  # warnings are errors
    assert model.ledger == whole.ledger() and 2.99 < model.epsilon(1e-3) == whole.epsilon <= 3.0
    with pytest.warns(tf_dpbn.PrivacyWarning, match="2 steps after 8 so far .* is for 8 steps and epsilon"):
        model.fit(whole.poisson_dataset(X, Y), verbose=0)


def test_an_optimizer_of_another_plan_than_the_data_is_named(model):
    optimizer = helpers.dp_optimizer(noise_multiplier=0.5 * PLAN.noise_multiplier, expected_batch_size=4)
    with pytest.warns(tf_dpbn.PrivacyWarning, match="The optimizer's noise multiplier is .* build both from one plan"):
        fit(make_model(optimizer))


def test_a_stride_of_several_steps_never_exceeds_the_budget():
    model = make_model(steps_per_execution=3)
    with pytest.raises(ValueError, match="leave room for another step after 0 steps"):
        fit(model, PrivacyBudget(budget_for(2)))
    assert model.ledger.steps == 0
    for allowed in (5, 6, 8):
        fit(helpers.forget(model), PrivacyBudget(budget_for(allowed)), epochs=6)
        assert allowed - 3 < model.ledger.steps <= allowed
        assert model.epsilon(DELTA) <= budget_for(allowed)


def test_a_budget_for_no_step_is_refused(model):
    no_noise = make_model(helpers.dp_optimizer(expected_batch_size=4, num_examples=16))
    for each, epsilon, message in [
        (model, epsilon_of(1) * 0.9, "after 0 steps.*noise multiplier 2"),
        (no_noise, 1000.0, "noise multiplier 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit(each, PrivacyBudget(epsilon, DELTA))
        assert each.ledger.steps == 0


@pytest.mark.parametrize("when", ["on_train_begin", "on_train_batch_end"])
def test_a_checkpoint_loaded_by_a_later_callback_counts(when, model, tmp_path):
    path = str(tmp_path / "earlier.weights.h5")
    fit(model)
    model.save_weights(path)
    helpers.forget(model)
    loads = iter([lambda: model.load_weights(path)])
    loading = keras.callbacks.LambdaCallback(**{when: lambda *_, **__: next(loads, int)()})
    fit(model, PrivacyBudget(budget_for(7)), loading, epochs=4)
    assert model.ledger == tf_dpbn.Ledger([PLAN.record(7)])


@pytest.mark.skipif(IS_KERAS_3, reason="Keras 3 does not tune the number of steps")
def test_a_stride_that_keras_tunes_is_refused():
    model = make_model(steps_per_execution="auto")
    with pytest.raises(ValueError, match='steps_per_execution="auto"'):
        fit(model, PrivacyBudget(budget_for(7)))
