"""The public forward pass of a train step: statistics, how they depend on the weights, and the non-local correction."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

from tf_dpbn import statistics
from tf_dpbn._keras import call_model, raw
from tf_dpbn.clipping.local_terms import LocalTerm, find_local_terms
from tf_dpbn.layers import NormalizationCall, PublicPass
from tf_dpbn.mechanisms import NoisedGradients

CORRECTIONS = ("local", "full", "none")


class PublicForward:
    """Statistics of the public batch at the current weights, within the graph of one train step.

    Nothing here touches private data: every attribute is a function of the weights and the public batch.

    Args:
      model: the model.
      public_batch: nest of tensors [public examples, ...].
      correction: which part of the gradient through the statistics to restore:
        "local": section 3a for calls that one kernel layer feeds, section 3b for the others.
        "full": 3a where possible, and 3b for every call.
        "none": statistics are constants; training suffers badly, for studies only.

    Attributes:
      calls: the normalization calls in training, in order.
      statistics: (mean, variance) of each, constants to the private pass.
      local_terms: for each call its local terms.

    Source: docs/algorithm.md, sections 2 and 3.
    """

    def __init__(self, model: Any, public_batch: Any, correction: str) -> None:
        self._variables = [raw(variable) for variable in model.trainable_variables]
        inputs = tf.nest.map_structure(tf.identity, public_batch)
        with tf.GradientTape(watch_accessed_variables=False) as self._tape, PublicPass() as scope:
            self._tape.watch(self._variables)
            call_model(model, inputs, training=True)
        self.calls: list[NormalizationCall] = scope.calls
        self.statistics = tuple((tf.stop_gradient(call.mean), tf.stop_gradient(call.variance)) for call in self.calls)
        nothing: tuple[LocalTerm, ...] = ()
        self.local_terms: tuple[tuple[LocalTerm, ...], ...] = tuple(nothing for _ in self.calls)
        if correction != "none":
            self.local_terms = find_local_terms(self.calls, tf.nest.flatten(inputs), self._variables)
        self._nonlocal_calls = self._choose_nonlocal_calls(correction)

    def _choose_nonlocal_calls(self, correction: str) -> list[int]:
        """Calls whose statistics' cotangents go through the non-local correction."""
        if correction == "none":
            return []
        layers = [call.layer for call in self.calls]
        chosen = []
        for k, layer in enumerate(layers):
            if correction == "local" and self.local_terms[k]:
                continue
            if layer.center and layer.scale and layers.count(layer) == 1:
                chosen.append(k)
            elif not self.local_terms[k]:
                warnings.warn(
                    f"DPBatchNormalization {layer.name!r} gets no gradient through its statistics: no single kernel "
                    "layer feeds it, and the non-local correction needs center=True, scale=True and one call of the "
                    "layer a pass. It may train poorly.",
                    stacklevel=2,
                )
        return chosen

    def nonlocal_correction(self, noised: NoisedGradients) -> list[tf.Tensor | None]:
        """The gradient that flows through the statistics into all earlier layers (section 3b).

        Post-processing: it uses the noised gradients of scale and offset, the weights and the public batch.

        Args:
          noised: the released gradients of all trainable variables.

        Returns:
          For each trainable variable the term to add, or None.
        """
        if not self._nonlocal_calls:
            return [None] * len(self._variables)
        index = {id(variable): i for i, variable in enumerate(self._variables)}
        targets: list[tf.Tensor] = []
        cotangents: list[tf.Tensor] = []
        for k in self._nonlocal_calls:
            layer = self.calls[k].layer
            d_gamma = noised.tensors[index[id(raw(layer.gamma))]]
            d_beta = noised.tensors[index[id(raw(layer.beta))]]
            targets += [self.calls[k].mean, self.calls[k].variance]
            gamma = tf.reshape(raw(layer.gamma), [-1])
            cotangents += statistics.statistics_cotangents(
                tf.reshape(d_gamma, [-1]),
                tf.reshape(d_beta, [-1]),
                gamma,
                tf.reshape(self.calls[k].variance, [-1]),
                layer.epsilon,
            )
        shaped = [tf.reshape(c, tf.shape(t)) for c, t in zip(cotangents, targets, strict=True)]
        terms = list(self._tape.gradient(targets, self._variables, output_gradients=shaped))
        for position, k in enumerate(self._nonlocal_calls):
            for term in self.local_terms[k]:  # counted already, before clipping
                counted = term.pull_back(shaped[2 * position], shaped[2 * position + 1])
                terms[term.index] = terms[term.index] - counted
        return [None if term is None else tf.convert_to_tensor(term) for term in terms]

    def update_moving_statistics(self) -> None:
        """Sets the layers' moving statistics to those of this pass."""
        assign_moving_statistics(self.calls)


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
    """Writes each layer's public moments to its moving statistics; several calls of a layer are pooled."""
    by_layer: dict[int, list[NormalizationCall]] = {}
    for call in calls:
        by_layer.setdefault(id(call.layer), []).append(call)
    for group in by_layer.values():
        mean = tf.add_n([call.mean for call in group]) / len(group)
        square = tf.add_n([call.variance + tf.square(call.mean) for call in group]) / len(group)
        variance = group[0].variance if len(group) == 1 else square - tf.square(mean)
        layer = group[0].layer
        for moving, value in ((layer.moving_mean, mean), (layer.moving_variance, variance)):
            moving.assign(tf.cast(tf.reshape(value, moving.shape), moving.dtype))
