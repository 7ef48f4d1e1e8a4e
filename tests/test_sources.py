"""Data sets that are read one example at a time: files, sources with random access, TFRecords."""

from __future__ import annotations

import gc
import math
import pickle
import threading
import time
import weakref

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests.helpers import small_dataset
from tf_dpbn._keras import keras
from tf_dpbn.sampling import index_tfrecords, poisson_dataset, source_of

SIZES = {"expected_batch_size": 6, "max_batch_size": 16, "steps_per_epoch": 5, "seed": 3}


class Pairs:
    """A source of (inputs, labels), as torch's data sets are; counts who reads what."""

    def __init__(self, count=40):
        self.count, self.read, self.threads = count, [], set()

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        assert isinstance(number, int) and number >= 0  # padding is no example
        self.read.append(number)
        self.threads.add(threading.get_ident())
        time.sleep(0.001)
        return np.full((2, 3), number + 1, "float32"), number + 1


class Elements(Pairs):
    """A source of dictionaries that reads many at a time, as Hugging Face's and TFDS' do."""

    def __getitem__(self, number):
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers):
        return [{"image": np.full((2, 3), k + 1, "uint8"), "label": k + 1, "text": f"é{k + 1}"} for k in numbers]


def check_batches(dataset, count=40):
    """Row by row inputs, labels and weights belong to one example, padding is zero, and the draws are those of arrays.

    Returns the element spec of inputs.
    """
    numbers = np.arange(count) + 1
    of_arrays = poisson_dataset(numbers, numbers, **SIZES)
    drawn = 0
    for (x, y, weight), (_, expected, _) in zip(
        dataset.as_numpy_iterator(), of_arrays.as_numpy_iterator(), strict=True
    ):
        np.testing.assert_array_equal(y, expected)
        np.testing.assert_array_equal(weight, (y > 0).astype("float32"))
        for leaf in tf.nest.flatten(x):
            if leaf.dtype == object:
                assert leaf.tolist() == [f"é{k}".encode() if k else b"" for k in y]
            else:
                np.testing.assert_array_equal(
                    leaf, np.broadcast_to(y.reshape([-1] + [1] * (leaf.ndim - 1)), leaf.shape)
                )
        drawn += int(weight.sum())
    assert drawn > 0 and source_of(dataset).sampling == source_of(of_arrays).sampling
    return dataset.element_spec[0]


def test_source_of_pairs_is_read_by_several_threads_and_only_as_it_is_drawn():
    source = Pairs()
    dataset = poisson_dataset(source, **SIZES)
    assert source.read == [0]  # to see what examples are like
    assert check_batches(dataset) == tf.TensorSpec([16, 2, 3], tf.float32)
    assert len(source.threads) > 1
    assert source_of(dataset).labels is None and not source_of(dataset).has_weights


def test_elements_become_examples_by_load_many_at_a_time():
    def load(element):
        return {"image": element["image"], "text": element["text"]}, element["label"]

    source = Elements()
    spec = check_batches(poisson_dataset(source, load=load, **SIZES))
    assert spec == {"image": tf.TensorSpec([16, 2, 3], tf.uint8), "text": tf.TensorSpec([16], tf.string)}
    assert not source.read


def test_weights_of_elements_count():
    dataset = poisson_dataset(range(1, 41), load=lambda k: (k, k, k / 2), **SIZES)
    assert source_of(dataset).has_weights
    for x, _, weight in dataset.as_numpy_iterator():
        np.testing.assert_array_equal(weight, (x / 2).astype("float32"))
    dataset = poisson_dataset(range(1, 41), load=lambda k: (k, k, math.inf if k > 1 else 1.0), **SIZES)
    with pytest.raises(tf.errors.InvalidArgumentError, match="`load` must make finite weights"):
        list(dataset)


def test_pictures_are_read_by_their_names(tmp_path):
    paths = []
    for k in range(40):
        paths.append(str(tmp_path / f"{k}.png"))
        Image.new("L", (5, 4), k + 1).save(paths[-1])
    readers = (
        lambda path: np.asarray(Image.open(path))[..., None],
        lambda path: tf.io.decode_png(tf.io.read_file(path)),
    )
    for read in readers:
        spec = check_batches(poisson_dataset(paths, np.arange(40) + 1, load=read, **SIZES))
        assert spec == tf.TensorSpec([16, 4, 5, 1], tf.uint8)


def test_rows_of_frames_are_elements_and_columns_are_inputs():
    pandas = pytest.importorskip("pandas")
    numbers = np.arange(40) + 1
    frame = pandas.DataFrame({"a": numbers, "text": [f"é{k}" for k in numbers]}, index=numbers + 100)
    check_batches(poisson_dataset(frame, load=lambda row: ((row["a"], row["text"]), row["a"]), **SIZES))
    spec = check_batches(poisson_dataset(dict(frame), frame["a"], **SIZES))
    assert spec == {"a": tf.TensorSpec([16], tf.int64), "text": tf.TensorSpec([16], tf.string)}


def test_tfrecords_are_drawn_by_an_index(tmp_path, capsys):
    for shard in range(3):
        with tf.io.TFRecordWriter(str(tmp_path / f"train-{shard}")) as writer:
            for k in range(14 * shard, min(40, 14 * (shard + 1))):
                feature = tf.train.Feature(int64_list=tf.train.Int64List(value=[k + 1]))
                writer.write(tf.train.Example(features=tf.train.Features(feature={"k": feature})).SerializeToString())

    def load(record):
        k = tf.io.parse_single_example(record, {"k": tf.io.FixedLenFeature([], tf.int64)})["k"]
        return k, k

    records = index_tfrecords(str(tmp_path / "train-*"))
    assert "3/3" in capsys.readouterr().out and len(records) == 40
    check_batches(poisson_dataset(pickle.loads(pickle.dumps(records)), load=load, **SIZES))
    with tf.io.TFRecordWriter(str(tmp_path / "packed"), "GZIP") as writer:
        writer.write(b"1")
    whole = (tmp_path / "train-0").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-1])
    (tmp_path / "empty").write_bytes(b"")
    for name in ("packed", "cut"):
        with pytest.raises(ValueError, match=f"uncompressed, complete TFRecord.*{name}"):
            index_tfrecords([str(tmp_path / name)], verbose=False)
    with pytest.raises(ValueError, match="hold at least one record"):
        index_tfrecords([str(tmp_path / "empty")], verbose=False)
    with pytest.raises(ValueError, match="name at least one file"):
        index_tfrecords(str(tmp_path / "test-*"))


def test_source_is_not_kept():
    source = Pairs()
    dataset = poisson_dataset(source, **SIZES)
    next(iter(dataset))
    kept = weakref.ref(source)
    del source, dataset
    gc.collect()
    assert kept() is None


class Batches(keras.utils.Sequence):
    def __len__(self):
        return 3

    def __getitem__(self, number):
        return np.zeros([4, 2]), np.zeros(4)


@pytest.mark.parametrize(
    "arguments,load,error,message",
    [
        ((tf.data.Dataset.range(9),), None, TypeError, "`x` must give random access to examples.*index_tfrecords"),
        ((Batches(),), None, TypeError, "The elements of this one are batches"),
        ((np.zeros(9), tf.data.Dataset.range(9)), None, TypeError, "`y` must give random access"),
        (({"a": np.zeros(9)},), lambda k: (k, k), TypeError, "`x` must be a sequence of elements.*dict"),
        ((range(9),), None, ValueError, r"`load` must make \(inputs, labels\).*TensorSpec"),
        ((range(0),), lambda k: (k, k), ValueError, "at least 1 example"),
        ((range(9), np.zeros(8)), None, ValueError, r"same number of examples.*\[9, 8\]"),
        ((range(9), None, np.ones(9)), lambda k: (k, k), ValueError, "`sample_weight` must be left out where y is"),
        ((range(9),), lambda k: (k, None), TypeError, "`load` must make dense arrays.*NoneType of example 0"),
        ((range(9),), lambda k: ([[1], []], k), TypeError, "`load` must make dense arrays.*list of example 0"),
        ((range(9),), lambda k: (np.datetime64("2020"), k), TypeError, "dense arrays.*datetime64 of example 0"),
    ],
)
def test_bad_sources_are_refused(arguments, load, error, message):
    with pytest.raises(error, match=message):
        poisson_dataset(*arguments, load=load, expected_batch_size=4, max_batch_size=8)


@pytest.mark.parametrize(
    "load,found",
    [
        (lambda k: (np.zeros(2 + (k > 0)), k), r"float64\[3\]"),
        (lambda k: (np.zeros(2, "uint8" if k else "float64"), k), r"uint8\[2\]"),
        (lambda k: ({"b" if k else "a": np.zeros(2)}, k), "'b'"),
    ],
)
def test_examples_unlike_the_first_are_named_as_they_are_read(load, found):
    dataset = poisson_dataset(range(9), load=load, expected_batch_size=9, max_batch_size=9)
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"make every example like the first.*{found}.*of example"):
        list(dataset)


# Data sets that are derived.


def normalized(x, y, weight):
    return tf.cast(x, tf.float32) / 255.0, tf.one_hot(y, 10), weight


def test_map_by_rows_keeps_the_source():
    dataset = small_dataset()
    for derived in (dataset.map(normalized), dataset.map(normalized, num_parallel_calls=2).prefetch(1)):
        assert source_of(derived).sampling is source_of(dataset).sampling
        assert source_of(derived).labels is None


@pytest.mark.parametrize(
    "change",
    [
        lambda x, y, weight: (tf.cast(x, tf.float32) - tf.reduce_mean(tf.cast(x, tf.float32)), y, weight),
        lambda x, y, weight: (x[::-1], y, weight),
        lambda x, y, weight: (x, y, 2.0 * weight),
        lambda x, y, weight: (x, y, tf.ones_like(weight)),
        lambda x, y, weight: (tf.numpy_function(lambda x: x, [x], x.dtype), y, weight),
        lambda x, y, weight: (x, {"a": y, "b": y}, {"a": tf.ones_like(weight), "b": weight}),
        lambda x, y, weight: (x, weight, None),
        lambda x, y, weight: (x, y),
        lambda x, y, weight: {"x": x, "y": y, "weight": weight},
    ],
)
def test_map_that_may_mix_rows_or_changes_weights_loses_the_source(change):
    assert source_of(small_dataset().map(change)) is None


def test_map_in_any_order_loses_the_source():
    assert source_of(small_dataset().map(normalized, num_parallel_calls=2, deterministic=False)) is None
