"""Cross gradients as pure functions, and the record of their choices."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk
from tf_regtopk import error_feedback
from tf_regtopk.steps import cross_gradients

SIGN = tf_regtopk.Codec(values="sign")
SIZE = 9


def test_config():
    record = tf_regtopk.CrossGradients(
        0.25,
        tf_regtopk.Codec(values=tf_regtopk.Uniform(num_bits=8)),
        tf_regtopk.NoFeedback(),
    )
    config = keras.saving.serialize_keras_object(record)
    assert keras.saving.deserialize_keras_object(config) == record
    assert tf_regtopk.CrossGradients(1) == tf_regtopk.CrossGradients()
    assert isinstance(tf_regtopk.CrossGradients(1).alpha, float)


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        (dict(alpha=-0.1), ValueError, r"`alpha` must be in \[0, 1\]"),
        (dict(alpha=1.1), ValueError, r"`alpha` must be in \[0, 1\]"),
        (dict(codec="sign"), TypeError, "`codec` must be a `Codec`"),
        (
            dict(error_feedback=tf_regtopk.EF21()),
            *(ValueError, r"must be `Accumulate\(\)` or `NoFeedback\(\)`"),
        ),
        (
            dict(error_feedback=tf_regtopk.Accumulate(momentum=0.5)),
            *(ValueError, "with its defaults"),
        ),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        tf_regtopk.CrossGradients(**kwargs)


@pytest.mark.parametrize(
    "record, sent_bytes, keeps_errors",
    [
        (tf_regtopk.CrossGradients(), 4 * SIZE, False),
        (tf_regtopk.CrossGradients(0.0, SIGN), 0, False),
        # A word of signs, and a magnitude.
        (tf_regtopk.CrossGradients(0.5, SIGN), 8, True),
        (
            tf_regtopk.CrossGradients(1.0, SIGN, tf_regtopk.NoFeedback()),
            *(8, False),
        ),
    ],
)
def test_what_is_sent_and_kept(record, sent_bytes, keeps_errors):
    assert record.sent_bytes(SIZE, tf.float32) == sent_bytes
    assert record.keeps_errors == keeps_errors
    assert record.sends_back == (record.alpha > 0)


def step_of(number, num_replicas=4):
    return error_feedback.StepContext(num_replicas, 1.0, tf.zeros([]), number)


def test_each_neighbour_has_an_error_of_its_own():
    """Replica 1 tells 0 and 3, and then 3 alone, which it knows as 1."""
    rng = np.random.default_rng(0)
    method = tf_regtopk.CrossGradients(codec=SIGN).method(SIZE, tf.float32)
    errors = (tf.zeros([3, SIZE]),)
    expected = np.zeros((3, SIZE))
    for t, (ranks, numbers) in enumerate([([0, 3], [0, 1]), ([3, 1], [1, 2])]):
        g = rng.standard_normal((2, SIZE))
        found = cross_gradients.answer(
            method,
            tf.constant(g, tf.float32),
            errors,
            (tf.constant(ranks), tf.constant(numbers)),
            step_of(tf.constant(t)),
            tf.constant(1),
        )
        errors = found.errors
        for d, (rank, number) in enumerate(zip(ranks, numbers, strict=True)):
            a = g[d] + expected[number]
            sent = np.where(a < 0, -1, 1) * np.abs(a).mean()
            np.testing.assert_allclose(found.values[d], sent, atol=1e-6)
            # The last place stands for nobody in the second step.
            expected[number] = 0 if rank == 1 else a - sent
        np.testing.assert_allclose(errors[0], expected, atol=1e-6)
        _, decoded, _ = method.payload_codec.decode(found.payloads)
        np.testing.assert_array_equal(decoded, found.values)


def test_neighbours_are_told_other_random_numbers():
    method = tf_regtopk.CrossGradients(
        codec=tf_regtopk.Codec(values="natural"),
        error_feedback=tf_regtopk.NoFeedback(),
    ).method(100, tf.float32)
    found = cross_gradients.answer(
        method,
        tf.fill([2, 100], 1.5),
        (),
        (tf.constant([0, 3]), tf.constant([0, 1])),
        step_of(tf.constant(0)),
        tf.constant(1),
    )
    assert set(found.values.numpy().ravel()) == {1.0, 2.0}
    assert (found.values[0] != found.values[1]).numpy().any()


def test_combine():
    rng = np.random.default_rng(1)
    own, at_weights, answers = (
        rng.standard_normal(shape) for shape in (SIZE, (2, SIZE), (2, SIZE))
    )
    taken = np.array([0.25, 0.125])
    for alpha in (0.0, 0.3, 1.0):
        mixed = (1 - alpha) * at_weights + alpha * answers
        found = cross_gradients.combine(
            alpha,
            *map(tf.constant, (own, at_weights)),
            tf.constant(answers) if alpha else None,
            tf.constant(taken, tf.float32),
        )
        np.testing.assert_allclose(found, 0.625 * own + taken @ mixed)
