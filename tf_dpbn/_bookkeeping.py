"""The part of a DPModel that keeps its public batch, its ledger, and moving statistics that match its weights."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tf_dpbn import _training_trace, public_data
from tf_dpbn._books import NO_SAVED_MODEL, Books
from tf_dpbn._keras import (
    IS_KERAS_3,
    StoredBeside,
    as_compiled,
    call_model,
    clear_call_time_losses,
    count_of,
    flatten_layers,
    keras,
    symbolic_outputs,
)
from tf_dpbn.accounting import Ledger, StepRecord, privacy_statement
from tf_dpbn.normalization import DPBatchNormalization, PublicPass, current_scope, refresh_moving_statistics

_STORE_KEY = "tf_dpbn_books"
_BATCH_KEY = "tf_dpbn_public_batch_"
_STRINGS = b"tf_dpbn strings "
_LEGACY_ENDINGS = (".h5", ".hdf5")


class _FreshStatistics(keras.callbacks.Callback):
    """Behind callbacks that swap weights as evaluation or prediction begins, and swap them back."""

    def on_test_begin(self, logs: Any = None) -> None:
        self.model._refresh_if_trained()

    def on_test_end(self, logs: Any = None) -> None:
        self.model._forget_statistics()

    on_predict_begin, on_predict_end = on_test_begin, on_test_end


class BookkeepingModel(keras.Model):
    """The part of DPModel that keeps the books; it does not train."""

    _books: Books

    # ------------------------------------------------------------------ public batch

    def set_public_batch(
        self, batch: Any, *, value_range: tuple[float, float] | None = None, may_contain_training_rows: bool = False
    ) -> None:
        """Sets the public examples from which batch statistics are computed; saved with the model.

        Args:
          batch: nest of arrays like the model's input, [examples, ...], 2 examples or more; 30 to 256 are typical. It
            must not contain private data: it is stored in the clear. See `public_data` for synthetic ones.
          value_range: if given, (low, high) that all values must lie in: the range of the training data.
          may_contain_training_rows: True lets `fit` train on data that hold rows of the batch, which it else refuses.
            Such rows have no privacy; say so only if they are public, or coincide by chance.

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
                dtype=_numpy_dtype(array, spec),
                value_range=value_range,
                name=name,
            )
            for array, spec, name in zip(arrays, specs, names, strict=True)
        ]
        sizes = {len(array) for array in checked}
        if len(sizes) > 1:
            raise ValueError(f"`public_batch` must have equally many rows everywhere. Received: {sorted(sizes)}")
        self._books.may_contain_training_rows = may_contain_training_rows
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

    def _refresh_if_trained(self) -> None:
        """Refreshes even what no step has made stale: callbacks swap weights (SwapEMAWeights) without a step."""
        self._forget_statistics()
        self._refresh_if_stale()

    def _forget_statistics(self) -> None:
        """Weights may have been swapped: whoever reads statistics next refreshes them, if the model has trained."""
        if getattr(self, "_books", None) is not None and self._books.statistics_are_of is not None:
            self._books.statistics_are_of = -1

    def evaluate(self, *args: Any, callbacks: Any = None, **kwargs: Any) -> Any:
        """keras.Model.evaluate, by statistics of the weights that callbacks put into the model, if any do."""
        with self._statistics_after(callbacks) as callbacks:
            return super().evaluate(*args, callbacks=callbacks, **kwargs)

    def predict(self, *args: Any, callbacks: Any = None, **kwargs: Any) -> Any:
        """keras.Model.predict, by statistics of the weights that callbacks put into the model, if any do."""
        with self._statistics_after(callbacks) as callbacks:
            return super().predict(*args, callbacks=callbacks, **kwargs)

    @contextlib.contextmanager
    def _statistics_after(self, callbacks: Any) -> Iterator[Any]:
        """Yields callbacks of which the last refreshes the statistics; `fit` hands over its own CallbackList."""
        last = _FreshStatistics()
        if not isinstance(callbacks, keras.callbacks.CallbackList):
            yield [*tf.nest.flatten(callbacks or []), last]
            return
        last.set_model(self)
        callbacks.callbacks.append(last)
        try:
            yield callbacks
        finally:
            callbacks.callbacks.remove(last)

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
        self._refresh_if_trained()
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
        self._refresh_if_trained()
        return super().save(filepath, *args, **kwargs)

    def save_weights(self, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """keras.Model.save_weights; .weights.h5 keeps public batch and ledger too.

        Raises:
          ValueError: for another .h5 file, which would lose the ledger.
        """
        legacy = str(filepath).endswith((*_LEGACY_ENDINGS, ".keras")) or kwargs.get("save_format") == "h5"
        if legacy and not str(filepath).endswith(".weights.h5"):
            raise _lossy_file(filepath, ".weights.h5")
        self._refresh_if_trained()
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
        return self._books.version + count_of(self._books.others)

    def add_budget(self, check: Callable[[int], None]) -> None:
        """Has the running `fit` ask before its next steps, and `train_on_batch` within it, and once at its end.

        Args:
          check: gets the number of steps that are to come, 0 at the end; raises ValueError if they are too many.
        """
        if self._books.depth:
            self._books.budgets.append(check)

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
        told = ["rows of the training data in the public batch"] if self._books.may_contain_training_rows else []
        return privacy_statement(self.ledger, delta=delta, accountant=accountant, not_covered=told)

    @property
    def debug_not_finite_examples(self) -> int:
        """How many examples were dropped because their gradient was not finite: private, not to be released."""
        return count_of(self._books.not_finite)

    # ------------------------------------------------------------------ saving

    @functools.cached_property
    def zz_tf_dpbn_books(self) -> StoredBeside:
        """What weights files hold of public batch and ledger, which a stock model passes over.

        tf_keras visits attributes in reverse order and stops at weights that do not match: this one comes first.
        """
        return StoredBeside(self._save_books, self._load_books)

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> Any:
        if save_type == "savedmodel" and not IS_KERAS_3:  # Keras 3's `export` comes here too, but not to the books
            raise ValueError(NO_SAVED_MODEL)
        return super()._trackable_children(save_type, **kwargs)

    def save_own_variables(self, store: Any) -> None:
        """Keras' hook."""
        if not IS_KERAS_3:
            self.reset_metrics()  # tf_keras saves them: sums over private examples, without noise
        super().save_own_variables(store)

    def _save_books(self, store: Any) -> None:
        batch = self._books.public_batch
        arrays = tf.nest.flatten(batch) if batch is not None else []
        structure = None if batch is None else tf.nest.pack_sequence_as(batch, list(range(len(arrays))))
        told = self._books.may_contain_training_rows
        books = {"books": self._books.serialize(), "public_batch": structure, "may_contain_training_rows": told}
        store[_STORE_KEY] = np.frombuffer(json.dumps(books).encode(), np.uint8)
        for i, array in enumerate(arrays):
            store[f"{_BATCH_KEY}{i}"] = _stored(array.numpy())

    def _load_books(self, store: Any) -> None:
        """Adds the ledger of a file, and takes its public batch; of a stock model's there is neither."""
        if _STORE_KEY not in store.keys():
            return
        books = json.loads(bytes(np.asarray(store[_STORE_KEY])).decode())
        self._books.deserialize(books["books"])
        structure = books["public_batch"]
        if structure is not None:
            batch = tf.nest.map_structure(lambda i: _loaded(np.asarray(store[f"{_BATCH_KEY}{i}"])), structure)
            self.set_public_batch(batch, may_contain_training_rows=books.get("may_contain_training_rows", False))


def _numpy_dtype(array: Any, spec: Any) -> Any:
    """The type that a model's input takes; for one that does not know its inputs None, or `object` for strings."""
    if spec is not None:
        return tf.as_dtype(spec.dtype).as_numpy_dtype
    return object if np.asarray(array).dtype.kind in "SU" else None


def _stored(array: np.ndarray) -> np.ndarray:
    """An array as files hold it; of strings, for which HDF5 needs a type of its own, as bytes of JSON."""
    if array.dtype != object:
        return array
    values = [value.decode("latin-1") for value in array.reshape(-1)]  # any byte is one character
    return np.frombuffer(_STRINGS + json.dumps([array.shape, values]).encode(), np.uint8)


def _loaded(array: np.ndarray) -> np.ndarray:
    """The inverse of `_stored`."""
    content = array.tobytes()
    if array.dtype != np.uint8 or not content.startswith(_STRINGS):
        return array
    shape, values = json.loads(content[len(_STRINGS) :])
    return np.array([value.encode("latin-1") for value in values], object).reshape(shape)


def _lossy_file(filepath: Any, better: str) -> ValueError:
    return ValueError(
        "`filepath` names a format that loses the ledger, and epsilon would start from zero. Save to a name that ends "
        f"in {better}. Received: filepath={str(filepath)!r}"
    )
