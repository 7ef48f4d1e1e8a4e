"""Tests of what tf_dpbn.accounting plans and says: calibration, plans, statements, parity."""

import dataclasses
import math
import sys

import dp_accounting
import pytest

from tf_dpbn import accounting
from tf_dpbn.accounting import events


def record(q=0.01, sigmas=(1.0,), steps=1000, **kwargs):
    return accounting.StepRecord(sampling_probability=q, noise_multipliers=sigmas, steps=steps, **kwargs)


def plan(**kwargs):
    given = {"delta": 1e-5, "num_examples": 60_000, "expected_batch_size": 600, "epochs": 10}
    if "target_epsilon" not in kwargs:
        given["noise_multiplier"] = 1.1
    if "steps" in kwargs:
        del given["epochs"]
    return accounting.PrivacyPlan(**{**given, **kwargs})


@pytest.mark.parametrize(
    "target, q, steps, accountant",
    [
        (3.0, 0.01, 1000, "rdp"),
        (0.01, 0.01, 1000, "rdp"),
        (1e4, 0.5, 1000, "rdp"),  # epsilon is infinite nearby
        (0.5, 0.2, 30, "pld"),
    ],
)
def test_calibration_meets_the_target_with_the_least_noise(accountant, target, q, steps):
    sigma = accounting.calibrate_noise_multiplier(
        target_epsilon=target, delta=1e-5, sampling_probability=q, steps=steps, accountant=accountant
    )

    def epsilon(noise_multiplier):
        return accounting.Ledger([record(q, (noise_multiplier,), steps)]).epsilon(1e-5, accountant)

    assert type(sigma) is float
    assert epsilon(sigma) <= target < epsilon(sigma * (1 - 1e-4))


@pytest.mark.parametrize(
    "change",
    [{"target_epsilon": 0.0}, {"delta": 1.0}, {"sampling_probability": 0.0}, {"steps": 0}, {"accountant": "gdp"}],
)
def test_calibration_refuses(change):
    given = {"target_epsilon": 3.0, "delta": 1e-5, "sampling_probability": 0.01, "steps": 1000}
    with pytest.raises(ValueError, match=f"{next(iter(change))}="):
        accounting.calibrate_noise_multiplier(**{**given, **change})


@pytest.mark.parametrize("accountant, sigma", [("rdp", 1.2), ("pld", 10.0)])
def test_max_steps_is_the_last_step_within_the_target(accountant, sigma):
    ledger = accounting.Ledger([record(0.02, (2 * sigma,), 50)])
    config = record(0.01, (sigma,), 999, num_examples=10_000, max_batch_size=176, sampling="poisson")
    n = accounting.max_steps(ledger, next_record_config=config, target_epsilon=1.0, delta=1e-5, accountant=accountant)

    def epsilon(steps):
        return accounting.Ledger([*ledger.entries, dataclasses.replace(config, steps=steps)]).epsilon(1e-5, accountant)

    assert n > 10 and epsilon(n) <= 1.0 < epsilon(n + 1)
    assert ledger.steps == 50


def test_max_steps_edges():
    spent = accounting.Ledger([record(steps=1000)])
    given = {"next_record_config": record(), "delta": 1e-5}
    budget = spent.epsilon(1e-5)
    assert accounting.max_steps(spent, target_epsilon=budget, **given) == 0
    fresh = accounting.Ledger()
    assert accounting.max_steps(fresh, target_epsilon=budget, **given) == 1000
    for limit in (1, 3, 999, 1000, 1001):
        found = accounting.max_steps(fresh, target_epsilon=budget, limit=limit, **given)
        assert found == min(limit, 1000)
    silent = dict(given, next_record_config=record(sigmas=(0.0,)))
    assert accounting.max_steps(fresh, target_epsilon=budget, **silent) == 0
    with pytest.raises(ValueError, match="target_epsilon=0"):
        accounting.max_steps(fresh, target_epsilon=0, **given)


@pytest.mark.parametrize("rows, accountant", [(None, "rdp"), (744, "rdp"), (744, "pld")])
def test_plan_calibrates_to_the_target_with_truncation_included(accountant, rows):
    target = {"rdp": 3.0, "pld": 0.5}[accountant]  # PLD takes seconds at little noise
    made = plan(target_epsilon=target, accountant=accountant, max_batch_size=rows)
    assert target - 1e-3 < made.epsilon <= target
    ledger = accounting.Ledger([made.record()])
    assert ledger.epsilon(1e-5, accountant) == made.epsilon
    share = ledger.truncation_delta() / 1e-5
    assert 0.01 < share < 1.0 if rows else 0.0 < share <= 0.01
    assert (made.steps, made.steps_per_epoch, made.sampling_probability) == (1000, 100, 0.01)
    assert made.max_batch_size == (rows or 768)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.noise_multiplier = 0.1


@pytest.mark.parametrize(
    "epochs, batch, steps",
    [(10, 600, 1000), (1, 256, 235), (0.5, 256, 118), (0.001, 600, 1), (1.1, 6000, 11)],
)
def test_plan_rounds_steps_up(epochs, batch, steps):
    assert plan(epochs=epochs, expected_batch_size=batch).steps == steps


def test_plan_with_given_noise_and_steps():
    made = plan(noise_multiplier=2, steps=30)
    assert (made.noise_multiplier, made.steps, made.target_epsilon) == (2.0, 30, None)
    rows = made.max_batch_size
    assert made.record() == record(0.01, (2.0,), 30, num_examples=60_000, max_batch_size=rows, sampling="poisson")
    assert made.record(4).steps == 4
    assert plan(noise_multiplier=0).epsilon == math.inf
    with pytest.raises(ValueError, match="steps=-1"):
        made.record(-1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"target_epsilon": 3.0, "noise_multiplier": 1.0}, "exactly one of `target_epsilon`"),
        ({"steps": 3, "epochs": 1}, "exactly one of `epochs`"),
        ({"target_epsilon": 0.0}, "target_epsilon=0.0"),
        ({"expected_batch_size": 60_001}, "expected_batch_size=60001"),
        ({"steps": 0}, "steps=0"),
        ({"max_batch_size": 599}, "max_batch_size=599"),
        ({"max_batch_size": 600}, "all of delta.*max_batch_size=600"),
    ],
)
def test_plan_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        plan(**change)


def test_plan_warns_of_a_delta_of_one_over_n_or_more_alone():
    with pytest.warns(accounting.PrivacyWarning, match="delta=0.01 is not below") as caught:
        accounting.PrivacyPlan(delta=0.01, num_examples=100, expected_batch_size=10, steps=1, noise_multiplier=1.0)
    assert caught[0].filename == __file__
    plan(delta=1.6e-5)  # warnings are errors here


def test_replace_finds_anew_what_was_filled_in_and_keeps_what_was_given():
    made = plan(target_epsilon=3.0)
    assert dataclasses.replace(made) == made
    assert dataclasses.replace(made, target_epsilon=1.0) == plan(target_epsilon=1.0)
    shorter = dataclasses.replace(made, epochs=3)
    assert shorter == plan(target_epsilon=3.0, epochs=3) and dataclasses.replace(shorter, epochs=10) == made
    rows = dataclasses.replace(made, expected_batch_size=300)
    assert rows == plan(target_epsilon=3.0, expected_batch_size=300) and rows.max_batch_size < made.max_batch_size
    fixed = dataclasses.replace(made, target_epsilon=None, epochs=None)
    assert (fixed.noise_multiplier, fixed.steps) == (made.noise_multiplier, made.steps)
    with pytest.raises(ValueError, match="exactly one of `target_epsilon`"):
        dataclasses.replace(made, noise_multiplier=2.0)
    given = dict(noise_multiplier=2.0, steps=30, max_batch_size=1000)
    assert dataclasses.replace(plan(**given), delta=1e-6) == plan(**given, delta=1e-6)


PHASES = [{"expected_batch_size": 600, "epochs": 2}, {"expected_batch_size": 1200, "steps": 300}]
SHARED = {"delta": 1e-5, "num_examples": 60_000}


@pytest.mark.parametrize("accountant, target", [("rdp", 3.0), ("pld", 0.5)])
def test_phases_have_one_noise_multiplier_and_the_epsilon_of_both_events(accountant, target):
    head, whole = accounting.PrivacyPlan.phases(PHASES, target_epsilon=target, accountant=accountant, **SHARED)
    assert head.noise_multiplier == whole.noise_multiplier and (head.steps, whole.steps) == (200, 300)
    assert head.epsilon < 0.9 * whole.epsilon and target - 1e-3 < whole.epsilon <= target
    assert whole.ledger() == accounting.Ledger([head.record(), whole.record()])
    delta = 1e-5 - math.fsum(
        each.steps
        * accounting.truncation_probability(
            num_examples=60_000, sampling_probability=q, max_batch_size=each.max_batch_size
        )
        for each, q in ((head, 0.01), (whole, 0.02))
    )
    orders = events._ORDERS[events._ORDERS <= 256].tolist()
    accountants = {"rdp": dp_accounting.rdp.RdpAccountant(orders), "pld": dp_accounting.pld.PLDAccountant()}
    for q, steps in ((0.01, 200), (0.02, 300)):
        gaussian = dp_accounting.GaussianDpEvent(whole.noise_multiplier)
        accountants[accountant].compose(dp_accounting.PoissonSampledDpEvent(q, gaussian), steps)
    assert whole.epsilon == pytest.approx(accountants[accountant].get_epsilon(delta), rel=1e-6)
    less = [dataclasses.replace(each, noise_multiplier=(1 - 1e-4) * each.noise_multiplier) for each in (head, whole)]
    assert dataclasses.replace(less[1], before=(less[0].record(),)).epsilon > target


def test_a_plan_counts_what_comes_before_it():
    head = accounting.PrivacyPlan(target_epsilon=1.0, **PHASES[0], **SHARED)
    rest = accounting.PrivacyPlan(target_epsilon=3.0, **PHASES[1], **SHARED, before=(head.record(),))
    alone = accounting.PrivacyPlan(target_epsilon=3.0, **PHASES[1], **SHARED)
    assert 3.0 - 1e-3 < rest.epsilon <= 3.0 and alone.noise_multiplier < rest.noise_multiplier < head.noise_multiplier
    assert rest.epsilon == accounting.Ledger([head.record(), rest.record()]).epsilon(1e-5)
    with pytest.raises(ValueError, match="be attainable.*target_epsilon=0.9"):
        accounting.PrivacyPlan(target_epsilon=0.9, **PHASES[1], **SHARED, before=(head.record(),))
    with pytest.raises(ValueError, match="phases=\\[\\]"):
        accounting.PrivacyPlan.phases([], target_epsilon=3.0, **SHARED)


def test_statement_says_what_ran():
    assumed = record(0.01, (1.0, 2.0), 900, num_examples=60_000, max_batch_size=744)
    ledger = accounting.Ledger([assumed, record(0.02, (1.5,), 100, sampling="poisson")])
    text = accounting.privacy_statement(ledger, delta=1e-5, covered=["the fudge"], not_covered=["the trudge"])
    text = " ".join(text.split())
    shown = float(text.split("epsilon = ")[1].split()[0])
    assert 0 <= shown - ledger.epsilon(1e-5) <= 1.001e-4
    for part in (
        "at delta = 1e-05, after 1000 steps, by RDP accounting",
        "adding or removing one example",
        "900 steps: sampling probability 0.01, noise multipliers (1, 2), together 0.894427; 60000 examples, 600 "
        "expected in a batch, at most 744.",
        "ASSUMED",
        "PROVIDED",
        "Shuffled or fixed-order batches do not satisfy the assumption",
        "100 steps: sampling probability 0.02, noise multiplier 1.5. Poisson sampling by this library",
        "one row of the data given to poisson_dataset",
        "Treated as public, and not protected: the number of examples and the expected batch size; the initial "
        "weights; the public batch",
        "preprocessing fitted on private data",
        "loss and metrics logged in training",
        "floating-point effects",
        f"Of delta, {ledger.truncation_delta():.3g} pays",
    ):
        assert part in text, part
    covered, not_covered = text.split("NOT covered:")
    assert "the fudge" in covered and "the trudge" in not_covered
    assert "loss and metrics" not in covered


def test_statements_of_poisson_sampling_and_of_no_guarantee():
    def said(*entries, **options):
        return accounting.privacy_statement(accounting.Ledger(entries), delta=1e-5, **options)

    poisson = said(plan().record(), accountant="pld")
    assert "ASSUMED" not in poisson and "PROVIDED" not in poisson and "PLD" in poisson
    assert "No training step" in said()
    for entry, reason in (
        (record(sigmas=(0.0,)), "no noise"),
        (record(0.5, num_examples=10, max_batch_size=5), "all of delta"),
    ):
        assert "NO PRIVACY GUARANTEE" in said(entry) and reason in said(entry)


# Parity with tensorflow-privacy 0.9.0.

TUTORIAL = dict(number_of_examples=60_000, batch_size=256, num_epochs=15, noise_multiplier=1.3, delta=1e-5)


@pytest.mark.parametrize("microbatching, once, poisson", [(True, 44.798, 5.160), (False, 17.648, 0.955)])
def test_tensorflow_privacy_numbers(microbatching, once, poisson):
    found = accounting.tensorflow_privacy_epsilons(**TUTORIAL, used_microbatching=microbatching)
    assert found.each_example_once_per_epoch == pytest.approx(once, abs=6e-4)
    # dp_accounting 0.6.0 bounds fractional orders more loosely, by 1e-3 here.
    assert found.poisson == pytest.approx(poisson, abs=2e-3)


@pytest.mark.tensorflow_privacy
@pytest.mark.parametrize("microbatching", [True, False])
@pytest.mark.parametrize("change", [{}, {"num_epochs": 2.5, "noise_multiplier": 0.9, "batch_size": 999}])
def test_tensorflow_privacy_itself_prints_the_same(monkeypatch, microbatching, change):
    monkeypatch.setattr(sys, "skip_tf_privacy_import", True, raising=False)
    library = pytest.importorskip(
        "tensorflow_privacy.privacy.analysis.compute_dp_sgd_privacy_lib", exc_type=ImportError
    )
    given = {**TUTORIAL, **change, "used_microbatching": microbatching}
    text = library.compute_dp_sgd_privacy_statement(**given)
    lines = [line for line in text.splitlines() if line.strip().startswith("Epsilon ")]
    printed = [float(line.split()[-1]) for line in lines[:2]]
    assert printed == [round(e, 3) for e in accounting.tensorflow_privacy_epsilons(**given)]


@pytest.mark.parametrize("change", [{"batch_size": 60_001}, {"num_epochs": 0}, {"delta": 0.0}])
def test_tensorflow_privacy_numbers_refuse(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        accounting.tensorflow_privacy_epsilons(**{**TUTORIAL, **change})
    assert accounting.tensorflow_privacy_epsilons(**{**TUTORIAL, "noise_multiplier": 0.0}) == (math.inf, math.inf)
