"""Looking ahead: which noise a privacy budget asks for, and how many steps it lasts."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from scipy import optimize

from tf_dpbn import _validate
from tf_dpbn.accounting.events import ACCOUNTANTS, default_max_batch_size, epsilon_of_events, gaussian_event
from tf_dpbn.accounting.ledger import Ledger, StepRecord

_LARGEST_NOISE_MULTIPLIER = 2.0**30
_Plan = TypeVar("_Plan", bound="PrivacyPlan")


class PrivacyWarning(UserWarning):
    """Training goes on, but its guarantee is weaker than it may look."""


def calibrate_noise_multiplier(
    *, target_epsilon: float, delta: float, sampling_probability: float, steps: int, accountant: str = "rdp"
) -> float:
    """Returns the smallest effective noise multiplier that meets the target, to 1e-5 relative.

    Args:
      target_epsilon: > 0.
      delta: in (0, 1); subtract `truncation_delta` first where batches are truncated (PrivacyPlan does).
      sampling_probability: in (0, 1].
      steps: >= 1.
      accountant: "rdp" or "pld".

    Raises:
      ValueError: an argument is out of range, or no noise multiplier up to 2^30 reaches the target.
    """
    target = _validate.positive("target_epsilon", target_epsilon)
    delta = _validate.open_probability("delta", delta)
    q = _validate.probability("sampling_probability", sampling_probability)
    steps = _validate.positive_int("steps", steps)

    def epsilon_of(noise_multiplier: float, accountant: str) -> float:
        return epsilon_of_events((gaussian_event(q, noise_multiplier, steps),), delta, accountant)

    return _least_noise(epsilon_of, target, accountant)


def _least_noise(epsilon_of: Callable[[float, str], float], target: float, accountant: str) -> float:
    """The smallest noise multiplier for which epsilon_of(noise multiplier, accountant) <= target, to 1e-5 relative."""

    def epsilon(noise_multiplier: float) -> float:
        return epsilon_of(noise_multiplier, accountant)

    upper, factor = 1.0, 2.0
    if accountant == "pld":
        # PLD takes seconds where RDP takes milliseconds: start just above the answer. RDP cannot show the smallest
        # epsilons at all.
        factor = 1.1
        shown = max(target, 0.05, 1.1 * epsilon_of(_LARGEST_NOISE_MULTIPLIER, "rdp"))
        upper = _least_noise(epsilon_of, shown, "rdp") if math.isfinite(shown) else upper
    while (least := epsilon(upper)) > target:
        upper *= factor
        if upper > _LARGEST_NOISE_MULTIPLIER:
            remedy = f"{accountant.upper()} accounting shows no epsilon below {least:.3g} here, whatever the noise. "
            remedy += "Raise it, or try accountant='pld'." if math.isfinite(least) else "Raise delta, or train less."
            raise _validate.argument_error("target_epsilon", target, "be attainable", remedy)
    lower = upper / factor
    while epsilon(lower) <= target:
        upper, lower = lower, lower / factor
    # An infinite epsilon would lead the search astray.
    found = optimize.brentq(
        lambda sigma: min(epsilon(sigma), 2.0 * target) - target, lower, upper, xtol=1e-5 * lower, disp=False
    )
    # The search stops within its tolerance on either side; `upper` is known to meet the target.
    noise_multiplier, nudge = float(found), 1e-6
    while epsilon(noise_multiplier) > target:
        noise_multiplier, nudge = min(noise_multiplier * (1.0 + nudge), upper), 2.0 * nudge
    return noise_multiplier


def max_steps(
    ledger: Ledger,
    *,
    next_record_config: StepRecord,
    target_epsilon: float,
    delta: float,
    accountant: str = "rdp",
    limit: int = 10_000_000,
) -> int:
    """Returns how many further steps keep the ledger's epsilon at or below the target.

    Args:
      ledger: what ran so far; not changed.
      next_record_config: the configuration of the further steps; its `steps` is ignored.
      target_epsilon: > 0.
      delta: in (0, 1).
      accountant: "rdp" or "pld".
      limit: the largest answer.

    Returns:
      The largest n <= limit with ledger.epsilon <= target_epsilon after n more steps, truncated batches included; 0 if
      there is none.

    Raises:
      ValueError: an argument is out of range, or a sampling probability is unknown.
    """
    target = _validate.positive("target_epsilon", target_epsilon)
    limit = _validate.positive_int("limit", limit)

    def fits(steps: int) -> bool:
        future = ledger.copy()
        future.record(dataclasses.replace(next_record_config, steps=steps))
        return future.epsilon(delta, accountant) <= target

    if not fits(1):
        return 0
    low, high = 1, 2  # `low` fits
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)  # does not fit, or is not asked for
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """A training run planned for a privacy budget: which noise for which epsilon.

    Give target_epsilon or noise_multiplier, and epochs or steps; the other one of each pair, and max_batch_size if it
    is not given, are filled in. `dataclasses.replace` works on the given fields: what was filled in is found anew.
    Noise multiplier 0 is legal, for debugging; epsilon is then math.inf.

    Attributes:
      target_epsilon: the epsilon that the whole plan may cost, > 0, or None.
      noise_multiplier: effective noise multiplier of a step, >= 0.
      delta: in (0, 1), well below 1 / num_examples.
      num_examples: size N of the data set (public).
      expected_batch_size: B = q * N, the mean size of a Poisson draw (public).
      epochs: passes over the data, each of ceil(N / B) steps, or None.
      steps: number of training steps.
      accountant: "rdp" or "pld".
      max_batch_size: rows of the padded batch; larger draws are truncated to it, which the plan's epsilon includes.
      statistics_fraction: part of a step's privacy, in (0, 1), that goes to noised statistics, if the model has any
        (see `split_noise_multiplier`); it does not change epsilon.
      before: records of the steps on the same data that come before this plan's, such as those of earlier phases:
        target_epsilon and `epsilon` are for these and the plan together, at delta.

    Raises:
      ValueError: a field is out of range, both or neither of a pair are given, or max_batch_size is so small that its
        truncation alone costs delta.
    """

    target_epsilon: float | None = None
    noise_multiplier: float | None = None
    delta: float
    num_examples: int
    expected_batch_size: int
    epochs: float | None = None
    steps: int | None = None
    accountant: str = "rdp"
    max_batch_size: int | None = None
    statistics_fraction: float = 0.1
    before: tuple[StepRecord, ...] = ()
    # What was filled in, as (name, value): dataclasses.replace hands it on, and it is told apart from what was given.
    _filled: tuple[tuple[str, float], ...] = dataclasses.field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        partner = {"noise_multiplier": "target_epsilon", "steps": "epochs"}
        for name, value in self._filled:
            # Without its partner a filled-in value is what the user now wants to keep.
            if getattr(self, name) == value and getattr(self, partner.get(name, "delta")) is not None:
                self._put(name, None)
        missing = [name for name in ("noise_multiplier", "steps", "max_batch_size") if getattr(self, name) is None]
        self._check()
        if self.delta >= 1.0 / self.num_examples:
            message = (
                f"delta={self.delta} is not below 1/num_examples={1.0 / self.num_examples:.3g}: that allows publishing "
                "a random example outright. Choose a smaller delta."
            )
            warnings.warn(message, PrivacyWarning, stacklevel=3)
        self._fill()
        self._put("_filled", tuple((name, getattr(self, name)) for name in missing))

    def _put(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check(self) -> None:
        for one, other in (("target_epsilon", "noise_multiplier"), ("epochs", "steps")):
            if (getattr(self, one) is None) == (getattr(self, other) is None):
                received = {one: getattr(self, one), other: getattr(self, other)}
                raise ValueError(f"Give exactly one of `{one}` and `{other}`. Received: {received}")
        checks = {
            "target_epsilon": _validate.positive,
            "noise_multiplier": _validate.non_negative,
            "delta": _validate.open_probability,
            "num_examples": _validate.positive_int,
            "expected_batch_size": _validate.positive_int,
            "epochs": _validate.positive,
            "steps": _validate.positive_int,
            "max_batch_size": _validate.positive_int,
            "statistics_fraction": _validate.open_probability,
        }
        optional = {"target_epsilon", "noise_multiplier", "epochs", "steps", "max_batch_size"}
        for name, check in checks.items():
            if name not in optional or getattr(self, name) is not None:
                self._put(name, check(name, getattr(self, name)))
        _validate.one_of("accountant", self.accountant, ACCOUNTANTS)
        if self.expected_batch_size > self.num_examples:
            requirement = f"be at most num_examples={self.num_examples}"
            raise _validate.argument_error("expected_batch_size", self.expected_batch_size, requirement)
        if self.max_batch_size is not None and self.max_batch_size < self.expected_batch_size:
            requirement = f"be at least expected_batch_size={self.expected_batch_size}"
            raise _validate.argument_error("max_batch_size", self.max_batch_size, requirement)

    def _fill(self) -> None:
        q = self.sampling_probability
        if self.epochs is not None:
            # Rounded first: 1.1 epochs of 10 steps are 11 steps, not ceil(11.000000000000002).
            self._put("steps", max(1, math.ceil(round(self.epochs * self.steps_per_epoch, 6))))
        assert self.steps is not None  # given, or filled in above
        if self.max_batch_size is None:
            rows = default_max_batch_size(
                num_examples=self.num_examples, sampling_probability=q, steps=self.steps, delta=self.delta
            )
            self._put("max_batch_size", max(rows, self.expected_batch_size))
        truncation = self.ledger().truncation_delta()
        if truncation >= self.delta:
            requirement = f"be larger: batches truncated to it cost {truncation:.3g}, all of delta={self.delta}"
            remedy = "Leave it out to have it chosen."
            raise _validate.argument_error("max_batch_size", self.max_batch_size, requirement, remedy)
        if self.target_epsilon is not None:
            self._put("noise_multiplier", _least_noise(self._epsilon_of, self.target_epsilon, self.accountant))

    def _epsilon_of(self, noise_multiplier: float, accountant: str) -> float:
        """Epsilon by the ledger, so that calibration and what is reported agree to the last bit."""
        own = dataclasses.replace(self.record(), noise_multipliers=(noise_multiplier,))
        return Ledger([*self.before, own]).epsilon(self.delta, accountant)

    @property
    def sampling_probability(self) -> float:
        """q = expected_batch_size / num_examples."""
        return self.expected_batch_size / self.num_examples

    @property
    def steps_per_epoch(self) -> int:
        """ceil(num_examples / expected_batch_size)."""
        return -(-self.num_examples // self.expected_batch_size)

    @property
    def epsilon(self) -> float:
        """Epsilon at delta of the whole plan and what comes before it, truncated batches included."""
        return self.ledger().epsilon(self.delta, self.accountant)

    def ledger(self) -> Ledger:
        """The steps of `before` and of the whole plan."""
        return Ledger([*self.before, self.record()])

    @classmethod
    def phases(
        cls: type[_Plan],
        phases: Sequence[Mapping[str, Any]],
        *,
        target_epsilon: float,
        delta: float,
        num_examples: int,
        accountant: str = "rdp",
        statistics_fraction: float = 0.1,
    ) -> tuple[_Plan, ...]:
        """Plans several phases of training on the same data, with one epsilon over all of them.

        For a pretrained network: first its head alone, then all of it. The phases have one noise multiplier, the least
        that meets the target. Each phase compiles with an optimizer of its own and trains on its own plan's data set:

            head, whole = PrivacyPlan.phases(
                [{"expected_batch_size": 256, "epochs": 5}, {"expected_batch_size": 512, "epochs": 20}],
                target_epsilon=3.0, delta=1e-5, num_examples=60_000,
            )

        Args:
          phases: in the order of training, the other fields of each one's plan: expected_batch_size, epochs or steps,
            and max_batch_size if it is given.
          target_epsilon: the epsilon that all phases together may cost, > 0.
          delta, num_examples, accountant, statistics_fraction: as in a plan, of all phases.

        Returns:
          A plan for each phase, with the phases before it in `before`: the last one's `epsilon` is that of all.

        Raises:
          ValueError: a field is out of range, or no phase is given.
          TypeError: a field is unknown, or given twice.
        """
        target = _validate.positive("target_epsilon", target_epsilon)
        if not phases:
            raise _validate.argument_error("phases", phases, "hold the fields of one plan or more")
        shared: dict[str, Any] = {
            "delta": delta,
            "num_examples": num_examples,
            "accountant": accountant,
            "statistics_fraction": statistics_fraction,
        }

        def plans(noise_multiplier: float) -> list[_Plan]:
            made: list[_Plan] = []
            for fields in phases:
                before = tuple(each.record() for each in made)
                made.append(cls(**shared, **fields, noise_multiplier=noise_multiplier, before=before))
            return made

        entries = plans(1.0)[-1].ledger().entries

        def epsilon_of(noise_multiplier: float, accountant: str) -> float:
            noised = [dataclasses.replace(each, noise_multipliers=(noise_multiplier,)) for each in entries]
            return Ledger(noised).epsilon(delta, accountant)

        return tuple(plans(_least_noise(epsilon_of, target, accountant)))

    def record(self, steps: int | None = None) -> StepRecord:
        """Returns the record of `steps` steps of this plan, of all of them by default."""
        assert self.steps is not None  # filled in when the plan was made
        return StepRecord(
            sampling_probability=self.sampling_probability,
            noise_multipliers=(self.noise_multiplier or 0.0,),
            steps=self.steps if steps is None else steps,
            num_examples=self.num_examples,
            max_batch_size=self.max_batch_size,
            sampling="poisson",
        )
