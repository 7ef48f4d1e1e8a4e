"""tensorflow-privacy's optimizers in stock models, for tests; a skip where they cannot be had."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import tf_dpbn
from tf_dpbn._keras import IS_KERAS_3, keras

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
ROWS, EXAMPLES = 6, 60


def module(name: str) -> Any:
    """A module of tensorflow-privacy, or a skip."""
    if IS_KERAS_3:
        pytest.skip("tensorflow-privacy's optimizers are those of tf_keras")
    sys.skip_tf_privacy_import = True  # type: ignore[attr-defined]  # its package imports what TensorFlow 2.16 lacks
    try:
        return importlib.import_module(f"tensorflow_privacy.privacy.{name}")
    except ImportError as error:
        pytest.skip(f"tensorflow-privacy is not installed ({error})")


def optimizer(name: str = "SGD", **kwargs: Any) -> Any:
    """A vectorized DP optimizer; without noise, at rate 1, unless told otherwise; and no global seed."""
    tf.random.set_seed(None)
    arguments = {"l2_norm_clip": 1.0, "noise_multiplier": 0.0, "learning_rate": 1.0, **kwargs}
    return getattr(module("optimizers.dp_optimizer_keras_vectorized"), f"VectorizedDPKeras{name}Optimizer")(**arguments)


def callback(**kwargs: Any) -> tf_dpbn.interop.StatisticsCallback:
    """For batches of ROWS rows, 4 of them expected to be examples."""
    arguments = {
        "max_batch_size": ROWS,
        "expected_batch_size": 4,
        "num_examples": EXAMPLES,
        "statistics_noise_multiplier": 1.0,
        "public_batch": tf_dpbn.public_data.uniform_noise((6, 6, 2), 16, seed=0),
        **kwargs,
    }
    return tf_dpbn.interop.StatisticsCallback(**arguments)


class Stepper:
    """A compiled stock model under a callback, one step at a time from the same weights, in one traced function."""

    def __init__(self, model: Any, watcher: Any) -> None:
        self.model, self.watcher, self.start = model, watcher, model.get_weights()
        watcher.set_model(model)
        watcher.on_train_begin()
        self._step = tf.function(model.train_step, autograph=False)
        self._forward = tf.function(lambda x: model(x, training=True), autograph=False)

    def _run(self, function: Any, *arguments: Any) -> Any:
        self.model.set_weights(self.start)
        self.watcher.on_train_batch_begin(0)
        found = function(*arguments)
        self.watcher.on_train_batch_end(0)
        return found

    def sums(self, x: Any, y: Any, weight: Any) -> np.ndarray:
        """What the optimizer takes from the trainable weights at rate 1, times the rows: the clipped sum."""
        x, y, weight = (tf.convert_to_tensor(each) for each in (x, y, weight))
        before = self._flat_start()
        self._run(self._step, (x, y, weight))
        return ROWS * (before - np.concatenate([v.numpy().ravel() for v in self.model.trainable_variables]))

    def _flat_start(self) -> np.ndarray:
        self.model.set_weights(self.start)
        return np.concatenate([v.numpy().ravel() for v in self.model.trainable_variables])

    def outputs(self, x: Any) -> np.ndarray:
        """Predictions in training."""
        return np.asarray(self._run(self._forward, tf.convert_to_tensor(x)))
