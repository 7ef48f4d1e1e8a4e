"""Class weights for data sets that carry sample weights already, which Keras 3 does not combine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from tf_dpbn import _validate


def apply_class_weight(dataset: tf.data.Dataset, class_weight: Mapping[int, float]) -> tf.data.Dataset:
    """Multiplies each example's weight by that of its class.

    Args:
      dataset: yields (x, y) or (x, y, weight); y holds class numbers [batch] or [batch, 1], or one-hot rows; weight is
        [batch, ...].
      class_weight: weight of each class, for classes 0 to K - 1.

    Raises:
      ValueError: if the classes are not 0 to K - 1, y has several parts, or an example has several labels.
    """
    classes = sorted(class_weight)
    if not classes or classes != list(range(len(classes))):
        requirement = "give a weight to every class from 0 up"
        raise _validate.argument_error("class_weight", class_weight, requirement, "Use 1.0 for the others.")
    labels = dataset.element_spec[1]
    if tf.nest.is_nested(labels):
        requirement = "be left out for several outputs"
        raise _validate.argument_error("class_weight", class_weight, requirement, "Use sample weights.")
    if labels.shape.rank not in (1, 2):
        requirement = f"be left out for labels of shape {labels.shape}"
        raise _validate.argument_error("class_weight", class_weight, requirement, "Use sample weights.")
    table = tf.constant([float(class_weight[k]) for k in classes])

    def weigh(x: Any, y: tf.Tensor, weight: Any = None) -> tuple[Any, tf.Tensor, tf.Tensor]:
        is_one_hot = y.shape.rank == 2 and y.shape[-1] != 1
        factor = tf.gather(table, tf.argmax(y, -1) if is_one_hot else tf.cast(tf.reshape(y, [-1]), tf.int64))
        if weight is None:
            return x, y, factor
        factor = tf.reshape(factor, [-1] + [1] * (weight.shape.rank - 1))
        return x, y, tf.cast(weight, factor.dtype) * factor

    return dataset.map(weigh)
