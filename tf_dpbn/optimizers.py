"""Differentially private optimizers: a Keras optimizer behind clipping and noise.

`DPOptimizer` wraps any Keras optimizer. It holds the clip norm and the noise multiplier, turns a `ClippedSum` into
`NoisedGradients`, and hands those, and nothing else, to the inner optimizer.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Sequence
from typing import Any, TypeVar

import tensorflow as tf

from tf_dpbn import _validate
from tf_dpbn._keras import IS_KERAS_3, apply_gradients, keras
from tf_dpbn.accounting import PrivacyPlan, split_noise_multiplier
from tf_dpbn.clipping import AdaptiveClip, AutomaticClip, ClipAt
from tf_dpbn.mechanisms import (
    SAME_ON_REPLICAS,
    ClippedSum,
    ClipRule,
    NoisedGradients,
    NoiseSource,
    add_gaussian_noise,
    checked_clip,
    sensitivity_of,
)

_Self = TypeVar("_Self", bound="DPOptimizer")
_Clip = float | AutomaticClip | AdaptiveClip
_PRIVACY_ARGUMENTS = (
    "l2_norm_clip",
    "noise_multiplier",
    "expected_batch_size",
    "num_examples",
    "delta",
    "statistics_fraction",
)
_MOST_RELEASES = 1024
_ORDINARY_GRADIENTS = (
    "accepts only clipped and noised gradients, so that a model cannot train without privacy unnoticed. Train with "
    "tf_dpbn.DPModel or tf_dpbn.DPSequential instead of keras.Model (tf_dpbn.convert makes one of yours), or use an "
    "ordinary optimizer."
)


def _fixed(name: str, doc: str) -> Any:
    """A property that nobody sets."""
    return property(operator.attrgetter(f"_{name}"), doc=doc)


def _of_inner(name: str, doc: str) -> Any:
    """A property of the inner optimizer."""

    def put(self: Any, value: Any) -> None:
        setattr(self.inner, name, value)

    return property(operator.attrgetter(f"inner.{name}"), put, doc=doc)


class _StepCounter:
    """Counts steps by how much they release beside the gradient; in no checkpoint, which could set it back."""

    def __init__(self) -> None:
        with tf.init_scope():
            zeros = tf.zeros([_MOST_RELEASES], tf.int64)
            self._counts = tf.Variable(zeros, trainable=False, name="private_steps", aggregation=SAME_ON_REPLICAS)

    def count(self, further_releases: int) -> tf.Tensor:
        if further_releases >= _MOST_RELEASES:
            raise ValueError(f"A step releases fewer than {_MOST_RELEASES} statistics. Received: {further_releases}")
        return self._counts.assign_add(tf.one_hot(further_releases, _MOST_RELEASES, dtype=tf.int64))

    def counts(self) -> list[int]:
        return tf.convert_to_tensor(self._counts).numpy().tolist()


@keras.saving.register_keras_serializable(package="tf_dpbn")
class DPOptimizer(keras.optimizers.Optimizer):
    """DP-SGD around any Keras optimizer, for use with a DPModel.

    Each step releases (sum of clipped per-example gradients + Gaussian noise of standard deviation
    noise_multiplier * l2_norm_clip) / expected_batch_size, and the inner optimizer works on that release alone.

    Formal guarantee: each step is one Gaussian mechanism with the given noise multiplier under adding or removing one
    example; what the inner optimizer does (momentum, schedules, weight decay) is post-processing.

    Args:
      inner: a keras optimizer, or its name.
      l2_norm_clip: bound on the L2 norm of one example's gradient over all variables, > 0; or an AutomaticClip or
        AdaptiveClip, which need no tuning.
      noise_multiplier: standard deviation of the noise over l2_norm_clip, >= 0. 0 gives no privacy. If the model
        releases noised statistics, or the clip norm is adaptive, it is the effective noise multiplier of all releases
        of a step together.
      expected_batch_size: expected number of examples in a batch, the denominator. A public constant: never the size
        of the batch at hand, which depends on who is in it.
      num_examples: size of the training set, for accounting; None if not known here.
      delta: the delta at which callbacks report epsilon, in (0, 1); None if not known here.
      statistics_fraction: which part of a step's privacy goes to noised statistics if the model has any, in (0, 1);
        the gradient's noise multiplier is then noise_multiplier / sqrt(1 - statistics_fraction). See
        `accounting.split_noise_multiplier`.
      noise_seed: for tests only. Noise from a known seed protects nothing; it is not part of the configuration.
      name: optional name.

    Raises:
      ValueError: for a clip norm or batch size <= 0, a negative noise multiplier, a batch larger than the data set,
        or an inner optimizer that is private itself or scales losses.

    Source: Abadi et al. 2016, Algorithm 1.
    """

    def __init__(
        self,
        inner: Any,
        l2_norm_clip: _Clip,
        noise_multiplier: float,
        expected_batch_size: float | None = None,
        num_examples: int | None = None,
        delta: float | None = None,
        statistics_fraction: float = 0.1,
        noise_seed: int | None = None,
        name: str | None = None,
    ) -> None:
        inner = keras.optimizers.get(inner)
        if isinstance(inner, (DPOptimizer, keras.mixed_precision.LossScaleOptimizer)):
            raise _validate.argument_error("inner", inner, "be an ordinary optimizer", "Pass the optimizer it wraps.")
        if getattr(inner, "gradient_accumulation_steps", None):
            received = f"gradient_accumulation_steps={inner.gradient_accumulation_steps}"
            requirement = "not accumulate gradients itself: each would carry noise of its own"
            remedy = "Give `fit` the whole batch: DPModel.compile(microbatch_size=...) bounds the memory that it takes."
            raise _validate.argument_error("inner", received, requirement, remedy)
        if getattr(inner, "loss_scale_factor", None):
            requirement = "not divide gradients by a loss scale"
            remedy = "Pass loss_scale to DPModel.compile, which scales losses before gradients are clipped."
            raise _validate.argument_error("inner", f"loss_scale_factor={inner.loss_scale_factor}", requirement, remedy)
        name = name or f"dp_{inner.name}"
        super().__init__(learning_rate=0.0, name=name) if IS_KERAS_3 else super().__init__(name=name)
        self.inner = inner
        self._l2_norm_clip = _checked_clip(l2_norm_clip)
        self._clip_norm: tf.Variable | None = None
        if isinstance(self._l2_norm_clip, AdaptiveClip):
            with tf.init_scope():
                initial = tf.constant(self._l2_norm_clip.initial)
                self._clip_norm = tf.Variable(initial, trainable=False, name="clip_norm", aggregation=SAME_ON_REPLICAS)
        remedy = "Use a PrivacyPlan to compute it from a target epsilon."
        self._noise_multiplier = _validate.non_negative("noise_multiplier", noise_multiplier, remedy)
        remedy = "Pass the expected number of examples in a batch, or build the optimizer with from_plan."
        self._expected_batch_size = _validate.positive("expected_batch_size", expected_batch_size, remedy)
        self._num_examples = None
        if num_examples is not None:
            self._num_examples = _validate.positive_int("num_examples", num_examples)
            if self._expected_batch_size > self._num_examples:
                requirement = f"not exceed num_examples={num_examples}"
                remedy = "A batch is drawn from the data set."
                raise _validate.argument_error("expected_batch_size", expected_batch_size, requirement, remedy)
        self._delta = None if delta is None else _validate.open_probability("delta", delta)
        self._statistics_fraction = _validate.open_probability("statistics_fraction", statistics_fraction)
        self._noise_source = NoiseSource(noise_seed)
        self._steps = _StepCounter()

    @classmethod
    def from_plan(
        cls: type[_Self],
        plan: PrivacyPlan,
        inner: Any,
        l2_norm_clip: _Clip,
        *,
        noise_seed: int | None = None,
        name: str | None = None,
        **refused: Any,
    ) -> _Self:
        """Builds the optimizer with the noise multiplier, batch size and data set size of a PrivacyPlan.

        Args:
          plan: the plan.
          inner, l2_norm_clip, noise_seed, name: the other arguments of the constructor.

        Raises:
          TypeError: if `plan` is not a PrivacyPlan.
          ValueError: if an argument that the plan decides is passed as well.
        """
        decided = _decided_by_plan(plan, "inner, l2_norm_clip=...", refused)
        return cls(inner, l2_norm_clip, noise_seed=noise_seed, name=name, **refused, **decided)

    # The traced train step and the ledger rely on these: a change needs a new optimizer and a new compile.

    l2_norm_clip: _Clip = _fixed("l2_norm_clip", "As given: a bound on one example's gradient, or how to find one.")
    noise_multiplier: float = _fixed("noise_multiplier", "Standard deviation of the noise over l2_norm_clip.")
    expected_batch_size: float = _fixed("expected_batch_size", "The denominator.")
    num_examples: int | None = _fixed("num_examples", "Size of the training set, or None.")
    delta: float | None = _fixed("delta", "The delta at which callbacks report epsilon, or None.")
    statistics_fraction: float = _fixed("statistics_fraction", "Part of a step's privacy for noised statistics.")

    @property
    def clip_norm(self) -> float:
        """The clip norm of the next step: as given, or where an AdaptiveClip has brought it."""
        return float(self._norm())

    def _norm(self) -> float | tf.Tensor:
        return sensitivity_of(self._l2_norm_clip) if self._clip_norm is None else self._clip_norm.read_value()

    def clip_of_step(self) -> float | ClipRule:
        """How a step clips its examples; read in the step, before its release."""
        return self._l2_norm_clip if self._clip_norm is None else ClipAt(self._norm())

    def noise_multipliers(self, further_releases: int) -> tuple[float, ...]:
        """Noise multipliers of a step's gradient and its further releases: statistics, and an AdaptiveClip's count."""
        count = getattr(self._l2_norm_clip, "count_fraction", None)
        statistics = further_releases - (count is not None)
        return split_noise_multiplier(self.noise_multiplier, self.statistics_fraction, statistics, count)

    def gradient_stddev(self, further_releases: int) -> float | tf.Tensor:
        """Standard deviation of the noise in each entry of a step's released mean gradient; read before the release."""
        return self.noise_multipliers(further_releases)[0] * self._norm() / self.expected_batch_size

    @property
    def sampling_probability(self) -> float | None:
        """expected_batch_size / num_examples, or None if num_examples was not given."""
        return None if self.num_examples is None else self.expected_batch_size / self.num_examples

    def release(self, clipped: Sequence[ClippedSum]) -> tuple[NoisedGradients, ...]:
        """Releases the clipped sums of one step: its privacy boundary. Counts the step, then draws its noise.

        Args:
          clipped: ClippedSums, the gradient's, then those of statistics, if any, and the count of an AdaptiveClip (at
            most 1,023 further ones).

        Returns:
          Each sum, noised, over the expected batch size; but the count, which goes into the next step's clip norm.
        """
        sums = [tensor for each in clipped for tensor in getattr(each, "tensors", ())]
        with tf.control_dependencies(sums):  # a batch that cannot be read, beyond the end of the data, is no step
            counted = self._steps.count(len(clipped) - 1)
        with tf.control_dependencies([counted]):
            noised = self._noised(clipped)
        if self._clip_norm is None:
            return noised
        gradient, *statistics, count = noised  # from here on post-processing
        norm = self._norm()
        self._clip_norm.assign(self._l2_norm_clip.updated(norm, count.tensors[0]))
        return NoisedGradients(tuple(norm * tensor for tensor in gradient.tensors)), *statistics

    def _noised(self, clipped: Sequence[ClippedSum]) -> tuple[NoisedGradients, ...]:
        """What `release` returns; by itself it counts nothing, for audits."""
        return tuple(
            add_gaussian_noise(each, multiplier, self.expected_batch_size, self._noise_source)
            for each, multiplier in zip(clipped, self.noise_multipliers(len(clipped) - 1), strict=True)
        )

    def counted_steps(self) -> dict[tuple[float, ...], int]:
        """How many steps `release` has taken in this process, by the noise multipliers that it drew with."""
        counts = enumerate(self._steps.counts())
        return {self.noise_multipliers(further): steps for further, steps in counts if steps}

    def apply_gradients(self, gradients: NoisedGradients, variables: Any = None, **kwargs: Any) -> Any:
        """Lets the inner optimizer apply noised gradients to `variables`; refuses ordinary ones."""
        if not isinstance(gradients, NoisedGradients):
            raise TypeError(f"{type(self).__name__} {_ORDINARY_GRADIENTS} Received: {type(gradients).__name__}")
        tensors = _of_first_replica(gradients.tensors)
        pairs = [(tf.cast(t, v.dtype), v) for t, v in zip(tensors, variables, strict=True)]
        return apply_gradients(self.inner, pairs)

    @property
    def inner_optimizer(self) -> Any:
        """The inner optimizer, by the name under which callbacks of Keras look for it (SwapEMAWeights, TensorBoard)."""
        return self.inner

    def is_built_in(self, strategy: tf.distribute.Strategy) -> bool:
        """Whether the optimizer belongs to `strategy`, so that its replicas draw the same noise."""
        inner = getattr(self.inner, "_distribution_strategy", None)
        belongs = inner is None or strategy.num_replicas_in_sync == 1 or inner is strategy
        return belongs and self._noise_source.is_shared_in(strategy)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{type(self).__name__} {_ORDINARY_GRADIENTS}")

    apply = minimize = compute_gradients = stateless_apply = update_step = _refuse

    def build(self, variables: Any) -> None:
        """Creates the inner optimizer's variables."""
        if hasattr(self.inner, "build") and not (IS_KERAS_3 and self.inner.built):
            self.inner.build(variables)
        if IS_KERAS_3:
            self.built = True

    iterations: Any = _of_inner("iterations", "The inner optimizer's step count.")
    learning_rate: Any = _of_inner("learning_rate", "The inner optimizer's learning rate.")

    @property
    def variables(self) -> Any:
        """The inner optimizer's variables, and an adaptive clip norm."""
        return self.inner.variables if self._clip_norm is None else [*self.inner.variables, self._clip_norm]

    def finalize_variable_values(self, var_list: Any) -> None:
        """Lets the inner optimizer write its averaged weights back, if it keeps any."""
        if hasattr(self.inner, "finalize_variable_values"):
            self.inner.finalize_variable_values(var_list)

    def _privacy_config(self) -> dict[str, Any]:
        config = {argument: getattr(self, argument) for argument in _PRIVACY_ARGUMENTS}
        if not isinstance(self.l2_norm_clip, float):
            config["l2_norm_clip"] = keras.saving.serialize_keras_object(self.l2_norm_clip)
        return config

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, the inner optimizer serialized; never a noise seed."""
        return {"inner": keras.saving.serialize_keras_object(self.inner), **self._privacy_config(), "name": self.name}

    @classmethod
    def from_config(cls: type[_Self], config: dict[str, Any], custom_objects: Any = None) -> _Self:
        """Builds an optimizer from `get_config`."""
        inner = keras.saving.deserialize_keras_object(config["inner"], custom_objects=custom_objects)
        return cls(**{**config, "inner": inner})


class _VectorizedDPKerasOptimizer(DPOptimizer):
    """Shared by the classes that carry tensorflow-privacy's names."""

    inner_class: type

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Shows the inner optimizer's arguments in the class' signature."""
        super().__init_subclass__(**kwargs)
        own = inspect.signature(_VectorizedDPKerasOptimizer.__init__).parameters.values()
        inner = inspect.signature(cls.inner_class).parameters.values()
        shown = [each for each in [*list(own)[1:], *inner] if each.name not in ("inner_args", "inner_kwargs")]
        cls.__signature__ = inspect.Signature(sorted(shown, key=lambda each: each.kind))

    def __init__(
        self,
        l2_norm_clip: _Clip,
        noise_multiplier: float,
        num_microbatches: int | None = None,
        *inner_args: Any,
        expected_batch_size: float | None = None,
        num_examples: int | None = None,
        delta: float | None = None,
        statistics_fraction: float = 0.1,
        noise_seed: int | None = None,
        **inner_kwargs: Any,
    ) -> None:
        if num_microbatches is not None:
            _validate.positive_int("num_microbatches", num_microbatches)
            expected_batch_size = num_microbatches if expected_batch_size is None else expected_batch_size
            if expected_batch_size != num_microbatches:
                requirement = f"equal expected_batch_size={expected_batch_size}"
                remedy = "Every example is clipped on its own. To save memory pass microbatch_size to DPModel.compile."
                raise _validate.argument_error("num_microbatches", num_microbatches, requirement, remedy)
        inner = self.inner_class(*inner_args, **inner_kwargs)
        privacy = (l2_norm_clip, noise_multiplier, expected_batch_size, num_examples, delta, statistics_fraction)
        super().__init__(inner, *privacy, noise_seed, name=inner.name)

    @classmethod
    def from_plan(  # type: ignore[override]
        cls: type[_Self], plan: PrivacyPlan, l2_norm_clip: _Clip, **inner_kwargs: Any
    ) -> _Self:
        """Builds the optimizer with the noise multiplier, batch size and data set size of a PrivacyPlan.

        Args:
          plan: the plan.
          l2_norm_clip: see DPOptimizer.
          **inner_kwargs: arguments of the inner optimizer, and noise_seed.

        Raises:
          TypeError: if `plan` is not a PrivacyPlan.
          ValueError: if an argument that the plan decides is passed as well.
        """
        decided = _decided_by_plan(plan, "l2_norm_clip, learning_rate=...", inner_kwargs)
        return cls(l2_norm_clip, **inner_kwargs, **decided)

    def get_config(self) -> dict[str, Any]:
        """Returns the privacy arguments and those of the inner optimizer."""
        return {**self.inner.get_config(), **self._privacy_config()}

    @classmethod
    def from_config(cls: type[_Self], config: dict[str, Any], custom_objects: Any = None) -> _Self:
        """Builds an optimizer from `get_config`."""
        privacy = {argument: config[argument] for argument in _PRIVACY_ARGUMENTS if argument in config}
        # The inner class reads its own configuration (learning rate schedules, say), so it is built first.
        inner = cls.inner_class.from_config({k: v for k, v in config.items() if k not in _PRIVACY_ARGUMENTS})
        optimizer = cls.__new__(cls)
        DPOptimizer.__init__(optimizer, inner, **privacy, name=config.get("name"))
        return optimizer


@keras.saving.register_keras_serializable(package="tf_dpbn")
class VectorizedDPKerasSGDOptimizer(_VectorizedDPKerasOptimizer):
    """DPOptimizer around keras.optimizers.SGD, with tensorflow-privacy's argument names.

    Args:
      l2_norm_clip: see DPOptimizer.
      noise_multiplier: standard deviation of the noise over l2_norm_clip, >= 0.
      num_microbatches: None, or the expected batch size, which it then gives. Every example is clipped on its own:
        other values, which clip means of several examples, are refused.
      *inner_args, **inner_kwargs: arguments of keras.optimizers.SGD.
      expected_batch_size, num_examples, delta, statistics_fraction, noise_seed: see DPOptimizer.
    """

    inner_class = keras.optimizers.SGD


@keras.saving.register_keras_serializable(package="tf_dpbn")
class VectorizedDPKerasAdamOptimizer(_VectorizedDPKerasOptimizer):
    """DPOptimizer around keras.optimizers.Adam, with tensorflow-privacy's argument names.

    Arguments are as of VectorizedDPKerasSGDOptimizer, with those of keras.optimizers.Adam.
    """

    inner_class = keras.optimizers.Adam


@keras.saving.register_keras_serializable(package="tf_dpbn")
class VectorizedDPKerasAdagradOptimizer(_VectorizedDPKerasOptimizer):
    """DPOptimizer around keras.optimizers.Adagrad, with tensorflow-privacy's argument names.

    Arguments are as of VectorizedDPKerasSGDOptimizer, with those of keras.optimizers.Adagrad.
    """

    inner_class = keras.optimizers.Adagrad


def _checked_clip(l2_norm_clip: Any) -> Any:
    """A clip norm, or how to find one, which may be serialized."""
    if isinstance(l2_norm_clip, dict):
        l2_norm_clip = keras.saving.deserialize_keras_object(l2_norm_clip)
    found = isinstance(l2_norm_clip, (AutomaticClip, AdaptiveClip))
    return l2_norm_clip if found else checked_clip("l2_norm_clip", l2_norm_clip)


def _decided_by_plan(plan: Any, others: str, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an optimizer that a plan decides, none of which may be given."""
    if not isinstance(plan, PrivacyPlan):
        remedy = f"It comes first: from_plan(plan, {others})."
        raise _validate.argument_error("plan", plan, "be a PrivacyPlan", remedy, TypeError)
    decided = {
        "noise_multiplier": plan.noise_multiplier,
        "expected_batch_size": plan.expected_batch_size,
        "num_examples": plan.num_examples,
        "delta": plan.delta,
        "statistics_fraction": plan.statistics_fraction,
    }
    for argument in [*decided, "num_microbatches"]:
        if argument in given:
            raise _validate.argument_error(argument, given[argument], "be left out", "The plan decides it.")
    return decided


def _of_first_replica(tensors: Sequence[tf.Tensor]) -> Sequence[tf.Tensor]:
    """Zeros on all replicas but the first: Keras adds up what is the same on each."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return tensors
    first = tf.equal(context.replica_id_in_sync_group, 0)
    return [tf.where(first, tensor, tf.zeros_like(tensor)) for tensor in tensors]
