"""Two worker processes that try to have one example counted twice; the first prints what came of it, as JSON.

Example i is the i-th unit vector, so that a step's move of weight i is what example i contributed.
"""

from __future__ import annotations

import json
import os
import sys
import warnings

import numpy as np

EXAMPLES, BATCH = 16, 8


def launch() -> None:
    import multi_worker

    sys.exit(multi_worker.launch(2))


def work() -> None:
    import tensorflow as tf

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    import tf_dpbn

    keras = tf.keras
    warnings.simplefilter("ignore")
    worker = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    x, y = np.eye(EXAMPLES, dtype="float32"), np.zeros((EXAMPLES, 1), "float32")
    batches = {"expected_batch_size": BATCH, "max_batch_size": 14}
    with strategy.scope():
        inputs = keras.Input((EXAMPLES,))
        model = tf_dpbn.DPModel(inputs, keras.layers.Dense(1, use_bias=False)(inputs))
        optimizer = tf_dpbn.DPOptimizer(
            keras.optimizers.SGD(1.0), 1.0, 0.0, expected_batch_size=BATCH, num_examples=EXAMPLES
        )
        model.compile(optimizer, lambda _, output: -100.0 * tf.reduce_sum(output, -1))
        dataset = tf_dpbn.sampling.poisson_dataset(x, y, seed=5 + worker, **batches)
        other = tf_dpbn.sampling.poisson_dataset(np.random.default_rng(worker).permutation(x), y, **batches)

    weights, moves = [], []

    def look_at_data(*_, **__) -> None:
        if worker == 0:  # once more than the other worker
            next(iter(dataset))

    def note_weights(*_, **__) -> None:
        weights.append(np.array(model.get_weights()[0])[:, 0])

    def note_moves(*_, **__) -> None:
        moves.append(np.abs(np.array(model.get_weights()[0])[:, 0] - weights[-1]) * BATCH)

    look_at_data()
    callback = keras.callbacks.LambdaCallback(
        on_epoch_begin=look_at_data, on_batch_begin=note_weights, on_batch_end=note_moves
    )
    model.fit(dataset, epochs=3, callbacks=[callback], verbose=0)
    result = {
        "largest": float(np.max(moves)),
        "draws": sorted({tuple(np.round(move).astype(int).tolist()) for move in moves}),
        "steps": model.ledger.steps,
    }
    attempts = {
        "arrays": lambda: model.fit(x, y, batch_size=BATCH, verbose=0),
        "batches": lambda: model.train_on_batch(x[:BATCH], y[:BATCH]),
        "outside": lambda: model.fit(tf_dpbn.sampling.poisson_dataset(x, y, **batches), verbose=0),
        "order": lambda: model.fit(other, verbose=0),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
            result[name] = "trained"
        except ValueError as error:
            result[name] = str(error)
    if worker == 0:
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    work() if "TF_CONFIG" in os.environ else launch()
