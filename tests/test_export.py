"""Files that Keras exports for inference predict what the model predicts, in every format that can run here."""

import dataclasses

import numpy as np
import pytest

import export
import nets
import tf_dpbn
from tests import helpers
from tf_dpbn._keras import IS_KERAS_3, keras

pytestmark = pytest.mark.skipif(not IS_KERAS_3, reason="tf_keras exports SavedModels alone: tests/test_saving.py")
RUNTIMES = {"onnx": ("tf2onnx", "onnxruntime"), "openvino": ("openvino",)}  # TensorFlow brings those of the others
X = np.random.default_rng(0).uniform(size=(4, 8, 8, 1)).astype("float32")


@pytest.fixture(scope="module")
def trained():
    layers = keras.layers
    inputs = keras.Input((8, 8, 1))
    h = layers.ReLU()(tf_dpbn.DPBatchNormalization()(layers.Conv2D(4, 3, strides=2)(inputs)))
    model = tf_dpbn.DPModel(inputs, layers.Dense(3)(layers.Flatten()(h)))
    model.set_public_batch(tf_dpbn.public_data.uniform_noise((8, 8, 1), 6, seed=0))
    optimizer = helpers.dp_optimizer(noise_multiplier=1.0, expected_batch_size=4, num_examples=100)
    helpers.compiled(model, optimizer=optimizer, stub=True)
    model.train_on_batch(X, np.zeros(4, int))
    return model


def require(name):
    for package in RUNTIMES.get(name, ()):
        pytest.importorskip(package)


@pytest.mark.parametrize("name", export.FORMATS)
def test_an_exported_private_model_predicts_as_before(name, trained):
    require(name)
    assert export.difference(trained, name, X) < 1e-5


def test_the_comparison_sees_another_model(trained, monkeypatch):
    monkeypatch.setattr(trained, "predict", lambda x, verbose: trained(x * 1.001).numpy())
    assert export.difference(trained, "tf_saved_model", X) > 1e-5


@pytest.mark.thorough
@pytest.mark.parametrize("name", export.FORMATS)
def test_an_exported_network_of_keras_applications_predicts_as_before(name):
    require(name)
    x = tf_dpbn.public_data.dead_leaves(nets.input_shape("MobileNetV2"), 2, seed=1)
    assert export.difference(export.network("MobileNetV2"), name, x) < 1e-4


def test_the_table_has_a_row_for_each_installed_format(monkeypatch, capsys):
    monkeypatch.setattr(export, "NETWORKS", ("tutorial_cnn",))
    missing = dataclasses.replace(export.FORMATS["onnx"], packages=("no-such-package",))
    monkeypatch.setattr(export, "FORMATS", {"tf_saved_model": export.FORMATS["tf_saved_model"], "onnx": missing})
    export.main(["export"])
    left_out, *table = capsys.readouterr().out.splitlines()
    assert left_out == "onnx is left out: it needs no-such-package."
    assert table[0] == "| format | packages | tutorial_cnn |" and len(table) == 3
    assert table[2].startswith("| `tf_saved_model` | tensorflow 2.")
