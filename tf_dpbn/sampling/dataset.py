"""Padded `tf.data` datasets of Poisson-sampled batches, of one fixed shape; see `draws` for their distribution."""

from __future__ import annotations

import dataclasses
import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tf_dpbn import _validate, accounting, augmentation
from tf_dpbn.sampling.draws import PoissonSampling, SharedDraws, checked_seed, digest_of, draws, seed_sequence

_SOURCE_ATTRIBUTE = "tf_dpbn_source"
_TRANSPARENT = ("_OptionsDataset", "_PrefetchDataset")  # of TensorFlow; by another name they lose the source


@dataclass(frozen=True, kw_only=True, eq=False)
class PoissonSource:
    """Where the batches of a dataset come from.

    Attributes:
      sampling: the distribution of the batches.
      inputs, labels: the private inputs and labels as they were given to `poisson_dataset`.
      sample_weight: likewise, or None: the weights of batches then only tell examples from padding.
      augmentation_multiplicity: how many augmented copies of each example a batch holds, on an axis of their own; 1
        where there is no such axis.
      draws: under MultiWorkerMirroredStrategy what keeps the workers' draws alike; otherwise None.
      plan: the plan whose dataset it is, or None.
    """

    sampling: PoissonSampling
    inputs: Any
    labels: Any
    sample_weight: Any = None
    augmentation_multiplicity: int = 1
    draws: SharedDraws | None = None
    plan: PrivacyPlan | None = None


def poisson_dataset(
    x: Any,
    y: Any,
    sample_weight: Any = None,
    *,
    expected_batch_size: int,
    max_batch_size: int,
    steps_per_epoch: int | None = None,
    augment: Callable[[Any], Any] | None = None,
    augmentation_multiplicity: int = 1,
    seed: int | None = None,
) -> tf.data.Dataset:
    """Builds a dataset of Poisson-sampled batches of one fixed shape.

    Build it within the scope of the distribution strategy it is for, if any. Every iteration over the dataset makes
    fresh draws. The dataset carries what it is, readable by `source_of`, and so does one derived from it by `prefetch`
    or `with_options`. Others (cache, map, repeat) do not, since their distribution may be another: `DPModel.fit` takes
    them with a warning.

    Args:
      x: inputs, an array [N, ...] or a nest (dict, tuple, list) of such arrays. Lists become tuples. Rows of numeric
        numpy arrays, memory-mapped ones included, are read as they are drawn, without a copy of the whole: do not
        change the arrays while you train.
      y: labels, likewise.
      sample_weight: one array [N] or [N, ...] of finite weights, or None for weights of 1. Weight 0 is padding.
      expected_batch_size: mean number B of examples in a batch; the sampling probability is B / N.
      max_batch_size: rows M of every batch, at least B; see `accounting.default_max_batch_size`.
      steps_per_epoch: draws in one iteration; None takes ceil(N / B).
      augment: maps one example's inputs to augmented ones of the same shapes, at random, without state; see
        `augmentation`.
      augmentation_multiplicity: how many augmented copies K of each example to make; the number given to
        `DPModel.compile`. With K > 1 inputs are [M, K, ...].
      seed: whole number that fixes the draws of all iterations, in order; see `poisson_indices`.

    Returns:
      A dataset of (x, y, weight) with rows [M, ...]; the weight is float32 [M] or [M, ...]. Padding rows are zeros
      (empty strings) with weight 0.

    Raises:
      ValueError: arrays of different or no lengths, non-finite weights, B > N, M < B, or a bad count or seed.
      TypeError: `x`, `y` or `sample_weight` holds something that is no dense array.
    """
    data = _as_arrays("x", x), _as_arrays("y", y)
    num_examples = _common_length(*data)
    expected = _validate.positive_int("expected_batch_size", expected_batch_size)
    if expected > num_examples:
        requirement = f"be at most the number of examples, {num_examples}"
        raise _validate.argument_error("expected_batch_size", expected, requirement)
    if _validate.positive_int("max_batch_size", max_batch_size) < expected:
        requirement = f"be at least `expected_batch_size`, {expected}"
        remedy = "`accounting.default_max_batch_size` gives one that draws seldom exceed."
        raise _validate.argument_error("max_batch_size", max_batch_size, requirement, remedy)
    sampling = PoissonSampling(
        num_examples=num_examples,
        sampling_probability=expected / num_examples,
        max_batch_size=max_batch_size,
        steps_per_epoch=math.ceil(num_examples / expected) if steps_per_epoch is None else steps_per_epoch,
        replicas=tf.distribute.get_strategy().num_replicas_in_sync,
    )
    multiplicity = _validate.positive_int("augmentation_multiplicity", augmentation_multiplicity)
    if multiplicity > 1 and augment is None:
        remedy = "Without it all copies would be the same: see tf_dpbn.augmentation."
        raise _validate.argument_error("augment", None, "be given with augmentation_multiplicity", remedy)
    weights = _weights(sample_weight, num_examples)
    seed, draws = checked_seed(seed), None
    if isinstance(tf.distribute.get_strategy(), tf.distribute.MultiWorkerMirroredStrategy):
        arrays = tf.nest.flatten((*data, weights))
        draws = SharedDraws(seed, digest_of([*arrays, np.array(dataclasses.astuple(sampling))]))
    dataset = _index_dataset(sampling, seed, draws)
    gatherer = _RowGatherer((*data, weights))
    dataset = dataset.map(gatherer.gather, num_parallel_calls=tf.data.AUTOTUNE)
    dataset.tf_dpbn_gatherer = gatherer  # kept, with the arrays
    if augment is not None:

        def augmented(x: Any, y: Any, weight: tf.Tensor) -> tuple:
            made = augmentation.copies(augment, multiplicity, x)
            return (made if multiplicity > 1 else tf.nest.map_structure(lambda t: t[:, 0], made)), y, weight

        dataset = dataset.map(augmented, num_parallel_calls=tf.data.AUTOTUNE)
    options = tf.data.Options()  # of one draw, each worker takes its own rows
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    dataset = dataset.prefetch(tf.data.AUTOTUNE).with_options(options)
    source = PoissonSource(
        sampling=sampling,
        inputs=x,
        labels=y,
        sample_weight=sample_weight,
        augmentation_multiplicity=multiplicity,
        draws=draws,
    )
    setattr(dataset, _SOURCE_ATTRIBUTE, source)
    return dataset


class PrivacyPlan(accounting.PrivacyPlan):
    """A training run planned for a privacy budget, with its datasets; fields as in `accounting.PrivacyPlan`."""

    def poisson_dataset(self, x: Any, y: Any, sample_weight: Any = None, **options: Any) -> tf.data.Dataset:
        """Builds the plan's dataset of Poisson-sampled batches.

        Args:
          x, y, sample_weight: as for `sampling.poisson_dataset`, with exactly `num_examples` examples.
          **options: `augment`, `augmentation_multiplicity` and `seed`, as for `sampling.poisson_dataset`; leave the
            seed out when training for privacy.

        Returns:
          A dataset of `steps_per_epoch` draws (x, y, weight) of `max_batch_size` rows.

        Raises:
          ValueError, TypeError: as `sampling.poisson_dataset`; also if the data does not have `num_examples` examples:
            the plan's epsilon would be that of another data set.
        """
        length = _common_length(_as_arrays("x", x), _as_arrays("y", y))
        if length != self.num_examples:
            requirement = f"have the plan's num_examples={self.num_examples} examples"
            remedy = "Plan anew: dataclasses.replace(plan, num_examples=...)."
            raise _validate.argument_error("x, y", length, requirement, remedy)
        assert self.max_batch_size is not None  # filled in when the plan was made
        dataset = poisson_dataset(
            x,
            y,
            sample_weight,
            expected_batch_size=self.expected_batch_size,
            max_batch_size=self.max_batch_size,
            steps_per_epoch=self.steps_per_epoch,
            **options,
        )
        setattr(dataset, _SOURCE_ATTRIBUTE, dataclasses.replace(getattr(dataset, _SOURCE_ATTRIBUTE), plan=self))
        return dataset


def source_of(dataset: Any) -> PoissonSource | None:
    """Returns what `poisson_dataset` noted on `dataset`, or None if it is not such a dataset.

    Prefetching and options change no batch, unless the options let each worker have all rows, or another order.
    """
    inner = dataset
    while type(inner).__name__ in _TRANSPARENT and not hasattr(inner, _SOURCE_ATTRIBUTE):
        inner = inner._input_dataset
    source = getattr(inner, _SOURCE_ATTRIBUTE, None)
    if not isinstance(source, PoissonSource):
        return None
    options = dataset.options()
    by_rows = options.experimental_distribute.auto_shard_policy == tf.data.experimental.AutoShardPolicy.DATA
    return source if by_rows and options.deterministic is not False else None


def source_behind(dataset: Any) -> PoissonSource | None:
    """Returns what `poisson_dataset` noted on a dataset from which `dataset` was derived, in whatever way, or None."""
    source = getattr(dataset, _SOURCE_ATTRIBUTE, None)
    if isinstance(source, PoissonSource) or not isinstance(dataset, tf.data.Dataset):
        return source if isinstance(source, PoissonSource) else None
    return next((found for each in dataset._inputs() if (found := source_behind(each))), None)


def real_example_mask(sample_weight: Any) -> tf.Tensor:
    """Tells examples from padding by their weights, [batch] or [batch, ...].

    Returns:
      A bool tensor [batch]: False where the weight is exactly 0, in all places of the row if it has several. NaN counts
      as an example.

    Raises:
      ValueError: `sample_weight` has no batch dimension.
    """
    weight = tf.convert_to_tensor(sample_weight)
    if weight.shape.rank == 0:
        raise _validate.argument_error("sample_weight", weight, "have a batch dimension")
    rank = tf.rank(weight) if weight.shape.rank is None else weight.shape.rank
    nonzero = tf.not_equal(weight, tf.zeros([], weight.dtype))
    return tf.reduce_any(nonzero, axis=tf.range(1, rank))


def apply_class_weight(dataset: tf.data.Dataset, class_weight: Mapping[int, float]) -> tf.data.Dataset:
    """Multiplies each example's weight by that of its class, which Keras 3 does not do where there are weights already.

    Args:
      dataset: yields (x, y) or (x, y, weight); y holds class numbers [batch] or [batch, 1], or one-hot rows; weight is
        [batch, ...].
      class_weight: weight of each class, for classes 0 to K - 1.

    Raises:
      ValueError: if the classes are not 0 to K - 1, y has several parts, or an example has several labels.
    """
    classes = sorted(class_weight)
    if not classes or classes != list(range(len(classes))):
        requirement = "give a weight to every class from 0 up"
        raise _validate.argument_error("class_weight", class_weight, requirement, "Use 1.0 for the others.")
    labels = dataset.element_spec[1]
    several = tf.nest.is_nested(labels)
    if several or labels.shape.rank not in (1, 2):
        requirement = f"be left out for {'several outputs' if several else f'labels of shape {labels.shape}'}"
        raise _validate.argument_error("class_weight", class_weight, requirement, "Use sample weights.")
    table = tf.constant([float(class_weight[k]) for k in classes])

    def weigh(x: Any, y: tf.Tensor, weight: Any = None) -> tuple[Any, tf.Tensor, tf.Tensor]:
        is_one_hot = y.shape.rank == 2 and y.shape[-1] != 1
        factor = tf.gather(table, tf.argmax(y, -1) if is_one_hot else tf.cast(tf.reshape(y, [-1]), tf.int64))
        if weight is None:
            return x, y, factor
        factor = tf.reshape(factor, [-1] + [1] * (weight.shape.rank - 1))
        return x, y, tf.cast(weight, factor.dtype) * factor

    return dataset.map(weigh)


def _index_dataset(sampling: PoissonSampling, seed: int | None, shared: SharedDraws | None) -> tf.data.Dataset:
    """Returns a dataset of one epoch of index vectors, int64 [rows]."""
    iterations = itertools.count()

    def epoch() -> Iterator[np.ndarray]:
        stream = (seed, next(iterations)) if shared is None else (shared.seed, *shared.stream())
        rng = np.random.default_rng(seed_sequence(*stream))
        for indices, _ in itertools.islice(draws(sampling, rng), sampling.steps_per_epoch):
            yield indices

    signature = tf.TensorSpec([sampling.rows], tf.int64)
    dataset = tf.data.Dataset.from_generator(epoch, output_signature=signature)
    return dataset.apply(tf.data.experimental.assert_cardinality(sampling.steps_per_epoch))


class _RowGatherer:
    """Makes an index vector the batch of these rows of a nest of numpy arrays and tensors, which it keeps alive."""

    def __init__(self, data: Any) -> None:
        self._data = data
        self._arrays = [leaf for leaf in tf.nest.flatten(data) if isinstance(leaf, np.ndarray)]
        self._specs = [tf.convert_to_tensor(array[:1]) for array in self._arrays]  # in the machine's byte order

    @tf.autograph.experimental.do_not_convert
    def gather(self, indices: tf.Tensor) -> Any:
        """Returns the batch, its padding zeros."""
        reader = weakref.WeakMethod(self._rows_of_arrays)  # TensorFlow never forgets a function that it may call
        types = [spec.dtype for spec in self._specs]
        copied = tf.numpy_function(lambda drawn: reader()(drawn), [indices], types, stateful=False)  # type: ignore[misc]
        for rows, spec in zip(copied, self._specs, strict=True):
            rows.set_shape([*indices.shape, *spec.shape[1:]])
        remaining = iter(copied)

        def rows_of(leaf: Any) -> tf.Tensor:
            return next(remaining) if isinstance(leaf, np.ndarray) else _rows_of_tensor(leaf, indices)

        return tf.nest.map_structure(rows_of, self._data)

    def _rows_of_arrays(self, indices: np.ndarray) -> list[np.ndarray]:
        gathered = [np.take(array, np.maximum(indices, 0), axis=0) for array in self._arrays]
        for rows in gathered:
            rows[indices < 0] = 0
        pairs = zip(gathered, self._specs, strict=True)
        return [rows.astype(spec.dtype.as_numpy_dtype, copy=False) for rows, spec in pairs]


def _rows_of_tensor(tensor: tf.Tensor, indices: tf.Tensor) -> tf.Tensor:
    gathered = tf.gather(tensor, tf.maximum(indices, 0))
    keep = tf.reshape(indices >= 0, [-1] + [1] * (tensor.shape.rank - 1))
    return tf.where(keep, gathered, tf.zeros_like(gathered))


def _as_arrays(name: str, nest: Any) -> Any:
    """Returns `nest` with lists as tuples, numeric numpy arrays as they are, others as tensors in host memory."""
    if isinstance(nest, dict):
        return {key: _as_arrays(f"{name}[{key!r}]", value) for key, value in nest.items()}
    if isinstance(nest, (tuple, list)):
        parts = [_as_arrays(f"{name}[{i}]", value) for i, value in enumerate(nest)]
        return type(nest)(*parts) if hasattr(nest, "_fields") else tuple(parts)
    if hasattr(nest, "columns") and hasattr(nest, "dtypes"):
        nest = _frame_values(name, nest)
    remedy, kind = "Give dense arrays of numbers or strings, all with the examples in front.", type(nest).__name__
    if nest is None or isinstance(nest, (tf.RaggedTensor, tf.SparseTensor, tf.data.Dataset)):
        raise _validate.argument_error(name, kind, "hold dense arrays", remedy, TypeError)
    if isinstance(nest, np.ndarray) and nest.ndim and nest.dtype.kind in "fiub" and nest.dtype.itemsize <= 8:
        return np.asarray(nest)
    try:
        with tf.device("CPU:0"):  # the whole data set need not fit into an accelerator
            tensor = tf.convert_to_tensor(nest)
    except (TypeError, ValueError) as error:
        raise _validate.argument_error(name, kind, "hold dense arrays", remedy, TypeError) from error
    if tensor.shape.rank == 0:
        raise _validate.argument_error(name, nest, "hold arrays, not scalars", remedy)
    return tensor


def _frame_values(name: str, frame: Any) -> Any:
    """The values of a pandas frame in one type: truth values as numbers, and text only where all columns are text."""
    kinds = [getattr(dtype, "kind", "O") for dtype in frame.dtypes]
    if all(kind in "biuf" for kind in kinds):
        types = [getattr(dtype, "numpy_dtype", dtype) for dtype in frame.dtypes]
        missing = [str(column) for column in frame.columns if kinds and frame[column].isna().any()]
        if missing and any(hasattr(dtype, "numpy_dtype") for dtype in frame.dtypes):
            requirement = f"have values everywhere, in columns {', '.join(map(repr, missing))} too"
            raise _validate.argument_error(name, "missing values", requirement, "Fill them in.", TypeError)
        return frame.to_numpy(np.result_type(*types)) if types else frame
    text = [kind not in "biufcmM" for kind in kinds]
    if all(text) and all(isinstance(value, (str, bytes)) for value in frame.to_numpy().ravel()):
        return frame.to_numpy(object)
    wrong = [str(column) for column, kind in zip(frame.columns, kinds, strict=True) if kind not in "biuf"]
    remedy = f"Encode or drop {', '.join(map(repr, wrong))}, or pass each kind as an input of its own."
    found = f"a frame with columns of type {', '.join(sorted({str(dtype) for dtype in frame.dtypes}))}"
    raise _validate.argument_error(name, found, "hold columns of numbers", remedy, TypeError)


def _common_length(*nests: Any) -> int:
    """Returns the number of examples that all arrays of `nests` have."""
    lengths = [int(array.shape[0]) for array in tf.nest.flatten(nests)]
    if not lengths or len(set(lengths)) != 1 or lengths[0] == 0:
        raise _validate.argument_error("x, y", lengths, "all have the same number of examples, at least 1")
    return lengths[0]


def _weights(sample_weight: Any, num_examples: int) -> np.ndarray:
    """Returns the weights as a float32 array [N, ...]."""
    weights = np.ones(num_examples) if sample_weight is None else np.asarray(sample_weight)
    if weights.dtype.kind not in "fiub":
        requirement = "be one array of real numbers"
        raise _validate.argument_error("sample_weight.dtype", weights.dtype, requirement, kind=TypeError)
    if weights.ndim == 0 or weights.shape[0] != num_examples:
        requirement = f"have one row for each of the {num_examples} examples"
        raise _validate.argument_error("sample_weight.shape", weights.shape, requirement)
    with np.errstate(over="ignore"):  # reported below
        weights = weights.astype(np.float32)
    if not np.all(np.isfinite(weights)):
        raise ValueError("`sample_weight` must hold finite float32 numbers only.")
    return weights
