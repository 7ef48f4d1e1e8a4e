"""Accuracy under privacy: normalization by epsilon, depth, data size; ablations; the best model.

    make utility UTILITY_FLAGS="--tables=b --data_dir=/usr/share/datasets/fashion-mnist"
    make utility UTILITY_FLAGS=--report

The first trains what the tables (see utility_tables.py) still lack and appends a line of JSON a run to --results;
it can be stopped and started again. On many cores or a GPU --processes=N --threads=1 trains N networks at a time. The
second writes the tables into docs/results.md and the plots beside it, from those lines alone.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import pathlib
import sys
from collections.abc import Mapping, Sequence
from concurrent import futures
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
_Run = tuple[training.Setting, int, str]  # what is trained, its seed and split


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


def accuracies(row: Row, seeds: int, results: Results) -> list[float]:
    """Those on test data of a row's best setting, of the seeds that were trained."""
    setting = best(row, results)
    runs = [results.get(key_of(setting, seed, "test")) for seed in range(seeds)] if setting else []
    return [run["accuracy"] for run in runs if run is not None]


def missing(row: Row, seeds: int, results: Results) -> list[_Run]:
    """The runs that a row needs next: those of its grid, then those of its seeds."""
    chosen = best(row, results)
    if chosen is None:
        wanted = [(row.tuning(setting), TUNING_SEED, "validation") for setting in row.settings]
    else:
        wanted = [(chosen, seed, "test") for seed in range(seeds)]
    return [run for run in wanted if key_of(*run) not in results]


def select(tables: Sequence[Table], words: Sequence[str]) -> list[tuple[Row, int]]:
    """Rows and their numbers of seeds: first those whose group or name holds the first of `words`, and so on."""
    rows = [(row, table.seeds) for table in tables for row in table.rows]
    chosen: list[tuple[Row, int]] = []
    for word in words:
        chosen += [each for each in rows if word in f"{each[0].group}: {each[0].name}" and each not in chosen]
    return chosen


def work(
    rows: Sequence[tuple[Row, int]], path: pathlib.Path, data_dir: str | None, pool: futures.Executor, at_once: int = 1
) -> None:
    """Trains what rows lack, given with their numbers of seeds, in order as far as `at_once` runs at a time allow."""
    running: dict[futures.Future[Any], _Run] = {}
    while True:
        results = read(path)
        wanted = (run for row, seeds in rows for run in missing(row, seeds, results))
        for run in wanted:
            if len(running) == at_once:
                break
            if run not in running.values():
                running[pool.submit(training.train, *run, data_dir)] = run
        if not running:
            return
        for done in futures.wait(running, return_when=futures.FIRST_COMPLETED).done:
            _record(path, running.pop(done), done.result())


def _record(path: pathlib.Path, run: _Run, result: Mapping[str, Any]) -> None:
    setting, seed, split = run
    what = [f"{each.name} {value}" for each in _FIELDS if (value := getattr(setting, each.name)) != each.default]
    print(f"{', '.join(what)}, {split} seed {seed}: {result['accuracy']:.4f} in {result['seconds']} s", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = {"setting": dataclasses.asdict(setting), "seed": seed, "split": split, **result}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**line, "tensorflow": tf.__version__}) + "\n")


def _limit_threads(threads: int) -> None:
    logging.set_verbosity(logging.ERROR)
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)


def report(path: pathlib.Path, document: pathlib.Path) -> None:
    """Writes tables and plots of the runs in `path`; the part of `document` between its marks is replaced."""
    results = read(path)
    summaries = []
    for name, table in TABLES.items():
        rows = []
        for row in table.rows:
            rows.append((row, best(row, results), accuracies(row, table.seeds, results)))
        summaries.append((name, table, rows))
    utility_report.write(document, path.parent, summaries)


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
    rows = select([TABLES[name] for name in values.tables], values.rows)
    if not rows:
        raise app.UsageError(f"`rows` must be parts of groups and names of rows of the tables. Received: {values.rows}")
    processes = values.processes
    with futures.ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), _limit_threads, (values.threads,)
    ) as pool:
        work(rows, path, values.data_dir, pool, processes)


def define_flags() -> None:
    """Defines the flags."""
    flags.DEFINE_list("tables", list(TABLES), f"Which, among {', '.join(TABLES)}.")
    flags.DEFINE_multi_string("rows", [""], "Which rows, by a part of their group and name: '16 convolutions: group'.")
    flags.DEFINE_string("results", str(RESULTS), "File of JSON lines to read and extend.")
    flags.DEFINE_string("data_dir", None, "IDX files of Fashion-MNIST; without it TensorFlow Datasets downloads them.")
    flags.DEFINE_integer("processes", 1, "How many networks to train at a time.", lower_bound=1)
    flags.DEFINE_integer("threads", 0, "Threads of each process; 0 leaves the choice to TensorFlow.", lower_bound=0)
    flags.DEFINE_bool("report", False, "Write the tables and plots instead of training.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
