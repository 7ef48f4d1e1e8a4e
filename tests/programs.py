"""Runs programs that need a process of their own, for tests."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def last_line(*arguments: str, **environment: str) -> str:
    """What `python *arguments` prints last; see `output`."""
    return output(*arguments, **environment).splitlines()[-1]


def output(*arguments: str, **environment: str) -> str:
    """What `python *arguments` prints, with the package and the examples on its path.

    Raises:
      AssertionError: with the end of its errors, if it fails.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout
