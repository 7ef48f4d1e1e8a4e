"""Callbacks that swap averaged weights in (SwapEMAWeights): evaluation and files get statistics of those weights."""

from __future__ import annotations

import numpy as np
import pytest

import tf_dpbn
from tests import helpers
from tf_dpbn._keras import IS_KERAS_3, keras

pytestmark = pytest.mark.both

X, Y = helpers.images(16)


def trained(*callbacks, **kwargs):
    model = helpers.bn_stack(1, tf_dpbn.DPBatchNormalization, model=tf_dpbn.DPModel)
    model.set_public_batch(helpers.images(6, seed=1)[0])
    inner = keras.optimizers.SGD(1.0, use_ema=True, ema_momentum=0.8)
    helpers.randomize(model)
    optimizer = helpers.dp_optimizer(inner=inner, noise_multiplier=1.0)  # noise moves the weights
    helpers.compiled(model, optimizer=optimizer, stub=True)
    batches = tf_dpbn.sampling.poisson_dataset(X, Y, expected_batch_size=8, max_batch_size=12, seed=0)
    history = model.fit(batches, epochs=2, verbose=0, callbacks=list(callbacks), **kwargs)
    return model, history.history


@pytest.mark.skipif(not IS_KERAS_3, reason="tf_keras has no SwapEMAWeights")
def test_swap_ema_weights_validates_averaged_weights_with_their_statistics(tmp_path):
    swap = keras.callbacks.SwapEMAWeights()
    model, history = trained(swap, validation_data=(X, Y))
    # At its end `fit` overwrites weights by their averages, which were evaluated last.
    np.testing.assert_allclose(history["val_loss"][-1], model.evaluate(X, Y, verbose=0), rtol=1e-5)


@pytest.mark.skipif(not IS_KERAS_3, reason="tf_keras has no SwapEMAWeights")
def test_checkpoints_of_swapped_weights_hold_their_statistics(tmp_path):
    path = tmp_path / "model.keras"
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    trained(swap, keras.callbacks.ModelCheckpoint(path))
    model = keras.saving.load_model(path)
    before = np.asarray(model.predict(X, verbose=0))
    model.refresh_statistics()
    np.testing.assert_allclose(model.predict(X, verbose=0), before, rtol=1e-5, atol=1e-6)


def test_averaged_weights_that_keras_writes_at_the_end_have_their_statistics_in_callbacks():
    seen = []
    reader = keras.callbacks.LambdaCallback(on_train_end=lambda logs: seen.append(float(np.sum(model(X)))))
    model, _ = trained()
    with pytest.warns(tf_dpbn.PrivacyWarning):
        model.fit(X, Y, batch_size=8, verbose=0, callbacks=[reader])
    np.testing.assert_allclose(seen, [float(np.sum(model(X)))], rtol=1e-5)
