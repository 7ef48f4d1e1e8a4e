"""The audits: of one step, of a training run, of a finished model."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_dpbn import _validate
from tf_dpbn._keras import keras
from tf_dpbn.accounting import Ledger, StepRecord
from tf_dpbn.auditing.attacks import UpdateAttack, clipped_sums
from tf_dpbn.auditing.bounds import AuditResult, area_under_curve, one_run_audit, true_positive_rate, two_world_epsilon
from tf_dpbn.mechanisms import ClippedSum
from tf_dpbn.model import DPModel
from tf_dpbn.sampling import PrivacyPlan


def audit_step(
    model: DPModel,
    x: Any,
    y: Any,
    *,
    delta: float,
    row: int | None = None,
    trials: int = 40_000,
    confidence: float = 0.95,
) -> AuditResult:
    """White-box audit of one step: can its release be told from that of the batch without one example?

    The clipped sums of the batch with and without the example in `row` go through the optimizer's noise `trials` times
    each. The attacker knows everything but the noise, so the projection of each release on the difference of the two
    sums is the strongest attack; also each release of a step (gradient, statistics) on its own is tried.

    The bound assumes a Gaussian trade-off (see `epsilon_lower_bound`, `gaussian=True`), and is as strong as the
    example: choose one whose gradient exceeds the clip norm, a mislabelled or very large input, say.

    Args:
      model: compiled with a DPOptimizer; it is not trained, and nothing is recorded.
      x, y: nests of arrays [rows, ...], a batch; [rows, K, ...] of a model of users, whose rows are users.
      delta: in (0, 1).
      row: the example, or user; None tries all and takes the one that moves the sums most.
      trials: how many releases in each world, >= 4. The noise that they use up is never used again.
      confidence: in (0, 1).

    Returns:
      The bound; its claim is the ledger's epsilon of one step on this very batch, without sampling.

    Raises:
      ValueError: an argument is out of range, or the optimizer adds no noise.
    """
    trials = max(_validate.positive_int("trials", trials), 4)
    sums = clipped_sums(model)
    rows = len(tf.nest.flatten(x)[0])
    everyone = sums(x, y, np.ones(rows, "float32"))
    multipliers = model.optimizer.noise_multipliers(len(everyone) - 1)
    if not min(multipliers):
        remedy = "Without noise there is no claim to audit."
        raise _validate.argument_error("noise_multiplier", 0.0, "be positive", remedy)
    stddevs = [sigma * each.l2_sensitivity for sigma, each in zip(multipliers, everyone, strict=True)]
    present = _standardized(everyone, stddevs)

    def without(i: int) -> tuple[ClippedSum, ...]:
        return sums(x, y, (np.arange(rows) != i).astype("float32"))

    def direction(world: Sequence[ClippedSum]) -> list[tf.Tensor]:
        return [p - a for p, a in zip(present, _standardized(world, stddevs), strict=True)]

    if row is None:
        row = int(np.argmax([float(tf.linalg.norm(tf.concat(direction(without(i)), 0))) for i in range(rows)]))
    absent = without(row)
    towards = direction(absent)

    def attack(released: Sequence[Any]) -> tf.Tensor:
        """Scores of all attacks, the likelihood ratio of all releases first."""
        noise = [stddev / model.optimizer.expected_batch_size for stddev in stddevs]
        vectors = zip(_standardized(released, noise), present, towards, strict=True)
        each = [tf.reduce_sum((vector - origin) * d) for vector, origin, d in vectors]
        return tf.cast(tf.stack([tf.add_n(each), *each] if len(each) > 1 else each), tf.float32)

    scores = [_noised_scores(model, world, attack, trials) for world in (absent, everyone)]
    record = StepRecord(sampling_probability=1.0, noise_multipliers=multipliers, steps=1)
    return AuditResult(
        epsilon_lower_bound=two_world_epsilon(*scores, delta=delta, confidence=confidence, gaussian=True),
        claimed_epsilon=Ledger([record]).epsilon(delta, "pld"),
        delta=delta,
        confidence=confidence,
        method=f"one step with and without {model._unit()} {row}, {trials} releases of each; Gaussian trade-off",
    )


def _standardized(sums: Sequence[Any], stddevs: Sequence[float]) -> list[tf.Tensor]:
    """Each sum as one vector, in standard deviations of its noise."""
    pairs = zip(sums, stddevs, strict=True)
    return [tf.concat([tf.reshape(tf.cast(t, tf.float64), [-1]) for t in s.tensors], 0) / stddev for s, stddev in pairs]


def _noised_scores(model: DPModel, world: Any, attack: Callable[[Any], tf.Tensor], trials: int) -> np.ndarray:
    """[trials, attacks]: scores of independent releases of one world."""

    def one(_: tf.Tensor) -> tf.Tensor:
        return attack(model.optimizer._noised(world))  # recorded nowhere: no step is taken

    def run() -> tf.Tensor:  # one after the other, as steps are: the noise source counts its draws
        return tf.map_fn(one, tf.range(trials), fn_output_signature=tf.float32, parallel_iterations=1)

    # Not by XLA, which would be faster: its normal numbers are other ones than a step's.
    return tf.function(run, autograph=False)().numpy()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TrainingAudit:
    """What `audit_training` found.

    Attributes:
      white_box: from every step's update of the weights.
      black_box: from the losses of the final model.
      included: bool [canaries], which canaries were trained on.
      scores: float [canaries], the white-box scores.
      losses: float [canaries], of the final model.
    """

    white_box: AuditResult
    black_box: AuditResult
    included: np.ndarray
    scores: np.ndarray
    losses: np.ndarray


def audit_training(
    model: DPModel,
    x: Any,
    y: Any,
    canary_x: Any,
    canary_y: Any,
    plan: PrivacyPlan,
    *,
    confidence: float = 0.95,
    guesses: tuple[int, int] | None = None,
    seed: int | None = None,
    **fit: Any,
) -> TrainingAudit:
    """Trains `model` on the data and on a random half of the canaries, then guesses which half it was.

    Canaries that are left out stay in the data set with weight 0, as padding does, so that sampling rate, batch size
    and number of examples do not tell the worlds apart. The white-box attacker knows the examples and sees the weights
    before and after each step. The bound holds for any optimizer; the attack takes each update for learning rate times
    release, as SGD without momentum makes it, and finds little under others.

    Args:
      model: compiled with an optimizer `from_plan(plan, ...)`, not trained yet.
      x, y: nests of arrays [examples, ...].
      canary_x, canary_y: likewise, [canaries, ...]; mislabelled or unusual examples are found most easily.
      plan: for the examples and all canaries together: num_examples = examples + canaries.
      confidence: in (0, 1), of each of the two bounds.
      guesses: (k_plus, k_minus), see `one_run_audit`.
      seed: for tests only: fixes the coins and which examples are drawn.
      **fit: further arguments of `model.fit`.

    Raises:
      ValueError: the plan is for another number of examples, an argument is out of range, the model was trained before,
        or its rows are users with several examples, which `audit_step` audits.
      RuntimeError: several steps ran between two callbacks (steps_per_execution).
    """
    if model._unit() == "user":
        remedy = "Canaries are single examples. Audit users by audit_step."
        raise _validate.argument_error("model", model.name, "have max_examples_per_user=1", remedy)
    if model.ledger.steps:
        remedy = "It trains the model, on the canaries: give it one that is not used otherwise."
        raise _validate.argument_error("model", f"{model.ledger.steps} steps", "not be trained yet", remedy)
    count, examples = (len(tf.nest.flatten(each)[0]) for each in (canary_x, x))
    draws, seed = seed, secrets.randbits(63) if seed is None else seed
    included = np.random.default_rng(seed).random(count) < 0.5
    weights = np.concatenate([np.ones(examples), included]).astype("float32")
    together = [tf.nest.map_structure(lambda a, b: np.concatenate([a, b]), *p) for p in ((x, canary_x), (y, canary_y))]
    attacker = UpdateAttack((x, y), (canary_x, canary_y), plan.sampling_probability)
    steps = model.private_steps
    fit = {"verbose": 0, "epochs": -(-plan.steps // plan.steps_per_epoch), **fit}  # type: ignore[operator]
    callbacks = [*fit.pop("callbacks", []), attacker]
    dataset = plan.poisson_dataset(together[0], together[1], weights, seed=draws)
    model.fit(dataset, callbacks=callbacks, **fit)
    if attacker.updates < model.private_steps - steps:
        raise RuntimeError("Several steps ran between two callbacks. Compile with steps_per_execution=1.")
    losses = per_example_losses(model, canary_x, canary_y)

    def result(scores: np.ndarray, method: str) -> AuditResult:
        bound = one_run_audit(scores, included, delta=plan.delta, confidence=confidence, guesses=guesses)
        return AuditResult(
            epsilon_lower_bound=bound,
            claimed_epsilon=model.epsilon(plan.delta, plan.accountant),
            delta=plan.delta,
            confidence=confidence,
            method=f"one training run with {count} canaries, {method}",
        )

    return TrainingAudit(
        white_box=result(attacker.scores(), "scored by the updates"),
        black_box=result(-losses, "scored by the final model's losses"),
        included=included,
        scores=attacker.scores(),
        losses=losses,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MembershipResult:
    """How well losses tell members from non-members.

    Attributes:
      auc: area under the attack's ROC curve; 0.5 is guessing.
      true_positive_rate: at the false positive rate below.
      false_positive_rate: at most this.
      audit: the lower bound on epsilon.
    """

    auc: float
    true_positive_rate: float
    false_positive_rate: float
    audit: AuditResult

    def __str__(self) -> str:
        return (
            f"membership inference by loss: AUC {self.auc:.3f}, TPR {100.0 * self.true_positive_rate:.1f}% at FPR "
            f"{100.0 * self.false_positive_rate:g}%; {self.audit}"
        )


def membership_inference(
    model: Any,
    x: Any,
    y: Any,
    member: Any,
    *,
    delta: float,
    confidence: float = 0.95,
    false_positive_rate: float = 0.01,
    guesses: tuple[int, int] | None = None,
) -> MembershipResult:
    """Guesses members of the training set by their loss: the lower, the more likely a member.

    The bound on epsilon is that of one run with each of these examples as a canary. It is valid if a fair coin decided
    for each of them whether to train on it; for a random split into equal halves that is nearly so. AUC and rates
    need no such thing.

    Args:
      model: compiled, of one output; any Keras model. Its claim is that of its ledger, if it is a DPModel.
      x, y: nests of arrays [examples, ...].
      member: bool [examples], which of them were trained on; some of each.
      delta, confidence, false_positive_rate: in (0, 1).
      guesses: (k_plus, k_minus), see `one_run_audit`.

    Raises:
      ValueError: an argument is out of range, or `member` lacks one kind.

    Source: Yeom et al., arXiv 1709.01604, for the attack; Carlini et al., arXiv 2112.03570, for how to report it.
    """
    member = np.asarray(member, bool)
    if member.all() or not member.any():
        raise _validate.argument_error("member", member.mean(), "hold members and non-members")
    scores = -per_example_losses(model, x, y)
    audit = AuditResult(
        epsilon_lower_bound=one_run_audit(scores, member, delta=delta, confidence=confidence, guesses=guesses),
        claimed_epsilon=model.epsilon(delta) if isinstance(model, DPModel) else None,
        delta=delta,
        confidence=confidence,
        method=f"loss of the final model on {len(member)} examples",
    )
    return MembershipResult(
        auc=area_under_curve(scores, member),
        true_positive_rate=true_positive_rate(scores, member, false_positive_rate),
        false_positive_rate=false_positive_rate,
        audit=audit,
    )


def per_example_losses(model: Any, x: Any, y: Any) -> np.ndarray:
    """The loss of each example in inference, [examples].

    Args:
      model: compiled, of one output.
      x, y: nests of arrays [examples, ...].
    """
    loss = keras.losses.get(model.loss)

    def one(row: Any) -> tf.Tensor:
        target, prediction = row
        return tf.cast(tf.reduce_mean(loss(target[None], prediction[None])), tf.float32)

    pairs = tf.convert_to_tensor(y), tf.convert_to_tensor(model.predict(x, verbose=0))
    return tf.function(lambda p: tf.map_fn(one, p, fn_output_signature=tf.float32), autograph=False)(pairs).numpy()
