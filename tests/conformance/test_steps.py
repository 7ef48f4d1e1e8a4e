"""The contract of a whole step, for each optimizer and on several replicas: sensitivity, noise, ledger."""

import json
import os

import numpy as np
import pytest
from scipy import stats

from tests import neighbours
from tests.programs import last_line

RELEASES = 3  # the gradient's, the noised and the anchored statistics'
LIKELY = 1e-4
# `make conformance` runs each optimizer on each number of replicas.
ALL = ["--all"] if os.environ.get("CONFORMANCE") == "all" else []


@pytest.mark.slow
def test_steps_of_each_optimizer_and_number_of_replicas_keep_the_contract():
    """One test, so that the program runs once."""
    found = json.loads(last_line("-m", "tests.conformance.steps", *ALL))
    assert {case.split(", ")[0] for case in found} == {"wrapped", "sgd", "adam", "adagrad"}
    assert {case.split(", ")[1] for case in found} == {"1", "2", "4"}
    for case, each in found.items():
        assert each["pairs"] >= 96 and len(each["worst"]) == RELEASES, case
        assert max(each["worst"]) <= neighbours.SLACK, case
        assert min(each["typical"]) > 1e-3 and each["moved"] > 1e-3, case  # batches differ, and weights move
        _check_ledger(case, each)
        assert each["replicas_disagree"] == 0.0, case  # one draw, the same on each
        assert each["closest_draws"] > 1e-3, case  # and another one in each step and release
    multipliers = next(iter(found.values()))["ledger"]["noise_multipliers"]
    for k, multiplier in enumerate(multipliers):
        _check_noise(np.concatenate([each["noise"][k] for each in found.values()]), multiplier)


def _check_ledger(case, found):
    ledger = found["ledger"]
    assert ledger["steps"] == found["steps"] == 48, case
    assert len(ledger["noise_multipliers"]) == RELEASES and ledger["effective"] == pytest.approx(0.5, rel=1e-9), case


def _check_noise(noise, stddev):
    assert stats.kstest(noise, "norm", args=(0, stddev)).pvalue > LIKELY
    assert _chance_of_scale(noise, stddev) > LIKELY
    for wrong in (0.9, 1.1):
        assert _chance_of_scale(noise, wrong * stddev) < LIKELY


def _chance_of_scale(noise, stddev):
    """Of a sum of squares as far out as this one, if the standard deviation were `stddev`."""
    below = stats.chi2.cdf(np.sum(np.square(noise)) / stddev**2, len(noise))
    return 2 * min(below, 1 - below)
