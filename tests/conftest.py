"""What all tests share, on both versions of Keras."""

from __future__ import annotations

import os

# Before TensorFlow is imported: it reports its CPU features on every start.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# On by default on some CPUs only; tests see the same kernels on all of them.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # several workers share the cores: one thread each
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")

import pytest  # noqa: E402


@pytest.fixture(autouse=True)
def _same_numbers(monkeypatch):
    """Initial weights and test data are the same in every run, privacy noise is not; and no GPU rounds products.

    Microbatches have the sizes that tests ask for, so that a few rows make several.
    """
    import tensorflow as tf

    from tf_dpbn.clipping import microbatches

    monkeypatch.setattr(microbatches, "ROWS_OF_REGISTERS", 1)
    tf.keras.utils.set_random_seed(0)
    tf.config.experimental.enable_tensor_float_32_execution(False)
