"""`python -m tf_dpbn`: which versions run, or with `plan` how much noise a privacy budget asks for."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence

from tf_dpbn import accounting
from tf_dpbn.version import __version__

_PACKAGES = ("tensorflow", "keras", "tf_keras", "dp-accounting", "numpy")


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tf_dpbn", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    plan = commands.add_parser("plan", help="the noise multiplier for an epsilon, or the epsilon of a noise multiplier")
    budget = plan.add_mutually_exclusive_group(required=True)
    budget.add_argument("--target_epsilon", type=float, help="what the whole training may cost")
    budget.add_argument("--noise_multiplier", type=float, help="standard deviation of the noise over the clip norm")
    length = plan.add_mutually_exclusive_group(required=True)
    length.add_argument("--epochs", type=float)
    length.add_argument("--steps", type=int)
    plan.add_argument("--delta", type=float, required=True, help="well below 1 / num_examples")
    plan.add_argument("--num_examples", type=int, required=True, help="in the training set")
    plan.add_argument("--expected_batch_size", type=int, required=True, help="mean number of examples in a batch")
    plan.add_argument("--accountant", choices=("rdp", "pld"), default="rdp", help="pld takes longer and is tighter")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    options = vars(_parser().parse_args(arguments))
    if options.pop("command") is None:
        print("\n".join([f"tf_dpbn {__version__}", *[f"{package} {_installed(package)}" for package in _PACKAGES]]))
        return
    try:
        plan = accounting.PrivacyPlan(**options)
    except ValueError as error:
        sys.exit(f"{error}")
    print(
        f"noise_multiplier {plan.noise_multiplier:.6g}\nepsilon {plan.epsilon:.6g} at delta {plan.delta:g} "
        f"({plan.accountant})\nsteps {plan.steps} of {plan.expected_batch_size} expected examples, "
        f"{plan.max_batch_size} rows at most"
    )


if __name__ == "__main__":
    main()
