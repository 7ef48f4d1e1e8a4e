"""The tutorial notebook: what it shows is of one run, and it runs from top to bottom on fewer and smaller trainings."""

import json

import matplotlib
import pytest
import tensorflow as tf

from tests import notebook

SETTINGS = "EXAMPLES, EPOCHS, RUNS, TRIALS = 4000, 20, 2, 4000"
SMALL = "EXAMPLES, EPOCHS, RUNS, TRIALS = 160, 1, 1, 200"
TEXT = notebook.PATH.read_text(encoding="utf-8")
CELLS = [cell for cell in json.loads(TEXT)["cells"] if cell["cell_type"] == "code"]


def test_what_it_shows_is_of_one_run_from_top_to_bottom():
    content = json.loads(TEXT)
    assert (content["nbformat"], len({cell["id"] for cell in content["cells"]})) == (4, len(content["cells"]))
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1)), "run `make notebook`"
    outputs = [output for cell in CELLS for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert len(TEXT) < 300_000


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(monkeypatch, capsys):
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plots, level = [], tf.get_logger().level
    monkeypatch.setattr(plt, "show", lambda: plots.append(plt.gcf()))
    sources = ["".join(cell["source"]) for cell in CELLS]
    assert sources.count(SETTINGS) == 1
    names = {}
    try:
        for number, source in enumerate(sources):
            exec(compile(source.replace(SETTINGS, SMALL), f"cell {number}", "exec"), names)
    finally:
        tf.get_logger().setLevel(level)
        plt.close("all")
    assert names["model"].epsilon(1e-5) == names["history"].history["epsilon"][-1] <= 3.0
    assert {name: len(found) for name, found in names["accuracies"].items()} == {"none": 1, "auto": 1}
    assert len(plots) == 2 and not any(result.contradicts_claim for result in names["results"])
    assert "private with epsilon" in capsys.readouterr().out
