"""Two worker processes that fit a stock model under MultiWorkerMirroredStrategy; the first prints a line of JSON.

It holds the error, if there is one, and else how far the weights are from those of one process on whole batches.
"""

from __future__ import annotations

import json
import os
import sys

import numpy as np


def launch() -> None:
    import multi_worker

    os.environ.setdefault("TF_USE_LEGACY_KERAS", "0")
    sys.exit(multi_worker.launch(2))


def work() -> None:
    import tensorflow as tf

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(32, 4)).astype("float32"), generator.normal(size=(32, 1)).astype("float32")
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(8, drop_remainder=True)

    def make_model():
        model = tf.keras.Sequential([tf.keras.Input((4,)), tf.keras.layers.Dense(1, kernel_initializer="ones")])
        model.compile(tf.keras.optimizers.SGD(0.1, momentum=0.9), "mse")
        return model

    with strategy.scope():
        model = make_model()
    alone = make_model()
    alone.fit(batches, epochs=2, verbose=0)
    result = {"tensorflow": tf.__version__, "keras": getattr(tf.keras, "__version__", "tf_keras")}
    try:
        model.fit(batches, epochs=2, verbose=0)
    except ValueError as error:
        result["error"] = str(error)
    else:
        pairs = zip(alone.get_weights(), model.get_weights(), strict=True)
        result["apart"] = max(float(np.abs(one - two).max()) for one, two in pairs)
    if json.loads(os.environ["TF_CONFIG"])["task"]["index"] == 0:
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    work() if "TF_CONFIG" in os.environ else launch()
