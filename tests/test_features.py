"""Scattering coefficients against their definition, computed in another way, and whitening by public features."""

import numpy as np
import pytest
import tensorflow as tf

import export
import tf_dpbn
from tests import helpers
from tf_dpbn._keras import IS_KERAS_3, keras
from tf_dpbn.clipping import book_keeping

pytestmark = pytest.mark.both
layers = keras.layers
Scattering2D = tf_dpbn.features.Scattering2D
IMAGES = np.random.default_rng(0).random((5, 8, 12, 1), dtype="float32")


def filters(height, width, scales, angles):
    """The wavelets [scale][angle] and the window, sampled over many periods in space and folded into one."""
    turns = np.arange(-4 * height, 5 * height), np.arange(-4 * width, 5 * width)
    down, across = np.meshgrid(*turns, indexing="ij")

    def gabor(deviation, frequency, angle, slant):
        along = np.cos(angle) * down + np.sin(angle) * across
        beside = np.cos(angle) * across - np.sin(angle) * down
        envelope = slant * np.exp(-(along**2 + slant**2 * beside**2) / (2 * deviation**2)) / (2 * np.pi * deviation**2)
        return (envelope * np.exp(1j * frequency * along)).reshape(9, height, 9, width).sum((0, 2))

    def morlet(scale, angle):
        wave, gaussian = (gabor(0.8 * 2**scale, f, angle, 4 / angles) for f in (0.75 * np.pi / 2**scale, 0))
        return wave - gaussian * wave.sum() / gaussian.sum()

    wavelets = [[morlet(j, k * np.pi / angles) for k in range(angles)] for j in range(scales)]
    return wavelets, gabor(0.4 * 2**scales, 0, 0, 1)


def scattered(image, scales, angles):
    step = 2**scales
    padded = np.pad(image.astype("float64"), step, mode="reflect")
    wavelets, window = filters(*padded.shape, scales, angles)

    def convolve(x, psi):
        return np.fft.ifft2(np.fft.fft2(x) * np.fft.fft2(psi))

    def average(x):
        return convolve(x, window).real[step:-step:step, step:-step:step]

    orders = [average(padded)], [], []
    for scale in range(scales):
        for psi in wavelets[scale]:
            first = np.abs(convolve(padded, psi))
            orders[1].append(average(first))
            orders[2].extend(average(np.abs(convolve(first, q))) for c in wavelets[scale + 1 :] for q in c)
    return np.stack([each for order in orders for each in order], -1)


@pytest.mark.parametrize("scales, angles, shape", [(2, 8, (8, 12, 1)), (3, 4, (16, 24, 2)), (1, 3, (4, 6, 1))])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_coefficients_are_those_of_the_definition(scales, angles, shape, dtype):
    images = np.random.default_rng(1).random((2, *shape))
    layer = Scattering2D(scales, angles, dtype=dtype)
    found = np.asarray(layer(images.astype(dtype)))
    expected = np.stack(
        [np.concatenate([scattered(x[..., c], scales, angles) for c in range(shape[-1])], -1) for x in images]
    )
    assert found.shape == layer.compute_output_shape((2, *shape))
    assert found.shape[-1] == layer.coefficients * shape[-1]
    # The modulus has a kink: where it is nearly zero, its error is the root of a difference of squares.
    np.testing.assert_allclose(found, expected, atol=1e-6 if dtype == "float32" else 1e-13)


def test_half_precision_casts_no_more_than_the_result():
    half = Scattering2D(dtype="mixed_bfloat16")(IMAGES)
    assert half.dtype == tf.bfloat16
    expected = tf.cast(Scattering2D()(IMAGES), tf.bfloat16)
    np.testing.assert_array_equal(tf.cast(half, tf.float32), tf.cast(expected, tf.float32))


def test_gradients_are_finite_where_the_image_is_black():
    images = tf.zeros((1, 8, 8, 1))
    with tf.GradientTape() as tape:
        tape.watch(images)
        total = tf.reduce_sum(Scattering2D()(images))
    assert np.all(np.isfinite(tape.gradient(total, images)))


def test_features_in_front_of_a_private_network_compile_save_export_and_keep_rows_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(book_keeping, "_trace_examples", lambda *_: pytest.fail("the proof was refused"))
    inputs = keras.Input((8, 12, 1))
    scattering = keras.Sequential([inputs, Scattering2D(1, 4)])
    public = scattering(tf_dpbn.public_data.dead_leaves((8, 12, 1), 16, seed=0))
    x = tf_dpbn.features.whitening(public)(scattering(inputs))
    x = layers.ReLU()(tf_dpbn.DPBatchNormalization()(layers.Conv2D(3, 1)(x)))
    model = tf_dpbn.DPModel(inputs, layers.Dense(2)(layers.Flatten()(x)))
    model.set_public_batch(tf_dpbn.public_data.dead_leaves((8, 12, 1), 16, seed=1))
    helpers.compiled(model, optimizer=helpers.dp_optimizer(expected_batch_size=5, num_examples=100))
    before = model.get_layer("whitening").get_weights()
    model.train_on_batch(IMAGES, np.arange(5) % 2)
    for old, new in zip(before, model.get_layer("whitening").get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)

    expected = model.predict(IMAGES, verbose=0)
    compiled = tf.function(lambda x: model(x, training=False), jit_compile=True)
    np.testing.assert_allclose(compiled(tf.constant(IMAGES)), expected, atol=1e-5)
    model.save(tmp_path / "model.keras")
    np.testing.assert_allclose(
        keras.models.load_model(tmp_path / "model.keras").predict(IMAGES, verbose=0), expected, atol=1e-6
    )
    for name in ("tf_saved_model", "litert") if IS_KERAS_3 else ():
        assert export.difference(model, name, IMAGES) < 1e-5


@pytest.mark.parametrize("shape", [(None, 8, 8, 1), (10, 12, 1), (4, 8, 1), (8, 8)])
def test_refuses_images_of_other_sizes(shape):
    with pytest.raises(ValueError, match="multiples of 4 and larger than it"):
        Scattering2D().build((None, *shape))


@pytest.mark.parametrize("arguments", [{"scales": 0}, {"angles": 2.5}])
def test_refuses_bad_counts(arguments):
    with pytest.raises(ValueError, match="`(scales|angles)` must"):
        Scattering2D(**arguments)


def correlated(examples=400):
    rng = np.random.default_rng(2)
    mix = rng.normal(size=(6, 6)) * [1e-3, 1.0, 50.0, 1.0, 1.0, 1.0]
    return (rng.normal(size=(examples, 3, 6)) @ mix + 7.0).astype("float32")


def test_whitened_public_features_are_centred_and_decorrelated():
    features = correlated()
    found = np.asarray(tf_dpbn.features.whitening(features, 1e-6)(features)).reshape(-1, 6)
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(np.cov(found.T), np.eye(6), atol=5e-3)


def test_epsilon_damps_directions_of_little_variance():
    """By the definition, with the correlation matrix R: the covariance of what comes out is R (R + epsilon)^-1."""
    features = correlated()
    found = np.asarray(tf_dpbn.features.whitening(features, 0.5)(features)).reshape(-1, 6)
    correlation = np.corrcoef(features.reshape(-1, 6).astype("float64").T)
    expected = correlation @ np.linalg.inv(correlation + 0.5 * np.eye(6))
    np.testing.assert_allclose(np.cov(found.T), expected, atol=5e-3)


def test_a_channel_that_is_constant_in_public_passes_without_its_mean():
    features = correlated()
    features[..., 2] = 3.0
    found = np.asarray(tf_dpbn.features.whitening(features, 1.0)(features + np.eye(6, dtype="float32")[2]))
    np.testing.assert_allclose(found[..., 2], 1.0, rtol=1e-4)


@pytest.mark.parametrize(
    "features, epsilon, name",
    [
        (np.ones((9, 3)) * np.nan, 0.1, "public_features"),
        (np.ones(9), 0.1, "public_features"),
        (np.ones((3, 3)), 0.1, "public_features"),
        (np.ones((9, 3)), 0.0, "epsilon"),
    ],
)
def test_whitening_refuses_what_it_cannot_take_statistics_of(features, epsilon, name):
    with pytest.raises(ValueError, match=f"`{name}` must"):
        tf_dpbn.features.whitening(features, epsilon)
