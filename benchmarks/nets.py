"""The networks of the benchmarks in Keras, for any normalization layer and any class of model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from architectures import ARCHITECTURES, CLASSES, Architecture

layers = tf.keras.layers
APPLICATIONS = ("ResNet50", "MobileNetV2", "EfficientNetB0", "DenseNet121")
RECURRENT = ("lstm", "gru")
NAMES = (*ARCHITECTURES, *APPLICATIONS, *RECURRENT)


def input_shape(name: str) -> tuple[int, ...]:
    """The shape of one example: small images for keras.applications, 50 steps of 16 features for recurrent networks."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name].image
    return (64, 64, 3) if name in APPLICATIONS else (50, 16)


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
