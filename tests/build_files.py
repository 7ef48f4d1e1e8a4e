"""Writes the BUILD files of Bazel: a target for each file, whose deps are what the file imports.

    python -m tests.build_files      (or: make build-files)

Third-party packages come from the environment that Bazel runs in, as setup.py lists them.
"""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = (
    "tf_dpbn",
    "tf_dpbn/accounting",
    "tf_dpbn/auditing",
    "tf_dpbn/clipping",
    "tf_dpbn/clipping/rules",
    "tf_dpbn/conversion",
    "tf_dpbn/interop",
    "tf_dpbn/model",
    "tf_dpbn/normalization",
    "tf_dpbn/sampling",
    "examples",
    "benchmarks",
    "tests",
    "tests/conformance",
)
# Directories whose files import each other by bare names, as scripts do.
SCRIPTS = ("examples", "benchmarks")
_PYTEST = "//tests:pytest_main.py"
HEADER = """# Written by `python -m tests.build_files`; deps are what the files import.
load("@rules_python//python:defs.bzl", {rules})

package(default_visibility = ["//visibility:public"])

licenses(["notice"])
"""


def label_of(path: pathlib.Path) -> tuple[str, str]:
    """(package, name) of the target of a file; an __init__.py is named like its directory."""
    package = path.parent.relative_to(ROOT).as_posix()
    return package, path.parent.name if path.name == "__init__.py" else path.stem


def module_file(name: str, importer: pathlib.Path) -> pathlib.Path | None:
    """The file of this repository that a dotted module name means, or None."""
    parts = name.split(".")
    places = [ROOT] + [
        ROOT / directory
        for directory in SCRIPTS
        if importer.parent == ROOT / directory
        or importer.is_relative_to(ROOT / "tests")
        or importer.is_relative_to(ROOT / "benchmarks")
    ]
    for place in places:
        path = place.joinpath(*parts)
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file() and candidate.parent.relative_to(ROOT).as_posix() in PACKAGES:
                return candidate
    return None


def imported_files(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Files of this repository that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[list[str]] = []
        if isinstance(node, ast.Import):
            names = [[alias.name] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [
                [f"{node.module}.{alias.name}", node.module] for alias in node.names
            ]  # a submodule, or a name in it
        for candidates in names:
            found = next((file for name in candidates if (file := module_file(name, path))), None)
            if found is not None and found != path:
                yield found


def rule_of(path: pathlib.Path) -> str:
    """The Bazel rule for a file."""
    if path.parent.is_relative_to(ROOT / "tests") and path.name.startswith("test_"):
        return "py_test"
    is_script = path.parent.name in SCRIPTS and '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    return "py_binary" if is_script else "py_library"


def target(path: pathlib.Path) -> str:
    """One target, as Starlark."""
    package, name = label_of(path)
    deps = set()
    for file in imported_files(path):
        other, target_name = label_of(file)
        if (other, target_name) != (package, name):
            short = f"//{other}" if other.rpartition("/")[2] == target_name else f"//{other}:{target_name}"
            deps.add(f":{target_name}" if other == package else short)
    lines = [f"{rule_of(path)}(", f'    name = "{name}",']
    if rule_of(path) == "py_test":
        deps.add(":conftest" if package == "tests" else "//tests:conftest")
        lines += [
            f'    srcs = ["{path.name}", "{_PYTEST}"],',
            f'    args = ["$(location {path.name})"],',
            f'    main = "{_PYTEST}",',
        ]
    else:
        lines.append(f'    srcs = ["{path.name}"],')
    if package in SCRIPTS:
        lines.append('    imports = ["."],')
    if deps:
        lines += ["    deps = [", *[f'        "{dep}",' for dep in sorted(deps)], "    ],"]
    return "\n".join([*lines, ")"])


def render(package: str) -> str:
    """The BUILD file of a directory."""
    files = sorted((ROOT / package).glob("*.py"))
    files = [path for path in files if path.read_text(encoding="utf-8").strip()]  # an empty __init__.py is implied
    rules = ", ".join(f'"{rule}"' for rule in sorted({rule_of(path) for path in files}))
    header = HEADER.format(rules=rules).rstrip()
    if package == "tests":
        header += '\n\nexports_files(["pytest_main.py"])'
    return "\n\n".join([header, *map(target, files)]) + "\n"


def main() -> None:
    """Writes all of them."""
    for package in PACKAGES:
        (ROOT / package / "BUILD").write_text(render(package), encoding="utf-8")


if __name__ == "__main__":
    main()
