"""The slow run of the check of neighbouring batches: `make conformance`, or with fewer pairs

python -m tests.conformance.many_pairs --pairs=100000
"""

from __future__ import annotations

import itertools
import json
import time
import warnings

import numpy as np
import tensorflow as tf
from absl import app, flags

from tests import neighbours
from tests.conformance import nets

_PAIRS = flags.DEFINE_integer("pairs", 1_000_000, "How many pairs of neighbouring batches to compare.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of weights, clip norms and batches.")
_TENSOR_FLOAT_32 = flags.DEFINE_bool(
    "tensor_float_32", False, "Multiply as GPUs do by default, which private steps never do: to see why."
)
_TOGETHER = 10  # batches for each network before the next one takes its turn


def main(argv: list[str]) -> None:
    del argv
    tf.config.experimental.enable_tensor_float_32_execution(_TENSOR_FLOAT_32.value)
    warnings.filterwarnings("ignore", "DPBatchNormalization .* gets no gradient")
    cases = list(itertools.product([*nets.PLAIN, *nets.RELEASING], nets.ENGINES))
    total, worst, failed, start = 0, 0.0, 0, time.perf_counter()
    for turn in itertools.count():
        for net, engine in cases:
            if total >= _PAIRS.value:
                print(json.dumps({"pairs": total, "worst": worst, "failed": failed, "seconds": _seconds(start)}))
                raise SystemExit(1 if failed else 0)
            rng = np.random.default_rng([_SEED.value, turn, cases.index((net, engine))])
            model, shape, targets = nets.compiled(net, rng, engine=engine)
            run = neighbours.sums_of_subsets(model)
            found = []
            for _ in range(_TOGETHER):
                nets.randomize(model, rng)
                found.append(neighbours.moves_of(run, *neighbours.hard_batch(rng, shape, targets)))
            moves = neighbours.sum_moves(found)
            total, worst = total + moves.pairs, max(worst, moves.excess)
            failed += not moves.within_bounds
            print(
                f"{total:>9} pairs, {net}, {engine}: worst {moves.excess:.7f}, padding {moves.padding:.1e}", flush=True
            )


def _seconds(start: float) -> int:
    return round(time.perf_counter() - start)


if __name__ == "__main__":
    app.run(main)
