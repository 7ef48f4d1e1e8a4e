"""The plots of docs/choosing.md that are not those of a table, from the runs of the utility benchmark,
accounting, and the table of fine-tuning in docs/results.md.

    PYTHONPATH=.:examples python benchmarks/choosing.py

Writes choosing_*.png beside --results.
"""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from absl import app, flags

import utility
from tf_dpbn import accounting
from utility_tables import TABLES, Row

DOCUMENT = utility.RESULTS.parents[1] / "results.md"
EPSILONS = (1.0, 3.0, 8.0)
# Tables whose learning rates were chosen on held-out data or, in (d), by single runs.
TUNED = ("a", "b", "small", "length", "c", "d", "e")


def noise_per_example(num_examples: int, batch_size: int, steps: int, epsilon: float, delta: float = 1e-5) -> float:
    """Standard deviation of the noise in the mean gradient, in clip norms."""
    plan = accounting.PrivacyPlan(
        num_examples=num_examples, expected_batch_size=batch_size, steps=steps, target_epsilon=epsilon, delta=delta
    )
    return float(plan.noise_multiplier or 0.0) / batch_size


def tuned_rates(results: utility.Results) -> Iterator[tuple[str, float, float]]:
    """(network, noise of the mean gradient in clip norms, learning rate) of tuned rows with public statistics."""
    for name in TUNED:
        for row in TABLES[name].rows:
            setting = utility.best(row, results)
            run = setting and results.get(utility.key_of(setting, 0, "test"))
            if (
                run
                and setting
                and setting.is_public
                and setting.statistics == "public"
                and setting.correction != "none"
            ):
                yield setting.net, run["noise_multipliers"][0] / setting.batch_size, setting.learning_rate


def accuracies(table: str, results: utility.Results) -> list[tuple[Row, list[float]]]:
    """Test accuracies in percent of each row of a table that has some."""
    seeds = TABLES[table].seeds
    found = [(row, [100 * each for each in utility.accuracies(row, seeds, results)]) for row in TABLES[table].rows]
    return [(row, each) for row, each in found if each]


def draw_batch_size(axes: Any, results: utility.Results) -> None:
    sizes = [2**k for k in range(6, 16)] + [60_000]
    for epsilon in EPSILONS:
        noise = [noise_per_example(60_000, size, 200, epsilon) for size in sizes]
        axes.loglog(sizes, noise, marker="o", label=f"epsilon {epsilon:g}")
        axes.axhline(1.1 * noise[-1], color="gray", linewidth=0.5)
    axes.set(xlabel="expected batch size", ylabel="noise in the mean gradient, clip norms")
    axes.set_title("60,000 examples, 200 steps, delta 1e-5; lines: 10 % more noise than all data", fontsize=10)


def draw_steps(axes: Any, results: utility.Results) -> None:
    steps = [2**k for k in range(3, 11)]
    for examples, style in ((4_000, "--"), (60_000, "-")):
        for k, epsilon in enumerate(EPSILONS):
            noise = [noise_per_example(examples, examples, count, epsilon) for count in steps]
            axes.loglog(steps, noise, style, color=f"C{k}", label=f"{examples:,} examples, epsilon {epsilon:g}")
            chosen = accounting.suggest(examples, epsilon, network="features", delta=1e-5).steps
            axes.plot(chosen, noise_per_example(examples, examples, chosen, epsilon), "o", color=f"C{k}")
    axes.set(xlabel="steps on all data", ylabel="noise in the mean gradient, clip norms")
    axes.set_ylim(top=0.5)  # room for the legend
    axes.set_title("What steps cost, delta 1e-5; dots: the steps that suited a dense layer on features", fontsize=10)


def draw_learning_rate(axes: Any, results: utility.Results) -> None:
    points = list(tuned_rates(results))
    for label, marker, deep in (("tutorial CNN", "o", False), ("stacks of convolutions", "x", True)):
        rows = [(noise, rate) for net, noise, rate in points if net.startswith("deep") == deep]
        axes.loglog(*zip(*rows, strict=True), marker, label=label)
    ends = [min(noise for _, noise, _ in points), max(noise for _, noise, _ in points)]
    for factor, style in ((1.0, "-"), (2.5, ":"), (0.4, ":")):
        axes.plot(ends, [factor * 0.001 / noise for noise in ends], style, color="gray", linewidth=1)
    axes.set(xlabel="noise in the mean gradient, clip norms", ylabel="learning rate")
    axes.set_title(
        "Learning rates of tuned rows, public statistics; lines: 0.001 / noise, times 2.5, by 2.5", fontsize=10
    )


def draw_clipping(axes: Any, results: utility.Results) -> None:
    curves: dict[str, list[tuple[float, float]]] = {}
    for row, found in accuracies("clip", results):
        name = row.name.rpartition(" ")[0].removesuffix(" from")
        curves.setdefault(name, []).append((row.settings[0].l2_norm_clip, statistics.mean(found)))
    for name, points in curves.items():
        axes.semilogx(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel="clip norm, or the first one", ylabel="test accuracy, %")
    axes.set_title("Table (clip): 4,000 digits, tutorial CNN, epsilon 8, learning rate 0.25", fontsize=10)


def draw_public(axes: Any, results: utility.Results) -> None:
    found = [(int(row.name), values) for row, values in accuracies("public", results)]
    for size, values in found:
        axes.plot([size] * len(values), values, "o", color="C0")
    axes.plot(*zip(*[(size, statistics.mean(values)) for size, values in found], strict=True), label="mean")
    axes.set(xlabel="public examples", ylabel="test accuracy, %")
    axes.set_xscale("log", base=2)
    axes.set_xticks([size for size, _ in found], [str(size) for size, _ in found])
    axes.set_title("Table (public): stack of 8 convolutions, 4,000 digits, dead leaves, epsilon 8", fontsize=10)


def draw_pretraining(axes: Any, results: utility.Results) -> None:
    """Of the document, since fine-tuning is an example's and not the benchmark's."""
    section = DOCUMENT.read_text(encoding="utf-8").split("## Fine-tuning")[1].split("\n## ")[0]
    header, _, *rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    for k, row in enumerate(rows):
        means, spreads = zip(*[map(float, cell.split(" ± ")) for cell in row[2:]], strict=True)
        places = [column + 0.1 * (k - len(rows) / 2) for column in range(len(means))]
        axes.errorbar(places, means, yerr=spreads, fmt="o", capsize=3, label=f"{row[0]}; {row[1]}")
    axes.set_xticks(range(len(header) - 2), header[2:])
    axes.set(ylabel="test accuracy, %", xlabel="private data, learning rate", ylim=(55, 95))  # room for the legend
    axes.set_title("Fine-tuning: 2,000 examples, epsilon 1", fontsize=10)


PLOTS: dict[str, Callable[[Any, utility.Results], None]] = {
    "batch_size": draw_batch_size,
    "steps": draw_steps,
    "learning_rate": draw_learning_rate,
    "clipping": draw_clipping,
    "public": draw_public,
    "pretraining": draw_pretraining,
}


def draw(results: utility.Results, directory: pathlib.Path) -> None:
    """Writes every plot."""
    from matplotlib import figure

    for name, fill in PLOTS.items():
        drawing = figure.Figure(figsize=(7.0, 4.0), layout="constrained")
        axes = drawing.add_subplot()
        fill(axes, results)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, ncols=2 if name in ("steps", "pretraining") else 1)
        drawing.savefig(directory / f"choosing_{name}.png", dpi=110)


def main(argv: list[str]) -> None:
    """Reads the runs and draws."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    path = pathlib.Path(flags.FLAGS.results)
    draw(utility.read(path), path.parent)


def define_flags() -> None:
    """Defines the flags."""
    flags.DEFINE_string("results", str(utility.RESULTS), "File of JSON lines of benchmarks/utility.py.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
