"""The flat buffer: where in one vector each variable's gradient lies."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import itertools
import math
import os
from typing import Literal
from typing import Self
from typing import TypeAlias

import keras
import tensorflow as tf

from tf_regtopk import selection
from tf_regtopk.kernels import device_kind
from tf_regtopk.steps import missing as missing_lib
from tf_regtopk.steps import variable_rules

# The gradient of a variable, as Keras hands it over; None where there is none.
Gradient: TypeAlias = tf.Tensor | tf.IndexedSlices | None
# Where a sparsifier selects: among all entries, or in each variable.
Scope: TypeAlias = Literal["global", "per_variable"]


@dataclasses.dataclass(frozen=True)
class FlatBuffer:
    """The order, shapes and dtypes of the gradients in one flat vector.

    Args:
        shapes: Tuple of static shapes (tuples of ints), one a variable.
        dtypes: Tuple of the variables' float dtypes.

    Example:

    >>> buffer = FlatBuffer(((2,), ()), (tf.float32, tf.float32))
    >>> gradients = [tf.constant([1.0, 2.0]), tf.constant(3.0)]
    >>> flat = tf.concat(buffer.vectors(gradients), axis=0)
    >>> flat.numpy()
    array([1., 2., 3.], dtype=float32)
    >>> buffer.split(flat)[1].numpy()
    np.float32(3.0)
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[tf.DType, ...]

    @classmethod
    def for_variables(cls, variables: Sequence[keras.Variable]) -> Self:
        """The flat buffer for the gradients of `variables`, in their order.

        Raises:
            ValueError: If they have more entries than an int32 index reaches,
                or numbers that are no floats.
        """
        for v in variables:
            if not tf.as_dtype(v.dtype).is_floating:
                raise ValueError(
                    "The variables whose gradients are exchanged must be of "
                    "floats: give real and imaginary parts variables of their "
                    f"own. Received: {variable_rules.path_of(v)!r} of "
                    f"{tf.as_dtype(v.dtype).name}"
                )
        buffer = cls(
            tuple(tuple(v.shape) for v in variables),
            tuple(tf.as_dtype(v.dtype) for v in variables),
        )
        if buffer.size >= 2**31:
            raise ValueError(
                "Variables that are exchanged as one vector must have fewer "
                "than 2^31 entries in all: name some of them in `dense`, an "
                "argument of `SparsifiedOptimizer`. "
                f"Received: {buffer.size} entries"
            )
        return buffer

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each variable."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """J, the number of entries in all."""
        return sum(self.sizes)

    @property
    def dtype(self) -> tf.DType:
        """float64 if any variable has it, else float32.

        Narrower gradients are accumulated in float32: a small gradient added to
        a large error would otherwise be rounded away.
        """
        return tf.float64 if tf.float64 in self.dtypes else tf.float32

    def first(self, num_variables: int) -> "FlatBuffer":
        """The buffer of the first variables only."""
        return FlatBuffer(
            self.shapes[:num_variables], self.dtypes[:num_variables]
        )

    def groups(
        self, scope: Scope, num_selected: Callable[[int], int]
    ) -> tuple[selection.Group, ...]:
        """The groups of entries in which a sparsifier selects.

        Args:
            scope: `"global"` (one group) or `"per_variable"`.
            num_selected: Function from the size of a group to its k.

        Returns:
            Tuple of `selection.Group`.
        """
        sizes = (self.size,) if scope == "global" else self.sizes
        return tuple(selection.Group(n, num_selected(n)) for n in sizes if n)

    def densify(self, gradients: Sequence[Gradient]) -> list[tf.Tensor | None]:
        """`gradients` with each `tf.IndexedSlices` as a dense tensor.

        Outside of XLA: the number of slices varies from step to step, and XLA
        would compile anew for each.
        """
        return [
            tf.math.unsorted_segment_sum(
                gradient.values, gradient.indices, num_segments=shape[0]
            )
            if isinstance(gradient, tf.IndexedSlices)
            else gradient
            for gradient, shape in zip(gradients, self.shapes, strict=True)
        ]

    def vectors(self, gradients: Sequence[tf.Tensor | None]) -> list[tf.Tensor]:
        """Vectors of which XLA has to make the flat one, by a concatenation.

        One a variable, with zeros where a gradient is None. But with several
        threads of a CPU all in one, by TensorFlow: there XLA's code for a
        concatenation loads beyond the ends of vectors and masks what it finds,
        which takes much longer where no memory is; see
        benchmarks/kernels/flatten.py.
        """
        vectors = [
            tf.zeros([size], self.dtype)
            if gradient is None
            else tf.cast(tf.reshape(gradient, [size]), self.dtype)
            for gradient, size in zip(gradients, self.sizes, strict=True)
        ]
        return [tf.concat(vectors, axis=0)] if _has_threads() else vectors

    def split(self, flat: tf.Tensor) -> list[tf.Tensor]:
        """A flat vector as gradients: a list in the variables' shapes, dtypes.

        Outside of XLA: there slices share the memory of `flat` where they lie
        on the bounds that TensorFlow requires.
        """
        starts = itertools.accumulate(self.sizes, initial=0)
        return [
            _narrow(tf.reshape(tf.slice(flat, [start], [size]), shape), dtype)
            for start, size, shape, dtype in zip(
                starts, self.sizes, self.shapes, self.dtypes, strict=False
            )
        ]

    def missing(
        self, has_gradient: Sequence[bool]
    ) -> missing_lib.Missing | None:
        """The entries of variables without a gradient, or None if all have one.

        Args:
            has_gradient: For each variable whether there is a gradient.

        Returns:
            `Missing` or None.
        """
        if all(has_gradient):
            return None
        runs, start = [], 0
        variables = zip(has_gradient, self.sizes, strict=True)
        for has, run in itertools.groupby(variables, lambda v: v[0]):
            end = start + sum(size for _, size in run)
            if not has:
                runs.append((start, end))
            start = end
        return missing_lib.Missing(self.size, tuple(runs))


def _has_threads() -> bool:
    """Returns True if XLA computes on a CPU with more than one thread."""
    if device_kind.is_gpu():
        return False
    num_threads = tf.config.threading.get_intra_op_parallelism_threads()
    if num_threads == 0 and hasattr(os, "sched_getaffinity"):
        num_threads = len(os.sched_getaffinity(0))
    return (num_threads or os.cpu_count() or 1) > 1


def _narrow(values: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    # The cast saturates because a float16 holds less than the sum may be, and
    # is left out for the same dtype because it would copy.
    if dtype == values.dtype:
        return values
    return tf.saturate_cast(values, dtype)
