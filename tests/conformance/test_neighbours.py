"""Neighbouring batches: adding or removing one example moves each release by at most its declared sensitivity."""

import warnings

import numpy as np
import pytest

from tests import helpers, neighbours
from tests.conformance import nets
from tf_dpbn.clipping import ENGINES

BATCHES = 2
# Each net with two draws of weights, clip norm and batches, and another engine in each.
CASES = [(net, "local", ENGINES[(k + seed) % 2], seed) for k, net in enumerate(nets.PLAIN) for seed in range(2)]
CASES += [("batch_normalization", "none", "book_keeping", 2), ("two_outputs", "none", "vectorized", 2)]
CASES += [("batch_normalization", "local", "loop", 3), ("batch_normalization_twice", "full", "book_keeping", 3)]
CASES += [(net, "local", engine, 0) for net in nets.RELEASING for engine in nets.ENGINES]
# In the gate each net once; those of one mode are parts of those of several.
AGAIN = [
    case
    for case in CASES
    if case[0] in nets.PLAIN
    and case[3]
    or case[0] in nets.RELEASING
    and (case[2] != nets.ENGINES[0] or case[0] in ("noised", "anchored"))
][::2]
QUIET = pytest.mark.filterwarnings("ignore:DPBatchNormalization .* gets no gradient:UserWarning")


@QUIET
@pytest.mark.parametrize(
    "net, correction, engine, seed",
    [pytest.param(*case, marks=[pytest.mark.thorough] if case in AGAIN else []) for case in CASES],
)
def test_one_example_moves_every_release_by_at_most_its_sensitivity(net, correction, engine, seed):
    rng = np.random.default_rng([seed, len(net)])
    model, shape, targets = nets.compiled(net, rng, correction=correction, engine=engine)
    found = neighbours.check(model, rng, shape, targets, BATCHES)
    assert found.pairs == BATCHES * neighbours.PAIRS
    assert len(found.worst) == 1 + nets.releases_of_statistics(net)
    assert (found.worst <= neighbours.SLACK).all()
    assert found.padding <= neighbours.ROUNDING
    assert (found.typical > 1e-3).all()  # the batches do differ


def test_at_least_ten_thousand_pairs_are_compared():
    assert neighbours.PAIRS == len(set(zip(*neighbours.neighbouring(), strict=True)))
    assert (len(CASES) - len(AGAIN)) * BATCHES * neighbours.PAIRS >= 10_000
    assert {engine for _, _, engine, _ in CASES} == set(ENGINES)


def test_pairs_are_neighbours():
    chosen = neighbours.subsets(4)
    without, with_row = neighbours.neighbouring(4)
    assert len({tuple(row) for row in chosen.tolist()}) == 16 and len(without) == 32
    np.testing.assert_array_equal(chosen[with_row].sum(1), chosen[without].sum(1) + 1)
    assert (chosen[with_row] >= chosen[without]).all()


@pytest.mark.parametrize("mode", ["noised", "anchored"])
def test_an_examples_release_does_not_depend_on_the_others(mode):
    rng = np.random.default_rng(3)
    model = nets.net_of_modes(mode)
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
    model, loss, shape, targets = nets.zoo_net("batch_normalization")(rng)
    helpers.randomize(model)
    model.set_public_batch(rng.normal(size=(5, *shape)).astype("float32"))
    helpers.compiled(model, loss, engine=engine)
    run = helpers.clipped_sum_function(model)
    x, y = rng.normal(size=(4, *shape)).astype("float32"), targets(4)
    alone = [run(x, y, np.eye(4, dtype="float32")[i])[0] for i in range(4)]
    together, _ = run(x, y, np.ones(4, "float32"))
    np.testing.assert_allclose(helpers.flat(together), sum(helpers.flat(each) for each in alone), atol=1e-5)
