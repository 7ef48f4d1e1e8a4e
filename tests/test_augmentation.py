"""Augmentation multiplicity: the mean gradient of an example's copies is what is clipped."""

import numpy as np
import pytest
import tensorflow as tf

import tf_dpbn
from tests import helpers
from tf_dpbn import augmentation
from tf_dpbn._keras import keras

layers = keras.layers


def network(seed=0):
    model = helpers.bn_stack(2, tf_dpbn.DPBatchNormalization, model=tf_dpbn.DPModel)
    helpers.randomize(model, seed)
    model.set_public_batch(helpers.images(9, seed=1)[0])
    return model


def others_thorough(first, *others):
    return [first, *(pytest.param(each, marks=pytest.mark.thorough) for each in others)]


@pytest.mark.parametrize("engine", others_thorough("book_keeping", "vectorized", "loop"))
def test_gradient_is_the_clipped_mean_over_copies(engine):
    copies, clip = 3, 0.05
    x, y = helpers.images(12, seed=4)
    x, y = x.reshape(4, copies, 6, 6, 2), y[:4]
    one = helpers.clipped_sum_function(helpers.compiled(network(), optimizer=helpers.dp_optimizer(l2_norm_clip=1e6)))
    means = [helpers.flat(one(x[i], np.full(copies, y[i]))[0]) / copies for i in range(4)]
    expected = sum(mean * min(1.0, clip / np.linalg.norm(mean)) for mean in means)
    optimizer = helpers.dp_optimizer(l2_norm_clip=clip)
    model = helpers.compiled(network(), optimizer=optimizer, engine=engine, augmentation_multiplicity=copies)
    found, result = helpers.clipped_sum_function(model)(x, y)
    assert helpers.relative_error(found, [expected]) < 1e-4
    assert result.y_pred.shape == (4, 3)


@pytest.mark.parametrize("statistics", others_thorough("noised", "public", "anchored"))
def test_one_example_moves_every_release_by_at_most_its_bound(statistics):
    rng = np.random.default_rng(0)
    model = helpers.bn_stack(2, lambda: tf_dpbn.DPBatchNormalization(statistics=statistics), model=tf_dpbn.DPModel)
    helpers.randomize(model, 0, scale=1.0)
    model.set_public_batch(helpers.images(9, seed=1)[0])
    helpers.compiled(model, augmentation_multiplicity=2)
    run = helpers.clipped_sum_function(model, all_releases=True)
    channels = {"public": 0, "noised": 2 * 5 + 5, "anchored": 2 * 5}[statistics]
    for _ in range(20):
        x = (rng.normal(size=(5, 2, 6, 6, 2)) * 10.0 ** rng.uniform(-2, 3)).astype("float32")
        y, without = rng.integers(0, 3, 5), np.array([0, 1, 1, 1, 1], "float32")
        pair = run(x, y, np.ones(5, "float32"))[0], run(x, y, without)[0]
        moves = [np.linalg.norm(helpers.flat(a) - helpers.flat(b)) for a, b in zip(*pair, strict=True)]
        assert moves[0] <= 1 + 1e-5
        assert all(move <= np.sqrt(channels) * (1 + 1e-5) for move in moves[1:])


def test_data_set_makes_copies_of_each_example_alone():
    x = np.arange(1.0, 9.0, dtype="float32")[:, None, None, None] * np.ones((8, 5, 5, 1), "float32")
    dataset = tf_dpbn.sampling.poisson_dataset(
        x,
        np.arange(1, 9),
        expected_batch_size=8,
        max_batch_size=10,
        augment=augmentation.random_shift(1, flip=True),
        augmentation_multiplicity=4,
    )
    ((made, labels, weight),) = dataset.as_numpy_iterator()
    assert made.shape == (10, 4, 5, 5, 1)
    for row, label, real in zip(made, labels, weight, strict=True):
        assert set(np.unique(row)) <= {0.0, float(label)}
        assert (row[:, 2, 2] == label).all()  # a shift by one never reaches the middle
        assert real == (label > 0)
    differing = [not (row[0] == row[1]).all() for row, real in zip(made, weight, strict=True) if real]
    assert any(differing)


def test_all_shifts_are_equally_likely():
    image = tf.reshape(tf.range(9.0), [3, 3, 1])
    made = augmentation.copies(augmentation.random_shift(1), 900, image[None])[0]
    middle, counts = np.unique(made[:, 1, 1, 0], return_counts=True)
    assert list(middle) == list(range(9))
    assert counts.min() > 50 and counts.max() < 160  # 100 expected, standard deviation 9.4


def test_trains_through_fit_and_refuses_other_numbers():
    plan = tf_dpbn.PrivacyPlan(noise_multiplier=1.0, delta=1e-3, num_examples=32, expected_batch_size=8, epochs=1)
    x, y = helpers.images(32)
    augment = augmentation.random_shift(1)
    data = plan.poisson_dataset(x, y, augment=augment, augmentation_multiplicity=2)
    optimizer = tf_dpbn.DPOptimizer.from_plan(plan, keras.optimizers.SGD(0.1), l2_norm_clip=1.0)
    model = helpers.compiled(network(), optimizer=optimizer)
    message = "equal that of the Poisson data set, 2.*Received: augmentation_multiplicity=1"
    with pytest.raises(ValueError, match=message):
        model.fit(data, verbose=0)
    helpers.compiled(model, optimizer=optimizer, metrics=["accuracy"], augmentation_multiplicity=2, stub=True)
    model.fit(data, verbose=0)
    assert model.ledger.steps == plan.steps
    assert model.get_compile_config()["augmentation_multiplicity"] == 2


def test_refuses_misuse():
    x, y = helpers.images(8)
    sizes = {"expected_batch_size": 4, "max_batch_size": 8}
    one_copy = tf_dpbn.sampling.poisson_dataset(x, y, **sizes, augment=augmentation.random_shift(1))
    assert one_copy.element_spec[0].shape == (8, 6, 6, 2)  # without an axis of copies
    with pytest.raises(ValueError, match="Received: augment=None"):
        tf_dpbn.sampling.poisson_dataset(x, y, **sizes, augmentation_multiplicity=2)
    with pytest.raises(ValueError, match="Received: augment='float32 "):
        tf_dpbn.sampling.poisson_dataset(x, y, **sizes, augment=lambda image: image[:3])
    with pytest.raises(ValueError, match="Received: pixels=0"):
        augmentation.random_shift(0)
    added = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
    with pytest.raises(ValueError, match="not add up the batch"):
        helpers.compiled(network(), added, augmentation_multiplicity=2)


def test_segment_sums_do_not_reach_another_example():
    """Vectorized, an id past the last segment would land in the next example."""

    def augment(row):
        with tf.device("CPU:0"):
            ids = tf.cast(row[0], tf.int32)[None]
            return tf.reshape(tf.math.unsorted_segment_sum(row[1:], ids, 1), [1]) * tf.ones([2])

    rows = tf.constant([[0.0, 5.0], [0.0, 7.0]])
    made = augmentation.copies(augment, 2, rows)
    np.testing.assert_array_equal(made[:, :, 0], [[5.0, 5.0], [7.0, 7.0]])


@pytest.mark.parametrize("kind", ["python", "variable"])
def test_refuses_augmentation_with_state(kind):
    total = tf.Variable(tf.zeros([2]))

    def augment(row):
        if kind == "python":
            return tf.reshape(tf.numpy_function(lambda value: value, [row], tf.float32), [2])
        return row + total.assign_add(row)

    x = np.ones((4, 2), "float32")
    with pytest.raises(ValueError, match="`augment` must keep no state"):
        tf_dpbn.sampling.poisson_dataset(
            x, x, expected_batch_size=2, max_batch_size=4, augment=augment, augmentation_multiplicity=2
        )


def test_refuses_inputs_without_the_copies():
    model = helpers.compiled(network(), augmentation_multiplicity=3)
    for shape in ((8, 4, 6, 6, 2), (8, 1, 6, 6, 2), (8, 6, 6, 2)):
        with pytest.raises(ValueError, match=r"have shape \[batch, 3, ...\]"):
            model.train_on_batch(np.zeros(shape, "float32"), np.zeros(8, "int64"))
