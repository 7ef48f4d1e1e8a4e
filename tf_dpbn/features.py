"""Features that are computed and not learned, in front of a private network. They cost no privacy.

Each example's features depend on that example alone, and the matrix that whitens them on public data. A dense layer on
good features learns more from a few noisy steps than a deep network does (Tramer and Boneh, "Differentially Private
Learning Needs Better Features (or Much More Data)", 2021, arXiv 2011.11660); examples/fashion_mnist.py shows the whole.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tf_dpbn import _validate, public_data
from tf_dpbn._keras import keras

_TINY = 1e-30  # under the root of a modulus, whose derivative is infinite at 0


@keras.saving.register_keras_serializable(package="tf_dpbn")
class Scattering2D(keras.layers.Layer):
    """Scattering coefficients of images up to the second order, with Morlet wavelets.

    For an image x, wavelets psi of `scales` dilations and `angles` rotations, a Gaussian window phi and * convolution:

        S0 = x * phi,   S1 = |x * psi_1| * phi,   S2 = ||x * psi_1| * psi_2| * phi,  psi_2 coarser than psi_1,

    each at every 2^scales-th pixel. That makes K = 1 + scales angles + scales (scales - 1) / 2 angles^2 coefficients a
    colour and position: 81 for 2 scales of 8 angles. Small shifts and deformations change them little (Mallat, "Group
    Invariant Scattering", 2012, theorem 2.12), and the linear map of a dense layer is enough to tell images apart.

    Wavelets are those of Bruna and Mallat, "Invariant Scattering Convolution Networks", 2013 (arXiv 1203.1513, section
    2.1), in the constants that their software ScatNet has set: at dilation j = 0, 1, ... a Gaussian of standard
    deviation 0.8 2^j along the wave and 0.8 2^j angles / 4 across, times a wave of frequency 3 pi / 4 2^-j, less as
    much of the Gaussian as makes its mean 0; phi is a Gaussian of standard deviation 0.4 2^scales. Images are reflected
    over 2^scales pixels at their borders and continued periodically from there. All of it is computed at the full
    resolution of the image, by discrete Fourier transforms as products with matrices, which every device and export
    format knows.

    The layer has no weights. It may stand in a `DPModel`, but it takes longer than a small network on top of it, so
    compute the features once, those of the public batch too:

    Examples:
      >>> import tf_dpbn
      >>> scattering = tf.keras.Sequential([tf.keras.Input((28, 28, 1)), tf_dpbn.features.Scattering2D()])
      >>> images = np.random.default_rng(0).random((3, 28, 28, 1), dtype="float32")
      >>> scattering.predict(images, verbose=0).shape
      (3, 7, 7, 81)

    Input: [batch, height, width, colours], real; height and width multiples of 2^scales and larger than it.
    Output: [batch, height / 2^scales, width / 2^scales, colours K] in the layer's compute dtype; computed in float32,
    or in float64 if that is its compute dtype. A colour's coefficients lie together: S0; S1 by dilation, then angle; S2
    by dilation and angle of psi_1, then of psi_2. Wave k of a dilation runs at k pi / angles from the vertical.

    Args:
      scales: number of dilations, J in the papers; at least 1.
      angles: number of rotations over half a turn, L in the papers; at least 1.
      **kwargs: those of keras.layers.Layer.

    Raises:
      ValueError: for bad `scales` or `angles`, and for images of unknown or unsuitable size.
    """

    def __init__(self, scales: int = 2, angles: int = 8, **kwargs: Any) -> None:
        kwargs.setdefault("trainable", False)
        super().__init__(autocast=False, **kwargs)  # images keep their precision under mixed ones
        self.scales = _validate.positive_int("scales", scales)
        self.angles = _validate.positive_int("angles", angles)

    @property
    def coefficients(self) -> int:
        """How many there are for a colour and position: K."""
        first = self.scales * self.angles
        return 1 + first + first * (self.scales - 1) * self.angles // 2

    def build(self, input_shape: Any) -> None:
        """Computes the matrices for images of this size."""
        shape = tuple(input_shape)
        step = 2**self.scales
        if len(shape) != 4 or None in shape[1:] or any(n % step or n <= step for n in shape[1:3]):
            requirement = f"be (None, height, width, colours), height and width multiples of {step} and larger than it"
            remedy = "Pad the images (keras.layers.ZeroPadding2D), crop them, or give fewer `scales`."
            raise _validate.argument_error("input_shape", shape, requirement, remedy)
        self._down, self._across = (_side(n, step) for n in shape[1:3])
        height, width = (side.transform.shape[0] for side in (self._down, self._across))
        self._wavelets = _wavelets(height, width, self.scales, self.angles)
        self.input_spec = keras.layers.InputSpec(shape=(None, *shape[1:]))
        super().build(input_shape)

    def call(self, inputs: Any) -> Any:
        """The coefficients of a batch of images."""
        dtype = tf.float64 if self.compute_dtype == "float64" else tf.float32
        plane = _Plane(self._down.constants(dtype), self._across.constants(dtype))
        wavelets = [tf.constant(each[:, :, None], dtype) for each in self._wavelets]  # [angles, y, 1, x] of a scale
        height, width, colours = inputs.shape[1:]
        images = tf.reshape(tf.transpose(tf.cast(inputs, dtype), [0, 3, 2, 1]), [-1, 1, width, height])
        images = plane.reflected(images)
        spectrum = plane.spectrum(images)
        orders: list[list[tf.Tensor]] = [[plane.average(images)], [], []]
        for scale in range(self.scales):
            first = plane.moduli(spectrum, wavelets[scale])
            orders[1].append(plane.average(first))
            # One map at a time: all of the second order at once would take `angles` times the memory.
            for one in tf.split(first, self.angles, axis=1) if scale + 1 < self.scales else ():
                of_one = plane.spectrum(one)
                orders[2] += [plane.average(plane.moduli(of_one, coarser)) for coarser in wavelets[scale + 1 :]]
        found = tf.concat([each for order in orders for each in order], axis=1)  # [batch colours, K, rows, columns]
        found = tf.reshape(found, [-1, colours * self.coefficients, *found.shape[2:]])
        return tf.cast(tf.transpose(found, [0, 2, 3, 1]), self.compute_dtype)

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        """The output's shape, from that of the input."""
        batch, height, width, colours = input_shape
        step = 2**self.scales
        return (batch, height // step, width // step, colours * self.coefficients)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().get_config(), "scales": self.scales, "angles": self.angles}


def whitening(public_features: Any, epsilon: float = 0.1, name: str = "whitening") -> keras.layers.Dense:
    """A dense layer, not trainable, that takes correlations out of features as those of a public batch have them.

    Each channel is normalized to mean 0 and variance 1, as batch normalization with public statistics does, and then
    channels are decorrelated by the inverse root of their correlation matrix (ZCA-cor: Kessy, Lewin, Strimmer, "Optimal
    Whitening and Decorrelation", 2018, arXiv 1512.00809; within a network: Huang et al., "Decorrelated Batch
    Normalization", 2018, arXiv 1804.08450). Neighbouring scattering coefficients tell nearly the same, and gradient
    descent spends most of its noisy steps on what all have in common; whitened ones need a fraction of the steps.

    `public_features` must not be private: the layer's weights hold their statistics without noise. Made from public
    data, they cost no privacy. Values must be in the range of those that the layer will see.

    Examples:
      >>> import tf_dpbn
      >>> images = np.random.default_rng(0).random((20, 28, 28, 1), dtype="float32")  # private
      >>> leaves = tf_dpbn.public_data.dead_leaves((28, 28, 1), 32, seed=0)  # public; 256 are better
      >>> scattering = tf.keras.Sequential([tf.keras.Input((28, 28, 1)), tf_dpbn.features.Scattering2D()])
      >>> whitening = tf_dpbn.features.whitening(scattering.predict(leaves, verbose=0))
      >>> features = tf.keras.Sequential([scattering, whitening])
      >>> x = features.predict(images, verbose=0)
      >>> inputs = tf.keras.Input(x.shape[1:])
      >>> model = tf_dpbn.DPModel(inputs, tf.keras.layers.Dense(10)(tf.keras.layers.Flatten()(inputs)))
      >>> trained = tf_dpbn.to_stock(model)  # once `model` has been trained on x
      >>> whole = tf.keras.Model(features.inputs[0], trained(features.outputs[0]))  # from images to predictions

    Args:
      public_features: array [examples, ..., channels] of public examples, for example those of
        `tf_dpbn.public_data.dead_leaves` behind `Scattering2D`; statistics are taken over all axes but the last.
      epsilon: added to the eigenvalues of the correlation matrix, whose mean is 1; the smaller, the more do directions
        in which the public features hardly vary count.
      name: that of the layer.

    Returns:
      A built `keras.layers.Dense` from [..., channels] to [..., channels].

    Raises:
      ValueError, TypeError: if `public_features` are not finite numbers, or hold fewer values a channel than ten times
        the number of channels, or if `epsilon` is not positive.
    """
    features = public_data.validate_batch(public_features, name="public_features")
    _validate.positive("epsilon", epsilon)
    channels = features.shape[-1]
    values = features.reshape(-1, channels).astype(np.float64)
    if len(values) < 10 * channels:
        remedy = "The correlation matrix is read off them; generate more public examples."
        requirement = f"hold at least {10 * channels} values of each of its {channels} channels"
        raise _validate.argument_error("public_features", features.shape, requirement, remedy)
    mean = values.mean(axis=0)
    deviation = values.std(axis=0)
    deviation[deviation == 0] = 1.0  # constant in public: left as it is
    normalized = (values - mean) / deviation
    eigenvalues, vectors = np.linalg.eigh(normalized.T @ normalized / len(values))
    root = (vectors / np.sqrt(np.maximum(eigenvalues, 0) + epsilon)) @ vectors.T
    kernel = root / deviation[:, None]
    layer = keras.layers.Dense(channels, trainable=False, name=name)
    layer.build((None, channels))
    layer.set_weights([kernel, -mean @ kernel])
    return layer


class _Side(NamedTuple):
    """What is done along one side of the images: arrays or tensors whose first axes are contracted with a map."""

    reflect: Any  # [pixels, positions of a period]
    transform: Any  # [positions, part, part, frequencies]
    inverse: Any  # [frequencies, part, part, positions]
    average: Any  # [positions, every 2^scales-th pixel]

    def constants(self, dtype: tf.DType) -> _Side:
        return _Side(*(tf.constant(array, dtype) for array in self))


def _side(length: int, step: int) -> _Side:
    period = length + 2 * step
    positions = np.arange(period)
    inside = np.abs(positions - step)
    reflect = np.zeros((length, period))
    reflect[np.minimum(inside, 2 * (length - 1) - inside), positions] = 1.0
    transform = np.exp(-2j * math.pi / period * np.outer(positions, positions))
    distances = positions[:, None] - (step + np.arange(0, length, step))
    average = sum(_gaussian(distances + turn * period, 0.4 * step) for turn in (-1, 0, 1))
    return _Side(reflect, _real_form(transform), _real_form(transform.conj() / period), average)


class _Plane(NamedTuple):
    """Convolutions of maps, by both of their sides.

    Maps have the axes b, k, w, h: example and colour, number of the map, column, row. Their spectra have b, k, y, c, x:
    frequencies y down and x across, and between them c, real and imaginary part. Each method contracts the last axis by
    one large product, and the other after a transposition.
    """

    down: _Side
    across: _Side

    def reflected(self, images: tf.Tensor) -> tf.Tensor:
        images = tf.einsum("bkwh,hp->bkwp", images, self.down.reflect)
        return tf.einsum("bkwh,wp->bkph", images, self.across.reflect)

    def spectrum(self, maps: tf.Tensor) -> tf.Tensor:
        half = tf.einsum("bkwh,hcy->bkwcy", maps, self.down.transform[:, 0])
        return tf.einsum("bkwcy,wcdx->bkydx", half, self.across.transform)

    def moduli(self, spectrum: tf.Tensor, wavelets: tf.Tensor) -> tf.Tensor:
        """|map * psi| of one map's spectrum and each of k wavelets [k, y, 1, x]: [b, k, w, h]."""
        half = tf.einsum("bkycx,xcdw->bkydw", spectrum * wavelets, self.across.inverse)
        parts = tf.einsum("bkycw,ycdh->bkwdh", half, self.down.inverse)
        return tf.sqrt(tf.maximum(tf.reduce_sum(tf.square(parts), axis=3), _TINY))

    def average(self, maps: tf.Tensor) -> tf.Tensor:
        """map * phi at every 2^scales-th pixel of the image: [b, k, rows, columns]."""
        half = tf.einsum("bkwh,hr->bkwr", maps, self.down.average)
        return tf.einsum("bkwr,wc->bkrc", half, self.across.average)


def _real_form(matrix: np.ndarray) -> np.ndarray:
    """A complex [n, m] matrix as a real [n, 2, 2, m] one: from real and imaginary part to real and imaginary part."""
    rows = [[matrix.real, matrix.imag], [-matrix.imag, matrix.real]]
    return np.asarray(rows).transpose(2, 0, 1, 3)


def _gaussian(distances: np.ndarray, deviation: float) -> np.ndarray:
    return np.exp(-0.5 * np.square(distances / deviation)) / (math.sqrt(2 * math.pi) * deviation)


def _wavelets(height: int, width: int, scales: int, angles: int) -> np.ndarray:
    """Fourier transforms [scales, angles, height, width] of the wavelets, sampled at pixels and made periodic; real.

    The transform of a sampled function is the sum of the function's own transform and of its copies 2 pi apart.
    """
    down = 2 * math.pi * np.fft.fftfreq(height)[:, None]
    across = 2 * math.pi * np.fft.fftfreq(width)
    turn = (math.pi / angles * np.arange(angles))[:, None, None]
    reach = 1 + math.ceil(9 / (2 * math.pi * 0.8 * min(1, angles / 4)))  # beyond, the copies are below exp(-40)
    copies = 2 * math.pi * np.arange(-reach, reach + 1)

    def gabor(frequency: float, deviation: float) -> np.ndarray:
        total = np.zeros((angles, height, width))
        for y, x in itertools.product(copies, copies):
            along = np.cos(turn) * (down + y) + np.sin(turn) * (across + x) - frequency
            beside = np.cos(turn) * (across + x) - np.sin(turn) * (down + y)
            total += np.exp(-0.5 * deviation**2 * (np.square(along) + np.square(angles / 4 * beside)))
        return total

    found = []
    for scale in range(scales):
        wave, gaussian = (gabor(frequency, 0.8 * 2**scale) for frequency in (0.75 * math.pi / 2**scale, 0.0))
        found.append(wave - gaussian * (wave[:, :1, :1] / gaussian[:, :1, :1]))
    return np.stack(found)
