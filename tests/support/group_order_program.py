"""The order in which TensorFlow gives a worker the rows of its group.

A program of its own, because its servers cannot be stopped. They are tasks 2,
9 and 10, without those between, and task 0, which leads.
"""

import json
import os
import sys

import multi_worker_launcher
import tensorflow as tf

from tf_regtopk import keras_internals

LEADER, MEMBERS = 0, (2, 9, 10)


def main(path):
    tasks = (LEADER, *MEMBERS)
    addresses = multi_worker_launcher.free_addresses(len(tasks))
    spec = tf.train.ClusterSpec(
        {"worker": dict(zip(tasks, addresses, strict=True))}
    )
    config = tf.compat.v1.ConfigProto()
    config.experimental.collective_group_leader = (
        f"/job:worker/replica:0/task:{LEADER}"
    )
    servers = [
        tf.distribute.Server(spec, "worker", task, config=config)
        for task in tasks
    ]
    received = []
    with tf.Graph().as_default():
        [key] = keras_internals.group_keys([MEMBERS])
        instance_key = keras_internals.take_instance_keys(1)
        for task in MEMBERS:
            with tf.device(f"/job:worker/replica:0/task:{task}"):
                received.append(
                    keras_internals.exchange_in_group(
                        tf.fill([len(MEMBERS), 1], task),
                        tf.constant(len(MEMBERS)),
                        tf.constant(key),
                        tf.constant(instance_key),
                    )
                )
        options = tf.compat.v1.RunOptions()
        options.experimental.collective_graph_key = 1
        with tf.compat.v1.Session(servers[0].target, config=config) as session:
            rows = session.run(received, options=options)
    with open(path, "w", encoding="utf-8") as f:
        json.dump([of_task[:, 0].tolist() for of_task in rows], f)
    # An exit would wait for the servers.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
