"""Checks of numbers that the guarantee rests on; errors print name, value and what is allowed."""

import math
import numbers


def require(name: str, value: object, is_good: bool, allowed: str) -> None:
    """Raise a ValueError with name, value and what is allowed, unless `is_good`."""
    if not is_good:
        raise ValueError(f'{name} is {value!r}; it must be {allowed}')


def is_positive(value: object) -> bool:
    """Whether `value` is a finite number > 0."""
    return isinstance(value, numbers.Real) and math.isfinite(value) and value > 0


def is_whole(value: object, least: int, most: float = math.inf) -> bool:
    """Whether `value` is a whole number (no bool) in [least, most]."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and least <= value <= most
