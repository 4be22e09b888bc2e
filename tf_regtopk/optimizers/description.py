"""The line by which an optimizer describes itself."""

from typing import Any

import tensorflow as tf

from tf_regtopk import codecs


def describe(optimizer: Any, index_code: str | None) -> str:
    """Describes a `SparsifiedOptimizer` in one line.

    Variables are read only where that is possible, which is not in a graph.

    Args:
        optimizer: The `SparsifiedOptimizer`.
        index_code: Name of the index codec that its wire report has, or None.
    """
    reads = tf.executing_eagerly()
    exchange = optimizer.chosen_exchange or optimizer.exchange
    parts = [_inner(optimizer.inner_optimizer, reads)]
    if exchange == "dense":
        parts += ["dense exchange"]
    else:
        parts += [
            _sparsifier(optimizer),
            type(optimizer.error_feedback).__name__,
            _codec(optimizer.codec, index_code),
            exchange
            if exchange == "all_gather"
            else f"{exchange} {type(optimizer.topology).__name__}",
        ]
    if optimizer.accumulation_steps > 1:
        parts.append(f"{optimizer.accumulation_steps} batches a step")
    if not optimizer.built:
        parts.append("not built")
    elif reads:
        parts.append(f"step {int(optimizer.iterations.numpy())}")
    return f"<{type(optimizer).__name__} {', '.join(parts)}>"


def _inner(inner: Any, reads: bool) -> str:
    name = type(inner).__name__
    # A `MultiOptimizer` has several.
    rate = getattr(inner, "learning_rate", None)
    if rate is None or not reads:
        return name
    return f"{name}({float(tf.convert_to_tensor(rate).numpy()):.4g})"


def _sparsifier(optimizer: Any) -> str:
    name = type(optimizer.sparsifier).__name__
    density = optimizer.density
    return name if density is None else f"{name} {100 * density:.3g} %"


def _codec(codec: codecs.Codec, index_code: str | None) -> str:
    """The value codec and the index codec, by their names."""
    values = codec.values
    value_code = values if isinstance(values, str) else type(values).__name__
    if codec.indices != "auto":
        index_code = (
            codec.indices
            if isinstance(codec.indices, str)
            else codec.indices.__name__
        )
    # The choice is known when the optimizer is built.
    return f"{value_code} {index_code or 'auto'}"
