"""The public forward pass of a train step: statistics, how they depend on the weights, and what is released of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorflow as tf

from tf_dpbn._keras import call_model, flatten_layers, raw
from tf_dpbn.mechanisms import NoisedGradients, clip_weights
from tf_dpbn.normalization import moments
from tf_dpbn.normalization.layer import (
    DPBatchNormalization,
    GivenStatistics,
    NormalizationCall,
    PublicPass,
    StatisticsRelease,
)
from tf_dpbn.normalization.local_terms import LocalTerm, find_local_terms, input_means

CORRECTIONS = ("auto", "local", "adaptive", "full", "none")
# From this many normalizations on "auto" is "adaptive". In stacks of 8 and 12 convolutions that gained 2.1 and 3.6
# points over "local", in those of 2 and 4 it lost 1.0 and 0.5, within the spread of seeds (docs/results.md, table b).
_DEEP = 8
# Of the average by which the adaptive correction tells signal from noise: about the last twenty steps.
_DECAY = 0.9


class PublicForward:
    """Statistics for the private examples at the current weights, within the graph of one train step.

    Every attribute is a function of the weights, the public batch and earlier releases. Only `residuals` touches
    private data, one example at a time.

    Args:
      model: the model.
      public_batch: nest of tensors [public examples, ...]; any single example where all statistics are noised ones.
      released_mean: (name, size) -> variable that keeps a mean of released values from step to step.
      correction: which part of the gradient through the statistics to restore:
        "auto": "adaptive" in deep models and "local" in others, see `chosen_correction`.
        "local": section 3a for calls that one kernel layer feeds, section 3b for the others.
        "full": 3a where possible, and 3b for every call that it can serve.
        "adaptive": as "full", but where there is 3a, 3b only as far as what it starts from is more than noise.
        "none": statistics are constants; training suffers badly, for studies only.

    Attributes:
      calls: the normalization calls in training, in order.
      statistics: (mean, variance) of each, constants to the private pass.
      local_terms: for each call its local terms.
      releases: what is released of each call whose layer has released statistics.

    Source: docs/algorithm.md, sections 2, 3 and 5.
    """

    def __init__(
        self, model: Any, public_batch: Any, correction: str, released_mean: Callable[[str, int], tf.Variable]
    ) -> None:
        correction = chosen_correction(model, correction)
        self._adaptive, self._released_mean = correction == "adaptive", released_mean
        self._wants_both = correction in ("adaptive", "full")
        self._names = names_of_normalizations(model)
        self._variables = [raw(variable) for variable in model.trainable_variables]
        inputs = tf.nest.map_structure(tf.identity, public_batch)
        with tf.GradientTape(watch_accessed_variables=False) as self._tape, PublicPass() as scope:
            self._tape.watch(self._variables)
            call_model(model, inputs, training=True)
        self.calls: list[NormalizationCall] = scope.calls
        self.statistics = tuple((tf.stop_gradient(call.mean), tf.stop_gradient(call.variance)) for call in self.calls)
        nothing: tuple[LocalTerm, ...] = ()
        self.local_terms: tuple[tuple[LocalTerm, ...], ...] = tuple(nothing for _ in self.calls)
        self._input_means: dict[int, tf.Variable] = {}
        if correction != "none":
            flat = tf.nest.flatten(inputs)
            self._input_means = self._create_input_means(flat)
            known = {k: variable.read_value() for k, variable in self._input_means.items()}
            means = [known.get(k) for k in range(len(self.calls))]
            self.local_terms = find_local_terms(self.calls, flat, self._variables, means)
        self._nonlocal_calls = self._choose_nonlocal_calls(correction)
        self._releasing = [k for k, call in enumerate(self.calls) if call.layer.releases]
        self.releases = tuple(self._release(k) for k in self._releasing)

    def _create_input_means(self, inputs: Sequence[tf.Tensor]) -> dict[int, tf.Variable]:
        """For each noised call whose kernel layer was found, the released mean of what that layer is fed with."""
        noised = [k for k, call in enumerate(self.calls) if call.layer.statistics == "noised"]
        means = input_means([(self.calls[k].inputs, self.calls[k]) for k in noised], inputs, self._variables)
        sizes = {k: mean.shape[0] for k, mean in zip(noised, means, strict=True) if mean is not None}
        return {k: self._released_mean(self._name_of_call(k), size) for k, size in sizes.items()}

    def _name_of_call(self, k: int) -> str:
        layer = self.calls[k].layer
        earlier = sum(call.layer is layer for call in self.calls[:k])
        return f"{self._name_of_layer(layer)}:{earlier}"

    def _name_of_layer(self, layer: Any) -> str:
        return self._names.get(id(layer), layer.name)  # Keras may not know a layer that a `call` keeps to itself

    def _release(self, k: int) -> StatisticsRelease:
        size = 2 * (self.calls[k].mean.shape.num_elements() or 0)
        if k in self._input_means:
            size += self._input_means[k].shape[0]
        return StatisticsRelease(size, self.calls[k].layer.statistics_clip * math.sqrt(size))

    def residuals(self, given: GivenStatistics, inputs: Sequence[tf.Tensor]) -> tuple[tf.Tensor, ...]:
        """For each release one example's vector: residuals of its moments, and of its kernel layer's input.

        Args:
          given: the scope in which the example went through the model.
          inputs: the tensors through which it entered.
        """
        with_mean = list(self._input_means)
        pairs = [(given.inputs[k][0], self.calls[k]) for k in with_mean]
        found = dict(zip(with_mean, input_means(pairs, inputs, self._variables), strict=True))
        vectors = []
        for k in self._releasing:
            (z, mask), layer = given.inputs[k], self.calls[k].layer
            parts = [moments.residuals(z, *self.statistics[k], layer.epsilon, layer.channel_axes, mask)]
            if k in with_mean:
                if found[k] is None:
                    raise ValueError(
                        f"DPBatchNormalization {layer.name!r} is fed by another layer for one example than for the "
                        "public pass. The model must compute the same for any number of examples; or compile it with "
                        'correction="none". Received: statistics="noised"'
                    )
                center, scale = self._input_mean_and_scale(k)
                parts.append((tf.convert_to_tensor(found[k]) - center) / scale)
            # Each part gets its share of the bound, so that none can crowd out the other.
            vectors.append(tf.concat([_clipped(tf.cast(part, tf.float32), layer.statistics_clip) for part in parts], 0))
        return tuple(vectors)

    def _input_mean_and_scale(self, k: int) -> tuple[tf.Tensor, tf.Tensor]:
        """A released mean, and the unit in which it moves: 1, or its root mean square where that is larger."""
        mean = self._input_means[k].read_value()
        return mean, tf.maximum(1.0, tf.sqrt(tf.reduce_mean(tf.square(mean))))

    def _choose_nonlocal_calls(self, correction: str) -> list[int]:
        """Calls whose statistics' cotangents go through the non-local correction."""
        if correction == "none":
            return []
        layers = [call.layer for call in self.calls]
        trained = {id(variable) for variable in self._variables}
        chosen = []
        for k, layer in enumerate(layers):
            if correction == "local" and self.local_terms[k]:
                continue
            both = layer.center and layer.scale and {id(raw(layer.gamma)), id(raw(layer.beta))} <= trained
            if layer.statistics != "noised" and both and layers.count(layer) == 1:
                chosen.append(k)
            elif not self.local_terms[k]:
                warnings.warn(
                    f"DPBatchNormalization {layer.name!r} gets no gradient through its statistics: no single kernel "
                    "layer feeds it, and the non-local correction needs public statistics (statistics='public' or "
                    "'anchored'), a scale and an offset that train, and one call of the layer a pass. It may train "
                    "poorly.",
                    stacklevel=2,
                )
        return chosen

    def corrections(self) -> list[tuple[str, str]]:
        """For each call its layer's name and "local", "local only", "non-local", "both" or "none"."""
        found, local = [], "local only" if self._wants_both else "local"
        for k, call in enumerate(self.calls):
            kinds = {(True, True): "both", (True, False): local, (False, True): "non-local", (False, False): "none"}
            found.append((call.layer.name, kinds[bool(self.local_terms[k]), k in self._nonlocal_calls]))
        return found

    def nonlocal_correction(self, noised: NoisedGradients, stddev: float) -> list[tf.Tensor | None]:
        """The gradient that flows through the statistics into all earlier layers (section 3b).

        Post-processing: it uses the noised gradients of scale and offset, the weights and the public batch.

        Args:
          noised: the released gradients of all trainable variables.
          stddev: of the noise in each of their entries.

        Returns:
          For each trainable variable the term to add, or None.
        """
        if not self._nonlocal_calls:
            return [None] * len(self._variables)
        index = {id(variable): i for i, variable in enumerate(self._variables)}
        targets: list[tf.Tensor] = []
        cotangents: list[tf.Tensor] = []
        counted: list[tuple[int, tf.Tensor]] = []
        for k in self._nonlocal_calls:
            call, layer = self.calls[k], self.calls[k].layer
            d_gamma = noised.tensors[index[id(raw(layer.gamma))]]
            d_beta = noised.tensors[index[id(raw(layer.beta))]]
            gamma, d_gamma, d_beta, variance = (
                tf.cast(tf.reshape(each, [-1]), call.variance.dtype)
                for each in (raw(layer.gamma), d_gamma, d_beta, call.variance)
            )
            if self._adaptive and self.local_terms[k]:  # without 3a it is all the gradient there is
                share = self._share_of_signal(k, tf.concat([d_gamma, d_beta], 0), stddev)
                d_gamma, d_beta = share * d_gamma, share * d_beta
            c = moments.statistics_cotangents(d_gamma, d_beta, gamma, variance, layer.epsilon)
            counted += [(term.index, term.pull_back(*c)) for term in self.local_terms[k]]  # before clipping
            targets += [call.public_mean, call.public_variance]
            cotangents += call.public_cotangents(*c)
        shaped = [tf.reshape(c, tf.shape(t)) for c, t in zip(cotangents, targets, strict=True)]
        terms = list(self._tape.gradient(targets, self._variables, output_gradients=shaped))
        for i, term in counted:
            terms[i] = terms[i] - tf.cast(term, terms[i].dtype)
        return [None if term is None else tf.convert_to_tensor(term) for term in terms]

    def _share_of_signal(self, k: int, released: tf.Tensor, stddev: float) -> tf.Tensor:
        """How much of a call's released gradient of scale and offset is signal, over the last steps."""
        kept = self._released_mean(*_average(self._name_of_layer(self.calls[k].layer), self.calls[k].layer))
        average, variance = kept[:-1], kept[-1]
        average = _DECAY * average + (1.0 - _DECAY) * tf.cast(released, tf.float32)
        variance = _DECAY**2 * variance + (1.0 - _DECAY) ** 2 * stddev**2
        kept.assign(tf.concat([average, variance[None]], 0))
        return tf.cast(moments.share_of_signal(average, variance), released.dtype)

    def update_statistics(self, released: Sequence[tf.Tensor]) -> None:
        """Takes over releases, and sets the moving statistics of layers with a public part to those of this pass.

        Args:
          released: for each of `releases` the noised mean.
        """
        assign_moving_statistics(self.calls)
        by_layer: dict[int, list[int]] = {}
        for position, k in enumerate(self._releasing):
            by_layer.setdefault(id(self.calls[k].layer), []).append(position)
        for positions in by_layer.values():
            first = self.calls[self._releasing[positions[0]]]
            size = 2 * first.mean.shape.num_elements()
            for position in positions:
                k = self._releasing[position]
                if k in self._input_means:
                    mean, scale = self._input_mean_and_scale(k)
                    rate = first.layer.update_rate(len(self.calls))
                    self._input_means[k].assign(mean + rate * scale * released[position][size:])
            residual = tf.add_n([released[position][:size] for position in positions]) / len(positions)
            first.layer.update_statistics(first, residual, len(self.calls))


def chosen_correction(model: Any, correction: str) -> str:
    """The correction itself, or for "auto" the one for as many normalizations as train in the model."""
    if correction != "auto":
        return correction
    return "adaptive" if sum(layer.trainable for layer in _normalizations(model)) >= _DEEP else "local"


def names_of_normalizations(model: Any) -> dict[int, str]:
    """By id of each DPBatchNormalization a name that no other one has; layers of submodels may share theirs."""
    return {id(layer): f"{k}:{getattr(layer, 'path', layer.name)}" for k, layer in enumerate(_normalizations(model))}


def _normalizations(model: Any) -> list[Any]:
    return [layer for layer in flatten_layers(model) if isinstance(layer, DPBatchNormalization)]


def create_averages(model: Any, correction: str, released_mean: Callable[[str, int], tf.Variable]) -> None:
    """Creates what the adaptive correction keeps: a step that creates variables is traced twice."""
    if chosen_correction(model, correction) != "adaptive":
        return
    names = names_of_normalizations(model)
    for layer in flatten_layers(model):
        if id(layer) in names and layer.built and layer.center and layer.scale and layer.statistics != "noised":
            released_mean(*_average(names[id(layer)], layer))


def _average(name: str, layer: Any) -> tuple[str, int]:
    """Name and size of the average of a layer's released gradients, whose last entry is the variance of its noise."""
    return f"{name}:gradient", 2 * math.prod(layer.gamma.shape) + 1


def _clipped(vector: tf.Tensor, root_mean_square: float) -> tf.Tensor:
    """Scales a vector so that its root mean square is at most the given one."""
    bound = root_mean_square * math.sqrt(vector.shape[0])
    weight = clip_weights(tf.reduce_sum(tf.square(vector)), bound, None)
    return tf.where(weight > 0, weight, 1.0) * vector  # what is not finite stays so, and is dropped as a whole


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
    by_layer: dict[int, list[NormalizationCall]] = {}
    for call in (call for call in calls if call.layer.statistics != "noised"):
        by_layer.setdefault(id(call.layer), []).append(call)
    for group in by_layer.values():
        mean = tf.add_n([call.mean for call in group]) / len(group)
        square = tf.add_n([call.variance + tf.square(call.mean) for call in group]) / len(group)
        variance = group[0].variance if len(group) == 1 else square - tf.square(mean)
        layer = group[0].layer
        for moving, value in ((layer.moving_mean, mean), (layer.moving_variance, variance)):
            moving.assign(tf.cast(tf.reshape(value, moving.shape), moving.dtype))
