"""tf_dpbn as users install it, with each Python and each TensorFlow: `make check-versions`.

    python -m tests.versions
    python -m tests.versions --pythons=python3.12 --tensorflows=2.20,2.21

Builds the sdist, and from it the wheel. Each pair of Python and TensorFlow gets a fresh environment with the wheel, for
which pip chooses everything else; what `CHECKS` lists runs there on Keras 3, then on tf_keras. With the newest
TensorFlow the sdist is installed, too. Results of the same package are kept from run to run and become the table of
docs/versions.md. Ends with status 1 if anything failed; build/versions has the logs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from typing import Any

from absl import app, flags

ROOT = pathlib.Path(__file__).parents[1]
WORK, PAGE = ROOT / "build" / "versions", ROOT / "docs" / "versions.md"
BEGIN, END = "<!-- versions: begin, written by make check-versions -->", "<!-- versions: end -->"
PYTHONS, TENSORFLOWS = ("3.10", "3.11", "3.12", "3.13"), ("2.18", "2.19", "2.20", "2.21")
_INSTALLED = ["python", "-I", str(ROOT / "tests" / "installed.py")]
_SIZES = "--delta=1e-5 --num_examples=60000 --expected_batch_size=512 --epochs=20".split()
# Each check is the commands that must succeed; they use what those of earlier checks wrote.
CHECKS = {
    "quick start": [[*_INSTALLED, "train"]],
    "save, load": [[*_INSTALLED, "load"]],
    "export, serve": [[*_INSTALLED, "serve"]],
    "command line": [
        ["tf_dpbn"],
        ["tf_dpbn", "noise", "--target_epsilon=3", *_SIZES],
        ["tf_dpbn", "statement", "--file=model.keras", "--delta=1e-4"],
    ],
}
_IN_SDIST = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml", "setup.py", "tf_dpbn/py.typed"}
_SHOWN = ("tensorflow", "keras", "tf-keras", "numpy", "dp-accounting")
_NO_RELEASE = "No matching distribution found for tensorflow=="

_PYTHONS = flags.DEFINE_list("pythons", [f"python{version}" for version in PYTHONS], "Interpreters.")
_TENSORFLOWS = flags.DEFINE_list("tensorflows", list(TENSORFLOWS), "Minor versions; the newest patch is taken.")

Row = dict[str, Any]


def run(log: pathlib.Path, *command: str | pathlib.Path, **environment: str) -> tuple[bool, str]:
    """Whether the command succeeds, and what it prints, which also goes to the log; runs where the log is."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TF_USE_LEGACY_KERAS")}
    words = ["timeout", "1200", *map(str, command)]
    done = subprocess.run(
        words, cwd=log.parent, env=kept | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(words)}\n{done.stdout}")
    return done.returncode == 0, done.stdout


def build() -> dict[str, pathlib.Path]:
    """The archives by kind: the sdist, and the wheel that was built from it."""
    shutil.rmtree(WORK / "dist", ignore_errors=True)
    WORK.mkdir(parents=True, exist_ok=True)
    done, output = run(WORK / "build.log", sys.executable, "-m", "build", "--outdir", WORK / "dist", ROOT)
    assert done, output
    (sdist,), (wheel,) = ((WORK / "dist").glob(pattern) for pattern in ("*.tar.gz", "*.whl"))
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= _IN_SDIST, f"The sdist lacks {sorted(_IN_SDIST - names)}."
    return {"wheel": wheel, "sdist": sdist}


def digest(wheel: pathlib.Path) -> str:
    """Of what the results depend on: the package, what it requires, and the quick start."""
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        record, metadata = (archive.read(f"{info}/{name}").decode() for name in ("RECORD", "METADATA"))
    lines = re.findall(r"^tf_dpbn/.*|^Requires.*", record + metadata, re.MULTILINE)
    return hashlib.sha256("\n".join([*lines, quick_start()]).encode()).hexdigest()


def quick_start() -> str:
    """The program in the README."""
    (program,) = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    return program


def checked(log: pathlib.Path, python: str, tensorflow: str, archive: pathlib.Path, kerases: list[str]) -> Row:
    """A new environment, and what passed there.

    Returns:
      "versions" by package, none if there is no such TensorFlow for this Python; and "failed", names of checks.
    """
    shutil.rmtree(log.parent, ignore_errors=True)
    log.parent.mkdir(parents=True)
    (log.parent / "quick_start.py").write_text(quick_start(), encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="tf_dpbn") as environment:  # gigabytes, gone when its turn is over
        programs = pathlib.Path(environment) / "bin"
        pip = (programs / "python", "-m", "pip")
        run(log, python, "-m", "venv", environment)
        done, output = run(log, *pip, "install", "--progress-bar=off", archive, f"tensorflow=={tensorflow}.*")
        if not done:
            return {"versions": {}, "failed": [] if _NO_RELEASE in output else ["install"]}
        failed = [] if has_types(log, programs) else ["types"]
        for keras in kerases:
            if keras == "tf_keras":
                run(log, *pip, "install", "--progress-bar=off", f"tf_keras=={tensorflow}.*")
            failed += [f"{check} on {keras}" for check in CHECKS if not passes(check, log, programs, keras)]
        listed = json.loads(run(log, *pip, "list", "--format=json")[1])
    versions = {each["name"].lower().replace("_", "-"): each["version"] for each in listed}
    return {"versions": {name: versions.get(name, "") for name in _SHOWN}, "failed": failed}


def has_types(log: pathlib.Path, programs: pathlib.Path) -> bool:
    """Whether mypy, that of the environment that runs this, accepts the quick start and knows types of the package."""
    (log.parent / "typed.py").write_text(quick_start() + "reveal_type(plan.epsilon)\n", encoding="utf-8")
    mypy = (sys.executable, "-m", "mypy", "--config-file=", "--ignore-missing-imports", "--cache-dir", os.devnull)
    done, output = run(log, *mypy, f"--python-executable={programs / 'python'}", "typed.py")
    return done and re.search(r'Revealed type is "(builtins\.)?float"', output) is not None


def passes(check: str, log: pathlib.Path, programs: pathlib.Path, keras: str) -> bool:
    """Whether each command of a check succeeds with the programs of an environment."""
    settings = {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_USE_LEGACY_KERAS": str(int(keras == "tf_keras"))}
    return all(run(log, programs / program, *words, **settings)[0] for program, *words in CHECKS[check])


def outcome(row: Row) -> str:
    """In words."""
    if row["failed"]:
        return f"failed: {', '.join(row['failed'])}"
    return "passed" if row["versions"] else "no release"


def table(rows: list[Row]) -> str:
    """Markdown, sorted by versions; whatever failed is named instead of "passed"."""
    lines = ["| Python | installed from | TensorFlow | Keras | tf_keras | NumPy | dp-accounting | checks |"]
    lines += ["| --- " * 8 + "|"]
    for row in sorted(rows, key=lambda row: [*map(int, row["python"].split(".")), row["tensorflow"], row["archive"]]):
        versions = [row["versions"].get(name) or "-" for name in _SHOWN]
        versions[0] = row["versions"].get("tensorflow", row["tensorflow"])
        lines.append(f"| {' | '.join([row['python'], row['archive'], *versions, outcome(row)])} |")
    return "\n".join(lines)


def write_page(version: str, rows: list[Row]) -> None:
    """Replaces what is between the marks."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    part = f"{BEGIN}\n\ntf_dpbn {version}:\n\n{table(rows)}\n\n{END}"
    PAGE.write_text(before + part + rest.split(END)[1], encoding="utf-8")


def main(argv: list[str]) -> None:
    del argv
    exact = {}
    for python in _PYTHONS.value:
        say = "import platform; print(platform.python_version())"
        exact[python] = subprocess.run([python, "-c", say], check=True, capture_output=True, text=True).stdout.strip()
    archives = build()
    results = WORK / "results.jsonl"
    package = {"package": digest(archives["wheel"])}
    kept = map(json.loads, results.read_text(encoding="utf-8").splitlines() if results.exists() else [])
    rows: list[Row] = [row for row in kept if row.items() >= package.items()]
    pairs = [*itertools.product(_PYTHONS.value, _TENSORFLOWS.value, ["wheel"])]
    pairs += [(python, TENSORFLOWS[-1], "sdist") for python, tensorflow, _ in pairs if tensorflow == TENSORFLOWS[-1]]
    for python, tensorflow, archive in pairs:
        pair = {"python": exact[python], "tensorflow": tensorflow, "archive": archive}
        log = WORK / "-".join(pair.values()) / "log.txt"
        kerases = ["Keras 3", "tf_keras"] if archive == "wheel" else ["Keras 3"]
        row = {**package, **pair, **checked(log, python, tensorflow, archives[archive], kerases)}
        rows = [other for other in rows if not other.items() >= pair.items()] + [row]
        results.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
        write_page(archives["wheel"].name.split("-")[1], rows)
        print(*pair.values(), *row["versions"].values(), outcome(row), flush=True)
    sys.exit(any(row["failed"] for row in rows))


if __name__ == "__main__":
    app.run(main)
