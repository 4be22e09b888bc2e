"""Decorators of functions that TensorFlow traces, with types."""

from collections.abc import Callable
from typing import Any
from typing import cast
from typing import TypeVar

import tensorflow as tf

_Function = TypeVar("_Function", bound=Callable[..., Any])

# It has a name of its own, because a type checker sees no types behind `tf`.
# For a function without control flow that depends on tensors.
untranslated: Callable[[_Function], _Function] = (
    tf.autograph.experimental.do_not_convert
)


def compiled(function: _Function) -> _Function:
    """Makes a function that XLA compiles, and that replicas trace once.

    Args:
        function: Function or method. All that depends on the replica reaches it
            as an argument.

    Returns:
        The function. Its attribute `function` is the `tf.function`.
    """
    return cast(
        _Function,
        _Compiled(tf.function(function, jit_compile=True, autograph=False)),
    )


class _Compiled:
    """A `tf.function` of which replicas share what has been traced.

    A `tf.function` alone would be traced for each device of a strategy anew,
    before the first step of a training.
    """

    def __init__(self, function: Any) -> None:
        self.function = function

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return _Compiled(self.function.__get__(instance, owner))

    @untranslated
    def __call__(self, *args: Any) -> Any:
        if tf.executing_eagerly():
            return self.function(*args)
        with tf.init_scope(), tf.device(None):
            concrete = self.function.get_concrete_function(*args)
        return concrete(*args)
