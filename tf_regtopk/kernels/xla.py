"""Compiling functions by XLA."""

from collections.abc import Callable
from typing import Any
from typing import TypeVar

import tensorflow as tf

_Function = TypeVar("_Function", bound=Callable[..., Any])

# A decorator of its own, because a type checker sees no types behind
# `tf.function`.
compiled: Callable[[_Function], _Function] = tf.function(
    jit_compile=True, autograph=False
)
