"""The dead leaves model: images of discs and rectangles that hide one another.

Lee, Mumford, Huang, "Occlusion models for natural images: a statistical study of a scale-invariant
dead leaves model", International Journal of Computer Vision 41, 2001.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

_LAYERS_OF_LEAVES = 5.0  # mean number of leaves over a pixel; exp(-5) = 0.7% stays background
# Mean of area / radius^2: pi for a disc; 2 sin(2 t), t uniform in [pi/8, 3 pi/8], for a rectangle.
_LEAF_AREA = (math.pi + 4 * math.sqrt(2) / math.pi) / 2


def draw_images(
    rng: np.random.Generator,
    count: int,
    size: tuple[int, int],
    channels: int,
    radii: tuple[float, float],
) -> np.ndarray:
    """Draws images with values in [0, 1].

    Args:
      rng: the source of randomness.
      count: number of images.
      size: height and width, pixels.
      channels: number of channels.
      radii: smallest and largest radius of a leaf, pixels; 0 < smallest < largest.

    Returns:
      A float64 array of shape [count, height, width, channels].
    """
    backgrounds = rng.random((count, 1, 1, channels))
    images = np.tile(backgrounds, (1, *size, 1))
    for image in images:
        for leaf in _draw_leaves(rng, size, radii, channels):
            _paint(image, leaf)
    return images


class _Leaf(NamedTuple):
    """A disc, or a rectangle with its corners on the circle; lengths in pixels."""

    row: float
    column: float
    radius: float
    half_sides: tuple[float, float] | None  # None for a disc
    angle: float  # of the rectangle, radians
    color: np.ndarray  # [channels], in [0, 1]


def _draw_leaves(
    rng: np.random.Generator, size: tuple[int, int], radii: tuple[float, float], channels: int
) -> list[_Leaf]:
    """Draws the leaves of one image bottom first, without those that miss the image."""
    smallest, largest = radii
    # Centres also lie outside, up to the largest radius, so that borders look like the middle.
    area = math.prod(length + 2 * largest for length in size)
    mean_square = 2 * math.log(largest / smallest) / (smallest**-2 - largest**-2)
    count = math.ceil(_LAYERS_OF_LEAVES * area / (mean_square * _LEAF_AREA))

    # Inverse of the distribution function of the density radius^-3 on [smallest, largest].
    share = rng.random(count)
    radius = (smallest**-2 - share * (smallest**-2 - largest**-2)) ** -0.5
    centers = rng.uniform(-largest, np.asarray(size) + largest, size=(count, 2))
    is_disc = rng.random(count) < 0.5
    corner = rng.uniform(math.pi / 8, 3 * math.pi / 8, size=count)
    half = radius[:, None] * np.stack([np.cos(corner), np.sin(corner)], axis=1)
    angle = rng.uniform(0.0, math.pi, size=count)
    colors = rng.random((count, channels))

    outside = np.maximum(-centers, centers - np.asarray(size)).max(axis=1)
    return [
        _Leaf(
            row=float(centers[i, 0]),
            column=float(centers[i, 1]),
            radius=float(radius[i]),
            half_sides=None if is_disc[i] else (float(half[i, 0]), float(half[i, 1])),
            angle=float(angle[i]),
            color=colors[i],
        )
        for i in np.flatnonzero(outside < radius)
    ]


def _paint(image: np.ndarray, leaf: _Leaf) -> None:
    """Paints `leaf` over `image` [height, width, channels] in place; pixel centres at halves."""
    rows, row_slice = _window(leaf.row, leaf.radius, image.shape[0])
    columns, column_slice = _window(leaf.column, leaf.radius, image.shape[1])
    rows, columns = rows[:, None], columns[None, :]
    if leaf.half_sides is None:
        covered = rows**2 + columns**2 <= leaf.radius**2
    else:
        along = rows * math.cos(leaf.angle) + columns * math.sin(leaf.angle)
        across = columns * math.cos(leaf.angle) - rows * math.sin(leaf.angle)
        covered = (np.abs(along) <= leaf.half_sides[0]) & (np.abs(across) <= leaf.half_sides[1])
    image[row_slice, column_slice][covered] = leaf.color


def _window(center: float, radius: float, length: int) -> tuple[np.ndarray, slice]:
    """Returns the pixels of an axis within `radius` of `center`: offsets from it, and a slice."""
    first = max(0, math.floor(center - radius))
    last = min(length, math.ceil(center + radius))
    return np.arange(first, last) + 0.5 - center, slice(first, last)
