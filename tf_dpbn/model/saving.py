"""What weights files hold of a DPModel beside its weights: its training record and its public batch."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import tensorflow as tf

from tf_dpbn._keras import IS_KERAS_3
from tf_dpbn.accounting.files import RECORD_KEY

_BATCH_KEY = "tf_dpbn_public_batch_"
_STRINGS = b"tf_dpbn strings "
_LEGACY_ENDINGS = (".h5", ".hdf5")


def save_record(model: Any, store: Any) -> None:
    """Fills a store of Keras' with the model's ledger, released means and public batch."""
    batch = model._public.batch
    arrays = tf.nest.flatten(batch) if batch is not None else []
    record = {
        "record": model._record.serialize(),
        "public_batch": None if batch is None else tf.nest.pack_sequence_as(batch, list(range(len(arrays)))),
        "may_contain_training_rows": model._public.may_contain_training_rows,
    }
    store[RECORD_KEY] = np.frombuffer(json.dumps(record).encode(), np.uint8)
    for i, array in enumerate(arrays):
        store[f"{_BATCH_KEY}{i}"] = _stored(array.numpy())


def load_record(model: Any, store: Any) -> None:
    """Adds the ledger of a file, and takes its public batch; a stock model's file has neither."""
    if RECORD_KEY not in store.keys():
        return
    record = json.loads(bytes(np.asarray(store[RECORD_KEY])).decode())
    model._record.deserialize(record["record"])
    if record["public_batch"] is not None:
        structure = record["public_batch"]
        batch = tf.nest.map_structure(lambda i: _loaded(np.asarray(store[f"{_BATCH_KEY}{i}"])), structure)
        model.set_public_batch(batch, may_contain_training_rows=record["may_contain_training_rows"])


def check_file(filepath: Any, save_format: str) -> None:
    """Refuses files of whole models that would lose the ledger: .h5, and tf_keras' SavedModel."""
    if not IS_KERAS_3 and not str(filepath).endswith(".keras") or save_format != "keras":
        raise _lossy_file(filepath, ".keras, or `export` for serving")
    if str(filepath).endswith(_LEGACY_ENDINGS):
        raise _lossy_file(filepath, ".keras")


def check_weights_file(filepath: Any, save_format: str | None) -> None:
    """Refuses files of weights that would lose the ledger."""
    legacy = str(filepath).endswith((*_LEGACY_ENDINGS, ".keras")) or save_format == "h5"
    if legacy and not str(filepath).endswith(".weights.h5"):
        raise _lossy_file(filepath, ".weights.h5")


def _lossy_file(filepath: Any, better: str) -> ValueError:
    return ValueError(
        "`filepath` names a format that loses the ledger, and epsilon would start from zero. Save to a name that ends "
        f"in {better}. Received: filepath={str(filepath)!r}"
    )


def _stored(array: np.ndarray) -> np.ndarray:
    """An array as files hold it; of strings, for which HDF5 needs a type of its own, as bytes of JSON."""
    if array.dtype != object:
        return array
    values = [value.decode("latin-1") for value in array.reshape(-1)]  # any byte is one character
    return np.frombuffer(_STRINGS + json.dumps([array.shape, values]).encode(), np.uint8)


def _loaded(array: np.ndarray) -> np.ndarray:
    """The inverse of `_stored`."""
    content = array.tobytes()
    if array.dtype != np.uint8 or not content.startswith(_STRINGS):
        return array
    shape, values = json.loads(content[len(_STRINGS) :])
    return np.array([value.encode("latin-1") for value in values], object).reshape(shape)
