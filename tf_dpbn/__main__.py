"""Privacy accounting at the command line: `tf_dpbn COMMAND --flags`, or `python -m tf_dpbn`; without TensorFlow.

Errors are one line on standard error, with exit status 2.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from tf_dpbn import accounting
from tf_dpbn.accounting.statement import shown_epsilon
from tf_dpbn.version import __version__

_PACKAGES = ("tensorflow", "keras", "tf_keras", "dp-accounting", "numpy")
_POINTS = 50  # of a plot, for each configuration in the ledger

# Every flag that some command has: how absl defines it, its default, and its help.
_FLAGS: dict[str, tuple[Callable[..., Any], Any, str]] = {
    "accountant": (flags.DEFINE_string, "rdp", "rdp, or pld, which takes longer and is tighter"),
    "delta": (flags.DEFINE_float, None, "well below 1 / num_examples"),
    "epochs": (flags.DEFINE_float, None, "passes over the training set; or give --steps"),
    "expected_batch_size": (flags.DEFINE_integer, None, "mean number of examples in a batch"),
    "file": (
        flags.DEFINE_string,
        None,
        "a saved model (.keras), its weights (.weights.h5), a ledger file or JSON",
    ),
    "max_batch_size": (flags.DEFINE_integer, None, "rows to which larger draws are truncated; chosen if left out"),
    "network": (flags.DEFINE_string, "shallow", "features, shallow, deep or pretrained: see docs/choosing.md"),
    "noise_multiplier": (flags.DEFINE_float, None, "standard deviation of the noise over the clip norm"),
    "num_examples": (flags.DEFINE_integer, None, "in the training set"),
    "output": (flags.DEFINE_string, "epsilon.png", "where the plot goes"),
    "steps": (flags.DEFINE_integer, None, "number of training steps; or give --epochs"),
    "target_epsilon": (flags.DEFINE_float, None, "what the whole training may cost"),
}


class _Command(NamedTuple):
    run: Callable[[dict[str, Any]], str]  # from flags to what is printed
    purpose: str
    required: tuple[str, ...]
    optional: tuple[str, ...]


def _plan_of(options: dict[str, Any]) -> accounting.PrivacyPlan:
    return accounting.PrivacyPlan(**{name: options[name] for name in options.keys() - {"file", "output"}})


def _epsilon(options: dict[str, Any]) -> str:
    return shown_epsilon(_plan_of(options).epsilon)


def _noise(options: dict[str, Any]) -> str:
    return repr(_plan_of(options).noise_multiplier)  # all digits: rounded down, it would not be enough


def _plan(options: dict[str, Any]) -> str:
    plan = _plan_of(options)
    return (
        f"Noise multiplier {plan.noise_multiplier!r} in each of {plan.steps} steps.\n"
        f"Each batch holds each of {plan.num_examples} examples with probability {plan.sampling_probability:.6g}: "
        f"{plan.expected_batch_size} are expected, and draws of more than {plan.max_batch_size} are truncated.\n"
        f"Epsilon {shown_epsilon(plan.epsilon)} at delta {plan.delta:g}, by {plan.accountant.upper()} accounting."
    )


def _suggest(options: dict[str, Any]) -> str:
    return str(accounting.suggest(**options))


def _statement(options: dict[str, Any]) -> str:
    training = accounting.read_training(options["file"])
    return accounting.privacy_statement(
        training.ledger,
        delta=options["delta"],
        accountant=options["accountant"],
        not_covered=training.not_covered,
    ).rstrip()


def _plot(options: dict[str, Any]) -> str:
    delta, accountant, output = (options[name] for name in ("delta", "accountant", "output"))
    if options["file"] is None:
        ledger = accounting.Ledger([_plan_of(options).record()])
    elif given := [name for name in (*_SIZES[1:], *_NOISE, *_LENGTH) if options[name] not in (None, accountant)]:
        raise ValueError(
            f"Give `file`, or a plan, not both. Received: file={options['file']!r} with {', '.join(given)}"
        )
    else:
        ledger = accounting.read_training(options["file"]).ledger
    curve = _curve(ledger, delta, accountant)
    try:
        from matplotlib import figure
    except ImportError as error:
        raise ImportError("`plot` needs matplotlib. Install it by pip install 'tf_dpbn[plot]'.") from error
    drawing = figure.Figure(layout="constrained")
    axes = drawing.add_subplot(xlabel="steps", ylabel=f"epsilon at delta = {delta:g} ({accountant.upper()})")
    axes.plot(*zip(*curve, strict=True))
    axes.grid()
    drawing.savefig(output)
    return f"{output}: epsilon {shown_epsilon(curve[-1][1])} after {ledger.steps} steps"


def _curve(ledger: accounting.Ledger, delta: float, accountant: str) -> list[tuple[int, float]]:
    """(steps, epsilon) from 0 to the end, one configuration after the other."""
    done, curve = accounting.Ledger(), [(0, 0.0)]
    for entry in ledger.entries:
        marks = np.linspace(1, entry.steps, min(entry.steps, _POINTS)).astype(int)
        for steps in np.diff(marks, prepend=0):  # the first step, which costs most, is a point of its own
            done.record(dataclasses.replace(entry, steps=steps))
            curve.append((done.steps, done.epsilon(delta, accountant)))
    return curve


_SIZES = ("delta", "num_examples", "expected_batch_size")
_LENGTH = ("epochs", "steps", "accountant", "max_batch_size")
_NOISE = ("noise_multiplier", "target_epsilon")
_COMMANDS = {
    "epsilon": _Command(_epsilon, "the epsilon of a noise multiplier", ("noise_multiplier", *_SIZES), _LENGTH),
    "noise": _Command(_noise, "the noise multiplier for an epsilon", ("target_epsilon", *_SIZES), _LENGTH),
    "plan": _Command(_plan, "a training run in words, for a noise multiplier or an epsilon", _SIZES, _NOISE + _LENGTH),
    "suggest": _Command(
        _suggest, "settings to start from, and why", ("num_examples", "target_epsilon"), ("network", "delta")
    ),
    "statement": _Command(_statement, "what a model's training guarantees", ("file", "delta"), ("accountant",)),
    "plot": _Command(
        _plot, "epsilon over steps, of a plan or a file", ("delta",), ("file", "output", *_SIZES[1:], *_NOISE, *_LENGTH)
    ),
}


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _overview() -> str:
    lines = ["tf_dpbn COMMAND --flags; COMMAND --help lists the flags of one:"]
    lines += [f"  {name:9}  {command.purpose}" for name, command in _COMMANDS.items()]
    lines += [f"tf_dpbn {__version__}", *[f"{package} {_installed(package)}" for package in _PACKAGES]]
    return "\n".join(lines)


def _run(name: str, arguments: list[str]) -> str:
    """What a command prints."""
    if name in ("", "help", "--help", "--version"):
        return _overview()
    if name not in _COMMANDS:
        raise ValueError(f"There is no such command. Choose one of {', '.join(_COMMANDS)}. Received: {name!r}")
    command = _COMMANDS[name]
    values = flags.FlagValues()  # not absl's global ones, which belong to the program that imports this
    for flag in (*command.required, *command.optional):
        define, default, description = _FLAGS[flag]
        define(flag, default, description, flag_values=values)
    if {"--help", "-help"} & set(arguments):
        return f"tf_dpbn {name}: {command.purpose}\n{values.get_help(include_special_flags=False)}".rstrip()
    flags.mark_flags_as_required(command.required, flag_values=values)
    if others := values([name, *arguments])[1:]:
        raise ValueError(f"`{name}` takes flags only, such as --delta=1e-5. Received: {others}")
    return command.run(values.flag_values_dict())


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line, by default that of this process."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    try:
        print(_run(name, rest))
    except (ValueError, ImportError, OSError, flags.Error) as error:
        print(f"tf_dpbn {name}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
