"""Keras callbacks: epsilon in the logs, and a stop before a privacy budget is exceeded."""

from __future__ import annotations

from typing import Any

from tf_dpbn import _validate, accounting
from tf_dpbn._keras import keras, steps_per_execution
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
        self._version: int | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Computes how many steps fit."""
        _require_dp_model(self, self.model)
        self._require_room()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Computes anew how many steps fit if the ledger has changed, by a checkpoint loaded after the start, say.

        Raises:
          ValueError: if the next call of the train function would exceed the budget: another callback took steps.
        """
        if self.model.ledger_version != self._version or self._is_used_up():
            self._require_room()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Stops if the next call of the train function would exceed the budget."""
        if self._is_used_up():
            self.model.stop_training = True

    def _is_used_up(self) -> bool:
        return self.model.private_steps + self._stride() > self._last_step

    def _require_room(self) -> None:
        record = self.model.running_record
        delta = _default_delta(self.model, self._delta)
        left = accounting.max_steps(
            self.model.ledger,
            next_record_config=record,
            target_epsilon=self._epsilon,
            delta=delta,
            accountant=self._accountant,
        )
        if left < self._stride():
            raise _validate.argument_error(
                "epsilon",
                self._epsilon,
                f"leave room for another step after {self.model.ledger.steps} steps, at delta={delta:g} and noise "
                f"multiplier {record.effective_noise_multiplier:g}",
                "Train with more noise, or stop here.",
            )
        self._last_step = self.model.private_steps + left
        self._version = self.model.ledger_version

    def _stride(self) -> int:
        """How many steps Keras takes between two callbacks."""
        return steps_per_execution(self.model)
