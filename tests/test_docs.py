"""The documents: their snippets run, and the tests, files and pages that they name exist."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import tf_dpbn
from tests import helpers
from tests import tensorflow_privacy as tfp
from tf_dpbn._keras import keras

ROOT = pathlib.Path(__file__).parents[1]
README, MIGRATION = ((ROOT / name).read_text("utf-8") for name in ("README.md", "docs/migration.md"))


def snippets(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


def test_quick_start_runs(tmp_path, monkeypatch, capsys):
    (snippet,) = snippets(README)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "quick_start"})
    assert "differentially private with epsilon = 3.0000" in capsys.readouterr().out
    assert (tmp_path / "served" / "saved_model.pb").is_file()


SIDE = 8
DATA_LINES = re.findall(r"^dataset = (.*?)(?:  #.*)?$", README.split("## Your data")[1].split("##")[0], re.MULTILINE)
PARTS = ["read_picture", "source", "mmap_mode", "frame", "index_tfrecords"]


def picture(k: int) -> np.ndarray:
    return np.random.default_rng(k).integers(0, 255, (SIDE, SIDE, 3), "uint8")


def data_on_disk(part: str, count: int, directory: pathlib.Path) -> dict[str, Any]:
    """What a line of the README reads, by name; written to `directory`, which is the current one."""
    labels = np.arange(count) % 2
    if part == "read_picture":
        paths = [str(directory / f"{k}.jpg") for k in range(count)]
        for k, path in enumerate(paths):
            Image.fromarray(picture(k)).save(path)
        return {"paths": paths, "labels": labels, "read_picture": lambda p: tf.io.decode_jpeg(tf.io.read_file(p))}
    if part == "source":
        return {"source": built_data_source(count, directory)}
    if part == "mmap_mode":
        np.save(directory / "x.npy", np.stack([picture(k) for k in range(count)]))
        return {"labels": labels}
    if part == "frame":
        pandas = pytest.importorskip("pandas")
        city = np.array(["A", "B", "C"])[np.arange(count) % 3]
        return {"frame": pandas.DataFrame({"age": np.arange(count) / count, "city": city, "label": labels})}
    with tf.io.TFRecordWriter(str(directory / "train-0.tfrecord")) as writer:
        for k in range(count):
            writer.write(bytes([k % 2]) + picture(k).tobytes())

    def parse_example(record: bytes) -> Any:
        return np.frombuffer(record[1:], "uint8").reshape(SIDE, SIDE, 3), record[0]

    return {"parse_example": parse_example}


def built_data_source(count: int, directory: pathlib.Path) -> Any:
    """A data source by tensorflow-datasets' own builder."""
    datasets = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    features = datasets.features.FeaturesDict(
        {"image": datasets.features.Image(shape=(SIDE, SIDE, 3)), "label": datasets.features.ClassLabel(num_classes=2)}
    )
    rows = [(k, {"image": picture(k), "label": k % 2}) for k in range(count)]
    built = datasets.dataset_builders.AdhocBuilder(
        name="pictures",
        version="1.0.0",
        features=features,
        split_datasets={"train": rows},
        data_dir=str(directory),
        file_format="array_record",
    )
    built.download_and_prepare()
    return built.as_data_source(split="train")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("count", [40, pytest.param(2000, marks=pytest.mark.thorough)])
def test_data_lines_train_with_poisson_sampling(part, count, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (line,) = [line for line in DATA_LINES if part in line]
    plan = tf_dpbn.PrivacyPlan(
        noise_multiplier=1.0, delta=1e-4, num_examples=count, expected_batch_size=count // 10, steps=3
    )
    names = {"plan": plan, "np": np, "tf_dpbn": tf_dpbn, **data_on_disk(part, count, tmp_path)}
    dataset = eval(line, names)
    if part == "frame":
        age, city = keras.Input((1,), name="age"), keras.Input((1,), name="city", dtype="string")
        code = keras.layers.StringLookup(vocabulary=["A", "B", "C"], output_mode="one_hot")(city)
        inputs, h = {"age": age, "city": city}, keras.layers.Concatenate()([age, code])
        dataset = dataset.map(lambda x, y, weight: ({"age": x["age"][:, None], "city": x["city"][:, None]}, y, weight))
    else:
        inputs = keras.Input((SIDE, SIDE, 3))
        h = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(inputs))
    model = helpers.compiled(tf_dpbn.DPModel(inputs, keras.layers.Dense(2)(h)), optimizer=optimizer_of(plan))
    model.fit(dataset, steps_per_epoch=3, verbose=0)
    (record,) = model.ledger.entries
    assert record == plan.record(3)


def optimizer_of(plan: Any) -> Any:
    return tf_dpbn.DPOptimizer.from_plan(plan, keras.optimizers.SGD(0.1), l2_norm_clip=1.0)


@pytest.mark.tensorflow_privacy
@pytest.mark.parametrize("snippet", snippets(MIGRATION), ids=["DPModel", "tensorflow-privacy"])
def test_snippets_of_the_migration_page_run(snippet, capsys):
    if "tensorflow_privacy" in snippet:
        tfp.optimizer()  # or skip
    exec(compile(snippet, "migration.md", "exec"), {"__name__": "snippet"})
    assert re.search(r"differentially private with epsilon = (3\.0000|2\.999\d)", capsys.readouterr().out)


def test_what_documents_name_exists():
    for name in re.findall(r"`([\w/]+(?:\.py|/))`", README.split("## Layout")[1]):
        assert (ROOT / name).exists() or (ROOT / "tf_dpbn" / name).exists(), name
    named = re.findall(r"`((?:\w+/)*test_\w+\.py)::(test_\w+)`", MIGRATION)
    assert len(named) > 15
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text("utf-8"), test
    for page in (ROOT / "docs").glob("*.md"):
        for target in re.findall(r"\]\(([\w./]+\.(?:md|png))", page.read_text("utf-8")):
            assert (page.parent / target).is_file(), target
