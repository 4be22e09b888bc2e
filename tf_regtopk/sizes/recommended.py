"""The entries of `methods.recommended`, in numbers."""

from tf_regtopk import validation
from tf_regtopk.sizes import payload
from tf_regtopk.sizes import values as value_sizes

VALUES: value_sizes.ValueCodecName = "sign"
COMPRESSION = 300.0
LEAST_COMPRESSION = 40.0


def density(compression: float = COMPRESSION) -> float:
    """The density at which a payload is so many times smaller than a gradient.

    Args:
        compression: Float of at least `LEAST_COMPRESSION`.

    Returns:
        Float in (0, 1).

    Raises:
        TypeError: If `compression` is no number.
        ValueError: If `compression` is too small.

    Example:

    >>> density(300)
    0.0113
    """
    validation.check_number(
        "compression",
        compression,
        f"at least {LEAST_COMPRESSION:g}",
        lambda c: c >= LEAST_COMPRESSION,
    )
    return payload.density_at(compression, "auto", VALUES)
