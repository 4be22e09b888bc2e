"""Bytes that participants and workers send, by exchange.

`num_bytes` is what each participant has: a payload, or a whole gradient. A
worker has `own` of the n participants, and only what it sends to others counts.
"""


def ring(num_bytes: float, n: int) -> float:
    """Bytes that each member of a ring sends, so that all have the sum."""
    return 2 * (n - 1) / n * num_bytes


def to_all(num_bytes: int, n: int) -> int:
    """Bytes of a participant that sends all it has to each of the others."""
    return (n - 1) * num_bytes


def to_all_by_worker(num_bytes: int, n: int, own: int) -> int:
    """Bytes of a worker whose participants send to each of the others."""
    return own * (n - own) * num_bytes


def to_owners(num_bytes: int, n: int) -> float:
    """Bytes of a participant that sends each of the others its share."""
    return (n - 1) / n * num_bytes


def to_owners_by_worker(num_bytes: int, n: int, own: int) -> float:
    """Bytes of a worker whose participants send each of the others a share."""
    return own * (n - own) / n * num_bytes
