"""Times steps side by side: what is compared takes turns, so that a busy machine slows all of it alike.

Only the standard library is imported.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

# A step of this length or more takes part in `slow_rounds` rounds only.
SLOW_MILLISECONDS = 3000.0


@dataclasses.dataclass(frozen=True)
class Quartiles:
    """Lower quartile, median and upper quartile."""

    lower: float
    median: float
    upper: float


def quartiles(values: Sequence[float]) -> Quartiles:
    """The quartiles of at least one value."""
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def ratios(values: Sequence[float], baseline: Sequence[float]) -> Quartiles:
    """Quartiles of the ratios round by round, over the rounds in which both took part."""
    # Both took part from the first round on, so the shorter one is the common part.
    return quartiles([value / base for value, base in zip(values, baseline, strict=False)])


def timed(step: Callable[[], object]) -> Callable[[], float]:
    """A function that runs `step`, which returns once its work is done, and returns milliseconds."""

    def run() -> float:
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)

    return run


def take_turns(
    steps: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    slow_rounds: int,
    warm_up: int,
    pause: float = 0.0,
) -> dict[str, list[float]]:
    """Runs every step once in each round.

    Args:
      steps: functions that run one step and return its milliseconds.
      rounds: how many rounds, at least 1.
      slow_rounds: in how many of them, the first, slow steps take part; at least 1.
      warm_up: how many calls of each step go before the first round, at least 1.
      pause: seconds of rest before each step.

    Returns:
      Milliseconds of each round, by the names of `steps`.
    """
    slow = set()
    for name, step in steps.items():
        for _ in range(warm_up):
            last = step()
        if last >= SLOW_MILLISECONDS:
            slow.add(name)
    names, times = list(steps), {name: [] for name in steps}
    for i in range(rounds):
        # Each round begins with another step, so that none always follows the same one.
        first = i % len(names)
        for name in names[first:] + names[:first]:
            if name in slow and i >= slow_rounds:
                continue
            time.sleep(pause)
            times[name].append(steps[name]())
    return times
