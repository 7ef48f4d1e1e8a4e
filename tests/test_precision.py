"""Private steps run with products in full float32, whatever the process is set to."""

import threading

import numpy as np
import pytest
import tensorflow as tf

import tf_dpbn
from tests import helpers
from tf_dpbn import _precision
from tf_dpbn._keras import keras


@pytest.fixture(params=[True, False], ids=["rounding", "full"])
def setting(request):
    """Whether the process lets devices round, as before and after each test."""
    before = rounding()
    tf.config.experimental.enable_tensor_float_32_execution(request.param)
    yield request.param
    tf.config.experimental.enable_tensor_float_32_execution(before)


def rounding():
    return tf.config.experimental.tensor_float_32_execution_enabled()


class Watch(keras.callbacks.Callback):
    """Notes the setting before and after each step, and fails if told to."""

    def __init__(self, error=None):
        super().__init__()
        self.error, self.seen = error, []

    def on_train_batch_begin(self, batch, logs=None):
        self.seen.append(rounding())
        if self.error:
            raise self.error

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(rounding())


def model_and_data():
    x, y = np.zeros((8, 3), "float32"), np.zeros(8, "int32")
    return helpers.compiled(tf_dpbn.DPSequential([keras.Input((3,)), keras.layers.Dense(2)])), x, y


@pytest.mark.filterwarnings("ignore::tf_dpbn.PrivacyWarning")
def test_fit_multiplies_in_full_float32_and_restores_the_setting(setting):
    model, x, y = model_and_data()
    watch = Watch()
    model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[watch])
    assert watch.seen == [False] * 4
    assert rounding() is setting


@pytest.mark.filterwarnings("ignore::tf_dpbn.PrivacyWarning")
def test_a_fit_that_fails_restores_the_setting(setting):
    model, x, y = model_and_data()
    with pytest.raises(OSError, match="disk"):
        model.fit(x, y, batch_size=8, verbose=0, callbacks=[Watch(OSError("disk"))])
    assert rounding() is setting


def test_single_steps_multiply_in_full_float32(setting, monkeypatch):
    model, x, y = model_and_data()
    monkeypatch.setattr(_precision, "has_accelerator", lambda: True)  # then a trace with rounding on is refused
    model.train_on_batch(x, y)
    model.train_step((tf.constant(x), tf.constant(y)))
    assert rounding() is setting
    assert model.private_steps == 2


def test_a_step_of_ones_own_is_refused_where_a_device_would_round(monkeypatch):
    model, x, y = model_and_data()
    data = (tf.constant(x), tf.constant(y))
    monkeypatch.setattr(_precision, "has_accelerator", lambda: True)
    monkeypatch.setattr(tf.config.experimental, "tensor_float_32_execution_enabled", lambda: True)
    with pytest.raises(RuntimeError, match=r"enable_tensor_float_32_execution\(False\)"):
        tf.function(model.train_step, autograph=False)(data)
    assert model.private_steps == 0
    monkeypatch.setattr(tf.config.experimental, "tensor_float_32_execution_enabled", lambda: False)
    tf.function(model.train_step, autograph=False)(data)
    assert model.private_steps == 1


def test_blocks_in_several_threads_end_with_the_last(setting):
    entered, leave = threading.Event(), threading.Event()

    def other():
        with _precision.full_float32():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with _precision.full_float32():
        thread.start()
        entered.wait()
    assert not rounding()  # the other block is still open
    leave.set()
    thread.join()
    assert rounding() is setting
