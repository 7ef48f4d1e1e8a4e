"""Clipping that needs no tuning of the clip norm: arguments for `l2_norm_clip` of a DPOptimizer."""

from __future__ import annotations

import dataclasses
from typing import Any

import tensorflow as tf

from tf_dpbn._keras import keras
from tf_dpbn.mechanisms import ClipRule, checked_clip


@keras.saving.register_keras_serializable(package="tf_dpbn")
@dataclasses.dataclass(frozen=True)
class AutomaticClip(ClipRule):
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

    >>> AutomaticClip().weights(tf.constant([0.0, 0.99, 99.99])).numpy().tolist()
    [100.0, 1.0, 0.009999999776482582]
    """

    l2_norm_clip: float = 1.0
    gamma: float = 0.01

    def __post_init__(self) -> None:
        object.__setattr__(self, "l2_norm_clip", checked_clip("l2_norm_clip", self.l2_norm_clip))
        object.__setattr__(self, "gamma", checked_clip("gamma", self.gamma))

    @property
    def l2_sensitivity(self) -> float:
        """The bound on the norm."""
        return self.l2_norm_clip

    def weights(self, norms: tf.Tensor) -> tf.Tensor:
        """See ClipRule."""
        return self.l2_norm_clip / (norms + self.gamma)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AutomaticClip:
        """Builds it from `get_config`."""
        return cls(**config)
