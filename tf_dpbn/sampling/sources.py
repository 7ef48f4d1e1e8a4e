"""Examples by their numbers: arrays in memory or on disk, and sources that are read one example at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from tf_dpbn import _validate
from tf_dpbn._keras import keras

_CHUNKS = 64  # into which the examples of a batch are divided among the threads


class Rows(Protocol):
    """Random access to examples.

    Attributes:
      specs: nest of tf.TensorSpec of one example.
      lengths: how many examples each of its parts has.
    """

    specs: Any
    lengths: list[int]

    def read(self, indices: np.ndarray) -> list[np.ndarray]:
        """For each spec the rows [len(indices), ...]; where an index is negative, zeros or empty strings."""


class ArrayRows:
    """Examples that lie in a nest of arrays, [N, ...] each; see `poisson_dataset`.

    Attributes:
      arrays: them, without structure.
      specs, lengths: see Rows.
    """

    def __init__(self, name: str, nest: Any) -> None:
        arrays = _as_arrays(name, nest)
        self.arrays: list[np.ndarray] = tf.nest.flatten(arrays)
        self.lengths = [len(array) for array in self.arrays]
        self._types = [_tensor_type(array) for array in self.arrays]
        specs = [tf.TensorSpec(a.shape[1:], dtype) for a, dtype in zip(self.arrays, self._types, strict=True)]
        self.specs = tf.nest.pack_sequence_as(arrays, specs)

    def read(self, indices: np.ndarray) -> list[np.ndarray]:
        """See Rows."""
        gathered = [np.take(array, np.maximum(indices, 0), axis=0) for array in self.arrays]
        for rows in gathered:
            rows[indices < 0] = b"" if rows.dtype == object else 0
        # In the machine's byte order.
        return [a.astype(kind.as_numpy_dtype, copy=False) for a, kind in zip(gathered, self._types, strict=True)]


class LoadedRows:
    """Examples that a function makes of the elements of a source, in several threads.

    Args:
      source: a sequence, or whatever else has `__len__` and `__getitem__`, from several threads at once; one with
        `__getitems__` (Grain's, TFDS', Hugging Face's) is asked for the elements of a batch at a time.
      load: maps an element to an example: a nest, of dictionaries and tuples, of arrays, lists, numbers or strings.
    """

    def __init__(self, source: Any, load: Callable[[Any], Any] | None) -> None:
        if isinstance(source, dict) or not hasattr(source, "__getitem__"):
            remedy = "Pass a list of what belongs together, list(zip(...)), for example."
            raise _validate.argument_error("x", type(source).__name__, "be a sequence of elements", remedy, TypeError)
        self._elements, self._load, self.lengths = getattr(source, "iloc", source), load, [len(source)]
        if not self.lengths[0]:
            raise _validate.argument_error("x", source, "hold at least 1 example")
        with tf.device("CPU:0"):
            first = self._example(0, self._elements[0])  # says what all are like
        self._form = _mapped(_form, first)
        self.specs = _mapped(lambda array: tf.TensorSpec(array.shape, _tensor_type(array)), first)
        self._threads = ThreadPoolExecutor(thread_name_prefix="tf_dpbn_load")

    def read(self, indices: np.ndarray) -> list[np.ndarray]:
        """See Rows; `load` never sees padding.

        Raises:
          ValueError, TypeError: if an example has another structure, shape or type than the first.
        """
        specs = tf.nest.flatten(self.specs)
        columns = [_zeros((len(indices), *spec.shape), spec.dtype) for spec in specs]
        positions = np.flatnonzero(indices >= 0).tolist()
        numbers = indices[positions].tolist()
        of_all = getattr(self._elements, "__getitems__", None) if numbers else None
        elements = None if of_all is None else of_all(numbers)

        def put(chunk: range) -> None:
            with tf.device("CPU:0"):
                for k in chunk:
                    example = self._example(numbers[k], self._elements[numbers[k]] if elements is None else elements[k])
                    if _mapped(_form, example) != self._form:
                        requirement = f"make every example like the first, {self._form}"
                        remedy = "Resize, crop, pad or convert in `load`."
                        received = f"{_mapped(_form, example)} of example {numbers[k]}"
                        raise _validate.argument_error("load", received, requirement, remedy)
                    for column, array in zip(columns, tf.nest.flatten(example), strict=True):
                        column[positions[k]] = array[()]

        size = -(-len(numbers) // _CHUNKS) or 1
        for _ in self._threads.map(put, (range(len(numbers))[k : k + size] for k in range(0, len(numbers), size))):
            pass  # or raises what `put` raised
        return columns

    def _example(self, number: int, element: Any) -> Any:
        example = element if self._load is None else self._load(element)
        return _mapped(lambda value: _array(value, number), example)


def _mapped(function: Callable[[Any], Any], nest: Any) -> Any:
    """As tf.nest.map_structure, but lists are values."""
    if isinstance(nest, dict):
        return {key: _mapped(function, each) for key, each in nest.items()}
    if isinstance(nest, tuple):
        parts = [_mapped(function, each) for each in nest]
        return type(nest)(*parts) if hasattr(nest, "_fields") else tuple(parts)
    return function(nest)


def _array(value: Any, number: int) -> np.ndarray:
    """A value of an example as an array, of bytes where it is text."""
    try:
        array = np.asarray(value)
        if array.dtype.kind == "U":
            array = np.char.encode(array)
        if array.dtype.kind == "S":
            return array.astype(object)
        if array.dtype == object and not all(isinstance(each, bytes) for each in array.flat):
            raise TypeError
        return array.astype(tf.as_dtype(array.dtype).as_numpy_dtype, copy=False)
    except (TypeError, ValueError) as error:  # lists of different lengths, None, dates and the like
        requirement = "make dense arrays of numbers or strings"
        raise _validate.argument_error(
            "load", f"{type(value).__name__} of example {number}", requirement, kind=TypeError
        ) from error


def _tensor_type(array: np.ndarray) -> tf.DType:
    return tf.string if array.dtype == object else tf.as_dtype(array.dtype)


def _form(array: np.ndarray) -> str:
    return f"{_tensor_type(array).name}{list(array.shape)}"


def _zeros(shape: tuple[int, ...], dtype: tf.DType) -> np.ndarray:
    return np.full(shape, b"", object) if dtype == tf.string else np.zeros(shape, dtype.as_numpy_dtype)


def is_source(data: Any) -> bool:
    """Whether data are read one example at a time: no arrays or nest of them, but with `__len__` and `__getitem__`."""
    is_array = isinstance(data, (dict, list, tuple, str)) or hasattr(data, "__array__")
    return not is_array and hasattr(data, "__len__") and hasattr(data, "__getitem__")


def check_random_access(name: str, data: Any) -> None:
    """Refuses data sets that cannot be asked for a single example."""
    if isinstance(data, tf.data.Dataset):
        remedy = (
            "A tf.data.Dataset has none: pass the arrays or files that it reads, with `load`, a source with __len__ "
            "and __getitem__, or sampling.index_tfrecords(files)."
        )
    elif isinstance(data, keras.utils.Sequence):
        remedy = "The elements of this one are batches: pass what it reads them from, with `load`."
    else:
        return
    raise _validate.argument_error(name, type(data).__name__, "give random access to examples", remedy, TypeError)


def _as_arrays(name: str, nest: Any) -> Any:
    """Returns `nest` with lists as tuples, numeric numpy arrays as they are, others as TensorFlow makes them."""
    if isinstance(nest, dict):
        return {key: _as_arrays(f"{name}[{key!r}]", value) for key, value in nest.items()}
    if isinstance(nest, (tuple, list)):
        parts = [_as_arrays(f"{name}[{i}]", value) for i, value in enumerate(nest)]
        return type(nest)(*parts) if hasattr(nest, "_fields") else tuple(parts)
    if hasattr(nest, "columns") and hasattr(nest, "dtypes"):
        nest = _frame_values(name, nest)
    check_random_access(name, nest)
    remedy, kind = "Give dense arrays of numbers or strings, all with the examples in front.", type(nest).__name__
    if nest is None or isinstance(nest, (tf.RaggedTensor, tf.SparseTensor)):
        raise _validate.argument_error(name, kind, "hold dense arrays", remedy, TypeError)
    if isinstance(nest, np.ndarray) and nest.ndim and nest.dtype.kind in "fiub" and nest.dtype.itemsize <= 8:
        return np.asarray(nest)
    try:
        with tf.device("CPU:0"):  # the whole data set need not fit into an accelerator
            tensor = tf.convert_to_tensor(nest)
    except (TypeError, ValueError) as error:
        remedy += " A missing value (None) is none: fill it in."
        raise _validate.argument_error(name, kind, "hold dense arrays", remedy, TypeError) from error
    if tensor.shape.rank == 0:
        raise _validate.argument_error(name, nest, "hold arrays, not scalars", remedy)
    return tensor.numpy()


def _frame_values(name: str, frame: Any) -> Any:
    """The values of a pandas frame in one type: truth values as numbers, and text only where all columns are text."""
    kinds = [getattr(dtype, "kind", "O") for dtype in frame.dtypes]
    if all(kind in "biuf" for kind in kinds):
        types = [getattr(dtype, "numpy_dtype", dtype) for dtype in frame.dtypes]
        missing = [str(column) for column in frame.columns if kinds and frame[column].isna().any()]
        if missing and any(hasattr(dtype, "numpy_dtype") for dtype in frame.dtypes):
            requirement = f"have values everywhere, in columns {', '.join(map(repr, missing))} too"
            raise _validate.argument_error(name, "missing values", requirement, "Fill them in.", TypeError)
        return frame.to_numpy(np.result_type(*types)) if types else frame
    text = [kind not in "biufcmM" for kind in kinds]
    if all(text) and all(isinstance(value, (str, bytes)) for value in frame.to_numpy().ravel()):
        return frame.to_numpy(object)
    wrong = [str(column) for column, kind in zip(frame.columns, kinds, strict=True) if kind not in "biuf"]
    remedy = f"Encode or drop {', '.join(map(repr, wrong))}, or pass each column as an input of its own: dict(frame)."
    found = f"a frame with columns of type {', '.join(sorted({str(dtype) for dtype in frame.dtypes}))}"
    raise _validate.argument_error(name, found, "hold columns of numbers", remedy, TypeError)
