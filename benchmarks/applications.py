"""keras.applications under DP-SGD: convert, train two steps, save and load, export, and back to stock Keras.

    python benchmarks/applications.py
    python benchmarks/applications.py --networks=MobileNetV2 --image_size=32

Random weights, small images. For each network it prints how many batch normalizations there are, how many get the
local correction (section 3a of docs/algorithm.md) and how many only the non-local one (3b), and what took how long.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import app, flags, logging

import tf_dpbn

keras = tf.keras
NETWORKS = ("ResNet50", "ResNet50V2", "MobileNetV2", "EfficientNetB0", "DenseNet121")
CLASSES = 3
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Row:
    """What happened to one network.

    Attributes:
      network: its name in keras.applications.
      normalizations: how many batch normalizations it has.
      corrected_locally, corrected_by_noised_sums: how many of them get correction 3a, and only 3b.
      convert_seconds, first_step_seconds, step_seconds: conversion; a step with tracing; a step.
      stock_difference, loaded_difference, served_difference: of logits, over the largest: the stock model's and the
        loaded model's from the private one's, called likewise; the SavedModel's from the private one's `predict`,
        which runs as a graph too (a graph rounds otherwise than single operations do, in any Keras model).
    """

    network: str
    normalizations: int
    corrected_locally: int
    corrected_by_noised_sums: int
    convert_seconds: float
    first_step_seconds: float
    step_seconds: float
    stock_difference: float
    loaded_difference: float
    served_difference: float


def run(network: str, image_size: int = 32, microbatch_size: int = 2) -> Row:
    """Takes one network all the way.

    Raises:
      RuntimeError: if logits differ by more than 1e-5 of the largest.
    """
    keras.utils.set_random_seed(0)
    shape = (image_size, image_size, 3)
    # Logits: probabilities of a network with random weights are often zeros and ones, which always agree.
    original = getattr(keras.applications, network)(
        weights=None, input_shape=shape, classes=CLASSES, classifier_activation=None
    )
    start = time.perf_counter()
    public_batch = tf_dpbn.public_data.uniform_noise(shape, 8, seed=0)
    model = tf_dpbn.convert(original, public_batch=public_batch)
    convert_seconds = time.perf_counter() - start
    step_seconds = _train(model, shape, microbatch_size)
    kinds = [kind for _, kind in model.correction_report()]
    differences = _differences(model, np.random.default_rng(1).uniform(size=(3, *shape)).astype("float32"))
    if not max(differences.values()) <= TOLERANCE:
        raise RuntimeError(f"{network}: logits differ, as parts of the largest, by {differences}")
    return Row(
        network=network,
        normalizations=len(kinds),
        corrected_locally=kinds.count("local"),
        corrected_by_noised_sums=kinds.count("non-local"),
        convert_seconds=round(convert_seconds, 1),
        first_step_seconds=round(step_seconds[0], 1),
        step_seconds=round(step_seconds[1], 2),
        **differences,
    )


def _train(model: Any, shape: tuple[int, ...], microbatch_size: int) -> list[float]:
    """Two steps on Poisson batches of about four; seconds of each."""
    examples, seconds = 16, []
    rng = np.random.default_rng(2)  # other numbers than the public batch's
    x, y = rng.uniform(size=(examples, *shape)).astype("float32"), rng.integers(0, CLASSES, examples)
    plan = tf_dpbn.PrivacyPlan(noise_multiplier=1.0, delta=1e-3, num_examples=examples, expected_batch_size=4, epochs=1)
    optimizer = tf_dpbn.optimizers.VectorizedDPKerasSGDOptimizer.from_plan(plan, l2_norm_clip=1.0, learning_rate=0.01)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, correction="local", microbatch_size=microbatch_size)
    batches = plan.poisson_dataset(x, y)
    for _ in range(2):
        start = time.perf_counter()
        model.fit(batches, epochs=1, steps_per_epoch=1, verbose=0)
        seconds.append(time.perf_counter() - start)
    if model.ledger.steps != 2:
        raise RuntimeError(f"The ledger holds {model.ledger.steps} steps, not 2")
    return seconds


def _differences(model: Any, x: np.ndarray) -> dict[str, float]:
    """The last three fields of a row.

    Raises:
      RuntimeError: if the logits do not depend on the example, so that to compare them would show nothing.
    """
    called, predicted = model(x, training=False).numpy(), model.predict(x, verbose=0)
    if not np.ptp(called, axis=0).max() > 1e-3 * np.abs(called).max():
        raise RuntimeError(f"All examples have the same logits: {called}")
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        file, folder = str(pathlib.Path(directory) / "m.keras"), str(pathlib.Path(directory) / "served")
        model.save(file)
        model.export(folder)
        served = tf.saved_model.load(folder)
        pairs = {
            "stock_difference": (tf_dpbn.to_stock(model)(x, training=False), called),
            "loaded_difference": (keras.models.load_model(file)(x, training=False), called),
            "served_difference": (served.serve(x), predicted),
        }
    return {name: float(np.abs(a - b).max() / np.abs(b).max()) for name, (a, b) in pairs.items()}


def render(rows: Sequence[Row]) -> str:
    """The table of docs/results.md."""
    lines = [
        "| network | batch norms | 3a | 3b only | convert s | first step s | step s | stock | loaded | served |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        *counts, stock, loaded, served = dataclasses.astuple(row)
        cells = [str(value) for value in counts] + [f"{value:.0e}" for value in (stock, loaded, served)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Runs the networks, prints the table, and ends with a line of JSON."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    values = flags.FLAGS
    unknown = set(values.networks) - set(NETWORKS)
    if unknown:
        raise app.UsageError(f"`networks` must be among {', '.join(NETWORKS)}. Received: networks={values.networks}")
    logging.set_verbosity(logging.ERROR)
    rows = []
    for network in values.networks:
        rows.append(run(network, values.image_size, values.microbatch_size))
        print(rows[-1], flush=True)
    print(render(rows))
    print(json.dumps([dataclasses.asdict(row) for row in rows]), flush=True)


def define_flags() -> None:
    """Defines the flags."""
    flags.DEFINE_list("networks", list(NETWORKS), f"Which, among {', '.join(NETWORKS)}.")
    flags.DEFINE_integer("image_size", 32, "Height and width.", lower_bound=32)
    flags.DEFINE_integer("microbatch_size", 2, "Examples at a time.", lower_bound=1)


if __name__ == "__main__":
    define_flags()
    app.run(main)
