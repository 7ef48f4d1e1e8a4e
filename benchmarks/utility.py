"""Accuracy under privacy: normalization by epsilon, depth, data size; ablations; the best model.

    make utility UTILITY_FLAGS="--tables=b --data_dir=/usr/share/datasets/fashion-mnist"
    make utility UTILITY_FLAGS=--report

The first trains what the tables (see utility_tables.py) still lack and appends a line of JSON a run to --results;
it can be stopped and started again, and several processes with --shard=0/2, --shard=1/2 share the work. The second
writes the tables into docs/results.md and the plots beside it, from those lines alone.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf
from absl import app, flags, logging

import training
import utility_report
from utility_tables import TABLES, Row, Table

_ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = _ROOT / "docs" / "results" / "utility.jsonl"
# Another seed than those of the tables, whose weights are not to be chosen by.
TUNING_SEED = 100

Results = dict[str, Mapping[str, Any]]


def key_of(setting: training.Setting, seed: int, split: str) -> str:
    """What identifies a run."""
    return json.dumps([dataclasses.asdict(setting), seed, split], sort_keys=True)


def read(path: pathlib.Path) -> Results:
    """The runs in a file of JSON lines, by key; a line that a stopped process left unfinished is skipped, and said."""
    found: Results = {}
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            run = json.loads(line)
            known = {field.name: run["setting"].get(field.name, field.default) for field in _FIELDS}
            found[key_of(training.Setting(**known), run["seed"], run["split"])] = run
        except (ValueError, KeyError) as error:
            print(f"{path}:{number} is no run and is left out: {error}", file=sys.stderr)
    return found


_FIELDS = dataclasses.fields(training.Setting)


def best(row: Row, results: Results) -> training.Setting | None:
    """The setting of a row that did best on held-out data; None while runs are missing."""
    if len(row.settings) == 1:
        return row.settings[0]
    runs = [results.get(key_of(row.tuning(setting), TUNING_SEED, "validation")) for setting in row.settings]
    if None in runs:
        return None
    return max(zip(row.settings, runs, strict=True), key=lambda pair: pair[1]["accuracy"])[0]  # type: ignore[index]


def missing(row: Row, seeds: int, results: Results) -> list[tuple[training.Setting, int, str]]:
    """The runs that a row needs next: those of its grid, then those of its seeds."""
    chosen = best(row, results)
    if chosen is None:
        wanted = [(row.tuning(setting), TUNING_SEED, "validation") for setting in row.settings]
    else:
        wanted = [(chosen, seed, "test") for seed in range(seeds)]
    return [run for run in wanted if key_of(*run) not in results]


def work(tables: Sequence[Table], path: pathlib.Path, data_dir: str | None, shard: tuple[int, int]) -> None:
    """Trains what is missing, row by row."""
    rows = [(row, table.seeds) for table in tables for row in table.rows]
    for i, (row, seeds) in enumerate(rows):
        if i % shard[1] != shard[0]:
            continue
        while runs := missing(row, seeds, read(path)):
            for setting, seed, split in runs:
                result = training.train(setting, seed, split, data_dir)
                print(
                    f"row {i + 1}/{len(rows)} {row.group}, {row.name}: rate {setting.learning_rate:g}, clip "
                    f"{setting.l2_norm_clip:g}, {split} seed {seed}: {result['accuracy']:.4f} in {result['seconds']} s",
                    flush=True,
                )
                run = {"setting": dataclasses.asdict(setting), "seed": seed, "split": split, **result}
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**run, "tensorflow": tf.__version__}) + "\n")


def report(path: pathlib.Path, document: pathlib.Path) -> None:
    """Writes tables and plots of the runs in `path`; the part of `document` between its marks is replaced."""
    results = read(path)
    summaries = []
    for name, table in TABLES.items():
        rows = []
        for row in table.rows:
            setting = best(row, results)
            runs = [results.get(key_of(setting, seed, "test")) for seed in range(table.seeds)] if setting else []
            rows.append((row, setting, [run["accuracy"] for run in runs if run is not None]))
        summaries.append((name, table, rows))
    utility_report.write(document, path.parent, summaries)


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise app.UsageError(f"`shard` must be like 0/2, the first of two. Received: shard={text!r}")
    return int(match[1]), int(match[2])


def main(argv: list[str]) -> None:
    """Trains, or reports."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    values = flags.FLAGS
    logging.set_verbosity(logging.ERROR)
    path = pathlib.Path(values.results)
    if values.report:
        report(path, _ROOT / "docs" / "results.md")
        return
    unknown = set(values.tables) - set(TABLES)
    if unknown:
        raise app.UsageError(f"`tables` must be among {', '.join(TABLES)}. Received: tables={values.tables}")
    if values.threads:
        tf.config.threading.set_intra_op_parallelism_threads(values.threads)
        tf.config.threading.set_inter_op_parallelism_threads(values.threads)
    work([TABLES[name] for name in values.tables], path, values.data_dir, _shard(values.shard))


def define_flags() -> None:
    """Defines the flags."""
    flags.DEFINE_list("tables", ["a", "b", "c", "depth", "d", "e", "limit"], f"Which, among {', '.join(TABLES)}.")
    flags.DEFINE_string("results", str(RESULTS), "File of JSON lines to read and extend.")
    flags.DEFINE_string("data_dir", None, "IDX files of Fashion-MNIST; without it TensorFlow Datasets downloads them.")
    flags.DEFINE_string("shard", "0/1", "Which part of the rows to work on: i/n is the i-th of n, from 0 on.")
    flags.DEFINE_integer("threads", 0, "Threads of this process; 0 leaves the choice to TensorFlow.", lower_bound=0)
    flags.DEFINE_bool("report", False, "Write the tables and plots instead of training.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
