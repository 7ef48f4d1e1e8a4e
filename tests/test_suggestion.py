"""Suggested settings: plans can be made of them, and their rules are those of the tables that they name."""

from __future__ import annotations

import functools
import pathlib
import re

import numpy as np
import pytest

import choosing
import utility
from tf_dpbn import accounting, public_data
from tf_dpbn.accounting import suggestion
from utility_tables import TABLES

DOCS = pathlib.Path(__file__).parents[1] / "docs"
RESULTS = (DOCS / "results.md").read_text("utf-8")
CASES = {
    "features": (60_000, 3.0, 1e-5),
    "shallow": (60_000, 3.0, 1e-5),
    "deep": (3_000, 20.0, None),
    "pretrained": (2_000, 1.0, None),
}


@functools.cache
def suggested(network):
    examples, epsilon, delta = CASES[network]
    return accounting.suggest(examples, epsilon, network=network, delta=delta)


@pytest.mark.parametrize("network", CASES)
def test_a_plan_of_the_suggested_settings_has_their_noise_and_epsilon(network):
    found = suggested(network)
    plan = accounting.PrivacyPlan(**found.plan_arguments())
    assert found.noise_multiplier == plan.noise_multiplier and plan.epsilon <= found.target_epsilon == CASES[network][1]
    assert (
        accounting.PrivacyPlan(**{**found.plan_arguments(), "steps": None, "epochs": found.epochs}).steps == found.steps
    )
    assert found.public_batch == "pretraining data" or callable(getattr(public_data, found.public_batch))


@pytest.mark.parametrize("network", ["features", "shallow"])
def test_the_settings_of_the_measured_recipes_are_suggested(network):
    found = suggested(network)
    row = {"features": TABLES["scattering"].rows[0], "shallow": TABLES["d"].rows[0]}[network]
    setting = row.settings[0]
    assert found.expected_batch_size == setting.batch_size and found.l2_norm_clip == setting.l2_norm_clip
    assert found.epochs == pytest.approx(setting.epochs, rel=0.2)
    assert network == "features" or found.learning_rate == setting.learning_rate
    assert (found.ema_momentum or 0.0) == setting.ema and not [r for r in found.reasons if "extrapolates" in r]


@pytest.mark.parametrize("network", ["features", "pretrained"])
def test_the_batch_is_the_least_power_of_two_that_has_at_most_a_tenth_more_noise_than_all_data(network):
    found = suggested(network)

    def noise(batch_size):
        q = batch_size / found.num_examples
        return (
            accounting.calibrate_noise_multiplier(
                target_epsilon=found.target_epsilon, delta=found.delta, sampling_probability=q, steps=found.steps
            )
            / batch_size
        )

    chosen, enough = found.expected_batch_size, 1.1 * noise(found.num_examples)
    assert chosen.bit_count() == 1 and noise(chosen) <= enough < noise(chosen // 2)


def test_steps_are_the_measured_ones_and_fall_neither_with_epsilon_nor_with_the_number_of_examples():
    epsilons, sizes = np.geomspace(0.1, 100.0, 31), (100, 4_000, 9_000, 30_000, 60_000, 10**8)
    for measured in suggestion._NETWORKS.values():
        for size, by_epsilon in measured.steps:
            for epsilon, steps in by_epsilon:
                assert suggestion._steps(measured, size, epsilon) == steps
        table = np.array([[suggestion._steps(measured, size, epsilon) for epsilon in epsilons] for size in sizes])
        assert np.all(np.diff(table, axis=0) >= 0) and np.all(np.diff(table, axis=1) >= 0)
    features = suggestion._NETWORKS["features"]
    assert 32 < suggestion._steps(features, 15_000, 3.0) < 200 and 16 < suggestion._steps(features, 4_000, 2.0) < 32


def test_the_learning_rate_rule_is_that_of_the_tuned_rows():
    products = [noise * rate for _, noise, rate in choosing.tuned_rates(utility.read(utility.RESULTS))]
    ratios = np.array(products) / suggestion._RATE_TIMES_NOISE
    assert len(ratios) > 40 and ratios.min() >= 1 / 2.5 and ratios.max() <= 2.5
    assert np.exp(np.mean(np.log(ratios))) == pytest.approx(1.0, abs=0.25)


def test_reasons_name_tables_and_sections_that_there_are_and_say_where_they_extrapolate():
    for network in CASES:
        text = " ".join(suggested(network).reasons)
        assert set(re.findall(r"\((\w+)\)", text)) <= set(TABLES)
        assert all(f"# {title}" in RESULTS for title in re.findall(r'under "(.+?)"', text))
        assert text.count("extrapolates") == (3 if network == "deep" else 0), text
        shown = str(suggested(network))
        assert shown.startswith("Start from") and shown.count("\n- ") == len(suggested(network).reasons)


@pytest.mark.parametrize(
    ("examples", "delta"), [(1, 0.1), (1_000, 1e-4), (4_000, 1e-5), (60_000, 1e-6), (10**9, 1e-10)]
)
def test_delta_is_a_power_of_ten_of_at_most_a_tenth_of_one_over_the_examples(examples, delta):
    assert suggestion._default_delta(examples) == delta


@pytest.mark.thorough
def test_the_table_of_the_guide_is_what_is_suggested():
    rows = re.findall(r"^\| ([\d,]+) \| (\d) \| (.*) \|$", (DOCS / "choosing.md").read_text("utf-8"), re.MULTILINE)
    assert len(rows) == 6
    for size, epsilon, cells in rows:
        for network, cell in zip(("features", "shallow", "deep"), cells.split(" | "), strict=True):
            found = accounting.suggest(int(size.replace(",", "")), float(epsilon), network=network, delta=1e-5)
            assert cell == f"{found.expected_batch_size:,} / {found.steps} / {found.learning_rate:g}"


REFUSED = {
    "num_examples": {"num_examples": 0},
    "target_epsilon": {"target_epsilon": -1.0},
    "network": {"network": "wide"},
    "delta": {"delta": 0.01},
    "delta between 0 and 1": {"delta": 1.0},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"`{name.split()[0]}` must.* Received: "):
        accounting.suggest(**{"num_examples": 100, "target_epsilon": 1.0, **REFUSED[name]})


def test_plots_are_drawn_of_the_runs(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(choosing, "noise_per_example", lambda examples, size, steps, epsilon: 1.0 / size)
    suggestion = suggested("features")  # before `suggest`, which it calls, is another
    monkeypatch.setattr(accounting, "suggest", lambda *_, **__: suggestion)
    choosing.draw(utility.read(utility.RESULTS), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"choosing_{name}.png" for name in choosing.PLOTS}
