"""What somebody who installed tf_dpbn does, each in a process of its own, for tests/versions.py.

    python -I tests/installed.py train      (in a directory with quick_start.py; then load, then serve)

Isolated (-I), Python finds the installed package and not this repository.
"""

from __future__ import annotations

import pathlib
import runpy
import sys

import numpy as np

IMAGES = np.random.default_rng(1).uniform(size=(16, 28, 28, 1)).astype("float32")
_MODEL, _LEDGER, _PREDICTIONS = "model.keras", "ledger.json", "predictions.npy"


def train() -> None:
    """Runs the quick start, saves its model, and leaves what the others compare with."""
    model = runpy.run_path("quick_start.py", run_name="__main__")["model"]
    model.save(_MODEL)
    pathlib.Path(_LEDGER).write_text(model.ledger.to_json(), encoding="utf-8")
    np.save(_PREDICTIONS, model.predict(IMAGES, verbose=0))


def load() -> None:
    """The saved model has the ledger and predicts the same."""
    import tensorflow as tf

    import tf_dpbn

    assert pathlib.Path(tf_dpbn.__file__).is_relative_to(sys.prefix), tf_dpbn.__file__
    model = tf.keras.models.load_model(_MODEL)
    assert isinstance(model, tf_dpbn.DPModel)
    assert model.ledger.to_json() == pathlib.Path(_LEDGER).read_text(encoding="utf-8")
    assert model.ledger.steps > 0
    np.testing.assert_allclose(model.predict(IMAGES, verbose=0), np.load(_PREDICTIONS), rtol=1e-5, atol=1e-5)


def serve() -> None:
    """The exported model predicts the same where tf_dpbn cannot be imported."""
    sys.modules["tf_dpbn"] = None  # type: ignore[assignment]
    import tensorflow as tf

    served = tf.saved_model.load("served")
    np.testing.assert_allclose(served.serve(tf.constant(IMAGES)), np.load(_PREDICTIONS), rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    {"train": train, "load": load, "serve": serve}[sys.argv[1]]()
