"""Audits: bounds against published and simulated figures, and attacks on right and on broken models."""

import math

import numpy as np
import pytest
from scipy import stats

import tf_dpbn
from tests import audited, helpers
from tf_dpbn import accounting, auditing
from tf_dpbn._keras import keras

layers = keras.layers
DELTA = audited.DELTA


# ---------------------------------------------------------------------- from guesses to bounds


def counts(**changes):
    given = {"true_positives": 5, "positives": 10, "false_positives": 1, "negatives": 10, "delta": DELTA}
    return {**given, **changes}


@pytest.mark.parametrize(
    "canaries, guesses, correct, delta, published",
    # The paper rounds the first (page 46) and cuts the second (page 28) after three digits.
    [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)],
)
def test_one_run_bound_is_the_papers(canaries, guesses, correct, delta, published):
    found = auditing.one_run_epsilon_lower_bound(canaries=canaries, guesses=guesses, correct=correct, delta=delta)
    assert found == pytest.approx(published, abs=1e-3)


def test_one_run_bound_is_seldom_above_the_truth():
    """Randomized response with epsilon 1: guesses are right with the rate that the bound is about."""
    rng, rate = np.random.default_rng(0), 1 / (1 + math.exp(-1.0))
    bounds = [
        auditing.one_run_epsilon_lower_bound(canaries=200, guesses=200, correct=correct, delta=0.0)
        for correct in rng.binomial(200, rate, 300)
    ]
    wrong = np.mean(np.array(bounds) > 1.0)
    assert 0.01 < wrong <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)  # and not far more cautious than it must be


def test_clopper_pearson_bound_by_hand():
    """100 of 100 and 0 of 100: the limits have a closed form."""
    limit = 0.025 ** (1 / 100)
    found = auditing.epsilon_lower_bound(**counts(positives=100, true_positives=100, negatives=100, false_positives=0))
    assert found == pytest.approx(math.log((limit - DELTA) / (1 - limit)), rel=1e-9)
    assert auditing.epsilon_lower_bound(**counts(true_positives=5, false_positives=5)) == 0.0


@pytest.mark.parametrize("mu", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-5])
def test_gaussian_epsilon_is_the_accountants(mu, delta):
    record = accounting.StepRecord(sampling_probability=1.0, noise_multipliers=(1 / mu,), steps=1)
    pld = accounting.Ledger([record]).epsilon(delta, "pld")
    assert auditing.gaussian_epsilon(mu, delta) == pytest.approx(pld, abs=2e-3)
    assert auditing.gaussian_epsilon(100.0, delta) == pytest.approx(5000.0 - 100.0 * stats.norm.ppf(delta), rel=0.01)


@pytest.mark.parametrize("gaussian", [False, True])
def test_two_world_bound_holds_and_has_teeth(gaussian):
    rng, mu, delta = np.random.default_rng(0), 2.0, 1e-2
    truth = auditing.gaussian_epsilon(mu, delta)
    bounds = [
        auditing.two_world_epsilon(*rng.normal([[0.0], [mu]], size=(2, 4000)), delta=delta, gaussian=gaussian)
        for _ in range(60)
    ]
    assert np.mean(np.array(bounds) > truth) <= 0.05
    assert np.median(bounds) > (0.85 if gaussian else 0.4) * truth


def test_the_best_attack_is_chosen_and_the_bound_stays_valid():
    """100 attacks on pure noise: chosen and judged on the same runs, the best of them would look like a leak."""
    rng = np.random.default_rng(0)
    bounds = [
        auditing.two_world_epsilon(*rng.normal(size=(2, 200, 100)), delta=DELTA, gaussian=True) for _ in range(20)
    ]
    assert np.mean(np.array(bounds) > 0.0) <= 0.1
    without, with_example = rng.normal(size=(2, 2000, 3))
    with_example[:, 1] += 3.0
    assert auditing.two_world_epsilon(without, with_example, delta=DELTA, gaussian=True) > 10.0


def test_rates_of_membership_inference_by_hand():
    scores = np.array([3.0, 2.0, 2.0, 1.0, 0.0])
    member = np.array([True, True, False, False, True])
    # pairs: 3 > 2, 3 > 1, 2 = 2, 2 > 1, 0 < 2, 0 < 1
    assert auditing.area_under_curve(scores, member) == pytest.approx(3.5 / 6)
    assert auditing.true_positive_rate(scores, member, 0.01) == pytest.approx(1 / 3)
    assert auditing.true_positive_rate(scores, member, 0.5) == pytest.approx(2 / 3)


def test_one_run_audit_guesses_both_ends():
    included = np.arange(100) % 2 == 0
    scores = np.where(included, 1.0, -1.0) + np.linspace(0.0, 0.1, 100)
    found = auditing.one_run_audit(scores, included, delta=0.0, guesses=(20, 30))
    assert found == auditing.one_run_epsilon_lower_bound(canaries=100, guesses=50, correct=50, delta=0.0) > 2.0
    assert auditing.one_run_audit(-scores, included, delta=0.0) == 0.0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: auditing.epsilon_lower_bound(**counts(true_positives=11)), "true_positives=11"),
        (lambda: auditing.epsilon_lower_bound(**counts(confidence=1.0)), "confidence=1.0"),
        (lambda: auditing.two_world_epsilon([0.0] * 3, [0.0] * 4, delta=DELTA), r"scores_without=\(3, 1\)"),
        (lambda: auditing.two_world_epsilon(np.zeros((4, 2)), np.zeros((4, 1)), delta=DELTA), "as many columns"),
        (lambda: auditing.one_run_audit([1.0, math.nan], [True, False], delta=DELTA), "none of them NaN"),
        (lambda: auditing.one_run_audit([1.0], [True], delta=DELTA, guesses=(2, 1)), r"guesses=\(2, 1\)"),
        (
            lambda: auditing.one_run_epsilon_lower_bound(canaries=5, guesses=6, correct=1, delta=DELTA),
            "rising order.*1, 6, 5",
        ),
        (lambda: auditing.gaussian_epsilon(-1.0, DELTA), "mu=-1.0"),
    ],
)
def test_refuses_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_result_says_what_it_contradicts():
    fields = dict(epsilon_lower_bound=1.2345, delta=DELTA, confidence=0.99, method="")
    wrong = auditing.AuditResult(**fields, claimed_epsilon=1.0)
    assert wrong.contradicts_claim
    assert str(wrong) == "empirical epsilon >= 1.23 with 99% confidence (claimed: 1 at delta 1e-05)"
    assert not auditing.AuditResult(**fields, claimed_epsilon=1.3).contradicts_claim
    assert "nothing claimed" in str(auditing.AuditResult(**fields, claimed_epsilon=None))


# ---------------------------------------------------------------------- one step


@pytest.mark.parametrize(
    "claim, trials, mode",
    [
        (8.0, 20_000, "noised"),
        pytest.param(4.0, 20_000, "anchored", marks=pytest.mark.thorough),
        pytest.param(1.0, 60_000, "public", marks=pytest.mark.thorough),
    ],
)
def test_audit_of_a_step_reaches_seventy_percent_of_the_claim_and_not_more_than_all(claim, trials, mode):
    model, x, y = audited.stepping_model(claim, mode)
    found = auditing.audit_step(model, x, y, delta=DELTA, trials=trials)
    assert found.claimed_epsilon == pytest.approx(claim, rel=1e-3)
    assert 0.7 * claim < found.epsilon_lower_bound <= found.claimed_epsilon
    assert not found.contradicts_claim
    assert model.ledger.steps == 0


def test_audit_of_a_step_sees_noise_that_is_a_tenth_too_small_and_needs_some():
    model, x, y = audited.stepping_model(4.0)
    right = auditing.audit_step(model, x, y, delta=DELTA, row=0, trials=20_000)
    draw = model.optimizer._noise_source.standard_normal
    model.optimizer._noise_source.standard_normal = lambda shapes: [0.85 * each for each in draw(shapes)]
    wrong = auditing.audit_step(model, x, y, delta=DELTA, row=0, trials=20_000)
    assert wrong.contradicts_claim and not right.contradicts_claim
    helpers.compiled(model)
    with pytest.raises(ValueError, match="Received: noise_multiplier=0.0"):
        auditing.audit_step(model, x, y, delta=DELTA)


# ---------------------------------------------------------------------- a training run


def test_audit_of_a_training_run_stays_below_the_claim_and_finds_something():
    found, model, _ = audited.training(8.0)
    assert found.white_box.claimed_epsilon == model.epsilon(DELTA, "pld") <= 8.0
    assert model.ledger.steps == 4 and model.ledger.entries[0].sampling == "poisson"
    assert 0.3 < found.white_box.epsilon_lower_bound <= 8.0
    assert 0.0 <= found.black_box.epsilon_lower_bound <= 8.0
    assert auditing.area_under_curve(found.scores, found.included) > 0.65
    assert found.included.shape == found.losses.shape == (300,)


def test_audit_of_a_training_run_sees_forgotten_noise():
    found, _, _ = audited.training(1.0, noise=0.01, seed=3)
    assert found.white_box.contradicts_claim


def test_audit_of_a_training_run_refuses_a_plan_for_other_data():
    model, x, y = audited.stepping_model(4.0)
    plan = tf_dpbn.PrivacyPlan(target_epsilon=8.0, delta=DELTA, num_examples=13, expected_batch_size=6, epochs=1)
    with pytest.raises(ValueError, match="num_examples=13.*Received: x, y=12"):
        auditing.audit_training(model, x, y, x, y, plan)
    assert model.ledger.steps == 0
    helpers.spend(model, 1)
    with pytest.raises(ValueError, match="`model` must not be trained yet.*Received: model='1 steps'"):
        auditing.audit_training(model, x, y, x, y, plan)


# ---------------------------------------------------------------------- a finished model


def test_losses_of_examples_are_kerass():
    model, x, y = audited.stepping_model(4.0)
    losses = [model.evaluate(x[i : i + 1], y[i : i + 1], verbose=0) for i in range(len(x))]
    np.testing.assert_allclose(auditing.per_example_losses(model, x, y), losses, rtol=1e-4)


def test_membership_inference_tells_a_model_that_learned_by_heart():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 300)).astype("float32"), rng.integers(0, 2, 200)
    member = rng.random(200) < 0.5
    inputs = keras.Input((300,))
    model = keras.Model(inputs, layers.Dense(2)(layers.Dense(64, activation="relu")(inputs)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.02), loss)
    before = auditing.membership_inference(model, x, y, member, delta=1e-3)
    model.fit(x[member], y[member], epochs=30, verbose=0)
    after = auditing.membership_inference(model, x, y, member, delta=1e-3, false_positive_rate=0.1)
    assert before.audit.epsilon_lower_bound == 0.0 and abs(before.auc - 0.5) < 0.15
    assert after.auc > 0.9 and after.true_positive_rate > 0.3 and after.audit.epsilon_lower_bound > 1.0
    assert after.audit.claimed_epsilon is None
    assert "AUC" in str(after) and "nothing claimed" in str(after)
    with pytest.raises(ValueError, match="members and non-members"):
        auditing.membership_inference(model, x, y, np.ones(200, bool), delta=1e-3)
