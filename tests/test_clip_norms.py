"""Clipping that needs no tuning: what is summed, released and counted, and what a saved model goes on with."""

import functools
import json
import warnings

import numpy as np
import pytest
import tensorflow as tf

import tf_dpbn
from tests import audited, gallery, helpers, neighbours, zoo
from tf_dpbn import accounting, auditing, optimizers
from tf_dpbn._keras import keras
from tf_dpbn.clipping import ENGINES
from tf_dpbn.clipping.microbatches import clip_counts
from tf_dpbn.mechanisms import ClippedSum

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


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "DPBatchNormalization .* gets no gradient")
        warnings.filterwarnings("ignore", "The batches do not come from", tf_dpbn.PrivacyWarning)
        yield


def moves(l2_norm_clip, mode):
    """How far one example moves each release of a model with a normalization, over its sensitivity."""
    model, rng = gallery.build(mode), np.random.default_rng(1)
    helpers.compiled(model, optimizer=helpers.dp_optimizer(l2_norm_clip=l2_norm_clip), microbatch_size=4)
    return neighbours.check(model, rng, gallery.SHAPE, lambda n: rng.integers(0, 3, n), 2)


# ---------------------------------------------------------------------- automatic


@pytest.mark.parametrize("engine, microbatch_size", helpers.spread(ENGINES, [3, None, 1]))
def test_automatic_sums_are_a_loop_over_examples(engine, microbatch_size):
    expected = 0.0
    for vector in normalized_case()[-1]:
        expected += 0.5 * vector / (np.linalg.norm(vector) + GAMMA)
    (found,) = sums_of(tf_dpbn.AutomaticClip(0.5), engine=engine, microbatch_size=microbatch_size)
    assert helpers.relative_error(found, expected) < 1e-5


def test_automatic_contributions_stay_within_the_norm():
    found = moves(tf_dpbn.AutomaticClip(0.3), "public")
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


# ---------------------------------------------------------------------- adaptive


@pytest.mark.parametrize("engine, microbatch_size", helpers.spread(ENGINES, [None, 1, 3]))
def test_adaptive_sums_are_a_loop_over_examples(engine, microbatch_size):
    vectors = normalized_case()[-1]
    norms = np.linalg.norm(vectors, axis=1)
    initial = float(np.median(norms[norms > 0]))  # itself not clipped
    expected, count = 0.0, 0.0
    for vector, norm, weight in zip(vectors, norms, WEIGHTS, strict=True):
        expected += vector / max(norm, initial)
        if 0 < weight < np.inf:
            count += 0.5 if norm <= 1.0001 * initial else -0.5
    clip = tf_dpbn.AdaptiveClip(1.0001 * initial)
    gradient, counted = sums_of(clip, engine=engine, microbatch_size=microbatch_size)
    assert helpers.relative_error(gradient, expected) < 1e-3
    assert counted == [count] == [0.5]  # three of five


def test_adaptive_releases_move_by_at_most_their_sensitivity():
    found = moves(tf_dpbn.AdaptiveClip(0.3), "noised")
    assert found.within_bounds and found.worst[0] > 0.99
    assert found.worst[-1] == 1.0 and len(found.worst) == 3


def released(optimizer, gradient, count):
    """One release of a sum of clipped gradients, in units of the norm, and a count."""
    sums = [tf.convert_to_tensor(each, tf.float64) for each in (gradient, count)]
    (noised,) = optimizer.release((ClippedSum((sums[0],), 1.0), ClippedSum((sums[1],), 0.5)))
    return noised.tensors[0]


def test_a_release_is_in_units_of_the_norm_of_its_step_and_moves_the_next_one():
    optimizer = helpers.dp_optimizer(l2_norm_clip=tf_dpbn.AdaptiveClip(2.0, target_quantile=0.75, learning_rate=0.4))
    np.testing.assert_allclose(released(optimizer, [4.0, -1.0], [-2.0]), [1.0, -0.25])
    assert optimizer.clip_norm == pytest.approx(2.0 * np.exp(-0.4 * (0.25 - 0.75)))
    np.testing.assert_allclose(released(optimizer, [4.0, -1.0], [2.0]), np.multiply([0.5, -0.125], 2 * np.exp(0.2)))
    assert optimizer.clip_norm == pytest.approx(2.0 * np.exp(0.2))
    for _ in range(2):  # where squares would leave float32
        optimizer._clip_norm.assign(1e-10)
        released(optimizer, [1.0], [4.0])
        assert optimizer.clip_norm == pytest.approx(1e-10)


def test_the_noise_of_gradient_and_count_together_is_that_of_the_plan():
    plan = tf_dpbn.PrivacyPlan(noise_multiplier=1.5, delta=1e-3, num_examples=64, expected_batch_size=8, steps=3)
    rule = tf_dpbn.AdaptiveClip(3.0, count_fraction=0.2, learning_rate=1.0)
    optimizer = tf_dpbn.DPOptimizer.from_plan(plan, "sgd", rule, noise_seed=1)
    of_gradient, of_count = optimizer.noise_multipliers(1)
    assert of_gradient**-2 + of_count**-2 == pytest.approx(1.5**-2) and of_count**-2 == pytest.approx(0.2 * 1.5**-2)
    release = tf.function(lambda: released(optimizer, tf.zeros([50], tf.float64), tf.zeros([1], tf.float64)))
    draws, norms = [], []
    for _ in range(400):
        optimizer._clip_norm.assign(3.0)
        assert float(optimizer.gradient_stddev(1)) == pytest.approx(of_gradient * 3.0 / 8)
        draws.append(release())
        norms.append(optimizer.clip_norm)
    assert np.std(draws) == pytest.approx(of_gradient * 3.0 / 8, rel=0.03)
    assert np.std(np.log(norms)) == pytest.approx(of_count * 0.5 / 8, rel=0.15)
    assert optimizer.counted_steps() == {(of_gradient, of_count): 400}


@pytest.mark.parametrize("initial, quantile", [(0.01, 0.5), (100.0, 0.8)])
def test_the_norm_converges_to_the_quantile(initial, quantile):
    """Norms with a logarithm of mean 0 and standard deviation 1, in batches of about 100 of 1,000 examples."""
    rule = tf_dpbn.AdaptiveClip(initial, target_quantile=quantile)
    optimizer = helpers.dp_optimizer(l2_norm_clip=rule, noise_multiplier=1.0, expected_batch_size=100, noise_seed=1)
    rng = np.random.default_rng(0)
    norms, found = np.exp(rng.normal(size=1000)), []

    @tf.function(autograph=False)
    def step(mask):
        counts = clip_counts(optimizer.clip_of_step(), tf.constant(norms**2, tf.float32), mask)
        released(optimizer, tf.zeros([1], tf.float64), *counts)

    for _ in range(200):
        step(tf.constant(rng.random(1000) < 0.1))
        found.append(optimizer.clip_norm)
    assert np.mean(norms <= np.exp(np.mean(np.log(found[120:])))) == pytest.approx(quantile, abs=0.05)


def adaptive_model(statistics=("public", "noised"), **options):
    """Compiled to release a gradient, statistics of one normalization and a count."""
    modes = iter(statistics)
    model = helpers.bn_stack(
        len(statistics), lambda: tf_dpbn.DPBatchNormalization(statistics=next(modes)), model=tf_dpbn.DPModel
    )
    helpers.randomize(model)
    model.set_public_batch(helpers.images(6, seed=1)[0])
    rule = tf_dpbn.AdaptiveClip(0.05, learning_rate=0.5)
    optimizer = helpers.dp_optimizer(
        inner=keras.optimizers.SGD(0.1), l2_norm_clip=rule, noise_multiplier=1e-6, num_examples=64
    )
    return helpers.compiled(model, None, optimizer, **options)


@pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_steps_follow_the_quantile_and_the_ledger_records_every_release(jit_compile):
    model = adaptive_model(correction="adaptive", microbatch_size=3, jit_compile=jit_compile)
    x, y = helpers.images(8)
    for _ in range(3):
        model.train_on_batch(x, y)
    # No gradient is as short as a twentieth: each step raises the norm by exp(0.5 * 0.5).
    assert model.optimizer.clip_norm == pytest.approx(0.05 * np.exp(0.75), rel=1e-4)
    (entry,) = model.ledger.entries
    assert entry.steps == 3
    assert entry.noise_multipliers == accounting.split_noise_multiplier(1e-6, 0.1, 1, 0.01)
    assert entry.effective_noise_multiplier == pytest.approx(1e-6) and len(entry.noise_multipliers) == 3
    assert "together 1e-06" in model.privacy_statement(1e-3)


def test_an_audit_of_a_step_stays_below_the_claim():
    model = trainable(tf_dpbn.AdaptiveClip(0.05, count_fraction=0.5), stub=False)
    found = auditing.audit_step(model, X, Y, delta=1e-5, row=0, trials=10_000)
    assert 0.6 * found.claimed_epsilon < found.epsilon_lower_bound <= found.claimed_epsilon
    assert model.optimizer.clip_norm == pytest.approx(0.05) and model.ledger.steps == 0


@pytest.mark.thorough
def test_an_audit_of_a_training_run_finds_something():
    found, model, _ = audited.training(8.0, clip=tf_dpbn.AdaptiveClip(0.05))
    assert model.optimizer.clip_norm > 0.05
    assert 0.3 < found.white_box.epsilon_lower_bound <= found.white_box.claimed_epsilon <= 8.0
    assert auditing.area_under_curve(found.scores, found.included) > 0.65


# ---------------------------------------------------------------------- arguments, and saving

OPTIMIZERS = {
    "generic": lambda clip: helpers.dp_optimizer(l2_norm_clip=clip),
    "adam": lambda clip: optimizers.VectorizedDPKerasAdamOptimizer(clip, 0.7, 8, 0.25),
}
RULES = {"automatic": tf_dpbn.AutomaticClip(0.5, gamma=0.02), "adaptive": tf_dpbn.AdaptiveClip(2.0, 0.3, 0.1, 0.05)}


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
        (lambda: tf_dpbn.AdaptiveClip(-1.0), "`initial` must be .*Received: initial=-1.0"),
        (lambda: tf_dpbn.AdaptiveClip(target_quantile=1.0), "`target_quantile` must lie strictly .*=1.0"),
        (lambda: tf_dpbn.AdaptiveClip(count_fraction=0.0), "`count_fraction` must lie strictly .*=0.0"),
        (lambda: helpers.dp_optimizer(l2_norm_clip="automatic"), "`l2_norm_clip` must be .*='automatic'"),
    ],
)
def test_refuses_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def trainable(clip, stub=True):
    inputs = keras.Input((3,))
    model = tf_dpbn.DPModel(inputs, layers.Dense(2)(inputs))
    inner = keras.optimizers.SGD(0.1, momentum=0.9)
    optimizer = tf_dpbn.DPOptimizer(inner, clip, 1.0, 16, num_examples=64)
    helpers.compiled(model, "mse", optimizer, stub=stub)
    optimizer.build(model.trainable_variables)
    return model


@pytest.mark.both
def test_a_saved_model_goes_on_with_the_norm_it_had(tmp_path):
    rule = tf_dpbn.AdaptiveClip(2.0, target_quantile=0.9, learning_rate=1.0)
    model = trainable(rule)
    model.train_on_batch(X, Y)
    norm = model.optimizer.clip_norm
    assert norm != 2.0
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert loaded.optimizer.l2_norm_clip == rule and loaded.optimizer.clip_norm == norm
    assert loaded.ledger == model.ledger and len(model.ledger.entries[0].noise_multipliers) == 2
    for name in ("m.weights.h5", "checkpoint"):
        if name == "checkpoint":
            path = tf.train.Checkpoint(model).save(str(tmp_path / name))
            load = lambda other, path=path: tf.train.Checkpoint(other).restore(path)  # noqa: E731
        else:
            model.save_weights(tmp_path / name)
            load = lambda other, path=tmp_path / name: other.load_weights(path)  # noqa: E731
        other = trainable(rule)
        load(other)
        assert other.optimizer.clip_norm == norm, name
    other.train_on_batch(X, Y)
    assert other.optimizer.clip_norm != norm
