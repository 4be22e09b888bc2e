"""Configurations of records in files of this and of older versions.

A file outlives the layout of the package and the hyper-parameters of a class.
So registered names are compared, never modules, and a hyper-parameter that a
file does not have counts as its default, because older versions did that.
"""

import dataclasses
import json
from typing import Any

import keras

from tf_regtopk import sparsifiers


def describe(record: Any) -> list[Any]:
    """Returns a record's registered name and its configuration.

    Args:
        record: Frozen dataclass that Keras can serialize, with its fields.

    Returns:
        List `[name, config]` of values that JSON can hold; records within
        `config` are described in the same way.

    Example:

    >>> from tf_regtopk import sparsifiers
    >>> describe(sparsifiers.TopK(density=0.5))
    ['tf_regtopk>TopK', {'density': 0.5}]
    """
    return _describe(keras.saving.serialize_keras_object(record))


def complete(saved: Any, record: Any) -> list[Any]:
    """Completes a description from a file, to compare it with `record`'s.

    Args:
        saved: Value that a file of any version holds for `describe(record)`.
        record: The record that resumes with the file's state.

    Returns:
        List `[name, config]` like that of `describe`, with the defaults of the
        record's class for hyper-parameters that the file does not have.
    """
    name, config = _describe(saved)
    own_name, own_config = describe(record)
    if ">" not in name and own_name.endswith(f">{name}"):
        name = own_name  # Version 0.1.0 left the package out.
    for field in dataclasses.fields(record):
        if field.name not in own_config:
            continue
        value = getattr(record, field.name)
        if field.name not in config:
            config[field.name] = _default_of(field)
        elif field.name == "density" and _chooses_density(record):
            # Any density fits, because the file says which one is in force.
            config[field.name] = None
        elif dataclasses.is_dataclass(value) and isinstance(
            config[field.name], list
        ):
            config[field.name] = complete(config[field.name], value)
    return [name, config]


def _chooses_density(record: Any) -> bool:
    return isinstance(record, sparsifiers.Sparsifier) and record.density is None


def without_names(value: Any) -> Any:
    """Returns a configuration without what may differ between equal programs.

    Keras numbers the names of optimizers, and saves functions as their code.

    Args:
        value: Configuration by `keras.saving.serialize_keras_object`.

    Example:

    >>> import keras
    >>> sgd = keras.saving.serialize_keras_object(keras.optimizers.SGD())
    >>> without_names(sgd)["config"].get("name")
    """
    if isinstance(value, dict):
        if value.get("class_name") in ("__lambda__", "function"):
            return None
        return {
            key: without_names(part)
            for key, part in value.items()
            if key not in ("name", "module", "build_config")
        }
    if isinstance(value, list | tuple):
        return [without_names(part) for part in value]
    return value


def _default_of(field: dataclasses.Field[Any]) -> Any:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if default is dataclasses.MISSING:
        return None
    return _describe(keras.saving.serialize_keras_object(default))


def _describe(value: Any) -> Any:
    """Removes the parts that may change between versions from a value."""
    if isinstance(value, dict):
        if {"class_name", "config"} <= value.keys():
            name = value.get("registered_name") or value["class_name"]
            return [name, _describe(value["config"])]
        return {key: _describe(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_describe(part) for part in value]
    # The value passes through JSON, because a file's value did as well.
    return json.loads(json.dumps(value))
