"""What the audits of tests audit: a step of a small model, and the training of another one."""

import functools

import numpy as np

import tf_dpbn
from tests import helpers
from tf_dpbn import accounting, auditing
from tf_dpbn._keras import keras

layers = keras.layers
DELTA = 1e-5


@functools.cache
def noise_multiplier(claim):
    """Of one step of everything that has epsilon `claim`."""
    return accounting.calibrate_noise_multiplier(
        target_epsilon=claim, delta=DELTA, sampling_probability=1.0, steps=1, accountant="pld"
    )


def stepping_model(claim, mode="public", seed=0):
    """A compiled model with its batch; the first row's gradient is clipped."""
    inputs = keras.Input((4,))
    x = layers.Activation("tanh")(tf_dpbn.DPBatchNormalization(statistics=mode)(layers.Dense(3)(inputs)))
    model = tf_dpbn.DPModel(inputs, layers.Dense(3)(x))
    helpers.randomize(model)
    rng = np.random.default_rng(0)
    model.set_public_batch(rng.normal(size=(9, 4)).astype("float32"))
    optimizer = helpers.dp_optimizer(noise_multiplier=noise_multiplier(claim), l2_norm_clip=0.1, noise_seed=seed)
    helpers.compiled(model, optimizer=optimizer)
    x, y = rng.normal(size=(6, 4)).astype("float32"), rng.integers(0, 3, 6)
    x[0] *= 100.0
    return model, x, y


def training(claim, seed=0, noise=1.0, noise_seed=0, clip=0.5):
    """Trains on random vectors with random labels, whose gradients are nearly orthogonal."""
    rng, rows, examples, features = np.random.default_rng(seed), 340, 40, 400
    keras.utils.set_random_seed(seed)
    given = dict(target_epsilon=claim, delta=DELTA, epochs=2, accountant="pld")
    plan = tf_dpbn.PrivacyPlan(**given, num_examples=rows, expected_batch_size=rows // 2)
    inputs = keras.Input((features,))
    x = tf_dpbn.DPBatchNormalization()(layers.Dense(4)(inputs))
    model = tf_dpbn.DPModel(inputs, layers.Dense(3)(layers.Activation("tanh")(x)))
    model.set_public_batch(rng.normal(size=(9, features)).astype("float32"))
    optimizer = tf_dpbn.optimizers.VectorizedDPKerasSGDOptimizer.from_plan(
        plan, l2_norm_clip=clip, learning_rate=0.5, noise_seed=noise_seed
    )
    if noise != 1.0:
        draw = optimizer._noise_source.standard_normal
        optimizer._noise_source.standard_normal = lambda shapes: [noise * each for each in draw(shapes)]
    helpers.compiled(model, optimizer=optimizer)
    x, y = rng.normal(size=(rows, features)).astype("float32"), rng.integers(0, 3, rows)
    data = x[:examples], y[:examples], x[examples:], y[examples:]
    return auditing.audit_training(model, *data, plan, seed=seed), model, data
