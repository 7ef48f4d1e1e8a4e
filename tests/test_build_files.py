"""BUILD files name a target for every file and depend on what the files import, without a circle."""

from __future__ import annotations

import ast
import pathlib

import pytest

from tests import build_files


def parsed(package):
    """Target name -> its arguments, from the file as it lies there."""
    tree = ast.parse((build_files.ROOT / package / "BUILD").read_text(encoding="utf-8"))
    calls = [node.value for node in tree.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    targets = [call for call in calls if call.func.id.startswith("py_")]
    arguments = [{k.arg: ast.literal_eval(k.value) for k in call.keywords} for call in targets]
    return {each["name"]: each for each in arguments}


def full(label, package):
    if label.startswith(":"):
        return package, label[1:]
    directory, _, name = label[2:].partition(":")
    return directory, name or directory.rpartition("/")[2]


@pytest.mark.parametrize("package", build_files.PACKAGES)
def test_build_file_is_up_to_date(package):
    found = (build_files.ROOT / package / "BUILD").read_text(encoding="utf-8")
    assert found == build_files.render(package), "run: python -m tests.build_files"


def test_every_directory_with_python_files_has_a_build_file():
    tracked = {
        path.parent
        for top in ("tf_dpbn", "examples", "benchmarks", "tests")
        for path in (build_files.ROOT / top).rglob("*.py")
        if "peers" not in path.parts
    }
    assert {path.relative_to(build_files.ROOT).as_posix() for path in tracked} == set(build_files.PACKAGES)


def test_deps_exist_and_form_no_circle():
    targets = {(package, name): target for package in build_files.PACKAGES for name, target in parsed(package).items()}
    deps = {key: {full(dep, key[0]) for dep in target.get("deps", [])} for key, target in targets.items()}
    assert all(dep in targets for found in deps.values() for dep in found)
    done = set()
    while len(done) < len(deps):
        ready = {key for key, found in deps.items() if key not in done and found <= done}
        assert ready, f"a circle among {sorted(set(deps) - done)}"
        done |= ready


def test_sources_exist_once():
    for package in build_files.PACKAGES:
        sources = [source for target in parsed(package).values() for source in target["srcs"] if "//" not in source]
        assert len(sources) == len(set(sources))
        assert all(pathlib.Path(build_files.ROOT, package, source).is_file() for source in sources)
