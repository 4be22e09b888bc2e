"""Steps of many workers that have weights of their own."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tf_regtopk import error_feedback as error_feedback_lib
from tf_regtopk import selection
from tf_regtopk.distribute import answers
from tf_regtopk.distribute import mixing
from tf_regtopk.distribute import mixing_rules
from tf_regtopk.distribute import neighbours
from tf_regtopk.distribute import topology as topology_lib
from tf_regtopk.simulation import descents
from tf_regtopk.simulation import inner_optimizers
from tf_regtopk.steps import cross_gradients as cross_gradients_lib
from tf_regtopk.steps import gossip
from tf_regtopk.steps import gossip_round
from tf_regtopk.steps import own_gradients
from tf_regtopk.steps import round as round_lib


class GossipDescent(NamedTuple):
    """Steps in which each worker averages its weights with neighbours.

    All tensors of its `State` are `[N, ...]`, those of each worker.

    Args:
        choices: `steps.gossip.Choices`, the parts of the exchange.
        num_workers: N.
        inner: `MomentumSGD` or `Adam`, which each worker has of its own.
        communication_period: The workers exchange in the first of so many
            steps.
    """

    choices: gossip.Choices
    num_workers: int
    inner: inner_optimizers.Inner
    communication_period: int = 1

    def initial_state(self, weights: tf.Tensor) -> descents.State:
        """`State` before the first step, where all have these weights `[J]`."""
        start = gossip_round.initial(self.choices.error_feedback, weights)
        found: descents.State = tf.nest.map_structure(
            lambda of_worker: tf.stack([of_worker] * self.num_workers),
            descents.State(
                weights,
                (tf.zeros_like(weights),) * self.inner.num_arrays,
                start.local,
                start.shared,
                errors=self._initial_errors(weights),
            ),
        )
        return found

    def gradients(
        self,
        state: descents.State,
        gradients_at: Callable[[tf.Tensor], tf.Tensor],
        t: tf.Tensor,
    ) -> tuple[tf.Tensor, descents.State]:
        """The gradients for `step`: the workers' own, or cross gradients.

        Args:
            state: `State`.
            gradients_at: Function from weights `[N, J]`, those of any worker in
                each row, to the gradients `[N, J]` of the workers' own losses
                at these.
            t: As of `step`.

        Returns:
            `(gradients, state)`: a float tensor `[N, J]`, and the `State` with
            the residual errors after the exchange of cross gradients.
        """
        own = gradients_at(state.weights)
        choices = self.choices.cross_gradients
        if choices is None:
            return own, state
        tables = self._tables(choices)
        of_step = answers.Tables(
            *(tf.gather(tf.constant(table), t % len(table)) for table in tables)
        )
        at_weights = tf.stack(
            [
                _finite(gradients_at(tf.gather(state.weights, of_place)))
                for of_place in tf.unstack(of_step.ranks, axis=1)
            ],
            axis=1,
        )
        received, errors = None, state.errors
        if choices.sends_back:
            sent, errors = self._answers(
                choices, at_weights, errors, of_step, t
            )
            received = tf.gather(
                tf.reshape(sent, [-1, own.shape[1]]), of_step.answers
            )
        combined = [
            cross_gradients_lib.combine(
                choices.alpha,
                of_worker,
                at_weights[i],
                None if received is None else received[i],
                of_step.taken[i],
            )
            for i, of_worker in enumerate(tf.unstack(_finite(own)))
        ]
        return tf.stack(combined), state._replace(errors=errors)

    def step(
        self,
        state: descents.State,
        gradients: tf.Tensor,
        t: tf.Tensor,
        rate: tf.Tensor,
    ) -> descents.State:
        """The state after a step.

        Args:
            state: `State` before it.
            gradients: Float tensor `[N, J]`, those of the workers' own losses
                at their own weights. One that holds NaN or infinity counts as
                zeros.
            t: Scalar int32 tensor, the number of steps before.
            rate: Scalar float tensor, the learning rate.

        Returns:
            `State`.
        """
        gradients = self._averaged(_finite(gradients))
        period = self.communication_period
        if period == 1:
            mixed = self._mix(state, t)
        else:
            mixed = tf.cond(
                tf.equal(t % period, 0),
                lambda: self._mix(state, t // period),
                lambda: tf.nest.map_structure(tf.identity, state),
            )
        change, arrays = self.inner(state.arrays, gradients, t, rate)
        return mixed._replace(weights=mixed.weights - change, arrays=arrays)

    def sent_bytes(self, size: int, dtype: tf.DType = tf.float32) -> float:
        """Counts the bytes that each worker would send per step, on average.

        Args:
            size: J.
            dtype: Float dtype of the weights.
        """
        return gossip.sent_bytes(
            self.choices,
            self._method(size, dtype).payload_codec,
            topology_lib.Cluster(self.num_workers, self.num_workers),
            self.communication_period,
        )

    def _initial_errors(self, weights: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """The errors of each worker for its neighbours, before a first step."""
        choices = self.choices.cross_gradients
        if choices is None or not choices.keeps_errors:
            return ()
        num_rows = int(self._tables(choices).numbers.max()) + 1
        return (tf.zeros([num_rows, weights.shape[0]], weights.dtype),)

    def _answers(
        self,
        choices: cross_gradients_lib.CrossGradients,
        gradients: tf.Tensor,
        errors: tuple[tf.Tensor, ...],
        tables: answers.Tables,
        t: tf.Tensor,
    ) -> tuple[tf.Tensor, tuple[tf.Tensor, ...]]:
        """Everything that all workers send back, `[N, D, J]`, and their errors.

        Args:
            choices: `CrossGradients`.
            gradients: Float tensor `[N, D, J]`.
            errors: As of `State`.
            tables: `Tables` of tensors `[N, D]`, those of the step.
            t: As of `step`.
        """
        size, dtype = gradients.shape[2], gradients.dtype
        method = choices.method(size, dtype)
        context = error_feedback_lib.StepContext(
            self.num_workers, 1.0, tf.zeros([]), t
        )

        def answer(
            of_worker: tuple[tf.Tensor, ...],
        ) -> tuple[tf.Tensor, tuple[tf.Tensor, ...]]:
            rank, of_neighbours, errors, ranks, numbers = of_worker
            made = cross_gradients_lib.answer(
                method, of_neighbours, errors, (ranks, numbers), context, rank
            )
            return made.values, made.errors

        found: tuple[tf.Tensor, tuple[tf.Tensor, ...]] = tf.map_fn(
            answer,
            (
                tf.range(self.num_workers),
                gradients,
                errors,
                tables.ranks,
                tables.numbers,
            ),
            fn_output_signature=(
                tf.TensorSpec(gradients.shape[1:], dtype),
                descents.specs(errors),
            ),
        )
        return found

    def _tables(
        self, choices: cross_gradients_lib.CrossGradients
    ) -> answers.Tables:
        """The neighbours of all workers in all steps."""
        return answers.tables(
            neighbours.differences(self.choices.topology, self.num_workers),
            choices.sends_back,
        )

    def _averaged(self, gradients: tf.Tensor) -> tf.Tensor:
        """Means over the cliques that average their gradients."""
        groups = self.choices.topology.gradient_groups(self.num_workers)
        if not groups:
            return gradients
        means = mixing.group_means(groups, self.num_workers)
        return tf.matmul(tf.constant(means, gradients.dtype), gradients)

    def _mix(self, state: descents.State, number: tf.Tensor) -> descents.State:
        """The state after an exchange.

        Args:
            state: `State` before it.
            number: Scalar int32 tensor, the number of exchanges before.
        """
        size, dtype = state.weights.shape[1], state.weights.dtype
        method = self._method(size, dtype)
        context = error_feedback_lib.StepContext(
            self.num_workers,
            method.payload_codec.k / size,
            tf.zeros([]),
            number,
        )
        sent = self._send(method, state, context)

        def move(of_worker: tuple[tf.Tensor, ...]) -> tuple[tf.Tensor, ...]:
            taken, sent_by_it, local, shared = of_worker
            d = self.choices.mixing_rule.disagreement(
                mixing_rules.Received(sent.indices, sent.values, taken),
                sent_by_it.values,
                size,
            )
            moved, after = gossip_round.mix(
                method,
                self.choices.consensus_step_size,
                d,
                sent_by_it,
                round_lib.State(local, shared),
                context,
            )
            return moved, after.local, after.shared

        moved, local, shared = tf.map_fn(
            move,
            (self._taken(number), sent, state.local, state.shared),
            fn_output_signature=(
                tf.TensorSpec([size], dtype),
                descents.specs(state.local),
                descents.specs(state.shared),
            ),
        )
        return state._replace(
            weights=state.weights + moved, local=local, shared=shared
        )

    def _send(
        self,
        method: round_lib.Method,
        state: descents.State,
        context: error_feedback_lib.StepContext,
    ) -> round_lib.Sent:
        """Sends of all workers, of tensors `[N, ...]`."""

        def send(of_worker: tuple[tf.Tensor, ...]) -> round_lib.Sent:
            rank, x, local, shared = of_worker
            before = round_lib.State(local, shared)
            return round_lib.send(method, x, before, context, rank)[1]

        k = method.payload_codec.k
        sent: round_lib.Sent = tf.map_fn(
            send,
            (
                tf.range(self.num_workers),
                state.weights,
                state.local,
                state.shared,
            ),
            fn_output_signature=round_lib.Sent(
                tf.TensorSpec([k], tf.int32),
                tf.TensorSpec([k], state.weights.dtype),
                descents.specs(state.local),
            ),
        )
        return sent

    def _taken(self, number: tf.Tensor) -> tf.Tensor:
        """The part that each worker takes of what each sends, `[N, N]`."""
        table = neighbours.differences(self.choices.topology, self.num_workers)
        table = np.asarray(table, np.float32)
        return tf.gather(tf.constant(table), number % len(table))

    def _method(self, size: int, dtype: tf.DType) -> round_lib.Method:
        sparsifier = self.choices.sparsifier
        k = sparsifier.num_selected(size)
        return round_lib.Method(
            sparsifier,
            self.choices.error_feedback,
            self.choices.codec.payload(k, size, dtype),
            (selection.Group(size, k),),
        )


def _finite(gradients: tf.Tensor) -> tf.Tensor:
    """Rows of gradients, with zeros for those that are not finite."""
    return tf.map_fn(
        lambda gradient: own_gradients.own_gradients([gradient], 1)[0][0],
        gradients,
    )
