"""The step as pure functions of plain values."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk
from tf_regtopk import error_feedback
from tf_regtopk import selection
from tf_regtopk.kernels import scatter_sum
from tf_regtopk.steps import missing as missing_lib
from tf_regtopk.steps import round as round_lib

SIZE, NUM_REPLICAS, DENSITY = 37, 3, 0.2


def method_of(sparsifier, rule):
    k = sparsifier.num_selected(SIZE)
    return round_lib.Method(
        sparsifier,
        rule,
        tf_regtopk.Codec("int32").payload(k, SIZE),
        (selection.Group(SIZE, k),),
    )


def test_rounds_without_variables_or_strategy():
    """RegTop-k of three replicas, in plain Python, against NumPy."""
    sparsifier = tf_regtopk.RegTopK(DENSITY)
    method = method_of(sparsifier, tf_regtopk.Accumulate())
    k = method.groups[0].k
    states = [
        round_lib.State(
            (tf.zeros([SIZE]),),
            (),
            sparsifier.initial_memory(k, SIZE, tf.float32),
        )
        for _ in range(NUM_REPLICAS)
    ]
    rng = np.random.default_rng(0)
    errors = np.zeros((NUM_REPLICAS, SIZE))
    for t in range(4):
        g = rng.standard_normal((NUM_REPLICAS, SIZE)).astype(np.float32)
        context = error_feedback.StepContext(
            NUM_REPLICAS, DENSITY, tf.zeros([]), tf.constant(t)
        )
        sent = [
            round_lib.send(method, tf.constant(g[n]), state, context, n)
            for n, state in enumerate(states)
        ]
        payloads = tf.stack([payload for payload, _, _ in sent])
        indices, values, is_valid = method.payload_codec.decode(payloads)
        assert is_valid.numpy().all()
        total = scatter_sum.sum_entries(indices, values, SIZE)
        total, shared = round_lib.aggregate(method, total, (), context)
        states = [
            round_lib.State(local, shared, memory)
            for local, memory in (
                round_lib.settle(
                    method, of_replica, state.memory, total, context
                )
                for (_, of_replica, _), state in zip(sent, states, strict=True)
            )
        ]
        # Nothing is lost, and each error is what was not sent.
        accumulated = errors + g
        for n, (_, (chosen, _, _), a) in enumerate(sent):
            np.testing.assert_allclose(a, accumulated[n], 1e-5, 1e-6)
            errors[n] = accumulated[n]
            errors[n, chosen] = 0
            np.testing.assert_allclose(
                states[n].local[0], errors[n], 1e-5, 1e-6
            )
            np.testing.assert_array_equal(states[n].memory[0], chosen)
        np.testing.assert_allclose(
            total + errors.sum(axis=0),
            accumulated.sum(axis=0),
            rtol=1e-5,
            atol=1e-5,
        )


def test_missing_entries_send_nothing_and_stay():
    method = method_of(tf_regtopk.TopK(0.5), tf_regtopk.Accumulate(0.5))
    missing = missing_lib.Missing(SIZE, ((5, 20),))
    old = tf.range(1.0, SIZE + 1), tf.range(2.0, SIZE + 2)
    state = round_lib.State(old)
    context = error_feedback.StepContext(1, 0.5, tf.zeros([]), tf.constant(0))
    g = tf.ones([SIZE])
    _, sent, a = round_lib.send(method, g, state, context, 0, missing)
    assert not a[5:20].numpy().any()
    local, _ = round_lib.settle(method, sent, (), a, context, missing)
    for before, after in zip(old, local, strict=True):
        np.testing.assert_array_equal(after[5:20], before[5:20])
        assert (after.numpy() != before.numpy())[:5].any()


@dataclasses.dataclass(frozen=True)
class OfVersion010(tf_regtopk.ErrorFeedback):
    """A rule as users wrote them for version 0.1.0."""

    keeps_a = True
    num_local = 1

    def accumulate(self, local, shared, gradient, context):
        return local[0] + gradient, (None,)

    def update(self, local, indices, sent, total, context):
        return local


def test_a_rule_of_version_0_1_0_says_what_to_write():
    method = method_of(tf_regtopk.TopK(0.5), OfVersion010())
    context = error_feedback.StepContext(1, 0.5, tf.zeros([]), tf.constant(0))
    with pytest.raises(ValueError, match=r"OfVersion010\.accumulate.*itself"):
        round_lib.send(
            method,
            tf.ones([SIZE]),
            round_lib.State((tf.zeros([SIZE]),)),
            context,
            0,
        )
