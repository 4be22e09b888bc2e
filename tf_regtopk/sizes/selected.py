"""The number of entries that are selected."""


def num_selected(density: float | None, num_entries: int) -> int:
    """Returns k for J = `num_entries`.

        k = max(1, round(density * J))
        k = min(J, max(1000, round(0.001 * J)))    if density is None

    Args:
        density: Float in (0, 1], or None.
        num_entries: J.

    Returns:
        k.

    Example:

    >>> num_selected(0.01, 1000)
    10
    """
    if density is not None:
        return max(1, round(density * num_entries))
    # Small models need more entries than 0.1 %, because each step would
    # change a few weights only (examples/studies/default_density.py).
    return min(num_entries, max(1000, round(0.001 * num_entries)))
