"""JAX-Privacy: clipped sums of per-example gradients, on the networks without normalization.

Its steps stop there: they add no noise and update nothing, which is in its favour. Run by step_time.py; see
protocol.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from jax_privacy import clipping

from architectures import ARCHITECTURES, CLASSES, Architecture
from peers import protocol

MICROBATCH_SIZES = (None, 32)


class TutorialCNN(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(nn.Conv(16, (8, 8), (2, 2), "SAME")(x))
        x = nn.max_pool(x, (2, 2), (1, 1))
        x = nn.relu(nn.Conv(32, (4, 4), (2, 2), "VALID")(x))
        x = nn.max_pool(x, (2, 2), (1, 1))
        x = nn.relu(nn.Dense(32)(x.reshape(x.shape[0], -1)))
        return nn.Dense(CLASSES)(x)


class ResNet(nn.Module):
    architecture: Architecture

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def convolution(x: Any, width: int, size: int, stride: int = 1) -> Any:
            return nn.Conv(width, (size, size), (stride, stride), "SAME", use_bias=False)(x)

        x = nn.relu(convolution(x, self.architecture.stem, 3))
        for channels, width, stride in self.architecture.residual_blocks():
            inner = convolution(nn.relu(convolution(x, width, 3, stride)), width, 3)
            shortcut = x if (channels, stride) == (width, 1) else convolution(x, width, 1, stride)
            x = nn.relu(inner + shortcut)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


def make_step(compute: Callable[..., Any], *arguments: Any) -> Callable[[], None]:
    compiled = jax.jit(compute)
    return lambda: jax.block_until_ready(compiled(*arguments))


def build(net: str, batch_size: int) -> protocol.Build:
    architecture = ARCHITECTURES[net]
    model = TutorialCNN() if architecture.blocks is None else ResNet(architecture)
    rng = np.random.default_rng(0)
    x = jax.device_put(rng.random((batch_size, *architecture.image), np.float32))
    y = jax.device_put(rng.integers(CLASSES, size=batch_size))
    parameters = model.init(jax.random.key(0), x[:1])

    def loss(parameters: Any, x: Any, y: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(parameters, x), y).mean()

    computations = {protocol.PLAIN: jax.grad(loss)}
    for size in MICROBATCH_SIZES:
        computations[f"microbatch={size}"] = clipping.clipped_grad(
            loss, l2_clip_norm=1.0, batch_argnums=(1, 2), keep_batch_dim=True, microbatch_size=size
        )
    steps = {name: functools.partial(make_step, each, parameters, x, y) for name, each in computations.items()}
    return protocol.Build(steps, {"none": sum(leaf.size for leaf in jax.tree.leaves(parameters))})


if __name__ == "__main__":
    protocol.serve(("jax", "jaxlib", "jax-privacy", "flax"), build)
