"""Clipping that needs no tuning of the clip norm: arguments for `l2_norm_clip` of a DPOptimizer."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import tensorflow as tf

from tf_dpbn import _validate
from tf_dpbn._keras import keras
from tf_dpbn.mechanisms import ClipRule, checked_clip, within_clip_range
from tf_dpbn.normalization import StatisticsRelease

_Self = TypeVar("_Self", bound="_Argument")
# What an adaptive clip norm releases beside the gradient: of each example 1/2 or -1/2.
_COUNT = StatisticsRelease(size=1, l2_norm_clip=0.5)


class _Argument:
    """A dataclass that Keras can save."""

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return dict(vars(self))

    @classmethod
    def from_config(cls: type[_Self], config: dict[str, Any]) -> _Self:
        """Builds it from `get_config`."""
        return cls(**config)

    def _put(self, **values: float) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)


@keras.saving.register_keras_serializable(package="tf_dpbn")
@dataclasses.dataclass(frozen=True)
class AutomaticClip(ClipRule, _Argument):
    """Automatic clipping: each example's gradient g is scaled by l2_norm_clip / (|g| + gamma), whatever its norm.

    All gradients well above gamma get nearly the same norm, so that no clip norm has to fit them: `l2_norm_clip` does
    what a learning rate does, and stays as it is. Learning rates are those that suit normalized gradients.

    Formal guarantee: a scaled gradient is shorter than l2_norm_clip, which is the sensitivity of their sum.

    Args:
      l2_norm_clip: bound on the L2 norm of a scaled gradient, > 0.
      gamma: keeps gradients near zero small, >= 1e-10.

    Raises:
      ValueError: an argument is out of range.

    Source: Bu, Wang, Zha, Karypis 2022, "Automatic Clipping: Differentially Private Deep Learning Made Easier and
    Stronger", arXiv 2206.07136, Algorithm 1 (AUTO-S).

    Examples:
      >>> AutomaticClip().weights(tf.constant([0.0, 0.99, 1e9])).numpy().round(4).tolist()
      [100.0, 1.0, 0.0]
    """

    l2_norm_clip: float = 1.0
    gamma: float = 0.01

    def __post_init__(self) -> None:
        self._put(l2_norm_clip=checked_clip("l2_norm_clip", self.l2_norm_clip), gamma=checked_clip("gamma", self.gamma))

    @property
    def l2_sensitivity(self) -> float:
        """The bound on the norm."""
        return self.l2_norm_clip

    def weights(self, norms: tf.Tensor) -> tf.Tensor:
        """See ClipRule."""
        return self.l2_norm_clip / (norms + self.gamma)


@keras.saving.register_keras_serializable(package="tf_dpbn")
@dataclasses.dataclass(frozen=True)
class AdaptiveClip(_Argument):
    """A clip norm that follows a quantile of the norms of the examples' gradients.

    Each step clips to the norm C that earlier releases left. Beside the gradient it releases how many examples had a
    norm of at most C, and with b the noised fraction of them the next step's norm is
    C exp(-learning_rate (b - target_quantile)).

    Formal guarantee: the count is a Gaussian mechanism of its own, to which each example adds 1/2 or -1/2. It takes
    `count_fraction` of a step's privacy (of noise_multiplier^-2) and leaves the rest to the other releases, so that
    epsilon is the same as without; the ledger records its noise multiplier. The norm is post-processing; it is one of
    the optimizer's variables, and saved with them.

    Args:
      initial: the first step's norm, > 0. Rather too small, which costs some tens of steps; too large means much noise.
      target_quantile: which fraction of the gradients is not to be clipped, in (0, 1).
      learning_rate: of the logarithm of the norm, > 0.
      count_fraction: which part of a step's privacy goes to the count, in (0, 1). Its noise has a standard deviation of
        noise_multiplier / (2 sqrt(count_fraction)) examples: 5 noise_multiplier by default.

    Raises:
      ValueError: an argument is out of range.

    Source: Andrew, Thakkar, McMahan, Ramaswamy 2019, "Differentially Private Learning with Adaptive Clipping", arXiv
    1905.03871, sections 2 and 3; their standard deviation of the count is a twentieth of the expected batch size.
    """

    initial: float = 0.1
    target_quantile: float = 0.5
    learning_rate: float = 0.2
    count_fraction: float = 0.01

    def __post_init__(self) -> None:
        self._put(
            initial=checked_clip("initial", self.initial),
            target_quantile=_validate.open_probability("target_quantile", self.target_quantile),
            learning_rate=_validate.positive("learning_rate", self.learning_rate),
            count_fraction=_validate.open_probability("count_fraction", self.count_fraction),
        )

    def updated(self, norm: tf.Tensor, released: tf.Tensor) -> tf.Tensor:
        """The next step's norm, of this step's and the released count, [1], over the expected batch size.

        Examples:
          >>> norm = AdaptiveClip(target_quantile=0.75).updated(tf.constant(2.0), tf.constant([0.5]))
          >>> round(float(norm), 4)  # 2 exp(-0.2 * 0.25)
          1.9025
        """
        fraction = 0.5 + released[0]
        return within_clip_range(norm * tf.exp(-self.learning_rate * (fraction - self.target_quantile)))


@dataclasses.dataclass(frozen=True)
class ClipAt(ClipRule):
    """Scales vectors to at most a norm that changes from step to step, in units of that norm; and counts.

    Attributes:
      norm: float32 scalar, a function of earlier releases.
    """

    norm: tf.Tensor
    # Of every step: what noise is scaled by, and what is recorded, is a constant.
    l2_sensitivity = 1.0

    def weights(self, norms: tf.Tensor) -> tf.Tensor:
        """See ClipRule."""
        return 1.0 / tf.maximum(norms, self.norm)

    def counts(self, squared_norms: tf.Tensor) -> tf.Tensor:
        """[batch, 1]: 1/2 for a vector that is not scaled, -1/2 for one that is, and zero for a non-finite one."""
        norms = tf.sqrt(squared_norms)
        counts = tf.where(norms <= self.norm, _COUNT.l2_norm_clip, -_COUNT.l2_norm_clip)
        return tf.where(tf.math.is_finite(norms), counts, 0.0)[:, None]


def count_release(l2_norm_clip: Any) -> tuple[StatisticsRelease, ...]:
    """What clipping releases beside the gradient: the count of an adaptive clip norm, or nothing."""
    return (_COUNT,) if isinstance(l2_norm_clip, ClipAt) else ()
