"""The callback that serves and counts the normalizations of a stock model in training; see `interop`."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, TypeVar

import tensorflow as tf

from tf_dpbn import _validate, accounting
from tf_dpbn._keras import IS_KERAS_3, count_of, flatten_layers, keras
from tf_dpbn._precision import check_rounding
from tf_dpbn.accounting import Ledger, PrivacyPlan, PrivacyWarning, StepRecord
from tf_dpbn.interop import checks
from tf_dpbn.interop.row_loss import RowLoss
from tf_dpbn.interop.statistics_scope import StockPass, StockRefresh
from tf_dpbn.layers import DPBatchNormalization, NormalizationCall

_Self = TypeVar("_Self", bound="StatisticsCallback")
# The optimizer's noise multiplier may fall short of the plan's by rounding.
_ROUNDING = 1e-9
_OF_OPTIMIZER = ("l2_norm_clip", "noise_multiplier", "num_microbatches")


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
    calls = checks.training_calls(model, 2)
    return accounting.split_noise_multiplier(plan.noise_multiplier or 0.0, plan.statistics_fraction, _releases(calls))


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
      noise_seed: for tests only. Noise from a known seed protects nothing.

    Raises:
      NotImplementedError: on Keras 3, which tensorflow-privacy does not support.
      ValueError: for an argument out of range; and at the start of training, for what `checks` refuses.
      RuntimeError: in training under a global seed, and if what was checked at its start changes within `fit`.

    Source: docs/algorithm.md, sections 3a, 5 and 6; docs/privacy.md.
    """

    def __init__(
        self,
        *,
        max_batch_size: int,
        expected_batch_size: float,
        num_examples: int,
        statistics_noise_multiplier: float | None = None,
        public_batch: Any = None,
        delta: float | None = None,
        noise_seed: int | None = None,
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
        self._scope = StockPass(self._rows, noise_seed)
        self._refresh: StockRefresh | None = None
        self._closed, self._calls_at_opening = Ledger(), 0
        self._open: StepRecord | None = None
        self._noise: tuple[float, ...] = ()
        self._steps_begun, self._calls_before_step = 0, 0
        self._checked: tuple[Any, ...] = ()

    @classmethod
    def from_plan(
        cls: type[_Self], plan: PrivacyPlan, public_batch: Any = None, noise_seed: int | None = None
    ) -> _Self:
        """Builds the callback for training on `plan.poisson_dataset`; give the optimizer `noise_multipliers(...)[0]`.

        Args:
          plan: the plan.
          public_batch, noise_seed: as in the constructor.
        """
        callback = cls(
            max_batch_size=plan.max_batch_size,  # type: ignore[arg-type]
            expected_batch_size=plan.expected_batch_size,
            num_examples=plan.num_examples,
            public_batch=public_batch,
            delta=plan.delta,
            noise_seed=noise_seed,
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
        ledger = self._closed.copy()
        if self._open is not None:
            calls = count_of(self._scope.calls) - self._calls_at_opening
            steps = max(self._steps_begun, -(-calls // self._scope.normalizations))
            ledger.record(dataclasses.replace(self._open, steps=steps))
        return ledger

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
        """Checks all that can be checked, opens a record, and has the step traced anew, so that it is what is checked.

        Raises:
          TypeError, ValueError, RuntimeError, NotImplementedError: see `checks`.
        """
        model = self.model
        checks.check_optimizer(model.optimizer, self._rows)
        checks.check_model(model)
        checks.check_compilation(model)
        checks.check_rows(model, self._rows)
        checks.check_seed()
        check_rounding()
        calls = checks.training_calls(model, self._rows)
        self._closed, self._open, self._steps_begun = self.ledger, None, 0
        self._calls_at_opening = count_of(self._scope.calls)
        self._choose_noise(calls)
        self._open = self._record()
        self._attach(calls)
        model.optimizer._create_all_weights(model.trainable_variables)  # in the step they would have it traced twice
        model.make_train_function(force=True)
        self._checked = self._what_is_checked()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Books one step, brings the statistics up to the weights, and lets that step train.

        Raises:
          RuntimeError: if what `on_train_begin` has checked is different now.
        """
        refresh = self._current_refresh()
        checks.check_seed()
        if self._what_is_checked() != self._checked:
            raise RuntimeError(
                "The model, its optimizer, train function, loss or layers were changed within `fit`, after they were "
                "checked. Change them between two calls of `fit`, and pass one StatisticsCallback to each. "
                f"Received: a change before batch {batch}"
            )
        self._steps_begun += 1
        self._calls_before_step = count_of(self._scope.calls)
        refresh.before_step()
        self._scope.allow_step()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Lets nothing train until the next batch.

        Raises:
          RuntimeError: if the step did not call its normalizations as often as was booked.
        """
        self._scope.allow_nothing()
        calls = count_of(self._scope.calls) - self._calls_before_step
        if calls != self._scope.normalizations:
            raise RuntimeError(
                f"A step called its normalizations {calls} times where {self._scope.normalizations} were expected. "
                "The step is booked, but what it released may have been more. A pass of the model must not depend on "
                "anything but its input: leave out run-time conditions and changes of `trainable`."
            )

    def _what_is_checked(self) -> tuple[Any, ...]:
        """What must stay as it is while `fit` runs."""
        model, optimizer = self.model, self.model.optimizer
        privacy = [getattr(optimizer, f"_{name}", None) for name in _OF_OPTIMIZER]
        states = [(id(layer), layer.trainable, id(layer.training_scope)) for layer in _normalizations(model)]
        variables = [id(variable) for variable in model.trainable_variables]
        objects = [id(each) for each in (optimizer, model.train_function, model.compute_loss)]
        return (*objects, *privacy, *states, *variables)

    def on_test_begin(self, logs: Any = None) -> None:
        """Brings the moving statistics up to the weights, within `fit`."""
        if self._refresh is not None:
            self._refresh.for_inference()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Brings the moving statistics up to the weights, for those who save or validate now, and logs epsilon."""
        self._current_refresh().for_inference()
        if logs is not None and self._delta is not None:
            logs["epsilon"] = self.epsilon()

    def on_train_end(self, logs: Any = None) -> None:
        """Takes the layers back: from here on they refuse to train."""
        self._current_refresh().for_inference()
        self._refresh = None
        for layer in _normalizations(self.model):
            layer.training_scope = None
        if isinstance(vars(self.model).get("compute_loss"), RowLoss):
            del self.model.compute_loss
        self.model.train_function = None  # so that a `fit` without callback meets the layers' refusal, in words

    def _current_refresh(self) -> StockRefresh:
        if self._refresh is None:
            raise RuntimeError("StatisticsCallback works within `fit` only. Pass it as callbacks=[...].")
        return self._refresh

    def _choose_noise(self, calls: list[NormalizationCall]) -> None:
        """Finds the noise of each release; refuses an optimizer with less noise than the plan asks for."""
        gradient, releases = float(self.model.optimizer._noise_multiplier), _releases(calls)
        each = self._statistics_noise_multiplier
        if self._plan is not None:
            planned, *others = noise_multipliers(self._plan, self.model)
            if gradient < planned * (1.0 - _ROUNDING):
                remedy = "Build the optimizer with tf_dpbn.interop.noise_multipliers(plan, model)[0]."
                raise _validate.argument_error("noise_multiplier", gradient, f"be at least {planned!r}", remedy)
            each = others[0] if others else None
        if releases and each is None:
            raise _validate.argument_error(
                "statistics_noise_multiplier",
                None,
                'be given for layers with statistics="noised"',
                "Or build the callback with StatisticsCallback.from_plan.",
            )
        if releases < len(calls) and self._public_batch is None:
            raise _validate.argument_error(
                "public_batch",
                None,
                'be given for layers with statistics="public"',
                "It must not be private; tf_dpbn.public_data makes synthetic ones.",
            )
        self._scope.begin(self.model, 0.0 if each is None else float(each), len(calls))
        self._noise = (gradient, *[self._scope.noise_multiplier] * releases)
        if accounting.effective_noise_multiplier(self._noise) == 0.0:
            warnings.warn("A noise multiplier is 0: this training is not private.", PrivacyWarning, stacklevel=2)

    def _record(self) -> StepRecord:
        """One step. Only batches full of examples are never cut; a callback cannot see where batches come from."""
        never_cut = self._plan is None and self._rows == self._expected
        return StepRecord(
            sampling_probability=self._expected / self._num_examples,
            noise_multipliers=self._noise,
            steps=1,
            num_examples=self._num_examples,
            max_batch_size=None if never_cut else self._rows,
        )

    def _attach(self, calls: list[NormalizationCall]) -> None:
        batch = self._public_batch
        if batch is None:
            shapes = self.model.input
            batch = tf.nest.map_structure(lambda t: tf.zeros([1, *t.shape[1:]], t.dtype), shapes)
        self._refresh = StockRefresh(self.model, self._scope, batch)
        self.model.compute_loss = RowLoss(self.model, self._rows, padded=self._rows != self._expected)
        for call in calls:
            call.layer.training_scope = self._scope


def _normalizations(model: Any) -> list[DPBatchNormalization]:
    return [layer for layer in flatten_layers(model) if isinstance(layer, DPBatchNormalization)]
