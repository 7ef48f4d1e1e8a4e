"""Trains one small model on 1, 2 and 4 logical CPUs and prints what differs, as JSON; see test_strategies.py.

A program of its own, because logical devices must be set up before TensorFlow starts.
"""

from __future__ import annotations

import functools
import json
import warnings
from typing import Any

import numpy as np
import tensorflow as tf

DEVICES = 4
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration() for _ in range(DEVICES)]
)

import tf_dpbn  # noqa: E402
from tests import helpers  # noqa: E402
from tf_dpbn._keras import keras, raw  # noqa: E402
from tf_dpbn.model import step  # noqa: E402

layers = keras.layers
ROWS = 16


@functools.cache
def strategy_of(replicas: int) -> tf.distribute.Strategy:
    if replicas == 1:
        return tf.distribute.get_strategy()
    # TensorFlow's collectives do not let devices join groups of different sizes in one process.
    reduction = None if replicas == 2 else tf.distribute.ReductionToOneDevice()
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)], reduction)


def batches() -> tf.data.Dataset:
    """Full, uneven over the rows, of one example, empty."""
    x, y = helpers.images(4 * ROWS)
    weights = np.ones((4, ROWS), "float32")
    weights[1, [0, 1, 2, 5, 11]] = 0.0
    weights[2, 1:] = 0.0
    weights[3] = 0.0
    x = x.reshape(4, ROWS, *x.shape[1:]) * weights[..., None, None, None]
    return tf.data.Dataset.from_tensor_slices((x, y.reshape(4, ROWS), weights))


def trained(
    replicas: int, statistics: tuple[str, ...], reduction: str | None = None
) -> tuple[Any, tf.distribute.Strategy]:
    strategy = strategy_of(replicas)
    with strategy.scope():
        each = iter(statistics)
        model = helpers.bn_stack(
            len(statistics), lambda: tf_dpbn.DPBatchNormalization(statistics=next(each)), model=tf_dpbn.DPModel
        )
        # Clips what it gets and has a memory: the gradient must be whole when it gets there.
        inner = keras.optimizers.SGD(0.5, momentum=0.9, clipnorm=0.2)
        optimizer = helpers.dp_optimizer(
            inner=inner,
            l2_norm_clip=1.0 if statistics else tf_dpbn.AdaptiveClip(0.5),
            noise_multiplier=0.5,
            expected_batch_size=ROWS,
            num_examples=64,
            noise_seed=1,
        )
        if set(statistics) - {"noised"}:
            model.set_public_batch(helpers.images(6, seed=1)[0])
        loss = keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, **{"reduction": reduction} if reduction else {}
        )
        counted = keras.metrics.MeanMetricWrapper(one_number, name="counted")
        helpers.compiled(model, loss, optimizer, correction="adaptive", metrics=["accuracy", counted])
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(0.4 * rng.normal(size=variable.shape))
    history = model.fit(batches(), verbose=0).history
    model.logged = [history["loss"][0], history["accuracy"][0]]
    assert history["counted"][0] == 1.0  # NaN on no rows, which a replica may have
    return model, strategy


def one_number(y: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
    """1 for a batch of real rows, 0/0 for none."""
    rows = tf.reduce_sum(tf.ones_like(y_pred[:, 0]))
    return rows / rows


def values(model: Any) -> np.ndarray:
    kept = model._record.released_means.variables.values()
    return helpers.flat([*model.get_weights(), *kept, model.optimizer.clip_norm])


def spread_over_replicas(model: Any, strategy: tf.distribute.Strategy) -> float:
    """How far the copies of any variable lie apart."""
    copies = [
        strategy.experimental_local_results(raw(variable))
        for variable in [*model.variables, *model.optimizer.variables]
    ]
    return max(float(np.max(np.abs(np.asarray(a) - np.asarray(b[0])))) for b in copies for a in b)


def comparison(statistics: tuple[str, ...], count: int, reduction: str | None = None) -> dict[str, Any]:
    one, _ = trained(1, statistics, reduction)
    model, strategy = trained(count, statistics, reduction)
    return {
        "steps": [one.ledger.steps, model.ledger.steps],
        "weights": float(np.max(np.abs(values(model) - values(one)))),
        "logs": float(np.max(np.abs(np.subtract(model.logged, one.logged)))),
        "copies": spread_over_replicas(model, strategy),
    }


def noise_scale() -> float:
    """Standard deviation of an update of two replicas by noise alone, over that of one Gaussian mechanism."""
    with strategy_of(2).scope():
        inputs = keras.Input((100,))
        model = tf_dpbn.DPModel(inputs, layers.Dense(200)(inputs))
        optimizer = helpers.dp_optimizer(l2_norm_clip=3.0, noise_multiplier=2.0, expected_batch_size=ROWS)
        helpers.compiled(model, "mse", optimizer, stub=True)
    before = np.asarray(model.layers[-1].kernel)
    data = np.zeros((1, ROWS, 100), "float32"), np.zeros((1, ROWS, 200), "float32"), np.zeros((1, ROWS), "float32")
    model.fit(tf.data.Dataset.from_tensor_slices(data), verbose=0)
    return float(np.std(np.asarray(model.layers[-1].kernel) - before) / (2.0 * 3.0 / ROWS))


def dropout_agreement() -> float:
    """How often two replicas drop the same unit of the example in their first row, at rate 0.5."""
    strategy = strategy_of(2)
    with strategy.scope():
        inputs = keras.Input((4000,))
        model = tf_dpbn.DPModel(inputs, layers.PReLU()(layers.Dropout(0.5)(inputs)))
        helpers.compiled(model, "mse", helpers.dp_optimizer(expected_batch_size=2))

    @tf.function(autograph=False)
    def run() -> Any:
        def outputs() -> tf.Tensor:
            x = tf.ones((1, 4000))
            batch = tf_dpbn.clipping.Batch(x, x, None, None)
            return step.clipped_sums(model, batch, step.public_forward(model, batch))[1].y_pred

        return strategy.run(outputs)

    first, second = (np.asarray(each) > 0 for each in strategy.experimental_local_results(run()))
    return float((first == second).mean())


def refusals() -> list[str]:
    """The messages of what is refused."""
    messages = []
    strategy = strategy_of(2)
    outside, plain = helpers.dp_optimizer(), keras.optimizers.SGD(1.0)
    with strategy.scope():
        inputs = keras.Input((3,))
        model = tf_dpbn.DPModel(inputs, layers.Dense(2)(inputs))
        inside = helpers.dp_optimizer(expected_batch_size=5)
        mixed = helpers.dp_optimizer(inner=plain)
    for optimizer, options in ((outside, {}), (mixed, {}), (inside, {"run_eagerly": True})):
        try:
            helpers.compiled(model, "mse", optimizer, **options)
        except (ValueError, NotImplementedError) as error:
            messages.append(str(error))
    helpers.compiled(model, "mse", inside, stub=True)
    x, y = np.zeros((20, 3), "float32"), np.zeros((20, 2), "float32")
    try:
        model.fit(tf_dpbn.sampling.poisson_dataset(x, y, expected_batch_size=5, max_batch_size=9))
    except ValueError as error:
        messages.append(str(error))
    with strategy.scope():
        dataset = tf_dpbn.sampling.poisson_dataset(x, y, expected_batch_size=5, max_batch_size=9)
    messages.append(f"{model.fit(dataset, verbose=0) and model.ledger.entries[0].max_batch_size}")
    return messages


def train_on_batch() -> str | float:
    """How far a step of `train_on_batch` on two replicas is from that on one device, or why it is refused."""
    found = []
    for replicas in (1, 2):
        with strategy_of(replicas).scope():
            inputs = keras.Input((3,))
            model = tf_dpbn.DPModel(inputs, layers.Dense(2)(inputs))
            helpers.compiled(model, "mse", helpers.dp_optimizer())
        model.set_weights([np.ones((3, 2)), np.zeros(2)])
        x, y = np.eye(3, dtype="float32")[np.arange(8) % 3], np.zeros((8, 2), "float32")
        try:
            model.train_on_batch(x, y)
        except NotImplementedError as error:
            return str(error)
        found.append(helpers.flat(model.get_weights()))
    return float(np.max(np.abs(found[0] - found[1])))


def main() -> None:
    warnings.simplefilter("ignore")  # the batches are not Poisson-sampled
    result = {
        "statistics": comparison(("public", "anchored", "noised"), 2),
        "sum": comparison((), 4, "sum"),
        "noise": noise_scale(),
        "dropout": dropout_agreement(),
        "refusals": refusals(),
        "train_on_batch": train_on_batch(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
