"""Variables without a gradient, in a flat vector."""

from collections.abc import Sequence
import dataclasses

import tensorflow as tf

from tf_regtopk.kernels import ranges


@dataclasses.dataclass(frozen=True)
class Missing:
    """The entries of a flat vector whose variables have no gradient.

    Args:
        size: J.
        runs: Tuple of `(start, end)`, runs of such entries.

    Example:

    >>> missing = Missing(size=4, runs=((1, 3),))
    >>> missing.clear(tf.constant([1.0, 2.0, 3.0, 4.0])).numpy()
    array([1., 0., 0., 4.], dtype=float32)
    """

    size: int
    runs: tuple[tuple[int, int], ...]

    def clear(self, flat: tf.Tensor) -> tf.Tensor:
        """A vector `[J]` with zeros in place of these entries."""
        return self.keep(tf.zeros_like(flat), flat)

    def keep(self, kept: tf.Tensor, flat: tf.Tensor) -> tf.Tensor:
        """A vector `[J]` with those of `kept` in place of these entries."""
        # `start` is 0, but depends on `flat`, see `range_from`.
        start = tf.cast(flat[0] != flat[0], tf.int32) * 0
        position = ranges.range_from(start, self.size)
        return tf.where(self.covers(position), kept, flat)

    def keep_state(
        self, old: Sequence[tf.Tensor], new: Sequence[tf.Tensor]
    ) -> tuple[tf.Tensor, ...]:
        """State in which these entries stay as they were.

        Args:
            old: Tuple of tensors, those `[J]` with an entry a parameter.
            new: Tuple of their successors.

        Returns:
            Tuple of tensors.
        """
        return tuple(
            after
            if after is before or after.shape != [self.size]
            else self.keep(before, after)
            for before, after in zip(old, new, strict=True)
        )

    def applied(self, indices: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
        """Values `[k]`, 0 where nothing is applied of what was sent.

        A codec may decode the zeros of a missing gradient as other values.
        """
        return tf.where(self.covers(indices), tf.zeros_like(values), values)

    def covers(self, positions: tf.Tensor) -> tf.Tensor:
        """Returns a bool tensor, True where one of these entries is."""
        is_missing = tf.zeros_like(positions, tf.bool)
        for start, end in self.runs:
            is_missing |= (positions >= start) & (positions < end)
        return is_missing
