"""Repeats the audits of tests/audited.py, with fresh noise: how often a bound is above its claim.

python -m tests.many_audits --runs=20
"""

from __future__ import annotations

import json
import time

import numpy as np
from absl import app, flags

from tests import audited
from tf_dpbn import auditing

_RUNS = flags.DEFINE_integer("runs", 20, "How many audits of each kind and claim.", lower_bound=1)
_TRIALS = flags.DEFINE_integer("trials", 40_000, "Releases in each world of an audit of a step.", lower_bound=4)
_CONFIDENCE = flags.DEFINE_float("confidence", 0.95, "Of each bound of a step.", 0.5, 1.0)
_KINDS = flags.DEFINE_multi_enum("kinds", ["step", "training"], ["step", "training"], "What to audit.")
_CLAIMS = (1.0, 4.0, 8.0)


def step_bounds(claim: float) -> list[float]:
    model, x, y = audited.stepping_model(claim, seed=None)
    audits = [
        auditing.audit_step(model, x, y, row=0, delta=audited.DELTA, trials=_TRIALS.value, confidence=_CONFIDENCE.value)
        for _ in range(_RUNS.value)
    ]
    return [each.epsilon_lower_bound for each in audits]


def training_bounds(claim: float) -> list[float]:
    found = []
    for run in range(_RUNS.value):
        audit, *_ = audited.training(claim, run, noise_seed=None)
        found.append(max(audit.white_box.epsilon_lower_bound, audit.black_box.epsilon_lower_bound))
    return found


def main(argv: list[str]) -> None:
    del argv
    for kind in _KINDS.value:
        for claim in _CLAIMS:
            start = time.perf_counter()
            bounds = np.array({"step": step_bounds, "training": training_bounds}[kind](claim))
            line = {
                "audit": kind,
                "confidence": _CONFIDENCE.value,
                "claimed": claim,
                "runs": len(bounds),
                "above_claim": int(np.sum(bounds > claim)),
                "least, median, largest": np.quantile(bounds, [0.0, 0.5, 1.0]).round(3).tolist(),
                "seconds": round(time.perf_counter() - start),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    app.run(main)
