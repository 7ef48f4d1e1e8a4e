"""Trains the best recipe of docs/results.md: Fashion-MNIST at epsilon 3, BatchNormalization, no public data.

The small network of mnist.py in batches of 4,096 for 40 epochs, evaluated with a moving average of its weights; on two
CPU cores it takes about five minutes and reaches 87 % (table d of docs/results.md).

    python examples/fashion_mnist.py --data_dir=/usr/share/datasets/fashion-mnist

Flags are those of mnist.py, with other defaults. It ends with one line of JSON.
"""

from __future__ import annotations

from absl import app, flags

import mnist

RECIPE = {
    "dataset": "fashion_mnist",
    "epsilon": 3.0,
    "l2_norm_clip": 1.0,
    "learning_rate": 2.0,
    "epochs": 40,
    "batch_size": 4096,
    "public_batch_size": 64,
    "ema": 0.9,
}


def define_flags() -> None:
    """Defines the flags of mnist.py with the recipe as defaults."""
    mnist.define_flags()
    flags.adopt_module_key_flags(mnist)  # shows them in --help
    for name, value in RECIPE.items():
        flags.FLAGS.set_default(name, value)


if __name__ == "__main__":
    define_flags()
    app.run(mnist.main)
