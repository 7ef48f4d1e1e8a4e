"""Contrastive pretraining: its loss against numpy, what it teaches, what it refuses, and the way to a private model."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import tf_dpbn
from tf_dpbn import pretraining, public_data
from tf_dpbn._keras import keras

layers = keras.layers
pytestmark = pytest.mark.both
SHAPE = (12, 12, 1)


def stock(pooled: bool = False) -> keras.Model:
    stack = [layers.Input(SHAPE), layers.Conv2D(8, 3, strides=2), layers.BatchNormalization(), layers.ReLU()]
    return keras.Sequential([*stack, layers.GlobalAveragePooling2D()] if pooled else stack)


IMAGES = public_data.dead_leaves(SHAPE, 64, radius_range=(0.2, 0.5), seed=0)


def train(backbone, images=IMAGES, **arguments):
    return pretraining.contrastive(backbone, images, **{"epochs": 1, "batch_size": 32, "verbose": 0, **arguments})


def noisy(images):
    return images + tf.random.normal(images.shape, stddev=0.1)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_loss_is_that_of_the_paper(temperature):
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 5, 3))
    views = [v / np.linalg.norm(v) for v in np.concatenate([first, second])]
    losses = []
    for i, view in enumerate(views):
        terms = {k: np.exp(view @ other / temperature) for k, other in enumerate(views) if k != i}
        losses.append(-np.log(terms[(i + 5) % 10] / sum(terms.values())))
    assert float(pretraining.nt_xent(first, second, temperature)) == pytest.approx(np.mean(losses))


def test_training_lowers_the_loss_and_moves_the_backbone_alone():
    backbone = stock(pooled=True)
    before, layers_before = backbone.get_weights(), list(backbone.layers)
    losses = train(backbone, epochs=20, learning_rate=1e-2, augment=noisy, seed=0).history["loss"]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.5
    assert backbone.layers == layers_before
    assert all(np.any(old != new) for old, new in zip(before, backbone.get_weights(), strict=True))


def test_a_seed_decides_views_order_and_head():
    losses = []
    for seed in (3, 3, 4):
        keras.utils.set_random_seed(0)
        losses.append(train(stock(), IMAGES[:32], seed=seed, batch_size=8).history["loss"][0])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("value_range", [(0.0, 1.0), (-1.0, 1.0), (0, 255)])
def test_views_keep_the_range_and_differ_between_images_and_calls(value_range):
    images = public_data.dead_leaves(SHAPE, 8, value_range=value_range, seed=0)
    images[1:] = images[0]
    view = pretraining.augmentation_layers(value_range)
    first, second = view(tf.constant(images)).numpy(), view(tf.constant(images)).numpy()
    span = value_range[1] - value_range[0]
    assert value_range[0] - 1e-4 * span <= first.min() < first.max() <= value_range[1] + 1e-4 * span
    assert first.shape == images.shape and first.std() > 0.1 * span
    for one, other in ((first[0], first[1]), (first[0], second[0])):
        assert np.abs(one - other).mean() > 0.02 * span


def test_ones_own_augmentation_is_used():
    seen = []

    def flip(images):
        seen.append(images.shape.as_list())
        return images[:, ::-1]

    train(stock(), augment=flip)
    assert seen == [[32, *SHAPE]] * 2


def test_a_pretrained_backbone_is_saved_loaded_and_made_private(tmp_path):
    backbone = stock()
    train(backbone)
    backbone.save(tmp_path / "backbone.keras")
    loaded = keras.models.load_model(tmp_path / "backbone.keras")
    np.testing.assert_allclose(loaded(IMAGES), backbone(IMAGES), atol=1e-6)
    whole = keras.Sequential([layers.Input(SHAPE), loaded, layers.GlobalAveragePooling2D(), layers.Dense(3)])
    fixed = tf_dpbn.convert(whole, statistics="fixed")
    np.testing.assert_allclose(fixed(IMAGES), whole(IMAGES), atol=1e-5)
    public = tf_dpbn.convert(whole, public_batch=IMAGES)
    np.testing.assert_array_equal(public.get_weights()[0], backbone.get_weights()[0])


def private() -> tf_dpbn.DPModel:
    return tf_dpbn.convert(stock())


def without_weights() -> keras.Model:
    backbone = stock()
    backbone.trainable = False
    return backbone


FLAT = [layers.Input((4,)), layers.Dense(3)]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"backbone": private}, TypeError, "`backbone` must be a stock Keras model.*tf_dpbn.convert"),
        ({"backbone": lambda: keras.Sequential([*private().layers])}, TypeError, "stock Keras model"),
        ({"backbone": lambda: layers.Dense(1)}, TypeError, "must be a keras.Model"),
        ({"backbone": lambda: keras.Sequential(FLAT)}, ValueError, "take one image"),
        ({"backbone": without_weights}, ValueError, "have trainable weights"),
        ({"images": IMAGES[:, :8]}, ValueError, r"images.shape` must be \(None, 12, 12, 1\)"),
        ({"images": IMAGES.astype(complex)}, TypeError, "images.dtype` must be a real float or integer"),
        ({"images": np.where(IMAGES > 0.9, np.nan, IMAGES)}, ValueError, "`images` must be finite"),
        ({"images": 255 * IMAGES}, ValueError, r"lie in \[0.0, 1.0\]"),
        ({"batch_size": 65}, ValueError, "between 2 and the number of images, 64.*batch_size=65"),
        ({"batch_size": 1}, ValueError, "batch_size=1"),
        ({"epochs": 0}, ValueError, "epochs=0"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate=0.0"),
        ({"temperature": -1.0}, ValueError, "temperature=-1.0"),
        ({"projection": (8, 0)}, ValueError, "projection=0"),
    ],
)
def test_what_is_refused(change, error, message):
    backbone = change.pop("backbone", stock)()
    with pytest.raises(error, match=message):
        train(backbone, **change)
