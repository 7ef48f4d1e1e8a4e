"""The benchmarks: their arithmetic, their networks, and a tiny run of step times and of memory."""

from __future__ import annotations

import contextlib
import json
import sys

import numpy as np
import pytest
import tensorflow as tf
from absl import flags
from absl.testing import flagsaver

import memory
import nets
import op_times
import peer_processes
import report
import step_time
import timing
from architectures import ARCHITECTURES
from tf_dpbn import DPBatchNormalization, DPModel

pytestmark = pytest.mark.once

# ---------------------------------------------------------------------- arithmetic


def test_ratios_are_taken_round_by_round_and_have_the_quartiles_of_numpy():
    # The median of the ratios, not the ratio of the medians (8 / 2).
    assert timing.ratios([2.0, 8.0, 30.0], [1.0, 2.0, 10.0]).median == 3.0
    assert timing.ratios([2.0], [1.0, 100.0]).median == 2.0  # it was slow and left after one round
    values = [5.0, 1.0, 4.0, 2.0, 10.0, 3.0]
    found = timing.quartiles(values)
    np.testing.assert_allclose([found.lower, found.median, found.upper], np.percentile(values, [25, 50, 75]))


def test_steps_take_turns_and_slow_ones_leave_early():
    calls = []

    def step(name, milliseconds):
        return lambda: calls.append(name) or milliseconds

    steps = {"a": step("a", 1.0), "b": step("b", 2.0), "slow": step("slow", timing.SLOW_MILLISECONDS)}
    times = timing.take_turns(steps, rounds=3, slow_rounds=1, warm_up=2)
    assert calls[:6] == ["a", "a", "b", "b", "slow", "slow"]
    assert calls[6:] == ["a", "b", "slow", "b", "a", "a", "b"]  # each round begins with the next one
    assert times == {"a": [1.0] * 3, "b": [2.0] * 3, "slow": [timing.SLOW_MILLISECONDS]}


def test_memory_is_read_in_bytes():
    status = "Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n"
    assert memory.resident("VmRSS", status) == 2**20 and memory.resident("VmHWM", status) == 2**21


def test_profiles_name_kinds_of_operations():
    pytest.importorskip("tensorflow.tsl.profiler.protobuf.xplane_pb2")
    product = tf.function(lambda x: tf.cumsum(x), autograph=False)
    x = tf.ones([100, 100])
    found = {kind: (milliseconds, calls) for kind, milliseconds, calls in op_times.op_times(lambda: product(x).numpy())}
    assert found["Cumsum"][0] > 0.0 and found["Cumsum"][1] == 1.0


# ---------------------------------------------------------------------- networks and settings


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_both_sides_run_the_network_whose_parameters_peers_have(name):
    without = nets.build(name, nets.no_normalization, tf.keras.Model)
    assert without.count_params() == ARCHITECTURES[name].parameters
    plain = nets.build(name, tf.keras.layers.BatchNormalization, tf.keras.Model)
    ours = nets.build(name, DPBatchNormalization, DPModel)
    ours.set_weights(plain.get_weights())
    x = tf.random.uniform((2, *ARCHITECTURES[name].image), seed=0)
    np.testing.assert_allclose(ours(x, training=False), plain(x, training=False), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nets": ["resnet8", "vgg"]}, "`nets` must be among tutorial_cnn, resnet8, resnet20. Received: vgg"),
        ({"batch_sizes": [0]}, r"`batch_sizes` must be at least 1. Received: \[0\]"),
        ({"statistics": ["private"]}, "`statistics` must be .* Received: .*'private'"),
        ({"memory": True, "peers": ["opacus"]}, "`memory` measures neither peers nor profiles"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        step_time.check(step_time.Config(**settings))


# ---------------------------------------------------------------------- runs

FAKE_PEER = """
from peers import protocol

def make_step():
    return lambda: print("what libraries print is no answer")

def make_broken_step():
    raise KeyError("no such mode")

def build(net, batch_size):
    steps = {"plain": make_step, "broken": make_broken_step, "ghost groupnorm": make_step}
    return protocol.Build(steps, {"none": 5, "groupnorm": 7})

protocol.serve((), build)
"""


@pytest.fixture
def fake_peer(monkeypatch):
    """A process that takes part in the place of Opacus."""
    peer = peer_processes.Peer("opacus", [sys.executable, "-c", FAKE_PEER])
    monkeypatch.setattr(peer_processes, "interpreter_of", lambda name: None)
    monkeypatch.setattr(peer_processes, "running", lambda interpreters: contextlib.nullcontext([peer]))
    yield peer
    peer.close()


def test_a_tiny_run_compares_step_times_and_appends_lines(fake_peer, tmp_path, capsys):
    path = tmp_path / "times.jsonl"
    path.write_text("{}\n")
    size = ("--nets=tutorial_cnn", "--batch_sizes=8", "--repeats=2", "--warm_up=1", "--public_batch=4")
    with flagsaver.flagsaver():
        step_time.define_flags()
        flags.FLAGS(["step_time", *size, "--statistics=public,none", "--peers=opacus", f"--json={path}"])
        step_time.main(["step_time"])
    printed = capsys.readouterr()
    first, *lines = path.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    found = {row["variant"]: row for row in rows if row["measured"] == "time"}
    private, bare = "tf_dpbn book_keeping public", "tf_dpbn book_keeping without normalization"
    assert first == "{}" and set(found) == {"plain", private, bare, "opacus plain", "opacus ghost groupnorm"}
    for variant, row in found.items():
        lower, upper = row["milliseconds_quartiles"]
        assert row["rounds"] == 2 and 0.0 < lower <= row["milliseconds"] <= upper
        assert row["microseconds_per_example"] == pytest.approx(125.0 * row["milliseconds"])
        assert variant in printed.out
    parameters = ARCHITECTURES["tutorial_cnn"].parameters
    assert found[private]["parameters"] == found["plain"]["parameters"] == parameters + 2 * (16 + 32)
    assert found[bare]["parameters"] == parameters and found[private]["ratio_to_plain"] > 0.0
    assert "left out broken: KeyError: 'no such mode'" in printed.err
    peer = found["opacus ghost groupnorm"]
    assert peer["own_plain"] == "opacus plain groupnorm" and peer["parameters"] == 7
    assert peer["ratio_to_own_plain"] is None  # its plain step did not take part
    comparisons = {row["variant"]: row["peer"] for row in rows if row["measured"] == "comparison"}
    assert comparisons == {private: "opacus ghost groupnorm", bare: "opacus ghost groupnorm"}
    with pytest.raises(RuntimeError, match="opacus ended with 1 at.*(?s:.)*KeyError: 'unknown'"):
        fake_peer.step("unknown")


@pytest.mark.thorough
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_memory_is_measured_in_a_process_of_its_own():
    config = step_time.Config(
        nets=("tutorial_cnn",), batch_sizes=(8,), public_batch=4, plain=False, memory=True, memory_repeats=1
    )
    (row,) = step_time.run(config)
    assert row["measured"] == "memory" and row["parameters"] > 26_000
    assert 0 < row["above_start_bytes"] < row["process_bytes"] < 2**31
    assert row["variant"] in report.render([row])
