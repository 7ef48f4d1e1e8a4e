"""Losses that compare the rows of a batch are refused before the first step; all others pass."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import tf_dpbn
from tests import helpers
from tf_dpbn._keras import build_compiled_loss, keras
from tf_dpbn.model.training_trace import check_rows_alone

layers, losses = keras.layers, keras.losses


def in_batch_contrastive(y: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
    """The other rows are the negatives."""
    similarities = tf.matmul(y_pred, tf.cast(y, y_pred.dtype), transpose_b=True)
    return keras.losses.sparse_categorical_crossentropy(tf.range(tf.shape(y)[0]), similarities, from_logits=True)


def semi_hard_triplets(y: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
    distances = tf.reduce_sum(tf.square(y_pred[:, None] - y_pred[None]), -1)
    same = tf.equal(tf.reshape(y, [-1, 1]), tf.reshape(y, [1, -1]))
    hinge = distances[:, :, None] - distances[:, None, :] + 1.0
    valid = tf.cast((same & ~tf.eye(tf.shape(y)[0], dtype=tf.bool))[:, :, None] & ~same[:, None, :], hinge.dtype)
    return tf.math.divide_no_nan(tf.reduce_sum(valid * tf.nn.relu(hinge)), tf.reduce_sum(valid))


def dice_of_the_batch(y: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
    """Not the mean over the rows, but a loss of each."""
    y = tf.cast(y, y_pred.dtype)
    return 1.0 - 2.0 * tf.reduce_sum(y * y_pred) / tf.reduce_sum(y + y_pred)


def build(loss: Any, units: int = 4) -> Any:
    inputs = keras.Input((3,))
    return helpers.compiled(tf_dpbn.DPModel(inputs, layers.Dense(units, activation="softmax")(inputs)), loss)


FLOATS, LABELS = np.eye(4, dtype="float32")[np.arange(8) % 4], np.arange(8) % 4
X = np.ones((8, 3), "float32")


def fit(model: Any, x: Any, y: Any) -> None:
    model.fit(tf_dpbn.sampling.poisson_dataset(x, y, expected_batch_size=8, max_batch_size=8), verbose=0)


@pytest.mark.parametrize("train", [fit, helpers.WAYS_TO_TRAIN["train_on_batch"]])
def test_a_loss_that_compares_rows_is_refused_before_the_first_step(train):
    model = build(in_batch_contrastive)
    with pytest.raises(ValueError, match=r"`loss` must depend on one example at a time.*several inputs"):
        train(model, X, FLOATS)
    assert model.ledger.steps == 0


@pytest.mark.parametrize("y", [LABELS, LABELS.astype("float32")], ids=["integers", "floats"])
def test_triplets_are_refused(y):
    with pytest.raises(ValueError, match="one example at a time"):
        build(semi_hard_triplets).train_on_batch(X, y)


@pytest.mark.skipif(not hasattr(losses, "Circle"), reason="of Keras 3")
def test_the_one_loss_of_keras_that_compares_rows_is_refused():
    with pytest.raises(ValueError, match="one example at a time"):
        probe(build(losses.Circle()), LABELS, FLOATS)


def test_a_loss_of_the_whole_batch_that_each_row_has_alone_is_not_refused():
    probe(build(dice_of_the_batch), FLOATS, FLOATS)


def all_losses() -> list[type]:
    found = {each for each in vars(losses).values() if inspect.isclass(each) and issubclass(each, losses.Loss)}
    return sorted(found - {losses.Loss, getattr(losses, "Circle", None)} - {None}, key=lambda each: each.__name__)


@pytest.mark.parametrize("cls", all_losses())
def test_no_loss_of_keras_is_refused(cls):
    targets = [FLOATS, LABELS, LABELS.astype("float32"), LABELS[:, None], FLOATS.astype("int32"), FLOATS > 0.5]
    for reduction in ("sum", "none", "sum_over_batch_size", "mean", "mean_with_sample_weight"):
        try:
            model = build(cls(reduction=reduction))
        except ValueError:
            continue  # Keras 3 and tf_keras have not the same ones
        for y in targets if reduction == "sum" else targets[:2]:
            probe(model, y, FLOATS)


@pytest.mark.parametrize("ignored", [0, 1, 255, -1])
def test_ignored_classes_do_not_make_a_loss_one_of_rows(ignored):
    probe(build(losses.SparseCategoricalCrossentropy(ignore_class=ignored)), LABELS, FLOATS)
    pictures = np.ones((8, 2, 2, 4), "float32")
    probe(build(losses.SparseCategoricalCrossentropy(ignore_class=ignored)), pictures[..., 0].astype("int32"), pictures)


def test_a_loss_that_fails_on_made_up_numbers_is_not_refused():
    def strict(y, y_pred):
        raise RuntimeError("not such numbers")

    probe(build(strict), FLOATS, FLOATS)


def probe(model: Any, y: Any, y_pred: Any) -> None:
    specs = [tf.TensorSpec([None, *each.shape[1:]], each.dtype) for each in (y, y_pred)]
    build_compiled_loss(model, *specs)
    check_rows_alone(model, *specs)
