"""DPBatchNormalization: batch normalization whose statistics never come from private rows un-noised.

A layer cannot know by itself which pass it is in, so the train step says it with a scope: in `PublicPass` the layer
normalizes by the moments of its own input, which is public, and records them; in `GivenStatistics` it uses the
statistics it is handed. Training without a scope is an error. A model whose train step is not this library's gets its
scope from `interop`, as `training_scope` of its layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf

from tf_dpbn import _validate
from tf_dpbn._keras import IS_KERAS_3, UNFUSED, StoredBeside, is_shape_inference, keras, raw, stored_as
from tf_dpbn.mechanisms import checked_clip
from tf_dpbn.normalization import moments
from tf_dpbn.normalization.moments import LocalTerm

STATISTICS_MODES = ("public", "noised", "anchored", "fixed")
Statistics = tuple[tf.Tensor, tf.Tensor] | None
_DEFAULT_MOMENTUM = {"public": 0.99, "noised": 0.95, "anchored": 0.95, "fixed": 0.99}


@dataclasses.dataclass(frozen=True)
class StatisticsRelease:
    """A vector by example whose clipped sum is released with noise, beside the gradient.

    Attributes:
      size: its length.
      l2_norm_clip: bound on its L2 norm.
    """

    size: int
    l2_norm_clip: float


@dataclasses.dataclass(frozen=True)
class NormalizationCall:
    """One call of a DPBatchNormalization in training, in the public pass.

    Attributes:
      layer: the layer.
      inputs: its input z, [public batch, ...].
      mean, variance: the statistics by which private examples are normalized, by channel.
      public_mean, public_variance: the moments of z by channel; those of another pass where `mean` and `variance` do
        not come from them (statistics="noised").
      masked: whether some positions are left out of the moments.
      local_terms: how its statistics depend on the kernel layer that feeds it (docs/algorithm.md, section 3a).
      input_mean: with noised statistics, the variable of the released mean of what that layer is fed with.
      is_nonlocal: whether section 3b restores the gradient through its statistics.
    """

    layer: DPBatchNormalization
    inputs: tf.Tensor
    mean: tf.Tensor
    variance: tf.Tensor
    public_mean: tf.Tensor
    public_variance: tf.Tensor
    masked: bool
    local_terms: tuple[LocalTerm, ...] = ()
    input_mean: Any = None
    is_nonlocal: bool = False

    @property
    def channels(self) -> int:
        """How many channels are normalized."""
        return self.mean.shape.num_elements() or 0

    @property
    def release(self) -> StatisticsRelease | None:
        """What a step releases of it: residuals of its moments, and of its kernel layer's mean input."""
        if not self.layer.releases:
            return None
        size = 2 * self.channels + (0 if self.input_mean is None else self.input_mean.shape[0])
        return StatisticsRelease(size, self.layer.statistics_clip * math.sqrt(size))

    def public_cotangents(self, c_mean: tf.Tensor, c_variance: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Carries derivatives by `mean` and `variance`, [..., channels], to `public_mean` and `public_variance`."""
        if self.layer.statistics != "anchored":
            return c_mean, c_variance
        shift, log_scale, variance = (
            tf.reshape(each, [-1]) for each in (raw(self.layer.shift), raw(self.layer.log_scale), self.public_variance)
        )
        return moments.anchored_cotangents(c_mean, c_variance, variance, shift, log_scale, self.layer.epsilon)


def side_by_side(
    calls: Sequence[NormalizationCall], variances: Sequence[tf.Tensor], dtype: tf.DType
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Scales, variances and epsilons of all calls as `moments` takes them, [channels of all calls] each.

    A deep network has many small ones, and each operation on one of its own takes time.
    """
    sizes = [call.channels for call in calls]
    scales = [
        tf.ones([size]) if call.layer.gamma is None else raw(call.layer.gamma)
        for call, size in zip(calls, sizes, strict=True)
    ]
    epsilon = tf.constant(np.repeat([call.layer.epsilon for call in calls], sizes), dtype)
    return moments.joined(scales, dtype), moments.joined(variances, dtype), epsilon


class _Scopes(threading.local):
    """The scopes entered on this thread; a strategy traces its replicas on several threads."""

    def __init__(self) -> None:
        self.stack: list[StatisticsScope] = []


_SCOPES = _Scopes()
# Averages of releases stay float32 under mixed precision.
_WITHOUT_CAST: dict[str, Any] = {"autocast": False} if IS_KERAS_3 else {"experimental_autocast": False}
stored_as({"DPBatchNormalization": "BatchNormalization", "DPFunctional": "Functional", "DPSequential": "Sequential"})
_Scope = TypeVar("_Scope", bound="StatisticsScope")


class StatisticsScope:
    """Decides, while entered, which statistics the DPBatchNormalization layers called on this thread use."""

    def __enter__(self: _Scope) -> _Scope:
        _SCOPES.stack.append(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        _SCOPES.stack.pop()

    def batch_statistics(self, layer: DPBatchNormalization, inputs: tf.Tensor, mask: Any, training: bool) -> Statistics:
        """Returns tensors (mean, variance) for one call of `layer`, or None for its moving statistics."""
        raise NotImplementedError

    def normalize(self, layer: DPBatchNormalization, z: tf.Tensor, found: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        """Normalizes z, float32 or wider, by what `batch_statistics` returned."""
        return moments.normalize(z, *found, layer.gamma, layer.beta, layer.epsilon, layer.channel_axes)


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

    def batch_statistics(self, layer: DPBatchNormalization, inputs: tf.Tensor, mask: Any, training: bool) -> Statistics:
        """Records a call in training; returns what normalizes the public examples: their own moments, if used."""
        key = (id(layer), self._seen.get(id(layer), 0))
        self._seen[id(layer)] = key[1] + 1
        if not (training if self._given is None else key in self._given):
            return None
        found = layer.released_statistics() or moments.moments(inputs, layer.channel_axes, mask)
        private = layer.private_statistics(*found)
        self.calls.append(NormalizationCall(layer, inputs, *private, *found, mask is not None))
        self.active.add(key)
        return found


@dataclasses.dataclass(frozen=True)
class Normalized:
    """One call of a DPBatchNormalization on private examples, whose scale and offset are constants.

    Attributes:
      inputs, outputs: z and what it was normalized to, in float32 or wider.
      mean, variance: the statistics, of the shape of the channel axes.
    """

    inputs: tf.Tensor
    outputs: tf.Tensor
    mean: tf.Tensor
    variance: tf.Tensor


class GivenStatistics(StatisticsScope):
    """A forward pass in which the calls in training use the given statistics, in the order of the public pass.

    Args:
      calls: the calls of the public pass, for their layers.
      values: (mean, variance) of each of them.
      constants: scale, offset and statistics get no gradient; who needs it takes it from `normalized`.

    Attributes:
      inputs: (input, mask or None) of each call, once it was made.
      normalized: likewise.
    """

    def __init__(
        self,
        calls: Sequence[NormalizationCall],
        values: Sequence[tuple[tf.Tensor, tf.Tensor]],
        constants: bool = False,
    ) -> None:
        self._remaining = list(zip([call.layer for call in calls], values, strict=True))
        self._constants = constants
        self.inputs: list[tuple[tf.Tensor, Any]] = []
        self.normalized: list[Normalized] = []

    def batch_statistics(self, layer: DPBatchNormalization, inputs: tf.Tensor, mask: Any, training: bool) -> Statistics:
        """Returns the next of the given statistics, for a call in training."""
        if not training:
            return None
        if not self._remaining or self._remaining[0][0] is not layer:
            raise RuntimeError(
                f"DPBatchNormalization {layer.name!r} is not called in the same order on private data as on the "
                "public batch. The model's control flow must not depend on its input."
            )
        self.inputs.append((inputs, mask))
        return self._remaining.pop(0)[1]

    def normalize(self, layer: DPBatchNormalization, z: tf.Tensor, found: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        """See StatisticsScope."""
        if not self._constants:
            return super().normalize(layer, z, found)
        gamma, beta = (None if each is None else tf.stop_gradient(each) for each in (layer.gamma, layer.beta))
        out = moments.normalize(z, *found, gamma, beta, layer.epsilon, layer.channel_axes)
        self.normalized.append(Normalized(z, out, *found))
        return out


@keras.saving.register_keras_serializable(package="tf_dpbn")
class DPBatchNormalization(keras.layers.BatchNormalization):
    """Batch normalization for differentially private training.

    In inference it is keras.layers.BatchNormalization: same arguments, same weights, same outputs. In training,
    inside a DPModel, it normalizes private examples by statistics that are public or were released with noise; it never
    uses the moments of a private batch, and training it anywhere else is an error (but with "fixed" statistics, which
    nothing changes).

    | `statistics` | normalizes by | needs | costs |
    | --- | --- | --- | --- |
    | "public" | moments of the model's public batch at the current weights | a public batch | nothing |
    | "noised" | moving averages of noised private moments | | part of the noise budget |
    | "anchored" | both: public moments, moved by averages of noised residuals | a public batch | part of the budget |
    | "fixed" | its moving statistics, in training as in inference | public pretraining | nothing |

    The public batch may be synthetic, see `public_data`.

    With "public" the moving statistics used in inference are set to those of the current weights (not averaged over
    steps), so `momentum` has no effect. With "noised" and "anchored" each step releases, for each call of the layer,
    one noised sum over private examples of how their moments differ from the statistics in use, clipped by example to
    an L2 norm of statistics_clip * sqrt(its length); the optimizer's `statistics_fraction` says how much of a step's
    privacy all of these releases take together, and the ledger counts them. How many examples are clipped is not
    released: it would cost privacy of its own.

    With "fixed" the moving statistics are constants that came with the initial weights, from pretraining on public
    data; training never changes them. Scale and offset train, which in a layer with trainable=False they do not.

    Formal guarantee: given the weights, the public batch and earlier releases, an example's output does not depend on
    any other private example; each release is a Gaussian mechanism.

    Args:
      axis: int, the channel axis; on tf_keras also a sequence of ints.
      momentum: of the moving averages of released statistics; None takes 0.95 (0.99 with "public" and "fixed", which
        keep no averages). The first updates count more, see `moments.update_rate`.
      *args, **kwargs: epsilon, center, scale, initializers, regularizers, constraints, name, dtype and trainable, as in
        keras.layers.BatchNormalization. With trainable=False the layer uses its moving statistics.
      statistics: where training statistics come from: "public", "noised", "anchored" or "fixed".
      statistics_clip: bound on the root mean square of an example's released residuals, > 0; the statistics' noise
        grows in proportion to it.

    Raises:
      ValueError: if `statistics` is unknown, or for Keras options that would couple examples (renorm, synchronized,
        virtual_batch_size, adjustment).

    Source: Davody et al. 2020, arXiv 2006.10919; docs/algorithm.md, sections 2 and 3.
    """

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
        momentum: float | None = None,
        *args: Any,
        statistics: str = "public",
        statistics_clip: float = 1.0,
        **kwargs: Any,
    ) -> None:
        for option in ("renorm", "synchronized", "virtual_batch_size", "adjustment"):
            if value := kwargs.pop(option, None):
                remedy = "It computes statistics across private examples."
                raise _validate.argument_error(option, value, "be left out", remedy)
        for option in ("renorm_clipping", "renorm_momentum", "fused"):
            kwargs.pop(option, None)
        kwargs.update(UNFUSED)
        _validate.one_of("statistics", statistics, STATISTICS_MODES)
        super().__init__(axis, _DEFAULT_MOMENTUM[statistics] if momentum is None else momentum, *args, **kwargs)
        self.statistics = statistics
        self.statistics_clip = checked_clip("statistics_clip", statistics_clip)
        # For calls outside of any scope; no part of the configuration, so that a copied or loaded layer has none.
        self.training_scope: StatisticsScope | None = None

    def build(self, input_shape: Any) -> None:
        """Creates the weights; for released statistics also their averages and the number of their updates."""
        super().build(input_shape)
        if self.releases:
            shape = tuple(self.moving_mean.shape)
            if self.statistics == "anchored":
                self.shift, self.log_scale = self._average("shift", shape), self._average("log_scale", shape)
            self.statistic_updates = self._average("statistic_updates", ())

    def _average(self, name: str, shape: tuple[int, ...]) -> Any:
        options = {"dtype": "float32", "initializer": "zeros", "trainable": False, **_WITHOUT_CAST}
        return self.add_weight(name=name, shape=shape, **options)

    @functools.cached_property
    def released_averages(self) -> StoredBeside:
        """What weights files hold beside the weights of stock batch normalization, which they hold as its own."""
        return StoredBeside(self._save_averages, self._load_averages)

    def save_own_variables(self, store: Any) -> None:
        """Keras' hook: what keras.layers.BatchNormalization saves."""
        for k, weight in enumerate(self._stock_weights()):
            store[f"{k}"] = raw(weight).numpy()

    def load_own_variables(self, store: Any) -> None:
        """Keras' hook: loads what keras.layers.BatchNormalization saves.

        Raises:
          ValueError: for another number of weights.
        """
        weights = self._stock_weights()
        if len(store.keys()) != len(weights):
            raise ValueError(
                f"The file must hold {len(weights)} weights for batch normalization {self.name!r}. Load into a built "
                f"model with the same layers, of the same `center` and `scale`. Received: {len(store.keys())}"
            )
        for k, weight in enumerate(weights):
            weight.assign(store[f"{k}"])

    def _stock_weights(self) -> list[Any]:
        weights = (self.gamma, self.beta, self.moving_mean, self.moving_variance) if self.built else ()
        return [weight for weight in weights if weight is not None]

    def _average_weights(self) -> dict[str, Any]:
        names = ("shift", "log_scale", "statistic_updates")
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def _save_averages(self, store: Any) -> None:
        for name, weight in self._average_weights().items():
            store[name] = raw(weight).numpy()

    def _load_averages(self, store: Any) -> None:
        """Takes averages from a file; from one without, a stock model's say, they begin anew as after `convert`."""
        weights = self._average_weights()
        known = set(weights) <= set(store.keys())
        for name, weight in weights.items():
            weight.assign(store[name] if known else tf.zeros_like(raw(weight)))

    @property
    def releases(self) -> bool:
        """Whether training releases noised statistics of private examples."""
        return self.statistics in ("noised", "anchored")

    @property
    def uses_public_batch(self) -> bool:
        """Whether statistics of training come from a public batch, at least in part."""
        return self.statistics in ("public", "anchored")

    def released_statistics(self) -> tuple[tf.Tensor, tf.Tensor] | None:
        """(mean, variance) if they are moving averages of releases and nothing else."""
        return self.moving_statistics() if self.statistics == "noised" else None

    def moving_statistics(self) -> tuple[tf.Tensor, tf.Tensor]:
        """(mean, variance) of inference, each of the shape of the channel axes."""
        return self._by_channel(self.moving_mean), self._by_channel(self.moving_variance)

    def _by_channel(self, weight: Any) -> tf.Tensor:
        """A weight in the shape of the channel axes; tf_keras gives several axes the rank of the input."""
        axes = self.channel_axes
        shape = [-1] if len(axes) == 1 else [weight.shape[axis] for axis in sorted(axes)]
        return tf.reshape(raw(weight), shape)

    def private_statistics(self, mean: tf.Tensor, variance: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Statistics for private examples, from those of the public batch (or released ones)."""
        if self.statistics != "anchored":
            return mean, variance
        averages = (self._by_channel(self.shift), self._by_channel(self.log_scale))
        return moments.anchored(mean, variance, *averages, self.epsilon)

    def update_rate(self, layers: int) -> tf.Tensor:
        """The part that the next release has in the averages, see `moments.update_rate`."""
        return moments.update_rate(self.momentum, raw(self.statistic_updates), layers)

    def update_statistics(self, call: NormalizationCall, released: tf.Tensor, layers: int) -> None:
        """Takes over the released mean of residuals, [2 * channels], that was computed with `call`'s statistics.

        Args:
          call: a call of this layer.
          released: noised.
          layers: how many normalizations the model has.
        """
        rate = self.update_rate(layers)
        if self.statistics == "noised":
            weights = (self.moving_mean, self.moving_variance)
            mean, variance = (tf.reshape(t, [-1]) for t in (call.mean, call.variance))
            values = moments.updated(mean, variance, released, rate, self.epsilon)
        else:
            weights = (self.shift, self.log_scale)
            shift, log_scale = (tf.reshape(raw(weight), [-1]) for weight in weights)
            values = moments.updated_anchor(shift, log_scale, released, rate)
        for weight, value in zip(weights, values, strict=True):
            weight.assign(tf.cast(tf.reshape(value, weight.shape), weight.dtype))
        self.statistic_updates.assign_add(1.0)

    @property
    def channel_axes(self) -> tuple[int, ...]:
        """The channel axes as a tuple."""
        return (self.axis,) if isinstance(self.axis, int) else tuple(self.axis)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> tf.Tensor:
        """Normalizes `inputs`, [batch, ...]; see the class for where the statistics come from."""
        training = bool(training) and self.trainable
        if self.statistics == "fixed":
            return self._by_constants(inputs) if training else super().call(inputs, training=False)
        scope = current_scope() or self.training_scope
        if scope is None and training:
            raise RuntimeError(
                f"DPBatchNormalization {self.name!r} was called with training=True outside a private step, where it "
                "would have to use statistics of private data. To train, call `fit` of a tf_dpbn.DPModel or "
                "tf_dpbn.DPSequential, or pass `fit` of a stock model a tf_dpbn.interop.StatisticsCallback. To "
                "predict, pass training=False; for Monte Carlo dropout pass training=True to the dropout layers alone. "
                f"Received: training={training}"
            )
        if is_shape_inference():
            scope = None  # no call of the pass: a Sequential or functional network is being built within it
        found = scope.batch_statistics(self, inputs, mask, training) if scope else None
        if scope is None or found is None:
            return super().call(inputs, training=False)
        z = moments.widen(tf.convert_to_tensor(inputs))
        return tf.cast(scope.normalize(self, z, found), self.compute_dtype)

    def _by_constants(self, inputs: Any) -> tf.Tensor:
        """Normalizes by the moving statistics; scale and offset are operations for which book-keeping has rules."""
        z = moments.widen(tf.convert_to_tensor(inputs))
        statistics = self.moving_statistics()
        out = moments.normalize(z, *statistics, None, None, self.epsilon, self.channel_axes)
        shape = moments.broadcast_shape(z.shape.rank, self.channel_axes, statistics[0])
        if self.gamma is not None:
            out *= tf.reshape(tf.cast(raw(self.gamma), z.dtype), shape)
        if self.beta is not None:
            out += tf.reshape(tf.cast(raw(self.beta), z.dtype), shape)
        return tf.cast(out, self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        config = super().get_config()
        for option in ("renorm", "renorm_clipping", "renorm_momentum", "synchronized"):
            config.pop(option, None)
        return {**config, "statistics": self.statistics, "statistics_clip": self.statistics_clip}
