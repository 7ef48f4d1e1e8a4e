"""A model's public batch, and moving statistics that match the model's weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tf_dpbn import _validate, public_data
from tf_dpbn._keras import as_compiled, call_model, clear_call_time_losses, flatten_layers, keras, symbolic_outputs
from tf_dpbn.model.training_trace import Structure, trace_training_pass
from tf_dpbn.normalization import DPBatchNormalization, PublicPass, refresh_moving_statistics


class _Refresh(keras.callbacks.Callback):
    """Keeps moving statistics those of the weights, in some of the hooks."""

    def __init__(self, *hooks: str) -> None:
        super().__init__()
        for hook in hooks:
            setattr(self, hook, lambda *_, **__: self.model._public.refresh_if_trained())


def with_refreshes(callbacks: Any) -> list[Any]:
    """The callbacks that `fit` got, between those that keep moving statistics those of the weights."""
    given = tf.nest.flatten(getattr(callbacks, "callbacks", callbacks) or [])
    # Others read statistics at the ends of epochs and of training, by when Keras may have written averaged weights.
    before = _Refresh("on_epoch_end", "on_train_end")
    # Others swap weights when evaluation, prediction or training begins or ends.
    behind = _Refresh("on_test_begin", "on_test_end", "on_predict_begin", "on_predict_end", "on_train_end")
    return [before, *given, behind]


class PublicStatistics:
    """The public batch of a DPModel, and the moving statistics that it gives."""

    def __init__(self, model: Any) -> None:
        self.batch: Any = None  # a nest of tensors
        self.may_contain_training_rows = False  # as the user said
        self.structure: Structure | None = None  # of the last trace of the training pass
        self._model = model
        self._refresh: tuple[Any, Any] = None, None

    def set_batch(self, batch: Any, value_range: tuple[float, float] | None, may_contain_training_rows: bool) -> bool:
        """Checks and takes a batch; returns whether it differs from the one before. See `DPModel.set_public_batch`."""
        arrays = tf.nest.flatten(batch)
        specs: list[Any] = [None] * len(arrays)
        if getattr(self._model, "inputs", None):
            specs = tf.nest.flatten(self._model.inputs)
            if len(specs) != len(arrays):
                requirement = f"have one array for each of the model's {len(specs)} inputs"
                raise _validate.argument_error("public_batch", f"{len(arrays)} arrays", requirement)
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
        self.may_contain_training_rows = may_contain_training_rows
        old = [] if self.batch is None else tf.nest.flatten(self.batch)
        if len(old) == len(checked) and all(map(np.array_equal, old, checked)):
            return False
        self.batch = tf.nest.pack_sequence_as(batch, [tf.convert_to_tensor(array) for array in checked])
        self._refresh = None, None
        return True

    def require_batch(self) -> Any:
        """The batch, which there must be."""
        if self.batch is None:
            shape = getattr(self._model, "input_shape", None)
            shape = shape[1:] if isinstance(shape, tuple) and shape[:1] == (None,) else "(height, width, channels)"
            raise ValueError(
                "The model contains DPBatchNormalization and has no public batch to take statistics from. Set one "
                "before training, for example model.set_public_batch(tf_dpbn.public_data.uniform_noise("
                f"{shape}, value_range=(0.0, 1.0))) with the range of your data, dead_leaves for images; or keep "
                "pretrained statistics: convert(model, statistics='fixed'). Received: public_batch=None"
            )
        return self.batch

    def refresh_if_trained(self) -> None:
        """Refreshes moving statistics, but not those with which a model came that has not trained here."""
        if self._model.private_steps:
            self.refresh()

    def refresh(self) -> None:
        """See `DPModel.refresh_statistics`."""
        active = self._calls_in_training()
        if not active:
            return
        batch = self.require_batch()
        if self._refresh[0] != active:
            refresh = tf.function(lambda: refresh_moving_statistics(self._model, batch, active), autograph=False)
            # Concrete, since TensorFlow warns of functions of several models as of one that is traced again and again.
            self._refresh = active, refresh.get_concrete_function()
        self._refresh[1]()

    def _calls_in_training(self) -> frozenset[tuple[int, int]]:
        """The normalization calls in training during a step, as far as the public batch decides any of them."""
        model = self._model
        if self.structure is not None:
            return self.structure.active if self.structure.needs_public_batch else frozenset()
        if not model.built:
            raise RuntimeError("Build the model before refresh_statistics: call it on a batch, or train it.")
        with as_compiled(model):
            layers = [each for each in flatten_layers(model) if isinstance(each, DPBatchNormalization)]
            needed = any(each.trainable and each.uses_public_batch for each in layers)
            if self.batch is None and not needed:
                return frozenset()
            batch = self.require_batch()
            specs = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), batch)
            if symbolic_outputs(model) is None and model.distribute_strategy.num_replicas_in_sync == 1:
                trace_outputs(model, specs)
            found: list[set[tuple[int, int]]] = []
            trace_in_replica(model, lambda x: found.append(trace_training_pass(model, x).scope.active), specs)
        return frozenset(found[0])


def trace_in_replica(model: Any, function: Callable[..., Any], *specs: Any) -> None:
    """Traces a function as the step is traced, in the context of a replica."""
    run = model.distribute_strategy.run

    def traced(*args: Any) -> None:
        run(lambda *args: function(*args) and None, args=args)

    tf.function(traced, autograph=False).get_concrete_function(*specs)


def trace_outputs(model: Any, x: Any) -> Any:
    """Creates all variables of a model, of layers in training only and in inference only too.

    Takes the specs of a batch without augmented copies, and returns those of what the model returns in training.
    """
    found = []

    def passes(x: Any) -> None:
        with PublicPass():
            y_pred = call_model(model, x, training=True)
        found.append(tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), y_pred))
        call_model(model, x, training=False)

    trace_in_replica(model, passes, x)
    clear_call_time_losses(model)
    return found[0]


def _numpy_dtype(array: Any, spec: Any) -> Any:
    """The type that a model's input takes; for one that does not know its inputs None, or `object` for strings."""
    if spec is not None:
        return tf.as_dtype(spec.dtype).as_numpy_dtype
    return object if np.asarray(array).dtype.kind in "SU" else None
