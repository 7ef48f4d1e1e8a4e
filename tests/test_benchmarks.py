"""The benchmarks: their arithmetic, their networks, and a tiny run of step times and of memory."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from absl import flags
from absl.testing import flagsaver

import applications
import filters
import nets
import report
import step_time
import tf_dpbn
import why
from architectures import ARCHITECTURES
from tests import helpers
from tf_dpbn import DPBatchNormalization, DPModel
from tf_dpbn._keras import keras


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_both_sides_run_the_network_whose_parameters_peers_have(name):
    without = nets.build(name, nets.no_normalization, tf.keras.Model)
    assert without.count_params() == ARCHITECTURES[name].parameters
    plain = nets.build(name, tf.keras.layers.BatchNormalization, tf.keras.Model)
    ours = nets.build(name, DPBatchNormalization, DPModel)
    ours.set_weights(plain.get_weights())
    x = tf.random.uniform((2, *ARCHITECTURES[name].image), seed=0)
    np.testing.assert_allclose(ours(x, training=False), plain(x, training=False), rtol=1e-5, atol=1e-5)


def test_a_tiny_run_compares_step_times_and_appends_lines(tmp_path, capsys):
    path = tmp_path / "times.jsonl"
    size = ("--nets=tutorial_cnn", "--batch_sizes=8", "--repeats=2", "--warm_up=1", "--public_batch=4")
    with flagsaver.flagsaver():
        step_time.define_flags()
        flags.FLAGS(["step_time", *size, "--statistics=public,none", f"--json={path}"])
        step_time.main(["step_time"])
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = {row["variant"]: row for row in rows}
    private, bare = "tf_dpbn book_keeping public", "tf_dpbn book_keeping without normalization"
    assert set(found) == {"plain", private, bare}
    for variant, row in found.items():
        lower, upper = row["milliseconds_quartiles"]
        assert row["rounds"] == 2 and 0.0 < lower <= row["milliseconds"] <= upper
        assert row["microseconds_per_example"] == pytest.approx(125.0 * row["milliseconds"])
        assert variant in printed
    assert found[private]["parameters"] == found["plain"]["parameters"]
    assert found[bare]["parameters"] == ARCHITECTURES["tutorial_cnn"].parameters


@pytest.mark.thorough
def test_memory_is_measured_in_a_process_of_its_own():
    config = step_time.Config(nets=("tutorial_cnn",), batch_sizes=(8,), plain=False, memory=True, memory_repeats=1)
    (row,) = step_time.run(config)
    assert 0 < row["above_start_bytes"] < row["process_bytes"] < 2**31
    assert row["variant"] in report.render([row])


@pytest.mark.thorough
def test_mobilenet_is_converted_trained_exported_and_made_plain_again():
    row = applications.run("MobileNetV2")  # raises if a loaded, exported or plain model predicts otherwise
    assert row.normalizations == row.corrected_locally == 52
    assert applications.render([row]).splitlines()[-1].startswith("| MobileNetV2 | 52 | 52 | 0 |")


@pytest.mark.thorough
def test_a_million_examples_made_as_they_are_drawn_take_little_memory():
    """In a process of its own, whose memory it measures."""
    script = pathlib.Path(applications.__file__).with_name("input_pipeline.py")
    command = [sys.executable, str(script), "--net=resnet8", "--steps=5", "--turns=1"]
    found = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout.splitlines()[-1])
    assert found["examples"] == 1_000_000 and found["peak_memory_MiB"] < 2048
    assert found["reading_alone_s"] < 0.1 * found["step_on_a_kept_batch_s"]
    assert found["draw_of_batch_from_1e9_ms"] < 10


def test_the_figure_of_the_readme_is_measured_on_both_layers(tmp_path):
    x, y = helpers.images(5, (4, 4, 1))
    x[0] = 9.0
    inputs = keras.Input((4, 4, 1))
    h = keras.layers.Flatten()(
        keras.layers.ReLU()(keras.layers.BatchNormalization()(keras.layers.Conv2D(3, 2)(inputs)))
    )
    stock = keras.Model(inputs, keras.layers.Dense(3)(h))
    private = helpers.compiled(tf_dpbn.convert(stock, public_batch=tf_dpbn.public_data.dead_leaves((4, 4, 1))))
    clip = private.optimizer.l2_norm_clip
    moves = why.stock_moves(stock, x, y, clip), why.private_moves(private, x, y, clip)
    assert moves[0].max() > 1.05 and moves[1].max() < 1.00001
    why.draw(*moves, tmp_path / "why.png")
    assert (tmp_path / "why.png").is_file()


def test_filters_of_gradients_keep_their_scale_and_train():
    x = np.random.default_rng(0).normal(size=(60, 5)).astype("float32")
    y = x[:, :3].argmax(1)
    plan = tf_dpbn.PrivacyPlan(noise_multiplier=0.0, delta=1e-4, num_examples=60, expected_batch_size=60, steps=40)
    for kind in filters.FILTERS.values():
        assert sum(kind.taps) == pytest.approx(1.0 - kind.decay)
        assert filters.train((x, y), (x, y), plan, kind, 4.0, 0) > 0.8
    look_ahead = filters.disk(0.5)
    assert (look_ahead.ahead, look_ahead.share, look_ahead.taps) == (1.0, 1.0, (0.5,))
