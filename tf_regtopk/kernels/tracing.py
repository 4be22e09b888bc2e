"""Functions that TensorFlow traces: with types, compiled, and shared."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any
from typing import cast
from typing import TypeVar
import weakref

import tensorflow as tf

from tf_regtopk import keras_internals
from tf_regtopk.kernels import device_kind

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Object = TypeVar("_Object")

# The most recently used objects of `of_equal`. What XLA has compiled for one
# that is dropped stays in memory all the same.
_NUM_SHARED = 128

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


def of_equal(make: Callable[..., _Object], *args: Any) -> _Object:
    """Makes an object with compiled methods, or returns an earlier, equal one.

    The earlier one has traced and compiled its methods already. So an optimizer
    that is made anew, as in a search for a learning rate, starts sooner, and
    XLA keeps no second program in memory.

    Only objects for the same kind of device are equal, and only those of this
    library's own classes: the code of a user's class may have been changed
    between the two, as in a notebook.

    Args:
        make: Class of the object, which keeps nothing but its arguments.
        *args: Arguments: tuples, frozen dataclasses, dtypes and plain values.

    Returns:
        The object.

    Example:

    >>> of_equal(complex, 1.0, 2.0) is of_equal(complex, 1.0, 2.0)
    True
    """
    if not all(map(_is_of_library, args)):
        return make(*args)
    return cast(
        _Object,
        _make(
            device_kind.is_gpu(),
            keras_internals.is_op_determinism_enabled(),
            make,
            *args,
        ),
    )


@functools.lru_cache(maxsize=_NUM_SHARED)
def _make(
    is_gpu: bool, is_deterministic: bool, make: Callable[..., Any], *args: Any
) -> Any:
    del is_gpu, is_deterministic
    return make(*args)


# Makes all objects of `of_equal` anew from here on.
forget = _make.cache_clear


def _is_of_library(value: Any) -> bool:
    """Returns whether equal values do the same."""
    if isinstance(value, tuple):
        return all(map(_is_of_library, value))
    if dataclasses.is_dataclass(value):
        return type(value).__module__.startswith("tf_regtopk.") and all(
            _is_of_library(getattr(value, field.name))
            for field in dataclasses.fields(value)
        )
    return isinstance(value, (int, float, str, tf.DType, type(None)))


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
        if concrete.graph not in _stateless:
            _check_stateless(concrete.graph)
            _stateless.add(concrete.graph)
        return concrete(*args)


# The graphs that were checked, because each replica calls.
_stateless: weakref.WeakSet[tf.Graph] = weakref.WeakSet()


def _check_stateless(graph: tf.Graph) -> None:
    """Raises if a graph has a stateful operation that is not of a variable.

    TensorFlow keeps the calls of functions with such operations in order. So
    the call of one replica waits for that of another replica, which waits in a
    collective for the first one, for ever.
    """
    for operation in graph.get_operations():
        if operation.op_def.is_stateful and not any(
            value.dtype == tf.resource for value in operation.inputs
        ):
            raise ValueError(
                "The methods of sparsifiers, codecs and rules must not call "
                "stateful operations, because the replicas would wait for each "
                "other for ever: draw random numbers by "
                "`tf.random.stateless_normal(shape, seed=[step, 0])` in place "
                "of `tf.random.normal`, and leave out `tf.debugging.assert_*` "
                f"and `tf.print`. Received: the operation {operation.name} "
                f"({operation.type})"
            )
