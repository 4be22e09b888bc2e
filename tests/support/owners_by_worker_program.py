"""Two workers of two devices each, where workers or devices own entries."""

import json
import os
import sys

import exchange_program
import numpy as np
import reduce_scatter_program
from tensorflow.python.distribute import collective_all_reduce_strategy

import tf_regtopk

TOPOLOGIES = {
    "workers": tf_regtopk.ReduceScatter(hierarchical=True),
    "devices": tf_regtopk.ReduceScatter(),
}


def of_replicas(strategy, variables):
    """The weights of each replica of this worker."""
    of_variables = (
        strategy.experimental_local_results(v.value) for v in variables
    )
    return [
        np.concatenate([np.ravel(value) for value in values]).tolist()
        for values in zip(*of_variables, strict=True)
    ]


def train(strategy, g, topology, **kwargs):
    """What became of weights, errors and state."""
    arguments = dict(
        topology=topology, codec=reduce_scatter_program.CODEC, **kwargs
    )
    made = exchange_program.make(strategy, **arguments)
    optimizer, variables = made
    weights, saved = exchange_program.train(strategy, g, made=made, **arguments)
    return {
        "weights": weights,
        "replicas": of_replicas(strategy, variables),
        "residual": np.sum(
            [
                np.concatenate([np.ravel(part) for part in of_participant])
                for of_participant in optimizer.residual_errors()
            ],
            axis=0,
        ).tolist(),
        "num_participants": saved.num_replicas,
        "own": sorted(saved.replicas),
    }


def main(result_path, task):
    """Chooses an exchange, or trains by one; by workers' entries does more.

    Args:
        result_path: Path of the JSON file to write.
        task: "auto", or a name in `TOPOLOGIES`.
    """
    exchange_program.two_devices(
        collective_all_reduce_strategy.CollectiveAllReduceExtended
    )
    strategy = tf_regtopk.MultiWorkerMirroredStrategy(timeout_seconds=60)
    if task == "auto":
        optimizer, _ = exchange_program.make(
            strategy, exchange="auto", topology=TOPOLOGIES["workers"]
        )
        result = {
            "auto": [optimizer.chosen_exchange, optimizer.exchange_seconds]
        }
    else:
        g = exchange_program.gradients(strategy.num_replicas_in_sync)
        topology = TOPOLOGIES[task]
        result = train(strategy, g, topology)
    if task == "workers":
        result["shift, resumed"], _ = exchange_program.train(
            strategy,
            g,
            "shift",
            is_resumed=True,
            topology=topology,
            codec=reduce_scatter_program.CODEC,
        )
        result["bytes"] = exchange_program.bytes_a_step(
            strategy, topology=topology
        )
        result["order"] = exchange_program.order_of_collectives(
            strategy, topology=topology
        )
    with open(result_path, "w", encoding="utf-8") as f:
        json.dump(result, f)
    sys.stdout.flush()
    # Not through TensorFlow's shutdown, which may wait for other workers.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
