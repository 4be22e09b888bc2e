"""Small immutable records of hyper-parameters."""

import dataclasses
import inspect
from typing import Any

from tf_regtopk import validation


@dataclasses.dataclass(frozen=True)
class HyperParameters:
    """Base class: a frozen dataclass that Keras saves by its fields.

    The checks store the number as it looks once it was saved and loaded, so
    that a record equals the one that comes back.

    Raises:
        TypeError: When a subclass is defined whose methods take other arguments
            than those they override, as one written for an older version does.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, method in vars(cls).items():
            if name.startswith("_") or not inspect.isfunction(method):
                continue
            overridden = getattr(super(cls, cls), name, None)
            if inspect.isfunction(overridden):
                _check_arguments(cls, method, overridden)

    def _check_number(self, name, rule, is_valid):
        """As `validation.check_number`, for a field, made a float."""
        value = getattr(self, name)
        validation.check_number(name, value, rule, is_valid)
        object.__setattr__(self, name, float(value))

    def _check_integer(self, name, minimum):
        """As `validation.check_integer`, for a field, made an int."""
        value = getattr(self, name)
        validation.check_integer(name, value, minimum)
        object.__setattr__(self, name, int(value))

    def get_config(self):
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config):
        return cls(**config)


def _check_arguments(cls, method, overridden):
    """Raises unless a method can be called as the one that it overrides."""
    expected = inspect.signature(overridden)
    received = inspect.signature(method)
    try:
        received.bind(*expected.parameters)
    except TypeError:
        raise TypeError(
            f"`{cls.__name__}.{method.__name__}` must take the arguments of "
            "the method that it overrides, which may change from version to "
            "version before 1.0 (see CHANGELOG.md): write "
            f"`def {method.__name__}{expected}`. "
            f"Received: `def {method.__name__}{received}`"
        ) from None
