"""Small immutable records of hyper-parameters."""

import dataclasses

from tf_regtopk import validation


@dataclasses.dataclass(frozen=True)
class HyperParameters:
    """Base class: a frozen dataclass that Keras saves by its fields.

    The checks store the number as it looks once it was saved and loaded, so
    that a record equals the one that comes back.
    """

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
