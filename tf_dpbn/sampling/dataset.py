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
from tf_dpbn.clipping.independence import NotProvedError, Proof, check_no_state
from tf_dpbn.clipping.independence import Rows as RowsOfExamples
from tf_dpbn.sampling.draws import PoissonSampling, SharedDraws, Users, checked_seed, digest_of, draws, seed_sequence
from tf_dpbn.sampling.sources import ArrayRows, LoadedRows, Rows, check_random_access, is_source

_SOURCE_ATTRIBUTE = "tf_dpbn_source"
# TensorFlow's classes; by another name they lose the source.
_TRANSPARENT, _MAPS = ("_OptionsDataset", "_PrefetchDataset"), ("_MapDataset", "_ParallelMapDataset")
_AHEAD = 2  # batches that are read ahead, and as many at the same time: they are what bounds the memory


@dataclass(frozen=True, kw_only=True, eq=False)
class PoissonSource:
    """Where the batches of a dataset come from.

    Attributes:
      sampling: the distribution of the batches.
      inputs, labels: the private inputs and labels as they were given to `poisson_dataset`; None where they are read
        by `load`, or changed later.
      sample_weight: likewise.
      has_weights: whether examples have weights; else those of batches only tell examples from padding.
      augmentation_multiplicity: how many augmented copies of each example a batch holds, on an axis of their own; 1
        where there is no such axis.
      max_examples_per_user: how many examples of each user a batch holds at most, likewise.
      draws: under MultiWorkerMirroredStrategy what keeps the workers' draws alike; otherwise None.
      plan: the plan whose dataset it is, or None.
    """

    sampling: PoissonSampling
    inputs: Any
    labels: Any
    sample_weight: Any = None
    has_weights: bool = False
    augmentation_multiplicity: int = 1
    max_examples_per_user: int = 1
    draws: SharedDraws | None = None
    plan: PrivacyPlan | None = None


def poisson_dataset(
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    expected_batch_size: int,
    max_batch_size: int,
    steps_per_epoch: int | None = None,
    load: Callable[[Any], Any] | None = None,
    user_ids: Any = None,
    max_examples_per_user: int = 1,
    augment: Callable[[Any], Any] | None = None,
    augmentation_multiplicity: int = 1,
    seed: int | None = None,
) -> tf.data.Dataset:
    """Builds a dataset of Poisson-sampled batches of one fixed shape.

    Build it within the scope of the distribution strategy it is for, if any. Every iteration over the dataset makes
    fresh draws. The dataset carries what it is, readable by `source_of`, and so does one derived from it by `prefetch`,
    `with_options`, or a `map` that provably keeps rows apart and weights as they are. Others (cache, repeat) do not,
    since their distribution may be another: `DPModel.fit` takes them with a warning.

    Examples come from arrays, or from a source that is asked for one at a time, as they are drawn: file names and a
    function that reads a file, a Hugging Face or Grain data set, `tfds.data_source`, `index_tfrecords`, an HDF5 data
    set. Memory then holds the batches in flight alone, and drawing one takes time in proportion to its size.

        poisson_dataset(paths, labels, load=read_picture, ...)
        poisson_dataset(data_source, load=lambda element: (element["image"], element["label"]), ...)

    Args:
      x: inputs, an array [N, ...] or a nest (dict, tuple, list) of such arrays. Lists become tuples. Rows of numeric
        numpy arrays, memory-mapped ones included, are read as they are drawn, without a copy of the whole: do not
        change the arrays while you train. Or a source: a sequence of N elements if there is a `load`, else anything
        with `__len__` and `__getitem__` that is no array.
      y: labels, an array or nest likewise. None if x is a source whose elements have them: they, or what `load` makes
        of them, are (inputs, labels) or (inputs, labels, weight).
      sample_weight: one array [N] or [N, ...] of finite weights, or None for weights of 1. Weight 0 is padding.
      expected_batch_size: mean number B of examples in a batch; the sampling probability is B / N.
      max_batch_size: rows M of every batch, at least B; see `accounting.default_max_batch_size`.
      steps_per_epoch: draws in one iteration; None takes ceil(N / B).
      load: maps an element of x to the inputs of an example, or to (inputs, labels[, weight]) if y is None: nests of
        dictionaries and tuples, of arrays, lists, numbers or strings, all of one shape and type. A Python function,
        called once for each drawn example, by several threads at once; what it makes of one element must not depend
        on others.
      user_ids: for data in which people have several examples: whose each is, whole numbers or strings [N]. Users are
        then drawn instead of examples, N and B count them, and the guarantee is for users, with all of their examples.
      max_examples_per_user: how many examples K of a drawn user, chosen at random, go into the batch; the number given
        to `DPModel.compile`. With K > 1 inputs, labels and weights are [M, K, ...].
      augment: maps one example's inputs to augmented ones of the same shapes, at random, without state; see
        `augmentation`.
      augmentation_multiplicity: how many augmented copies K of each example to make; the number given to
        `DPModel.compile`. With K > 1 inputs are [M, K, ...].
      seed: whole number that fixes the draws of all iterations, in order; see `poisson_indices`.

    Returns:
      A dataset of (x, y, weight) with rows [M, ...]; the weight is float32 [M] or [M, ...]. Padding rows are zeros
      (empty strings) with weight 0.

    Raises:
      ValueError: arrays of different or no lengths, non-finite weights, B > N, M < B, or a bad count or seed; while
        batches are read, an example of another shape or type than the first.
      TypeError: `x`, `y` or `sample_weight` holds something that is no dense array, or has no random access.
    """
    examples = _Examples(x, y, sample_weight, load)
    most = _validate.positive_int("max_examples_per_user", max_examples_per_user)
    users = None if user_ids is None else Users(user_ids, most)
    if users is None and most > 1:
        raise _validate.argument_error("user_ids", None, "be given with max_examples_per_user")
    if users is not None and len(user_ids) != examples.count:
        requirement = f"name the user of each of the {examples.count} examples"
        raise _validate.argument_error("user_ids", f"{len(user_ids)} of them", requirement)
    num_examples = examples.count if users is None else users.count
    expected = _validate.positive_int("expected_batch_size", expected_batch_size)
    if expected > num_examples:
        requirement = f"be at most the number of {'examples' if users is None else 'users'}, {num_examples}"
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
        unit="example" if users is None else "user",
    )
    multiplicity = _validate.positive_int("augmentation_multiplicity", augmentation_multiplicity)
    if multiplicity > 1 and augment is None:
        remedy = "Without it all copies would be the same: see tf_dpbn.augmentation."
        raise _validate.argument_error("augment", None, "be given with augmentation_multiplicity", remedy)
    if augment is not None and most > 1:
        remedy = "Augment in `load`, which is called for each example."
        raise _validate.argument_error("augment", augment, "be left out with max_examples_per_user > 1", remedy)
    seed, draws = checked_seed(seed), None
    if isinstance(tf.distribute.get_strategy(), tf.distribute.MultiWorkerMirroredStrategy):
        draws = SharedDraws(seed, digest_of([*examples.arrays, np.array(dataclasses.astuple(sampling))]))
    dataset = _index_dataset(sampling, seed, draws, users, most)
    dataset = dataset.map(examples.gather, num_parallel_calls=_AHEAD)
    dataset.tf_dpbn_examples = examples  # kept, with the data
    if augment is not None:

        def augmented(x: Any, y: Any, weight: tf.Tensor) -> tuple:
            made = augmentation.copies(augment, multiplicity, x)
            return (made if multiplicity > 1 else tf.nest.map_structure(lambda t: t[:, 0], made)), y, weight

        dataset = dataset.map(augmented, num_parallel_calls=tf.data.AUTOTUNE)
    options = tf.data.Options()  # of one draw, each worker takes its own rows
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    dataset = dataset.prefetch(_AHEAD).with_options(options)
    source = PoissonSource(
        sampling=sampling,
        inputs=None if examples.are_loaded else x,
        labels=y,
        sample_weight=sample_weight,
        has_weights=examples.has_weights,
        augmentation_multiplicity=multiplicity,
        max_examples_per_user=most,
        draws=draws,
    )
    setattr(dataset, _SOURCE_ATTRIBUTE, source)
    return dataset


class PrivacyPlan(accounting.PrivacyPlan):
    """A training run planned for a privacy budget, with its datasets; fields as in `accounting.PrivacyPlan`."""

    def poisson_dataset(self, x: Any, y: Any = None, sample_weight: Any = None, **options: Any) -> tf.data.Dataset:
        """Builds the plan's dataset of Poisson-sampled batches.

        Args:
          x, y, sample_weight: as for `sampling.poisson_dataset`, with exactly `num_examples` examples, or users.
          **options: `load`, `user_ids`, `max_examples_per_user`, `augment`, `augmentation_multiplicity` and `seed`, as
            for `sampling.poisson_dataset`; leave the seed out when training for privacy.

        Returns:
          A dataset of `steps_per_epoch` draws (x, y, weight) of `max_batch_size` rows.

        Raises:
          ValueError, TypeError: as `sampling.poisson_dataset`; also if the data does not have `num_examples` examples:
            the plan's epsilon would be that of another data set.
        """
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
        source = getattr(dataset, _SOURCE_ATTRIBUTE)
        if source.sampling.num_examples != self.num_examples:
            requirement = f"have the plan's num_examples={self.num_examples} {source.sampling.unit}s"
            remedy = "Plan anew: dataclasses.replace(plan, num_examples=...)."
            raise _validate.argument_error("x, y", source.sampling.num_examples, requirement, remedy)
        setattr(dataset, _SOURCE_ATTRIBUTE, dataclasses.replace(source, plan=self))
        return dataset


def source_of(dataset: Any) -> PoissonSource | None:
    """Returns what `poisson_dataset` noted on `dataset`, or None if it is not such a dataset.

    Prefetching and options change no batch, unless the options let each worker have all rows, or another order; nor
    does a `map` for which it can be proved that row i of what it returns depends on row i alone, and that its weights
    are those that it got. What its function captures (tensors, variables) is taken for public.
    """
    inner, mapped = dataset, False
    while not hasattr(inner, _SOURCE_ATTRIBUTE):
        if type(inner).__name__ in _MAPS and _keeps_rows(inner):
            mapped = True
        elif type(inner).__name__ not in _TRANSPARENT:
            return None
        inner = inner._input_dataset
    source = getattr(inner, _SOURCE_ATTRIBUTE)
    if not isinstance(source, PoissonSource):
        return None
    options = dataset.options()
    by_rows = options.experimental_distribute.auto_shard_policy == tf.data.experimental.AutoShardPolicy.DATA
    if not by_rows or options.deterministic is False:
        return None
    return dataclasses.replace(source, labels=None) if mapped else source


def _keeps_rows(dataset: Any) -> bool:
    """Whether a dataset that was made by `map` has the rows of the one that it was made of, and its weights."""
    graph = dataset._map_func.function.graph
    examples = graph.inputs[: len(tf.nest.flatten(dataset._input_dataset.element_spec))]
    spec, weights = dataset.element_spec, graph.outputs[-1]
    while weights.op.type == "Identity":
        weights = weights.op.inputs[0]
    if not isinstance(spec, tuple) or len(spec) != 3 or not isinstance(spec[2], tf.TensorSpec):
        return False  # of several weights one that is not 0 would do
    if weights is not examples[-1] or getattr(dataset, "_deterministic", None) == "false":
        return False
    try:
        proof = Proof(examples, examples[-1].shape[0])
        check_no_state(proof, graph.get_operations())
        return all(proof.rows_of(each) == RowsOfExamples(0) for each in graph.outputs)
    except NotProvedError:
        return False


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


def _index_dataset(
    sampling: PoissonSampling, seed: int | None, shared: SharedDraws | None, users: Users | None, most: int
) -> tf.data.Dataset:
    """Returns a dataset of one epoch of draws: indices and which of them count, [rows], or [rows, most] of users."""
    iterations = itertools.count()
    shape = [sampling.rows, most] if most > 1 else [sampling.rows]

    def epoch() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        stream = (seed, next(iterations)) if shared is None else (shared.seed, *shared.stream())
        rng = np.random.default_rng(seed_sequence(*stream))
        for indices, _ in itertools.islice(draws(sampling, rng), sampling.steps_per_epoch):
            found, counts = (indices, indices >= 0) if users is None else users.examples_of(indices, rng)
            yield found.reshape(shape), counts.reshape(shape)

    signature = tf.TensorSpec(shape, tf.int64), tf.TensorSpec(shape, tf.bool)
    dataset = tf.data.Dataset.from_generator(epoch, output_signature=signature)
    return dataset.apply(tf.data.experimental.assert_cardinality(sampling.steps_per_epoch))


class _Examples:
    """Makes an index vector the batch of these rows (x, y, weight), and keeps the data alive.

    Attributes:
      count: the number of examples.
      are_loaded: whether inputs are read one by one.
      arrays: those that hold the others.
      has_weights: whether there are weights.
    """

    def __init__(self, x: Any, y: Any, sample_weight: Any, load: Callable[[Any], Any] | None) -> None:
        check_random_access("x", x)
        self.are_loaded = load is not None or is_source(x)
        parts: list[Rows]
        if not self.are_loaded:
            if y is None:
                raise _validate.argument_error(
                    "y", None, "be given with arrays", "Pass inputs and labels apart: (x, y)."
                )
            parts = [ArrayRows("x", x), ArrayRows("y", y)]
        elif y is not None:
            parts = [LoadedRows(x, load), ArrayRows("y", y)]
        elif sample_weight is None:
            parts = [LoadedRows(x, load)]
        else:
            remedy = "Let elements, or `load`, give (inputs, labels, weight)."
            raise _validate.argument_error("sample_weight", "an array", "be left out where y is", remedy)
        lengths = [length for part in parts for length in part.lengths]
        if not lengths or len(set(lengths)) != 1 or lengths[0] == 0:
            raise _validate.argument_error("x, y", lengths, "all have the same number of examples, at least 1")
        self.count = lengths[0]
        self._specs = parts[0].specs if len(parts) == 1 else tuple(part.specs for part in parts)
        if not isinstance(self._specs, tuple) or len(self._specs) not in (2, 3):
            requirement = "make (inputs, labels) or (inputs, labels, weight) of each element where y is left out"
            remedy = 'For example load=lambda element: (element["image"], element["label"]).'
            raise _validate.argument_error("load", self._specs, requirement, remedy)
        self.has_weights = sample_weight is not None or len(self._specs) == 3
        if len(self._specs) == 2:
            parts.append(ArrayRows("sample_weight", _weights(sample_weight, self.count)))
            self._specs = (*self._specs, parts[-1].specs)
        self._parts = parts
        self.arrays = [a for part in parts if isinstance(part, ArrayRows) for a in part.arrays]

    @tf.autograph.experimental.do_not_convert
    def gather(self, indices: tf.Tensor, counts: tf.Tensor) -> Any:
        """Returns the batch, padding zeros, with weight 0 where an index does not count."""
        reader = weakref.WeakMethod(self._read)  # TensorFlow never forgets a function that it may call
        specs = tf.nest.flatten(self._specs)
        types = [spec.dtype for spec in specs]
        copied = tf.numpy_function(lambda drawn: reader()(drawn), [indices], types, stateful=False)  # type: ignore[misc]
        for rows, spec in zip(copied, specs, strict=True):
            rows.set_shape([*indices.shape, *spec.shape])
        x, y, weights = tf.nest.pack_sequence_as(self._specs, copied)
        counts = tf.reshape(counts, [*counts.shape, *[1] * (weights.shape.rank - counts.shape.rank)])
        return x, y, tf.where(counts, tf.cast(weights, tf.float32), 0.0)

    def _read(self, indices: np.ndarray) -> list[np.ndarray]:
        if indices.ndim == 1:
            columns = [rows for part in self._parts for rows in part.read(indices)]
        else:  # several examples of each user, some of them twice
            distinct, places = np.unique(indices, return_inverse=True)
            columns = [rows[places.reshape(indices.shape)] for part in self._parts for rows in part.read(distinct)]
        if not np.all(np.isfinite(columns[-1])):
            raise _validate.argument_error("load", "a non-finite weight", "make finite weights")
        return columns


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
