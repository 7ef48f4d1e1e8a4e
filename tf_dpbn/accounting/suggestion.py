"""Settings to start from, for a data set, an epsilon and a kind of network: readings of the tables of results.md."""

from __future__ import annotations

import bisect
import dataclasses
import math
import textwrap
from typing import Any

import numpy as np

from tf_dpbn import _validate
from tf_dpbn.accounting.planning import PrivacyPlan, calibrate_noise_multiplier

_MORE_NOISE = 1.1  # than all data in every step: what a smaller batch may cost
# Learning rate times noise multiplier over batch size, within a factor of 2.5 in all tuned rows of public statistics.
_RATE_TIMES_NOISE = 0.001
_LOWEST_RATE = 1 / 16  # of those measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Settings to start from; `suggest` makes them.

    Attributes:
      network: the kind of network, as given.
      num_examples, target_epsilon, delta: as given, or delta as chosen.
      expected_batch_size, steps, noise_multiplier: of the PrivacyPlan.
      learning_rate: of SGD with momentum 0.9, at the start of a cosine decay to a tenth over all steps.
      l2_norm_clip: clip norm.
      statistics, correction: of DPBatchNormalization and of `DPModel.compile`.
      public_batch: the generator in `tf_dpbn.public_data`, or "pretraining data": examples of those.
      public_batch_size: how many public examples.
      ema_momentum: decay of the moving average of weights that is evaluated (`ema_momentum` of Keras' optimizers, with
        use_ema=True), or None for no averaging.
      reasons: a sentence for each choice, with the table of docs/results.md that it rests on.
    """

    network: str
    num_examples: int
    target_epsilon: float
    delta: float
    expected_batch_size: int
    steps: int
    noise_multiplier: float
    learning_rate: float
    l2_norm_clip: float
    statistics: str
    correction: str
    public_batch: str
    public_batch_size: int
    ema_momentum: float | None
    reasons: tuple[str, ...]

    @property
    def epochs(self) -> int:
        """Passes over the data, each of ceil(num_examples / expected_batch_size) steps, as in PrivacyPlan."""
        return self.steps // -(-self.num_examples // self.expected_batch_size)

    def plan_arguments(self) -> dict[str, Any]:
        """The arguments of the PrivacyPlan: `tf_dpbn.PrivacyPlan(**suggestion.plan_arguments())`."""
        names = ("num_examples", "target_epsilon", "delta", "expected_batch_size", "epochs")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        """The settings and their reasons, a line or a few each."""
        head = f"Start from (network {self.network!r}, {self.num_examples} examples, epsilon {self.target_epsilon:g}, "
        average = "none" if self.ema_momentum is None else f"decay {self.ema_momentum:g}"
        settings = {
            "expected batch size": f"{self.expected_batch_size}",
            "steps": f"{self.steps} ({self.epochs} epochs)",
            "noise multiplier": f"{self.noise_multiplier:.4g}",
            "learning rate": f"{self.learning_rate:g}, SGD with momentum 0.9, cosine decay to a tenth",
            "clip norm": f"{self.l2_norm_clip:g}",
            "statistics, correction": f"{self.statistics}, {self.correction}",
            "public batch": f"{self.public_batch}, {self.public_batch_size} examples",
            "weight averaging": average,
        }
        lines = [f"{head}delta {self.delta:g}):", *[f"  {name:23} {text}" for name, text in settings.items()], "Why:"]
        wrap = textwrap.TextWrapper(width=100, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
        return "\n".join([*lines, *[wrap.fill(reason) for reason in self.reasons]])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Measured:
    """What the tables say of a kind of network.

    Attributes:
      tables: their names.
      steps: (num_examples, ((epsilon, steps) that suited, ...)), both ascending.
      largest_batch_size: that was measured.
      rates: the lowest and the highest learning rate to suggest.
      why: sentences for steps and rate, and for all that does not depend on data and epsilon.
    """

    tables: str
    steps: tuple[tuple[int, tuple[tuple[float, int], ...]], ...]
    largest_batch_size: int
    rates: tuple[float, float]
    l2_norm_clip: float
    public_batch: str = "dead_leaves"
    public_batch_size: int = 32
    ema_momentum: float | None = None
    why_steps: str
    why_rate: str = (
        "about 0.001 times batch size over noise multiplier, as in the tuned rows of tables (a) to (e) within a "
        "factor of 2.5, as a power of two in the measured range"
    )
    why: tuple[str, ...]


_PUBLIC = (
    "Statistics of a public batch were ahead of released ones and of group, layer and no normalization at every "
    'epsilon of tables (a) and (e), but for epsilon 8 in (e), where it was level; the correction "auto" is "local" '
    'here, which tables (c) and (small) have level with "adaptive".'
)
_LEAVES = (
    "Dead leaves were the best of the synthetic public batches in table (c), by 0.3 points, and single runs under "
    '"The public batch in depth" prefer pictures to noise; more than 32 gained little under "Step time of real '
    'networks" and nothing in table (public).'
)
_NETWORKS = {
    "features": _Measured(
        tables="(scattering) and (small_scattering)",
        steps=((4_000, ((1.0, 16), (3.0, 32), (8.0, 64))), (60_000, ((1.0, 200), (3.0, 200), (8.0, 300)))),
        largest_batch_size=8192,
        rates=(0.5, 2.0),
        l2_norm_clip=1.0,
        public_batch_size=256,
        why_steps=(
            "tuning for tables (scattering) and (small_scattering) found 16, 32 and 64 best for 4,000 examples at "
            "epsilon 1, 3 and 8, about 200 for 60,000 and 200 to 400 at epsilon 8"
        ),
        why_rate=(
            "about 0.001 times batch size over noise multiplier, between 0.5 and 2, the grid of tables (scattering) "
            "and (small_scattering), whose best points are within a factor of two"
        ),
        why=(
            "The clip norm hardly matters on features if the learning rate is scaled with it: 1 and 50 were level in "
            "tuning for table (scattering).",
            "Features do not move, so a public batch normalizes them once and for all (tf_dpbn.features.whitening, "
            'or DPBatchNormalization), and the correction "auto" has nothing to correct; table (scattering) '
            'compares, and a frozen backbone keeps the statistics it came with ("fixed", table under "Fine-tuning").',
            "256 dead leaves are the public batch of tables (scattering) and (small_scattering); whitening needs more "
            "values a channel than there are channels, and no other sizes were tried.",
            "Weight averaging is left out: table (scattering) was measured without it.",
        ),
    ),
    "shallow": _Measured(
        tables="(a), (d) and (e)",
        steps=((4_000, ((1.0, 240), (8.0, 240))), (60_000, ((0.5, 600), (8.0, 600)))),
        largest_batch_size=4096,
        rates=(_LOWEST_RATE, 2.0),
        l2_norm_clip=1.0,
        ema_momentum=0.9,
        why_steps=(
            "table (e) has 240 for 4,000 examples, table (d), the best for 60,000 at epsilon 3, 600; no table varies "
            "them with epsilon"
        ),
        why=(
            "Clip norm 1 was best in thirteen of the fourteen rows of table (c), and ten times as much or as little "
            "cost more than five points in table (clip), where AutomaticClip did as well without tuning.",
            _PUBLIC,
            _LEAVES,
            "Evaluating the average of weights with decay 0.9 is part of table (d); what it gains was not measured "
            "apart.",
        ),
    ),
    "deep": _Measured(
        tables="(b) and (public)",
        steps=((4_000, ((8.0, 240),)), (60_000, ((3.0, 240),))),
        largest_batch_size=1024,
        rates=(_LOWEST_RATE, 1.0),
        l2_norm_clip=3.0,
        why_steps=(
            "tables (b) and (public) have 236 and 240; longer training went on to pay at 8 convolutions under "
            '"The non-local term"'
        ),
        why=(
            "Tuning preferred clip norm 3 to 1 for batch normalization at every depth of table (b).",
            "Batch normalization with public statistics was ahead of group and of no normalization at every depth of "
            'table (b); the correction "auto" is "adaptive" from eight normalizations on, which had 2.1 and 3.6 '
            'points more than "local" at 8 and 12 convolutions in table (small).',
            _LEAVES,
            'Weight averaging is left out: under "Deep networks" it moved nothing beyond the spread of runs.',
        ),
    ),
    "pretrained": _Measured(
        tables='under "Fine-tuning"',
        steps=((2_000, ((1.0, 160),)),),
        largest_batch_size=256,
        rates=(_LOWEST_RATE, 0.25),
        l2_norm_clip=0.5,
        public_batch="pretraining data",
        public_batch_size=128,
        why_steps='the table under "Fine-tuning" has 160 for 2,000 examples at epsilon 1, and no others',
        why_rate=(
            "about 0.001 times batch size over noise multiplier, as in tables (a) to (e), between the 0.0625 that "
            'suited best under "Fine-tuning" and the 0.25 that cost two to five points there'
        ),
        why=(
            'Clip norm 0.5 is the only one of the table under "Fine-tuning".',
            'Where all of the network trains, public statistics were ahead of "fixed" ones in the table under '
            '"Fine-tuning", at the larger rate by far; the correction "auto" follows the number of normalizations, '
            "by tables (c) and (small).",
            '128 of the public images were the public batch of the table under "Fine-tuning"; no other sizes were '
            "tried.",
            'Weight averaging is left out: the table under "Fine-tuning" was measured without it.',
        ),
    ),
}


def suggest(
    num_examples: int, target_epsilon: float, *, network: str = "shallow", delta: float | None = None
) -> Suggestion:
    """Proposes settings to start from, and says why.

    They are readings of what docs/results.md measured, on 2,000 to 60,000 small images and in few settings; where
    `reasons` say that they extrapolate, nothing was measured. docs/choosing.md has the evidence, and where it fails.

    Examples:
      >>> from tf_dpbn import accounting
      >>> suggestion = accounting.suggest(60_000, 3.0, network="features", delta=1e-5)
      >>> suggestion.steps, suggestion.expected_batch_size, suggestion.learning_rate
      (200, 8192, 2.0)

    Args:
      num_examples: size N of the training set (public).
      target_epsilon: what the whole training may cost, > 0.
      network: "features", one dense layer on fixed features (`tf_dpbn.features`, or a frozen pretrained backbone);
        "shallow", up to about four normalizations, from random weights; "deep", more; or "pretrained", a network whose
        weights come from public data and all train.
      delta: in (0, 1 / N); by default the largest power of ten of at most a tenth of 1 / N.

    Returns:
      A Suggestion. Its noise multiplier is that of a PrivacyPlan with its numbers.

    Raises:
      ValueError: an argument is out of range, or no noise reaches epsilon at delta.
    """
    examples = _validate.positive_int("num_examples", num_examples)
    target = _validate.positive("target_epsilon", target_epsilon)
    measured = _NETWORKS[_validate.one_of("network", network, tuple(_NETWORKS))]
    delta = _default_delta(examples) if delta is None else _validate.open_probability("delta", delta)
    if delta >= 1.0 / examples:
        remedy = "Delta of 1/N or more allows publishing a random example outright. Leave it out to have it chosen."
        raise _validate.argument_error("delta", delta, f"be below 1/num_examples={1.0 / examples:.3g}", remedy)
    steps = _steps(measured, examples, target)
    batch_size = _batch_size(examples, steps, target, delta)
    epoch = -(-examples // batch_size)
    steps = max(1, round(steps / epoch)) * epoch  # whole epochs, for `fit`
    plan = PrivacyPlan(
        num_examples=examples, target_epsilon=target, delta=delta, expected_batch_size=batch_size, steps=steps
    )
    assert plan.noise_multiplier is not None  # filled in
    followed = 2.0 ** round(math.log2(_RATE_TIMES_NOISE * batch_size / plan.noise_multiplier))
    rate = min(max(followed, measured.rates[0]), measured.rates[1])
    reasons = [
        f"{steps} steps: {measured.why_steps}.",
        f"Batches of {batch_size}: the least power of two, or else all data, with at most 10 % more noise in the mean "
        "gradient than all data in each of these steps, by accounting; for what tables (d), (scattering) and "
        "(small_scattering) train that is within a factor of two of their batches, and microbatch_size bounds memory.",
        f"Learning rate {rate:g}: {measured.why_rate}.",
        *measured.why,
        *_extrapolations(measured, examples, target, batch_size),
    ]
    return Suggestion(
        network=network,
        **{name: getattr(plan, name) for name in ("num_examples", "delta", "expected_batch_size")},
        target_epsilon=target,
        steps=steps,
        noise_multiplier=plan.noise_multiplier,
        learning_rate=rate,
        l2_norm_clip=measured.l2_norm_clip,
        statistics="public",
        correction="auto",
        public_batch=measured.public_batch,
        public_batch_size=measured.public_batch_size,
        ema_momentum=measured.ema_momentum,
        reasons=tuple(reasons),
    )


def _default_delta(num_examples: int) -> float:
    """The largest power of ten of at most a tenth of 1 / num_examples."""
    return float(f"1e-{math.ceil(math.log10(10 * num_examples))}")


def _steps(measured: _Measured, num_examples: int, epsilon: float) -> int:
    """What was measured, interpolated by logarithms, and held beyond the ends; two digits."""
    of_size = [np.interp(math.log(epsilon), *np.log(np.transpose(by_epsilon))) for _, by_epsilon in measured.steps]
    sizes = [math.log(size) for size, _ in measured.steps]
    return int(float(f"{math.exp(np.interp(math.log(num_examples), sizes, of_size)):.2g}"))


def _batch_size(num_examples: int, steps: int, epsilon: float, delta: float) -> int:
    """The least power of two, or else all examples, with little more noise in the mean gradient than all examples."""

    def noise(batch_size: int) -> float:
        multiplier = calibrate_noise_multiplier(
            target_epsilon=epsilon, delta=delta, sampling_probability=batch_size / num_examples, steps=steps
        )
        return multiplier / batch_size

    enough = _MORE_NOISE * noise(num_examples)
    sizes = [*(2**k for k in range((num_examples - 1).bit_length())), num_examples]
    return sizes[bisect.bisect_left(sizes, True, key=lambda size: noise(size) <= enough)]


def _extrapolations(measured: _Measured, num_examples: int, epsilon: float, batch_size: int) -> list[str]:
    """A sentence for each number beyond what the tables have."""
    sizes = [size for size, _ in measured.steps]
    epsilons = [each for _, by_epsilon in measured.steps for each, _ in by_epsilon]
    found = []
    for name, value, low, high in (
        ("num_examples", num_examples, min(sizes), max(sizes)),
        ("epsilon", epsilon, min(epsilons), max(epsilons)),
    ):
        if not low <= value <= high:
            measured_range = f"{low:,g}" if low == high else f"{low:,g} to {high:,g}"
            found.append(
                f"This extrapolates in {name}, {value:,.12g}: the tables {measured.tables} have {measured_range}, and "
                "steps are those of the nearest."
            )
    if batch_size > measured.largest_batch_size:
        found.append(
            f"This extrapolates in batch size, {batch_size:,}: the tables {measured.tables} have "
            f"{measured.largest_batch_size:,} at most; where such batches take too long, smaller ones cost noise."
        )
    return found
