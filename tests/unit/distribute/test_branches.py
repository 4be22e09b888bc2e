"""Branches of all replicas, and what one replica does for all."""

import tensorflow as tf

from tf_regtopk.distribute import branches


def test_only_the_first_replica_of_a_process_may_be_the_first(mirrored):
    found = []

    @tf.function
    def step():
        found.append(branches.may_be_first_replica())

    mirrored(3).run(step)
    assert sorted(found) == [False, False, True]
    assert branches.may_be_first_replica()
