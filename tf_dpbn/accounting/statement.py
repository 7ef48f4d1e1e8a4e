"""Accounting in words: the privacy statement, and the numbers tensorflow-privacy would print."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from typing import NamedTuple

from tf_dpbn import _validate
from tf_dpbn.accounting.events import epsilon_of_events, gaussian_event
from tf_dpbn.accounting.ledger import Ledger, StepRecord


class TensorFlowPrivacyEpsilons(NamedTuple):
    """The two example-level epsilons of tensorflow-privacy's statement."""

    each_example_once_per_epoch: float
    poisson: float


def tensorflow_privacy_epsilons(
    *,
    number_of_examples: int,
    batch_size: int,
    num_epochs: float,
    noise_multiplier: float,
    delta: float,
    used_microbatching: bool = True,
) -> TensorFlowPrivacyEpsilons:
    """Returns the two numbers that tensorflow-privacy's statement prints, for comparison only.

    It is compute_dp_sgd_privacy_statement of tensorflow-privacy 0.9.0. Both use RDP. With microbatching of more than
    one example it halves the noise multiplier, since one example more or less can move a microbatch's clipped mean by
    twice the clip norm (Ponomareva et al., "How to DP-fy ML", arXiv 2303.00654, section 5.6). "Each example once per
    epoch" composes ceil(num_epochs) Gaussians without subsampling.

    Raises:
      ValueError: an argument is out of range.
    """
    count = _validate.positive_int("number_of_examples", number_of_examples)
    q = _validate.probability("batch_size / number_of_examples", _validate.positive("batch_size", batch_size) / count)
    epochs = _validate.positive("num_epochs", num_epochs)
    sigma = _validate.non_negative("noise_multiplier", noise_multiplier) / (2.0 if used_microbatching else 1.0)
    delta = _validate.open_probability("delta", delta)
    once = gaussian_event(1.0, sigma, math.ceil(epochs))
    poisson = gaussian_event(q, sigma, math.ceil(epochs / q))
    return TensorFlowPrivacyEpsilons(*(epsilon_of_events((event,), delta, "rdp") for event in (once, poisson)))


_COVERED = ("the final weights and every checkpoint of them", "the normalization statistics stored with them")
_NOT_COVERED = (
    "loss and metrics logged in training, which carry no noise",
    "counters for debugging",
    "hyper-parameter search: every further run on the same data costs its own budget",
    "validation on private data, and early stopping on private metrics",
    "preprocessing fitted on private data, such as vocabularies, means and scales",
    "side channels such as timing or memory",
    "floating-point effects of the noise: the analysis is for real numbers",
)
_NEIGHBOURS = {
    "example": "Neighbouring data sets differ by adding or removing one example: one row of the data given to "
    "poisson_dataset or fit. Whoever has several rows in it has less protection than epsilon says.",
    "user": "Neighbouring data sets differ by adding or removing one user, with all of their examples: all rows of one "
    "of the user_ids given to poisson_dataset.",
    "both": "Neighbouring data sets differ by adding or removing one example whose user has no other: some steps drew "
    "examples, others users. Whoever has several examples has less protection than epsilon says.",
}
_SAMPLING_SENTENCES = {
    "poisson": "Poisson sampling by this library: each {unit} in each batch independently.",
    "assumed": (
        "Poisson sampling is ASSUMED: these batches are not known to come from this library's sampler. Shuffled or "
        "fixed-order batches do not satisfy the assumption, and this epsilon is then no guarantee."
    ),
}


def privacy_statement(
    ledger: Ledger,
    *,
    delta: float,
    accountant: str = "rdp",
    covered: Iterable[str] = (),
    not_covered: Iterable[str] = (),
) -> str:
    """Returns, in plain words, what the recorded training guarantees and what it does not.

    Args:
      ledger: what ran.
      delta: in (0, 1).
      accountant: "rdp" or "pld".
      covered: further things that the guarantee covers, one phrase each.
      not_covered: further things that it does not cover.

    Raises:
      ValueError: delta or accountant is out of range, or a sampling probability is unknown.
    """
    epsilon = ledger.epsilon(delta, accountant)
    paragraphs = [_headline(ledger, epsilon, delta, accountant)]
    paragraphs += [_entry_text(entry) for entry in ledger.entries]
    if ledger.entries:
        paragraphs.append(
            f"Of delta, {ledger.truncation_delta():.3g} pays for batches truncated to their padded size, and "
            f"{ledger.tail_delta():.3g} for what the noise's tail leaves out."
        )
    units = {entry.unit for entry in ledger.entries}
    paragraphs.append(_NEIGHBOURS["both" if len(units) > 1 else ledger.unit])
    paragraphs.append(
        f"Treated as public, and not protected: the number of {ledger.unit}s and the expected batch size; the initial "
        "weights; the public batch, if there is one, which is stored with the model."
    )
    paragraphs.append("Covered: " + "; ".join((*_COVERED, *covered)) + ".")
    paragraphs.append("NOT covered: " + "; ".join((*_NOT_COVERED, *not_covered)) + ".")
    return "\n\n".join(textwrap.fill(paragraph, width=80) for paragraph in paragraphs) + "\n"


def shown_epsilon(epsilon: float) -> str:
    """Epsilon to four decimals, rounded up, never down: the printed number must be a guarantee too."""
    return f"{math.ceil(epsilon * 1e4) / 1e4:.4f}" if math.isfinite(epsilon) else "infinite"


def _headline(ledger: Ledger, epsilon: float, delta: float, accountant: str) -> str:
    if ledger.steps == 0:
        return "No training step is recorded here: epsilon = 0 for this ledger's training."
    if math.isinf(epsilon):
        if any(entry.effective_noise_multiplier == 0.0 for entry in ledger.entries):
            reason = "a release carried no noise"
        elif ledger.truncation_delta() + ledger.tail_delta() >= delta:
            reason = "truncated batches and the end of the noise's tail cost all of delta"
        else:
            reason = "the accountant finds no bound"
        return f"NO PRIVACY GUARANTEE: epsilon is infinite at delta = {delta:g}, because {reason}."
    assumed = any(entry.sampling == "assumed" for entry in ledger.entries)
    condition = ", PROVIDED that the sampling assumed below is what happened" if assumed else ""
    return (
        f"Training was (epsilon, delta)-differentially private with epsilon = {shown_epsilon(epsilon)} at delta = "
        f"{delta:g}, after {ledger.steps} steps, by {accountant.upper()} accounting{condition}."
    )


def _entry_text(entry: StepRecord) -> str:
    multipliers = ", ".join(f"{sigma:.6g}" for sigma in entry.noise_multipliers)
    probability = entry.sampling_probability or 0.0
    noise = f"noise multiplier {multipliers}"
    if len(entry.noise_multipliers) > 1:
        noise = f"noise multipliers ({multipliers}), together {entry.effective_noise_multiplier:.6g}"
    text = f"{entry.steps} steps: sampling probability {probability:.6g}, {noise}"
    if entry.num_examples is not None:
        expected = probability * entry.num_examples
        text += f"; {entry.num_examples} {entry.unit}s, {expected:.6g} expected in a batch"
    if entry.max_batch_size is not None:
        text += f", at most {entry.max_batch_size}"
    return f"{text}. {_SAMPLING_SENTENCES[entry.sampling].format(unit=entry.unit)}"
