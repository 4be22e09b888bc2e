"""TensorFlow's checkpoints still do what we rely on."""

import pytest
import tensorflow as tf


def test_tensorflow_leaves_the_positions_of_unknown_children(tmp_path):
    found = []

    class Positions:
        def append(self, position):
            found.append(position)

    class Deferred:
        def setdefault(self, *_):
            return Positions()

        def pop(self, _, default):
            return default

    class Unknowing(tf.Module):
        def _lookup_dependency(self, name, cached_dependencies=None):
            if cached_dependencies is None:
                return super()._lookup_dependency(name)
            return None

        @property
        def _deferred_dependencies(self):
            return Deferred()

    saved, restored = tf.Module(), Unknowing()
    saved.a, restored.a = tf.Variable(1.0), tf.Variable(2.0)
    path = tf.train.Checkpoint(child=saved).write(str(tmp_path / "c"))
    status = tf.train.Checkpoint(child=restored).read(path)
    [position] = found
    checkpoint = position.checkpoint
    [node] = [
        checkpoint.object_graph_proto.nodes[number]
        for number, bound in checkpoint.object_by_proto_id.items()
        if bound is restored
    ]
    assert [child.local_name for child in node.children] == ["a"]
    with pytest.raises(AssertionError):
        status.assert_existing_objects_matched()
    position.restore(restored.a)
    assert restored.a.numpy() == 1.0
    assert restored.a._update_uid == checkpoint.restore_uid
    status.assert_existing_objects_matched()
