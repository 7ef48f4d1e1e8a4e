"""One small model for each kind of layer, for conformance tests: name -> function building (model, x, y)."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

import tf_dpbn
from tf_dpbn._keras import IS_KERAS_3, keras

layers = keras.layers
CLASSES = 3


class ScaleBias(layers.Layer):
    """A custom layer with bare scale and bias."""

    def build(self, input_shape: Any) -> None:
        self.a = self.add_weight(shape=(input_shape[-1],), initializer="ones", name="a")
        self.b = self.add_weight(shape=(input_shape[-1],), initializer="zeros", name="b")

    def call(self, x: Any) -> Any:
        return x * self.a + self.b


class AddsLoss(layers.Layer):
    """A layer that adds a loss while it is called."""

    def call(self, x: Any) -> Any:
        self.add_loss(tf.reduce_mean(x))
        return x


class RunningMean(layers.Layer):
    """Centers by a moving mean of what it saw, as vector quantizers move their codebooks."""

    def build(self, shape: Any) -> None:
        self.mean = self.add_weight(shape=(shape[-1],), initializer="zeros", trainable=False, name="mean")

    def call(self, x: Any, training: bool = False) -> Any:
        if training:
            self.mean.assign(0.9 * self.mean + 0.1 * tf.reduce_mean(x, 0))
        return x - self.mean


class Counter(layers.Layer):
    """State that does not depend on examples."""

    def build(self, shape: Any) -> None:
        self.count = self.add_weight(shape=(), initializer="zeros", dtype="float32", trainable=False, name="count")

    def call(self, x: Any, training: bool = False) -> Any:
        if training:
            self.count.assign(self.count + 1.0)
        return x


def _flat(x: Any) -> Any:
    return layers.Flatten()(x)


def _pooled(x: Any) -> Any:
    return layers.GlobalAveragePooling1D()(x)


def _shared(x: Any) -> Any:
    dense = layers.Dense(6, activation="tanh")
    return layers.Concatenate()([dense(dense(x)), x])


def _twice_normalized(x: Any) -> Any:
    norm, dense = tf_dpbn.DPBatchNormalization(), layers.Dense(6)
    return layers.Activation("tanh")(norm(dense(layers.Activation("tanh")(norm(dense(x))))))


def _attention(x: Any) -> Any:
    return _pooled(layers.MultiHeadAttention(2, 3)(x, x))


def _normalized(x: Any) -> Any:
    x = layers.Conv2D(4, 3, padding="same")(x)
    x = layers.MaxPooling2D()(layers.Activation("relu")(tf_dpbn.DPBatchNormalization()(x)))
    return _flat(tf_dpbn.DPBatchNormalization()(layers.Conv2D(4, 2)(x)))


def _residual(x: Any) -> Any:
    x = layers.Conv2D(4, 3, padding="same")(x)
    h = layers.Activation("relu")(tf_dpbn.DPBatchNormalization()(x))
    x = layers.Add()([x, layers.Conv2D(4, 3, padding="same")(h)])
    return _flat(tf_dpbn.DPBatchNormalization()(x))


IMAGE, SERIES, VECTOR, VOLUME, TOKENS = (6, 6, 2), (7, 4), (6,), (4, 5, 4, 2), (7,)

BODIES: dict[str, tuple[tuple[int, ...], Any]] = {
    "dense": (VECTOR, layers.Dense(5, activation="tanh")),
    "dense_sequence": (SERIES, lambda x: _pooled(layers.Dense(5, activation="tanh")(x))),
    "conv1d": (SERIES, lambda x: _flat(layers.Conv1D(3, 3, dilation_rate=2)(x))),
    "conv2d": (IMAGE, lambda x: _flat(layers.Conv2D(3, 3, activation="relu")(x))),
    "conv2d_strided": (IMAGE, lambda x: _flat(layers.Conv2D(3, 3, strides=2, padding="same")(x))),
    "conv2d_grouped": (IMAGE, lambda x: _flat(layers.Conv2D(4, 3, groups=2)(x))),
    "conv3d": (VOLUME, lambda x: _flat(layers.Conv3D(2, 2)(x))),
    "conv2d_transpose": (IMAGE, lambda x: _flat(layers.Conv2DTranspose(2, 3, strides=2)(x))),
    "depthwise": (IMAGE, lambda x: _flat(layers.DepthwiseConv2D(3, depth_multiplier=2)(x))),
    "separable": (IMAGE, lambda x: _flat(layers.SeparableConv2D(3, 3)(x))),
    "embedding": (TOKENS, lambda x: _pooled(layers.Embedding(9, 4)(x))),
    "attention": (SERIES, _attention),
    "einsum_dense": (SERIES, lambda x: _flat(layers.EinsumDense("abc,cd->abd", (7, 3))(x))),
    "layer_normalization": (SERIES, lambda x: _flat(layers.LayerNormalization()(x))),
    "group_normalization": (IMAGE, lambda x: _flat(layers.GroupNormalization(2)(x))),
    "lstm": (SERIES, layers.LSTM(4)),
    "gru": (SERIES, layers.GRU(4)),
    "prelu": (IMAGE, lambda x: _flat(layers.PReLU(shared_axes=[1, 2])(x))),
    "custom": (VECTOR, lambda x: ScaleBias()(x)),
    "shared": (VECTOR, _shared),
    "batch_normalization": (IMAGE, _normalized),
    "batch_normalization_twice": (VECTOR, _twice_normalized),
    "batch_normalization_residual": (IMAGE, _residual),
}
if not IS_KERAS_3:
    # tf_keras compiles these to operations for which TensorFlow has no CPU kernel or gradient.
    BODIES.pop("conv2d_grouped")


def _fresh(body: Any) -> Any:
    """A layer given as an instance is rebuilt from its configuration, so that models share nothing."""
    return type(body).from_config(body.get_config()) if isinstance(body, layers.Layer) else body


def build(name: str, model: Any = tf_dpbn.DPModel) -> Any:
    """Returns the model called `name`: its body and a dense head of logits."""
    shape, body = BODIES[name]
    dtype = "int32" if shape == TOKENS else "float32"
    inputs = keras.Input(shape, dtype=dtype)
    return model(inputs, layers.Dense(CLASSES)(_fresh(body)(inputs)))


def data(name: str, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """n random examples for the model called `name`."""
    rng = np.random.default_rng(seed)
    shape = BODIES[name][0]
    x = rng.integers(0, 9, (n, *shape)) if shape == TOKENS else rng.normal(size=(n, *shape))
    return x.astype("int32" if shape == TOKENS else "float32"), rng.integers(0, CLASSES, n)


def has_batch_normalization(model: Any) -> bool:
    """Whether a public batch is needed."""
    return any(isinstance(layer, tf_dpbn.DPBatchNormalization) for layer in model.layers)


def logits_loss(y: Any, logits: Any) -> tf.Tensor:
    """The loss of each example."""
    return tf.nn.sparse_softmax_cross_entropy_with_logits(tf.cast(y, tf.int32), logits)
