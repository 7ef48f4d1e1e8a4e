"""Training passes of models whose train step is not this library's: what their normalizations release and use.

Such a step runs all rows at once, and its optimizer differentiates the loss of each row. So the layers normalize every
row by the same statistics, which are constants from before the step, and attach the local correction of
docs/algorithm.md, section 3a, to them as a gradient: it then enters each row's gradient before that is clipped.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tf_dpbn._keras import call_model, raw
from tf_dpbn.clipping.rows import weighted_sum
from tf_dpbn.interop.row_loss import check_rows
from tf_dpbn.mechanisms import ClippedSum, NoiseSource, add_gaussian_noise, clip_weights
from tf_dpbn.normalization import (
    DPBatchNormalization,
    LocalTerm,
    NormalizationCall,
    PublicPass,
    StatisticsScope,
    assign_moving_statistics,
    moments,
    refresh_moving_statistics,
    with_local_terms,
)

# What replaces an example may be a padding row, whose residual is not zero: a layer does not see weights.
ROWS_CHANGED_BY_ONE_EXAMPLE = 2


@dataclasses.dataclass(frozen=True)
class _HeldTerm:
    """A local term of a kernel layer's parameter in variables, from the refresh before a step until the step."""

    variable: tf.Variable
    term: LocalTerm
    d_mean: tf.Variable
    d_variance: tf.Variable

    @classmethod
    def of(cls, variable: tf.Variable, term: LocalTerm) -> _HeldTerm:
        zeros = [tf.Variable(tf.zeros(variable.shape, term.d_mean.dtype), trainable=False) for _ in range(2)]
        return cls(variable, term, *zeros)

    def read(self) -> LocalTerm:
        return dataclasses.replace(self.term, d_mean=self.d_mean.read_value(), d_variance=self.d_variance.read_value())


class StockPass(StatisticsScope):
    """The scope of a stock model's training passes.

    Formal guarantee: a row's output and gradient are functions of that row, the weights, the public batch and earlier
    releases. Each release is a Gaussian mechanism with the given noise multiplier, whether one example is added,
    removed, or put in the place of another or of a padding row.

    Args:
      model: compiled, as it will be traced.
      public_batch: nest of arrays; any one example where all statistics are noised.
      rows: of every batch, padding included: a public constant, the denominator of releases.
      normalizations: how many calls in training a pass has.

    Attributes:
      credit: how many calls of a counted step may still be made; others fail before they release anything.
      before_step: brings public statistics (of a training pass, with its dropout) and local terms up to the weights.
      for_inference: brings public statistics up to the weights, without dropout.
    """

    def __init__(
        self,
        model: Any,
        public_batch: Any,
        rows: int,
        normalizations: int,
        noise_multiplier: float,
        noise_seed: int | None = None,
    ) -> None:
        self._model, self._optimizer = model, model.optimizer
        self._public_batch = tf.nest.map_structure(tf.convert_to_tensor, public_batch)
        self._rows, self._normalizations, self._noise_multiplier = rows, normalizations, noise_multiplier
        self._source = NoiseSource(noise_seed)
        self._terms: dict[int, tuple[_HeldTerm, ...]] = {}
        self._active: frozenset[tuple[int, int]] = frozenset()
        self.credit = tf.Variable(0, dtype=tf.int64, trainable=False, name="credit")
        self.before_step: Callable[[], None] = tf.function(self._before_step, autograph=False)
        self.for_inference: Callable[[], None] = tf.function(
            lambda: refresh_moving_statistics(self._model, self._public_batch, self._active), autograph=False
        )

    def _before_step(self) -> None:
        variables = [raw(variable) for variable in self._model.trainable_variables]
        inputs = tf.nest.map_structure(tf.identity, self._public_batch)
        with PublicPass() as scope:
            call_model(self._model, inputs, training=True)
        self._active = frozenset(scope.active)
        # What feeds the kernel layers is not released here: their mean is taken to be zero, but for its part along the
        # kernel, which the released mean of the outputs tells.
        calls = with_local_terms(scope.calls, tf.nest.flatten(inputs), variables, lambda call, size: tf.zeros([size]))
        layers = [call.layer for call in calls]
        for call in calls:
            if layers.count(call.layer) > 1:
                continue  # one set of terms cannot serve several calls
            key = id(call.layer)
            if key not in self._terms:
                with tf.init_scope():
                    self._terms[key] = tuple(_HeldTerm.of(variables[term.index], term) for term in call.local_terms)
            for held, term in zip(self._terms[key], call.local_terms, strict=True):
                held.d_mean.assign(term.d_mean)
                held.d_variance.assign(term.d_variance)
        assign_moving_statistics(scope.calls)

    def batch_statistics(
        self, layer: DPBatchNormalization, inputs: tf.Tensor, mask: Any, training: bool
    ) -> tuple[tf.Tensor, tf.Tensor] | None:
        """For a call in training releases noised residuals, if the layer does; returns statistics from before that."""
        if not training:
            return None
        if self._model.optimizer is not self._optimizer:
            raise RuntimeError(_without_callback(layer))  # compiled anew since, and traced with that optimizer
        z = tf.convert_to_tensor(inputs)
        allowed = tf.debugging.Assert(self.credit > 0, [_without_callback(layer)])
        with tf.control_dependencies([*check_rows(z, self._rows), *([] if allowed is None else [allowed])]):
            counted = self.credit.assign_sub(1)
        with tf.control_dependencies([counted]):
            mean, variance = (tf.stop_gradient(tf.identity(each)) for each in layer.moving_statistics())
            if layer.releases:
                released = self.release(layer, z, mask, mean, variance)
                call = NormalizationCall(layer, z, mean, variance, mean, variance, mask is not None)
                # After the reads, also where nothing orders operations on one variable.
                with tf.control_dependencies([mean, variance]):
                    layer.update_statistics(call, released, self._normalizations)
        return self._with_local_terms(layer, mean, variance)

    def release(
        self, layer: DPBatchNormalization, z: tf.Tensor, mask: Any, mean: tf.Tensor, variance: tf.Tensor
    ) -> tf.Tensor:
        """The noised mean over rows of how their moments differ from the statistics in use, [2 * channels]."""
        clipped = clipped_residuals(layer, tf.stop_gradient(z), mask, mean, variance)
        return add_gaussian_noise(clipped, self._noise_multiplier, self._rows, self._source).tensors[0]

    def _with_local_terms(
        self, layer: DPBatchNormalization, mean: tf.Tensor, variance: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """The same values, with the local terms as their gradient by the parameters of the layer before."""
        held = self._terms.get(id(layer), ())
        if not held:
            return mean, variance
        terms = [(each.read(), each.variable.dtype) for each in held]

        @tf.custom_gradient
        def attach(mean: tf.Tensor, variance: tf.Tensor, *parameters: tf.Tensor) -> Any:
            def gradient(c_mean: tf.Tensor, c_variance: tf.Tensor) -> Any:
                return None, None, *[tf.cast(term.pull_back(c_mean, c_variance), dtype) for term, dtype in terms]

            return (tf.identity(mean), tf.identity(variance)), gradient

        with_gradient: tuple[tf.Tensor, tf.Tensor] = attach(mean, variance, *[each.variable.value() for each in held])
        return with_gradient


def _without_callback(layer: DPBatchNormalization) -> str:
    return (
        f"DPBatchNormalization {layer.name!r} was trained without its callback, which counts what the model releases. "
        "Pass tf_dpbn.interop.StatisticsCallback to every `fit`; `train_on_batch` does not run callbacks."
    )


def clipped_residuals(
    layer: DPBatchNormalization, z: tf.Tensor, mask: Any, mean: tf.Tensor, variance: tf.Tensor
) -> ClippedSum:
    """The sum over rows of residuals, each clipped to R = statistics_clip * sqrt(2 * channels).

    A row whose residuals are non-finite contributes zero. Adding or removing a row moves the sum by R at most. But a
    padding row contributes as well, because a layer cannot see that its weight is zero; an example that takes its place
    moves the sum by up to 2 R, and that is the sensitivity declared. Mean and variance are from before the step.
    """

    def of_row(each: tuple[tf.Tensor, ...]) -> tf.Tensor:
        row, *row_mask = [tensor[None] for tensor in each]
        found = moments.residuals(row, mean, variance, layer.epsilon, layer.channel_axes, *row_mask)
        return tf.cast(found, tf.float32)

    vectors = tf.vectorized_map(of_row, (z,) if mask is None else (z, mask))
    bound = layer.statistics_clip * math.sqrt(2 * (mean.shape.num_elements() or 0))
    weights = clip_weights(tf.reduce_sum(tf.square(vectors), 1), bound, None)
    total = weighted_sum(weights, tf.where(weights[:, None] > 0, vectors, 0.0))
    return ClippedSum((total,), ROWS_CHANGED_BY_ONE_EXAMPLE * bound)
