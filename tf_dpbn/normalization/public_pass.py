"""The public forward pass of a train step: statistics, how they depend on the weights, and what is released of them."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_dpbn import _graph
from tf_dpbn._keras import call_model, flatten_layers, raw
from tf_dpbn.mechanisms import NoisedGradients, clip_weights
from tf_dpbn.normalization import moments
from tf_dpbn.normalization.layer import (
    DPBatchNormalization,
    GivenStatistics,
    NormalizationCall,
    PublicPass,
    side_by_side,
)
from tf_dpbn.normalization.local_terms import PassGraph, with_local_terms

CORRECTIONS = ("auto", "local", "adaptive", "full", "none")
# From this many normalizations on "auto" is "adaptive". In stacks of 8 and 12 convolutions that gained 2.1 and 3.6
# points over "local", in those of 2 and 4 it lost 1.0 and 0.5, within the spread of seeds (docs/results.md, table b).
_DEEP = 8
# Of the average by which the adaptive correction tells signal from noise: about the last twenty steps.
_DECAY = 0.9


class ReleasedMeans:
    """Means of released values that a model keeps from step to step: post-processing, and saved with the model.

    Attributes:
      variables: by a name that the layer's makes unique, which is also that in files.
    """

    def __init__(self) -> None:
        self.variables: dict[str, tf.Variable] = {}
        self._saved: dict[str, list[float]] = {}

    def of_input(self, layer_name: str, earlier: int, size: int) -> tf.Variable:
        """The mean of what the kernel layer is fed with that feeds a normalization, in a call of it.

        Args:
          layer_name: of the normalization, see `names_of_normalizations`.
          earlier: how many calls of it came before in the pass.
          size: the number of channels.
        """
        return self._mean(f"{layer_name}:{earlier}", size)

    def of_gradients(self, layers: Sequence[DPBatchNormalization]) -> tf.Variable:
        """The means of the gradients by scales, then by offsets, and in the last entry the variance of their noise."""
        return self._mean("gradients", 2 * sum(math.prod(layer.gamma.shape) for layer in layers) + 1)

    def _mean(self, name: str, size: int) -> tf.Variable:
        variable = self.variables.get(name)
        if variable is None or variable.shape[0] != size:
            value = self._saved.get(name, [])
            with tf.init_scope():
                variable = tf.Variable(
                    value if len(value) == size else [0.0] * size,
                    dtype=tf.float32,
                    trainable=False,
                    name="released_mean",
                    aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
                )
            self.variables[name] = variable
        return variable

    def values(self) -> dict[str, list[float]]:
        """All means, to be saved."""
        return {**self._saved, **{name: variable.numpy().tolist() for name, variable in self.variables.items()}}

    def load(self, values: dict[str, list[float]]) -> None:
        """Takes over saved `values`; means that are not among them begin anew."""
        self._saved = dict(values)
        for name, variable in self.variables.items():
            value = values.get(name, [])
            variable.assign(value if len(value) == variable.shape[0] else tf.zeros_like(variable))


class PublicForward:
    """Statistics for the private examples at the current weights, within the graph of one train step.

    Every attribute is a function of the weights, the public batch and earlier releases. Only `residuals` touches
    private data, one example at a time.

    Args:
      model: the model.
      public_batch: nest of tensors [public examples, ...]; any single example where all statistics are noised ones.
      correction: which part of the gradient through the statistics to restore:
        "auto": "adaptive" in deep models and "local" in others, see `chosen_correction`.
        "local": section 3a for calls that one kernel layer feeds, section 3b for the others.
        "full": 3a where possible, and 3b for every call that it can serve.
        "adaptive": as "full", but where there is 3a, 3b only as far as what it starts from is more than noise.
        "none": statistics are constants; training suffers badly, for studies only.
      released_means: what the model keeps of earlier releases.

    Attributes:
      calls: the normalization calls in training, in order.

    Source: docs/algorithm.md, sections 2, 3 and 5.
    """

    def __init__(self, model: Any, public_batch: Any, correction: str, released_means: ReleasedMeans) -> None:
        self._correction, self._released_means = chosen_correction(model, correction), released_means
        self._names = names_of_normalizations(model)
        self._variables = [raw(variable) for variable in model.trainable_variables]
        inputs = tf.nest.map_structure(tf.identity, public_batch)
        with tf.GradientTape(watch_accessed_variables=False) as self._tape, PublicPass() as scope:
            self._tape.watch(self._variables)
            call_model(model, inputs, training=True)
        self.calls: list[NormalizationCall] = scope.calls
        if self._correction != "none":
            self.calls = with_local_terms(self.calls, tf.nest.flatten(inputs), self._variables, self._input_mean)
            self.calls = [dataclasses.replace(call, is_nonlocal=self._is_nonlocal(call)) for call in self.calls]

    def _name_of_layer(self, layer: DPBatchNormalization) -> str:
        return self._names.get(id(layer)) or str(layer.name)  # Keras may not know a layer that a `call` keeps to itself

    def _input_mean(self, call: NormalizationCall, size: int) -> tf.Variable:
        of_layer = [id(each) for each in self.calls if each.layer is call.layer]
        return self._released_means.of_input(self._name_of_layer(call.layer), of_layer.index(id(call)), size)

    def _is_nonlocal(self, call: NormalizationCall) -> bool:
        if self._correction == "local" and call.local_terms:
            return False
        layer, trained = call.layer, {id(variable) for variable in self._variables}
        both = layer.center and layer.scale and {id(raw(layer.gamma)), id(raw(layer.beta))} <= trained
        if layer.statistics != "noised" and both and sum(each.layer is layer for each in self.calls) == 1:
            return True
        if not call.local_terms:
            warnings.warn(
                f"DPBatchNormalization {layer.name!r} gets no gradient through its statistics: no single kernel layer "
                "feeds it, and the non-local correction needs public statistics (statistics='public' or 'anchored'), a "
                "scale and an offset that train, and one call of the layer a pass. It may train poorly.",
                stacklevel=2,
            )
        return False

    def residuals(self, given: GivenStatistics, inputs: Sequence[tf.Tensor]) -> tuple[tf.Tensor, ...]:
        """For each release one example's vector: residuals of its moments, and of its kernel layer's input.

        Args:
          given: the scope in which the example went through the model.
          inputs: the tensors through which it entered.
        """
        graph = PassGraph(inputs, self._variables)
        vectors = []
        for call, (z, mask) in zip(self.calls, given.inputs, strict=True):
            layer = call.layer
            if not layer.releases:
                continue
            parts = [moments.residuals(z, call.mean, call.variance, layer.epsilon, layer.channel_axes, mask)]
            if call.input_mean is not None:
                mean_input = graph.mean_input(z, call)
                if mean_input is None:
                    raise ValueError(
                        f"DPBatchNormalization {layer.name!r} is fed by another layer for one example than for the "
                        "public pass. The model must compute the same for any number of examples; or compile it with "
                        'correction="none". Received: statistics="noised"'
                    )
                center, scale = _value_and_scale(call.input_mean)
                parts.append((mean_input - center) / scale)
            # Each part gets its share of the bound, so that none can crowd out the other.
            vectors.append(tf.concat([_clipped(tf.cast(part, tf.float32), layer.statistics_clip) for part in parts], 0))
        return tuple(vectors)

    def corrections(self) -> list[tuple[str, str]]:
        """For each call its layer's name and "local", "local only", "non-local", "both" or "none"."""
        local = "local only" if self._correction in ("adaptive", "full") else "local"
        kinds = {(True, True): "both", (True, False): local, (False, True): "non-local", (False, False): "none"}
        return [(call.layer.name, kinds[bool(call.local_terms), call.is_nonlocal]) for call in self.calls]

    def nonlocal_correction(self, noised: NoisedGradients, stddev: float | tf.Tensor) -> list[tf.Tensor | None]:
        """The gradient that flows through the statistics into all earlier layers (section 3b).

        Post-processing: it uses the noised gradients of scale and offset, the weights and the public batch.

        Args:
          noised: the released gradients of all trainable variables.
          stddev: of the noise in each of their entries.

        Returns:
          For each trainable variable the term to add, or None.
        """
        calls = [call for call in self.calls if call.is_nonlocal]
        if not calls:
            return [None] * len(self._variables)
        by_variable = {id(v): tensor for v, tensor in zip(self._variables, noised.tensors, strict=True)}
        layers, sizes = [call.layer for call in calls], [call.channels for call in calls]
        dtype = tf.float64 if any(call.variance.dtype == tf.float64 for call in calls) else tf.float32
        d_gamma = moments.joined([by_variable[id(raw(layer.gamma))] for layer in layers], dtype)
        d_beta = moments.joined([by_variable[id(raw(layer.beta))] for layer in layers], dtype)
        if self._correction == "adaptive":
            share = self._shares_of_signal(calls, d_gamma, d_beta, stddev)
            d_gamma, d_beta = share * d_gamma, share * d_beta
        gamma, variance, epsilon = side_by_side(calls, [call.variance for call in calls], dtype)
        c = moments.statistics_cotangents(d_gamma, d_beta, gamma, variance, epsilon)
        targets: list[tf.Tensor] = []
        cotangents: list[tf.Tensor] = []
        counted: list[tuple[int, tf.Tensor]] = []
        for call, *of_call in zip(calls, *(tf.split(each, sizes) for each in c), strict=True):
            c_mean, c_variance = (tf.cast(each, call.variance.dtype) for each in of_call)
            counted += [(term.index, term.pull_back(c_mean, c_variance)) for term in call.local_terms]
            targets += [call.public_mean, call.public_variance]
            cotangents += call.public_cotangents(c_mean, c_variance)
        shaped = [_graph.reshape(c, t.shape) for c, t in zip(cotangents, targets, strict=True)]
        terms = list(self._tape.gradient(targets, self._variables, output_gradients=shaped))
        for i, term in counted:
            terms[i] = terms[i] - tf.cast(term, terms[i].dtype)
        return [None if term is None else tf.convert_to_tensor(term) for term in terms]

    def _shares_of_signal(
        self, calls: Sequence[NormalizationCall], d_gamma: tf.Tensor, d_beta: tf.Tensor, stddev: float | tf.Tensor
    ) -> tf.Tensor:
        """How much of the released gradients of scales and offsets is signal, over the last steps; by channel."""
        kept = self._released_means.of_gradients([call.layer for call in calls])
        average, variance = kept[:-1], kept[-1]
        released = tf.cast(tf.concat([d_gamma, d_beta], 0), tf.float32)
        average = _DECAY * average + (1.0 - _DECAY) * released
        variance = _DECAY**2 * variance + (1.0 - _DECAY) ** 2 * stddev**2
        kept.assign(tf.concat([average, variance[None]], 0))
        call_of_channel = np.repeat(np.arange(len(calls)), [call.channels for call in calls])
        shares = moments.shares_of_signal(average, variance, np.tile(call_of_channel, 2))
        # Without 3a it is all the gradient that there is.
        shares = tf.where([bool(call.local_terms) for call in calls], shares, 1.0)
        return tf.cast(tf.gather(shares, call_of_channel), d_gamma.dtype)

    def update_statistics(self, released: Sequence[tf.Tensor]) -> None:
        """Takes over releases, and sets the moving statistics of layers with a public part to those of this pass.

        Args:
          released: for each call whose layer releases statistics the noised mean.
        """
        assign_moving_statistics(self.calls)
        releasing = [call for call in self.calls if call.layer.releases]
        means = {id(call): mean for call, mean in zip(releasing, released, strict=True)}
        for layer, group in _by_layer(releasing):
            for call in (call for call in group if call.input_mean is not None):
                value, scale = _value_and_scale(call.input_mean)
                step = layer.update_rate(len(self.calls)) * scale * means[id(call)][2 * call.channels :]
                call.input_mean.assign(value + step)
            residual = tf.add_n([means[id(call)][: 2 * call.channels] for call in group]) / len(group)
            layer.update_statistics(group[0], residual, len(self.calls))


def chosen_correction(model: Any, correction: str) -> str:
    """The correction itself, or for "auto" the one for as many normalizations as train and are not fixed."""
    if correction != "auto":
        return correction
    moving = sum(layer.trainable and layer.statistics != "fixed" for layer in _normalizations(model))
    return "adaptive" if moving >= _DEEP else "local"


def names_of_normalizations(model: Any) -> dict[int, str]:
    """By id of each DPBatchNormalization a name that no other one has; layers of submodels may share theirs."""
    return {id(layer): f"{k}:{getattr(layer, 'path', layer.name)}" for k, layer in enumerate(_normalizations(model))}


def _normalizations(model: Any) -> list[Any]:
    return [layer for layer in flatten_layers(model) if isinstance(layer, DPBatchNormalization)]


def create_averages(model: Any, correction: str, released_means: ReleasedMeans) -> None:
    """Creates what the adaptive correction keeps: a step that creates variables is traced twice."""
    if chosen_correction(model, correction) == "adaptive":
        built = [layer for layer in _normalizations(model) if layer.built and layer.trainable]
        released_means.of_gradients(
            [layer for layer in built if layer.center and layer.scale and layer.uses_public_batch]
        )


def _by_layer(calls: Iterable[NormalizationCall]) -> Iterable[tuple[DPBatchNormalization, list[NormalizationCall]]]:
    """Each layer with its calls."""
    groups: dict[int, list[NormalizationCall]] = {}
    for call in calls:
        groups.setdefault(id(call.layer), []).append(call)
    return [(group[0].layer, group) for group in groups.values()]


def _value_and_scale(input_mean: tf.Variable) -> tuple[tf.Tensor, tf.Tensor]:
    """A released mean, and the unit in which it moves: 1, or its root mean square where that is larger."""
    value = input_mean.read_value()
    return value, tf.maximum(1.0, tf.sqrt(tf.reduce_mean(tf.square(value))))


def _clipped(vector: tf.Tensor, root_mean_square: float) -> tf.Tensor:
    """Scales a vector so that its root mean square is at most the given one."""
    bound = root_mean_square * math.sqrt(vector.shape[0])
    weight = clip_weights(tf.reduce_sum(tf.square(vector)), bound, None)
    return tf.where(weight > 0, weight, 1.0) * vector  # non-finite vectors stay so, and are dropped as a whole


def refresh_moving_statistics(model: Any, public_batch: Any, active: Iterable[tuple[int, int]]) -> None:
    """Sets moving statistics to the public batch's at the current weights; the model runs in inference.

    Args:
      model: the model.
      public_batch: nest of tensors.
      active: the normalization calls that are in training during a train step.
    """
    with PublicPass(frozenset(active)) as scope:
        call_model(model, public_batch, training=False)
    assign_moving_statistics(scope.calls)


def assign_moving_statistics(calls: Sequence[NormalizationCall]) -> None:
    """Writes each layer's statistics, public in part, to its moving ones; several calls of a layer are pooled."""
    for layer, group in _by_layer(call for call in calls if call.layer.statistics != "noised"):
        mean, variance = group[0].mean, group[0].variance
        if len(group) > 1:
            mean = tf.add_n([call.mean for call in group]) / len(group)
            square = tf.add_n([call.variance + tf.square(call.mean) for call in group]) / len(group)
            variance = square - tf.square(mean)
        for moving, value in ((layer.moving_mean, mean), (layer.moving_variance, variance)):
            moving.assign(tf.cast(_graph.reshape(value, moving.shape), moving.dtype))
