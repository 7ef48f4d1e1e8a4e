"""Synthetic public batches, and the check that every public batch has to pass.

A public batch feeds the normalization statistics, so it must not hold private examples. The three
generators look at no data at all, so nobody needs public data to train:

| generator       | what it draws                           | shape of an example                 |
| --------------- | --------------------------------------- | ----------------------------------- |
| `uniform_noise` | independent uniform values              | any                                 |
| `random_fields` | smooth fields with a power-law spectrum | 1 to 3 spatial dimensions, channels |
| `dead_leaves`   | discs and rectangles hiding one another | height, width, channels             |

All return one array of shape [batch_size, *shape]. Numpy only.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tf_dpbn import _dead_leaves, _validate

_ROWS_READ = 10_000  # of a memory-mapped array, each of which costs a page or more
_LARGEST_WHOLE = 2**53  # float64, in which values are scaled, counts every whole number up to here


def uniform_noise(
    shape: Sequence[int],
    batch_size: int = 128,
    *,
    value_range: tuple[float, float] = (0.0, 1.0),
    dtype: Any = "float32",
    seed: int | None = None,
) -> np.ndarray:
    """Draws independent uniform values.

    Args:
      shape: shape of one example, without the batch dimension; `()` for scalars.
      batch_size: number of examples.
      value_range: lowest and highest value. Give the range of the model's inputs: (0, 255) for
        unscaled images. Integer dtypes take each whole number of the range equally often.
      dtype: a real float or integer numpy dtype.
      seed: makes the draw repeatable; None draws from the operating system's entropy.

    Returns:
      An array of `dtype` and shape [batch_size, *shape] with values inside `value_range`.

    Raises:
      ValueError: bad `shape`, `batch_size` or `seed`; `value_range` empty, not finite or outside
        the range of `dtype`.
      TypeError: `dtype` is not a real float or integer type.
    """
    lengths = _checked_shape(shape)
    count = _validate.positive_int("batch_size", batch_size)
    scale = _checked_scale(value_range, dtype)
    return scale.apply(_generator(seed).random((count, *lengths)))


def random_fields(
    shape: Sequence[int],
    batch_size: int = 128,
    *,
    exponent: float = 3.0,
    value_range: tuple[float, float] = (0.0, 1.0),
    dtype: Any = "float32",
    seed: int | None = None,
) -> np.ndarray:
    """Draws smooth Gaussian random fields, each example stretched to fill the range.

    White noise is filtered in the Fourier domain so that its power falls as frequency^-exponent,
    frequency in cycles per position, the same in all directions. The fields wrap around at the
    borders; channels are independent. Photographs have an exponent near 2 (Field, "Relations
    between the statistics of natural images and the response properties of cortical cells", 1987).

    Args:
      shape: shape of one example: 1 to 3 spatial dimensions, then channels.
      batch_size: number of examples.
      exponent: decay of the power spectrum, at least 0; 0 is white noise, larger is smoother.
      value_range: lowest and highest value of every example. An example with a single position
        cannot be stretched; it gets one uniform value.
      dtype: as for `uniform_noise`.
      seed: as for `uniform_noise`.

    Returns:
      An array of `dtype` and shape [batch_size, *shape] with values inside `value_range`.

    Raises:
      ValueError, TypeError: as `uniform_noise`; also a bad `exponent`.
    """
    lengths = _checked_shape(shape, ranks=(2, 3, 4), layout="1 to 3 spatial dimensions, then channels")
    count = _validate.positive_int("batch_size", batch_size)
    decay = _validate.non_negative("exponent", exponent)
    scale = _checked_scale(value_range, dtype)
    rng = _generator(seed)

    spatial = lengths[:-1]
    axes = tuple(range(1, 1 + len(spatial)))
    spectrum = np.fft.rfftn(rng.standard_normal((count, *lengths)), axes=axes)
    spectrum *= _spectral_amplitude(spatial, decay)[None, ..., None]
    fields = np.fft.irfftn(spectrum, s=spatial, axes=axes)
    return scale.apply(_stretched(fields, rng))


def dead_leaves(
    shape: Sequence[int],
    batch_size: int = 128,
    *,
    radius_range: tuple[float, float] = (0.05, 0.5),
    value_range: tuple[float, float] = (0.0, 1.0),
    dtype: Any = "float32",
    seed: int | None = None,
) -> np.ndarray:
    """Draws images of discs and rectangles of random colours that lie on top of one another.

    The dead leaves model (Lee, Mumford, Huang, "Occlusion models for natural images", 2001): the
    density of the radii is proportional to radius^-3, which gives edges at all scales, as in
    photographs. Half of the leaves are discs, half randomly turned rectangles with their corners
    at the radius. Colours are uniform in the range, channels independent.

    Args:
      shape: height, width, channels of one image.
      batch_size: number of images.
      radius_range: smallest and largest radius in units of the image's shorter side, within
        [0.01, 2]. The number of leaves, and with it the time, grows as the smallest radius^-2.
      value_range: as for `uniform_noise`.
      dtype: as for `uniform_noise`.
      seed: as for `uniform_noise`.

    Returns:
      An array of `dtype` and shape [batch_size, *shape] with values inside `value_range`.

    Raises:
      ValueError, TypeError: as `uniform_noise`; also a bad `radius_range`.
    """
    height, width, channels = _checked_shape(shape, ranks=(3,), layout="height, width, channels")
    count = _validate.positive_int("batch_size", batch_size)
    smallest, largest = (min(height, width) * radius for radius in _checked_radii(radius_range))
    scale = _checked_scale(value_range, dtype)
    rng = _generator(seed)

    images = _dead_leaves.draw_images(rng, count, (height, width), channels, (smallest, largest))
    return scale.apply(images)


def validate_batch(
    batch: Any,
    *,
    expected_shape: Sequence[int | None] | None = None,
    dtype: Any = None,
    value_range: tuple[float, float] | None = None,
    name: str = "public_batch",
) -> np.ndarray:
    """Checks a public batch and returns it as a numpy array.

    Args:
      batch: an array of shape [batch, ...].
      expected_shape: the shape with None where any length will do: (None, 28, 28, 1).
      dtype: dtype of the model's input, to which the batch is cast. Whole numbers may feed a float
        input; floats may not feed an integer input. `object` is that of strings.
      value_range: lowest and highest value allowed, in the precision of the returned array.
      name: what the batch is called in errors.

    Returns:
      The batch as a numpy array, of `dtype` if that was given; strings as an array of bytes.

    Raises:
      ValueError: wrong shape, fewer than 2 rows, no values, or values that are not finite or lie
        outside `value_range` or `dtype`.
      TypeError: `batch` or `dtype` is not of a real float or integer type, or `batch` is float
        where `dtype` is integer.
    """
    array = np.asarray(batch)
    is_text = dtype is not None and np.dtype(dtype) == object
    array = _checked_strings(array, name) if is_text else array
    if not is_text:
        _check_batch_type(array, name)
    if expected_shape is not None:
        _check_batch_shape(array, tuple(expected_shape), name)
    if array.ndim == 0 or array.shape[0] < 2:
        remedy = "Statistics of a single example have no variance; 30 to 256 examples work well."
        raise _validate.argument_error(f"{name}.shape", array.shape, "have at least 2 rows", remedy)
    if array.size == 0:
        raise _validate.argument_error(f"{name}.shape", array.shape, "hold at least one value")
    if is_text:
        return array
    bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    if bad:
        raise ValueError(f"`{name}` must be finite. Received: {bad} values NaN or infinite")
    if dtype is not None:
        array = _cast_batch(array, _checked_dtype(dtype), name)
    if value_range is not None:
        _check_batch_range(array, _checked_range(value_range), name)
    return array


def count_common_rows(batch: Sequence[np.ndarray], training: Sequence[Any]) -> int:
    """How many rows of a public batch are rows of the training data, once these have its dtypes.

    Rows whose values are all the same, blank images say, are not counted: they coincide by chance. Of memory-mapped
    arrays only the first 10,000 rows are read, of text nothing.

    Args:
      batch: numpy arrays [examples, ...], one for each of the model's inputs.
      training: arrays [N, ...] in the same order; where their number or shapes are others, nothing is in common.
    """
    shapes = [tuple(array.shape[1:]) for array in batch]
    if shapes != [tuple(array.shape[1:]) for array in training] or any(a.dtype.kind not in "fiub" for a in batch):
        return 0
    arrays = [np.asarray(a[:_ROWS_READ] if isinstance(a, np.memmap) else a) for a in training]
    if any(array.dtype.kind not in "fiub" for array in arrays):
        return 0
    rows = [i for i in range(len(batch[0])) if any(np.any(array[i] != array[i].flat[0]) for array in batch)]
    if not rows:
        return 0
    public = {_row_bytes(batch, batch, i) for i in rows}
    found = {_row_bytes(arrays, batch, i) for i in _candidates(batch, arrays)} & public
    return sum(_row_bytes(batch, batch, i) in found for i in rows)


def _row_bytes(arrays: Sequence[np.ndarray], like: Sequence[np.ndarray], i: int) -> bytes:
    with np.errstate(all="ignore"):
        return b"".join(array[i].astype(to.dtype).tobytes() for array, to in zip(arrays, like, strict=True))


def _candidates(batch: Sequence[np.ndarray], training: Sequence[np.ndarray]) -> np.ndarray:
    """The numbers of the rows of `training` that equal one of `batch` in a few places, those that tell most apart."""
    widest = max(range(len(batch)), key=lambda k: batch[k][0].size)
    public, private = batch[widest], training[widest]
    shape = public.shape[1:]
    places = np.unique(np.linspace(0, public[0].size - 1, 256).astype(int))
    values_there = public.reshape(len(public), -1)[:, places]
    distinct = [len(np.unique(column)) for column in values_there.T]
    index: Any = (slice(None), *np.unravel_index(np.sort(places[np.argsort(distinct)[-16:]]), shape))
    with np.errstate(all="ignore"):
        parts = [np.ascontiguousarray(array[index].astype(public.dtype)) for array in (public, private)]
    keys, values = (part.view(f"S{part.shape[1] * part.itemsize}").ravel() for part in parts)
    return np.flatnonzero(np.isin(values, keys))


class _Scale(NamedTuple):
    """Maps the unit interval onto the closed range [low, high] of a dtype."""

    low: float
    high: float
    dtype: np.dtype

    def apply(self, unit: np.ndarray) -> np.ndarray:
        """Returns the values of `dtype` for `unit`, float64 in [0, 1]."""
        if self.dtype.kind in "iu":
            # Each whole number owns an equal share of [0, 1]; the clip below catches unit == 1.
            values = np.floor(self.low + unit * (self.high - self.low + 1))
        else:
            values = self.low * (1.0 - unit) + self.high * unit
        # `low` and `high` are numbers of the dtype: rounding cannot carry a value across them.
        return np.clip(values, self.low, self.high).astype(self.dtype)


def _spectral_amplitude(spatial: tuple[int, ...], exponent: float) -> np.ndarray:
    """Returns the amplitude (root of the power) at every frequency of `rfftn` over `spatial`."""
    frequencies = [np.fft.fftfreq(length) for length in spatial]
    frequencies[-1] = np.fft.rfftfreq(spatial[-1])
    grid = np.meshgrid(*frequencies, indexing="ij")
    radius = np.sqrt(sum(np.square(component) for component in grid))
    # Relative to the lowest frequency, so that a large exponent underflows but never overflows.
    # Frequency 0, the mean, gets no power: stretching discards it in any case.
    lowest = radius[radius > 0].min(initial=1.0)
    return np.maximum(radius / lowest, 1.0) ** (-exponent / 2) * (radius > 0)


def _stretched(fields: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Stretches every example of `fields` [batch, ...] to minimum 0 and maximum 1."""
    axes = tuple(range(1, fields.ndim))
    lowest = fields.min(axis=axes, keepdims=True)
    span = fields.max(axis=axes, keepdims=True) - lowest
    constant = span == 0
    unit = (fields - lowest) / np.where(constant, 1.0, span)
    return np.where(constant, rng.random(span.shape), unit)


def _generator(seed: int | None) -> np.random.Generator:
    """Returns a generator apart from numpy's global one, which is neither read nor moved."""
    if seed is None:
        return np.random.default_rng()
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or seed < 0:
        raise _validate.argument_error("seed", seed, "be None or a whole number of at least 0")
    return np.random.default_rng(int(seed))


def _checked_shape(shape: Any, ranks: tuple[int, ...] | None = None, layout: str = "") -> tuple[int, ...]:
    """Returns `shape` as a tuple of positive ints of an allowed rank."""
    remedy = "Leave out the batch dimension: (28, 28, 1), not (None, 28, 28, 1)."
    if isinstance(shape, (str, bytes)) or not isinstance(shape, Sequence | np.ndarray):
        raise _validate.argument_error("shape", shape, "be a sequence of whole numbers", remedy)
    if any(isinstance(n, bool) or not isinstance(n, numbers.Integral) or n < 1 for n in shape):
        raise _validate.argument_error("shape", shape, "hold whole numbers of at least 1", remedy)
    if ranks is not None and len(shape) not in ranks:
        raise _validate.argument_error("shape", shape, f"be {layout}", remedy)
    return tuple(int(length) for length in shape)


def _checked_radii(radius_range: Any) -> tuple[float, float]:
    """Returns the smallest and largest radius, fractions of the shorter side."""
    smallest, largest = _checked_range(radius_range, "radius_range")
    if smallest < 0.01 or largest > 2:
        raise _validate.argument_error("radius_range", radius_range, "lie in [0.01, 2]")
    return float(smallest), float(largest)


def _checked_dtype(dtype: Any) -> np.dtype:
    """Returns the numpy dtype, or raises TypeError unless it is a real float or integer type."""
    remedy = 'Use "float32", or the integer type of the model\'s input.'
    try:
        checked = np.dtype(dtype) if dtype is not None else None
    except TypeError:
        checked = None
    if checked is None or checked.kind not in "fiu":
        requirement = "be a real float or integer type"
        raise _validate.argument_error("dtype", dtype, requirement, remedy, TypeError)
    return checked


def _checked_range(value_range: Any, name: str = "value_range") -> tuple[float, float]:
    """Returns (low, high) as given, finite and in order."""
    bounds = tuple(value_range) if isinstance(value_range, (tuple, list, np.ndarray)) else ()
    finite = all(isinstance(b, numbers.Real) and math.isfinite(b) for b in bounds)
    if len(bounds) != 2 or not finite:
        raise _validate.argument_error(name, value_range, "be a pair of finite numbers (low, high)")
    if not bounds[0] < bounds[1]:
        raise _validate.argument_error(name, value_range, "have its low end below its high end")
    return bounds


def _checked_scale(value_range: Any, dtype: Any) -> _Scale:
    """Returns the scale onto the numbers of `dtype` that lie inside `value_range`."""
    checked = _checked_dtype(dtype)
    low, high = _checked_range(value_range)
    least, most = _limits(checked)
    if checked.kind in "iu":
        least, most = max(least, -_LARGEST_WHOLE), min(most, _LARGEST_WHOLE)
    if low < least or high > most:
        raise _validate.argument_error("value_range", value_range, f"lie inside {checked}: [{least}, {most}]")
    bounds = (math.ceil(low), math.floor(high))
    if checked.kind == "f":
        bounds = _rounded_inward(low, high, checked)
    if not bounds[0] < bounds[1]:
        raise _validate.argument_error("value_range", value_range, f"hold at least two numbers of {checked}")
    return _Scale(float(bounds[0]), float(bounds[1]), checked)


def _limits(dtype: np.dtype) -> tuple[Any, Any]:
    """Returns the finite limits of `dtype` as Python numbers, which compare exactly."""
    if dtype.kind in "iu":
        return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    return float(np.finfo(dtype).min), float(np.finfo(dtype).max)


def _rounded_inward(low: float, high: float, dtype: np.dtype) -> tuple[Any, Any]:
    """Returns the least and the greatest number of the float `dtype` inside [low, high]."""
    # float32(0.1) lies above 0.1: rounding to nearest could leave the range. Float64 is exact.
    cast_low, cast_high = dtype.type(low), dtype.type(high)
    if float(cast_low) < low:
        cast_low = np.nextafter(cast_low, dtype.type(np.inf))
    if float(cast_high) > high:
        cast_high = np.nextafter(cast_high, dtype.type(-np.inf))
    return cast_low, cast_high


def _check_batch_type(array: np.ndarray, name: str) -> None:
    """Raises TypeError unless `array` holds real floats or whole numbers."""
    if array.dtype.kind not in "fiu":
        requirement = "be a real float or integer type"
        remedy = "Convert it to one numeric array with rows of equal shape."
        if array.dtype.kind in "SU":
            remedy = "Strings feed a model whose input is keras.Input(..., dtype='string')."
        raise _validate.argument_error(f"{name}.dtype", array.dtype, requirement, remedy, TypeError)


def _checked_strings(array: np.ndarray, name: str) -> np.ndarray:
    """Returns an array of strings as an array of bytes, as TensorFlow holds them."""
    values = array.reshape(-1).tolist()
    if not all(isinstance(value, (str, bytes)) for value in values):
        remedy = "The model's input is of strings."
        raise _validate.argument_error(f"{name}.dtype", array.dtype, "be strings", remedy, TypeError)
    encoded = np.empty(len(values), object)
    encoded[:] = [value.encode() if isinstance(value, str) else value for value in values]
    return encoded.reshape(array.shape)


def _check_batch_shape(array: np.ndarray, expected: tuple[int | None, ...], name: str) -> None:
    """Raises ValueError unless the shape matches `expected`, where None matches any length."""
    fits = len(expected) == array.ndim and all(
        want is None or want == have for want, have in zip(expected, array.shape, strict=False)
    )
    if not fits:
        remedy = "Give examples of the shape that the model takes, with a batch dimension in front."
        raise _validate.argument_error(f"{name}.shape", array.shape, f"be {expected}", remedy)


def _cast_batch(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Casts to `dtype`, or raises where values would be cut or leave its range."""
    if dtype.kind in "iu" and array.dtype.kind == "f":
        remedy = f"The model's input is {dtype}; give whole numbers, unscaled."
        requirement = "be an integer type"
        raise _validate.argument_error(f"{name}.dtype", array.dtype, requirement, remedy, TypeError)
    least, most = _limits(dtype)
    lowest, highest = array.min().item(), array.max().item()
    if lowest < least or highest > most:
        received = f"values in [{lowest}, {highest}]"
        raise ValueError(f"`{name}` must lie inside the range of {dtype}. Received: {received}")
    return array.astype(dtype)


def _check_batch_range(array: np.ndarray, bounds: tuple[float, float], name: str) -> None:
    """Raises ValueError if values lie outside `bounds`, both taken in the precision of `array`."""
    low, high = bounds
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # a bound beyond a narrow type becomes infinite: no bound
            low, high = array.dtype.type(low), array.dtype.type(high)
    lowest, highest = array.min().item(), array.max().item()
    if lowest < low or highest > high:
        remedy = "Scale it as the private inputs are scaled."
        received = f"values in [{lowest}, {highest}]"
        limits = f"[{bounds[0]}, {bounds[1]}]"
        raise ValueError(f"`{name}` must lie in {limits}. {remedy} Received: {received}")
