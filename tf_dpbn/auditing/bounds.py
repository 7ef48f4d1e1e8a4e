"""Lower bounds on epsilon from how well an attacker guesses. Needs no TensorFlow.

All bounds hold with the stated confidence over the randomness of what is audited; none of them proves privacy: a
mechanism may leak more than an attacker finds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats

from tf_dpbn import _validate

# Which part of the runs chooses the attack, and how many thresholds it tries: more of them fit its accidents.
_CHOOSING = 0.25
_THRESHOLDS = 49


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditResult:
    """What an audit found.

    Attributes:
      epsilon_lower_bound: what was audited is not (epsilon, delta)-DP for any smaller epsilon, with the confidence.
      claimed_epsilon: the epsilon that the ledger claims at the same delta; None if there is no claim.
      delta: the delta of both.
      confidence: in (0, 1): how seldom the bound is wrong at most, as one minus that probability.
      method: how the bound was found, in words.

    Examples:
      >>> print(AuditResult(epsilon_lower_bound=2.718, claimed_epsilon=3.0, delta=1e-5, confidence=0.95, method=""))
      empirical epsilon >= 2.71 with 95% confidence (claimed: 3 at delta 1e-05)
    """

    epsilon_lower_bound: float
    claimed_epsilon: float | None
    delta: float
    confidence: float
    method: str

    @property
    def contradicts_claim(self) -> bool:
        """Whether the lower bound is above the claim: there is a bug, or the audit was unlucky."""
        return self.claimed_epsilon is not None and self.epsilon_lower_bound > self.claimed_epsilon

    def __str__(self) -> str:
        bound = math.floor(self.epsilon_lower_bound * 100.0) / 100.0
        claim = "nothing claimed" if self.claimed_epsilon is None else f"claimed: {self.claimed_epsilon:.4g}"
        confidence = f"{100.0 * self.confidence:g}% confidence"
        return f"empirical epsilon >= {bound:.2f} with {confidence} ({claim} at delta {self.delta:g})"


def _bounds(
    hits: Any, positives: int, misses: Any, negatives: int, *, delta: float, confidence: float, gaussian: bool
) -> np.ndarray:
    """What `hits` true and `misses` false positives need: an epsilon, or under `gaussian` the mu of Gaussian DP."""
    # One-sided Clopper-Pearson limits of the two rates, each wrong with half of what the confidence leaves.
    failure = (1.0 - _validate.open_probability("confidence", confidence)) / 2.0
    low = np.where(hits, stats.beta.ppf(failure, np.maximum(hits, 1), positives - hits + 1), 0.0)
    left = negatives - misses
    high = np.where(left, stats.beta.ppf(1.0 - failure, misses + 1, np.maximum(left, 1)), 1.0)
    if gaussian:
        return np.maximum(stats.norm.ppf(low) - stats.norm.ppf(high), 0.0)
    with np.errstate(divide="ignore"):
        positive = np.log(np.maximum(low - delta, 0.0)) - np.log(high)
        negative = np.log(np.maximum(1.0 - high - delta, 0.0)) - np.log(1.0 - low)
    return np.maximum(np.maximum(positive, negative), 0.0)


def _threshold(holds: Callable[[float], bool]) -> tuple[float, float]:
    """Brackets the epsilon up to which `holds`, which is true below it and false above; (0, 0) where it never is."""
    if not holds(0.0):
        return 0.0, 0.0
    low, high = 0.0, 1.0
    while holds(high):
        low, high = high, 2.0 * high
    for _ in range(60):
        middle = (low + high) / 2.0
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low, high


def epsilon_lower_bound(
    *,
    true_positives: int,
    positives: int,
    false_positives: int,
    negatives: int,
    delta: float,
    confidence: float = 0.95,
    gaussian: bool = False,
) -> float:
    """Lower bound on epsilon from guesses which of two neighbouring worlds a run came from.

    An (epsilon, delta)-DP mechanism has TPR <= e^epsilon FPR + delta, and the same for the complements. The two rates
    are bounded by Clopper-Pearson intervals, each at half of what the confidence leaves.

    Args:
      true_positives, positives: how many of how many independent runs with the example were guessed to be with it.
      false_positives, negatives: how many of how many runs without the example were guessed to be with it.
      delta, confidence: in (0, 1).
      gaussian: whether to assume that the trade-off between the rates is that of a Gaussian mechanism, mu-GDP: the
        rates then bound mu >= Phi^-1(TPR) - Phi^-1(FPR), and mu bounds epsilon (see `gaussian_epsilon`). Right for one
        step without sampling; without it no number of runs below 1/delta shows what happens at small delta.

    Returns:
      The bound, >= 0.

    Raises:
      ValueError: an argument is out of range. The threshold by which runs were guessed must not depend on them.

    Source: Jagielski, Ullman, Oprea, arXiv 2006.07709, section 4; for Gaussian mechanisms Nasr et al., "Tight Auditing
    of Differentially Private Machine Learning", arXiv 2302.07956, section 4; Dong, Roth, Su, arXiv 1905.02383.
    """
    for name, hits, limit_name, limit in (
        ("true_positives", true_positives, "positives", positives),
        ("false_positives", false_positives, "negatives", negatives),
    ):
        total = _validate.positive_int(limit_name, limit)
        if _validate.non_negative_int(name, hits) > total:
            raise _validate.argument_error(name, hits, f"be at most {limit_name}={total}")
    delta = _validate.open_probability("delta", delta)
    setting: dict[str, Any] = {"delta": delta, "confidence": confidence, "gaussian": gaussian}
    bound = float(_bounds(true_positives, positives, false_positives, negatives, **setting))
    return gaussian_epsilon(bound, delta) if gaussian else bound


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The exact epsilon of a mu-GDP Gaussian mechanism: mu is one over the noise multiplier.

    The smallest epsilon >= 0 with Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu) <= delta.

    Args:
      mu: >= 0.
      delta: in (0, 1).

    Raises:
      ValueError: an argument is out of range.

    Source: Balle and Wang, arXiv 1805.06530, Theorem 8; Dong, Roth, Su, arXiv 1905.02383, Corollary 2.13.

    Examples:
      >>> round(gaussian_epsilon(1.0, 1e-5), 3)
      4.377
    """
    mu, delta = _validate.non_negative("mu", mu), _validate.open_probability("delta", delta)

    def excess(epsilon: float) -> float:
        far = epsilon + stats.norm.logcdf(-mu / 2.0 - epsilon / mu)
        return float(stats.norm.cdf(mu / 2.0 - epsilon / mu) - math.exp(min(far, 0.0)) - delta)

    return _threshold(lambda epsilon: excess(epsilon) > 0.0)[1] if mu else 0.0


def two_world_epsilon(
    scores_without: np.ndarray,
    scores_with: np.ndarray,
    *,
    delta: float,
    confidence: float = 0.95,
    gaussian: bool = False,
) -> float:
    """Lower bound on epsilon from an attacker's scores of independent runs in two neighbouring worlds.

    The first quarter of the runs chooses the attack (which column of scores, and the threshold above which a run is
    guessed to be with the example); the others, which it has not seen, give the bound. So it is valid however many
    attacks are tried.

    Args:
      scores_without, scores_with: [runs] or [runs, attacks], of runs without the example and with it.
      delta, confidence, gaussian: as for `epsilon_lower_bound`.

    Raises:
      ValueError: fewer than four runs, different numbers of attacks, scores that are NaN, or a bad number.
    """
    negatives, checked_negatives = _parts("scores_without", scores_without)
    positives, checked_positives = _parts("scores_with", scores_with)
    choosing = negatives, positives
    if negatives.shape[1] != positives.shape[1]:
        requirement = f"have as many columns as scores_with, {positives.shape[1]}"
        raise _validate.argument_error("scores_without", negatives.shape, requirement)
    setting: dict[str, Any] = {"delta": delta, "confidence": confidence, "gaussian": gaussian}
    best, attack, threshold = -1.0, 0, math.inf
    for k in range(negatives.shape[1]):
        pooled = np.concatenate([negatives[:, k], positives[:, k]])
        thresholds = np.quantile(pooled, np.linspace(0.0, 1.0, _THRESHOLDS + 2)[1:-1], method="lower")
        # How many scores lie above each threshold.
        misses, hits = (len(s) - np.searchsorted(np.sort(s[:, k]), thresholds, side="right") for s in choosing)
        found = _bounds(hits, len(positives), misses, len(negatives), **setting)
        if found.max() > best:
            best, attack, threshold = float(found.max()), k, float(thresholds[found.argmax()])
    return epsilon_lower_bound(
        true_positives=int(np.sum(checked_positives[:, attack] > threshold)),
        positives=len(checked_positives),
        false_positives=int(np.sum(checked_negatives[:, attack] > threshold)),
        negatives=len(checked_negatives),
        **setting,
    )


def _parts(name: str, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    columns = np.asarray(scores, np.float64)
    columns = columns[:, None] if columns.ndim == 1 else columns
    if columns.ndim != 2 or len(columns) < 4 or np.isnan(columns).any():
        requirement = "hold at least 4 runs of [attacks] scores, none of them NaN"
        raise _validate.argument_error(name, columns.shape, requirement)
    choosing = max(1, int(_CHOOSING * len(columns)))
    return columns[:choosing], columns[choosing:]


def one_run_p_value(*, canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Bound on the probability that an (epsilon, delta)-DP training lets so many guesses be right.

    With W ~ Bin(guesses, e^epsilon / (1 + e^epsilon)):
      p = P[W >= correct] + 2 canaries delta max_{1 <= i <= correct} P[correct > W >= correct - i] / i,    at most 1.

    Args:
      canaries: m, how many examples were included by independent fair coins, 1 or more.
      guesses: r <= m, for how many of them a guess was made.
      correct: v <= r, how many guesses are right.
      epsilon: >= 0.
      delta: in [0, 1).

    Raises:
      ValueError: an argument is out of range.

    Source: Steinke, Nasr, Jagielski, "Privacy Auditing with One (1) Training Run", arXiv 2305.08846, Theorem 5.2 and
    Appendix D.
    """
    canaries = _validate.positive_int("canaries", canaries)
    guesses, correct = (_validate.non_negative_int(n, v) for n, v in (("guesses", guesses), ("correct", correct)))
    if not correct <= guesses <= canaries:
        received = f"{correct}, {guesses}, {canaries}"
        raise _validate.argument_error("correct, guesses, canaries", received, "be in rising order")
    epsilon = _validate.non_negative("epsilon", epsilon)
    if not 0.0 <= delta < 1.0:
        raise _validate.argument_error("delta", delta, "lie in [0, 1)")
    rate = 1.0 / (1.0 + math.exp(-epsilon))
    tail = float(stats.binom.sf(correct - 1, guesses, rate))
    below = np.cumsum(stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, rate))
    worst = float(np.max(below / np.arange(1, correct + 1))) if correct else 0.0
    return min(tail + 2.0 * canaries * delta * worst, 1.0)


def one_run_epsilon_lower_bound(
    *, canaries: int, guesses: int, correct: int, delta: float, confidence: float = 0.95
) -> float:
    """Lower bound on epsilon from the guesses of one training run: the largest epsilon that `one_run_p_value` refutes.

    Args:
      canaries, guesses, correct, delta: see `one_run_p_value`.
      confidence: in (0, 1).

    Raises:
      ValueError: an argument is out of range.

    Source: arXiv 2305.08846, Appendix D. Its example on page 46:

    Examples:
      >>> round(one_run_epsilon_lower_bound(canaries=1000, guesses=100, correct=75, delta=1e-4), 3)
      0.673
    """
    failure = 1.0 - _validate.open_probability("confidence", confidence)

    def refuted(epsilon: float) -> bool:
        p = one_run_p_value(canaries=canaries, guesses=guesses, correct=correct, epsilon=epsilon, delta=delta)
        return p < failure

    return _threshold(refuted)[0]


def one_run_audit(
    scores: np.ndarray,
    included: np.ndarray,
    *,
    delta: float,
    confidence: float = 0.95,
    guesses: tuple[int, int] | None = None,
) -> float:
    """Lower bound on epsilon from canaries' scores and from which of them were trained on.

    The k_plus canaries of highest score are guessed to be included, the k_minus of lowest score to be left out, and no
    guess is made for the others.

    Args:
      scores: [canaries], higher for what looks included.
      included: bool [canaries], results of independent fair coins.
      delta, confidence: see `one_run_epsilon_lower_bound`.
      guesses: (k_plus, k_minus), chosen before scores are seen; None takes a quarter of the canaries for each.

    Raises:
      ValueError: arrays of different lengths, NaN scores, or more guesses than canaries.

    Source: arXiv 2305.08846, Algorithm 1.
    """
    scores, included = np.asarray(scores, np.float64), np.asarray(included, bool)
    if scores.ndim != 1 or scores.shape != included.shape or np.isnan(scores).any():
        requirement = f"be numbers of the shape of `included`, {included.shape}, none of them NaN"
        raise _validate.argument_error("scores", scores.shape, requirement)
    count = len(scores)
    k_plus, k_minus = (count // 4, count // 4) if guesses is None else guesses
    if k_plus + k_minus > count:
        raise _validate.argument_error("guesses", guesses, f"add up to at most the {count} canaries")
    order = np.argsort(scores, kind="stable")
    correct = int(np.sum(included[order[count - k_plus :]])) + int(np.sum(~included[order[:k_minus]]))
    return one_run_epsilon_lower_bound(
        canaries=count, guesses=k_plus + k_minus, correct=correct, delta=delta, confidence=confidence
    )


def area_under_curve(scores: np.ndarray, member: np.ndarray) -> float:
    """P[a member's score > a non-member's], ties counted half.

    Args:
      scores: [examples].
      member: bool [examples], with members and non-members.
    """
    ranks, member = stats.rankdata(scores), np.asarray(member, bool)
    members, others = int(member.sum()), int((~member).sum())
    return float((ranks[member].sum() - members * (members + 1) / 2.0) / (members * others))


def true_positive_rate(scores: np.ndarray, member: np.ndarray, false_positive_rate: float = 0.01) -> float:
    """The largest part of the members above a threshold that at most the given part of the non-members exceeds.

    Args:
      scores, member: as for `area_under_curve`.
      false_positive_rate: in (0, 1).
    """
    scores, member = np.asarray(scores, np.float64), np.asarray(member, bool)
    others = np.sort(scores[~member])
    allowed = math.floor(_validate.open_probability("false_positive_rate", false_positive_rate) * len(others))
    return float(np.mean(scores[member] > others[len(others) - 1 - allowed]))
