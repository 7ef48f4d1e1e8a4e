"""Several replicas do what one does: the same update, statistics, logs and ledger, with one draw of noise."""

from __future__ import annotations

import json
import re
import types

import numpy as np
import pytest
import tensorflow as tf

import tf_dpbn
from tests import helpers
from tests.programs import ROOT, last_line
from tf_dpbn._keras import IS_KERAS_3
from tf_dpbn.model import checks
from tf_dpbn.sampling import poisson_dataset


def noised():
    return tf_dpbn.DPBatchNormalization(statistics="noised")


def test_a_strategy_of_one_device_trains_with_noised_statistics_and_reports_corrections():
    x, y = helpers.images(8)
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        model = helpers.bn_stack(2, noised, model=tf_dpbn.DPModel)
        helpers.compiled(model, optimizer=helpers.dp_optimizer(expected_batch_size=4), stub=True)
        model.set_public_batch(x + 1)
        assert [kind for _, kind in model.correction_report()] == ["local", "local"]
        batches = poisson_dataset(x, y, expected_batch_size=4, max_batch_size=8)
        assert np.isfinite(model.fit(batches, verbose=0).history["loss"]).all()
    assert model.ledger.steps == 2


@pytest.mark.slow
def test_replicas_do_what_one_device_does():
    """One test, so that the program runs once."""
    found = json.loads(last_line("-m", "tests.replicas"))
    for case in ("statistics", "sum"):
        assert found[case]["weights"] < 1e-5, case
        assert found[case]["logs"] < 1e-5, case
        assert found[case]["copies"] == 0.0, case
        assert found[case]["steps"] == [4, 4], case
    assert 0.97 < found["noise"] < 1.03  # 20,200 numbers: six standard errors; two draws would give 1.41
    assert 0.4 < found["dropout"] < 0.6
    if IS_KERAS_3:  # hands the whole batch to each replica
        assert "`train_on_batch` cannot be used on 2 replicas" in found["train_on_batch"]
    else:
        assert found["train_on_batch"] < 1e-6
    outside, inner, eagerly, rows, trained = found["refusals"]
    for message in (outside, inner):
        assert "`optimizer` must be built" in message and "with strategy.scope()" in message
    assert "`run_eagerly` must be False" in eagerly
    assert "9 rows" in rows and "equally many rows for each of the 2 replicas" in rows
    assert trained == "9"  # rows are rounded up, the distribution of the draws is not


@pytest.mark.slow
@pytest.mark.both
@pytest.mark.skipif(IS_KERAS_3, reason="Keras 3 cannot fit under MultiWorkerMirroredStrategy")
def test_two_processes_train_to_the_ledger_of_one():
    script = str(ROOT / "examples" / "multi_worker.py")
    line = last_line(
        script, "--workers=2", "--epochs=2", "--batch_size=100", "--max_examples=400", TF_USE_LEGACY_KERAS="1"
    )
    result = json.loads(line)
    assert result["steps"] == 8 and result["replicas"] == 2
    assert 7.9 < result["epsilon"] <= 8.0


@pytest.mark.slow
@pytest.mark.both
@pytest.mark.skipif(IS_KERAS_3, reason="Keras 3 cannot fit under MultiWorkerMirroredStrategy")
def test_no_two_workers_count_the_same_example():
    """Seeds of their own, and one worker that looks at the data once more than the other."""
    result = json.loads(last_line(str(ROOT / "tests" / "workers.py")))
    assert 0.99 < result["largest"] < 1.001
    assert result["steps"] == 6 and len(result["draws"]) == 6  # fresh ones in every epoch
    for attempt in ("arrays", "batches", "outside"):
        assert "be drawn alike by all workers" in result[attempt]
    assert "be the same on all workers, in the same order" in result["order"]


@pytest.mark.thorough
def test_the_refusal_of_keras_3_under_several_workers_is_still_needed():
    """Where this fails on a new Keras: lift the refusal in checks.py, and run the two tests above on Keras 3, too."""
    found = json.loads(last_line(str(ROOT / "tests" / "stock_workers.py")))
    if IS_KERAS_3:  # in _maybe_symbolic_build, or in reduce_per_replica: Keras' trainer fails in both
        assert re.search("^Attempt to convert a value .PerReplica|^Invalid reduction dimension", found["error"]), found
    else:
        assert found["apart"] < 1e-6


@pytest.mark.skipif(not IS_KERAS_3, reason="tf_keras can")
def test_keras_3_under_several_workers_is_refused_with_the_remedy():
    several_workers = object.__new__(tf.distribute.MultiWorkerMirroredStrategy)  # which needs a process of its own
    optimizer = types.SimpleNamespace(is_built_in=lambda strategy: True)
    with pytest.raises(NotImplementedError, match="TF_USE_LEGACY_KERAS=1.*Received: Keras 3"):
        checks.check_replicas(several_workers, optimizer, run_eagerly=False)
