"""The steps of a Keras optimizer in a simulation."""

from typing import TypeAlias

import keras

from tf_regtopk import validation
from tf_regtopk.distribute import answers
from tf_regtopk.distribute import neighbours
from tf_regtopk.distribute import reduce_scatter
from tf_regtopk.distribute import topology as topology_lib
from tf_regtopk.optimizers import decentralized
from tf_regtopk.optimizers import decentralized_checks
from tf_regtopk.optimizers import sparsified
from tf_regtopk.simulation import descents
from tf_regtopk.simulation import gossip_descent
from tf_regtopk.simulation import inner_optimizers
from tf_regtopk.steps import gossip

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
# The steps of all kinds of optimizers.
Descent: TypeAlias = (
    descents.DenseDescent
    | descents.SparseDescent
    | gossip_descent.GossipDescent
)


def descent_of(
    optimizer: keras.optimizers.Optimizer, num_workers: int
) -> Descent:
    """The steps that an optimizer takes under a strategy of N replicas.

    Args:
        optimizer: `keras.optimizers.SGD` or `keras.optimizers.Adam`, or
            `SparsifiedOptimizer` or `DecentralizedOptimizer` around one of
            them. Its learning rate is left out, because every step is given
            one, and so is `average_at_end`.
        num_workers: N.

    Returns:
        `DenseDescent`, `SparseDescent` of a `SparsifiedOptimizer`, or
        `GossipDescent` of a `DecentralizedOptimizer`.

    Raises:
        TypeError: If the optimizer is another one.
        ValueError: If it has an option that is not simulated, or a
            decentralised one is to have a single worker, or a topology that
            does not suit.

    Example:

    >>> descent_of(keras.optimizers.SGD(momentum=0.5), num_workers=20)
    DenseDescent(inner=MomentumSGD(momentum=0.5))
    """
    validation.check_integer("num_workers", num_workers, minimum=1)
    if isinstance(optimizer, decentralized.DecentralizedOptimizer):
        return _gossip_descent_of(optimizer, num_workers)
    if not isinstance(optimizer, sparsified.SparsifiedOptimizer):
        return descents.DenseDescent(inner_optimizers.inner_of(optimizer))
    inner_optimizers.check_options(optimizer, _SPARSIFIED)
    if optimizer.hierarchical or not isinstance(
        optimizer.topology,
        (topology_lib.AllGather, reduce_scatter.ReduceScatter),
    ):
        raise ValueError(
            "`topology` must be `AllGather` or `ReduceScatter` without "
            "`hierarchical` in a simulation. "
            f"Received: topology={optimizer.topology!r}"
        )
    return descents.SparseDescent(
        optimizer.sparsifier,
        optimizer.error_feedback,
        optimizer.codec,
        num_workers,
        inner_optimizers.inner_of(optimizer.inner_optimizer),
        optimizer.topology,
    )


def _gossip_descent_of(
    optimizer: decentralized.DecentralizedOptimizer, num_workers: int
) -> gossip_descent.GossipDescent:
    validation.check_integer("num_workers", num_workers, minimum=2)
    inner_optimizers.check_options(optimizer, {"layer_mask": None})
    if optimizer.mixing_rule.tracks_average:
        raise ValueError(
            "`mixing_rule` must be one that changes the weights, such as "
            "`LinearGossip()`, in a simulation, where `measure` finds the "
            f"mean itself. Received: mixing_rule={optimizer.mixing_rule!r}"
        )
    topology = optimizer.topology
    decentralized_checks.check_constant(
        topology, optimizer.error_feedback, num_workers
    )
    decentralized_checks.check_symmetric(
        topology, optimizer.mixing_rule, num_workers
    )
    steps = neighbours.rounds_of(topology, num_workers)
    neighbours.check_meetings(
        steps, neighbours.differences(topology, num_workers)
    )
    crossing = optimizer.cross_gradients
    if crossing is not None:
        decentralized_checks.check_no_gradient_groups(
            topology, num_workers, cross_gradients=crossing
        )
        if crossing.sends_back:
            answers.check_no_cycles(steps)
    return gossip_descent.GossipDescent(
        gossip.Choices(
            topology,
            optimizer.sparsifier,
            optimizer.codec,
            optimizer.error_feedback,
            optimizer.mixing_rule,
            optimizer.consensus_step_size,
            optimizer.cross_gradients,
        ),
        num_workers,
        inner_optimizers.inner_of(optimizer.inner_optimizer),
        optimizer.communication_period,
    )
