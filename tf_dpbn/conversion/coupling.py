"""Whether a model's output for one example depends on the others, found by changing those."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_dpbn import _graph
from tf_dpbn._keras import call_model, flatten_layers, isolated_call, kept_state, raw, symbolic_inputs
from tf_dpbn.normalization import GivenStatistics, NormalizationCall

ROWS = 5
_MOST_ROWS = 8
# A row computed twice from the same numbers is the same up to rounding.
_TOLERANCE = 1e-5
# Random numbers that differ may agree by chance, as those of dropout do.
_STEADY_RUNS = 4


def make_batch(model: Any) -> Any:
    """A batch of random floats in [0, 1), or of zeros and ones, for a model that knows its inputs."""
    if not getattr(model, "inputs", None):
        raise ValueError(
            f"Model {model.name!r} does not know the shape of its input. Pass `x`, a few examples. Received: x=None"
        )
    rng = np.random.default_rng(0)

    def draw(spec: Any) -> np.ndarray:
        dtype, shape = tf.as_dtype(spec.dtype), list(spec.shape)
        shape[0] = ROWS if shape[0] is None else shape[0]
        if None in shape or not (dtype.is_floating or dtype.is_integer or dtype.is_bool):
            raise ValueError(
                f"Model {model.name!r} takes inputs of shape {tuple(spec.shape)} and type {dtype.name}, for which no "
                "examples can be made up. Pass `x`, a few examples. Received: x=None"
            )
        if dtype.is_floating:
            return rng.uniform(size=shape).astype(dtype.as_numpy_dtype)
        return rng.integers(0, 2, shape).astype(dtype.as_numpy_dtype)

    return tf.nest.map_structure(draw, symbolic_inputs(model))


def first_rows(x: Any) -> Any:
    """At most eight examples of a batch."""
    x = tf.nest.map_structure(lambda t: np.asarray(t)[:_MOST_ROWS], x)
    rows = {len(t) for t in tf.nest.flatten(x)}
    if len(rows) != 1 or rows.pop() < 2:
        raise ValueError(
            "`x` must hold two examples or more, as many in each of its arrays. "
            f"Received: shapes {[t.shape for t in tf.nest.flatten(x)]}"
        )
    return x


def coupling_layer(model: Any, x: Any, calls: Sequence[NormalizationCall]) -> tuple[str | None, str | None]:
    """Names of the first layer in whose output one example depends on others, and of the first that cannot be judged.

    What follows a layer whose random numbers cannot be held fixed (drawn in a loop, say) is not judged either. The
    model's own name stands for operations outside its layers. `calls` are of DPBatchNormalization in training.
    """
    rows = len(tf.nest.flatten(x)[0])
    probe = _Probe(model, calls, rows)
    specs = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, tf.as_dtype(t.dtype)), x)
    row_spec = tf.TensorSpec([], tf.int32)
    traced = tf.function(probe.compare, autograph=False).get_concrete_function(specs, specs, row_spec)

    def compare(others: Any, row: int) -> np.ndarray:
        return traced(*tf.nest.map_structure(tf.constant, (x, others)), tf.constant(row)).numpy()

    moved, unsteady = np.zeros((2, len(probe.names)), bool)
    unsteady[probe.loops] = True
    for row in range(rows):
        for _ in range(_STEADY_RUNS):
            unsteady |= compare(x, row)
        moved |= compare(tf.nest.map_structure(lambda t, row=row: _change_others(t, row), x), row)
    unsteady[probe.shuffles] = False
    moved[int(np.argmax(unsteady)) if unsteady.any() else len(moved) :] = False
    unsteady &= not moved.any()  # what follows a coupling need not be judged
    first, second = (probe.names[int(np.argmax(f))] if f.any() else None for f in (moved, unsteady))
    return first, second


def layer_scope(model: Any, operation: str) -> tuple[str, str]:
    """The innermost name scope of an operation that belongs to a layer, and the layer's name; empty if there is none.

    Layers open a scope of their name, with a number behind it from the second call on, inside that of their parent.
    """
    parts, parent, found = operation.split("/")[:-1], model, ("", "")
    for k, part in enumerate(parts):
        inside = {layer.name: layer for layer in flatten_layers(parent)}
        name = part if part in inside else re.sub(r"_\d+$", "", part)
        if name in inside:
            parent, found = inside[name], ("/".join(parts[: k + 1]), name)
    return found


def _change_others(values: np.ndarray, row: int) -> np.ndarray:
    """A batch with all rows changed but one; other values than were there only for floats, zeros and ones."""
    if values.dtype.kind == "f":
        changed = 2.0 * values[::-1] + 1.0
    elif values.dtype.kind in "biu" and set(np.unique(values)) <= {0, 1}:
        changed = np.where(values == 0, 1, 0)
    else:
        changed = np.roll(values, 1, axis=0)
    result = changed.astype(values.dtype)
    result[row] = values[row]
    return result


class _Probe:
    """Two training passes in one graph that draw the same random numbers, compared tensor by tensor."""

    def __init__(self, model: Any, calls: Sequence[NormalizationCall], rows: int) -> None:
        self._model, self._calls, self._rows = model, calls, rows
        self.names: list[str] = []
        self.shuffles: list[int] = []
        self.loops: list[int] = []

    def compare(self, x: Any, others: Any, row: tf.Tensor) -> tf.Tensor:
        """For each of `names` whether the given row differs between the passes."""
        (first, operations), (second, again) = self._run(x), self._run(others)
        if [operation.type for operation in operations] != [operation.type for operation in again]:
            raise ValueError(
                f"Model {self._model.name!r} does not do the same in each call: it must not depend on Python's state."
            )
        graph = operations[0].graph
        data = _graph.data_tensors(graph, tf.nest.flatten(x))
        for one, other in zip(operations, again, strict=True):
            if _graph.is_random(one) and not any(id(t) in data for t in one.inputs):
                for ours, theirs in zip(one.outputs, other.outputs, strict=True):
                    _graph.redirect(theirs, ours)
        pairs = self._layer_outputs(operations, again, data)
        outputs = zip(tf.nest.flatten(first), tf.nest.flatten(second), strict=True)
        pairs += [(self._model.name, *map(tf.convert_to_tensor, pair)) for pair in outputs]
        self.names = [name for name, *_ in pairs]
        calls = _graph.calls_with_random_state(graph)
        drawing = {layer_scope(self._model, operation.name)[1] or self._model.name for operation in calls}
        self.loops = [k for k, name in enumerate(self.names) if name in drawing]
        self.shuffles = [k for k, (_, tensor, _) in enumerate(pairs) if tensor.op.type == "RandomShuffle"]
        return tf.stack([self._differs(a, b, row) for _, a, b in pairs])

    def _run(self, x: Any) -> tuple[Any, list[tf.Operation]]:
        graph = tf.compat.v1.get_default_graph()
        before = len(graph.get_operations())
        statistics = []
        for call in self._calls:
            moving = raw(call.layer.moving_mean), raw(call.layer.moving_variance)
            statistics.append(tuple(tf.reshape(t, call.mean.shape) for t in moving))
        scope = GivenStatistics(self._calls, statistics) if self._calls else contextlib.nullcontext()
        with scope, isolated_call([], tf.constant(0)), kept_state(self._model):
            outputs = call_model(self._model, x, training=True)
        # What the first pass captures (as a constant if it is small) is there for the second.
        made = graph.get_operations()[before:]
        return outputs, [operation for operation in made if operation.type not in ("Placeholder", "Const")]

    def _layer_outputs(
        self, operations: list[tf.Operation], again: list[tf.Operation], data: set[int]
    ) -> list[tuple[str, tf.Tensor, tf.Tensor]]:
        """(layer, its output in the first pass, in the second), in the order of the calls."""
        found = []
        for one, other in zip(operations, again, strict=True):
            scope, name = layer_scope(self._model, one.name)
            for ours, theirs in zip(one.outputs, other.outputs, strict=True):
                leaves = any(not consumer.name.startswith(f"{scope}/") for consumer in ours.consumers())
                if name and leaves and id(ours) in data and self._has_rows(ours):
                    found.append((name, ours, theirs))
        return found

    def _has_rows(self, tensor: tf.Tensor) -> bool:
        comparable = tensor.dtype.is_floating or tensor.dtype.is_integer or tensor.dtype.is_bool
        return comparable and bool(tensor.shape.rank) and tensor.shape[0] == self._rows

    def _differs(self, a: tf.Tensor, b: tf.Tensor, row: tf.Tensor) -> tf.Tensor:
        if not self._has_rows(a):
            return tf.constant(True)  # an output without a row for each example
        one, other = (tf.cast(tf.gather(t, row), tf.float64) for t in (a, b))
        scale = tf.reduce_max(tf.where(tf.math.is_finite(one), tf.abs(one), 0.0))
        both_nan = tf.math.is_nan(one) & tf.math.is_nan(other)
        return tf.reduce_any(~((tf.abs(one - other) <= _TOLERANCE * scale) | (one == other) | both_nan))
