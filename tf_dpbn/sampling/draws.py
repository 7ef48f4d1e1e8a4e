"""Poisson sampling: the distribution of the batches, and draws of example numbers.

Formal Guarantees. Privacy amplification by subsampling, as used by `accounting`, needs batches in which every example
lies with probability q, independently of all others and of all other steps. Shuffled or fixed-order batches do not have
that distribution; the draws made here do.

| case                          | what happens                                                    |
| ----------------------------- | --------------------------------------------------------------- |
| fewer than M examples drawn   | the other rows are padding: all zeros, weight 0                 |
| nothing drawn                 | a batch of padding only; the step must still run and add noise  |
| more than M examples drawn    | M of them, uniformly at random, are kept; `accounting` adds the |
|                               | probability of this to delta                                    |
| `seed` given                  | draws can be repeated: whoever knows the seed can undo the      |
|                               | amplification, so keep it secret or use it for tests only       |
| several workers, one data set | all need the same secret seed, and each its own share of rows   |
| the dataset is cached         | NOT Poisson sampling: each pass repeats the draws of the first  |

Examples take uniformly random rows of the batch. So one example more or less changes one row, and the distribution of
all other rows stays as it was: microbatches and replicas, which split the batch by rows, keep the sensitivity of a
single example.
"""

from __future__ import annotations

import hashlib
import math
import numbers
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tf_dpbn import _validate


@dataclass(frozen=True, kw_only=True)
class PoissonSampling:
    """The distribution of the batches; public facts only.

    Attributes:
      num_examples: N, number of examples, or of users, in the data set.
      sampling_probability: q, probability in (0, 1] that a batch contains a given one.
      max_batch_size: M, how many of them a draw holds at most.
      steps_per_epoch: number of draws in one pass over the dataset.
      replicas: among how many replicas a batch is split by rows.
      unit: "example" or "user", of which N, q and M tell.

    Raises:
      ValueError: a count is not a whole number of at least 1, or q is outside (0, 1].
    """

    num_examples: int
    sampling_probability: float
    max_batch_size: int
    steps_per_epoch: int
    replicas: int = 1
    unit: str = "example"

    def __post_init__(self) -> None:
        for name in ("num_examples", "max_batch_size", "steps_per_epoch", "replicas"):
            object.__setattr__(self, name, _validate.positive_int(name, getattr(self, name)))
        rate = _validate.probability("sampling_probability", self.sampling_probability)
        object.__setattr__(self, "sampling_probability", rate)

    @property
    def rows(self) -> int:
        """Rows of a batch, padding included: M, rounded up so that all replicas get equally many."""
        return -(-self.max_batch_size // self.replicas) * self.replicas

    @property
    def expected_batch_size(self) -> float:
        """Mean number of examples drawn, q * N: the public denominator of the step's averages."""
        return self.sampling_probability * self.num_examples


class Users:
    """The users that examples belong to.

    Args:
      user_ids: whole numbers or strings [N].
      most: how many examples of a user a draw holds at most.

    Attributes:
      count: the number of users.
    """

    def __init__(self, user_ids: Any, most: int) -> None:
        ids = np.asarray(user_ids)
        if ids.ndim != 1 or ids.dtype.kind not in "iuSU" and not all(isinstance(each, str) for each in ids):
            received = f"{ids.dtype} of shape {ids.shape}"
            raise _validate.argument_error("user_ids", received, "hold a whole number or a string for each example")
        _, user_of = np.unique(ids, return_inverse=True)
        self._examples, self._most = np.argsort(user_of, kind="stable"), most
        self._ends = np.cumsum(np.bincount(user_of))
        self.count = len(self._ends)

    def examples_of(self, users: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draws at most `most` examples of each user.

        A user with fewer has some of them again, which do not count: so no user looks like padding in part.

        Args:
          users: their numbers, int64 [rows], or -1.
          rng: draws.

        Returns:
          (indices, counts): int64 and bool [rows, most], an example's number or -1, and whether it counts.
        """
        indices = np.full((len(users), self._most), -1, np.int64)
        counts = np.zeros(indices.shape, bool)
        for row in np.flatnonzero(users >= 0):
            end = self._ends[users[row]]
            own = self._examples[self._ends[users[row] - 1] if users[row] else 0 : end]
            if len(own) > self._most:
                own = rng.choice(own, self._most, replace=False)
            indices[row], counts[row, : len(own)] = np.resize(own, self._most), True
        return indices, counts


class SharedDraws:
    """Keeps several workers' draws alike: one secret seed, and a stream for each epoch of training.

    Streams are numbered by what all workers count alike, calls of `fit` and private steps, not by iterations of the
    data set: one more on a single worker, to look at a batch, must not put it out of step with the others.

    Args:
      seed: of this worker, or None; that of the first worker is taken for all.
      digest: of the training data, by which workers can tell that they hold the same.
    """

    def __init__(self, seed: int | None, digest: int) -> None:
        self.seed, self.digest, self._fits = _shared_seed(seed), digest, 0
        self._steps: Callable[[], int] = int

    def begin(self, steps: Callable[[], int]) -> None:
        """Notes that `fit` begins; `steps` counts private steps."""
        self._fits, self._steps = self._fits + 1, steps

    def stream(self) -> tuple[int, int]:
        """The number of the stream for an iteration that begins now."""
        return self._fits, self._steps()


def poisson_indices(sampling: PoissonSampling, *, seed: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Draws batches of example numbers, without end.

    Args:
      sampling: the distribution of the batches.
      seed: whole number that fixes the sequence; for tests. None takes the operating system's entropy, which no global
        seed of Python, numpy, TensorFlow or Keras makes predictable.

    Returns:
      An iterator over (indices, mask), one pair a draw: int64 [rows], the example's number or -1 for padding; float32
      [rows], 1 for an example, 0 for padding. The rows of the examples are uniformly random.

    Raises:
      ValueError: bad `seed`.
    """
    return draws(sampling, np.random.default_rng(seed_sequence(checked_seed(seed), 0)))


def draws(sampling: PoissonSampling, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the (indices, mask) of `poisson_indices` from `rng`."""
    rows = sampling.rows
    while True:
        drawn = _heads(sampling.num_examples, sampling.sampling_probability, rng)
        if drawn.size > sampling.max_batch_size:
            drawn = rng.choice(drawn, size=sampling.max_batch_size, replace=False)
        indices = np.full(rows, -1, dtype=np.int64)
        indices[rng.choice(rows, size=drawn.size, replace=False)] = drawn
        yield indices, (indices >= 0).astype(np.float32)


def _heads(coins: int, probability: float, rng: np.random.Generator) -> np.ndarray:
    """Which of as many independent coins show heads, in time in proportion to how many do.

    From one head to the next it takes a geometric number of coins: numpy makes it of an exponential number of 53 bits.
    """
    expected, last, found = coins * probability, -1, []
    while last < coins:
        gaps = rng.geometric(probability, int(expected + 6.0 * math.sqrt(expected)) + 10)
        gaps = np.clip(gaps, 1, coins + 1)  # 0 where the exponential number is 0, and beyond all coins next to overflow
        found.append(last + np.cumsum(gaps))
        last = found[-1][-1]
    heads = np.concatenate(found)
    return heads[heads < coins]


def digest_of(arrays: Sequence[Any]) -> int:
    """A number of 32 bits that tells nests of arrays apart."""
    digest = hashlib.sha256()
    for array in arrays:
        array = np.asarray(array)
        digest.update(f"{array.dtype}{array.shape}".encode())
        flat = np.ascontiguousarray(array.astype(bytes) if array.dtype == object else array).reshape(-1)
        digest.update(flat.view(np.uint8).data)  # not a copy of the array
    return int.from_bytes(digest.digest()[:4], "big")


def _shared_seed(seed: int | None) -> int:
    """The first worker's seed, secret unless it was given, on all workers of the current strategy."""
    mask = 2**63 - 1
    words = [secrets.randbits(63), secrets.randbits(63)] if seed is None else [seed >> 63 & mask, seed & mask]
    first = tf.VariableAggregation.ONLY_FIRST_REPLICA  # created with the first worker's value
    variable = tf.Variable(words, dtype=tf.int64, trainable=False, aggregation=first)
    high, low = tf.distribute.get_strategy().experimental_local_results(variable)[0].numpy().tolist()
    return high << 63 | low


def seed_sequence(seed: int | None, *stream: int) -> np.random.SeedSequence:
    """Returns the seed of one iteration: from `seed` and its number, or new from the operating system."""
    # A stream for each iteration: what prefetching draws ahead in one does not shift the next.
    # Without a seed nothing is kept between iterations that a forked process could repeat.
    entropy = secrets.randbits(128) if seed is None else seed
    return np.random.SeedSequence(entropy, spawn_key=stream)


def checked_seed(seed: int | None) -> int | None:
    """Returns `seed` as a Python int or None."""
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or seed < 0:
        raise _validate.argument_error("seed", seed, "be None or a whole number of at least 0")
    return int(seed)
