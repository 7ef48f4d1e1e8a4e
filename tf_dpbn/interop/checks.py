"""What a stock model must satisfy before an optimizer of tensorflow-privacy may train it with this library's layers."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tf_dpbn import _checks, _training_trace, _validate
from tf_dpbn._keras import flatten_layers, keras, regularization_losses, steps_per_execution
from tf_dpbn.conversion import validate
from tf_dpbn.conversion.coupling import make_batch
from tf_dpbn.interop.row_loss import RowLoss
from tf_dpbn.layers import DPBatchNormalization, NormalizationCall
from tf_dpbn.mechanisms import LARGEST_CLIP, SMALLEST_CLIP
from tf_dpbn.model import DPModel
from tf_dpbn.optimizers import DPOptimizer

_ATTRIBUTES = ("_l2_norm_clip", "_noise_multiplier", "_num_microbatches", "_was_dp_gradients_called")
# What a step of `fit` runs; see `check_model`.
_OF_KERAS = ("train_step", "compute_loss", "make_train_function", "compute_metrics")
_NAMES = "VectorizedDPKerasSGDOptimizer, VectorizedDPKerasAdamOptimizer or VectorizedDPKerasAdagradOptimizer"


def check_model(model: Any) -> None:
    """Refuses models whose rows meet, or whose normalizations an outside train step cannot serve.

    Raises:
      TypeError: for a DPModel.
      ValueError: naming the layer, or what the model lacks.
    """
    if isinstance(model, DPModel):
        raise _validate.argument_error(
            "model",
            type(model).__name__,
            "be a stock Keras model for tensorflow-privacy's optimizers",
            "Build it with tf.keras.Model or tf.keras.Sequential, or train the DPModel with tf_dpbn.optimizers.",
            TypeError,
        )
    if not getattr(model, "inputs", None):
        raise _validate.argument_error(
            "model",
            model.name,
            "know the shape of its inputs before training",
            "Build it as tf.keras.Model(inputs, outputs), or as tf.keras.Sequential that begins with tf.keras.Input.",
        )
    _check_step(model)
    _check_strategy(model)
    _checks.check_layers(model)
    for layer in flatten_layers(model):
        if isinstance(layer, DPBatchNormalization):
            _check_normalization(layer)
    for variable in model.trainable_variables:
        if variable.dtype != tf.float32:
            raise _validate.argument_error(
                "dtype", variable.dtype.name, f"be float32 for variable {variable.name!r}", "Build the model anew."
            )
    if regularization_losses(model):
        raise ValueError(
            "The model has weight regularizers (kernel_regularizer and the like). tensorflow-privacy's vectorized "
            "optimizers add their loss to that of every row, padding included, so that an example that takes the place "
            "of padding would move the clipped sum by twice the clip norm. Leave them out, or train a "
            f"tf_dpbn.DPModel, which keeps them out of clipping. Received: model={model.name!r}"
        )
    findings = validate(model)
    if not findings.ok:
        raise ValueError(f"Examples meet in model {model.name!r}, which voids the guarantee:\n{findings}")


def _check_step(model: Any) -> None:
    """Refuses train steps other than Keras' own: nothing is known of what rows do to each other in them."""
    for name in _OF_KERAS:
        own = getattr(type(model), name) is not getattr(keras.Model, name)
        patched = name in vars(model) and not isinstance(vars(model)[name], RowLoss)
        if own or patched:
            raise _validate.argument_error(
                "model",
                f"{type(model).__name__} with a `{name}` of its own",
                "train by the step of tf.keras.Model",
                "Leave it out, or train a tf_dpbn.DPModel.",
            )


def check_seed() -> None:
    """Refuses a global seed: the gradient's noise obeys it, and would be drawn again in every `fit`.

    Raises:
      RuntimeError: with the remedy.
    """
    seeds = tf.compat.v1.get_seed(None)
    if seeds != (None, None):
        raise RuntimeError(
            "A global seed is set (tf.random.set_seed, keras.utils.set_random_seed or tf.config.experimental."
            "enable_op_determinism), which tensorflow-privacy's noise obeys: every `fit`, and every model, would draw "
            "the same noise again, and two updates with the same noise give away the difference of their gradients. "
            f"Call tf.random.set_seed(None) once the weights are made, before `fit`. Received: a seed of {seeds[0]}"
        )


def _check_strategy(model: Any) -> None:
    if model.distribute_strategy.num_replicas_in_sync > 1:
        raise NotImplementedError(
            "tensorflow-privacy's vectorized optimizers add noise on each replica by themselves, which is not counted. "
            "Train on one device, or a tf_dpbn.DPModel on several. "
            f"Received: {model.distribute_strategy.num_replicas_in_sync} replicas"
        )


def _check_normalization(layer: DPBatchNormalization) -> None:
    if layer.statistics == "anchored":
        raise _validate.argument_error(
            "statistics",
            layer.statistics,
            f'be "public" or "noised" for layer {layer.name!r} in a stock model',
            "Choose one of these, or train a tf_dpbn.DPModel.",
        )
    if layer.compute_dtype != "float32":
        raise _validate.argument_error(
            "dtype",
            layer.compute_dtype,
            f"be float32 for layer {layer.name!r}",
            "tensorflow-privacy's optimizers clip in float32; for half precision train a tf_dpbn.DPModel.",
        )


def check_optimizer(optimizer: Any, rows: int) -> None:
    """Refuses optimizers that do not clip every row and add noise once.

    Args:
      optimizer: of the compiled model, or None.
      rows: of each batch.

    Raises:
      RuntimeError: for a model that is not compiled.
      TypeError: for other optimizers.
      ValueError: for microbatches of several rows.
    """
    if optimizer is None:
        raise RuntimeError("Call compile(optimizer=..., loss=...) before training.")
    known = all(hasattr(optimizer, name) for name in _ATTRIBUTES)
    accumulates = hasattr(optimizer, "gradient_accumulation_steps")
    if isinstance(optimizer, DPOptimizer) or not known or accumulates:
        raise _validate.argument_error(
            "optimizer",
            f"{type(optimizer).__module__}.{type(optimizer).__name__}",
            f"be tensorflow-privacy's {_NAMES}",
            "Any other trains without privacy or is not known to clip every row by itself; with tf_dpbn.optimizers "
            "train a tf_dpbn.DPModel.",
            TypeError,
        )
    _validate.non_negative("noise_multiplier", float(optimizer._noise_multiplier))
    clip = _validate.positive("l2_norm_clip", float(optimizer._l2_norm_clip))
    if not SMALLEST_CLIP <= clip <= LARGEST_CLIP:
        requirement = f"lie in [{SMALLEST_CLIP}, {LARGEST_CLIP}]"
        raise _validate.argument_error("l2_norm_clip", clip, requirement, "Squares of other norms leave float32.")
    if optimizer._num_microbatches not in (None, rows):
        raise _validate.argument_error(
            "num_microbatches",
            optimizer._num_microbatches,
            f"be None or the number of rows of each batch, {rows}",
            "Fewer clip means of several examples, which doubles the sensitivity.",
        )


def check_compilation(model: Any) -> None:
    """Refuses losses that are not the loss of each row, and train functions in which checks would not run.

    Raises:
      ValueError: naming the argument of `compile`.
    """
    for loss in tf.nest.flatten(model.loss):
        reduction = getattr(loss, "reduction", None)
        if reduction != "none":
            raise _validate.argument_error(
                "loss",
                loss if reduction is None else f"{type(loss).__name__}(reduction={reduction!r})",
                "be a tf.keras.losses.Loss with reduction=tf.keras.losses.Reduction.NONE",
                "The optimizer clips the gradient of each row's loss, and needs it as a vector.",
            )
    if getattr(model, "_jit_compile", None):
        raise _validate.argument_error("jit_compile", True, "be False", "XLA leaves out the checks of each step.")
    stride = steps_per_execution(model)
    if stride != 1:
        raise _validate.argument_error(
            "steps_per_execution", stride, "be 1", "Statistics are brought up to the weights before each step."
        )


def training_calls(model: Any, rows: int) -> list[NormalizationCall]:
    """The calls of DPBatchNormalization in training, in order, from a trace that runs nothing.

    Raises:
      ValueError: if there is none, if one of them does not see examples in its first axis, or if state or losses depend
        on the examples.
    """
    batch = make_batch(model)
    specs = tf.nest.map_structure(lambda t: tf.TensorSpec([rows, *t.shape[1:]], tf.as_dtype(t.dtype)), batch)
    trace = _training_trace.trace_training_pass(model, specs)
    for change in trace.changes_from_data:
        raise ValueError(change.reason)
    if not trace.scope.calls:
        raise _validate.argument_error(
            "model", model.name, "have a DPBatchNormalization in training", "Without one it needs no callback."
        )
    for call in trace.scope.calls:
        if call.inputs.shape[0] not in (None, rows):
            raise ValueError(
                f"DPBatchNormalization {call.layer.name!r} must have the examples in the first axis of its input, by "
                "which residuals are clipped. Keep that axis in what comes before it, or train a tf_dpbn.DPModel. "
                f"Received: shape {tuple(call.inputs.shape)} for a batch of {rows}"
            )
    return trace.scope.calls


def check_rows(model: Any, rows: int) -> None:
    """Refuses normalizations whose first axis is another one that happens to be as long as the batch.

    Raises:
      ValueError: naming the layer.
    """
    if all(t.shape[0] is None for t in tf.nest.flatten(model.inputs)):
        training_calls(model, rows + 1)
