"""What one example's loss is, however it is given and weighted; gradients and logs against naive loops and Keras."""

import numpy as np
import pytest
import tensorflow as tf

import tf_dpbn
from tests import helpers
from tf_dpbn._keras import IS_KERAS_3, keras, raw
from tf_dpbn.sampling import poisson_dataset

pytestmark = pytest.mark.both

layers = keras.layers
EXAMPLES, POSITIONS, CLASSES = 5, 4, 3
WEIGHTS = np.array([1.0, 0.5, 2.0, 3.0, 0.25], "float32")
NOT_POISSON = "do not come from PrivacyPlan.poisson_dataset"


# ---------------------------------------------------------------- oracles


def example_gradients(model, x, example_loss):
    """The gradient of each example's loss: `example_loss(i, prediction)`, prediction of a batch of one."""
    variables = [raw(variable) for variable in model.trainable_variables]
    gradients = []
    for i in range(len(tf.nest.flatten(x)[0])):
        with tf.GradientTape() as tape:
            prediction = model(tf.nest.map_structure(lambda t, i=i: t[i : i + 1], x), training=True)
            loss = example_loss(i, prediction)
        gradients.append(helpers.flat(tape.gradient(loss, variables)))
    return gradients


def clip_that_binds_for_half(gradients):
    return float(np.median([np.linalg.norm(gradient) for gradient in gradients]))


def clipped_sum(gradients, clip):
    return sum(gradient * min(1.0, clip / np.linalg.norm(gradient)) for gradient in gradients)


def update_of_one_step(model, *data, **options):
    """What plain SGD at rate 1 without noise subtracts in one call of `fit`, times the denominator."""
    before = [variable.numpy() for variable in model.trainable_variables]
    history = model.fit(*data, verbose=0, **options).history
    after = [variable.numpy() for variable in model.trainable_variables]
    scale = model.optimizer.expected_batch_size
    return scale * (helpers.flat(before) - helpers.flat(after)), history


def every_example(x, y, weight=None, padding=3):
    """A Poisson data set with sampling probability 1: each batch holds all examples and some padding."""
    n = len(tf.nest.flatten(x)[0])
    return poisson_dataset(x, y, weight, expected_batch_size=n, max_batch_size=n + padding, steps_per_epoch=1)


# ---------------------------------------------------------------- one output


def network(positions, activation=None):
    """Logits [classes], or [positions, classes]."""
    inputs = keras.Input((POSITIONS, 2) if positions else (2,))
    x = layers.Dense(4, activation="tanh")(inputs)
    model = tf_dpbn.DPModel(inputs, layers.Dense(CLASSES, activation=activation)(x))
    helpers.randomize(model, scale=1.0)
    return model


def data(positions):
    rng = np.random.default_rng(0)
    shape = (EXAMPLES, POSITIONS) if positions else (EXAMPLES,)
    return rng.normal(size=(*shape, 2)).astype("float32"), rng.integers(0, CLASSES, shape)


def crossentropy(y, logits):
    return tf.nn.sparse_softmax_cross_entropy_with_logits(tf.cast(y, tf.int32), logits)


class OwnLoss(keras.losses.Loss):
    def call(self, y_true, y_pred):
        # tf_keras hands a loss targets of the prediction's rank.
        return crossentropy(tf.reshape(y_true, tf.shape(y_pred)[:-1]), y_pred)


def reduced(reduction):
    return lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)


# name -> (loss, activation of the network, how the definition reduces over positions)
LOSSES = {
    "string": (lambda: "sparse_categorical_crossentropy", "softmax", tf.reduce_mean),
    "function": (lambda: crossentropy, None, tf.reduce_mean),
    "scalar_function": (lambda: lambda y, p: tf.reduce_sum(crossentropy(y, p)), None, tf.reduce_sum),
    "own_class": (OwnLoss, None, tf.reduce_mean),
    "sum_over_batch_size": (reduced("sum_over_batch_size"), None, tf.reduce_mean),
    "sum": (reduced("sum"), None, tf.reduce_sum),
    "none": (reduced("none"), None, tf.reduce_mean),
}
if IS_KERAS_3:
    LOSSES["mean_with_sample_weight"] = (reduced("mean_with_sample_weight"), None, tf.reduce_mean)
else:
    LOSSES["auto"] = (reduced("auto"), None, tf.reduce_mean)

BY_POSITION = np.random.default_rng(1).uniform(0.2, 2.0, (EXAMPLES, POSITIONS)).astype("float32")
BY_POSITION[0, :2] = 0.0
# shape name -> (sample weights, the factor on each example's loss, or on that of each position)
EXAMPLE_WEIGHTS = {
    "none": (None, np.ones(EXAMPLES, "float32")),
    "row": (WEIGHTS, WEIGHTS),
    "column": (WEIGHTS[:, None], WEIGHTS),
    "position": (BY_POSITION, BY_POSITION),
}


def position_losses(activation):
    """Losses by position, of targets and a prediction of a batch of one."""
    if activation == "softmax":
        return lambda y, p: keras.losses.sparse_categorical_crossentropy(tf.convert_to_tensor(y), p)
    return crossentropy


CASES = [(name, "sequence", "row") for name in LOSSES]
CASES += [(n, "sequence", "position") for n in LOSSES if n not in ("scalar_function", "function", "own_class")]
CASES += [("string", "vector", "none"), ("function", "sequence", "none"), ("own_class", "vector", "column")]


@pytest.mark.parametrize("name, shape, weighting", CASES)
def test_example_weights_multiply_the_loss_of_a_batch_of_one_before_clipping(name, shape, weighting):
    (loss, activation, reduce), positions = LOSSES[name], shape == "sequence"
    model, (x, y) = network(positions, activation), data(positions)
    weights, factors = EXAMPLE_WEIGHTS[weighting]
    by_position = position_losses(activation)

    def example_loss(i, prediction):
        losses = factors[i] * by_position(y[i : i + 1], prediction)
        if name == "mean_with_sample_weight" and weighting == "position":
            return tf.reduce_sum(losses) / factors[i].sum()
        return reduce(losses)

    gradients = example_gradients(model, x, example_loss)
    clip = clip_that_binds_for_half(gradients)
    helpers.compiled(model, loss(), helpers.dp_optimizer(l2_norm_clip=clip))
    found, result = helpers.clipped_sum_function(model)(x, y, weights)
    assert helpers.relative_error(found, [clipped_sum(gradients, clip)]) < 1e-4
    losses = [example_loss(i, model(x[i : i + 1])) for i in range(EXAMPLES)]
    np.testing.assert_allclose(result.loss, losses, rtol=1e-5)


CLASS_WEIGHT = {0: 0.5, 1: 3.0, 2: 1.5}


def fit_weighted(poisson, weight, **options):
    model, (x, y) = network(False), data(False)
    helpers.compiled(model, optimizer=helpers.dp_optimizer(l2_norm_clip=0.6, expected_batch_size=EXAMPLES))
    if poisson:
        return update_of_one_step(model, every_example(x, y, weight), **options)[0]
    with pytest.warns(tf_dpbn.PrivacyWarning, match=NOT_POISSON):
        return update_of_one_step(model, x, y, EXAMPLES, sample_weight=weight, **options)[0]


@pytest.mark.parametrize(
    "poisson, weight", [(True, 1.0), (False, 1.0), (True, WEIGHTS)], ids=["poisson", "arrays", "both"]
)
def test_class_weight_multiplies_the_sample_weight(poisson, weight):
    by_class = np.array([CLASS_WEIGHT[int(label)] for label in data(False)[1]], "float32")
    given = None if np.isscalar(weight) else weight
    expected = fit_weighted(poisson, weight * by_class)
    np.testing.assert_allclose(fit_weighted(poisson, given, class_weight=CLASS_WEIGHT), expected, atol=1e-5)
    assert np.abs(fit_weighted(poisson, given) - expected).max() > 1e-2


# ---------------------------------------------------------------- several inputs and outputs

LOSS_WEIGHTS = {"c": 0.7, "v": 2.0}


def two_by_two(kind, model=tf_dpbn.DPModel):
    """Two inputs and two outputs, as dicts or as lists."""
    a, b = keras.Input((4,), name="a"), keras.Input((3,), name="b")
    x = layers.Concatenate()([layers.Dense(4, activation="tanh")(a), b])
    c, v = layers.Dense(CLASSES, name="c")(x), layers.Dense(1, name="v")(x)
    built = model({"a": a, "b": b}, {"c": c, "v": v}) if kind == "dict" else model([a, b], [c, v])
    helpers.randomize(built, scale=0.7)
    return built


def nest(kind, **parts):
    return parts if kind == "dict" else list(parts.values())


def two_by_two_data(kind):
    rng = np.random.default_rng(3)
    x = nest(
        kind, a=rng.normal(size=(EXAMPLES, 4)).astype("float32"), b=rng.normal(size=(EXAMPLES, 3)).astype("float32")
    )
    y = nest(kind, c=rng.integers(0, CLASSES, EXAMPLES), v=rng.normal(size=(EXAMPLES, 1)).astype("float32"))
    return x, y


def compile_options(kind):
    return {
        "loss": nest(kind, c=keras.losses.SparseCategoricalCrossentropy(from_logits=True), v="mse"),
        "loss_weights": nest(kind, **LOSS_WEIGHTS),
        "metrics": nest(kind, c=["accuracy"], v=["mae"]),
        "weighted_metrics": nest(kind, c=[], v=[keras.metrics.MeanSquaredError(name="weighted")]),
    }


def both_losses(kind, y, by_output):
    c, v = (y["c"], y["v"]) if kind == "dict" else y

    def example_loss(i, prediction):
        of_c, of_v = (prediction["c"], prediction["v"]) if kind == "dict" else prediction
        first, second = tf.reduce_mean(crossentropy(c[i : i + 1], of_c)), tf.reduce_mean((v[i] - of_v) ** 2)
        return LOSS_WEIGHTS["c"] * by_output[0][i] * first + LOSS_WEIGHTS["v"] * by_output[1][i] * second

    return example_loss


def compiled_two_by_two(kind, clip):
    model = two_by_two(kind)
    optimizer = helpers.dp_optimizer(l2_norm_clip=clip, expected_batch_size=EXAMPLES)
    model.compile(optimizer=optimizer, **compile_options(kind))
    return model


def logs_of_stock(kind, x, y, weights):
    stock = two_by_two(kind, keras.Model)
    stock.compile(optimizer=keras.optimizers.SGD(0.0), **compile_options(kind))
    return stock.fit(x, y, sample_weight=weights, verbose=0).history


def assert_logs(logs, expected):
    assert set(logs) == set(expected)
    for name in logs:
        np.testing.assert_allclose(logs[name], expected[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("by_output", [False, True])
@pytest.mark.parametrize("kind", ["dict", "list"])
@pytest.mark.filterwarnings("ignore:The batches do not come from PrivacyPlan.poisson_dataset")
def test_several_inputs_and_outputs_train_and_log_like_keras(kind, by_output):
    """The update is the clipped sum of the weighted losses; the logs are Keras' own, without the padding."""
    x, y = two_by_two_data(kind)
    given = (WEIGHTS, WEIGHTS[::-1].copy() if by_output else WEIGHTS)
    weights = nest(kind, c=given[0], v=given[1])
    gradients = example_gradients(two_by_two(kind, keras.Model), x, both_losses(kind, y, given))
    clip = clip_that_binds_for_half(gradients)
    model = compiled_two_by_two(kind, clip)
    if by_output:
        update, logs = update_of_one_step(model, x, y, EXAMPLES, sample_weight=weights)
    else:
        update, logs = update_of_one_step(model, every_example(x, y, WEIGHTS))
    assert helpers.relative_error(update, clipped_sum(gradients, clip)) < 1e-4
    # Keras 3 takes weights only by output.
    assert_logs(logs, logs_of_stock(kind, x, y, weights if IS_KERAS_3 or by_output else WEIGHTS))
    assert {"loss", "c_loss", "v_loss", "c_accuracy", "v_mae", "v_weighted"} <= set(logs)


def test_one_output_logs_like_keras_and_metrics_ignore_padding():
    (x, y), model = data(False), network(False)
    y = np.argmax(model(x), -1)
    y[0] = (y[0] + 1) % CLASSES  # four of five are right; padding would read as class 0
    helpers.compiled(
        model,
        optimizer=helpers.dp_optimizer(expected_batch_size=EXAMPLES),
        metrics=["accuracy"],
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy(name="weighted")],
    )
    expected_loss = np.mean(WEIGHTS * crossentropy(y, model(x)).numpy())
    _, logs = update_of_one_step(model, every_example(x, y, WEIGHTS, padding=40))
    assert logs["accuracy"] == [pytest.approx(0.8)]
    assert logs["weighted"] == [pytest.approx(1.0 - WEIGHTS[0] / WEIGHTS.sum())]
    assert logs["loss"] == [pytest.approx(expected_loss, rel=1e-5)]


# ---------------------------------------------------------------- regularizers


def regularized(strength):
    model = keras.Sequential if strength is None else tf_dpbn.DPSequential
    regularizer = keras.regularizers.L2(strength) if strength else None
    built = model([keras.Input((2,)), layers.Dense(4, kernel_regularizer=regularizer), layers.Dense(CLASSES)])
    helpers.randomize(built)
    return helpers.compiled(built, optimizer=helpers.dp_optimizer(l2_norm_clip=1e-6, expected_batch_size=EXAMPLES))


def test_a_regularizer_is_neither_clipped_nor_divided():
    strength, (x, y) = 5.0, data(False)
    plain, with_penalty = regularized(0.0), regularized(strength)
    kernel = with_penalty.trainable_variables[0].numpy()
    update, logs = update_of_one_step(plain, every_example(x, y))
    penalized, penalized_logs = update_of_one_step(with_penalty, every_example(x, y))
    gradient = (penalized - update) / EXAMPLES  # `update` is what was subtracted times the denominator
    np.testing.assert_allclose(gradient[: kernel.size], 2 * strength * kernel.ravel(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradient[kernel.size :], 0.0, atol=1e-5)
    assert penalized_logs["loss"][0] - logs["loss"][0] == pytest.approx(strength * np.sum(kernel**2), rel=1e-4)
