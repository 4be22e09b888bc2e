r"""Bytes that decentralised replicas send, beside what `wire_report` says.

Four workers average random weights with their neighbours, each in a network
namespace of its own. The counters of their interfaces around the steps give
bytes and packets; each packet has 66 bytes of link, IP and TCP headers.

    python -m benchmarks.cluster.gossip_bytes --size=200000
"""

import json
import os
import pathlib
import subprocess
import sys

from absl import app
from absl import flags

from benchmarks.cluster import namespaces

_NUM_WORKERS = 4
_PORT = 5300
_WARM_UP_STEPS = 4  # A whole turn of all topologies.


def define_flags():
    flags.DEFINE_integer("size", 200_000, "J.", lower_bound=1)
    flags.DEFINE_integer("steps", 12, "Counted steps.", lower_bound=4)
    flags.DEFINE_integer("timeout", 900, "Seconds for all.", lower_bound=1)
    flags.DEFINE_string("output_dir", "results/gossip_bytes", "For results.")


def methods():
    """Arguments of `DecentralizedOptimizer` by the names of the table."""
    import tf_regtopk

    pairs = [[0, 1], [2, 3]]
    eight_bits = {
        "codec": tf_regtopk.Codec(values=tf_regtopk.Uniform(num_bits=8)),
        "error_feedback": tf_regtopk.Accumulate(),
    }
    return {
        "one-peer, 8 bits": {
            "topology": tf_regtopk.OnePeerExponential(),
            **eight_bits,
        },
        "ring": {"topology": tf_regtopk.Ring()},
        "ring, Top-k of 1 %": {
            "topology": tf_regtopk.Ring(),
            "sparsifier": tf_regtopk.TopK(0.01),
            "error_feedback": tf_regtopk.EF21(),
            "consensus_step_size": 0.05,
        },
        "ring, cross gradients of signs": {
            "topology": tf_regtopk.Ring(),
            "cross_gradients": tf_regtopk.CrossGradients(
                codec=tf_regtopk.Codec(values="sign")
            ),
        },
        "cliques": {"topology": tf_regtopk.Cliques(pairs)},
        "cliques, with gradients": {
            "topology": tf_regtopk.Cliques(pairs, average_gradients=True)
        },
    }


# ----- A worker -----


def measure(size, steps):
    """What one worker counts and what its optimizer reports, by method."""
    import tf_regtopk

    strategy = tf_regtopk.MultiWorkerMirroredStrategy(timeout_seconds=100)
    found = {}
    for name, arguments in methods().items():
        found[name] = _measure_method(strategy, size, steps, arguments)
        if strategy.is_chief:
            print(f"Measured: {name}", file=sys.stderr, flush=True)
    return found


def _measure_method(strategy, size, steps, arguments):
    import keras
    import tensorflow as tf

    import tf_regtopk
    from tf_regtopk.distribute import collectives

    with strategy.scope():
        variable = keras.Variable(
            keras.random.normal([size], seed=0), trainable=True
        )
        optimizer = tf_regtopk.DecentralizedOptimizer(
            keras.optimizers.SGD(0.1), **arguments
        )
        optimizer.build([variable])

    def gradients_at(variables, values):
        del variables
        return values  # Of half the square of each weight.

    def of_replica():
        with optimizer.with_gradients_at(gradients_at):
            optimizer.apply([tf.convert_to_tensor(variable)], [variable])

    step = tf.function(lambda: strategy.run(of_replica), autograph=False)

    def count():
        # A worker is done when its neighbours have taken what it sends.
        collectives.gather_from_workers([0], strategy)
        return namespaces.sent_counters()

    for _ in range(_WARM_UP_STEPS):
        step()
    before = count()
    for _ in range(steps):
        step()
    num_bytes, num_packets = (
        (later - earlier) / steps
        for earlier, later in zip(before, count(), strict=True)
    )
    return {
        "reported_bytes": optimizer.wire_report().sent_bytes,
        "counted_bytes": num_bytes - namespaces.HEADER_BYTES * num_packets,
        "packets": num_packets,
    }


# ----- The launcher -----


def run(size, steps, timeout):
    """Starts the workers, and returns the means over them, by method."""
    with namespaces.Network(_NUM_WORKERS) as network:
        hosts = [f"{address}:{_PORT}" for address in network.addresses]
        workers = [
            _start(network, hosts, i, size, steps) for i in range(_NUM_WORKERS)
        ]
        try:
            outputs = [w.communicate(timeout=timeout)[0] for w in workers]
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    if any(worker.returncode for worker in workers):
        raise RuntimeError(
            "All workers must end regularly. Received: the exit statuses "
            f"{[worker.returncode for worker in workers]}"
        )
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {name: _mean([one[name] for one in found]) for name in found[0]}


def _start(network, hosts, index, size, steps):
    config = {
        "cluster": {"worker": hosts},
        "task": {"type": "worker", "index": index},
    }
    return subprocess.Popen(
        network.command(
            index,
            *(sys.executable, "-m", "benchmarks.cluster.gossip_bytes"),
            *("worker", str(size), str(steps)),
        ),
        env=os.environ
        | {
            "TF_CONFIG": json.dumps(config),
            "CUDA_VISIBLE_DEVICES": "-1",
            "TF_CPP_MIN_LOG_LEVEL": "2",
        },
        stdout=subprocess.PIPE,
    )


def _mean(records):
    return {
        name: sum(record[name] for record in records) / len(records)
        for name in records[0]
    }


def print_table(results):
    """Prints the rows of the table of the docs.

    Example:

    >>> print_table(
    ...     {"ring": {"reported_bytes": 8, "counted_bytes": 9.2, "packets": 2}})
    | method | `wire_report` | counted | ratio | packets |
    | --- | --- | --- | --- | --- |
    | ring | 8 | 9 | 1.150 | 2 |
    """
    print("| method | `wire_report` | counted | ratio | packets |")
    print("| --- | --- | --- | --- | --- |")
    for name, record in results.items():
        reported, counted = record["reported_bytes"], record["counted_bytes"]
        print(
            f"| {name} | {reported:,.0f} | {counted:,.0f} | "
            f"{counted / reported:.3f} | {record['packets']:.0f} |"
        )


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    if reason := namespaces.why_not():
        print(f"No network of namespaces here: {reason}.", file=sys.stderr)
        return 2
    values = flags.FLAGS
    results = run(values.size, values.steps, values.timeout)
    print(f"Bytes that a worker sends a step, of {_NUM_WORKERS} workers:")
    print_table(results)
    folder = pathlib.Path(values.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    summary = {"size": values.size, "steps": values.steps, "results": results}
    path = folder / "summary.json"
    path.write_text(json.dumps(summary, indent=2), "utf-8")
    print(f"Wrote {path}.")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        print(json.dumps(measure(*map(int, sys.argv[2:]))), flush=True)
        # Not through TensorFlow's shutdown, which may wait for other workers.
        os._exit(0)
    define_flags()
    app.run(main)
