"""What a DPModel keeps besides its weights: public batch, ledger, and moving statistics that match the weights."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import tensorflow as tf

from tf_dpbn import _checks, public_data
from tf_dpbn._keras import keras
from tf_dpbn._public_pass import refresh_moving_statistics
from tf_dpbn.accounting import Ledger, StepRecord, privacy_statement
from tf_dpbn.layers import current_scope
from tf_dpbn.optimizers import DPOptimizer
from tf_dpbn.sampling import PoissonSampling

_STORE_KEY = "tf_dpbn_books"
_BATCH_KEY = "tf_dpbn_public_batch_"


class Books:
    """The books of one model. A plain object, so that Keras counts none of it among the weights."""

    def __init__(self) -> None:
        self.public_batch: Any = None
        self.structure: _checks.Structure | None = None
        self.closed = Ledger()
        self.configuration: StepRecord | None = None
        self.steps_at_opening = 0
        self.statistics_are_of: int | None = None
        self.functions: dict[str, Any] = {}
        with tf.init_scope():
            self.steps = tf.Variable(0, dtype=tf.int64, trainable=False, name="privacy_steps")
            self.not_finite = tf.Variable(0, dtype=tf.int64, trainable=False, name="not_finite")

    def open_record(self, optimizer: DPOptimizer, sampling: PoissonSampling | None) -> None:
        """Books the steps so far and starts a record with the configuration that is about to run."""
        self.closed = self.ledger()
        self.steps_at_opening = int(self.steps)
        if sampling is None:
            rate = {
                "sampling_probability": optimizer.sampling_probability,
                "num_examples": optimizer.num_examples,
                "sampling": "assumed",
            }
        else:
            rate = {
                "sampling_probability": sampling.sampling_probability,
                "num_examples": sampling.num_examples,
                "max_batch_size": sampling.max_batch_size,
                "sampling": "poisson",
            }
        self.configuration = StepRecord(noise_multipliers=(optimizer.noise_multiplier,), steps=1, **rate)

    def ledger(self) -> Ledger:
        """Everything that ran, the open record included."""
        ledger = self.closed.copy()
        steps = int(self.steps) - self.steps_at_opening
        if self.configuration is not None and steps:
            ledger.record(dataclasses.replace(self.configuration, steps=steps))
        return ledger

    def restore_ledger(self, ledger: Ledger) -> None:
        """Replaces what ran by a saved ledger."""
        self.closed, self.steps_at_opening = ledger, int(self.steps)


class BookkeepingModel(keras.Model):
    """The part of DPModel that keeps the books; it does not train."""

    _books: Books

    # ------------------------------------------------------------------ public batch

    def set_public_batch(self, batch: Any, *, value_range: tuple[float, float] | None = None) -> None:
        """Sets the public examples from which batch statistics are computed; saved with the model.

        Args:
          batch: nest of arrays like the model's input, [examples, ...], 2 examples or more; 30 to 256 are typical. It must
            not contain private data: it is stored in the clear. See `public_data` for synthetic ones.
          value_range: if given, (low, high) that all values must lie in: the range of the training data.

        Raises:
          ValueError: for a wrong structure, shape, dtype or range, or values that are not finite.
        """
        arrays, names = tf.nest.flatten(batch), ["public_batch"]
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
                expected_shape=None if spec is None else tuple(spec.shape),
                dtype=None if spec is None else tf.as_dtype(spec.dtype).as_numpy_dtype,
                value_range=value_range,
                name=name,
            )
            for array, spec, name in zip(arrays, specs, names, strict=True)
        ]
        sizes = {len(array) for array in checked}
        if len(sizes) > 1:
            raise ValueError(f"`public_batch` must have equally many rows everywhere. Received: {sorted(sizes)}")
        tensors = [tf.convert_to_tensor(array) for array in checked]
        self._books.public_batch = tf.nest.pack_sequence_as(batch, tensors)
        self._books.functions.clear()
        self.train_function = None  # the batch is part of the traced step

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
                "The model contains DPBatchNormalization and has no public batch to take statistics from. Set one before "
                f"training, for example model.set_public_batch(tf_dpbn.public_data.uniform_noise({shape}, "
                "value_range=(0.0, 1.0))) with the range of your data. Received: public_batch=None"
            )
        return self._books.public_batch

    # ------------------------------------------------------------------ moving statistics

    def refresh_statistics(self) -> None:
        """Sets the moving statistics to those of the public batch at the current weights.

        Evaluation, prediction, saving and export after training do it by themselves; a custom loop that changes weights in
        other ways can call it.
        """
        structure = self._books.structure
        if structure is not None and structure.active:
            batch, active = self._require_public_batch(), structure.active
            if "refresh" not in self._books.functions:
                self._books.functions["refresh"] = tf.function(
                    lambda: refresh_moving_statistics(self, batch, active), autograph=False
                )
            self._books.functions["refresh"]()
        self._books.statistics_are_of = int(self.optimizer.iterations)

    def _watch_statistics(self) -> None:
        """From here on steps make the moving statistics stale."""
        if self._books.statistics_are_of is None:
            self._books.statistics_are_of = int(self.optimizer.iterations)

    def _refresh_if_stale(self) -> None:
        books = getattr(self, "_books", None)
        if books is None or books.statistics_are_of is None or current_scope() is not None:
            return
        if tf.executing_eagerly() and int(self.optimizer.iterations) != books.statistics_are_of:
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

    def save(self, *args: Any, **kwargs: Any) -> Any:
        """keras.Model.save; the .keras format keeps public batch and ledger too."""
        self._refresh_if_stale()
        return super().save(*args, **kwargs)

    def save_weights(self, *args: Any, **kwargs: Any) -> Any:
        """keras.Model.save_weights; the .weights.h5 format keeps public batch and ledger too."""
        self._refresh_if_stale()
        return super().save_weights(*args, **kwargs)

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
    def private_steps(self) -> int:
        """How many private steps this process has taken with this model."""
        return int(self._books.steps)

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
        """How many examples were dropped because their gradient was not finite. Private: not noised, not to be released."""
        return int(self._books.not_finite)

    # ------------------------------------------------------------------ saving

    def save_own_variables(self, store: Any) -> None:
        """Keras' hook: adds public batch and ledger to what is saved."""
        super().save_own_variables(store)
        batch = self._books.public_batch
        arrays = tf.nest.flatten(batch) if batch is not None else []
        structure = None
        if batch is not None:
            structure = tf.nest.pack_sequence_as(batch, list(range(len(arrays))))
        books = {"ledger": self.ledger.to_json(), "public_batch": structure}
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
        self._books.restore_ledger(Ledger.from_json(books["ledger"]))
        if books["public_batch"] is not None:
            self.set_public_batch(
                tf.nest.map_structure(
                    lambda i: np.asarray(store[f"{_BATCH_KEY}{i}"]), books["public_batch"]
                )
            )
