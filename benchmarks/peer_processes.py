"""The other side of peers/protocol.py: starts peers and asks them to run steps."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

_HERE = pathlib.Path(__file__).parent
# Environments that `make bench-peers` creates, in the repository's root.
ENVIRONMENTS = {
    "opacus": ".venv-peer-opacus",
    "jax_privacy": ".venv-peer-jax",
    "tensorflow_privacy": ".venv-peer-tfp",
}


class Peer:
    """A running peer.

    Args:
      name: a key of ENVIRONMENTS.
      command: what starts it.
    """

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+")
        # The peer has an environment of its own: nothing of this one's packages may be found there.
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        self._process = subprocess.Popen(
            command,
            cwd=_HERE,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )

    def build(self, net: str, batch_size: int) -> dict[str, Any]:
        """What the peer offers: see peers/protocol.py."""
        return self._ask({"net": net, "batch_size": batch_size})

    def step(self, variant: str) -> float:
        """Runs one step and returns its milliseconds."""
        return self._ask({"step": variant})["milliseconds"]

    def close(self) -> None:
        """Ends the peer."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._log.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        if answer:
            return json.loads(answer)
        status = self._process.wait()
        self._log.seek(0)
        raise RuntimeError(f"The peer {self.name} ended with {status} at {request}:\n{self._log.read()[-4000:]}")


def interpreter_of(name: str) -> pathlib.Path:
    """The interpreter of a peer's environment.

    Raises:
      ValueError: if there is no such peer.
      FileNotFoundError: if its environment has not been created.
    """
    if name not in ENVIRONMENTS:
        raise ValueError(f"`peers` must be among {', '.join(ENVIRONMENTS)}. Received: {name!r}")
    path = _HERE.parent / ENVIRONMENTS[name] / "bin" / "python"
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}; `make bench-peers` creates it.")
    return path


@contextlib.contextmanager
def running(interpreters: Mapping[str, pathlib.Path]) -> Iterator[list[Peer]]:
    """Starts the peers of these names and ends them in the end."""
    with contextlib.ExitStack() as stack:
        peers = []
        for name, interpreter in interpreters.items():
            peers.append(Peer(name, [str(interpreter), "-m", f"peers.{name}_peer"]))
            stack.callback(peers[-1].close)
        yield peers
