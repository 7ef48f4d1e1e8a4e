"""Keras callbacks: epsilon in the logs, and a stop before a privacy budget is exceeded."""

from __future__ import annotations

from typing import Any

from tf_dpbn import _validate, accounting
from tf_dpbn._keras import keras
from tf_dpbn.model import DPModel


def _require_dp_model(callback: Any, model: Any) -> None:
    if not isinstance(model, DPModel):
        raise _validate.argument_error(
            "model", type(model).__name__, f"be a DPModel for {type(callback).__name__}", kind=TypeError
        )


def _default_delta(model: DPModel, delta: float | None) -> float:
    """The given delta, or the optimizer's, which it has from its PrivacyPlan."""
    delta = model.optimizer.delta if delta is None else delta
    if delta is None:
        raise _validate.argument_error(
            "delta",
            None,
            "be given where the optimizer does not come from a PrivacyPlan",
            "Choose it well below 1 / number of examples.",
        )
    return delta


class PrivacyLogger(keras.callbacks.Callback):
    """Adds "epsilon", of all steps taken so far, to the logs at the end of every epoch.

    Progress bar, History, TensorBoard and CSVLogger then show it; put this callback before those that read the logs.

    Args:
      delta: in (0, 1); None takes that of the optimizer's PrivacyPlan.
      accountant: "rdp" or "pld".

    Raises:
      ValueError: for delta outside (0, 1) or an unknown accountant.
    """

    def __init__(self, delta: float | None = None, accountant: str = "rdp") -> None:
        super().__init__()
        self._delta = None if delta is None else _validate.open_probability("delta", delta)
        self._accountant = _validate.one_of("accountant", accountant, ("rdp", "pld"))

    def on_train_begin(self, logs: Any = None) -> None:
        """Checks that the model is a DPModel."""
        _require_dp_model(self, self.model)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Writes epsilon into `logs`."""
        if logs is not None:
            delta = _default_delta(self.model, self._delta)
            logs["epsilon"] = self.model.epsilon(delta, self._accountant)


class PrivacyBudget(keras.callbacks.Callback):
    """Stops training before the step that would exceed a budget, whatever ran before in this model's life.

    Args:
      epsilon: the budget, > 0.
      delta: in (0, 1); None takes that of the optimizer's PrivacyPlan.
      accountant: "rdp" or "pld".

    Raises:
      ValueError: for an argument out of range; at the start of training, if not even one more step fits.
    """

    def __init__(self, epsilon: float, delta: float | None = None, accountant: str = "rdp") -> None:
        super().__init__()
        self._epsilon = _validate.positive("epsilon", epsilon)
        self._delta = None if delta is None else _validate.open_probability("delta", delta)
        self._accountant = _validate.one_of("accountant", accountant, ("rdp", "pld"))
        self._last_step = 0

    def on_train_begin(self, logs: Any = None) -> None:
        """Computes how many steps fit."""
        _require_dp_model(self, self.model)
        delta = _default_delta(self.model, self._delta)
        left = accounting.max_steps(
            self.model.ledger,
            next_record_config=self.model.running_record,
            target_epsilon=self._epsilon,
            delta=delta,
            accountant=self._accountant,
        )
        if left < self._stride():
            raise _validate.argument_error(
                "epsilon",
                self._epsilon,
                f"leave room for at least one more call of the train function at delta={delta:g}, noise multipliers "
                f"{self.model.running_record.noise_multipliers}",
                "Train with more noise, or stop here.",
            )
        self._last_step = self.model.private_steps + left

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Stops if the next call of the train function would exceed the budget."""
        if self.model.private_steps + self._stride() > self._last_step:
            self.model.stop_training = True

    def _stride(self) -> int:
        """How many steps Keras takes between two callbacks."""
        return int(getattr(self.model, "steps_per_execution", None) or getattr(self.model, "_steps_per_execution", None) or 1)
