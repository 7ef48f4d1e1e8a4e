"""What the example scripts' command lines have in common: flags become a Config, the result becomes a line of JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any, TypeVar

from absl import app, flags, logging

ConfigT = TypeVar("ConfigT")

flags.disclaim_key_flags()  # flags defined here count as those of the calling script, whose --help shows them


def runner(config: type[ConfigT], run: Callable[[ConfigT], dict[str, Any]]) -> Callable[[list[str]], None]:
    """Returns the main function for `absl.app.run`: it calls `run` with the flags and prints the JSON line.

    Args:
      config: dataclass; its fields have the names of flags, and those without a flag keep their defaults.
      run: from a config to what the JSON line holds.
    """

    def main(argv: list[str]) -> None:
        prepare(argv)
        print(json.dumps(run(config_from_flags(config))), flush=True)

    return main


def prepare(argv: list[str]) -> None:
    """Refuses arguments that are no flags, and leaves TensorFlow's notes on saving out of the output.

    Raises:
      absl.app.UsageError: if there are such arguments.
    """
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)


def config_from_flags(config: type[ConfigT]) -> ConfigT:
    """The flags as a config; a flag that may be given several times becomes a tuple."""
    fields: Any = dataclasses.fields(config)  # type: ignore[arg-type]
    values = {field.name: flags.FLAGS[field.name].value for field in fields if field.name in flags.FLAGS}
    return config(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def round_up(epsilon: float) -> float | None:
    """Epsilon for the JSON line, with 4 digits; up, since the printed number is a guarantee too. None if infinite."""
    return math.ceil(epsilon * 1e4) / 1e4 if math.isfinite(epsilon) else None


def define_training_flags(defaults: Any) -> None:
    """Defines the flags that all trainings have, with the fields of a config as defaults."""
    flags.DEFINE_float("delta", defaults.delta, "Delta, well below 1 / training examples.")
    flags.DEFINE_float("l2_norm_clip", defaults.l2_norm_clip, "Bound on an example's gradient.")
    flags.DEFINE_float("learning_rate", defaults.learning_rate, "First learning rate.")
    flags.DEFINE_integer("epochs", defaults.epochs, "Passes over the data.", lower_bound=1)
    flags.DEFINE_integer("batch_size", defaults.batch_size, "Expected batch size, over all replicas.", lower_bound=1)
    flags.DEFINE_integer("max_examples", None, "Use only so many training examples.", lower_bound=1)
    flags.DEFINE_integer(
        "seed",
        defaults.seed,
        "Seed of initial weights, public batch, and split. Privacy noise and the sampling of batches have no seed, so "
        "two runs differ.",
        lower_bound=0,
    )
