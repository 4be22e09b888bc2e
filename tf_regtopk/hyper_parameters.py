"""Small immutable records of hyper-parameters."""

from collections.abc import Callable
import dataclasses
import inspect
from types import FunctionType
from typing import Any
from typing import Self
import warnings

import keras

from tf_regtopk import validation


@dataclasses.dataclass(frozen=True)
class HyperParameters:
    """Base class of frozen dataclasses that Keras saves by their fields.

    The checks store a number in the form that it has after saving and loading,
    so that a record equals the loaded record.

    Raises:
        TypeError: If a subclass is defined whose methods take other arguments
            than the methods that they override, as a subclass written for an
            older version does.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        _check_is_dataclass(cls)
        return super().__new__(cls)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, method in vars(cls).items():
            if name.startswith("_") or not inspect.isfunction(method):
                continue
            overridden = getattr(super(cls, cls), name, None)
            if inspect.isfunction(overridden):
                _check_arguments(cls, method, overridden)

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
        values = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self)
        }
        # A record within this one is saved with its class, which loading needs.
        return {
            name: keras.saving.serialize_keras_object(value)
            if dataclasses.is_dataclass(value)
            else value
            for name, value in values.items()
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(
            **{
                name: keras.saving.deserialize_keras_object(value)
                if isinstance(value, dict)
                else value
                for name, value in config.items()
            }
        )


def warn_if_unregistered(*records: Any) -> None:
    """Warns of classes that Keras will not find when it loads a model.

    Args:
        *records: Records, with records in their fields; other values do not
            count.
    """
    for record in records:
        if not isinstance(record, HyperParameters):
            continue
        class_ = type(record)
        if keras.saving.get_registered_name(class_) == class_.__name__:
            warnings.warn(
                f"The class `{class_.__name__}` should be registered by "
                "`@keras.saving.register_keras_serializable(package=...)` "
                "above it, because the configuration of the optimizer, which "
                "is saved with the model, has its name. Else loading needs "
                f"`custom_objects={{{class_.__name__!r}: ...}}`.",
                stacklevel=3,
            )
        warn_if_unregistered(
            *(getattr(record, f.name) for f in dataclasses.fields(record))
        )


def _check_is_dataclass(cls: type) -> None:
    """Raises if a class has parameters that its dataclass does not know."""
    for class_ in cls.__mro__:
        if class_ is HyperParameters or "__dataclass_fields__" in vars(class_):
            return
        fields = [
            name
            for name, kind in inspect.get_annotations(class_).items()
            if "ClassVar" not in str(kind)
        ]
        if fields or "__init__" in vars(class_):
            raise TypeError(
                f"`{class_.__name__}` must be a frozen dataclass, whose "
                "parameters are its fields: write "
                "`@dataclasses.dataclass(frozen=True)` above it. Received: a "
                f"class with {fields or '`__init__`'} of its own"
            )


def _check_arguments(
    cls: type, method: FunctionType, overridden: FunctionType
) -> None:
    """Raises unless a method takes the arguments of the overridden one."""
    expected = _signature_without_types(overridden)
    received = _signature_without_types(method)
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


def _signature_without_types(method: FunctionType) -> inspect.Signature:
    signature = inspect.signature(method)
    return inspect.Signature(
        [
            parameter.replace(annotation=inspect.Parameter.empty)
            for parameter in signature.parameters.values()
        ]
    )
