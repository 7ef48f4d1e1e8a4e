"""The networks of the benchmarks in Keras, for any normalization layer and any class of model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from architectures import ARCHITECTURES, CLASSES, Architecture

layers = tf.keras.layers
APPLICATIONS = ("ResNet50", "MobileNetV2", "EfficientNetB0", "DenseNet121")
RECURRENT = ("lstm", "gru")
WIDE_RESNET, U_NET = "wrn16_4", "u_net"
NAMES = (*ARCHITECTURES, WIDE_RESNET, *APPLICATIONS, U_NET, *RECURRENT)


def input_shape(name: str) -> tuple[int, ...]:
    """The shape of one example: images, or 50 steps of 16 features for recurrent networks."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name].image
    if name == WIDE_RESNET:
        return (32, 32, 3)
    return (50, 16) if name in RECURRENT else (64, 64, 3)


def label_shape(name: str) -> tuple[int, ...]:
    """The shape of one example's labels, which are classes."""
    return input_shape(name)[:2] if name == U_NET else ()


def build(name: str, normalization: Callable[[], Any], model_class: Callable[[Any, Any], Any]) -> Any:
    """Builds the network `name`; it returns logits.

    Args:
      name: one of NAMES.
      normalization: makes a normalization layer, for example keras.layers.BatchNormalization, which those of
        keras.applications have whatever it is.
      model_class: makes the model from inputs and outputs, for example keras.Model or tf_dpbn.DPModel.
    """
    if name in APPLICATIONS:
        options = {"weights": None, "classes": CLASSES, "classifier_activation": None}
        return getattr(tf.keras.applications, name)(input_shape=input_shape(name), **options)
    inputs = layers.Input(input_shape(name))
    if name in RECURRENT:
        return model_class(inputs, _recurrent(inputs, name, normalization))
    if name == WIDE_RESNET:
        return model_class(inputs, _wide_resnet(inputs, 2, 4, normalization))
    if name == U_NET:
        return model_class(inputs, _u_net(inputs, (32, 64, 128), normalization))
    architecture = ARCHITECTURES[name]
    if architecture.blocks is None:
        outputs = _tutorial_cnn(inputs, normalization)
    else:
        outputs = _resnet(inputs, architecture, normalization)
    return model_class(inputs, outputs)


def no_normalization() -> Any:
    """In place of a normalization layer: the networks that the peers run."""
    return layers.Activation("linear")


def _recurrent(x: Any, name: str, normalization: Callable[[], Any]) -> Any:
    x = layers.ReLU()(normalization()(layers.Dense(32)(x)))
    return layers.Dense(CLASSES)((layers.LSTM if name == "lstm" else layers.GRU)(64)(x))


def _wide_resnet(x: Any, blocks: int, widen: int, normalization: Callable[[], Any]) -> Any:
    """A wide residual network (Zagoruyko and Komodakis 2016, arXiv 1605.07146) of 6 * blocks + 4 layers."""
    x = layers.Conv2D(16, 3, padding="same", use_bias=False)(x)
    for stage, width in enumerate((16 * widen, 32 * widen, 64 * widen)):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            inner = layers.ReLU()(normalization()(x))
            if block == 0:
                x = layers.Conv2D(width, 1, strides=stride, use_bias=False)(inner)
            inner = layers.Conv2D(width, 3, strides=stride, padding="same", use_bias=False)(inner)
            inner = layers.ReLU()(normalization()(inner))
            x = layers.Add()([x, layers.Conv2D(width, 3, padding="same", use_bias=False)(inner)])
    x = layers.ReLU()(normalization()(x))
    return layers.Dense(CLASSES)(layers.GlobalAveragePooling2D()(x))


def _u_net(x: Any, widths: Sequence[int], normalization: Callable[[], Any]) -> Any:
    """Ronneberger et al. 2015, arXiv 1505.04597, with padding and batch normalization; logits by pixel."""

    def twice(x: Any, width: int) -> Any:
        for _ in range(2):
            x = layers.Conv2D(width, 3, padding="same", use_bias=False)(x)
            x = layers.ReLU()(normalization()(x))
        return x

    skipped = []
    for width in widths[:-1]:
        skipped.append(twice(x, width))
        x = layers.MaxPooling2D()(skipped[-1])
    x = twice(x, widths[-1])
    for width in reversed(widths[:-1]):
        x = twice(layers.Concatenate()([layers.Conv2DTranspose(width, 2, strides=2)(x), skipped.pop()]), width)
    return layers.Conv2D(CLASSES, 1)(x)


def _tutorial_cnn(x: Any, normalization: Callable[[], Any]) -> Any:
    x = layers.Conv2D(16, 8, strides=2, padding="same")(x)
    x = layers.ReLU()(normalization()(x))
    x = layers.MaxPool2D(2, strides=1)(x)
    x = layers.Conv2D(32, 4, strides=2)(x)
    x = layers.ReLU()(normalization()(x))
    x = layers.MaxPool2D(2, strides=1)(x)
    x = layers.Dense(32, activation="relu")(layers.Flatten()(x))
    return layers.Dense(CLASSES)(x)


def _resnet(x: Any, architecture: Architecture, normalization: Callable[[], Any]) -> Any:
    def convolution(x: Any, width: int, size: int, stride: int = 1) -> Any:
        x = layers.Conv2D(width, size, strides=stride, padding="same", use_bias=False)(x)
        return normalization()(x)

    x = layers.ReLU()(convolution(x, architecture.stem, 3))
    for channels, width, stride in architecture.residual_blocks():
        inner = layers.ReLU()(convolution(x, width, 3, stride))
        inner = convolution(inner, width, 3)
        shortcut = x if (channels, stride) == (width, 1) else convolution(x, width, 1, stride)
        x = layers.ReLU()(layers.Add()([inner, shortcut]))
    return layers.Dense(CLASSES)(layers.GlobalAveragePooling2D()(x))
