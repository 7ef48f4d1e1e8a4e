"""The rows of step_time.py as tables for people. Only the standard library is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

# For each kind of row, its columns: title, field, unit by which the number is divided, digits.
_COLUMNS: dict[str, list[tuple[str, str, float, int]]] = {
    "time": [
        ("ms", "milliseconds", 1.0, 2),
        ("/ plain", "ratio_to_plain", 1.0, 2),
        ("/ own plain", "ratio_to_own_plain", 1.0, 2),
        ("first s", "first_seconds", 1.0, 1),
        ("/ plain", "first_ratio_to_plain", 1.0, 2),
        ("us/example", "microseconds_per_example", 1.0, 1),
        ("rounds", "rounds", 1.0, 0),
    ],
    "comparison": [("ratio", "ratio", 1.0, 2)],
    "memory": [
        ("MiB", "process_bytes", 2.0**20, 1),
        ("/ plain", "process_ratio_to_plain", 1.0, 2),
        ("MiB growth", "above_start_bytes", 2.0**20, 1),
        ("/ plain", "above_start_ratio_to_plain", 1.0, 2),
        ("GPU MiB", "accelerator_bytes", 2.0**20, 1),
        ("/ plain", "accelerator_ratio_to_plain", 1.0, 2),
    ],
}


def render(rows: Sequence[Row]) -> str:
    """One table for each kind of row that occurs."""
    parts = []
    for measured, columns in _COLUMNS.items():
        of_kind = [row for row in rows if row["measured"] == measured]
        if all(row.get("ratio_to_own_plain") == row.get("ratio_to_plain") for row in of_kind):
            columns = [column for column in columns if column[1] != "ratio_to_own_plain"]  # no peers
        columns = [each for each in columns if "accelerator" not in each[1] or any(each[1] in row for row in of_kind)]
        if of_kind:
            parts.append(_table(of_kind, columns))
    return "\n\n".join(parts)


def _table(rows: Sequence[Row], columns: Sequence[tuple[str, str, float, int]]) -> str:
    words = ["net", "batch", "variant"]
    cells = [words + [title for title, *_ in columns]]
    for row in rows:
        name = f"{row['variant']} over {row['peer']}" if "peer" in row else row["variant"]
        numbers = [_cell(row, *column[1:]) for column in columns]
        cells.append([row["net"], str(row["batch_size"]), name, *numbers])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        left = [text.ljust(width) for text, width in zip(line[:3], widths[:3], strict=True)]
        right = [text.rjust(width) for text, width in zip(line[3:], widths[3:], strict=True)]
        lines.append("  ".join(left + right).rstrip())
    return "\n".join(lines)


def _cell(row: Row, field: str, unit: float, digits: int) -> str:
    value, spread = row.get(field), row.get(f"{field}_quartiles")
    if value is None:
        return "-"
    text = f"{value / unit:.{digits}f}"
    if spread is None:
        return text
    return f"{text} [{spread[0] / unit:.{digits}f}, {spread[1] / unit:.{digits}f}]"
