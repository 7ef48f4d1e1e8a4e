"""Ledger files: never fewer steps than ran, whenever a training dies; what is not as it was written is refused."""

import dataclasses
import functools
import json
import math
import os

import pytest
import tensorflow as tf

import tf_dpbn
from tests import helpers, killed, programs
from tf_dpbn._keras import keras
from tf_dpbn.accounting import Ledger, LedgerFile, ledger_file
from tf_dpbn.model import checks, training_record

layers = keras.layers
DELTA = 1e-3
X, _ = helpers.images(16, (3,))
Y = X[:, :2]
PLAN = tf_dpbn.PrivacyPlan(noise_multiplier=2.0, delta=DELTA, num_examples=16, expected_batch_size=4, epochs=4)
ONE = PLAN.record(1)


def ledger(steps):
    return Ledger([PLAN.record(steps)])


def read(path):
    """What a file says of each run, without a line more."""
    file = LedgerFile(path, "reader")
    try:
        return file.open()
    finally:
        file.close(Ledger())


def read_unlocked(path):
    """All steps in a file, which a training may have open."""
    return sum(numbers[-1] for numbers in killed.states(path).values())


def write(path, run="a", steps=3):
    """A file whose `run` has taken some steps and has ended."""
    file = LedgerFile(path, run)
    file.open()
    for step in range(steps):
        file.reserve(1, functools.partial(ledger, step), ONE)
    file.close(ledger(steps))


@pytest.fixture(autouse=True)
def _blocks_double(monkeypatch):
    """However slow the machine is."""
    monkeypatch.setattr(ledger_file, "_BLOCK_SECONDS", math.inf)


@pytest.fixture
def unsynced(monkeypatch):
    """Without the wait for the disk, in tests of many files."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# ---------------------------------------------------------------------- the file by itself


def test_the_file_is_ahead_of_each_step_until_it_is_closed(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor, fsync=os.fsync: (synced.append(descriptor), fsync(descriptor)))
    file = LedgerFile(tmp_path / "ledger", "a")
    assert file.open() == {}
    ahead = []
    for step in range(100):
        file.reserve(1, functools.partial(ledger, step), ONE)
        ahead.append(read_unlocked(tmp_path / "ledger") - step)
    assert min(ahead) == 1 and max(ahead) == 64
    assert len(synced) == 1 + 7  # of the directory; blocks of 1 to 64
    file.close(ledger(100))
    assert read(tmp_path / "ledger") == {"a": ledger(100)}


def test_blocks_are_as_many_steps_as_take_a_second(tmp_path, monkeypatch, unsynced):
    now, blocks = [0.0], []
    monkeypatch.setattr(ledger_file, "_BLOCK_SECONDS", 1.0)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    file = LedgerFile(tmp_path / "ledger", "a")
    file.open()
    for step in range(400):
        file.reserve(1, lambda step=step: blocks.append(step) or Ledger(), ONE)
        now[0] += 0.1 if step < 200 else 3.0
    file.close(Ledger())
    sizes = [after - before for before, after in zip(blocks, blocks[1:], strict=False)]
    assert sizes[:6] == [1, 2, 4, 8, 16, 8] and set(sizes[6:15]) == {8, 16}
    assert set(sizes[-50:]) == {1}


def test_a_call_of_many_steps_is_written_whole(tmp_path):
    file = LedgerFile(tmp_path / "ledger", "a")
    file.open()
    for call in range(10):
        file.reserve(5, functools.partial(ledger, 5 * call), ONE)
        assert read_unlocked(tmp_path / "ledger") >= 5 * (call + 1)
    file.close(ledger(50))


def test_steps_of_another_cost_are_written_as_such(tmp_path):
    file = LedgerFile(tmp_path / "ledger", "a")
    file.open()
    file.reserve(1, Ledger, ONE)
    file.reserve(1, lambda: ledger(1), ONE)  # of a block of two
    other = dataclasses.replace(ONE, noise_multipliers=(1.0,))
    file.reserve(1, lambda: ledger(2), other)
    assert '"noise_multipliers": [1.0]' in (tmp_path / "ledger").read_text()
    file.close(Ledger([PLAN.record(2), other]))
    assert read(tmp_path / "ledger") == {"a": Ledger([PLAN.record(2), other])}


def test_runs_of_one_file_are_kept(tmp_path):
    write(tmp_path / "ledger", "a", 3)
    write(tmp_path / "ledger", "b", 4)
    write(tmp_path / "ledger", "a", 5)
    assert read(tmp_path / "ledger") == {"a": ledger(5), "b": ledger(4)}


def test_a_line_cut_short_is_ignored_and_overwritten(tmp_path, unsynced):
    write(tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    ends = [k + 1 for k, byte in enumerate(content) if byte == ord("\n")]
    for cut in {*range(0, ends[0]), *range(ends[-2], ends[-1] - 1), *ends[:-1]}:
        path = tmp_path / f"cut{cut}"
        path.write_bytes(content[:cut])
        before = sum(each.steps for each in read(path).values())
        assert before == [0, 0, 1, 3][sum(end <= cut for end in ends)]
        assert path.read_bytes() == content[:cut]
        write(path, "b", 7)
        assert sum(each.steps for each in read(path).values()) == before + 7
        assert len(path.read_text().splitlines()) == max(1, sum(end <= cut for end in ends)) + 3


def test_any_other_change_is_refused_and_the_file_kept(tmp_path, unsynced):
    path = tmp_path / "ledger"
    write(path)
    write(path, "b")
    content = path.read_bytes()
    changed = [content[:k] + bytes([content[k] ^ 1]) + content[k + 1 :] for k in range(len(content))]
    kept = content.splitlines(keepends=True)
    changed += [b"".join(kept[:k] + kept[k + 1 :]) for k in range(1, len(kept) - 1)]  # a line is missing
    changed += [
        b"".join([*kept[:2], kept[3], kept[2], *kept[4:]]),
        content[:-1],
        content[:-1] + b"\r\n",
        content + b"\n",
    ]
    changed += [content.replace(b'"steps": 3', b'"steps": 2'), b"PK\x03\x04", b"{}\n", content.replace(b"n 1", b"n 2")]
    for each in changed:
        path.write_bytes(each)
        with pytest.raises(ValueError, match="`ledger_file` must be (missing, or a file|as it was written).*Received"):
            read(path)
        assert path.read_bytes() == each


def test_a_file_is_open_once_at_a_time(tmp_path):
    file = LedgerFile(tmp_path / "ledger", "a")
    file.open()
    with pytest.raises(ValueError, match="not be open in another process or for another model. Wait .*Received"):
        read(tmp_path / "ledger")
    file.close(Ledger())
    assert read(tmp_path / "ledger") == {}


@pytest.mark.parametrize("fails", ["fsync", "write"])
def test_what_cannot_be_written_is_an_error_and_the_file_stays_whole(fails, tmp_path, monkeypatch):
    file = LedgerFile(tmp_path / "ledger", "a")
    file.open()
    file.reserve(1, Ledger, ONE)
    with monkeypatch.context() as patch:
        if fails == "fsync":
            patch.setattr(os, "fsync", lambda descriptor: 1 // 0)
        else:
            patch.setattr(file, "_file", FullDisk(file._file))
        for _ in range(2):  # the second try must not count on the first one
            with pytest.raises(ZeroDivisionError if fails == "fsync" else OSError):
                file.reserve(1, lambda: ledger(1), ONE)
    file.close(ledger(1))
    assert read(tmp_path / "ledger") == {"a": ledger(1)}


class FullDisk:
    """A file of which the last bytes find no space."""

    def __init__(self, file):
        self._file = file

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, line):
        return self._file.write(line[:-9])


def test_fifty_kills_never_lose_a_step(tmp_path):
    result = json.loads(programs.last_line("-m", "tests.killed", f"--directory={tmp_path}", "--file_only"))
    assert result["killed"] == 50 and 0 < result["taken"] < result["written"]


# ---------------------------------------------------------------------- with a model


def make_model(path, **kwargs):
    inputs = keras.Input((3,))
    optimizer = tf_dpbn.DPOptimizer.from_plan(PLAN, keras.optimizers.SGD(0.01), 1.0)
    model = tf_dpbn.DPModel(inputs, layers.Dense(2)(inputs))
    return helpers.compiled(model, "mse", optimizer, stub=True, ledger_file=path, **kwargs)


def fit(model, *callbacks, epochs=1):
    model.fit(PLAN.poisson_dataset(X, Y), epochs=epochs, verbose=0, callbacks=list(callbacks))


@pytest.mark.both
@pytest.mark.parametrize("steps", [1, 3])
def test_fit_writes_ahead_and_a_resumed_model_has_all_steps(steps, tmp_path):
    path, seen = tmp_path / "ledger", []
    model = make_model(path, steps_per_execution=steps)
    fit(model, keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: model.save_weights(tmp_path / "old.weights.h5")))
    assert read(path) == {model._record._run: ledger(4)} and model.ledger == ledger(4)

    def note(batch, logs):
        seen.append((model.private_steps, read_unlocked(path)))

    with pytest.MonkeyPatch.context() as patch:  # what a program leaves that dies before the end of `fit`
        patch.setattr(LedgerFile, "close", lambda self, ran: setattr(self, "_file", self._file.close()))
        fit(model, keras.callbacks.LambdaCallback(on_train_batch_end=note))
    assert all(taken <= written for taken, written in seen)
    (taken, written) = seen[-1]
    assert taken == 8 < written == read_unlocked(path)

    resumed = make_model(path)
    assert resumed.ledger == ledger(written)
    resumed.load_weights(tmp_path / "old.weights.h5")  # which have taken 4 steps, and say so
    assert resumed.ledger == ledger(written)
    with pytest.warns(tf_dpbn.PrivacyWarning, match=f"take 16 steps after {written} so far"):
        fit(resumed, epochs=4)
    assert resumed.ledger == ledger(written + 16)
    assert read(path) == {model._record._run: ledger(written), resumed._record._run: ledger(16)}


def test_single_batches_are_written_in_blocks_and_the_rest_given_back(tmp_path):
    path = tmp_path / "ledger"
    model = make_model(path)
    fit(model)
    for step in range(1, 8):
        model.train_on_batch(X[:4], Y[:4])
        assert read_unlocked(path) >= 4 + step
    assert len(path.read_text().splitlines()) < 9
    with pytest.raises(ValueError, match="open in another process or for another model"):
        make_model(path)
    training_record._close_files()  # as when Python ends
    assert read(path) == {model._record._run: model.ledger} and model.ledger.steps == 11
    model.train_on_batch(X[:4], Y[:4])  # has the file open; `fit` goes on with it
    fit(model)
    assert read(path) == {model._record._run: model.ledger} and model.ledger.steps == 16
    helpers.compiled(model, "mse", model.optimizer, stub=True)
    before = path.read_bytes()
    model.train_on_batch(X[:4], Y[:4])
    assert path.read_bytes() == before  # compiled without


def test_no_step_runs_that_could_not_be_written(tmp_path, monkeypatch):
    model = make_model(tmp_path / "ledger")
    fit(model)
    weights = helpers.flat(model.get_weights())

    def fail(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(LedgerFile, "_append", fail)
        fit(model)
    assert model.private_steps == 4 and (helpers.flat(model.get_weights()) == weights).all()
    fit(model)
    assert read(tmp_path / "ledger") == {model._record._run: ledger(8)}


def test_a_model_of_which_the_file_is_refused_does_not_train(tmp_path):
    (tmp_path / "ledger").write_text("my notes\n")
    with pytest.raises(ValueError, match="`ledger_file` must be missing, or a file"):
        make_model(tmp_path / "ledger")
    model = make_model(tmp_path / "other")
    with pytest.raises(ValueError, match="`ledger_file` must be missing, or a file"):
        helpers.compiled(model, "mse", model.optimizer, ledger_file=tmp_path / "ledger")
    with pytest.raises(RuntimeError, match=r"Call compile\("):
        fit(model)
    assert (tmp_path / "ledger").read_text() == "my notes\n"


def test_a_loaded_model_goes_on_with_the_file(tmp_path):
    model = make_model(tmp_path / "ledger")
    fit(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert "ledger_file" not in loaded.get_compile_config()
    helpers.compiled(loaded, loaded.loss, loaded.optimizer, stub=True, ledger_file=tmp_path / "ledger")
    fit(loaded)
    assert loaded.ledger == ledger(8) and int(loaded.optimizer.iterations) == 8
    assert {run: each.steps for run, each in read(tmp_path / "ledger").items()} == {
        model._record._run: 4,
        loaded._record._run: 4,
    }
    fit(model)  # of a branch; the other one's steps are in the file
    assert model.ledger == ledger(12)


def test_released_statistics_are_written_at_their_cost(tmp_path):
    path = tmp_path / "ledger"
    inputs = keras.Input((3,))
    model = tf_dpbn.DPModel(
        inputs, layers.Dense(2)(tf_dpbn.DPBatchNormalization(statistics="noised")(layers.Dense(2)(inputs)))
    )
    optimizer = tf_dpbn.DPOptimizer.from_plan(PLAN, keras.optimizers.SGD(0.01), 1.0)
    helpers.compiled(model, "mse", optimizer, stub=True, ledger_file=path)
    epsilons = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda *_, **__: epsilons.append((last_epsilon(path), model.epsilon(DELTA)))
    )
    fit(model, note)
    assert len(epsilons) == 4 and all(written >= taken * (1 - 1e-9) for written, taken in epsilons)
    assert read(path) == {model._record._run: model.ledger} and len(model.ledger.entries[0].noise_multipliers) == 2


def last_epsilon(path):
    return Ledger.from_json(path.read_text().splitlines()[-1].split(" ", 2)[2]).epsilon(DELTA)


def test_several_workers_are_refused():
    several_workers = object.__new__(tf.distribute.MultiWorkerMirroredStrategy)  # which needs a process of its own
    checks.check_ledger_file(several_workers, None)
    with pytest.raises(NotImplementedError, match="`ledger_file` must be None under MultiWorker.*Received"):
        checks.check_ledger_file(several_workers, "ledger")


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=[pytest.mark.thorough, pytest.mark.slow])])
def test_killed_trainings_lose_no_steps(kills, tmp_path):
    arguments = ["-m", "tests.killed", f"--directory={tmp_path}", f"--kills={kills}"]
    result = json.loads(programs.last_line(*arguments))
    assert result["killed"] == kills and 0 < result["taken"] <= result["written"]


def test_a_forked_child_has_no_files_to_close_when_it_exits(tmp_path):
    model = make_model(tmp_path / "ledger")
    assert model._record in training_record._WITH_FILES
    child = os.fork()
    if not child:
        os._exit(len(training_record._WITH_FILES))
    assert os.waitpid(child, 0)[1] == 0
