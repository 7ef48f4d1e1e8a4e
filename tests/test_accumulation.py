"""Gradient accumulation: several batches of fit are one logical batch."""

import warnings

import numpy as np
import pytest
import tensorflow as tf

import tf_dpbn
from tests import helpers
from tf_dpbn._keras import keras

layers = keras.layers
N, BATCH = 64, 16


def network(normalized=True):
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(4, 3, padding="same")(inputs)
    x = tf_dpbn.DPBatchNormalization()(x) if normalized else x
    x = layers.GlobalAveragePooling2D()(layers.Activation("tanh")(x))
    return tf_dpbn.DPModel(inputs, layers.Dense(3)(x))


def trained(parts, noise_seed=3, epochs=1, noise_multiplier=1.0, correction="full", jit_compile=None, **kwargs):
    model = network()
    helpers.randomize(model)
    x, y = helpers.images(N)
    model.set_public_batch(helpers.images(8, seed=1)[0])
    optimizer = tf_dpbn.DPOptimizer(
        keras.optimizers.SGD(0.5, momentum=0.9),
        l2_norm_clip=0.3,
        noise_multiplier=noise_multiplier,
        expected_batch_size=BATCH,
        num_examples=N,
        noise_seed=noise_seed,
    )
    if jit_compile is not None:
        kwargs["jit_compile"] = jit_compile
    helpers.compiled(model, optimizer=optimizer, accumulation_steps=parts, correction=correction, **kwargs)
    dataset = tf_dpbn.sampling.poisson_dataset(
        x, y, expected_batch_size=BATCH, max_batch_size=32, accumulation_steps=parts, seed=5
    )
    history = model.fit(dataset, epochs=epochs, verbose=0)
    return model, history


@pytest.mark.parametrize("parts", helpers.first_on_both([2, 4]))
def test_parts_of_a_logical_batch_give_the_same_weights_as_the_whole(parts):
    whole, _ = trained(1)
    split, _ = trained(parts)
    np.testing.assert_allclose(helpers.flat(split.get_weights()), helpers.flat(whole.get_weights()), atol=1e-5)


def test_compiled_by_xla_and_in_several_steps_per_execution():
    whole, _ = trained(1, jit_compile=True)  # XLA turns the same bits into other normal numbers
    split, _ = trained(2, jit_compile=True)
    np.testing.assert_allclose(helpers.flat(split.get_weights()), helpers.flat(whole.get_weights()), atol=1e-5)
    whole, _ = trained(1)
    split, _ = trained(2, steps_per_execution=4)
    np.testing.assert_allclose(helpers.flat(split.get_weights()), helpers.flat(whole.get_weights()), atol=1e-5)


def test_ledger_and_optimizer_count_logical_batches():
    model, _ = trained(4, epochs=2)
    assert model.private_steps == model.ledger.steps == int(model.optimizer.iterations) == 2 * N // BATCH
    (record,) = model.ledger.entries
    assert record.sampling_probability == BATCH / N and record.max_batch_size == 32
    whole, _ = trained(1, epochs=2)
    assert model.epsilon(1e-3) == whole.epsilon(1e-3)


def test_noise_is_drawn_once_a_logical_batch():
    """With zero gradients an update is the noise alone: its variance is that of one draw."""
    inputs = keras.Input((1,))
    model = tf_dpbn.DPModel(inputs, layers.Dense(20_000, kernel_initializer="zeros")(inputs))
    optimizer = tf_dpbn.DPOptimizer(keras.optimizers.SGD(1.0), 1.0, 2.0, expected_batch_size=4)
    model.compile(optimizer, lambda y, p: 0.0 * tf.reduce_sum(p, -1), accumulation_steps=4)
    for _ in range(3):
        model.train_on_batch(np.zeros((1, 1)), np.zeros((1, 1)))
    assert np.all(model.get_weights()[0] == 0)
    model.train_on_batch(np.zeros((1, 1)), np.zeros((1, 1)))
    assert model.private_steps == 1
    stddev = np.std(helpers.flat(model.get_weights()))
    assert abs(stddev - 2.0 / 4.0) < 0.02 * 0.5


def test_an_unfinished_logical_batch_is_in_no_checkpoint_and_ends_with_the_epoch(tmp_path):
    model = network(normalized=False)
    helpers.compiled(model, optimizer=helpers.dp_optimizer(expected_batch_size=8), accumulation_steps=4)
    x, y = helpers.images(2)
    model.train_on_batch(x, y)
    sums = [v.numpy() for v in model._accumulator._sums]
    assert np.linalg.norm(helpers.flat(sums)) > 0
    reader = tf.train.load_checkpoint(tf.train.Checkpoint(model=model).save(str(tmp_path / "checkpoint")))
    saved = [reader.get_tensor(name) for name in reader.get_variable_to_shape_map()]
    kernels = [value for value in saved if np.shape(value) == (3, 3, 2, 4)]
    assert kernels and not any(np.allclose(value, sums[0], rtol=1e-3) for value in kernels)
    saved = helpers.flat(model.get_weights())
    assert len(saved) == model.count_params()
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded._accumulator.pending == 0 and loaded._accumulator.parts == 4
    assert model._accumulator.pending == 1
    three_batches = tf.data.Dataset.from_tensor_slices((x, y)).repeat(3).batch(2)
    with pytest.warns(tf_dpbn.accounting.PrivacyWarning) as caught:
        model.fit(three_batches, verbose=0)  # never a whole logical one
    assert model.private_steps == 0
    assert [("not used" in str(w.message)) for w in caught] == [False, True]  # the other tells of the sampling


def test_data_set_and_compile_must_agree():
    model = network(normalized=False)
    optimizer = helpers.dp_optimizer(expected_batch_size=BATCH, num_examples=N)
    helpers.compiled(model, optimizer=optimizer, accumulation_steps=2)
    x, y = helpers.images(N)
    dataset = tf_dpbn.sampling.poisson_dataset(x, y, expected_batch_size=BATCH, max_batch_size=32)
    with pytest.raises(ValueError, match="accumulation_steps=2"):
        model.fit(dataset, verbose=0)
    with pytest.raises(ValueError, match="8 times accumulation_steps=2|16 times accumulation_steps=2"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(x, y, batch_size=16, verbose=0)


def test_a_draw_is_split_into_batches_of_equal_size_without_loss():
    numbers = np.arange(100) + 1
    kwargs = {"expected_batch_size": 50, "max_batch_size": 70, "steps_per_epoch": 3, "seed": 1}
    whole = tf_dpbn.sampling.poisson_dataset(numbers, numbers, **kwargs)
    parts = tf_dpbn.sampling.poisson_dataset(numbers, numbers, accumulation_steps=4, **kwargs)
    assert len(parts) == 12
    assert {tuple(x.shape) for x, _, _ in parts} == {(18,)}
    rows = np.concatenate([x for x, _, _ in parts.as_numpy_iterator()]).reshape(3, 72)
    assert [len(set(row) - {0}) for row in rows] == [np.count_nonzero(row) for row in rows]
    assert max(np.count_nonzero(row) for row in rows) <= 70
    assert len(list(whole)) == 3


@pytest.mark.parametrize("value", [0, -1, 1.5, "2"])
def test_refuses_bad_numbers_of_parts(value):
    with pytest.raises(ValueError, match="accumulation_steps"):
        helpers.compiled(network(normalized=False), accumulation_steps=value)


@pytest.mark.parametrize("steps, together", [(4, 1), (3, 2), (5, 3)])
def test_refuses_epochs_that_end_within_a_logical_batch(steps, together):
    """The next epoch would go on in the middle of a draw, so that an example could enter a logical batch twice."""
    inputs = keras.Input((1,))
    model = tf_dpbn.DPModel(inputs, keras.layers.Dense(1)(inputs))
    optimizer = helpers.dp_optimizer(expected_batch_size=1)
    helpers.compiled(model, "mse", optimizer, accumulation_steps=3, steps_per_execution=together)
    x = np.ones((1, 1), "float32")
    dataset = tf_dpbn.sampling.poisson_dataset(
        x, x, expected_batch_size=1, max_batch_size=3, steps_per_epoch=4, accumulation_steps=3
    )
    with pytest.raises(ValueError, match=f"steps_per_epoch={steps}"):
        model.fit(dataset, steps_per_epoch=steps, epochs=3, verbose=0)
    model.fit(dataset, steps_per_epoch=6, epochs=2, verbose=0)
    assert model.ledger.steps == 4
