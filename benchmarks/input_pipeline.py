"""What data cost that are made one example at a time: memory, time to read, and time to draw.

A million pictures exist only as numbers from which `load` makes them. `fit` takes steps of 512 expected examples on
them and on one batch that is kept, in turns; the difference is what reading costs where the step does not hide it.

    python benchmarks/input_pipeline.py --net=resnet20 --steps=20
"""

from __future__ import annotations

import itertools
import json
import resource
import time
from typing import Any

import numpy as np
import tensorflow as tf
from absl import app, flags

import nets
import tf_dpbn

_NET = flags.DEFINE_string("net", "resnet20", "network, see nets.py")
_STEPS = flags.DEFINE_integer("steps", 20, "steps of one turn", lower_bound=1)
_TURNS = flags.DEFINE_integer("turns", 3, "how often each takes so many", lower_bound=1)
_EXAMPLES = flags.DEFINE_integer("num_examples", 1_000_000, "in the data set", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 512, "expected examples of a batch", lower_bound=1)


def picture(shape: tuple[int, ...], number: int) -> tuple[np.ndarray, int]:
    """An example from its number alone."""
    return np.random.Generator(np.random.PCG64(number)).random(shape, "float32"), number % 10


def draw_milliseconds(num_examples: int, batch_size: int, draws: int = 100) -> float:
    """How long a draw takes, on average."""
    sampling = tf_dpbn.sampling.PoissonSampling(
        num_examples=num_examples,
        sampling_probability=batch_size / num_examples,
        max_batch_size=2 * batch_size,
        steps_per_epoch=draws,
    )
    drawn = tf_dpbn.sampling.poisson_indices(sampling)
    next(drawn)
    begin = time.perf_counter()
    for _ in itertools.islice(drawn, draws):
        pass
    return (time.perf_counter() - begin) / draws * 1e3


def seconds_of(model: Any, dataset: Any) -> float:
    """How long a step of `fit` takes, after one that is not counted."""
    times: list[float] = []
    clock = tf.keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: times.append(time.perf_counter()))
    model.fit(dataset, callbacks=[clock], verbose=0)
    return (times[-1] - times[0]) / (len(times) - 1)


def main(argv: list[str]) -> None:
    del argv
    shape = nets.input_shape(_NET.value)
    plan = tf_dpbn.PrivacyPlan(
        noise_multiplier=1.0,
        delta=0.1 / _EXAMPLES.value,
        num_examples=_EXAMPLES.value,
        expected_batch_size=_BATCH_SIZE.value,
        steps=1000,
    )
    model = nets.build(_NET.value, tf_dpbn.DPBatchNormalization, tf_dpbn.DPModel)
    model.set_public_batch(tf_dpbn.public_data.uniform_noise(shape))
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = tf_dpbn.DPOptimizer.from_plan(plan, tf.keras.optimizers.SGD(0.1), l2_norm_clip=1.0)
    model.compile(optimizer=optimizer, loss=loss)
    dataset = tf_dpbn.sampling.poisson_dataset(
        range(_EXAMPLES.value),
        load=lambda number: picture(shape, number),
        expected_batch_size=plan.expected_batch_size,
        max_batch_size=plan.max_batch_size,
        steps_per_epoch=_STEPS.value + 1,
    )
    kept = dataset.take(1).cache().repeat(_STEPS.value + 1)  # `fit` says that this is no Poisson sampling
    begin = time.perf_counter()
    for _ in dataset:
        pass
    read = (time.perf_counter() - begin) / (_STEPS.value + 1)
    seconds_of(model, kept)  # traces
    pairs = [(seconds_of(model, kept), seconds_of(model, dataset)) for _ in range(_TURNS.value)]
    of_kept, of_loaded = np.median(pairs, axis=0)
    result = {
        "net": _NET.value,
        "examples": _EXAMPLES.value,
        "batch_size": _BATCH_SIZE.value,
        "step_on_a_kept_batch_s": round(of_kept, 4),
        "step_on_loaded_batches_s": round(of_loaded, 4),
        "loaded_over_kept": round(float(np.median([loaded / kept for kept, loaded in pairs])), 3),
        "reading_alone_s": round(read, 4),
        "peak_memory_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "draw_of_batch_ms": round(draw_milliseconds(_EXAMPLES.value, _BATCH_SIZE.value), 3),
        "draw_of_batch_from_1e9_ms": round(draw_milliseconds(10**9, _BATCH_SIZE.value), 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
