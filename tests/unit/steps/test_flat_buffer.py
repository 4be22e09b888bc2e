"""Gradients as one vector, and back."""

import types

import numpy as np
import pytest
import tensorflow as tf

from tf_regtopk import selection
from tf_regtopk.kernels import device_kind
from tf_regtopk.steps import flat_buffer


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


@pytest.mark.parametrize(
    "num_threads, num_cpus, kind, num_vectors",
    [(1, 8, "CPU", 2), (2, 1, "CPU", 1), (0, 1, "CPU", 2), (0, 2, "CPU", 1)]
    + [(2, 2, "GPU", 2)],
)
def test_several_threads_of_a_cpu_get_one_vector(
    num_threads, num_cpus, kind, num_vectors, monkeypatch
):
    monkeypatch.setattr(
        tf.config.threading,
        "get_intra_op_parallelism_threads",
        lambda: num_threads,  # 0 if TensorFlow is to choose.
    )
    monkeypatch.setattr(
        flat_buffer.os,
        "sched_getaffinity",
        lambda _: set(range(num_cpus)),
        raising=False,
    )
    buffer = flat_buffer.FlatBuffer(((2,), (1,)), (tf.float32,) * 2)
    with device_kind.compile_for(kind):
        vectors = buffer.vectors([tf.constant([1.0, 2.0]), None])
    assert len(vectors) == num_vectors
    np.testing.assert_array_equal(tf.concat(vectors, axis=0), [1, 2, 0])


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
