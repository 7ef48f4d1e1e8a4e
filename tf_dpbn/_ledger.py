"""What private training did, and what it cost: steps in, (epsilon, delta) out.

Needs no TensorFlow.
Users reach these names through `tf_dpbn.accounting`; this file holds the half that looks back
(events, overflow of padded batches, the ledger), `accounting` the half that plans ahead.

Formal guarantee. Data sets are neighbours when one is the other plus one example. With every
example in each step's batch independently with probability q, and every release of a step a
Gaussian mechanism with its own noise multiplier, `Ledger.epsilon(delta)` is an epsilon for which
everything released over all recorded steps is (epsilon, delta)-DP.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from typing import Any

import dp_accounting
import numpy as np
from scipy import special, stats

from tf_dpbn import _validate

ACCOUNTANTS = ("rdp", "pld")
SAMPLINGS = ("poisson", "assumed")
_FORMAT, _VERSION = "tf_dpbn.Ledger", 1

# Above this RDP epsilon no privacy worth a number is left, and the grid of a privacy loss
# distribution (1e-4 wide, as long as the largest loss) takes minutes and gigabytes: "pld" then
# answers with the RDP bound, which is also valid.
_PLD_CEILING = 50.0
# Renyi orders: large ones show small epsilons, down to about log(1/delta) / 2^14; fractional ones large epsilons.
_WHOLE_ORDERS = np.unique([*range(2, 65), *(64 * 2.0 ** np.arange(0.0, 8.1, 0.125)).astype(int)])
_FRACTIONAL_ORDERS = np.array([1.0 + tenth / 10.0 for tenth in range(1, 100) if tenth % 10])
_ORDERS = np.concatenate([_FRACTIONAL_ORDERS, _WHOLE_ORDERS])
# Of fractional orders, where that of order 2 is above this; below, they could only serve more than 10^8 steps.
_SMALLEST_DIVERGENCE = 1e-9
# dp_accounting's series ends at a term below exp(-30); this leaves a margin.
_LAST_TERM = 30.5
# Up to here, in standard deviations, the noise's distribution is the normal one; see `tail_delta`.
_TAIL = 11.0


def effective_noise_multiplier(noise_multipliers: Sequence[float]) -> float:
    """Returns the multiplier of the one Gaussian that a step's Gaussian releases amount to.

    (sum_j sigma_j^-2)^(-1/2): adaptive composition of Gaussian mechanisms on the same batch is
    dominated by a single Gaussian (Dong, Roth, Su, "Gaussian Differential Privacy", arXiv
    1905.02383, Corollary 3.3).

    Args:
      noise_multipliers: standard deviation / L2 sensitivity of each release (at least one), >= 0.

    Returns:
      A float; 0.0 if any release is without noise.

    Raises:
      ValueError: the sequence is empty, or an entry is negative or not finite.
    """
    if isinstance(noise_multipliers, str) or not isinstance(noise_multipliers, Sequence):
        raise _validate.argument_error("noise_multipliers", noise_multipliers, "be a tuple of numbers")
    sigmas = [_validate.non_negative("noise_multipliers", sigma) for sigma in noise_multipliers]
    if not sigmas:
        raise _validate.argument_error("noise_multipliers", noise_multipliers, "name at least one release")
    smallest = min(sigmas)
    if smallest == 0.0:
        return 0.0
    # Divided by the smallest first, so that no square leaves the range of a float.
    return smallest / math.sqrt(math.fsum((smallest / sigma) ** 2 for sigma in sigmas))


def split_noise_multiplier(
    noise_multiplier: float, statistics_fraction: float, statistic_releases: int
) -> tuple[float, ...]:
    """Divides a step's privacy between the gradient and releases of statistics.

    Of sigma^-2 a fraction rho goes to n statistic releases, in equal parts, and the rest to the gradient:
      sigma_g = sigma / sqrt(1 - rho),    sigma_s = sigma sqrt(n / rho),    (1/sigma_g^2 + n/sigma_s^2)^(-1/2) = sigma.

    Args:
      noise_multiplier: sigma, effective noise multiplier of the step, >= 0.
      statistics_fraction: rho, in (0, 1).
      statistic_releases: n, >= 0; 0 leaves everything to the gradient.

    Returns:
      (sigma_g, sigma_s, ..., sigma_s), whose effective noise multiplier is sigma, never less.

    Raises:
      ValueError: an argument is out of range.

    >>> [round(sigma, 4) for sigma in split_noise_multiplier(1.0, 0.5, 2)]
    [1.4142, 2.0, 2.0]
    """
    sigma = _validate.non_negative("noise_multiplier", noise_multiplier)
    rho = _validate.open_probability("statistics_fraction", statistics_fraction)
    n = _validate.non_negative_int("statistic_releases", statistic_releases)
    if n == 0:
        return (sigma,)
    parts = (sigma / math.sqrt(1.0 - rho), *[sigma * math.sqrt(n / rho)] * n)
    # Folded again, rounding must not leave less than sigma.
    while sigma and effective_noise_multiplier(parts) < sigma:
        parts = tuple(part * (1.0 + 1e-15) for part in parts)
    return parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRecord:
    """A run of training steps with one configuration.

    Attributes:
      sampling_probability: probability q in (0, 1] that a given example is in a step's batch; None
        if unknown.
      noise_multipliers: standard deviation / L2 sensitivity of each release of a step.
      steps: how many such steps, >= 0.
      num_examples: size N of the data set (public), or None.
      max_batch_size: rows M of the padded batch to which larger draws are cut, or None if nothing
        is ever cut. Its overflow is charged to delta, so N and q must then be known (q may be
        filled in later if sampling is "assumed").
      sampling: "poisson" if the batches came from this library's Poisson sampler, "assumed" if that
        is taken on trust.
    """

    sampling_probability: float | None
    noise_multipliers: tuple[float, ...]
    steps: int
    num_examples: int | None = None
    max_batch_size: int | None = None
    sampling: str = "assumed"

    def __post_init__(self) -> None:
        # Python's own numbers throughout: dp_accounting loses noise multipliers that are ints or
        # numpy floats.
        put = functools.partial(object.__setattr__, self)
        effective_noise_multiplier(self.noise_multipliers)
        put("noise_multipliers", tuple(float(sigma) for sigma in self.noise_multipliers))
        put("steps", _validate.non_negative_int("steps", self.steps))
        _validate.one_of("sampling", self.sampling, SAMPLINGS)
        if self.sampling_probability is not None:
            put(
                "sampling_probability",
                _validate.probability("sampling_probability", self.sampling_probability),
            )
        elif self.sampling == "poisson":
            remedy = "The sampler knows it: expected_batch_size / num_examples."
            raise _validate.argument_error("sampling_probability", None, "be given for Poisson sampling", remedy)
        for name in ("num_examples", "max_batch_size"):
            if getattr(self, name) is not None:
                put(name, _validate.positive_int(name, getattr(self, name)))
        if self.max_batch_size is not None and self.num_examples is None:
            remedy = "The probability that a batch overflows `max_batch_size` depends on it."
            raise _validate.argument_error("num_examples", None, "be given with `max_batch_size`", remedy)

    @property
    def effective_noise_multiplier(self) -> float:
        """`effective_noise_multiplier(noise_multipliers)` of one step."""
        return effective_noise_multiplier(self.noise_multipliers)

    @property
    def overflow_delta(self) -> float:
        """steps * P[Bin(N, q) >= M], the delta that cut batches cost; 0.0 if none can be cut."""
        if self.max_batch_size is None or self.num_examples is None or self.steps == 0:
            return 0.0
        return self.steps * overflow_probability(
            num_examples=self.num_examples,
            sampling_probability=_known_probability(self),
            max_batch_size=self.max_batch_size,
        )


def _known_probability(record: StepRecord) -> float:
    if record.sampling_probability is None:
        remedy = (
            "Without it no epsilon can be given. Pass `num_examples` to the optimizer, or build it "
            "from a PrivacyPlan, or fill it in with `ledger.with_sampling_probability(q)`."
        )
        raise _validate.argument_error("sampling_probability", None, "be known for every step", remedy)
    return record.sampling_probability


def dp_sgd_event(record: StepRecord) -> dp_accounting.DpEvent:
    """Returns SelfComposed(PoissonSampled(q, Gaussian(sigma_eff)), steps).

    The multipliers are folded here and not left to the accountant as nested events, because
    dp_accounting 0.4.3 to 0.6.0 drops some of them. Subsampling acts on the folded Gaussian: all
    releases of a step use one draw (Zhu, Dong, Wang, "Optimal Accounting of Differential Privacy
    via Characteristic Function", arXiv 2106.08567).

    Raises:
      ValueError: the record's sampling probability is unknown.
    """
    return gaussian_event(_known_probability(record), record.effective_noise_multiplier, record.steps)


def gaussian_event(sampling_probability: float, noise_multiplier: float, steps: int) -> dp_accounting.DpEvent:
    """The event of `steps` Poisson-sampled Gaussians, in the Python numbers that it needs."""
    gaussian = dp_accounting.GaussianDpEvent(float(noise_multiplier))
    sampled = dp_accounting.PoissonSampledDpEvent(float(sampling_probability), gaussian)
    return dp_accounting.SelfComposedDpEvent(sampled, int(steps))


def overflow_probability(*, num_examples: int, sampling_probability: float, max_batch_size: int) -> float:
    """Returns P[Bin(N, q) >= M], by which each step with batches cut to M rows adds to delta.

    A Poisson draw of more than M examples is cut to M of them at random, and the cut couples
    examples. Take neighbours D (N examples) and D + x, and draw the common examples S_t of each
    step alike in both; whether x is drawn does not depend on S_t. If |S_t| <= M - 1 in all steps,
    then neither data set overflows, and for each such fixed S_1..S_T the two outputs are dominated
    by the composed Poisson-subsampled Gaussian pair. Averaging over S, for every event E,
      P[E] <= exp(epsilon) Q[E] + delta(epsilon) + sum_t P[Bin(N, q) >= M],    in both directions.
    The test is >= M and not > M: with |S_t| = M, drawing x already pushes another example out. N is
    the size of the recorded data set; against the neighbour with one example fewer the common part,
    and so the charge, is smaller.

    Raises:
      ValueError: an argument is out of range.
    """
    count = _validate.positive_int("num_examples", num_examples)
    probability = _validate.probability("sampling_probability", sampling_probability)
    rows = _validate.positive_int("max_batch_size", max_batch_size)
    return float(stats.binom.sf(rows - 1, count, probability))


def tail_delta(noise_multiplier: float) -> float:
    """Returns the delta that a step costs because its noise, drawn from 96 bits, ends 11.59 standard deviations out.

    In real numbers what is drawn is the Gaussian on a bounded set around each sum: pairs of coordinates on discs of
    radius R > 11.5 standard deviations. The sets of two neighbouring sums, s apart in standard deviations,
    |s| <= 1/sigma, overlap but for a part of probability sum_j P[|Z_j + s_j| > R] over the pairs j. There a release may
    be possible in one world only; elsewhere both densities are the Gaussians' over one constant, so that their ratio is
    the Gaussians'. The sum is largest where a single pair has all of s (each term is convex in |s_j|^2 for
    |s_j| <= 10), and then at most
      P[Z > 11 - 1/sigma] + 2^32 P[Z > 11]
    for fewer than 2^31 coordinates in all draws of a step. It is charged in every step, whatever the sampling. Steps of
    other generators' noise are not covered: TensorFlow's own ends at 5.68. Nor is how finely floats are spaced.

    Raises:
      ValueError: noise_multiplier is negative or not finite.

    >>> [f"{tail_delta(sigma):.0e}" for sigma in (10.0, 1.0, 0.5, 0.2)]
    ['8e-19', '8e-19', '9e-19', '1e-09']
    """
    sigma = _validate.non_negative("noise_multiplier", noise_multiplier)
    if sigma == 0.0:
        return 1.0
    return float(stats.norm.sf(_TAIL - 1.0 / sigma) + 2.0**32 * stats.norm.sf(_TAIL))


def default_max_batch_size(
    *,
    num_examples: int,
    sampling_probability: float,
    steps: int,
    delta: float,
    share: float = 0.01,
    multiple: int = 8,
) -> int:
    """Returns the fewest rows, a multiple of `multiple`, that keep the overflow's cost low.

    Low is at most `share` of delta over all steps. Never above the first multiple that exceeds
    num_examples, where nothing can overflow.

    Raises:
      ValueError: an argument is out of range.
    """
    multiple = _validate.positive_int("multiple", multiple)
    allowed = _validate.open_probability("delta", delta) * _validate.open_probability("share", share)
    steps = _validate.positive_int("steps", steps)
    low, high = 0, -(-(_validate.positive_int("num_examples", num_examples) + 1) // multiple)
    while high - low > 1:  # `high` blocks suffice, `low` do not
        middle = (low + high) // 2
        charge = steps * overflow_probability(
            num_examples=num_examples,
            sampling_probability=sampling_probability,
            max_batch_size=middle * multiple,
        )
        low, high = (low, middle) if charge <= allowed else (middle, high)
    return high * multiple


def _subsampled_divergence(order: int, q: float, sigma: float) -> float:
    """The Renyi divergence of a whole order of one Poisson-sampled Gaussian, exact to rounding.

    With A = sum_k C(a, k) (1-q)^(a-k) q^k exp((k^2-k) / 2 sigma^2) it is log(A) / (a-1) (Mironov, Talwar, Zhang, arXiv
    1908.10530, section 3.3). The binomial terms without the exponential sum to 1, so A - 1 is a sum of positive terms:
    no digits are lost however small it is.
    """
    k = np.arange(2, order + 1)
    exponents = (k * k - k) / (2.0 * sigma * sigma)
    grown = np.where(exponents < 30.0, np.log(np.expm1(np.minimum(exponents, 30.0))), exponents)  # of exp(x) - 1
    chosen = special.gammaln(order + 1) - special.gammaln(k + 1) - special.gammaln(order - k + 1)
    terms = chosen + k * math.log(q) + (order - k) * math.log1p(-q) + grown
    return float(np.logaddexp(0.0, special.logsumexp(terms))) / (order - 1)


def _size_of_last_term(q: float, sigma: float) -> np.ndarray:
    """Logarithm of the 1,000th term of dp_accounting's series for fractional orders a (the same paper, equation 30).

    The n-th is C(a, n) (1-q)^(a-n) q^n exp((n^2-n) / 2 sigma^2) erfc((n - z) / sqrt(2) sigma) / 2, whose exponentials
    cancel with z = sigma^2 log(1/q - 1) + 1/2: what is left falls off as n^-(a+2) only.
    """
    a, n, z = _FRACTIONAL_ORDERS, 1000.0, sigma * sigma * math.log(1.0 / q - 1.0) + 0.5
    chosen = special.gammaln(a + 1.0) + np.log(np.abs(np.sin(math.pi * a)) / math.pi) - (a + 1.0) * math.log(n)
    tail = math.log(sigma / math.sqrt(2.0 * math.pi)) - math.log(max(n - z, 1.0)) - z * z / (2.0 * sigma * sigma)
    return chosen + tail + a * math.log1p(-q)


@functools.lru_cache(maxsize=256)
def _step_divergences(step: dp_accounting.DpEvent) -> np.ndarray:
    """Renyi divergences of one step, by order; those of T equal steps are T times as large (they add up).

    Infinite at fractional orders that dp_accounting cannot compute: where log(A) is a rounding error, and where its
    series does not end within the 1,000 terms that it takes (0.6.0, which says so in the log).
    """
    q, sigma = step.sampling_probability, step.event.noise_multiplier
    if q == 1.0:
        return _ORDERS / (2.0 * sigma * sigma)
    whole = np.array([_subsampled_divergence(int(order), q, sigma) for order in _WHOLE_ORDERS])
    known = (_size_of_last_term(q, sigma) < -_LAST_TERM) & (whole[0] > _SMALLEST_DIVERGENCE)
    fractional = np.full(len(_FRACTIONAL_ORDERS), math.inf)
    if known.any():
        renyi = dp_accounting.rdp.RdpAccountant(_FRACTIONAL_ORDERS[known].tolist())
        fractional[known] = renyi.compose(step).rdp
    return np.concatenate([fractional, whole])


@functools.lru_cache(maxsize=256)
def epsilon_of_events(events: tuple[dp_accounting.DpEvent, ...], delta: float, accountant: str) -> float:
    """Returns epsilon of composed `gaussian_event`s at delta, less what `tail_delta` charges; math.inf without a bound.

    "pld" is the smaller of the PLD and the RDP bound, both of which hold; RDP alone above 50.
    """
    _validate.one_of("accountant", accountant, ACCOUNTANTS)
    events = tuple(event for event in events if event.count)
    if not events:
        return 0.0
    delta -= math.fsum(event.count * tail_delta(event.event.event.noise_multiplier) for event in events)
    if delta <= 0.0:
        return math.inf
    steps = [(event.count, _step_divergences(event.event)) for event in events]
    divergences = sum(count * step for count, step in steps)
    epsilon = float(dp_accounting.rdp.compute_epsilon(_ORDERS, divergences, delta)[0])
    if accountant == "pld" and epsilon <= _PLD_CEILING:
        pld = dp_accounting.pld.PLDAccountant()
        for event in events:
            pld.compose(event)
        epsilon = min(epsilon, float(pld.get_epsilon(delta)))
    return math.inf if math.isnan(epsilon) else max(epsilon, 0.0)


class Ledger:
    """The steps that really ran, in the order of their first occurrence, and their cost.

    | state | epsilon(delta) |
    | --- | --- |
    | no steps | 0.0 |
    | a release without noise | math.inf |
    | overflow_delta() + tail_delta() >= delta | math.inf |
    | a sampling probability is unknown | ValueError that says how to supply it |
    """

    def __init__(self, entries: Sequence[StepRecord] = ()) -> None:
        self._steps: dict[StepRecord, int] = {}
        for entry in entries:
            self.record(entry)

    def record(self, record: StepRecord) -> None:
        """Adds steps; those of an equal configuration are merged."""
        if not isinstance(record, StepRecord):
            raise _validate.argument_error("record", record, "be a StepRecord", kind=TypeError)
        if record.steps:
            key = dataclasses.replace(record, steps=0)
            self._steps[key] = self._steps.get(key, 0) + record.steps

    @property
    def entries(self) -> tuple[StepRecord, ...]:
        """One record for each configuration, with all its steps."""
        return tuple(dataclasses.replace(key, steps=steps) for key, steps in self._steps.items())

    @property
    def steps(self) -> int:
        """Number of all steps."""
        return sum(self._steps.values())

    def overflow_delta(self) -> float:
        """Returns the part of delta that cut batches cost: sum over steps of P[Bin(N, q) >= M]."""
        return math.fsum(entry.overflow_delta for entry in self.entries)

    def tail_delta(self) -> float:
        """Returns the part of delta that the end of the noise's tail costs; see `tail_delta`."""
        return math.fsum(entry.steps * tail_delta(entry.effective_noise_multiplier) for entry in self.entries)

    def epsilon(self, delta: float, accountant: str = "rdp") -> float:
        """Returns epsilon of all steps together at `delta`, the overflow of cut batches and the noise's tail included.

        Raises:
          ValueError: delta is not in (0, 1), the accountant is unknown, or a sampling probability
          is unknown.
        """
        delta = _validate.open_probability("delta", delta)
        _validate.one_of("accountant", accountant, ACCOUNTANTS)
        events = tuple(dp_sgd_event(entry) for entry in self.entries)
        return epsilon_of_events(events, delta - self.overflow_delta(), accountant)

    def with_sampling_probability(self, sampling_probability: float) -> Ledger:
        """Returns a copy whose unknown sampling probabilities have the given value."""
        q = _validate.probability("sampling_probability", sampling_probability)
        filled = Ledger()
        for entry in self.entries:
            unknown = entry.sampling_probability is None
            filled.record(dataclasses.replace(entry, sampling_probability=q) if unknown else entry)
        return filled

    def copy(self) -> Ledger:
        """Returns an independent copy."""
        return Ledger(self.entries)

    def to_json(self) -> str:
        """Returns the ledger as text that `from_json` restores exactly."""
        entries = [dataclasses.asdict(entry) for entry in self.entries]
        return json.dumps({"format": _FORMAT, "version": _VERSION, "entries": entries}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Ledger:
        """Restores `to_json`'s text.

        Raises:
          ValueError: the text is corrupt, not a ledger, or of a version that this code does not
          know.
        """
        try:
            content = json.loads(text)
            if content["format"] != _FORMAT or set(content) != {"format", "version", "entries"}:
                raise ValueError("it is not a ledger")
            if type(content["version"]) is not int or content["version"] != _VERSION:
                raise ValueError(f"its version is {content['version']!r}, and this code reads {_VERSION}")
            return cls([_record_from(fields) for fields in content["entries"]])
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            remedy = f"Reading it failed: {error}."
            raise _validate.argument_error("text", text, "be the JSON of a Ledger", remedy) from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ledger) and self._steps == other._steps

    __hash__ = None  # type: ignore[assignment]  # a ledger changes

    def __repr__(self) -> str:
        return f"Ledger({list(self.entries)!r})"


def _record_from(fields: Any) -> StepRecord:
    if set(fields) != {field.name for field in dataclasses.fields(StepRecord)}:
        raise ValueError(f"an entry has the fields {sorted(fields)}")
    if not isinstance(fields["noise_multipliers"], list):
        raise TypeError("noise_multipliers is not a list")
    return StepRecord(**{**fields, "noise_multipliers": tuple(fields["noise_multipliers"])})
