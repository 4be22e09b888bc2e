"""Zeros of run time: what depends on them is no literal of the program."""

import re

import numpy as np
import pytest
import tensorflow as tf

from tf_regtopk.kernels import bitmap
from tf_regtopk.kernels import ranges

SIZE = 1 << 16


def from_opaque_zero(number):
    return ranges.range_from(ranges.opaque_zero(number), SIZE)


def runs_from_run_time_zero(number):
    starts = tf.constant([5, 700]) + ranges.run_time_zero(number)
    return bitmap.run_of_each(starts, SIZE)


@pytest.mark.parametrize(
    "function, stages",
    [
        # XLA knows that this 0 is one, but a range of it stays an operation.
        (from_opaque_zero, ["hlo"]),
        (runs_from_run_time_zero, ["hlo", "optimized_hlo"]),
    ],
)
def test_program_holds_no_literal_of_the_results_size(function, stages):
    compiled = tf.function(function, jit_compile=True, autograph=False)
    program = compiled.experimental_get_compiler_ir(tf.constant(7))
    for stage in stages:
        text = program(stage=stage)
        assert f"[{SIZE}]" in text
        literals = re.findall(r"\[([\d,]+)\]\S* constant\(", text)
        sizes = [np.prod([*map(int, dims.split(","))]) for dims in literals]
        assert max(sizes, default=0) < SIZE // 8, stage


@pytest.mark.parametrize("number", [0, 1, 7, 2**31 - 1])
def test_zeros_are_zero(number):
    for zero in (ranges.opaque_zero, ranges.run_time_zero):
        for dtype in (tf.int32, tf.int64):
            actual = zero(tf.constant(number, dtype))
            assert actual.dtype == tf.int32 and actual.numpy() == 0


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 5000])
def test_range_from(size):
    actual = ranges.range_from(tf.constant(-3), size)
    np.testing.assert_array_equal(actual, np.arange(-3, size - 3))
