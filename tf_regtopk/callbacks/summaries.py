"""Scalars and images in the files that TensorBoard reads.

Written by `tf.summary.write`, because `tf.summary.scalar` and
`tf.summary.image` need the package of TensorBoard, which a machine that trains
may lack.
"""

from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

# The least size of a cell of a heat map, in pixels.
_CELL = 8


class Writer:
    """Writes numbers of a training to a folder.

    Args:
        log_dir: Path of the folder, which TensorBoard takes as `--logdir`.
    """

    def __init__(self, log_dir: str) -> None:
        self._writer = tf.summary.create_file_writer(log_dir)

    def scalars(self, numbers: Mapping[str, float], step: int) -> None:
        """Writes numbers by their names."""
        with self._writer.as_default():
            for name, number in numbers.items():
                tf.summary.write(
                    name,
                    tf.constant(number, tf.float32),
                    step,
                    _metadata("scalars", data_class=1),
                )

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Writes an image, of uint8 `[height, width]`."""
        height, width = pixels.shape
        png = tf.io.encode_png(pixels[..., np.newaxis])
        with self._writer.as_default():
            tf.summary.write(
                name,
                tf.stack([str(width), str(height), png]),
                step,
                _metadata("images", data_class=3),
            )

    def flush(self) -> None:
        """Makes TensorBoard see what has been written."""
        self._writer.flush()

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()


def heat_map(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Draws numbers over time: a row for each, a column for each moment.

    Args:
        columns: List of float arrays of one length.

    Returns:
        uint8 array `[height, width]`, white where a number is the largest.

    Example:

    >>> heat_map([np.array([1.0, 0.5]), np.array([0.0, 0.0])])[::8, ::8]
    array([[255,   0],
           [127,   0]], dtype=uint8)
    """
    rows = np.nan_to_num(np.stack(columns, axis=1), posinf=0.0)
    largest = max(float(rows.max()), 1e-30)
    pixels = (255 * rows / largest).astype(np.uint8)
    return np.kron(pixels, np.ones([_CELL, _CELL], np.uint8))


def _metadata(
    plugin_name: str, data_class: int
) -> tf.compat.v1.SummaryMetadata:
    """Metadata by which TensorBoard shows a number or an image."""
    plugin = tf.compat.v1.SummaryMetadata.PluginData(plugin_name=plugin_name)
    return tf.compat.v1.SummaryMetadata(
        plugin_data=plugin, data_class=data_class
    )
