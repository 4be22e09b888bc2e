"""The variables that replicas average with neighbours, and what that keeps."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import itertools
from typing import NamedTuple
from typing import TypeAlias

import keras
import numpy as np
import tensorflow as tf

from tf_regtopk import codecs
from tf_regtopk import error_feedback as error_feedback_lib
from tf_regtopk import selection
from tf_regtopk import sparsifiers
from tf_regtopk.codecs import wire_report
from tf_regtopk.distribute import answers
from tf_regtopk.distribute import mixing
from tf_regtopk.distribute import mixing_rules
from tf_regtopk.distribute import neighbours
from tf_regtopk.distribute import replica_state
from tf_regtopk.distribute import topology as topology_lib
from tf_regtopk.distribute import vector_exchange
from tf_regtopk.kernels import tracing
from tf_regtopk.steps import average_tracking
from tf_regtopk.steps import cross_gradient_step
from tf_regtopk.steps import cross_gradients as cross_gradients_lib
from tf_regtopk.steps import flat_buffer
from tf_regtopk.steps import gossip_round
from tf_regtopk.steps import gossip_step
from tf_regtopk.steps import round as round_lib
from tf_regtopk.steps import variable_rules

# Function from weights to the gradients of this replica's loss at these, both
# one for each variable. None stands for the weights that the replica has.
GradientsAt: TypeAlias = Callable[
    [Sequence[tf.Tensor | None]], Sequence[flat_buffer.Gradient]
]


class Choices(NamedTuple):
    """The parts of an exchange with neighbours that the user has chosen.

    Args:
        topology: `MixingTopology`.
        sparsifier: `Sparsifier` that remembers nothing.
        codec: `Codec`.
        error_feedback: `ErrorFeedback`.
        mixing_rule: `MixingRule`.
        consensus_step_size: Float gamma.
        cross_gradients: `CrossGradients`, or None.
    """

    topology: mixing.MixingTopology
    sparsifier: sparsifiers.Sparsifier
    codec: codecs.Codec
    error_feedback: error_feedback_lib.ErrorFeedback
    mixing_rule: mixing_rules.MixingRule
    consensus_step_size: float
    cross_gradients: cross_gradients_lib.CrossGradients | None = None


def sent_bytes(
    choices: Choices,
    payload_codec: codecs.PayloadCodec | codecs.ScatteredCodec,
    cluster: topology_lib.Cluster,
    communication_period: int,
) -> float:
    """Counts the bytes that each replica sends per step, on average.

    Args:
        choices: `Choices`.
        payload_codec: `PayloadCodec` of the weights.
        cluster: `Cluster`.
        communication_period: Number of steps for one exchange.
    """
    vector_bytes = payload_codec.size * payload_codec.dtype.size
    exchanged = wire_report.payload_bytes(payload_codec)
    if choices.mixing_rule.tracks_average:
        exchanged += vector_bytes
    if choices.cross_gradients is not None:
        exchanged += choices.cross_gradients.sent_bytes(
            payload_codec.size, payload_codec.dtype
        )
    of_weights = choices.topology.sent_bytes(exchanged, cluster)
    groups = choices.topology.gradient_groups(cluster.num_replicas)
    messages = sum(len(group) * (len(group) - 1) for group in groups)
    of_gradients = messages / cluster.num_replicas * vector_bytes
    return of_weights / communication_period + of_gradients


class Gossip:
    """Averages the weights of replicas with those of their neighbours.

    To be created in the scope of the strategy, with several replicas, on all
    workers alike. `mix`, `mix_with_cross_gradients` and `average_gradients` are
    for a replica context.

    Args:
        variables: List of the trainable variables.
        choices: `Choices`.
    """

    def __init__(
        self, variables: Sequence[keras.Variable], choices: Choices
    ) -> None:
        self._choices = choices
        # A variable of which the next value is a "gradient" is no summand.
        self._is_mixed = [*map(variable_rules.can_be_summed, variables)]
        self._variables = [*itertools.compress(variables, self._is_mixed)]
        self._buffer = flat_buffer.FlatBuffer.for_variables(self._variables)
        self._participants = topology_lib.Participants(choices.topology)
        size, n = self._buffer.size, self._participants.count
        steps = neighbours.rounds_of(choices.topology, n)
        k = choices.sparsifier.num_selected(size)
        self._payload_codec = choices.codec.payload(k, size, self._buffer.dtype)
        differences = neighbours.differences(choices.topology, n)
        self._neighbours: neighbours.Neighbours
        self._crossing: cross_gradient_step.Crossing | None = None
        if choices.cross_gradients is None:
            self._neighbours = neighbours.Neighbours(steps, differences)
        else:
            self._crossing = cross_gradient_step.Crossing(
                choices.cross_gradients,
                self._buffer,
                answers.AnsweringNeighbours(
                    steps, differences, choices.cross_gradients.sends_back
                ),
                n,
            )
            self._neighbours = self._crossing.neighbours
        self._step = tracing.of_equal(
            gossip_step.GossipStep,
            self._buffer,
            round_lib.Method(
                choices.sparsifier,
                choices.error_feedback,
                self._payload_codec,
                (selection.Group(size, k),),
            ),
            choices.mixing_rule,
            choices.consensus_step_size,
            n,
        )
        self._tracking = (
            average_tracking.AverageTracking(choices.topology, n)
            if choices.mixing_rule.tracks_average
            else None
        )
        self._state = replica_state.ReplicaState(self._initial)
        self._cliques = _Cliques(choices.topology.gradient_groups(n), n)

    def mix(self, number: tf.Tensor) -> None:
        """Moves the weights of this replica towards those of its neighbours.

        Args:
            number: Scalar integer tensor, the number of exchanges before, the
                same on every replica.
        """
        local = self._local()
        weights = [part.read_value() for part in local]
        state, tracked, _ = self._state.variables()
        moves, _ = self._step.moves(weights, state, number, self._neighbours)
        if self._tracking is not None:
            [ahead] = tracked
            # Nothing is kept of a step in which a neighbour's weights were of
            # no use.
            with tf.control_dependencies(moves):
                x = tf.concat(self._buffer.vectors(weights), axis=0)
            ahead.assign(self._tracking.next(ahead.read_value(), x, number))
        for part, move in zip(local, moves, strict=True):
            part.assign_add(move)

    def mix_with_cross_gradients(
        self,
        gradients: Sequence[flat_buffer.Gradient],
        gradients_at: GradientsAt,
        number: tf.Tensor,
    ) -> list[flat_buffer.Gradient]:
        """Moves the weights, and returns gradients that heed the neighbours'.

        To be called where there are `CrossGradients`.

        Args:
            gradients: As of `average_gradients`.
            gradients_at: `GradientsAt`, finite.
            number: As of `mix`.
        """
        assert self._crossing is not None
        local = self._local()
        state, _, errors = self._state.variables()
        moves, payloads = self._step.moves(
            [part.read_value() for part in local],
            state,
            number,
            self._neighbours,
        )
        places = self._crossing.neighbours.places(number)
        of_neighbours = self._step.values(tf.gather(payloads, places))
        at_weights = []
        before: list[tf.Tensor] = []
        for weights in tf.unstack(of_neighbours):
            # One pass begins when the one before has ended, because each needs
            # memory for the activations of the model.
            with tf.control_dependencies(before):
                weights = self._buffer.split(tf.identity(weights))
            found = self._flat(gradients_at(self._of_all_variables(weights)))
            at_weights.append(found)
            before = [found]
        combined = self._crossing.gradient(
            self._flat(gradients), at_weights, errors, number
        )
        for part, move in zip(local, moves, strict=True):
            part.assign_add(move)
        return self._in_place_of(gradients, combined)

    def use_tracked_average(self) -> None:
        """Gives this replica what it has tracked of the mean of all.

        In a replica context, where the rule is `AverageTracker`.
        """
        local = self._local()
        _, [ahead], _ = self._state.variables()
        for part, move in zip(
            local, self._buffer.split(ahead.read_value()), strict=True
        ):
            part.assign_add(move)

    def average_gradients(
        self, gradients: Sequence[flat_buffer.Gradient], number: tf.Tensor
    ) -> list[flat_buffer.Gradient]:
        """Returns the means of gradients over a clique, if there are cliques.

        Args:
            gradients: One gradient of this replica for each variable, or None,
                where it is None on all replicas.
            number: As of `mix`.
        """
        if not self._cliques:
            return [*gradients]
        mean = self._cliques.mean(self._flat(gradients), number)
        return self._in_place_of(gradients, mean)

    def save(self) -> list[list[np.ndarray]]:
        """For each replica of this process the arrays that it keeps."""
        return self._state.local_arrays()

    def load(self, values: Sequence[Sequence[np.ndarray]]) -> None:
        """Inverts `save`.

        Args:
            values: What `save` returns.
        """
        self._state.assign_local(values)

    def clear(self) -> None:
        """Starts as if new, with the weights that the variables have."""
        arrays = [*itertools.chain(*self._state.initial_arrays())]
        self._state.assign_local([arrays] * len(self._state.replicas))

    def wire_report(self, communication_period: int) -> codecs.WireReport:
        """Returns the bytes that each replica sends per step, on average.

        Args:
            communication_period: Number of steps for one exchange.
        """
        report = wire_report.report(
            self._payload_codec, self._variables, (), self._participants
        )
        num_bytes = sent_bytes(
            self._choices,
            self._payload_codec,
            self._participants.cluster,
            communication_period,
        )
        return dataclasses.replace(report, sent_bytes=round(num_bytes))

    def _flat(self, gradients: Sequence[flat_buffer.Gradient]) -> tf.Tensor:
        """One vector of the gradients of the variables that are mixed."""
        mixed = [*itertools.compress(gradients, self._is_mixed)]
        vectors = self._buffer.vectors(self._buffer.densify(mixed))
        return tf.concat(vectors, axis=0)

    def _in_place_of(
        self, gradients: Sequence[flat_buffer.Gradient], flat: tf.Tensor
    ) -> list[flat_buffer.Gradient]:
        """The parts of a vector, for the variables that are mixed.

        The others keep their gradients, and so do those without any.
        """
        found = self._of_all_variables(self._buffer.split(flat))
        return [
            gradient if gradient is None or part is None else part
            for gradient, part in zip(gradients, found, strict=True)
        ]

    def _of_all_variables(
        self, parts: Sequence[tf.Tensor]
    ) -> list[tf.Tensor | None]:
        """Tensors of the variables that are mixed, and None for the others."""
        left = iter(parts)
        return [next(left) if mixed else None for mixed in self._is_mixed]

    def _local(self) -> list[tf.Variable]:
        """This replica's parts of the variables that are mixed."""
        strategy = tf.distribute.get_strategy()
        return [
            replica_state.local_part(variable, strategy)
            for variable in self._variables
        ]

    def _initial(
        self,
    ) -> tuple[round_lib.State, tuple[tf.Tensor, ...], tuple[tf.Tensor, ...]]:
        """The state of the step, of `AverageTracking`, and of `Crossing`."""
        vectors = self._buffer.vectors(
            [tf.convert_to_tensor(variable) for variable in self._variables]
        )
        x = tf.concat(vectors, axis=0)
        return (
            gossip_round.initial(self._choices.error_feedback, x),
            () if self._tracking is None else (tf.zeros_like(x),),
            () if self._crossing is None else self._crossing.initial_errors(),
        )


class _Cliques:
    """The groups whose replicas take the mean of their gradients.

    Args:
        groups: Groups of ranks. There may be none.
        num_replicas: N.
    """

    def __init__(self, groups: mixing.Round, num_replicas: int) -> None:
        self._groups = groups
        if groups:
            weights = mixing.group_means(groups, num_replicas)
            self._exchange = vector_exchange.VectorExchange(
                [(groups,)], weights[np.newaxis]
            )

    def __bool__(self) -> bool:
        return bool(self._groups)

    def mean(self, gradient: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
        """The mean of flat gradients over the clique of this replica."""
        return self._exchange.sum(gradient, number)
