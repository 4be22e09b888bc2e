"""Layouts: facts in which a saved state and the loading optimizer agree."""

from collections.abc import Sequence
import re
from typing import Any

# What a layout calls the variables that are exchanged densely, and the
# densities of variables that have their own.
DENSE_VARIABLES = "dense_variables"
DENSITIES = "densities"


def canonical_names(names: Sequence[str]) -> list[str]:
    """Returns names of variables that stay the same in the next program.

    `dense_3` and `dense_5` of one program may be `dense` and `dense_1` of the
    next: so only the order of the numbers after a word counts. The model's name
    may or may not come first, depending on the way the model was built: so only
    the names of the layer and of the variable count.

    Args:
        names: List of strings, the paths of Keras variables.

    Returns:
        List of strings.

    Example:

    >>> canonical_names(["model/dense_3/kernel", "model/dense_5/kernel"])
    ['dense_0/kernel_0', 'dense_1/kernel_0']
    >>> canonical_names(["dense/kernel", "dense_1/kernel"])
    ['dense_0/kernel_0', 'dense_1/kernel_0']
    """
    names = ["/".join(name.split("/")[-2:]) for name in names]
    word = re.compile(r"([^/]*?)(?:_(\d+))?(?=/|$)")
    numbers: dict[str, set[int]] = {}
    for name in names:
        for base, number in word.findall(name):
            numbers.setdefault(base, set()).add(int(number or 0))
    rank = {base: sorted(found) for base, found in numbers.items()}

    def renumber(match: re.Match[str]) -> str:
        base, number = match.groups()
        return base and f"{base}_{rank[base].index(int(number or 0))}"

    return [word.sub(renumber, name) for name in names]


def check_layout(
    saved: dict[str, Any],
    layout: dict[str, Any],
    rule: str = "The saved residual errors must be of an optimizer with",
) -> None:
    """Raises unless a saved layout equals that of the loading optimizer."""
    for key in sorted({*layout, *saved}):
        expected, received = layout.get(key), saved.get(key)
        if expected != received:
            advice = ""
            if key == DENSE_VARIABLES:
                advice = ". (`dense_below` says which variables these are)"
            raise ValueError(
                f"{rule} {key}={expected}. Received: {key}={received}{advice}"
            )
