"""Trains the network of mnist.py on several workers under MultiWorkerMirroredStrategy.

Started as it is, it launches --workers processes on this machine, which talk over the loopback interface. On a cluster
start it once on each machine with TensorFlow's TF_CONFIG in the environment, which says who takes part.

    TF_USE_LEGACY_KERAS=1 python examples/multi_worker.py --workers=2 --epochs=5

All workers draw the same Poisson batch, of which each takes its rows; their clipped sums are added up, noise is added
once for the whole batch, and the ledger counts steps of the whole. Keras 3 (3.15.1 was tried) cannot train under this
strategy, so it runs on tf_keras. The first worker ends with one line of JSON.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

from absl import app, flags

import command_line


def launch(workers: int) -> int:
    """Starts workers on this machine with the arguments of this script; returns the first bad exit status, or 0."""
    addresses = [f"127.0.0.1:{port}" for port in _free_ports(workers)]
    processes = []
    for index in range(workers):
        task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        environment = {"TF_USE_LEGACY_KERAS": "1", **os.environ, "TF_CONFIG": json.dumps(task)}
        output = None if index == 0 else subprocess.DEVNULL
        processes.append(subprocess.Popen([sys.executable, *sys.argv], env=environment, stdout=output))
    statuses = [process.wait() for process in processes]
    return next((status for status in statuses if status), 0)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def work() -> dict[str, object]:
    """Trains as one of the workers."""
    import tensorflow as tf

    strategy = tf.distribute.MultiWorkerMirroredStrategy()  # before anything else touches a device
    import datasets
    import mnist

    values = flags.FLAGS
    config = mnist.Config(epsilon=values.epsilon, epochs=values.epochs, batch_size=values.batch_size)
    tf.keras.utils.set_random_seed(config.seed)
    data = datasets.load(config.dataset, None, config.seed).first(values.max_examples)
    plan = mnist.make_plan(config, len(data.x_train))
    with strategy.scope():
        model = mnist.make_model(config, data.x_train.shape[1:])
        mnist.compile_model(model, plan, config)
        train = plan.poisson_dataset(data.x_train, data.y_train)
    model.fit(train, epochs=config.epochs, verbose=2 if _is_first() else 0)
    evaluation = tf.data.Dataset.from_tensor_slices((data.x_test, data.y_test)).batch(100, drop_remainder=True)
    _, accuracy = model.evaluate(evaluation, verbose=0)
    return {
        "test_accuracy": round(float(accuracy), 4),
        "epsilon": command_line.round_up(model.epsilon(plan.delta)),
        "steps": model.ledger.steps,
        "replicas": strategy.num_replicas_in_sync,
    }


def _is_first() -> bool:
    return json.loads(os.environ["TF_CONFIG"])["task"].get("index", 0) == 0


def main(argv: list[str]) -> None:
    """Launches, or works."""
    command_line.prepare(argv)
    if "TF_CONFIG" not in os.environ:
        sys.exit(launch(flags.FLAGS.workers))
    result = work()
    if _is_first():
        print(json.dumps(result), flush=True)


def define_flags() -> None:
    """Defines the flags."""
    flags.DEFINE_integer("workers", 2, "Processes to launch if TF_CONFIG is not set.", lower_bound=1)
    flags.DEFINE_float("epsilon", 8.0, "Target epsilon of the whole training.", lower_bound=0.0)
    flags.DEFINE_integer("epochs", 30, "Passes over the data.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 512, "Expected batch size, over all workers.", lower_bound=1)
    flags.DEFINE_integer("max_examples", None, "Use only so many training examples.", lower_bound=1)


if __name__ == "__main__":
    define_flags()
    app.run(main)
