"""Payloads in a step: what is not delivered stays in the error."""

import flat_gradients
import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
import wire_models

import tf_regtopk
from tf_regtopk.codecs import index_codecs
from tf_regtopk.distribute import collectives
from tf_regtopk.kernels import words


def errors(optimizer):
    """`[N, J]`: the residual error of each replica."""
    replicas = optimizer.save_state().replicas
    return np.stack([replicas[n][0] for n in sorted(replicas)])


SPARSIFIERS = {
    "topk": tf_regtopk.TopK(0.2),
    "regtopk": tf_regtopk.RegTopK(0.2, mu=1.5),
    "dense": tf_regtopk.Dense(),
}


@pytest.mark.parametrize(
    "codec, sparsifier, num_replicas",
    [
        ("golomb, ternary", "topk", 3),
        pytest.param("bitmap, bfloat16", "topk", 2, marks=pytest.mark.slow),
        pytest.param("default", "topk", 2, marks=pytest.mark.slow),
        ("golomb, natural", "regtopk", 2),
        pytest.param("uniform", "regtopk", 3, marks=pytest.mark.slow),
        ("uniform", "dense", 2),
        pytest.param("default", "dense", 2, marks=pytest.mark.slow),
    ],
)
def test_errors_keep_what_was_not_delivered(
    codec, sparsifier, num_replicas, mirrored
):
    """Each step: sum of what was delivered + errors = sum of a, entry by entry.

    And what was delivered is what the codec makes of each replica's entries,
    with rounding that is fresh for each step and replica.
    """
    optimizer, variables = wire_models.make(
        mirrored(num_replicas),
        sparsifier=SPARSIFIERS[sparsifier],
        codec=wire_models.CODECS[codec],
    )
    take_step = flat_gradients.step_function(
        mirrored(num_replicas), optimizer, variables
    )
    k = SPARSIFIERS[sparsifier].num_selected(wire_models.SIZE)
    payload_codec = optimizer.codec.payload(k, wire_models.SIZE)
    rng = np.random.default_rng(0)
    before, weights = errors(optimizer), flat_gradients.flat_weights(variables)
    for step in range(4):
        g = rng.standard_normal((num_replicas, wire_models.SIZE)).astype(
            np.float32
        )
        a = before + g
        take_step(g)
        after = errors(optimizer)
        delivered = np.zeros(wire_models.SIZE)
        for n in range(num_replicas):
            [indices] = np.nonzero(after[n] != a[n])
            if sparsifier == "dense":
                indices = np.arange(wire_models.SIZE)
            elif sparsifier == "topk":
                expected = reference.largest(np.abs(a[n]), k)
                assert set(indices) <= set(expected)
                indices = expected
            if len(indices) < k:  # Of RegTop-k, some rounded to 0.
                pytest.fail("cannot tell what was sent")
            _, sent = payload_codec.encode(
                tf.constant(indices, tf.int32),
                tf.constant(a[n][indices]),
                (step, n),
            )
            expected = a[n].copy()
            expected[indices] -= sent
            if codec == "golomb, ternary":  # The order of the sum may differ.
                np.testing.assert_allclose(after[n], expected, atol=1e-6)
            else:
                assert after[n].tobytes() == expected.tobytes()
            delivered[indices] += sent
        new_weights = flat_gradients.flat_weights(variables)
        np.testing.assert_allclose(
            weights - new_weights, delivered, rtol=1e-6, atol=1e-6
        )
        before, weights = after, new_weights


def test_quantised_gradients_without_feedback(mirrored):
    """QSGD: whole gradients, unbiased, and nothing is remembered."""
    optimizer, variables = wire_models.make(
        mirrored(2),
        sparsifier=tf_regtopk.Dense(),
        codec=tf_regtopk.Codec(values="natural"),
        error_feedback=tf_regtopk.NoFeedback(),
    )
    take_step = flat_gradients.step_function(mirrored(2), optimizer, variables)
    g = (
        np.random.default_rng(0)
        .standard_normal((2, wire_models.SIZE))
        .astype(np.float32)
    )
    steps = 300
    for _ in range(steps):
        take_step(g)
    assert optimizer.save_state().replicas == {0: [], 1: []}
    mean = -flat_gradients.flat_weights(variables) / steps
    # At most 1/8 of the square of each value is variance.
    bound = 5 * np.sqrt((g**2 / 8).sum(axis=0) / steps)
    assert (np.abs(mean - g.sum(axis=0)) < bound).all()
    assert np.abs(mean - g.sum(axis=0)).max() > 1e-4


@pytest.mark.parametrize(
    "indices, num_replicas", [("elias_fano", 2), ("golomb", 3)]
)
def test_a_corrupted_payload_raises_and_changes_nothing(
    indices, num_replicas, mirrored, monkeypatch
):
    strategy = mirrored(num_replicas)
    optimizer, variables = wire_models.make(
        strategy,
        sparsifier=tf_regtopk.RegTopK(0.1),
        codec=tf_regtopk.Codec(indices),
    )
    gather = collectives.all_gather
    is_corrupt = tf.Variable(False)

    def corrupt(*args):
        payloads = words.release(gather(*args), tf.int32)
        # The last words of the last replica: high indices.
        noise = tf.one_hot(num_replicas - 1, num_replicas, 1, 0, dtype=tf.int32)
        noise = noise[:, tf.newaxis]
        noise *= tf.one_hot(payloads.shape[1] - 1, payloads.shape[1], -1, 0)
        flipped = tf.bitwise.bitwise_xor(payloads, noise)
        return words.hold(tf.where(is_corrupt, flipped, payloads))

    monkeypatch.setattr(collectives, "all_gather", corrupt)
    take_step = flat_gradients.step_function(strategy, optimizer, variables)
    g = np.random.default_rng(0).standard_normal(
        (num_replicas, wire_models.SIZE)
    )
    take_step(g)
    before = errors(optimizer), flat_gradients.flat_weights(variables)
    is_corrupt.assign(True)
    with pytest.raises(
        tf.errors.InvalidArgumentError, match="Every payload must hold"
    ):
        take_step(g)
    assert errors(optimizer).tobytes() == before[0].tobytes()
    assert (
        flat_gradients.flat_weights(variables).tobytes() == before[1].tobytes()
    )
    assert optimizer.iterations.numpy() == 1
    is_corrupt.assign(False)
    take_step(g)
    assert optimizer.iterations.numpy() == 2


@pytest.mark.parametrize("num_used", [0, -100])
def test_payloads_of_false_length(num_used, mirrored, monkeypatch):
    """A replica says that it has sent less than it has to.

    Two replicas, which exchange by a collective, send payloads of full length.
    """
    optimizer, variables = wire_models.make(
        mirrored(3),
        sparsifier=tf_regtopk.TopK(0.1),
        codec=tf_regtopk.Codec("golomb"),
    )
    monkeypatch.setattr(
        index_codecs.Golomb, "num_used", lambda *_: tf.constant(num_used)
    )
    with pytest.raises(
        tf.errors.InvalidArgumentError, match="Every payload must hold"
    ):
        flat_gradients.step_function(mirrored(3), optimizer, variables)(
            np.ones((3, wire_models.SIZE))
        )
    assert not flat_gradients.flat_weights(variables).any()


def test_what_a_code_makes_of_a_missing_gradient_is_not_remembered():
    """Nothing of it is applied; so it was not cancelled by others either."""
    for values in ("float32", "ternary", "sign"):
        variables = [tf.Variable(tf.zeros([n])) for n in (9, 7)]
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(1.0),
            tf_regtopk.RegTopK(0.5),
            codec=tf_regtopk.Codec(values=values),
            scope="per_variable",
        )
        optimizer.apply([tf.range(1.0, 10.0), None], variables)
        np.testing.assert_array_equal(variables[1], np.zeros(7))
        optimizer.apply([tf.zeros([9]), tf.range(7.0)], variables)
        np.testing.assert_array_equal(variables[1] != 0, np.arange(7) > 2)
