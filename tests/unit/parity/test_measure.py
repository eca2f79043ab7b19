"""The measure that every comparison with a recording uses."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kit.compare import relative_error


def test_is_a_ratio_of_norms():
    assert relative_error([3.0, 4.0], [3.0, 0.0]) == pytest.approx(4 / 3)


def test_zero_over_zero_is_zero_and_anything_over_zero_is_infinite():
    assert relative_error(np.zeros(3), np.zeros(3)) == 0
    assert relative_error(np.ones(3), np.zeros(3)) == float("inf")


def test_not_a_number_is_never_equal():
    assert not relative_error([np.nan], [1.0]) < 1


def test_shapes_are_not_broadcast():
    with pytest.raises(ValueError, match="shape"):
        relative_error(np.ones((2, 1)), np.ones(2))
