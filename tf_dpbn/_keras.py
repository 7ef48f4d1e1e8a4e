"""What differs between Keras 3 and tf_keras, and every use of a Keras internal, in one place.

The rest of the package is written once on `keras` as imported from here: what TensorFlow resolves `tf.keras` to, Keras
3 or, with TF_USE_LEGACY_KERAS=1, tf_keras.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

try:
    IS_KERAS_3 = str(getattr(tf.keras, "__version__", "2")).startswith("3")
except ImportError as error:
    raise ImportError(
        "TF_USE_LEGACY_KERAS=1 asks for tf_keras, which is not installed. Install it by pip install 'tf_dpbn[legacy]'."
    ) from error
# tf.keras of Keras 3 is a view of the package that lacks some modules (saving).
keras: Any = importlib.import_module("keras") if IS_KERAS_3 else tf.keras

if IS_KERAS_3 and keras.config.backend() != "tensorflow":
    raise ImportError(
        "tf_dpbn needs Keras on its TensorFlow backend. Set KERAS_BACKEND=tensorflow before Keras is imported. "
        f"Received: KERAS_BACKEND={keras.config.backend()!r}"
    )

# The class of functional models, which Keras does not export: it lies beside that of keras.Model.
Functional: type = importlib.import_module(f"{keras.Model.__module__.rpartition('.')[0]}.functional").Functional
# The class that every kind of stock batch normalization derives from.
BatchNormalizationBase: type = keras.layers.BatchNormalization.__mro__[0 if IS_KERAS_3 else 1]
# For batch normalization: tf_keras' fused kernel rounds otherwise, and does not run in inference in front of a tanh
# (TensorFlow 2.21, oneDNN).
UNFUSED: dict[str, Any] = {} if IS_KERAS_3 else {"fused": False}


_LONGEST_UNROLLED = 128  # steps in time; tracing takes a hundredth of a second for each


def is_functional_signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether constructor arguments are those of a functional model (inputs, outputs)."""
    return len(args) == 2 or "outputs" in kwargs


def raw(variable: Any) -> tf.Variable:
    """Returns the tf.Variable behind a Keras 3 variable, or the tf.Variable itself.

    Must not be called under a mixed precision autocast scope or a stateless scope.
    """
    return variable.value if IS_KERAS_3 and not isinstance(variable, tf.Variable) else variable


def count_of(variable: Any) -> int:
    """The value of a counter, mirrored by a distribution strategy or not."""
    return int(tf.convert_to_tensor(raw(variable)))


def flatten_layers(model: Any) -> list[Any]:
    """All layers inside `model`, nested ones included, the model itself not."""
    return list(model._flatten_layers(include_self=False, recursive=True))


def own_variables(layer: Any) -> list[Any]:
    """The variables that `layer` itself created, not those of its sublayers."""
    if IS_KERAS_3:
        return list(layer._trainable_variables) + list(layer._non_trainable_variables)
    return list(layer._trainable_weights) + list(layer._non_trainable_weights)


def trainable_flags(model: Any) -> dict[int, bool]:
    """Which of a model's variables train, by their ids."""
    trainable = {id(variable) for variable in model.trainable_variables}
    return {id(variable): id(variable) in trainable for variable in model.weights}


def as_compiled(model: Any) -> Any:
    """A scope in which `trainable` of a compiled model's layers is what its training goes by.

    On tf_keras that is what it was at `compile`; on Keras 3 what it is when a step is traced.
    """
    if IS_KERAS_3:
        return contextlib.nullcontext()
    package = keras.Model.__module__.rpartition(".")[0]
    return importlib.import_module(f"{package}.training_utils").RespectCompiledTrainableState(model)


def call_model(model: Any, x: Any, training: bool, as_batch: bool = False) -> Any:
    """Calls `model` with the training argument if its `call` takes one.

    With `as_batch` it runs as fast as it can for a batch whose kernels get no gradient from TensorFlow: layers of Keras
    3 that recur are unrolled over sequences of a known length that is not large.
    """
    takes_training = model._call_has_training_arg if IS_KERAS_3 else model._call_spec.expects_training_arg
    # cuDNN's operations, which recurrent layers of Keras 3 choose on GPUs, count as changing state, and cannot be
    # vectorized over examples.
    choosing = [layer for layer in flatten_layers(model) if getattr(layer, "use_cudnn", None) == "auto"]
    without_cudnn = [(layer, "use_cudnn", False) for layer in choosing]
    others = _unrolled(model) if as_batch else _convolutions_of_what_is_left(model)
    with _overridden(without_cudnn + others):
        return model(x, training=training) if takes_training else model(x)


@contextlib.contextmanager
def _overridden(attributes: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """Sets attributes, each (object or module, name, value), for a while."""
    own = [(owner, name, vars(owner)[name]) for owner, name, _ in attributes if name in vars(owner)]
    try:
        for owner, name, value in attributes:
            vars(owner)[name] = value
        yield
    finally:
        for owner, name, _ in attributes:
            vars(owner).pop(name, None)
        for owner, name, value in own:
            vars(owner)[name] = value


def _unrolled(model: Any) -> list[tuple[Any, str, Any]]:
    """Recurrent layers whose steps are traced one by one."""
    if not IS_KERAS_3:
        return []
    layers = [each for each in flatten_layers(model) if isinstance(each, keras.layers.RNN)]
    # Keras 3.15, unrolled backwards, sets the outputs of the wrong steps to zero.
    layers = [each for each in layers if not (each.go_backwards and each.zero_output_for_mask)]
    steps = [(each, next(iter((each._build_shapes_dict or {}).values()), (0, 0))[1] or 0) for each in layers]
    return [(each, "unroll", True) for each, number in steps if 0 < number <= _LONGEST_UNROLLED]


def _convolutions_of_what_is_left(model: Any) -> list[tuple[Any, str, Any]]:
    """Methods by which convolutions of one tap a side that stride leave out positions first, and then do not stride.

    Where there are fewer examples than threads, the filter gradient of oneDNN's kernel for them writes beyond its
    memory, with some numbers of channels (TensorFlow 2.21, CPUs; 8 to 16 among them): that of an example alone, and
    of a public batch on a machine of many cores.
    """
    overridden = []
    for layer in filter(_strides_with_one_tap, flatten_layers(model)):
        own_call = IS_KERAS_3 and type(layer).call is keras.layers.Conv1D.call  # which convolves by itself
        method = "call" if own_call else "convolution_op"
        overridden.append((layer, method, functools.partial(_convolve_what_is_left, layer, method)))
    return overridden


def _strides_with_one_tap(layer: Any) -> bool:
    if not hasattr(layer, "convolution_op") or layer.groups != 1 or layer.data_format != "channels_last":
        return False
    return max(layer.kernel_size) == 1 and max(layer.strides) > 1


def _convolve_what_is_left(layer: Any, method: str, inputs: tf.Tensor, *kernel: Any) -> tf.Tensor:
    strides = layer.strides
    first = inputs.shape.rank - 1 - len(strides)
    left = inputs[(slice(None),) * first + tuple(slice(None, None, stride) for stride in strides)]
    with _overridden([(layer, "strides", (1,) * len(strides))]):
        return getattr(type(layer), method)(layer, left, *kernel)


def is_compiled_whole(model: Any) -> bool:
    """Whether XLA compiles the train step of a compiled model."""
    return bool(getattr(model, "jit_compile" if IS_KERAS_3 else "_jit_compile", False))


def is_shape_inference() -> bool:
    """Whether tf_keras is calling layers only to infer shapes, in a graph that it throws away.

    A Sequential without Input does so in the middle of a call, whenever the batch size changes.
    """
    return not IS_KERAS_3 and getattr(tf.compat.v1.get_default_graph(), "name", "").endswith("_scratch_graph")


def call_time_losses(model: Any) -> list[Any]:
    """Layers that added a loss during their last call (add_loss, activity_regularizer)."""
    layers = [*flatten_layers(model), model]
    return [layer for layer in layers if layer._losses or getattr(layer, "_eager_losses", None)]


def clear_call_time_losses(model: Any) -> None:
    """Forgets the losses that a trace of the model added, so that none of its tensors is read later."""
    for layer in [*flatten_layers(model), model]:
        if IS_KERAS_3:
            layer._losses.clear()
            layer._loss_ids.clear()
        else:
            layer._clear_losses()


def regularization_losses(model: Any) -> list[tf.Tensor]:
    """Losses of the weights' regularizers, functions of the weights alone."""
    if IS_KERAS_3:
        return list(model._get_regularization_losses())
    losses = [loss() for layer in [*flatten_layers(model), model] for loss in layer._callable_losses]
    return [loss for loss in losses if loss is not None]


def _seed_generators(model: Any) -> list[Any]:
    layers = [*flatten_layers(model), model]
    return list({id(each): each for layer in layers for each in getattr(layer, "_seed_generators", [])}.values())


def steps_of_call(model: Any) -> int:
    """How many steps the next call of the model's train function takes at most; tf_keras changes it as it trains."""
    if not IS_KERAS_3 and model.autotune_steps_per_execution:
        raise ValueError('`steps_per_execution` must be a number here. Received: steps_per_execution="auto"')
    return int(model.steps_per_execution) if IS_KERAS_3 else count_of(model._steps_per_execution)


def print_line(message: str) -> None:
    """Prints as Keras' progress bar does, or logs where Keras is told to."""
    importlib.import_module(f"{keras.Model.__module__.partition('.')[0]}.src.utils.io_utils").print_msg(message)


def steps_of_epoch(steps_per_epoch: int | None) -> int | None:
    """How many batches an epoch is cut to, by `fit`'s argument or Keras 3's configuration; None if it is not."""
    cap = keras.config.max_steps_per_epoch() if IS_KERAS_3 and hasattr(keras.config, "max_steps_per_epoch") else None
    given = [steps for steps in (steps_per_epoch, cap) if steps]
    return min(given) if given else None


def seed_states(model: Any) -> list[tf.Variable]:
    """The states of a Keras 3 model's random generators."""
    return [raw(generator.state) for generator in _seed_generators(model)]


def draw_example_seeds(model: Any) -> list[tuple[Any, tf.Tensor]]:
    """Advances each random generator of a Keras 3 model by one and returns (state, drawn seed).

    tf_keras layers draw from stateful ops, which are independent for each example by themselves.
    """
    if not IS_KERAS_3:
        return []
    return [(generator.state, generator.next()) for generator in _seed_generators(model)]


@contextlib.contextmanager
def isolated_call(
    seeds: Sequence[tuple[Any, tf.Tensor]],
    example: tf.Tensor,
    zeroed: Sequence[Any] = (),
    constants: Sequence[Any] = (),
) -> Iterator[Any]:
    """A scope in which the model runs on one example without touching any Keras 3 state.

    Args:
      seeds: from `draw_example_seeds`.
      example: int32 scalar; folded into every seed, so that dropout is independent across examples.
      zeroed: Keras 3 variables that read as zero inside the scope.
      constants: variables to which assignments inside the scope have no effect, on both versions of Keras. A layer that
        updates its weights in each training pass (spectral normalization) reads them as the step's own update left
        them, so that gradients are those by the variables and no example's run repeats the update.
    """
    if not IS_KERAS_3:
        # tf_keras has no stateless scope.
        names = ("assign", "assign_add", "assign_sub")
        unchanged = [(each, name, lambda *_, each=each, **__: each) for each in constants for name in names]
        with _overridden(unchanged):
            yield None
        return
    mapping = []
    for state, seed in seeds:
        words = tf.random.experimental.stateless_fold_in(tf.cast(seed, tf.int64), tf.cast(example, tf.int64))
        mapping.append((state, tf.cast(words, state.dtype)))
    mapping += [(variable, tf.zeros(variable.shape, variable.dtype)) for variable in zeroed]
    with keras.StatelessScope(state_mapping=mapping) as scope:
        ignored, add_update = {id(variable) for variable in constants}, scope.add_update
        scope.add_update = lambda update: None if id(update[0]) in ignored else add_update(update)
        yield scope


@contextlib.contextmanager
def kept_state(model: Any) -> Iterator[None]:
    """Undoes on tf_keras what calls of `model`, if any, do to its weights; on Keras 3 `isolated_call` prevents it."""
    variables = [] if IS_KERAS_3 or model is None else model.weights
    saved = [variable.read_value() for variable in variables]
    yield
    for variable, value in zip(variables, saved, strict=True):
        variable.assign(value)


def _compiled(model: Any) -> tuple[Any, Any]:
    """Keras' containers of the losses and of the metrics that `compile` got; None where there are none."""
    names = ("_compile_loss", "_compile_metrics") if IS_KERAS_3 else ("compiled_loss", "compiled_metrics")
    return getattr(model, names[0]), getattr(model, names[1])


def build_compiled_loss(model: Any, y: Any, y_pred: Any) -> None:
    """Creates the loss objects and their trackers, outside any stateless scope."""
    container, _ = _compiled(model)
    if container.built:
        return
    names = getattr(container, "output_names", None) or ()
    if isinstance(y_pred, (list, tuple)) and isinstance(y, dict) and set(names) == set(y):
        y = [y[name] for name in names]  # a list where the outputs are one, as a loss of Keras 3 does when called
    with tf.init_scope():
        container.build(*((y, y_pred) if IS_KERAS_3 else (y_pred,)))


def compiled_data_loss(
    model: Any, y: Any, y_pred: Any, sample_weight: Any, scope: Any
) -> tuple[tf.Tensor, tuple[tf.Tensor, ...]]:
    """The compiled loss without regularization, and its parts by output.

    The parts (unweighted by loss_weights, as Keras logs them) are empty for a single output. Nothing is tracked: on
    Keras 3 the trackers' updates go to `scope` (see `loss_trackers`).
    """
    if IS_KERAS_3:
        # Keras 3 divides losses by the number of replicas, in some reductions only.
        module = importlib.import_module("keras.src.losses.loss")
        names = ("scale_loss_for_distribution", "unscale_loss_for_distribution")
        with _overridden([(module, name, lambda value: value) for name in names]):
            loss = model._compile_loss(y, y_pred, sample_weight)
        trackers = model._compile_loss.metrics  # weighted by the number of rows
        values = [[scope.get_current_value(v) for v in (m.total, m.count)] for m in trackers]
        parts = [tf.math.divide_no_nan(total, count) for total, count in values]
        return loss, tuple(parts)
    return _legacy_data_loss(model.compiled_loss, y, y_pred, sample_weight)


def _legacy_data_loss(container: Any, y: Any, y_pred: Any, sample_weight: Any) -> tuple[Any, tuple[Any, ...]]:
    y = tf.nest.flatten(container._conform_to_outputs(y_pred, y))
    weights = tf.nest.flatten(container._conform_to_outputs(y_pred, sample_weight))
    outputs = tf.nest.flatten(y_pred)
    total, parts = [], []
    compiled = container._losses, container._loss_weights
    for y_t, y_p, weight, loss, scale in zip(y, outputs, weights, *compiled, strict=True):
        if y_t is None or loss is None:
            continue
        y_t, y_p, weight = _legacy_match_rank(y_t, y_p, weight)
        mask = getattr(y_p, "_keras_mask", None)
        if mask is not None:
            mask = tf.cast(mask, y_p.dtype)
            weight = mask if weight is None else weight * mask
        value = tf.reduce_mean(loss(y_t, y_p, sample_weight=weight))
        ignored = ignored_class(loss)
        if ignored is not None:  # tf_keras divides by the number of the others: 0 / 0 for an example without any
            value = tf.where(tf.reduce_any(tf.cast(y_t, tf.int64) != ignored), value, tf.zeros_like(value))
        parts.append(value)
        total.append(value if scale is None else value * scale)
    return tf.add_n(total), tuple(parts) if len(outputs) > 1 else ()


def _legacy_match_rank(y: Any, y_pred: Any, weight: Any) -> tuple[Any, Any, Any]:
    """tf_keras gives a target or weight of rank one the trailing axis of a rank-two prediction."""
    if y.shape.rank == 1 and y_pred.shape.rank == 2:
        y = y[:, None]
    if weight is not None:
        weight = tf.cast(weight, y_pred.dtype)
        if weight.shape.rank == 1 and y_pred.shape.rank == 2:
            weight = weight[:, None]
    if y.dtype.is_floating and y_pred.dtype.is_floating or y.dtype.is_integer and y_pred.dtype.is_integer:
        y = tf.cast(y, y_pred.dtype)
    return y, y_pred, weight


def loss_trackers(model: Any) -> tuple[Any, list[Any]]:
    """The metric that logs "loss" and those that log the loss of each of several outputs."""
    if IS_KERAS_3:
        return model._loss_tracker, list(model._compile_loss.metrics)
    container = model.compiled_loss
    return container._total_loss_mean, [m for m in container._per_output_metrics or [] if m is not None]


def tracker_variables(model: Any) -> list[Any]:
    """Keras 3 variables in which per-output losses accumulate; empty for a single output."""
    if not IS_KERAS_3:
        return []
    return [v for metric in model._compile_loss.metrics for v in (metric.total, metric.count)]


def symbolic_outputs(model: Any) -> Any:
    """The outputs of a functional model, None of others."""
    functional = getattr(model, "_functional", None) or model  # a Sequential of Keras 3 holds one
    return getattr(functional, "_outputs_struct" if IS_KERAS_3 else "_nested_outputs", None)


def build_compiled(model: Any, y: Any, y_pred: Any) -> None:
    """Creates what the compiled losses and metrics keep in variables: a step that creates them is traced twice.

    `y` and `y_pred` are nests of what has shapes and types, the targets and predictions of a batch.
    """
    y, y_pred = (tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), each) for each in (y, y_pred))
    build_compiled_loss(model, y, y_pred)
    _build_metrics(_compiled(model)[1], y, y_pred)


def _build_metrics(container: Any, y: Any, y_pred: Any) -> None:
    if container is None or container.built:
        return
    if IS_KERAS_3:
        with tf.init_scope():
            container.build(y, y_pred)
    else:
        container.build(y_pred, container._conform_to_outputs(y_pred, y))  # as its update_state does


def update_compiled_metrics(model: Any, y: Any, y_pred: Any, sample_weight: Any, mask: tf.Tensor | None) -> None:
    """Updates the compiled metrics as Keras does on a batch of the rows whose mask is True; without any, not at all.

    Many metrics cannot be told of padding by weights: functions that return one number for a batch, confusion
    matrices of pictures, and NaN times 0 is NaN. So the rows are taken out. The mask is None where all are examples;
    predictions with a `_keras_mask` keep it.
    """
    _, container = _compiled(model)
    if container is None:
        return
    _build_metrics(container, y, y_pred)
    if mask is None:
        container.update_state(y, y_pred, sample_weight)
        return
    real = tf.where(mask)[:, 0]

    def rows(t: tf.Tensor) -> tf.Tensor:
        taken = tf.gather(t, real)
        if getattr(t, "_keras_mask", None) is not None:
            taken._keras_mask = tf.gather(t._keras_mask, real)
        return taken

    y, y_pred = tf.nest.map_structure(rows, (y, y_pred))
    sample_weight = None if sample_weight is None else tf.nest.map_structure(rows, sample_weight)

    def update() -> tf.Tensor:
        container.update_state(y, y_pred, sample_weight)
        return tf.constant(True)

    tf.cond(tf.reduce_any(mask), update, lambda: tf.constant(False))


def masks_of(outputs: Any) -> tuple[Any, ...]:
    """For each output the mask that Keras attached to it, or an empty tuple."""
    masks = (getattr(output, "_keras_mask", None) for output in tf.nest.flatten(outputs))
    return tuple(() if mask is None else mask for mask in masks)


def with_masks(outputs: Any, masks: tuple[Any, ...]) -> Any:
    """The outputs, with what `masks_of` found attached to copies of them."""
    found = []
    for output, mask in zip(tf.nest.flatten(outputs), masks, strict=True):
        if not isinstance(mask, tuple):
            output = tf.identity(output)
            output._keras_mask = mask
        found.append(output)
    return tf.nest.pack_sequence_as(outputs, found)


def is_keras_loss(loss: Any, name: str | None = None) -> bool:
    """Whether what `compile` got is a loss of Keras' own, and the named one (in snake case) if a name is given."""
    if isinstance(loss, str):
        try:
            loss = keras.losses.get(loss)
        except ValueError:  # `fit` will say so
            return False
    kind = loss if hasattr(loss, "__name__") else type(loss)
    is_own = kind.__module__.partition(".")[0] == keras.Model.__module__.partition(".")[0]
    return is_own and (name is None or kind.__name__.replace("_", "").lower() == name.replace("_", ""))


def ignored_class(loss: Any) -> int | None:
    """The `ignore_class` of a loss object of Keras', if it has one."""
    return getattr(loss, "_fn_kwargs", {}).get("ignore_class", getattr(loss, "ignore_class", None))


class StoredBeside(keras.losses.Loss):
    """An attribute of a model or layer that weights files hold under a name of its own, which stock Keras passes over.

    Both Kerases walk attributes of a few kinds only; of these a loss is the one that they neither track nor count.
    `save` and `load` are as `save_own_variables` and `load_own_variables`; the store of a file without this is empty.
    """

    def __init__(self, save: Callable[[Any], None], load: Callable[[Any], None]) -> None:
        super().__init__()
        self.save_own_variables, self.load_own_variables = save, load

    def call(self, y_true: Any, y_pred: Any) -> Any:
        raise NotImplementedError


def stored_as(stock_names: dict[str, str]) -> None:
    """Has Keras' weights files name layers of some classes as the stock ones that they stand for.

    In files layers are found by the name of their class and their number among those of it, for which there is no hook.
    """
    module = importlib.import_module(f"{keras.Model.__module__.partition('.')[0]}.src.saving.saving_lib")
    name = "naming" if IS_KERAS_3 else "generic_utils"
    original = getattr(module, name)

    def to_snake_case(class_name: str) -> str:
        return original.to_snake_case(stock_names.get(class_name, class_name))

    setattr(module, name, types.SimpleNamespace(**{**vars(original), "to_snake_case": to_snake_case}))


def is_functional(model: Any) -> bool:
    """Whether `model` is a graph of layers from inputs to outputs; a Sequential is not, whatever its inside."""
    return isinstance(model, Functional) and not isinstance(model, keras.Sequential)


def symbolic_inputs(model: Any) -> Any:
    """The inputs of a functional model in their nest, or that of a Sequential."""
    return model.inputs[0] if isinstance(model, keras.Sequential) else model.input


def rebuild_functional(model: Any, clone: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Symbolic (inputs, outputs) of a functional model's graph, anew, with clone(layer) for each layer.

    Keras 3's clone_model would also compile the result as `model` is, a DPModel with stock layers among them.
    """
    if not IS_KERAS_3:
        rebuilt = keras.models.clone_model(model, clone_function=clone)
        return rebuilt.input, rebuilt.output
    inputs = keras.tree.map_structure(
        lambda t: keras.Input(batch_shape=t.shape, dtype=t.dtype, name=t.name, sparse=t.sparse), model.input
    )
    return inputs, model._run_through_graph(inputs, operation_fn=clone)


def mark_called(model: Any) -> None:
    """Calls a model of Keras 3 on its symbolic inputs, if it knows them: some formats of `export` want it called."""
    if IS_KERAS_3 and getattr(model, "inputs", None):
        model(symbolic_inputs(model))


def sequential_input(model: Any) -> list[Any]:
    """The input of a Sequential that has one, as a new layer in a list; empty before it has met data."""
    inputs = getattr(model, "inputs", None) or []
    return [keras.Input(batch_shape=tuple(t.shape), dtype=t.dtype, name=t.name.partition(":")[0]) for t in inputs]


def copy_trainable_flags(layer: Any, other: Any) -> None:
    """Freezes and unfreezes `layer`, and on Keras 3 each of its own variables, as `other` is."""
    layer.trainable = other.trainable
    if IS_KERAS_3:
        for variable, theirs in zip(own_variables(layer), own_variables(other), strict=False):
            if variable.trainable != theirs.trainable:
                variable.trainable = theirs.trainable


@contextlib.contextmanager
def frozen(layers: Sequence[Any]) -> Iterator[None]:
    """Freezes layers for a while."""
    saved = [(layer, layer.trainable, [v.trainable for v in own_variables(layer)]) for layer in layers]
    for layer in layers:
        layer.trainable = False
    try:
        yield
    finally:
        for layer, trainable, flags in saved:
            layer.trainable = trainable
            for variable, flag in zip(own_variables(layer), flags, strict=True):
                if IS_KERAS_3 and variable.trainable != flag:
                    variable.trainable = flag


def apply_gradients(optimizer: Any, pairs: list[tuple[tf.Tensor, Any]]) -> Any:
    """A Keras optimizer's update by (gradient, variable) pairs, which are the same on each replica or zero.

    On a single device there is nothing to add up over replicas. Keras would do so all the same, by a
    tf.custom_gradient, which TensorFlow keeps for the life of the process, and with it the graph of the step.
    """
    context = tf.distribute.get_replica_context()
    if context is None or tf.distribute.has_strategy():
        return optimizer.apply_gradients(pairs)
    if IS_KERAS_3:
        return context.merge_call(lambda _: optimizer.apply_gradients(pairs))
    # Optimizers with a method of their own may not know the argument.
    known = type(optimizer).apply_gradients is keras.optimizers.Optimizer.apply_gradients
    return optimizer.apply_gradients(pairs, **({"skip_gradients_aggregation": True} if known else {}))
