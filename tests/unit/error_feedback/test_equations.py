"""The equations of the rules, on plain tensors."""

import numpy as np
import pytest
import reference
import tensorflow as tf

import tf_regtopk
from tf_regtopk import error_feedback
from tf_regtopk.error_feedback import equations

NUM_REPLICAS, SIZE = 3, 9


def test_nothing_is_lost():
    """sent + residual error = accumulated, to the bit."""
    rng = np.random.default_rng(0)
    error, gradient = rng.standard_normal((2, 50)).astype(np.float32)
    a = equations.accumulate(tf.constant(error), tf.constant(gradient))
    indices = tf.constant([3, 49, 0])
    sent = tf.gather(a, indices)
    residual = equations.residual_error(a, indices, sent).numpy()
    assert (residual[[3, 49, 0]] == 0).all()
    residual[[3, 49, 0]] += sent.numpy()
    np.testing.assert_array_equal(residual, error + gradient)


@pytest.mark.parametrize("k", [4, SIZE])
@pytest.mark.parametrize(
    "name, arguments",
    [
        ("Accumulate", {}),
        ("Accumulate", dict(momentum=0.7)),
        ("Accumulate", dict(momentum=0.7, factor_masking=True)),
        ("Accumulate", dict(momentum=0.5, clip_norm=0.5)),
        ("Accumulate", dict(follow_learning_rate=True)),
        ("NoFeedback", {}),
        ("EF21", {}),
        ("EF21", dict(momentum=0.3)),
        ("LearnedShift", {}),
        ("LearnedShift", dict(rate=0.5, momentum=0.6)),
        ("LearnedShift", dict(momentum=0.6, at_once=True)),
    ],
)
def test_rules_follow_the_reference(name, arguments, k):
    """A few rounds; `test_rules.py` takes them through the optimizer."""
    rule = getattr(tf_regtopk, name)(**arguments)
    plain = getattr(reference, name)(**arguments)
    plain.start(NUM_REPLICAS, SIZE, k / SIZE)
    states = [rule.initial_local(SIZE, tf.float64)] * NUM_REPLICAS
    shared = rule.initial_shared(SIZE, tf.float64)
    rng = np.random.default_rng(0)
    for t, rate in enumerate([1.0, 0.5, 0.5, 0.125]):
        g = rng.standard_normal((NUM_REPLICAS, SIZE))
        context = error_feedback.StepContext(
            NUM_REPLICAS, k / SIZE, tf.constant(rate), tf.constant(t)
        )
        expected = plain.accumulate(g, rate)
        a, states = zip(
            *(
                rule.accumulate(
                    local, shared, tf.constant(g_n / NUM_REPLICAS), context
                )
                for local, g_n in zip(states, g, strict=True)
            ),
            strict=True,
        )
        np.testing.assert_allclose(
            NUM_REPLICAS * np.array(a), expected, atol=1e-12
        )
        s = np.zeros(expected.shape, bool)
        for n in range(NUM_REPLICAS):
            s[n, reference.largest(np.abs(expected[n]), k)] = True
        sent = np.where(s, expected, 0.0)
        total = tf.constant(sent.sum(axis=0) / NUM_REPLICAS)
        indices = [tf.constant(np.flatnonzero(s_n), tf.int32) for s_n in s]
        states = [
            rule.update(local, i, tf.gather(a_n, i), total, context)
            for local, i, a_n in zip(states, indices, a, strict=True)
        ]
        aggregate, shared = rule.aggregate(shared, total, context)
        np.testing.assert_allclose(
            aggregate,
            plain.update(expected, s, sent, sent.mean(axis=0)),
            atol=1e-12,
        )
