"""Whether a compiled loss says anything of one example, tried on made-up numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tf_dpbn._keras import compiled_data_loss, isolated_call, tracker_variables

_ROWS = 6  # of two classes, so that there are triplets among them
_UNKNOWN_SIZE = 4
_LARGEST_ROW = 2**20  # such outputs are pictures, not embeddings


def check_rows_alone(model: Any, y: Any, y_pred: Any) -> None:
    """Refuses a loss that compares the rows of a batch: of one example alone it is the same whatever is predicted.

    A loss whose value on a batch is merely not the mean of its values on the rows (Dice of a whole batch) is taken
    example by example. Nothing is refused where the loss cannot be computed on made-up numbers.

    Args:
      model: compiled, its loss built.
      y, y_pred: nests of what has shapes [batch, ...] and types.

    Raises:
      ValueError: naming the loss.
    """
    for fractions in (True, False):
        try:
            y_made, one, other = _made_up(y, 0, fractions), _made_up(y_pred, 1, True), _made_up(y_pred, 2, True)
            pairs_rows = _depends_on_predictions(model, y_made, one, other) and not any(
                _depends_on_predictions(model, *(_row(each, row) for each in (y_made, one, other)))
                for row in range(_ROWS)
            )
        except Exception:  # whatever a loss of the user's raises on numbers that it was not made for
            continue
        if pairs_rows:
            raise ValueError(
                f"`loss` must depend on one example at a time: for each of {_ROWS} made-up rows alone it is the same "
                "(or not a number) whatever is predicted, and for all of them together it is not. What is clipped is "
                "the gradient of one example, so a loss that pairs the rows of a batch (in-batch contrastive, triplet) "
                "would learn nothing and spend privacy. Make the pair or triplet one example: a model that takes its "
                f"members as several inputs, and a loss of what it returns for them. Received: loss={model.loss!r}"
            )


def _made_up(like: Any, seed: int, fractions: bool) -> Any:
    """Tensors of `like`'s structure: fractions where types allow, or 0 and 1, valid class numbers for whatever loss."""
    rng = np.random.default_rng(seed)

    def made(t: Any) -> tf.Tensor:
        shape = [_ROWS, *(_UNKNOWN_SIZE if size is None else size for size in t.shape[1:])]
        if np.prod(shape[1:]) > _LARGEST_ROW:
            raise ValueError("Too large to try.")
        if fractions and t.dtype.is_floating:
            return tf.constant(rng.uniform(0.1, 0.9, shape), t.dtype)
        return tf.cast(np.broadcast_to((np.arange(_ROWS) % 2).reshape(-1, *[1] * (len(shape) - 1)), shape), t.dtype)

    return tf.nest.map_structure(made, like)


def _row(tensors: Any, row: int) -> Any:
    return tf.nest.map_structure(lambda t: t[row : row + 1], tensors)


def _depends_on_predictions(model: Any, y: Any, one: Any, other: Any) -> bool:
    values = []
    for y_pred in (one, other):
        with isolated_call([], tf.constant(0), tracker_variables(model)) as scope:
            values.append(float(tf.reduce_sum(compiled_data_loss(model, y, y_pred, None, scope)[0])))
    return bool(np.isfinite(values).all()) and abs(values[0] - values[1]) > 1e-6 * max(1.0, abs(values[0]))
