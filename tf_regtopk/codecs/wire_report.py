"""The bytes that a step sends, counted before training."""

from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Literal

import keras
import numpy as np
import tensorflow as tf

from tf_regtopk.codecs import header
from tf_regtopk.codecs import index_codecs
from tf_regtopk.codecs import payload as payload_lib
from tf_regtopk.codecs import scattered
from tf_regtopk.distribute import topology as topology_lib


@dataclasses.dataclass(frozen=True)
class WireReport:
    """Bytes that a replica, or a worker that acts as one, sends per step.

    The transport's own bytes (headers, acknowledgements) do not count. An index
    codec of variable length is counted for indices that are spread evenly.

    Args:
        num_replicas: N, the number of participants: replicas, or workers.
        dense_below_bytes: Bytes of the gradients of the variables exchanged
            densely.
        dense_bytes: Bytes of all gradients, in the variables' dtypes.
        num_entries: J, the entries of all variables exchanged sparsely.
        num_selected: k.
        index_code: Name of the index codec.
        value_code: Name of the value codec.
        bits_per_index: Bits of an index.
        entropy_bits_per_index: `log2 C(J, k) / k`, which no index codec for all
            sets of indices can undercut.
        bits_per_value: Bits of a value, with its share of scales.
        payload_bytes: Bytes of the payload of one replica, header included; by
            a reduce-scatter of its entries for all owners and, N times, of the
            sums of one.
        sent_bytes: Bytes that each participant of the topology sends per step:
            its payload, and by a ring its part of the other gradients.
        dense_sent_bytes: Bytes that each replica sends per step without the
            wrapper, by a ring.
        topology: Name of the topology by which payloads go.
        exchange: The chosen exchange, `"sparse"`, `"all_gather"` or `"dense"`.
        exchange_seconds: Measured seconds per step of each exchange, by its
            name; None unless `exchange="auto"` measured them to choose.
        participant: `"worker"` if the replicas of each worker act as one, as by
            `hierarchical=True`.
    """

    num_replicas: int
    dense_below_bytes: int
    dense_bytes: int
    num_entries: int = 0
    num_selected: int = 0
    index_code: str = "none"
    value_code: str = "none"
    bits_per_index: float = 0.0
    entropy_bits_per_index: float = 0.0
    bits_per_value: float = 0.0
    payload_bytes: int = 0
    sent_bytes: int = 0
    dense_sent_bytes: int = 0
    topology: str = "AllGather"
    exchange: Literal["sparse", "all_gather", "dense"] = "sparse"
    exchange_seconds: dict[str, float] | None = None
    participant: Literal["replica", "worker"] = "replica"

    @property
    def ratio(self) -> float:
        """Bytes of all gradients, divided by those of one payload.

        The gradients that are sent densely count as a part of the payload.
        """
        num_bytes = self.payload_bytes + self.dense_below_bytes
        return self.dense_bytes / max(num_bytes, 1)

    @property
    def measured(self) -> str:
        """The measured times of a step in words; empty without any."""
        return ", ".join(
            f"{name} {1e3 * seconds:.1f} ms"
            for name, seconds in (self.exchange_seconds or {}).items()
        )

    def __str__(self) -> str:
        exchange: str = self.exchange
        if exchange != "dense" and not self.num_selected:
            exchange = "dense, because no variable is sent sparsely"
        if self.measured:
            exchange += f" (measured a step: {self.measured})"
        sent = f"sent by a {self.participant}"
        rows = {
            "exchange": exchange,
            "all gradients": f"{self.dense_bytes:,} bytes, summed over "
            f"{self.num_replicas} replicas",
            sent: f"{self.sent_bytes:,} bytes a step (ring all-reduce)",
        }
        if self.num_selected:
            rows = {
                "exchange": exchange,
                "entries selected": f"{self.num_selected:,} of "
                f"{self.num_entries:,}, by each of {self.num_replicas} "
                f"{self.participant}s",
                "bits per index": f"{self.bits_per_index:.2f} "
                f"({self.index_code}; at least "
                f"{self.entropy_bits_per_index:.2f})",
                "bits per value": f"{self.bits_per_value:.2f} "
                f"({self.value_code})",
                "payload": f"{self.payload_bytes:,} bytes",
                "sent densely": f"{self.dense_below_bytes:,} bytes",
                "all gradients": f"{self.dense_bytes:,} bytes, "
                f"{self.ratio:.1f} times as many",
                sent: f"{self.sent_bytes:,} bytes a step "
                f"({self.topology}), {self.dense_sent_bytes:,} without the "
                "wrapper (ring all-reduce)",
            }
        return "\n".join(f"{name:18} {text}" for name, text in rows.items())


def report(
    payload_codec: payload_lib.PayloadCodec | scattered.ScatteredCodec | None,
    sparse: Sequence[keras.Variable],
    dense: Sequence[keras.Variable],
    participants: topology_lib.Participants,
    is_quick: bool = False,
) -> WireReport:
    """Makes the report of a step.

    Args:
        payload_codec: `PayloadCodec` or `ScatteredCodec`, None if no variable
            is sent sparsely.
        sparse: List of the variables that are exchanged sparsely.
        dense: List of the variables that are exchanged densely.
        participants: `topology.Participants`.
        is_quick: Whether an index codec of variable length counts as if it
            reached the entropy, in place of encoding random entries.

    Returns:
        `WireReport`.
    """
    dense_below_bytes = _num_bytes(dense)
    dense_bytes = dense_below_bytes + _num_bytes(sparse)
    reduced = functools.partial(
        topology_lib.AllReduce().sent_bytes, cluster=participants.cluster
    )
    dense_sent_bytes = round(reduced(dense_bytes))
    if payload_codec is None:
        return WireReport(
            participants.cluster.num_replicas,
            dense_below_bytes,
            dense_bytes,
            sent_bytes=round(reduced(dense_below_bytes)),
            dense_sent_bytes=dense_sent_bytes,
        )
    of_entries = (
        payload_codec.to_owner  # Those for one owner.
        if isinstance(payload_codec, scattered.ScatteredCodec)
        else payload_codec
    )
    words_of = _words_at_entropy if is_quick else _words_used
    num_words = words_of(of_entries)
    num_bytes = _payload_bytes(payload_codec, num_words)
    k, size = payload_codec.k, payload_codec.size
    sent = participants.topology.sent_bytes(num_bytes, participants.cluster)
    return WireReport(
        participants.count,
        dense_below_bytes,
        dense_bytes,
        num_entries=size,
        num_selected=k,
        index_code=type(of_entries.indices).__name__,
        value_code=type(of_entries.values).__name__,
        bits_per_index=32
        * (num_words - of_entries.num_value_words)
        / of_entries.k,
        entropy_bits_per_index=index_codecs.entropy_bits(
            of_entries.k, of_entries.size
        )
        / of_entries.k,
        bits_per_value=32 * of_entries.num_value_words / of_entries.k,
        payload_bytes=num_bytes,
        sent_bytes=round(sent + reduced(dense_below_bytes)),
        topology=type(participants.topology).__name__,
        dense_sent_bytes=dense_sent_bytes,
        participant="worker" if participants.copies > 1 else "replica",
    )


def payload_bytes(
    payload_codec: payload_lib.PayloadCodec | scattered.ScatteredCodec,
) -> int:
    """Counts the bytes of a payload, as `WireReport` does."""
    if isinstance(payload_codec, scattered.ScatteredCodec):
        return _payload_bytes(payload_codec, payload_codec.to_owner.num_words)
    return _payload_bytes(payload_codec, _words_used(payload_codec))


def _payload_bytes(
    payload_codec: payload_lib.PayloadCodec | scattered.ScatteredCodec,
    num_words: int,
) -> int:
    """Bytes of a payload, with `num_words` of entries, for all or one owner."""
    num_words += header.header_words(payload_codec.dtype)
    if isinstance(payload_codec, scattered.ScatteredCodec):
        num_words += 1 + payload_codec.num_words_to_all
        return 4 * payload_codec.ownership.num_owners * num_words
    if payload_codec.is_variable:
        num_words += 1  # The length is sent as well.
    return 4 * num_words


def _num_bytes(variables: Sequence[keras.Variable]) -> int:
    return sum(
        int(np.prod(v.shape)) * tf.as_dtype(v.dtype).size for v in variables
    )


def _words_at_entropy(payload_codec: payload_lib.PayloadCodec) -> int:
    """Number of words of a payload, at the entropy if its length varies."""
    if not payload_codec.is_variable:
        return payload_codec.num_words
    k, size = payload_codec.indices.k, payload_codec.indices.size
    bits = index_codecs.entropy_bits(k, size)
    return payload_codec.num_value_words + math.ceil(bits / 32)


def _words_used(payload_codec: payload_lib.PayloadCodec) -> int:
    """Number of words of a payload, of random entries if its length varies."""
    if not payload_codec.is_variable:
        return payload_codec.num_words
    k, size = payload_codec.indices.k, payload_codec.indices.size
    rng = np.random.default_rng(0)
    indices = np.sort(rng.choice(size, k, replace=False, shuffle=False))
    payload, _ = payload_codec.encode(
        tf.constant(indices, tf.int32),
        tf.constant(rng.standard_normal(k), payload_codec.dtype),
        stream=(0, 0),
    )
    return int(payload_codec.num_used(payload))
