"""The networks of the utility benchmark, for every normalization under the same engine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

import tf_dpbn

layers = tf.keras.layers

NORMALIZATIONS = ("none", "group", "standardized", "layer", "scale", "batch", "whitening")
NETS = ("linear", "top", "cnn", "wide_cnn", "deep<number of convolutions>", "res<blocks a stage>")
_WIDTHS = (16, 32)
_Layer = Callable[[Any], Any]
_Layers = Callable[..., _Layer]


def build(
    net: str,
    image: tuple[int, ...],
    normalization: str,
    classes: int = 10,
    initializer: str = "glorot_uniform",
    **batch: Any,
) -> tf_dpbn.DPModel:
    """Builds a network that returns logits.

    Args:
      net: one of NETS.
      image: height, width, channels.
      normalization: one of NORMALIZATIONS. "group": groups of 4 channels or more, at most 8; "layer": one group;
        "standardized": "group" with weight standardization of all convolutions; "scale": "group", and once more after
        each residual addition (Klause et al. 2022, arXiv 2203.00324); "batch": ours; "whitening": of
        tf_dpbn.features on the input, "batch" elsewhere.
      classes: how many.
      initializer: of the convolutions' kernels, by Keras' name; in "linear" of the dense layer's.
      **batch: arguments of DPBatchNormalization, or of `tf_dpbn.features.whitening`.

    Raises:
      ValueError: for an unknown name.
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"`normalization` must be one of {NORMALIZATIONS}. Received: {normalization!r}")

    def normalize(x: Any) -> Any:
        return _normalization(normalization, x, batch)(x)

    standardize = tf_dpbn.constraints.WeightStandardization() if normalization == "standardized" else None
    convolve = functools.partial(
        layers.Conv2D, padding="same", kernel_initializer=initializer, kernel_constraint=standardize
    )
    inputs = layers.Input(image)
    if normalization == "whitening":
        first = tf_dpbn.features.whitening(**batch)
        normalization, batch = "batch", {}
    else:
        first = _normalization(normalization, inputs, {**batch, "center": False, "scale": False}, affine=False)
    if net == "linear":
        outputs = layers.Flatten()(first(inputs))
    elif net == "top":
        outputs = layers.MaxPool2D(2)(layers.ReLU()(normalize(convolve(64, 3)(first(inputs)))))
        outputs = layers.Flatten()(layers.ReLU()(normalize(convolve(64, 3)(outputs))))
    elif net == "cnn":
        outputs = _cnn(inputs, convolve, normalize)
    elif net == "wide_cnn":
        outputs = _wide_cnn(inputs, convolve, normalize)
    elif net.startswith("deep"):
        outputs = _deep(inputs, convolve, normalize, int(net[4:]))
    elif net.startswith("res"):
        outputs = _res(inputs, convolve, normalize, int(net[3:]), after_addition=normalization == "scale")
    else:
        raise ValueError(f"`net` must be one of {NETS}. Received: {net!r}")
    head = layers.Dense(classes, kernel_initializer=initializer if net == "linear" else "glorot_uniform")
    return tf_dpbn.DPModel(inputs, head(outputs))


def _normalization(kind: str, x: Any, batch: dict[str, Any], affine: bool = True) -> _Layer:
    if kind == "none":
        return layers.Activation("linear")
    if kind == "batch":
        return tf_dpbn.DPBatchNormalization(**batch)
    if len(x.shape) == 2:
        return layers.LayerNormalization()
    channels = x.shape[-1]
    most = 1 if kind == "layer" else max(1, min(8, channels // 4))
    groups = next(n for n in range(most, 0, -1) if channels % n == 0)
    return layers.GroupNormalization(groups, center=affine, scale=affine)


def _cnn(x: Any, convolve: _Layers, normalize: _Layer) -> Any:
    """The MNIST tutorial of tensorflow-privacy, with normalization after each hidden layer."""
    x = convolve(16, 8, strides=2)(x)
    x = layers.MaxPool2D(2, strides=1)(layers.ReLU()(normalize(x)))
    x = convolve(32, 4, strides=2, padding="valid")(x)
    x = layers.MaxPool2D(2, strides=1)(layers.ReLU()(normalize(x)))
    x = layers.Dense(32)(layers.Flatten()(x))
    return layers.ReLU()(normalize(x))


def _wide_cnn(x: Any, convolve: _Layers, normalize: _Layer) -> Any:
    """Three convolutions of 32 to 64 channels, and a dense layer."""
    for width, size in ((32, 5), (48, 3), (64, 3)):
        x = layers.ReLU()(normalize(convolve(width, size, strides=2)(x)))
    x = layers.Dense(64)(layers.Flatten()(x))
    return layers.ReLU()(normalize(x))


def _deep(x: Any, convolve: _Layers, normalize: _Layer, depth: int) -> Any:
    """`depth` convolutions one after the other: the first two strided by 2 at the start and half-way."""
    x = convolve(_WIDTHS[0], 5, strides=2)(x)
    for k in range(depth - 1):
        x = layers.ReLU()(normalize(x))
        late = k >= (depth - 1) // 2
        stride = 2 if k == (depth - 1) // 2 else 1
        x = convolve(_WIDTHS[late], 3, strides=stride)(x)
    return layers.GlobalAveragePooling2D()(layers.ReLU()(normalize(x)))


def _res(x: Any, convolve: _Layers, normalize: _Layer, blocks: int, after_addition: bool) -> Any:
    x = layers.ReLU()(normalize(convolve(_WIDTHS[0], 5, strides=2, use_bias=False)(x)))
    for stage, width in enumerate(_WIDTHS):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            inner = convolve(width, 3, strides=stride, use_bias=False)(x)
            inner = layers.ReLU()(normalize(inner))
            inner = normalize(convolve(width, 3, use_bias=False)(inner))
            if stride != 1:
                x = normalize(convolve(width, 1, strides=stride, use_bias=False)(x))
            x = layers.Add()([inner, x])
            x = layers.ReLU()(normalize(x) if after_addition else x)
    return layers.GlobalAveragePooling2D()(x)
