"""Tables and plots of the utility benchmark."""

from __future__ import annotations

import pathlib
import statistics
import textwrap
from collections.abc import Sequence
from typing import Any

from training import Setting
from utility_tables import Row, Table

BEGIN, END = "<!-- utility: begin, written by make utility UTILITY_FLAGS=--report -->", "<!-- utility: end -->"

_Rows = Sequence[tuple[Row, Setting | None, Sequence[float]]]


def write(document: pathlib.Path, plots: pathlib.Path, summaries: Sequence[tuple[str, Table, _Rows]]) -> None:
    """Replaces the part of `document` between the marks, and writes a plot for each table with several groups.

    Args:
      document: Markdown with the two marks.
      plots: directory for the plots, below that of the document.
      summaries: (name, table, (row, chosen setting, accuracies by seed) of each row).

    Raises:
      ValueError: if the document lacks the marks.
    """
    text = document.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{document} must hold the lines {BEGIN!r} and {END!r}, between which the tables go.")
    parts = []
    for name, table, rows in summaries:
        if not any(accuracies for _, _, accuracies in rows):
            continue
        parts.append(f"### ({name}) {table.title}\n\n{_table(rows, table.seeds)}")
        if len({row.group for row, *_ in rows}) > 1:
            path = plots / f"utility_{name}.png"
            _plot(path, table.title, rows)
            parts.append(f"![{table.title}]({path.relative_to(document.parent)})")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    document.write_text(before + "\n\n".join([BEGIN, *parts, END]) + after, encoding="utf-8")


def _table(rows: _Rows, seeds: int) -> str:
    lines = ["| | | accuracy | seeds | learning rate | clip norm |", "| --- | --- | --- | --- | --- | --- |"]
    last = None
    for row, setting, accuracies in rows:
        if setting is None or not accuracies:
            continue
        group, last = "" if row.group == last else row.group, row.group
        incomplete = "" if len(accuracies) == seeds else f" of {seeds}"
        lines.append(
            f"| {group} | {row.name} | {_spread(accuracies)} | {len(accuracies)}{incomplete} | "
            f"{setting.learning_rate:g} | {setting.l2_norm_clip:g} |"
        )
    return "\n".join(lines)


def _spread(accuracies: Sequence[float]) -> str:
    """Mean and half the range, in percent."""
    text = f"{100 * statistics.mean(accuracies):.1f}"
    return text if len(accuracies) == 1 else f"{text} ± {50 * (max(accuracies) - min(accuracies)):.1f}"


def _plot(path: pathlib.Path, title: str, rows: _Rows) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = list(dict.fromkeys(row.group for row, *_ in rows))
    curves: dict[str, list[tuple[int, float, float, float]]] = {}
    for row, _, accuracies in rows:
        if accuracies:
            percent = [100 * accuracy for accuracy in accuracies]
            mean = statistics.mean(percent)
            point = (groups.index(row.group), mean, mean - min(percent), max(percent) - mean)
            curves.setdefault(row.name, []).append(point)
    figure, axes = pyplot.subplots(figsize=(7.0, 4.0))
    for name, points in curves.items():
        x, y, below, above = zip(*points, strict=True)
        style: dict[str, Any] = {"marker": "o", "capsize": 3, "label": name}
        axes.errorbar(x, y, yerr=[below, above], **style)
    axes.set_xticks(range(len(groups)), groups, rotation=20 if len(groups) > 4 else 0)
    axes.set_ylabel("test accuracy, %")
    axes.set_title(textwrap.fill(title, 80), fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
