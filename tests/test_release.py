"""Version numbers agree, and what is claimed of other packages' versions was tried."""

import pathlib
import re

from tests import versions
from tf_dpbn.version import __version__

ROOT = pathlib.Path(__file__).parents[1]


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_version_is_the_same_in_every_file():
    found = {
        "MODULE.bazel": re.search(r'version = "(.+)"', text_of("MODULE.bazel")),
        "CITATION.cff": re.search(r"^version: (.+)$", text_of("CITATION.cff"), re.MULTILINE),
        "CHANGELOG.md": re.search(r"^## \[(\d.*?)\]", text_of("CHANGELOG.md"), re.MULTILINE),
        "docs/versions.md": re.search(r"^tf_dpbn (.+):$", text_of("docs/versions.md"), re.MULTILINE),
    }
    assert {name: match[1] for name, match in found.items()} == dict.fromkeys(found, __version__)


def test_date_of_release_is_the_same_in_both_files():
    date = re.search(r"^date-released: (\S+)$", text_of("CITATION.cff"), re.MULTILINE)[1]
    assert f"## [{__version__}] - {date}\n" in text_of("CHANGELOG.md")


def test_what_setup_py_claims_was_tried():
    setup = text_of("setup.py")
    assert tuple(re.findall(r'"Programming Language :: Python :: (3\.\d+)"', setup)) == versions.PYTHONS
    assert re.search(r'python_requires=">=(.+)"', setup)[1] == versions.PYTHONS[0]
    assert re.search(r'"tensorflow>=(.+)"', setup)[1] == versions.TENSORFLOWS[0]
    lines = re.findall(r"^\| (3\..*) \|$", text_of("docs/versions.md"), re.MULTILINE)
    rows = [line.split(" | ") for line in lines]
    found = {(row[0].rpartition(".")[0], ".".join(row[2].split(".")[:2])): row[-1] for row in rows if row[1] == "wheel"}
    assert found.keys() == {(python, tf) for python in versions.PYTHONS for tf in versions.TENSORFLOWS}
    assert set(found.values()) <= {"passed", "no release"}
