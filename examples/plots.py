"""The examples' plot: accuracy and epsilon over the epochs of one training."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")  # writes files; needs no display

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator, PercentFormatter  # noqa: E402

_ACCURACY_COLOR, _EPSILON_COLOR = "#1f5fa8", "#c2541b"


def plot_training(
    path: str | pathlib.Path,
    *,
    accuracy: Sequence[float],
    epsilon: Sequence[float],
    title: str,
    delta: float,
    target_epsilon: float | None = None,
) -> None:
    """Writes a PNG: accuracy on the left axis, epsilon on the right one.

    Args:
      path: the file to write.
      accuracy: accuracy on held-out data after each epoch, in [0, 1].
      epsilon: epsilon after each epoch; infinite values are not drawn.
      title: the title.
      delta: the delta at which epsilon holds.
      target_epsilon: drawn as a dashed line if given.
    """
    figure, left = plt.subplots(figsize=(8, 5), dpi=120)
    epochs = range(1, len(accuracy) + 1)
    left.set_title(title)
    left.set_xlabel("epoch")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.grid(alpha=0.3)
    lines = left.plot(epochs, accuracy, "o-", color=_ACCURACY_COLOR, label="test accuracy")
    left.set_ylabel("test accuracy", color=_ACCURACY_COLOR)
    left.tick_params(axis="y", colors=_ACCURACY_COLOR)
    left.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    left.set_ylim(0.0, 1.0)

    right = left.twinx()
    finite = [value if math.isfinite(value) else math.nan for value in epsilon]
    lines += right.plot(epochs, finite, "s--", color=_EPSILON_COLOR, label="epsilon spent")
    right.set_ylabel(f"epsilon at delta = {delta:g}", color=_EPSILON_COLOR)
    right.tick_params(axis="y", colors=_EPSILON_COLOR)
    if target_epsilon is not None:
        target = right.axhline(target_epsilon, color=_EPSILON_COLOR, linestyle=":")
        target.set_label(f"target epsilon = {target_epsilon:g}")
        lines.append(target)
    right.set_ylim(bottom=0.0)
    left.legend(handles=lines, loc="lower right")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def plot_audit(
    path: str | pathlib.Path, *, claimed: Sequence[float], found: dict[str, Sequence[float]], title: str
) -> None:
    """Writes a PNG: lower bounds on epsilon over the claimed epsilon, and the line that none may cross.

    Args:
      path: the file to write.
      claimed: claimed epsilons.
      found: name of an audit -> its lower bounds.
      title: the title.
    """
    figure, axes = plt.subplots(figsize=(7, 5), dpi=120)
    axes.set_title(title)
    axes.set_xlabel("claimed epsilon")
    axes.set_ylabel("empirical lower bound")
    largest = 1.1 * max(claimed)
    axes.plot([0.0, largest], [0.0, largest], "--", color="gray", label="claim")
    for (name, bounds), marker in zip(found.items(), "osD^v", strict=False):
        axes.plot(claimed, bounds, marker=marker, label=name)
    axes.set_xlim(0.0, largest)
    axes.set_ylim(bottom=0.0)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
