"""Synthetic public batches, and the check that every public batch has to pass. Needs no TensorFlow.

A public batch feeds the normalization statistics, so it must not hold private examples. The four generators look at no
data at all, so nobody needs public data to train:

| generator           | what it draws                           | shape of an example                 |
| ------------------- | --------------------------------------- | ----------------------------------- |
| `uniform_noise`     | independent uniform values              | any                                 |
| `random_fields`     | smooth fields with a power-law spectrum | 1 to 3 spatial dimensions, channels |
| `dead_leaves`       | discs and rectangles hiding one another | height, width, channels             |
| `random_generators` | outputs of untrained generator networks | height, width, channels             |

All return one array of shape [batch_size, *shape].
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from tf_dpbn import _validate

_ROWS_READ = 10_000  # of a memory-mapped array, each of which costs a page or more
_LAYERS_OF_LEAVES = 5.0  # mean number of leaves over a pixel; exp(-5) = 0.7% stays background
# Mean of area / radius^2: pi for a disc; 2 sin(2 t), t uniform in [pi/8, 3 pi/8], for a rectangle.
_LEAF_AREA = (math.pi + 4 * math.sqrt(2) / math.pi) / 2
_GENERATOR_WIDTH = 16  # feature maps of the random generators
_GENERATORS_AT_ONCE = 64  # which bounds their memory


def uniform_noise(
    shape: Sequence[int],
    batch_size: int = 32,
    *,
    value_range: tuple[float, float] = (0.0, 1.0),
    dtype: Any = "float32",
    seed: int | None = None,
) -> np.ndarray:
    """Draws independent uniform values.

    Args:
      shape: shape of one example, without the batch dimension; `()` for scalars.
      batch_size: number of examples.
      value_range: lowest and highest value. Give the range of the model's inputs: (0, 255) for unscaled images. Integer
        dtypes take each whole number of the range equally often.
      dtype: a real float or integer numpy dtype.
      seed: makes the draw repeatable; None draws from the operating system's entropy. Numpy's global generator is
        neither read nor moved.

    Returns:
      An array of `dtype` and shape [batch_size, *shape] with values inside `value_range`.

    Raises:
      ValueError: bad `shape`, `batch_size` or `seed`; `value_range` empty, non-finite or outside the range of `dtype`.
      TypeError: `dtype` is not a real float or integer type, or `seed` is no integer.
    """
    lengths = _checked_shape(shape)
    count = _validate.positive_int("batch_size", batch_size)
    return _scaled(np.random.default_rng(seed).random((count, *lengths)), value_range, dtype)


def random_fields(
    shape: Sequence[int],
    batch_size: int = 32,
    *,
    exponent: float = 3.0,
    value_range: tuple[float, float] = (0.0, 1.0),
    dtype: Any = "float32",
    seed: int | None = None,
) -> np.ndarray:
    """Draws smooth Gaussian random fields, each example stretched to fill the range.

    White noise is filtered in the Fourier domain so that its power falls as frequency^-exponent, frequency in cycles
    per position, the same in all directions. The fields wrap around at the borders; channels are independent.
    Photographs have an exponent near 2 (Field, "Relations between the statistics of natural images and the response
    properties of cortical cells", 1987).

    Args:
      shape: shape of one example: 1 to 3 spatial dimensions, then channels.
      batch_size: number of examples.
      exponent: decay of the power spectrum, at least 0; 0 is white noise, larger is smoother.
      value_range: lowest and highest value of every example. An example with a single position cannot be stretched; it
        gets one uniform value.
      dtype, seed: as for `uniform_noise`.

    Returns:
      An array of `dtype` and shape [batch_size, *shape] with values inside `value_range`.

    Raises:
      ValueError, TypeError: as `uniform_noise`; also a bad `exponent`.
    """
    lengths = _checked_shape(shape, ranks=(2, 3, 4), layout="1 to 3 spatial dimensions, then channels")
    count = _validate.positive_int("batch_size", batch_size)
    decay = _validate.non_negative("exponent", exponent)
    rng = np.random.default_rng(seed)
    spatial = lengths[:-1]
    axes = tuple(range(1, 1 + len(spatial)))
    spectrum = np.fft.rfftn(rng.standard_normal((count, *lengths)), axes=axes)
    spectrum *= _spectral_amplitude(spatial, decay)[None, ..., None]
    fields = np.fft.irfftn(spectrum, s=spatial, axes=axes)
    return _scaled(_stretched(fields, rng), value_range, dtype)


def dead_leaves(
    shape: Sequence[int],
    batch_size: int = 32,
    *,
    radius_range: tuple[float, float] = (0.05, 0.5),
    value_range: tuple[float, float] = (0.0, 1.0),
    dtype: Any = "float32",
    seed: int | None = None,
) -> np.ndarray:
    """Draws images of discs and rectangles of random colours that lie on top of one another.

    The dead leaves model (Lee, Mumford, Huang, "Occlusion models for natural images: a statistical study of a
    scale-invariant dead leaves model", International Journal of Computer Vision 41, 2001): the density of the radii is
    proportional to radius^-3, which gives edges at all scales, as in photographs. Half of the leaves are discs, half
    randomly turned rectangles with their corners at the radius. Colours are uniform in the range, channels independent.

    Args:
      shape: height, width, channels of one image.
      batch_size: number of images.
      radius_range: smallest and largest radius in units of the image's shorter side, within [0.01, 2]. The number of
        leaves, and with it the time, grows as the smallest radius^-2.
      value_range, dtype, seed: as for `uniform_noise`.

    Returns:
      An array of `dtype` and shape [batch_size, *shape] with values inside `value_range`.

    Raises:
      ValueError, TypeError: as `uniform_noise`; also a bad `radius_range`.
    """
    height, width, channels = _checked_shape(shape, ranks=(3,), layout="height, width, channels")
    count = _validate.positive_int("batch_size", batch_size)
    radii = _checked_range(radius_range, "radius_range")
    if radii[0] < 0.01 or radii[1] > 2:
        raise _validate.argument_error("radius_range", radius_range, "lie in [0.01, 2]")
    rng = np.random.default_rng(seed)
    images = np.tile(rng.random((count, 1, 1, channels)), (1, height, width, 1))  # of one colour each
    for image in images:
        _paint_leaves(image, rng, *(min(height, width) * float(radius) for radius in radii))
    return _scaled(images, value_range, dtype)


def random_generators(
    shape: Sequence[int],
    batch_size: int = 32,
    *,
    value_range: tuple[float, float] = (0.0, 1.0),
    dtype: Any = "float32",
    seed: int | None = None,
) -> np.ndarray:
    """Draws the outputs of untrained image generators, each example from one with random weights of its own.

    In the spirit of the untrained StyleGAN2 of Baradad et al., "Learning to See by Looking at Noise" (2021, arXiv
    2106.05963), and much simpler: from random features of 4x4, blocks of a 3x3 convolution, a noise map that is added
    to all features with random strengths, random biases and a leaky ReLU, each at twice the resolution of the one
    before; an image is the sum over blocks of linear combinations of their features. There is no style modulation, and
    none of the wavelet kernels of their "oriented" variant.

    Args:
      shape: height, width, channels of one image.
      batch_size: number of images.
      value_range: lowest and highest value of every example, as for `random_fields`.
      dtype, seed: as for `uniform_noise`.

    Returns:
      An array of `dtype` and shape [batch_size, *shape] with values inside `value_range`.

    Raises:
      ValueError, TypeError: as `uniform_noise`.
    """
    height, width, channels = _checked_shape(shape, ranks=(3,), layout="height, width, channels")
    count = _validate.positive_int("batch_size", batch_size)
    rng = np.random.default_rng(seed)
    images = np.empty((count, height, width, channels))
    for first in range(0, count, _GENERATORS_AT_ONCE):
        part = images[first : first + _GENERATORS_AT_ONCE]
        part[:] = _generated(rng, len(part), max(height, width), channels)[:, :height, :width]
    return _scaled(_stretched(images, rng), value_range, dtype)


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
      dtype: dtype of the model's input, to which the batch is cast. Whole numbers may feed a float input; floats may
        not feed an integer input. `object` is that of strings.
      value_range: lowest and highest value allowed, in the precision of the returned array.
      name: what the batch is called in errors.

    Returns:
      The batch as a numpy array, of `dtype` if that was given; strings as an array of bytes.

    Raises:
      ValueError: wrong shape, fewer than 2 rows, no values, or values that are non-finite or lie outside `value_range`
        or `dtype`.
      TypeError: `batch` or `dtype` is not of a real float or integer type, or `batch` is float where `dtype` is
        integer.
    """
    array = np.asarray(batch)
    is_text = dtype is not None and np.dtype(dtype) == object
    if is_text:
        array = _bytes_of(array, name)
    elif array.dtype.kind not in "fiu":
        remedy = "Convert it to one numeric array with rows of equal shape."
        if array.dtype.kind in "SU":
            remedy = "Strings feed a model whose input is keras.Input(..., dtype='string')."
        requirement = "be a real float or integer type"
        raise _validate.argument_error(f"{name}.dtype", array.dtype, requirement, remedy, TypeError)
    if expected_shape is not None:
        expected = tuple(expected_shape)
        same_rank = len(expected) == array.ndim
        if not same_rank or any(w not in (None, n) for w, n in zip(expected, array.shape, strict=True)):
            remedy = "Give examples of the shape that the model takes, with a batch dimension in front."
            raise _validate.argument_error(f"{name}.shape", array.shape, f"be {expected}", remedy)
    if array.ndim == 0 or array.shape[0] < 2 or array.size == 0:
        remedy = "Statistics of a single example have no variance; 30 to 256 examples work well."
        raise _validate.argument_error(f"{name}.shape", array.shape, "have at least 2 rows with values", remedy)
    if is_text:
        return array
    bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    if bad:
        raise ValueError(f"`{name}` must be finite. Received: {bad} values NaN or infinite")
    if dtype is not None:
        to = _checked_dtype(dtype)
        if to.kind in "iu" and array.dtype.kind == "f":
            remedy = f"The model's input is {to}; give whole numbers, unscaled."
            raise _validate.argument_error(f"{name}.dtype", array.dtype, "be an integer type", remedy, TypeError)
        _check_values(array, *_limits(to), name, f"lie inside the range of {to}.")
        array = array.astype(to)
    if value_range is not None:
        low, high = _checked_range(value_range)
        requirement = f"lie in [{low}, {high}]. Scale it as the private inputs are scaled."
        if array.dtype.kind == "f":
            with np.errstate(over="ignore"):  # a bound beyond a narrow type becomes infinite: no bound
                low, high = array.dtype.type(low), array.dtype.type(high)
        _check_values(array, low, high, name, requirement)
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
    """The numbers of the rows of `training` that equal one of `batch` in a few places."""
    widest = max(range(len(batch)), key=lambda k: batch[k][0].size)
    public, private = batch[widest], training[widest]
    shape = public.shape[1:]
    places = np.unique(np.linspace(0, public[0].size - 1, 64).astype(int))
    index: Any = (slice(None), *np.unravel_index(places, shape))
    with np.errstate(all="ignore"):
        parts = [np.ascontiguousarray(array[index].astype(public.dtype)) for array in (public, private)]
    keys, values = (part.view(f"S{part.shape[1] * part.itemsize}").ravel() for part in parts)
    return np.flatnonzero(np.isin(values, keys))


def _spectral_amplitude(spatial: tuple[int, ...], exponent: float) -> np.ndarray:
    """Returns the amplitude (root of the power) at every frequency of `rfftn` over `spatial`."""
    frequencies = [*map(np.fft.fftfreq, spatial[:-1]), np.fft.rfftfreq(spatial[-1])]
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
    return np.where(span == 0, rng.random(span.shape), (fields - lowest) / np.where(span == 0, 1.0, span))


def _paint_leaves(image: np.ndarray, rng: np.random.Generator, smallest: float, largest: float) -> None:
    """Paints leaves of all radii, pixels, over `image` [height, width, channels] in place, the lowest leaf first."""
    size = np.asarray(image.shape[:2])
    # Centres also lie outside, up to the largest radius, so that borders look like the middle.
    area = float(np.prod(size + 2 * largest))
    mean_square = 2 * math.log(largest / smallest) / (smallest**-2 - largest**-2)
    count = math.ceil(_LAYERS_OF_LEAVES * area / (mean_square * _LEAF_AREA))

    # Inverse of the distribution function of the density radius^-3 on [smallest, largest].
    radii = (smallest**-2 - rng.random(count) * (smallest**-2 - largest**-2)) ** -0.5
    centers = rng.uniform(-largest, size + largest, size=(count, 2))
    is_disc = rng.random(count) < 0.5
    corner = rng.uniform(math.pi / 8, 3 * math.pi / 8, size=count)
    half_sides = radii[:, None] * np.stack([np.cos(corner), np.sin(corner)], axis=1)
    angles = rng.uniform(0.0, math.pi, size=count)
    colors = rng.random((count, image.shape[-1]))

    outside = np.maximum(-centers, centers - size).max(axis=1)
    for i in np.flatnonzero(outside < radii):
        radius, angle = float(radii[i]), float(angles[i])
        rows, row_slice = _window(float(centers[i, 0]), radius, image.shape[0])
        columns, column_slice = _window(float(centers[i, 1]), radius, image.shape[1])
        rows, columns = rows[:, None], columns[None, :]
        if is_disc[i]:
            covered = rows**2 + columns**2 <= radius**2
        else:
            along = rows * math.cos(angle) + columns * math.sin(angle)
            across = columns * math.cos(angle) - rows * math.sin(angle)
            covered = (np.abs(along) <= half_sides[i, 0]) & (np.abs(across) <= half_sides[i, 1])
        image[row_slice, column_slice][covered] = colors[i]


def _generated(rng: np.random.Generator, count: int, size: int, channels: int) -> np.ndarray:
    """Images [count, side, side, channels] of as many random generators; side is a power of two, at least `size`."""

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal((count, *shape), np.float32)

    width, side = _GENERATOR_WIDTH, 4
    features, images = normal(side, side, width), np.zeros((count, side, side, channels), np.float32)
    while True:
        padded = np.pad(features, ((0, 0), (1, 1), (1, 1), (0, 0)), "edge")
        patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
        patches = patches.reshape(count, side * side, 9 * width)
        # He's variance, which keeps the features' from block to block, each generator with kernels of its own.
        features = patches @ (normal(9 * width, width) * math.sqrt(2 / (9 * width)))
        features += normal(side * side, 1) * normal(1, width) * 0.3 + normal(1, width) * 0.3
        features = np.where(features > 0, features, 0.2 * features)
        images += (features @ normal(width, channels)).reshape(images.shape)
        features = features.reshape(count, side, side, width)
        if side >= size:
            return images
        features, images = (_doubled(_doubled(maps, 1), 2) for maps in (features, images))
        side *= 2


def _doubled(maps: np.ndarray, axis: int) -> np.ndarray:
    """Interpolates linearly to twice the length of an axis."""
    previous, following = (np.take(maps, index, axis) for index in _neighbours(maps.shape[axis]))
    pairs = np.stack([0.75 * maps + 0.25 * previous, 0.75 * maps + 0.25 * following], axis + 1)
    return pairs.reshape(*maps.shape[:axis], -1, *maps.shape[axis + 1 :])


def _neighbours(length: int) -> tuple[np.ndarray, np.ndarray]:
    positions = np.arange(length)
    return np.maximum(positions - 1, 0), np.minimum(positions + 1, length - 1)


def _window(center: float, radius: float, length: int) -> tuple[np.ndarray, slice]:
    """Returns the pixels of an axis, centres at halves, within `radius` of `center`: offsets from it, and a slice."""
    first = max(0, math.floor(center - radius))
    last = min(length, math.ceil(center + radius))
    return np.arange(first, last) + 0.5 - center, slice(first, last)


def _checked_shape(shape: Any, ranks: tuple[int, ...] | None = None, layout: str = "") -> tuple[int, ...]:
    remedy = "Leave out the batch dimension: (28, 28, 1), not (None, 28, 28, 1)."
    integers = isinstance(shape, Sequence | np.ndarray) and all(isinstance(n, (int, np.integer)) for n in shape)
    if not integers or any(n < 1 for n in shape):
        raise _validate.argument_error("shape", shape, "hold whole numbers of at least 1", remedy)
    if ranks is not None and len(shape) not in ranks:
        raise _validate.argument_error("shape", shape, f"be {layout}", remedy)
    return tuple(int(length) for length in shape)


def _checked_dtype(dtype: Any) -> np.dtype:
    checked = np.dtype(dtype)
    if checked.kind not in "fiu":
        remedy = 'Use "float32", or the integer type of the model\'s input.'
        raise _validate.argument_error("dtype", dtype, "be a real float or integer type", remedy, TypeError)
    return checked


def _checked_range(value_range: Any, name: str = "value_range") -> tuple[float, float]:
    bounds = tuple(value_range) if isinstance(value_range, (tuple, list, np.ndarray)) else ()
    if len(bounds) != 2 or not all(isinstance(b, numbers.Real) and math.isfinite(b) for b in bounds):
        raise _validate.argument_error(name, value_range, "be a pair of finite numbers (low, high)")
    if not bounds[0] < bounds[1]:
        raise _validate.argument_error(name, value_range, "have its low end below its high end")
    return bounds


def _scaled(unit: np.ndarray, value_range: Any, dtype: Any) -> np.ndarray:
    """Maps values in [0, 1], float64, onto the numbers of `dtype` that lie inside `value_range`."""
    checked = _checked_dtype(dtype)
    low, high = _checked_range(value_range)
    least, most = _limits(checked)
    if low < least or high > most:
        raise _validate.argument_error("value_range", value_range, f"lie inside {checked}: [{least}, {most}]")
    if checked.kind == "f":
        # float32(0.1) lies above 0.1: rounding to nearest could leave the range. Float64 is exact.
        first, last = checked.type(low), checked.type(high)
        first = float(np.nextafter(first, checked.type(np.inf)) if float(first) < low else first)
        last = float(np.nextafter(last, checked.type(-np.inf)) if float(last) > high else last)
        values = first * (1.0 - unit) + last * unit
    else:
        first, last = math.ceil(low), math.floor(high)
        # Each whole number owns an equal share of [0, 1]; the clip below catches unit == 1.
        values = np.floor(first + unit * (last - first + 1.0))
    if not first < last:
        raise _validate.argument_error("value_range", value_range, f"hold at least two numbers of {checked}")
    # `first` and `last` are numbers of the dtype: rounding cannot carry a value across them.
    return np.clip(values, first, last).astype(checked)


def _limits(dtype: np.dtype) -> tuple[Any, Any]:
    """Returns the finite limits of `dtype` as Python numbers, which compare exactly."""
    if dtype.kind in "iu":
        return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    return float(np.finfo(dtype).min), float(np.finfo(dtype).max)


def _bytes_of(array: np.ndarray, name: str) -> np.ndarray:
    """Returns an array of strings as an array of bytes, as TensorFlow holds them."""
    values = array.reshape(-1).tolist()
    if not all(isinstance(value, (str, bytes)) for value in values):
        remedy = "The model's input is of strings."
        raise _validate.argument_error(f"{name}.dtype", array.dtype, "be strings", remedy, TypeError)
    encoded = np.empty(len(values), object)
    encoded[:] = [value.encode() if isinstance(value, str) else value for value in values]
    return encoded.reshape(array.shape)


def _check_values(array: np.ndarray, low: Any, high: Any, name: str, requirement: str) -> None:
    lowest, highest = array.min().item(), array.max().item()
    if lowest < low or highest > high:
        raise ValueError(f"`{name}` must {requirement} Received: values in [{lowest}, {highest}]")
