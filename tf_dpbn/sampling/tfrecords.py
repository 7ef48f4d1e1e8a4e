"""Random access to TFRecord files, by an index of where each record begins."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_dpbn import _validate
from tf_dpbn._keras import keras

# A record is its length and a checksum of that, then its bytes and their checksum (tensorflow.org/tutorials/load_data/
# tfrecord, "TFRecords format details").
_HEADER, _FOOTER = 12, 4


class TFRecords(Sequence):
    """The records of TFRecord files, as bytes; made by `index_tfrecords`. Can be pickled, to index only once.

    Args:
      files: their names.
      file_of, offsets, lengths: int64 [records], where each record is, and of how many bytes.
    """

    def __init__(self, files: Sequence[str], file_of: np.ndarray, offsets: np.ndarray, lengths: np.ndarray) -> None:
        self._files, self._file_of, self._offsets, self._lengths = list(files), file_of, offsets, lengths

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, number: Any) -> bytes:
        with tf.io.gfile.GFile(self._files[self._file_of[number]], "rb") as file:
            file.seek(int(self._offsets[number]))
            return file.read(int(self._lengths[number]))


def index_tfrecords(files: str | Sequence[str], *, verbose: bool = True) -> TFRecords:
    """Finds where each record of TFRecord files begins, so that `poisson_dataset` can draw records.

        records = tf_dpbn.sampling.index_tfrecords("train-*.tfrecord")
        dataset = plan.poisson_dataset(records, load=parse)  # parse(record) -> (image, label)

    It reads the lengths of the records, not the records.

    Args:
      files: names of uncompressed TFRecord files, or patterns for them (`tf.io.gfile.glob`), local or remote; each file
        by one name only.
      verbose: whether to show a progress bar.

    Returns:
      A sequence of the records, bytes each.

    Raises:
      ValueError: if there are no such files or no records, or if a file is compressed, truncated or something else.
    """
    patterns = [files] if isinstance(files, str) else list(files)
    names = sorted({name for pattern in patterns for name in tf.io.gfile.glob(pattern)})
    if not names:
        raise _validate.argument_error("files", files, "name at least one file", "Check the pattern.")
    progress = keras.utils.Progbar(len(names), unit_name="file") if verbose else None
    found: list[np.ndarray] = []
    for k, name in enumerate(names):
        places = _places(name)
        found.append(np.insert(places, 0, k, axis=1))
        if progress is not None:
            progress.update(k + 1)
    file_of, offsets, lengths = np.concatenate(found).T
    if not len(offsets):
        raise _validate.argument_error("files", files, "hold at least one record")
    return TFRecords(names, file_of, offsets, lengths)


def _places(name: str) -> np.ndarray:
    """Where the records of a file are: int64 [records, 2], offset and length."""
    size, position, places = tf.io.gfile.stat(name).length, 0, []
    with tf.io.gfile.GFile(name, "rb") as file:
        while position < size:
            file.seek(position)
            header = file.read(_HEADER)
            length = struct.unpack("<Q", header[:8])[0] if len(header) == _HEADER else size
            places.append((position + _HEADER, length))
            position += _HEADER + length + _FOOTER
    if position != size:
        remedy = "Decompress it, or write it anew."
        raise _validate.argument_error("files", name, "be uncompressed, complete TFRecord files", remedy)
    return np.array(places, np.int64).reshape(-1, 2)
