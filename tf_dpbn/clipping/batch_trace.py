"""What book-keeping needs of a microbatch, from one pass of all its examples through the model.

The pass is an ordinary one of a batch, in TensorFlow's ordinary kernels. Its graph, forward and backward, is proved to
keep examples apart (`independence`), or the caller is told that it is not. Only the loss is vectorized over examples:
a loss averages over whatever batch it is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from tf_dpbn import _graph
from tf_dpbn._keras import masks_of, raw
from tf_dpbn.clipping.independence import NotProvedError, Proof, check_no_state, check_same_operations
from tf_dpbn.clipping.rows import reshape_rows, unscaled, widen
from tf_dpbn.clipping.rules import find_rule
from tf_dpbn.clipping.rules.base import Found
from tf_dpbn.clipping.task import BatchPass, Task
from tf_dpbn.clipping.uses import Use, find_uses
from tf_dpbn.clipping.vectorization import vectorize
from tf_dpbn.normalization import NormalizationCall, Normalized, moments, side_by_side


@dataclasses.dataclass(frozen=True)
class Records:
    """What a pass leaves behind of each example; tensors are [rows, ...], or without that axis for one example.

    Attributes:
      uses: the operations that rules cover.
      data: for each of them (inputs, cotangent), see `rules.base.Rule`.
      whole: by variable gradients that were computed as such; they are added to those of its uses.
      cotangents: derivatives of the loss by mean and variance of each normalization call, [rows, channels].
      results: (loss, parts, y_pred).
      residuals: of the statistics, by release.
    """

    uses: tuple[Use, ...]
    data: Sequence[Any]
    whole: Mapping[int, Sequence[tf.Tensor]]
    cotangents: Sequence[tf.Tensor]
    results: tuple[Any, Any, Any]
    residuals: Sequence[tf.Tensor]

    def tensors(self) -> Any:
        """All but the uses, as a nest."""
        return self.data, self.whole, self.cotangents, self.results, self.residuals

    def with_tensors(self, tensors: Any) -> Records:
        """The same of other tensors."""
        return Records(self.uses, *tensors)


class BatchTrace:
    """Runs several examples of a task through the model at once; traced once for each number of rows.

    Args:
      task: the model.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._records: dict[int, Records] = {}
        self._failure: NotProvedError | None = None
        self._function = tf.function(self._run, autograph=False)

    def _run(self, rows: Any) -> Any:
        records = _record(self._task, rows)
        self._records[rows[-1].shape[0]] = records
        return records.tensors()

    def records(self, rows: Any) -> Records:
        """The records, without values, of as many examples as `rows` has: (x, y, weight, index, mask).

        Raises:
          NotProvedError: if it is not proved that examples stay apart.
        """
        if self._task.run_batch is None:
            raise NotProvedError("the model is known by one example only")
        if self._task.releases:
            raise NotProvedError("statistics are released")
        count = rows[-1].shape[0]
        if self._failure is not None:  # another number of rows would fail likewise, after as long a trace
            raise self._failure
        if count not in self._records:
            specs = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), rows)
            try:
                self._function.get_concrete_function(specs)
            except NotProvedError as error:
                self._failure = error
                raise
        return self._records[count]

    def __call__(self, rows: Any) -> Records:
        """The records of rows; arguments and errors as for `records`."""
        return self.records(rows).with_tensors(self._function(rows))


def _record(task: Task, rows: Any) -> Records:
    x, y, weight, index, _ = rows
    graph = tf.compat.v1.get_default_graph()
    proof = Proof(tf.nest.flatten((x, y, weight)), index.shape[0], index)
    result, operations = _forward(task, x, index)
    check_no_state(proof, operations)
    one_more: list[Any] = []
    specs = tf.nest.map_structure(lambda t: tf.TensorSpec([proof.rows + 1, *t.shape[1:]], t.dtype), (x, index))
    tf.function(lambda *rows: one_more.extend(_forward(task, *rows)[1]), autograph=False).get_concrete_function(*specs)
    check_same_operations(operations, one_more)
    uses, others = find_uses(operations, task.variables, lambda *use: _find_rule(proof, *use))
    if others:
        raise NotProvedError(f"there is no rule for a use of {task.variables[others[0]].name!r}")
    if len(result.normalized) != len(task.calls):
        raise NotProvedError("normalizations were left out")
    loss, parts, y_pred, derivatives = _losses(task, proof, result, rows)
    sources = [*[use.output for use in uses], *[each.outputs for each in result.normalized]]
    predictions = tf.nest.flatten(result.y_pred)
    before = len(graph.get_operations())
    gradients = tf.gradients(predictions, sources, derivatives)
    check_no_state(proof, graph.get_operations()[before:])
    found = []
    for gradient, source in zip(gradients, sources, strict=True):
        if gradient is None:
            gradient = tf.zeros([proof.rows, *proof.row_shape(source)], source.dtype)
        elif not isinstance(gradient, tf.Tensor):
            raise NotProvedError(f"the gradient by {source.name!r} is sparse")
        elif proof.rows_of(gradient) != proof.rows_of(source):
            raise NotProvedError(f"the gradient by {source.name!r} has its examples elsewhere")
        else:
            gradient = proof.by_row(gradient)
        found.append(unscaled(gradient, task.loss_scale))
    data = [(use.inputs, cotangent) for use, cotangent in zip(uses, found[: len(uses)], strict=True)]
    whole: dict[int, list[tf.Tensor]] = {}
    cotangents: list[tf.Tensor] = []
    index_of = {id(variable): i for i, variable in enumerate(task.variables)}
    derivatives_of_calls = _of_normalizations(proof, task.calls, result.normalized, found[len(uses) :])
    for call, d_gamma, d_beta, *of_statistics in derivatives_of_calls:
        for variable, gradient in ((call.layer.gamma, d_gamma), (call.layer.beta, d_beta)):
            i = None if variable is None else index_of.get(id(raw(variable)))
            if i is not None:
                whole.setdefault(i, []).append(_graph.reshape(gradient, [proof.rows, *task.variables[i].shape]))
        cotangents += of_statistics
    return Records(uses, data, whole, cotangents, (loss, parts, y_pred), ())


def _forward(task: Task, x: Any, index: tf.Tensor) -> tuple[BatchPass, list[tf.Operation]]:
    """The pass of examples through the model, and its operations."""
    graph = tf.compat.v1.get_default_graph()
    before = len(graph.get_operations())
    try:
        result = task.run_batch(x, index, task.statistics)  # type: ignore[misc]
    except (TypeError, ValueError, tf.errors.OpError) as error:  # the model's own, which comes back example by example
        raise NotProvedError(f"the model does not take {index.shape[0]} examples") from error
    return result, graph.get_operations()[before:]


def _losses(task: Task, proof: Proof, result: BatchPass, rows: Any) -> tuple[Any, Any, Any, list[tf.Tensor]]:
    """Losses, their parts and predictions by row, and the derivatives of the losses by the model's predictions."""
    _, y, weight, index, _ = rows
    if tf.nest.flatten(masks_of(result.y_pred)):
        raise NotProvedError("predictions carry masks")
    predictions = tf.nest.flatten(result.y_pred)
    for each in predictions:
        state = proof.rows_of(each)
        if state.axis or state.outer != 1:
            raise NotProvedError("the first axis of a prediction is not that of the examples")

    def differentiate(row: Any) -> Any:
        given, *rest = row
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(tf.nest.flatten(given))
            loss, parts, y_pred = task.example_loss(given, *rest)  # type: ignore[misc]
            scaled = task.loss_scale * widen(loss)
        derivatives = tape.gradient(scaled, tf.nest.flatten(given), unconnected_gradients="zero")
        loss, parts = tf.cast(loss, tf.float32), tuple(tf.cast(part, tf.float32) for part in parts)
        return loss, parts, y_pred, derivatives

    copies = [proof.rows_of(each).inner for each in predictions]
    given = [
        each if number == 1 else tf.reshape(each, [proof.rows, number, *each.shape[1:]])
        for each, number in zip(predictions, copies, strict=True)
    ]
    by_row = (tf.nest.pack_sequence_as(result.y_pred, given), y, weight, index)
    vectorized = vectorize(differentiate, by_row)
    if vectorized is None:
        raise NotProvedError("the loss cannot be vectorized")
    specs = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), by_row)
    if _graph.captured_variables(vectorized.get_concrete_function(specs).graph, task.variables):
        raise NotProvedError("the loss reads trainable variables")
    loss, parts, y_pred, derivatives = vectorized(by_row)
    derivatives = [tf.reshape(d, each.shape) for d, each in zip(derivatives, predictions, strict=True)]
    for derivative, each in zip(derivatives, predictions, strict=True):
        proof.assume(derivative, proof.rows_of(each))
    return loss, parts, y_pred, derivatives


def _of_normalizations(
    proof: Proof, calls: Sequence[NormalizationCall], normalized: Sequence[Normalized], cotangents: Sequence[tf.Tensor]
) -> list[tuple[Any, ...]]:
    """(call, derivatives of the losses by its scale, offset, mean and variance, [rows, channels] each) for all calls.

    With g the cotangent of the result, those by scale and offset are sum_t g_t (z_t - mu) r and sum_t g_t.
    """
    if not calls:
        return []
    sizes = [call.channels for call in calls]
    dtype = tf.float64 if any(each.inputs.dtype == tf.float64 for each in normalized) else tf.float32
    of_offsets: list[tf.Tensor] = []
    products: list[tf.Tensor] = []
    for call, size, each, cotangent in zip(calls, sizes, normalized, cotangents, strict=True):
        rank = each.inputs.shape.rank
        channels = [1 + axis % rank for axis in call.layer.channel_axes]
        others = [axis for axis in range(1, rank + 1) if axis not in channels]
        for sums, values in ((of_offsets, cotangent), (products, cotangent * proof.by_row(each.inputs))):
            sums.append(tf.cast(reshape_rows(tf.reduce_sum(values, others), [size]), dtype))
    mean = moments.joined([each.mean for each in normalized], dtype)
    gamma, variance, epsilon = side_by_side(calls, [each.variance for each in normalized], dtype)
    d_beta = tf.concat(of_offsets, 1)
    d_gamma = (tf.concat(products, 1) - mean * d_beta) * tf.math.rsqrt(variance + epsilon)
    c = moments.statistics_cotangents(d_gamma, d_beta, gamma, variance, epsilon)
    return list(zip(calls, *(tf.split(each, sizes, 1) for each in (d_gamma, d_beta, *c)), strict=True))


class _RowTensor:
    """How a rule sees a tensor of the batch: with the shape that it would have for one example."""

    def __init__(self, proof: Proof, tensor: tf.Tensor) -> None:
        self.tensor = tensor
        self.shape = proof.row_shape(tensor)
        self.dtype = tensor.dtype


class _RowOperation:
    """How a rule sees an operation on the batch: as it would be for one example."""

    def __init__(self, proof: Proof, operation: tf.Operation) -> None:
        self.type, self.get_attr = operation.type, operation.get_attr

        def seen(tensor: tf.Tensor) -> Any:
            return _RowTensor(proof, tensor) if proof.is_rows(tensor) else tensor

        self.inputs = [seen(tensor) for tensor in operation.inputs]
        self.outputs = [seen(operation.outputs[0])]


def _find_rule(proof: Proof, operation: tf.Operation, position: int, shape: tf.TensorShape) -> Found:
    for tensor in (operation.outputs[0], *operation.inputs):
        proof.repeat_if_alike(tensor)
    if not proof.is_rows(operation.outputs[0]):
        return None
    found = find_rule(_RowOperation(proof, operation), position, shape)
    if found is None or not all(isinstance(each, _RowTensor) for each in found[1]):
        return None
    return found[0], tuple(proof.by_row(each.tensor) for each in found[1])
