"""People with several examples: users are drawn, and the mean gradient of a user's examples is what is clipped."""

import dataclasses
import math

import dp_accounting
import numpy as np
import pytest
from scipy import stats

import tf_dpbn
from tests import helpers, neighbours
from tests.test_augmentation import network, others_thorough
from tf_dpbn import accounting
from tf_dpbn._keras import keras
from tf_dpbn.sampling import poisson_dataset, source_of

IDS = np.repeat(np.arange(20), np.arange(20) % 6 + 1)  # of 1 to 6 examples each
USERS = 20


def dataset_of(ids=IDS, most=3, steps=40, **options):
    numbers = np.arange(len(ids)) + 1
    return poisson_dataset(
        numbers,
        numbers,
        user_ids=ids,
        max_examples_per_user=most,
        expected_batch_size=5,
        max_batch_size=12,
        steps_per_epoch=steps,
        **options,
    )


def test_rows_hold_examples_of_one_user_which_count_once():
    shuffled = np.random.default_rng(0).permutation(IDS)
    names = np.array([f"user {k}" for k in shuffled])
    seen = np.zeros(len(IDS), int)
    for x, y, weight in dataset_of(names, seed=1).as_numpy_iterator():
        assert x.shape == y.shape == weight.shape == (12, 3)
        np.testing.assert_array_equal(x, y)
        drawn = []
        for examples, counts in zip(x, weight > 0, strict=True):
            if not examples.any():
                assert not counts.any()
                continue
            (user,) = set(names[examples - 1])
            own = np.flatnonzero(names == user) + 1
            assert counts.sum() == min(3, len(own)) == len(set(examples[counts])) and set(examples) <= set(own)
            seen[examples[counts] - 1] += 1
            drawn.append(user)
        assert len(set(drawn)) == len(drawn)
    assert seen.min() > 0


def test_users_are_poisson_sampled_and_their_examples_equally_likely():
    drawn, examples = np.zeros(USERS), np.zeros(len(IDS))
    steps = 3000
    for x, _, weight in dataset_of(steps=steps, seed=2).as_numpy_iterator():
        chosen = x[weight > 0] - 1
        examples[chosen] += 1
        drawn[np.unique(IDS[chosen])] += 1
    rate = 5 / USERS
    deviations = (drawn - steps * rate) / math.sqrt(steps * rate * (1 - rate))
    assert stats.chi2.sf(np.sum(deviations**2), USERS) > 1e-3
    expected = drawn[IDS] * np.minimum(3, np.bincount(IDS)[IDS]) / np.bincount(IDS)[IDS]
    assert np.max(np.abs(examples - expected) / np.sqrt(expected)) < 4.5


def test_one_example_a_user_has_no_axis_of_its_own_and_says_what_it_counts():
    dataset = dataset_of(most=1)
    assert dataset.element_spec[0].shape == (12,)
    sampling = source_of(dataset).sampling
    assert (sampling.num_examples, sampling.sampling_probability, sampling.unit) == (USERS, 5 / USERS, "user")


def grouped(seed=4, users=4, most=3):
    """Inputs, labels and weights of users with 1, 2, 3, ... examples."""
    x, y = helpers.images(users * most, seed=seed)
    counts = np.arange(most) <= np.arange(users)[:, None] % most
    return x.reshape(users, most, *x.shape[1:]), y.reshape(users, most), counts.astype("float32")


@pytest.mark.parametrize("engine", others_thorough("book_keeping", "vectorized", "loop"))
def test_gradient_is_the_clipped_mean_over_a_users_examples(engine):
    x, y, weight = grouped()
    weight[3] = [0.5, 0.0, 2.0]
    one = helpers.clipped_sum_function(helpers.compiled(network(), optimizer=helpers.dp_optimizer(l2_norm_clip=1e6)))
    means = []
    for rows in zip(x, y, weight, strict=True):
        real = rows[2] > 0
        means.append(helpers.flat(one(*(each[real] for each in rows))[0]) / real.sum())
    norms = [np.linalg.norm(mean) for mean in means]
    clip = float(np.median(norms))  # some are scaled, others are not
    expected = sum(mean * min(1.0, clip / norm) for mean, norm in zip(means, norms, strict=True))
    optimizer = helpers.dp_optimizer(l2_norm_clip=clip)
    model = helpers.compiled(network(), optimizer=optimizer, engine=engine, max_examples_per_user=3)
    found, result = helpers.clipped_sum_function(model)(x, y, weight)
    assert helpers.relative_error(found, [expected]) < 1e-4
    assert result.y_pred.shape == (4, 3, 3)


@pytest.mark.parametrize("statistics", others_thorough("noised", "public", "anchored"))
@pytest.mark.parametrize("batches", others_thorough(1, 23))
def test_neighbouring_users_move_no_release_by_more_than_its_sensitivity(statistics, batches):
    model = helpers.bn_stack(2, lambda: tf_dpbn.DPBatchNormalization(statistics=statistics), model=tf_dpbn.DPModel)
    helpers.randomize(model, 0, scale=1.0)
    model.set_public_batch(helpers.images(9, seed=1)[0])
    helpers.compiled(model, max_examples_per_user=3)
    rng, (_, _, within) = np.random.default_rng(batches), grouped(users=neighbours.ROWS)
    run = neighbours.sums_of_subsets(model, within)
    moves = neighbours.check(
        model, rng, (3, 6, 6, 2), lambda rows: rng.integers(0, 3, (rows, 3)), batches, batches > 1, run
    )
    assert moves.pairs == 448 * batches and moves.within_bounds, moves
    assert batches > 1 or moves.typical.min() > 1e-3


@pytest.fixture(scope="module")
def trained():
    """A model trained on users, its plan, and its ledger after `fit`."""
    plan = tf_dpbn.PrivacyPlan(noise_multiplier=1.0, delta=1e-3, num_examples=USERS, expected_batch_size=8, epochs=1)
    x, y = helpers.images(len(IDS))
    data = plan.poisson_dataset(x, y, user_ids=IDS, max_examples_per_user=3, seed=1)
    optimizer = tf_dpbn.DPOptimizer.from_plan(plan, keras.optimizers.SGD(0.1), l2_norm_clip=1.0)
    model = helpers.compiled(network(), optimizer=optimizer)
    with pytest.raises(ValueError, match="Poisson data set, 3.*to compile and to poisson_dataset.*per_user=1"):
        model.fit(data, verbose=0)
    helpers.compiled(model, optimizer=optimizer, metrics=["accuracy"], max_examples_per_user=3)
    model.fit(data, verbose=0)
    return model, plan, model.ledger


def test_metrics_see_each_example_once(trained):
    model, x, y, weight = trained[0], *grouped(users=5)
    _, result = helpers.clipped_sum_function(model)(x, y, weight)
    real = weight > 0
    expected = np.mean(np.argmax(result.y_pred, -1)[real] == y[real])
    logs = model.train_on_batch(x, y, weight, return_dict=True)
    assert logs["accuracy"] == pytest.approx(expected, abs=1e-6)
    assert logs["loss"] == pytest.approx(float(np.mean(result.loss)), rel=1e-5)


def test_ledger_and_statement_speak_of_users_at_their_rate(trained):
    _, plan, ledger = trained
    (record,) = ledger.entries
    assert record == dataclasses.replace(plan.record(), unit="user") and record.sampling == "poisson"
    event = dp_accounting.PoissonSampledDpEvent(8 / USERS, dp_accounting.GaussianDpEvent(1.0))
    accountant = dp_accounting.rdp.RdpAccountant().compose(event, plan.steps)
    assert ledger.unit == "user" and ledger.epsilon(1e-3) == plan.epsilon
    assert ledger.epsilon(1e-3) == pytest.approx(accountant.get_epsilon(1e-3), rel=1e-3)
    statement = " ".join(accounting.privacy_statement(ledger, delta=1e-3).split())
    for phrase in ("adding or removing one user, with all", "each user in each batch", "20 users", "number of users"):
        assert phrase in statement
    assert accounting.Ledger.from_json(ledger.to_json()) == ledger
    mixed = ledger.copy()
    mixed.record(dataclasses.replace(record, unit="example"))
    assert mixed.unit == "example"
    statement = " ".join(accounting.privacy_statement(mixed, delta=1e-3).split())
    assert "adding or removing one example whose user has no other" in statement


def test_audit_of_a_step_tells_users_apart(trained):
    model, x, y, _ = trained[0], *grouped(users=4)
    found = tf_dpbn.auditing.audit_step(model, 30.0 * x, y, delta=1e-3, trials=400)
    assert "with and without user" in found.method and 0.5 < found.epsilon_lower_bound < found.claimed_epsilon
    with pytest.raises(ValueError, match="Audit users by audit_step"):
        tf_dpbn.auditing.audit_training(model, x, y, x, y, trained[1])


def test_refuses_misuse():
    x, y = helpers.images(8)
    sizes = {"expected_batch_size": 2, "max_batch_size": 4}
    ids = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    for change, message in (
        ({"max_examples_per_user": 2}, "Received: user_ids=None"),
        ({"user_ids": ids[:7]}, "the user of each of the 8 examples.*7 of them"),
        ({"user_ids": ids / 2}, "a whole number or a string for each example.*float64"),
        ({"user_ids": ids, "expected_batch_size": 5}, "at most the number of users, 4"),
        ({"user_ids": ids, "max_examples_per_user": 2, "augment": lambda x: x}, "Augment in `load`"),
    ):
        with pytest.raises(ValueError, match=message):
            poisson_dataset(x, y, **{**sizes, **change})
    with pytest.raises(ValueError, match="be 1 with max_examples_per_user > 1"):
        helpers.compiled(network(), max_examples_per_user=2, augmentation_multiplicity=2)
    model = helpers.compiled(network(), max_examples_per_user=2)
    data = poisson_dataset(x, y, user_ids=ids, max_examples_per_user=2, **sizes)
    optimizer = helpers.dp_optimizer(expected_batch_size=2, num_examples=4)
    helpers.compiled(model, optimizer=optimizer, max_examples_per_user=2)
    with pytest.raises(ValueError, match="`class_weight` must be None with max_examples_per_user > 1"):
        model.fit(data, class_weight={0: 1.0, 1: 2.0, 2: 3.0}, verbose=0)
    with pytest.raises(ValueError, match=r"have shape \[batch, 2, ...\], as max_examples_per_user"):
        model.train_on_batch(x, y, np.ones(8))
