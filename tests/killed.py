"""Kills trainings that have a ledger file, at random times, and compares the file with the steps that they took.

    python -m tests.killed --directory=$(mktemp -d) --kills=50
    python -m tests.killed --directory=$(mktemp -d) --kills=50 --file_only      (without TensorFlow)

Each training goes on with the file of those before, and with their checkpoint if there is one. Memory that it shares
with the parent says how many steps it took. Prints one line of JSON; a count that is not right is an AssertionError.
"""

from __future__ import annotations

import json
import mmap
import os
import pathlib
import random
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from absl import app, flags

from tf_dpbn import accounting

PLAN = {"noise_multiplier": 2.0, "delta": 1e-3, "num_examples": 16, "expected_batch_size": 4, "epochs": 4}
_STARTED = 1 << 32  # how the ledger of a training says that it is known, also if it is empty


class Counts:
    """Two numbers in memory that a process shares with those it forks."""

    def __init__(self) -> None:
        self._memory = memoryview(mmap.mmap(-1, 16)).cast("q")

    @property
    def taken(self) -> int:
        """How many steps the training has taken."""
        return self._memory[0]

    @taken.setter
    def taken(self, steps: int) -> None:
        self._memory[0] = steps

    @property
    def resumed(self) -> int | None:
        """How many steps were in the ledger when the training began; None if it has not begun."""
        return self._memory[1] - _STARTED if self._memory[1] else None

    @resumed.setter
    def resumed(self, steps: int) -> None:
        self._memory[1] = steps + _STARTED


def count(path: pathlib.Path, counts: Counts, number: int) -> None:
    """Steps that are counted; the file is closed and opened again as between calls of `fit`."""
    plan, file = accounting.PrivacyPlan(**PLAN), accounting.LedgerFile(path, f"run{number}")
    record = plan.record(1)

    def ran() -> accounting.Ledger:
        return accounting.Ledger([plan.record(counts.taken)])

    counts.resumed = sum(ledger.steps for ledger in file.open().values())
    while True:
        for _ in range(random.randrange(20)):
            file.reserve(1, ran, record)
            counts.taken += 1
        file.close(ran())
        file.open()


def train(path: pathlib.Path, counts: Counts, number: int, calls: int | None = None) -> None:
    """A small model, with checkpoints; with `calls` so many calls of `train_on_batch` at the end of it."""
    import numpy as np

    import tf_dpbn
    from tf_dpbn._keras import keras

    plan, checkpoint = tf_dpbn.PrivacyPlan(**PLAN), path.parent / "checkpoint.weights.h5"
    x = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
    inputs = keras.Input((3,))
    model = tf_dpbn.DPModel(inputs, keras.layers.Dense(2)(tf_dpbn.DPBatchNormalization()(inputs)))
    model.set_public_batch(tf_dpbn.public_data.uniform_noise((3,), 6, seed=0))
    optimizer = tf_dpbn.DPOptimizer.from_plan(plan, keras.optimizers.SGD(0.01), 1.0)
    model.compile(optimizer, "mse", steps_per_execution=1 + number % 2, ledger_file=path)
    if checkpoint.exists():
        model.load_weights(checkpoint)
    counts.resumed = model.ledger.steps

    def note(*_: Any, **__: Any) -> None:
        counts.taken = sum(optimizer.counted_steps().values())

    def save(*_: Any, **__: Any) -> None:
        unfinished = path.parent / "unfinished.weights.h5"
        model.save_weights(unfinished)
        os.replace(unfinished, checkpoint)

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=note, on_epoch_end=save)
    budget = tf_dpbn.callbacks.PrivacyBudget(1e6)  # says that going beyond the plan is meant
    data = plan.poisson_dataset(x, x[:, :2])
    for _ in range(calls or 0):
        model.train_on_batch(x[:4], x[:4, :2])
        note()
    while calls is None:
        model.fit(data, epochs=random.randrange(1, 6), verbose=0, callbacks=[callback, budget])


def states(path: pathlib.Path) -> dict[str, list[int]]:
    """The numbers of steps in a file's lines by run, as a reader sees them who knows nothing of checksums."""
    found: dict[str, list[int]] = {}
    for line in path.read_text().splitlines()[1:] if path.exists() else []:
        _, run, ledger = line.split(" ", 2)
        found.setdefault(run, [0]).append(sum(entry["steps"] for entry in json.loads(ledger)["entries"]))
    return found


def fork(training: Callable[..., None], *args: Any) -> int:
    """Starts a process, whose number is returned."""
    process = os.fork()
    if not process:
        random.seed()
        training(*args)
        sys.exit()
    return process


def check(path: pathlib.Path, before: dict[str, list[int]], counts: Counts) -> tuple[int, int]:
    """Compares what a training left in the file with its steps; returns how many it says, and how many too many."""
    after = states(path)
    assert all(after[run] == lines for run, lines in before.items()), "lines of another run have changed"
    lines = [lines for run, lines in after.items() if run not in before]
    assert len(lines) <= 1, "a training that wrote for two runs"
    (*_, block_before, last) = lines[0] if lines else (0, 0)
    assert min(block_before, last) <= counts.taken <= last, (block_before, counts.taken, last)
    expected = sum(lines[-1] for lines in before.values())
    assert counts.resumed in (None, expected), (counts.resumed, expected)
    return last, last - counts.taken


def main(_: Any) -> None:
    random.seed(flags.FLAGS.seed)
    training, longest = (count, 0.02) if flags.FLAGS.file_only else (train, 1.0)
    if not flags.FLAGS.file_only:
        import tf_dpbn.model  # noqa: F401  imported once for all, and not used: TensorFlow's threads would not survive
    path, taken, written, over = pathlib.Path(flags.FLAGS.directory, "ledger"), 0, 0, []
    for number in range(flags.FLAGS.kills):
        before, counts = states(path), Counts()
        process = fork(training, path, counts, number)
        is_early = random.random() < 0.1  # in its first moments, and else within its steps
        while not is_early and not counts.taken:
            assert os.waitpid(process, os.WNOHANG) == (0, 0), "a training that failed"
            time.sleep(1e-4)
        time.sleep(random.uniform(0.0, longest))
        os.kill(process, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(process, 0)[1]), "a training that failed"
        last, too_many = check(path, before, counts)
        taken, written = taken + counts.taken, written + last
        over.append(too_many)
    if not flags.FLAGS.file_only:  # one that ends by itself
        before, counts = states(path), Counts()
        assert os.waitpid(fork(train, path, counts, 0, 5), 0)[1] == 0
        assert check(path, before, counts) == (5, 0)
    print(json.dumps({"killed": len(over), "taken": taken, "written": written, "most_over": max(over)}))


if __name__ == "__main__":  # where tests import this, the flags of examples are others
    flags.DEFINE_string("directory", None, "An empty one, for ledger file and checkpoint.", required=True)
    flags.DEFINE_integer("kills", 50, "How many trainings are killed, one after the other.", lower_bound=1)
    flags.DEFINE_boolean("file_only", False, "Steps do nothing but to be counted.")
    flags.DEFINE_integer("seed", 0, "Of the times at which trainings are killed.")
    app.run(main)
