"""Step time and peak memory of private training with tf_dpbn over plain training with Keras.

For each network and batch size it times a train step of stock Keras (BatchNormalization, SGD) and of tf_dpbn
(DPBatchNormalization, per-example clipping, noise, SGD), in turns in one process, so that a busy machine slows both:
the ratio is the median over the rounds. Medians are followed by [lower quartile, upper quartile].

    python benchmarks/step_time.py --nets=resnet8 --batch_sizes=64,256 --engine=book_keeping,vectorized

With --memory it starts a process for each measurement and prints the peak of its resident set, how far that grew in the
steps, and the peak of what TensorFlow took of a GPU's memory. With --peers other packages take part in the same rounds,
each in an environment of its own (`make bench-peers` creates them). They run the same networks without normalization,
since they do not train BatchNormalization privately, which spares them work; Opacus runs them with GroupNorm as well.
With --statistics=public,none tf_dpbn takes part with and without normalization.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib.metadata
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf
from absl import app, flags

import memory
import nets
import peer_processes
import report
import tf_dpbn
import timing
from architectures import ARCHITECTURES
from op_times import op_times
from tf_dpbn.clipping import ENGINES, NORM_METHODS
from variants import NO_NORMALIZATION, PLAIN, Step, Variant

# Threads of another process may still be waiting busily for work just after its step.
_PAUSE_BETWEEN_PROCESSES = 0.02
_PROFILE_ROWS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure. See the flags, which have the same names."""

    nets: Sequence[str] = tuple(ARCHITECTURES)
    batch_sizes: Sequence[int] = (256,)
    engine: Sequence[str] = ("book_keeping",)
    microbatch_size: Sequence[int] = (0,)
    norm_method: str = "auto"
    statistics: Sequence[str] = ("public",)
    public_batch: int = 32
    plain: bool = True
    jit_compile: bool = False
    policy: str = "float32"
    repeats: int = 15
    slow_repeats: int = 3
    warm_up: int = 3
    memory: bool = False
    memory_repeats: int = 3
    profile: bool = False
    peers: Sequence[str] = ()
    json: str | None = None


Row = dict[str, Any]


def run(config: Config) -> list[Row]:
    """Measures everything that `config` asks for; returns the lines of the JSON file."""
    check(config)
    interpreters = {name: peer_processes.interpreter_of(name) for name in config.peers}
    rows: list[Row] = []
    with peer_processes.running(interpreters) as peers:
        for net, batch_size in itertools.product(config.nets, config.batch_sizes):
            print(f"{net}, batch size {batch_size} ...", file=sys.stderr, flush=True)
            variants = list(variants_of(config, net, batch_size))
            found = memory_rows(config, variants) if config.memory else time_rows(config, variants, peers)
            found = [{"net": net, "batch_size": batch_size, **row} for row in found]
            if config.json:
                append(config.json, found)
            rows += found
    return rows


def check(config: Config) -> None:
    """Refuses what cannot be measured, before anything is.

    Raises:
      ValueError: saying what is wrong.
    """
    for name, choices in (("nets", nets.NAMES), ("engine", ENGINES), ("peers", peer_processes.ENVIRONMENTS)):
        wrong = set(getattr(config, name)) - set(choices)
        if wrong:
            raise ValueError(f"`{name}` must be among {', '.join(choices)}. Received: {', '.join(sorted(wrong))}")
    for name, least in (("batch_sizes", 1), ("microbatch_size", 0)):
        if any(value < least for value in getattr(config, name)):
            raise ValueError(f"`{name}` must be at least {least}. Received: {getattr(config, name)}")
    if set(config.nets) & set(nets.APPLICATIONS) and tuple(config.statistics) != ("public",):
        raise ValueError("networks of keras.applications are measured with --statistics=public.")
    if not set(config.nets) <= set(ARCHITECTURES) and config.peers:
        raise ValueError(f"`peers` take part in {', '.join(ARCHITECTURES)}. Leave out the other nets.")
    for mode in set(config.statistics) - {NO_NORMALIZATION}:
        tf_dpbn.DPBatchNormalization(statistics=mode)  # which knows its modes
    if config.memory and (config.peers or config.profile):
        raise ValueError("`memory` measures neither peers nor profiles. Leave out --peers and --profile.")
    if config.peers and tf.config.list_physical_devices("GPU"):
        raise ValueError("`peers` run on CPUs, so that nothing else may. Set CUDA_VISIBLE_DEVICES to the empty string.")


def variants_of(config: Config, net: str, batch_size: int) -> list[Variant]:
    """Stock Keras, then every combination of the settings of tf_dpbn."""
    same = {"net": net, "batch_size": batch_size, "jit_compile": config.jit_compile, "policy": config.policy}
    found = [Variant(**same)] if config.plain else []
    for engine, statistics, size in itertools.product(config.engine, config.statistics, config.microbatch_size):
        found.append(
            Variant(
                **same,
                engine=engine,
                statistics=statistics,
                microbatch_size=size or None,
                norm_method=config.norm_method if engine == "book_keeping" else "auto",  # the others have none
                public_batch=config.public_batch,
            )
        )
    return found


# ---------------------------------------------------------------------- time


def time_rows(config: Config, variants: Sequence[Variant], peers: Sequence[peer_processes.Peer]) -> list[Row]:
    """Times the variants and the peers' steps in the same rounds; a row for each, and comparisons with the peers."""
    steps = {variant.label: Step(variant) for variant in variants}
    runs: dict[str, Callable[[], float]] = {label: timing.timed(step) for label, step in steps.items()}
    rows: dict[str, Row] = {variant.label: _variant_row(variant) for variant in variants}
    for label, step in steps.items():
        rows[label]["parameters"] = step.parameters
        rows[label]["first_seconds"] = timing.timed(step)() / 1e3
        if PLAIN in rows:
            rows[label]["first_ratio_to_plain"] = rows[label]["first_seconds"] / rows[PLAIN]["first_seconds"]
    for peer in peers:
        offer = peer.build(variants[0].net, variants[0].batch_size)
        for name, reason in offer["refused"].items():
            print(f"  {peer.name}: left out {name}: {reason}", file=sys.stderr, flush=True)
        for name in offer["variants"]:
            label = f"{peer.name} {name}"
            runs[label] = functools.partial(peer.step, name)
            rows[label] = _peer_row(peer.name, name, offer)
    times = timing.take_turns(
        runs,
        rounds=config.repeats,
        slow_rounds=config.slow_repeats,
        warm_up=config.warm_up,
        pause=_PAUSE_BETWEEN_PROCESSES if peers else 0.0,
    )
    for label, row in rows.items():
        row.update(_time_fields(times, label, row["own_plain"]))
        row["microseconds_per_example"] = 1e3 * row["milliseconds"] / variants[0].batch_size
    if config.profile:
        _print_profiles(steps)
    del steps, runs
    tf.keras.backend.clear_session()
    gc.collect()  # the next network begins without this one's memory
    return [*rows.values(), *comparisons(rows, times)]


def _time_fields(times: Mapping[str, Sequence[float]], label: str, own_plain: str) -> Row:
    found: Row = {"rounds": len(times[label]), **_spread("milliseconds", timing.quartiles(times[label]))}
    for field, baseline in (("ratio_to_plain", PLAIN), ("ratio_to_own_plain", own_plain)):
        ratio = timing.ratios(times[label], times[baseline]) if baseline in times else None
        found.update(_spread(field, ratio))
    return found


def comparisons(rows: Mapping[str, Row], times: Mapping[str, Sequence[float]]) -> list[Row]:
    """Each variant of tf_dpbn over the fastest private step of each peer, round by round."""
    private: dict[str, list[str]] = {}
    for label, row in rows.items():
        if label != row["own_plain"]:
            private.setdefault(row["package"], []).append(label)
    found = []
    for label in private.pop("tf_dpbn", []):
        for labels in private.values():
            best = min(labels, key=lambda each: rows[each]["milliseconds"])
            ratio = timing.ratios(times[label], times[best])
            found.append({**_common("comparison"), "variant": label, "peer": best, **_spread("ratio", ratio)})
    return found


def _variant_row(variant: Variant) -> Row:
    package = "keras" if variant.engine is None else "tf_dpbn"
    settings = dataclasses.asdict(variant)
    return {**_common("time"), "package": package, "variant": variant.label, "own_plain": PLAIN, **settings}


def _peer_row(package: str, name: str, offer: Mapping[str, Any]) -> Row:
    mode, _, normalization = name.partition(" ")
    own_plain = " ".join([package, PLAIN, *([normalization] if normalization else [])])
    return {
        **_common("time"),
        "package": package,
        "variant": f"{package} {name}",
        "own_plain": own_plain,
        "engine": None if mode == PLAIN else mode,
        "parameters": offer["parameters"][normalization or "none"],
        "versions": offer["versions"],
    }


def _print_profiles(steps: Mapping[str, Callable[[], object]]) -> None:
    for label, step in steps.items():
        print(f"\n{label}: operations, milliseconds a step, calls a step")
        for kind, milliseconds, calls in op_times(step)[:_PROFILE_ROWS]:
            print(f"  {kind:<32}{milliseconds:>10.2f}{calls:>8.1f}")


# ---------------------------------------------------------------------- memory


def memory_rows(config: Config, variants: Sequence[Variant]) -> list[Row]:
    """Measures the peak memory of each variant, in turns."""
    peaks: dict[str, list[memory.Peak]] = {variant.label: [] for variant in variants}
    for _ in range(config.memory_repeats):
        for variant in variants:
            peaks[variant.label].append(memory.measure(variant))
    rows = []
    for variant in variants:
        row = {**_variant_row(variant), "measured": "memory", "processes": config.memory_repeats}
        row["parameters"] = peaks[variant.label][0].parameters
        for field in ("process", "above_start", "accelerator"):
            values = {label: [getattr(peak, field) for peak in found] for label, found in peaks.items()}
            if None in values[variant.label]:
                continue
            found, plain = values[variant.label], values.get(PLAIN)
            row.update(_spread(f"{field}_bytes", timing.quartiles(found)))
            row.update(_spread(f"{field}_ratio_to_plain", timing.ratios(found, plain) if plain else None))
        rows.append(row)
    return rows


# ---------------------------------------------------------------------- rows


def _spread(field: str, found: timing.Quartiles | None) -> Row:
    """The median and the quartiles as two fields, None where there is nothing."""
    return {
        field: found.median if found else None,
        f"{field}_quartiles": [found.lower, found.upper] if found else None,
    }


def _common(measured: str) -> Row:
    return {"measured": measured, "cores": cores(), "versions": versions()}


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what is measured."""
    keras = tf.keras.layers.Layer.__module__.partition(".")[0]  # keras or tf_keras
    found = {name: importlib.metadata.version(name) for name in (keras, "numpy")}
    return {"tf_dpbn": tf_dpbn.__version__, "tensorflow": tf.__version__, **found}


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def append(path: str, rows: Sequence[Row]) -> None:
    """Appends the rows to a file of JSON lines."""
    with pathlib.Path(path).open("a", encoding="utf-8") as file:
        for row in rows:
            print(json.dumps(row), file=file)


# ---------------------------------------------------------------------- command line


def define_flags() -> None:
    """Defines one flag for each field of Config."""
    defaults = Config()
    flags.DEFINE_list("nets", list(defaults.nets), f"Networks, among {', '.join(nets.NAMES)}.")
    flags.DEFINE_list("batch_sizes", [*map(str, defaults.batch_sizes)], "Batch sizes.")
    flags.DEFINE_list("engine", list(defaults.engine), f"Clipping engines, among {', '.join(ENGINES)}.")
    flags.DEFINE_list(
        "microbatch_size",
        [*map(str, defaults.microbatch_size)],
        "Sizes of the microbatches in which tf_dpbn works through a batch; 0 leaves the choice to it.",
    )
    flags.DEFINE_enum("norm_method", defaults.norm_method, NORM_METHODS, "How norms are found, for book_keeping.")
    flags.DEFINE_list("statistics", list(defaults.statistics), "Modes of DPBatchNormalization; none: no layer.")
    flags.DEFINE_integer("public_batch", defaults.public_batch, "Examples in the public batch.", lower_bound=2)
    flags.DEFINE_bool("plain", defaults.plain, "Whether stock Keras takes part, to which ratios refer.")
    flags.DEFINE_bool("jit_compile", defaults.jit_compile, "Whether XLA compiles the steps; slower on CPUs.")
    flags.DEFINE_enum("policy", defaults.policy, ["float32", "mixed_bfloat16", "mixed_float16"], "Keras' dtype policy.")
    flags.DEFINE_integer("repeats", defaults.repeats, "Rounds.", lower_bound=1)
    slow = timing.SLOW_MILLISECONDS / 1e3
    flags.DEFINE_integer(
        "slow_repeats", defaults.slow_repeats, f"Rounds for a step that takes {slow:g} seconds or more.", lower_bound=1
    )
    flags.DEFINE_integer("warm_up", defaults.warm_up, "Steps before the first round.", lower_bound=1)
    flags.DEFINE_bool("memory", defaults.memory, "Measure peak memory instead of time.")
    flags.DEFINE_integer("memory_repeats", defaults.memory_repeats, "Processes for each variant.", lower_bound=1)
    flags.DEFINE_bool("profile", defaults.profile, "Print, after timing, where the steps spend their time.")
    flags.DEFINE_list("peers", [], f"Other packages, among {', '.join(peer_processes.ENVIRONMENTS)}.")
    flags.DEFINE_string("json", None, "File to which one JSON object a line is appended.")


def config_of_flags() -> Config:
    """The configuration that the flags give."""
    values = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(Config)}
    for name in ("batch_sizes", "microbatch_size"):
        values[name] = [int(value) for value in values[name]]
    return Config(**values)


def main(argv: list[str]) -> None:
    """Measures and prints the tables."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    try:
        config = config_of_flags()
        check(config)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    rows = run(config)
    about = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(f"\n{about}; {cores()} cores\n\n{report.render(rows)}", flush=True)


if __name__ == "__main__":
    define_flags()
    app.run(main)
