"""What a DPModel keeps besides its weights: public batch, ledger, and moving statistics that match the weights."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tf_dpbn import _training_trace, public_data
from tf_dpbn._keras import (
    IS_KERAS_3,
    as_compiled,
    call_model,
    clear_call_time_losses,
    count_of,
    flatten_layers,
    keras,
    symbolic_outputs,
)
from tf_dpbn._public_pass import refresh_moving_statistics
from tf_dpbn.accounting import Ledger, StepRecord, privacy_statement
from tf_dpbn.layers import DPBatchNormalization, PublicPass, current_scope
from tf_dpbn.optimizers import DPOptimizer
from tf_dpbn.sampling import PoissonSampling

_STORE_KEY = "tf_dpbn_books"
_BATCH_KEY = "tf_dpbn_public_batch_"
_LEGACY_ENDINGS = (".h5", ".hdf5")


class Books(tf.train.experimental.PythonState):
    """The books of one model: no part of its weights, but of its checkpoints (as serialized text).

    Attributes:
      public_batch: nest of tensors, or None.
      structure: what the last trace of the training pass showed.
      configuration: the step that would run next, as a record of one step.
      steps, not_finite: counters that the train step advances.
      others: the counter of those of them that `fit` did not take on the batches that it was given.
      is_of_fit: 1 while `fit` takes a step, else 0; read by the step when it runs, for a graph can be run by anyone.
      sampling: of the data set of the running `fit`, or None.
      depth: how many `fit` run, one called by a callback of the other.
      statistics_are_of: how many steps the optimizer had made when moving statistics were set; None before training.
      functions: what was traced since `compile`, by its name.
      version: changes whenever the ledger changes otherwise than by steps of the open record.
    """

    def __init__(self) -> None:
        self.public_batch: Any = None
        self.structure: _training_trace.Structure | None = None
        self.configuration: StepRecord | None = None
        self.statistics_are_of: int | None = None
        self.functions: dict[str, Any] = {}
        self.version = 0
        self._run = uuid.uuid4().hex
        self.sampling: PoissonSampling | None = None
        self.depth = 0
        self.takes_step_of_fit = False
        self._is_beside_fit = False
        self._closed = Ledger()
        self._assumed: StepRecord | None = None
        self._steps_at_opening, self._others_at_opening = 0, 0
        self._releases = 0
        self._released_means: dict[str, tf.Variable] = {}
        self._saved_means: dict[str, list[float]] = {}
        with tf.init_scope():
            self.steps = _counter("privacy_steps", tf.VariableAggregation.ONLY_FIRST_REPLICA)
            self.others = _counter("other_steps", tf.VariableAggregation.ONLY_FIRST_REPLICA)
            self.is_of_fit = _counter("is_of_fit", tf.VariableAggregation.ONLY_FIRST_REPLICA)
            self.not_finite = _counter("not_finite", tf.VariableAggregation.SUM)

    @property
    def has_state(self) -> bool:
        """Whether some layer updates state that does not depend on the examples."""
        return self.structure is not None and self.structure.has_state

    def open_record(self, optimizer: DPOptimizer, sampling: PoissonSampling | None) -> None:
        """Books the steps so far and starts a record with the configuration that is about to run."""
        self._close(self.ledger())
        self.sampling = sampling
        self._assumed = self.configuration = StepRecord(
            noise_multipliers=optimizer.noise_multipliers(self._releases),
            steps=1,
            sampling_probability=optimizer.sampling_probability,
            num_examples=optimizer.num_examples,
            sampling="assumed",
        )
        if sampling is not None:
            self.configuration = dataclasses.replace(
                self._assumed,
                sampling_probability=sampling.sampling_probability,
                num_examples=sampling.num_examples,
                max_batch_size=sampling.max_batch_size,
                sampling="poisson",
            )

    def count_step(self) -> list[tf.Tensor]:
        """Counts a step, within its graph; returns what must have run before the step releases anything."""
        return [self.steps.assign_add(1), self.others.assign_add(1 - self.is_of_fit)]

    @contextlib.contextmanager
    def beside_fit(self) -> Iterator[None]:
        """A scope in which Keras' train function gets batches that `fit` was not given."""
        before, self._is_beside_fit = self._is_beside_fit, True
        try:
            yield
        finally:
            self._is_beside_fit = before

    def of_fit(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Keras' train function, whose batches are those that `fit` was given unless it is called `beside_fit`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._is_beside_fit:
                return function(*args, **kwargs)
            self.is_of_fit.assign(1)
            self.takes_step_of_fit = True
            try:
                return function(*args, **kwargs)
            finally:
                self.takes_step_of_fit = False
                self.is_of_fit.assign(0)

        return call

    def check_parts(self, parts: int) -> None:
        """Refuses a step beside a running `fit` whose logical batches have several parts: it would be one of them.

        Raises:
          RuntimeError: for more than one part.
        """
        if parts > 1 and self.depth and not self.takes_step_of_fit:
            raise RuntimeError(
                f"With accumulation_steps={parts} a step within `fit`, by a callback, would become a part of `fit`'s "
                "logical batch, in which an example could then be twice. Train before or after `fit`."
            )

    def set_releases(self, optimizer: DPOptimizer, number: int) -> None:
        """Notes how many releases of statistics a step of the running record has; known once the step is traced.

        Epsilon does not depend on it: whatever the number, the releases of a step fold to the optimizer's multiplier.
        """
        if number == self._releases:
            return
        with tf.init_scope():  # a step is being traced
            self._close(self.ledger())  # what ran before keeps its record
        self._releases = number
        if self.configuration is not None and self._assumed is not None:
            multipliers = optimizer.noise_multipliers(number)
            self.configuration = dataclasses.replace(self.configuration, noise_multipliers=multipliers)
            self._assumed = dataclasses.replace(self._assumed, noise_multipliers=multipliers)

    def released_mean(self, name: str, size: int) -> tf.Variable:
        """A float32 variable, first zero, for a mean of released values (and its noise); saved with the model."""
        variable = self._released_means.get(name)
        if variable is None or variable.shape[0] != size:
            value = self._saved_means.get(name, [])
            with tf.init_scope():
                variable = tf.Variable(
                    value if len(value) == size else [0.0] * size,
                    dtype=tf.float32,
                    trainable=False,
                    name="released_mean",
                    aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
                )
            self._released_means[name] = variable
        return variable

    def ledger(self) -> Ledger:
        """Everything that ran, the open record included."""
        ledger = self._closed.copy()
        steps = count_of(self.steps) - self._steps_at_opening
        others = min(steps, count_of(self.others) - self._others_at_opening)
        for record, number in ((self.configuration, steps - others), (self._assumed, others)):
            if record is not None and number:
                ledger.record(dataclasses.replace(record, steps=number))
        return ledger

    def take_over(self, other: Books) -> None:
        """Adds what another model's weights have cost, and takes its released means; the weights were copied."""
        ledger = self.ledger()
        for record in other.ledger().entries:
            ledger.record(record)
        self._close(ledger)
        self._saved_means.update(json.loads(other.serialize())["input_means"])

    def _close(self, ledger: Ledger) -> None:
        self._closed, self._steps_at_opening = ledger, count_of(self.steps)
        self._others_at_opening = count_of(self.others)
        self.version += 1

    def serialize(self) -> str:
        """The ledger, and released means, as text; tf.train.Checkpoint calls this too."""
        means = {**self._saved_means, **{k: v.numpy().tolist() for k, v in self._released_means.items()}}
        return json.dumps({"run": self._run, "ledger": self.ledger().to_json(), "input_means": means})

    def deserialize(self, text: str | bytes) -> None:
        """Takes over a saved ledger. Nothing that ran is ever forgotten.

        A saved state of the same run replaces this one only if it is longer; steps of another run are added.
        """
        saved = json.loads(text)
        self._saved_means = saved.get("input_means", {})
        for name, variable in self._released_means.items():
            value = self._saved_means.get(name, [])
            variable.assign(value if len(value) == variable.shape[0] else tf.zeros_like(variable))
        theirs, ours = Ledger.from_json(saved["ledger"]), self.ledger()
        if ours.steps and saved["run"] != self._run:
            for record in ours.entries:
                theirs.record(record)
        elif ours.steps > theirs.steps:
            theirs = ours
        else:
            self._run = saved["run"]
        self._close(theirs)


def _counter(name: str, aggregation: tf.VariableAggregation) -> tf.Variable:
    return tf.Variable(0, dtype=tf.int64, trainable=False, name=name, aggregation=aggregation)


class BookkeepingModel(keras.Model):
    """The part of DPModel that keeps the books; it does not train."""

    _books: Books

    # ------------------------------------------------------------------ public batch

    def set_public_batch(self, batch: Any, *, value_range: tuple[float, float] | None = None) -> None:
        """Sets the public examples from which batch statistics are computed; saved with the model.

        Args:
          batch: nest of arrays like the model's input, [examples, ...], 2 examples or more; 30 to 256 are typical. It
            must not contain private data: it is stored in the clear. See `public_data` for synthetic ones.
          value_range: if given, (low, high) that all values must lie in: the range of the training data.

        Raises:
          ValueError: for a wrong structure, shape, dtype or range, or values that are not finite.
        """
        arrays = tf.nest.flatten(batch)
        specs: list[Any] = [None] * len(arrays)
        if getattr(self, "inputs", None):
            specs = tf.nest.flatten(self.inputs)
            if len(specs) != len(arrays):
                raise ValueError(
                    f"`public_batch` must have one array for each of the model's {len(specs)} inputs. "
                    f"Received: {len(arrays)} arrays"
                )
        names = ["public_batch"] if len(arrays) == 1 else [f"public_batch[{i}]" for i in range(len(arrays))]
        checked = [
            public_data.validate_batch(
                array,
                expected_shape=None if spec is None else (None, *spec.shape[1:]),
                dtype=None if spec is None else tf.as_dtype(spec.dtype).as_numpy_dtype,
                value_range=value_range,
                name=name,
            )
            for array, spec, name in zip(arrays, specs, names, strict=True)
        ]
        sizes = {len(array) for array in checked}
        if len(sizes) > 1:
            raise ValueError(f"`public_batch` must have equally many rows everywhere. Received: {sorted(sizes)}")
        if self._same_public_batch(checked):
            return  # nothing to trace anew, and a checkpoint may be loaded in the middle of fit
        tensors = [tf.convert_to_tensor(array) for array in checked]
        self._books.public_batch = tf.nest.pack_sequence_as(batch, tensors)
        self._books.functions.clear()
        if self.train_function is not None:  # the batch is part of the traced step
            self.make_train_function(force=True)  # not None: fit may be running, and a callback loading a checkpoint

    def _same_public_batch(self, arrays: list[np.ndarray]) -> bool:
        old = tf.nest.flatten(self._books.public_batch)
        return len(old) == len(arrays) and all(
            a is not None and np.array_equal(a, b) for a, b in zip(old, arrays, strict=True)
        )

    @property
    def public_batch(self) -> Any:
        """The public batch as numpy arrays, or None."""
        batch = self._books.public_batch
        return None if batch is None else tf.nest.map_structure(lambda t: t.numpy(), batch)

    def _require_public_batch(self) -> Any:
        if self._books.public_batch is None:
            shape = getattr(self, "input_shape", None)
            shape = shape[1:] if isinstance(shape, tuple) and shape[:1] == (None,) else "(height, width, channels)"
            raise ValueError(
                "The model contains DPBatchNormalization and has no public batch to take statistics from. Set one "
                "before training, for example model.set_public_batch(tf_dpbn.public_data.uniform_noise("
                f"{shape}, value_range=(0.0, 1.0))) with the range of your data. Received: public_batch=None"
            )
        return self._books.public_batch

    # ------------------------------------------------------------------ moving statistics

    def refresh_statistics(self) -> None:
        """Sets the moving statistics to those of the public batch at the current weights.

        Evaluation, prediction, saving and export after training do it by themselves; a custom loop that changes
        weights in other ways can call it.

        Raises:
          RuntimeError: if the model is not built.
          ValueError: if a public batch is needed and there is none.
        """
        active = self._calls_in_training()
        if active:
            batch = self._require_public_batch()
            kept, refresh = self._books.functions.get("refresh", (None, None))
            if kept != active:
                refresh = tf.function(lambda: refresh_moving_statistics(self, batch, active), autograph=False)
                self._books.functions["refresh"] = active, refresh
            refresh()
        if getattr(self, "optimizer", None) is not None:
            self._books.statistics_are_of = count_of(self.optimizer.iterations)

    def _calls_in_training(self) -> frozenset[tuple[int, int]]:
        """The normalization calls in training during a step, as far as the public batch decides any of them."""
        structure = self._books.structure
        if structure is not None:
            return structure.active if structure.needs_public_batch else frozenset()
        if not self.built:
            raise RuntimeError("Build the model before refresh_statistics: call it on a batch, or train it.")
        with as_compiled(self):
            layers = [each for each in flatten_layers(self) if isinstance(each, DPBatchNormalization)]
            needed = any(each.trainable and each.statistics != "noised" for each in layers)
            if self._books.public_batch is None and not needed:
                return frozenset()
            batch = self._require_public_batch()
            specs = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), batch)
            if symbolic_outputs(self) is None and self.distribute_strategy.num_replicas_in_sync == 1:
                self._trace_outputs(specs)
            found: list[frozenset[tuple[int, int]]] = []

            def trace(x: Any) -> None:
                found.append(frozenset(_training_trace.trace_training_pass(self, x).scope.active))

            self._trace(trace, specs)
        return found[0]

    def _trace(self, function: Callable[..., Any], *specs: Any) -> None:
        """Traces a function as the step is traced, in the context of a replica."""
        run = self.distribute_strategy.run
        tf.function(lambda *args: run(function, args=args), autograph=False).get_concrete_function(*specs)

    def _trace_outputs(self, x: Any) -> Any:
        """Creates all variables, of layers in training only and in inference only too.

        Args:
          x: nest of TensorSpecs, a batch without augmented copies.

        Returns:
          Nest of TensorSpecs, what the model returns in training.
        """
        found = []

        def passes(x: Any) -> None:
            with PublicPass():
                y_pred = call_model(self, x, training=True)
            found.append(tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), y_pred))
            call_model(self, x, training=False)

        self._trace(passes, x)
        clear_call_time_losses(self)
        return found[0]

    def _watch_statistics(self) -> None:
        """From here on steps make the moving statistics stale."""
        if self._books.statistics_are_of is None:
            self._books.statistics_are_of = count_of(self.optimizer.iterations)

    def _statistics_are_stale(self) -> bool:
        """Whether steps have changed weights since the moving statistics were set."""
        counted = self._books.statistics_are_of
        return counted is not None and count_of(self.optimizer.iterations) != counted

    def _count_statistics_anew(self) -> None:
        """The optimizer was exchanged: what was set stays so."""
        if self._books.statistics_are_of is not None:
            self._books.statistics_are_of = count_of(self.optimizer.iterations)

    def _refresh_if_stale(self) -> None:
        if getattr(self, "_books", None) is None or current_scope() is not None or not tf.executing_eagerly():
            return
        if self._statistics_are_stale():
            self.refresh_statistics()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model; an eager call in inference uses statistics of the current weights."""
        if not kwargs.get("training"):
            self._refresh_if_stale()
        return super().__call__(*args, **kwargs)

    def make_test_function(self, *args: Any, **kwargs: Any) -> Any:
        """Keras calls this before every evaluation."""
        self._refresh_if_stale()
        return super().make_test_function(*args, **kwargs)

    def make_predict_function(self, *args: Any, **kwargs: Any) -> Any:
        """Keras calls this before every prediction."""
        self._refresh_if_stale()
        return super().make_predict_function(*args, **kwargs)

    def export(self, *args: Any, **kwargs: Any) -> Any:
        """keras.Model.export: a SavedModel for inference that loads without tf_dpbn."""
        self._refresh_if_stale()
        return super().export(*args, **kwargs)

    def save(self, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """keras.Model.save in the .keras format, which keeps public batch and ledger too.

        Raises:
          ValueError: for the formats .h5 and (tf_keras) SavedModel, which would lose them.
        """
        if not IS_KERAS_3 and not str(filepath).endswith(".keras") or kwargs.get("save_format", "keras") != "keras":
            raise _lossy_file(filepath, ".keras, or `export` for serving")
        if str(filepath).endswith(_LEGACY_ENDINGS):
            raise _lossy_file(filepath, ".keras")
        self._refresh_if_stale()
        return super().save(filepath, *args, **kwargs)

    def save_weights(self, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """keras.Model.save_weights; .weights.h5 keeps public batch and ledger too.

        Raises:
          ValueError: for another .h5 file, which would lose the ledger.
        """
        legacy = str(filepath).endswith((*_LEGACY_ENDINGS, ".keras")) or kwargs.get("save_format") == "h5"
        if legacy and not str(filepath).endswith(".weights.h5"):
            raise _lossy_file(filepath, ".weights.h5")
        self._refresh_if_stale()
        return super().save_weights(filepath, *args, **kwargs)

    # ------------------------------------------------------------------ ledger

    @property
    def ledger(self) -> Ledger:
        """A copy of the record of every private step that this model has taken, in this process or before saving."""
        return self._books.ledger()

    @property
    def running_record(self) -> StepRecord:
        """The configuration of the step that would run next, as a record of one step."""
        if self._books.configuration is None:
            raise RuntimeError("Call compile(optimizer=..., loss=...) first.")
        return self._books.configuration

    @property
    def ledger_version(self) -> int:
        """Changes whenever the ledger changes otherwise than by steps of the running record."""
        return self._books.version

    @property
    def private_steps(self) -> int:
        """How many private steps this process has taken with this model."""
        return count_of(self._books.steps)

    def epsilon(self, delta: float, accountant: str = "rdp") -> float:
        """The epsilon, at `delta`, of everything that ran.

        Args:
          delta: in (0, 1), below 1 / number of examples.
          accountant: "rdp" or "pld".
        """
        return self.ledger.epsilon(delta, accountant)

    def privacy_statement(self, delta: float, accountant: str = "rdp") -> str:
        """What the guarantee is, what it assumes, and what it does not cover, in plain words. For what really ran."""
        return privacy_statement(self.ledger, delta=delta, accountant=accountant)

    @property
    def debug_not_finite_examples(self) -> int:
        """How many examples were dropped because their gradient was not finite: private, not to be released."""
        return count_of(self._books.not_finite)

    # ------------------------------------------------------------------ saving

    def save_own_variables(self, store: Any) -> None:
        """Keras' hook: adds public batch and ledger to what is saved."""
        if not IS_KERAS_3:
            self.reset_metrics()  # tf_keras saves them: sums over private examples, without noise
        super().save_own_variables(store)
        batch = self._books.public_batch
        arrays = tf.nest.flatten(batch) if batch is not None else []
        structure = None if batch is None else tf.nest.pack_sequence_as(batch, list(range(len(arrays))))
        books = {"books": self._books.serialize(), "public_batch": structure}
        store[_STORE_KEY] = np.frombuffer(json.dumps(books).encode(), np.uint8)
        for i, array in enumerate(arrays):
            store[f"{_BATCH_KEY}{i}"] = array.numpy()

    def load_own_variables(self, store: Any) -> None:
        """Keras' hook: restores public batch and ledger."""
        keys = [key for key in store.keys() if key != _STORE_KEY and not key.startswith(_BATCH_KEY)]
        super().load_own_variables({key: store[key] for key in keys})
        if _STORE_KEY not in store.keys():
            return
        books = json.loads(bytes(np.asarray(store[_STORE_KEY])).decode())
        self._books.deserialize(books["books"])
        structure = books["public_batch"]
        if structure is not None:
            batch = tf.nest.map_structure(lambda i: np.asarray(store[f"{_BATCH_KEY}{i}"]), structure)
            self.set_public_batch(batch)


def _lossy_file(filepath: Any, better: str) -> ValueError:
    return ValueError(
        "`filepath` names a format that loses the ledger, and epsilon would start from zero. Save to a name that ends "
        f"in {better}. Received: filepath={str(filepath)!r}"
    )
