"""Trains a text classifier with BatchNormalization with differential privacy.

By default the texts are docstrings of six Python libraries, as the installed packages ship them, and the task is to say
which library one is of; names of the libraries are masked. About 15,400 documents, four fifths to train on; the largest
class is a fifth of them. These texts are public, of course: they stand for private ones of that size.

    python examples/text.py --epsilon=3 --normalization=batch
    python examples/text.py --dataset=imdb_reviews    # 25,000 film reviews; TensorFlow Datasets downloads them

An example is one document: the guarantee is that of adding or removing one, whatever its words. Who wrote several
documents has a weaker one, and so has what several documents say.

Nothing but the training itself may look at private text. A vocabulary of its words, say their frequencies or an IDF
weight, would be computed from it without noise and is a classic leak; here a word's number is a fixed hash of it. The
public batch, from which normalization takes its statistics, is docstrings of Python's standard library, or random
tokens if --public_batch=random.

Output is that of mnist.py: accuracy and epsilon by epoch, the privacy statement, a plot, a SavedModel (its input are
tokens, see text_datasets.tokenize) and a last line of JSON. Accuracy is that of documents that are not trained on, and
carries no noise: validation on private data is outside the guarantee.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf
from absl import app, flags

import command_line
import mnist
import text_datasets
import tf_dpbn

keras = tf.keras
layers = tf.keras.layers

NORMALIZATIONS = ("batch", "group", "layer", "none")
PUBLIC_BATCHES = {"standard_library": text_datasets.public_documents, "random": text_datasets.random_documents}
_GROUPS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(mnist.Config):
    """One training. See the flags, which have the same names."""

    dataset: str = "docstrings"
    l2_norm_clip: float = 0.5
    learning_rate: float = 1.0
    epochs: int = 20
    batch_size: int = 1024
    public_batch: str = "standard_library"
    words: int = 64
    buckets: int = 2048
    width: int = 32
    output_dir: str = "text_output"


def run(config: Config) -> dict[str, Any]:
    """Trains, writes plot and SavedModel, and returns what the JSON line holds."""
    keras.utils.set_random_seed(config.seed)  # initial weights; privacy noise does not obey it
    data = text_datasets.load(config.dataset, config.words, config.buckets, config.seed, config.data_dir)
    data = data.first(config.max_examples)
    plan = mnist.make_plan(config, len(data.x_train))
    return mnist.train_and_report(make_model(config, int(data.y_test.max()) + 1), plan, data, config)


def make_model(config: Config, classes: int) -> tf_dpbn.DPModel:
    """Embedding, convolution over words, the mean of its features over the text, a dense layer; gives logits."""
    normalize = normalization(config.normalization, config.statistics)
    inputs = layers.Input((config.words,), dtype="int32")
    x = layers.Embedding(config.buckets, config.width)(inputs)
    x = layers.Conv1D(2 * config.width, 3, padding="same")(x)
    x = layers.ReLU()(normalize(x))
    x = layers.GlobalAveragePooling1D()(x)
    x = layers.Dense(config.width)(x)
    x = layers.ReLU()(normalize(x))
    model = tf_dpbn.DPModel(inputs, layers.Dense(classes)(x))
    if config.normalization == "batch" and config.statistics != "noised":
        # Public whatever they are trained with: packages hold copies of docstrings of the standard library.
        model.set_public_batch(make_public_batch(config), may_contain_training_rows=True)
    return model


def make_public_batch(config: Config) -> np.ndarray:
    """Tokens of public documents, int32 [public_batch_size, words]."""
    return PUBLIC_BATCHES[config.public_batch](config.public_batch_size, config.words, config.buckets, config.seed)


def normalization(kind: str, statistics: str = "public") -> Any:
    """A function that puts a new normalization layer of this kind on a tensor, channels last.

    Raises:
      ValueError: for a kind that is not in NORMALIZATIONS.
    """
    makers = {
        "batch": lambda: tf_dpbn.DPBatchNormalization(statistics=statistics),
        "group": lambda: layers.GroupNormalization(_GROUPS),
        "layer": lambda: layers.LayerNormalization(),
        "none": lambda: layers.Activation("linear"),
    }
    if kind not in makers:
        raise ValueError(f"`normalization` must be one of {', '.join(NORMALIZATIONS)}. Received: {kind!r}")
    return lambda x: makers[kind]()(x)


def define_flags() -> None:
    """Defines one flag for each field of Config."""
    defaults = Config()
    flags.DEFINE_enum("dataset", defaults.dataset, text_datasets.NAMES, "What to train on.")
    flags.DEFINE_string("data_dir", None, "Where TensorFlow Datasets keeps imdb_reviews, if not in its usual place.")
    flags.DEFINE_enum(
        "normalization",
        defaults.normalization,
        NORMALIZATIONS,
        "batch: DPBatchNormalization; group: GroupNormalization; layer: LayerNormalization; or none.",
    )
    flags.DEFINE_enum(
        "public_batch",
        defaults.public_batch,
        list(PUBLIC_BATCHES),
        "Public documents from which batch statistics are computed: of Python's standard library, or random tokens.",
    )
    flags.DEFINE_integer("words", defaults.words, "How many words of a document are read.", lower_bound=1)
    flags.DEFINE_integer("buckets", defaults.buckets, "How many numbers the hash of words has.", lower_bound=3)
    flags.DEFINE_integer("width", defaults.width, "Size of a word's embedding; a multiple of 8.", lower_bound=8)
    mnist.define_statistics_flag(defaults)
    mnist.define_training_flags(defaults)
    flags.adopt_module_key_flags(mnist)  # shows them in --help


main = command_line.runner(Config, run)


if __name__ == "__main__":
    define_flags()
    app.run(main)
