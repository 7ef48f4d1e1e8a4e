"""Runs TensorFlow's layout optimizer for GPUs on the graphs of private steps, without a GPU; it may crash the process.

python -m tests.gpu_layout conv1d batch_normalization_residual
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import config_pb2, device_properties_pb2, rewriter_config_pb2
from tensorflow.python.grappler import cluster, tf_optimizer

from tests import helpers, zoo
from tf_dpbn._devices import has_accelerator

_PLACE = "/job:localhost/replica:0/task:0/device:"


def pretend_gpu() -> None:
    """Makes the library build graphs for GPUs."""
    real = tf.config.list_logical_devices
    gpu = tf.config.LogicalDevice("/device:GPU:0", "GPU")
    tf.config.list_logical_devices = lambda kind=None: [gpu] if kind == "GPU" else real(kind)
    assert has_accelerator()


def optimized(graph: Any) -> Any:
    """What becomes of a function's graph whose operations all run on a GPU."""
    meta = tf.compat.v1.train.export_meta_graph(graph_def=graph.as_graph_def(add_shapes=True), graph=graph)
    meta.collection_def["train_op"].node_list.value.extend(tensor.name for tensor in graph.outputs)
    for nodes in [meta.graph_def.node, *[each.node_def for each in meta.graph_def.library.function]]:
        for node in nodes:
            node.device = f"{_PLACE}GPU:0"
    config = config_pb2.ConfigProto()
    options = config.graph_options.rewrite_options
    options.min_graph_nodes = -1
    options.meta_optimizer_iterations = rewriter_config_pb2.RewriterConfig.TWO
    return tf_optimizer.OptimizeGraph(config, meta, cluster=cluster.Cluster(devices=[_device("CPU"), _device("GPU")]))


def _device(kind: str) -> Any:
    properties = device_properties_pb2.DeviceProperties(
        type=kind, frequency=1000, num_cores=8, environment={"architecture": "8.0", "cuda": "12000", "cudnn": "9000"}
    )
    return device_properties_pb2.NamedDevice(name=f"{_PLACE}{kind}:0", properties=properties)


def main(names: list[str]) -> None:
    """Says for each net how many images had their channels moved."""
    pretend_gpu()
    for name in names:
        model, shape = zoo.build(name), zoo.BODIES[name][0]
        if zoo.has_batch_normalization(model):
            model.set_public_batch(np.zeros((5, *shape), "float32"))
        step = helpers.step_function(helpers.compiled(model))
        x, y = tf.zeros((4, *shape)), tf.zeros(4, tf.int32)
        nodes = optimized(step.get_concrete_function(x, y, tf.ones(4)).graph).node
        moved = sum(node.op == "Transpose" and "LayoutOptimizer" in node.name for node in nodes)
        print(name, "moved", moved, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
