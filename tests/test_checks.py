"""What a DPModel refuses, with what words and which remedy, and what it lets pass."""

import textwrap

import numpy as np
import pytest
import tensorflow as tf

import tf_dpbn
from tests import helpers, zoo
from tests.programs import output
from tf_dpbn._keras import IS_KERAS_3, keras
from tf_dpbn.sampling import poisson_dataset

pytestmark = pytest.mark.both

layers = keras.layers
BATCH, CLASSES = 8, 3
NOT_POISSON = "do not come from PrivacyPlan.poisson_dataset"


def vectors(n=BATCH, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 5)).astype("float32"), rng.integers(0, CLASSES, n)


def every_example(x, y, steps=1):
    """Each batch holds all examples."""
    return poisson_dataset(x, y, expected_batch_size=BATCH, max_batch_size=BATCH, steps_per_epoch=steps)


def network(*middle, model=tf_dpbn.DPModel):
    inputs = x = keras.Input((5,))
    for layer in middle:
        x = layer(x)
    return model(inputs, layers.Dense(CLASSES)(x))


class Subclassed(tf_dpbn.DPModel):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, layers.Dense(CLASSES)

    def call(self, x, training=False):  # Keras hands it down
        return self.head(self.layer(x))


def fit(model, steps=1, **options):
    return model.fit(every_example(*vectors(), steps), verbose=0, **options)


def assert_untrained(model, before):
    for variable, value in zip(model.trainable_variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    assert model.private_steps == 0


# ---------------------------------------------------------------- layers


def nested(layer):
    return network(network(layer, model=keras.Model))


@pytest.mark.parametrize("build", [network, nested, Subclassed])
def test_refuses_stock_batch_normalization_wherever_it_is(build):
    model = build(layers.BatchNormalization(name="stock"))
    with pytest.raises(ValueError, match="'stock' is a stock BatchNormalization.*Replace it by .*tf_dpbn.convert"):
        helpers.compiled(model)


@pytest.mark.parametrize("build", [nested, Subclassed])
def test_frozen_stock_batch_normalization_may_train(build):
    layer = layers.BatchNormalization(trainable=False)
    model = helpers.compiled(build(layer))
    fit(model)
    np.testing.assert_array_equal(layer.moving_mean.numpy(), np.zeros_like(layer.moving_mean.numpy()))
    assert model.private_steps == 1


@pytest.mark.parametrize(
    "layer, build",
    [
        (lambda: layers.Dense(4, activity_regularizer="l2", name="culprit"), network),
        (lambda: layers.ActivityRegularization(0.1, name="culprit"), nested),
        (lambda: zoo.AddsLoss(name="culprit"), network),
        (lambda: zoo.AddsLoss(name="culprit"), Subclassed),
    ],
    ids=["activity_regularizer", "ActivityRegularization", "add_loss", "add_loss_subclassed"],
)
def test_refuses_losses_added_during_the_call(layer, build):
    with pytest.raises(ValueError, match="'culprit' adds a loss while it is called.*Put it into the compiled loss"):
        fit(helpers.compiled(build(layer())))


# ---------------------------------------------------------------- public batch


def test_refuses_to_train_without_public_batch():
    model = helpers.compiled(network(tf_dpbn.DPBatchNormalization()))
    with pytest.raises(ValueError, match=r"no public batch.*uniform_noise\(\(5,\).*Received: public_batch=None"):
        fit(model)
    assert model.private_steps == 0


GOOD = vectors(4)[0]
BAD_PUBLIC_BATCHES = {
    "shape": (GOOD[:, :4], {}, ValueError, r"`public_batch.shape` must .*\(None, 5\).*\(4, 4\)"),
    "rows": (GOOD[:1], {}, ValueError, r"at least 2 rows.*\(1, 5\)"),
    "range": (GOOD, {"value_range": (0.0, 0.5)}, ValueError, r"Scale it as the private inputs are scaled"),
    "number": ([GOOD, GOOD], {}, ValueError, "each of the model's 1 inputs. Received: .*2 arrays"),
}


@pytest.mark.parametrize("batch, options, error, message", BAD_PUBLIC_BATCHES.values(), ids=BAD_PUBLIC_BATCHES)
def test_refuses_bad_public_batches(batch, options, error, message):
    model = network(tf_dpbn.DPBatchNormalization())
    with pytest.raises(error, match=message):
        model.set_public_batch(batch, **options)
    assert model.public_batch is None


def test_refuses_a_public_batch_of_floats_for_an_integer_input_and_of_unequal_lengths():
    a, b = keras.Input((3,), dtype="int32"), keras.Input((5,))
    model = tf_dpbn.DPModel([a, b], layers.Concatenate()([layers.Flatten()(layers.Embedding(4, 2)(a)), b]))
    with pytest.raises(TypeError, match=r"`public_batch\[0\].*float32"):
        model.set_public_batch([GOOD[:, :3], GOOD])
    with pytest.raises(ValueError, match=r"equally many rows everywhere. Received: \[3, 4\]"):
        model.set_public_batch([np.ones((3, 3), "int32"), GOOD])


# ---------------------------------------------------------------- compile and fit


@pytest.mark.parametrize("given", ["sgd", None, keras.optimizers.SGD])
def test_refuses_an_optimizer_that_is_not_private(given):
    given = given() if callable(given) else given
    with pytest.raises(
        TypeError, match="`optimizer` must be a DPOptimizer. Wrap yours: .*DPOptimizer.from_plan.*num_examples="
    ):
        network().compile(optimizer=given, loss="mse")


@pytest.mark.parametrize("option, value", [("correction", "global"), ("engine", "fast")])
def test_refuses_unknown_options(option, value):
    with pytest.raises(ValueError, match=f"`{option}` must .*Received: {option}='{value}'"):
        helpers.compiled(network(), **{option: value})


@pytest.mark.parametrize("train", helpers.WAYS_TO_TRAIN.values(), ids=helpers.WAYS_TO_TRAIN)
def test_refuses_to_train_without_a_loss_and_without_weights(train):
    model = network()
    with pytest.raises(RuntimeError, match="Call compile"):
        train(model, *vectors())
    for loss, named in ((None, "loss=None"), ([None], r"loss=.*\[None\]")):
        model.compile(helpers.dp_optimizer(), loss)
        with pytest.raises(ValueError, match=f"`loss` must be given to compile.*Received: {named}"):
            train(model, *vectors())
    model.trainable = False
    with pytest.raises(ValueError, match="The model '.*' has no trainable weights.*Received"):
        train(helpers.compiled(model), *vectors())
    assert model.ledger.steps == 0


SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.mark.parametrize("label", [-1, CLASSES])
@pytest.mark.parametrize("loss", ["sparse_categorical_crossentropy", SPARSE], ids=["string", "object"])
def test_refuses_labels_out_of_range_before_training(loss, label):
    model = helpers.compiled(network(), loss)
    before = [variable.numpy() for variable in model.trainable_variables]
    x, y = vectors()
    y[3] = label
    message = rf"`y` must hold labels from 0 to {CLASSES - 1}.*give the last layer more units. Received: y={label}"
    with pytest.raises(ValueError, match=message):
        model.fit(every_example(x, y), verbose=0)
    with pytest.warns(tf_dpbn.PrivacyWarning, match=NOT_POISSON), pytest.raises(ValueError, match=message):
        model.fit(x, y, batch_size=BATCH, verbose=0)
    with pytest.raises(ValueError, match=message.replace("y`", "validation_data`").replace(" y=", " validation_data=")):
        model.fit(every_example(*vectors()), validation_data=(x, y), verbose=0)
    assert_untrained(model, before)


def trained_on(y, loss, weights=None, engine="book_keeping"):
    model = helpers.compiled(network(), loss, engine=engine)
    x = vectors()[0]
    data = poisson_dataset(x, y, weights, expected_batch_size=BATCH, max_batch_size=BATCH, steps_per_epoch=1)
    loss_value = model.fit(data, verbose=0).history["loss"][0]
    assert np.isfinite(loss_value) and model.debug_non_finite_examples == 0


def sparse_categorical_of_mine(y, p):
    """Merely named like one that wants labels in range."""
    return tf.reduce_mean(p, -1)


@pytest.mark.parametrize("engine", ["book_keeping", "loop"])
def test_labels_of_an_ignored_class_or_of_weight_zero_train(engine):
    y = np.where(np.arange(BATCH) == 3, 255, vectors()[1])
    ignoring = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=255)
    trained_on(y, ignoring, engine=engine)
    trained_on(y, SPARSE, (y < 255).astype("float32"), engine)
    y[0] = 254
    trained_on(y, sparse_categorical_of_mine, engine=engine)
    with pytest.raises(ValueError, match="`y` must hold labels from 0 to 2.*Received: y=254"):
        trained_on(y, ignoring)


@pytest.mark.parametrize("loss", ["sparse_categorical_crossentropy", keras.losses.MeanSquaredError()])
def test_labels_in_words_are_refused_with_the_remedy(loss):
    with pytest.raises(ValueError, match="`y` must hold numbers.*Encode the labels.*StringLookup"):
        trained_on(np.array([["no"], ["yes"]] * 4)[:, 0], loss)


def test_a_lookup_that_only_reads_trains_and_its_public_batch_is_kept(tmp_path):
    words = np.array([["a"], ["b"], ["c"], ["d"]] * 2)
    inputs = keras.Input((1,), dtype="string")
    h = layers.StringLookup(vocabulary=["a", "b", "c"], output_mode="one_hot")(inputs)
    h = tf_dpbn.DPBatchNormalization()(layers.Dense(4)(h))
    model = helpers.compiled(tf_dpbn.DPModel(inputs, layers.Dense(CLASSES)(h)), engine="loop")
    model.set_public_batch(words[:3])
    model.fit(every_example(words, vectors()[1]), verbose=0)
    assert model.private_steps == 1
    model.save_weights(str(tmp_path / "m.weights.h5"))
    model.set_public_batch(words[:2])
    model.load_weights(str(tmp_path / "m.weights.h5"))
    np.testing.assert_array_equal(model.public_batch, [[b"a"], [b"b"], [b"c"]])
    with pytest.raises(TypeError, match=r"`public_batch.dtype` must be strings.*Received"):
        model.set_public_batch(np.zeros((3, 1)))
    with pytest.raises(TypeError, match="must be a real float or integer type. Strings feed a model whose input is"):
        network().set_public_batch(np.array([["a"] * 5] * 3))


def test_batch_normalization_in_training_outside_a_step_says_what_fits():
    model = network(tf_dpbn.DPBatchNormalization(), layers.Dropout(0.5))
    with pytest.raises(RuntimeError, match="for Monte Carlo dropout pass training=True to the dropout layers alone"):
        model(vectors()[0], training=True)


def batched(x, y):
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(4, drop_remainder=True)


CONTRADICTIONS = {
    "batch_size": ({}, vectors(), {"batch_size": 4}, "`expected_batch_size` must equal the size of the batches, 4.*=8"),
    "default_batch_size": ({}, vectors(), {}, "must equal the size of the batches, 32.*Pass batch_size to fit.*=8"),
    "dataset": ({}, (batched(*vectors()),), {}, "must equal the size of the batches, 4.*=8"),
    "examples": ({"num_examples": 100}, vectors(16), {"batch_size": 8}, "training examples, 16.*=100"),
    "held_out": ({"num_examples": 16}, vectors(16), {"batch_size": 8, "validation_split": 0.5}, "examples, 8.*=16"),
}


@pytest.mark.parametrize("arguments, data, options, message", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_refuses_batches_that_contradict_the_accounting(arguments, data, options, message):
    model = helpers.compiled(network(), optimizer=helpers.dp_optimizer(**arguments))
    with pytest.warns(tf_dpbn.PrivacyWarning, match=NOT_POISSON), pytest.raises(ValueError, match=message):
        model.fit(*data, verbose=0, **options)
    assert model.private_steps == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"expected_batch_size": 4}, "`expected_batch_size` must equal that of .* 8.*same PrivacyPlan.*=4"),
        ({"num_examples": 9}, "`num_examples` must equal that of the Poisson data set, 8.*=9"),
    ],
)
def test_refuses_draws_that_contradict_the_optimizer(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(helpers.compiled(network(), optimizer=helpers.dp_optimizer(**arguments)))


@pytest.mark.parametrize("name", ["ReduceLROnPlateau", "EarlyStopping"])
def test_warns_of_callbacks_that_decide_by_data_without_noise(name):
    callback = getattr(keras.callbacks, name)(monitor="loss")
    with pytest.warns(tf_dpbn.PrivacyWarning, match=f"{name} decides by 'loss'.*without noise.*outside the privacy"):
        fit(helpers.compiled(network()), callbacks=[callback])


# ---------------------------------------------------------------- state


class RunningMeanInLoop(zoo.RunningMean):
    """The same update, hidden in the body of a loop."""

    def call(self, x, training=False):
        def body(i):
            self.mean.assign(0.9 * self.mean + 0.1 * tf.reduce_mean(x, 0))
            return (i + 1,)

        (i,) = tf.while_loop(lambda i: i < 2, body, (tf.constant(0),))
        return x + tf.cast(i, x.dtype)


class PythonState(layers.Layer):
    def call(self, x):
        out = tf.numpy_function(lambda values: values, [x], tf.float32)
        return x + 0.0 * tf.stop_gradient(tf.ensure_shape(out, x.shape))


WITH_STATE = [(zoo.RunningMean, network), (zoo.RunningMean, Subclassed), (RunningMeanInLoop, nested)]
WITH_STATE += [(PythonState, Subclassed)]


@pytest.mark.parametrize("layer, build", WITH_STATE)
def test_refuses_state_that_depends_on_examples(layer, build):
    model = build(layer(name="culprit"))
    model(vectors()[0])
    helpers.compiled(model)
    before = [variable.numpy() for variable in model.trainable_variables]
    where = "of layer 'culprit'" if issubclass(layer, zoo.RunningMean) else "outside the model's weights"
    with pytest.raises(ValueError, match=rf"updates state .*{where}.*couples private examples.*Received: "):
        fit(model)
    assert_untrained(model, before)


def test_refuses_a_stateful_recurrent_layer():
    inputs = keras.Input(batch_shape=(BATCH, 3, 5))
    model = helpers.compiled(tf_dpbn.DPModel(inputs, layers.Dense(CLASSES)(layers.SimpleRNN(4, stateful=True)(inputs))))
    x = np.random.default_rng(0).normal(size=(BATCH, 3, 5)).astype("float32")
    with pytest.raises(ValueError, match="updates state .*simple_rnn.*stateful=False"):
        model.fit(every_example(x, vectors()[1]), verbose=0)


def test_refuses_state_in_the_loss():
    total = tf.Variable(0.0)

    def loss(y, p):
        total.assign_add(tf.reduce_sum(p))
        return keras.losses.sparse_categorical_crossentropy(y, p, from_logits=True) + total

    with pytest.raises(ValueError, match="The model or its loss updates state outside the model's weights"):
        fit(helpers.compiled(network(), loss))
    assert float(total) == 0.0


@pytest.mark.parametrize("normalized", [False, True])
def test_state_that_does_not_depend_on_examples_advances_once_a_step(normalized):
    counter = zoo.Counter()
    model = network(layers.Dense(4), counter, *([tf_dpbn.DPBatchNormalization()] if normalized else []))
    model.set_public_batch(GOOD + 1)
    fit(helpers.compiled(model), steps=3)
    assert float(counter.count.numpy()) == 3.0


# ---------------------------------------------------------------- devices


def test_refuses_strategies_without_mirrored_variables():
    with tf.distribute.experimental.CentralStorageStrategy(["CPU:0"], "CPU:0").scope():
        model, optimizer = network(), helpers.dp_optimizer()
        with pytest.raises(NotImplementedError, match="trains under MirroredStrategy.*: CentralStorageStrategy"):
            helpers.compiled(model, optimizer=optimizer)


GROUPED = """
    import numpy as np
    import tensorflow as tf

    import tf_dpbn
    from tf_dpbn.sampling import poisson_dataset

    keras = tf.keras
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def train(rank, frozen=False, **options):
        kind = getattr(keras.layers, f"Conv{rank}D")
        inputs = keras.Input((*[4] * rank, 4))
        x = kind(4, 3, groups=2, padding="same", name="grouped", trainable=not frozen)(inputs)
        model = tf_dpbn.DPModel(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(x)))
        model.compile(tf_dpbn.DPOptimizer("sgd", 1.0, 0.0, 8), loss, **options)
        x = np.ones((8, *inputs.shape[1:]), "float32")
        data = poisson_dataset(x, np.zeros(8, "int64"), expected_batch_size=8, max_batch_size=8)
        try:
            return np.isfinite(model.fit(data, verbose=0).history["loss"][0])
        except NotImplementedError as error:
            return error

    print("2 frozen:", train(2, frozen=True))
    print("2 compiled:", train(2, jit_compile=True))
    for rank in (1, 2, 3):
        print(f"{rank}:", train(rank))
"""


@pytest.mark.parametrize("one_dnn", ["0", "1"])
def test_grouped_convolutions_without_a_kernel_for_their_gradients(one_dnn):
    printed = output("-c", textwrap.dedent(GROUPED), CUDA_VISIBLE_DEVICES="-1", TF_ENABLE_ONEDNN_OPTS=one_dnn)
    found = dict(line.split(": ", 1) for line in printed.splitlines())
    assert {found.pop(name) for name in ("2 frozen", "2 compiled")} == {"True"}
    refused = {rank for rank, said in found.items() if said.startswith("TensorFlow has no kernel")}
    assert refused == ({"1", "2", "3"} if one_dnn == "0" else {"3"})
    assert {said for rank, said in found.items() if rank not in refused} <= {"True"}
    assert all("layer 'grouped', groups=2" in found[rank] for rank in refused)
    assert all(("TF_ENABLE_ONEDNN_OPTS" in found[rank]) == (rank != "3") for rank in refused)


def test_a_fit_that_fails_before_its_first_step_does_not_lend_its_sampling_to_later_steps():
    model = helpers.compiled(network())
    with pytest.raises(ValueError, match="class_weight"):
        fit(model, class_weight={"a": 1.0})
    assert model._record.next_step.sampling == "assumed"


def test_unfrozen_stock_batch_normalization_does_not_train_and_neither_does_a_model_that_compile_refused():
    normalization = layers.BatchNormalization(trainable=False)
    model = helpers.compiled(network(normalization))
    normalization.trainable = True
    if IS_KERAS_3:
        with pytest.raises(ValueError, match="stock"):
            fit(model)
    else:
        fit(model)  # tf_keras trains with what was trainable at compile
    np.testing.assert_array_equal(normalization.moving_mean, np.zeros(5))
    steps = model.ledger.steps
    with pytest.raises(ValueError, match="stock"):
        helpers.compiled(model, optimizer=helpers.dp_optimizer(noise_multiplier=5.0))
    normalization.trainable = False
    for train in helpers.WAYS_TO_TRAIN.values():
        with pytest.raises(RuntimeError, match="compile"):
            train(model, *vectors())
    assert model.ledger.steps == steps


def test_ids_outside_the_vocabulary_do_not_reach_another_example_under_xla():
    clip, vocabulary = 0.5, 6
    inputs = keras.Input((4,), dtype="int32")
    pooled = layers.GlobalAveragePooling1D()(layers.Embedding(vocabulary, 3)(inputs))
    model = tf_dpbn.DPModel(inputs, layers.Dense(CLASSES)(pooled))
    helpers.randomize(model, scale=1.0)
    run = helpers.clipped_sum_function(
        helpers.compiled(model, optimizer=helpers.dp_optimizer(l2_norm_clip=clip)), jit_compile=True
    )
    rng = np.random.default_rng(0)
    for outside in (-1, -vocabulary, vocabulary, vocabulary + 2, 3 * vocabulary):
        x = rng.integers(0, vocabulary, (BATCH, 4)).astype("int32")
        row = int(rng.integers(BATCH))
        x[row, :3] = outside
        weight = np.ones(BATCH, "float32")
        moved, _ = run(x, vectors()[1], weight)
        weight[row] = 0.0
        without, _ = run(x, vectors()[1], weight)
        move = np.linalg.norm(helpers.flat(moved) - helpers.flat(without))
        assert 1e-3 * clip < move <= clip * (1 + 1e-5)


def test_a_dp_model_is_no_layer_of_another_one():
    inner = network()
    with pytest.raises(ValueError, match=r"is a DPModel, with a ledger of its own.*tf_dpbn.convert\(model\)"):
        helpers.compiled(tf_dpbn.DPSequential([keras.Input((5,)), inner]))


def test_an_optimizer_that_trained_another_model_is_refused():
    model = helpers.compiled(network(), stub=True)
    fit(model)
    helpers.compiled(model, optimizer=model.optimizer)  # its own
    with pytest.raises(ValueError, match=r"`optimizer` must not have trained another model.*from_config"):
        helpers.compiled(network(), optimizer=model.optimizer)


def test_a_batch_without_weights_must_be_of_the_expected_size():
    model = helpers.compiled(network(), stub=True)
    x, y = vectors(BATCH - 2)
    with pytest.raises(
        ValueError, match=rf"expected_batch_size={BATCH} rows, .*train_on_batch\(\*batch\).*{BATCH - 2} rows"
    ):
        model.train_on_batch(x, y)
    model.train_on_batch(x, y, np.ones(BATCH - 2, "float32"))
    assert model.ledger.steps == 1


# ---------------------------------------------------------------------- what is asked of a model that may have trained


def test_draws_are_not_evaluated_since_padding_would_count():
    model = helpers.compiled(network(), stub=True)
    draws = every_example(*vectors()).map(lambda x, y, weight: (x, y, weight))
    for name, call in [
        ("x", lambda: model.evaluate(draws, verbose=0)),
        ("x", lambda: model.predict(draws, verbose=0)),
        ("validation_data", lambda: fit(model, validation_data=draws)),
    ]:
        with pytest.raises(ValueError, match=f"`{name}` must have no rows of padding. Give arrays"):
            call()
    assert model.private_steps == 0


def test_a_change_of_what_trains_wants_another_compile():
    model = helpers.compiled(network(layers.Dense(4, name="first")), stub=True)
    fit(model)
    fit(model)
    model.get_layer("first").trainable = False
    if IS_KERAS_3:  # tf_keras goes by what trained at `compile`, here and in stock models
        with pytest.raises(RuntimeError, match="`trainable` of some layer has changed.*Call compile again"):
            fit(model)
        with pytest.raises(RuntimeError, match="Call compile again"):
            model.train_on_batch(*vectors())
    assert model.private_steps == 2
    helpers.compiled(model, stub=True)
    fit(model)
    assert model.ledger.steps == 3
