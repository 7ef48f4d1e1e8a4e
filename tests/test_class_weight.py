"""Class weights become sample weights."""

import numpy as np
import pytest
import tensorflow as tf

from tf_dpbn.sampling import apply_class_weight

pytestmark = pytest.mark.both

CLASS_WEIGHT = {0: 1.0, 1: 0.5, 2: 3.0}
CLASSES = np.array([2, 0, 1, 1])
EXPECTED = np.array([3.0, 1.0, 0.5, 0.5], "float32")
X = np.arange(8.0).reshape(4, 2)

LABELS = {
    "integers": CLASSES,
    "floats": CLASSES.astype("float32"),
    "column": CLASSES[:, None],
    "one_hot": np.eye(3, dtype="float32")[CLASSES],
    "soft": 0.8 * np.eye(3)[CLASSES] + 0.1,
}


def only_batch(dataset):
    (batch,) = list(dataset.as_numpy_iterator())
    return batch


def dataset_of(*parts, batch=4):
    return tf.data.Dataset.from_tensor_slices(parts).batch(batch)


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_weights_by_class_leaving_data_alone_and_padding_at_zero(labels):
    x, y, weight = only_batch(apply_class_weight(dataset_of(X, labels), CLASS_WEIGHT))
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, labels)
    np.testing.assert_array_equal(weight, EXPECTED)
    for dtype in ("float32", "float64", "int64"):
        given = np.array([0, 2, 4, 1], dtype)
        _, _, weight = only_batch(apply_class_weight(dataset_of(X, labels, given), CLASS_WEIGHT))
        np.testing.assert_array_equal(weight, given * EXPECTED)


def test_weights_by_position_are_scaled_by_example():
    given = np.arange(1.0, 17.0, dtype="float32").reshape(4, 4)  # as many positions as examples
    _, _, weight = only_batch(apply_class_weight(dataset_of(X, CLASSES, given), CLASS_WEIGHT))
    np.testing.assert_array_equal(weight, given * EXPECTED[:, None])


def test_keeps_the_number_of_batches_and_works_with_partial_ones():
    dataset = apply_class_weight(dataset_of({"nested": X}, CLASSES, batch=3), CLASS_WEIGHT)
    assert dataset.cardinality().numpy() == 2
    weights = [weight for _, _, weight in dataset.as_numpy_iterator()]
    np.testing.assert_array_equal(np.concatenate(weights), EXPECTED)


@pytest.mark.parametrize(
    "labels, class_weight, message",
    [
        (CLASSES, {1: 1.0, 2: 2.0}, "every class from 0 up.*Received: class_weight={1: 1.0, 2: 2.0}"),
        (CLASSES, {}, "every class from 0 up.*Received: class_weight={}"),
        ({"a": CLASSES, "b": CLASSES}, CLASS_WEIGHT, "several outputs.*class_weight={0: 1.0"),
        (np.zeros((4, 2, 1)), CLASS_WEIGHT, r"labels of shape \(None, 2, 1\).*Use sample weights"),
    ],
)
def test_refuses_what_has_no_weight_by_class(labels, class_weight, message):
    with pytest.raises(ValueError, match=message):
        apply_class_weight(dataset_of(X, labels), class_weight)


def test_a_class_without_weight_is_an_error():
    with pytest.raises(tf.errors.InvalidArgumentError, match="indices.* = 2 is not in"):
        only_batch(apply_class_weight(dataset_of(X, CLASSES), {0: 1.0, 1: 1.0}))
