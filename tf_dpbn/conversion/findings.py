"""What in a model would void the guarantee: `validate` and its findings."""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from typing import Any

from tf_dpbn._keras import call_model, flatten_layers, frozen, kept_state, raw
from tf_dpbn.conversion import coupling
from tf_dpbn.model import DPModel
from tf_dpbn.model.checks import stock_normalizations
from tf_dpbn.model.training_trace import trace_training_pass

_WIDTHS = {"layer": 24, "severity": 8, "reason": 44, "remedy": 44}
_SHOWN = 4  # names of layers with the same finding
_REPLACE = (
    "tf_dpbn.convert(model), with statistics='fixed' to keep pretrained statistics; in a subclassed model use "
    "tf_dpbn.DPBatchNormalization, and derive the model from tf_dpbn.DPModel. Or freeze the layer with trainable=False."
)
_STATE = "Use a layer without such state (recurrent ones: stateful=False), or freeze it."
_LOSS = "Put the loss into `compile`, where it is clipped for each example, or use a weight regularizer."
_ALONE = "Let the layer work on each example alone; to normalize, use tf_dpbn.DPBatchNormalization."


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something in a model that private training has to know of.

    Attributes:
      layer: the layer's name, or the model's.
      severity: "error" blocks private training, "warning" does not.
      reason: what is wrong.
      remedy: what to do.
    """

    layer: str
    severity: str
    reason: str
    remedy: str


class Findings(tuple[Finding, ...]):
    """Findings that print as a table, alike ones in one row, and are true if one of them blocks private training."""

    @property
    def ok(self) -> bool:
        """Whether nothing blocks private training."""
        return all(finding.severity != "error" for finding in self)

    def __bool__(self) -> bool:
        return not self.ok

    def __str__(self) -> str:
        if not len(self):
            return "No findings: no layer couples examples."
        alike: dict[tuple[str, ...], list[str]] = {}
        for layer, *rest in map(dataclasses.astuple, self):
            alike.setdefault(tuple(rest), []).append(layer)
        rows, lines = [[_names(layers), *rest] for rest, layers in alike.items()], []
        for row in [[*_WIDTHS], *rows]:
            cells = map(textwrap.wrap, row, _WIDTHS.values())
            for line in itertools.zip_longest(*cells, fillvalue=""):
                lines.append("  ".join(map(str.ljust, line, _WIDTHS.values())).rstrip())
        return "\n".join(lines)


def _names(layers: list[str]) -> str:
    shown = ", ".join(layers[:_SHOWN])
    return shown if len(layers) <= _SHOWN else f"{shown} and {len(layers) - _SHOWN} more"


def validate(model: Any, x: Any = None) -> Findings:
    """Lists what in a model would void the privacy guarantee, or what DPModel refuses.

    Layers are judged by what they are (stock batch normalization, activity regularizers), by a trace of the training
    pass (state that is written from the examples) and by what they do: the model runs in training mode on a small
    batch, all examples but one are changed, and that one's output must not move. Random layers draw the same numbers
    both times. Stock batch normalization that the training pass only uses in inference is a warning. (In functional
    models of Keras 3, the training=True of `fit` overrules training=False: there only trainable=False freezes a layer.)
    The model is left as it was.

    Args:
      model: a keras.Model or DPModel, compiled or not.
      x: nest of arrays, [examples, ...], two examples or more, at most eight are used; not needed if the model knows
        its inputs' shapes and takes floats or integers: random floats, and zeros and ones, then take its place. Give
        one where values matter (strings, lookups).

    Returns:
      The findings, in the order of the layers. They are falsy, and `ok`, if none of them blocks private training.
      A `print` shows a table.

    Raises:
      ValueError: if there is nothing to run the model on, or it does not run.

    Examples:
      >>> import tensorflow as tf
      >>> import tf_dpbn
      >>> inputs = tf.keras.Input((4,))
      >>> outputs = tf.keras.layers.BatchNormalization(name="norm")(tf.keras.layers.Dense(3)(inputs))
      >>> findings = tf_dpbn.validate(tf.keras.Model(inputs, outputs))
      >>> [(finding.layer, finding.severity) for finding in findings], findings.ok
      ([('norm', 'error')], False)
    """
    x = coupling.make_batch(model) if x is None else coupling.first_rows(x)
    try:
        if not model.built or not model.weights:
            with kept_state(model):
                call_model(model, x, training=False)
        trace = trace_training_pass(model, x)
    except Exception as error:
        raise ValueError(
            f"Model {model.name!r} does not run on the examples: {error} Pass `x`, examples of the kind that it takes."
        ) from error
    found: dict[str, Finding] = {}

    def add(layer: str, reason: str, remedy: str, severity: str = "error") -> None:
        found.setdefault(layer, Finding(layer, severity, reason, remedy))

    stock = stock_normalizations(model)
    written = {id(variable) for change in trace.changes_from_data for variable in change.variables}
    unclear = any(not change.variables for change in trace.changes_from_data)
    for layer in stock:
        kind = f"Stock {type(layer).__name__}"
        if unclear or any(id(raw(variable)) in written for variable in layer.non_trainable_variables):
            add(layer.name, f"{kind}: in training its statistics mix examples.", _REPLACE)
        else:
            reason = f"{kind}, called with training=False only, which is private. A DPModel takes it frozen only."
            add(layer.name, reason, _REPLACE, "error" if isinstance(model, DPModel) else "warning")
    for layer in trace.layers_with_losses:
        reason = "It adds a loss while it is called (activity regularizers do), which is neither clipped nor noised."
        add(layer.name, reason, _LOSS)
    for change in trace.changes_from_data:
        for name in change.layers or (coupling.layer_scope(model, change.operation)[1] or model.name,):
            add(name, "In training it writes what it saw of the examples, un-noised, to its state.", _STATE)
    with frozen(stock):  # the others are judged without them
        coupled, unsteady = coupling.coupling_layer(model, x, trace.scope.calls)
    if coupled is not None:
        reason = "One example's output moves when only others change; a DPModel would work on each example alone."
        add(coupled, reason, _ALONE)
    if unsteady is not None:
        reason = "Its random numbers cannot be held fixed: whether examples couple here or behind was not tried."
        add(unsteady, reason, "Try it without this layer's randomness.", "warning")
    order = {layer.name: k for k, layer in enumerate(flatten_layers(model))}
    return Findings(sorted(found.values(), key=lambda finding: order.get(finding.layer, len(order))))
