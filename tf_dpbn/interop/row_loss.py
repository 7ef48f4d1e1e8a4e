"""The loss of a stock model that an optimizer of tensorflow-privacy trains, row by row."""

from __future__ import annotations

import warnings
from typing import Any

import tensorflow as tf

from tf_dpbn import _validate
from tf_dpbn._keras import build_compiled_loss, compiled_data_loss, loss_trackers
from tf_dpbn.accounting import PrivacyWarning


def check_rows(tensor: tf.Tensor, rows: int) -> list[tf.Operation]:
    """Operations that fail where the first axis of a tensor is not the rows of a batch."""
    message = (
        "`max_batch_size` must equal the rows of each batch, padding included, and be the first axis in every layer. "
        "Train on plan.poisson_dataset(x, y), or on batches of one size (drop_remainder=True). "
        f"Received: max_batch_size={rows}"
    )
    if tensor.shape[0] not in (None, rows):
        raise ValueError(f"{message}, {tensor.shape[0]} rows")
    check = tf.debugging.assert_equal(tf.shape(tensor)[0], rows, message)
    return [] if check is None else [check]


class RowLoss:
    """Stands in for `compute_loss` of a model: computes the compiled loss of each row as of a batch of it alone.

    Keras broadcasts what differs in rank: weights of rows against the columns of images, labels of all rows against the
    outputs of one. No row's loss may know another row, so none sees one here, whatever loss the user has compiled.
    `rows` is of each batch, and `padded` tells whether some are padding, whose weight is zero.
    """

    def __init__(self, model: Any, rows: int, padded: bool) -> None:
        self._model, self._rows, self._padded = model, rows, padded

    def __call__(self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None) -> tf.Tensor:
        """The weighted loss of each row, [rows]; updates the model's trackers by the mean of real rows."""
        weight = self._weights(sample_weight)
        with tf.control_dependencies([op for each in tf.nest.flatten(y_pred) for op in check_rows(each, self._rows)]):
            y, y_pred, weight = tf.nest.map_structure(tf.identity, (y, y_pred, weight))
        build_compiled_loss(self._model, y, y_pred)

        def of_row(row: Any) -> tuple[tf.Tensor, tuple[tf.Tensor, ...]]:
            one_y, one_y_pred = tf.nest.map_structure(lambda t: tf.convert_to_tensor(t)[None], row)
            loss, parts = compiled_data_loss(self._model, one_y, one_y_pred, None, None)
            return tf.reduce_mean(loss), parts

        losses, parts = tf.vectorized_map(of_row, (y, y_pred))
        losses = weight * losses
        self._track(losses, parts, weight)
        return losses

    def _weights(self, sample_weight: Any) -> tf.Tensor:
        if sample_weight is None:
            if self._padded:
                requirement = f"tell padding from the examples expected among the {self._rows} rows of a batch"
                remedy = "Train on plan.poisson_dataset(x, y), whose batches carry it."
                raise _validate.argument_error("sample_weight", None, requirement, remedy)
            message = (
                "The batches do not come from PrivacyPlan.poisson_dataset. The reported epsilon assumes Poisson "
                "sampling, which shuffled or fixed-order batches do not satisfy."
            )
            warnings.warn(message, PrivacyWarning, stacklevel=2)
            return tf.ones([self._rows])
        shapes = [tuple(each.shape) for each in tf.nest.flatten(sample_weight)]
        if len(shapes) != 1 or any(size != 1 for size in shapes[0][1:]):
            remedy = "For weights by position train a tf_dpbn.DPModel."
            raise _validate.argument_error("sample_weight", shapes, "have one number a row", remedy)
        return tf.reshape(tf.cast(tf.nest.flatten(sample_weight)[0], tf.float32), [-1])

    def _track(self, losses: tf.Tensor, parts: tuple[tf.Tensor, ...], weight: tf.Tensor) -> None:
        count = tf.reduce_sum(tf.cast(weight != 0, tf.float32))
        total, trackers = loss_trackers(self._model)
        total.update_state(tf.math.divide_no_nan(tf.reduce_sum(losses), count), sample_weight=count)
        for tracker, values in zip(trackers, parts, strict=True):
            mean = tf.math.divide_no_nan(tf.reduce_sum(weight * values), count)
            tracker.update_state(mean, sample_weight=count)
