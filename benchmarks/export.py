"""Exports private networks to every format of Keras' `model.export`, runs the files, and compares with `predict`.

    pip install '.[export]'
    python benchmarks/export.py

Random weights, moving statistics of a synthetic public batch, logits. A format whose packages are not installed is left
out. Keras 3 only: tf_keras exports SavedModels alone.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import pathlib
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import app

import nets
import tf_dpbn

keras = tf.keras
NETWORKS = ("tutorial_cnn", "MobileNetV2")


def _run_saved_model(path: str, x: np.ndarray) -> np.ndarray:
    served = tf.saved_model.load(path)  # a name of its own: its function alone does not keep the variables
    return served.serve(x).numpy()


def _run_litert(path: str, x: np.ndarray) -> np.ndarray:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        Interpreter = tf.lite.Interpreter  # TensorFlow's own, as long as it has one
    signature = Interpreter(path).get_signature_runner()
    (name,) = signature.get_input_details()
    (output,) = signature(**{name: x}).values()
    return output


def _run_onnx(path: str, x: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    (output,) = session.run(None, {session.get_inputs()[0].name: x})
    return output


def _run_openvino(path: str, x: np.ndarray) -> np.ndarray:
    import openvino

    # By default it computes in half precision on CPUs that are quick at it.
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled(x)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """A format that Keras exports to.

    Attributes:
      ending: of the file's name, which Keras requires.
      packages: distributions that make the file and run it; TensorFlow's own tools aside.
      run: the outputs of an exported file for an array of inputs.
    """

    ending: str
    packages: tuple[str, ...]
    run: Callable[[str, np.ndarray], np.ndarray]


FORMATS = {
    "tf_saved_model": Format(ending="", packages=("tensorflow",), run=_run_saved_model),
    "litert": Format(ending=".tflite", packages=("ai-edge-litert",), run=_run_litert),
    "onnx": Format(ending=".onnx", packages=("tf2onnx", "onnxruntime"), run=_run_onnx),
    "openvino": Format(ending=".xml", packages=("openvino",), run=_run_openvino),
}


def versions(name: str) -> str | None:
    """The packages of a format with their versions; None if one is not installed."""
    try:
        return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in FORMATS[name].packages)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def network(name: str) -> Any:
    """A private network with random weights and the moving statistics of its public batch."""
    keras.utils.set_random_seed(0)
    stock = nets.build(name, keras.layers.BatchNormalization, keras.Model)
    public_batch = tf_dpbn.public_data.dead_leaves(nets.input_shape(name), 16, seed=0)
    model = tf_dpbn.convert(stock, public_batch=public_batch)
    model.refresh_statistics()
    return model


def difference(model: Any, name: str, x: np.ndarray) -> float:
    """Exports a model to a format, runs the file on `x`, and returns how far it is from `predict`.

    Returns:
      The largest difference, over the largest output.

    Raises:
      RuntimeError: if outputs do not depend on the example, so that to compare them would show nothing.
    """
    predicted = model.predict(x, verbose=0)
    if not np.ptp(predicted, axis=0).max() > 1e-3 * np.abs(predicted).max():
        raise RuntimeError(f"All examples have the same outputs: {predicted}")
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras patches tf2onnx for numpy 2; TensorFlow will drop its interpreter
        path = str(pathlib.Path(directory) / f"model{FORMATS[name].ending}")
        model.export(path, format=name, verbose=False)
        found = FORMATS[name].run(path, x)
    return float(np.abs(found - predicted).max() / np.abs(predicted).max())


def render(rows: Sequence[Sequence[str]]) -> str:
    """The table of docs/results.md."""
    header = ["format", "packages", *NETWORKS]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def main(argv: list[str]) -> None:
    """Compares all formats that are installed, and prints the table."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    rows = []
    for name in FORMATS:
        if (found := versions(name)) is None:
            print(f"{name} is left out: it needs {' and '.join(FORMATS[name].packages)}.")
            continue
        cells = []
        for each in NETWORKS:
            x = tf_dpbn.public_data.dead_leaves(nets.input_shape(each), 8, seed=1)
            cells.append(f"{difference(network(each), name, x):.0e}")
        rows.append([f"`{name}`", found, *cells])
    print(render(rows))


if __name__ == "__main__":
    app.run(main)
