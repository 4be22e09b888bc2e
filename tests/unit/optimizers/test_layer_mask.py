"""Layers that only some of the replicas train."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk

# Of three replicas two train the first layer, and all the second one.
MASK = tf_regtopk.LayerMask([["first"], [], []])


class Replicas:
    """Three replicas with variables of two layers, and steps of theirs."""

    def __init__(self, strategy, inner=None, mask=MASK, **kwargs):
        self.strategy = strategy
        rng = np.random.default_rng(0)
        with strategy.scope():
            layers = []
            for name in ("first", "second"):
                with keras.name_scope(name):
                    layers.append(keras.Variable(rng.normal(size=4)))
            self.variables = layers
            self.optimizer = tf_regtopk.DecentralizedOptimizer(
                inner() if inner else keras.optimizers.SGD(0.5),
                **{"topology": tf_regtopk.Complete(), **kwargs},
                layer_mask=mask,
            )
            self.optimizer.build(layers)
        self._step = tf.function(self._take_step, autograph=False)

    def _take_step(self, scale):
        def of_replica():
            replica = tf.distribute.get_replica_context()
            n = replica.num_replicas_in_sync
            i = tf.cast(replica.replica_id_in_sync_group, tf.float32)
            g = scale * tf.cos(tf.range(4.0) + i) / n
            self.optimizer.apply([g, 2 * g], self.variables)

        self.strategy.run(of_replica)

    def step(self, scale):
        """A step with the gradients cos(j + i) of replica i, scaled."""
        self._step(tf.constant(scale))

    def weights(self):
        """`[layers, N, 4]`."""
        return np.array(
            [
                [part.numpy() for part in parts]
                for parts in (
                    self.strategy.experimental_local_results(v.value)
                    for v in self.variables
                )
            ]
        )


def test_the_mean_is_over_those_that_trained(mirrored):
    """W = r mean + (1 - r) W of the first layer, after a step."""
    replicas = Replicas(mirrored(3))
    before = replicas.weights()
    replicas.step(1.0)
    g = np.cos(np.arange(4) + np.arange(3)[:, np.newaxis])
    trained = before - 0.5 * np.stack([g, 2 * g])
    expected = trained.copy()
    expected[0, 0] = before[0, 0]
    after = replicas.weights()
    np.testing.assert_allclose(after, expected, atol=1e-6)
    # To the bit.
    np.testing.assert_array_equal(after[0, 0], before[0, 0])
    replicas.step(0.0)
    mixed = replicas.weights()
    r = 2 / 3
    first = r * trained[0, 1:].mean(axis=0) + (1 - r) * before[0, 0]
    np.testing.assert_allclose(mixed[0], [first] * 3, atol=1e-6)
    second = trained[1].mean(axis=0)
    np.testing.assert_allclose(mixed[1], [second] * 3, atol=1e-6)


def test_an_optimizer_with_momentum_and_decay_leaves_layers_alone(mirrored):
    replicas = Replicas(
        mirrored(3),
        lambda: keras.optimizers.AdamW(0.1, weight_decay=0.1),
        communication_period=10,
    )
    before = replicas.weights()
    for _ in range(3):
        replicas.step(1.0)
    after = replicas.weights()
    np.testing.assert_array_equal(after[0, 0], before[0, 0])
    has_moved = np.abs(after - before).min(axis=-1) > 1e-3
    assert has_moved.tolist() == [[False, True, True], [True] * 3]


def test_a_layer_that_is_not_trained_does_not_count_in_the_norm(mirrored):
    """By which gradients are clipped."""
    g = np.array([np.cos(np.arange(4)), 2 * np.cos(np.arange(4))])
    replicas = Replicas(
        mirrored(3), lambda: keras.optimizers.SGD(1.0, global_clipnorm=0.1)
    )
    before = replicas.weights()
    replicas.step(1.0)
    moved = before - replicas.weights()
    np.testing.assert_allclose(
        moved[1, 0], 0.1 * g[1] / np.linalg.norm(g[1]), atol=1e-6
    )


def test_slices_of_embeddings(mirrored):
    strategy = mirrored(2)
    with strategy.scope():
        table = keras.Variable(np.zeros((3, 2)), name="table")
        optimizer = tf_regtopk.DecentralizedOptimizer(
            keras.optimizers.SGD(1.0),
            tf_regtopk.Ring(),
            layer_mask=tf_regtopk.LayerMask([[], ["table"]]),
        )

    @tf.function(autograph=False)
    def step():
        strategy.run(
            lambda: optimizer.apply(
                [
                    tf.IndexedSlices(
                        tf.ones([1, 2]), tf.constant([1]), tf.constant([3, 2])
                    )
                ],
                [table],
            )
        )

    step()
    first, second = strategy.experimental_local_results(table.value)
    np.testing.assert_array_equal(first, [[0, 0], [-2, -2], [0, 0]])
    np.testing.assert_array_equal(second, np.zeros((3, 2)))


def test_config():
    optimizer = tf_regtopk.DecentralizedOptimizer(
        keras.optimizers.SGD(0.1), layer_mask=MASK
    )
    config = keras.optimizers.serialize(optimizer)
    loaded = keras.optimizers.deserialize(config)
    assert loaded.layer_mask == MASK
    assert hash(loaded.layer_mask) == hash(MASK)
    plain = tf_regtopk.DecentralizedOptimizer(keras.optimizers.SGD(0.1))
    config = keras.optimizers.serialize(plain)
    assert keras.optimizers.deserialize(config).layer_mask is None


@pytest.mark.parametrize(
    "frozen, message",
    [
        ([[], []], "a list for each of the 3 replicas"),
        ([["third"], [], []], r"Received: \['third'\]"),
        # Whole parts of a path.
        ([["firs"], [], []], r"Received: \['firs'\]"),
        ([["first"]] * 3, "nobody trains"),
    ],
)
def test_masks_that_do_not_fit(frozen, message, mirrored):
    with pytest.raises(ValueError, match=message):
        Replicas(mirrored(3), mask=tf_regtopk.LayerMask(frozen))


def test_means_of_gradients_are_refused(mirrored):
    cliques = tf_regtopk.Cliques([[0, 1], [2]], average_gradients=True)
    with pytest.raises(ValueError, match="averages weights only"):
        Replicas(mirrored(3), topology=cliques)


@pytest.mark.parametrize("frozen", [3, "ab", ["ab"], [[1]], [[""]]])
def test_bad_arguments(frozen):
    with pytest.raises(ValueError, match="list of lists of names of layers"):
        tf_regtopk.LayerMask(frozen)


def test_another_type():
    with pytest.raises(TypeError, match="`layer_mask` must be a `LayerMask`"):
        tf_regtopk.DecentralizedOptimizer(
            keras.optimizers.SGD(0.1), layer_mask=[["dense"]]
        )
