"""DPModel and DPSequential: Keras models whose train step is differentially private.

`train_step` is the algorithm; everything around it keeps the books (ledger, public batch, fresh statistics).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import warnings
import weakref
from typing import Any

import tensorflow as tf

from tf_dpbn import _checks, _training_trace, _validate
from tf_dpbn._accumulation import Accumulator, EpochBoundaries
from tf_dpbn._bookkeeping import BookkeepingModel
from tf_dpbn._books import Admission, Books
from tf_dpbn._class_weight import apply_class_weight
from tf_dpbn._keras import (
    IS_KERAS_3,
    Functional,
    as_compiled,
    build_compiled,
    call_model,
    compiled_data_loss,
    compiled_is_built,
    deserialize,
    draw_example_seeds,
    flatten_layers,
    is_compiled_whole,
    is_functional_signature,
    isolated_call,
    kept_state,
    keras,
    loss_trackers,
    masks_of,
    raw,
    regularization_losses,
    steps_of_call,
    steps_of_epoch,
    steps_per_execution,
    symbolic_outputs,
    tracker_variables,
    update_compiled_metrics,
    with_callback,
    with_masks,
)
from tf_dpbn._precision import check_full_float32, check_rounding, in_full_float32
from tf_dpbn.accounting import PrivacyWarning
from tf_dpbn.clipping import Batch, BatchResult, ExampleResult, MaskedPredictions, Task, get_engine
from tf_dpbn.clipping.vectorization import has_accelerator
from tf_dpbn.mechanisms import ClippedSum, summed_over_replicas
from tf_dpbn.normalization import CORRECTIONS, GivenStatistics, PublicForward, create_averages
from tf_dpbn.optimizers import DPOptimizer
from tf_dpbn.sampling import real_example_mask, source_behind, source_of

_HALF_PRECISION_LOSS_SCALE = 1024.0
# The models whose own train_step runs in this thread: replicas have one each.
_STEPPING: contextvars.ContextVar[frozenset[int]] = contextvars.ContextVar("stepping", default=frozenset())
_BEGINNING_BATCHES: weakref.WeakSet[Any] = weakref.WeakSet()


class DPModel(BookkeepingModel):
    """A keras.Model that trains with DP-SGD, batch normalization included.

    Build it as `DPModel(inputs, outputs)`, or subclass it and define `call`. Compile it with a DPOptimizer, give it a
    public batch if it contains DPBatchNormalization, and train it with `fit`:

        model = tf_dpbn.DPModel(inputs, outputs)
        model.set_public_batch(tf_dpbn.public_data.uniform_noise((28, 28, 1)))
        model.compile(optimizer=..., loss="sparse_categorical_crossentropy", metrics=["accuracy"])
        model.fit(plan.poisson_dataset(x, y), epochs=20)

    Formal guarantee: every step releases one Gaussian mechanism on a sum of per-example vectors of norm at most
    l2_norm_clip; weights, moving statistics and checkpoints are post-processing of those releases, the public batch and
    the initial weights. Losses and metrics logged in training are not covered.
    """

    train_function: Any  # Keras'

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Returns a DPFunctional for `DPModel(inputs, outputs)`, as keras.Model returns a functional model."""
        if cls is DPModel and is_functional_signature(args, kwargs):
            return super().__new__(DPFunctional, *args, **kwargs)
        return super().__new__(cls, *args, **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Has a subclass' own train_step say where a batch begins: it may call the one here several times on it."""
        super().__init_subclass__(**kwargs)
        step = inspect.getattr_static(cls, "train_step")
        if step is not _OWN_TRAIN_STEP and step not in _BEGINNING_BATCHES:
            cls.train_step = _beginning_batches(step)  # type: ignore[method-assign]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if is_functional_signature(args, kwargs) and not isinstance(self, Functional):
            raise TypeError(
                "A subclass of DPModel must define `call` and pass no inputs and outputs to super().__init__(). Use "
                f"tf_dpbn.DPModel(inputs, outputs) directly for a functional model. Received: {type(self).__name__}"
            )
        super().__init__(*args, **kwargs)
        self._books = Books()

    # ------------------------------------------------------------------ configuration

    def compile(
        self,
        optimizer: Any = None,
        loss: Any = None,
        *args: Any,
        correction: str = "auto",
        engine: str = "book_keeping",
        microbatch_size: int | None = None,
        norm_method: str = "auto",
        accumulation_steps: int = 1,
        loss_scale: float | None = None,
        augmentation_multiplicity: int = 1,
        **kwargs: Any,
    ) -> None:
        """Configures training.

        Args:
          optimizer: a DPOptimizer.
          loss: as in Keras; any reduction. The loss of one example is what Keras computes for a batch of one.
          *args, **kwargs: loss_weights, metrics, weighted_metrics, run_eagerly, steps_per_execution, jit_compile as
            in Keras. jit_compile="auto" is off on CPUs, where XLA's convolutions are slower.
          correction: how gradients flow through batch statistics: "local" (section 3a of docs/algorithm.md, 3b where
            3a does not apply), "adaptive" (3a, and 3b as far as it is more than noise: deep networks train better, and
            a step takes a little longer), "full" (3a and 3b) or "none" (statistics as constants; for studies). "auto",
            the default, is "adaptive" from eight normalizations on that train, and else "local".
          engine: "book_keeping" (default), "vectorized" or "loop", see `clipping.get_engine`. All give the same result.
          microbatch_size: how many examples are worked on at a time, within one step; bounds memory and does not change
            the result. None chooses.
          norm_method: for "book_keeping": "auto", "instantiate" or "gram", see `clipping.book_keeping`.
          accumulation_steps: how many consecutive batches of `fit` make one logical batch, with one draw of noise, one
            update and one step in the ledger. The optimizer's expected_batch_size is that of the logical batch; pass
            the same number to `poisson_dataset`. The clipped sum of an unfinished logical batch is dropped at the end
            of an epoch, and is in no checkpoint.
          loss_scale: power of two by which the loss of each example is multiplied while it is differentiated, and its
            gradient divided by, in float32, before it is clipped: small gradients then survive half precision, and
            nothing else changes. None takes 1024 if a layer computes in float16 and 1 otherwise.
          augmentation_multiplicity: K > 1 if inputs are [batch, K, ...], K augmented copies of each example, as
            `poisson_dataset` makes them; the gradients of an example's copies are averaged before they are clipped.

        Raises:
          TypeError: if the optimizer is not a DPOptimizer.
          ValueError: for unknown options, or stock batch normalization in the model (naming the layer).
          NotImplementedError: under a distribution strategy that does not mirror variables, or for options that several
            replicas cannot combine with.
          RuntimeError: by a callback of `fit` whose logical batches have several parts, or will have.
        """
        if not isinstance(optimizer, DPOptimizer):
            raise _validate.argument_error(
                "optimizer",
                optimizer,
                "be a DPOptimizer",
                "Wrap yours: tf_dpbn.optimizers.DPOptimizer(inner, l2_norm_clip=1.0, noise_multiplier=1.1, "
                "expected_batch_size=256).",
                TypeError,
            )
        accumulator = Accumulator(accumulation_steps)
        self._books.check_parts(max(accumulator.parts, getattr(self, "_accumulator", accumulator).parts))
        self._compiled_optimizer = None  # what fails below must not leave a mixture that trains
        eagerly = bool(kwargs.get("run_eagerly"))
        _checks.check_replicas(self.distribute_strategy, optimizer, accumulation_steps, eagerly)
        _validate.one_of("correction", correction, CORRECTIONS)
        self._engine = get_engine(engine, microbatch_size, norm_method)
        self._accumulator = accumulator
        if loss_scale is not None:
            _validate.power_of_two("loss_scale", loss_scale)
        self._dp_options: dict[str, Any] = {
            "correction": correction,
            "engine": engine,
            "microbatch_size": microbatch_size,
            "norm_method": norm_method,
            "accumulation_steps": accumulation_steps,
            "loss_scale": loss_scale,
            "augmentation_multiplicity": _validate.positive_int("augmentation_multiplicity", augmentation_multiplicity),
        }
        if augmentation_multiplicity > 1:
            _checks.check_reduction(loss)
        if IS_KERAS_3:
            kwargs.setdefault("auto_scale_loss", False)
            if kwargs.get("jit_compile", "auto") == "auto" and not has_accelerator():
                kwargs["jit_compile"] = False
        _checks.check_layers(self)
        self._refresh_if_stale()  # as what trained so far, and by the optimizer that counted it
        super().compile(optimizer, loss, *args, **kwargs)
        self._books.count_compile()
        self._books.functions.clear()
        self._books.structure = None
        self._books.open_record(optimizer, None)
        self.optimizer = self._compiled_optimizer = optimizer  # tf_keras wraps it under mixed_float16
        self._count_statistics_anew()
        self._create_averages()

    def get_compile_config(self) -> dict[str, Any]:
        """Returns the arguments of `compile`, serialized."""
        config = super().get_compile_config()
        return {**config, **self._dp_options} if config else config

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles from `get_compile_config`."""
        self.compile(**deserialize(config))
        if self.built:
            with self.distribute_strategy.scope():
                self.optimizer.build(self.trainable_variables)

    # ------------------------------------------------------------------ the train step

    @tf.autograph.experimental.do_not_convert
    def train_step(self, data: Any) -> dict[str, Any]:
        """One step of DP-SGD on a batch (x, y[, sample_weight]); rows of weight 0 are padding: metrics do not see it.

        Weights of type bool or int8 only mark padding: `weighted_metrics` get none then, as in Keras without.

        A graph that you trace of it holds the noise and clip norm of the `compile` before; trace it anew after another
        `compile`, whose noise the ledger books from then on. The old one fails when it is run, unless XLA compiled it,
        which cannot refuse. On GPUs and TPUs, switch TensorFloat-32 off before, and leave it off while the graph is in
        use: `fit` and `train_on_batch` do so for each step.

        Raises:
          RuntimeError: without `compile`, if products would be rounded to fewer bits than float32 has, or if TensorFlow
            is told to run functions eagerly.
        """
        self._compiled_dp_optimizer()
        _checks.check_loss(self)
        self._books.check_parts(self._accumulator.parts)
        with tf.init_scope():
            self._watch_statistics()
        if tf.executing_eagerly():  # the local correction reads the graph of the public pass
            _checks.check_functions()
            self._books.check_budgets(self._accumulator.completed_by(1))
            if "step" not in self._books.functions:
                step = tf.function(functools.partial(DPModel.train_step, self), autograph=False)
                self._books.functions["step"] = in_full_float32(step)
            with as_compiled(self), self._forgetting_failures():
                return self._books.functions["step"](data)
        check_full_float32()
        if _is_outermost(self, _OWN_TRAIN_STEP):
            self._begin_batch(data)
        with _after(data):
            admission = self._books.admit(self._accumulator.parts)
        batch = self._read_batch(data)
        public = self._public_forward(batch)

        task = self._task(public)
        with kept_state(self if self._books.has_state else None):
            clipped, result = self._engine(task, batch, self.optimizer.l2_norm_clip)
        self._books.set_releases(self.optimizer, len(task.releases))
        penalty, penalty_gradients = self._regularization()
        clipped = summed_over_replicas(clipped)
        self._accumulator.add(
            clipped, lambda total: self._release(total, public, penalty_gradients, admission), admission.is_part
        )
        self._books.not_finite.assign_add(result.not_finite)
        return self._update_metrics(batch, result, penalty)

    def _forgetting_failures(self) -> contextlib.AbstractContextManager[None]:
        """A scope for steps by hand. Within `fit` the place in the draw must be kept, and `fit` itself forgets."""
        return contextlib.nullcontext() if self._books.depth else self._accumulator.forgetting_failures()

    def _begin_batch(self, data: Any) -> None:
        with _after(data):
            self._accumulator.begin_batch(self._books.begin_batch())

    def _release(
        self,
        clipped: tuple[ClippedSum, ...],
        public: PublicForward | None,
        penalty_gradients: Any,
        admission: Admission,
    ) -> None:
        """Noise, post-processing, update: what follows once a logical batch is complete."""
        optimizer = self._compiled_dp_optimizer()
        with tf.control_dependencies(self._books.count_step(admission)):  # booked before it is released
            noised, *residuals = optimizer.privatize_all(clipped)  # the privacy boundary
        if public is not None:
            noised = noised.plus(public.nonlocal_correction(noised, optimizer.gradient_stddev(len(residuals))))
        noised = noised.plus(penalty_gradients)
        with tf.control_dependencies(noised.tensors):  # no variable changes while another's update still reads it
            optimizer.apply_gradients(noised, self.trainable_variables)
            if public is not None:
                public.update_statistics([each.tensors[0] for each in residuals])

    def _read_batch(self, data: Any) -> Batch:
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
        _checks.check_copies(x, self._dp_options["augmentation_multiplicity"])
        if weight is None:
            return Batch(x, y, None, None)
        masks = [real_example_mask(each) for each in tf.nest.flatten(weight)]
        return Batch(x, y, weight, tf.reduce_any(tf.stack(masks), 0))

    def _public_forward(self, batch: Batch) -> PublicForward | None:
        _checks.check_layers(self)
        x = batch.x
        if self._dp_options["augmentation_multiplicity"] > 1:
            x = tf.nest.map_structure(lambda t: t[:, 0], x)
        structure = self._books.structure = _training_trace.trace_structure(self, x, batch.y)
        if structure.active:
            public_batch = tf.nest.map_structure(lambda t: tf.zeros_like(t[:1]), x)
            if structure.needs_public_batch:
                public_batch = self._require_public_batch()
            return PublicForward(self, public_batch, self._dp_options["correction"], self._books.released_means)
        if structure.has_state:
            # The private pass leaves state alone; run its updates, which do not depend on the input, on zeros.
            call_model(self, tf.nest.map_structure(lambda t: tf.zeros_like(t[:1]), x), training=True)
        return None

    def _build_for(self, x: Any, y: Any) -> bool:
        """Creates the variables of the model, its losses and its metrics: in a step, it is traced twice.

        A model that is not functional is traced for that, once after each `compile`; on several replicas it is left to
        the step.

        Args:
          x, y: specs of a batch.

        Returns:
          Whether the model has all its variables.
        """
        y_pred = symbolic_outputs(self)
        if self._books.functions.get("built") or (y_pred is not None and compiled_is_built(self)):
            return True
        if y_pred is None and self.distribute_strategy.num_replicas_in_sync > 1:
            return self.built
        _checks.check_layers(self)
        if y_pred is None:
            if self._dp_options["augmentation_multiplicity"] > 1:
                x = tf.nest.map_structure(lambda spec: tf.TensorSpec([spec.shape[0], *spec.shape[2:]], spec.dtype), x)
            y_pred = self._trace_outputs(x)
            _checks.check_trainable(self)
        with self.distribute_strategy.scope():
            build_compiled(self, y, y_pred)
        self._books.functions["built"] = True
        return True

    def _create_averages(self) -> None:
        """Creates what the adaptive correction keeps, as far as the model is built: in a step, it is traced twice."""
        if self.built:
            with self.distribute_strategy.scope():
                create_averages(self, self._dp_options["correction"], self._books.released_means)

    def _create_input_means(self, x: Any, y: Any) -> None:
        """Creates what noised statistics keep of their kernel layers' inputs, which takes a trace to find.

        Args:
          x, y: specs of a batch.
        """
        noised = any(getattr(layer, "statistics", None) == "noised" for layer in flatten_layers(self))
        if noised and self._dp_options["correction"] != "none" and "means" not in self._books.functions:
            self._trace(lambda x, y: self._public_forward(Batch(x, y, None, None)) and None, x, y)
            self._books.functions["means"] = True  # they are there now; the graph is of no further use

    def correction_report(self) -> list[tuple[str, str]]:
        """How the gradient flows through the statistics of each normalization; needs `compile` and a public batch.

        Returns:
          For each call in training, in order, the layer's name and "local" (section 3a of docs/algorithm.md),
          "non-local" (3b), "both", "none", or "local only": `correction` asks for both, and 3b cannot serve the call
          (a layer called several times, a frozen scale or offset, noised statistics).
        """
        self._compiled_dp_optimizer()
        batch, found = self._require_public_batch(), []

        def report() -> None:
            public = PublicForward(self, batch, self._dp_options["correction"], self._books.released_means)
            found.append(public.corrections())

        with as_compiled(self):
            if not self.built and self.distribute_strategy.num_replicas_in_sync == 1:
                self._trace_outputs(tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), batch))
            self._trace(report)
        return found[0]  # each replica reports the same

    def _task(self, public: PublicForward | None) -> Task:
        """Describes one example's forward pass: a batch of its copies, or of one, with the public statistics."""
        seeds = draw_example_seeds(self)
        copies = self._dp_options["augmentation_multiplicity"]
        calls = public.calls if public else []

        def run_example(x: Any, y: Any, weight: Any, index: tf.Tensor, statistics: Any) -> ExampleResult:
            y, weight = tf.nest.map_structure(lambda t: t[None], (y, weight))
            y = _with_class_where_unweighted(y, weight)
            scale, weight = _split_weight(weight)
            if copies == 1:
                x = tf.nest.map_structure(lambda t: t[None], x)
            else:
                y = tf.nest.map_structure(lambda t: tf.repeat(t, copies, 0), y)
                weight = None if weight is None else tf.nest.map_structure(lambda t: tf.repeat(t, copies, 0), weight)
            with (
                GivenStatistics(calls, statistics) as given,
                isolated_call(seeds, index, tracker_variables(self), self.weights) as scope,
            ):
                y_pred = call_model(self, x, training=True)
                loss, parts = compiled_data_loss(self, y, y_pred, weight, scope)
            masks = tf.nest.map_structure(lambda t: t[0], masks_of(y_pred))  # of copies alike: shapes are the same
            y_pred = tf.nest.map_structure(lambda t: tf.squeeze(t, 0) if copies == 1 else tf.reduce_mean(t, 0), y_pred)
            y_pred = MaskedPredictions(y_pred, masks) if tf.nest.flatten(masks) else y_pred
            parts = tuple(scale * tf.cast(part, tf.float32) for part in parts)
            residuals = public.residuals(given, tf.nest.flatten(x)) if public else ()
            return ExampleResult(scale * tf.reduce_mean(loss), parts, y_pred, residuals)

        variables = tuple(raw(variable) for variable in self.trainable_variables)
        scale = self._loss_scale()
        return Task(run_example, variables, calls, scale)

    def _loss_scale(self) -> float:
        given = self._dp_options["loss_scale"]
        if given is not None:
            return float(given)
        half = any(getattr(layer, "compute_dtype", None) == "float16" for layer in [self, *flatten_layers(self)])
        return _HALF_PRECISION_LOSS_SCALE if half else 1.0

    def _regularization(self) -> tuple[tf.Tensor, list[tf.Tensor | None]]:
        """Sum of the weights' regularizers and its gradients: no private data, so neither clipped nor noised."""
        variables = [raw(variable) for variable in self.trainable_variables]
        with tf.GradientTape() as tape:
            losses = [tf.cast(loss, tf.float32) for loss in regularization_losses(self)]
            total = tf.add_n(losses) if losses else tf.constant(0.0)
        return total, tape.gradient(total, variables) if losses else [None] * len(variables)

    def _update_metrics(self, batch: Batch, result: BatchResult, penalty: tf.Tensor) -> dict[str, Any]:
        """Updates Keras' metrics on the real examples; un-noised, outside the guarantee.

        Args:
          batch: the batch.
          result: losses and predictions of its rows.
          penalty: the regularizers' sum at the weights that made them, from before the update.
        """
        real = tf.ones_like(result.loss, tf.bool) if batch.mask is None else batch.mask
        count = tf.reduce_sum(tf.cast(real, tf.float32))

        def mean(values: tf.Tensor) -> tf.Tensor:
            values = tf.where(real, values, tf.zeros_like(values))
            return tf.math.divide_no_nan(tf.reduce_sum(values), count)

        total, parts = loss_trackers(self)
        total.update_state(mean(result.loss) + penalty, sample_weight=count)
        for tracker, values in zip(parts, result.parts, strict=True):
            tracker.update_state(mean(values), sample_weight=count)
        y_pred, weight = result.y_pred, batch.sample_weight
        if isinstance(y_pred, MaskedPredictions):
            y_pred = with_masks(*y_pred)
        if isinstance(weight, tf.Tensor) and weight.dtype in (tf.bool, tf.int8):  # only says which rows are real
            weight = None
        update_compiled_metrics(self, batch.y, y_pred, weight, batch.mask)
        return self.get_metrics_result()

    # ------------------------------------------------------------------ training

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        *,
        class_weight: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Trains as keras.Model.fit does.

        Pass a data set from `PrivacyPlan.poisson_dataset` as x: the accounting assumes Poisson-sampled batches. Other
        input works with a warning, and the privacy statement says that sampling was assumed.

        Raises:
          ValueError: before any training, if the data set and the optimizer disagree about batch size or number of
            examples, if labels are out of range, if there is no loss or nothing trains, or if a public batch is needed
            and missing, or holds rows of the training data.
          RuntimeError: with accumulation_steps, if a callback of `fit` trains the model, by whatever method (by a graph
            of its own: tf.errors.InvalidArgumentError).
        """
        kwargs.update(batch_size=batch_size, epochs=epochs)
        source = source_of(x)
        optimizer, accumulator, steps_before = self._compiled_dp_optimizer(), self._accumulator, self.private_steps
        self._books.check_parts(accumulator.parts)
        around = self._books.running_law if self._books.depth else (None,)  # of a `fit` whose callback called this one
        try:
            with self._books.running_fit():
                with as_compiled(self):
                    self._prepare_training(x, y, kwargs)
                if isinstance(x, tf.data.Dataset):
                    kwargs.setdefault("shuffle", False)  # Keras cannot shuffle it, and says so
                    if class_weight is not None:
                        x, class_weight = apply_class_weight(x, class_weight), None
                    elif source is not None and source.sample_weight is None:  # metrics are to see no weights either
                        x = x.map(lambda x, y, is_example: (x, y, tf.cast(is_example, tf.int8)))
                return super().fit(x, y, class_weight=class_weight, **kwargs)
        finally:  # whatever failed: later steps have neither these batches nor an optimizer that a callback put in
            accumulator.reset()  # an interrupted logical batch is not another one's beginning
            self._books.open_record(self._compiled_optimizer or optimizer, *around)
            if self.private_steps > steps_before:
                # Even if fresh at the last step: Keras may have written averaged or earlier weights since.
                self.refresh_statistics()

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """keras.Model.train_on_batch; the ledger books the step with sampling assumed.

        With accumulation_steps, that many calls make one logical batch, no example of which may be in two of them.

        Raises:
          NotImplementedError: on Keras 3 with several replicas, each of which Keras would give the whole batch.
        """
        self._compiled_dp_optimizer()
        check_rounding()
        _checks.check_loss(self)
        with as_compiled(self):
            _checks.check_trainable(self)
            _checks.check_grouped_convolutions(self, is_compiled_whole(self))
        _checks.check_single_batch(self.distribute_strategy)
        _checks.check_workers(self.distribute_strategy, None, None)
        self._books.check_parts(self._accumulator.parts)
        self._books.check_budgets(self._accumulator.completed_by(1))
        self._watch_statistics()
        with self._books.beside_fit(), self._forgetting_failures():
            return super().train_on_batch(*args, **kwargs)

    def make_train_function(self, force: bool = False) -> Any:
        """As in Keras; what it makes multiplies in full float32, on GPUs and TPUs too."""
        before = self.train_function
        super().make_train_function(force)
        if self.train_function is not before:
            function = in_full_float32(self.train_function)
            self.train_function = self._books.of_fit(
                function, lambda: steps_of_call(self), lambda batches: self._accumulator.completed_by(batches)
            )
        return self.train_function

    def steps_at_a_time(self) -> int:
        """How many private steps one call of Keras' train function takes at most.

        Raises:
          ValueError: if Keras tunes the number while training.
        """
        return -(-steps_per_execution(self) // self._accumulator.parts)

    def _compiled_dp_optimizer(self) -> DPOptimizer:
        """The optimizer that `compile` got, whose steps the ledger books; another one is refused."""
        compiled = getattr(self, "_compiled_optimizer", None)
        if compiled is None or self.optimizer is not compiled:
            raise RuntimeError("Call compile(optimizer=..., loss=...) before training.")
        return compiled

    def _prepare_training(self, x: Any, y: Any, options: dict[str, Any]) -> None:
        """Checks everything that can be checked before the first step, and opens the ledger's record."""
        optimizer, source = self._compiled_dp_optimizer(), source_of(x)
        check_rounding()
        _checks.check_loss(self)
        _checks.check_trainable(self)
        _checks.check_grouped_convolutions(self, is_compiled_whole(self))
        law = source.sampling if source else _law_behind(x)
        if source is None:
            origin = "do not come from" if law is None else "were changed (mapped, cached, shuffled) after"
            warnings.warn(
                f"The batches {origin} PrivacyPlan.poisson_dataset (or tf_dpbn.sampling.poisson_dataset). The reported "
                "epsilon assumes Poisson sampling, which shuffled or fixed-order batches do not satisfy.",
                PrivacyWarning,
                stacklevel=3,
            )
        if law is None:
            held_out = options.get("validation_split", 0.0)
            _checks.check_batches(x, options.get("batch_size"), held_out, optimizer, self._accumulator.parts)
        else:
            replicas = self.distribute_strategy.num_replicas_in_sync
            _checks.check_sampling(law, optimizer, self._accumulator.parts, replicas)
        if source is not None:
            _checks.check_multiplicity(source.augmentation_multiplicity, self._dp_options["augmentation_multiplicity"])
        _checks.check_workers(self.distribute_strategy, source, self._books.public_batch)
        if source is not None and source.draws is not None:
            source.draws.begin(lambda: self.private_steps)
        if self._books.public_batch is not None and not self._books.may_contain_training_rows:
            behind = source_behind(x)
            _checks.check_public_rows(self._books.public_batch, x if behind is None else behind.inputs)
        labels = source.labels if source else y
        if labels is not None:
            _checks.check_labels(self, labels, source.sample_weight if source else options.get("sample_weight"))
        _checks.check_callbacks(options.get("callbacks"))
        if self._accumulator.parts > 1:
            steps = steps_of_epoch(options.get("steps_per_epoch"))
            if steps is not None:
                _checks.check_steps(steps, steps_per_execution(self), self._accumulator.parts)
            is_whole = steps is not None or source is not None
            boundaries = EpochBoundaries(self._accumulator, is_whole, lambda: bool(self.stop_training))
            options["callbacks"] = with_callback(options.get("callbacks"), boundaries)
        built = self._build_for(*x.element_spec[:2]) if source is not None else symbolic_outputs(self) is not None
        self._books.open_record(optimizer, law, "poisson" if source else "assumed")
        if source is not None and source.plan is not None:
            _checks.check_plan(source.plan, source.sampling, self.ledger, self.running_record, options)
        if built:  # created in the step they would have it traced twice
            self._create_averages()
            with self.distribute_strategy.scope():
                optimizer.build(self.trainable_variables)
        if built and source is not None:
            self._create_input_means(*x.element_spec[:2])
        self._watch_statistics()


_OWN_TRAIN_STEP = DPModel.__dict__["train_step"]


@keras.saving.register_keras_serializable(package="tf_dpbn")
class DPFunctional(DPModel, Functional):
    """What `DPModel(inputs, outputs)` returns: a functional model that trains with DP-SGD."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    # Keras saves the network of a functional model only if its constructor looks like Functional's.
    __init__.__signature__ = inspect.signature(Functional.__init__)  # type: ignore[attr-defined, misc]


@keras.saving.register_keras_serializable(package="tf_dpbn")
class DPSequential(DPModel, keras.Sequential):
    """A keras.Sequential that trains with DP-SGD; see DPModel.

    Args:
      layers: optional list of layers.
      name: optional name.
    """


def _is_outermost(model: DPModel, train_step: Any) -> bool:
    """Whether this is the train_step that Keras calls, and not one that another one calls."""
    if id(model) in _STEPPING.get() or "train_step" in vars(model):
        return False
    return inspect.getattr_static(type(model), "train_step") is train_step


def _beginning_batches(step: Any) -> Any:
    """The train_step of a subclass (a function, or a tf.function), which says where a batch begins."""

    def train_step(self: DPModel, *args: Any, **kwargs: Any) -> Any:
        call = step.__get__(self, type(self))
        if not _is_outermost(self, train_step):
            return call(*args, **kwargs)
        self._compiled_dp_optimizer()
        token = _STEPPING.set(_STEPPING.get() | {id(self)})
        try:
            with self._forgetting_failures():
                self._begin_batch((args, kwargs))
                return call(*args, **kwargs)
        finally:
            _STEPPING.reset(token)

    train_step.__doc__ = getattr(step, "__doc__", None)
    _BEGINNING_BATCHES.add(train_step)
    return train_step


def _law_behind(x: Any) -> Any:
    """The PoissonSampling of the data set whose batches a data set was derived from, or None where rows are others."""
    source = source_behind(x)
    if source is None:
        return None
    (rows,) = tf.nest.flatten(x.element_spec)[0].shape[:1].as_list() or [0]
    law = source.sampling
    return law if rows in (None, law.rows // law.batches_per_draw) else None


def _after(data: Any) -> Any:
    """A scope whose operations wait for the batch: where data end, Keras asks for one more, which is no step."""
    tensors = [each for each in tf.nest.flatten(data, expand_composites=True) if tf.is_tensor(each)]
    return tf.control_dependencies(tensors)


def _with_class_where_unweighted(y: Any, weight: Any) -> Any:
    """Sets labels of weight 0 to class 0: the loss of a label that is no class fails on CPUs and is NaN elsewhere."""
    if tf.nest.is_nested(y) or tf.nest.is_nested(weight) or not y.dtype.is_integer or y.shape.rank is None:
        return y
    if weight.shape.rank is None or not y.shape[: weight.shape.rank].is_compatible_with(weight.shape):
        return y
    counts = tf.reshape(weight != 0, tf.concat([tf.shape(weight), [1] * (y.shape.rank - weight.shape.rank)], 0))
    return tf.where(counts, y, tf.zeros_like(y))


def _split_weight(weight: Any) -> tuple[Any, Any]:
    """Splits one example's sample weight, [1, ...], into a factor on its loss and what Keras' loss must handle.

    A weight for the whole example multiplies its loss, whatever the loss' reduction; weights by position or by output
    go to Keras.
    """
    if isinstance(weight, tuple) and not weight:
        return 1.0, None
    if not tf.nest.is_nested(weight) and weight.shape.num_elements() == 1:
        return tf.cast(tf.reshape(weight, []), tf.float32), None
    return 1.0, weight
