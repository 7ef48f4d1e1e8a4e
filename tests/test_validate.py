"""One phrasing for every error a user can cause."""

import fractions
import math
import re

import numpy as np
import pytest

from tf_dpbn import _validate

NOT_NUMBERS = [None, "1", True, [1.0], float("nan"), math.inf, -math.inf, 1j]

CHECKS = {
    "positive": ([1, 0.5, np.float32(2), np.int64(3), fractions.Fraction(1, 2)], [0, 0.0, -1]),
    "non_negative": ([0, 0.0, 1.5, np.float64(2)], [-1e-9, -1]),
    "positive_int": ([1, 2.0, np.int32(7)], [0, -1, 1.5]),
    "non_negative_int": ([0, 2.0, np.int32(7)], [-1, 0.5]),
    "open_probability": ([1e-5, 0.5, np.float32(0.25)], [0, 1, -0.1, 1.1]),
    "probability": ([1e-5, 1, 1.0], [0, -0.1, 1.0001]),
}
GOOD = [(check, value) for check, (good, _) in CHECKS.items() for value in good]
BAD = [(check, value) for check, (_, bad) in CHECKS.items() for value in [*bad, *NOT_NUMBERS]]


@pytest.mark.parametrize(("check", "value"), GOOD)
def test_accepts_and_returns_a_plain_python_number(check, value):
    result = getattr(_validate, check)("argument", value)
    assert result == value
    assert type(result) is (int if check.endswith("int") else float)


@pytest.mark.parametrize(("check", "value"), BAD)
def test_refuses_with_name_remedy_and_value(check, value):
    message = rf"^`argument` must be .*\. Try 1\. Received: argument={re.escape(repr(value))}$"
    if check == "open_probability":
        message = message.replace("must be", "must lie")
    with pytest.raises(ValueError, match=message):
        getattr(_validate, check)("argument", value, "Try 1.")


def test_one_of_returns_the_choice():
    assert _validate.one_of("mode", "b", ("a", "b")) == "b"


def test_one_of_lists_the_choices():
    message = re.escape("`mode` must be one of 'a', 'b'. Received: mode='c'")
    with pytest.raises(ValueError, match=f"^{message}$"):
        _validate.one_of("mode", "c", ("a", "b"))


def test_argument_error_takes_another_class():
    error = _validate.argument_error("x", 3, "be a string", kind=TypeError)
    assert type(error) is TypeError
    assert str(error) == "`x` must be a string. Received: x=3"
