"""What private training of one model has cost: its ledger, and what is kept of released statistics."""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import uuid
import weakref
from collections.abc import Callable

import tensorflow as tf

from tf_dpbn import _validate
from tf_dpbn.accounting import Ledger, LedgerFile, StepRecord
from tf_dpbn.normalization import ReleasedMeans
from tf_dpbn.optimizers import DPOptimizer
from tf_dpbn.sampling import PoissonSampling

NO_SAVED_MODEL = (
    "tf.saved_model.save cannot save a DPModel. Call `model.export(path)`, which makes a SavedModel for inference."
)


class TrainingRecord(tf.train.experimental.PythonState):
    """The record of one model: no part of its weights, but of its checkpoints (as serialized text).

    Steps are counted by the optimizer, which draws their noise; this record says how their batches were drawn.
    """

    def __init__(self) -> None:
        self.next_step: StepRecord | None = None  # the step that would run next; None before `compile`
        self.version = 0  # changes whenever the ledger changes otherwise than by steps of `next_step`
        self._optimizer: DPOptimizer | None = None
        self._counted: dict[tuple[float, ...], int] = {}  # what the optimizer had counted when `open` was called
        self._run = uuid.uuid4().hex
        self._closed = {self._run: Ledger()}  # by who took the steps: only this object adds to its own
        self._file: LedgerFile | None = None  # where steps are written before they run
        self._most_steps = 1  # of a call of the train function since `use_file`; its trace may keep an earlier setting
        self.released_means = ReleasedMeans()  # what normalizations keep of earlier releases
        with tf.init_scope():
            zero = tf.constant(0, tf.int64)  # of examples that were dropped because their gradient was non-finite
            self.non_finite = tf.Variable(zero, trainable=False, aggregation=tf.VariableAggregation.SUM)

    def open(
        self,
        optimizer: DPOptimizer,
        batches: PoissonSampling | None = None,
        sampling: str = "assumed",
        unit: str = "example",
    ) -> StepRecord:
        """Records the steps so far, and from here on those of `optimizer` on batches drawn in a given way.

        A data set that was derived from one of the Poisson sampler has its distribution, if that is assumed: truncated
        batches are charged to delta all the same.

        Args:
          optimizer: whose steps are counted.
          batches: the distribution of the batches; None takes the optimizer's.
          sampling: "poisson" if they are known to be drawn so, or "assumed".
          unit: what the optimizer's numbers count where `batches` are not known, "example" or "user".
        """
        self._close()
        if optimizer is not self._optimizer:
            self._optimizer, self._counted = optimizer, optimizer.counted_steps()
        self.next_step = StepRecord(
            noise_multipliers=(optimizer.noise_multiplier,),
            steps=1,
            sampling_probability=batches.sampling_probability if batches else optimizer.sampling_probability,
            num_examples=batches.num_examples if batches else optimizer.num_examples,
            max_batch_size=batches.max_batch_size if batches else None,
            sampling=sampling,
            unit=batches.unit if batches else unit,
        )
        return self.next_step

    def check_optimizer(self, optimizer: DPOptimizer) -> None:
        """Refuses an optimizer that has counted another model's steps."""
        if optimizer is not self._optimizer and optimizer.counted_steps():
            requirement = "not have trained another model, whose steps it has counted"
            remedy = "Build a new one: type(optimizer).from_config(optimizer.get_config())."
            raise _validate.argument_error("optimizer", type(optimizer).__name__, requirement, remedy)

    def ledger(self) -> Ledger:
        """Everything that ran, the running steps included."""
        return Ledger([record for ledger in self._ledgers()[0].values() for record in ledger.entries])

    @property
    def own_steps(self) -> int:
        """How many steps this object has recorded, not those that were loaded."""
        return self._ledgers()[0][self._run].steps

    def _ledgers(self) -> tuple[dict[str, Ledger], dict[tuple[float, ...], int]]:
        """The ledgers of all runs, and the optimizer's count that they go by: steps can run while they are made."""
        counted = self._optimizer.counted_steps() if self._optimizer is not None else {}
        own = self._closed[self._run].copy()
        for multipliers, steps in counted.items():
            new = steps - self._counted.get(multipliers, 0)
            if self.next_step is not None and new:
                own.record(dataclasses.replace(self.next_step, noise_multipliers=multipliers, steps=new))
        return {**self._closed, self._run: own}, counted

    def _close(self) -> None:
        self._closed, self._counted = self._ledgers()
        self.version += 1

    def _merge(self, others: dict[str, Ledger]) -> None:
        """Adds runs; of two states of one run, whose steps only one object ever took, the longer stays."""
        self._close()
        merged = {run: ledger.copy() for run, ledger in others.items()}
        for run, ledger in self._closed.items():
            if run not in merged or ledger.steps >= merged[run].steps:
                merged[run] = ledger
        self._closed = merged

    def use_file(self, path: str | os.PathLike[str] | None) -> None:
        """Adds what a ledger file says, and has steps written there before they run; None has them in no file."""
        self.close_file()
        self._file, self._most_steps = None if path is None else LedgerFile(path, self._run), 1
        self.open_file()
        self.close_file()
        _WITH_FILES.add(self)

    def open_file(self) -> None:
        """Locks the ledger file, if there is one, and adds what others have written since."""
        if self._file is not None and not self._file.is_open:
            self._merge(self._file.open())

    def write_ahead(self, steps_of_call: Callable[[], int]) -> None:
        """Writes the steps of a call of the train function, of which there may be fewer, to the ledger file."""
        if self._file is not None and self.next_step is not None:
            self._most_steps = max(self._most_steps, steps_of_call())
            self._file.reserve(self._most_steps, lambda: self._ledgers()[0][self._run], self.next_step)

    def close_file(self) -> None:
        """Writes to the ledger file which steps did run, and unlocks it."""
        if self._file is not None:
            self._file.close(self._ledgers()[0][self._run])

    def take_over(self, other: TrainingRecord) -> None:
        """Adds what another model's weights have cost, and takes its released means; the weights were copied."""
        self._merge(other._ledgers()[0])
        self.released_means.load(other.released_means.values())

    def serialize(self) -> str:
        """The ledger by who took the steps, and released means, as text; tf.train.Checkpoint calls this too."""
        if not tf.executing_eagerly():
            raise ValueError(NO_SAVED_MODEL)
        runs = {run: ledger.to_json() for run, ledger in self._ledgers()[0].items() if ledger.steps}
        return json.dumps({"runs": runs, "released_means": self.released_means.values()})

    def deserialize(self, text: str | bytes) -> None:
        """Merges a saved ledger, and takes its released means; steps that ran here or elsewhere stay recorded."""
        saved = json.loads(text)
        self.released_means.load(saved["released_means"])
        self._merge({run: Ledger.from_json(ledger) for run, ledger in saved["runs"].items()})


_WITH_FILES: weakref.WeakSet[TrainingRecord] = weakref.WeakSet()


if hasattr(os, "register_at_fork"):  # a child that exits must not take back what its parent has reserved
    os.register_at_fork(after_in_child=_WITH_FILES.clear)


@atexit.register
def _close_files() -> None:
    """After `train_on_batch`, which does not know of its last step."""
    for record in list(_WITH_FILES):
        record.close_file()
