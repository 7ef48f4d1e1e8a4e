"""Contrastive pretraining of a stock network on synthetic images, before private training.

Private training starts better from features than from random weights, and images of random processes teach a network
features without anybody's data (Tang et al. 2023, "Differentially Private Image Classification by Learning Priors from
Random Processes", arXiv 2306.06076). The way from there: `contrastive` trains a stock backbone with its
BatchNormalization; the user saves it, adds a head, makes the model private by `tf_dpbn.convert`, and trains the head or
all of it with a `PrivacyPlan`, in phases by `PrivacyPlan.phases`.

Nothing here is private: the images must be public. Those of `tf_dpbn.public_data` look at no data at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tf_dpbn import _validate, public_data
from tf_dpbn._keras import flatten_layers, keras
from tf_dpbn.model import DPModel
from tf_dpbn.normalization import DPBatchNormalization


def contrastive(
    backbone: Any,
    images: Any,
    *,
    epochs: int,
    batch_size: int = 256,
    learning_rate: float = 2e-3,
    temperature: float = 0.2,
    value_range: tuple[float, float] = (0.0, 1.0),
    augment: Callable[[tf.Tensor], tf.Tensor] | None = None,
    projection: Sequence[int] = (128, 64),
    seed: int | None = None,
    callbacks: Sequence[Any] = (),
    verbose: Any = "auto",
) -> Any:
    """Trains a stock backbone, in place, to tell augmented views of public images apart, with Keras' own `fit`.

    This is SimCLR (Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations", arXiv
    2002.05709): two augmented views of each image go through the backbone and a small dense network, which is dropped
    afterwards, and `nt_xent` asks for each view which of the others shows the same image. Feature maps are averaged
    over positions first. The optimizer is Adam, its rate decays to zero along a cosine; a last, smaller batch of an
    epoch is left out.

    This training is not private, and no ledger counts it: `images` must not hold private examples.

    Args:
      backbone: a keras.Model from one image [height, width, channels] to features [d] or feature maps [h, w, d], with
        stock BatchNormalization if any.
      images: public images [N, height, width, channels].
      epochs: passes over the images.
      batch_size: images in a batch, 2 to N, of which each has twice as many views. BatchNormalization and the loss see
        them together.
      learning_rate: of Adam, at the start.
      temperature: of the loss, greater than 0.
      value_range: lowest and highest value of the images.
      augment: a function from images [batch, height, width, channels] to a random view of each, of the same shape and
        type. By default `augmentation_layers`.
      projection: units of the hidden and of the last layer of the dense network.
      seed: of its initial weights, of the views and of the order of the images.
      callbacks, verbose: as in keras.Model.fit.

    Returns:
      The keras.callbacks.History of `fit`, with "loss".

    Raises:
      TypeError: for a DPModel, for a model with DPBatchNormalization, and for images of a wrong type.
      ValueError: for a backbone of another form; for images of another shape, non-finite, outside `value_range` or
        fewer than a batch; for a bad number.

    Examples:
      >>> layers = keras.layers
      >>> backbone = keras.Sequential([
      ...     layers.Input((8, 8, 1)), layers.Conv2D(4, 3), layers.BatchNormalization(), layers.ReLU()])
      >>> images = public_data.dead_leaves((8, 8, 1), 16)
      >>> history = contrastive(backbone, images, epochs=2, batch_size=8, verbose=0)
      >>> len(history.history["loss"])
      2
      >>> stock = keras.Sequential([backbone, layers.GlobalAveragePooling2D(), layers.Dense(10, name="head")])
      >>> from tf_dpbn import convert
      >>> model = convert(stock, public_batch=images)  # to be compiled with a DPOptimizer
    """
    _check_backbone(backbone)
    passes, size = (_validate.positive_int(*each) for each in (("epochs", epochs), ("batch_size", batch_size)))
    rate, heat = _validate.positive("learning_rate", learning_rate), _validate.positive("temperature", temperature)
    hidden, width = (_validate.positive_int("projection", units) for units in projection)
    dtype = tf.as_dtype(backbone.inputs[0].dtype).as_numpy_dtype
    shape = tuple(backbone.inputs[0].shape)
    checked = public_data.validate_batch(
        images, expected_shape=shape, dtype=dtype, value_range=value_range, name="images"
    )
    if not 2 <= size <= len(checked):
        requirement = f"lie between 2 and the number of images, {len(checked)}"
        raise _validate.argument_error("batch_size", batch_size, requirement)

    view = augment or augmentation_layers(value_range, seed)
    dataset = tf.data.Dataset.from_tensor_slices(checked).shuffle(len(checked), seed).batch(size, drop_remainder=True)
    dataset = dataset.map(lambda batch: tf.concat([tf.ensure_shape(view(batch), batch.shape) for _ in range(2)], 0))

    x = backbone.outputs[0]
    x = keras.layers.GlobalAveragePooling2D()(x) if len(x.shape) == 4 else x
    x = keras.layers.Dense(hidden, "relu", kernel_initializer=keras.initializers.GlorotUniform(seed))(x)
    x = keras.layers.Dense(width, kernel_initializer=keras.initializers.GlorotUniform(seed))(x)
    trainer = keras.Model(backbone.inputs, _Contrast(heat)(x))
    decay = keras.optimizers.schedules.CosineDecay(rate, passes * (len(checked) // size))
    trainer.compile(keras.optimizers.Adam(decay))
    # The data set shuffles; Keras would warn that it does not.
    return trainer.fit(dataset.prefetch(2), epochs=passes, shuffle=False, callbacks=list(callbacks), verbose=verbose)


def nt_xent(first: tf.Tensor, second: tf.Tensor, temperature: float) -> tf.Tensor:
    """The normalized, temperature-scaled cross entropy of Chen et al. 2020, equation 1, mean over all views.

    Args:
      first, second: projections [batch, d] of the two views of each image, of any length other than 0.
      temperature: divides the cosine of the angle between two views.

    Returns:
      A scalar: minus the logarithm of the probability with which a view finds its other among all other views.
    """
    views = tf.math.l2_normalize(tf.concat([first, second], 0), -1)
    count = tf.shape(first)[0]
    similarities = tf.matmul(views, views, transpose_b=True) / temperature
    # No view is compared with itself.
    similarities = tf.linalg.set_diag(similarities, tf.fill([2 * count], similarities.dtype.min))
    others = tf.roll(tf.range(2 * count), count, 0)
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(others, similarities))


def augmentation_layers(value_range: tuple[float, float] = (0.0, 1.0), seed: int | None = None) -> Any:
    """The default augmentation, of Keras' preprocessing layers: a function from images to a random view of each.

    Shifts by up to a fifth, zooms by up to 30 %, turns by up to 36 degrees, and changes contrast and brightness by up
    to 40 %. No mirroring and no colours: the views of an image should differ in nothing that tells classes apart.
    """
    low, high = value_range
    seeds = [None if seed is None else seed + k for k in range(5)]
    chain = keras.Sequential(
        [
            keras.layers.Rescaling(255 / (high - low), -255 * low / (high - low)),  # the range that these layers expect
            keras.layers.RandomTranslation(0.2, 0.2, seed=seeds[0]),
            keras.layers.RandomZoom((-0.3, 0.3), seed=seeds[1]),
            keras.layers.RandomRotation(0.1, seed=seeds[2]),
            keras.layers.RandomContrast(0.4, seed=seeds[3]),
            keras.layers.RandomBrightness(0.4, seed=seeds[4]),
            keras.layers.Rescaling((high - low) / 255, low),
        ]
    )
    return lambda images: tf.cast(chain(images, training=True), images.dtype)


class _Contrast(keras.layers.Layer):
    """Hands projections [first views, second views] on and adds the contrast between them as loss."""

    def __init__(self, temperature: float) -> None:
        super().__init__(dtype="float32")
        self._temperature = temperature

    def call(self, projections: tf.Tensor) -> tf.Tensor:
        first, second = tf.split(projections, 2)
        self.add_loss(nt_xent(first, second, self._temperature))
        return projections


def _check_backbone(backbone: Any) -> None:
    if not isinstance(backbone, keras.Model):
        raise _validate.argument_error("backbone", backbone, "be a keras.Model", kind=TypeError)
    if isinstance(backbone, DPModel) or any(isinstance(x, DPBatchNormalization) for x in flatten_layers(backbone)):
        remedy = "Pretrain the stock network, add a head and make the whole private by tf_dpbn.convert."
        raise _validate.argument_error("backbone", backbone, "be a stock Keras model", remedy, TypeError)
    inputs, outputs = (getattr(backbone, name, None) or [] for name in ("inputs", "outputs"))
    shapes = [tuple(tensor.shape) for tensor in (*inputs, *outputs)]
    if len(inputs) != 1 or len(outputs) != 1 or len(shapes[0]) != 4 or len(shapes[1]) not in (2, 4):
        requirement = "take one image [height, width, channels] and return features [d] or feature maps [h, w, d]"
        raise _validate.argument_error("backbone", shapes, requirement, "Build it as a functional model.")
    if not backbone.trainable_variables:
        raise _validate.argument_error("backbone", backbone, "have trainable weights", "Set backbone.trainable = True.")
