"""What files of private models say of their training, read without building the model, and without TensorFlow."""

from __future__ import annotations

import json
import os
import pathlib
import zipfile
from typing import Any, NamedTuple

import h5py

from tf_dpbn import _validate
from tf_dpbn.accounting.ledger import Ledger
from tf_dpbn.accounting.ledger_file import HEADER, LedgerFile

# Where files of weights have the record: in `RECORD_KEY` of what DPModel's attribute of this name stores.
RECORD_ATTRIBUTE, RECORD_KEY = "zz_tf_dpbn_record", "tf_dpbn_record"
TRAINING_ROWS = "rows of the training data in the public batch"


class SavedTraining(NamedTuple):
    """What a file says: the ledger, and what the guarantee does not cover beside what it never covers."""

    ledger: Ledger
    not_covered: tuple[str, ...] = ()


def read_training(path: str | os.PathLike[str]) -> SavedTraining:
    """Returns what a file says of private training.

    Args:
      path: of a saved DPModel (.keras), of its weights (.weights.h5), of a ledger file (`compile(ledger_file=...)`), or
        of the text that `Ledger.to_json` returns.

    Raises:
      ValueError: it is none of these, cannot be read, or is of a model that is not private.
    """
    try:
        if str(path).endswith(".keras"):
            with zipfile.ZipFile(path) as archive, archive.open("model.weights.h5") as weights:
                return _of_weights(weights)
        if str(path).endswith(".h5"):
            with open(path, "rb") as weights:
                return _of_weights(weights)
        content = pathlib.Path(path).read_bytes()
        if content.startswith(HEADER):
            return SavedTraining(_joined(LedgerFile(path, "").parse(content)))
        return SavedTraining(Ledger.from_json(content.decode()))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        requirement = "be a saved DPModel (.keras), its weights (.weights.h5), a ledger file or the JSON of a Ledger"
        # A ledger's own error quotes the whole text.
        remedy = f"Reading it failed: {error.__cause__ or error}."
        raise _validate.argument_error("path", str(path), requirement, remedy) from error


def _of_weights(file: Any) -> SavedTraining:
    with h5py.File(file, "r") as weights:
        content = json.loads(bytes(weights[f"{RECORD_ATTRIBUTE}/vars/{RECORD_KEY}"][()]))
    runs = {run: Ledger.from_json(text) for run, text in json.loads(content["record"])["runs"].items()}
    return SavedTraining(_joined(runs), (TRAINING_ROWS,) if content["may_contain_training_rows"] else ())


def _joined(runs: dict[str, Ledger]) -> Ledger:
    return Ledger([entry for ledger in runs.values() for entry in ledger.entries])
