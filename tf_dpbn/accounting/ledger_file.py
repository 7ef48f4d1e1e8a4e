"""A file that never says fewer steps than ran, whenever the program dies: steps are written before they run."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import math
import os
import time
from collections.abc import Callable
from typing import Any

from tf_dpbn import _validate
from tf_dpbn.accounting.ledger import Ledger, StepRecord

HEADER = b"tf_dpbn ledger file, version 1\n"
_LINE_END = b"]}"  # of a ledger as text, and nowhere else in it
_RESTORE = "Restore it from a copy; it was left as it is."
_BLOCK_SECONDS = 1.0  # what a block of steps is to take: one line and one fsync for each


class LedgerFile:
    """An append-only file of what runs have cost; one object at a time has it open.

    After the first line each is "checksum run ledger": all steps that a run has taken, or may take before its next
    line; a run's last line counts. The checksum is the SHA-256 of the checksum before and of the rest of the line, so
    that edited and missing lines are found, but for lines cut off at the end.

    Steps are written in blocks, which double while one takes less than a second. A program that dies leaves at most one
    block of steps that did not run; `close` takes them back.

    Args:
      path: the file; made if it is missing.
      run: whose steps are written, text without spaces that no other object uses.
    """

    def __init__(self, path: str | os.PathLike[str], run: str) -> None:
        self._path, self._run = os.path.abspath(path), run
        self._file: Any = None
        self._end, self._checksum = 0, ""  # of the whole lines
        self._written: Ledger | None = None  # what the last line of this run says; None if writing it failed
        self._block, self._left, self._last = 1, 0, -math.inf
        self._record: StepRecord | None = None  # of the steps left in the block

    @property
    def is_open(self) -> bool:
        """Whether this object has the file open."""
        return self._file is not None

    def open(self) -> dict[str, Ledger]:
        """Locks the file and returns what it says of each run.

        An incomplete last line is one whose steps never started: it is ignored, and overwritten by the next line.

        Raises:
          ValueError: the file is open elsewhere, is no ledger file, or was changed; it is left as it is.
          ModuleNotFoundError: on systems without fcntl, which locks it.
        """
        import fcntl  # here, since Windows has none

        file = open(self._path, "a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _sync_directory(os.path.dirname(self._path))
            file.seek(0)
            runs = self.parse(file.read())
        except BlockingIOError:
            file.close()
            remedy = "Wait for the other one to end, or give this training a file of its own."
            raise self._error("not be open in another process or for another model", remedy) from None
        except BaseException:
            file.close()
            raise
        self._file, self._left, self._written = file, 0, runs.get(self._run, Ledger())
        return runs

    def reserve(self, steps: int, ran: Callable[[], Ledger], record: StepRecord) -> None:
        """Sees to it that `steps` more steps are on disk before they run.

        Args:
          steps: how many are about to run at most.
          ran: returns what the run has taken so far; called for each line, not for each step.
          record: what such a step costs, the same object as long as that stays so.

        Raises:
          OSError: they could not be written, and must not run.
        """
        if not self.is_open:
            raise self._error("be open before steps run", "Train by `fit` or `train_on_batch`, which open it.")
        self._left -= steps
        if self._left >= 0 and record is self._record:
            return
        now = time.monotonic()
        is_fast = now - self._last < _BLOCK_SECONDS
        self._block = max(2 * self._block if is_fast else self._block // 2, steps)
        self._last = now
        ledger = ran()
        ledger.record(dataclasses.replace(record, steps=self._block))
        self._append(ledger)
        self._left, self._record = self._block - steps, record

    def close(self, ran: Ledger) -> None:
        """Writes what the run has taken, unless the file says that, and unlocks it; if it is open."""
        if self._file is None:
            return
        try:
            if ran != self._written:
                self._append(ran)
        finally:
            self._file.close()
            self._file = None

    def parse(self, content: bytes) -> dict[str, Ledger]:
        """What the file says of each run, from its content; errors as of `open`."""
        if not content.startswith(HEADER) and not HEADER.startswith(content):
            remedy = "Choose another path; the file was left as it is."
            raise self._error("be missing, or a file that ledger_file has made, of this version", remedy)
        runs: dict[str, Ledger] = {}
        checksum = _checksum("", HEADER)
        *lines, tail = content.split(b"\n")
        for number, line in enumerate(lines[1:], 2):
            expected, _, rest = line.partition(b" ")
            checksum = _checksum(checksum, rest)
            if expected != checksum.encode():
                raise self._error(f"be as it was written: line {number}, or one before it, was changed", _RESTORE)
            run, _, ledger = rest.decode().partition(" ")
            runs[run] = Ledger.from_json(ledger)
        if _LINE_END in tail:  # a line that was cut short while it was written has less
            raise self._error("be as it was written: its last line has another end", _RESTORE)
        self._end, self._checksum = len(content) - len(tail) if lines else 0, checksum
        return runs

    def _append(self, ledger: Ledger) -> None:
        rest = f"{self._run} {ledger.to_json()}".encode()
        checksum = _checksum(self._checksum, rest)
        line = b"%s %s\n" % (checksum.encode(), rest)
        if not self._end:
            line = HEADER + line
        self._written = None
        self._file.truncate(self._end)  # of what a dying program, or a full disk, has left of a line
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._path)
        os.fsync(self._file.fileno())
        self._end, self._checksum, self._written = self._end + len(line), checksum, ledger

    def _error(self, requirement: str, remedy: str) -> Exception:
        return _validate.argument_error("ledger_file", str(self._path), requirement, remedy)


def _checksum(before: str, rest: bytes) -> str:
    return hashlib.sha256(before.encode() + rest).hexdigest()


def _sync_directory(path: str) -> None:
    """Puts the name of a new file on disk, too."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
