"""Checks of arguments, with errors that read like Keras's.

Nothing here needs TensorFlow: `training_validation.py` checks what does.
"""

from collections.abc import Callable
from collections.abc import Sequence
import math
import numbers
from typing import Any


def check_number(
    name: str, value: Any, rule: str, is_valid: Callable[[float], bool]
) -> None:
    """Raises unless `value` is a real number that obeys the rule.

    Args:
        name: Name of the argument.
        value: Value that the user passed.
        rule: The rule in words that follow "must be".
        is_valid: Function of a float, True if the float obeys the rule.

    Raises:
        TypeError: If `value` is not a real number (a bool is not a number).
        ValueError: If `value` is NaN, infinite or breaks the rule.
    """
    message = f"`{name}` must be {rule}. Received: {name}={value!r}"
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_real:
        raise TypeError(message)
    if not math.isfinite(value) or not is_valid(value):
        raise ValueError(message)


def check_density(name: str, value: Any, rule: str = "in (0, 1]") -> None:
    """Raises unless `value` is a share of the entries, more than none.

    Args:
        name: As of `check_number`.
        value: As of `check_number`.
        rule: As of `check_number`.
    """
    check_number(name, value, rule, lambda density: 0 < density <= 1)


def check_integer(name: str, value: Any, minimum: int) -> None:
    """Raises unless `value` is an integer of at least `minimum`."""
    message = (
        f"`{name}` must be an integer >= {minimum}. Received: {name}={value!r}"
    )
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(message)
    if value < minimum:
        raise ValueError(message)


def check_boolean(name: str, value: Any, others: Sequence[str] = ()) -> None:
    """Raises unless `value` is a bool, or one of the strings `others`."""
    is_other = isinstance(value, str) and value in others
    if not isinstance(value, bool) and not is_other:
        expected = " or ".join(["a boolean", *(f'"{o}"' for o in others)])
        raise TypeError(
            f"`{name}` must be {expected}. Received: {name}={value!r}"
        )


def check_instance(name: str, value: Any, class_: type, example: str) -> None:
    """Raises unless `value` is an instance of a class, like `example`."""
    if not isinstance(value, class_):
        article = "an" if class_.__name__[0] in "AEIOU" else "a"
        raise TypeError(
            f"`{name}` must be {article} `{class_.__name__}` such as "
            f"`{example}`. "
            f"Received: {name}={value!r}"
        )


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises unless `value` is one of the strings `choices`."""
    if not isinstance(value, str) or value not in choices:
        expected = " or ".join(f'"{choice}"' for choice in choices)
        raise ValueError(
            f"`{name}` must be {expected}. Received: {name}={value!r}"
        )
