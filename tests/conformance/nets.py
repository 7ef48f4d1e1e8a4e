"""Networks for the check of neighbouring batches: name -> function (rng) -> (model, loss, shape, targets)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

import tf_dpbn
from tests import helpers, zoo
from tf_dpbn._keras import keras

layers = keras.layers
IMAGE = (6, 6, 2)
ENGINES = ("book_keeping", "vectorized")


def two_outputs(rng: np.random.Generator) -> tuple[Any, ...]:
    inputs = keras.Input((5,))
    x = layers.Activation("tanh")(tf_dpbn.DPBatchNormalization()(layers.Dense(6)(inputs)))
    outputs = {"a": layers.Dense(3, name="a")(x), "b": layers.Dense(1, name="b")(x)}
    model = tf_dpbn.DPModel(inputs, outputs)
    loss = {"a": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "b": "mse"}
    return model, loss, (5,), lambda n: {"a": rng.integers(0, 3, n), "b": rng.normal(size=(n, 1))}


def zoo_net(name: str) -> Callable[[np.random.Generator], tuple[Any, ...]]:
    def build(rng: np.random.Generator) -> tuple[Any, ...]:
        return zoo.build(name), None, zoo.BODIES[name][0], lambda n: rng.integers(0, zoo.CLASSES, n)

    return build


def frozen(rng: np.random.Generator) -> tuple[Any, ...]:
    """The other statistics path: moving statistics, because the layer is frozen."""
    model, *rest = zoo_net("batch_normalization")(rng)
    for layer in model.layers:
        if isinstance(layer, tf_dpbn.DPBatchNormalization):
            layer.trainable = False
    return model, *rest


def net_of_modes(*modes: str) -> Any:
    """Normalizations of several modes: after convolutions, an addition, a nested model, and one called twice."""
    norm = [functools.partial(tf_dpbn.DPBatchNormalization, statistics=mode) for mode in modes]
    inputs = keras.Input(IMAGE)
    x = layers.ReLU()(norm[0]()(layers.Conv2D(4, 3, padding="same")(inputs)))
    x = layers.Add()([x, layers.DepthwiseConv2D(3, padding="same")(x)])
    x = layers.Flatten()(norm[1 % len(norm)](axis=-1)(x))
    inside = keras.Input((144,))
    nested = keras.Model(inside, norm[2 % len(norm)]()(layers.Dense(5)(inside)))
    x = layers.Activation("tanh")(nested(x))
    twice, dense = norm[0](), layers.Dense(5)
    return tf_dpbn.DPModel(inputs, layers.Dense(3)(twice(dense(twice(dense(x))))))


def of_modes(*modes: str) -> Callable[[np.random.Generator], tuple[Any, ...]]:
    return lambda rng: (net_of_modes(*modes), None, IMAGE, lambda n: rng.integers(0, 3, n))


PLAIN = {
    "two_outputs": two_outputs,
    "frozen": frozen,
    **{name: zoo_net(name) for name in zoo.BODIES if name.startswith("batch_normalization")},
    "conv2d": zoo_net("conv2d"),
    "attention": zoo_net("attention"),
    "fixed": of_modes("fixed", "public"),
}
RELEASING = {
    "-".join(modes): of_modes(*modes)
    for modes in [("noised",), ("anchored",), ("noised", "public", "anchored"), ("anchored", "noised", "public")]
}


def releases_of_statistics(net: str) -> int:
    """How many a step has, one for each call of a normalization whose statistics are released."""
    modes = net.split("-") if net in RELEASING else ["public"]
    calls = [*modes, *modes, *modes][:3] + 2 * modes[:1]  # of `net_of_modes`
    return sum(mode != "public" for mode in calls)


def compiled(net: str, rng: np.random.Generator, **options: Any) -> tuple[Any, tuple[int, ...], Any]:
    """(model, shape, targets) with random weights, clip norm and public batch, in microbatches of four."""
    model, loss, shape, targets = {**PLAIN, **RELEASING}[net](rng)
    model.set_public_batch(rng.normal(size=(5, *shape)).astype("float32"))
    clip = float(rng.choice([0.1, 1.0, 5.0]))
    helpers.compiled(model, loss, helpers.dp_optimizer(l2_norm_clip=clip), **{"microbatch_size": 4, **options})
    randomize(model, rng)
    return model, shape, targets


def randomize(model: Any, rng: np.random.Generator) -> None:
    helpers.randomize(model, int(rng.integers(1 << 30)), scale=float(rng.choice([0.3, 0.7, 1.0])))
