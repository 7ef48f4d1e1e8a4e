"""tensorflow-privacy: its vectorized optimizer, on the tutorial CNN without normalization.

Run by step_time.py; see protocol.py.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable

# Both before the imports: its optimizers are tf_keras', and its package imports what TensorFlow 2.16 and later lack.
os.environ["TF_USE_LEGACY_KERAS"] = "1"
sys.skip_tf_privacy_import = True

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
from tensorflow_privacy.privacy.optimizers import dp_optimizer_keras_vectorized  # noqa: E402

import nets  # noqa: E402
from architectures import ARCHITECTURES, CLASSES  # noqa: E402
from peers import protocol  # noqa: E402

keras = tf.keras
_LEARNING_RATE = 0.1


def make_step(model: keras.Model, private: bool, x: tf.Tensor, y: tf.Tensor) -> Callable[[], None]:
    if private:
        optimizer = dp_optimizer_keras_vectorized.VectorizedDPKerasSGDOptimizer(
            l2_norm_clip=1.0, noise_multiplier=1.0, num_microbatches=len(x), learning_rate=_LEARNING_RATE
        )
    else:
        optimizer = keras.optimizers.legacy.SGD(_LEARNING_RATE)
    # The optimizer needs the loss of each example.
    reduction = keras.losses.Reduction.NONE if private else keras.losses.Reduction.AUTO
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction))
    function = tf.function(lambda data: model.train_step(data), autograph=False)
    return lambda: function((x, y))["loss"].numpy()


def build(net: str, batch_size: int) -> protocol.Build:
    architecture = ARCHITECTURES[net]
    if architecture.blocks is not None:
        raise NotImplementedError("run on the tutorial CNN only, the smallest network: a step takes seconds there")
    rng = np.random.default_rng(0)
    x = tf.constant(rng.random((batch_size, *architecture.image), np.float32))
    y = tf.constant(rng.integers(CLASSES, size=batch_size))
    model = functools.partial(nets.build, net, nets.no_normalization, keras.Model)
    steps = {
        protocol.PLAIN: lambda: make_step(model(), False, x, y),
        "vectorized": lambda: make_step(model(), True, x, y),
    }
    return protocol.Build(steps, {"none": model().count_params()})


if __name__ == "__main__":
    protocol.serve(("tensorflow", "tf_keras", "tensorflow-privacy"), build)
