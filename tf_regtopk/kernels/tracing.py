"""Decorators of functions that TensorFlow traces, with types."""

from collections.abc import Callable
from typing import Any
from typing import TypeVar

import tensorflow as tf

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Both have names of their own, because a type checker sees no types behind
# `tf`.

# For a function that XLA compiles.
compiled: Callable[[_Function], _Function] = tf.function(
    jit_compile=True, autograph=False
)
# For a function without control flow that depends on tensors.
untranslated: Callable[[_Function], _Function] = (
    tf.autograph.experimental.do_not_convert
)
