"""What in a model would void the guarantee: `validate` and its findings."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, overload

from tf_dpbn import _training_trace
from tf_dpbn._keras import BatchNormalizationBase, call_model, flatten_layers, frozen, kept_state, raw
from tf_dpbn.conversion import coupling
from tf_dpbn.conversion.rebuild import is_convertible
from tf_dpbn.layers import DPBatchNormalization
from tf_dpbn.model import DPModel

_WIDTHS = {"layer": 24, "severity": 8, "reason": 44, "remedy": 44}
_CONVERT = "tf_dpbn.convert(model), or freeze it with trainable=False."
_REPLACE = (
    "Use tf_dpbn.DPBatchNormalization in its place and derive the model from tf_dpbn.DPModel, or freeze it with "
    "trainable=False."
)
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


class Findings(Sequence[Finding]):
    """A list of findings that prints as a table and is true if one of them blocks private training."""

    def __init__(self, findings: Sequence[Finding] = ()) -> None:
        self._findings = tuple(findings)

    @overload
    def __getitem__(self, index: int) -> Finding: ...

    @overload
    def __getitem__(self, index: slice) -> Findings: ...

    def __getitem__(self, index: int | slice) -> Finding | Findings:
        return Findings(self._findings[index]) if isinstance(index, slice) else self._findings[index]

    def __len__(self) -> int:
        return len(self._findings)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self._findings)

    @property
    def ok(self) -> bool:
        """Whether nothing blocks private training."""
        return all(finding.severity != "error" for finding in self._findings)

    def __bool__(self) -> bool:
        return not self.ok

    def __repr__(self) -> str:
        return f"Findings({list(self._findings)!r})"

    def __str__(self) -> str:
        if not self._findings:
            return "No findings: examples do not meet in this model."
        rows = [[*_WIDTHS], *([str(getattr(each, name)) for name in _WIDTHS] for each in self._findings)]
        return "\n".join(line for row in rows for line in _lines(row))


def _lines(row: Sequence[str]) -> list[str]:
    """One row of the table, each cell wrapped to its column's width."""
    cells = [textwrap.wrap(text, width) or [""] for text, width in zip(row, _WIDTHS.values(), strict=True)]
    height = max(map(len, cells))
    padded = [[*cell, *[""] * (height - len(cell))] for cell in cells]
    return [
        "  ".join(text.ljust(width) for text, width in zip(line, _WIDTHS.values(), strict=True)).rstrip()
        for line in zip(*padded, strict=True)
    ]


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
        one where values matter (strings, look-ups).

    Returns:
      The findings, in the order of the layers. They are falsy, and `ok`, if none of them blocks private training.
      A `print` shows a table.

    Raises:
      ValueError: if there is nothing to run the model on, or it does not run.

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
        trace = _training_trace.trace_training_pass(model, x)
    except Exception as error:
        raise ValueError(
            f"Model {model.name!r} does not run on the examples: {error} Pass `x`, examples of the kind that it takes."
        ) from error
    stock = [layer for layer in flatten_layers(model) if _would_train(layer)]
    written = {id(variable) for change in trace.changes_from_data for variable in change.variables}
    unclear = any(not change.variables for change in trace.changes_from_data)
    remedy = _CONVERT if is_convertible(model) else _REPLACE
    found = {}
    for layer in stock:
        in_training = unclear or any(id(raw(variable)) in written for variable in layer.non_trainable_variables)
        found[layer.name] = _stock_finding(layer, remedy) if in_training else _idle_finding(layer, model, remedy)
    for layer in [layer for layer in flatten_layers(model) if getattr(layer, "activity_regularizer", None)]:
        reason = "It has an activity regularizer, a loss that is neither clipped nor noised."
        found.setdefault(layer.name, Finding(layer.name, "error", reason, _LOSS))
    for layer in trace.layers_with_losses:
        reason = "It adds a loss while it is called, which is neither clipped nor noised."
        found.setdefault(layer.name, Finding(layer.name, "error", reason, _LOSS))
    for change in trace.changes_from_data:
        for name in change.layers or (coupling.layer_scope(model, change.operation)[1] or model.name,):
            found.setdefault(name, _state_finding(name))
    with frozen(stock):  # the others are judged without them
        coupled, unsteady = coupling.coupling_layer(model, x, trace.scope.calls)
    if coupled is not None:
        reason = "One example's output moves when only others change; a DPModel would work on each example alone."
        found.setdefault(coupled, Finding(coupled, "error", reason, _ALONE))
    if unsteady is not None:
        reason = "Its random numbers cannot be held fixed: whether examples couple here or behind was not tried."
        found.setdefault(unsteady, Finding(unsteady, "warning", reason, "Try it without this layer's randomness."))
    order = {layer.name: k for k, layer in enumerate(flatten_layers(model))}
    return Findings(sorted(found.values(), key=lambda finding: order.get(finding.layer, len(order))))


def _would_train(layer: Any) -> bool:
    is_stock = isinstance(layer, BatchNormalizationBase) and not isinstance(layer, DPBatchNormalization)
    return is_stock and layer.trainable


def _idle_finding(layer: Any, model: Any, remedy: str) -> Finding:
    reason = f"Stock {type(layer).__name__}, called with training=False only: it uses its moving statistics."
    if isinstance(model, DPModel):
        return Finding(layer.name, "error", f"{reason} A DPModel takes it frozen only.", "Set its trainable=False.")
    return Finding(layer.name, "warning", f"{reason} That is private; a DPModel takes it frozen only.", remedy)


def _stock_finding(layer: Any, remedy: str) -> Finding:
    kind = type(layer).__name__
    if getattr(layer, "synchronized", False) or kind == "SyncBatchNormalization":
        kind += " (synchronized over replicas)"
    reason = f"Stock {kind}: in training its statistics mix examples."
    if not layer.trainable_weights:
        reason += " That it has no trainable scale or offset does not help."
    return Finding(layer.name, "error", reason, remedy)


def _state_finding(name: str) -> Finding:
    reason = "In training it writes what it saw of the examples, un-noised, to its state."
    remedy = "Use a layer without such state (recurrent ones: stateful=False), or freeze it."
    return Finding(name, "error", reason, remedy)
