"""The synthetic public batches, and the check of public batches."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from tf_dpbn import public_data
from tf_dpbn.public_data import dead_leaves, random_fields, random_generators, uniform_noise, validate_batch

GENERATORS = [uniform_noise, random_fields, dead_leaves, random_generators]


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize(
    "value_range,dtype",
    [
        ((0.0, 1.0), "float32"),
        ((0.1, 0.3), "float32"),  # float32(0.1) > 0.1 and float32(0.3) > 0.3
        ((-0.3, -0.1), "float16"),
        ((0, 255), "uint8"),
        ((-128, 127), np.int8),
        ((-2.5, 3.5), "int64"),
    ],
)
def test_values_have_shape_and_type_and_stay_inside_the_range(generator, value_range, dtype):
    for shape in ((8, 8, 1), (9, 5, 3), (1, 1, 1), (1, 6, 2)):
        batch = generator(shape, 6, value_range=value_range, dtype=dtype, seed=0)
        assert batch.shape == (6, *shape) and batch.dtype == np.dtype(dtype)
        # As Python numbers: numpy would round the range to the type of the batch.
        assert value_range[0] <= batch.min().item() < batch.max().item() <= value_range[1]


@pytest.mark.parametrize("generator", GENERATORS)
def test_values_fill_the_range(generator):
    batch = generator((16, 16, 3), 64, value_range=(-3.0, 5.0), seed=1)
    assert batch.min() < -2.9 and batch.max() > 4.9
    assert 0.0 < batch.mean() < 2.0 and batch.std() > 0.8
    whole = generator((16, 16, 1), 32, value_range=(0, 5), dtype="uint8", seed=2)
    assert np.unique(whole).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("generator", GENERATORS)
def test_a_seed_repeats_the_batch_and_the_global_generator_is_left_alone(generator):
    np.random.seed(6)
    expected = np.random.random()
    np.random.seed(6)
    batches = [generator((6, 6, 2), 3, seed=seed) for seed in (4, 4, 5, None)]
    assert np.random.random() == expected
    np.testing.assert_array_equal(batches[0], batches[1])
    assert not np.array_equal(batches[0], batches[2])
    np.random.seed(6)
    assert not np.array_equal(batches[3], generator((6, 6, 2), 3))


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"shape": (4, 0, 1)}, ValueError, r"shape=\(4, 0, 1\)"),
        ({"shape": (None, 4, 4, 1)}, ValueError, "Leave out the batch dimension"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"value_range": (1.0, 1.0)}, ValueError, r"below its high end.*\(1.0, 1.0\)"),
        ({"value_range": (0.0, math.inf)}, ValueError, "finite.*inf"),
        ({"value_range": (0, 256), "dtype": "uint8"}, ValueError, r"uint8: \[0, 255\].*256"),
        ({"value_range": (0.2, 1.8), "dtype": "int8"}, ValueError, "at least two numbers of int8"),
        ({"dtype": "complex64"}, TypeError, "dtype='complex64'"),
        ({"seed": -1}, ValueError, "non-negative"),
    ],
)
def test_generators_refuse_bad_arguments(change, error, message):
    for generator in GENERATORS:
        with pytest.raises(error, match=message):
            generator(**{"shape": (4, 4, 1), "batch_size": 4, **change})


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: random_fields((5,), 4), "1 to 3 spatial dimensions"),
        (lambda: random_fields((4, 4, 1), 4, exponent=-1.0), "Received: exponent=-1.0"),
        (lambda: random_generators((8, 8), 4), "be height, width, channels"),
        (lambda: dead_leaves((8, 8), 4), "be height, width, channels"),
        (lambda: dead_leaves((8, 8, 1), 4, radius_range=(0.5, 0.1)), "below its high end.*radius_range="),
        (lambda: dead_leaves((8, 8, 1), 4, radius_range=(0.1, 3.0)), r"lie in \[0.01, 2\].*radius_range="),
    ],
)
def test_single_generators_refuse_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_random_generators_make_an_image_each_of_several_scales():
    batch = random_generators((32, 32, 1), 100, dtype="float64", seed=3)  # more than are made at a time
    assert len(np.unique(batch.reshape(100, -1), axis=0)) == 100
    assert -3.5 < spectral_slope(batch) < -1.0  # white noise has 0
    slopes = [spectral_slope(image[None]) for image in batch]
    assert np.std(slopes) > 0.3 > np.std([spectral_slope(image[None]) for image in random_fields((32, 32, 1), 100)])


def test_uniform_noise_is_uniform_and_independent():
    assert [uniform_noise(shape, 4).ndim for shape in ((), (7,), (2, 3, 4, 5, 2))] == [1, 2, 6]
    batch = uniform_noise((100,), 200, value_range=(-2.0, 6.0), dtype="float64", seed=7)
    unit = (batch + 2.0) / 8.0
    assert stats.kstest(unit.ravel(), "uniform").pvalue > 1e-3
    assert stats.kstest(unit.ravel() ** 1.05, "uniform").pvalue < 1e-3  # the test can fail
    products = ((unit[:, :-1] - 0.5) * (unit[:, 1:] - 0.5)).ravel() * 12
    assert abs(products.sum()) / math.sqrt(products.size) < 3.5


def spectral_slope(batch: np.ndarray) -> float:
    """Fits log power against log frequency over all frequencies but 0; spatial axes 1 to -2."""
    spatial = batch.shape[1:-1]
    axes = tuple(range(1, 1 + len(spatial)))
    power = (np.abs(np.fft.fftn(batch, axes=axes)) ** 2).mean(axis=(0, -1)).ravel()
    grid = np.meshgrid(*[np.fft.fftfreq(length) for length in spatial], indexing="ij")
    frequency = np.sqrt(sum(component**2 for component in grid)).ravel()
    kept = frequency > 0
    return float(np.polyfit(np.log(frequency[kept]), np.log(power[kept]), 1)[0])


@pytest.mark.parametrize(
    "shape, exponent", [((64, 2), 2.0), ((32, 32, 2), 0.0), ((31, 16, 1), 1.0), ((12, 12, 12, 1), 3.0)]
)
def test_random_fields_have_the_spectrum(shape, exponent):
    batch = random_fields(shape, 300, exponent=exponent, dtype="float64", seed=10)
    # Stretching to the range weighs examples differently and so cannot change the slope.
    assert spectral_slope(batch) == pytest.approx(-exponent, abs=0.06)


def test_random_fields_fill_the_range_in_every_example_that_has_one():
    assert random_fields((4, 4, 1)).shape == (32, 4, 4, 1)
    batch = random_fields((8, 8, 3), 20, dtype="uint8", value_range=(0, 255), seed=12)
    assert np.all(batch.min(axis=(1, 2, 3)) == 0) and np.all(batch.max(axis=(1, 2, 3)) == 255)
    steep = random_fields((16, 16, 1), 4, exponent=1e4, seed=15)
    assert np.all(np.isfinite(steep)) and steep.max() == 1.0 and steep.min() == 0.0
    single = random_fields((1, 1), 2000, dtype="float64", seed=14)
    assert stats.kstest(single.ravel(), "uniform").pvalue > 1e-3


def equal_neighbours(batch: np.ndarray) -> np.ndarray:
    """Returns the share of horizontal neighbours of one colour, for each column border."""
    return np.all(batch[:, :, 1:] == batch[:, :, :-1], axis=-1).mean(axis=(0, 1))


def test_dead_leaves_have_flat_areas_as_large_as_their_radii_and_edges():
    flat, small, large = (
        equal_neighbours(dead_leaves((32, 32, 3), 50, radius_range=radii, seed=16)).mean()
        for radii in ((0.05, 0.5), (0.05, 0.1), (0.3, 1.0))
    )
    assert 0.6 < flat < 0.95 and small < large - 0.2
    assert equal_neighbours(uniform_noise((32, 32, 3), 100, seed=16)).mean() < 0.01


@pytest.mark.parametrize(
    "batch,arguments,expected_type",
    [
        ([[1, 2], [3, 4]], {}, np.array([1]).dtype),
        (np.zeros((2, 3), "float64"), {"dtype": "float32"}, "float32"),
        (np.zeros((9, 5, 7, 1)), {"expected_shape": (None, None, None, 1)}, "float64"),
        (np.array([[0.1], [0.3]]), {"value_range": (0.1, 0.3), "dtype": "float16"}, "float16"),
        (np.array([[0], [255]], "uint8"), {"value_range": (0.0, 255.0)}, "uint8"),
    ],
)
def test_validate_batch_returns_the_values(batch, arguments, expected_type):
    checked = validate_batch(batch, **arguments)
    assert isinstance(checked, np.ndarray) and checked.dtype == np.dtype(expected_type)
    np.testing.assert_array_equal(checked, np.asarray(batch).astype(expected_type))


ZEROS = np.zeros((4, 3))


@pytest.mark.parametrize(
    "batch,arguments,error,message",
    [
        (ZEROS, {"expected_shape": (None, 4)}, ValueError, r"\(None, 4\).*shape=\(4, 3\)"),
        (ZEROS[:1], {"name": "other"}, ValueError, r"`other.shape` must have at least 2 rows.*shape=\(1, 3\)"),
        (ZEROS[:, :0], {}, ValueError, r"at least 2 rows with values.*shape=\(4, 0\)"),
        (np.where(np.eye(4, 3) > 0, np.nan, 0.0), {}, ValueError, "3 values NaN or infinite"),
        (ZEROS > 0, {}, TypeError, "real float or integer.*bool"),
        (ZEROS, {"dtype": "int32"}, TypeError, "be an integer type.*int32.*float64"),
        (ZEROS.astype(int) + 256, {"dtype": "uint8"}, ValueError, r"uint8.*\[256, 256\]"),
        (ZEROS + 1.01, {"value_range": (0, 1)}, ValueError, r"lie in \[0, 1\].*\[1.01, 1.01\]"),
    ],
)
def test_validate_batch_refuses(batch, arguments, error, message):
    with pytest.raises(error, match=message):
        validate_batch(batch, **arguments)


PRIVATE = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 1))


@pytest.mark.parametrize("kind", ["uint8", "float64", "float32"])
def test_training_rows_in_a_public_batch_are_counted_in_the_batchs_type(kind):
    batch = np.concatenate([PRIVATE[7:9], PRIVATE[:1] + 1, PRIVATE[7:8]]).astype("float32") / 255
    training = PRIVATE.astype(kind) / np.asarray(255, "float32" if kind == "float32" else "float64")
    assert public_data.count_common_rows([batch], [training]) == 3
    whole = np.concatenate([PRIVATE[40:], PRIVATE[40:] + 1]).astype("float32")
    assert public_data.count_common_rows([whole], [PRIVATE.astype(kind)]) == 10


def test_rows_of_one_value_and_rows_of_other_shapes_are_not_counted():
    blank = np.full((3, 4, 4, 1), 0.5, "float32")
    assert public_data.count_common_rows([blank], [np.repeat(blank, 9, 0)]) == 0
    assert public_data.count_common_rows([PRIVATE[:3]], [PRIVATE.reshape(50, 16)]) == 0
    assert public_data.count_common_rows([PRIVATE[:3]], [PRIVATE, PRIVATE]) == 0
    assert public_data.count_common_rows([np.arange(4)], [np.arange(4)]) == 0


def test_a_row_of_several_inputs_is_common_if_all_of_it_is():
    kinds = np.arange(50) % 3
    assert public_data.count_common_rows([PRIVATE[:6], kinds[:6]], [PRIVATE, kinds]) == 6
    assert public_data.count_common_rows([PRIVATE[:6], kinds[1:7]], [PRIVATE, kinds]) == 0


def test_rows_that_look_alike_where_they_are_compared_first_are_compared_in_full():
    training = np.zeros((20, 4000), "float32")
    training[np.arange(20), np.arange(20) * 7 + 1] = 1.0
    batch = np.zeros((2, 4000), "float32")
    batch[0, 8], batch[1, 9] = 1.0, 1.0
    assert public_data.count_common_rows([batch], [training]) == 1


def test_of_memory_mapped_arrays_the_beginning_is_read(tmp_path):
    mapped = np.memmap(tmp_path / "x", "uint8", "w+", shape=(20_000, 4))
    mapped[:] = np.random.default_rng(0).integers(0, 256, mapped.shape)
    assert public_data.count_common_rows([np.asarray(mapped[:5])], [mapped]) == 5
    assert public_data.count_common_rows([np.array([[1, 2, 3, 4], [5, 6, 7, 8]])], [mapped]) == 0
