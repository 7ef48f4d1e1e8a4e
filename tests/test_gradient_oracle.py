"""The gradient through batch statistics, against stock BatchNormalization (docs/algorithm.md, section 3)."""

import functools

import numpy as np
import pytest
import tensorflow as tf

import tf_dpbn
from tests import helpers
from tf_dpbn._keras import IS_KERAS_3, call_model, keras, raw
from tf_dpbn.mechanisms import NoisedGradients
from tf_dpbn.normalization import PublicForward, ReleasedMeans

layers = keras.layers
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def stock_gradient(stock, x, y):
    """Gradient of the mean loss of a model with stock BatchNormalization in training mode."""
    variables = [raw(v) for v in stock.trainable_variables]
    with tf.GradientTape() as tape:
        loss = LOSS(y, stock(x, training=True))
    return [tf.convert_to_tensor(g).numpy() for g in tape.gradient(loss, variables)]


def our_gradient(model, x, y, correction, is_public=True, **options):
    """What the inner optimizer gets, without noise and clipping, the batch being public as well if told so."""
    optimizer = helpers.dp_optimizer(l2_norm_clip=1e6, expected_batch_size=len(x))
    helpers.compiled(model, optimizer=optimizer, correction=correction, **options)
    if is_public:
        model.set_public_batch(x)
    before = [v.numpy().copy() for v in map(raw, model.trainable_variables)]
    model.train_on_batch(x, y)
    after = [v.numpy() for v in map(raw, model.trainable_variables)]
    return [b - a for b, a in zip(before, after, strict=True)]


def pair_of_models(build, seed=0):
    stock = build(layers.BatchNormalization, keras.Model)
    ours = build(tf_dpbn.DPBatchNormalization, tf_dpbn.DPModel)
    helpers.randomize(stock, seed)
    ours.set_weights(stock.get_weights())
    return stock, ours


def stack(depth):
    return lambda normalization, model: helpers.bn_stack(depth, normalization, model=model)


def chain(shape, *kinds, dtype=None, **options):
    """Builds what the `kinds` make, one after the other, and a head; `normalize` stands for a normalization."""

    def build(normalization, model):
        inputs = x = keras.Input(shape, dtype=dtype)
        for kind in kinds:
            x = layers.Activation("tanh")(normalization(**options)(x)) if kind is normalize else kind()(x)
        head = layers.GlobalAveragePooling1D() if len(x.shape) == 3 else layers.Flatten()
        return model(inputs, layers.Dense(3)(head(x)))

    return build


def normalize():
    raise AssertionError("a mark for `chain`")


dense_net = chain((7,), lambda: layers.Dense(6), normalize, lambda: layers.Dense(5, activation="tanh"), normalize)


def pre_activation(normalization, model):
    """Normalizations that no single kernel layer feeds: only the non-local correction reaches them."""
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(4, 3, padding="same")(inputs)
    for _ in range(2):
        h = layers.Activation("tanh")(normalization()(x))
        h = layers.Conv2D(4, 3, padding="same")(h)
        x = layers.Add()([x, h])
    x = layers.GlobalAveragePooling2D()(normalization()(x))
    return model(inputs, layers.Dense(3)(x))


def assorted(normalization, model):
    """A kernel layer of each kind before a normalization; pooling and activation in between."""
    inputs = keras.Input((8, 8, 2))
    x = normalization()(layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same")(inputs))
    x = normalization()(layers.SeparableConv2D(4, 3, padding="same")(x))
    x = normalization()(layers.MaxPooling2D()(layers.Conv2D(4, 3, dilation_rate=2, padding="same")(x)))
    x = normalization()(layers.Conv2DTranspose(3, 3, strides=2, padding="same")(x))
    x = normalization()(layers.Conv1D(4, 3)(layers.Reshape((64, 3))(x)))
    x = normalization()(layers.Dense(5)(layers.Activation("relu")(x)))
    return model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))


def shortcut(normalization, model):
    """A residual block whose shortcut leaves out positions, as those of ResNets do."""
    inputs = keras.Input((7, 8, 2))
    h = layers.Activation("tanh")(normalization()(layers.Conv2D(3, 3, strides=(2, 3), padding="same")(inputs)))
    x = normalization()(layers.Conv2D(3, 1, strides=(2, 3), padding="same")(inputs))
    return model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(layers.Add()([x, h]))))


NETS = {
    "one": (stack(1), (6, 6, 2)),
    "three": (stack(3), (6, 6, 2)),
    "dense": (dense_net, (7,)),
    "pre_activation": (pre_activation, (6, 6, 2)),
    "assorted": (assorted, (8, 8, 2)),
    "shortcut": (shortcut, (7, 8, 2)),
}


def errors(build, shape, *corrections, **options):
    """How far the gradients with these corrections are from that of stock batch normalization."""
    stock, ours = pair_of_models(build)
    x, y = helpers.images(16, shape)
    expected, found = stock_gradient(stock, x, y), []
    for correction in corrections:
        ours.set_weights(stock.get_weights())
        found.append(helpers.relative_error(our_gradient(ours, x, y, correction, **options), expected))
    return found


@pytest.mark.parametrize(
    "net, correction",
    [
        pytest.param("three", "adaptive", marks=pytest.mark.both),
        ("assorted", "full"),
        *((net, "full") for net in NETS if net != "assorted"),
    ],
)
def test_local_and_nonlocal_terms_give_the_gradient_of_stock_batch_normalization(net, correction):
    assert errors(*NETS[net], correction)[0] < 1e-4


class Constant(layers.BatchNormalization):
    """Stock batch normalization by its moving statistics, in training too; scale and offset train."""

    def call(self, inputs, training=False, mask=None):
        return super().call(inputs, training=False)


def fixed_and_others(other):
    """Builds convolutions with fixed statistics behind all of them, and other ones behind two."""

    def build(normalization, model):
        is_ours = normalization is tf_dpbn.DPBatchNormalization
        fixed = functools.partial(normalization, statistics="fixed") if is_ours else Constant
        others = {"public": normalization, "fixed": fixed}[other]
        each = iter([fixed, others, lambda: keras.Sequential([fixed(), others()])])
        return helpers.bn_stack(3, lambda: next(each)(), model=model)

    return build


@pytest.mark.both
@pytest.mark.parametrize("other, engine", [("fixed", "book_keeping"), ("fixed", "loop"), ("public", "book_keeping")])
def test_fixed_statistics_give_the_gradient_of_stock_batch_normalization_whose_statistics_are_frozen(other, engine):
    stock, ours = pair_of_models(fixed_and_others(other))
    x, y = helpers.images(16)
    expected = stock_gradient(stock, x, y)
    constants = [np.array(v) for v in ours.get_layer(index=2).get_weights()[2:]]
    found = our_gradient(ours, x, y, "full", is_public=other == "public", engine=engine)
    assert helpers.relative_error(found, expected) < 1e-4
    ours.refresh_statistics()
    np.testing.assert_array_equal(ours.get_layer(index=2).get_weights()[2:], constants)


def test_part_of_the_correction_gives_part_of_the_gradient_of_stock_batch_normalization():
    frozen, local = errors(*NETS["three"], "none", "local")
    assert frozen > 0.2 and local > 0.01
    frozen, local = errors(*NETS["one"], "none", "local")  # the local term alone is exact for one normalization
    assert frozen > 0.2 and local < 1e-4
    frozen, local = errors(*NETS["pre_activation"], "none", "local")  # the non-local term where no kernel layer feeds
    assert local < 0.5 * frozen


def nonlocal_terms(stddev, steps):
    """What "adaptive" and "full" add after each of some steps, the noised gradients being ones plus such noise."""
    model = helpers.bn_stack(3, tf_dpbn.DPBatchNormalization, model=tf_dpbn.DPModel)
    helpers.randomize(model)
    helpers.compiled(model)
    x, rng = helpers.images(16)[0], np.random.default_rng(0)
    means, variables = ReleasedMeans(), [raw(v) for v in model.trainable_variables]

    @tf.function(autograph=False)
    def terms(*gradients):
        found = [PublicForward(model, x, kind, means) for kind in ("adaptive", "full")]
        noised = NoisedGradients(gradients)
        return [[t for t in public.nonlocal_correction(noised, stddev) if t is not None] for public in found]

    for _ in range(steps):
        released = [np.float32(1.0 + stddev * rng.normal(size=v.shape)) for v in variables]
        yield [np.concatenate([np.ravel(t) for t in each]) for each in terms(*map(tf.constant, released))]


def test_adaptive_correction_follows_what_is_signal_in_the_noised_gradient():
    for adaptive, full in nonlocal_terms(stddev=0.01, steps=3):  # no noise to speak of: the full correction
        assert helpers.relative_error([adaptive], [full]) < 0.01
    by_noise = {}
    for stddev in (100.0, 1.0):
        pairs = nonlocal_terms(stddev, steps=40)
        by_noise[stddev] = [np.linalg.norm(adaptive) / np.linalg.norm(full) for adaptive, full in pairs]
    assert np.mean(by_noise[100.0]) < 0.5
    # |signal| = |noise| in one step, and 19 times less noise in the average
    assert np.mean(by_noise[1.0][20:]) > 0.8


@pytest.mark.parametrize(
    "kernel, normalized, options",
    [
        ("float64", "float64", {"correction": "full", "engine": "vectorized"}),
        ("float64", "float32", {"correction": "local", "engine": "loop"}),
        ("float32", "float64", {"correction": "adaptive", "norm_method": "gram"}),
    ],
)
def test_layers_in_double_and_single_precision_meet_and_clip_to_the_norm(kernel, normalized, options):
    def build(normalization, model):
        inputs = keras.Input((6, 6, 2), dtype=kernel)
        x = layers.Conv2D(4, 3, dtype=kernel)(inputs)
        x = layers.Activation("tanh", dtype=kernel)(normalization(dtype=normalized)(x))
        return model(inputs, layers.Dense(3, dtype=kernel)(layers.GlobalAveragePooling2D(dtype=kernel)(x)))

    stock, ours = pair_of_models(build)
    x, y = helpers.images(16)
    found = our_gradient(ours, x.astype(kernel), y, **options)
    assert helpers.relative_error(found, stock_gradient(stock, x.astype(kernel), y)) < 1e-4
    helpers.compiled(ours, optimizer=helpers.dp_optimizer(l2_norm_clip=1e-3), **options)
    total, _ = helpers.clipped_sum_function(ours)(x.astype(kernel), y, np.eye(16, dtype="float32")[0])
    assert 0.9999 < np.linalg.norm(helpers.flat(total)) / 1e-3 <= 1.00001


@pytest.mark.skipif(not IS_KERAS_3, reason="tf_keras freezes whole layers only")
def test_normalization_whose_scale_is_frozen_keeps_its_local_term():
    x, y = helpers.images(16)
    stock, ours = pair_of_models(stack(1))
    for model in (stock, ours):
        next(layer for layer in model.layers if hasattr(layer, "gamma")).gamma.trainable = False
    found = our_gradient(ours, x, y, "adaptive")
    assert len(found) == len(stock.trainable_variables) < len(stock.weights) - 2
    assert helpers.relative_error(found, stock_gradient(stock, x, y)) < 1e-4


def test_normalization_without_affine_parameters_and_without_feeding_layer_warns():
    inputs = keras.Input((6, 6, 2))
    x = layers.Add()([layers.Conv2D(3, 3)(inputs), layers.Conv2D(3, 3)(inputs)])
    x = tf_dpbn.DPBatchNormalization(scale=False, name="bare")(x)
    ours = tf_dpbn.DPModel(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))
    with pytest.warns(UserWarning, match="'bare' gets no gradient through its statistics"):
        our_gradient(ours, *helpers.images(16), "local")


class TransposedDense(layers.Layer):
    """x @ kernel^T with a square kernel: its channels are the kernel's first axis, which shapes do not show."""

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(5, 5), name="kernel")

    def call(self, x):
        return tf.linalg.matmul(x, tf.convert_to_tensor(self.kernel), transpose_b=True)


@pytest.mark.parametrize(
    "build, shape",
    [
        (chain((6, 5), lambda: layers.Dense(6), normalize, axis=1), (6, 5)),  # another axis than the kernel layer's
        (chain((6, 5), TransposedDense, normalize), (6, 5)),
    ],
)
def test_channels_are_those_of_the_kernel_layer_or_the_nonlocal_term_takes_over(build, shape):
    assert errors(build, shape, "local")[0] < 1e-4


def test_no_filter_gradient_of_one_example_strides_with_one_tap():
    """With fewer examples than threads it writes beyond its memory on CPUs (oneDNN, TensorFlow 2.21)."""
    model = helpers.compiled(shortcut(tf_dpbn.DPBatchNormalization, tf_dpbn.DPModel))
    x = tf.constant(helpers.images(5, (7, 8, 2))[0])

    def forward():
        return [t.d_mean for call in PublicForward(model, x, "local", None).calls for t in call.local_terms]

    gradients = [
        operation
        for operation in tf.function(forward, autograph=False).get_concrete_function().graph.get_operations()
        if operation.type == "Conv2DBackpropFilter" and operation.inputs[0].shape[0] == 1
    ]
    assert {tuple(g.get_attr("strides")) for g in gradients if g.outputs[0].shape[0] == 1} == {(1, 1, 1, 1)}
    assert (1, 2, 3, 1) in {tuple(g.get_attr("strides")) for g in gradients}


# ---------------------------------------------------------------- what lies in front of a normalization


class OneHot(layers.Layer):
    """A lookup without a table: data of a lower rank than what is made of them, and a weight for each channel."""

    def build(self, input_shape):
        self.scale = self.add_weight(shape=(7,), initializer="ones", name="scale")

    def call(self, x):
        return tf.one_hot(x, 7) * tf.convert_to_tensor(self.scale)


class Indexed(layers.Layer):
    """Some of the data, by Python's indices."""

    def __init__(self, *indices):
        super().__init__()
        self.indices = indices

    def call(self, x):
        return x[self.indices]


WHOLE = slice(None)
EMBEDDED = [lambda: layers.Embedding(7, 5), lambda: layers.Dense(4)]
FRONTS = {
    "embedding": ([lambda: layers.Embedding(7, 5)], "non-local"),
    "masked": ([lambda: layers.Embedding(7, 5, mask_zero=True)], "non-local"),
    "one_hot": ([OneHot], "non-local"),
    "reversed": ([*EMBEDDED, lambda: Indexed(..., slice(None, None, -1))], "non-local"),
    "one_channel": ([*EMBEDDED, lambda: Indexed(WHOLE, WHOLE, 1)], "non-local"),
    "first_step": ([*EMBEDDED, lambda: Indexed(WHOLE, 0)], "both"),
}


@pytest.mark.parametrize("front", list(FRONTS))
def test_local_term_where_a_kernel_layer_feeds_channel_by_channel_else_the_nonlocal_term(front):
    """Lookups have data of a lower rank than what they yield, and indices keep shapes, but not always channels."""
    between, kind = FRONTS[front]

    build = chain((4,), *between, normalize, dtype="int32")
    stock, ours = pair_of_models(build)
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 7, (16, 4)).astype("int32"), rng.integers(0, 3, 16)
    found = our_gradient(ours, x, y, "full")
    assert [found for _, found in ours.correction_report()] == [kind]
    assert helpers.relative_error(found, stock_gradient(stock, x, y)) < 1e-4


def time_distributed(normalization, model):
    inputs = x = keras.Input((3, 5))
    for layer in (layers.Dense(4), normalization(), layers.Activation("tanh")):
        x = layers.TimeDistributed(layer)(x)
    return model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))


def test_normalization_of_each_time_step_has_the_gradient_of_stock_keras():
    stock, ours = pair_of_models(time_distributed)
    x, y = helpers.images(16, (3, 5))
    found = our_gradient(ours, x, y, "local")
    assert [kind for _, kind in ours.correction_report()] == ["local"] * (3 if IS_KERAS_3 else 1)
    assert helpers.relative_error(found, stock_gradient(stock, x, y)) < 1e-4


def shared(normalization, model):
    inputs = keras.Input((7,))
    normalization, x = normalization(), inputs
    for _ in range(2):
        x = layers.Activation("tanh")(normalization(layers.Dense(6)(x)))
    return model(inputs, layers.Dense(3)(x))


def test_normalization_called_twice_reports_that_it_gets_no_nonlocal_term():
    stock, ours = pair_of_models(shared)
    x, y = helpers.images(16, (7,))
    error = helpers.relative_error(our_gradient(ours, x, y, "full"), stock_gradient(stock, x, y))
    assert [kind for _, kind in ours.correction_report()] == ["local only"] * 2
    assert 0.05 < error < 0.2  # docs/algorithm.md, section 3b


# ---------------------------------------------------------------- layers that normalize their own weights


spectral = chain((6, 6, 2), lambda: layers.SpectralNormalization(layers.Conv2D(4, 3)), normalize)


@pytest.mark.parametrize(
    "engine, correction",
    [("book_keeping", "full"), ("loop", "local"), ("vectorized", "full")],
)
def test_spectral_normalization_takes_the_step_of_stock_keras(engine, correction):
    """Keras assigns the normalized kernel to the variable, so that the gradient is that by the normalized kernel."""
    stock, ours = pair_of_models(spectral)
    x, y = helpers.images(16)
    stock.compile(keras.optimizers.SGD(1.0), LOSS)
    stock.train_on_batch(x, y)
    with helpers.logged_lines() as lines:
        our_gradient(ours, x, y, correction, engine=engine)
    assert not lines
    for found, expected in zip(ours.weights, stock.weights, strict=True):
        if "moving" not in found.name:
            np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-5)


class DependingOnRows(layers.Layer):
    """Another operation for one row than for several."""

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(7, 6), name="kernel")

    def call(self, x):
        kernel = tf.convert_to_tensor(self.kernel)
        return tf.matmul(x, kernel if x.shape[0] == 1 else 1.0 * kernel)


def test_noised_statistics_refuse_a_kernel_layer_that_depends_on_the_number_of_rows():
    inputs = keras.Input((7,))
    x = tf_dpbn.DPBatchNormalization(statistics="noised", name="fed")(DependingOnRows()(inputs))
    model = helpers.compiled(tf_dpbn.DPModel(inputs, layers.Dense(3)(x)), augmentation_multiplicity=2)
    x, y = helpers.images(8, (2, 7))
    with pytest.raises(ValueError, match="'fed' is fed by another layer for one example than for the public pass"):
        model.train_on_batch(x, y)


@pytest.mark.parametrize("rank, padding", [(1, "valid"), (2, "same"), (3, "same")])
def test_no_convolution_of_one_tap_strides_in_a_private_step(rank, padding):
    """Its filter gradient writes beyond its memory with fewer examples than threads (oneDNN, TensorFlow 2.21)."""
    convolution = getattr(keras.layers, f"Conv{rank}D")
    inputs = keras.Input((*(5, 6, 4)[:rank], 8))
    first, second = convolution(8, 1, strides=2, padding=padding), convolution(16, 1, strides=(1, 3, 2)[:rank])
    model = keras.Model(inputs, second(first(inputs)))
    x = tf.random.normal((2, *inputs.shape[1:]))

    def called(function):
        return tf.function(lambda x: function(x), autograph=False).get_concrete_function(x)

    private, stock = called(lambda x: call_model(model, x, training=True)), called(model)
    np.testing.assert_allclose(private(x), stock(x), rtol=1e-5, atol=1e-6)

    def strides(graph):
        return [op.get_attr("strides") for op in graph.get_operations() if op.type in ("Conv2D", "Conv3D")]

    assert len(strides(private.graph)) == 2 and set(sum(strides(private.graph), [])) == {1}
    assert set(sum(strides(stock.graph), [])) > {1}
    assert first.strides == (2,) * rank and "convolution_op" not in vars(first)
