"""Small models and direct access to the clipped sum, for tests."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import tf_dpbn
from tf_dpbn._keras import keras
from tf_dpbn.clipping import Batch, BatchResult, Task, count_release
from tf_dpbn.mechanisms import ClippedSum, ClipRule, sensitivity_of
from tf_dpbn.model import step

layers = keras.layers


def spread(*axes: Sequence[Any]) -> list[Any]:
    """All combinations of the axes' values, for `parametrize`; a diagonal part of them is for every run of the gate.

    It holds each value of the longest axis with one of the second longest, in turn. The others are for `make thorough`.
    """
    period = sorted(map(len, axes))[-2]
    found = []
    for numbered in itertools.product(*map(enumerate, axes)):
        values = [value for _, value in numbered]
        found.append(
            pytest.param(*values, marks=[] if sum(k for k, _ in numbered) % period == 0 else [pytest.mark.thorough])
        )
    return found


def dp_optimizer(**kwargs: Any) -> tf_dpbn.DPOptimizer:
    """Plain SGD at rate 1 with a clip norm and no noise, unless told otherwise."""
    arguments = {
        "inner": keras.optimizers.SGD(1.0),
        "l2_norm_clip": 1.0,
        "noise_multiplier": 0.0,
        "expected_batch_size": 8,
        **kwargs,
    }
    return tf_dpbn.DPOptimizer(**arguments)


def compiled(model: Any, loss: Any = None, optimizer: Any = None, stub: bool = False, **kwargs: Any) -> Any:
    """Compiles `model` with a sparse categorical loss on logits, or with `stub` without its gradients; returns it."""
    loss = loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer or dp_optimizer(), loss=loss, **kwargs)
    if stub:
        model._engine = StubEngine()
    return model


def spend(model: Any, steps: int) -> None:
    """Counts steps as train_on_batch does, without the work."""
    for _ in range(steps):
        model._record._optimizer._steps.count(0)


def forget(model: Any) -> Any:
    """Empties the record of a compiled model and returns it, so that tests can share what it takes to trace one."""
    record = model._record
    record.open(model.optimizer)
    record._run = uuid.uuid4().hex
    record._closed = {record._run: tf_dpbn.Ledger()}
    return model


def bn_stack(depth: int, normalization: Callable[..., Any], channels: int = 5, model: Any = keras.Model) -> Any:
    """Convolutions, each followed by a normalization and a tanh, and a dense head of 3 logits."""
    inputs = keras.Input((6, 6, 2))
    x = inputs
    for k in range(depth):
        x = layers.Conv2D(channels, 3, padding="same", use_bias=k % 2 == 0)(x)
        x = layers.Activation("tanh")(normalization()(x))
    x = layers.GlobalAveragePooling2D()(x)
    return model(inputs, layers.Dense(3)(x))


def randomize(model: Any, seed: int = 0, scale: float = 0.3) -> None:
    """Gives every weight of `model` a random value; variances become positive."""
    rng = np.random.default_rng(seed)
    weights = []
    for variable in model.weights:
        value = rng.normal(size=variable.shape) * scale
        if "seed_generator" in getattr(variable, "path", variable.name):
            value = np.asarray(variable)
        elif "variance" in getattr(variable, "path", variable.name):
            value = np.abs(value) + 0.5
        elif "statistic_updates" in getattr(variable, "path", variable.name):
            value = np.zeros(())
        elif "gamma" in getattr(variable, "path", variable.name):
            value = 1.0 + value
        weights.append(value)
    model.set_weights(weights)


def images(n: int, shape: tuple[int, ...] = (6, 6, 2), classes: int = 3, seed: int = 0) -> Any:
    """Random float images and integer labels."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, *shape)).astype("float32"), rng.integers(0, classes, n)


def step_function(model: Any, jit_compile: bool = False, all_releases: bool = False) -> Any:
    """A tf.function (x, y, weight or None) -> (sums, fields of BatchResult); see `clipped_sum_function`."""

    def run(x: Any, y: Any, weight: Any) -> Any:
        batch = step.read_batch(model, (x, y, weight))
        clipped, result = step.clipped_sums(model, batch, step.public_forward(model, batch))
        sums = [each.tensors for each in clipped] if all_releases else clipped[0].tensors
        return sums, tuple(getattr(result, f.name) for f in dataclasses.fields(result))

    return tf.function(run, autograph=False, jit_compile=jit_compile)


def clipped_sum_function(model: Any, jit_compile: bool = False, all_releases: bool = False) -> Callable[..., Any]:
    """A function (x, y, weight or None) -> (list of sums, per-example loss) through the model's own step.

    The sums are those of the gradient, or with `all_releases` lists of those of every release, the gradient first.
    """
    traced = step_function(model, jit_compile, all_releases)

    def call(x: Any, y: Any, weight: Any = None) -> Any:
        x, y, weight = (
            tf.nest.map_structure(tf.convert_to_tensor, (x, y, weight))
            if weight is not None
            else (
                *tf.nest.map_structure(tf.convert_to_tensor, (x, y)),
                None,
            )
        )
        tensors, result = traced(x, y, weight)
        return tf.nest.map_structure(lambda tensor: tensor.numpy(), list(tensors)), BatchResult(*result)

    return call


def flat(tensors: Any) -> np.ndarray:
    """Concatenates arrays into one float64 vector."""
    return np.concatenate([np.asarray(t, np.float64).ravel() for t in tensors])


def relative_error(found: Any, expected: Any) -> float:
    """L2 distance over the L2 norm of what is expected."""
    found, expected = flat(found), flat(expected)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def small_dataset(
    num_examples: int = 100, batch: int = 50, rows: int = 100, steps: int = 3, seed: int | None = None
) -> tf.data.Dataset:
    """Poisson batches of the numbers 1 to `num_examples`; 0 is padding."""
    numbers = np.arange(num_examples) + 1
    return tf_dpbn.sampling.poisson_dataset(
        numbers, numbers, expected_batch_size=batch, max_batch_size=rows, steps_per_epoch=steps, seed=seed
    )


def drawn_by(dataset: tf.data.Dataset) -> list[tuple[int, ...]]:
    """One iteration of `small_dataset`: the examples' numbers, row by row."""
    return [tuple(x.tolist()) for x, _, _ in dataset.as_numpy_iterator()]


@contextlib.contextmanager
def logged_lines() -> Iterator[list[str]]:
    """What TensorFlow's logger says meanwhile, warnings and errors; but not that tests trace often."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    handler.addFilter(lambda record: "triggered tf.function retracing" not in record.getMessage())
    tf.get_logger().addHandler(handler)
    try:
        yield lines
    finally:
        tf.get_logger().removeHandler(handler)


WAYS_TO_TRAIN = {
    "fit": lambda model, x, y: model.fit(x, y, verbose=0),
    "train_on_batch": lambda model, x, y: model.train_on_batch(x, y),
}


class StubEngine:
    """Stands in for a clipping engine where gradients are not under test: sums are zeros, which take little to trace.

    As an engine's they need the batch to be read first.
    """

    def __call__(
        self, task: Task, batch: Batch, l2_norm_clip: float | ClipRule
    ) -> tuple[tuple[ClippedSum, ...], BatchResult]:
        weight = () if batch.sample_weight is None else batch.sample_weight
        inputs = tf.nest.flatten(batch.x)
        first = tf.nest.map_structure(lambda t: t[0], (batch.x, batch.y, weight))
        example = task.run_example(*first, tf.constant(0), task.statistics)

        def by_row(tensor: tf.Tensor) -> tf.Tensor:
            return tf.zeros(tf.concat([tf.shape(inputs[0])[:1], tf.shape(tensor)], 0), tensor.dtype)

        with tf.control_dependencies(inputs):
            zeros = tuple(tf.zeros(v.shape, tf.float64) for v in task.variables)
            gradient = ClippedSum(zeros, sensitivity_of(l2_norm_clip))
            released = [
                ClippedSum((tf.zeros([r.size], tf.float64),), r.l2_norm_clip)
                for r in (*task.releases, *count_release(l2_norm_clip))
            ]
        by_products = tf.nest.map_structure(by_row, (*example.logged(), example.y_pred))
        return (gradient, *released), BatchResult(*by_products, tf.constant(0, tf.int64))
