"""The steps of a Keras optimizer in a simulation."""

import keras

from tf_regtopk import validation
from tf_regtopk.distribute import reduce_scatter
from tf_regtopk.distribute import topology as topology_lib
from tf_regtopk.optimizers import sparsified
from tf_regtopk.simulation import descents
from tf_regtopk.simulation import inner_optimizers

# What one vector of weights on one device has no counterpart of.
_SPARSIFIED = {
    "scope": "global",
    "dense_below": 0,
    "dense": (),
    "densities": {},
    "clipping": "aggregate",
    "exchange": "sparse",
    "accumulation_steps": 1,
}


def descent_of(
    optimizer: keras.optimizers.Optimizer, num_workers: int
) -> descents.DenseDescent | descents.SparseDescent:
    """The steps that an optimizer takes under a strategy of N replicas.

    Args:
        optimizer: `keras.optimizers.SGD` or `keras.optimizers.Adam`, or
            `SparsifiedOptimizer` around one of them. Its learning rate is left
            out, because every step is given one.
        num_workers: N.

    Returns:
        `DenseDescent`, or `SparseDescent` of a `SparsifiedOptimizer`.

    Raises:
        TypeError: If the optimizer is another one.
        ValueError: If it has an option that is not simulated.

    Example:

    >>> descent_of(keras.optimizers.SGD(momentum=0.5), num_workers=20)
    DenseDescent(inner=MomentumSGD(momentum=0.5))
    """
    validation.check_integer("num_workers", num_workers, minimum=1)
    if not isinstance(optimizer, sparsified.SparsifiedOptimizer):
        return descents.DenseDescent(inner_optimizers.inner_of(optimizer))
    inner_optimizers.check_options(optimizer, _SPARSIFIED)
    if not isinstance(
        optimizer.topology,
        (topology_lib.AllGather, reduce_scatter.ReduceScatter),
    ):
        raise ValueError(
            "`topology` must be `AllGather` or `ReduceScatter` in a "
            f"simulation. Received: topology={optimizer.topology!r}"
        )
    return descents.SparseDescent(
        optimizer.sparsifier,
        optimizer.error_feedback,
        optimizer.codec,
        num_workers,
        inner_optimizers.inner_of(optimizer.inner_optimizer),
        optimizer.topology,
    )
