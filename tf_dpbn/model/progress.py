"""What `fit` tells while it trains: how long its first step takes, and the epsilon spent of the planned one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tf_dpbn import _keras
from tf_dpbn._keras import keras
from tf_dpbn.accounting import Ledger, PrivacyPlan
from tf_dpbn.accounting.statement import shown_epsilon

# Of the first step for each trainable variable, on two cores: 0.08 to 0.11 in docs/results.md, from ResNet-20 with 65
# variables to DenseNet121 with 364.
_SECONDS_PER_VARIABLE = 0.09
_SECONDS_WORTH_A_LINE = 5


class Progress(keras.callbacks.Callback):
    """Puts epsilon, and the planned one, into the logs of `fit`, and prints a line before and after training.

    Epsilon by PLD takes a third of a second: with such a plan it is computed at the end only.

    Args:
      plan: that of the data set, or None.
      delta: that of the optimizer, or None; the plan's has precedence.
      others: the callbacks that `fit` got.
    """

    def __init__(self, plan: PrivacyPlan | None, delta: float | None, others: Sequence[Any]) -> None:
        super().__init__()
        self._plan, self._delta, self._others = plan, plan.delta if plan else delta, others
        self._accountant = plan.accountant if plan else "rdp"
        self._planned: float | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Tells how long the first step takes, if that is long."""
        message = first_step_message(self.model)
        if message and (self.params or {}).get("verbose"):
            _keras.print_line(message)
        # Without the steps that come before those of the plan, what is spent is not of what is planned.
        if self._plan and self.model.ledger.covers(Ledger(self._plan.before)):
            self._planned = _planned(self._plan)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Writes epsilon, and the planned one, into `logs`."""
        epsilon = self._spent() if self._accountant == "rdp" else None
        if logs is not None and epsilon is not None:
            logs["epsilon"] = epsilon
            own = any(getattr(each, "logs_epsilon", False) for each in self._others)  # perhaps at another delta
            if self._planned is not None and not own:
                logs["planned_epsilon"] = self._planned

    def on_train_end(self, logs: Any = None) -> None:
        """Tells epsilon, unless a PrivacyBudget does."""
        told = any(getattr(each, "stopped_early", False) for each in self._others)
        if told or not (self.params or {}).get("verbose"):
            return
        epsilon = self._spent()
        if epsilon is not None:
            of = "" if self._planned is None else f" of {shown_epsilon(self._planned)} planned"
            spent = f"Epsilon {shown_epsilon(epsilon)}{of}, at delta {self._delta:g}"
            assumed = any(entry.sampling == "assumed" for entry in self.model.ledger.entries)
            steps = f"after {self.model.ledger.steps} private steps{', of Poisson samples as is assumed' * assumed}"
            _keras.print_line(f"{spent}, {steps}.")

    def _spent(self) -> float | None:
        """Epsilon of all steps; None without a delta or with unknown sampling, where PrivacyLogger says what to do."""
        ledger = self.model.ledger
        if self._delta is None or any(entry.sampling_probability is None for entry in ledger.entries):
            return None
        return ledger.epsilon(self._delta, self._accountant)


def with_progress(callbacks: Any, plan: PrivacyPlan | None, delta: float | None) -> list[Any]:
    """The callbacks that `fit` got, behind those that write epsilon into the logs which the others read."""
    given = tf.nest.flatten(getattr(callbacks, "callbacks", callbacks) or [])
    given.sort(key=lambda each: not getattr(each, "logs_epsilon", False))
    return [Progress(plan, delta, given), *given]


def first_step_message(model: Any) -> str | None:
    """What to tell before a step is traced, if that takes several seconds."""
    if hasattr(model.train_function, "trained") or not model.built:
        return None
    trainable = {id(variable) for variable in model.trainable_variables}
    seconds = _SECONDS_PER_VARIABLE * len(trainable)
    if seconds < _SECONDS_WORTH_A_LINE:
        return None
    layers = sum(any(id(v) in trainable for v in _keras.own_variables(each)) for each in _keras.flatten_layers(model))
    about = f"{5 * round(seconds / 5)} s"
    if _keras.is_compiled_whole(model):
        return f"Tracing the private step of {layers} layers takes about {about}, and XLA's compilation follows."
    return f"Tracing the private step of {layers} layers: the first step takes about {about}."


def _planned(plan: PrivacyPlan) -> float | None:
    epsilon = plan.target_epsilon or plan.epsilon
    return epsilon if math.isfinite(epsilon) else None
