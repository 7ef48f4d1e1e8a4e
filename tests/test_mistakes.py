"""Mistakes that a new user makes, and that each message names the remedy."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import tensorflow as tf

import tf_dpbn
from tf_dpbn._keras import keras

layers = keras.layers
X, Y = np.ones((40, 4, 4, 1), "float32"), np.arange(40) % 3
PLAN = {"target_epsilon": 8.0, "delta": 1e-3, "num_examples": 40, "expected_batch_size": 10, "epochs": 1}
LOSS = "sparse_categorical_crossentropy"


def network(kind=tf_dpbn.DPModel, normalization=tf_dpbn.DPBatchNormalization):
    inputs = keras.Input((4, 4, 1))
    x = normalization()(layers.Conv2D(2, 3)(inputs))
    return kind(inputs, layers.Dense(3, activation="softmax")(layers.Flatten()(x)))


def plan(**options):
    return tf_dpbn.PrivacyPlan(**{**PLAN, **options})


def optimizer(**options):
    return tf_dpbn.optimizers.VectorizedDPKerasSGDOptimizer.from_plan(
        plan(), **{"l2_norm_clip": 1.0, "learning_rate": 0.1, **options}
    )


def ready(public=True):
    model = network()
    if public:
        model.set_public_batch(tf_dpbn.public_data.uniform_noise((4, 4, 1), 4))
    model.compile(optimizer(), LOSS)
    return model


def private_optimizer_in_an_ordinary_model():
    model = network(keras.Model, layers.BatchNormalization)
    model.compile(optimizer(), LOSS)
    model.fit(X, Y, verbose=0)


def ordinary_optimizer():
    network().compile("sgd", LOSS)


def gradients_of_a_tape():
    variable = tf.Variable([1.0])
    optimizer().apply_gradients([(tf.constant([1.0]), variable)])


def training_loop_of_ones_own():
    with tf.GradientTape():
        network()(X, training=True)


def stock_batch_normalization():
    network(normalization=layers.BatchNormalization).compile(optimizer(), LOSS)


def no_public_batch():
    ready(public=False).fit(plan().poisson_dataset(X, Y), verbose=0)


def public_batch_of_another_shape():
    network().set_public_batch(np.zeros((8, 5, 5, 1), "float32"))


def public_batch_in_bytes():
    network().set_public_batch(np.full((8, 4, 4, 1), 255.0, "float32"), value_range=(0.0, 1.0))


def one_public_example():
    network().set_public_batch(np.zeros((1, 4, 4, 1), "float32"))


def fit_before_compile():
    network().fit(X, Y)


def batches_of_another_size():
    ready().fit(X, Y, batch_size=32, verbose=0)


def validation_split():
    ready().fit(X, Y, batch_size=10, validation_split=0.5, verbose=0)


def data_of_another_plan():
    plan(num_examples=50).poisson_dataset(X, Y)


def draws_of_another_plan():
    ready().fit(plan(expected_batch_size=20).poisson_dataset(X, Y), verbose=0)


def label_out_of_range():
    ready().fit(plan().poisson_dataset(X, Y + 1), verbose=0)


def epsilon_and_noise():
    plan(noise_multiplier=1.0)


def neither_epsilon_nor_noise():
    plan(target_epsilon=None)


def batch_larger_than_the_data():
    plan(expected_batch_size=50)


def delta_of_a_whole_example():
    plan(delta=1.5)


def noise_beside_a_plan():
    optimizer(noise_multiplier=1.0)


def microbatches_as_in_tensorflow_privacy():
    tf_dpbn.optimizers.VectorizedDPKerasSGDOptimizer(1.0, 1.0, num_microbatches=5, expected_batch_size=10)


def no_expected_batch_size():
    tf_dpbn.DPOptimizer(keras.optimizers.SGD(), 1.0, 1.0)


def negative_clip():
    optimizer(l2_norm_clip=-1.0)


def unknown_statistics():
    tf_dpbn.DPBatchNormalization(statistics="private")


def file_that_loses_the_ledger():
    ready().save("model.h5")


def weights_file_that_loses_the_ledger():
    ready().save_weights("weights.h5" if hasattr(keras, "version") else "model.hdf5")


ERRORS = {
    private_optimizer_in_an_ordinary_model: (TypeError, "DPModel"),
    ordinary_optimizer: (TypeError, "Wrap yours: tf_dpbn.optimizers.DPOptimizer"),
    gradients_of_a_tape: (TypeError, "DPModel"),
    training_loop_of_ones_own: (RuntimeError, "To train, call `fit` of a tf_dpbn.DPModel"),
    stock_batch_normalization: (ValueError, "Replace it by tf_dpbn.DPBatchNormalization"),
    no_public_batch: (ValueError, "model.set_public_batch"),
    public_batch_of_another_shape: (ValueError, r"\(4, 4, 1\)|4, 4, 1"),
    public_batch_in_bytes: (ValueError, "Scale it as the private inputs are scaled"),
    one_public_example: (ValueError, "at least 2|2 examples"),
    fit_before_compile: (RuntimeError, "Call compile"),
    batches_of_another_size: (ValueError, "Pass batch_size to fit"),
    validation_split: (ValueError, "num_examples"),
    data_of_another_plan: (ValueError, "Plan anew"),
    draws_of_another_plan: (ValueError, "from the same PrivacyPlan"),
    label_out_of_range: (ValueError, "give the last layer more units"),
    epsilon_and_noise: (ValueError, "not both|only one|one of"),
    neither_epsilon_nor_noise: (ValueError, "target_epsilon"),
    batch_larger_than_the_data: (ValueError, "num_examples"),
    delta_of_a_whole_example: (ValueError, "`delta`"),
    noise_beside_a_plan: (ValueError, "The plan decides it"),
    microbatches_as_in_tensorflow_privacy: (ValueError, "pass microbatch_size to DPModel.compile"),
    no_expected_batch_size: (ValueError, "from_plan"),
    negative_clip: (ValueError, "l2_norm_clip"),
    unknown_statistics: (ValueError, "anchored"),
    file_that_loses_the_ledger: (ValueError, "ends in .keras"),
    weights_file_that_loses_the_ledger: (ValueError, r"weights\.h5"),
}


@pytest.mark.parametrize("mistake", ERRORS, ids=lambda mistake: mistake.__name__)
def test_the_message_names_the_remedy(mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error, remedy = ERRORS[mistake]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tf_dpbn.PrivacyWarning)
        with pytest.raises(error, match=remedy):
            mistake()


def generator():
    while True:
        yield X[:10], Y[:10]


@pytest.mark.parametrize(
    "data",
    [
        lambda: (tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(40).batch(10, drop_remainder=True),),
        lambda: (plan().poisson_dataset(X, Y).cache(),),
        lambda: (X, Y),
        lambda: (generator(),),
    ],
    ids=["shuffled", "cached", "arrays", "generator"],
)
def test_batches_without_a_known_law_train_with_a_warning_that_names_the_remedy(data):
    model = ready()
    data = data()
    with pytest.warns(tf_dpbn.PrivacyWarning, match="PrivacyPlan.poisson_dataset"):
        model.fit(*data, batch_size=10 if len(data) == 2 else None, steps_per_epoch=2, verbose=0)
    assert "assumed" in model.privacy_statement(1e-3)


def test_stopping_by_what_carries_no_noise_warns():
    model = ready()
    with pytest.warns(tf_dpbn.PrivacyWarning, match="outside the privacy guarantee"):
        model.fit(plan().poisson_dataset(X, Y), callbacks=[keras.callbacks.EarlyStopping("loss")], verbose=0)


def test_evaluation_and_prediction_before_training_work():
    model = ready()
    assert np.isfinite(model.evaluate(X, Y, verbose=0))
    assert model.predict(X, verbose=0).shape == (40, 3)
    assert model.epsilon(1e-3) == 0.0


def test_training_beyond_the_plan_shows_in_epsilon_and_is_refused_with_a_budget():
    model = ready()
    data = plan().poisson_dataset(X, Y)
    model.fit(data, verbose=0)
    assert model.epsilon(1e-3) <= 8.0
    with pytest.warns(tf_dpbn.PrivacyWarning, match="4 steps after 4 so far .* is for 4 steps and epsilon 8"):
        model.fit(data, verbose=0)
    assert model.epsilon(1e-3) > 8.0
    with pytest.raises(ValueError, match="Train with more noise, or stop here"):
        model.fit(data, callbacks=[tf_dpbn.callbacks.PrivacyBudget(epsilon=8.0)], verbose=0)
