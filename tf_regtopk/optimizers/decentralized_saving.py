"""The part of `DecentralizedOptimizer` that saves and loads."""

import abc
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import MutableMapping
from collections.abc import Sequence
import contextlib
from typing import Any

import keras
import numpy as np

from tf_regtopk import error_feedback as error_feedback_lib
from tf_regtopk import keras_internals
from tf_regtopk.distribute import mixing
from tf_regtopk.distribute import mixing_rules
from tf_regtopk.distribute import replica_state
from tf_regtopk.log import logger
from tf_regtopk.optimizers import decentralized_checks as checks
from tf_regtopk.optimizers import wrapper
from tf_regtopk.saving import layouts
from tf_regtopk.saving import replica_variables
from tf_regtopk.saving import resuming
from tf_regtopk.saving import saved_config
from tf_regtopk.saving import saved_state
from tf_regtopk.saving import worker_files
from tf_regtopk.steps import cross_gradients as cross_gradients_lib
from tf_regtopk.steps import gossip

# In Keras's file of several replicas, in place of what they keep.
_NUM_REPLICAS = "num_replicas"


class DecentralizedSaving(wrapper.OptimizerWrapper):
    """Saves and loads what each replica keeps.

    Of several replicas a `SavedState` has for each replica the optimizer's
    variables, the count of gradients taken as 0, and what a `Gossip` keeps. The
    weights belong to the model, and `Backup` saves them beside it. Keras's
    files have room for one replica: of several they have the weights alone.

    A subclass creates in `_create_state` what is declared here.
    """

    topology: mixing.MixingTopology
    error_feedback: error_feedback_lib.ErrorFeedback
    mixing_rule: mixing_rules.MixingRule
    cross_gradients: cross_gradients_lib.CrossGradients | None
    _num_replicas: int
    _gossip: gossip.Gossip | None
    _zeroed: replica_state.ReplicaState
    # The step at which all replicas' weights were noted, and their checksum.
    _noted_at: int | None = None
    _noted_weights: int = 0
    # Whether what each replica keeps is saved and loaded beside Keras's file.
    _is_saved_apart: bool = False

    @property
    @abc.abstractmethod
    def replicas_agree(self) -> bool:
        """True if all replicas are known to have the same weights."""

    @abc.abstractmethod
    def note_agreement(self, agrees: bool) -> None:
        """Notes that all replicas were given the same weights, or their own."""

    @property
    def has_own_weights(self) -> bool:
        """True if there are several replicas, each with its own weights."""
        return self._num_replicas > 1

    @property
    def trained_variables(self) -> list[keras.Variable]:
        """The weights that the optimizer changes."""
        return [*self._trainable_variables]

    @contextlib.contextmanager
    def saved_apart(self) -> Iterator[None]:
        """Lets Keras save and load without a word on what replicas keep.

        `Backup` saves and loads in such a block, and by `save_state` and
        `load_state` what each replica keeps.
        """
        self._is_saved_apart = True
        try:
            yield
        finally:
            self._is_saved_apart = False

    def save_own_variables(
        self, store: MutableMapping[str, np.ndarray]
    ) -> None:
        if not self.built or self._num_replicas == 1:
            super().save_own_variables(store)
            return
        store[_NUM_REPLICAS] = np.array(self._num_replicas)
        if self._is_saved_apart:
            return
        # No error, because Keras has emptied the file by now.
        if not self.replicas_agree:
            logger.warning(
                "THE FILE HOLDS THE WEIGHTS OF ONE REPLICA of '%s', and the "
                "others have weights of their own. Save in `with "
                "tf_regtopk.averaged(model):`, or after a `fit` with "
                "`average_at_end`",
                self.name,
            )
        logger.info(
            "What each replica of '%s' keeps is not saved: training will go on "
            "from the weights with a new optimizer. To resume to the bit train "
            "with `tf_regtopk.Backup`",
            self.name,
        )

    def load_own_variables(self, store: Mapping[str, np.ndarray]) -> None:
        if _NUM_REPLICAS not in store.keys():  # noqa: SIM118
            super().load_own_variables(store)
        elif not self._is_saved_apart:
            logger.warning(
                "The file has the weights, but not what each replica of '%s' "
                "kept: training goes on with a new optimizer",
                self.name,
            )

    def state_for_checkpoint(self) -> saved_state.SavedState:
        if self._num_replicas > 1:
            raise checks.cannot_checkpoint()
        return super().state_for_checkpoint()

    def save_state(self) -> saved_state.SavedState:
        """The state of this process's replicas, but for the weights."""
        kept = self._kept_arrays()
        if self._num_replicas > 1:
            strategy = keras_internals.strategy_of(self)
            of_replicas = replica_variables.read(self.variables, strategy)
            kept = [
                [*variables, *others]
                for variables, others in zip(of_replicas, kept, strict=True)
            ]
        # A single replica's weights are those of the file.
        moment = self.moment if self.has_own_weights else self._moment_of_one()
        return saved_state.SavedState(
            self._layout(),
            moment,
            self._num_replicas,
            dict(zip(self._zeroed.replicas, kept, strict=True)),
        )

    def load_state(self, saved: saved_state.SavedState) -> None:
        """Loads a `SavedState`, or raises and changes nothing.

        What another number of replicas has saved goes to all replicas alike:
        the means of the optimizer's variables. The gossip then starts anew from
        the weights, which the replicas must have by then.
        """
        resuming.check_replicas(saved)
        is_same = saved.num_replicas == self._num_replicas
        self._check_layout(saved.layout, is_same)
        ranks = self._zeroed.replicas
        saved = worker_files.complete(saved, ranks, self._num_replicas)
        # A single replica's are in Keras's file or in the checkpoint.
        variables = self.variables if saved.num_replicas > 1 else []
        values = replica_variables.values_for(
            saved, ranks, self._num_replicas, variables
        )
        if is_same:
            kept = [saved.replicas[n][len(variables) :] for n in ranks]
            self._check_kept(kept)
        # All is checked before anything is assigned.
        strategy = keras_internals.strategy_of(self)
        replica_variables.assign(variables, strategy, values)
        if is_same:
            self._assign_kept(kept)
        else:
            logger.warning(
                "The number of replicas of '%s' was %d and is %d now: all "
                "start from the mean of the weights and of the optimizer's "
                "variables; what neighbours have told each other is dropped",
                self.name,
                saved.num_replicas,
                self._num_replicas,
            )
            self._clear_state()
        self._noted_at = None
        if max(saved.num_replicas, self._num_replicas) > 1:
            self._noted_at = saved.moment["step"]
            self._noted_weights = saved.moment["weights"]
        # Otherwise nobody knows yet, and it is found out when needed.
        self.note_agreement(not is_same and saved.num_replicas > 1)

    def _kept_arrays(self) -> list[list[np.ndarray]]:
        """For each replica of this process what is in no Keras variable."""
        zeroed = self._zeroed.local_arrays()
        if self._gossip is None:
            return zeroed
        return [
            [*count, *kept]
            for count, kept in zip(zeroed, self._gossip.save(), strict=True)
        ]

    def _check_kept(self, values: Sequence[Sequence[np.ndarray]]) -> None:
        initial = self._kept_arrays()[0]
        for arrays in values:
            resuming.check_state([arrays], initial, len(initial))

    def _assign_kept(self, values: Sequence[Sequence[np.ndarray]]) -> None:
        self._zeroed.assign_local([arrays[:1] for arrays in values])
        if self._gossip is not None:
            self._gossip.load([arrays[1:] for arrays in values])

    def _clear_state(self) -> None:
        self._zeroed.assign_local([[0]] * len(self._zeroed.replicas))
        if self._gossip is not None:
            self._gossip.clear()

    def note_weights(self, checksums: Sequence[int]) -> None:
        """Notes the weights of all replicas at this step.

        Args:
            checksums: List of integers, one for each replica of all workers.
        """
        self._noted_at = int(self._iterations.numpy())
        self._noted_weights = saved_state.checksum(
            [np.array(checksums, np.int64)]
        )

    @property
    def moment(self) -> dict[str, Any]:
        """Tells steps and runs apart: all workers agree in it.

        Of several replicas "weights" is of those noted at this step, or 0.
        """
        step = int(self._iterations.numpy())
        if self._noted_at == step:
            return {"step": step, "weights": self._noted_weights}
        if self._num_replicas == 1:
            return self._moment_of_one()
        return {"step": step, "weights": 0}

    def _moment_of_one(self) -> dict[str, Any]:
        return {
            "step": int(self._iterations.numpy()),
            "weights": saved_state.checksum(
                variable.numpy() for variable in self._trainable_variables
            ),
        }

    def _layout(self) -> dict[str, Any]:
        """Returns the facts in which a saved state must agree to fit."""
        keeps_errors = (
            self.cross_gradients is not None
            and self.cross_gradients.keeps_errors
        )
        # The sum of what neighbours have sent is of these neighbours, and so
        # are the errors of what was sent back to them.
        is_of_topology = keeps_errors or isinstance(
            self.error_feedback, error_feedback_lib.EF21
        )
        return {
            "optimizer": "DecentralizedOptimizer",
            "weights": replica_variables.describe(self._trainable_variables),
            "error_feedback": saved_config.describe(self.error_feedback),
            **(
                {"topology": saved_config.describe(self.topology)}
                if is_of_topology
                else {}
            ),
            **(
                {"mixing_rule": saved_config.describe(self.mixing_rule)}
                if self.mixing_rule.tracks_average
                else {}
            ),
            **(
                {"cross_gradients": saved_config.describe(self.cross_gradients)}
                if keeps_errors
                else {}
            ),
        }

    def _check_layout(self, layout: dict[str, Any], is_same: bool) -> None:
        rule = "What replicas kept must be of a `DecentralizedOptimizer` with"
        own = self._layout()
        # First, because of another optimizer all differs.
        _check_layout_of(["optimizer"], layout, own, rule)
        names = [n for n in (*own, *layout) if n not in _RECORDS]
        if is_same and self._gossip is not None:
            names += _RECORDS
        completed = {
            name: saved_config.complete(value, getattr(self, name))
            if name in _RECORDS and getattr(self, name) is not None
            else value
            for name, value in layout.items()
        }
        _check_layout_of(names, completed, own, rule)


_RECORDS = ("error_feedback", "cross_gradients", "topology", "mixing_rule")


def _check_layout_of(
    names: Sequence[str],
    saved: dict[str, Any],
    own: dict[str, Any],
    rule: str,
) -> None:
    layouts.check_layout(
        {name: saved.get(name) for name in names},
        {name: own.get(name) for name in names},
        rule,
    )
