"""Private parts of `tf.train.Checkpoint`."""

from collections.abc import Callable
from typing import Any

import keras
from tensorflow.python.checkpoint import restore

# The state of a wrapper has the first name in a `tf.train.Checkpoint`, and had
# the second name in checkpoints of version 0.1.0.
CHECKPOINT_KEY, _FORMER_CHECKPOINT_KEY = "_replica_state", "_checkpointed_state"
CHECKPOINT_KEYS = (CHECKPOINT_KEY, _FORMER_CHECKPOINT_KEY)
_INNER = "inner_optimizer"
# TensorFlow's counter of checkpoints looks like a child of the wrapper if the
# wrapper is the root.
_SAVE_COUNTER = "save_counter"


class CheckpointedAsInner:
    """A part of an optimizer around another one: how checkpoints see it.

    `tf.train.Checkpoint` stores the variables of an object by the names of its
    children. In a checkpoint the children of the wrapper are those of its inner
    optimizer, and a `tf.train.experimental.PythonState` of the wrapper's own.
    So a checkpoint of a plain optimizer fits the wrapper, and the other way
    round. A checkpoint of version 0.1.0 had the wrapper's own variables under
    the names of the inner optimizer's, and the inner optimizer as a child.

    TensorFlow asks for a child by its name alone, and leaves the position of an
    unknown child in `_deferred_dependencies`. Only a position tells which of
    these checkpoints is restored. So every child is unknown at first.
    """

    inner_optimizer: keras.optimizers.Optimizer

    def start_without_state(self) -> None:
        """Starts as if new: what is restored was saved without a wrapper."""

    def checkpoint_children(self) -> dict[str, Any]:
        """Returns the wrapper's own children by their names."""
        return super()._trackable_children()  # type: ignore[misc]

    def _trackable_children(
        self, save_type: str = "checkpoint", **kwargs: Any
    ) -> dict[str, Any]:
        own = super()._trackable_children(save_type, **kwargs)  # type: ignore[misc]
        if save_type != "checkpoint":
            # A SavedModel is written in a graph, where Python can read nothing.
            return {n: c for n, c in own.items() if n != CHECKPOINT_KEY}
        children = dict(
            self.inner_optimizer._trackable_children(save_type, **kwargs)
        )
        if CHECKPOINT_KEY in own:
            children[CHECKPOINT_KEY] = own[CHECKPOINT_KEY]
        return children

    def _lookup_dependency(
        self, name: str, cached_dependencies: dict[str, Any] | None = None
    ) -> Any:
        if cached_dependencies is None:
            return super()._lookup_dependency(name)  # type: ignore[misc]
        return None

    @property
    def _deferred_dependencies(self) -> "_Deferred":
        return _Deferred(super()._deferred_dependencies, self._restore_child)  # type: ignore[misc]

    def _restore_child(
        self, name: str, position: "restore.CheckpointPosition"
    ) -> None:
        """Restores a child of the wrapper from a checkpoint of any kind."""
        checkpoint = position.checkpoint
        node = next(
            checkpoint.object_graph_proto.nodes[i]
            for i, restored in checkpoint.object_by_proto_id.items()
            if restored is self
        )
        saved = {child.local_name for child in node.children}
        inner_children = self.inner_optimizer._trackable_children()
        has_own = CHECKPOINT_KEY in saved
        if not has_own and (
            _FORMER_CHECKPOINT_KEY in saved
            # A custom inner optimizer may itself be around another one.
            or (_INNER in saved and _INNER not in inner_children)
        ):
            own = self.checkpoint_children()
            if name == _FORMER_CHECKPOINT_KEY:
                name = CHECKPOINT_KEY
            pending = super()._deferred_dependencies  # type: ignore[misc]
            child = own.get(name)
        elif name in (CHECKPOINT_KEY, _SAVE_COUNTER):
            pending = super()._deferred_dependencies  # type: ignore[misc]
            child = self.checkpoint_children().get(name)
        else:
            pending = self.inner_optimizer._deferred_dependencies
            child = self.inner_optimizer._lookup_dependency(
                name, inner_children
            )
            if not has_own:
                self._restore_nothing(checkpoint)
        if child is None:
            pending.setdefault(name, []).append(position)
        else:
            position.restore(child)

    def _restore_nothing(self, checkpoint: Any) -> None:
        """Starts without state, once for a checkpoint that has none."""
        if checkpoint.restore_uid == getattr(self, "_started_by", None):
            return
        self._started_by = checkpoint.restore_uid
        self.start_without_state()
        state = self.checkpoint_children().get(CHECKPOINT_KEY)
        if state is not None:
            # So that `assert_existing_objects_matched` counts the state as
            # restored. Numbers of saved objects are never negative.
            checkpoint.object_by_proto_id[-id(state)] = state


class _Deferred:
    """The positions of children that TensorFlow could not find by name."""

    def __init__(
        self,
        pending: dict[str, list["restore.CheckpointPosition"]],
        restore_child: Callable[[str, "restore.CheckpointPosition"], None],
    ) -> None:
        self._pending = pending
        self._restore_child = restore_child

    def setdefault(self, name: str, _: Any) -> "_Positions":
        return _Positions(name, self._restore_child)

    def get(self, name: str, default: Any = None) -> Any:
        return self._pending.get(name, default)

    def pop(self, name: str, default: Any = None) -> Any:
        return self._pending.pop(name, default)


class _Positions:
    """A list of one child's positions, which restores what it gets."""

    def __init__(
        self,
        name: str,
        restore_child: Callable[[str, "restore.CheckpointPosition"], None],
    ) -> None:
        self._name = name
        self._restore_child = restore_child

    def append(self, position: "restore.CheckpointPosition") -> None:
        self._restore_child(self._name, position)
