"""One phrasing for every error a user can cause.

A message names the argument, says what it must be and what to do, and ends in the value received.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any


def argument_error(
    name: str, value: Any, requirement: str, remedy: str = "", kind: type[Exception] = ValueError
) -> Exception:
    """Builds the error for a bad argument; the caller raises it.

    Args:
      name: the argument as the user wrote it.
      value: what was received.
      requirement: completes "`name` must ...".
      remedy: a sentence that says what to do instead.
      kind: the exception class.

    >>> raise argument_error("l2_norm_clip", -1.0, "be positive", "Start with 1.0.")
    Traceback (most recent call last):
    ...
    ValueError: `l2_norm_clip` must be positive. Start with 1.0. Received: l2_norm_clip=-1.0
    """
    parts = [f"`{name}` must {requirement}.", remedy, f"Received: {name}={value!r}"]
    return kind(" ".join(part for part in parts if part))


def _checked(name: str, value: Any, holds: Callable[[Any], bool], requirement: str, remedy: str) -> Any:
    """Returns `value`, or raises ValueError unless it is a finite number of which `holds` is true."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not holds(value):
        raise argument_error(name, value, requirement, remedy)
    return value


def positive(name: str, value: Any, remedy: str = "") -> float:
    """Returns `value` as a float, or raises ValueError unless it is a finite number > 0."""
    return float(_checked(name, value, lambda v: v > 0, "be a finite number greater than 0", remedy))


def non_negative(name: str, value: Any, remedy: str = "") -> float:
    """Returns `value` as a float, or raises ValueError unless it is a finite number >= 0."""
    return float(_checked(name, value, lambda v: v >= 0, "be a finite number of at least 0", remedy))


def positive_int(name: str, value: Any, remedy: str = "") -> int:
    """Returns `value` as an int, or raises ValueError unless it is a whole number >= 1."""
    return int(_checked(name, value, lambda v: v == int(v) >= 1, "be a whole number of at least 1", remedy))


def non_negative_int(name: str, value: Any, remedy: str = "") -> int:
    """Returns `value` as an int, or raises ValueError unless it is a whole number >= 0."""
    return int(_checked(name, value, lambda v: v == int(v) >= 0, "be a whole number of at least 0", remedy))


def open_probability(name: str, value: Any, remedy: str = "") -> float:
    """Returns `value` as a float, or raises ValueError unless 0 < value < 1."""
    return float(_checked(name, value, lambda v: 0 < v < 1, "lie strictly between 0 and 1", remedy))


def probability(name: str, value: Any, remedy: str = "") -> float:
    """Returns `value` as a float, or raises ValueError unless 0 < value <= 1."""
    return float(_checked(name, value, lambda v: 0 < v <= 1, "be greater than 0 and at most 1", remedy))


def power_of_two(name: str, value: Any, remedy: str = "") -> float:
    """Returns `value` as a float, or raises ValueError unless it is a power of two with a whole exponent."""
    return float(_checked(name, value, lambda v: v > 0 and math.frexp(v)[0] == 0.5, "be a power of two", remedy))


def one_of(name: str, value: Any, choices: tuple[Any, ...], remedy: str = "") -> Any:
    """Returns `value`, or raises ValueError unless it is one of `choices`."""
    if value not in choices:
        raise argument_error(name, value, f"be one of {', '.join(map(repr, choices))}", remedy)
    return value
