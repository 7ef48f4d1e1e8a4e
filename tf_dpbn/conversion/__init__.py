"""Bring your own model: what in it would void the guarantee, its private form, and the way back.

`validate` finds stock batch normalization and whatever else couples examples; `convert` makes a DPModel, to be compiled
and trained; `to_stock` makes plain Keras of that, for serving.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tf_dpbn import _validate
from tf_dpbn._keras import UNFUSED, BatchNormalizationBase, flatten_layers, keras, mark_called
from tf_dpbn.conversion.findings import Finding, Findings, validate
from tf_dpbn.conversion.rebuild import Rebuilder
from tf_dpbn.model import DPModel, DPSequential
from tf_dpbn.normalization import STATISTICS_MODES, DPBatchNormalization

__all__ = ["Finding", "Findings", "convert", "to_stock", "validate"]

# Arguments of BatchNormalization that compute statistics across private examples or in ways that DP-SGD has not.
_COUPLING_OPTIONS = ("renorm", "synchronized", "virtual_batch_size", "adjustment")


def convert(
    model: Any,
    *,
    statistics: str | Mapping[str, str] = "public",
    public_batch: Any = None,
    momentum: float | None = None,
    statistics_clip: float = 1.0,
) -> DPModel:
    """Makes a DPModel of a Keras model, with DPBatchNormalization for each stock BatchNormalization that would train.

    Functional and Sequential models, with nested models, several inputs and outputs, and shared layers. The new model
    has weights of its own with the values of the old one's, moving statistics included; the old one is left as it was.
    Layers keep names and arguments. Batch normalization with trainable=False is copied as it is: it uses its moving
    statistics in training, and couples nothing; to train it later, convert the model first and freeze it then. The new
    model has to be compiled, whatever the old one was; a DPModel's public batch and ledger go over to it, for its
    weights carry what they cost.

    Formal guarantee: that of DPModel, which the new model is. What was pretrained on private data without privacy
    stays unprotected: initial weights are outside the guarantee.

    Args:
      model: a keras.Model or DPModel.
      statistics: of the new layers: "public", "noised", "anchored" or "fixed", see DPBatchNormalization; or a mapping
        from layers' names to these, and the others are "public": {"bn_conv1": "fixed"}.
      public_batch: if given, nest of arrays [examples, ...] for `DPModel.set_public_batch`.
      momentum, statistics_clip: of the new layers, see DPBatchNormalization. Without `momentum`, layers with "public"
        or "fixed" statistics keep the stock layer's, which they do not use but hand back to `to_stock`.

    Returns:
      DPSequential for a Sequential, else a functional DPModel.

    Raises:
      TypeError: for what is no model, and for a subclassed one, naming its class and the remedy.
      ValueError: for unknown statistics, or those of a name that no replaced layer has; for batch normalization with
        options that couple examples (renorm, synchronized, virtual_batch_size, adjustment), for a subclass of it, and
        for a layer that holds one and cannot be rebuilt without.
    """
    if not isinstance(model, keras.Model):
        remedy = "Load a file by keras.models.load_model first."
        raise _validate.argument_error("model", model, "be a keras.Model", remedy, TypeError)
    by_name, others = (statistics, "public") if isinstance(statistics, Mapping) else ({}, statistics)
    for mode in (*by_name.values(), others):
        _validate.one_of("statistics", mode, STATISTICS_MODES)
    replaced = {layer.name for layer in flatten_layers(model) if _is_replaced(layer)}
    for name in by_name.keys() - replaced:
        remedy = "Layers with trainable=False are copied as they are: convert the model first and freeze it then."
        raise _validate.argument_error("statistics", name, "name stock batch normalization that trains", remedy)

    def replacement(layer: Any) -> Any:
        if not _is_replaced(layer):
            return None
        _check_stock(layer)
        config = layer.get_config()
        mode = by_name.get(layer.name, others)
        if momentum is not None or mode in ("noised", "anchored"):
            config["momentum"] = momentum
        return DPBatchNormalization(**{**config, "statistics": mode, "statistics_clip": statistics_clip})

    if isinstance(model, DPModel):
        model._public.refresh_if_trained()
    converted = Rebuilder(replacement, "converted").rebuild(model, DPModel, DPSequential)
    _hand_over_ledgers(model, converted)
    if public_batch is not None:
        converted.set_public_batch(public_batch)
    return converted


def to_stock(model: Any) -> Any:
    """Makes a plain Keras model of a DPModel, with stock BatchNormalization, for serving or for publishing.

    It predicts what the DPModel predicts, has weights of its own, and needs no tf_dpbn (but for layers of
    `tf_dpbn.features`), also when it is saved and loaded. It has no ledger: note `privacy_statement` beside it.
    Training it is not private, and converted to a DPModel again it starts with an epsilon of 0.

    On tf_keras a loaded file runs fused kernels, which the returned model does not: they round otherwise, in
    MobileNetV2 by up to 5e-5 of the largest logit, as much as float32 is off there by itself.

    Args:
      model: a functional DPModel or DPSequential, nested ones included; its moving statistics are refreshed first.

    Returns:
      keras.Sequential for a DPSequential, else a functional keras.Model; not compiled.

    Raises:
      TypeError: for a subclassed model, for which `export` makes a SavedModel without tf_dpbn.
      ValueError: for a layer that holds DPBatchNormalization and cannot be rebuilt without.
    """

    def replacement(layer: Any) -> Any:
        if not isinstance(layer, DPBatchNormalization):
            return None
        config = layer.get_config()
        del config["statistics"], config["statistics_clip"]
        return keras.layers.BatchNormalization(**config, **UNFUSED)

    if isinstance(model, DPModel):
        model._public.refresh_if_trained()
    plain = Rebuilder(replacement, "made plain").rebuild(model, keras.Model, keras.Sequential)
    mark_called(plain)
    return plain


def _is_replaced(layer: Any) -> bool:
    """Whether `convert` puts a private layer in the place of one: stock batch normalization that would train."""
    is_stock = isinstance(layer, BatchNormalizationBase) and not isinstance(layer, DPBatchNormalization)
    return is_stock and bool(layer.trainable)


def _check_stock(layer: Any) -> None:
    """Refuses what no private layer does."""
    if type(layer) is not keras.layers.BatchNormalization:
        raise ValueError(
            f"Layer {layer.name!r} is a {type(layer).__name__}, whose own behaviour would be lost. Use "
            "keras.layers.BatchNormalization in its place, or freeze it with trainable=False. Received: "
            f"layer={layer!r}"
        )
    for option in _COUPLING_OPTIONS:
        if getattr(layer, option, None):
            raise ValueError(
                f"Layer {layer.name!r} has {option}, which computes statistics across private examples. Build it "
                f"without {option}. Received: {option}={getattr(layer, option)!r}"
            )


def _hand_over_ledgers(model: Any, converted: DPModel) -> None:
    """Ledgers of all DPModels in `model`, and the outermost's public batch."""
    for each in [*reversed(flatten_layers(model)), model]:
        if isinstance(each, DPModel):
            converted._record.take_over(each._record)
    if isinstance(model, DPModel) and model.public_batch is not None:
        told = model._public.may_contain_training_rows
        converted.set_public_batch(model.public_batch, may_contain_training_rows=told)
