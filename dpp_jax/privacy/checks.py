"""Checks of numbers that the guarantee rests on; errors print name, value and what is allowed."""

import math
import numbers


def require(name: str, value: object, is_good: bool, allowed: str) -> None:
    """Raise a ValueError with name, value and what is allowed, unless `is_good`."""
    if not is_good:
        raise ValueError(f'{name} is {value!r}; it must be {allowed}')


def is_number(value: object, least: float = -math.inf, most: float = math.inf) -> bool:
    """Whether `value` is a finite number (no bool) in [least, most]."""
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_real and math.isfinite(value) and least <= value <= most


def is_positive(value: object) -> bool:
    """Whether `value` is a finite number > 0."""
    return is_number(value) and value > 0


def is_text(value: object) -> bool:
    """Whether `value` is a text that is not empty."""
    return isinstance(value, str) and value != ''


def is_whole(value: object, least: float, most: float = math.inf) -> bool:
    """Whether `value` is a whole number (no bool) in [least, most]."""
    return isinstance(value, numbers.Integral) and is_number(value, least, most)
