"""Seeds of the parts that draw random numbers."""

import warnings

from tf_regtopk import codecs
from tf_regtopk import sparsifiers


def warn_if_shared(
    sparsifier: sparsifiers.Sparsifier, codec: codecs.Codec
) -> None:
    """Warns if a sparsifier and stochastic rounding draw the same numbers.

    Replica 0 selects an entry because its number is large, and would round it
    down because of the same number. That concerns the first entry, whose place
    among the selected ones is its own, and rarely the next ones.

    Args:
        sparsifier: `Sparsifier`, of which `RandomK` has a seed.
        codec: `Codec`, of whose values `Natural` and `Uniform` have a seed.
    """
    seed = getattr(sparsifier, "seed", None)
    values = codec.payload(k=1, size=1).values
    if seed is not None and seed == getattr(values, "seed", None):
        warnings.warn(
            "`sparsifier` and the values of `codec` must have different seeds, "
            "because replica 0 would round the first entry with a bias. Choose "
            f"another seed, as by `{type(sparsifier).__name__}"
            f"({sparsifier.density}, seed={seed + 1})`. Received: seed={seed} "
            "of both",
            stacklevel=3,
        )
