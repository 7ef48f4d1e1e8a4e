"""Several replicas do what one does: the same update, statistics, logs and ledger, with one draw of noise."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tf_dpbn._keras import IS_KERAS_3

ROOT = pathlib.Path(__file__).resolve().parent.parent


def _run(*arguments: str, **environment: str) -> str:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def replicas():
    return json.loads(_run("-m", "tests.replicas"))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["public", "anchored", "noised", "sum"])
def test_a_batch_split_over_replicas_gives_the_update_statistics_logs_and_ledger_of_one(replicas, case):
    found = replicas[case]
    assert max(found["weights"]) < 1e-5
    assert max(found["logs"]) < 1e-5
    assert max(found["copies"]) == 0.0
    assert set(found["steps"]) == {4}


@pytest.mark.slow
def test_noise_is_that_of_one_draw(replicas):
    for scale in replicas["noise"]:
        assert 0.97 < scale < 1.03  # 20,200 numbers: six standard errors; two draws would give 1.41


@pytest.mark.slow
def test_dropout_is_independent_across_replicas(replicas):
    assert 0.4 < replicas["dropout"] < 0.6


@pytest.mark.slow
def test_what_replicas_cannot_do_alike_is_refused(replicas):
    outside, accumulation, rows, trained = replicas["refusals"]
    assert "`optimizer` must be built within the scope" in outside and "with strategy.scope()" in outside
    assert "`accumulation_steps` must be 1 on several replicas" in accumulation
    assert "9 rows" in rows and "equally many rows for each of the 2 replicas" in rows
    assert trained == "9"  # rows are rounded up, the law of the draws is not


@pytest.mark.slow
@pytest.mark.skipif(IS_KERAS_3, reason="Keras 3 cannot fit under MultiWorkerMirroredStrategy")
def test_two_processes_train_to_the_ledger_of_one():
    script = str(ROOT / "examples" / "multi_worker.py")
    line = _run(script, "--workers=2", "--epochs=2", "--batch_size=100", "--max_examples=400", TF_USE_LEGACY_KERAS="1")
    result = json.loads(line)
    assert result["steps"] == 8 and result["replicas"] == 2
    assert 7.9 < result["epsilon"] <= 8.0


MULTI_WORKER = """
import warnings
import numpy as np
import tensorflow as tf
strategy = tf.distribute.MultiWorkerMirroredStrategy()
import tf_dpbn
keras = tf.keras
x = np.ones((40, 3), "float32")
outside = tf_dpbn.sampling.poisson_dataset(x, x[:, :1], expected_batch_size=8, max_batch_size=16)
with strategy.scope():
    inputs = keras.Input((3,))
    model = tf_dpbn.DPModel(inputs, keras.layers.Dense(1)(inputs))
    optimizer = tf_dpbn.DPOptimizer(keras.optimizers.SGD(0.1), 1.0, 1.0, expected_batch_size=8)
    try:
        model.compile(optimizer, "mse")
        model.fit(outside, verbose=0)
    except (ValueError, NotImplementedError) as error:
        print(str(error).replace("\\n", " "))
"""


@pytest.mark.slow
def test_workers_that_draw_for_themselves_are_refused_and_keras_3_under_this_strategy_too():
    message = _run("-c", MULTI_WORKER)
    expected = "TF_USE_LEGACY_KERAS=1" if IS_KERAS_3 else "be drawn alike by all workers"
    assert expected in message
