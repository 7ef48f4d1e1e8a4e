"""What a model must satisfy before it may train on private data; every failure names the layer and the remedy."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

import numpy as np
import tensorflow as tf

from tf_dpbn import _keras, _validate, public_data, sampling
from tf_dpbn._keras import IS_KERAS_3, Functional, keras
from tf_dpbn.accounting import Ledger, PrivacyPlan, PrivacyWarning, StepRecord
from tf_dpbn.model.training_record import TrainingRecord
from tf_dpbn.normalization import DPBatchNormalization
from tf_dpbn.optimizers import DPOptimizer
from tf_dpbn.sampling import PoissonSampling, PoissonSource

_ONE_DNN = (
    " Or set TF_ENABLE_ONEDNN_OPTS=1 in the environment before TensorFlow is imported: most CPUs then have one, and "
    "other convolutions get faster, too."
)
_CONVOLUTIONS = {1: keras.layers.Conv1D, 2: keras.layers.Conv2D, 3: keras.layers.Conv3D}


def stock_normalizations(model: Any) -> list[Any]:
    """The layers inside a model that are stock batch normalization and would train: their statistics mix examples."""
    trainable = [layer for layer in _keras.flatten_layers(model) if layer.trainable]
    normalizations = [layer for layer in trainable if isinstance(layer, _keras.BatchNormalizationBase)]
    return [layer for layer in normalizations if not isinstance(layer, DPBatchNormalization)]


def check_layers(model: Any) -> None:
    """Refuses stock batch normalization that would train, DPModels as layers, and losses that layers add."""
    for layer in stock_normalizations(model):
        raise ValueError(
            f"Layer {layer.name!r} is a stock {type(layer).__name__}: in training its statistics mix private examples, "
            "which voids the privacy guarantee. Replace it by tf_dpbn.DPBatchNormalization, as tf_dpbn.convert(model) "
            f"does, or freeze it with trainable=False so that it uses its moving statistics. Received: layer={layer!r}"
        )
    for layer in _keras.flatten_layers(model):
        if isinstance(getattr(layer, "_record", None), TrainingRecord):
            raise ValueError(
                f"Layer {layer.name!r} is a DPModel, with a ledger of its own. Build it as keras.Model, or take both "
                f"ledgers together by tf_dpbn.convert(model). Received: layer={layer!r}"
            )
        if getattr(layer, "activity_regularizer", None) is not None:
            refuse_call_time_loss(layer)


def check_functions() -> None:
    """Refuses a step in Python, operation by operation: gradients through statistics are read off the step's graph."""
    if tf.config.functions_run_eagerly():
        raise RuntimeError(
            "A private step must be traced. Call tf.config.run_functions_eagerly(False) before training; with "
            "compile(run_eagerly=True) all of training but the step itself runs eagerly."
        )


def refuse_call_time_loss(layer: Any) -> None:
    """Refuses a layer that adds losses while it is called."""
    raise ValueError(
        f"Layer {layer.name!r} adds a loss while it is called (add_loss or activity_regularizer), which is neither "
        "clipped nor noised. Put it into the compiled loss, or use a weight regularizer (kernel_regularizer)."
    )


def check_grouped_convolutions(model: Any, compiled: bool) -> None:
    """Refuses grouped convolutions where TensorFlow has no kernel for their gradients.

    Stock Keras has these convolutions alone compiled by XLA, which vectorizing over examples undoes.
    """
    for layer in [] if compiled else _keras.flatten_layers(model):
        rank = next((rank for rank, kind in _CONVOLUTIONS.items() if isinstance(layer, kind)), None)
        if rank is None or layer.groups == 1 or not _may_need_gradients(model, layer) or _has_grouped_gradients(rank):
            continue
        raise NotImplementedError(
            "TensorFlow has no kernel here for the gradient of grouped convolutions, but under XLA. Pass "
            f"jit_compile=True to compile.{_ONE_DNN if rank < 3 else ''} Received: layer {layer.name!r}, "
            f"groups={layer.groups}"
        )


def _may_need_gradients(model: Any, layer: Any) -> bool:
    """False if neither `layer` nor one before it trains, as far as the order of the model's layers tells."""
    ordered = model.built and isinstance(model, (Functional, keras.Sequential))
    position = next((k for k, each in enumerate(model.layers) if each is layer), None) if ordered else None
    if position is None:
        return True
    before = model.layers[: position + 1]
    return any(each.trainable_variables or isinstance(each, DPBatchNormalization) and each.trainable for each in before)


@functools.cache
def _has_grouped_gradients(rank: int) -> bool:
    """Whether the device that TensorFlow prefers can differentiate a grouped convolution of so many axes."""
    image, kernel = tf.ones([1, *[3] * rank, 4]), tf.ones([*[1] * rank, 2, 2])
    try:
        with tf.GradientTape() as tape:
            tape.watch((image, kernel))
            result = tf.nn.convolution(image, kernel)
        return tape.gradient(result, kernel) is not None
    except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError):
        return False


_REPLICATED = (tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy, tf.distribute.TPUStrategy)


def check_replicas(strategy: tf.distribute.Strategy, optimizer: DPOptimizer, run_eagerly: bool) -> None:
    """Refuses what several replicas cannot do alike."""
    single = isinstance(strategy, tf.distribute.OneDeviceStrategy) or type(strategy).__name__.startswith("_Default")
    if not single and not isinstance(strategy, _REPLICATED):
        raise NotImplementedError(
            "DPModel trains under MirroredStrategy, MultiWorkerMirroredStrategy, TPUStrategy and OneDeviceStrategy. "
            f"Use one of these. Received: {type(strategy).__name__}"
        )
    if not optimizer.is_built_in(strategy):
        requirement = "be built, with the optimizer it wraps, in the same strategy's scope as the model"
        remedy = "Build all of them within `with strategy.scope():`, so that all replicas draw the same noise."
        raise _validate.argument_error("optimizer", type(optimizer).__name__, requirement, remedy)
    if IS_KERAS_3 and isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        raise NotImplementedError(
            "Keras 3 cannot `fit` under MultiWorkerMirroredStrategy (last tried: Keras 3.15.1 with TensorFlow 2.21; "
            "github.com/keras-team/keras/issues/20585). Set TF_USE_LEGACY_KERAS=1 in the environment before TensorFlow "
            f"is imported, which selects tf_keras. Received: Keras {keras.__version__}"
        )
    replicas = strategy.num_replicas_in_sync
    if replicas > 1 and run_eagerly:
        raise NotImplementedError(
            f"`run_eagerly` must be False on several replicas. Leave it out. Received: True, {replicas} replicas"
        )


def check_ledger_file(strategy: tf.distribute.Strategy, path: Any) -> None:
    """Refuses a ledger file under several workers: one would know of steps that the others do not."""
    if path is not None and isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        requirement = "be None under MultiWorkerMirroredStrategy"
        raise _validate.argument_error("ledger_file", path, requirement, "Save checkpoints.", NotImplementedError)


def check_labels(model: Any, labels: Any, sample_weight: Any = None, name: str = "y") -> None:
    """Refuses labels that one of Keras' losses cannot take: strings, and integers that are no class of the model's.

    Integers are checked for one output of known shape with a sparse categorical loss of Keras'. Where `sample_weight`
    is 0, and for the loss' `ignore_class`, any will do.
    """
    losses = [loss for loss in tf.nest.flatten(getattr(model, "loss", None)) if loss is not None]
    arrays = tf.nest.flatten(labels)
    are_strings = any(_holds_strings(each) for each in arrays)
    if are_strings and all(_keras.is_keras_loss(loss) for loss in losses):
        remedy = "Encode the labels before training, for example by keras.layers.StringLookup(vocabulary=...)(y) - 1."
        raise _validate.argument_error(name, "strings", "hold numbers, which the compiled loss takes", remedy)
    shape = getattr(model, "output_shape", None)
    if len(losses) != 1 or not _keras.is_keras_loss(losses[0], "sparse_categorical_crossentropy") or len(arrays) != 1:
        return
    if are_strings or not isinstance(shape, tuple) or not isinstance(shape[-1] if shape else None, int):
        return
    classes, values = shape[-1], np.asarray(arrays[0])
    values = values[_counting(values, sample_weight) & (values != _keras.ignored_class(losses[0]))]
    for label in (int(values.min()), int(values.max())) if values.size else ():
        if not 0 <= label < classes:
            requirement = f"hold labels from 0 to {classes - 1}, the classes that the model predicts"
            remedy = "Correct the labels or give the last layer more units."
            raise _validate.argument_error(name, label, requirement, remedy)


def _holds_strings(labels: Any) -> bool:
    values = labels if tf.is_tensor(labels) else np.asarray(labels)
    if values.dtype == object:
        return any(isinstance(value, (str, bytes)) for value in values.reshape(-1))
    return values.dtype == tf.string or getattr(values.dtype, "kind", "") in tuple("SU")


def _counting(labels: np.ndarray, sample_weight: Any) -> np.ndarray:
    """Which labels have a weight other than 0, by example or by position; all where the shapes do not tell."""
    weights = np.asarray(1.0 if sample_weight is None or tf.nest.is_nested(sample_weight) else sample_weight)
    if weights.ndim and weights.size == len(labels):
        weights = weights.reshape([-1] + [1] * (labels.ndim - 1))
    elif weights.shape not in ((), labels.shape):
        weights = np.ones(())
    return np.broadcast_to(weights != 0, labels.shape)


def check_batches(x: Any, batch_size: int | None, held_out: float, optimizer: DPOptimizer) -> None:
    """Refuses batches, of arrays or of another sampler, whose size contradicts the sampling rate of the accounting."""
    if isinstance(x, tf.data.Dataset):
        size = tf.nest.flatten(x.element_spec)[0].shape[:1].as_list()
        size = size[0] if size else None
    else:
        arrays = [each for each in tf.nest.flatten(x) if hasattr(each, "shape")]
        size = (batch_size or 32) if arrays else None  # Keras' default
        examples = round(len(arrays[0]) * (1.0 - held_out)) if arrays else None
        expected = optimizer.num_examples
        if expected is not None and examples is not None and abs(examples - expected) > 1:
            requirement = f"equal the number of training examples, {examples}"
            raise _validate.argument_error("num_examples", expected, requirement, "Epsilon depends on it.")
    if size is not None and size != optimizer.expected_batch_size:
        requirement = f"equal the size of the batches, {size}"
        remedy = "Epsilon depends on it. Pass batch_size to fit, or better a data set from PrivacyPlan.poisson_dataset."
        raise _validate.argument_error("expected_batch_size", optimizer.expected_batch_size, requirement, remedy)


def check_rows(x: Any, sample_weight: Any, optimizer: DPOptimizer) -> None:
    """Refuses a batch without weights that is not of the expected size: epsilon would be that of other batches."""
    rows = next((each.shape[0] for each in tf.nest.flatten(x) if len(getattr(each, "shape", ()))), None)
    if sample_weight is None and rows not in (None, optimizer.expected_batch_size):
        requirement = f"have expected_batch_size={optimizer.expected_batch_size:g} rows, or come with weights"
        remedy = "Pass whole batches of poisson_dataset: train_on_batch(*batch). With your own draws use weights of 1."
        raise _validate.argument_error("x", f"{rows} rows and sample_weight=None", requirement, remedy)


def check_callbacks(callbacks: Any) -> None:
    """Warns of callbacks that steer training by un-noised logs."""
    for callback in tf.nest.flatten(callbacks or []):
        monitor = getattr(callback, "monitor", None)
        if monitor is not None and monitor != "epsilon" and getattr(callback, "save_best_only", True):
            message = (
                f"{type(callback).__name__} decides by {monitor!r}, which is computed without noise. What it decides "
                "(learning rate, best epoch, stopping) is outside the privacy guarantee unless its data are public. If "
                "they are not, train the planned epochs without it."
            )
            warnings.warn(message, PrivacyWarning, stacklevel=4)


def check_sampling(batches: PoissonSampling, optimizer: DPOptimizer, replicas: int) -> None:
    """Refuses a data set of draws that the optimizer's denominator, accounting or replicas do not fit."""
    if batches.rows % replicas:
        requirement = f"have equally many rows for each of the {replicas} replicas"
        remedy = "Build it within `with strategy.scope():`, or choose another max_batch_size."
        raise _validate.argument_error("x", f"a Poisson data set of {batches.rows} rows", requirement, remedy)
    pairs = [
        ("expected_batch_size", optimizer.expected_batch_size, batches.expected_batch_size),
        ("num_examples", optimizer.num_examples or batches.num_examples, batches.num_examples),
    ]
    for name, given, drawn in pairs:
        if abs(given - drawn) > 1e-6 * drawn:
            remedy = "Build optimizer and data set from the same PrivacyPlan."
            raise _validate.argument_error(name, given, f"equal that of the Poisson data set, {drawn:g}", remedy)


def check_public_rows(public_batch: Any, training: Any) -> None:
    """Refuses a public batch with rows of the training data (arrays or tensors), which would have no privacy."""
    public = [np.asarray(each) for each in tf.nest.flatten(public_batch)]
    arrays = [each for each in tf.nest.flatten(training) if hasattr(each, "shape") and hasattr(each, "__array__")]
    found = public_data.count_common_rows(public, arrays)
    if found:
        received = f"{found} of {len(public[0])} rows that are rows of the training data"
        remedy = (
            "It is stored in the clear. Take other data, or a synthetic batch of tf_dpbn.public_data; only if these "
            "rows are public, or coincide by chance, set_public_batch(..., may_contain_training_rows=True)."
        )
        raise _validate.argument_error("public_batch", received, "not contain private examples", remedy)


def check_plan(
    plan: PrivacyPlan, draws: PoissonSampling, ledger: Ledger, record: StepRecord, options: dict[str, Any]
) -> None:
    """Warns of a `fit` that would go beyond the plan of its data set, counting what ran before.

    With a PrivacyBudget among the callbacks, which stops in time, there is nothing to warn of, and with
    BackupAndRestore it is not known yet with which epoch training goes on.
    """
    callbacks = tf.nest.flatten(options.get("callbacks") or [])
    resumed = any(isinstance(each, keras.callbacks.BackupAndRestore) for each in callbacks)
    epochs = max(0, options.get("epochs", 1) - options.get("initial_epoch", 0))
    steps = epochs * (_keras.steps_of_epoch(options.get("steps_per_epoch")) or draws.steps_per_epoch)
    if not steps or resumed or any(getattr(each, "stops_in_time", False) for each in callbacks):
        return
    future = ledger.with_sampling_probability(plan.sampling_probability)
    future.record(dataclasses.replace(record, steps=steps))
    whole = plan.ledger()
    if whole.covers(future):
        return  # without a computation, which takes seconds with PLD
    planned, reached = plan.target_epsilon or plan.epsilon, future.epsilon(plan.delta, plan.accountant)
    if reached > planned * (1.0 + 1e-6):
        (noise,), (asked,) = record.noise_multipliers, plan.record().noise_multipliers
        remedy = f"Train for fewer epochs, make a new plan, or stop in time by callbacks.PrivacyBudget({planned:.4g})."
        if noise < asked:
            remedy = f"The optimizer's noise multiplier is {noise:.4g}, not {asked:.4g}: build both from one plan."
        message = (
            f"This `fit` would take {steps} steps after {ledger.steps} so far and reach epsilon {reached:.4g} at delta "
            f"{plan.delta:g}; the plan of its data set is for {whole.steps} steps and epsilon {planned:.4g}. {remedy}"
        )
        warnings.warn(message, PrivacyWarning, stacklevel=4)


def check_workers(strategy: tf.distribute.Strategy, source: PoissonSource | None, public_batch: Any) -> None:
    """Refuses workers that draw for themselves, so that an example could enter a step twice, or hold other data."""
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return
    if source is None or source.draws is None:
        raise _validate.argument_error(
            "x",
            "data of this worker's own" if source is None else "a Poisson data set built outside the strategy's scope",
            "be drawn alike by all workers, each of which takes its share of the rows",
            "Build it within `with strategy.scope():` by plan.poisson_dataset, and train it with `fit`.",
        )
    arrays = [] if public_batch is None else tf.nest.flatten(public_batch)
    for name, ours in (("x, y", source.draws.digest), ("public_batch", sampling.digest_of(arrays))):
        total = strategy.reduce("SUM", strategy.run(functools.partial(tf.constant, ours, tf.int64)), axis=None)
        if int(total) != ours * strategy.num_replicas_in_sync:
            requirement = "be the same on all workers, in the same order"
            raise _validate.argument_error(name, "other values than on another worker", requirement, "Use one seed.")


def check_overrides(model: Any, private: type) -> None:
    """Refuses models that take steps (other than `private`'s), or compute losses, in a method of their own."""
    for method, owner, remedy in (
        ("train_step", private, "which is the private step itself. Put what it does into layers, losses or callbacks"),
        ("compute_loss", keras.Model, "which a private step does not call. Give the loss to compile(loss=...)"),
    ):
        if getattr(type(model), method) is not getattr(owner, method) or method in vars(model):
            raise NotImplementedError(f"Model {model.name!r} overrides {method}, {remedy}.")


def check_loss(model: Any) -> None:
    """Refuses to train a model that was compiled without a loss."""
    if all(each is None for each in tf.nest.flatten(model.loss)):
        raise ValueError(
            f"`loss` must be given to compile: what is clipped are the gradients of the loss of model {model.name!r}, "
            f"example by example. Call compile(optimizer, loss=...) again. Received: loss={model.loss or None}"
        )


def check_traced(model: Any) -> None:
    """Refuses a step that was traced for other variables than those that train now, and would go on with those."""
    trained, now = getattr(model.train_function, "trained", {}), _keras.trainable_flags(model)
    if any(now.get(each, flag) != flag for each, flag in trained.items()):
        raise RuntimeError(
            "`trainable` of some layer has changed since the step was traced, which goes on with what trained then. "
            "Call compile again, with a new optimizer, as after any such change in Keras. Received: "
            f"model={model.name!r}"
        )


def check_unpadded(name: str, data: Any) -> None:
    """Refuses to evaluate on draws for training: padding would count, and examples come at random."""
    if sampling.source_behind(data) is not None:
        remedy = "Give arrays, or a tf.data.Dataset of your own of (x, y)."
        raise _validate.argument_error(name, "draws of poisson_dataset", "have no rows of padding", remedy)


def check_trainable(model: Any) -> None:
    """Refuses to train a built model in which nothing trains: its steps would cost privacy for nothing."""
    has_weights = model.weights or _keras.symbolic_outputs(model) is not None  # a subclass may be called built without
    if model.built and has_weights and not model.trainable_variables:
        raise ValueError(
            f"The model {model.name!r} has no trainable weights. Set `trainable = True` of the layers to train, and of "
            "what holds them, and call `compile` again. Received: trainable_variables=[]"
        )


def check_single_batch(strategy: tf.distribute.Strategy) -> None:
    """Refuses `train_on_batch` where Keras hands the whole batch to every replica: an example would count on each."""
    if IS_KERAS_3 and strategy.num_replicas_in_sync > 1:
        raise NotImplementedError(
            f"`train_on_batch` cannot be used on {strategy.num_replicas_in_sync} replicas: Keras 3 gives each of them "
            "the whole batch. Use `fit`; for one batch pass tf.data.Dataset.from_tensors((x, y, sample_weight))."
        )


GROUPS = ("augmentation_multiplicity", "max_examples_per_user")


def check_one_group(options: dict[str, Any]) -> None:
    """Refuses augmented copies of several examples a user."""
    if all(options[name] > 1 for name in GROUPS):
        remedy = "Augment one copy of each example, augmentation_multiplicity=1."
        raise _validate.argument_error(GROUPS[0], options[GROUPS[0]], "be 1 with max_examples_per_user > 1", remedy)


def check_class_weight(options: dict[str, Any]) -> None:
    """Refuses weights of classes for rows with several labels."""
    if options["max_examples_per_user"] > 1:
        remedy = "Give poisson_dataset sample weights instead, class_weight[label] of each example."
        raise _validate.argument_error("class_weight", "given", "be None with max_examples_per_user > 1", remedy)


def check_same_groups(source: PoissonSource, options: dict[str, Any]) -> None:
    """Refuses a data set with another number of copies, or of examples a user, than the model averages over."""
    for name in GROUPS:
        if getattr(source, name) != options[name]:
            requirement = f"equal that of the Poisson data set, {getattr(source, name)}"
            remedy = f"Pass the same {name} to compile and to poisson_dataset."
            raise _validate.argument_error(name, options[name], requirement, remedy)


def check_groups(x: Any, weight: Any, options: dict[str, Any]) -> None:
    """Refuses a batch that does not hold the copies, or a user's examples, that the model averages over."""
    size, name = max((options[name], name) for name in GROUPS)
    for tensor in tf.nest.flatten(x) if size > 1 else []:
        if tensor.shape.rank is not None and (tensor.shape.rank < 2 or tensor.shape[1] not in (size, None)):
            requirement = f"have shape [batch, {size}, ...], as {name} asks for"
            raise _validate.argument_error("x", tensor.shape, requirement, "poisson_dataset makes such inputs.")
    if weight is None and options["max_examples_per_user"] > 1:
        remedy = "It tells a user's examples from padding; poisson_dataset makes it."
        raise _validate.argument_error("sample_weight", None, f"have shape [batch, {size}]", remedy)


def check_reduction(loss: Any) -> None:
    """Refuses losses that add up a batch, where the mean over an example's copies is meant."""
    for each in tf.nest.flatten(loss):
        if getattr(each, "reduction", None) == "sum":
            requirement = "not add up the batch (reduction='sum')"
            raise _validate.argument_error("loss", each, requirement, "An example's copies are averaged over.")
