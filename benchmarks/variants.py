"""What is measured of TensorFlow: one train step of stock Keras, or of tf_dpbn in one configuration."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import tensorflow as tf

import nets
import tf_dpbn
from architectures import CLASSES

keras = tf.keras

PLAIN = "plain"
NO_NORMALIZATION = "none"
_LEARNING_RATE = 0.1
_L2_NORM_CLIP = 1.0
_NOISE_MULTIPLIER = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One configuration.

    Attributes:
      net: one of nets.NAMES.
      batch_size: examples in a step.
      jit_compile: whether XLA compiles the step.
      policy: Keras' name of the types in which layers compute and keep their weights.
      engine, microbatch_size, norm_method: as in DPModel.compile; engine=None is stock Keras without privacy, for
        which the other fields are None.
      statistics: as in DPBatchNormalization, or "none" for the network without normalization.
      public_batch: examples in the public batch.
    """

    net: str
    batch_size: int
    jit_compile: bool = False
    policy: str = "float32"
    engine: str | None = None
    microbatch_size: int | None = None
    norm_method: str | None = None
    statistics: str | None = None
    public_batch: int | None = None

    @property
    def label(self) -> str:
        """A name that tells apart the variants of one net and batch size."""
        if self.engine is None:
            return PLAIN
        words = ["tf_dpbn", self.engine]
        words.append("without normalization" if self.statistics == NO_NORMALIZATION else self.statistics)
        if self.norm_method != "auto":
            words.append(self.norm_method)
        if self.microbatch_size:
            words.append(f"microbatch={self.microbatch_size}")
        return " ".join(map(str, words))


class Step:
    """One `train_on_batch` on random images; see `Variant`."""

    def __init__(self, variant: Variant) -> None:
        image = nets.input_shape(variant.net)
        rng = np.random.default_rng(0)
        x = tf.constant(rng.random((variant.batch_size, *image), np.float32))
        y = tf.constant(rng.integers(CLASSES, size=(variant.batch_size, *nets.label_shape(variant.net))))
        policy = keras.mixed_precision.global_policy()
        keras.mixed_precision.set_global_policy(variant.policy)
        if variant.engine is None:
            self._model, self._data = _plain_model(variant), (x, y)
        else:
            # What the Poisson sampler yields has weights, with which it marks padding.
            self._model, self._data = _dp_model(variant), (x, y, tf.ones([variant.batch_size]))
        keras.mixed_precision.set_global_policy(policy)
        self._is_plain = variant.engine is None
        self.parameters = sum(int(np.prod(v.shape)) for v in self._model.trainable_variables)

    def __call__(self) -> None:
        """Runs one step to its end."""
        # Not `fit`, whose input pipeline would be timed too.
        if self._is_plain:
            tf.config.experimental.enable_tensor_float_32_execution(True)  # a private step leaves it off
        self._model.train_on_batch(*self._data)
        tf.test.experimental.sync_devices()  # the loss is ready before the weights are updated


def _loss() -> Any:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _plain_model(variant: Variant) -> Any:
    model = nets.build(variant.net, keras.layers.BatchNormalization, keras.Model)
    model.compile(keras.optimizers.SGD(_LEARNING_RATE), _loss(), jit_compile=variant.jit_compile)
    return model


def _dp_model(variant: Variant) -> tf_dpbn.DPModel:
    shape = nets.input_shape(variant.net)
    if variant.net in nets.APPLICATIONS:
        stock = nets.build(variant.net, keras.layers.BatchNormalization, keras.Model)
        public_batch = tf_dpbn.public_data.uniform_noise(shape, variant.public_batch)
        model = tf_dpbn.convert(stock, public_batch=public_batch)
    elif variant.statistics == NO_NORMALIZATION:
        model = nets.build(variant.net, nets.no_normalization, tf_dpbn.DPModel)
    else:
        normalization = functools.partial(tf_dpbn.DPBatchNormalization, statistics=variant.statistics)
        model = nets.build(variant.net, normalization, tf_dpbn.DPModel)
        model.set_public_batch(tf_dpbn.public_data.uniform_noise(shape, variant.public_batch))
    optimizer = tf_dpbn.optimizers.VectorizedDPKerasSGDOptimizer(
        _L2_NORM_CLIP,
        _NOISE_MULTIPLIER,
        expected_batch_size=variant.batch_size,
        learning_rate=_LEARNING_RATE,
    )
    model.compile(
        optimizer,
        _loss(),
        engine=variant.engine,
        microbatch_size=variant.microbatch_size,
        norm_method=variant.norm_method,
        jit_compile=variant.jit_compile,
    )
    return model
