"""The payload of one replica: k indices and k values as 32-bit words.

A payload is one int32 tensor, because each gathered tensor costs a collective
of its own, and because `tf.distribute` gathers no narrower dtype. Values lie in
front of indices, because the length of the indices may vary.
"""

import dataclasses
from typing import Any
from typing import Self

import keras
import tensorflow as tf

from tf_regtopk import training_validation
from tf_regtopk import validation
from tf_regtopk.codecs import index_codecs
from tf_regtopk.codecs import value_codecs
from tf_regtopk.kernels import device_kind
from tf_regtopk.sizes import values as value_sizes

# A GPU decodes at most so many entries of all replicas at once. With more
# entries each replica is decoded on its own, because then starting kernels
# takes little of the time, and because less memory is needed.
_MOST_AT_ONCE = 1 << 22


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class Codec:
    """The index codec and the value codec of the entries that a replica sends.

    Args:
        indices: `"int32"`, `"elias_fano"`, `"golomb"`, `"bitmap"`, or `"auto"`:
            the shortest index codec of fixed length. `"golomb"` saves 4 to 9 %
            of the indices' bits over `"elias_fano"` if the indices are spread
            evenly, but replicas must first exchange the length. Or a class of
            yours, a subclass of `IndexCodec` that is registered with
            `keras.saving.register_keras_serializable`.
        values: `"float32"` (plain values, of 64 bits if any variable has
            float64), `"bfloat16"`, `"float16"`, `"natural"` (8 bits),
            `"uniform"` (4 bits), `"sign"`, `"ternary"` (1 bit); or a value
            codec such as `Natural`, `Uniform` or `ScaledSign` with its own
            parameters. The part of a value that a value codec rounds away stays
            in the residual error.

    Raises:
        TypeError: If `indices` is a class that is no `IndexCodec`.
        ValueError: If an argument breaks its rule.

    Example:

    >>> Codec(values="bfloat16").payload(k=10, size=1000).num_words
    9
    """

    indices: index_codecs.IndexCodecName | type[index_codecs.IndexCodec] = (
        "auto"
    )
    values: value_sizes.ValueCodecName | value_codecs.ValueCodec = "float32"

    def __post_init__(self) -> None:
        if isinstance(self.indices, type):
            _check_index_codec(self.indices)
        else:
            validation.check_choice(
                "indices", self.indices, ("auto", *index_codecs.CODECS)
            )
        if not isinstance(self.values, value_codecs.ValueCodec):
            validation.check_choice(
                "values", self.values, tuple(value_codecs.CODECS)
            )

    def payload(
        self, k: int, size: int, dtype: tf.DType = tf.float32
    ) -> "PayloadCodec":
        """Makes the `PayloadCodec` for k of J = `size` entries of a dtype."""
        values = self.values
        if isinstance(values, str):
            values = value_codecs.CODECS[values]
        return PayloadCodec(
            index_codecs.choose(self.indices, k, size), values, dtype
        )

    def get_config(self) -> dict[str, Any]:
        values = self.values
        if not isinstance(values, str):
            values = keras.saving.serialize_keras_object(values)
        indices = self.indices
        if isinstance(indices, type):
            indices = keras.saving.get_registered_name(indices)
        return {"indices": indices, "values": values}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        values = config["values"]
        if not isinstance(values, str):
            values = keras.saving.deserialize_keras_object(values)
        indices = config["indices"]
        # Only registered names have the mark.
        if ">" in indices:
            indices = keras.saving.get_registered_object(indices)
        return cls(indices, values)


def _check_index_codec(indices: type) -> None:
    """Raises unless a class is an index codec that Keras can save."""
    if not issubclass(indices, index_codecs.IndexCodec):
        raise TypeError(
            "`indices` must be a name or a subclass of `IndexCodec`. "
            f"Received: indices={indices!r}"
        )
    if keras.saving.get_registered_name(indices) == indices.__name__:
        raise ValueError(
            "`indices` must be registered with "
            "`keras.saving.register_keras_serializable`, because it is saved "
            f"with the model. Received: indices={indices!r}"
        )


@dataclasses.dataclass(frozen=True)
class PayloadCodec:
    """The index codec and the value codec for one k and J.

    Args:
        indices: `IndexCodec` for this k and J.
        values: `ValueCodec`.
        dtype: float32 or float64, the dtype of the gradient.

    Example:

    >>> codec = Codec(values="float32").payload(k=2, size=1000)
    >>> payload, sent = codec.encode(
    ...     tf.constant([7, 9]), tf.constant([0.5, 2.0]), stream=(0, 0))
    >>> indices, values, is_valid = codec.decode(payload[tf.newaxis])
    >>> indices.numpy().tolist(), values.numpy().tolist()
    ([[7, 9]], [[0.5, 2.0]])
    """

    indices: index_codecs.IndexCodec
    values: value_codecs.ValueCodec
    dtype: tf.DType

    @property
    def k(self) -> int:
        """Number k of entries."""
        return self.indices.k

    @property
    def size(self) -> int:
        """J, the number of entries of the gradient."""
        return self.indices.size

    @property
    def num_words(self) -> int:
        """Number of words of a payload, the most if its length varies."""
        return self.num_value_words + self.indices.num_words

    @property
    def is_variable(self) -> bool:
        """True if `num_used` may be less than `num_words`."""
        return self.indices.is_variable

    @property
    def num_value_words(self) -> int:
        """Number of words of the values of a payload."""
        return self.values.num_words(self.indices.k, self.dtype)

    def encode(
        self, indices: tf.Tensor, values: tf.Tensor, stream: value_codecs.Stream
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Packs entries into one payload.

        Args:
            indices: int32 tensor `[k]`, rising.
            values: Tensor `[k]` of `dtype`.
            stream: `(step, rank)`, scalar integers that stochastic rounding
                depends on.

        Returns:
            `(payload, sent)`: an int32 tensor `[num_words]`, and the values
            that every receiver decodes, `[k]`.
        """
        words = self.values.encode(values, stream)
        training_validation.check_words(
            f"{type(self.values).__name__}.encode", words, self.num_value_words
        )
        sent = self._decode_values(words)
        index_words = self.indices.encode(indices)
        training_validation.check_words(
            f"{type(self.indices).__name__}.encode",
            index_words,
            self.indices.num_words,
        )
        words = tf.concat([words, index_words], axis=0)
        return tf.bitcast(words, tf.int32), sent

    def num_used(self, payload: tf.Tensor) -> tf.Tensor:
        """Number of words of a payload to send, a scalar int32 tensor."""
        words = tf.bitcast(payload, tf.uint32)[self.num_value_words :]
        return self.num_value_words + self.indices.num_used(words)

    def decode(
        self, payloads: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Unpacks the payloads of N replicas, of any contents.

        Args:
            payloads: int32 tensor `[N, num_words]`.

        Returns:
            `(indices, values, is_valid)`: tensors `[N, k]`, `[N, k]` and `[N]`.
            Whatever the payloads hold, the indices lie in the gradient;
            `is_valid` tells whether a payload held k rising indices. (If one of
            them is incomplete, the order of the others may go unchecked.)

        Raises:
            ValueError: If the payloads are of another length.
        """
        if payloads.shape[1:] != [self.num_words]:
            raise ValueError(
                f"`payloads` must hold {self.num_words} words each. Received: "
                f"payloads.shape={payloads.shape}"
            )

        words = tf.bitcast(payloads, tf.uint32)
        split = self.num_value_words
        if self._decodes_all_at_once(payloads.shape[0]):
            indices, is_complete = self.indices.decode_all(words[:, split:])
            values = tf.stack(
                [self._decode_values(row[:split]) for row in tf.unstack(words)]
            )
            # No indices are checked beside an incomplete payload, because they
            # mean nothing.
            is_exempt = ~tf.reduce_all(is_complete)
        else:
            (indices, is_complete), values = tf.map_fn(
                lambda row: (
                    self.indices.decode(row[split:]),
                    self._decode_values(row[:split]),
                ),
                words,
                fn_output_signature=((tf.int32, tf.bool), self.dtype),
            )
            is_exempt = False
        size = self.indices.size
        is_rising = (
            tf.reduce_all(indices[:, 1:] > indices[:, :-1], axis=1)
            & (indices[:, 0] >= 0)
            & (indices[:, -1] < size)
        )
        return (
            tf.clip_by_value(indices, 0, size - 1),
            values,
            is_complete & (is_rising | is_exempt),
        )

    def _decode_values(self, words: tf.Tensor) -> tf.Tensor:
        values = self.values.decode(words, self.indices.k, self.dtype)
        training_validation.check_values(
            f"{type(self.values).__name__}.decode",
            values,
            self.indices.k,
            self.dtype,
        )
        return values

    def _decodes_all_at_once(self, num_payloads: int) -> bool:
        """Returns whether the device suits operations on all payloads."""
        num_entries = num_payloads * self.indices.k
        num_bits = 32 * num_payloads * self.indices.num_words
        return (
            device_kind.is_gpu()
            and num_entries <= _MOST_AT_ONCE
            and num_bits < 2**31
        )
