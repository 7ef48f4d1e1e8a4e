"""DPBatchNormalization: batch normalization whose statistics never come from private rows un-noised.

A layer cannot know by itself which pass it is in, so the train step says it with a scope: in `PublicPass` the layer
normalizes by the moments of its own input, which is public, and records them; in `GivenStatistics` it uses the
statistics it is handed. Training without a scope is an error.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any, TypeVar

import tensorflow as tf

from tf_dpbn import _validate, statistics
from tf_dpbn._keras import IS_KERAS_3, is_shape_inference, keras

_STATISTICS_MODES = ("public",)


@dataclasses.dataclass(frozen=True)
class NormalizationCall:
    """One call of a DPBatchNormalization in a forward pass over public data.

    Attributes:
      layer: the layer.
      inputs: its input z, [public batch, ...].
      mean, variance: the moments of z by channel.
      masked: whether some positions are left out of the moments.
    """

    layer: DPBatchNormalization
    inputs: tf.Tensor
    mean: tf.Tensor
    variance: tf.Tensor
    masked: bool


class _Scopes(threading.local):
    """The scopes entered on this thread; a strategy traces its replicas on several threads."""

    def __init__(self) -> None:
        self.stack: list[StatisticsScope] = []


_SCOPES = _Scopes()
_Scope = TypeVar("_Scope", bound="StatisticsScope")


class StatisticsScope:
    """Decides, while entered, which statistics the DPBatchNormalization layers called on this thread use."""

    def __enter__(self: _Scope) -> _Scope:
        _SCOPES.stack.append(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        _SCOPES.stack.pop()

    def batch_statistics(
        self, layer: DPBatchNormalization, inputs: tf.Tensor, mask: Any, training: bool
    ) -> tuple[tf.Tensor, tf.Tensor] | None:
        """Returns (mean, variance) for one call of `layer`, or None for its moving statistics."""
        raise NotImplementedError


def current_scope() -> StatisticsScope | None:
    """The innermost scope entered on this thread."""
    return _SCOPES.stack[-1] if _SCOPES.stack else None


class PublicPass(StatisticsScope):
    """A forward pass over public data: layers in training normalize by their input's own moments.

    Args:
      active: which calls are in training, each as (id of the layer, how many calls of it came before). None goes by
        each call's `training` argument. A refresh of the moving statistics passes the `active` of an earlier pass,
        because it runs the model in inference (without dropout).

    Attributes:
      calls: the calls in training, in order.
      active: the keys of those calls.
    """

    def __init__(self, active: frozenset[tuple[int, int]] | None = None) -> None:
        self._given = active
        self._seen: dict[int, int] = {}
        self.calls: list[NormalizationCall] = []
        self.active: set[tuple[int, int]] = set()

    def batch_statistics(
        self, layer: DPBatchNormalization, inputs: tf.Tensor, mask: Any, training: bool
    ) -> tuple[tf.Tensor, tf.Tensor] | None:
        """Records the moments of `inputs` and returns them, for a call in training."""
        key = (id(layer), self._seen.get(id(layer), 0))
        self._seen[id(layer)] = key[1] + 1
        if not (training if self._given is None else key in self._given):
            return None
        mean, variance = statistics.moments(inputs, layer.channel_axes, mask)
        self.calls.append(NormalizationCall(layer, inputs, mean, variance, mask is not None))
        self.active.add(key)
        return mean, variance


class GivenStatistics(StatisticsScope):
    """A forward pass in which the calls in training use the given statistics, in the order of the public pass.

    Args:
      calls: the calls of the public pass, for their layers.
      values: (mean, variance) of each of them.
    """

    def __init__(
        self,
        calls: Sequence[NormalizationCall],
        values: Sequence[tuple[tf.Tensor, tf.Tensor]],
    ) -> None:
        self._remaining = list(zip([call.layer for call in calls], values, strict=True))

    def batch_statistics(
        self, layer: DPBatchNormalization, inputs: tf.Tensor, mask: Any, training: bool
    ) -> tuple[tf.Tensor, tf.Tensor] | None:
        """Returns the next of the given statistics, for a call in training."""
        if not training:
            return None
        if not self._remaining or self._remaining[0][0] is not layer:
            raise RuntimeError(
                f"DPBatchNormalization {layer.name!r} is not called in the same order on private data as on the "
                "public batch. The model's control flow must not depend on its input."
            )
        return self._remaining.pop(0)[1]


@keras.saving.register_keras_serializable(package="tf_dpbn")
class DPBatchNormalization(keras.layers.BatchNormalization):
    """Batch normalization for differentially private training.

    In inference it is keras.layers.BatchNormalization: same arguments, same weights, same outputs. In training,
    inside a DPModel, it normalizes private examples by statistics that cost no privacy; it never uses the moments of
    a private batch, and training it anywhere else is an error.

    With `statistics="public"` mean and variance are the moments of the model's public batch at this layer, at the
    current weights. The moving statistics used in inference are set to those of the current weights too (not
    averaged over steps), so `momentum` has no effect in this mode; it is kept for compatibility.

    Formal guarantee: given the weights and the public batch, an example's output does not depend on any other
    private example.

    Args:
      axis: int, the channel axis; on tf_keras also a sequence of ints.
      momentum, epsilon, center, scale, beta_initializer, gamma_initializer, moving_mean_initializer,
        moving_variance_initializer, beta_regularizer, gamma_regularizer, beta_constraint, gamma_constraint: as in
        keras.layers.BatchNormalization.
      statistics: where training statistics come from; "public".
      **kwargs: `name`, `dtype`, `trainable`. With trainable=False the layer uses its moving statistics, as in Keras.

    Raises:
      ValueError: if `statistics` is unknown, or for Keras options that would couple examples (renorm, synchronized,
        virtual_batch_size, adjustment).

    Source: Davody et al. 2020, arXiv 2006.10919; docs/algorithm.md, sections 2 and 3.
    """

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        statistics: str = "public",
        **kwargs: Any,
    ) -> None:
        for option in ("renorm", "synchronized", "virtual_batch_size", "adjustment"):
            value = kwargs.pop(option, None)
            if value:
                raise _validate.argument_error(
                    option, value, "be left out", "It computes statistics across private examples."
                )
        for option in ("renorm_clipping", "renorm_momentum", "fused"):
            kwargs.pop(option, None)
        if not IS_KERAS_3:
            # The fused kernel does not run in inference in front of a tanh (TensorFlow 2.21, oneDNN).
            kwargs["fused"] = False
        super().__init__(
            axis=axis,
            momentum=momentum,
            epsilon=epsilon,
            center=center,
            scale=scale,
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            moving_mean_initializer=moving_mean_initializer,
            moving_variance_initializer=moving_variance_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            **kwargs,
        )
        self.statistics = _validate.one_of("statistics", statistics, _STATISTICS_MODES)

    @property
    def channel_axes(self) -> tuple[int, ...]:
        """The channel axes as a tuple."""
        return (self.axis,) if isinstance(self.axis, int) else tuple(self.axis)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> tf.Tensor:
        """Normalizes `inputs`, [batch, ...]; see the class for where the statistics come from."""
        scope = current_scope()
        training = bool(training) and self.trainable
        if scope is None and training:
            raise RuntimeError(
                f"DPBatchNormalization {self.name!r} was called with training=True outside the train step of a "
                "DPModel, where it would have to use statistics of private data. Build the network as "
                "tf_dpbn.DPModel(inputs, outputs) or tf_dpbn.DPSequential(layers) and train it with `fit`; call "
                f"it with training=False to predict. Received: training={training}"
            )
        if is_shape_inference():
            scope = None  # no call of the pass: a Sequential or functional network is being built within it
        found = scope.batch_statistics(self, inputs, mask, training) if scope else None
        if found is None:
            return super().call(inputs, training=False)
        z = statistics.widen(tf.convert_to_tensor(inputs))
        out = statistics.normalize(z, *found, self.gamma, self.beta, self.epsilon, self.channel_axes)
        return tf.cast(out, self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        config = super().get_config()
        for option in ("renorm", "renorm_clipping", "renorm_momentum", "synchronized"):
            config.pop(option, None)
        return {**config, "statistics": self.statistics}
