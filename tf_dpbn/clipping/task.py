"""What passes between a model and a clipping engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tf_dpbn.normalization import NormalizationCall, Normalized, StatisticsRelease


@dataclasses.dataclass(frozen=True)
class Batch:
    """Private examples of one step.

    Attributes:
      x, y: nests of tensors [batch, ...].
      sample_weight: [batch, ...], a nest of them (one an output), or None; bool or int8 ones only mark padding.
      mask: bool [batch], False for padding, or None where every row is a real example.
    """

    x: Any
    y: Any
    sample_weight: Any
    mask: tf.Tensor | None


class MaskedPredictions(NamedTuple):
    """Predictions to some of which Keras attached a mask, which metrics read.

    Attributes:
      outputs: nest of predictions.
      masks: for each of them its mask, or an empty tuple.
    """

    outputs: Any
    masks: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class ExampleResult:
    """What the forward pass of one example yields.

    Attributes:
      loss: scalar, its sample weight included.
      parts: its unweighted losses by output, as Keras logs them; empty for a single output.
      y_pred: the prediction, or MaskedPredictions, without a batch axis.
      residuals: for each of the task's releases, a float32 vector.
    """

    loss: tf.Tensor
    parts: tuple[tf.Tensor, ...]
    y_pred: Any
    residuals: tuple[tf.Tensor, ...] = ()

    def logged(self) -> tuple[tf.Tensor, tuple[tf.Tensor, ...]]:
        """(loss, parts) in the float32 of a BatchResult."""
        return tf.cast(self.loss, tf.float32), tuple(tf.cast(part, tf.float32) for part in self.parts)


@dataclasses.dataclass(frozen=True)
class BatchPass:
    """What the forward pass of several examples at once yields, in the current graph.

    Attributes:
      y_pred: nest of predictions, [rows, ...].
      normalized: for each of the task's calls, what was normalized.
    """

    y_pred: Any
    normalized: Sequence[Normalized]


@dataclasses.dataclass(frozen=True)
class BatchResult:
    """Private by-products of a clipped sum: for Keras' un-noised metrics, never for an update.

    Attributes:
      loss: float32 [batch].
      parts: float32 [batch] for each output.
      y_pred: nest of [batch, ...], or MaskedPredictions of such.
      non_finite: int64 scalar, how many real examples were dropped because their gradient was non-finite.
    """

    loss: tf.Tensor
    parts: tuple[tf.Tensor, ...]
    y_pred: Any
    non_finite: tf.Tensor


@dataclasses.dataclass(frozen=True)
class Task:
    """What an engine needs to know about the model, at the current weights.

    Attributes:
      run_example: maps (x, y, sample_weight, index, statistics) of one example, without batch axis, to its
        ExampleResult. It runs the model on a batch of one, so nothing in it can see another example.
      variables: the trainable variables.
      calls: the normalization calls in training; their statistics are public or released.
      run_batch: maps (x, index, statistics) of several examples to a BatchPass, in which nothing but the model itself
        could let one example see another; None where only `run_example` says what the model does.
      example_loss: maps (y_pred, y, sample_weight, index) of one example, without batch axis, to (loss, parts, y_pred)
        of its ExampleResult.
      expected_rows: how many rows a batch has, about, where its shape does not say.
      batch_trace: what an engine traced of `run_batch`.
      loss_scale: a power of two; losses are multiplied by it while they are differentiated, and gradients divided by
        it in float32, so that small gradients survive half precision.
    """

    run_example: Callable[..., ExampleResult]
    variables: tuple[tf.Variable, ...]
    calls: Sequence[NormalizationCall] = ()
    loss_scale: float = 1.0
    run_batch: Callable[..., BatchPass] | None = None
    example_loss: Callable[..., Any] | None = None
    expected_rows: int | None = None
    batch_trace: Any = None

    @property
    def statistics(self) -> tuple[tuple[tf.Tensor, tf.Tensor], ...]:
        """(mean, variance) of each call."""
        return tuple((call.mean, call.variance) for call in self.calls)

    @property
    def releases(self) -> tuple[StatisticsRelease, ...]:
        """What is released of the residuals of some calls' statistics, in the order of the calls."""
        return tuple(call.release for call in self.calls if call.release is not None)
