"""Private steps run with products in full float32, whatever the process is set to."""

import threading
import time

import numpy as np
import pytest
import tensorflow as tf

import tf_dpbn
from tests import helpers
from tf_dpbn import _precision
from tf_dpbn._keras import keras
from tf_dpbn.auditing import clipped_sums

pytestmark = pytest.mark.filterwarnings("ignore::tf_dpbn.PrivacyWarning")


@pytest.fixture(params=[True, False], ids=["rounding", "full"])
def setting(request):
    """Whether the process lets devices round, as before and after each test."""
    before = rounding()
    tf.config.experimental.enable_tensor_float_32_execution(request.param)
    yield request.param
    tf.config.experimental.enable_tensor_float_32_execution(before)


@pytest.fixture
def gpu(monkeypatch):
    """As if there were a GPU, where a trace with rounding on is refused."""
    monkeypatch.setattr(_precision, "has_accelerator", lambda: True)


def rounding():
    return tf.config.experimental.tensor_float_32_execution_enabled()


class Seen(keras.metrics.Metric):
    """Reads the setting while a step runs."""

    def __init__(self):
        super().__init__(name="seen")
        self.rounding = []

    def update_state(self, y_true, y_pred, sample_weight=None):
        tf.py_function(lambda: self.rounding.append(rounding()), [], [])

    def result(self):
        return tf.constant(0.0)

    def reset_state(self):
        pass


class Callback(keras.callbacks.Callback):
    """Calls a function after each step."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def on_train_batch_end(self, batch, logs=None):
        self.function()


def model_and_data(**options):
    x, y = np.zeros((16, 3), "float32"), np.zeros(16, "int32")
    seen = Seen()
    model = tf_dpbn.DPSequential([keras.Input((3,)), keras.layers.Dense(2)])
    return helpers.compiled(model, metrics=[seen], **options), x, y, seen.rounding


@pytest.mark.parametrize("eagerly", [False, True])
def test_steps_of_fit_multiply_in_full_float32(setting, gpu, eagerly):
    model, x, y, seen = model_and_data(run_eagerly=eagerly)
    model.fit(x, y, batch_size=8, epochs=2, verbose=0)
    assert seen == [False] * 4
    assert rounding() is setting


def test_what_a_callback_sets_does_not_reach_the_steps(setting, gpu):
    model, x, y, seen = model_and_data()
    switch = Callback(lambda: tf.config.experimental.enable_tensor_float_32_execution(True))
    model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[switch])
    assert seen == [False] * 4
    assert rounding()  # it is the callback's now


def test_the_train_function_multiplies_in_full_float32_outside_of_fit(setting, gpu):
    model, x, y, seen = model_and_data()
    model.fit(x, y, batch_size=8, epochs=1, verbose=0)
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(8).repeat()
    model.train_function(iter(batches))
    assert seen == [False] * 3


def test_a_fit_that_fails_restores_the_setting(setting):
    model, x, y, _ = model_and_data()

    def fail():
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        model.fit(x, y, batch_size=8, verbose=0, callbacks=[Callback(fail)])
    assert rounding() is setting


def test_single_steps_multiply_in_full_float32(setting, gpu):
    model, x, y, seen = model_and_data()
    model.train_on_batch(x, y)
    model.train_step((tf.constant(x), tf.constant(y)))
    assert seen == [False] * 2
    assert rounding() is setting
    assert model.private_steps == 2


def test_a_step_that_still_runs_keeps_the_setting(setting):
    tf.config.experimental.set_synchronous_execution(False)
    try:
        seen = []

        @tf.function
        def slow():
            tf.py_function(lambda: (time.sleep(0.3), seen.append(rounding())), [], [])

        with _precision.full_float32():
            slow()
        assert seen == [False]
    finally:
        tf.config.experimental.set_synchronous_execution(True)


def test_audits_see_what_steps_release(setting):
    traced = []

    def loss(y_true, y_pred):
        traced.append(rounding())
        return keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)

    model = helpers.compiled(tf_dpbn.DPSequential([keras.Input((3,)), keras.layers.Dense(2)]), loss)
    clipped_sums(model)(np.zeros((4, 3), "float32"), np.zeros(4, "int32"), np.ones(4, "float32"))
    assert traced and not any(traced)


def test_a_step_of_ones_own_is_refused_where_a_device_would_round(gpu, monkeypatch):
    model, x, y, _ = model_and_data()
    data = tf.constant(x), tf.constant(y)
    monkeypatch.setattr(tf.config.experimental, "tensor_float_32_execution_enabled", lambda: True)
    with pytest.raises(RuntimeError, match=r"enable_tensor_float_32_execution\(False\)"):
        tf.function(model.train_step, autograph=False)(data)
    assert model.private_steps == 0
    monkeypatch.setattr(tf.config.experimental, "tensor_float_32_execution_enabled", lambda: False)
    tf.function(model.train_step, autograph=False)(data)
    assert model.private_steps == 1


def steps_of(model, x, y):
    """Every way to run one."""
    data = tf.constant(x), tf.constant(y)
    return [
        lambda: model.fit(x, y, verbose=0),
        lambda: model.train_on_batch(x, y),
        lambda: model.train_step(data),
        lambda: tf.function(model.train_step, autograph=False)(data),
    ]


def test_tensorflows_mixed_precision_is_refused():
    model, x, y, _ = model_and_data()
    tf.config.optimizer.set_experimental_options({"auto_mixed_precision": True})
    try:
        for step in steps_of(model, x, y):
            with pytest.raises(RuntimeError, match=r"'auto_mixed_precision'.*keras\.mixed_precision"):
                step()
    finally:
        tf.config.optimizer.set_experimental_options({"auto_mixed_precision": False})
    assert model.private_steps == 0
    model.train_on_batch(x, y)


def test_an_option_that_a_callback_sets_stops_training():
    model, x, y, _ = model_and_data()
    switch = Callback(lambda: tf.config.optimizer.set_experimental_options({"auto_mixed_precision": True}))
    try:
        with pytest.raises(RuntimeError, match="'auto_mixed_precision' would narrow"):
            model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[switch])
    finally:
        tf.config.optimizer.set_experimental_options({"auto_mixed_precision": False})
    assert model.private_steps == model.ledger.steps == 1


@pytest.mark.parametrize("name, value", [("ONEDNN_DEFAULT_FPMATH_MODE", "BF16"), ("TF_USE_CUBLASLT", "1")])
def test_environments_that_round_are_refused(name, value, monkeypatch):
    model, x, y, _ = model_and_data()
    monkeypatch.setenv(name, value)
    for step in steps_of(model, x, y):
        with pytest.raises(RuntimeError, match=f"{name}='{value}'"):
            step()
    assert model.private_steps == 0
    monkeypatch.setenv(name, "")
    model.train_on_batch(x, y)


def test_blocks_in_several_threads_end_with_the_last(setting):
    entered, leave = threading.Event(), threading.Event()

    def other():
        with _precision.full_float32():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other, daemon=True)
    with _precision.full_float32():
        thread.start()
        entered.wait()
    assert not rounding()  # the other block is still open
    leave.set()
    thread.join()
    assert rounding() is setting
