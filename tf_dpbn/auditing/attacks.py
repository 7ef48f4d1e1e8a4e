"""What an attacker computes with a model: clipped sums without noise, each example's vector, and guesses from updates.

Private values throughout: for audits and tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_dpbn._devices import require_full_float32
from tf_dpbn._keras import keras
from tf_dpbn.mechanisms import ClippedSum
from tf_dpbn.model import DPModel, step


def _sums_of(model: DPModel, data: Any) -> tuple[ClippedSum, ...]:
    """What the train step runs until it adds noise, at the current weights."""
    batch = step.read_batch(model, data)
    return step.clipped_sums(model, batch, step.public_forward(model, batch))[0]


def clipped_sums(model: DPModel) -> Callable[[Any, Any, Any], tuple[ClippedSum, ...]]:
    """A function (x, y, weights) -> the clipped sums that a step of a compiled model would release, without noise.

    At the current weights. The sums are private; they are for audits and tests. Weights are [rows]; where rows are
    users, all examples of a row have its weight.
    """
    require_full_float32()
    sensitivities: list[float] = []

    def run(x: Any, y: Any, weights: Any) -> list[tuple[tf.Tensor, ...]]:
        if (most := model._dp_options["max_examples_per_user"]) > 1:
            weights = tf.repeat(weights[:, None], most, 1)
        found = _sums_of(model, (x, y, weights))
        sensitivities[:] = [each.l2_sensitivity for each in found]
        return [each.tensors for each in found]

    traced = tf.function(run, autograph=False)

    def call(x: Any, y: Any, weights: Any) -> tuple[ClippedSum, ...]:
        found = traced(*tf.nest.map_structure(tf.convert_to_tensor, (x, y, weights)))
        return tuple(ClippedSum(tuple(t), s) for t, s in zip(found, sensitivities, strict=True))

    return call


def _flat(tensors: Sequence[Any]) -> np.ndarray:
    return np.concatenate([np.asarray(tf.convert_to_tensor(t), np.float64).ravel() for t in tensors])


def clipped_gradients(model: DPModel) -> Callable[[Any, Any], tf.Tensor]:
    """A function (x, y) -> [examples, all weights]: each example's clipped gradient at the current weights."""

    def one(row: Any) -> tf.Tensor:
        gradient, *_ = _sums_of(model, tf.nest.map_structure(lambda t: t[None], row))
        return tf.concat([tf.reshape(t, [-1]) for t in gradient.tensors], 0)

    return tf.function(
        lambda x, y: tf.map_fn(one, (x, y), fn_output_signature=tf.float64, parallel_iterations=1), autograph=False
    )


class UpdateAttack(keras.callbacks.Callback):
    """Estimates which canaries the updates of the weights contain.

    A step of SGD releases r = sum_i b_i v_i + sum of the known examples + noise, v_i the clipped gradient of canary i
    and b_i whether it was drawn. The attacker subtracts what they expect of both sums and fits b by least squares over
    all steps, with a penalty as large as the noise.

    Args:
      known, canaries: (x, y), examples that are in the data set, and those that may be.
      rate: sampling probability q.
    """

    def __init__(self, known: Any, canaries: Any, rate: float) -> None:
        super().__init__()
        self._known, self._canaries = (tf.nest.map_structure(tf.convert_to_tensor, each) for each in (known, canaries))
        self._rate = rate
        count, self._examples = (len(tf.nest.flatten(each)[0]) for each in (canaries, known))
        self._products, self._match = np.zeros([count, count]), np.zeros(count)
        self.updates = 0  # how many were seen
        self._functions: Any = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Traces the model's own engine."""
        self._functions = clipped_sums(self.model), clipped_gradients(self.model)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Computes what is expected of the step, at the weights before it."""
        sums, vectors = self._functions
        self._vectors = vectors(*self._canaries).numpy().astype(np.float64)
        known = sums(*self._known, np.ones(self._examples, "float32"))[0]
        self._sensitivity, self._unit = known.l2_sensitivity, self.model.optimizer.clip_norm / known.l2_sensitivity
        self._expected = self._rate * (_flat(known.tensors) + 0.5 * self._vectors.sum(0))
        self._before = _flat(self.model.trainable_variables)
        self._learning_rate = float(np.asarray(self.model.optimizer.learning_rate))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Compares the update with what was expected."""
        update = (self._before - _flat(self.model.trainable_variables)) / self._learning_rate
        released = self.model.optimizer.expected_batch_size * update / self._unit
        self._products += self._vectors @ self._vectors.T
        self._match += self._vectors @ (released - self._expected)
        self.updates += 1

    def scores(self) -> np.ndarray:
        """[canaries], about one half more for those that were trained on than for the others."""
        drawn = self._rate / 2.0
        penalty = (self.model.optimizer.noise_multiplier * self._sensitivity) ** 2 / (drawn * (1.0 - drawn))
        penalty = max(penalty, 1e-9 * float(np.trace(self._products)))
        return np.linalg.solve(self._products + penalty * np.eye(len(self._match)), self._match)
