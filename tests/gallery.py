"""Planted bugs, each a small change of a real component, and the generic checks that must catch them.

    python -m tests.gallery    prints the table of docs/privacy.md: bug, who catches it, measured excess

The checks are those that the right library passes: `neighbours.check` (sensitivity of every release), the same of whole
updates, the distribution of the noise, the ledger against what was drawn, and `auditing.audit_step`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import tensorflow as tf
from scipy import stats

import tf_dpbn
from tests import helpers, neighbours
from tf_dpbn import auditing, mechanisms
from tf_dpbn._keras import keras
from tf_dpbn.accounting import ledger
from tf_dpbn.clipping import book_keeping, contributions, microbatches, per_example
from tf_dpbn.clipping.rows import by_row, sum_of_squares, weighted_sum
from tf_dpbn.model import step
from tf_dpbn.normalization import PublicForward

layers = keras.layers
SHAPE, ROWS, CLIP, DELTA = (4, 3), 6, 0.5, 1e-5
MANY_ROWS = 8  # even, and enough that some are extreme
REJECTED = 1e-6
Patch = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a check says: whether it objects, and the figure by which."""

    caught: bool
    measured: str


# ---------------------------------------------------------------------- the model and the checks


def build(mode: str = "public", noise_multiplier: float = 1.0, seed: int | None = 0, **options: Any) -> Any:
    """A dense layer on a series, a normalization of the given mode, a head; compiled."""
    inputs = keras.Input(SHAPE)
    x = layers.Dense(4)(inputs)
    x = layers.Activation("tanh")(tf_dpbn.DPBatchNormalization(statistics=mode)(x))
    model = tf_dpbn.DPModel(inputs, layers.Dense(3)(layers.Flatten()(x)))
    helpers.randomize(model, 1, scale=0.7)
    model.set_public_batch(np.random.default_rng(1).normal(size=(5, *SHAPE)).astype("float32"))
    optimizer = helpers.dp_optimizer(l2_norm_clip=CLIP, noise_multiplier=noise_multiplier, noise_seed=seed)
    return helpers.compiled(model, None, optimizer, **options)


def check_sensitivity(mode: str = "public", **options: Any) -> Finding:
    """Neighbouring batches: no release moves by more than it declares, and padding does not matter."""
    model, rng = build(mode, **options), np.random.default_rng(0)
    run = neighbours.sums_of_subsets(model)
    for extremes in (False, True):  # what ordinary rows show is a figure; extreme ones may only make it infinite
        found = neighbours.check(model, rng, SHAPE, lambda n: rng.integers(0, 3, n), 4, extremes, run, MANY_ROWS)
        if not found.within_bounds:
            break
    if found.excess <= neighbours.SLACK and not found.within_bounds:
        return Finding(True, f"padding moves the sum by {found.padding:.2g} sensitivities")
    moved = f"sensitivity {found.excess:.3g} C" if np.isfinite(found.excess) else "sum not finite"
    return Finding(not found.within_bounds, moved)


def check_updates() -> Finding:
    """Neighbouring batches: a whole train step without noise moves the weights by at most C / B."""
    model, (x, y) = build(noise_multiplier=0.0), helpers.images(ROWS, SHAPE)
    start, chosen = model.get_weights(), neighbours.subsets(ROWS)
    updates = []
    for subset in chosen:
        model.set_weights(start)
        model.train_on_batch(x, y, sample_weight=subset.astype("float32"))
        updates.append(helpers.flat(start) - helpers.flat(model.get_weights()))
    without, with_row = neighbouring = neighbours.neighbouring(ROWS)
    assert len(neighbouring[0]) == ROWS * 2 ** (ROWS - 1)
    trained = np.array(updates)
    moves = np.linalg.norm(trained[with_row] - trained[without], axis=1)
    excess = float(moves.max()) * model.optimizer.expected_batch_size / CLIP
    return Finding(excess > 1.0 + 1e-4, f"an example moves the update by {excess:.3g} C / B")


def drawn_noise(model: Any, draws: int = 400) -> list[np.ndarray]:
    """For each release of a step on padding alone: noise over the declared stddev, [draws, size]."""
    optimizer = model.optimizer
    x, y = helpers.images(ROWS, SHAPE)
    sums = auditing.clipped_sums(model)(x, y, np.zeros(ROWS, "float32"))
    stddevs = [
        s * each.l2_sensitivity for s, each in zip(optimizer.noise_multipliers(len(sums) - 1), sums, strict=True)
    ]

    def one(_: tf.Tensor) -> tf.Tensor:
        flat = [tf.concat([tf.reshape(t, [-1]) for t in each.tensors], 0) for each in optimizer._noised(sums)]
        return tf.concat([optimizer.expected_batch_size * f / s for f, s in zip(flat, stddevs, strict=True)], 0)

    run = tf.function(
        lambda: tf.map_fn(one, tf.range(draws), fn_output_signature=tf.float32, parallel_iterations=1), autograph=False
    )
    sizes = [sum(t.shape.num_elements() for t in each.tensors) for each in sums]
    return np.split(run().numpy().astype(np.float64), np.cumsum(sizes)[:-1], axis=1)


def p_value(noise: np.ndarray) -> float:
    """The smaller one of a chi-square test of the scale and a Kolmogorov-Smirnov test, against N(0, 1)."""
    square, n = float(np.sum(noise**2)), noise.size
    scale = 2 * min(stats.chi2.cdf(square, n), stats.chi2.sf(square, n))
    return min(scale, stats.kstest(noise.ravel(), "norm").pvalue)


def check_noise(mode: str = "anchored") -> Finding:
    """Each release's noise is normal with the standard deviation that the ledger counts."""
    noises = drawn_noise(build(mode, noise_multiplier=1.5))
    p_values = [p_value(noise) for noise in noises]
    worst = int(np.argmin(p_values))
    measured = f"noise of {np.std(noises[worst]):.3g} times the promised stddev"
    return Finding(p_values[worst] < REJECTED, measured)


def check_ledger() -> Finding:
    """The ledger's effective noise multiplier is what the noise that was drawn amounts to."""
    model, (x, y) = build("anchored", noise_multiplier=1.5), helpers.images(ROWS, SHAPE)
    sums = auditing.clipped_sums(model)(x, y, np.ones(ROWS, "float32"))
    measured = [float(np.std(noise)) for noise in drawn_noise(model)]
    multipliers = model.optimizer.noise_multipliers(len(sums) - 1)
    drawn = np.sum([1.0 / (m * s) ** 2 for m, s in zip(measured, multipliers, strict=True)]) ** -0.5
    model.train_on_batch(x, y, np.ones(ROWS, "float32"))
    (entry,) = model.ledger.entries
    ratio = entry.effective_noise_multiplier / drawn
    return Finding(abs(ratio - 1.0) > 0.02, f"ledger counts {ratio:.3g} times the noise that was drawn")


def check_audit(mode: str = "anchored") -> Finding:
    """The lower bound of a white-box audit is not above the claim."""
    x, y = helpers.images(ROWS, SHAPE)
    x[0] *= 100.0
    found = auditing.audit_step(build(mode, seed=1), x, y, delta=DELTA, row=0, trials=8000)
    return Finding(
        found.contradicts_claim, f"{found.epsilon_lower_bound:.3g} found, {found.claimed_epsilon:.3g} claimed"
    )


# ---------------------------------------------------------------------- the bugs

_public_forward = step.public_forward
_release = tf_dpbn.DPOptimizer._noised


def _masked(batch: Any) -> tf.Tensor:
    real = tf.reshape(tf.cast(batch.mask, tf.float32), [-1, *[1] * len(SHAPE)])
    return tf.math.multiply_no_nan(batch.x, real)


def _with_public_batch(model: Any, batch: Any, rows: tf.Tensor) -> Any:
    public, model._public.batch = model._public.batch, rows
    try:
        return _public_forward(model, batch)
    finally:
        model._public.batch = public


def _stock_statistics(model: Any, batch: Any) -> Any:
    return _with_public_batch(model, batch, _masked(batch))


def _papers_statistics(model: Any, batch: Any) -> Any:
    return _with_public_batch(model, batch, tf.concat([model._public.batch, _masked(batch)], 0))


def _gradient_through_private_statistics(model: Any, batch: Any) -> PublicForward:
    right, private = _public_forward(model, batch), _stock_statistics(model, batch)
    # Jacobians of the private rows' statistics
    pairs = zip(right.calls, private.calls, strict=True)
    right.calls = [dataclasses.replace(call, local_terms=other.local_terms) for call, other in pairs]
    return right


def _privatize_statistics_without_noise(self: Any, clipped: Any) -> Any:
    noised = _release(self, clipped)
    plain = [tuple(t / self.expected_batch_size for t in each.tensors) for each in clipped[1:]]
    return (noised[0], *[mechanisms.NoisedGradients(each) for each in plain])


def _clip_after_noise(self: Any, clipped: Any) -> Any:
    released = []
    for each, noised in zip(clipped, _release(self, clipped), strict=True):
        norm = self.expected_batch_size * tf.linalg.global_norm(noised.tensors)
        factor = each.l2_sensitivity / tf.maximum(norm, each.l2_sensitivity)
        released.append(mechanisms.NoisedGradients(tuple(factor * t for t in noised.tensors)))
    return tuple(released)


def _replica_noise(self: Any, clipped: Any) -> Any:
    """Four replicas should each add noise of half the stddev; only one of them does."""
    parts = 4
    rest = tuple(mechanisms.ClippedSum(c.tensors, c.l2_sensitivity / parts**0.5) for c in clipped)
    return _release(self, rest)


def _noise_without_sensitivity(self: Any, clipped: Any) -> Any:
    return _release(self, tuple(mechanisms.ClippedSum(c.tensors, 1.0) for c in clipped))


def _by_actual_batch_size(self: Any, clipped: Any) -> Any:
    count = tf.reduce_sum(tf.cast(self._latest_mask, tf.float32))
    factor = tf.cast(self.expected_batch_size / tf.maximum(count, 1.0), tf.float64)
    scaled = [mechanisms.ClippedSum(tuple(factor * t for t in c.tensors), c.l2_sensitivity) for c in clipped]
    return _release(self, tuple(scaled))


_read_batch = step.read_batch


def _remembering_mask(model: Any, data: Any) -> Any:
    batch = _read_batch(model, data)
    model.optimizer._latest_mask = tf.ones([ROWS]) if batch.mask is None else batch.mask
    return batch


def _reused_noise(self: Any, shapes: Any) -> list[tf.Tensor]:
    return [tf.random.stateless_normal(shape, [1, k]) for k, shape in enumerate(shapes)]


def _of_all_rows(weights: Callable[..., tf.Tensor]) -> Callable[..., tf.Tensor]:
    return lambda squared, clip, mask: weights(squared, clip, None)


def _microbatch_clipping(self: Any, task: Any, rows: Any, l2_norm_clip: float) -> Any:
    """The clipped sum is that of pairs: each pair's mean is clipped, and one example moves its pair's."""
    results, gradients, cotangents = self._run(task, rows)
    gradients = per_example._add_local_terms(task, gradients, cotangents)
    mask = tf.cast(rows[-1], tf.float32)
    finite = tf.math.is_finite(tf.sqrt(tf.add_n([sum_of_squares(g) for g in gradients])))
    kept = [tf.where(by_row(finite, g), by_row(mask, g) * g, 0.0) for g in gradients]
    pairs = [tf.reduce_mean(tf.reshape(g, [-1, 2, *g.shape[1:]]), 1) for g in kept]
    squared = tf.add_n([sum_of_squares(g) for g in pairs])
    weights = mechanisms.clip_weights(squared, l2_norm_clip, None)
    sums = tuple(weighted_sum(weights, g) for g in pairs)
    sums += microbatches.residual_sums(task.releases, results.residuals, rows[-1])
    return sums, (results.loss, results.parts, results.y_pred, tf.logical_not(finite))


def _without_cross_terms(self: Any) -> tf.Tensor:
    """The Gram norm of the direct gradient alone: the inner products with the local terms are forgotten."""
    return tf.reduce_sum(contributions._gram(self._a) * contributions._gram(self._g), [1, 2, 3])


def _first_position_only(self: Any) -> tf.Tensor:
    """The ghost norm of a sum over positions without the products of different positions."""
    a, g = (tf.reduce_sum(tf.square(t), -1) for t in (self._a, self._g))
    return tf.reduce_sum(a * g, [1, 2])


def _variable_by_variable(self: Any, task: Any, rows: Any, l2_norm_clip: float) -> Any:
    results, gradients, cotangents = self._run(task, rows)
    sums = []
    for g in per_example._add_local_terms(task, gradients, cotangents):
        squared = sum_of_squares(g)
        weights = mechanisms.clip_weights(squared, l2_norm_clip, rows[-1])
        finite = by_row(tf.math.is_finite(squared), g)
        sums.append(weighted_sum(weights, tf.where(finite, g, 0.0)))
    sums += microbatches.residual_sums(task.releases, results.residuals, rows[-1])
    return tuple(sums), (results.loss, results.parts, results.y_pred, tf.zeros_like(rows[-1]))


def _unclipped_residuals(releases: Any, residuals: Any, mask: tf.Tensor) -> tuple[tf.Tensor, ...]:
    kept = [tf.where(tf.math.is_finite(r), r, 0.0) for r in residuals]
    return tuple(3.0 * weighted_sum(tf.cast(mask, tf.float32), r) for r in kept)


def _first_multiplier(multipliers: Any) -> float:
    return float(multipliers[0])


def _local_terms_after_clipping(self: Any, weights: tf.Tensor, operands: Any) -> tf.Tensor:
    """Clips the direct gradient's weights and adds the local terms unclipped."""
    total = _product_sum(self, weights, operands)
    for (jacobian, _), cotangent in zip(self._corrections, operands[2:], strict=True):
        missing = weighted_sum(1.0 - weights, cotangent)[None]
        term = self._from_matrix(tf.cast(jacobian, tf.float64) * missing)
        total += tf.reshape(term, self.shape)
    return total


_product_sum = contributions.Products.weighted_sum


@contextlib.contextmanager
def _patched(*replacements: tuple[Any, str, Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for owner, name, value in replacements:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


@dataclasses.dataclass(frozen=True)
class Bug:
    """A planted bug.

    Attributes:
      replacements: (owner, name, value) of what is patched.
      check: the generic check that must object.
      catcher: its name in the table.
    """

    replacements: tuple[tuple[Any, str, Any], ...]
    check: Callable[[], Finding]
    catcher: str


_SENSITIVITY, _NOISE, _AUDIT = "neighbouring batches", "distribution of the noise", "audit of a step"
_GRAM = functools.partial(check_sensitivity, engine="book_keeping", norm_method="gram")
_PER_EXAMPLE = functools.partial(check_sensitivity, engine="vectorized")
_RELEASING = functools.partial(check_sensitivity, "anchored")
_CLIP_USERS = (per_example, book_keeping, microbatches)
_OPTIMIZER, _ENGINE = tf_dpbn.DPOptimizer, per_example.PerExampleEngine


def _everywhere(value: Any) -> tuple[tuple[Any, str, Any], ...]:
    return tuple((module, "clip_weights", value) for module in _CLIP_USERS)


BUGS: dict[str, Bug] = {
    "stock batch normalization: statistics of the private batch": Bug(
        ((step, "public_forward", _stock_statistics),), check_sensitivity, _SENSITIVITY
    ),
    "the paper's code: statistics of private and public rows together": Bug(
        ((step, "public_forward", _papers_statistics),), check_sensitivity, _SENSITIVITY
    ),
    "gradient through the private batch's statistics": Bug(
        ((step, "public_forward", _gradient_through_private_statistics),), _GRAM, _SENSITIVITY
    ),
    "moving averages of statistics without noise": Bug(
        ((_OPTIMIZER, "_noised", _privatize_statistics_without_noise),), check_audit, _AUDIT
    ),
    "noise added before clipping": Bug(((_OPTIMIZER, "_noised", _clip_after_noise),), check_noise, _NOISE),
    "noise of only one of four replicas": Bug(((_OPTIMIZER, "_noised", _replica_noise),), check_noise, _NOISE),
    "noise of the multiplier, not times the sensitivity": Bug(
        ((_OPTIMIZER, "_noised", _noise_without_sensitivity),), check_noise, _NOISE
    ),
    "the same seed for every draw of noise": Bug(
        ((mechanisms.NoiseSource, "standard_normal", _reused_noise),), check_audit, _AUDIT
    ),
    "sum divided by the actual batch size": Bug(
        ((_OPTIMIZER, "_noised", _by_actual_batch_size), (step, "read_batch", _remembering_mask)),
        check_updates,
        "neighbouring updates",
    ),
    "accounting drops all multipliers but the first": Bug(
        ((ledger, "effective_noise_multiplier", _first_multiplier),), check_ledger, "ledger against draws"
    ),
    "means of two examples clipped, accounted as one example": Bug(
        ((_ENGINE, "sum_slice", _microbatch_clipping),), _PER_EXAMPLE, _SENSITIVITY
    ),
    "each variable clipped on its own, accounted as one vector": Bug(
        ((_ENGINE, "sum_slice", _variable_by_variable),), _PER_EXAMPLE, _SENSITIVITY
    ),
    "mask of padding rows ignored": Bug(_everywhere(_of_all_rows(mechanisms.clip_weights)), _RELEASING, _SENSITIVITY),
    "NaN times a weight of zero kept in the sum": Bug(
        ((book_keeping, "finite_only", lambda finite, values: values),), check_sensitivity, _SENSITIVITY
    ),
    "ghost norm without the products of different positions": Bug(
        ((contributions.Products, "squared_norms", _first_position_only),), _GRAM, _SENSITIVITY
    ),
    "ghost norm without the cross terms of the local correction": Bug(
        ((contributions.Products, "squared_norms", _without_cross_terms),), _GRAM, _SENSITIVITY
    ),
    "local correction added after clipping": Bug(
        ((contributions.Products, "weighted_sum", _local_terms_after_clipping),), _GRAM, _SENSITIVITY
    ),
    "residuals of statistics not clipped": Bug(
        ((book_keeping, "residual_sums", _unclipped_residuals),), _RELEASING, _SENSITIVITY
    ),
}
# The check of each kind, on the right library.
CHECKS = {
    "sensitivity": check_sensitivity,
    "sensitivity_gram": _GRAM,
    "sensitivity_vectorized": _PER_EXAMPLE,
    "sensitivity_of_statistics": _RELEASING,
    "updates": check_updates,
    "noise": check_noise,
    "ledger": check_ledger,
    "audit": check_audit,
}


def examine(bug: Bug) -> Finding:
    """Runs a bug's check with the bug planted."""
    with _patched(*bug.replacements), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bug.check()


def main() -> None:
    print("| planted bug | caught by | measured |\n| --- | --- | --- |")
    for name, bug in BUGS.items():
        finding = examine(bug)
        print(f"| {name} | {bug.catcher if finding.caught else 'NOBODY'} | {finding.measured} |", flush=True)


if __name__ == "__main__":
    main()
