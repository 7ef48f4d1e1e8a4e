"""Engines on keras.applications' networks: they run as one batch, and give what each example alone gives."""

import numpy as np
import pytest
import tensorflow as tf

import tf_dpbn
from tests import helpers
from tf_dpbn._keras import keras
from tf_dpbn.clipping.batch_trace import BatchTrace
from tf_dpbn.clipping.microbatches import to_rows
from tf_dpbn.model import step

SHAPE, ROWS, CLASSES = (32, 32, 3), 4, 3


def u_net():
    layers = keras.layers
    inputs = keras.Input(SHAPE)
    x, skipped = inputs, []
    for width in (8, 16):
        x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(width, 3, padding="same")(x)))
        skipped.append(x)
        x = layers.MaxPooling2D()(x)
    for width in (16, 8):
        x = layers.Concatenate()([layers.Conv2DTranspose(width, 2, strides=2)(x), skipped.pop()])
        x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(width, 3, padding="same")(x)))
    return keras.Model(inputs, layers.Conv2D(CLASSES, 1)(x))


def application(name):
    return getattr(keras.applications, name)(
        weights=None, input_shape=SHAPE, classes=CLASSES, classifier_activation=None
    )


@pytest.mark.parametrize(
    "name, statistics",
    [
        ("u_net", "public"),
        ("u_net", "fixed"),
        *(
            pytest.param(name, statistics, marks=pytest.mark.thorough)
            for name, statistics in (
                ("ResNet50", "public"),
                ("MobileNetV2", "public"),
                ("MobileNetV2", "fixed"),
                ("EfficientNetB0", "public"),
                ("DenseNet121", "public"),
            )
        ),
    ],
)
def test_a_batch_gives_what_each_example_alone_gives(name, statistics):
    keras.utils.set_random_seed(0)
    stock = u_net() if name == "u_net" else application(name)
    rng = np.random.default_rng(1)
    model = tf_dpbn.convert(stock, statistics=statistics, public_batch=rng.uniform(size=(4, *SHAPE)).astype("float32"))
    for layer in model.layers:
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0  # engines draw other numbers
    x = rng.uniform(size=(ROWS, *SHAPE)).astype("float32")
    y = rng.integers(0, CLASSES, (ROWS, *SHAPE[:2]) if name == "u_net" else ROWS)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    sums = {}
    for engine in ("book_keeping", "vectorized"):
        helpers.compiled(model, loss, helpers.dp_optimizer(l2_norm_clip=1.0), engine=engine, microbatch_size=ROWS)
        sums[engine] = helpers.clipped_sum_function(model)(x, y)[0]

    def trace(x, y):
        batch = step.read_batch(model, (x, y, None))
        return BatchTrace(step.task(model, step.public_forward(model, batch)))(to_rows(batch)).results[0]

    tf.function(trace, autograph=False).get_concrete_function(x, y)  # raises where it is not proved
    assert helpers.relative_error(sums["book_keeping"], sums["vectorized"]) < 1e-4
