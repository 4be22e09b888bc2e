"""The flat buffer: where in one vector each variable's gradient lies."""

import dataclasses
import functools
import itertools
import math

import tensorflow as tf

from tf_regtopk import selection


@dataclasses.dataclass(frozen=True)
class FlatBuffer:
    """The order, shapes and dtypes of the gradients in one flat vector.

    Args:
        shapes: Tuple of static shapes (tuples of ints), one a variable.
        dtypes: Tuple of the variables' float dtypes.

    Example:

    >>> buffer = FlatBuffer(((2,), ()), (tf.float32, tf.float32))
    >>> flat = buffer.flatten([tf.constant([1.0, 2.0]), tf.constant(3.0)])
    >>> flat.numpy()
    array([1., 2., 3.], dtype=float32)
    >>> buffer.split(flat)[1].numpy()
    np.float32(3.0)
    """

    shapes: tuple
    dtypes: tuple

    @classmethod
    def for_variables(cls, variables):
        """The flat buffer for the gradients of `variables`, in their order.

        Raises:
            ValueError: If they have more entries than an int32 index reaches.
        """
        buffer = cls(
            tuple(tuple(v.shape) for v in variables),
            tuple(tf.as_dtype(v.dtype) for v in variables),
        )
        if buffer.size >= 2**31:
            raise ValueError(
                "The variables exchanged sparsely must have fewer than 2^31 "
                f"entries in all. Received: {buffer.size} entries"
            )
        return buffer

    @functools.cached_property
    def sizes(self):
        """Number of entries of each variable."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def size(self):
        """J, the number of entries in all."""
        return sum(self.sizes)

    @property
    def dtype(self):
        """float64 if any variable has it, else float32.

        Narrower gradients are accumulated in float32: a small gradient added to
        a large error would otherwise be rounded away.
        """
        return tf.float64 if tf.float64 in self.dtypes else tf.float32

    def groups(self, scope, num_selected):
        """The groups of entries in which a sparsifier selects.

        Args:
            scope: `"global"` (one group) or `"per_variable"`.
            num_selected: Function from the size of a group to its k.

        Returns:
            Tuple of `selection.Group`.
        """
        sizes = (self.size,) if scope == "global" else self.sizes
        return tuple(selection.Group(n, num_selected(n)) for n in sizes if n)

    def densify(self, gradients):
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

    def flatten(self, gradients):
        """One vector `[J]` of all gradients; zeros where one is None."""
        return tf.concat(
            [
                tf.zeros([size], self.dtype)
                if gradient is None
                else tf.cast(tf.reshape(gradient, [size]), self.dtype)
                for gradient, size in zip(gradients, self.sizes, strict=True)
            ],
            axis=0,
        )

    def split(self, flat):
        """The inverse of `flatten`: a list in the variables' shapes, dtypes.

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

    def clear_missing(self, flat, gradients):
        """`flat` with zeros in place of variables whose gradient is None."""
        return self.keep_missing(tf.zeros_like(flat), flat, gradients)

    def keep_missing(self, kept, flat, gradients):
        """`flat`, but `kept` where the gradient of a variable is None."""
        if not any(gradient is None for gradient in gradients):
            return flat
        return tf.concat(
            [
                kept_part if gradient is None else part
                for kept_part, part, gradient in zip(
                    tf.split(kept, self.sizes),
                    tf.split(flat, self.sizes),
                    gradients,
                    strict=True,
                )
            ],
            axis=0,
        )

    def keep_missing_state(self, old, new, gradients):
        """As `keep_missing`, for each of a list of tensors.

        Args:
            old: List of tensors, those `[J]` with an entry a parameter.
            new: List of their successors, None where one stays.
            gradients: List of gradients, of which some may be None.

        Returns:
            List of tensors or None.
        """
        return [
            after
            if after is None or after.shape != [self.size]
            else self.keep_missing(before, after, gradients)
            for before, after in zip(old, new, strict=True)
        ]


def _narrow(values, dtype):
    # A float16 holds less than the sum may be.  (To the same dtype it would
    # copy.)
    if dtype == values.dtype:
        return values
    return tf.saturate_cast(values, dtype)
