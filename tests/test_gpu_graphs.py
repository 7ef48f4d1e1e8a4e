"""The graphs that the library builds for GPUs, on a machine that has none; docs/results.md says what a GPU ran."""

import numpy as np
import pytest
import tensorflow as tf

from tests import gpu_layout, helpers, programs, zoo
from tf_dpbn._keras import IS_KERAS_3
from tf_dpbn.clipping import vectorization

# Those that differ on GPUs: convolutions of several kinds, and recurrent layers, for which Keras 3 would take cuDNN's.
NETS = ["conv1d", "conv2d", "conv2d_strided", "conv2d_transpose", "depthwise", "conv3d", "batch_normalization_residual"]
RECURRENT = ["lstm", "gru"]


@pytest.fixture
def gpu(monkeypatch):
    """As if there were a GPU."""
    monkeypatch.setattr(tf.config, "list_logical_devices", tf.config.list_logical_devices)  # restored after the test
    gpu_layout.pretend_gpu()


@pytest.mark.parametrize("net", [*NETS, *RECURRENT])
def test_rules_equal_the_generic_engine_in_what_they_do_on_gpus(net, gpu):
    model = zoo.build(net)
    helpers.randomize(model)
    x, y = zoo.data(net, 6)
    if zoo.has_batch_normalization(model):
        model.set_public_batch(zoo.data(net, 5)[0])
    found = {}
    for engine in ("book_keeping", "loop"):
        run = helpers.clipped_sum_function(helpers.compiled(model, engine=engine))
        found[engine] = helpers.flat(run(x, y, np.ones(6, "float32"))[0])
    assert helpers.relative_error(found["book_keeping"], found["loop"]) < 1e-5


@pytest.mark.slow
def test_tensorflow_lays_out_images_for_gpus_without_crashing():
    """Where slices of volumes name some axes only, it crashed in the optimizer (seen on a GPU)."""
    lines = programs.output("-m", "tests.gpu_layout", *NETS).splitlines()
    moved = {name: int(count) for name, _, count in map(str.split, lines)}
    assert set(moved) == set(NETS)
    assert moved["depthwise"] and moved["batch_normalization_residual"]  # the optimizer did its work


def test_slices_of_images_and_volumes_name_every_axis(gpu):
    model = zoo.build("batch_normalization_residual")
    model.set_public_batch(zoo.data("batch_normalization_residual", 5)[0])
    step = helpers.step_function(helpers.compiled(model))
    x, y = map(tf.convert_to_tensor, zoo.data("batch_normalization_residual", 4))
    slices = [
        operation
        for operation in step.get_concrete_function(x, y, tf.ones(4)).graph.get_operations()
        if operation.type == "StridedSlice"
        and operation.inputs[0].op.type != "Placeholder"  # nothing moves the channels of what goes into a step
        and operation.inputs[0].shape.rank >= 4
        and not any(operation.get_attr(f"{kind}_mask") for kind in ("new_axis", "shrink_axis", "ellipsis"))
    ]
    assert slices
    assert all(each.inputs[1].shape == [each.inputs[0].shape.rank] for each in slices)


@pytest.mark.parametrize("pretend", [True, False])
def test_biases_of_vectorized_images_are_ordinary_sums_on_gpus(pretend, monkeypatch):
    monkeypatch.setattr(vectorization, "has_accelerator", lambda: pretend)
    images, bias = tf.random.normal([3, 1, 4, 4, 2]), tf.constant([1.0, -2.0])
    added = vectorization.vectorize(lambda image: tf.nn.relu(tf.nn.bias_add(image, bias)), images)
    operations = added.get_concrete_function(images).graph.get_operations()
    volumes = [each for each in operations if each.type == "BiasAdd" and each.outputs[0].shape.rank == 5]
    biases = [each for each in volumes if each.outputs[0].consumers()]
    assert bool(biases) is not pretend
    np.testing.assert_array_equal(added(images), tf.nn.relu(images + bias))


@pytest.mark.skipif(not IS_KERAS_3, reason="tf_keras has no such option")
def test_recurrent_layers_choose_for_themselves_again_outside_of_steps(gpu):
    model = zoo.build("lstm")
    layer = next(layer for layer in model.layers if hasattr(layer, "use_cudnn"))
    run = helpers.clipped_sum_function(helpers.compiled(model))
    run(*zoo.data("lstm", 4), np.ones(4, "float32"))
    assert layer.use_cudnn == "auto"
