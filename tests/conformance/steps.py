"""Whole train steps of each optimizer, on one device and on several replicas: `python -m tests.conformance.steps`

Every step is watched at the privacy boundary, `DPOptimizer.release`: what was clipped goes in, what is released
comes out. Prints a JSON object, case -> findings; test_steps.py says what they must be. A program of its own, because
logical devices must be set up before TensorFlow starts.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tests.replicas import strategy_of  # first: it sets up the logical devices

import tf_dpbn  # isort: skip
from tests import helpers, neighbours  # isort: skip
from tf_dpbn._keras import keras  # isort: skip
from tf_dpbn.mechanisms import ROUNDING  # isort: skip

layers = keras.layers
ROWS, FEATURES, CLASSES = 4, 6, 3
# Each with the arguments that it shares with the others, and some of its own.
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "wrapped": lambda **common: tf_dpbn.DPOptimizer(keras.optimizers.RMSprop(0.1, momentum=0.5), **common),
    "sgd": lambda **common: tf_dpbn.optimizers.VectorizedDPKerasSGDOptimizer(learning_rate=0.5, momentum=0.9, **common),
    "adam": lambda **common: tf_dpbn.optimizers.VectorizedDPKerasAdamOptimizer(learning_rate=0.1, **common),
    "adagrad": lambda **common: tf_dpbn.optimizers.VectorizedDPKerasAdagradOptimizer(learning_rate=0.1, **common),
}
REPLICAS = (1, 2, 4)
# Each optimizer and each number of replicas at least once; `--all` runs them all.
CASES = [("wrapped", 2), ("sgd", 1), ("adam", 4), ("adagrad", 2)]
BATCHES = 3
COMMON = {"l2_norm_clip": 0.7, "noise_multiplier": 0.5, "expected_batch_size": ROWS, "num_examples": 64}


class Boundary:
    """Keeps what the steps of an optimizer clip and release.

    Attributes:
      sensitivities: the declared one of each release.
      steps: for each step and replica (clipped, noised), each a list of vectors, one a release.
    """

    def __init__(self, optimizer: Any) -> None:
        self.sensitivities: list[float] = []
        self.steps: list[tuple[list[np.ndarray], list[np.ndarray]]] = []
        release = optimizer.release

        def watched(clipped: Any) -> Any:
            noised = release(clipped)
            self.sensitivities = [each.l2_sensitivity for each in clipped]
            vectors = [tf.concat([tf.reshape(t, [-1]) for t in each.tensors], 0) for each in (*clipped, *noised)]
            tf.py_function(self._keep, vectors, [])
            return noised

        optimizer.release = watched

    def _keep(self, *vectors: Any) -> None:
        values = [np.asarray(vector, np.float64) for vector in vectors]
        half = len(values) // 2
        self.steps.append((values[:half], values[half:]))


class SameWeights(keras.callbacks.Callback):
    """Has every step start from the same weights and statistics."""

    def __init__(self, weights: list[np.ndarray]) -> None:
        super().__init__()
        self._weights = weights

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Puts them back."""
        self.model.set_weights(self._weights)
        for mean in self.model._record.released_means.variables.values():
            mean.assign(tf.zeros_like(mean))


def network() -> Any:
    """A normalization of each mode."""
    inputs = keras.Input((FEATURES,))
    x = inputs
    for mode in ("noised", "public", "anchored"):
        x = layers.Activation("tanh")(tf_dpbn.DPBatchNormalization(statistics=mode)(layers.Dense(5)(x)))
    return tf_dpbn.DPModel(inputs, layers.Dense(CLASSES)(x))


def prepared(name: str, replicas: int) -> tuple[Any, Boundary]:
    """The compiled network and its watched boundary."""
    rng = np.random.default_rng(0)
    with strategy_of(replicas).scope():
        model = network()
        model.set_public_batch(rng.normal(size=(8, FEATURES)).astype("float32"))
        optimizer = OPTIMIZERS[name](noise_seed=10 * list(OPTIMIZERS).index(name) + replicas, **COMMON)
        helpers.compiled(model, optimizer=optimizer)
    helpers.randomize(model, 1, scale=0.7)
    return model, Boundary(optimizer)


def findings(name: str, replicas: int) -> dict[str, Any]:
    """Trains on all subsets of hard batches from the same weights; says what their releases did."""
    model, boundary = prepared(name, replicas)
    rng = np.random.default_rng(7)
    weights, moves, subsets = model.get_weights(), [], neighbours.subsets(ROWS)
    for _ in range(BATCHES):
        x, y, weight = neighbours.hard_batch(rng, (FEATURES,), lambda n: rng.integers(0, CLASSES, n), ROWS)
        x, y = (np.broadcast_to(each, (len(subsets), *each.shape)) for each in (x, y))
        data = tf.data.Dataset.from_tensor_slices((x, y, np.where(subsets, weight, 0).astype("float32")))
        before = len(boundary.steps)
        model.fit(data, callbacks=[SameWeights(weights)], verbose=0)
        moves.append(_moves(boundary.steps[before:], boundary.sensitivities, replicas))
    largest, typical = np.max(moves, 0)
    return {
        "pairs": BATCHES * len(neighbours.neighbouring(ROWS)[0]),
        "worst": largest.tolist(),
        "typical": typical.tolist(),
        "moved": float(np.max(np.abs(helpers.flat(model.get_weights()) - helpers.flat(weights)))),
        "ledger": _ledger(model),
        **_noise(boundary, replicas, model.optimizer.expected_batch_size),
    }


def _moves(steps: list[Any], sensitivities: list[float], replicas: int) -> np.ndarray:
    """[2, releases]: the largest and the median move of each release, over its sensitivity; infinite if not finite."""
    releases = len(sensitivities)
    sums = [np.array([clipped[k] for clipped, _ in steps[::replicas]]) / sensitivities[k] for k in range(releases)]
    without, with_row = neighbours.neighbouring(ROWS)
    distances = np.array([np.linalg.norm(each[with_row] - each[without], axis=1) for each in sums])
    return np.array([np.where(np.isfinite(distances), distances, np.inf).max(1), np.median(distances, 1)])


def _noise(boundary: Boundary, replicas: int, batch_size: float) -> dict[str, Any]:
    """The noise of each release in units of its sensitivity, and whether replicas and steps share it as they must."""
    steps = boundary.steps
    disagreement = max(
        float(np.max(np.abs(np.concatenate(one[1]) - np.concatenate(other[1]))))
        for i in range(0, len(steps), replicas)
        for one, other in zip(steps[i : i + 1] * replicas, steps[i : i + replicas], strict=True)
    )
    noise = []
    for k, sensitivity in enumerate(boundary.sensitivities):
        drawn = [noised[k] * batch_size - clipped[k] for clipped, noised in steps[::replicas]]
        noise.append(np.array(drawn) / (sensitivity * (1 + ROUNDING)))
    # Two steps, or two releases of a step, that shared their noise would begin alike.
    starts = np.array([row[:5] / np.std(each) for each in noise for row in each])
    apart = np.max(np.abs(starts[:, None] - starts[None]), -1) + np.diag(np.full(len(starts), np.inf))
    return {
        "steps": len(steps) // replicas,
        "replicas_disagree": disagreement,
        "closest_draws": float(np.min(apart)),
        "noise": [np.round(each.ravel(), 5).tolist() for each in noise],
    }


def _ledger(model: Any) -> dict[str, Any]:
    (entry,) = model.ledger.entries
    return {
        "steps": model.ledger.steps,
        "noise_multipliers": list(entry.noise_multipliers),
        "effective": 1 / math.sqrt(sum(s**-2 for s in entry.noise_multipliers)),
    }


def main() -> None:
    warnings.simplefilter("ignore")  # the batches are not Poisson-sampled
    cases = list(itertools.product(OPTIMIZERS, REPLICAS)) if "--all" in sys.argv else CASES
    print(json.dumps({f"{name}, {replicas}": findings(name, replicas) for name, replicas in cases}))


if __name__ == "__main__":
    main()
