"""What a DPModel keeps besides its weights: what ran and what that costs, and whose step it is that runs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from tf_dpbn import _training_trace
from tf_dpbn._keras import count_of
from tf_dpbn.accounting import Ledger, StepRecord
from tf_dpbn.normalization import ReleasedMeans
from tf_dpbn.optimizers import DPOptimizer
from tf_dpbn.sampling import PoissonSampling

_NO_FIT = -1
_BESIDE_FIT = (
    "With accumulation_steps={} a step within `fit` that is not its own, by a callback or a train function of yours, "
    "would become a part of `fit`'s logical batch, in which an example could then be twice. Train before or after "
    "`fit`, and let Keras make the train function."
)
NO_SAVED_MODEL = (
    "tf.saved_model.save cannot save a DPModel. Call `model.export(path)`, which makes a SavedModel for inference."
)
_OUTDATED = (
    "This graph of train_step was traced before the last `compile`, with the noise and clip norm of then. Trace it "
    "anew; a train_step that is a tf.function itself needs a new model."
)


@dataclasses.dataclass(frozen=True)
class Admission:
    """What a step is, known when it runs: any graph can be run by anyone.

    Attributes:
      of_fit: int64 scalar, 1 if the step is one that `fit` takes on the batches that it was given, else 0.
      is_part: bool scalar, whether the step may add to a logical batch of several parts.
    """

    of_fit: tf.Tensor
    is_part: tf.Tensor


class Books(tf.train.experimental.PythonState):
    """The books of one model: no part of its weights, but of its checkpoints (as serialized text).

    Attributes:
      public_batch: nest of tensors, or None.
      released_means: what normalizations keep of earlier releases.
      may_contain_training_rows: whether the public batch may hold rows of the training data, as the user said.
      structure: what the last trace of the training pass showed.
      configuration: the step that would run next, as a record of one step.
      steps, not_finite: counters that the train step advances.
      others: the counter of those of them that `fit` did not take on the batches that it was given.
      running_law: sampling of the data set of the running `fit`, or None, and "assumed" unless that is known.
      depth: how many `fit` run, one called by a callback of the other.
      budgets: what to ask before steps, and once after `fit`, for their number; they raise where it is too many.
      statistics_are_of: how many steps the optimizer had made when moving statistics were set; None before training.
      functions: what was traced since `compile`, by its name.
      version: changes whenever the ledger changes otherwise than by steps of the open record.
    """

    def __init__(self) -> None:
        self.public_batch: Any = None
        self.may_contain_training_rows = False
        self.structure: _training_trace.Structure | None = None
        self.configuration: StepRecord | None = None
        self.statistics_are_of: int | None = None
        self.functions: dict[str, Any] = {}
        self.budgets: list[Callable[[int], None]] = []
        self.version = 0
        self.running_law: tuple[PoissonSampling | None, str] = None, "assumed"
        self.depth = 0
        self._is_beside_fit = self._takes_step_of_fit = False
        self._compiled = 0
        self._run = uuid.uuid4().hex
        self._closed = {self._run: Ledger()}  # by who took the steps: only this object adds to its own
        self._assumed: StepRecord | None = None
        self._steps_at_opening, self._others_at_opening = 0, 0
        self._releases = 0
        self.released_means = ReleasedMeans()
        with tf.init_scope():
            self.steps = _counter("privacy_steps", tf.VariableAggregation.ONLY_FIRST_REPLICA)
            self.others = _counter("other_steps", tf.VariableAggregation.ONLY_FIRST_REPLICA)
            self.not_finite = _counter("not_finite", tf.VariableAggregation.SUM)
            # Twice the number of batches that the running call of `fit` has before it, and one more while the step on
            # the present one is not taken; _NO_FIT where no `fit` runs.
            self._granted = _counter("granted", tf.VariableAggregation.ONLY_FIRST_REPLICA, _NO_FIT)
            self._latest = _counter("compiled", tf.VariableAggregation.ONLY_FIRST_REPLICA)

    @property
    def has_state(self) -> bool:
        """Whether some layer updates state that does not depend on the examples."""
        return self.structure is not None and self.structure.has_state

    # ------------------------------------------------------------------ who takes a step

    @contextlib.contextmanager
    def running_fit(self) -> Iterator[None]:
        """A scope in which `fit` runs, perhaps in a callback of another; its budgets end with it."""
        depth, budgets = self.depth, list(self.budgets)
        try:
            self.depth = depth + 1
            self._grant_none()
            yield
            self.check_budgets(0)
        finally:
            self.depth, self.budgets = depth, budgets
            self._grant_none()

    @contextlib.contextmanager
    def beside_fit(self) -> Iterator[None]:
        """A scope in which Keras' train function gets batches that `fit` was not given."""
        before = self._is_beside_fit
        try:
            self._is_beside_fit = True
            self._grant_none()
            yield
        finally:
            self._is_beside_fit = before

    def of_fit(
        self, function: Callable[..., Any], batches: Callable[[], int], completed_by: Callable[[int], int]
    ) -> Callable[..., Any]:
        """Keras' train function, whose batches are those that `fit` was given unless it is called `beside_fit`.

        Args:
          function: takes a step on each batch.
          batches: on how many, in the next call, at most.
          completed_by: how many steps a number of batches complete.
        """

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._is_beside_fit:
                return function(*args, **kwargs)
            number = batches()
            self.check_budgets(completed_by(number))
            try:
                self._takes_step_of_fit = True
                self._granted.assign(2 * number)
                return function(*args, **kwargs)
            finally:
                self._takes_step_of_fit = False
                self._grant_none()

        return call

    def _grant_none(self) -> None:
        self._granted.assign(0 if self.depth else _NO_FIT)

    def check_budgets(self, steps: int) -> None:
        """Asks all budgets for some steps; for none, whether what ran is within them."""
        for check in self.budgets:
            check(steps)

    def check_parts(self, parts: int) -> None:
        """Refuses a step beside a running `fit` whose logical batches have several parts: it would be one of them.

        Raises:
          RuntimeError: for more than one part.
        """
        if parts > 1 and self.depth and not self._takes_step_of_fit:
            raise RuntimeError(_BESIDE_FIT.format(parts))

    def count_compile(self) -> None:
        """From here on graphs of steps that were traced before are refused, where the device can (XLA cannot)."""
        self._compiled += 1
        self._latest.assign(self._compiled)

    def begin_batch(self) -> tf.Tensor:
        """Within a graph, before what steps on one batch: lets one step on it be `fit`'s, if `fit` has it.

        Returns:
          bool scalar, False for a batch beside a running `fit`.
        """
        granted = tf.identity(self._granted)
        begun = tf.where(granted > 1, granted - granted % 2 - 1, tf.zeros_like(granted))
        self._granted.assign(tf.where(granted < 0, granted, begun))
        return tf.logical_or(granted < 0, granted > 1)

    def admit(self, parts: int) -> Admission:
        """Within the graph of a step: takes the one step on this batch that is `fit`'s, if it is not taken yet.

        Args:
          parts: of how many steps a logical batch consists.

        Returns:
          What the step is. A graph from before the last `compile`, and a step that would be a part of the running
          `fit`'s logical batch without being of that `fit`, fail with InvalidArgumentError. XLA leaves assertions out;
          the part is then not added, for which `Admission.is_part` is there.
        """
        granted = tf.identity(self._granted)
        of_fit = tf.where(granted < 0, tf.zeros_like(granted), granted % 2)
        is_part = tf.logical_or(granted < 0, of_fit > 0) if parts > 1 else tf.constant(True)
        checks = [
            self._granted.assign(granted - of_fit),
            tf.debugging.Assert(tf.equal(self._latest, self._compiled), [_OUTDATED]),
            tf.debugging.Assert(is_part, [_BESIDE_FIT.format(parts)]),
        ]
        with tf.control_dependencies([check for check in checks if check is not None]):
            return Admission(tf.identity(of_fit), tf.identity(is_part))

    def count_step(self, admission: Admission) -> list[tf.Tensor]:
        """Counts a step, within its graph; returns what must have run before the step releases anything."""
        with tf.control_dependencies([admission.of_fit]):  # what is refused is no step
            return [self.steps.assign_add(1), self.others.assign_add(1 - admission.of_fit)]

    # ------------------------------------------------------------------ ledger

    def open_record(self, optimizer: DPOptimizer, law: PoissonSampling | None, sampling: str = "assumed") -> None:
        """Books the steps so far and starts a record with the configuration that is about to run.

        A data set that was derived from one of the Poisson sampler has its law, if that is assumed: batches that were
        cut are charged to delta all the same.
        """
        self._close()
        self.running_law = law, sampling
        self._assumed = self.configuration = StepRecord(
            noise_multipliers=optimizer.noise_multipliers(self._releases),
            steps=1,
            sampling_probability=optimizer.sampling_probability,
            num_examples=optimizer.num_examples,
            sampling="assumed",
        )
        if law is not None:
            self.configuration = dataclasses.replace(
                self._assumed,
                sampling_probability=law.sampling_probability,
                num_examples=law.num_examples,
                max_batch_size=law.max_batch_size,
                sampling=sampling,
            )

    def set_releases(self, optimizer: DPOptimizer, number: int) -> None:
        """Notes how many releases of statistics a step of the running record has; known once the step is traced.

        Epsilon does not depend on it: whatever the number, the releases of a step fold to the optimizer's multiplier.
        """
        if number == self._releases:
            return
        with tf.init_scope():  # a step is being traced
            self._close()  # what ran before keeps its record
        self._releases = number
        if self.configuration is not None and self._assumed is not None:
            multipliers = optimizer.noise_multipliers(number)
            self.configuration = dataclasses.replace(self.configuration, noise_multipliers=multipliers)
            self._assumed = dataclasses.replace(self._assumed, noise_multipliers=multipliers)

    def ledger(self) -> Ledger:
        """Everything that ran, the open record included."""
        return Ledger([record for ledger in self._snapshot()[0].values() for record in ledger.entries])

    def _snapshot(self) -> tuple[dict[str, Ledger], int, int]:
        """The ledgers of all runs, and the counters that this one's is of: steps can run while it is made."""
        steps, others = count_of(self.steps), count_of(self.others)
        own, new = self._closed[self._run].copy(), steps - self._steps_at_opening
        beside = min(new, others - self._others_at_opening)
        for record, number in ((self.configuration, new - beside), (self._assumed, beside)):
            if record is not None and number:
                own.record(dataclasses.replace(record, steps=number))
        return {**self._closed, self._run: own}, steps, others

    def _close(self) -> None:
        self._closed, self._steps_at_opening, self._others_at_opening = self._snapshot()
        self.version += 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Books:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        copied.depth, copied.budgets = 0, []  # it may be a callback that copies: no `fit` of the copy runs
        copied._is_beside_fit = copied._takes_step_of_fit = False
        copied._grant_none()
        copied._close()
        copied._run = uuid.uuid4().hex  # what either takes from here on, the other does not
        copied._closed[copied._run] = Ledger()
        return copied

    def _merge(self, others: dict[str, Ledger]) -> None:
        """Adds runs; of two states of one run, whose steps only one object ever took, the longer stays."""
        self._close()
        merged = {run: ledger.copy() for run, ledger in others.items()}
        for run, ledger in self._closed.items():
            if run not in merged or ledger.steps >= merged[run].steps:
                merged[run] = ledger
        self._closed = merged

    def take_over(self, other: Books) -> None:
        """Adds what another model's weights have cost, and takes its released means; the weights were copied."""
        self._merge(other._snapshot()[0])
        self.released_means.load(other.released_means.values())

    # ------------------------------------------------------------------ saving

    def serialize(self) -> str:
        """The ledger by who took the steps, and released means, as text; tf.train.Checkpoint calls this too."""
        if not tf.executing_eagerly():
            raise ValueError(NO_SAVED_MODEL)
        runs = {run: ledger.to_json() for run, ledger in self._snapshot()[0].items() if ledger.steps}
        return json.dumps({"runs": runs, "input_means": self.released_means.values()})

    def deserialize(self, text: str | bytes) -> None:
        """Takes over a saved ledger. Nothing that ran is ever forgotten.

        Steps that another object took are added. Of those that were taken by the same one, this or another, the file
        and this model may hold different states; the longer stays.
        """
        saved = json.loads(text)
        self.released_means.load(saved.get("input_means", {}))
        self._merge({run: Ledger.from_json(ledger) for run, ledger in saved["runs"].items()})


def _counter(name: str, aggregation: tf.VariableAggregation, value: int = 0) -> tf.Variable:
    return tf.Variable(value, dtype=tf.int64, trainable=False, name=name, aggregation=aggregation)
