"""The topology of an optimizer, by its arguments `topology`, `hierarchical`."""

from tf_regtopk import codecs
from tf_regtopk import validation
from tf_regtopk.distribute import mixing
from tf_regtopk.distribute import reduce_scatter
from tf_regtopk.distribute import topology as topology_lib


def choose(
    topology: topology_lib.Topology | None, hierarchical: bool
) -> topology_lib.Topology:
    """Returns the topology that the two arguments ask for.

    Raises:
        TypeError: If `topology` is none.
        ValueError: If the arguments contradict each other.
    """
    if topology is None:
        if hierarchical:
            return topology_lib.Hierarchical()
        return topology_lib.AllGather()
    validation.check_instance(
        "topology", topology, topology_lib.Topology, "Hierarchical()"
    )
    if hierarchical and not is_hierarchical(topology):
        raise ValueError(
            "`hierarchical=True` must go without another `topology`; for "
            "workers that own entries write `ReduceScatter(hierarchical=True)`"
            f". Received: topology={topology!r}"
        )
    return topology


def is_hierarchical(topology: topology_lib.Topology) -> bool:
    """Returns whether the replicas of a worker act as one."""
    if isinstance(topology, reduce_scatter.ReduceScatter):
        return topology.hierarchical
    return isinstance(topology, topology_lib.Hierarchical)


def check(
    topology: topology_lib.Topology, codec: codecs.Codec, exchange: str
) -> None:
    """Raises a `ValueError` where the other arguments do not fit a topology."""
    if isinstance(topology, mixing.MixingTopology):
        raise ValueError(
            "`topology` must be one by which all replicas get the same sum, "
            "such as `AllGather()`: for replicas that average their weights "
            "with neighbours use `DecentralizedOptimizer`. "
            f"Received: topology={topology!r}"
        )
    if not isinstance(topology, topology_lib.EntryTopology):
        if exchange == "auto":
            raise ValueError(
                '`exchange` must be "sparse" or "dense" with a topology that '
                f"sends whole gradients. Received: topology={topology!r}, "
                'exchange="auto"'
            )
    elif (
        codec.payload(k=1, size=2).is_variable and not topology.can_vary_length
    ):
        raise ValueError(
            "`codec` must write indices in a fixed length with a topology "
            "whose `can_vary_length` is False, as "
            '`Codec(indices="auto")` does. '
            f"Received: {topology=}, indices={codec.indices!r}"
        )
