"""Tests of tf_dpbn.accounting, against closed forms, exact sums, quadrature, other libraries."""

import fractions
import functools
import json
import logging
import math

import dp_accounting
import mpmath
import numpy as np
import pytest
from scipy import stats

from tf_dpbn import accounting
from tf_dpbn.accounting import events

ACCOUNTANTS = ("rdp", "pld")


def record(q=0.01, sigmas=(1.0,), steps=1000, **kwargs):
    return accounting.StepRecord(sampling_probability=q, noise_multipliers=sigmas, steps=steps, **kwargs)


def subsampled_gaussian_delta(epsilon, sigma, q):
    """The larger hockey-stick divergence of one step, both directions, in closed form."""
    normal = stats.norm(scale=sigma)

    def threshold(ratio):  # the x at which (1 - q) + q exp((2x - 1) / 2 sigma^2) equals ratio
        return -math.inf if ratio <= 1 - q else sigma**2 * math.log((ratio - 1 + q) / q) + 0.5

    x = threshold(math.exp(epsilon))
    remove = (1 - q) * normal.sf(x) + q * normal.sf(x - 1) - math.exp(epsilon) * normal.sf(x)
    y = threshold(math.exp(-epsilon))
    mixture = (1 - q) * normal.cdf(y) + q * normal.cdf(y - 1)
    add = normal.cdf(y) - math.exp(epsilon) * mixture if math.isfinite(y) else 0.0
    return max(remove, add)


@pytest.mark.parametrize(
    "sigmas, expected",
    [
        ((1.3,), 1.3),
        ((1.0, 2.0), 0.8944271909999159),
        ((3.0,) * 9, 1.0),
        ((1.0, 0.0), 0.0),
        ((1e200, 1e200), 1e200 / math.sqrt(2)),
    ],
)
def test_effective_noise_multiplier_is_the_inverse_root_of_summed_inverse_squares(sigmas, expected):
    assert accounting.effective_noise_multiplier(sigmas) == pytest.approx(expected, rel=1e-14)


def two_release_delta(epsilon, sigmas, q):
    """Hockey-stick of one step with two releases of one draw, by quadrature on a plane."""
    axes = [np.linspace(-9 * s, 9 * s + 1, 1501) for s in sigmas]
    absent = np.multiply.outer(*(stats.norm.pdf(x, 0, s) for x, s in zip(axes, sigmas, strict=True)))
    present = np.multiply.outer(*(stats.norm.pdf(x, 1, s) for x, s in zip(axes, sigmas, strict=True)))
    mixture = (1 - q) * absent + q * present
    excess = np.maximum(mixture - math.exp(epsilon) * absent, 0)
    return excess.sum() * np.prod([x[1] - x[0] for x in axes])


@pytest.mark.parametrize("epsilon", [0.1, 0.5])
def test_two_releases_on_one_draw_cost_what_the_folded_gaussian_costs(epsilon):
    sigmas, q = (1.0, 2.0), 0.3
    truth = two_release_delta(epsilon, sigmas, q)
    folded = accounting.effective_noise_multiplier(sigmas)
    assert subsampled_gaussian_delta(epsilon, folded, q) == pytest.approx(truth, rel=1e-4)
    for wrong in (1.0, math.sqrt(5.0)):
        assert subsampled_gaussian_delta(epsilon, wrong, q) != pytest.approx(truth, rel=1e-2)


@pytest.mark.parametrize("sigmas", [(1.0, 2.0), (2, 1), [np.float32(1), np.int64(2)]])
def test_no_noise_multiplier_is_lost_whatever_its_number_type(sigmas):
    # dp_accounting 0.4.3 to 0.6.0 gives 2.1014 for (1, 2) and 0.6862 for (2, 1) as nested events.
    ledger = accounting.Ledger([record(0.01, sigmas, 1000)])
    assert ledger.epsilon(1e-5) == pytest.approx(2.7488, abs=1e-4)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"q": 0.0}, "sampling_probability=0.0"),
        ({"sigmas": ()}, "one for each release"),
        ({"sigmas": (1.0, -1.0)}, "noise_multipliers=-1.0"),
        ({"sigmas": "11"}, "noise_multipliers='1'"),
        ({"steps": 1.5}, "steps=1.5"),
        ({"num_examples": 9, "max_batch_size": 0}, "max_batch_size=0"),
        ({"max_batch_size": 8}, "num_examples"),
        ({"sampling": "shuffled"}, "sampling='shuffled'"),
    ],
)
def test_record_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        record(**fields)


@pytest.mark.parametrize("n, q, m", [(6, 0.5, 4), (6, 0.5, 7), (6, 1.0, 6), (300, 0.3, 250)])
def test_truncation_probability_is_the_binomial_tail_from_max_batch_size_on(n, q, m):
    p = fractions.Fraction(q)
    exact = float(sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(m, n + 1)))
    found = accounting.truncation_probability(num_examples=n, sampling_probability=q, max_batch_size=m)
    assert type(found) is float and found == pytest.approx(exact, rel=1e-11, abs=0.0)


def truncated_step_delta(epsilon, *, n, m, q, sigma):
    """Exact hockey-stick of one step with truncated batches, n common examples -1 and one more, +1."""
    x = np.linspace(-m - 10 * sigma, m + 10 * sigma, 40_001)
    bump = functools.partial(stats.norm.pdf, x, scale=sigma)
    without, with_it = np.zeros_like(x), np.zeros_like(x)

    for k in range(n + 1):
        weight = stats.binom.pmf(k, n, q)
        kept = min(k, m)
        without += weight * bump(-kept)
        with_it += weight * (1 - q) * bump(-kept)
        if k < m:
            with_it += weight * q * bump(-k + 1)
        else:  # m of k + 1 rows stay: the extra one with probability m / (k + 1)
            stays = m / (k + 1)
            with_it += weight * q * (stays * bump(-(m - 1) + 1) + (1 - stays) * bump(-m))
    excess = [np.maximum(p - math.exp(epsilon) * r, 0).sum() for p, r in ((with_it, without), (without, with_it))]
    return max(excess) * (x[1] - x[0])


@pytest.mark.parametrize("n, m", [(6, 4), (6, 3), (6, 6), (6, 7), (2, 2), (3, 1)])  # 7 rows are never too few
@pytest.mark.parametrize("q, sigma", [(0.2, 0.4), (0.5, 0.4), (0.8, 1.0)])
def test_truncation_theorem_bounds_the_exact_divergence(n, m, q, sigma):
    charge = record(q, (sigma,), 1, num_examples=n, max_batch_size=m).truncation_delta
    assert (charge == 0.0) == (m > n)
    for epsilon in (0.1, 1.0, 4.0):
        truth = truncated_step_delta(epsilon, n=n, m=m, q=q, sigma=sigma)
        assert truth <= subsampled_gaussian_delta(epsilon, sigma, q) + charge + 1e-9


def test_the_exact_divergence_rejects_a_smaller_charge():
    n, m, q, sigma, epsilon = 2, 2, 0.8, 1.0, 0.5
    truth = truncated_step_delta(epsilon, n=n, m=m, q=q, sigma=sigma)
    for wrong_charge in (0.0, stats.binom.sf(m, n, q)):  # none, P[Bin > M]
        assert truth > subsampled_gaussian_delta(epsilon, sigma, q) + wrong_charge + 0.01


@pytest.mark.parametrize("n, q, steps", [(60_000, 0.01, 1000), (50, 0.3, 10), (9, 1.0, 3)])
def test_default_max_batch_size_is_the_smallest_multiple_within_the_share(n, q, steps):
    delta = 1e-5
    for multiple, share in ((8, 0.01), (1, 0.5)):
        given = {"num_examples": n, "sampling_probability": q, "steps": steps, "delta": delta}
        m = accounting.default_max_batch_size(**given, multiple=multiple, share=share)
        assert m % multiple == 0 and m < n + 1 + multiple
        least, less = (steps * stats.binom.sf(rows - 1, n, q) for rows in (m, m - multiple))
        assert least <= share * delta < less


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
@pytest.mark.parametrize("q, sigma", [(0.3, 0.8), (1.0, 2.0)])
def test_epsilon_of_one_step_bounds_the_closed_form(accountant, q, sigma):
    delta = 1e-5
    epsilon = accounting.Ledger([record(q, (sigma,), 1)]).epsilon(delta, accountant)
    assert subsampled_gaussian_delta(epsilon, sigma, q) <= delta
    slack = 1e-3 if accountant == "pld" else 1.0
    assert subsampled_gaussian_delta(epsilon - slack, sigma, q) > delta


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_epsilon_is_the_accountants_for_all_entries_together(accountant):
    entries = [record(0.01, (1.0,), 500), record(0.02, (1.5, 2.5), 300)]
    oracle = {"rdp": dp_accounting.rdp.RdpAccountant, "pld": dp_accounting.pld.PLDAccountant}
    reference = oracle[accountant]()
    for entry in entries:
        reference.compose(accounting.dp_sgd_event(entry))
    found = accounting.Ledger(entries).epsilon(1e-5, accountant)
    assert type(found) is float
    tail = sum(entry.steps * accounting.tail_delta(entry.effective_noise_multiplier) for entry in entries)
    assert found == pytest.approx(reference.get_epsilon(1e-5 - tail), rel=1e-12)


def test_truncation_is_taken_from_delta_and_summed_over_steps_and_entries():
    padded = {"num_examples": 1000, "max_batch_size": 96}
    ledger = accounting.Ledger([record(0.05, (1.0,), 30, **padded), record(0.05, (2.0,), 70, **padded)])
    truncation = 100 * stats.binom.sf(95, 1000, 0.05)
    assert 1e-8 < truncation < 1e-5
    assert ledger.truncation_delta() == pytest.approx(truncation, rel=1e-12)
    whole = accounting.Ledger([record(0.05, (1.0,), 30), record(0.05, (2.0,), 70)])
    assert ledger.epsilon(1e-5) == pytest.approx(whole.epsilon(1e-5 - truncation), rel=1e-9)
    assert ledger.epsilon(1e-5) > whole.epsilon(1e-5)
    assert ledger.epsilon(ledger.truncation_delta()) == math.inf


@pytest.mark.parametrize("sigma", [0.11, 0.2, 1.0, 30.0])
def test_the_tails_charge_bounds_what_noise_of_one_world_leaves_out_of_the_other(sigma):
    """Pairs of coordinates are drawn on discs: what lies outside of the other world's follows noncentral chi-square."""
    radius, pairs, rng = 11.5, 2.0**30, np.random.default_rng(0)
    shifts = [np.ones(n) for n in (1, 2, 1000)] + [rng.exponential(size=n) ** 4 for n in (3, 50, 1000)]
    unmoved = math.exp(-(radius**2) / 2.0)
    for shift in shifts:
        shift = shift / np.linalg.norm(shift) / sigma
        outside = stats.ncx2.sf(radius**2, 2, shift**2).sum() + (pairs - shift.size) * unmoved
        assert 0.0 < outside <= accounting.tail_delta(sigma)


def test_the_tail_is_taken_from_delta_and_said_in_the_statement():
    ledger = accounting.Ledger([record(0.05, (0.2,), 30)])
    assert ledger.tail_delta() == pytest.approx(30 * stats.norm.sf(6.0), rel=1e-6)
    assert ledger.epsilon(0.99 * ledger.tail_delta()) == math.inf
    assert math.isfinite(ledger.epsilon(1e-5)) and ledger.epsilon(1e-5) > ledger.epsilon(1.1e-5)
    statement = " ".join(accounting.privacy_statement(ledger, delta=1e-5).split())
    assert "2.96e-08 for what the noise's tail leaves out" in statement
    assert accounting.Ledger([record(0.05, (0.1,), 1)]).epsilon(1e-5) == math.inf  # 10 away from its neighbour


@pytest.mark.parametrize("order, q, sigma", [(2, 0.01, 1.0), (5, 0.3, 0.7), (37, 1e-8, 1.0), (20, 1e-7, 8.0)])
def test_divergences_of_whole_orders_are_exact_however_small(order, q, sigma):
    with mpmath.workdps(60):
        p, variance = mpmath.mpf(q), mpmath.mpf(sigma) ** 2
        drawn = [mpmath.binomial(order, k) * (1 - p) ** (order - k) * p**k for k in range(order + 1)]
        terms = [each * mpmath.exp((k * k - k) / (2 * variance)) for k, each in enumerate(drawn)]
        expected = float(mpmath.log(mpmath.fsum(terms)) / (order - 1))
    assert events._subsampled_divergence(order, q, sigma) == pytest.approx(expected, rel=1e-9)


def test_tiny_sampling_rates_cost_little_and_what_rdp_cannot_show_is_said():
    ledger = accounting.Ledger([record(1e-8, (1.0,), 10**6)])
    assert ledger.epsilon(1e-9) == pytest.approx(0.4528, rel=1e-3)  # log(1/delta) / (order - 1) at an order of about 37
    plan = accounting.PrivacyPlan(target_epsilon=1.0, delta=1e-9, num_examples=10**8, expected_batch_size=10, epochs=1)
    assert plan.noise_multiplier < 0.8 and plan.epsilon <= 1.0
    with pytest.raises(ValueError, match=r"RDP accounting shows no epsilon below 0\.00\d+ here.*try accountant='pld'"):
        accounting.calibrate_noise_multiplier(target_epsilon=1e-4, delta=1e-9, sampling_probability=1.0, steps=10**6)


def test_no_plan_makes_the_accountant_warn(monkeypatch):
    messages = []
    monkeypatch.setattr(logging.getLogger("absl"), "handle", messages.append)
    for q in (1e-9, 1e-5, 1e-3, 0.01, 0.1, 0.5, 0.7, 0.999, 1.0):
        for sigma in (0.15, 0.3, 0.7, 1.0, 3.0, 8.0, 30.0, 1e6):
            assert accounting.Ledger([record(q, (sigma,), 10)]).epsilon(1e-5) >= 0.0
    assert not messages


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_edges_of_epsilon(accountant):
    assert accounting.Ledger().epsilon(1e-5, accountant) == 0.0
    assert accounting.Ledger([record(steps=0)]).epsilon(1e-5, accountant) == 0.0
    for last in (record(sigmas=(1.0, 0.0), steps=1), record(sigmas=(0.0,), steps=1)):
        assert accounting.Ledger([record(sigmas=(5.0,)), last]).epsilon(0.5, accountant) == math.inf


@pytest.mark.parametrize(
    "entries, arguments, message",
    [
        ([], (0.0,), "delta=0.0"),
        ([record()], (1e-5, "gdp"), "accountant='gdp'"),
    ],
)
def test_epsilon_refuses(entries, arguments, message):
    with pytest.raises(ValueError, match=message):
        accounting.Ledger(entries).epsilon(*arguments)


def test_equal_configurations_merge_and_different_ones_do_not():
    ledger = accounting.Ledger([record(steps=2), record(steps=3), record(0.02, steps=5), record(steps=1)])
    ledger.record(record(steps=7, sampling="poisson"))
    assert ledger.entries == (record(steps=6), record(0.02, steps=5), record(steps=7, sampling="poisson"))
    twin = ledger.copy()
    assert ledger.steps == twin.steps == 18 and twin == ledger
    twin.record(record(steps=1))
    assert (ledger.steps, twin.steps) == (18, 19) and twin != ledger
    with pytest.raises(TypeError, match="StepRecord"):
        ledger.record("step")


def test_unknown_sampling_probability_is_refused_until_it_is_filled_in():
    known = record(0.05, steps=3)
    ledger = accounting.Ledger([record(None, steps=10), known])
    with pytest.raises(ValueError, match=r"num_examples.*with_sampling_probability"):
        ledger.epsilon(1e-5)
    with pytest.raises(ValueError, match="sampling_probability"):
        accounting.Ledger([record(None, num_examples=9, max_batch_size=8)]).truncation_delta()
    filled = ledger.with_sampling_probability(0.01)
    assert filled.entries == (record(0.01, steps=10), known)
    assert ledger.entries[0].sampling_probability is None
    assert filled.epsilon(1e-5) > 0
    with pytest.raises(ValueError, match="sampling_probability=0"):
        ledger.with_sampling_probability(0)


def test_json_restores_the_ledger_exactly():
    odd = record(1 / 3, (0.1 + 0.2, 1e-300), 7, num_examples=9, max_batch_size=4)
    ledger = accounting.Ledger([odd, record(None, (2.0,), 10**12), record(256 / 60_000, sampling="poisson")])
    assert accounting.Ledger.from_json(ledger.to_json()) == ledger
    assert accounting.Ledger.from_json(accounting.Ledger().to_json()).steps == 0


def damage(**changes):
    content = json.loads(accounting.Ledger([record(num_examples=9)]).to_json())
    for path, value in changes.items():
        if path.startswith("entry_"):
            content["entries"][0][path[len("entry_") :]] = value
        else:
            content[path] = value
    return json.dumps(content)


CORRUPT = [
    "",
    "[]",
    "[" * 100_000,
    damage(entries=None),
    damage(entry_steps=10**400),
    damage(entry_noise_multipliers=[math.nan]),
]


@pytest.mark.parametrize(
    "text, message",
    [
        (damage(version=2), "its version is 2, and this code reads 1"),
        (damage(format="other"), "it is not a ledger"),
        (damage(entry_extra=1), "an entry has the fields .*extra"),
        *((text, "must be the JSON of a Ledger") for text in CORRUPT),
    ],
)
def test_from_json_refuses(text, message):
    with pytest.raises(ValueError, match=message):
        accounting.Ledger.from_json(text)


def test_pld_is_tighter_than_rdp_but_not_asked_where_nothing_is_left():
    little = accounting.Ledger([record(0.01, (1e-3,), 10)])
    assert little.epsilon(1e-5, "pld") == little.epsilon(1e-5, "rdp") > 50
    ledger = accounting.Ledger([record(0.01, (1.0,), 1000)])
    assert ledger.epsilon(1e-5, "pld") < 0.95 * ledger.epsilon(1e-5, "rdp")
