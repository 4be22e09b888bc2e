"""A step of decentralised training as pure functions, against NumPy."""

import functools

import gossip_reference
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk
from tf_regtopk import error_feedback
from tf_regtopk import selection
from tf_regtopk.distribute import mixing_rules
from tf_regtopk.steps import gossip_round
from tf_regtopk.steps import round as round_lib

SIZE, N = 41, 8
RULES = {
    gossip_reference.DPSGD: tf_regtopk.NoFeedback(),
    gossip_reference.CHOCO: tf_regtopk.EF21(),
    gossip_reference.DeepSqueeze: tf_regtopk.Accumulate(),
}


class Replicas:
    """N replicas in one process, without variables or strategy."""

    def __init__(
        self, x, sparsifier, rule, gamma=1.0, codec=None, mixing_rule=None
    ):
        self.mixing_rule = mixing_rule or tf_regtopk.LinearGossip()
        k = sparsifier.num_selected(SIZE)
        self.gamma, self.density = gamma, k / SIZE
        self.method = round_lib.Method(
            sparsifier,
            rule,
            (codec or tf_regtopk.Codec("int32")).payload(k, SIZE),
            (selection.Group(SIZE, k),),
        )
        self.x = tf.unstack(tf.constant(x, tf.float32))
        # All start with the weights of the first one.
        self.states = [gossip_round.initial(rule, self.x[0])] * len(x)
        self.number = 0

        self._send = tf.function(self._send, autograph=False)
        self._mix = tf.function(self._mix, autograph=False)

    def _send(self, x, state, number, rank):
        return round_lib.send(self.method, x, state, self._at(number), rank)

    def _mix(self, payloads, weights, sent, state, number):
        indices, values, is_valid = self.method.payload_codec.decode(payloads)
        d = self.mixing_rule.disagreement(
            mixing_rules.Received(indices, values, weights), sent.values, SIZE
        )
        move, state = gossip_round.mix(
            self.method, self.gamma, d, sent, state, self._at(number)
        )
        return move, state, is_valid

    def _at(self, number):
        return error_feedback.StepContext(
            len(self.x), self.density, tf.zeros([]), number
        )

    def step(self, w, update):
        number = tf.constant(self.number)
        sent = [
            self._send(x, state, number, tf.constant(rank))
            for rank, (x, state) in enumerate(
                zip(self.x, self.states, strict=True)
            )
        ]
        payloads = tf.stack([payload for payload, _, _ in sent])
        rows = tf.constant(w - np.eye(len(w)), tf.float32)
        for i, (_, of_replica, _) in enumerate(sent):
            move, self.states[i], is_valid = self._mix(
                payloads, rows[i], of_replica, self.states[i], number
            )
            assert is_valid.numpy().all()
            self.x[i] = self.x[i] + move + tf.cast(update[i], tf.float32)
        self.number += 1


def start(seed=0, spread=0.0):
    """Weights `[N, J]`, by default alike on all replicas."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(SIZE) + spread * rng.standard_normal((N, SIZE))
    return x.astype(np.float32).astype(float)


def updates(num_steps, seed=1):
    rng = np.random.default_rng(seed)
    return 0.1 * rng.standard_normal((num_steps, N, SIZE))


@pytest.mark.parametrize(
    "twin, density, gamma, topology",
    [
        (gossip_reference.DPSGD, 1.0, 1.0, tf_regtopk.Ring()),
        (gossip_reference.DPSGD, 1.0, 0.7, tf_regtopk.OnePeerExponential()),
        (gossip_reference.CHOCO, 1.0, 1.0, tf_regtopk.Ring()),
        (gossip_reference.CHOCO, 0.1, 0.1, tf_regtopk.Ring()),
        (gossip_reference.CHOCO, 0.3, 0.3, tf_regtopk.Torus()),
        (gossip_reference.DeepSqueeze, 1.0, 1.0, tf_regtopk.Exponential()),
        (
            gossip_reference.DeepSqueeze,
            *(0.2, 0.3, tf_regtopk.OnePeerExponential()),
        ),
    ],
)
def test_equals_the_paper(twin, density, gamma, topology):
    x, k = start(), max(1, round(density * SIZE))
    compress = functools.partial(gossip_reference.top_k, k=k)
    expected = twin(x, compress, gamma)
    sparsifier = tf_regtopk.TopK(density)
    if density == 1:
        sparsifier = tf_regtopk.Dense()
    replicas = Replicas(x, sparsifier, RULES[twin], gamma)
    matrices = topology.mixing_matrices(N)
    for t, update in enumerate(updates(15)):
        w = matrices[t % len(matrices)]
        expected.step(w, update)
        replicas.step(w, update)
        np.testing.assert_allclose(replicas.x, expected.x, rtol=0, atol=1e-5)
    assert gossip_reference.disagreement(expected.x) > 0.1


@pytest.mark.parametrize("alpha, epsilon", [(0.75, 0.3), (0.3, 0.1), (1, 1)])
def test_nonlinear_gossip_equals_the_paper(alpha, epsilon):
    x = start(spread=1.0)
    expected = gossip_reference.NGO(x, alpha, epsilon)
    replicas = Replicas(
        x,
        tf_regtopk.Dense(),
        tf_regtopk.NoFeedback(),
        mixing_rule=tf_regtopk.NonlinearGossip(alpha, epsilon),
    )
    [w] = tf_regtopk.Torus().mixing_matrices(N)
    mean = x.mean(axis=0)
    for update in updates(10):
        expected.step(w, update)
        replicas.step(w, update)
        mean = mean + update.mean(axis=0)
        np.testing.assert_allclose(replicas.x, expected.x, rtol=0, atol=2e-5)
        # Nothing is lost on the way.
        np.testing.assert_allclose(
            np.mean(replicas.x, axis=0), mean, rtol=0, atol=1e-5
        )


def test_names_of_the_state():
    """The h of EF21 is x^ of CHOCO, its H the sum over the neighbours."""
    x, matrices = start(), tf_regtopk.Ring().mixing_matrices(N)
    compress = functools.partial(gossip_reference.top_k, k=4)
    expected = gossip_reference.CHOCO(x, compress, 0.1)
    replicas = Replicas(x, tf_regtopk.TopK(0.1), tf_regtopk.EF21(), 0.1)
    for update in updates(10):
        expected.step(matrices[0], update)
        replicas.step(matrices[0], update)
    h = np.stack([state.local[0] for state in replicas.states])
    h_sum = np.stack([state.shared[0] for state in replicas.states])
    np.testing.assert_allclose(h, expected.x_hat, atol=1e-5)
    np.testing.assert_allclose(h_sum, matrices[0] @ h - h, atol=1e-5)


@pytest.mark.parametrize("n, rho", [(4, 1 / 3), (8, 0.8047)])
def test_a_ring_contracts_by_rho(n, rho):
    """The squared distance falls by rho^2 a step, or more."""
    rng = np.random.default_rng(0)
    replicas = Replicas(
        rng.standard_normal((n, SIZE)),
        tf_regtopk.Dense(),
        tf_regtopk.NoFeedback(),
    )
    [w] = tf_regtopk.Ring().mixing_matrices(n)
    mean = np.mean(replicas.x, axis=0)
    distances = [gossip_reference.disagreement(np.stack(replicas.x))]
    for _ in range(8):
        replicas.step(w, np.zeros((n, SIZE)))
        distances.append(gossip_reference.disagreement(np.stack(replicas.x)))
    ratios = np.array(distances[1:]) / distances[:-1]
    # Float32 has no digits for much smaller distances.
    ratios = ratios[np.array(distances[1:]) > 1e-4]
    assert len(ratios) > 4
    assert (ratios <= rho * (1 + 1e-3)).all()
    assert ratios[-1] > 0.9 * rho
    np.testing.assert_allclose(np.mean(replicas.x, axis=0), mean, atol=1e-6)


def test_choco_agrees_in_the_end():
    """From other weights than the neighbours know of, by a third of entries."""
    x = start(spread=1.0)
    replicas = Replicas(x, tf_regtopk.TopK(0.3), tf_regtopk.EF21(), 0.3)
    [w] = tf_regtopk.Ring().mixing_matrices(N)
    zeros = np.zeros((N, SIZE))
    for _ in range(100):
        replicas.step(w, zeros)
    agreed = np.stack(replicas.x)
    assert gossip_reference.disagreement(agreed) < 1e-2
    np.testing.assert_allclose(agreed.mean(axis=0), x.mean(axis=0), atol=1e-5)


def test_without_feedback_compressed_gossip_does_not_agree():
    """The reason why the optimizer warns of it."""
    x = start(spread=1.0)
    replicas = Replicas(x, tf_regtopk.TopK(0.1), tf_regtopk.NoFeedback(), 0.1)
    [w] = tf_regtopk.Ring().mixing_matrices(N)
    for _ in range(30):
        replicas.step(w, np.zeros((N, SIZE)))
    assert gossip_reference.disagreement(np.stack(replicas.x)) > 0.1


@pytest.mark.parametrize("rule", [tf_regtopk.EF21(), tf_regtopk.Accumulate()])
def test_eight_bits_are_as_good_as_all(rule):
    x = start(spread=1.0)
    codec = tf_regtopk.Codec(values=tf_regtopk.Uniform(num_bits=8))
    replicas = Replicas(x, tf_regtopk.Dense(), rule, codec=codec)
    [w] = tf_regtopk.Ring().mixing_matrices(N)
    for _ in range(60):
        replicas.step(w, np.zeros((N, SIZE)))
    agreed = np.stack(replicas.x)
    assert gossip_reference.disagreement(agreed) < 0.15
    np.testing.assert_allclose(agreed.mean(axis=0), x.mean(axis=0), atol=1e-4)
