"""What a stock model must satisfy before an optimizer of tensorflow-privacy may train it with this library's layers."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tf_dpbn import _validate
from tf_dpbn._keras import flatten_layers, keras, regularization_losses, steps_of_call, symbolic_inputs
from tf_dpbn.conversion import validate
from tf_dpbn.interop.row_loss import RowLoss
from tf_dpbn.mechanisms import checked_clip
from tf_dpbn.model.training_trace import trace_training_pass
from tf_dpbn.normalization import DPBatchNormalization, NormalizationCall
from tf_dpbn.optimizers import DPOptimizer

_ATTRIBUTES = ("_l2_norm_clip", "_noise_multiplier", "_num_microbatches", "_was_dp_gradients_called")
# What a step of `fit` runs; see `_check_step`.
_OF_KERAS = ("train_step", "compute_loss", "make_train_function", "compute_metrics")
_NAMES = "VectorizedDPKerasSGDOptimizer, VectorizedDPKerasAdamOptimizer or VectorizedDPKerasAdagradOptimizer"
# Of the batch in a trace that runs nothing: a prime, so that no other axis, nor a product of axes, is as long.
_ROWS = 1009


def check_model(model: Any) -> None:
    """Refuses models that couple rows, or whose normalizations an outside train step cannot serve."""
    _check_step(model)
    replicas = model.distribute_strategy.num_replicas_in_sync
    if replicas > 1:
        raise NotImplementedError(
            "tensorflow-privacy's optimizers add noise on each replica, which is not counted. Train on one device, or "
            f"a tf_dpbn.DPModel on several. Received: {replicas} replicas"
        )
    for layer in flatten_layers(model):
        if isinstance(layer, DPBatchNormalization) and layer.statistics == "anchored":
            requirement = f'be "public", "noised" or "fixed" for layer {layer.name!r} in a stock model'
            remedy = "Choose one of these, or train a tf_dpbn.DPModel."
            raise _validate.argument_error("statistics", layer.statistics, requirement, remedy)
        if layer.weights and layer.compute_dtype != "float32":
            remedy = "tensorflow-privacy's optimizers clip in float32; for half precision train a tf_dpbn.DPModel."
            raise _validate.argument_error("dtype", layer.compute_dtype, f"be float32 for layer {layer.name!r}", remedy)
    if regularization_losses(model):
        # They would be added to the loss of every row, padding included: an example that takes the place of padding
        # would then move the clipped sum by twice the clip norm.
        raise ValueError(
            "The model has weight regularizers, which tensorflow-privacy's optimizers clip with each row. Leave them "
            f"out, or train a tf_dpbn.DPModel, which does not clip them. Received: model={model.name!r}"
        )
    findings = validate(model)
    if not findings.ok:
        raise ValueError(f"Training model {model.name!r} would void the guarantee:\n{findings}")


def _check_step(model: Any) -> None:
    """Refuses train steps other than Keras' own: nothing is known of how rows enter them."""
    for name in _OF_KERAS:
        own = getattr(type(model), name) is not getattr(keras.Model, name)
        patched = name in vars(model) and not isinstance(vars(model)[name], RowLoss)
        if own or patched:
            received = f"{type(model).__name__} with a `{name}` of its own"
            requirement = "train by the step of tf.keras.Model"
            raise _validate.argument_error("model", received, requirement, "Leave it out, or train a tf_dpbn.DPModel.")


def check_seed() -> None:
    """Refuses a global seed: the gradient's noise obeys it, and would be drawn again in every `fit`."""
    seeds = tf.compat.v1.get_seed(None)
    if seeds != (None, None):
        raise RuntimeError(
            "A global seed is set, with which every `fit` would draw the same noise again. Call "
            f"tf.random.set_seed(None) once the weights are made, before `fit`. Received: a seed of {seeds[0]}"
        )


def check_optimizer(optimizer: Any, rows: int) -> None:
    """Refuses optimizers that do not clip every one of `rows` rows and add noise once."""
    if optimizer is None:
        raise RuntimeError("Call compile(optimizer=..., loss=...) before training.")
    known = all(hasattr(optimizer, name) for name in _ATTRIBUTES)
    accumulates = hasattr(optimizer, "gradient_accumulation_steps")
    if isinstance(optimizer, DPOptimizer) or not known or accumulates:
        received = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
        remedy = (
            "Others are not known to clip every row by itself; those of tf_dpbn.optimizers train a tf_dpbn.DPModel."
        )
        raise _validate.argument_error("optimizer", received, f"be tensorflow-privacy's {_NAMES}", remedy, TypeError)
    _validate.non_negative("noise_multiplier", float(optimizer._noise_multiplier))
    checked_clip("l2_norm_clip", optimizer._l2_norm_clip)
    if optimizer._num_microbatches not in (None, rows):
        requirement = f"be None or the number of rows of each batch, {rows}"
        remedy = "Fewer clip means of several examples, which doubles the sensitivity."
        raise _validate.argument_error("num_microbatches", optimizer._num_microbatches, requirement, remedy)


def check_compilation(model: Any) -> None:
    """Refuses losses that are not the loss of each row, and train functions in which checks would not run."""
    for loss in tf.nest.flatten(model.loss):
        reduction = getattr(loss, "reduction", None)
        if reduction != "none":
            received = loss if reduction is None else f"{type(loss).__name__}(reduction={reduction!r})"
            requirement = "be a tf.keras.losses.Loss with reduction=tf.keras.losses.Reduction.NONE"
            remedy = "The optimizer clips the gradient of each row's loss, and needs it as a vector."
            raise _validate.argument_error("loss", received, requirement, remedy)
    if getattr(model, "_jit_compile", None):
        raise _validate.argument_error("jit_compile", True, "be False", "XLA leaves out the checks of each step.")
    if (stride := steps_of_call(model)) != 1:
        remedy = "Statistics are brought up to the weights before each step."
        raise _validate.argument_error("steps_per_execution", stride, "be 1", remedy)


def training_calls(model: Any) -> list[NormalizationCall]:
    """The calls of DPBatchNormalization in training, in order, from a trace that runs nothing."""
    if not getattr(model, "inputs", None):
        remedy = "Build it as tf.keras.Model(inputs, outputs), or as a Sequential that begins with tf.keras.Input."
        raise _validate.argument_error("model", model.name, "know the shape of its inputs before training", remedy)
    rows = tf.nest.flatten(model.inputs)[0].shape[0] or _ROWS
    specs = tf.nest.map_structure(
        lambda t: tf.TensorSpec([rows, *t.shape[1:]], tf.as_dtype(t.dtype)), symbolic_inputs(model)
    )
    calls = trace_training_pass(model, specs).scope.calls
    if not calls:
        requirement = "have a DPBatchNormalization in training"
        raise _validate.argument_error("model", model.name, requirement, "Without one it needs no callback.")
    for call in calls:
        if call.inputs.shape[0] not in (None, rows):
            raise ValueError(
                f"DPBatchNormalization {call.layer.name!r} must have the examples in the first axis of its input, by "
                "which residuals are clipped. Keep that axis in what comes before it, or train a tf_dpbn.DPModel. "
                f"Received: shape {tuple(call.inputs.shape)} for a batch of {rows}"
            )
    return calls
