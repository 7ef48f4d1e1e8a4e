"""Keras callbacks: epsilon in the logs, a plot of them, and a stop before a privacy budget is exceeded."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping
from typing import Any

from tf_dpbn import _validate, accounting
from tf_dpbn._keras import keras, print_line, steps_of_call
from tf_dpbn.model import DPModel


class _PrivacyCallback(keras.callbacks.Callback):
    """A callback of a DPModel, at a delta of its own or that of the optimizer, which has it from its PrivacyPlan."""

    def __init__(self, delta: float | None = None, accountant: str = "rdp") -> None:
        super().__init__()
        self._delta = None if delta is None else _validate.open_probability("delta", delta)
        self._accountant = _validate.one_of("accountant", accountant, ("rdp", "pld"))

    def on_train_begin(self, logs: Any = None) -> None:
        """Checks that the model is a DPModel."""
        if not isinstance(self.model, DPModel):
            requirement = f"be a DPModel for {type(self).__name__}"
            raise _validate.argument_error("model", type(self.model).__name__, requirement, kind=TypeError)

    def _delta_of_model(self) -> float:
        delta: float | None = self.model.optimizer.delta if self._delta is None else self._delta
        if delta is None:
            requirement = "be given where the optimizer does not come from a PrivacyPlan"
            remedy = "Choose it well below 1 / number of examples."
            raise _validate.argument_error("delta", None, requirement, remedy)
        return delta

    def _spent(self) -> float:
        return self.model.epsilon(self._delta_of_model(), self._accountant)


class PrivacyLogger(_PrivacyCallback):
    """Adds "epsilon", of all steps taken so far, to the logs at the end of every epoch.

    `fit` does so by itself, at the delta and for the plan of its data set, with "planned_epsilon" beside; this callback
    is for another delta or accountant, without that. It runs before the others, wherever it is in the list, so that
    progress bar, History, TensorBoard and CSVLogger show epsilon.

    Args:
      delta: in (0, 1); None takes that of the optimizer's PrivacyPlan.
      accountant: "rdp" or "pld".

    Raises:
      ValueError: for delta outside (0, 1) or an unknown accountant.
    """

    logs_epsilon = True  # so that `fit` calls it before the others

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Writes epsilon into `logs`."""
        if logs is not None:
            logs["epsilon"] = self._spent()


class PrivacyBudget(_PrivacyCallback):
    """Stops training before the step that would exceed a budget, whatever ran before in this model's life.

    Where it stops training early it says so in a line after the progress bar, which otherwise looks complete; with
    `verbose=0` it says nothing.

    Args:
      epsilon: the budget, > 0.
      delta: in (0, 1); None takes that of the optimizer's PrivacyPlan.
      accountant: "rdp" or "pld".

    Raises:
      ValueError: for an argument out of range; at the start of training, if not even one more step fits; in training,
        if a checkpoint that another callback loads leaves no room for the next one.
    """

    stops_in_time = True  # so that `fit` need not warn of more epochs than the data set's plan has

    def __init__(self, epsilon: float, delta: float | None = None, accountant: str = "rdp") -> None:
        super().__init__(delta, accountant)
        self._epsilon = _validate.positive("epsilon", epsilon)
        self._last_step = 0
        self._version: int | None = None
        self._stride = 1
        self._epoch = 0
        self.stopped_early = False

    def on_train_begin(self, logs: Any = None) -> None:
        """Computes how many steps fit."""
        super().on_train_begin(logs)
        self._version, self.stopped_early = None, False
        self._stride = steps_of_call(self.model)
        self._require_room()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Notes the epoch."""
        self._epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Checks that the next steps fit: a checkpoint may have been loaded."""
        self._require_room()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Stops if the next call of the train function would exceed the budget."""
        self._stride = max(self._stride, steps_of_call(self.model))  # tf_keras lowers it at the end of an epoch
        if self.model.private_steps + self._stride > self._last_allowed_step():
            self.model.stop_training = True
            epochs, steps = ((self.params or {}).get(name) for name in ("epochs", "steps"))
            self.stopped_early = not (epochs == self._epoch + 1 and steps == batch + 1)

    def on_train_end(self, logs: Any = None) -> None:
        """Tells that training stopped before `fit` had all its steps."""
        if self.stopped_early and (self.params or {}).get("verbose"):
            print_line(
                f"PrivacyBudget stopped training in epoch {self._epoch + 1} of {self.params.get('epochs')}, after "
                f"{self.model.ledger.steps} private steps in all: epsilon {self._spent():.4g} of {self._epsilon:g} at "
                f"delta {self._delta_of_model():g}, and another step would exceed it."
            )

    def _last_allowed_step(self) -> int:
        """The number of the last step that fits, computed anew if the ledger changed, by a loaded checkpoint."""
        model = self.model
        if model._record.version != self._version:
            self._version = model._record.version
            left = accounting.max_steps(
                model.ledger,
                next_record_config=model._record.next_step,
                target_epsilon=self._epsilon,
                delta=self._delta_of_model(),
                accountant=self._accountant,
            )
            self._last_step = model.private_steps + left
        return self._last_step

    def _require_room(self) -> None:
        model = self.model
        if model.private_steps + steps_of_call(model) > self._last_allowed_step():
            noise = model._record.next_step.effective_noise_multiplier
            requirement = (
                f"leave room for another step after {model.ledger.steps} steps, which have cost {self._spent():.4g} at "
                f"delta {self._delta_of_model():g}: another one, with noise multiplier {noise:g}, would exceed it"
            )
            remedy = "Stop here, compile with more noise, or allow a larger epsilon."
            raise _validate.argument_error("epsilon", self._epsilon, requirement, remedy)


def plot_history(
    history: Any, path: str | os.PathLike[str] | None = None, *, metric: str | None = None, delta: float | None = None
) -> Any:
    """Draws a training: a metric and epsilon over the epochs, side by side.

    Args:
      history: what `fit` returned, its `history` dict, or the path of a file that keras.callbacks.CSVLogger wrote.
      path: the image file to write, or None.
      metric: name in the logs, drawn with its "val_" counterpart; None takes the first accuracy, or else "loss".
      delta: named at epsilon's axis, if it is given.

    Returns:
      The matplotlib Figure.

    Raises:
      ImportError: without matplotlib (`pip install 'tf_dpbn[plot]'`).
      ValueError: if the metric or epsilon is not in the logs.
    """
    try:
        from matplotlib import pyplot, ticker
    except ImportError as error:
        raise ImportError("`plot_history` needs matplotlib: pip install 'tf_dpbn[plot]'.") from error
    logs, epochs = _logs_of(history)
    if metric is None:
        metric = next((name for name in logs if "acc" in name and not name.startswith("val_")), "loss")
    for name in (metric, "epsilon"):
        if name not in logs:
            remedy = "Train on a PrivacyPlan's data set, or with PrivacyLogger." if name == "epsilon" else ""
            raise _validate.argument_error("history", sorted(logs), f"have {name!r}", remedy)
    drawing, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    pyplot.close(drawing)  # a notebook shows what a cell returns, and else would show it twice
    curves = [(left, metric, metric, "o-"), (left, f"val_{metric}", f"val_{metric}", "s-")]
    curves += [(right, "epsilon", "spent", "o-"), (right, "planned_epsilon", "planned", "--")]
    for axes, name, label, style in curves:
        if name in logs:
            axes.plot(epochs, [value if math.isfinite(value) else math.nan for value in logs[name]], style, label=label)
    right.set_ylim(bottom=0.0)
    for axes, label in ((left, metric), (right, "epsilon" if delta is None else f"epsilon at delta = {delta:g}")):
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    if path is not None:
        drawing.savefig(path, dpi=120)
    return drawing


def _logs_of(history: Any) -> tuple[Mapping[str, list[float]], list[int]]:
    """The values of each name in the logs, and the numbers of their epochs, from 1."""
    if isinstance(history, keras.callbacks.History):
        return history.history, [epoch + 1 for epoch in history.epoch]
    if isinstance(history, Mapping):
        return history, list(range(1, 1 + max(map(len, history.values()), default=0)))
    with open(history, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    logs = {name: [float(row[name]) if row[name] != "NA" else math.nan for row in rows] for name in (rows or [{}])[0]}
    return logs, [int(epoch) + 1 for epoch in logs.pop("epoch", [])]
