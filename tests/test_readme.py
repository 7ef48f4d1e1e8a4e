"""The README's quick start runs as it stands."""

from __future__ import annotations

import pathlib
import re

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_quick_start_runs(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks[0], "README.md", "exec"), {"__name__": "quick_start"})
    assert "differentially private with epsilon = 3.0000" in capsys.readouterr().out
    assert (tmp_path / "served" / "saved_model.pb").is_file()


def test_every_file_named_in_the_layout_exists():
    root = README.parent
    layout = README.read_text("utf-8").split("## Layout")[1]
    for name in re.findall(r"`([\w/]+(?:\.py|/))`", layout):
        assert (root / name).exists() or (root / "tf_dpbn" / name).exists(), name
