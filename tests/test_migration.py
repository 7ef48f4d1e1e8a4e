"""The migration page: its snippets run, and the tests that it names exist."""

from __future__ import annotations

import pathlib
import re

import pytest

from tests import tensorflow_privacy as tfp

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "migration.md").read_text("utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.tensorflow_privacy
@pytest.mark.parametrize("snippet", SNIPPETS, ids=["DPModel", "tensorflow-privacy"])
def test_snippets_run(snippet, capsys):
    if "tensorflow_privacy" in snippet:
        tfp.optimizer()  # or skip
    exec(compile(snippet, "migration.md", "exec"), {"__name__": "snippet"})
    assert re.search(r"differentially private with epsilon = (3\.0000|2\.999\d)", capsys.readouterr().out)


def test_named_tests_exist():
    named = re.findall(r"`((?:\w+/)*test_\w+\.py)::(test_\w+)`", PAGE)
    assert len(named) > 15
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text("utf-8"), test


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([\w./]+\.md)", PAGE):
        assert (ROOT / "docs" / target).is_file(), target
