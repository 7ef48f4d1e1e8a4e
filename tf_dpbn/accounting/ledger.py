"""What private training did, and what it cost: steps in, (epsilon, delta) out.

Formal guarantee. Data sets are neighbours when one is the other plus one example. With every example in each step's
batch independently with probability q, and every release of a step a Gaussian mechanism with its own noise multiplier,
`Ledger.epsilon(delta)` is an epsilon for which everything released over all recorded steps is (epsilon, delta)-DP.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from typing import Any

import dp_accounting

from tf_dpbn import _validate
from tf_dpbn.accounting.events import (
    effective_noise_multiplier,
    epsilon_of_events,
    gaussian_event,
    tail_delta,
    truncation_probability,
)

SAMPLINGS, UNITS = ("poisson", "assumed"), ("example", "user")
_FORMAT, _VERSION = "tf_dpbn.Ledger", 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRecord:
    """A run of training steps with one configuration.

    Attributes:
      sampling_probability: probability q in (0, 1] that a given example is in a step's batch; None if unknown.
      noise_multipliers: standard deviation / L2 sensitivity of each release of a step.
      steps: how many such steps, >= 0.
      num_examples: size N of the data set (public), or None.
      max_batch_size: rows M of the padded batch to which larger draws are truncated, or None if nothing is ever
        truncated. Truncation is charged to delta, so N and q must then be known (q may be filled in later if sampling
        is "assumed").
      sampling: "poisson" if the batches came from this library's Poisson sampler, "assumed" if that is taken on trust.
      unit: what is drawn, and what one more or less of makes data sets neighbours: "example", or "user" with all of
        their examples; N, q and M count them.

    Raises:
      ValueError: a field is out of range, or one that another needs is missing.
    """

    sampling_probability: float | None
    noise_multipliers: tuple[float, ...]
    steps: int
    num_examples: int | None = None
    max_batch_size: int | None = None
    sampling: str = "assumed"
    unit: str = "example"

    def __post_init__(self) -> None:
        # Python's own numbers throughout, so that records of equal steps are equal and can be written as JSON.
        put = functools.partial(object.__setattr__, self)
        effective_noise_multiplier(self.noise_multipliers)
        put("noise_multipliers", tuple(float(sigma) for sigma in self.noise_multipliers))
        put("steps", _validate.non_negative_int("steps", self.steps))
        _validate.one_of("sampling", self.sampling, SAMPLINGS)
        _validate.one_of("unit", self.unit, UNITS)
        if self.sampling_probability is not None:
            put("sampling_probability", _validate.probability("sampling_probability", self.sampling_probability))
        elif self.sampling == "poisson":
            remedy = "The sampler knows it: expected_batch_size / num_examples."
            raise _validate.argument_error("sampling_probability", None, "be given for Poisson sampling", remedy)
        for name in ("num_examples", "max_batch_size"):
            if getattr(self, name) is not None:
                put(name, _validate.positive_int(name, getattr(self, name)))
        if self.max_batch_size is not None and self.num_examples is None:
            remedy = "The probability of truncation depends on it."
            raise _validate.argument_error("num_examples", None, "be given with `max_batch_size`", remedy)

    @property
    def effective_noise_multiplier(self) -> float:
        """`effective_noise_multiplier(noise_multipliers)` of one step."""
        return effective_noise_multiplier(self.noise_multipliers)

    @property
    def truncation_delta(self) -> float:
        """steps * P[Bin(N, q) >= M], the delta that truncated batches cost; 0.0 if none can be truncated."""
        if self.max_batch_size is None or self.num_examples is None or self.steps == 0:
            return 0.0
        return self.steps * truncation_probability(
            num_examples=self.num_examples,
            sampling_probability=_known_probability(self),
            max_batch_size=self.max_batch_size,
        )


def _known_probability(record: StepRecord) -> float:
    if record.sampling_probability is None:
        remedy = "Pass `num_examples` to the optimizer, or fill it in with `ledger.with_sampling_probability(q)`."
        raise _validate.argument_error("sampling_probability", None, "be known for every step", remedy)
    return record.sampling_probability


def dp_sgd_event(record: StepRecord) -> dp_accounting.DpEvent:
    """Returns SelfComposed(PoissonSampled(q, Gaussian(sigma_eff)), steps).

    The multipliers are folded here and not left to the accountant as nested events, because dp_accounting 0.4.3 to
    0.6.0 drops some of them. Subsampling acts on the folded Gaussian: all releases of a step use one draw (Zhu, Dong,
    Wang, "Optimal Accounting of Differential Privacy via Characteristic Function", arXiv 2106.08567).

    Raises:
      ValueError: the record's sampling probability is unknown.
    """
    return gaussian_event(_known_probability(record), record.effective_noise_multiplier, record.steps)


class Ledger:
    """The steps that really ran, in the order of their first occurrence, and their cost.

    | state | epsilon(delta) |
    | --- | --- |
    | no steps | 0.0 |
    | a release without noise | math.inf |
    | truncation_delta() + tail_delta() >= delta | math.inf |
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
    def unit(self) -> str:
        """What is protected by all steps together: "user" if it is by each, else "example"."""
        return "user" if self._steps and all(entry.unit == "user" for entry in self._steps) else "example"

    @property
    def steps(self) -> int:
        """Number of all steps."""
        return sum(self._steps.values())

    def truncation_delta(self) -> float:
        """Returns the part of delta that truncated batches cost: sum over steps of P[Bin(N, q) >= M]."""
        return math.fsum(entry.truncation_delta for entry in self.entries)

    def tail_delta(self) -> float:
        """Returns the part of delta that the end of the noise's tail costs; see `tail_delta`."""
        return math.fsum(entry.steps * tail_delta(entry.effective_noise_multiplier) for entry in self.entries)

    def epsilon(self, delta: float, accountant: str = "rdp") -> float:
        """Returns epsilon of all steps together at `delta`, truncated batches and the noise's tail included.

        Raises:
          ValueError: delta is not in (0, 1), the accountant is unknown, or a sampling probability is unknown.
        """
        delta = _validate.open_probability("delta", delta)
        events = tuple(dp_sgd_event(entry) for entry in self.entries)
        return epsilon_of_events(events, delta - self.truncation_delta(), accountant)

    def with_sampling_probability(self, sampling_probability: float) -> Ledger:
        """Returns a copy whose unknown sampling probabilities have the given value."""
        q = _validate.probability("sampling_probability", sampling_probability)
        filled = functools.partial(dataclasses.replace, sampling_probability=q)
        return Ledger([filled(entry) if entry.sampling_probability is None else entry for entry in self.entries])

    def covers(self, other: Ledger) -> bool:
        """Returns whether it has all steps of another one, of each configuration as many or more."""
        return all(self._steps.get(key, 0) >= steps for key, steps in other._steps.items())

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
          ValueError: the text is corrupt, not a ledger, or of a version that this code does not know.
        """
        try:
            content = json.loads(text)
            if content["format"] != _FORMAT:
                raise ValueError("it is not a ledger")
            if content["version"] != _VERSION:
                raise ValueError(f"its version is {content['version']!r}, and this code reads {_VERSION}")
            return cls([_record_from(fields) for fields in content["entries"]])
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            remedy = f"Reading it failed: {error}."
            raise _validate.argument_error("text", text, "be the JSON of a Ledger", remedy) from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ledger) and self._steps == other._steps

    __hash__ = None  # type: ignore[assignment]  # a ledger changes

    def __repr__(self) -> str:
        return f"Ledger({list(self.entries)!r})"


def _record_from(fields: Any) -> StepRecord:
    # None may be missing: a record's defaults would leave out what truncation costs.
    if set(fields) != {field.name for field in dataclasses.fields(StepRecord)}:
        raise ValueError(f"an entry has the fields {sorted(fields)}")
    return StepRecord(**{**fields, "noise_multipliers": tuple(fields["noise_multipliers"])})
