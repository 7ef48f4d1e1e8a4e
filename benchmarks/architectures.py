"""The networks of the benchmarks as plain data, the same for every framework.

Only the standard library is imported: the peers read this under interpreters of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

CLASSES = 10
_WIDTHS = (16, 32, 64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """One network.

    Attributes:
      image: height, width, channels of an input.
      blocks: basic blocks in each of a ResNet's three stages; None for the tutorial CNN.
      parameters: trainable parameters without normalization.
    """

    image: tuple[int, int, int]
    blocks: int | None
    parameters: int

    @property
    def stem(self) -> int:
        """Channels of a ResNet's first convolution."""
        return _WIDTHS[0]

    @property
    def features(self) -> int:
        """Channels after a ResNet's last stage."""
        return _WIDTHS[-1]

    def residual_blocks(self) -> Iterator[tuple[int, int, int]]:
        """(channels in, channels out, stride) of each basic block, from the input on."""
        channels = self.stem
        for stage, width in enumerate(_WIDTHS):
            for block in range(self.blocks or 0):
                yield channels, width, 2 if stage > 0 and block == 0 else 1
                channels = width


ARCHITECTURES = {
    # The MNIST tutorial of tensorflow-privacy.
    "tutorial_cnn": Architecture(image=(28, 28, 1), blocks=None, parameters=26_010),
    "resnet8": Architecture(image=(28, 28, 1), blocks=1, parameters=77_082),
    "resnet20": Architecture(image=(32, 32, 3), blocks=3, parameters=270_906),
}
