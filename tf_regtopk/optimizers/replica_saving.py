"""The part of `SparsifiedOptimizer` that saves and loads."""

import abc
from collections.abc import Callable
from collections.abc import Sequence
import itertools
from typing import Any
from typing import Literal

import keras
import tensorflow as tf

from tf_regtopk import error_feedback as error_feedback_lib
from tf_regtopk import keras_internals
from tf_regtopk import sparsifiers
from tf_regtopk.distribute import replica_state
from tf_regtopk.distribute import topology as topology_lib
from tf_regtopk.optimizers import wrapper
from tf_regtopk.saving import layouts
from tf_regtopk.saving import resuming
from tf_regtopk.saving import saved_config
from tf_regtopk.saving import saved_state
from tf_regtopk.saving import worker_files
from tf_regtopk.steps import layout as layout_lib
from tf_regtopk.steps import local_accumulation
from tf_regtopk.steps import partition as partition_lib


class ReplicaSaving(wrapper.OptimizerWrapper):
    """Saves and loads what a `Partition` and a `LocalAccumulation` keep.

    A subclass creates these two in `_create_state`.
    """

    sparsifier: sparsifiers.Sparsifier
    error_feedback: error_feedback_lib.ErrorFeedback
    exchange: Literal["sparse", "dense", "auto"]
    topology: topology_lib.Topology
    _partition: partition_lib.Partition
    _accumulation: local_accumulation.LocalAccumulation | None

    @property
    @abc.abstractmethod
    def density(self) -> float | None:
        """The share of the entries that is sent."""

    @property
    @abc.abstractmethod
    def chosen_exchange(self) -> layout_lib.Exchange | None:
        """The kind of exchange in force."""

    @abc.abstractmethod
    def set_density(self, density: float) -> None:
        """Sends another share of the entries from the next step on."""

    @abc.abstractmethod
    def _new_partition(
        self, kind: layout_lib.Exchange, variables: Sequence[keras.Variable]
    ) -> partition_lib.Partition:
        """Creates a `Partition` with the optimizer's parts."""

    @abc.abstractmethod
    def _change(self, change: Callable[[], None]) -> None:
        """Changes what a step does, for functions that are traced anew."""

    def save_state(self) -> saved_state.SavedState:
        """The state of this process's replicas, as a `SavedState`."""
        state, memory = self._states()
        num_local = len(state.dtypes[0])
        kept = state.local_arrays()
        return saved_state.SavedState(
            layout=self._layout_of(self._partition),
            moment=self.moment,
            num_replicas=state.num_replicas,
            replicas={
                n: [*arrays[:num_local], *remembered]
                for n, arrays, remembered in zip(
                    state.replicas, kept, memory.local_arrays(), strict=True
                )
            },
            shared=kept[0][num_local:],
            accumulated=self._accumulation.save(state.replicas)
            if self._accumulation
            else {},
        )

    def load_state(self, saved: saved_state.SavedState) -> None:
        """Loads a `SavedState`, or raises and changes nothing."""
        resuming.check_replicas(saved)
        partition = self._partition_for(saved)
        layout = self._layout_of(partition)
        layouts.check_layout(self._completed(saved.layout, layout), layout)
        state = partition.feedback_state
        # Older ones could not have another than the sparsifier's.
        density = saved.moment.get("density", partition.layout.default_density)
        local, *other_parts = state.initial_arrays()
        shared = [*itertools.chain(*other_parts)]
        initial_memory = [
            p.numpy() for p in partition.layout.initial_memory(density)
        ]
        ranks = state.replicas, state.num_replicas
        complete = worker_files.complete(saved, *ranks)
        replicas = resuming.state_of_replicas(
            complete,
            *ranks,
            local,
            shared,
            initial_memory,
        )
        split = len(local) + len(shared)
        factor = self.loss_scale_factor
        if saved.shared is None and factor != 1:
            # Version 0.1.0 kept errors of the scaled loss.
            replicas = [
                [(p / factor).astype(p.dtype) for p in parts[:split]]
                + parts[split:]
                for parts in replicas
            ]
        resuming.check_state(
            replicas, [*local, *shared, *initial_memory], split
        )
        for parts in replicas:
            partition.layout.check_memory(parts[split:])
        if self._accumulation:
            load_accumulated = self._accumulation.prepare(complete, *ranks)
        else:
            local_accumulation.check_saved(saved, num_batches=1)
        # All is checked before anything is assigned.
        if partition is not self._partition:
            self._change(lambda: setattr(self, "_partition", partition))
        if density != self.density:
            self.set_density(density)
        state, memory = self._states()
        state.assign_local([parts[:split] for parts in replicas])
        memory.assign_local([parts[split:] for parts in replicas])
        if self._accumulation:
            load_accumulated()

    def _clear_state(self) -> None:
        state, memory = self._states()
        for part in (state, memory):
            arrays = list(itertools.chain(*part.initial_arrays()))
            part.assign_local([arrays] * len(part.replicas))
        if self._accumulation:
            self._accumulation.clear()

    def _states(
        self,
    ) -> tuple[replica_state.ReplicaState, replica_state.ReplicaState]:
        partition = self._partition
        return partition.feedback_state, partition.memory

    def _partition_for(
        self, saved: saved_state.SavedState
    ) -> partition_lib.Partition:
        """The partition of the exchange by which the saved run went."""
        candidates: tuple[str | None, ...] = (self.chosen_exchange,)
        if self.exchange == "auto":
            candidates = layout_lib.candidates(self.topology)
        kind = saved.moment.get("exchange", "sparse")
        if kind == "all_gather" and kind not in candidates:
            # The state is the same, and the topology that is given counts.
            kind = "sparse"
        if kind == self.chosen_exchange:
            return self._partition
        if kind not in candidates:
            raise ValueError(
                f'`exchange` must be "auto" or "{kind}" to load what was saved '
                f'with exchange="{kind}". Received: exchange="{self.exchange}"'
            )
        with tf.init_scope(), keras_internals.strategy_of(self).scope():
            return self._new_partition(kind, self._trainable_variables)

    @property
    def moment(self) -> dict[str, Any]:
        """Tells steps and runs apart: all workers agree in it."""
        return {
            "step": int(self._iterations.numpy()),
            "density": self.density,
            "exchange": self.chosen_exchange,
            "weights": saved_state.checksum(
                variable.numpy() for variable in self._trainable_variables
            ),
            **local_accumulation.moment_of(self._accumulation),
        }

    def _layout_of(self, partition: partition_lib.Partition) -> dict[str, Any]:
        """Returns the facts in which a saved state must agree to fit."""
        return {
            **partition.layout.facts(),
            **{
                name: saved_config.describe(record)
                for name, record in self._compared_records().items()
            },
        }

    def _completed(
        self, layout: dict[str, Any], own: dict[str, Any]
    ) -> dict[str, Any]:
        """The layout of a file of any version, to compare with one's own."""
        # Files of earlier versions lack these.
        missing = {layouts.DENSE_VARIABLES, layouts.DENSITIES} - {*layout}
        return {
            **layout,
            **{name: own[name] for name in missing},
            **{
                name: saved_config.complete(layout[name], record)
                for name, record in self._compared_records().items()
                if name in layout
            },
        }

    def _compared_records(self) -> dict[str, Any]:
        return {
            "sparsifier": self.sparsifier,
            "error_feedback": self.error_feedback,
        }
