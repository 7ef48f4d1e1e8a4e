"""Where a step spends its time: totals by kind of operation, from TensorFlow's profiler."""

from __future__ import annotations

import collections
import pathlib
import tempfile
from collections.abc import Callable

import tensorflow as tf

_STEPS = 5


def op_times(step: Callable[[], object]) -> list[tuple[str, float, float]]:
    """(kind of operation, milliseconds a step, calls a step), the longest first; operations run in parallel.

    Raises:
      ImportError: if this TensorFlow keeps the format of traces elsewhere: it is not part of its interface.
    """
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    step()
    with tempfile.TemporaryDirectory() as directory:
        tf.profiler.experimental.start(directory)
        for _ in range(_STEPS):
            step()
        tf.profiler.experimental.stop()
        (trace,) = pathlib.Path(directory).rglob("*.xplane.pb")
        space = xplane_pb2.XSpace.FromString(trace.read_bytes())
    milliseconds: dict[str, float] = collections.Counter()
    calls: dict[str, int] = collections.Counter()
    for plane in space.planes:
        if "CPU" not in plane.name:
            continue
        for event in (event for line in plane.lines for event in line.events):
            name = plane.event_metadata[event.metadata_id].name
            if ":" in name and "::" not in name:  # operations are called "name:kind"; the rest are C++ functions
                kind = name.rpartition(":")[2]
                milliseconds[kind] += event.duration_ps / 1e9
                calls[kind] += 1
    return [(kind, total / _STEPS, calls[kind] / _STEPS) for kind, total in milliseconds.most_common()]
