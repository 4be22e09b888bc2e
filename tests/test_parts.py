"""The pure parts: codec, sum, residual error and flat buffer."""

import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk
from tf_regtopk import keras_internals
from tf_regtopk import selection
from tf_regtopk.distribute import replica_state
from tf_regtopk.error_feedback import equations
from tf_regtopk.kernels import device_kind
from tf_regtopk.kernels import scatter_sum
from tf_regtopk.kernels import words
from tf_regtopk.selection import kth_largest
from tf_regtopk.steps import flat_buffer


@pytest.mark.parametrize("compiled", [False, True])
def test_sum_is_that_of_the_replicas_in_order(compiled):
    rng = np.random.default_rng(0)
    size, k, num_replicas = 37, 11, 5
    indices = np.stack(
        [rng.permutation(size)[:k] for _ in range(num_replicas)]
    ).astype(np.int32)
    values = rng.standard_normal((num_replicas, k)).astype(np.float32)
    expected = np.zeros(size, np.float32)
    for n in range(num_replicas):
        expected[indices[n]] += values[n]
    for kind in ("CPU", "GPU"):
        with device_kind.compile_for(kind):
            actual = tf.function(scatter_sum.sum_entries, jit_compile=compiled)(
                tf.constant(indices), tf.constant(values), size
            )
        np.testing.assert_array_equal(actual, expected)


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


def test_replica_state(mirrored):
    strategy = mirrored(2)
    with strategy.scope():
        state = replica_state.ReplicaState(
            lambda: ((tf.zeros([2]),), (tf.constant(7),))
        )

    @tf.function
    def step():
        n = tf.distribute.get_replica_context().replica_id_in_sync_group
        (error,), (memory,) = state.variables()
        error.assign_add(tf.fill([2], tf.cast(n + 1, tf.float32)))
        number = words.release(memory.read_value(), tf.int32)
        memory.assign(words.hold(number * n))

    for _ in range(2):
        strategy.run(step)
    (error_0, memory_0), (error_1, memory_1) = state.local_arrays()
    np.testing.assert_array_equal(error_0, [2.0, 2.0])
    np.testing.assert_array_equal(error_1, [4.0, 4.0])
    assert (memory_0, memory_1) == (0, 7)
    assert list(state.replicas) == [0, 1] and state.num_replicas == 2
    [[error], [memory]] = state.initial_arrays()
    state.assign_local([[error_1, memory_1], [error, memory]])
    (error_0, memory_0), (error_1, memory_1) = state.local_arrays()
    np.testing.assert_array_equal(error_0, [4.0, 4.0])
    np.testing.assert_array_equal(error_1, [0.0, 0.0])
    assert (memory_0, memory_1) == (7, 7)


def test_flat_buffer():
    buffer = flat_buffer.FlatBuffer(
        ((2, 2), (), (3,)), (tf.float32, tf.bfloat16, tf.float32)
    )
    assert buffer.sizes == (4, 1, 3)
    assert buffer.size == 8
    assert buffer.dtype == tf.float32
    gradients = [
        tf.constant([[1.0, 2.0], [3.0, 4.0]]),
        tf.constant(5.0, tf.bfloat16),
        tf.constant([6.0, 7.0, 8.0]),
    ]
    flat = tf.concat(buffer.vectors(gradients), axis=0)
    np.testing.assert_array_equal(flat, np.arange(1.0, 9.0))
    for part, gradient in zip(buffer.split(flat), gradients, strict=True):
        assert part.dtype == gradient.dtype
        np.testing.assert_array_equal(part.numpy(), gradient.numpy())


def test_flat_buffer_without_some_gradients():
    buffer = flat_buffer.FlatBuffer(((2,), (1,), (2,)), (tf.float64,) * 3)
    gradients = [None, tf.constant([1.0], tf.float64), None]
    assert buffer.dtype == tf.float64
    flat = tf.concat(buffer.vectors(gradients), axis=0)
    np.testing.assert_array_equal(flat, [0, 0, 1, 0, 0])
    flat = tf.constant([1.0, 2.0, 3.0, 4.0, 5.0], tf.float64)
    for has_gradient, expected in (
        ((False, True, False), [1, 2, -3, 4, 5]),
        ((True, False, False), [-1, -2, 3, 4, 5]),
        ((False, False, False), [1, 2, 3, 4, 5]),
    ):
        missing = buffer.missing(has_gradient)
        np.testing.assert_array_equal(missing.keep(flat, -flat), expected)
        np.testing.assert_array_equal(
            missing.clear(-flat), np.minimum(expected, 0)
        )
        # Vectors with other than J entries are kept as they are.
        old, new = (flat, flat[:1], flat), (-flat, -flat[:1], flat)
        state = missing.keep_state(old, new)
        np.testing.assert_array_equal(state[0], expected)
        assert state[1] is new[1] and state[2] is flat
        indices = tf.constant([0, 2, 4])
        np.testing.assert_array_equal(
            missing.applied(indices, tf.gather(-flat, indices)),
            np.minimum(expected, 0)[[0, 2, 4]],
        )
    assert buffer.missing((True, True, True)) is None


def test_flat_buffer_densifies_slices():
    buffer = flat_buffer.FlatBuffer(((4, 2),), (tf.float32,))
    slices = tf.IndexedSlices(
        tf.constant([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
        tf.constant([3, 0, 3]),
    )
    (dense,) = buffer.densify([slices])
    np.testing.assert_array_equal(dense, [[3, 4], [0, 0], [0, 0], [6, 8]])
    assert buffer.densify([None]) == [None]


def test_more_entries_than_indices():
    variable = types.SimpleNamespace(shape=(2**16, 2**14), dtype="float32")
    flat_buffer.FlatBuffer.for_variables([variable])
    with pytest.raises(ValueError, match="Received: 2147483648 entries"):
        flat_buffer.FlatBuffer.for_variables([variable] * 2)


def test_groups():
    buffer = flat_buffer.FlatBuffer(((2, 5), (), (3,)), (tf.float32,) * 3)
    half = lambda n: max(1, n // 2)  # noqa: E731
    assert buffer.groups("global", half) == (selection.Group(14, 7),)
    assert buffer.groups("per_variable", half) == ((10, 5), (1, 1), (3, 1))
    assert flat_buffer.FlatBuffer((), ()).groups("global", half) == ()


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("comparisons", [1, 1 << 15, 1 << 26])
@pytest.mark.parametrize("num_parts", [32, 50])
def test_kth_largest_by_counting(comparisons, num_parts, dtype, monkeypatch):
    """With narrow and wide digits; keys of all sizes, ties and padding."""
    monkeypatch.setattr(kth_largest, "_COMPARISONS", comparisons)
    # 300 keys are counted in one part, or in 50.
    monkeypatch.setattr(kth_largest, "_PARTS", num_parts)
    largest = np.iinfo(dtype).max
    rng = np.random.default_rng(0)
    keys = (largest * rng.random(300) ** 8).astype(dtype)
    keys[:40], keys[40:90], keys[90:100] = -1, 12345, largest
    ordered = np.sort(keys)[::-1]
    for k in (1, 9, 10, 11, 100, 200, 260):
        threshold, num_ties = kth_largest.kth_largest_by_counting(
            tf.constant(keys), tf.constant(k)
        )
        assert threshold == ordered[k - 1]
        assert num_ties == k - (keys > ordered[k - 1]).sum()
        bound, _ = kth_largest.kth_largest_by_counting(tf.constant(keys), k, 18)
        shift = 8 * np.dtype(dtype).itemsize - 1 - 18
        assert bound == ordered[k - 1] >> shift << shift


def test_a_gpu_that_no_replica_uses_does_not_count(monkeypatch, mirrored):
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda _: ["GPU:0"])
    found = []
    compiled = tf.function(lambda: found.append(device_kind.is_gpu()))
    mirrored(2).run(compiled)
    assert found and not any(found)
    assert device_kind.is_gpu()


def test_replicas_on_gpus_are_recognised(monkeypatch):
    devices = tuple(f"/replica:0/task:0/device:GPU:{i}" for i in range(2))
    strategy = types.SimpleNamespace(
        extended=types.SimpleNamespace(worker_devices=devices)
    )
    monkeypatch.setattr(tf.distribute, "has_strategy", lambda: True)
    monkeypatch.setattr(tf.distribute, "get_strategy", lambda: strategy)
    assert device_kind.is_gpu()


@pytest.mark.parametrize(
    "kind, is_enabled, xla_flags, is_told",
    [
        ("GPU", True, "", True),
        ("GPU", False, "", False),
        ("CPU", True, "", False),
        (
            "GPU",
            True,
            "--xla_gpu_enable_scatter_determinism_expander=true",
            False,
        ),
    ],
)
def test_what_determinism_costs_is_told_when_built(
    kind, is_enabled, xla_flags, is_told, monkeypatch, recwarn
):
    monkeypatch.setattr(
        keras_internals, "is_op_determinism_enabled", lambda: is_enabled
    )
    monkeypatch.setenv("XLA_FLAGS", xla_flags)
    with device_kind.compile_for(kind):
        tf_regtopk.SparsifiedOptimizer(keras.optimizers.SGD()).build(
            [tf.Variable(tf.zeros([9]))]
        )
    told = [w for w in recwarn if "XLA adds entries" in str(w.message)]
    assert len(told) == is_told
