"""Class weights for data sets that carry sample weights already, which Keras 3 does not combine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from tf_dpbn import _validate


def apply_class_weight(dataset: tf.data.Dataset, class_weight: Mapping[int, float]) -> tf.data.Dataset:
    """Multiplies each example's weight by that of its class.

    Args:
      dataset: yields (x, y) or (x, y, weight); y holds class numbers [batch] or [batch, 1], or one-hot rows.
      class_weight: weight of each class, for classes 0 to K - 1.

    Raises:
      ValueError: if the classes are not 0 to K - 1, or y has several parts.
    """
    classes = sorted(class_weight)
    if classes != list(range(len(classes))):
        raise _validate.argument_error(
            "class_weight", class_weight, "give a weight to every class from 0 up", "Use 1.0 for the others."
        )
    if tf.nest.is_nested(dataset.element_spec[1]):
        raise _validate.argument_error(
            "class_weight", class_weight, "be left out for several outputs", "Use sample weights."
        )
    table = tf.constant([float(class_weight[k]) for k in classes])

    def weigh(x: Any, y: tf.Tensor, weight: Any = None) -> tuple[Any, tf.Tensor, tf.Tensor]:
        if y.shape.rank == 2 and y.shape[-1] != 1:
            number = tf.argmax(y, -1)
        else:
            number = tf.cast(tf.reshape(y, [-1]), tf.int64)
        factor = tf.gather(table, number)
        return x, y, factor if weight is None else weight * factor

    return dataset.map(weigh)
