"""The privacy boundary: `ClippedSum` goes in, noised tensors come out. No other file draws privacy noise.

A `ClippedSum` holds sums over private examples together with their L2 sensitivity. It is not a tensor: nothing
accepts it but `add_gaussian_noise`, whose result is safe to use in any way (post-processing).
"""

from __future__ import annotations

import dataclasses
import math
import secrets
from typing import Any

import tensorflow as tf

from tf_dpbn import _graph, _validate

# Squares of norms outside this range leave that of float32: clipping would then bound nothing.
_SMALLEST_CLIP, _LARGEST_CLIP = 1e-10, 1e18
# Rounding may leave a clipped vector longer than its bound by less than this part of it; noise covers it. Sums add
# nothing to it that grows with the batch: they are float64 (docs/privacy.md, "Floating point").
ROUNDING = 1e-5
# One draw of noise has fewer numbers than this: their bits are twice as many words, and TensorFlow counts some things
# in 32 bits. Accounting reckons with twice as many in all draws of a step.
_MOST_COORDINATES = 2**30
# Replicas change a variable alike; the first one's value is taken for all.
SAME_ON_REPLICAS = tf.VariableAggregation.ONLY_FIRST_REPLICA


def checked_clip(name: str, value: Any) -> float:
    """Returns a bound on norms as a float, or raises ValueError unless squares of such norms are within float32."""
    clip = _validate.positive(name, value, "1.0 is a common start; tf_dpbn.AutomaticClip() needs no tuning.")
    if not _SMALLEST_CLIP <= clip <= _LARGEST_CLIP:
        requirement = f"lie in [{_SMALLEST_CLIP}, {_LARGEST_CLIP}]"
        raise _validate.argument_error(name, value, requirement, "Squares of other norms leave float32.")
    return clip


def within_clip_range(norm: tf.Tensor) -> tf.Tensor:
    """The norm, or the nearest one that `checked_clip` accepts."""
    return tf.clip_by_value(norm, _SMALLEST_CLIP, _LARGEST_CLIP)


class ClipRule:
    """How vectors are scaled to a bounded norm, where that is not by a constant clip norm."""

    @property
    def l2_sensitivity(self) -> float:
        """Bound on the L2 norm of a scaled vector."""
        raise NotImplementedError

    def weights(self, norms: tf.Tensor) -> tf.Tensor:
        """The factor that scales each vector, [batch], by its L2 norm; that of a non-finite one is not used."""
        raise NotImplementedError


def sensitivity_of(l2_norm_clip: float | ClipRule) -> float:
    """The bound on the L2 norm of what is clipped so."""
    return l2_norm_clip.l2_sensitivity if isinstance(l2_norm_clip, ClipRule) else float(l2_norm_clip)


def clip_weights(squared_norms: tf.Tensor, l2_norm_clip: float | ClipRule, mask: tf.Tensor | None) -> tf.Tensor:
    """The factor that scales each example's vector to an L2 norm of at most `l2_norm_clip`.

    An example whose norm is non-finite gets weight 0: its contribution is dropped, which is a function of that
    example alone and leaves the sensitivity as it is.

    Args:
      squared_norms: float32 [batch], squared L2 norm of each example's whole vector.
      l2_norm_clip: bound on the norm, > 0; `math.inf` does not clip. Or a rule, whose factors are used.
      mask: bool [batch], False for padding rows (weight 0), or None.

    Returns:
      float32 [batch], each in [0, 1] unless a rule says otherwise.

    Source: Abadi et al. 2016, Algorithm 1, with min(1, C/|g|) in place of 1/max(1, |g|/C).

    Examples:
      >>> clip_weights(tf.constant([4.0, 0.25, float("inf")]), 1.0, None).numpy().tolist()
      [0.5, 1.0, 0.0]
    """
    norms = tf.sqrt(squared_norms)
    if isinstance(l2_norm_clip, ClipRule):
        weights = l2_norm_clip.weights(norms)
    else:
        weights = l2_norm_clip / tf.maximum(norms, l2_norm_clip) if math.isfinite(l2_norm_clip) else 1.0
    keep = tf.math.is_finite(norms)
    if mask is not None:
        keep = tf.logical_and(keep, mask)
    return tf.where(keep, weights, tf.zeros_like(norms))


@dataclasses.dataclass(frozen=True, repr=False)
class ClippedSum:
    """Sums over private examples, each example's vector clipped. Private until noise is added.

    Attributes:
      tensors: one float64 tensor a variable; together they are one vector.
      l2_sensitivity: how far that vector can move, in L2 norm, when one example is added or removed.
    """

    tensors: tuple[tf.Tensor, ...]
    l2_sensitivity: float

    def __repr__(self) -> str:
        return f"ClippedSum({len(self.tensors)} tensors, l2_sensitivity={self.l2_sensitivity})"


def summed_over_replicas(clipped: tuple[ClippedSum, ...]) -> tuple[ClippedSum, ...]:
    """Adds up the sums of all replicas of the current distribution strategy; the result is the same on each.

    Replicas hold different examples, so that the sensitivity of their sum is that of each.
    """
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return clipped
    tensors = [each.tensors for each in clipped]
    flat = context.all_reduce(tf.distribute.ReduceOp.SUM, tf.nest.flatten(tensors))
    totals = tf.nest.pack_sequence_as(tensors, flat)
    return tuple(ClippedSum(tuple(t), each.l2_sensitivity) for t, each in zip(totals, clipped, strict=True))


@dataclasses.dataclass(frozen=True)
class NoisedGradients:
    """Gradients that may leave the privacy boundary: a noised clipped sum over the expected batch size.

    Attributes:
      tensors: one float32 tensor a variable.
    """

    tensors: tuple[tf.Tensor, ...]

    def plus(self, terms: list[tf.Tensor | None]) -> NoisedGradients:
        """Adds terms computed without private data, or from released values only; None adds nothing."""
        pairs = zip(self.tensors, terms, strict=True)
        return NoisedGradients(tuple(g if t is None else g + tf.cast(t, g.dtype) for g, t in pairs))


class NoiseSource:
    """Draws standard normal tensors, never the same one twice.

    The key comes from the operating system's entropy, so that `keras.utils.set_random_seed` and
    `tf.random.set_seed` do not make privacy noise predictable. The object is deliberately not trackable: a key
    and counter restored from a checkpoint would repeat noise that was already used, so a loaded model draws a new key.
    Draws are stateless (Philox, keyed by (key, counter)), so replicas that share key and counter draw the same: the
    noise of one mechanism, on each. Built within the scope of a distribution strategy, a source is shared; the key is
    that of the first worker.

    Args:
      seed: for tests only: an int that fixes the key. Noise from a known seed protects nothing.
    """

    def __init__(self, seed: int | None = None) -> None:
        if seed is None:
            key = [secrets.randbits(63), secrets.randbits(63)]
        else:
            key = [int(seed), 0]
        with tf.init_scope():
            self._key = tf.Variable(key, dtype=tf.int64, trainable=False, name="key", aggregation=SAME_ON_REPLICAS)
            self._draws = tf.Variable(0, dtype=tf.int64, trainable=False, name="draws", aggregation=SAME_ON_REPLICAS)

    def is_shared_in(self, strategy: tf.distribute.Strategy) -> bool:
        """Whether all replicas of `strategy` draw the same noise."""
        return strategy.extended.variable_created_in_scope(self._draws)

    def standard_normal(self, shapes: list[tf.TensorShape]) -> list[tf.Tensor]:
        """One fresh float32 N(0, 1) tensor for each shape; advances the counter by one."""
        draw = self._draws.assign_add(1)
        # Philox permutes the 128 bits of a seed, so no two draws share a stream. (stateless_fold_in
        # keeps 64 bits, or 32 with a Python int: so few that they repeat, and can be searched.)
        seed = self._key + tf.stack([tf.zeros_like(draw), draw])
        mixed = tf.random.stateless_uniform([2], seed, minval=None, maxval=None, dtype=tf.int64, alg="philox")
        sizes = [shape.num_elements() for shape in shapes]
        total = sum(sizes)
        if total >= _MOST_COORDINATES:
            raise ValueError(f"One draw of noise has fewer than 2^30 numbers. Train fewer weights. Received: {total}")
        # One draw for all: on CPUs a draw of its own for each small variable takes longer than the numbers do.
        words = tf.random.stateless_uniform(
            [4, (total + 1) // 2], mixed, minval=None, maxval=None, dtype=tf.uint32, alg="philox"
        )
        flat = normal_from_bits(words)[:total]
        return [_graph.reshape(part, shape) for part, shape in zip(tf.split(flat, sizes), shapes, strict=True)]


def normal_from_bits(words: tf.Tensor) -> tf.Tensor:
    """Standard normal numbers with a tail, from uniform bits: Box and Muller's transform.

    The radius comes from 96 bits, so that numbers reach 11.59 standard deviations. TensorFlow's own come from 23 bits
    and end at 5.68: what one example makes likely beyond would be impossible without it, at any epsilon. What is left
    is charged to delta (`accounting.tail_delta`).

    Args:
      words: uint32 [4, n], uniform.

    Returns:
      float32 [2 n].

    Source: Box and Muller 1958, "A Note on the Generation of Random Normal Deviates".

    Examples:
      >>> [round(float(number), 2) for number in normal_from_bits(tf.zeros([4, 1], tf.uint32))]
      [11.6, 0.0]
    """
    high, middle, low, angle = tf.unstack(tf.cast(words, tf.float32))
    # Added from the smallest on, each part at its own exponent: near zero floats are fine enough for all 96 bits.
    uniform = high * 2.0**-32 + (middle * 2.0**-64 + (low + 0.5) * 2.0**-96)
    radius = tf.sqrt(-2.0 * tf.math.log(uniform))
    angle *= 2.0 * math.pi * 2.0**-32
    return tf.concat([radius * tf.cos(angle), radius * tf.sin(angle)], 0)


def add_gaussian_noise(
    clipped: ClippedSum, noise_multiplier: float, denominator: float, source: NoiseSource
) -> NoisedGradients:
    """Releases (clipped sum + N(0, (noise_multiplier * l2_sensitivity)^2 I)) / denominator.

    The noise is larger than that by a part of ROUNDING, which covers the rounding of clipped vectors. Sum and noise are
    added in float64: rounded to float32 before, a sum of many examples would move by more than that. The release is
    rounded to float32 afterwards.

    Formal guarantee: the Gaussian mechanism with standard deviation noise_multiplier * l2_sensitivity; what it
    costs is computed by `accounting` from the multiplier, the sampling rate and the number of steps.

    Args:
      clipped: the sums; each tensor of static shape.
      noise_multiplier: standard deviation over sensitivity, >= 0; 0 adds no noise and gives no privacy.
      denominator: a public constant, the *expected* batch size; never the size of the batch at hand.
      source: where the noise comes from.

    Raises:
      TypeError: if `clipped` is not a ClippedSum.
      ValueError: if noise_multiplier < 0, denominator <= 0, or there is noise to add to an unbounded sum.
    """
    if not isinstance(clipped, ClippedSum):
        raise _validate.argument_error("clipped", clipped, "be a ClippedSum", "Clip the examples first.", TypeError)
    multiplier = _validate.non_negative("noise_multiplier", noise_multiplier)
    denominator = _validate.positive("denominator", denominator)
    small = {i: t.shape for i, t in enumerate(clipped.tensors) if t.shape.num_elements() <= _graph.SMALL}
    sums = [tensor for i, tensor in enumerate(clipped.tensors) if i not in small]
    if small:
        sums.append(tf.concat([tf.reshape(clipped.tensors[i], [-1]) for i in small], 0))
    if multiplier > 0:
        stddev = multiplier * _validate.positive("l2_sensitivity", clipped.l2_sensitivity) * (1.0 + ROUNDING)
        noise = source.standard_normal([tensor.shape for tensor in sums])
        sums = [tensor + tf.cast(stddev * each, tensor.dtype) for tensor, each in zip(sums, noise, strict=True)]
    noised = [tf.cast(tensor / denominator, tf.float32) for tensor in sums]
    return NoisedGradients(tuple(_graph.put_back(noised[:-1], noised[-1], small) if small else noised))
