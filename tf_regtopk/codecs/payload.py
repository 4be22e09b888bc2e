"""The payload of one replica: k indices and k values as 32-bit words.

One int32 tensor, because each gathered tensor costs a collective of its own,
and because `tf.distribute` gathers no narrower type. Values lie in front of
indices, whose length may vary.
"""

import dataclasses

import keras
import tensorflow as tf

from tf_regtopk import validation
from tf_regtopk.codecs import index_codecs
from tf_regtopk.codecs import value_codecs
from tf_regtopk.kernels import device_kind

# Entries of all replicas that a GPU decodes at once. Of more, starting kernels
# for each replica takes little of the time, and the memory would have to be
# there.
_MOST_AT_ONCE = 1 << 22


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class Codec:
    """How the entries that a replica sends are written.

    Args:
        indices: `"int32"`, `"elias_fano"`, `"golomb"`, `"bitmap"`, or `"auto"`:
            the shortest of those whose length is fixed. `"golomb"` saves 4 to
            9 % of the indices' bits over `"elias_fano"` if these are spread
            evenly, but replicas must first exchange its length.
        values: `"float32"` (as they are, and in 64 bits if any variable has
            float64), `"bfloat16"`, `"float16"`, `"natural"` (8 bits),
            `"uniform"` (4 bits), `"sign"`, `"ternary"` (1 bit); or one of the
            value codecs `Natural`, `Uniform` and `ScaledSign` with parameters
            of their own. What a codec rounds away stays in the residual error.

    Raises:
        ValueError: If an argument breaks its rule.

    Example:

    >>> Codec(values="bfloat16").payload(k=10, size=1000).num_words
    9
    """

    indices: str = "auto"
    values: str | value_codecs.ValueCodec = "float32"

    def __post_init__(self):
        validation.check_choice(
            "indices", self.indices, ("auto", *index_codecs.CODECS)
        )
        if not isinstance(self.values, value_codecs.ValueCodec):
            validation.check_choice(
                "values", self.values, tuple(value_codecs.CODECS)
            )

    def payload(self, k, size, dtype=tf.float32):
        """The `PayloadCodec` for k of J = `size` entries of a float dtype."""
        values = self.values
        if isinstance(values, str):
            values = value_codecs.CODECS[values]
        return PayloadCodec(
            index_codecs.choose(self.indices, k, size), values, dtype
        )

    def get_config(self):
        values = self.values
        if not isinstance(values, str):
            values = keras.saving.serialize_keras_object(values)
        return {"indices": self.indices, "values": values}

    @classmethod
    def from_config(cls, config):
        values = config["values"]
        if not isinstance(values, str):
            values = keras.saving.deserialize_keras_object(values)
        return cls(config["indices"], values)


@dataclasses.dataclass(frozen=True)
class PayloadCodec:
    """The payload for one k and J.

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
    def num_words(self):
        """Number of words of a payload; the most where its length varies."""
        return self.num_value_words + self.indices.num_words

    @property
    def is_variable(self):
        """Whether `num_used` may be less than `num_words`."""
        return self.indices.is_variable

    @property
    def num_value_words(self):
        """Number of words of the values of a payload."""
        return self.values.num_words(self.indices.k, self.dtype)

    def encode(self, indices, values, stream):
        """Packs entries into one payload.

        Args:
            indices: int32 tensor `[k]`, rising.
            values: Tensor `[k]` of `dtype`.
            stream: `(step, replica)`, scalar integer tensors, for stochastic
                rounding.

        Returns:
            `(payload, sent)`: an int32 tensor `[num_words]`; and the values as
            every receiver decodes them.
        """
        words = self.values.encode(values, stream)
        sent = self.values.decode(words, self.indices.k, self.dtype)
        words = tf.concat([words, self.indices.encode(indices)], axis=0)
        return tf.bitcast(words, tf.int32), sent

    def num_used(self, payload):
        """How many words of a payload have to be sent, scalar int32 tensor."""
        words = tf.bitcast(payload, tf.uint32)[self.num_value_words :]
        return self.num_value_words + self.indices.num_used(words)

    def decode(self, payloads):
        """Unpacks the payloads of N replicas, or what should be some.

        Args:
            payloads: int32 tensor `[N, num_words]`.

        Returns:
            `(indices, values, is_valid)`: of shapes `[N, k]`, `[N, k]` and
            `[N]`. Whatever the payloads hold, the indices lie in the gradient;
            `is_valid` says whether they are k different ones and rise.

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
            # Indices beside payloads that are not complete mean nothing.
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

    def _decode_values(self, words):
        return self.values.decode(words, self.indices.k, self.dtype)

    def _decodes_all_at_once(self, num_payloads):
        """Whether operations on all payloads suit the device, and are small."""
        num_entries = num_payloads * self.indices.k
        num_bits = 32 * num_payloads * self.indices.num_words
        return (
            device_kind.is_gpu()
            and num_entries <= _MOST_AT_ONCE
            and num_bits < 2**31
        )
