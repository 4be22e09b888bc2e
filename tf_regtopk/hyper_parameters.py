"""Small immutable records of hyper-parameters."""

from collections.abc import Callable
import dataclasses
from typing import Any
from typing import Self

from tf_regtopk import validation


@dataclasses.dataclass(frozen=True)
class HyperParameters:
    """Base class of frozen dataclasses that Keras saves by their fields.

    The checks store a number in the form that it has after saving and loading,
    so that a record equals the loaded record.
    """

    def _check_number(
        self, name: str, rule: str, is_valid: Callable[[float], bool]
    ) -> None:
        """Applies `validation.check_number` to a field; makes it a float."""
        value = getattr(self, name)
        validation.check_number(name, value, rule, is_valid)
        object.__setattr__(self, name, float(value))

    def _check_integer(self, name: str, minimum: int) -> None:
        """Applies `validation.check_integer` to a field; makes it an int."""
        value = getattr(self, name)
        validation.check_integer(name, value, minimum)
        object.__setattr__(self, name, int(value))

    def get_config(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(**config)
