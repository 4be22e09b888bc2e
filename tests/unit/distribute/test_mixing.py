"""Topologies of decentralised training: matrices, meetings, bytes, errors."""

import dataclasses
import itertools
import math

import keras
import numpy as np
import pytest

import tf_regtopk
from tf_regtopk.distribute import mixing

RING = tf_regtopk.Ring()
DIRECTED = tf_regtopk.OnePeerExponential(directed=True)
# Each with a number of replicas that suits it.
TOPOLOGIES = [
    (tf_regtopk.Complete(), 5),
    (RING, 7),
    (tf_regtopk.Torus(), 12),
    (tf_regtopk.Torus(rows=2), 8),
    (tf_regtopk.Exponential(), 11),
    (tf_regtopk.OnePeerExponential(), 8),
    (DIRECTED, 6),
    (tf_regtopk.Grid(3), 9),
    (tf_regtopk.Cliques([[0, 3, 4], [5, 1], [2, 6]]), 7),
    (tf_regtopk.PeriodicGlobalAveraging(RING, 3), 6),
    (tf_regtopk.RingPass([[0, 2, 4], [1], [3, 5]]), 6),
    (
        tf_regtopk.PeriodicGlobalAveraging(
            tf_regtopk.RingPass([[0, 1, 2], [3, 4]]), 4
        ),
        5,
    ),
]


@dataclasses.dataclass(frozen=True)
class Meetings(tf_regtopk.MixingTopology):
    """A topology of the user, which says who meets and nothing else."""

    rounds_of_step: tuple

    def rounds(self, num_replicas):
        return (self.rounds_of_step,)


def product(topology, n):
    """What all T steps together multiply the weights by."""
    result = np.eye(n)
    for matrix in topology.mixing_matrices(n):
        result = matrix @ result
    return result


def deviation(topology, n):
    """The largest distance of that to the mean of all replicas."""
    return np.abs(product(topology, n) - 1 / n).max()


@pytest.mark.parametrize("topology, n", TOPOLOGIES)
def test_who_meets_mixes(topology, n):
    matrices, steps = topology.mixing_matrices(n), topology.rounds(n)
    assert matrices.shape == (len(steps), n, n)
    assert (matrices >= 0).all()
    np.testing.assert_allclose(matrices.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(matrices.sum(axis=2), 1, atol=1e-12)
    for matrix, step in zip(matrices, steps, strict=True):
        met = []
        for groups in step:
            ranks = [*itertools.chain(*groups)]
            assert len(set(ranks)) == len(ranks), "a rank is twice in a round"
            assert all(len(group) > 1 for group in groups)
            for group in groups:
                # Receivers and givers, as rows and columns.
                met.extend((j, i) for i, j in mixing.sendings(group))
        assert len(set(met)) == len(met), "a pair meets twice in a step"
        others = np.argwhere(matrix - np.diag(np.diag(matrix)))
        assert {*map(tuple, others.tolist())} <= set(met)


@pytest.mark.parametrize("topology, n", TOPOLOGIES)
def test_a_saved_topology_is_the_same(topology, n):
    config = keras.saving.serialize_keras_object(topology)
    loaded = keras.saving.deserialize_keras_object(config)
    assert loaded == topology
    assert hash(loaded) == hash(topology)
    assert loaded.rounds(n) == topology.rounds(n)


@pytest.mark.parametrize(
    "topology",
    [
        tf_regtopk.Complete(),
        RING,
        tf_regtopk.Torus(),
        tf_regtopk.Exponential(),
        tf_regtopk.OnePeerExponential(),
        DIRECTED,
        tf_regtopk.Grid(2),
        tf_regtopk.Cliques([[0]]),
        tf_regtopk.RingPass([[0]]),
        tf_regtopk.PeriodicGlobalAveraging(RING, 2),
    ],
)
def test_a_single_replica_is_alone(topology):
    assert (topology.mixing_matrices(1) == 1).all()
    assert topology.messages(1) == 0


@pytest.mark.parametrize(
    "n, gap", [(4, 0.6667), (8, 0.1953), (16, 0.0507), (3, 1.0)]
)
def test_gap_of_a_ring(n, gap):
    """1 - (1 + 2 cos(2 pi / N)) / 3."""
    assert RING.spectral_gap(n) == pytest.approx(gap, abs=1e-4)
    theory = 2 / 3 - 2 / 3 * math.cos(2 * math.pi / n)
    assert RING.spectral_gap(n) == pytest.approx(theory)


@pytest.mark.parametrize(
    "topology, n, num_steps",
    [
        (tf_regtopk.Complete(), 6, 1),
        (tf_regtopk.OnePeerExponential(), 4, 2),
        (tf_regtopk.OnePeerExponential(), 8, 3),
        (tf_regtopk.OnePeerExponential(), 16, 4),
        *((DIRECTED, n, math.ceil(math.log2(n))) for n in (2, 4, 8, 16)),
        (tf_regtopk.Grid(3), 27, 3),
        (tf_regtopk.PeriodicGlobalAveraging(RING, 5), 16, 5),
    ],
)
def test_the_mean_of_all_is_exact(topology, n, num_steps):
    assert len(topology.mixing_matrices(n)) == num_steps
    assert deviation(topology, n) < 1e-15
    assert topology.spectral_gap(n) == 1


def test_directed_peers_of_six_are_nearly_the_mean_of_all():
    """Of each two paths of three hops that end on the same replica: 1/4."""
    assert len(DIRECTED.mixing_matrices(6)) == 3
    assert deviation(DIRECTED, 6) == pytest.approx(1 / 4 - 1 / 6)
    row = product(DIRECTED, 6)[0]
    np.testing.assert_allclose(sorted(row), [1 / 8] * 4 + [1 / 4] * 2)


@pytest.mark.parametrize("n", [2, 3, 5, 6, 8])
def test_directed_peers_send_to_one_and_hear_from_one(n):
    for t, [groups] in enumerate(DIRECTED.rounds(n)):
        assert {type(group) for group in groups} == {mixing.Cycle}
        pairs = [*itertools.chain(*map(mixing.sendings, groups))]
        assert sorted(pairs) == [(i, (i + 2**t) % n) for i in range(n)]
    assert DIRECTED.messages(n) == 1


def test_a_step_too_few_is_not_the_mean_of_all():
    matrices = tf_regtopk.Grid(3).mixing_matrices(27)
    assert np.abs(matrices[1] @ matrices[0] - 1 / 27).max() > 0.07


def test_random_groups_contract_as_moshpit_says():
    """By (r - 1) / N + r / N^2 in the mean, with r groups of N replicas."""
    n, r = 32, 8
    rng = np.random.default_rng(0)
    left = []
    for _ in range(300):
        groups = rng.permutation(n).reshape(r, n // r).tolist()
        [matrix] = Meetings((groups,)).mixing_matrices(n)
        x = rng.standard_normal(n)
        x -= x.mean()
        left.append(((matrix @ x) ** 2).sum() / (x**2).sum())
    assert np.mean(left) == pytest.approx((r - 1) / n + r / n**2, abs=0.02)


@pytest.mark.parametrize("num_cliques, edges", [(100, 9450), (10, 495)])
def test_edges_of_cliques(num_cliques, edges):
    """9,450 in place of 499,500, as the paper has it for 1000 nodes."""
    n = 10 * num_cliques
    topology = tf_regtopk.Cliques(np.arange(n).reshape(-1, 10).tolist())
    assert topology.messages(n) * n / 2 == edges
    [(cliques, *links)] = topology.rounds(n)
    num_links = np.bincount(np.ravel([*itertools.chain(*links)]), minlength=n)
    # The links are spread over the members.
    assert num_links.max() - num_links.min() <= 1
    assert sum(num_links) == num_cliques * (num_cliques - 1)
    assert len(cliques) == num_cliques


def test_groups_that_average_gradients():
    cliques = [[0, 3], [2], [1, 4]]
    assert tf_regtopk.Cliques(cliques).gradient_groups(5) == ()
    topology = tf_regtopk.Cliques(cliques, average_gradients=True)
    assert topology.gradient_groups(5) == ((0, 3), (1, 4))
    around = tf_regtopk.PeriodicGlobalAveraging(topology, 2)
    assert around.gradient_groups(5) == ((0, 3), (1, 4))


def test_a_ring_pass_hands_weights_on():
    [matrix] = tf_regtopk.RingPass([[3, 1, 0], [2]]).mixing_matrices(4)
    np.testing.assert_array_equal(matrix @ [10, 11, 12, 13], [11, 13, 12, 10])


def test_global_averaging_takes_its_turn():
    """Of a topology of two steps, every third: the period is six."""
    one_peer = tf_regtopk.OnePeerExponential()
    topology = tf_regtopk.PeriodicGlobalAveraging(one_peer, 3)
    [mean] = tf_regtopk.Complete().mixing_matrices(4)
    a, b = one_peer.mixing_matrices(4)
    np.testing.assert_array_equal(
        topology.mixing_matrices(4), [a, b, mean, b, a, mean]
    )
    pairs, others = one_peer.rounds(4)
    all_at_once = (((0, 1, 2, 3),),)
    assert topology.rounds(4) == (
        *(pairs, others, all_at_once),
        *(others, pairs, all_at_once),
    )


@pytest.mark.parametrize(
    "topology, n, workers, messages, by_worker",
    [
        (tf_regtopk.Complete(), 4, 4, 3, 3),
        (RING, 8, 8, 2, 2),
        (RING, 8, 2, 2, 2),  # Two of a worker's four meet the other's.
        (RING, 2, 2, 1, 1),
        (tf_regtopk.Torus(), 16, 16, 4, 4),
        (tf_regtopk.Torus(), 4, 1, 2, 0),
        (tf_regtopk.OnePeerExponential(), 8, 8, 1, 1),
        # Of four on each worker, one sends to the other worker, then two.
        (DIRECTED, 8, 2, 1, (1 + 2 + 4) / 3),
        (tf_regtopk.RingPass([[0, 1, 2], [3]]), 4, 4, 3 / 4, 3 / 4),
        (tf_regtopk.Exponential(), 8, 8, 5, 5),
        (tf_regtopk.Grid(3), 9, 9, 2, 2),
        # Each is in a clique of four, and half of them have a link.
        (
            tf_regtopk.Cliques([[0, 1, 2, 3], [4, 5, 6, 7]]),
            *(8, 8, 3 + 2 / 8, 3 + 2 / 8),
        ),
    ],
)
def test_messages(topology, n, workers, messages, by_worker):
    cluster = tf_regtopk.Cluster(n, workers)
    assert topology.messages(n) == pytest.approx(messages)
    assert topology.sent_bytes(100, cluster) == pytest.approx(100 * messages)
    assert topology.worker_sent_bytes(100, cluster) == pytest.approx(
        100 * by_worker
    )


@pytest.mark.parametrize(
    "topology, n, message",
    [
        (tf_regtopk.OnePeerExponential(), 6, "a power of two.*6 replicas"),
        (tf_regtopk.Grid(3), 6, "a power of 3.*6 replicas"),
        (tf_regtopk.Torus(rows=4), 6, "a multiple of 4.*6 replicas"),
        (tf_regtopk.Cliques([[0, 1], [2]]), 4, "each rank from 0 to 3 once"),
        (tf_regtopk.Cliques([[0, 1], [1, 2]]), 3, "`cliques` must hold each"),
        (tf_regtopk.RingPass([[0, 1]]), 3, "`classes` must hold each rank"),
    ],
)
def test_unsuitable_numbers_of_replicas(topology, n, message):
    for method in (topology.rounds, topology.mixing_matrices):
        with pytest.raises(ValueError, match=message):
            method(n)


def test_bad_arguments():
    with pytest.raises(ValueError, match="`cliques` must be a list of lists"):
        tf_regtopk.Cliques(3)
    with pytest.raises(ValueError, match="`cliques` must be a list of lists"):
        tf_regtopk.Cliques([[0, 1.5]])
    with pytest.raises(ValueError, match="`classes` must be a list of lists"):
        tf_regtopk.RingPass([[0, 1], []])
    with pytest.raises(TypeError, match="`average_gradients` must be a bool"):
        tf_regtopk.Cliques([[0, 1]], average_gradients=1)
    with pytest.raises(ValueError, match="`side` must be an integer >= 2"):
        tf_regtopk.Grid(1)
    with pytest.raises(ValueError, match="`every` must be an integer >= 1"):
        tf_regtopk.PeriodicGlobalAveraging(RING, 0)
    with pytest.raises(TypeError, match="must be a `MixingTopology` such as"):
        tf_regtopk.PeriodicGlobalAveraging(tf_regtopk.AllGather(), 2)
    with pytest.raises(TypeError, match="`directed` must be a bool"):
        tf_regtopk.OnePeerExponential(directed=1)
    with pytest.raises(TypeError, match="`rows` must be an integer"):
        tf_regtopk.Torus(1.5)


def test_the_sum_of_all_needs_another_topology():
    with pytest.raises(ValueError, match=r"AllGather\(\)`.*Decentralized"):
        tf_regtopk.SparsifiedOptimizer(keras.optimizers.SGD(), topology=RING)


def test_weights_follow_from_a_users_meetings():
    star = Meetings(([(0, 1)], [(0, 2)]))
    [matrix] = star.mixing_matrices(3)
    third = 1 / 3
    np.testing.assert_allclose(
        matrix,
        [[third] * 3, [third, 1 - third, 0], [third, 0, 1 - third]],
    )
    assert star.messages(3) == pytest.approx(4 / 3)
