"""Metrics see the real rows of a padded batch, and nothing else, as stock Keras would on a batch of those rows."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import tf_dpbn
from tests import helpers
from tf_dpbn._keras import _compiled, keras, update_compiled_metrics

pytestmark = pytest.mark.both

metrics, layers = keras.metrics, keras.layers
REAL = np.array([True, False, True, True, False, False, True, True])
ROWS, CLASSES = len(REAL), 3
BASES = {"Metric", "Mean", "Sum", "MeanTensor", "MeanMetricWrapper"}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "BinaryIoU": {"target_class_ids": [0, 1]},
    "IoU": {"num_classes": CLASSES, "target_class_ids": [0, 2], "sparse_y_pred": False},
    "MeanIoU": {"num_classes": CLASSES, "sparse_y_pred": False},
    "OneHotIoU": {"num_classes": CLASSES, "target_class_ids": [0, 2]},
    "OneHotMeanIoU": {"num_classes": CLASSES},
    "MeanRelativeError": {"normalizer": np.ones(CLASSES, "float32")},
    "TopKCategoricalAccuracy": {"k": 2},
    "SparseTopKCategoricalAccuracy": {"k": 2},
    "PrecisionAtRecall": {"recall": 0.5},
    "RecallAtPrecision": {"precision": 0.5},
    "SensitivityAtSpecificity": {"specificity": 0.5},
    "SpecificityAtSensitivity": {"sensitivity": 0.5},
    "ConcordanceCorrelation": {},
}
SPARSE = {"IoU", "MeanIoU", "SparseCategoricalAccuracy", "SparseCategoricalCrossentropy"}
SPARSE |= {"SparseTopKCategoricalAccuracy"}
SHAPES = {"vectors": (), "sequences": (4,), "maps as wide as the padding": (3, 3)}


def all_metrics() -> dict[str, type]:
    """Every class in keras.metrics that compares predictions with targets, under one of its names."""
    classes = {value: name for name, value in vars(metrics).items() if inspect.isclass(value)}
    return {name: value for value, name in classes.items() if name not in BASES and issubclass(value, metrics.Metric)}


def dice(y: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
    y = tf.cast(y, y_pred.dtype)
    return 2.0 * tf.reduce_sum(y * y_pred) / tf.reduce_sum(y + y_pred)


class CountsRows(metrics.Metric):
    """A metric that ignores weights."""

    def __init__(self, name: str = "counted", **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        self.rows = self.add_weight(name="rows", initializer="zeros")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.rows.assign_add(tf.cast(tf.size(y_true), self.rows.dtype))

    def result(self) -> Any:
        return tf.convert_to_tensor(self.rows)


def made(name: str) -> Any:
    functions = {"dice": dice, "CountsRows": CountsRows()}
    return functions[name] if name in functions else all_metrics()[name](**ARGUMENTS.get(name, {}))


NAMES = [*sorted(all_metrics()), "dice", "CountsRows"]


@functools.cache
def data(inner: tuple[int, ...], sparse: bool) -> tuple[np.ndarray, np.ndarray]:
    """Targets and predictions [rows, *inner, classes], those of padding NaN."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, CLASSES, (ROWS, *inner))
    y_pred = rng.dirichlet(np.ones(CLASSES), (ROWS, *inner)).astype("float32")
    y_pred[~REAL] = np.nan
    return (y if sparse else np.eye(CLASSES, dtype="float32")[y]), y_pred


def compiled(given: list[Any], inner: tuple[int, ...] = (), model: Any = tf_dpbn.DPModel, **kwargs: Any) -> Any:
    inputs = keras.Input((*inner, CLASSES))
    optimizer = helpers.dp_optimizer() if model is tf_dpbn.DPModel else keras.optimizers.SGD(0.0)
    net = model(inputs, layers.Dense(CLASSES, activation="softmax")(inputs))
    return helpers.compiled(net, "mse", optimizer, metrics=given, **kwargs)


def values(model: Any) -> list[np.ndarray]:
    """Results of the compiled metrics, in order."""
    return [np.asarray(metric.result()) for metric in _compiled(model)[1].metrics]


def value_on(name: str, targets: np.ndarray, y_pred: np.ndarray) -> np.ndarray | None:
    """What the metric alone makes of these rows, or None where Keras fails on them."""
    metric = made(name)
    if not isinstance(metric, metrics.Metric):
        metric = metrics.MeanMetricWrapper(metric)
    try:
        metric.update_state(tf.constant(targets), tf.constant(y_pred))
        return np.asarray(metric.result())
    except (ValueError, TypeError, IndexError, tf.errors.OpError):
        return None


@functools.cache
def expected(inner: tuple[int, ...], sparse: bool) -> dict[str, np.ndarray]:
    """What each metric that fits such rows makes of the real ones."""
    targets, y_pred = data(inner, sparse)
    found = {n: value_on(n, targets[REAL], y_pred[REAL]) for n in NAMES if (n in SPARSE) == sparse}
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    "shape", ["vectors", pytest.param("sequences", marks=pytest.mark.thorough), "maps as wide as the padding"]
)
def test_each_metric_sees_the_real_rows_only(shape, sparse):
    """Compiled metrics are updated by a padded batch and by an empty one."""
    inner = SHAPES[shape]
    names = [name for name in NAMES if name in expected(inner, sparse)]
    model = compiled([made(name) for name in names], inner)
    update = tf.function(lambda *args: update_compiled_metrics(model, args[0], args[1], None, args[2]), autograph=False)
    for mask in (REAL, np.zeros(ROWS, bool)):
        update(*map(tf.constant, data(inner, sparse)), tf.constant(mask))
    for name, found in zip(names, values(model), strict=True):
        value = expected(inner, sparse)[name]
        assert np.isfinite(value).all()
        np.testing.assert_allclose(found, value, rtol=1e-6, atol=1e-6, err_msg=name)


def test_some_shape_fits_each_metric():
    assert set(NAMES) == {n for inner in SHAPES.values() for sparse in (False, True) for n in expected(inner, sparse)}


def padded(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Zeros where rows are padding."""
    return tuple(np.where(REAL.reshape(-1, *[1] * (a.ndim - 1)), a, np.zeros_like(a)) for a in arrays)


@pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_training_on_a_padded_batch_logs_what_keras_logs_on_its_rows(jit_compile):
    """Pictures, with metrics of which many fail on weights or on padding; user weights reach weighted_metrics."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(ROWS, 3, 3, CLASSES)).astype("float32")
    y, weights = data((3, 3), False)[0], rng.uniform(0.5, 2.0, ROWS).astype("float32")
    x, y, weights = padded(x, y, weights)
    names = ["OneHotMeanIoU", "Precision", "AUC", "CategoricalAccuracy", "dice", "CountsRows"]
    found = []
    for model, rows in ((keras.Model, REAL), (tf_dpbn.DPModel, np.ones(ROWS, bool))):
        weighted = [metrics.MeanSquaredError(name="weighted")]
        net = compiled([made(n) for n in names], (3, 3), model, weighted_metrics=weighted, jit_compile=jit_compile)
        net.set_weights([np.eye(CLASSES), np.zeros(CLASSES)])
        net.train_on_batch(x[rows], y[rows], sample_weight=weights[rows, None, None])
        found.append(values(net))
    assert len(found[1]) == len(names) + 1
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["none", "weights", "class_weight"])
def test_weighted_metrics_get_the_weights_of_the_user_and_none_that_only_padding_made(kind):
    seen: list[bool] = []

    class Spy(CountsRows):
        def update_state(self, y_true, y_pred, sample_weight=None):
            seen.append(sample_weight is not None)  # while it is traced
            super().update_state(y_true, y_pred)

    x, y = helpers.images(12, (CLASSES,))
    inputs = keras.Input((CLASSES,))
    model = tf_dpbn.DPModel(inputs, layers.Dense(3)(inputs))
    helpers.compiled(
        model, optimizer=helpers.dp_optimizer(expected_batch_size=4), weighted_metrics=[Spy("spy")], stub=True
    )
    batches = tf_dpbn.sampling.poisson_dataset(
        x, y, np.ones(12) if kind == "weights" else None, expected_batch_size=4, max_batch_size=8
    )
    class_weight = dict.fromkeys(range(3), 1.0) if kind == "class_weight" else None
    history = model.fit(batches, verbose=0, class_weight=class_weight).history
    assert set(seen) == {kind != "none"}
    assert history["spy"][0] < 8 * 3  # of three batches of eight rows


@pytest.mark.parametrize("pooled", [True, False])
def test_masks_reach_metrics_as_in_keras_and_padding_makes_no_nan(pooled):
    """An all-zero row of padding is masked everywhere: its mean is 0/0."""
    x = np.array([[1, 2, 0], [0, 0, 0], [3, 0, 0], [2, 2, 1], [0, 0, 0], [0, 0, 0], [1, 0, 0], [2, 3, 0]])
    y = padded(np.random.default_rng(3).normal(size=(ROWS, 2) if pooled else (ROWS, 3, 2)).astype("float32"))[0]
    weights = REAL * np.arange(1.0, 9.0, dtype="float32")
    weights = weights if pooled else weights[:, None]
    found: list[Any] = []
    for model, rows in ((keras.Model, REAL), (tf_dpbn.DPModel, np.ones(ROWS, bool))):
        inputs = keras.Input((3,), dtype="int32")
        hidden = layers.Embedding(4, 2, mask_zero=True)(inputs)
        hidden = layers.GlobalAveragePooling1D()(hidden) if pooled else hidden
        optimizer = helpers.dp_optimizer() if model is tf_dpbn.DPModel else keras.optimizers.SGD(0.0)
        net = helpers.compiled(
            model(inputs, layers.Dense(2)(hidden)),
            "mae",
            optimizer,
            metrics=["mae"],
            weighted_metrics=[metrics.MeanAbsoluteError(name="weighted")],
        )
        helpers.randomize(net)
        net.train_on_batch(x[rows], y[rows], sample_weight=weights[rows])
        found.append(values(net))
    assert np.isfinite(found[1]).all() and len(found[1]) == 2
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)
