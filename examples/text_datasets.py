"""Text classification data for the examples: docstrings of installed packages, TensorFlow Datasets.

"docstrings" asks of which of six libraries a piece of documentation is. The texts are those of the packages that are
installed here (each comes with one that tf_dpbn or its `examples` extra needs), read from their source files, so that
nothing is downloaded or run. Other versions of the packages hold slightly other texts.

Words become numbers by a fixed hash and not by a vocabulary of the training text: which words such a vocabulary holds,
and in which order, is computed from private documents, and no noise of the training covers it.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import pathlib
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

import datasets

NAMES = ("docstrings", "imdb_reviews")
LIBRARIES = ("keras", "matplotlib", "numpy", "pandas", "scipy", "sklearn")
PADDING, NAME = 0, 1  # tokens of what is not there, and of what would tell the library by its name

_FEWEST_WORDS = 8  # shorter texts ("See base class.") say nothing
_TEST_FRACTION = 0.2
_REMEDY = "Check the connection, or take --dataset=docstrings, which needs no download."
_WORDS = re.compile("[a-z]+")
_LIBRARY_NAMES = frozenset((*LIBRARIES, "np", "pd", "plt", "mpl", "pyplot", "scikit", "learn", "tf", "tensorflow"))
_NO_DOCUMENTATION = re.compile(r"_?(tests?|testing|conftest|extern.*|.*vendor.*|array_api_.*|site-packages)(\.py)?")


def load(name: str, words: int, buckets: int, seed: int = 0, data_dir: str | None = None) -> datasets.Dataset:
    """Loads a data set.

    Args:
      name: one of NAMES.
      words: how many words of a text are kept, its first ones.
      buckets: how many numbers there are, see `tokenize`.
      seed: shuffles "docstrings" before their split; "imdb_reviews" comes split.
      data_dir: where TensorFlow Datasets keeps "imdb_reviews"; None for its usual place.

    Returns:
      int32 tokens [documents, words] and int32 labels [documents]. An example, of which privacy is about, is one
      document.

    Raises:
      ValueError: an unknown name.
      RuntimeError: a package is missing, or the download fails.
    """
    if name not in NAMES:
        raise ValueError(f"`name` must be one of {', '.join(NAMES)}. Received: name={name!r}")
    if name == "imdb_reviews":
        train, test = datasets.tfds_arrays(name, _REMEDY, data_dir)
        x_train, x_test = (
            tokenize([text.decode("utf-8", "replace") for text in texts], words, buckets) for texts, _ in (train, test)
        )
        return datasets.Dataset(x_train, train[1].astype("int32"), x_test, test[1].astype("int32"))
    texts, labels = _labelled_docstrings(LIBRARIES)
    order = np.random.default_rng(seed).permutation(len(texts))
    x, y = tokenize(texts, words, buckets)[order], np.array(labels, "int32")[order]
    train_size = len(x) - int(_TEST_FRACTION * len(x))
    return datasets.Dataset(x[:train_size], y[:train_size], x[train_size:], y[train_size:])


def public_documents(count: int, words: int, buckets: int, seed: int = 0) -> np.ndarray:
    """Docstrings of Python's standard library: public text, of no class of either data set. int32 [count, words].

    Raises:
      ValueError: if there are fewer than `count`.
    """
    texts = docstrings(pathlib.Path(sysconfig.get_path("stdlib")))
    if count > len(texts):
        raise ValueError(f"The standard library has {len(texts)} docstrings. Received: count={count}")
    chosen = np.random.default_rng(seed).choice(len(texts), count, replace=False)
    return tokenize([texts[index] for index in chosen], words, buckets)


def random_documents(count: int, words: int, buckets: int, seed: int = 0) -> np.ndarray:
    """Synthetic documents of random lengths whose tokens are drawn from Zipf's distribution. int32 [count, words]."""
    rng = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, buckets - 1)
    frequent = NAME + 1 + rng.permutation(buckets - 2)  # the hash spreads frequent words over all numbers
    tokens = rng.choice(frequent, (count, words), p=weights / weights.sum())
    there = np.arange(words) < rng.integers(_FEWEST_WORDS, words + 1, (count, 1))
    return np.where(there, tokens, PADDING).astype("int32")


def tokenize(texts: Sequence[str], words: int, buckets: int) -> np.ndarray:
    """Numbers of the first words of each text, int32 [texts, words], with PADDING behind.

    Words are runs of letters a to z in lower case. A word's number is CRC-32 of it, modulo what is left of `buckets`;
    names of the libraries all get NAME. No text affects another one's numbers.

    Raises:
      ValueError: for less than three buckets.
    """
    if buckets < 3:
        raise ValueError(f"`buckets` must be at least 3. Received: buckets={buckets}")
    tokens = np.full((len(texts), words), PADDING, "int32")
    for row, text in zip(tokens, texts, strict=True):
        found = _WORDS.findall(text.lower())[:words]
        row[: len(found)] = [_number(word, buckets) for word in found]
    return tokens


def _number(word: str, buckets: int) -> int:
    return NAME if word in _LIBRARY_NAMES else NAME + 1 + zlib.crc32(word.encode()) % (buckets - 2)


def _labelled_docstrings(libraries: tuple[str, ...]) -> tuple[list[str], list[int]]:
    """Texts and the index of the library of each; a text that several libraries have goes to the first."""
    label_of: dict[str, int] = {}
    for label, library in enumerate(libraries):
        spec = importlib.util.find_spec(library)
        if spec is None or not spec.submodule_search_locations:
            raise RuntimeError(f"The data set 'docstrings' needs the package {library}: pip install mlxtend tensorflow")
        for text in docstrings(pathlib.Path(spec.submodule_search_locations[0])):
            label_of.setdefault(text, label)
    return list(label_of), list(label_of.values())


@functools.cache  # takes seconds
def docstrings(folder: pathlib.Path) -> tuple[str, ...]:
    """The different docstrings of functions and classes below a folder, in order; without tests and vendored code."""
    texts: dict[str, None] = {}
    for path in sorted(folder.rglob("*.py")):
        if not any(_NO_DOCUMENTATION.fullmatch(part) for part in path.relative_to(folder).parts):
            texts.update(dict.fromkeys(_docstrings_of(path)))
    return tuple(texts)


def _docstrings_of(path: pathlib.Path) -> Iterable[str]:
    """Docstrings of at least _FEWEST_WORDS words; none where the file is not Python of this version."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            text = ast.get_docstring(node)
            if text and len(_WORDS.findall(text.lower())) >= _FEWEST_WORDS:
                yield text
