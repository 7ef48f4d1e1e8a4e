"""What a trace of a training pass shows: normalization calls, state that examples change, losses that pair rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_dpbn import _graph, _keras
from tf_dpbn.model.checks import refuse_call_time_loss
from tf_dpbn.normalization import PublicPass

# Of the made-up batch on which a loss is tried.
_ROWS = 6  # of two classes, so that there are triplets among them
_UNKNOWN_SIZE = 4
_LARGEST_ROW = 2**20  # such outputs are pictures, not embeddings


@dataclasses.dataclass(frozen=True)
class Structure:
    """What the step has to know of the model's training pass."""

    active: frozenset[tuple[int, int]]  # the normalization calls that are in training (see `normalization.PublicPass`)
    needs_public_batch: bool  # some of these take statistics from a public batch
    has_state: bool  # some layer updates state that does not depend on the examples (spectral normalization, a counter)


def trace_structure(model: Any, x: Any, y: Any) -> Structure:
    """Traces a compiled model's training pass on a batch (nests of tensors or specs), without running it.

    Refuses state that depends on the examples, losses that layers add, and a loss that compares examples.
    """
    specs = []

    def loss(y_pred: Any, y: Any) -> Any:
        _keras.build_compiled_loss(model, y, y_pred)
        specs.append(tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), (y, y_pred)))
        with _keras.isolated_call([], tf.constant(0), _keras.tracker_variables(model)) as isolated:
            return _keras.compiled_data_loss(model, y, y_pred, None, isolated)[0]

    trace = trace_training_pass(model, x, y, loss)
    for layer in trace.layers_with_losses:
        refuse_call_time_loss(layer)
    for change in trace.changes_from_data:
        raise ValueError(change.reason)
    with tf.init_scope():  # once a trace, on made-up numbers
        check_rows_alone(model, *specs[-1])
    needs_public_batch = any(call.layer.uses_public_batch for call in trace.scope.calls)
    return Structure(frozenset(trace.scope.active), needs_public_batch, trace.has_state)


@dataclasses.dataclass(frozen=True)
class StateChange:
    """An operation that writes what depends on examples to state."""

    layers: tuple[str, ...]  # names of those that own the state, as far as it is among the model's weights
    operation: str  # its name
    reason: str  # what to tell the user
    variables: tuple[Any, ...] = ()  # which of the layers' it changes


@dataclasses.dataclass(frozen=True)
class TrainingTrace:
    """What a trace of a training pass shows."""

    scope: PublicPass  # the normalization calls
    layers_with_losses: list[Any]  # that added a loss while they were called
    changes_from_data: list[StateChange]
    has_state: bool  # whether there are other state changes than those of random generators


def trace_training_pass(
    model: Any, x: Any, y: Any = (), then: Callable[[Any, Any], Any] = lambda y_pred, y: ()
) -> TrainingTrace:
    """Traces the training pass of any model on a batch; `then` is what else belongs to it, from (predictions, y)."""
    scope = PublicPass()

    def forward(x: Any, y: Any) -> Any:
        with scope:
            y_pred = _keras.call_model(model, x, training=True)
        return y_pred, then(y_pred, y)

    specs = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), (x, y))
    _keras.clear_call_time_losses(model)
    traced = tf.function(forward, autograph=False).get_concrete_function(*specs)
    added = _keras.call_time_losses(model)
    _keras.clear_call_time_losses(model)
    return TrainingTrace(scope, added, *_state_changes(model, traced.graph))


def _state_changes(model: Any, graph: Any) -> tuple[list[StateChange], bool]:
    """State changes that depend on examples; and whether there are any others."""
    owners = {}
    for layer in [model, *_keras.flatten_layers(model)]:
        owners.update({id(_keras.raw(variable)): layer.name for variable in _keras.own_variables(layer)})
    variables = _graph.captured_variables(graph, [_keras.raw(variable) for variable in model.variables])
    captured = {id(inside) for _, inside in graph.captures}
    data = _graph.data_tensors(graph, [t for t in graph.inputs if id(t) not in captured])
    random_states = {id(state) for state in _keras.seed_states(model)}
    from_data, has_state = [], False
    for operation in _graph.state_changes(graph):
        changed = [variables[id(t)] for t in operation.inputs if id(t) in variables]
        if any(id(tensor) in data for tensor in operation.inputs):
            names = [owners.get(id(v), model.name) for v in changed]
            reason = _reason_of_change(operation, changed, names)
            from_data.append(StateChange(tuple(names), operation.name, reason, tuple(changed)))
        has_state = has_state or any(id(variable) not in random_states for variable in changed)
    return from_data, has_state


def _reason_of_change(operation: Any, changed: Sequence[Any], names: Sequence[str]) -> str:
    parts = [f"{v.name!r} of layer {name!r}" for v, name in zip(changed, names, strict=True)]
    what = ", ".join(parts) or f"outside the model's weights (operation {operation.type} {operation.name!r})"
    return (
        f"The model or its loss updates state {what} during training from the examples, un-noised: that couples "
        "private examples. Use a layer or loss without such state (for a recurrent layer: stateful=False, "
        f"use_cudnn='auto'), or freeze it. Received: {operation.type}"
    )


def check_rows_alone(model: Any, y: Any, y_pred: Any) -> None:
    """Refuses a loss that compares the rows of a batch: of one example alone it is the same whatever is predicted.

    A loss whose value on a batch is merely not the mean of its values on the rows (Dice of a whole batch) is taken
    example by example. Nothing is refused where the loss cannot be computed on made-up numbers. `y` and `y_pred` are
    nests of what has shapes [batch, ...] and types.
    """
    for fractions in (True, False):
        try:
            y_made, one, other = _made_up(y, 0, fractions), _made_up(y_pred, 1, True), _made_up(y_pred, 2, True)
            rows = [tf.nest.map_structure(lambda t, i=i: t[i : i + 1], (y_made, one, other)) for i in range(_ROWS)]
            alone = any(_depends_on_predictions(model, *row) for row in rows)
            pairs_rows = not alone and _depends_on_predictions(model, y_made, one, other)
        except Exception:  # whatever a loss of the user's raises on numbers that it was not made for
            continue
        if pairs_rows:
            raise ValueError(
                f"`loss` must depend on one example at a time: for each of {_ROWS} made-up rows alone it is the same "
                "(or not a number) whatever is predicted, so a private step would learn nothing. Make the pair or "
                "triplet one example: a model that takes its members as several inputs, and a loss of what it returns "
                f"for them. Received: loss={model.loss!r}"
            )


def _made_up(like: Any, seed: int, fractions: bool) -> Any:
    """Tensors of `like`'s structure: fractions where types allow, or 0 and 1, valid class numbers for whatever loss."""
    rng = np.random.default_rng(seed)

    def made(t: Any) -> tf.Tensor:
        shape = [_ROWS, *(_UNKNOWN_SIZE if size is None else size for size in t.shape[1:])]
        if np.prod(shape[1:]) > _LARGEST_ROW:
            raise ValueError("Too large to try.")
        if fractions and t.dtype.is_floating:
            return tf.constant(rng.uniform(0.1, 0.9, shape), t.dtype)
        return tf.cast(np.broadcast_to((np.arange(_ROWS) % 2).reshape(-1, *[1] * (len(shape) - 1)), shape), t.dtype)

    return tf.nest.map_structure(made, like)


def _depends_on_predictions(model: Any, y: Any, one: Any, other: Any) -> bool:
    values = []
    for y_pred in (one, other):
        with _keras.isolated_call([], tf.constant(0), _keras.tracker_variables(model)) as scope:
            values.append(float(tf.reduce_sum(_keras.compiled_data_loss(model, y, y_pred, None, scope)[0])))
    return bool(np.isfinite(values).all()) and abs(values[0] - values[1]) > 1e-6 * max(1.0, abs(values[0]))
