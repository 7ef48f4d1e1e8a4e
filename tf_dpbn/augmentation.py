"""Augmentation multiplicity: several augmented copies of each example, whose gradients are averaged before clipping.

One example's gradient is then the mean over its copies, so that its sensitivity stays the clip norm and nothing more is
to be accounted for (De et al. 2022, "Unlocking High-Accuracy Differentially Private Image Classification through
Scale", arXiv 2204.13650, section 3.2). `poisson_dataset(..., augment=..., augmentation_multiplicity=K)` makes the
copies, `DPModel.compile(augmentation_multiplicity=K)` averages over them.

Formal guarantee: a copy is made from one example and random numbers, by a function that is handed that example alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tf_dpbn import _graph, _validate


def random_shift(pixels: int, *, flip: bool = False) -> Callable[[tf.Tensor], tf.Tensor]:
    """A function that shifts one image at random; what comes in at the border is zero.

    Args:
      pixels: largest shift along height and width, >= 1; all shifts up to it are equally likely.
      flip: whether to mirror the image, left to right, half of the time.

    Returns:
      A function from an image [height, width, channels] to one of the same shape.

    Raises:
      ValueError: if pixels is not a whole number >= 1.

    Examples:
      >>> random_shift(2)(tf.ones([8, 8, 1])).shape.as_list()
      [8, 8, 1]
    """
    pixels = _validate.positive_int("pixels", pixels)

    def augment(image: tf.Tensor) -> tf.Tensor:
        height, width, _ = image.shape
        padded = tf.pad(image, [[pixels, pixels], [pixels, pixels], [0, 0]])
        shift = tf.random.uniform([2], 0, 2 * pixels + 1, tf.int32)
        columns = tf.range(width)
        if flip:
            columns = tf.where(tf.random.uniform([]) < 0.5, columns, width - 1 - columns)
        # Gathers, which unlike slices can be vectorized over examples.
        return tf.gather(tf.gather(padded, tf.range(height) + shift[0]), columns + shift[1], axis=1)

    return augment


def copies(augment: Callable[[Any], Any], multiplicity: int, rows: Any) -> Any:
    """Augments every row of a nest of tensors, [rows, ...], several times, each on its own: [rows, multiplicity, ...].

    Refuses an `augment`, of one row, that changes shapes or types, or keeps state.
    """
    repeated = tf.nest.map_structure(lambda t: tf.repeat(t, multiplicity, 0), rows)
    specs = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape[1:], t.dtype), rows)
    graph = tf.function(augment, autograph=False).get_concrete_function(specs).graph
    changes = _graph.state_changes(graph)
    if changes:
        requirement = "keep no state, and run no Python code"
        raise _validate.argument_error("augment", changes[0].type, requirement, "State would couple private examples.")
    if _graph.has_segment_sums(graph):
        made = tf.map_fn(augment, repeated, fn_output_signature=specs)
    else:
        made = tf.vectorized_map(augment, repeated)

    def split(copy: tf.Tensor, row: tf.Tensor) -> tf.Tensor:
        if copy.dtype != row.dtype or copy.shape[1:] != row.shape[1:]:
            requirement = f"return {row.dtype.name} {row.shape[1:]}, as it got"
            raise _validate.argument_error("augment", f"{copy.dtype.name} {copy.shape[1:]}", requirement)
        return tf.reshape(copy, [-1, multiplicity, *row.shape[1:]])

    return tf.nest.map_structure(split, made, rows)
