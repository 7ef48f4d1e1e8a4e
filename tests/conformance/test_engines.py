"""Every engine against a naive loop over examples, for every kind of layer."""

import functools
import itertools

import numpy as np
import pytest
import tensorflow as tf

import tf_dpbn
from tests import helpers, zoo
from tf_dpbn._keras import keras, raw
from tf_dpbn.clipping import ENGINES, Batch, Task, microbatches
from tf_dpbn.clipping.contributions import Products
from tf_dpbn.clipping.microbatches import MicrobatchedEngine, residual_sums
from tf_dpbn.mechanisms import ROUNDING
from tf_dpbn.model import step
from tf_dpbn.normalization import StatisticsRelease

NORMALIZED = [name for name in zoo.BODIES if name.startswith("batch_normalization")]
PLAIN = [name for name in zoo.BODIES if name not in NORMALIZED]


def gradients_by_example(model, x, y, weights):
    """The definition: one example at a time."""
    variables, found = [raw(v) for v in model.trainable_variables], []
    for i in range(len(x)):
        with tf.GradientTape() as tape:
            logits = model(x[i : i + 1], training=True)
            loss = tf.reduce_sum(zoo.logits_loss(y[i : i + 1], logits)) * weights[i]
        found.append([np.asarray(tf.convert_to_tensor(g)) for g in tape.gradient(loss, variables)])
    return found


def clipped_sum(gradients, clip):
    total = [np.zeros_like(g) for g in gradients[0]]
    for gradient in gradients:
        scale = min(1.0, clip / max(np.linalg.norm(helpers.flat(gradient)), 1e-30))
        total = [a + scale * b for a, b in zip(total, gradient, strict=True)]
    return total


@functools.cache
def case(name):
    """A model, a batch, a clip norm that some examples exceed and some do not, and the sum; once for all engines."""
    model = zoo.build(name)
    helpers.randomize(model)
    x, y = zoo.data(name, 5)
    weights = np.array([1.0, 0.5, 0.0, 2.0, 1.0], "float32")
    gradients = gradients_by_example(model, x, y, weights)
    clip = float(np.median([np.linalg.norm(helpers.flat(gradient)) for gradient in gradients]))
    return model, (x, y, weights), clip, clipped_sum(gradients, clip)


@pytest.mark.parametrize(
    "name, engine", [*((name, "book_keeping") for name in PLAIN), *helpers.spread(PLAIN, ["vectorized", "loop"])]
)
def test_clipped_sum_equals_a_loop_over_examples(name, engine):
    model, batch, clip, expected = case(name)
    helpers.compiled(model, optimizer=helpers.dp_optimizer(l2_norm_clip=clip), engine=engine, microbatch_size=2)
    found, _ = helpers.clipped_sum_function(model)(*batch)
    assert helpers.relative_error(found, expected) < 1e-4


class Slope(keras.layers.Layer):
    """The derivative of a dense layer and a tanh along the first input; forward-mode, of a traced function."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(4, activation="tanh")
        self.traced = tf.function(lambda x: self.dense(x), autograph=False)

    def build(self, shape):
        self.dense.build(shape)
        super().build(shape)

    def call(self, x):
        direction = tf.one_hot(tf.zeros(tf.shape(x)[:1], tf.int32), x.shape[1])
        with tf.autodiff.ForwardAccumulator(x, direction) as accumulator:
            y = self.traced(x)
        return y + accumulator.jvp(y)

    def compute_output_shape(self, shape):
        return (shape[0], 4)


def test_derivatives_within_a_layer_are_differentiated():
    inputs = keras.Input((3,))
    model = tf_dpbn.DPModel(inputs, keras.layers.Dense(2)(Slope()(keras.layers.Dense(3)(inputs))))
    helpers.randomize(model)
    x, y = np.random.default_rng(0).normal(size=(4, 3)).astype("float32"), np.arange(4) % 2
    sums = []
    for engine in ENGINES:
        helpers.compiled(model, optimizer=helpers.dp_optimizer(l2_norm_clip=1e3), engine=engine)
        sums.append(helpers.clipped_sum_function(model)(x, y)[0])
    for found in sums[:2]:
        assert helpers.relative_error(found, sums[2]) < 1e-5


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_a_branch_without_gradient_over_sequences_of_unknown_length(microbatch_size):
    inputs = keras.Input((None, 4))
    used, unused = keras.layers.Dense(5), keras.layers.Dense(5)
    positions = keras.layers.Lambda(lambda t: tf.cast(tf.argmax(t, -1), tf.float32)[..., None])
    x = keras.layers.Add()([used(inputs), positions(unused(inputs))])
    model = tf_dpbn.DPModel(inputs, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling1D()(x)))
    helpers.randomize(model)
    x, y = np.random.default_rng(0).normal(size=(4, 3, 4)).astype("float32"), np.arange(4) % 2
    specs = [tf.TensorSpec([4, None, 4]), tf.TensorSpec([4], tf.int64)]
    sums = []
    for engine, size in (("book_keeping", microbatch_size), ("loop", None)):
        helpers.compiled(model, optimizer=helpers.dp_optimizer(l2_norm_clip=1e3), engine=engine, microbatch_size=size)
        step = helpers.step_function(model).get_concrete_function(*specs, None)
        sums.append([each.numpy() for each in step(tf.constant(x), tf.constant(y))[0]])
    assert helpers.relative_error(*sums) < 1e-5


@functools.cache
def normalized_case(name):
    """A model with a public batch, a batch, and what the default engine makes of it; once for all engines."""
    model = zoo.build(name)
    helpers.randomize(model)
    x, y = zoo.data(name, 5)
    model.set_public_batch(zoo.data(name, 6, seed=1)[0])
    helpers.compiled(model, optimizer=helpers.dp_optimizer(l2_norm_clip=0.5))
    return model, (x, y), helpers.clipped_sum_function(model)(x, y)


@pytest.mark.parametrize("name, engine, microbatch_size", helpers.spread(NORMALIZED, ENGINES, [1, 3, None]))
def test_engines_and_microbatches_agree_for_batch_normalization(name, engine, microbatch_size):
    model, (x, y), (expected, one) = normalized_case(name)
    optimizer = helpers.dp_optimizer(l2_norm_clip=0.5)
    helpers.compiled(model, optimizer=optimizer, engine=engine, microbatch_size=microbatch_size)
    found, other = helpers.clipped_sum_function(model)(x, y)
    assert helpers.relative_error(found, expected) < 1e-5
    np.testing.assert_allclose(other.loss, one.loss, rtol=1e-5)
    np.testing.assert_allclose(other.y_pred, one.y_pred, rtol=1e-4, atol=1e-5)


# Batches hold 10 rows, of which these are examples.
EXAMPLES = [(), (6,), (1, 4, 5, 8, 9)]


def model_for_padding(engine="book_keeping"):
    model = zoo.build("batch_normalization")
    helpers.randomize(model)
    model.set_public_batch(zoo.data("batch_normalization", 6, seed=1)[0])
    return helpers.compiled(model, optimizer=helpers.dp_optimizer(l2_norm_clip=0.5), engine=engine, microbatch_size=2)


@functools.cache
def sums_without_padding():
    """Clipped sum and result of each of EXAMPLES but the first, in a batch of their own; once for all engines."""
    x, y = zoo.data("batch_normalization", 10)
    run = helpers.clipped_sum_function(model_for_padding())
    return [run(x[list(each)], y[list(each)]) for each in EXAMPLES[1:]]


@pytest.mark.parametrize(
    "engine, jit_compile",
    list(itertools.product(ENGINES, [False, True])),
)
def test_padding_anywhere_in_a_batch_changes_nothing(engine, jit_compile):
    x, y = zoo.data("batch_normalization", 10)
    run = helpers.clipped_sum_function(model_for_padding(engine), jit_compile)
    nothing, *padded = [run(x, y, np.isin(np.arange(10), each).astype("float32")) for each in EXAMPLES]
    assert not np.any(helpers.flat(nothing[0]))
    for examples, (found, result), (expected, alone) in zip(EXAMPLES[1:], padded, sums_without_padding(), strict=True):
        chosen = list(examples)
        assert helpers.relative_error(found, expected) < 1e-5
        np.testing.assert_allclose(result.loss.numpy()[chosen], alone.loss, rtol=1e-5)
        np.testing.assert_allclose(result.y_pred.numpy()[chosen], alone.y_pred, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_of_no_rows_and_unknown_size_contributes_nothing(engine):
    model = helpers.compiled(zoo.build("conv2d"), engine=engine)
    x, y = zoo.data("conv2d", 3)

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None, *t.shape[1:]], t.dtype) for t in (x, y)])
    def run(x, y):
        batch = Batch(x, y, None, None)
        (clipped,), result = step.clipped_sums(model, batch, step.public_forward(model, batch))
        return clipped.tensors, result.loss, result.y_pred

    sums, loss, y_pred = run(x[:0], y[:0])
    assert not np.any(helpers.flat(sums)) and loss.shape == (0,) and y_pred.shape[0] == 0
    sums, loss, _ = run(x, y)
    expected = clipped_sum(gradients_by_example(model, x, y, np.ones(3)), 1.0)
    assert helpers.relative_error(sums, expected) < 1e-4 and loss.shape == (3,)


@pytest.mark.parametrize("mask", [[True, True, True, True], [True, False, True, True]])
def test_residuals_are_clipped_to_their_bound_whoever_made_them(mask):
    """The public pass hands over vectors within the bound; this is the place that does not rely on it."""
    rows = tf.constant([[0.3, 0.4], [3.0, 4.0], [0.0, -1e20], [np.nan, 0.0]])
    (total,) = residual_sums([StatisticsRelease(2, 2.0)], (rows,), tf.constant(mask))
    expected = np.array([0.3, 0.4]) + mask[1] * np.array([1.2, 1.6])  # the square of 1e20 is not finite: dropped
    np.testing.assert_allclose(total, expected, rtol=1e-6)


def test_slices_of_padding_alone_are_not_worked_on():
    worked_on = tf.Variable(0)

    class Counting(MicrobatchedEngine):
        def sum_slice(self, task, rows, l2_norm_clip):
            x, _, _, _, mask = rows
            worked_on.assign_add(1)
            kept = tf.where(mask, x, tf.zeros_like(x))
            return (tf.cast(tf.reduce_sum(kept), tf.float64)[None],), (x, (), x, tf.zeros_like(mask))

    @tf.function(autograph=False)
    def run(x, mask):
        task = Task(None, (tf.zeros([1]),))
        (total,), result = Counting(microbatch_size=3)(task, Batch(x, (), None, mask), 1.0)
        return total.tensors[0], result.loss

    mask = np.isin(np.arange(14), [2, 7, 11, 13])
    total, loss = run(tf.range(14.0), tf.constant(mask))
    assert float(total[0]) == 2 + 7 + 11 + 13
    np.testing.assert_array_equal(loss.numpy()[mask], [2, 7, 11, 13])
    assert int(worked_on) == 2  # of the five slices


def test_local_term_is_the_derivative_of_each_examples_loss_through_the_statistics():
    """Differentiates F_i(theta, s(K; public inputs)) literally, for one example at a time."""
    model = helpers.bn_stack(1, helpers.tf_dpbn.DPBatchNormalization, model=helpers.tf_dpbn.DPModel)
    helpers.randomize(model)
    (x, y), (public, _) = helpers.images(5), helpers.images(7, seed=1)
    kernel, bias, gamma, beta, head, head_bias = [raw(v) for v in model.trainable_variables]
    epsilon = model.layers[2].epsilon

    def logits(examples):
        def convolve(images):
            return tf.nn.conv2d(images, kernel, 1, "SAME") + bias

        mean, variance = tf.nn.moments(convolve(public), [0, 1, 2])
        z = tf.nn.batch_normalization(convolve(examples), mean, variance, beta, gamma, epsilon)
        return tf.reduce_mean(tf.tanh(z), [1, 2]) @ head + head_bias

    clip, total = 0.4, 0.0
    for i in range(len(x)):
        with tf.GradientTape() as tape:
            loss = zoo.logits_loss(y[i : i + 1], logits(x[i : i + 1]))
        gradient = helpers.flat(tape.gradient(loss, [kernel, bias, gamma, beta, head, head_bias]))
        total = total + gradient * min(1.0, clip / np.linalg.norm(gradient))

    model.set_public_batch(public)
    helpers.compiled(model, optimizer=helpers.dp_optimizer(l2_norm_clip=clip))
    found, _ = helpers.clipped_sum_function(model)(x, y)
    assert helpers.relative_error(found, [total]) < 1e-4


@pytest.mark.parametrize(
    "name, engine",
    [
        *[("batch_normalization", "vectorized"), ("batch_normalization", "loop"), ("lstm", "loop")],
        *[(name, "book_keeping") for name in ("conv2d_transpose", "separable", "embedding", "attention", "shared")],
        *[(name, "book_keeping") for name in NORMALIZED],
    ],
)
def test_whole_step_compiles_with_xla_and_agrees(name, engine):
    model = zoo.build(name)
    helpers.randomize(model)
    x, y = zoo.data(name, 4)
    if zoo.has_batch_normalization(model):
        model.set_public_batch(zoo.data(name, 6, seed=1)[0])
    helpers.compiled(model, engine=engine, microbatch_size=2)
    weights = np.ones(4, "float32")
    expected, _ = helpers.clipped_sum_function(model)(x, y, weights)
    found, _ = helpers.clipped_sum_function(model, jit_compile=True)(x, y, weights)
    assert helpers.relative_error(found, expected) < 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_batches_of_no_and_of_one_example(engine):
    model = helpers.compiled(zoo.build("conv2d"), engine=engine)
    (x, y), run = zoo.data("conv2d", 3), helpers.clipped_sum_function(model)
    for size in (0, 1):
        weights = (np.arange(3) < size).astype("float32")
        found, result = run(x, y, weights)
        expected = clipped_sum(gradients_by_example(model, x, y, weights), 1.0)
        np.testing.assert_allclose(helpers.flat(found), helpers.flat(expected), atol=1e-6)
        assert (np.linalg.norm(helpers.flat(found)) > 0) == bool(size)
        assert int(result.non_finite) == 0


def test_an_example_with_a_non_finite_gradient_contributes_nothing_and_is_counted():
    model = helpers.compiled(zoo.build("conv2d"))
    x, y = zoo.data("conv2d", 4)
    weights = np.array([1.0, 1.0, 0.0, 1.0], "float32")
    expected, _ = helpers.clipped_sum_function(model)(x, y, np.array([1.0, 0.0, 0.0, 1.0], "float32"))
    x[1], x[2] = np.nan, np.inf  # an example, and a row of padding, which is not counted
    found, result = helpers.clipped_sum_function(model)(x, y, weights)
    np.testing.assert_allclose(helpers.flat(found), helpers.flat(expected), atol=1e-6)
    assert int(result.non_finite) == 1


def test_dropout_is_independent_across_examples_and_steps():
    inputs = zoo.keras.Input((400,))
    x = zoo.layers.Dropout(0.5)(inputs)
    model = helpers.compiled(helpers.tf_dpbn.DPModel(inputs, x), loss="mse")
    ones = np.ones((4, 400), "float32")

    def run(batch):
        task = step.task(model, step.public_forward(model, Batch(batch, batch, None, None)))
        return tf.vectorized_map(
            lambda row: task.run_example(row[0], row[0], (), row[1], ()).y_pred, (batch, tf.range(4))
        )

    run = tf.function(run, autograph=False)
    masks = np.concatenate([run(tf.constant(ones)).numpy() > 0 for _ in range(2)])
    agreement = [(masks[i] == masks[j]).mean() for i in range(8) for j in range(i)]
    assert 0.35 < min(agreement) and max(agreement) < 0.65


def clipped_norm(model, x, y, engine, **options):
    """The norm of the clipped sum of a batch; the clip norm is 1."""
    helpers.compiled(model, optimizer=helpers.dp_optimizer(l2_norm_clip=1.0), engine=engine, **options)
    sums, _ = helpers.clipped_sum_function(model)(x, y)
    return np.linalg.norm(np.concatenate([np.ravel(each).astype(float) for each in sums]))


@pytest.mark.parametrize("x, y", [(1e-19, 9e18), (1e-20, 9e18)])
def test_norms_count_products_whose_factors_squares_leave_float32(x, y):
    inputs = keras.Input((784,))
    model = tf_dpbn.DPModel(inputs, keras.layers.Dense(1, use_bias=False)(inputs))
    batch = np.full((1, 784), x, "float32"), np.full((1, 1), y, "float32")
    norm = clipped_norm(model, *batch, "book_keeping", loss="mse")
    assert norm <= 1.0 + ROUNDING
    np.testing.assert_allclose(norm, clipped_norm(model, *batch, "loop", loss="mse"), rtol=1e-4)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_norms_are_infinite_where_products_leave_float32(sign):
    a, g, jacobian, cotangent = (
        tf.constant(np.array(values, "float32").reshape(shape))
        for values, shape in (
            ([1e20, 1e20], (1, 1, 1, 2)),
            ([1e-20], (1, 1, 1, 1)),
            ([1e19, 1e18], (1, 1, 2, 1)),
            ([sign * 1e-22], (1, 1, 1, 1)),
        )
    )
    products = Products((2, 1), (a, g), [(jacobian, cotangent)], lambda matrix: matrix)
    assert np.isinf(products.squared_norms().numpy()).all()


def set_float_type(name):
    keras.backend.set_floatx(name)
    keras.mixed_precision.set_global_policy(name)


def test_norms_of_float64_count_all_that_the_sum_holds():
    """No wider type holds the squares of float64's factors, or tells positions apart that cancel in it."""
    set_float_type("float64")
    try:
        inputs = keras.Input((784,))
        model = tf_dpbn.DPModel(inputs, keras.layers.Dense(1, use_bias=False)(inputs))
        batch = np.full((1, 784), 1e-155), np.full((1, 1), 5e153)
        assert clipped_norm(model, *batch, "book_keeping", loss="mse", norm_method="gram") <= 1.0 + ROUNDING
    finally:
        set_float_type("float32")


@pytest.mark.parametrize("positions, inputs, outputs", [(2, 256, 256), (4, 256, 128), (3, 700, 64)])
@pytest.mark.parametrize("corrected", [False, True])
def test_norms_from_inner_products_are_never_below_the_true_ones(positions, inputs, outputs, corrected):
    rng = np.random.default_rng(0)
    sizes = rng.uniform(0.5, 2.0, (2, 200, 1, 1, 1)).astype("float32")
    a, g = np.ones((200, 1, positions, inputs), "float32") * sizes[0], np.ones((200, 1, positions, outputs)) * sizes[1]
    g[:, :, 1::2] *= -(1.0 + rng.choice([3e-4, 1e-3, 3e-3], (200, 1, 1, 1)) * rng.uniform(-1.0, 1.0, (200, 1, 1, 1)))
    g = g.astype("float32")
    true = np.einsum("rgti,rgto->rgio", *(each.astype(float) for each in (a, g)))
    corrections = []
    if corrected:
        jacobian = (1.0 + rng.uniform(0.0, 1e-3, (1, 1, inputs, outputs))).astype("float32")
        cotangent = -(true.mean(2, keepdims=True)).astype("float32")  # what is left is small too
        true += jacobian.astype(float) * cotangent
        corrections = [(tf.constant(jacobian), tf.constant(cotangent))]
    products = Products((inputs, outputs), (tf.constant(a), tf.constant(g)), corrections, lambda matrix: matrix)
    squared = tf.function(products.squared_norms, autograph=False)().numpy()
    assert np.all(np.sqrt(squared) >= np.linalg.norm(true.reshape(200, -1), axis=1) * (1.0 - ROUNDING / 2))


@pytest.mark.parametrize(
    "given, mebibytes, expected", [(None, 1, 32), (None, 100, 16), (None, 1000, 1), (1, 1, 1), (3, 1, 16), (20, 1, 32)]
)
def test_microbatches_are_multiples_of_16_or_one_row(monkeypatch, given, mebibytes, expected):
    monkeypatch.setattr(microbatches, "ROWS_OF_REGISTERS", 16)
    sizes = []

    class Sized(MicrobatchedEngine):
        def bytes_per_example(self, task, rows):
            return 2**20 * mebibytes

        def sum_slice(self, task, rows, l2_norm_clip):
            sizes.append(rows[-1].shape[0])
            return (tf.zeros([1], tf.float64),), (rows[0], (), rows[0], rows[-1])

    Sized(given)(Task(None, (tf.zeros([1]),)), Batch(tf.range(20.0), (), None, None), 1.0)
    assert set(sizes) == {expected}


@pytest.mark.parametrize("microbatch_size", [3, None])
def test_an_example_does_not_depend_on_its_place_in_half_precision(monkeypatch, microbatch_size):
    monkeypatch.setattr(microbatches, "ROWS_OF_REGISTERS", 16)
    rng = np.random.default_rng(0)
    inputs = keras.Input((3,))
    x = inputs
    for _ in range(2):
        x = keras.layers.Dense(7, dtype="mixed_bfloat16")(x)
        x = tf_dpbn.DPBatchNormalization(dtype="mixed_bfloat16")(x)
        x = keras.layers.Activation("sigmoid", dtype="mixed_bfloat16")(x)
    model = tf_dpbn.DPModel(inputs, keras.layers.Dense(3)(x))
    model.set_public_batch(rng.normal(size=(8, 3)).astype("float32"))
    helpers.compiled(model, optimizer=helpers.dp_optimizer(l2_norm_clip=1.0), microbatch_size=microbatch_size)
    run = helpers.clipped_sum_function(model)
    for row in 3.0 * rng.normal(size=(4, 3)).astype("float32"):
        batch = np.tile(row, (90, 1)), np.zeros(90, int)
        alone = helpers.flat(run(*batch, np.eye(1, 90, dtype="float32")[0])[0])
        together = helpers.flat(run(*batch, np.ones(90, "float32"))[0])
        np.testing.assert_allclose(together, 90.0 * alone, atol=90 * 1e-6)


@pytest.mark.parametrize("wrapper", ["Bidirectional", "go_backwards"])
def test_masked_sequences_read_backwards_are_those_of_the_layer(wrapper):
    rng = np.random.default_rng(0)
    inputs = keras.Input((5, 3))
    x = keras.layers.Masking()(inputs)
    if wrapper == "Bidirectional":
        x = keras.layers.Bidirectional(keras.layers.GRU(3, return_sequences=True))(x)
    else:
        x = keras.layers.GRU(3, return_sequences=True, go_backwards=True, zero_output_for_mask=True)(x)
    model = tf_dpbn.DPModel(inputs, keras.layers.GRU(3)(keras.layers.Dense(3)(x)))
    helpers.randomize(model)
    data = rng.normal(size=(4, 5, 3)).astype("float32")
    data[rng.random((4, 5)) < 0.4] = 0.0
    sums = {}
    for engine in ("book_keeping", "loop"):
        helpers.compiled(model, optimizer=helpers.dp_optimizer(l2_norm_clip=0.5), engine=engine)
        sums[engine], _ = helpers.clipped_sum_function(model)(data, np.arange(4) % 3)
    assert helpers.relative_error(*sums.values()) < 1e-5


class _TwoShapes(keras.layers.Layer):
    """Multiplies by a matrix, and by the same elements in another shape."""

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(4, 6), name="kernel")

    def call(self, inputs):
        kernel = tf.convert_to_tensor(self.kernel)
        return inputs @ kernel @ tf.reshape(kernel, [6, 4])


def test_one_variable_in_two_shapes():
    rng = np.random.default_rng(0)
    inputs = keras.Input((4,))
    model = tf_dpbn.DPModel(inputs, keras.layers.Dense(3)(_TwoShapes()(inputs)))
    helpers.randomize(model)
    x, y = rng.normal(size=(4, 4)).astype("float32"), rng.integers(0, 3, 4)
    sums = {}
    for engine in ("book_keeping", "loop"):
        helpers.compiled(model, optimizer=helpers.dp_optimizer(l2_norm_clip=0.5), engine=engine)
        sums[engine], _ = helpers.clipped_sum_function(model)(x, y)
    assert helpers.relative_error(*sums.values()) < 1e-5
