"""The documents: their snippets run, and the tests, files and pages that they name exist."""

from __future__ import annotations

import pathlib
import re

import pytest

from tests import tensorflow_privacy as tfp

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
        for target in re.findall(r"\]\(([\w./]+\.md)", page.read_text("utf-8")):
            assert (page.parent / target).is_file(), target
