"""Answers of neighbours: the tables of all workers, played in NumPy."""

import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk
from tf_regtopk.distribute import answers
from tf_regtopk.distribute import neighbours
from tf_regtopk.distribute import topology as topology_lib

RING = tf_regtopk.Ring()
CLIQUES = tf_regtopk.Cliques([[0, 3, 4], [5, 1], [2, 6]])
TOPOLOGIES = [
    (tf_regtopk.Complete(), 4),
    (RING, 2),
    (RING, 5),
    (tf_regtopk.Exponential(), 7),
    (tf_regtopk.OnePeerExponential(), 8),
    (tf_regtopk.OnePeerExponential(), 16),
    (tf_regtopk.Complete(), 12),
    (tf_regtopk.Grid(3), 9),
    (CLIQUES, 7),
    (tf_regtopk.PeriodicGlobalAveraging(CLIQUES, 3), 7),
]
DIRECTED = tf_regtopk.OnePeerExponential(directed=True)


def on_each_worker(topology, n, monkeypatch, is_mutual=True):
    """`AnsweringNeighbours` as each of n workers makes them."""
    found = []
    for rank in range(n):
        cluster = topology_lib.Cluster(n, num_workers=n, worker=rank)
        monkeypatch.setattr(
            topology_lib.Cluster, "in_scope", lambda cluster=cluster: cluster
        )
        found.append(
            answers.AnsweringNeighbours(
                topology.rounds(n),
                neighbours.differences(topology, n),
                is_mutual,
            )
        )
    return found


def heard(workers, steps, t, rank):
    """What a worker hears in step t, as `(giver, place of the answer)`.

    `exchange_in_group` gives the worker at place p of a group the row p of all.
    """
    rows = [(rank, 0)]
    for r, of_worker in enumerate(workers[rank]._table.rounds):
        groups = steps[t][r] if r < len(steps[t]) else ()
        group = next((g for g in groups if rank in g), (rank,))
        group = sorted(group, key=str)  # As TensorFlow sorts task 10 and 2.
        p = group.index(rank)
        received = [
            (giver, workers[giver]._answers_in_rounds[r][t][p])
            for giver in group
        ]
        rows += [received[i] for i in of_worker.others[t]]
    return [rows[place] for place in workers[rank]._places[t, 0]]


@pytest.mark.parametrize("topology, n", TOPOLOGIES)
def test_each_hears_what_is_for_it(topology, n, monkeypatch):
    steps = topology.rounds(n)
    workers = on_each_worker(topology, n, monkeypatch)
    for t, matrix in enumerate(topology.mixing_matrices(n)):
        for i in range(n):
            ranks = workers[i]._tables.ranks[t, 0]
            taken = workers[i]._tables.taken[t, 0]
            others = ranks[ranks != i]
            assert [*others] == [j for j in np.flatnonzero(matrix[i]) if j != i]
            np.testing.assert_allclose(
                taken, np.where(ranks == i, 0, matrix[i, ranks]), atol=1e-6
            )
            for d, (giver, place) in enumerate(heard(workers, steps, t, i)):
                assert giver == ranks[d]
                if giver != i:
                    # The giver's answer in this place is for i.
                    assert workers[giver]._tables.ranks[t, 0, place] == i


@pytest.mark.parametrize("topology, n", TOPOLOGIES)
def test_a_neighbour_has_the_same_number_in_all_steps(topology, n):
    tables = answers.tables(neighbours.differences(topology, n), True)
    for i in range(n):
        ranks, numbers = tables.ranks[:, i], tables.numbers[:, i]
        pairs = {*zip(ranks.ravel(), numbers.ravel(), strict=True)}
        assert len({number for _, number in pairs}) == len(pairs)
        assert len({rank for rank, _ in pairs}) == len(pairs)
        own = {int(number) for rank, number in pairs if rank == i}
        assert own <= {int(tables.numbers.max())}


def test_neighbours_that_are_not_mutual(monkeypatch):
    """Nothing is answered; the rows are those of the giver."""
    n = 6
    workers = on_each_worker(DIRECTED, n, monkeypatch, is_mutual=False)
    for i, worker in enumerate(workers):
        ranks = worker._tables.ranks[:, 0, 0]
        np.testing.assert_array_equal(ranks, [(i - h) % n for h in (1, 2, 4)])
        for t in range(3):
            [place] = worker._places[t, 0]
            assert worker._senders[t, 0, place] == ranks[t]


def test_keys_are_for_answers_only(monkeypatch):
    """No key of the exchange of weights serves for answers as well."""
    taken = []
    take = answers.keras_internals.take_instance_keys
    monkeypatch.setattr(
        answers.keras_internals,
        "take_instance_keys",
        lambda count: taken.append(count) or take(count),
    )
    on_each_worker(RING, 4, monkeypatch)
    assert taken == [4, 4] * 4


def test_a_step_has_other_keys_than_the_one_before(monkeypatch):
    found, *_ = on_each_worker(RING, 4, monkeypatch)
    keys = []

    def exchange_in_group(payloads, size, group_key, key):
        keys.append(int(key))
        return payloads

    monkeypatch.setattr(
        answers.keras_internals, "exchange_in_group", exchange_in_group
    )
    for number in (0, 1):
        found._answer(tf.zeros([2, 3]), tf.constant(number, tf.int64))
    assert len(set(keys)) == len(keys) == 4


@pytest.mark.parametrize("topology, n", [(RING, 4), (CLIQUES, 7)])
def test_one_process_emulates(topology, n, mirrored):
    strategy = mirrored(n)
    with strategy.scope():
        found = answers.AnsweringNeighbours(
            topology.rounds(n), neighbours.differences(topology, n), True
        )

    @tf.function(autograph=False)
    def step(number):
        def of_replica():
            replica = tf.distribute.get_replica_context()
            rank = tf.cast(replica.replica_id_in_sync_group, tf.float32)
            ranks = found.ranks(number)
            told = tf.stack(
                [tf.fill(ranks.shape, rank), tf.cast(ranks, tf.float32)], axis=1
            )
            return found.answer(told, number), ranks, found.places(number)

        return strategy.run(of_replica)

    results = step(tf.constant(5, tf.int64))
    for i in range(n):
        rows, ranks, places = (
            strategy.experimental_local_results(result)[i].numpy()
            for result in results
        )
        # Each row is from that neighbour, and for this replica.
        np.testing.assert_array_equal(rows[:, 0], ranks)
        np.testing.assert_array_equal(rows[:, 1], i)
        np.testing.assert_array_equal(places, ranks)


def test_cycles_cannot_answer(mirrored):
    with (
        mirrored(3).scope(),
        pytest.raises(ValueError, match=r"such as `Ring\(\)`.*with a `Cycle`"),
    ):
        answers.AnsweringNeighbours(
            DIRECTED.rounds(3), neighbours.differences(DIRECTED, 3), True
        )


def test_no_neighbours_at_all():
    weights = np.zeros([1, 3, 3])
    tables = answers.tables(weights, True)
    np.testing.assert_array_equal(tables.ranks, [[[0], [1], [2]]])
    assert not tables.taken.any()
    assert not tables.numbers.any()
