"""What workers gather, in the order of their numbers."""

import numpy as np
import tensorflow as tf

from tf_regtopk.distribute import collectives


def test_rows_are_in_the_order_of_the_workers(monkeypatch):
    """TensorFlow puts task 10 before task 2, as names are sorted."""
    names = sorted(range(12), key=str)
    rows = [[worker, 10 * worker] for worker in names for _ in range(2)]
    monkeypatch.setattr(
        collectives, "_gather_numbers", lambda _: tf.constant(rows)
    )
    gathered = collectives.gather_from_workers(
        [0], tf.distribute.get_strategy()
    )
    np.testing.assert_array_equal(
        gathered, [[10 * worker] for worker in range(12) for _ in range(2)]
    )
