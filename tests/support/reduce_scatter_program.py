"""The program of `test_reduce_scatter_workers.py`, on each of the workers."""

import json
import os
import sys

import exchange_program

import tf_regtopk

TOPOLOGIES = {
    "reduce_scatter": tf_regtopk.ReduceScatter(),
    "all_gather": tf_regtopk.AllGather(),
}
# The owner of an entry keeps what this rounds off.
CODEC = tf_regtopk.Codec(values="natural")


def main(result_path, *counted):
    """Writes down the weights, and the bytes of the topologies `counted`."""
    strategy = tf_regtopk.MultiWorkerMirroredStrategy(timeout_seconds=60)
    n = strategy.num_replicas_in_sync
    g = exchange_program.gradients(n)
    result = {"bytes": {}}
    for name, topology in TOPOLOGIES.items():
        if name == "reduce_scatter":
            result["weights"], _ = exchange_program.train(
                strategy, g, "shift", topology=topology, codec=CODEC
            )
        result["bytes"][name] = exchange_program.bytes_a_step(
            strategy,
            num_steps=20 if name in counted else 0,
            num_workers=n,
            topology=topology,
        )
    auto, _ = exchange_program.make(
        strategy, exchange="auto", topology=TOPOLOGIES["reduce_scatter"]
    )
    result["auto"] = [auto.chosen_exchange, auto.exchange_seconds]
    with open(result_path, "w", encoding="utf-8") as f:
        json.dump(result, f)
    sys.stdout.flush()
    # Not through TensorFlow's shutdown, which may wait for other workers.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
