"""Clipping that needs no tuning: what is summed, released and counted, and what a saved model goes on with."""

import functools
import json
import re

import numpy as np
import pytest
import tensorflow as tf

import tf_dpbn
from tests import helpers, neighbours, zoo
from tests.conformance import nets
from tf_dpbn import auditing, optimizers
from tf_dpbn._keras import keras
from tf_dpbn.clipping import ENGINES

layers = keras.layers
GAMMA = 0.01
X, _ = helpers.images(16, (3,))
Y = X[:, :2]
# One of them is padding, and one example's gradient is not finite.
WEIGHTS = np.array([1.0, 0.0, 1e-3, 1.0, 30.0, np.inf, 1.0], "float32")


@functools.cache
def normalized_case():
    """A model with local terms, a batch, and [rows, all weights]: each example's vector, not clipped."""
    model = zoo.build("batch_normalization")
    helpers.randomize(model)
    model.set_public_batch(zoo.data("batch_normalization", 6, seed=1)[0])
    x, y = zoo.data("batch_normalization", len(WEIGHTS))
    helpers.compiled(model, optimizer=helpers.dp_optimizer(l2_norm_clip=1e9), engine="loop")
    run = helpers.clipped_sum_function(model)
    vectors = [helpers.flat(run(x, y, np.where(np.arange(len(x)) == i, WEIGHTS, 0))[0]) for i in range(len(x))]
    return model, x, y, np.array(vectors)


def sums_of(l2_norm_clip, **options):
    """All sums of a step on that batch."""
    model, x, y, _ = normalized_case()
    helpers.compiled(model, optimizer=helpers.dp_optimizer(l2_norm_clip=l2_norm_clip), **options)
    return [helpers.flat(each) for each in helpers.clipped_sum_function(model, all_releases=True)(x, y, WEIGHTS)[0]]


def moves(l2_norm_clip, net="batch_normalization"):
    """How far one example moves each release of a net, over its sensitivity."""
    rng = np.random.default_rng(1)
    model, shape, targets = nets.compiled(net, rng)
    helpers.compiled(model, model.loss, helpers.dp_optimizer(l2_norm_clip=l2_norm_clip), microbatch_size=4)
    return neighbours.check(model, rng, shape, targets)


# ---------------------------------------------------------------------- automatic


@pytest.mark.parametrize("engine, microbatch_size", helpers.spread(ENGINES, [3, None, 1]))
def test_automatic_sums_are_a_loop_over_examples(engine, microbatch_size):
    expected = 0.0
    for vector in normalized_case()[-1]:
        expected += 0.5 * vector / (np.linalg.norm(vector) + GAMMA)
    (found,) = sums_of(tf_dpbn.AutomaticClip(0.5), engine=engine, microbatch_size=microbatch_size)
    assert helpers.relative_error(found, expected) < 1e-5


def test_automatic_contributions_stay_within_the_norm():
    found = moves(tf_dpbn.AutomaticClip(0.3))
    assert found.within_bounds and found.worst > 0.5


def test_automatic_noise_is_that_of_its_norm():
    model, x, y, _ = normalized_case()
    optimizer = helpers.dp_optimizer(l2_norm_clip=tf_dpbn.AutomaticClip(0.5), noise_multiplier=2.0)
    helpers.compiled(model, optimizer=optimizer)
    assert optimizer.gradient_stddev(0) == 2.0 * 0.5 / 8
    (clipped,) = auditing.clipped_sums(model)(x, y, np.zeros(len(x), "float32"))
    noise = helpers.flat(optimizer.release((clipped,))[0].tensors)
    assert np.std(noise) == pytest.approx(2.0 * 0.5 / 8, rel=0.2)
    assert optimizer.counted_steps() == {(2.0,): 1}


# ---------------------------------------------------------------------- arguments, and saving

OPTIMIZERS = {
    "generic": lambda clip: helpers.dp_optimizer(l2_norm_clip=clip),
    "adam": lambda clip: optimizers.VectorizedDPKerasAdamOptimizer(clip, 0.7, 8, 0.25),
}
RULES = {"automatic": tf_dpbn.AutomaticClip(0.5, gamma=0.02)}


@pytest.mark.both
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_configuration_round_trip(make, rule):
    original = make(rule)
    text = json.dumps(keras.saving.serialize_keras_object(original))
    copied = type(original).from_config(original.get_config())
    for clone in (copied, keras.saving.deserialize_keras_object(json.loads(text))):
        assert type(clone) is type(original) and clone.l2_norm_clip == original.l2_norm_clip == rule


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: tf_dpbn.AutomaticClip(0.0), "`l2_norm_clip` must be a finite number greater than 0.*=0.0"),
        (lambda: tf_dpbn.AutomaticClip(gamma=1e-20), "`gamma` must lie in .*Received: gamma=1e-20"),
        (lambda: helpers.dp_optimizer(l2_norm_clip="automatic"), "`l2_norm_clip` must be .*='automatic'"),
    ],
)
def test_refuses_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
