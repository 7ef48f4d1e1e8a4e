"""The parts of one private step before and behind its privacy boundary; `DPModel.train_step` puts them together."""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from tf_dpbn._devices import traced_for_xla
from tf_dpbn._keras import (
    call_model,
    compiled_data_loss,
    draw_example_seeds,
    flatten_layers,
    is_compiled_whole,
    isolated_call,
    kept_state,
    keras,
    loss_trackers,
    masks_of,
    raw,
    regularization_losses,
    tracker_variables,
    update_compiled_metrics,
    with_masks,
)
from tf_dpbn.clipping import Batch, BatchPass, BatchResult, ExampleResult, MaskedPredictions, Task
from tf_dpbn.mechanisms import ClippedSum
from tf_dpbn.model import checks
from tf_dpbn.model.training_trace import trace_structure
from tf_dpbn.normalization import GivenStatistics, PublicForward
from tf_dpbn.sampling import real_example_mask

_HALF_PRECISION_LOSS_SCALE = 1024.0


def read_batch(model: Any, data: Any) -> Batch:
    """The examples of what Keras hands to a train step."""
    x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
    checks.check_groups(x, weight, model._dp_options)
    if weight is None:
        return Batch(x, y, None, None)
    return Batch(x, y, weight, _real_rows(weight))


def _real_rows(weight: Any) -> tf.Tensor:
    """bool [rows]: where one of the weights, a nest of [rows, ...], is not 0."""
    return tf.reduce_any(tf.stack([real_example_mask(each) for each in tf.nest.flatten(weight)]), 0)


def public_forward(model: Any, batch: Batch) -> PublicForward:
    """The forward pass of public data at the current weights; of the batch it uses shapes and types alone.

    Where no statistics come from a public batch it runs on one row of zeros, for the updates of state (spectral
    normalization, say) that the examples' own passes leave out.
    """
    checks.check_layers(model)
    x, y = first_of_groups(model._dp_options, batch.x, batch.y)
    structure = model._public.structure = trace_structure(model, x, y)
    zeros = tf.nest.map_structure(lambda t: tf.zeros_like(t[:1]), x)
    public_batch = model._public.require_batch() if structure.needs_public_batch else zeros
    return PublicForward(model, public_batch, model._dp_options["correction"], model._record.released_means)


def first_of_groups(options: dict[str, Any], x: Any, y: Any) -> tuple[Any, Any]:
    """Inputs and labels, nests of tensors or specs, without the axis of copies or of a user's examples."""

    def first(each: Any) -> Any:
        if isinstance(each, tf.TensorSpec):
            return tf.TensorSpec([each.shape[0], *each.shape[2:]], each.dtype)
        return each[:, 0]

    of_users = options["max_examples_per_user"] > 1
    x = tf.nest.map_structure(first, x) if of_users or options["augmentation_multiplicity"] > 1 else x
    return x, tf.nest.map_structure(first, y) if of_users else y


def clipped_sums(model: Any, batch: Batch, public: PublicForward) -> tuple[tuple[ClippedSum, ...], BatchResult]:
    """The clipped sum of per-example gradients, then those of statistics' residuals; and what metrics read."""
    with kept_state(model if model._public.structure.has_state else None), traced_for_xla(is_compiled_whole(model)):
        return model._engine(task(model, public), batch, model.optimizer.clip_of_step())


def task(model: Any, public: PublicForward) -> Task:
    """Describes one example's forward pass: a batch of its copies, or of one, with the public statistics.

    With several examples a user, the batch of a user's examples takes the place of the copies of an example.
    """
    seeds = draw_example_seeds(model)
    users, copies = model._dp_options["max_examples_per_user"], model._dp_options["augmentation_multiplicity"]
    group = max(users, copies)

    def loss_of_user(y_pred: Any, y: Any, weight: Any, index: tf.Tensor) -> tuple[Any, Any, Any]:
        """What `loss_of` yields, as means over the user's examples; all their predictions, [examples, ...]."""
        masks, results = masks_of(y_pred), []
        for k in range(users):
            outputs, masks_of_one = tf.nest.map_structure(lambda t: t[k : k + 1], (y_pred, masks))  # noqa: B023
            of_one = tf.nest.map_structure(lambda t: t[k], (y, weight))  # noqa: B023
            results.append(loss_of(with_masks(outputs, masks_of_one), of_one[0], of_one[1], index)[:2])
        present = _real_rows(weight)

        def mean(*values: tf.Tensor) -> tf.Tensor:
            total = tf.reduce_sum(tf.where(present, tf.stack(values), tf.zeros([users])))
            return tf.math.divide_no_nan(total, tf.reduce_sum(tf.cast(present, tf.float32)))

        loss, parts = tf.nest.map_structure(mean, *results)
        return loss, parts, MaskedPredictions(y_pred, masks) if tf.nest.flatten(masks) else y_pred

    def loss_of(y_pred: Any, y: Any, weight: Any, index: tf.Tensor) -> tuple[tf.Tensor, tuple[tf.Tensor, ...], Any]:
        """(loss, parts, prediction) of one example, from the predictions [copies, ...] for it."""
        y, weight = tf.nest.map_structure(lambda t: t[None], (y, weight))
        y = _with_class_where_unweighted(y, weight)
        scale, weight = _split_weight(weight)
        if copies > 1:
            y = tf.nest.map_structure(lambda t: tf.repeat(t, copies, 0), y)
            weight = None if weight is None else tf.nest.map_structure(lambda t: tf.repeat(t, copies, 0), weight)
        with isolated_call(seeds, index, tracker_variables(model), model.weights) as scope:
            loss, parts = compiled_data_loss(model, y, y_pred, weight, scope)
        masks = tf.nest.map_structure(lambda t: t[0], masks_of(y_pred))  # of copies alike: shapes are the same
        y_pred = tf.nest.map_structure(lambda t: tf.squeeze(t, 0) if copies == 1 else tf.reduce_mean(t, 0), y_pred)
        y_pred = MaskedPredictions(y_pred, masks) if tf.nest.flatten(masks) else y_pred
        parts = tuple(scale * tf.cast(part, tf.float32) for part in parts)
        return scale * tf.cast(tf.reduce_mean(loss), tf.float32), parts, y_pred

    def run_example(x: Any, y: Any, weight: Any, index: tf.Tensor, statistics: Any) -> ExampleResult:
        if group == 1:
            x = tf.nest.map_structure(lambda t: t[None], x)
        with (
            GivenStatistics(public.calls, statistics) as given,
            isolated_call(seeds, index, tracker_variables(model), model.weights),
        ):
            y_pred = call_model(model, x, training=True)
        loss, parts, y_pred = (loss_of if users == 1 else loss_of_user)(y_pred, y, weight, index)
        return ExampleResult(loss, parts, y_pred, public.residuals(given, tf.nest.flatten(x)))

    def run_batch(x: Any, index: tf.Tensor, statistics: Any) -> BatchPass:
        x = tf.nest.map_structure(_merge_groups if group > 1 else tf.identity, x)
        with (
            GivenStatistics(public.calls, statistics, constants=True) as given,
            isolated_call(seeds, index[0], tracker_variables(model), model.weights),
        ):
            y_pred = call_model(model, x, training=True, as_batch=True)
        return BatchPass(y_pred, given.normalized)

    def example_loss(y_pred: Any, y: Any, weight: Any, index: tf.Tensor) -> Any:
        if users > 1:
            return loss_of_user(y_pred, y, weight, index)
        return loss_of(tf.nest.map_structure(lambda t: t[None] if copies == 1 else t, y_pred), y, weight, index)

    variables = tuple(raw(variable) for variable in model.trainable_variables)
    expected = math.ceil(model.optimizer.expected_batch_size)
    return Task(run_example, variables, public.calls, _loss_scale(model), run_batch, example_loss, expected)


def _merge_groups(x: tf.Tensor) -> tf.Tensor:
    return tf.reshape(x, tf.concat([[-1], tf.shape(x)[2:]], 0))


def _loss_scale(model: Any) -> float:
    given = model._dp_options["loss_scale"]
    if given is not None:
        return float(given)
    half = any(getattr(layer, "compute_dtype", None) == "float16" for layer in [model, *flatten_layers(model)])
    return _HALF_PRECISION_LOSS_SCALE if half else 1.0


def regularization(model: Any) -> tuple[tf.Tensor, list[tf.Tensor | None]]:
    """Sum of the weights' regularizers and its gradients: no private data, so neither clipped nor noised."""
    variables = [raw(variable) for variable in model.trainable_variables]
    with tf.GradientTape() as tape:
        losses = [tf.cast(loss, tf.float32) for loss in regularization_losses(model)]
        total = tf.add_n(losses) if losses else tf.constant(0.0)
    return total, tape.gradient(total, variables) if losses else [None] * len(variables)


def update_metrics(model: Any, batch: Batch, result: BatchResult, penalty: tf.Tensor) -> dict[str, Any]:
    """Updates Keras' metrics on the real examples; un-noised, outside the guarantee.

    Args:
      model: a DPModel.
      batch: the batch.
      result: losses and predictions of its rows.
      penalty: the regularizers' sum at the weights that made them, from before the update.
    """
    model._record.non_finite.assign_add(result.non_finite)
    real = tf.ones_like(result.loss, tf.bool) if batch.mask is None else batch.mask
    count = tf.reduce_sum(tf.cast(real, tf.float32))

    def mean(values: tf.Tensor) -> tf.Tensor:
        values = tf.where(real, values, tf.zeros_like(values))
        return tf.math.divide_no_nan(tf.reduce_sum(values), count)

    total, parts = loss_trackers(model)
    total.update_state(mean(result.loss) + penalty, sample_weight=count)
    for tracker, values in zip(parts, result.parts, strict=True):
        tracker.update_state(mean(values), sample_weight=count)
    y, y_pred, weight, mask = batch.y, result.y_pred, batch.sample_weight, batch.mask
    if model._dp_options["max_examples_per_user"] > 1:
        y, y_pred, weight = tf.nest.map_structure(_merge_groups, (y, y_pred, weight))
        mask = _real_rows(weight)
    if isinstance(y_pred, MaskedPredictions):
        y_pred = with_masks(*y_pred)
    if isinstance(weight, tf.Tensor) and weight.dtype in (tf.bool, tf.int8):  # only says which rows are real
        weight = None
    update_compiled_metrics(model, y, y_pred, weight, mask)
    return model.get_metrics_result()


def _with_class_where_unweighted(y: Any, weight: Any) -> Any:
    """Sets labels of weight 0 to class 0: the loss of a label that is no class fails on CPUs and is NaN elsewhere."""
    if tf.nest.is_nested(y) or tf.nest.is_nested(weight) or not y.dtype.is_integer or y.shape.rank is None:
        return y
    if weight.shape.rank is None or not y.shape[: weight.shape.rank].is_compatible_with(weight.shape):
        return y
    counts = tf.reshape(weight != 0, tf.concat([tf.shape(weight), [1] * (y.shape.rank - weight.shape.rank)], 0))
    return tf.where(counts, y, tf.zeros_like(y))


def _split_weight(weight: Any) -> tuple[Any, Any]:
    """Splits one example's sample weight, [1, ...], into a factor on its loss and what Keras' loss must handle.

    A weight for the whole example multiplies its loss, whatever the loss' reduction; weights by position or by output
    go to Keras.
    """
    if isinstance(weight, tuple) and not weight:
        return 1.0, None
    if not tf.nest.is_nested(weight) and weight.shape.num_elements() == 1:
        return tf.cast(tf.reshape(weight, []), tf.float32), None
    return 1.0, weight
