"""Padded datasets of Poisson batches, what they carry, masks, and the plan that makes them."""

from __future__ import annotations

import collections
import gc
import math
import pathlib
import weakref

import numpy as np
import pytest
import tensorflow as tf

from tests.helpers import drawn_by, small_dataset
from tf_dpbn import accounting
from tf_dpbn.sampling import (
    PoissonSampling,
    PoissonSource,
    PrivacyPlan,
    poisson_dataset,
    real_example_mask,
    source_behind,
    source_of,
)

# Datasets.


def test_dataset_gathers_rows_and_zeroes_padding():
    rng = np.random.default_rng(14)
    x, y = rng.normal(size=(30, 4, 5)).astype("float32") + 9, np.arange(30) + 1
    weight = rng.uniform(0.5, 2.0, size=30)
    dataset = poisson_dataset(x, y, weight, expected_batch_size=6, max_batch_size=16, steps_per_epoch=50, seed=0)
    padded = 0
    for batch_x, batch_y, batch_weight in dataset.as_numpy_iterator():
        assert batch_x.shape == (16, 4, 5) and batch_y.shape == batch_weight.shape == (16,)
        real = batch_y > 0
        examples = batch_y[real] - 1
        np.testing.assert_array_equal(batch_x[real], x[examples])
        np.testing.assert_array_equal(batch_weight[real], weight[examples].astype("float32"))
        assert not batch_x[~real].any() and not batch_weight[~real].any()
        np.testing.assert_array_equal(real_example_mask(batch_weight), real)
        padded += int((~real).sum())
    assert 0 < padded < 50 * 16


def test_dataset_has_static_shapes_types_and_length():
    dataset = poisson_dataset(
        np.zeros((30, 4), "float16"), np.zeros(30, "int32"), expected_batch_size=7, max_batch_size=9
    )
    assert dataset.element_spec == (
        tf.TensorSpec((9, 4), tf.float16),
        tf.TensorSpec((9,), tf.int32),
        tf.TensorSpec((9,), tf.float32),
    )
    assert int(dataset.cardinality()) == len(dataset) == 5  # ceil(30 / 7)
    assert len(list(dataset)) == len(list(dataset)) == 5


def test_padding_keeps_not_a_number_and_infinity_out():
    x = np.full((10, 2), np.nan, "float32")
    x[5:] = np.inf
    dataset = poisson_dataset(x, x, expected_batch_size=2, max_batch_size=10, seed=0)
    for batch_x, batch_y, weight in dataset.as_numpy_iterator():
        assert not batch_x[weight == 0].any() and not batch_y[weight == 0].any()
        assert not np.isfinite(batch_x[weight == 1]).any()


def test_empty_draws_are_batches_of_padding():
    dataset = poisson_dataset(
        np.ones((50, 2)), np.ones(50), expected_batch_size=1, max_batch_size=4, steps_per_epoch=200, seed=15
    )
    empty = [x for x, _, weight in dataset.as_numpy_iterator() if not weight.any()]
    assert 40 < len(empty) < 110  # 200 * (1 - 1/50)^50 = 73
    assert all(x.shape == (4, 2) and not x.any() for x in empty)


Pair = collections.namedtuple("Pair", "left right")


def test_nests_keep_their_structure_and_lists_become_tuples():
    numbers = np.arange(1, 13)
    x = {
        "image": numbers[:, None].astype("float64"),
        "parts": [numbers, Pair(numbers.astype("int8"), tf.constant(numbers))],
        "text": np.array([f"text {n}" for n in numbers]),
    }
    y = (numbers.astype(bool), numbers)
    dataset = poisson_dataset(x, y, expected_batch_size=4, max_batch_size=12, seed=0)
    for batch_x, batch_y, weight in dataset.as_numpy_iterator():
        real = weight > 0
        drawn = batch_y[1][real]
        assert isinstance(batch_x["parts"], tuple) and isinstance(batch_x["parts"][1], Pair)
        np.testing.assert_array_equal(batch_x["image"][real, 0], drawn)
        np.testing.assert_array_equal(batch_x["parts"][0][real], drawn)
        np.testing.assert_array_equal(batch_x["parts"][1].left[real], drawn)
        np.testing.assert_array_equal(batch_x["parts"][1].right[real], drawn)
        assert batch_x["text"][real].tolist() == [f"text {n}".encode() for n in drawn]
        np.testing.assert_array_equal(batch_y[0], real)
        for leaf in tf.nest.flatten((batch_x, batch_y)):
            assert not np.any(leaf[~real] != np.zeros((), leaf.dtype)) or leaf.dtype == object
        assert set(batch_x["text"][~real]) <= {b""}


def private_memory() -> int:
    """Bytes of this process that belong to no file."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("mapped", [False, True])
def test_arrays_are_not_copied_and_not_kept(mapped, tmp_path):
    shape = (2000, 160, 160, 3)  # 154 MB
    x = np.memmap(tmp_path / "x", "uint8", "w+", shape=shape) if mapped else np.ones(shape, "uint8")
    labels = np.arange(len(x), dtype=">i2")  # of a byte order that TensorFlow does not have
    before = private_memory()
    dataset = make_plan(num_examples=len(x), expected_batch_size=20).poisson_dataset(x, labels, seed=1)
    for _, batch_y, weight in dataset.take(3).as_numpy_iterator():
        assert batch_y.dtype == np.dtype("int16") and batch_y[weight > 0].any()
    assert private_memory() - before < x.nbytes / 3
    x[:, 0, 0, 0] = 7  # read as they are drawn
    batch_x, _, weight = next(dataset.as_numpy_iterator())
    assert set(batch_x[weight > 0][:, 0, 0, 0]) == {7}
    kept = weakref.ref(x)
    del x, dataset, batch_x
    gc.collect()
    assert kept() is None


# The note that a dataset carries.


def test_source_tells_the_sampling_and_labels():
    labels = np.arange(100)
    dataset = poisson_dataset(labels, labels, expected_batch_size=8, max_batch_size=24, steps_per_epoch=4)
    source = source_of(dataset)
    assert source is dataset.tf_dpbn_source and isinstance(source, PoissonSource)
    assert source.labels is labels
    assert source.sampling == PoissonSampling(
        num_examples=100, sampling_probability=0.08, max_batch_size=24, steps_per_epoch=4
    )
    assert source.sampling.expected_batch_size == pytest.approx(8.0)


def test_prefetching_and_options_keep_the_source_and_what_is_derived_otherwise_does_not():
    dataset = small_dataset()
    in_any_order = tf.data.Options()
    in_any_order.deterministic = False
    for same in (
        dataset.prefetch(2),
        dataset.with_options(tf.data.Options()).prefetch(1),
    ):
        assert source_of(same) is source_of(dataset) is not None
    for derived in (
        dataset.cache(),
        dataset.repeat(),
        dataset.take(1),
        dataset.map(lambda x, y, weight: (x[::-1], y, weight)).prefetch(1),
        dataset.with_options(in_any_order).prefetch(1),
    ):
        assert source_of(derived) is None
        assert source_behind(derived) is source_of(dataset)


def test_other_data_has_no_source():
    foreign = tf.data.Dataset.range(3)
    foreign.tf_dpbn_source = "something else"
    assert source_of(foreign) is None
    for other in (None, np.zeros(3), tf.data.Dataset.range(3)):
        assert source_of(other) is source_behind(other) is None


# Masks.


@pytest.mark.parametrize(
    "weight,expected",
    [
        ([1.0, 0.0, -0.0, -2.0, math.nan], [True, False, False, True, True]),
        ([[1.0, -1.0], [0.0, 0.0], [0.0, 1.0]], [True, False, True]),
        (np.array([[[0], [0]], [[0], [7]]]), [False, True]),
        ([True, False], [True, False]),
    ],
)
def test_real_example_mask(weight, expected):
    weight = tf.constant(weight)
    unknown = tf.TensorSpec(None, weight.dtype)  # not even the rank is known
    for function in (real_example_mask, tf.function(real_example_mask, input_signature=[unknown])):
        mask = function(weight)
        assert mask.dtype == tf.bool
        assert mask.numpy().tolist() == expected
    with pytest.raises(ValueError, match="`sample_weight` must have a batch dimension"):
        real_example_mask(1.0)


# Errors.


ARRAY = np.zeros(10)


def test_frames_of_numbers_and_truth_values_are_taken_and_other_columns_named():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"age": np.arange(10) / 2, "smokes": np.arange(10) > 4, "visits": np.arange(10)})
    y = np.zeros(10, "int64")
    options = {"expected_batch_size": 10, "max_batch_size": 10, "steps_per_epoch": 1}
    (x, _, _), *_ = poisson_dataset(frame, y, **options)
    assert x.dtype == tf.float64
    np.testing.assert_array_equal(np.asarray(x)[np.argsort(np.asarray(x)[:, 0])], frame.to_numpy("float64"))
    frame["city"], frame["since"] = list("abcdefghij"), pandas.date_range("2020", periods=10)
    with pytest.raises(TypeError, match="`x` must hold columns of numbers. Encode or drop 'city', 'since'.*Received"):
        poisson_dataset(frame, y, **options)
    with pytest.raises(TypeError, match="`x` must have values everywhere, in columns 'gaps' too"):
        poisson_dataset(pandas.DataFrame({"gaps": pandas.array([1] * 9 + [None], "Int64")}), y, **options)
    (words, _, _), *_ = poisson_dataset(frame[["city"]], y, **options)
    assert words.dtype == tf.string


@pytest.mark.parametrize(
    "arguments,change,error,message",
    [
        ((ARRAY, ARRAY[:9]), {}, ValueError, r"same number of examples.*\[10, 9\]"),
        ((ARRAY[:0], ARRAY[:0]), {}, ValueError, r"at least 1.*\[0, 0\]"),
        ((ARRAY, None), {}, ValueError, "`y` must be given with arrays"),
        ((ARRAY, {"a": None}), {}, TypeError, "must hold dense arrays.*NoneType"),
        ((ARRAY, [1, 2]), {}, ValueError, r"`y\[0\]` must hold arrays, not scalars.*=1"),
        (({"a": tf.ragged.constant([[1], []])}, ARRAY), {}, TypeError, r"x\['a'\]=.*Ragged"),
        ((ARRAY, ARRAY, ARRAY[:4]), {}, ValueError, r"each of the 10 examples.*\(4,\)"),
        ((ARRAY, ARRAY, {"a": ARRAY}), {}, TypeError, "one array of real numbers"),
        ((ARRAY, ARRAY, ARRAY + 1e300), {}, ValueError, "finite float32"),
        ((ARRAY, ARRAY), {"expected_batch_size": 11}, ValueError, "10.*expected_batch_size=11"),
        ((ARRAY, ARRAY), {"expected_batch_size": 2.5}, ValueError, "expected_batch_size=2.5"),
        ((ARRAY, ARRAY), {"max_batch_size": 3}, ValueError, "at least.*4.*max_batch_size=3"),
        ((ARRAY, ARRAY), {"steps_per_epoch": 0}, ValueError, "steps_per_epoch=0"),
        ((ARRAY, ARRAY), {"seed": -1}, ValueError, "seed=-1"),
        ((ARRAY, ARRAY), {"seed": True}, ValueError, "seed=True"),
    ],
)
def test_dataset_refuses_bad_arguments(arguments, change, error, message):
    sizes = {"expected_batch_size": 4, "max_batch_size": 8, **change}
    with pytest.raises(error, match=message):
        poisson_dataset(*arguments, **sizes)


# The plan.


def make_plan(**change) -> PrivacyPlan:
    fields = {"noise_multiplier": 1.0, "delta": 1e-5, "num_examples": 30, "steps": 20}
    return PrivacyPlan(**{**fields, "expected_batch_size": 7, **change})


def test_plan_makes_the_dataset_it_accounts_for_and_hands_on_weights_and_seed():
    plan, numbers = make_plan(), np.arange(30) + 1
    assert isinstance(plan, accounting.PrivacyPlan)
    dataset = plan.poisson_dataset(numbers, numbers, numbers[:, None] / 2, seed=18)
    sampling = source_of(dataset).sampling
    assert (sampling.num_examples, sampling.max_batch_size) == (30, plan.max_batch_size)
    assert sampling.sampling_probability == plan.record().sampling_probability == 7 / 30
    assert len(dataset) == sampling.steps_per_epoch == plan.steps_per_epoch == 5
    direct = poisson_dataset(numbers, numbers, expected_batch_size=7, max_batch_size=plan.max_batch_size, seed=18)
    assert drawn_by(dataset) == drawn_by(direct)
    for x, _, weight in dataset.as_numpy_iterator():
        np.testing.assert_array_equal(weight[:, 0], x / 2)


def test_plan_refuses_data_of_another_length():
    with pytest.raises(ValueError, match=r"num_examples=30 examples.* Received: x, y=29$"):
        make_plan().poisson_dataset({"a": np.zeros((29, 2))}, np.zeros(29))
