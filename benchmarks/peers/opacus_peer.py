"""Opacus: all its modes, on the networks without normalization and with GroupNorm in place of batch normalization.

Its steps clip, add noise and update, as those of tf_dpbn do. Run by step_time.py; see protocol.py.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from opacus import PrivacyEngine
from torch import nn

from architectures import ARCHITECTURES, CLASSES, Architecture
from peers import protocol

MODES = ("hooks", "functorch", "ew", "ghost")
_GROUPS = 8
_LEARNING_RATE = 0.1


class Block(nn.Module):
    """A basic residual block."""

    def __init__(self, channels: int, width: int, stride: int, normalization: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, 1, bias=False),
            normalization(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            normalization(width),
        )
        self.shortcut = nn.Sequential()
        if (channels, stride) != (width, 1):
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), normalization(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.inner(x) + self.shortcut(x))


def tutorial_cnn(normalization: Callable[[int], nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, padding=3),
        normalization(16),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2),
        normalization(32),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.ReLU(),
        nn.Linear(32, CLASSES),
    )


def resnet(architecture: Architecture, normalization: Callable[[int], nn.Module]) -> nn.Module:
    stem = nn.Conv2d(architecture.image[-1], architecture.stem, 3, 1, 1, bias=False)
    blocks = [Block(*block, normalization) for block in architecture.residual_blocks()]
    return nn.Sequential(
        stem,
        normalization(architecture.stem),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(architecture.features, CLASSES),
    )


def make_net(architecture: Architecture, group_norm: bool) -> nn.Module:
    def normalization(channels: int) -> nn.Module:
        return nn.GroupNorm(_GROUPS, channels) if group_norm else nn.Identity()

    return tutorial_cnn(normalization) if architecture.blocks is None else resnet(architecture, normalization)


def make_step(
    architecture: Architecture, mode: str | None, group_norm: bool, x: torch.Tensor, y: torch.Tensor
) -> Callable[[], None]:
    """One step of SGD; `mode` None is without privacy."""
    model, criterion = make_net(architecture, group_norm), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=_LEARNING_RATE)
    if mode is not None:
        model, optimizer, *rest = PrivacyEngine().make_private(
            module=model,
            optimizer=optimizer,
            criterion=criterion,
            data_loader=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=len(x)),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            grad_sample_mode=mode,
            poisson_sampling=False,  # the batch is given; this concerns the loader only
        )
        if mode == "ghost":
            criterion = rest[0]

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()

    return step


def build(net: str, batch_size: int) -> protocol.Build:
    architecture = ARCHITECTURES[net]
    height, width, channels = architecture.image
    x = torch.rand(batch_size, channels, height, width)
    y = torch.randint(0, CLASSES, (batch_size,))
    steps, parameters = {}, {}
    for suffix, group_norm in (("", False), (" groupnorm", True)):
        parameters[suffix.strip() or "none"] = sum(p.numel() for p in make_net(architecture, group_norm).parameters())
        for mode in (None, *MODES):
            name = (mode or protocol.PLAIN) + suffix
            steps[name] = functools.partial(make_step, architecture, mode, group_norm, x, y)
    return protocol.Build(steps, parameters)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    protocol.serve(("torch", "opacus"), build)
