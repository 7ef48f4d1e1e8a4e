"""What a step releases and what it costs: noise multipliers, dp_accounting's events, Renyi orders, epsilon."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import dp_accounting
import numpy as np
from scipy import special, stats

from tf_dpbn import _validate

ACCOUNTANTS = ("rdp", "pld")

# Above this RDP epsilon no privacy worth a number is left, and the grid of a privacy loss distribution (1e-4 wide, as
# long as the largest loss) takes minutes and gigabytes: "pld" then answers with the RDP bound, which is also valid.
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

    (sum_j sigma_j^-2)^(-1/2): adaptive composition of Gaussian mechanisms on the same batch is dominated by a single
    Gaussian (Dong, Roth, Su, "Gaussian Differential Privacy", arXiv 1905.02383, Corollary 3.3).

    Args:
      noise_multipliers: standard deviation / L2 sensitivity of each release (at least one), >= 0.

    Returns:
      A float; 0.0 if any release is without noise.

    Raises:
      ValueError: the sequence is empty, or an entry is negative or non-finite.
    """
    if not isinstance(noise_multipliers, Sequence) or not noise_multipliers:
        requirement = "be a tuple of numbers, one for each release"
        raise _validate.argument_error("noise_multipliers", noise_multipliers, requirement)
    sigmas = [_validate.non_negative("noise_multipliers", sigma) for sigma in noise_multipliers]
    smallest = min(sigmas)
    if smallest == 0.0:
        return 0.0
    # Divided by the smallest first, so that no square leaves the range of a float.
    return smallest / math.sqrt(math.fsum((smallest / sigma) ** 2 for sigma in sigmas))


def split_noise_multiplier(
    noise_multiplier: float, statistics_fraction: float, statistic_releases: int, count_fraction: float | None = None
) -> tuple[float, ...]:
    """Divides a step's privacy between the gradient, releases of statistics, and the count of an adaptive clip norm.

    Of sigma^-2 a fraction rho goes to n statistic releases, in equal parts, and the rest to the gradient:
      sigma_g = sigma / sqrt(1 - rho),    sigma_s = sigma sqrt(n / rho),    (1/sigma_g^2 + n/sigma_s^2)^(-1/2) = sigma.
    If there is a count, a fraction f goes to it before: its multiplier is sigma / sqrt(f), and the others are as above
    for sigma / sqrt(1 - f).

    Args:
      noise_multiplier: sigma, effective noise multiplier of the step, >= 0.
      statistics_fraction: rho, in (0, 1).
      statistic_releases: n, >= 0; 0 leaves everything to the gradient.
      count_fraction: f, in (0, 1); None if there is no count.

    Returns:
      (sigma_g, sigma_s, ..., sigma_s), and the count's if there is one; the effective noise multiplier of all is sigma,
      never less.

    Raises:
      ValueError: an argument is out of range.

    Examples:
      >>> [round(sigma, 4) for sigma in split_noise_multiplier(1.0, 0.5, 2)]
      [1.4142, 2.0, 2.0]
      >>> [round(sigma, 4) for sigma in split_noise_multiplier(1.0, 0.5, 0, 0.01)]
      [1.005, 10.0]
    """
    sigma = _validate.non_negative("noise_multiplier", noise_multiplier)
    rho = _validate.open_probability("statistics_fraction", statistics_fraction)
    n = _validate.non_negative_int("statistic_releases", statistic_releases)
    f = 0.0 if count_fraction is None else _validate.open_probability("count_fraction", count_fraction)
    rest = sigma / math.sqrt(1.0 - f)
    parts = (rest / math.sqrt(1.0 - rho), *[rest * math.sqrt(n / rho)] * n) if n else (rest,)
    if f:
        parts += (sigma / math.sqrt(f),)
    # Folded again, rounding must not leave less than sigma.
    while sigma and effective_noise_multiplier(parts) < sigma:
        parts = tuple(part * (1.0 + 1e-15) for part in parts)
    return parts


def gaussian_event(sampling_probability: float, noise_multiplier: float, steps: int) -> dp_accounting.DpEvent:
    """The event of `steps` Poisson-sampled Gaussians.

    In Python's own numbers: dp_accounting loses noise multipliers that are ints or numpy floats.
    """
    gaussian = dp_accounting.GaussianDpEvent(float(noise_multiplier))
    sampled = dp_accounting.PoissonSampledDpEvent(float(sampling_probability), gaussian)
    return dp_accounting.SelfComposedDpEvent(sampled, int(steps))


def truncation_probability(*, num_examples: int, sampling_probability: float, max_batch_size: int) -> float:
    """Returns P[Bin(N, q) >= M], by which each step with batches truncated to M rows adds to delta.

    Poisson draws of more than M examples are truncated to M of them at random. It is >= M and not > M, because with M
    common examples drawn a further one already pushes another out: docs/algorithm.md, section 6, has the proof. N is
    the size of the recorded data set; against the neighbour with one example fewer the charge is smaller.

    Raises:
      ValueError: an argument is out of range.
    """
    count = _validate.positive_int("num_examples", num_examples)
    probability = _validate.probability("sampling_probability", sampling_probability)
    rows = _validate.positive_int("max_batch_size", max_batch_size)
    return float(stats.binom.sf(rows - 1, count, probability))


def default_max_batch_size(
    *, num_examples: int, sampling_probability: float, steps: int, delta: float, share: float = 0.01, multiple: int = 8
) -> int:
    """Returns the fewest rows, a multiple of `multiple`, whose truncation costs at most `share` of delta in all steps.

    Never above the first multiple that exceeds num_examples, where nothing is ever truncated.

    Raises:
      ValueError: an argument is out of range.
    """
    multiple = _validate.positive_int("multiple", multiple)
    allowed = _validate.open_probability("delta", delta) * _validate.open_probability("share", share)
    steps = _validate.positive_int("steps", steps)
    low, high = 0, -(-(_validate.positive_int("num_examples", num_examples) + 1) // multiple)
    while high - low > 1:  # `high` blocks suffice, `low` do not
        middle = (low + high) // 2
        charge = steps * truncation_probability(
            num_examples=num_examples, sampling_probability=sampling_probability, max_batch_size=middle * multiple
        )
        low, high = (low, middle) if charge <= allowed else (middle, high)
    return high * multiple


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
      ValueError: noise_multiplier is negative or non-finite.

    Examples:
      >>> [f"{tail_delta(sigma):.0e}" for sigma in (10.0, 1.0, 0.5, 0.2)]
      ['8e-19', '8e-19', '9e-19', '1e-09']
    """
    sigma = _validate.non_negative("noise_multiplier", noise_multiplier)
    if sigma == 0.0:
        return 1.0
    return float(stats.norm.sf(_TAIL - 1.0 / sigma) + 2.0**32 * stats.norm.sf(_TAIL))


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
    divergences = sum(event.count * _step_divergences(event.event) for event in events)
    epsilon = float(dp_accounting.rdp.compute_epsilon(_ORDERS, divergences, delta)[0])
    if accountant == "pld" and epsilon <= _PLD_CEILING:
        pld = dp_accounting.pld.PLDAccountant()
        for event in events:
            pld.compose(event)
        epsilon = min(epsilon, float(pld.get_epsilon(delta)))
    return math.inf if math.isnan(epsilon) else max(epsilon, 0.0)
