"""Configurations of records as files hold them, of this and of older versions.

A file outlives the layout of the package and the hyper-parameters of a class:
what is compared are registered names, never modules, and a hyper-parameter that
a file does not have counts as its default, which is what older versions did.
"""

import dataclasses
import json

import keras


def describe(record):
    """A record's registered name and its configuration.

    Args:
        record: Frozen dataclass that Keras can serialize; so may its fields.

    Returns:
        List `[name, config]` of what JSON can hold; records within `config` are
        described in the same way.

    Example:

    >>> from tf_regtopk import sparsifiers
    >>> describe(sparsifiers.TopK(density=0.5))
    ['tf_regtopk>TopK', {'density': 0.5}]
    """
    return _describe(keras.saving.serialize_keras_object(record))


def complete(saved, record):
    """A description from a file of any version, to compare with `record`'s.

    Args:
        saved: What a file holds in the place of `describe(record)`.
        record: The record that is to go on with it.

    Returns:
        List as of `describe`, with the defaults of `record`'s class for what
        the file does not have.
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
        elif dataclasses.is_dataclass(value) and isinstance(
            config[field.name], list
        ):
            config[field.name] = complete(config[field.name], value)
    return [name, config]


def _default_of(field):
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if default is dataclasses.MISSING:
        return None
    return _describe(keras.saving.serialize_keras_object(default))


def _describe(value):
    """A serialized value without what may change from version to version."""
    if isinstance(value, dict):
        if {"class_name", "config"} <= value.keys():
            name = value.get("registered_name") or value["class_name"]
            return [name, _describe(value["config"])]
        return {key: _describe(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_describe(part) for part in value]
    # As it comes back from a file.
    return json.loads(json.dumps(value))
