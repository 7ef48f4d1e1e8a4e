"""The distribution of the Poisson draws, and the datasets made from them."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from tests.helpers import drawn_by, small_dataset
from tf_dpbn.sampling import PoissonSampling, poisson_dataset, poisson_indices, source_of

# Draws are seeded, so nothing here is flaky. A right sampler fails a test at this level with probability 1e-3 at
# writing; the planted wrong ones fall far below `REJECTED`.
ACCEPTED, REJECTED = 1e-3, 1e-6


def make_sampling(num_examples=20, rate=0.25, rows=20, steps=10) -> PoissonSampling:
    return PoissonSampling(
        num_examples=num_examples, sampling_probability=rate, max_batch_size=rows, steps_per_epoch=steps
    )


def memberships(batches, num_examples: int) -> np.ndarray:
    """Returns bool [steps, num_examples]: which example is in which batch."""
    inside = np.zeros((len(batches), num_examples), dtype=bool)
    for step, indices in enumerate(batches):
        inside[step, indices[indices >= 0]] = True
    return inside


def draw(sampling: PoissonSampling, steps: int, seed: int) -> list[np.ndarray]:
    return [indices for indices, _ in itertools.islice(poisson_indices(sampling, seed=seed), steps)]


# Wrong samplers, all with the right mean batch size unless the name says otherwise.


def shuffling_sampler(rng, num_examples, rate, steps):
    size = round(rate * num_examples)
    epochs = math.ceil(steps * size / num_examples)
    order = np.concatenate([rng.permutation(num_examples) for _ in range(epochs)])
    return [order[step * size : (step + 1) * size] for step in range(steps)]


def too_high_rate_sampler(rng, num_examples, rate, steps):
    return [np.flatnonzero(rng.random(num_examples) < 1.1 * rate) for _ in range(steps)]


def paired_sampler(rng, num_examples, rate, steps):
    coins = rng.random((steps, num_examples // 2)).repeat(2, axis=1)
    return [np.flatnonzero(row < rate) for row in coins]


# Tests of the distribution: each returns a p-value, uniform for a Poisson sampler.


def p_inclusion(inside: np.ndarray, rate: float) -> float:
    """Every example is drawn equally often, at the rate."""
    steps, num_examples = inside.shape
    scores = (inside.sum(axis=0) - steps * rate) / math.sqrt(steps * rate * (1 - rate))
    return float(stats.chi2.sf(np.sum(scores**2), num_examples))


def p_batch_size(inside: np.ndarray, rate: float) -> float:
    """Batch sizes are binomial."""
    steps, num_examples = inside.shape
    expected = steps * stats.binom.pmf(np.arange(num_examples + 1), num_examples, rate)
    observed = np.bincount(inside.sum(axis=1), minlength=num_examples + 1)
    rare = expected < 10
    expected = np.append(expected[~rare], expected[rare].sum())
    observed = np.append(observed[~rare], observed[rare].sum())
    return float(stats.chisquare(observed, expected).pvalue)


def p_independent(first: np.ndarray, second: np.ndarray, rate: float) -> float:
    products = (first - rate) * (second - rate)
    score = products.sum() / (math.sqrt(products.size) * rate * (1 - rate))
    return float(2 * stats.norm.sf(abs(score)))


def p_steps_independent(inside: np.ndarray, rate: float) -> float:
    """Being in one batch says nothing about being in the next one."""
    return p_independent(inside[:-1], inside[1:], rate)


def p_examples_independent(inside: np.ndarray, rate: float) -> float:
    """Being in a batch says nothing about the neighbour (in order) being in it."""
    return p_independent(inside[:, 0::2], inside[:, 1::2], rate)


P_VALUES = [p_inclusion, p_batch_size, p_steps_independent, p_examples_independent]


@pytest.mark.parametrize("num_examples,rate", [(20, 0.25), (50, 0.04), (8, 0.75)])
def test_draws_follow_the_poisson_distribution(num_examples, rate):
    sampling = make_sampling(num_examples, rate, rows=num_examples)
    inside = memberships(draw(sampling, 5000, seed=1), num_examples)
    assert [p_value(inside, rate) > ACCEPTED for p_value in P_VALUES] == [True] * 4


@pytest.mark.thorough
def test_many_draws_follow_the_poisson_distribution():
    inside = memberships(draw(make_sampling(200, 0.05, rows=200), 100_000, seed=12), 200)
    assert [p_value(inside, 0.05) > ACCEPTED for p_value in P_VALUES] == [True] * 4
    together = inside.T.astype("float32") @ inside.astype("float32")  # how often each pair of examples met
    pairs = together[np.triu_indices(200, 1)]
    scores = (pairs - 1e5 * 0.05**2) / math.sqrt(1e5 * 0.05**2 * (1 - 0.05**2))
    assert abs(np.mean(scores**2) - 1.0) < 0.05 and np.max(np.abs(scores)) < 6.0


def test_drawing_takes_time_in_proportion_to_the_draw():
    sampling = make_sampling(10**9, 512 / 10**9, rows=1000)
    drawn = draw(sampling, 50, seed=13)  # a coin for each example would take minutes
    sizes = [np.sum(indices >= 0) for indices in drawn]
    assert abs(np.mean(sizes) - 512) < 5 * math.sqrt(512 / 50) and max(indices.max() for indices in drawn) > 0.9e9


def test_hardly_ever_drawn_examples_are_not_drawn():
    drawn = draw(make_sampling(100, 1e-19, rows=10), 200, seed=14)  # gaps between them are beyond 64 bits
    assert all((indices == -1).all() for indices in drawn)


@pytest.mark.parametrize(
    "wrong,p_value",
    [
        (shuffling_sampler, p_batch_size),
        (shuffling_sampler, p_steps_independent),
        (too_high_rate_sampler, p_inclusion),
        (paired_sampler, p_examples_independent),
    ],
)
def test_these_tests_reject_wrong_samplers(wrong, p_value):
    batches = wrong(np.random.default_rng(2), 20, 0.25, 5000)
    assert p_value(memberships(batches, 20), 0.25) < REJECTED


def test_dataset_follows_the_poisson_distribution():
    dataset = poisson_dataset(
        np.arange(20), np.zeros(20), expected_batch_size=5, max_batch_size=20, steps_per_epoch=1000, seed=3
    )
    batches = [np.where(w > 0, x, -1) for x, _, w in dataset.as_numpy_iterator()]
    inside = memberships(batches, 20)
    assert [p_value(inside, 0.25) > ACCEPTED for p_value in P_VALUES] == [True] * 4


# Exact distributions of whole batches, small enough to enumerate.


def distribution_of_kept_sets(num_examples: int, rate: float, rows: int) -> dict[frozenset, float]:
    """The distribution of the kept set where a larger draw is truncated to a uniform subset of `rows`."""
    found: dict[frozenset, float] = collections.defaultdict(float)
    for size in range(num_examples + 1):
        for drawn in itertools.combinations(range(num_examples), size):
            probability = rate**size * (1 - rate) ** (num_examples - size)
            kept_sets = list(itertools.combinations(drawn, min(size, rows)))
            for kept in kept_sets:
                found[frozenset(kept)] += probability / len(kept_sets)
    return found


def p_outcomes(outcomes, distribution) -> float:
    counts = collections.Counter(outcomes)
    assert set(counts) <= set(distribution)
    total = sum(counts.values())
    observed = [counts[outcome] for outcome in distribution]
    return float(stats.chisquare(observed, [total * p for p in distribution.values()]).pvalue)


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_truncation_keeps_a_uniform_subset(rows):
    batches = draw(make_sampling(4, 0.6, rows=rows), 20_000, seed=4)
    assert all(batch.shape == (rows,) for batch in batches)
    kept = [frozenset(batch[batch >= 0].tolist()) for batch in batches]
    assert p_outcomes(kept, distribution_of_kept_sets(4, 0.6, rows)) > ACCEPTED
    if rows == 6:  # the test rejects keeping the first ones
        first = [frozenset(np.sort(batch[batch >= 0])[:2].tolist()) for batch in batches]
        assert p_outcomes(first, distribution_of_kept_sets(4, 0.6, 2)) < REJECTED


def distribution_of_rows() -> dict[tuple, float]:
    """The distribution of the index vector for 2 examples at rate 1/2 in 3 rows, rows uniformly random."""
    found: dict[tuple, float] = {}
    for size, drawn in [(0, ()), (1, (0,)), (1, (1,)), (2, (0, 1))]:
        places = list(itertools.permutations(range(3), size))
        for place in places:
            indices = [-1, -1, -1]
            for example, row in zip(drawn, place, strict=True):
                indices[row] = example
            found[tuple(indices)] = 0.25 / len(places)
    return found


def test_rows_of_examples_are_uniformly_random():
    distribution = distribution_of_rows()
    assert len(distribution) == 13 and sum(distribution.values()) == pytest.approx(1.0)
    batches = [tuple(batch.tolist()) for batch in draw(make_sampling(2, 0.5, rows=3), 20_000, seed=5)]
    assert p_outcomes(batches, distribution) > ACCEPTED
    padding_last = [tuple(sorted(batch, key=lambda example: example % 9)) for batch in batches]
    assert p_outcomes(padding_last, distribution) < REJECTED  # the test rejects sorted batches


def test_indices_have_fixed_shape_types_and_distinct_entries():
    for indices, mask in itertools.islice(poisson_indices(make_sampling(20, 0.25, 9), seed=6), 200):
        assert indices.shape == mask.shape == (9,)
        assert indices.dtype == np.int64 and mask.dtype == np.float32
        np.testing.assert_array_equal(mask, indices >= 0)
        assert np.all(indices[indices < 0] == -1) and np.all(indices < 20)
        drawn = indices[indices >= 0]
        assert len(set(drawn)) == len(drawn)


# Seeds.


def set_every_global_seed() -> None:
    tf.keras.utils.set_random_seed(7)
    random.seed(7)
    np.random.seed(7)
    tf.random.set_seed(7)


def test_global_seeds_fix_neither_unseeded_draws_nor_unseeded_datasets():
    found = []
    for _ in range(2):
        set_every_global_seed()
        indices, _ = next(poisson_indices(make_sampling(200, 0.5, rows=200)))
        found.append((set(indices), drawn_by(small_dataset(num_examples=200, batch=100, rows=200))))
    assert found[0][0] != found[1][0] and found[0][1] != found[1][1]


def test_draws_leave_global_random_state_alone():
    set_every_global_seed()
    expected = np.random.random(), random.random()
    set_every_global_seed()
    next(poisson_indices(make_sampling()))
    drawn_by(small_dataset())
    assert (np.random.random(), random.random()) == expected


def test_seed_repeats_draws_and_other_seeds_differ():
    sampling = make_sampling(100, 0.5, rows=100)
    same = [np.stack(draw(sampling, 5, seed=8)) for _ in range(2)]
    np.testing.assert_array_equal(*same)
    assert not np.array_equal(same[0], np.stack(draw(sampling, 5, seed=9)))


@pytest.mark.parametrize("seed", [None, 10])
def test_iterations_and_steps_make_fresh_draws(seed):
    dataset = small_dataset(seed=seed)
    batches = [batch for _ in range(4) for batch in drawn_by(dataset)]
    assert len(set(batches)) == 12


def test_seed_fixes_all_iterations_of_a_dataset_however_far_earlier_ones_were_read():
    first, second = small_dataset(seed=11), small_dataset(seed=11)
    drawn = drawn_by(first)
    assert drawn == [tuple((b + 1).tolist()) for b in draw(source_of(first).sampling, 3, seed=11)]  # of poisson_indices
    next(iter(second))
    assert [drawn_by(first) for _ in range(2)] == [drawn_by(second) for _ in range(2)]


# Errors.


@pytest.mark.parametrize(
    "change,message",
    [
        ({"num_examples": 0}, "`num_examples` .* Received: num_examples=0"),
        ({"sampling_probability": 1.01}, "at most 1.* Received: sampling_probability=1.01"),
        ({"max_batch_size": -3}, "Received: max_batch_size=-3"),
        ({"steps_per_epoch": 0}, "Received: steps_per_epoch=0"),
    ],
)
def test_sampling_refuses_bad_values(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make_sampling(), **change)
