"""The proof that examples stay apart, on graphs that mix them and on graphs that do not."""

import numpy as np
import pytest
import tensorflow as tf

import tf_dpbn
from tests import helpers
from tf_dpbn._keras import keras
from tf_dpbn.clipping import Batch
from tf_dpbn.clipping.batch_trace import BatchTrace
from tf_dpbn.clipping.independence import NotProvedError, Proof, check_no_state
from tf_dpbn.clipping.microbatches import to_rows
from tf_dpbn.model import step

ROWS = 4
RNG = np.random.default_rng(0)
W = tf.constant(RNG.normal(size=(6, 5)), tf.float32)
BY_PLACE = tf.constant(RNG.normal(size=(ROWS, 6)), tf.float32)
KERNEL = tf.constant(RNG.normal(size=(3, 3, 3, 2)), tf.float32)
TABLE = tf.constant(RNG.normal(size=(7, 5)), tf.float32)
VECTORS, SQUARE, IMAGES, SERIES = (ROWS, 6), (ROWS, ROWS), (ROWS, 8, 8, 3), (ROWS, 5, 6)


@tf.custom_gradient
def centred_gradient(x):
    return tf.identity(x), lambda upstream: upstream - tf.reduce_mean(upstream, 0)


@tf.custom_gradient
def doubled_gradient(x):
    return tf.identity(x), lambda upstream: 2.0 * upstream


@tf.function(autograph=False)
def places():
    return tf.cast(tf.range(ROWS)[:, None], tf.float32)


def seed():
    """A seed that differs between the batches of a step, as the engine's do."""
    return tf.stack([INDEX[-1][0], 4])


@tf.custom_gradient
def gradient_in_state(x):
    variable = tf.Variable(tf.zeros([6]), trainable=False)

    def gradient(upstream):
        variable.assign(tf.reduce_mean(upstream, 0))
        return upstream - variable.read_value()

    return tf.identity(x), gradient


INDEX: list[tf.Tensor] = []


def moments(x, training):
    scale, offset = tf.ones([3]), tf.zeros([3])
    statistics = () if training else (tf.zeros([3]), tf.ones([3]))
    return tf.raw_ops.FusedBatchNormV3(
        x=x, scale=scale, offset=offset, mean=statistics[0] if statistics else [], is_training=training,
        variance=statistics[1] if statistics else [],
    ).y  # fmt: skip


def summed_in_a_loop(x):
    return x + tf.while_loop(lambda i, _: i < ROWS, lambda i, s: (i + 1, s + x[i]), (0, tf.zeros([6])))[1]


def written_to_state(x):
    variable = tf.Variable(tf.zeros([6]), trainable=False)
    variable.assign(tf.zeros([6]))
    return x * variable.assign_add(x[0])


# Name -> (shape, function): an example's result depends on another one, on its place, or may do so.
COUPLED = {
    "batch mean": (VECTORS, lambda x: x - tf.reduce_mean(x, 0)),
    "batch maximum": (VECTORS, lambda x: x / tf.reduce_max(x, 0, keepdims=True)),
    "sum of all": (VECTORS, lambda x: x - tf.reduce_sum(x)),
    "batch variance": (IMAGES, lambda x: x * tf.math.rsqrt(tf.math.reduce_variance(x, [0, 1, 2]) + 1.0)),
    "fused batch normalization": (IMAGES, lambda x: moments(x, True)),
    "roll": (VECTORS, lambda x: tf.roll(x, 1, 0)),
    "roll of all axes": (VECTORS, lambda x: tf.roll(x, [1, 1], [1, 0])),
    "sort": (VECTORS, lambda x: tf.sort(x, 0)),
    "rank of the examples": (VECTORS, lambda x: tf.cast(tf.argsort(x, 0), tf.float32)),
    "reversed": (VECTORS, lambda x: tf.reverse(x, [0])),
    "cumulative sum": (VECTORS, lambda x: tf.cumsum(x, 0)),
    "softmax over examples": (VECTORS, lambda x: tf.nn.softmax(x, 0)),
    "reshape that mixes": (VECTORS, lambda x: tf.reduce_sum(tf.reshape(x, [3, 8]), 1)),
    "pairs of examples": (VECTORS, lambda x: tf.reduce_mean(tf.reshape(x, [2, 2, 6]), 1)),
    "reshape that moves": (VECTORS, lambda x: tf.reshape(tf.transpose(x), [ROWS, 6])),
    "gram matrix": (VECTORS, lambda x: tf.matmul(x, x, transpose_b=True)),
    "covariance": (VECTORS, lambda x: x @ tf.matmul(x, x, transpose_a=True)),
    "einsum over examples": (VECTORS, lambda x: tf.einsum("ij,ik->jk", x, x)),
    "einsum of pairs": (VECTORS, lambda x: tf.einsum("ij,kj->ik", x, x)),
    "attention between examples": (SERIES, lambda x: tf.einsum("itf,jtf->ijt", x, x)),
    "product from the left": (VECTORS, lambda x: tf.constant(RNG.normal(size=(ROWS, ROWS)), tf.float32) @ x),
    "square product from the left": (SQUARE, lambda x: tf.linalg.band_part(tf.ones(SQUARE), 1, 1) @ x),
    "diagonal": (SQUARE, lambda x: tf.einsum("ii->i", x)),
    "gather of other rows": (VECTORS, lambda x: tf.gather(x, [1, 2, 3, 0])),
    "gather by an example": (VECTORS, lambda x: tf.gather(x, tf.argmax(x[:, :4], 1))),
    "first example": (VECTORS, lambda x: x - x[:1]),
    "one example": (VECTORS, lambda x: x - x[2]),
    "shifted by slices": (VECTORS, lambda x: tf.concat([x[1:], x[:1]], 0)),
    "differences": (VECTORS, lambda x: x[1:] - x[:-1]),
    "examples reversed by a stride": (VECTORS, lambda x: x[::-1]),
    "unstacked": (VECTORS, lambda x: tf.stack(tf.unstack(x)[::-1])),
    "split": (VECTORS, lambda x: tf.concat(tf.split(x, 2)[::-1], 0)),
    "padded": (VECTORS, lambda x: tf.pad(x, [[1, 0], [0, 0]])[:-1]),
    "tiled and folded": (VECTORS, lambda x: tf.reduce_sum(tf.reshape(tf.tile(x, [1, 2]), [2, ROWS, 6]), 0)),
    "by the place": (VECTORS, lambda x: x + BY_PLACE),
    "scaled by the place": (VECTORS, lambda x: x * tf.range(4.0)[:, None]),
    "concatenated with places": (VECTORS, lambda x: tf.concat([x, BY_PLACE], 1)),
    "convolution over examples": (SERIES, lambda x: tf.nn.conv1d(tf.transpose(x, [1, 0, 2]), tf.ones([3, 6, 1]), 1, "SAME")),  # noqa: E501
    "loop over rows": (VECTORS, summed_in_a_loop),
    "condition on the batch": (VECTORS, lambda x: tf.cond(tf.reduce_sum(x) > 0, lambda: x, lambda: -x)),
    "function of rows": (VECTORS, lambda x: tf.map_fn(lambda row: row * 2.0, x)),
    "segment sums": (VECTORS, lambda x: tf.math.unsorted_segment_sum(x, [0, 0, 1, 1], ROWS)),
    "scattered": (VECTORS, lambda x: tf.scatter_nd([[1], [0], [3], [2]], x, [ROWS, 6])),
    "custom gradient over the batch": (VECTORS, centred_gradient),
    "state": (VECTORS, written_to_state),
    "shuffled": (VECTORS, tf.random.shuffle),
    "the same noise in every batch": (VECTORS, lambda x: x + tf.random.stateless_normal(VECTORS, [1, 2])),
    "a function of places": (VECTORS, lambda x: x + places()),
    "gradient written to state": (VECTORS, gradient_in_state),
    "nearest other example": (VECTORS, lambda x: tf.gather(x, tf.argmin(tf.norm(x[:, None] - x[None], axis=2), 1))),
}  # fmt: skip


def attend(x):
    return tf.einsum("bts,bsf->btf", tf.nn.softmax(tf.einsum("btf,bsf->bts", x, x)), x)


def upsampled(x):
    return tf.nn.conv2d_transpose(x, tf.transpose(KERNEL, [0, 1, 3, 2]), [ROWS, 16, 16, 2], 2)


def patches(x):
    return tf.reshape(tf.transpose(tf.reshape(x, [ROWS, 2, 4, 2, 4, 3]), [0, 1, 3, 2, 4, 5]), [ROWS, 4, 48])


def rows_within_an_axis(x):
    return tf.reduce_max(tf.reshape(tf.reshape(x, [ROWS * 5, 6]) * 2.0, [ROWS, 30]), 1)


def time_first_and_merged(x):
    return tf.reshape(tf.reshape(tf.transpose(x, [1, 0, 2]), [-1, 6]) @ W, [5, ROWS, 5])


def split_heads(x):
    heads = tf.transpose(tf.reshape(x, [ROWS, 5, 2, 3]), [0, 2, 1, 3])
    return tf.nn.softmax(tf.matmul(heads, heads, transpose_b=True)) @ heads


# Name -> (shape, function): each example's result depends on it alone.
SEPARATE = {
    "dense": (VECTORS, lambda x: tf.nn.relu(x @ W + 1.0)),
    "dense, transposed": (VECTORS, lambda x: tf.matmul(W, x, transpose_a=True, transpose_b=True)),
    "dense over time": (SERIES, lambda x: tf.tensordot(x, W, 1)),
    "dense over merged rows": (SERIES, lambda x: tf.reshape(tf.reshape(x, [-1, 6]) @ W, [ROWS, 5, 5])),
    "batch of products": (SERIES, lambda x: tf.matmul(x, x, transpose_b=True)),
    "product by one matrix": (SERIES, lambda x: tf.matmul(x, tf.broadcast_to(W, [1, 6, 5]))),
    "einsum": (SERIES, lambda x: tf.einsum("btf,fg->btg", x, W)),
    "einsum with an ellipsis": (SERIES, lambda x: tf.einsum("...f,fg->...g", x, W)),
    "attention": (SERIES, split_heads),
    "attention by einsum": (SERIES, attend),
    "convolution": (IMAGES, lambda x: tf.nn.conv2d(x, KERNEL, 2, "SAME")),
    "depthwise convolution": (IMAGES, lambda x: tf.nn.depthwise_conv2d(x, KERNEL, [1, 1, 1, 1], "VALID")),
    "transposed convolution": (IMAGES, upsampled),
    "pooling": (IMAGES, lambda x: tf.nn.max_pool2d(x, 2, 2, "SAME") + tf.nn.avg_pool2d(x, 2, 2, "SAME")),
    "pooling over space": (IMAGES, lambda x: tf.reduce_mean(x, [1, 2]) - tf.reduce_max(x, [1, 2])),
    "resized": (IMAGES, lambda x: tf.image.resize(x, [4, 12]) + tf.image.resize(x, [4, 12], "nearest")),
    "space to depth": (IMAGES, lambda x: tf.nn.space_to_depth(x, 2)),
    "constant statistics": (IMAGES, lambda x: moments(x, False)),
    "layer normalization": (SERIES, lambda x: (x - tf.reduce_mean(x, -1, keepdims=True)) * tf.math.rsqrt(
        tf.math.reduce_variance(x, -1, keepdims=True) + 1.0)),
    "squeeze and excitation": (IMAGES, lambda x: x * tf.sigmoid(tf.reduce_mean(x, [1, 2], keepdims=True) * 2.0)),
    "patches": (IMAGES, patches),
    "rows within an axis": (SERIES, rows_within_an_axis),
    "time first": (SERIES, lambda x: tf.transpose(tf.cumsum(tf.transpose(x, [1, 0, 2]), 0), [1, 0, 2])),
    "time first and merged": (SERIES, time_first_and_merged),
    "unrolled over time": (SERIES, lambda x: tf.stack([tf.tanh(each) for each in tf.unstack(x, axis=1)], 1)),
    "reversed in time": (SERIES, lambda x: tf.reverse(x, [1]) + tf.roll(x, 1, 1)),
    "slices in time": (SERIES, lambda x: x[:, 1:] - x[:, :-1]),
    "last step": (SERIES, lambda x: x[:, -1]),
    "new axis and ellipsis": (SERIES, lambda x: x[:, None, ..., ::2] * 1.0),
    "padded in space": (IMAGES, lambda x: tf.pad(x, [[0, 0], [1, 1], [2, 0], [0, 0]], "SYMMETRIC")),
    "split and concatenated": (SERIES, lambda x: tf.concat(tf.split(x, [2, 4], -1)[::-1], -1)),
    "tiled": (VECTORS, lambda x: tf.reshape(tf.tile(x[:, None], [1, 3, 1]), [ROWS, 18])),
    "one token for all": (SERIES, lambda x: tf.concat([tf.broadcast_to(W[None, None, :, 0], [ROWS, 1, 6]), x], 1)),
    "places in a sequence": (SERIES, lambda x: x + tf.range(5.0)[:, None]),
    "lookup": (VECTORS, lambda x: tf.gather(TABLE, tf.cast(tf.abs(x), tf.int32))),
    "one hot": (VECTORS, lambda x: tf.one_hot(tf.argmax(x, 1), 6) * x),
    "dropout": (VECTORS, lambda x: tf.nn.experimental.stateless_dropout(x, 0.5, seed())),
    "unrolled from zeros": (VECTORS, lambda x: tf.tanh(x @ W + tf.zeros([ROWS, 5]) @ W[:5])),
    "repeated": (SERIES, lambda x: tf.repeat(x, 2, 1)),
    "noise for all alike": (VECTORS, lambda x: x + tf.random.stateless_normal([1, 6], [1, 2])),
    "custom gradient": (VECTORS, doubled_gradient),
    "swish": (VECTORS, tf.nn.silu),
    "gelu": (VECTORS, tf.nn.gelu),
    "clipped, by sign": (VECTORS, lambda x: tf.where(x > 0, tf.clip_by_value(x, 0.1, 0.5), tf.zeros_like(x) - 0.1)),
    "mask": (SERIES, lambda x: tf.where(tf.reduce_any(x > 1.0, -1, keepdims=True), x, 0.0)),
    "half precision": (VECTORS, lambda x: tf.cast(tf.cast(x, tf.bfloat16) * 2, tf.float32)),
}  # fmt: skip


def identifier(name):
    return name.replace(",", "").replace(" ", "_")


def prove(function, shape):
    """Proves forward and backward pass of a function, in a graph of its own; returns where rows are in its result."""
    found = []

    def run(x, index):
        graph = tf.compat.v1.get_default_graph()
        INDEX.append(index)
        proof = Proof([x], ROWS, index)
        y = function(x)
        found.append(proof.rows_of(y))
        if y.dtype.is_floating:
            (gradient,) = tf.gradients(y, [x], tf.sin(y))
            check_no_state(proof, graph.get_operations())
            assert gradient is None or proof.rows_of(gradient).axis == 0
        return proof.by_row(y)

    specs = tf.TensorSpec(shape), tf.TensorSpec([ROWS], tf.int32)
    return tf.function(run, autograph=False).get_concrete_function(*specs)


@pytest.mark.parametrize("name", COUPLED, ids=identifier)
def test_refuses_what_couples_examples(name):
    shape, function = COUPLED[name]
    with pytest.raises(NotProvedError):
        prove(function, shape)


@pytest.mark.parametrize("name", SEPARATE, ids=identifier)
def test_accepts_what_keeps_examples_apart(name):
    shape, function = SEPARATE[name]
    run = prove(function, shape)
    x = RNG.normal(size=shape).astype("float32")
    changed = x.copy()
    changed[1] *= -2.0
    before, after = (np.asarray(tf.cast(run(tf.constant(each), tf.range(ROWS)), tf.float32)) for each in (x, changed))
    assert before.shape[0] == ROWS
    np.testing.assert_allclose(np.delete(before, 1, 0), np.delete(after, 1, 0), rtol=1e-6)
    assert not np.array_equal(before[1], after[1])


def test_the_galleries_are_large_enough():
    assert min(len(COUPLED), len(SEPARATE)) >= 30


@keras.saving.register_keras_serializable("test_independence")
class Divided(keras.layers.Layer):
    """Computes with the size of the batch."""

    def __init__(self, how, **kwargs):
        super().__init__(**kwargs)
        self.how = how

    def call(self, x):
        size = tf.shape(x)[0]
        if self.how == "factor":
            return x / tf.cast(size, x.dtype)
        if self.how == "shape operation":
            return x / tf.cast(tf.raw_ops.Shape(input=x)[0], x.dtype)
        if self.how == "attribute":
            return tf.nn.leaky_relu(x, alpha=1.0 / (x.shape[0] or 1))
        if self.how == "branch":
            return x if x.shape[0] == ROWS else 2.0 * x
        return tf.reshape(tf.reshape(x, [size, 2, -1]), [size, 6])  # a shape alone is fine


@pytest.mark.parametrize("how", ["factor", "branch", "shape operation", "attribute", "shape alone"])
def test_arithmetic_on_the_size_of_the_batch(how):
    inputs = keras.Input((6,))
    model = tf_dpbn.DPModel(inputs, keras.layers.Dense(3)(Divided(how)(keras.layers.Dense(6)(inputs))))
    helpers.compiled(model)

    def run(x, y):
        batch = Batch(x, y, None, None)
        task = step.task(model, step.public_forward(model, batch))
        return BatchTrace(task)(to_rows(batch)).results[0]

    specs = tf.TensorSpec(VECTORS), tf.TensorSpec([ROWS], tf.int64)
    traced = tf.function(run, autograph=False)
    if how != "shape alone":
        with pytest.raises(NotProvedError, match="number of examples"):
            traced.get_concrete_function(*specs)
    else:
        traced.get_concrete_function(*specs)
