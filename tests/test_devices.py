"""Private steps run with products in full float32, whatever the process is set to."""

import numpy as np
import pytest
import tensorflow as tf

import tf_dpbn
from tests import helpers
from tf_dpbn import _devices
from tf_dpbn._keras import keras
from tf_dpbn.auditing import clipped_sums
from tf_dpbn.clipping.rules.convolution import from_operation

pytestmark = [pytest.mark.both, pytest.mark.filterwarnings("ignore::tf_dpbn.PrivacyWarning")]
X, Y = np.zeros((16, 3), "float32"), np.zeros(16, "int32")
WAYS = [
    lambda model: model.fit(X, Y, batch_size=8, verbose=0),
    lambda model: model.train_on_batch(X[:8], Y[:8]),
]


@pytest.fixture(autouse=True)
def _rounding():
    """The process lets devices round, as it does where nobody says otherwise."""
    tf.config.experimental.enable_tensor_float_32_execution(True)
    yield
    tf.config.experimental.enable_tensor_float_32_execution(False)


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


def make_model(seen, **options):
    model = tf_dpbn.DPSequential([keras.Input((3,)), keras.layers.Dense(2)])
    return helpers.compiled(model, metrics=[seen], stub=True, **options)


@pytest.mark.parametrize("eagerly", [False, True])
def test_steps_multiply_in_full_float32_whatever_callbacks_set(eagerly):
    seen = Seen()
    model = make_model(seen, run_eagerly=eagerly)
    switch = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: tf.config.experimental.enable_tensor_float_32_execution(True)
    )
    model.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=[switch])
    assert rounding()  # as the callback left it
    model.train_on_batch(X[:8], Y[:8])
    assert seen.rounding == [False] * 5
    assert not rounding()


def test_audits_see_what_steps_release():
    traced = []

    def loss(y_true, y_pred):
        traced.append(rounding())
        return keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)

    model = helpers.compiled(tf_dpbn.DPSequential([keras.Input((3,)), keras.layers.Dense(2)]), loss)
    clipped_sums(model)(X[:4], Y[:4], np.ones(4, "float32"))
    assert traced and not any(traced)


def test_what_rounds_whatever_tensorflow_is_told_is_refused(monkeypatch):
    model = make_model(Seen())
    options = {"auto_mixed_precision": True}
    monkeypatch.setattr(tf.config.optimizer, "get_experimental_options", lambda: options)
    for train in WAYS:
        with pytest.raises(RuntimeError, match=r"'auto_mixed_precision'.*keras\.mixed_precision"):
            train(model)
    options.clear()
    for name, value in [("ONEDNN_DEFAULT_FPMATH_MODE", "BF16"), ("TF_USE_CUBLASLT", "1")]:
        monkeypatch.setenv(name, value)
        for train in WAYS:
            with pytest.raises(RuntimeError, match=f"{name}='{value}'"):
                train(model)
        monkeypatch.setenv(name, "")
    assert model.private_steps == 0
    WAYS[0](model)


def test_what_xla_compiles_has_no_convolutions_in_a_group_for_each_example():
    with tf.Graph().as_default():
        operation = tf.nn.conv2d(tf.zeros([1, 6, 6, 4]), tf.zeros([3, 3, 4, 8]), 1, "SAME").op
        for compiled in (False, True):
            with _devices.traced_for_xla(compiled):
                rule, _ = from_operation(operation, 1, operation.inputs[1].shape)
            assert rule.is_whole is not compiled
