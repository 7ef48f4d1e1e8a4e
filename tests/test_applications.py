"""Networks of keras.applications under DP-SGD; benchmarks/applications.py takes the others all the way too."""

from __future__ import annotations

import pytest

import applications


@pytest.mark.thorough
def test_mobilenet_is_converted_trained_exported_and_made_plain_again():
    row = applications.run("MobileNetV2")  # raises if a loaded, exported or plain model predicts otherwise
    assert row.normalizations == row.corrected_locally == 52
    cells = applications.render([row]).splitlines()[-1].split("|")
    assert [cell.strip() for cell in cells[1:5]] == ["MobileNetV2", "52", "52", "0"]
