"""Neighbouring batches: adding or removing one example moves the clipped sum by at most l2_norm_clip."""

import functools
import warnings

import numpy as np
import pytest
import tensorflow as tf

import tf_dpbn
from tests import helpers, zoo
from tf_dpbn._keras import keras
from tf_dpbn.clipping import Batch

layers = keras.layers
PAIRS_PER_NET = 60
# float32 sums of a few dozen terms; docs/privacy.md states the bound
SLACK = 1 + 1e-5


def two_outputs(rng):
    inputs = keras.Input((5,))
    x = layers.Activation("tanh")(tf_dpbn.DPBatchNormalization()(layers.Dense(6)(inputs)))
    outputs = {"a": layers.Dense(3, name="a")(x), "b": layers.Dense(1, name="b")(x)}
    model = tf_dpbn.DPModel(inputs, outputs)
    loss = {"a": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "b": "mse"}
    return model, loss, (5,), lambda n: {"a": rng.integers(0, 3, n), "b": rng.normal(size=(n, 1))}


def zoo_net(name):
    def build(rng):
        model = zoo.build(name)
        shape = zoo.BODIES[name][0]
        return model, None, shape, lambda n: rng.integers(0, zoo.CLASSES, n)

    return build


def frozen(rng):
    """The other statistics path: moving statistics, because the layer is frozen."""
    model, loss, shape, targets = zoo_net("batch_normalization")(rng)
    for layer in model.layers:
        if isinstance(layer, tf_dpbn.DPBatchNormalization):
            layer.trainable = False
    return model, loss, shape, targets


NETS = {
    "two_outputs": two_outputs,
    "frozen": frozen,
    **{name: zoo_net(name) for name in zoo.BODIES if name.startswith("batch_normalization")},
    "conv2d": zoo_net("conv2d"),
    "attention": zoo_net("attention"),
}
CORRECTIONS = {"two_outputs": ["local", "none"], "batch_normalization": ["local", "none"]}
CASES = [(net, c, seed) for net in NETS for c in CORRECTIONS.get(net, ["local"]) for seed in range(2)]


def neighbours(rng, shape, targets, n=6):
    """A batch with mixed scales, weights and padding, and the same batch with one example more or less, or extreme."""
    scale = 10.0 ** rng.uniform(-3, 3, (n, *[1] * len(shape)))
    x = (rng.normal(size=(n, *shape)) * scale).astype("float32")
    y = targets(n)
    weight = np.where(rng.random(n) < 0.3, 0.0, rng.exponential(2.0, n)).astype("float32")
    row = rng.integers(n)
    weight[row] = rng.choice([0.1, 1.0, 30.0])
    if rng.random() < 0.2:
        x[row] = rng.choice([np.nan, np.inf, 1e30, 0.0])
    without = weight.copy()
    without[row] = 0.0
    return x, y, weight, without


def largest_move(run, rng, shape, targets, pairs):
    moves = []
    for _ in range(pairs):
        x, y, weight, without = neighbours(rng, shape, targets)
        with_row, _ = run(x, y, weight)
        without_row, _ = run(x, y, without)
        moves.append(np.linalg.norm(helpers.flat(with_row) - helpers.flat(without_row)))
    assert np.isfinite(moves).all()
    return max(moves), float(np.median(moves))


@pytest.mark.parametrize("net, correction, seed", CASES)
def test_one_example_moves_the_clipped_sum_by_at_most_the_clip_norm(net, correction, seed):
    rng = np.random.default_rng(seed)
    model, loss, shape, targets = NETS[net](rng)
    helpers.randomize(model, seed, scale=float(rng.choice([0.3, 1.0])))
    clip = float(rng.choice([0.1, 1.0, 5.0]))
    model.set_public_batch(rng.normal(size=(5, *shape)).astype("float32"))
    helpers.compiled(model, loss, helpers.dp_optimizer(l2_norm_clip=clip), correction=correction, microbatch_size=4)
    run = helpers.clipped_sum_function(model)
    worst, typical = largest_move(run, rng, shape, targets, PAIRS_PER_NET)
    assert worst <= clip * SLACK
    assert typical > 1e-3 * clip  # the batches do differ


def test_at_least_a_thousand_pairs_are_tried():
    assert len(CASES) * PAIRS_PER_NET >= 1000


def test_a_planted_use_of_private_statistics_is_caught():
    """The public pass fed with the private batch, as the paper's own code does: the bound must break."""
    rng = np.random.default_rng(0)
    model, loss, shape, targets = zoo_net("batch_normalization")(rng)
    helpers.randomize(model, 0, scale=1.0)
    model.set_public_batch(rng.normal(size=(5, *shape)).astype("float32"))
    helpers.compiled(model, loss, helpers.dp_optimizer(l2_norm_clip=1.0))

    @functools.wraps(model._public_forward)
    def leaky(batch):
        real = tf.reshape(tf.cast(batch.mask, tf.float32), [-1, *[1] * len(shape)])
        public = model._books.public_batch
        model._books.public_batch = tf.concat([public, batch.x * real], 0)
        try:
            return type(model)._public_forward(model, batch)
        finally:
            model._books.public_batch = public

    model._public_forward = leaky
    run = helpers.clipped_sum_function(model)
    x = rng.normal(size=(6, *shape)).astype("float32")
    x[0] *= 30.0
    weight = np.ones(6, "float32")
    without = np.array([0.0, 1, 1, 1, 1, 1], "float32")
    y = targets(6)
    moved = helpers.flat(run(x, y, weight)[0]) - helpers.flat(run(x, y, without)[0])
    assert np.linalg.norm(moved) > 1.2


def net_of_modes(*modes):
    """Normalizations of several modes: after convolutions, an addition, a nested model, and one called twice."""

    def build():
        norm = [functools.partial(tf_dpbn.DPBatchNormalization, statistics=mode) for mode in modes]
        inputs = keras.Input((6, 6, 2))
        x = layers.ReLU()(norm[0]()(layers.Conv2D(4, 3, padding="same")(inputs)))
        x = layers.Add()([x, layers.DepthwiseConv2D(3, padding="same")(x)])
        x = layers.Flatten()(norm[1 % len(norm)](axis=-1)(x))
        inside = keras.Input((144,))
        nested = keras.Model(inside, norm[2 % len(norm)]()(layers.Dense(5)(inside)))
        x = layers.Activation("tanh")(nested(x))
        twice, dense = norm[0](), layers.Dense(5)
        return tf_dpbn.DPModel(inputs, layers.Dense(3)(twice(dense(twice(dense(x))))))

    return build


MODES = [("noised",), ("anchored",), ("noised", "public", "anchored"), ("anchored", "noised", "public")]


@pytest.mark.filterwarnings("ignore:DPBatchNormalization .* gets no gradient:UserWarning")
@pytest.mark.parametrize("modes", MODES, ids="-".join)
@pytest.mark.parametrize("engine", ["book_keeping", "vectorized"])
def test_one_example_moves_every_release_by_at_most_its_bound(modes, engine):
    rng = np.random.default_rng(len(modes))
    shape, clip = (6, 6, 2), float(rng.choice([0.1, 1.0, 5.0]))
    model = net_of_modes(*modes)()
    helpers.randomize(model, 0, scale=0.7)
    model.set_public_batch(rng.normal(size=(5, *shape)).astype("float32"))
    helpers.compiled(model, None, helpers.dp_optimizer(l2_norm_clip=clip), engine=engine, microbatch_size=4)
    run = helpers.clipped_sum_function(model, all_releases=True)
    moves = []
    for _ in range(PAIRS_PER_NET):
        x, y, weight, without = neighbours(rng, shape, lambda n: rng.integers(0, 3, n))
        pair = run(x, y, weight)[0], run(x, y, without)[0]
        moves.append([np.linalg.norm(helpers.flat(a) - helpers.flat(b)) for a, b in zip(*pair, strict=True)])
    bounds = [clip] + [each.l2_norm_clip for each in released_by(model)]
    assert len(bounds) == np.shape(moves)[1] > 1
    assert (np.max(moves, 0) <= np.array(bounds) * SLACK).all()
    assert (np.median(moves, 0) > 1e-3 * np.array(bounds)).all()  # the batches do differ


def released_by(model):
    """What the model's step releases of statistics."""
    found = []

    @tf.function(autograph=False)
    def trace(x, y):
        found.extend(model._task(model._public_forward(Batch(x, y, None, None))).releases)

    trace.get_concrete_function(tf.TensorSpec((4, 6, 6, 2)), tf.TensorSpec((4,), tf.int64))
    return found


@pytest.mark.parametrize("mode", ["noised", "anchored"])
def test_an_examples_release_does_not_depend_on_the_others(mode):
    rng = np.random.default_rng(3)
    model = net_of_modes(mode)()
    helpers.randomize(model)
    model.set_public_batch(rng.normal(size=(5, 6, 6, 2)).astype("float32"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "DPBatchNormalization .* gets no gradient")
        run = helpers.clipped_sum_function(helpers.compiled(model), all_releases=True)
        x, y = rng.normal(size=(4, 6, 6, 2)).astype("float32"), rng.integers(0, 3, 4)
        alone = [run(x, y, np.eye(4, dtype="float32")[i])[0] for i in range(4)]
    together, _ = run(x, y, np.ones(4, "float32"))
    for k, release in enumerate(together):
        expected = sum(helpers.flat(each[k]) for each in alone)
        np.testing.assert_allclose(helpers.flat(release), expected, atol=2e-5)


@pytest.mark.parametrize("engine", ["vectorized", "loop"])
def test_an_examples_clipped_vector_does_not_depend_on_the_others(engine):
    rng = np.random.default_rng(3)
    model, loss, shape, targets = zoo_net("batch_normalization")(rng)
    helpers.randomize(model)
    model.set_public_batch(rng.normal(size=(5, *shape)).astype("float32"))
    helpers.compiled(model, loss, engine=engine)
    run = helpers.clipped_sum_function(model)
    x, y = rng.normal(size=(4, *shape)).astype("float32"), targets(4)
    alone = [run(x, y, np.eye(4, dtype="float32")[i])[0] for i in range(4)]
    together, _ = run(x, y, np.ones(4, "float32"))
    np.testing.assert_allclose(helpers.flat(together), sum(helpers.flat(each) for each in alone), atol=1e-5)
