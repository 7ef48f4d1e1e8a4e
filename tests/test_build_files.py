"""BUILD files name a target for every file and depend on what the files import."""

from __future__ import annotations

import pytest

from tests import build_files


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
