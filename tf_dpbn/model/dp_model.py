"""DPModel and DPSequential: Keras models whose train step is differentially private. `train_step` is the algorithm."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import warnings
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from tf_dpbn import _keras, _validate
from tf_dpbn._devices import has_accelerator, require_full_float32
from tf_dpbn._keras import IS_KERAS_3, Functional, keras
from tf_dpbn.accounting import Ledger, PrivacyWarning, privacy_statement
from tf_dpbn.accounting.files import TRAINING_ROWS
from tf_dpbn.clipping import Batch, get_engine
from tf_dpbn.mechanisms import summed_over_replicas
from tf_dpbn.model import checks, saving, step
from tf_dpbn.model.progress import with_progress
from tf_dpbn.model.public_statistics import PublicStatistics, trace_in_replica, trace_outputs, with_refreshes
from tf_dpbn.model.training_record import NO_SAVED_MODEL, TrainingRecord
from tf_dpbn.normalization import CORRECTIONS, PublicForward, create_averages
from tf_dpbn.optimizers import DPOptimizer
from tf_dpbn.sampling import PoissonSampling, apply_class_weight, source_behind, source_of


class DPModel(keras.Model):
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
        if cls is DPModel and _keras.is_functional_signature(args, kwargs):
            return super().__new__(DPFunctional, *args, **kwargs)
        return super().__new__(cls, *args, **kwargs)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if _keras.is_functional_signature(args, kwargs) and not isinstance(self, Functional):
            raise TypeError(
                "A subclass of DPModel must define `call` and pass no inputs and outputs to super().__init__(). Use "
                f"tf_dpbn.DPModel(inputs, outputs) directly for a functional model. Received: {type(self).__name__}"
            )
        super().__init__(*args, **kwargs)
        self._record = TrainingRecord()
        self._public = PublicStatistics(self)
        self._private_optimizer: DPOptimizer | None = None
        self._is_training = self._is_in_step = self._is_prepared = False

    def __deepcopy__(self, memo: Any) -> Any:
        """Refuses: two models would go on with one training record."""
        raise TypeError(
            "copy.deepcopy cannot copy a DPModel with its training record. Save it and load it twice, or copy it by "
            f"tf_dpbn.convert(model). Received: model={self.name!r}"
        )

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
        loss_scale: float | None = None,
        augmentation_multiplicity: int = 1,
        max_examples_per_user: int = 1,
        ledger_file: str | os.PathLike[str] | None = None,
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
          microbatch_size: how many examples are worked on at a time, within one step, 1 or rounded up to a multiple of
            16; bounds memory, also that of batches far larger than fit at once, and does not change the result. None
            chooses.
          norm_method: for "book_keeping": "auto", "instantiate" or "gram", see `clipping.book_keeping`.
          loss_scale: power of two by which the loss of each example is multiplied while it is differentiated, and its
            gradient divided by, in float32, before it is clipped: small gradients then survive half precision, and
            nothing else changes. None takes 1024 if a layer computes in float16 and 1 otherwise.
          augmentation_multiplicity: K > 1 if inputs are [batch, K, ...], K augmented copies of each example, as
            `poisson_dataset` makes them; the gradients of an example's copies are averaged before they are clipped.
          max_examples_per_user: K > 1 if inputs, labels and weights are [batch, K, ...], at most K examples of each
            user, as `poisson_dataset(user_ids=...)` makes them; the gradients of a user's examples are averaged before
            they are clipped, and the guarantee is for users.
          ledger_file: path of an `accounting.LedgerFile`, or None. Steps are written to it before they run, so that the
            record of none is lost if the program dies; what it says already is added to the ledger. One model at a time
            trains with it. It is no part of a saved model: compile again after `load_model`.

        Raises:
          TypeError: if the optimizer is not a DPOptimizer.
          ValueError: for unknown options, stock batch normalization in the model (naming the layer), or a ledger file
            that is open elsewhere, was changed, or is none.
          NotImplementedError: under a distribution strategy that does not mirror variables, or for options that several
            replicas, or several workers, cannot combine with.
          RuntimeError: by a callback of a running `fit`.
        """
        if not isinstance(optimizer, DPOptimizer):
            remedy = (
                "Wrap yours: tf_dpbn.optimizers.DPOptimizer.from_plan(plan, inner, l2_norm_clip=1.0), or DPOptimizer("
                "inner, l2_norm_clip=1.0, noise_multiplier=1.1, expected_batch_size=256, num_examples=60_000)."
            )
            raise _validate.argument_error("optimizer", optimizer, "be a DPOptimizer", remedy, TypeError)
        self._refuse_while_training("compile")
        self._private_optimizer = None  # a model whose `compile` fails does not train
        checks.check_overrides(self, DPModel)
        checks.check_replicas(self.distribute_strategy, optimizer, bool(kwargs.get("run_eagerly")))
        checks.check_ledger_file(self.distribute_strategy, ledger_file)
        self._record.check_optimizer(optimizer)
        _validate.one_of("correction", correction, CORRECTIONS)
        self._engine = get_engine(engine, microbatch_size, norm_method)
        if loss_scale is not None:
            _validate.power_of_two("loss_scale", loss_scale)
        self._dp_options: dict[str, Any] = {
            "correction": correction,
            "engine": engine,
            "microbatch_size": microbatch_size,
            "norm_method": norm_method,
            "loss_scale": loss_scale,
            "augmentation_multiplicity": _validate.positive_int("augmentation_multiplicity", augmentation_multiplicity),
            "max_examples_per_user": _validate.positive_int("max_examples_per_user", max_examples_per_user),
        }
        checks.check_one_group(self._dp_options)
        if augmentation_multiplicity > 1:
            checks.check_reduction(loss)
        if IS_KERAS_3:
            kwargs.setdefault("auto_scale_loss", False)
            if kwargs.get("jit_compile", "auto") == "auto" and not has_accelerator():
                kwargs["jit_compile"] = False
        checks.check_layers(self)
        super().compile(optimizer, loss, *args, **kwargs)
        self._record.use_file(ledger_file)
        self.optimizer = self._private_optimizer = optimizer  # tf_keras wraps it under mixed_float16
        self._record.open(optimizer, unit=self._unit())
        self._public.structure = None
        self._forget_traces()
        self._create_averages()

    def _unit(self) -> str:
        """What a row of a batch is."""
        return "user" if self._dp_options["max_examples_per_user"] > 1 else "example"

    def get_compile_config(self) -> dict[str, Any]:
        """Returns the arguments of `compile`, serialized."""
        config = super().get_compile_config()
        return {**config, **self._dp_options} if config else config

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles from `get_compile_config`."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            with self.distribute_strategy.scope():
                self.optimizer.build(self.trainable_variables)

    # ------------------------------------------------------------------ the train step

    @tf.autograph.experimental.do_not_convert
    def train_step(self, data: Any) -> dict[str, Any]:
        """One step of DP-SGD on a batch (x, y[, sample_weight]), for `fit` and `train_on_batch`.

        Rows of weight 0 are padding: metrics do not see it. Weights of type bool or int8 only mark padding:
        `weighted_metrics` get none then, as in Keras without.

        Raises:
          RuntimeError: outside of `fit` and `train_on_batch`.
        """
        optimizer = self._check_entry()
        if tf.executing_eagerly():  # compile(run_eagerly=True): the local correction reads the public pass' graph
            return self._traced_step(data)
        batch = step.read_batch(self, data)
        public = step.public_forward(self, batch)
        clipped, result = step.clipped_sums(self, batch, public)
        penalty, penalty_gradients = step.regularization(self)
        stddev = optimizer.gradient_stddev(len(clipped) - 1)
        released, *statistics = optimizer.release(summed_over_replicas(clipped))  # the privacy boundary
        correction = public.nonlocal_correction(released, stddev)
        gradients = released.plus(correction).plus(penalty_gradients)
        with tf.control_dependencies([tf.group(gradients.tensors)]):  # no variable changes while an update reads it
            optimizer.apply_gradients(gradients, self.trainable_variables)
            public.update_statistics([each.tensors[0] for each in statistics])
        return step.update_metrics(self, batch, result, penalty)

    def _check_entry(self) -> DPOptimizer:
        """The optimizer of a step that Keras' train function takes; a step from elsewhere is refused."""
        optimizer = self._compiled_optimizer()
        if not self._is_in_step:
            raise RuntimeError(
                "A private step is taken by `fit` and `train_on_batch` alone, which see to its privacy and record it. "
                "Call one of them instead of train_step."
            )
        return optimizer

    def make_train_function(self, force: bool = False) -> Any:
        """As in Keras; only what it makes may call `train_step`, and it multiplies in full float32."""
        before = self.train_function
        super().make_train_function(force)
        function = self.train_function
        if function is before:
            return before

        def train_function(*args: Any, **kwargs: Any) -> Any:
            require_full_float32()
            self._record.write_ahead(functools.partial(_keras.steps_of_call, self))
            self._is_in_step = True
            try:
                result = function(*args, **kwargs)
                if "trained" not in vars(train_function):  # what it was traced for
                    vars(train_function)["trained"] = _keras.trainable_flags(self)
                return result
            finally:
                self._is_in_step = False

        self.train_function = train_function
        return train_function

    # ------------------------------------------------------------------ training

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        *,
        callbacks: Any = None,
        class_weight: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Trains as keras.Model.fit does.

        Pass a data set from `PrivacyPlan.poisson_dataset` as x: the accounting assumes Poisson-sampled batches. Other
        input works with a warning, and the privacy statement says that sampling was assumed. TensorFloat-32, in which
        GPUs would round products, is switched off and stays so, here and in `train_on_batch`.

        With a delta, from the data set's plan or the optimizer, the logs of each epoch have "epsilon", of all steps so
        far, and with a plan "planned_epsilon": the progress bar, History, CSVLogger and TensorBoard show them. (Not for
        plans by PLD accounting, which takes longer: add PrivacyLogger.) Unless verbose=0, a line at the end tells
        epsilon, and one at the beginning how long a large network's first step takes, which is traced.

        Raises:
          ValueError: before any training, if the data set and the optimizer disagree about batch size or number of
            examples, if labels are out of range, if there is no loss or nothing trains, or if a public batch is needed
            and missing, or holds rows of the training data.
          RuntimeError: by a callback of a running `fit`.
        """
        kwargs.update(batch_size=batch_size, epochs=epochs, callbacks=callbacks)
        source = source_of(x)
        with self._training("fit") as optimizer:
            try:
                with _keras.as_compiled(self):
                    self._prepare_fit(x, y, kwargs)
                if isinstance(x, tf.data.Dataset):
                    kwargs.setdefault("shuffle", False)  # Keras cannot shuffle it, and says so
                    if class_weight is not None:
                        checks.check_class_weight(self._dp_options)
                        x, class_weight = apply_class_weight(x, class_weight), None
                    elif source is not None and not source.has_weights:  # metrics are to see no weights either
                        x = x.map(lambda x, y, is_example: (x, y, tf.cast(is_example, tf.int8)))
                told = with_progress(callbacks, source.plan if source else None, optimizer.delta)
                kwargs["callbacks"] = with_refreshes(told)
                return super().fit(x, y, class_weight=class_weight, **kwargs)
            finally:
                self._record.open(optimizer, unit=self._unit())  # later steps are not on these batches

    def train_on_batch(self, x: Any, y: Any = None, sample_weight: Any = None, *args: Any, **kwargs: Any) -> Any:
        """keras.Model.train_on_batch; the ledger records the step with sampling assumed, without a warning.

        A batch of `poisson_dataset` is passed whole, `train_on_batch(*batch)`: its weights tell examples from padding.

        Raises:
          ValueError: without weights, for another number of rows than expected_batch_size.
          NotImplementedError: on Keras 3 with several replicas, each of which Keras would give the whole batch.
          RuntimeError: by a callback of a running `fit`.
        """
        with self._training("train_on_batch") as optimizer:
            checks.check_single_batch(self.distribute_strategy)
            checks.check_workers(self.distribute_strategy, None, None)
            checks.check_rows(x, sample_weight, optimizer)
            return super().train_on_batch(x, y, sample_weight, *args, **kwargs)

    @contextlib.contextmanager
    def _training(self, method: str) -> Iterator[DPOptimizer]:
        """A scope in which the model trains, once it may; yields the optimizer."""
        self._refuse_while_training(method)
        optimizer = self._compiled_optimizer()
        checks.check_functions()
        checks.check_overrides(self, DPModel)
        checks.check_loss(self)
        with _keras.as_compiled(self):
            checks.check_trainable(self)
            checks.check_traced(self)
            checks.check_grouped_convolutions(self, _keras.is_compiled_whole(self))
        self._record.open_file()
        self._is_training = True
        try:
            yield optimizer
        finally:
            self._is_training = False
            if method == "fit":  # `train_on_batch` cannot know of its last step
                self._record.close_file()

    def _refuse_while_training(self, method: str) -> None:
        if self._is_training:
            raise RuntimeError(
                f"`{method}` cannot be called by a callback of a running `fit`, whose batches and noise the ledger "
                f"records. Call `{method}` before or after `fit`."
            )

    def _compiled_optimizer(self) -> DPOptimizer:
        """The optimizer that `compile` got, whose steps the ledger reads; another one is refused."""
        if self._private_optimizer is None or self.optimizer is not self._private_optimizer:
            raise RuntimeError("Call compile(optimizer=..., loss=...) before training.")
        return self._private_optimizer

    def _prepare_fit(self, x: Any, y: Any, options: dict[str, Any]) -> None:
        """Checks everything that can be checked before the first step, and opens the ledger's record."""
        optimizer, source = self._compiled_optimizer(), source_of(x)
        batches = source.sampling if source else _sampling_behind(x)
        if source is None:
            origin = (
                "do not come from" if batches is None else "were changed (mapped, batched, shuffled, repeated) after"
            )
            message = (
                f"The batches {origin} PrivacyPlan.poisson_dataset (or tf_dpbn.sampling.poisson_dataset). The reported "
                "epsilon assumes Poisson sampling, which shuffled or fixed-order batches do not satisfy. Pass such a "
                "data set as it comes: it draws anew in each epoch."
            )
            warnings.warn(message, PrivacyWarning, stacklevel=3)
        if batches is None:
            checks.check_batches(x, options["batch_size"], options.get("validation_split", 0.0), optimizer)
        else:
            checks.check_sampling(batches, optimizer, self.distribute_strategy.num_replicas_in_sync)
        if source is not None:
            checks.check_same_groups(source, self._dp_options)
        checks.check_workers(self.distribute_strategy, source, self._public.batch)
        if source is not None and source.draws is not None:
            source.draws.begin(lambda: self.private_steps)
        if self._public.batch is not None and not self._public.may_contain_training_rows:
            behind = source_behind(x)
            checks.check_public_rows(self._public.batch, x if behind is None else behind.inputs)
        labels = source.labels if source else y
        if labels is not None:
            checks.check_labels(self, labels, source.sample_weight if source else options.get("sample_weight"))
        held_out = options.get("validation_data")
        checks.check_unpadded("validation_data", held_out)
        if isinstance(held_out, (tuple, list)) and len(held_out) > 1 and held_out[1] is not None:
            checks.check_labels(self, held_out[1], held_out[2] if len(held_out) > 2 else None, "validation_data")
        checks.check_callbacks(options["callbacks"])
        next_step = self._record.open(optimizer, batches, "poisson" if source else "assumed", self._unit())
        if source is not None and source.plan is not None:
            checks.check_plan(source.plan, source.sampling, self.ledger, next_step, options)
        self._create_variables(*x.element_spec[:2] if source is not None else (None, None))

    def _create_variables(self, x: Any, y: Any) -> None:
        """Creates, as far as can be, the variables that a step would otherwise create, and be traced twice for.

        A model that is not functional is traced for that on the specs of a batch, if they are known, once after each
        `compile`; on several replicas it is left to the step.
        """
        y_pred = _keras.symbolic_outputs(self)
        is_functional = y_pred is not None
        can_trace = is_functional or self.distribute_strategy.num_replicas_in_sync == 1
        if x is not None and not self._is_prepared and can_trace:
            checks.check_layers(self)
            first_x, first_y = step.first_of_groups(self._dp_options, x, y)
            if not is_functional:
                y_pred = trace_outputs(self, first_x)
                checks.check_trainable(self)
            with self.distribute_strategy.scope():
                _keras.build_compiled(self, first_y, y_pred)
        elif not (is_functional or x is not None and self.built):
            return
        self._create_averages()
        with self.distribute_strategy.scope():
            self._compiled_optimizer().build(self.trainable_variables)
        noised = any(getattr(layer, "statistics", None) == "noised" for layer in _keras.flatten_layers(self))
        if x is not None and noised and self._dp_options["correction"] != "none" and not self._is_prepared:
            # The means of what kernel layers are fed with take a trace to find; the graph is of no further use.
            trace_in_replica(self, lambda x, y: step.public_forward(self, Batch(x, y, None, None)), x, y)
        self._is_prepared = x is not None

    def _create_averages(self) -> None:
        """Creates what the adaptive correction keeps, as far as the model is built: in a step, it is traced twice."""
        if self.built:
            with self.distribute_strategy.scope():
                create_averages(self, self._dp_options["correction"], self._record.released_means)

    def _forget_traces(self) -> None:
        """What was traced holds another public batch, or what `compile` got before."""
        self._is_prepared = False
        self._traced_step = tf.function(functools.partial(DPModel.train_step, self), autograph=False)

    # ------------------------------------------------------------------ statistics

    def set_public_batch(
        self, batch: Any, *, value_range: tuple[float, float] | None = None, may_contain_training_rows: bool = False
    ) -> None:
        """Sets the public examples from which batch statistics are computed; saved with the model.

        Args:
          batch: nest of arrays like the model's input, [examples, ...], 2 examples or more; 30 to 256 are typical. It
            must not contain private data: it is stored in the clear. See `public_data` for synthetic ones.
          value_range: if given, (low, high) that all values must lie in: the range of the training data.
          may_contain_training_rows: True lets `fit` train on data that hold rows of the batch, which it else refuses.
            Such rows have no privacy; say so only if they are public, or coincide by chance.

        Raises:
          ValueError: for a wrong structure, shape, dtype or range, or non-finite values.
        """
        if self._public.set_batch(batch, value_range, may_contain_training_rows):
            self._forget_traces()
            if self.train_function is not None:  # the batch is part of the traced step
                self.make_train_function(force=True)

    @property
    def public_batch(self) -> Any:
        """The public batch as numpy arrays, or None."""
        batch = self._public.batch
        return None if batch is None else tf.nest.map_structure(lambda t: t.numpy(), batch)

    def refresh_statistics(self) -> None:
        """Sets the moving statistics to those of the public batch at the current weights.

        Each step sets them to those of the weights before its update, `fit` at the ends of epochs to those after it,
        and so do `evaluate`, `predict`, saving and export of a model that has trained in this process. Call it if you
        call the model itself after `train_on_batch`, or after changing weights by hand.

        Raises:
          RuntimeError: if the model is not built.
          ValueError: if a public batch is needed and there is none.
        """
        self._public.refresh()

    def evaluate(self, x: Any = None, *args: Any, callbacks: Any = None, **kwargs: Any) -> Any:
        """keras.Model.evaluate, by statistics of the weights, also of those that callbacks put into the model.

        Raises:
          ValueError: for a data set of Poisson draws, whose padding would count.
        """
        checks.check_unpadded("x", x)
        return super().evaluate(x, *args, callbacks=self._with_statistics(callbacks), **kwargs)

    def predict(self, x: Any, *args: Any, callbacks: Any = None, **kwargs: Any) -> Any:
        """keras.Model.predict, by statistics of the weights, also of those that callbacks put into the model.

        Raises:
          ValueError: for a data set of Poisson draws, with whose padding predictions would come.
        """
        checks.check_unpadded("x", x)
        return super().predict(x, *args, callbacks=self._with_statistics(callbacks), **kwargs)

    def _with_statistics(self, callbacks: Any) -> Any:
        """Refreshes statistics for an evaluation, or lets callbacks do so; those of `fit` do already."""
        if callbacks and not isinstance(callbacks, keras.callbacks.CallbackList):
            return with_refreshes(callbacks)
        if not callbacks:
            self._public.refresh_if_trained()
        return callbacks

    def correction_report(self) -> list[tuple[str, str]]:
        """How the gradient flows through the statistics of each normalization; needs `compile` and a public batch.

        Returns:
          For each call in training, in order, the layer's name and "local" (section 3a of docs/algorithm.md),
          "non-local" (3b), "both", "none", or "local only": `correction` asks for both, and 3b cannot serve the call
          (a layer called several times, a frozen scale or offset, noised statistics).
        """
        self._compiled_optimizer()
        batch, found = self._public.require_batch(), []

        def report() -> None:
            public = PublicForward(self, batch, self._dp_options["correction"], self._record.released_means)
            found.append(public.corrections())

        with _keras.as_compiled(self):
            if not self.built and self.distribute_strategy.num_replicas_in_sync == 1:
                trace_outputs(self, tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), batch))
            trace_in_replica(self, report)
        return found[0]  # each replica reports the same

    # ------------------------------------------------------------------ ledger

    @property
    def ledger(self) -> Ledger:
        """A copy of the record of every private step that this model has taken, in this process or before saving."""
        return self._record.ledger()

    @property
    def private_steps(self) -> int:
        """How many private steps this process has taken with this model."""
        return self._record.own_steps

    def epsilon(self, delta: float, accountant: str = "rdp") -> float:
        """The epsilon, at `delta`, of everything that ran.

        Args:
          delta: in (0, 1), below 1 / number of examples.
          accountant: "rdp" or "pld".
        """
        return self.ledger.epsilon(delta, accountant)

    def privacy_statement(self, delta: float, accountant: str = "rdp") -> str:
        """What the guarantee is, what it assumes, and what it does not cover, in plain words. For what really ran."""
        told = [TRAINING_ROWS] if self._public.may_contain_training_rows else []
        return privacy_statement(self.ledger, delta=delta, accountant=accountant, not_covered=told)

    @property
    def debug_non_finite_examples(self) -> int:
        """How many examples were dropped because their gradient was non-finite: private, not to be released."""
        return _keras.count_of(self._record.non_finite)

    # ------------------------------------------------------------------ saving

    def export(self, *args: Any, **kwargs: Any) -> Any:
        """keras.Model.export: a file for inference that runs without tf_dpbn.

        A SavedModel, or with Keras 3 `format="litert"`, "onnx" or "openvino", each with its packages (extra "export").
        """
        self._public.refresh_if_trained()
        return super().export(*args, **kwargs)

    def save(self, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """keras.Model.save in the .keras format, which keeps public batch and ledger too.

        Raises:
          ValueError: for the formats .h5 and (tf_keras) SavedModel, which would lose them.
        """
        saving.check_file(filepath, kwargs.get("save_format", "keras"))
        return super().save(filepath, *args, **kwargs)

    def save_weights(self, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """keras.Model.save_weights; .weights.h5 keeps public batch and ledger too.

        Raises:
          ValueError: for another .h5 file, which would lose the ledger.
        """
        saving.check_weights_file(filepath, kwargs.get("save_format"))
        self._public.refresh_if_trained()
        return super().save_weights(filepath, *args, **kwargs)

    @functools.cached_property
    def zz_tf_dpbn_record(self) -> _keras.StoredBeside:
        """What weights files hold of public batch and ledger, which a stock model passes over.

        tf_keras visits attributes in reverse order and stops at weights that do not match: this one comes first.
        """
        return _keras.StoredBeside(
            functools.partial(saving.save_record, self), functools.partial(saving.load_record, self)
        )

    def save_own_variables(self, store: Any) -> None:
        """Keras' hook, before other weights are saved."""
        self._public.refresh_if_trained()
        if not IS_KERAS_3:
            self.reset_metrics()  # tf_keras saves them: sums over private examples, without noise
        super().save_own_variables(store)

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> Any:
        if save_type == "savedmodel" and not IS_KERAS_3:  # Keras 3's `export` comes here too, but not to the record
            raise ValueError(NO_SAVED_MODEL)
        return super()._trackable_children(save_type, **kwargs)


@keras.saving.register_keras_serializable(package="tf_dpbn")
class DPFunctional(DPModel, Functional):
    """What `DPModel(inputs, outputs)` returns: a functional model that trains with DP-SGD."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    # Both save the network only if the constructor is like Functional's; to Keras 3, one that takes anything is.
    if not IS_KERAS_3:
        __init__.__signature__ = inspect.signature(Functional.__init__)  # type: ignore[attr-defined, misc]


@keras.saving.register_keras_serializable(package="tf_dpbn")
class DPSequential(DPModel, keras.Sequential):
    """A keras.Sequential that trains with DP-SGD; see DPModel.

    Args:
      layers: optional list of layers.
      name: optional name.
    """


def _sampling_behind(x: Any) -> PoissonSampling | None:
    """The distribution of the data set whose batches a data set was derived from, or None where rows are others."""
    source = source_behind(x)
    if source is None:
        return None
    (rows,) = tf.nest.flatten(x.element_spec)[0].shape[:1].as_list() or [0]
    return source.sampling if rows in (None, source.sampling.rows) else None
