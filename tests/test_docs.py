"""The documents: their snippets run, and the tests, files and pages that they name exist."""

from __future__ import annotations

import pathlib
import re
import shlex
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import tf_dpbn
from tests import helpers
from tests import tensorflow_privacy as tfp
from tf_dpbn import __main__ as command_line
from tf_dpbn._keras import keras

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def page(name: str) -> str:
    return (DOCS / name).read_text("utf-8")


def snippets(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


README, MIGRATION = (ROOT / "README.md").read_text("utf-8"), page("migration.md")
# What the tests shorten, by page.
SHORTER = {
    "tutorial.md": {"EPOCHS = 30": "EPOCHS = 1"},
    "guides/auditing.md": {"trials=4000": "trials=400"},
    "guides/features.md": {
        "1), 256)": "1), 32)",
        "1), 512)": "1), 256)",
        "400": "100",
        "=200": "=50",
        "epochs=5": "epochs=1",
    },
    "guides/pretrained.md": {"keras.applications.MobileNetV2(": "small_backbone("},
}
TESTED_OTHERWISE = ("guides/data.md", "migration.md")


@pytest.mark.slow
@pytest.mark.parametrize("name", [str(p.relative_to(DOCS)) for p in PAGES[2:] if snippets(p.read_text("utf-8"))])
def test_snippets_of_a_page_run_one_after_the_other(name, tmp_path, monkeypatch, capsys):
    if name in TESTED_OTHERWISE:
        pytest.skip("has a test of its own")
    monkeypatch.chdir(tmp_path)
    code = "\n".join(snippets(page(name)))
    for before, after in SHORTER.get(name, {}).items():
        assert before in code
        code = code.replace(before, after)
    exec(compile(code, name, "exec"), {"__name__": "page", "small_backbone": small_backbone})
    assert "privacy_statement(" not in code or "differentially private with epsilon" in capsys.readouterr().out


def small_backbone(input_shape: tuple[int, ...], name: str, **_: Any) -> keras.Model:
    """Stands in for a network of keras.applications, which takes a minute and a half to trace twice."""
    inputs = keras.Input(input_shape)
    h = keras.layers.ReLU()(keras.layers.BatchNormalization()(keras.layers.Conv2D(4, 3)(inputs)))
    return keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(h), name=name)


def test_quick_start_runs(tmp_path, monkeypatch, capsys):
    (snippet,) = snippets(README)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "quick_start"})
    assert "differentially private with epsilon = 3.0000" in capsys.readouterr().out
    assert (tmp_path / "served" / "saved_model.pb").is_file()


SIDE = 8
EXAMPLES = 400  # of the plan of guides/data.md


def picture(k: int) -> np.ndarray:
    return np.random.default_rng(k).integers(0, 255, (SIDE, SIDE, 3), "uint8")


def data_on_disk(directory: pathlib.Path) -> dict[str, Any]:
    """What guides/data.md reads: files in `directory`, which is the current one, and names."""
    pictures, labels = [picture(k) for k in range(EXAMPLES)], np.arange(EXAMPLES) % 2
    with tf.io.TFRecordWriter(str(directory / "train-0.tfrecord")) as writer:
        for k, (image, label) in enumerate(zip(pictures, labels, strict=True)):
            path = directory / "pictures" / ("cat", "dog")[label] / f"{k}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
            features = {
                "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image.tobytes()])),
                "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
            }
            example = tf.train.Example(features=tf.train.Features(feature=features))
            writer.write(example.SerializeToString())
    np.save(directory / "images.npy", np.stack(pictures))
    np.save(directory / "labels.npy", labels)
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"age": labels / 2, "city": np.array(["A", "B", "C"])[np.arange(EXAMPLES) % 3]})
    return {"source": built_data_source(EXAMPLES, directory), "frame": frame.assign(label=labels)}


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


@pytest.mark.slow
def test_data_sets_of_the_guide_train_with_poisson_sampling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, trained = data_on_disk(tmp_path), 0
    for snippet in snippets(page("guides/data.md")):
        exec(compile(snippet, "data.md", "exec"), names)
        if "dataset = " in snippet:
            train(names["plan"], names["dataset"])
            trained += 1
    assert trained == 5


def train(plan: Any, dataset: tf.data.Dataset) -> None:
    spec = dataset.element_spec[0]
    if isinstance(spec, dict):
        age, city = keras.Input((1,), name="age"), keras.Input((1,), name="city", dtype="string")
        code = keras.layers.StringLookup(vocabulary=["A", "B", "C"], output_mode="one_hot")(city)
        inputs, h = {"age": age, "city": city}, keras.layers.Concatenate()([age, code])
        dataset = dataset.map(lambda x, y, weight: ({"age": x["age"][:, None], "city": x["city"][:, None]}, y, weight))
    else:
        inputs = keras.Input(spec.shape[1:])
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


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    """Those between documents; `make docs` checks the site's."""
    for target, anchor in re.findall(r"\]\(([\w./-]*)(?:#([\w-]+))?\)", path.read_text("utf-8")):
        found = path.parent / target if target else path
        assert found.exists(), target
        assert not anchor or anchor in anchors(found.read_text("utf-8")), f"{target}#{anchor}"


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"`", "", h).lower()).replace(" ", "-") for h in headings}


COMMAND = re.compile(r"^    (?:[A-Z_]+=\S+ )*(make|python|pytest|tf_dpbn) ([^#\n]*)", re.MULTILINE)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_documents_exist(path, capsys):
    """Targets of make, scripts, modules, and their flags; those of the command line run."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    text = path.read_text("utf-8").replace("\\\n", " ")
    fenced = [
        line for block in re.findall(r"^```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE) for line in block.split("\n")
    ]
    commands = COMMAND.findall("\n".join([text, *(f"    {line}" for line in fenced)]))
    for program, arguments in commands:
        words = shlex.split(arguments)
        if program == "make":
            assert words[0] in targets or words[0].startswith("PYTHON"), words
        elif program == "tf_dpbn":
            command_line.main(words)
            assert capsys.readouterr().out
        else:
            assert_script_takes(words[1:] if words[0] == "-m" else words, is_module=words[0] == "-m")


def assert_script_takes(words: list[str], is_module: bool) -> None:
    files = [word for word in words if not word.startswith("-")]
    flags = [re.split("[= ]", word[2:])[0] for word in words if word.startswith("--")]
    names = [f"{file.replace('.', '/')}.py" for file in files[:1]] if is_module else files
    for name in names:
        assert (ROOT / name).is_file(), name
    modules = [ROOT / name for name in names if not name.startswith("examples/")] + list(
        (ROOT / "examples").glob("*.py")
    )
    text = "".join(module.read_text("utf-8") for module in modules)
    for flag in flags:
        assert re.search(rf'"(no)?{flag}"|"--{flag}"', text) or flag == "help", (names, flag)
