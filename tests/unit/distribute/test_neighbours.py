"""Who sends what to whom: the tables of all workers, played in NumPy."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk
from tf_regtopk import keras_internals
from tf_regtopk.distribute import meetings
from tf_regtopk.distribute import mixing
from tf_regtopk.distribute import neighbours
from tf_regtopk.distribute import topology as topology_lib
from tf_regtopk.keras_internals import neighbours as group_collectives

RING = tf_regtopk.Ring()
TOPOLOGIES = [
    (tf_regtopk.Complete(), 4),
    (RING, 2),
    (RING, 5),
    (tf_regtopk.Exponential(), 7),
    (tf_regtopk.OnePeerExponential(), 8),
    (tf_regtopk.OnePeerExponential(), 16),
    (RING, 13),
    (tf_regtopk.Complete(), 12),
    (tf_regtopk.Grid(3), 9),
    (tf_regtopk.Cliques([[0, 3, 4], [5, 1], [2, 6]]), 7),
    (tf_regtopk.PeriodicGlobalAveraging(RING, 3), 5),
    (tf_regtopk.RingPass([[0, 2, 4], [1], [3, 5]]), 6),
    (tf_regtopk.OnePeerExponential(directed=True), 6),
    # Steps of groups and steps of cycles.
    (
        tf_regtopk.PeriodicGlobalAveraging(
            tf_regtopk.RingPass([[2, 0, 1], [3, 4]]), 3
        ),
        5,
    ),
]


def received(table, steps, t, rank, x):
    """The rows that a worker reads in step t of the weights x `[N, J]`."""
    rows = [x[rank]]
    rounds = [
        [r for r in steps[t] if (type(r[0]) is mixing.Cycle) == is_cycle]
        for is_cycle in (False, True)
    ]
    for r, meeting in enumerate(table.rounds):
        groups = rounds[0][r] if r < len(rounds[0]) else ()
        group = next((g for g in groups if rank in g), (rank,))
        group = sorted(group, key=str)  # As TensorFlow sorts task 10 and 2.
        assert meeting.sizes[t] == len(group)
        if len(group) == 1:
            rows.extend([x[rank]] * meeting.others.shape[1])
        else:
            rows.extend(x[group][meeting.others[t]])
    for r, one in enumerate(table.passes):
        cycles = rounds[1][r] if r < len(rounds[1]) else ()
        cycle = next((c for c in cycles if rank in c), (rank,))
        assert one.takes_part[t] == (len(cycle) > 1)
        rows.append(x[cycle[cycle.index(rank) - 1]])
    return np.array(rows)


@pytest.mark.parametrize("topology, n", TOPOLOGIES)
def test_rows_of_each_worker_make_the_mixing_matrix(topology, n, monkeypatch):
    steps = topology.rounds(n)
    x = np.random.default_rng(0).standard_normal((n, 3))
    mixed = np.tile(x, (len(steps), 1, 1))
    for rank in range(n):
        cluster = topology_lib.Cluster(n, num_workers=n, worker=rank)
        monkeypatch.setattr(
            topology_lib.Cluster, "in_scope", lambda cluster=cluster: cluster
        )
        found = neighbours.Neighbours(
            steps, neighbours.differences(topology, n)
        )
        for t in range(len(steps)):
            rows = received(found._table, steps, t, rank, x)
            np.testing.assert_array_equal(rows, x[found._senders[t, 0]])
            mixed[t, rank] += found._weights[t, 0] @ rows
    for t, matrix in enumerate(topology.mixing_matrices(n)):
        np.testing.assert_allclose(mixed[t], matrix @ x, atol=1e-6)


@pytest.mark.parametrize("topology, n", TOPOLOGIES)
def test_members_of_a_group_have_its_key(topology, n):
    steps = topology.rounds(n)
    tables = [
        meetings.table(steps, topology_lib.Cluster(n, n, rank))
        for rank in range(n)
    ]
    members = {}
    for t, step in enumerate(steps):
        numbers = [0, 0]
        for groups in step:
            is_cycle = type(groups[0]) is mixing.Cycle
            r = numbers[is_cycle]
            numbers[is_cycle] += 1
            for group in () if is_cycle else groups:
                keys = {int(tables[i].rounds[r].keys[t]) for i in group}
                assert len(keys) == 1
                assert members.setdefault(keys.pop(), group) == group
            for cycle in groups if is_cycle else ():
                for giver, receiver in mixing.sendings(cycle):
                    sends = tables[giver].passes[r]
                    receives = tables[receiver].passes[r]
                    key = sends.keys_to[t]
                    assert key == receives.keys_from[t]
                    pair = tuple(sorted([giver, receiver]))
                    assert members.setdefault(key, pair) == pair
                    # Both know the direction, which has keys of its own.
                    is_up = giver < receiver
                    assert sends.is_up[t] == is_up
                    assert receives.is_from_below[t] == is_up
    assert len(set(members.values())) == len(members)


@pytest.mark.parametrize("topology, n", TOPOLOGIES)
def test_replicas_with_the_same_weights_keep_them(topology, n):
    """To the bit: float32 sums of a row and of a column are 0."""
    differences = neighbours.differences(topology, n).astype(np.float32)
    assert differences.dtype == np.float32
    for axis in (1, 2):
        assert not differences.sum(axis=axis, dtype=np.float32).any()
    np.testing.assert_allclose(
        differences + np.eye(n), topology.mixing_matrices(n), atol=1e-6
    )


def test_keys_are_far_from_others():
    """TensorFlow's count up from 1; the library's own begin further up."""
    first = keras_internals.take_instance_keys(3)
    assert keras_internals.take_instance_keys(1) == first + 3
    assert first >= group_collectives._FIRST_INSTANCE_KEY
    keys = keras_internals.group_keys([(0, 1), (2, 3), (0, 1)])
    assert keys[0] == keys[2] != keys[1]
    assert keras_internals.group_keys([(2, 3)]) == keys[1:2]
    assert min(keys) >= group_collectives._FIRST_GROUP_KEY
    own = keras_internals.collective_keys
    last = own.FIRST_GROUP_KEY_OF_WORKERS + 2**20
    assert last < group_collectives._FIRST_GROUP_KEY
    margin = 2**27
    for other in own.FIRST_INSTANCE_KEYS:
        distance = group_collectives._FIRST_INSTANCE_KEY - other
        assert abs(distance) >= margin


@pytest.mark.parametrize("topology, n", TOPOLOGIES)
def test_a_step_has_other_keys_than_the_one_before(topology, n, monkeypatch):
    cluster = topology_lib.Cluster(n, num_workers=n)
    monkeypatch.setattr(topology_lib.Cluster, "in_scope", lambda: cluster)
    found = neighbours.Neighbours(
        topology.rounds(n), neighbours.differences(topology, n)
    )
    keys = []

    def exchange_in_group(payloads, size, group_key, key):
        keys.append(int(key))
        return payloads

    def pass_on(payload, to, before):
        keys.extend({int(to.instance_key), int(before.instance_key)})
        return payload

    for function in (exchange_in_group, pass_on):
        monkeypatch.setattr(keras_internals, function.__name__, function)
    found._meet(tf.zeros([3]), tf.constant(0, tf.int64))
    before = [*keys]
    found._meet(tf.zeros([3]), tf.constant(1, tf.int64))
    assert len(set(keys)) == len(keys) > len(before) > 0


@pytest.mark.parametrize("n", [2, 3])
def test_one_process_emulates(n, mirrored):
    """All rows arrive, and a replica takes those of its neighbours."""
    strategy = mirrored(n)
    topology = RING
    with strategy.scope():
        found = neighbours.Neighbours(
            topology.rounds(n), neighbours.differences(topology, n)
        )

    @tf.function(autograph=False)
    def step(number):
        def of_replica():
            replica = tf.distribute.get_replica_context()
            rank = tf.cast(replica.replica_id_in_sync_group, tf.float32)
            rows = found.exchange(tf.stack([rank, 10 * rank]), number)
            return rows, found.weights(number), found.senders(number)

        return strategy.run(of_replica)

    results = step(tf.constant(5, tf.int64))
    for rank in range(n):
        rows, weights, senders = (
            strategy.experimental_local_results(result)[rank].numpy()
            for result in results
        )
        np.testing.assert_array_equal(rows[:, 1], 10.0 * np.arange(n))
        np.testing.assert_array_equal(senders, np.arange(n))
        expected = topology.mixing_matrices(n)[0, rank] - np.eye(n)[rank]
        np.testing.assert_allclose(weights, expected, atol=1e-6)


@dataclasses.dataclass(frozen=True)
class Wrong(tf_regtopk.MixingTopology):
    """Meetings and a matrix that need not go together."""

    steps: tuple
    matrix: tuple

    def rounds(self, num_replicas):
        return self.steps

    def mixing_matrices(self, num_replicas):
        return np.array([self.matrix], float)


HALF = ((0.5, 0.5), (0.5, 0.5))


@pytest.mark.parametrize(
    "steps, matrix, message",
    [
        (((((0, 1),),),), ((1, 0), (0.5, 0.5)), "add up to 1"),
        (((),), HALF, r"no meeting of \[\(0, 1\), \(1, 0\)\] in step 0"),
        (((((0, 1), (1, 0)),),), HALF, "each rank in at most one"),
        # The second replica sends to the third one only.
        (
            (((mixing.Cycle([0, 1, 2]),),),),
            ((0, 1, 0), (0, 0, 1), (1, 0, 0)),
            r"no meeting of \[\(0, 1\), \(1, 2\), \(2, 0\)\] in step 0",
        ),
    ],
)
def test_topologies_that_are_wrong(steps, matrix, message, mirrored):
    topology = Wrong(steps, matrix)
    n = len(matrix)
    with mirrored(n).scope(), pytest.raises(ValueError, match=message):
        neighbours.Neighbours(
            topology.rounds(n), neighbours.differences(topology, n)
        )


def test_workers_of_several_replicas_are_refused(monkeypatch):
    cluster = topology_lib.Cluster(num_replicas=4, num_workers=2)
    monkeypatch.setattr(topology_lib.Cluster, "in_scope", lambda: cluster)
    with pytest.raises(ValueError, match="2 workers of 2 replicas each"):
        neighbours.Neighbours(RING.rounds(4), neighbours.differences(RING, 4))


@dataclasses.dataclass(frozen=True)
class Given(tf_regtopk.MixingTopology):
    """A topology of a user's own that returns what it is given."""

    returned: object = ()

    def rounds(self, num_replicas):
        return self.returned


@pytest.mark.parametrize(
    "returned", [(), 3, [[[0, 1]]], [[[[0, 5]]]], [[[[-1, 0]]]], [[[[0, 0.5]]]]]
)
def test_rounds_of_another_form_are_refused(returned):
    with pytest.raises(ValueError, match="`rounds` of a topology must have"):
        neighbours.rounds_of(Given(returned), 2)


def test_rounds_may_be_lists():
    assert neighbours.rounds_of(Given([[[[0, np.int64(1)]]]]), 2) == (
        (((0, 1),),),
    )


def test_cycles_stay_cycles():
    [[(cycle,)]] = neighbours.rounds_of(
        Given([[[mixing.Cycle([0, np.int64(1)])]]]), 2
    )
    assert type(cycle) is mixing.Cycle
    with pytest.raises(ValueError, match="own where its `rounds` hold a `Cyc"):
        neighbours.differences(Given([[[mixing.Cycle([0, 1])]]]), 2)


def test_matrices_of_another_shape_are_refused():
    topology = Given([[[[0, 1]]]])
    object.__setattr__(topology, "mixing_matrices", lambda n: np.eye(2))
    with pytest.raises(ValueError, match=r"\(1, 2, 2\).*shape \(2, 2\)"):
        neighbours.differences(topology, 2)
