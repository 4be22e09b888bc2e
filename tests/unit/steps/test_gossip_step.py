"""What a replica does with something useless that a neighbour has sent."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk
from tf_regtopk.distribute import collectives

SIZE = 12


@pytest.fixture
def tamper(monkeypatch):
    """Function that changes a word of what the second replica sends."""

    def tamper(word, value):
        gather = collectives.all_gather

        def gather_and_change(payload):
            words = tf.bitcast(gather(payload), tf.int32)
            words = tf.tensor_scatter_nd_update(
                words, [[1, word % words.shape[1]]], [value]
            )
            return tf.bitcast(words, tf.float32)

        monkeypatch.setattr(collectives, "all_gather", gather_and_change)

    return tamper


def start(strategy, **kwargs):
    """A function that takes a step, and what replicas keep, by name."""
    with strategy.scope():
        variable = keras.Variable(np.ones(SIZE), dtype="float32")
        optimizer = tf_regtopk.DecentralizedOptimizer(
            keras.optimizers.SGD(0.1), tf_regtopk.Ring(), **kwargs
        )
        optimizer.build([variable])

    @tf.function(autograph=False)
    def step():
        def of_replica():
            replica = tf.distribute.get_replica_context()
            rank = tf.cast(replica.replica_id_in_sync_group, tf.float32)
            optimizer.apply([tf.range(float(SIZE)) * rank], [variable])

        strategy.run(of_replica)

    def kept():
        parts = strategy.experimental_local_results(variable.value)
        state = optimizer._gossip._state.local_arrays()
        return [part.numpy() for part in parts], state

    return step, kept


COMPRESSED = dict(
    sparsifier=tf_regtopk.TopK(0.25),
    codec=tf_regtopk.Codec("int32"),
    error_feedback=tf_regtopk.Accumulate(),
)


@pytest.mark.parametrize(
    "word, value, message, kwargs",
    [
        # The mark of a step and a rank that are others.
        (0, 77, "Neighbours must be at the same step.*0.*1", {}),
        # The largest magnitude: NaN.
        (1, 0x7FC00000, "weights of all replicas must be finite", {}),
        # A value: infinity.
        (5, 0x7F800000, "weights of all replicas must be finite", {}),
        # The last index.
        (-1, SIZE + 3, "different, rising indices", COMPRESSED),
    ],
)
def test_useless_payloads_end_the_step(
    word, value, message, kwargs, mirrored, tamper
):
    step, kept = start(mirrored(2), **kwargs)
    before = kept()
    tamper(word, value)
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        step()
    for now, then in zip(kept(), before, strict=True):
        tf.nest.map_structure(np.testing.assert_array_equal, now, then)


def test_other_payloads_do_not(mirrored, tamper):
    step, kept = start(mirrored(2), **COMPRESSED)
    # The same word as is sent: the mark of rank 1 of 2 in step 0.
    tamper(0, 1)
    step()
    weights, state = kept()
    assert (weights[0] != weights[1]).any()
    # All entries were 1, of which some were not sent.
    assert 0 < np.count_nonzero(state[0][0]) < SIZE
