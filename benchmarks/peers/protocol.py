"""How step_time.py talks with a peer, which runs under the interpreter of its own environment.

A line of JSON goes in, a line of JSON comes out:

    {"net": "resnet8", "batch_size": 256} -> {"parameters": {...}, "variants": [...], "refused": {...},
                                              "versions": {...}}
    {"step": "hooks"}                     -> {"milliseconds": 31.2}

A peer leaves when its input ends. Only the standard library is imported.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

PLAIN = "plain"

# Makes a function that runs one step and returns once it is done.
MakeStep = Callable[[], Callable[[], object]]


@dataclasses.dataclass(frozen=True)
class Build:
    """What a peer offers for one net and batch size.

    Attributes:
      steps: by name; PLAIN is its step without privacy. One that fails is left out and its error passed on.
      parameters: trainable parameters, for each normalization that occurs.
    """

    steps: dict[str, MakeStep]
    parameters: dict[str, int]


def serve(packages: Sequence[str], build: Callable[[str, int], Build]) -> None:
    """Answers requests until the input ends.

    Args:
      packages: whose versions to tell.
      build: from net and batch size; raises NotImplementedError, saying why, for a net that this peer leaves out.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever libraries print is not an answer
    steps: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "step" in request:
            start = time.perf_counter()
            steps[request["step"]]()
            answer: dict[str, Any] = {"milliseconds": 1e3 * (time.perf_counter() - start)}
        else:
            steps.clear()
            answer = _build(build, request, steps)
            answer["versions"] = {name: importlib.metadata.version(name) for name in packages}
        print(json.dumps(answer), file=answers, flush=True)


def _build(build: Callable[[str, int], Build], request: dict[str, Any], steps: dict[str, Any]) -> dict[str, Any]:
    try:
        offered = build(request["net"], request["batch_size"])
    except NotImplementedError as error:
        return {"parameters": {}, "variants": [], "refused": {"all": str(error)}}
    refused = {}
    for name, make in offered.steps.items():
        try:
            step = make()
            step()  # some modes fail only here
            steps[name] = step
        except Exception as error:  # noqa: BLE001  what a peer cannot do is a finding
            refused[name] = f"{type(error).__name__}: {error}"[:300]
    return {"parameters": offered.parameters, "variants": list(steps), "refused": refused}
