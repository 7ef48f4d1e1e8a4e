"""The callback that serves and counts the normalizations of a stock model in training; see `interop`."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import tensorflow as tf

from tf_dpbn import _validate, accounting
from tf_dpbn._devices import require_full_float32
from tf_dpbn._keras import IS_KERAS_3, keras
from tf_dpbn.accounting import Ledger, PrivacyPlan, PrivacyWarning, StepRecord
from tf_dpbn.interop import checks
from tf_dpbn.interop.row_loss import RowLoss
from tf_dpbn.interop.statistics_scope import StockPass
from tf_dpbn.normalization import DPBatchNormalization, NormalizationCall

_Self = TypeVar("_Self", bound="StatisticsCallback")
# The optimizer's noise multiplier may fall short of the plan's by rounding.
_ROUNDING = 1e-9


def noise_multipliers(plan: PrivacyPlan, model: Any) -> tuple[float, ...]:
    """Noise multipliers of the gradient, for the optimizer, and of each release of statistics, for the callback.

    They fold to the plan's: (1/sigma_g^2 + sum_k 1/sigma_k^2)^(-1/2) = plan.noise_multiplier. That number, and not the
    optimizer's own, belongs into tensorflow-privacy's privacy statement and accountants.

    Args:
      plan: the plan.
      model: a stock Keras model, built; compiled or not.

    Raises:
      ValueError: if the model does not know its inputs, or has no DPBatchNormalization in training.
    """
    return _split(plan, _releases(checks.training_calls(model)))


def _split(plan: PrivacyPlan, releases: int) -> tuple[float, ...]:
    return accounting.split_noise_multiplier(plan.noise_multiplier or 0.0, plan.statistics_fraction, releases)


def _releases(calls: list[NormalizationCall]) -> int:
    return sum(call.layer.releases for call in calls)


class StatisticsCallback(keras.callbacks.Callback):
    """Gives DPBatchNormalization its statistics in a stock model, and keeps the ledger.

    Pass it to every `fit`, in front of callbacks that save the model. Without it the layers refuse to train. With
    statistics="public" the moving statistics are, before each step, validation and the end of an epoch, those of the
    public batch at the current weights. With "noised" each call of a layer releases a noised mean of residuals in each
    step, of L2 sensitivity 2 R, R = statistics_clip * sqrt(2 * channels): a layer does not see sample weights, so
    padding contributes, and an example in its place moves the sum by up to 2 R. "anchored" needs a DPModel.

    Formal guarantee: what the layers store and the loss' gradient of each row are functions of that row, the weights,
    the public batch and earlier releases; each release is a Gaussian mechanism, counted in `ledger`. The noise of the
    gradient is tensorflow-privacy's: it obeys tf.random.set_seed and keras.utils.set_random_seed, and would be the same
    in every `fit`, so that training under a global seed is refused.

    Args:
      max_batch_size: rows of every batch, padding included, a public constant; other batches are refused.
      expected_batch_size: expected number of examples among them. If it equals max_batch_size, batches are taken to be
        of one size, without padding, and none to be cut.
      num_examples: size of the training set.
      statistics_noise_multiplier: of each release: standard deviation over its sensitivity, >= 0. Needed where layers
        have statistics="noised".
      public_batch: nest of arrays [public examples, ...], for layers with statistics="public". It must not be private.
      delta: in (0, 1): `fit` then logs "epsilon" at the end of each epoch.

    Raises:
      NotImplementedError: on Keras 3, which tensorflow-privacy does not support.
      ValueError: for an argument out of range; and at the start of training, for what `interop.checks` refuses.
      RuntimeError: in training under a global seed, or beside another StatisticsCallback.

    Source: docs/algorithm.md, sections 3a, 5 and 6; docs/privacy.md.
    """

    # Of the running `fit`.
    _scope: StockPass
    _noise: tuple[float, ...]

    def __init__(
        self,
        *,
        max_batch_size: int,
        expected_batch_size: float,
        num_examples: int,
        statistics_noise_multiplier: float | None = None,
        public_batch: Any = None,
        delta: float | None = None,
    ) -> None:
        super().__init__()
        if IS_KERAS_3:
            raise NotImplementedError(
                "tensorflow-privacy's optimizers are those of tf_keras. Set TF_USE_LEGACY_KERAS=1 in the environment "
                "before TensorFlow is imported, or train a tf_dpbn.DPModel. Received: Keras 3"
            )
        self._rows = _validate.positive_int("max_batch_size", max_batch_size)
        self._expected = _validate.positive("expected_batch_size", expected_batch_size)
        self._num_examples = _validate.positive_int("num_examples", num_examples)
        for name, bound in (("max_batch_size", self._rows), ("num_examples", self._num_examples)):
            if self._expected > bound:
                requirement = f"be at most {name}={bound}"
                raise _validate.argument_error("expected_batch_size", expected_batch_size, requirement)
        if statistics_noise_multiplier is not None:
            _validate.non_negative("statistics_noise_multiplier", statistics_noise_multiplier)
        self._statistics_noise_multiplier = statistics_noise_multiplier
        self._public_batch = public_batch
        self._delta = None if delta is None else _validate.open_probability("delta", delta)
        self._plan: PrivacyPlan | None = None
        self._ledger, self._noise = Ledger(), ()
        self._normalizations: list[DPBatchNormalization] = []  # empty outside of `fit`

    @classmethod
    def from_plan(cls: type[_Self], plan: PrivacyPlan, public_batch: Any = None) -> _Self:
        """Builds the callback to train on `plan.poisson_dataset`; give the optimizer `noise_multipliers(...)[0]`."""
        callback = cls(
            max_batch_size=plan.max_batch_size,  # type: ignore[arg-type]
            expected_batch_size=plan.expected_batch_size,
            num_examples=plan.num_examples,
            public_batch=public_batch,
            delta=plan.delta,
        )
        callback._plan = plan
        return callback

    # ------------------------------------------------------------------ the ledger

    @property
    def noise_multipliers(self) -> tuple[float, ...]:
        """Of each release of a step, the gradient's first, as the last `fit` found them."""
        return self._noise

    @property
    def effective_noise_multiplier(self) -> float:
        """What to tell other accountants: all releases of a step as one Gaussian, see docs/algorithm.md, section 6."""
        return accounting.effective_noise_multiplier(self._noise)

    @property
    def ledger(self) -> Ledger:
        """The steps that ran under this callback. It is not saved with the model: keep `ledger.to_json()` beside it."""
        return self._ledger.copy()

    def epsilon(self, delta: float | None = None, accountant: str = "rdp") -> float:
        """Epsilon of all steps that ran; delta as in `privacy_statement`."""
        return self.ledger.epsilon(self._delta_or(delta), accountant)

    def privacy_statement(self, delta: float | None = None, accountant: str = "rdp") -> str:
        """What ran, in plain words.

        Args:
          delta: in (0, 1); None takes the plan's or the constructor's.
          accountant: "rdp" or "pld".
        """
        return accounting.privacy_statement(
            self.ledger,
            delta=self._delta_or(delta),
            accountant=accountant,
            not_covered=(
                "non-finite losses and gradients, which tensorflow-privacy's optimizers do not leave out",
                "what lies beyond 5.68 standard deviations, where the noise of tensorflow-privacy's optimizers ends",
                "rounding in their float32 sums of large batches",
            ),
        )

    def _delta_or(self, delta: float | None) -> float:
        found = self._delta if delta is None else delta
        if found is None:
            raise _validate.argument_error("delta", None, "be given", "Choose it well below 1 / number of examples.")
        return found

    # ------------------------------------------------------------------ Keras' hooks

    def on_train_begin(self, logs: Any = None) -> None:
        """Checks all that can be checked, and has the step traced anew, so that it is what is checked."""
        model = self.model
        checks.check_optimizer(model.optimizer, self._rows)
        checks.check_compilation(model)
        calls = checks.training_calls(model)
        checks.check_model(model)
        require_full_float32()
        gradient, statistics = self._choose_noise(calls)
        self._noise = (gradient, *[statistics] * _releases(calls))
        batch = self._public_batch
        if batch is None:
            batch = tf.nest.map_structure(lambda t: tf.zeros([1, *t.shape[1:]], t.dtype), model.input)
        self._scope = StockPass(model, batch, self._rows, len(calls), statistics)
        self._normalizations = [call.layer for call in calls]
        for layer in self._normalizations:
            layer.training_scope = self._scope
        model.compute_loss = self._row_loss = RowLoss(model, self._rows, padded=self._rows != self._expected)
        model.optimizer._create_all_weights(model.trainable_variables)  # in the step they would have it traced twice
        model.make_train_function(force=True)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Counts one step, brings the statistics up to the weights, and lets that step train."""
        checks.check_seed()
        if any(layer.training_scope is not self._scope for layer in self._normalizations):
            raise RuntimeError("Two callbacks serve the normalizations. Pass one StatisticsCallback to each `fit`.")
        # Only batches full of examples are never cut; a callback cannot see where batches come from.
        never_cut = self._plan is None and self._rows == self._expected
        step = StepRecord(
            sampling_probability=self._expected / self._num_examples,
            noise_multipliers=self._noise,
            steps=1,
            num_examples=self._num_examples,
            max_batch_size=None if never_cut else self._rows,
        )
        self._ledger.record(step)
        self._scope.before_step()
        self._scope.credit.assign(len(self._normalizations))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Lets nothing train until the next batch."""
        self._scope.credit.assign(0)

    def on_test_begin(self, logs: Any = None) -> None:
        """Brings the moving statistics up to the weights, and has the compiled loss computed as usual, within `fit`."""
        if self._normalizations:
            self._scope.for_inference()
            del self.model.compute_loss

    def on_test_end(self, logs: Any = None) -> None:
        """Has the loss of each row computed alone again, within `fit`."""
        if self._normalizations:
            self.model.compute_loss = self._row_loss

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Brings the moving statistics up to the weights, for those who save or validate now, and logs epsilon."""
        self._scope.for_inference()
        if logs is not None and self._delta is not None:
            logs["epsilon"] = self.epsilon()

    def on_train_end(self, logs: Any = None) -> None:
        """Takes the layers back: from here on they refuse to train."""
        self._scope.for_inference()
        for layer in self._normalizations:
            layer.training_scope = None
        self._normalizations = []
        del self.model.compute_loss
        self.model.train_function = None  # so that a `fit` without callback is refused by the layers, in words

    def _choose_noise(self, calls: list[NormalizationCall]) -> tuple[float, float]:
        """Noise multipliers of the gradient and of each release; refuses an optimizer with less than was planned."""
        gradient, releases = float(self.model.optimizer._noise_multiplier), _releases(calls)
        each = self._statistics_noise_multiplier
        if self._plan is not None:
            planned, *others = _split(self._plan, releases)
            if gradient < planned * (1.0 - _ROUNDING):
                remedy = "Build the optimizer with tf_dpbn.interop.noise_multipliers(plan, model)[0]."
                raise _validate.argument_error("noise_multiplier", gradient, f"be at least {planned!r}", remedy)
            each = others[0] if others else None
        if releases and each is None:
            requirement = 'be given for layers with statistics="noised"'
            remedy = "Or build the callback with StatisticsCallback.from_plan."
            raise _validate.argument_error("statistics_noise_multiplier", None, requirement, remedy)
        if releases < len(calls) and self._public_batch is None:
            remedy = "It must not be private; tf_dpbn.public_data makes synthetic ones."
            raise _validate.argument_error("public_batch", None, 'be given for layers with statistics="public"', remedy)
        if gradient == 0.0 or each == 0.0 and releases:
            warnings.warn("A noise multiplier is 0: this training is not private.", PrivacyWarning, stacklevel=2)
        return gradient, float(each or 0.0)
