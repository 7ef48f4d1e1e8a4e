"""The benchmarks: their arithmetic, the networks, the exchange with peers, and a tiny run of each kind."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import memory
import nets
import op_times
import peer_processes
import report
import step_time
import timing
import variants
from architectures import ARCHITECTURES
from tf_dpbn import DPBatchNormalization, DPModel

SCRIPT = pathlib.Path(step_time.__file__)
TINY = {"nets": ("tutorial_cnn",), "batch_sizes": (8,), "public_batch": 4}

# ---------------------------------------------------------------------- timing


@pytest.mark.keras_free
def test_quartiles_are_those_of_numpy():
    values = [5.0, 1.0, 4.0, 2.0, 10.0, 3.0]
    found = timing.quartiles(values)
    np.testing.assert_allclose([found.lower, found.median, found.upper], np.percentile(values, [25, 50, 75]))
    assert timing.quartiles([7.0]) == timing.Quartiles(7.0, 7.0, 7.0)


@pytest.mark.keras_free
def test_ratios_are_taken_round_by_round():
    # The median of the ratios, not the ratio of the medians (8 / 2).
    assert timing.ratios([2.0, 8.0, 30.0], [1.0, 2.0, 10.0]).median == 3.0
    assert timing.ratios([2.0], [1.0, 100.0]).median == 2.0  # it was slow and left after one round


@pytest.mark.keras_free
def test_steps_take_turns_and_slow_ones_leave_early():
    calls = []

    def step(name, milliseconds):
        return lambda: calls.append(name) or milliseconds

    steps = {"a": step("a", 1.0), "b": step("b", 2.0), "slow": step("slow", timing.SLOW_MILLISECONDS)}
    times = timing.take_turns(steps, rounds=3, slow_rounds=1, warm_up=2)
    assert calls[:6] == ["a", "a", "b", "b", "slow", "slow"]
    assert calls[6:] == ["a", "b", "slow", "b", "a", "a", "b"]  # each round begins with the next one
    assert times == {"a": [1.0] * 3, "b": [2.0] * 3, "slow": [timing.SLOW_MILLISECONDS]}


@pytest.mark.keras_free
def test_a_timed_step_runs_and_returns_milliseconds():
    ran = []
    assert 0.0 <= timing.timed(lambda: ran.append(1))() < 1e3 and ran == [1]


# ---------------------------------------------------------------------- networks


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_networks_have_the_parameters_that_peers_are_compared_with(name):
    assert nets.build(name, nets.no_normalization, tf.keras.Model).count_params() == ARCHITECTURES[name].parameters


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_both_sides_run_the_same_network(name):
    plain = nets.build(name, tf.keras.layers.BatchNormalization, tf.keras.Model)
    ours = nets.build(name, DPBatchNormalization, DPModel)
    ours.set_weights(plain.get_weights())
    x = tf.random.uniform((2, *ARCHITECTURES[name].image), seed=0)
    np.testing.assert_allclose(ours(x, training=False), plain(x, training=False), rtol=1e-5, atol=1e-5)


@pytest.mark.keras_free
def test_labels_tell_variants_apart():
    config = step_time.Config(engine=("book_keeping", "loop"), microbatch_size=(0, 4), norm_method="gram")
    found = [variant.label for variant in step_time.variants_of(config, "resnet8", 8)]
    config = step_time.Config(statistics=("none",), plain=False)
    found += [variant.label for variant in step_time.variants_of(config, "resnet8", 8)]
    assert found == [
        "plain",
        "tf_dpbn book_keeping public gram",
        "tf_dpbn book_keeping public gram microbatch=4",
        "tf_dpbn loop public",
        "tf_dpbn loop public microbatch=4",
        "tf_dpbn book_keeping without normalization",
    ]


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nets": ["resnet8", "vgg"]}, "`nets` must be among tutorial_cnn, resnet8, resnet20. Received: vgg"),
        ({"engine": ["fast"]}, "`engine` must be among book_keeping.* Received: fast"),
        ({"peers": ["objax"]}, "`peers` must be among opacus.* Received: objax"),
        ({"batch_sizes": [0]}, r"`batch_sizes` must be at least 1. Received: \[0\]"),
        ({"microbatch_size": [-1]}, r"`microbatch_size` must be at least 0. Received: \[-1\]"),
        ({"statistics": ["private"]}, "`statistics` must be .* Received: .*'private'"),
        ({"memory": True, "peers": ["opacus"]}, "`memory` measures neither peers nor profiles"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        step_time.check(step_time.Config(**settings))


@pytest.mark.once
def test_a_private_step_without_normalization_has_the_weights_of_the_peers_network():
    config = step_time.Config(statistics=("none",), plain=False)
    (variant,) = step_time.variants_of(config, "tutorial_cnn", 4)
    step = variants.Step(variant)
    step()
    assert step.parameters == ARCHITECTURES["tutorial_cnn"].parameters


@pytest.mark.keras_free
def test_a_missing_environment_of_a_peer_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(peer_processes, "_HERE", tmp_path / "benchmarks")
    with pytest.raises(FileNotFoundError, match=r"\.venv-peer-jax.*make bench-peers"):
        peer_processes.interpreter_of("jax_privacy")


# ---------------------------------------------------------------------- peers

FAKE_PEER = """
from peers import protocol

def make_step():
    return lambda: print("what libraries print is no answer")

def make_broken_step():
    raise KeyError("no such mode")

def build(net, batch_size):
    if net == "resnet20":
        raise NotImplementedError("too large")
    steps = {"plain": make_step, "broken": make_broken_step, "ghost groupnorm": make_step}
    return protocol.Build(steps, {"none": 5, "groupnorm": 7})

protocol.serve((), build)
"""


@pytest.fixture
def fake_peer():
    peer = peer_processes.Peer("opacus", [sys.executable, "-c", FAKE_PEER])
    yield peer
    peer.close()


@pytest.mark.keras_free
def test_a_peer_builds_and_steps(fake_peer):
    offer = fake_peer.build("resnet8", 8)
    assert offer == {
        "parameters": {"none": 5, "groupnorm": 7},
        "variants": ["plain", "ghost groupnorm"],
        "refused": {"broken": "KeyError: 'no such mode'"},
        "versions": {},
    }
    assert 0.0 <= fake_peer.step("plain") < 1e3
    assert fake_peer.build("resnet20", 8)["refused"] == {"all": "too large"}


@pytest.mark.keras_free
def test_a_peer_that_ends_is_reported_with_what_it_wrote(fake_peer):
    fake_peer.build("resnet8", 8)
    with pytest.raises(RuntimeError, match="opacus ended with 1 at.*(?s:.)*KeyError: 'unknown'"):
        fake_peer.step("unknown")


def test_peers_are_compared_by_their_fastest_private_step(fake_peer):
    config = step_time.Config(**TINY, repeats=2, warm_up=1)
    rows = step_time.time_rows(config, step_time.variants_of(config, "tutorial_cnn", 8), [fake_peer])
    peers = {row["variant"]: row for row in rows if row.get("package") == "opacus"}
    assert peers["opacus plain"]["own_plain"] == "opacus plain" and peers["opacus plain"]["parameters"] == 5
    assert peers["opacus ghost groupnorm"]["own_plain"] == "opacus plain groupnorm"
    assert peers["opacus ghost groupnorm"]["parameters"] == 7
    assert peers["opacus ghost groupnorm"]["ratio_to_own_plain"] is None  # which did not take part
    (comparison,) = (row for row in rows if row["measured"] == "comparison")
    assert comparison["variant"] == "tf_dpbn book_keeping public"
    assert comparison["peer"] == "opacus ghost groupnorm" and comparison["ratio"] > 0.0


# ---------------------------------------------------------------------- runs


@pytest.mark.slow
@pytest.mark.once
def test_a_tiny_run_prints_a_table_and_appends_lines(tmp_path):
    path = tmp_path / "times.jsonl"
    path.write_text("{}\n")
    arguments = ["--nets=tutorial_cnn", "--batch_sizes=8", "--repeats=2", "--warm_up=1", "--public_batch=4"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments, f"--json={path}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])},
    )
    assert done.returncode == 0, done.stderr
    first, *lines = path.read_text().splitlines()
    assert first == "{}"
    plain, ours = map(json.loads, lines)
    for row in (plain, ours):
        assert (row["measured"], row["net"], row["batch_size"], row["rounds"]) == ("time", "tutorial_cnn", 8, 2)
        lower, upper = row["milliseconds_quartiles"]
        assert 0.0 < lower <= row["milliseconds"] <= upper
        assert row["microseconds_per_example"] == pytest.approx(125.0 * row["milliseconds"])
        assert row["cores"] >= 1 and row["versions"]["tensorflow"] == tf.__version__
        assert row["variant"] in done.stdout
    assert plain["ratio_to_plain"] == 1.0 and plain["engine"] is None
    assert ours["ratio_to_plain"] > 0.0 and ours["engine"] == "book_keeping" and ours["statistics"] == "public"
    assert plain["parameters"] == ours["parameters"] == ARCHITECTURES["tutorial_cnn"].parameters + 2 * (16 + 32)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
@pytest.mark.once
def test_memory_is_measured_in_processes_of_their_own(tmp_path):
    path = tmp_path / "memory.jsonl"
    config = step_time.Config(**TINY, microbatch_size=(4,), memory=True, memory_repeats=1, json=str(path))
    rows = step_time.run(config)
    assert rows == [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["variant"] for row in rows] == ["plain", "tf_dpbn book_keeping public microbatch=4"]
    for row in rows:
        assert row["measured"] == "memory" and row["parameters"] > 26_000
        assert 0 < row["above_graph_bytes"] < row["above_start_bytes"] < row["process_bytes"] < 2**31
    assert rows[0]["above_start_ratio_to_plain"] == 1.0 and rows[1]["above_start_ratio_to_plain"] > 0.0


def test_a_failing_measurement_shows_its_error():
    with pytest.raises(RuntimeError, match="KeyError: 'vgg'"):
        memory.measure(variants.Variant(net="vgg", batch_size=8))


@pytest.mark.keras_free
def test_memory_is_read_in_bytes():
    status = "Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n"
    assert memory.resident("VmRSS", status) == 2**20 and memory.resident("VmHWM", status) == 2**21
    with pytest.raises(ValueError, match="VmSwap"):
        memory.resident("VmSwap", status)


@pytest.mark.keras_free
def test_profiles_name_kinds_of_operations():
    pytest.importorskip("tensorflow.tsl.profiler.protobuf.xplane_pb2")
    product = tf.function(lambda x: tf.cumsum(x), autograph=False)
    x = tf.ones([100, 100])
    found = {kind: (milliseconds, calls) for kind, milliseconds, calls in op_times.op_times(lambda: product(x).numpy())}
    assert found["Cumsum"][0] > 0.0 and found["Cumsum"][1] == 1.0


@pytest.mark.keras_free
def test_tables_show_medians_and_quartiles():
    row = {
        "measured": "time",
        "net": "resnet8",
        "batch_size": 64,
        "variant": "plain",
        "milliseconds": 12.345,
        "milliseconds_quartiles": [12.0, 13.0],
        "ratio_to_plain": None,
        "ratio_to_plain_quartiles": None,
        "microseconds_per_example": 192.9,
        "rounds": 15,
    }
    header, line = report.render([row]).splitlines()
    assert header.split() == ["net", "batch", "variant", "ms", "/", "plain", "us/example", "rounds"]
    assert re.split(r"\s{2,}", line) == ["resnet8", "64", "plain", "12.35 [12.00, 13.00]", "-", "192.9", "15"]
