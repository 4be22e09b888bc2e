r"""Bytes that cross a real socket, beside what `wire_report` says.

Two workers exchange the gradients of one large variable over loopback, in a
network namespace of their own where the system allows it (else other programs'
traffic counts as well). The interface's counters around the steps give bytes
and packets; each packet has 66 bytes of link, IP and TCP headers.

    python -m benchmarks.step.wire_bytes --size=11200000
"""

import json
import os
import shutil
import socket
import subprocess
import sys

from absl import app
from absl import flags

_COMMAND = (sys.executable, "-m", "benchmarks.step.wire_bytes")
_NUM_WORKERS = 2
_HEADER_BYTES = 66


def define_flags():
    flags.DEFINE_integer("size", 11_200_000, "J.", lower_bound=1)
    flags.DEFINE_list("densities", ["0.001", "0.01"], "Values of k / J.")
    flags.DEFINE_list(
        "codecs",
        [
            "int32+float32",
            "elias_fano+float32",
            "elias_fano+natural",
            "golomb+ternary",
        ],
        "Codes of the indices and of the values.",
    )
    flags.DEFINE_integer("steps", 20, "Counted steps.", lower_bound=1)
    flags.DEFINE_string("output_dir", "results/wire_bytes", "For results.")


def counters():
    """Bytes and packets that the loopback interface has sent."""
    with open("/proc/net/dev", encoding="utf-8") as f:
        [line] = [line for line in f if line.strip().startswith("lo:")]
    numbers = line.split(":")[1].split()
    return int(numbers[8]), int(numbers[9])


def measure(args):
    """What one worker does; returns a record for each case."""
    import keras
    import numpy as np
    import tensorflow as tf

    import tf_regtopk

    strategy = tf_regtopk.MultiWorkerMirroredStrategy()

    def record_of(density, codec):
        with strategy.scope():
            variable = keras.Variable(np.zeros(args["size"]), dtype="float32")
            optimizer = tf_regtopk.SparsifiedOptimizer(
                keras.optimizers.SGD(0.1),
                tf_regtopk.RegTopK(density),
                codec=tf_regtopk.Codec(*codec.split("+")),
            )
            optimizer.build([variable])

        @tf.function
        def step(seed):
            def replica_step():
                replica = tf.distribute.get_replica_context()
                number = tf.convert_to_tensor(replica.replica_id_in_sync_group)
                gradient = tf.random.stateless_normal(
                    variable.shape, tf.stack([seed, number])
                )
                optimizer.apply([gradient], [variable])

            strategy.run(replica_step)

        for i in range(3):
            step(tf.constant(i))
        before = counters()
        for i in range(args["steps"]):
            step(tf.constant(i + 3))
        after = counters()
        num_bytes, num_packets = (
            (b - a) / args["steps"] for a, b in zip(before, after, strict=True)
        )
        report = optimizer.wire_report()
        return {
            "density": density,
            "codec": codec,
            "payload_bytes": report.payload_bytes,
            "reported_bytes": _NUM_WORKERS * report.sent_bytes,
            "counted_bytes": num_bytes,
            "packet_header_bytes": _HEADER_BYTES * num_packets,
        }

    return [
        record_of(density, codec)
        for density in args["densities"]
        for codec in args["codecs"]
    ]


def free_ports(number):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def run_workers(args):
    """Starts the workers, and returns the records of the first."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=False)
    hosts = [f"127.0.0.1:{port}" for port in free_ports(_NUM_WORKERS)]
    workers = []
    for index in range(_NUM_WORKERS):
        config = {
            "cluster": {"worker": hosts},
            "task": {"type": "worker", "index": index},
        }
        workers.append(
            subprocess.Popen(
                [*_COMMAND, "worker", json.dumps(args)],
                env=os.environ
                | {
                    "TF_CONFIG": json.dumps(config),
                    "CUDA_VISIBLE_DEVICES": "-1",
                    "TF_CPP_MIN_LOG_LEVEL": "2",
                },
                stdout=subprocess.PIPE,
            )
        )
    try:
        outputs = [worker.communicate(timeout=900)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return json.loads(outputs[0].splitlines()[-1])


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = {
        "size": flags.FLAGS.size,
        "densities": [float(d) for d in flags.FLAGS.densities],
        "codecs": flags.FLAGS.codecs,
        "steps": flags.FLAGS.steps,
    }
    command = [*_COMMAND, "launcher", json.dumps(args)]
    unshare = [shutil.which("unshare") or "unshare", "--net"]
    is_alone = (
        subprocess.run([*unshare, "true"], check=False).returncode == 0
        if shutil.which("unshare")
        else False
    )
    output = subprocess.run(
        [*unshare, *command] if is_alone else command,
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    records = json.loads(output.splitlines()[-1])
    print(f"Bytes a step of both workers, J = {args['size']:,}:")
    print(f"{'k / J':>6} {'codec':24} {'report':>10} {'counted':>10} ratio")
    for r in records:
        counted = r["counted_bytes"] - r["packet_header_bytes"]
        print(
            f"{r['density']:6g} {r['codec']:24} {r['reported_bytes']:10,} "
            f"{counted:10,.0f} {counted / r['reported_bytes']:.3f}"
        )
    print("Without the headers of packets.")
    os.makedirs(flags.FLAGS.output_dir, exist_ok=True)
    path = os.path.join(flags.FLAGS.output_dir, "summary.json")
    with open(path, "w", encoding="utf-8") as f:
        json.dump(
            {"has_own_network": is_alone, "results": records}, f, indent=2
        )
    print(f"Wrote {path}.")


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        print(json.dumps(measure(json.loads(sys.argv[2]))), flush=True)
        # Not through TensorFlow's shutdown, which may wait for other workers.
        os._exit(0)
    elif sys.argv[1:2] == ["launcher"]:
        print(json.dumps(run_workers(json.loads(sys.argv[2]))))
    else:
        define_flags()
        app.run(main)
