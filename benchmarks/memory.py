"""Peak memory of train steps, each variant in a process of its own.

Run as a script, it is that process: it takes a Variant as JSON and prints what it measured as a line of JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import subprocess
import sys

import tensorflow as tf

from variants import Step, Variant

_STATUS = pathlib.Path("/proc/self/status")
_RESET = pathlib.Path("/proc/self/clear_refs")
_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Peak:
    """Peaks, in bytes: of the resident set, and of an accelerator's memory.

    Attributes:
      process: the whole of it, with what Python and TensorFlow take before the first step.
      above_start: how far it grew: its peak during the steps over its size just before the first one, which also builds
        and optimizes the graph.
      parameters: trainable parameters of the model.
      accelerator: the peak of what TensorFlow allocated on the first GPU, with the weights; None without one.
    """

    process: int
    above_start: int
    parameters: int
    accelerator: int | None


def measure(variant: Variant) -> Peak:
    """Measures `variant` in a new process.

    Raises:
      RuntimeError: if that process fails.
    """
    command = [sys.executable, __file__, json.dumps(dataclasses.asdict(variant))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"The process that measures {variant} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def resident(field: str, status: str) -> int:
    """Reads VmRSS (resident set now) or VmHWM (its peak) in bytes from the text of /proc/<pid>/status."""
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name == field:
            number, unit = value.split()
            assert unit == "kB", line
            return 1024 * int(number)
    raise ValueError(f"The status names no {field}: {status!r}")


def _measure_here(variant: Variant) -> Peak:
    # Not resource.getrusage: its ru_maxrss begins at the peak of the process that started this one.
    step = Step(variant)
    with contextlib.suppress(OSError):  # where that is not allowed, a higher peak while importing counts too
        _RESET.write_text("5")  # the peak begins anew
    start = resident("VmRSS", _STATUS.read_text())
    for _ in range(_STEPS):
        step()
    peak = resident("VmHWM", _STATUS.read_text())
    has_gpu = bool(tf.config.list_physical_devices("GPU"))
    accelerator = tf.config.experimental.get_memory_info("GPU:0")["peak"] if has_gpu else None
    return Peak(peak, peak - start, step.parameters, accelerator)


if __name__ == "__main__":
    if not _STATUS.exists():
        sys.exit("Memory is read from /proc/self/status, which is Linux's.")
    print(json.dumps(dataclasses.asdict(_measure_here(Variant(**json.loads(sys.argv[1]))))))
