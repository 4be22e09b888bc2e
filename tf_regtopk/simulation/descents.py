"""Steps of many workers that have the same weights."""

from collections.abc import Iterable
from typing import Any
from typing import NamedTuple

import tensorflow as tf

from tf_regtopk import codecs
from tf_regtopk import error_feedback as error_feedback_lib
from tf_regtopk import selection
from tf_regtopk import sparsifiers
from tf_regtopk.codecs import scattered
from tf_regtopk.codecs import wire_report
from tf_regtopk.distribute import topology as topology_lib
from tf_regtopk.kernels import scatter_sum
from tf_regtopk.simulation import inner_optimizers
from tf_regtopk.steps import round as round_lib
from tf_regtopk.steps import telemetry


class State(NamedTuple):
    """The values that a step changes.

    Args:
        weights: Float tensor `[J]`.
        arrays: Tuple of what the inner optimizer keeps.
        local: Tuple of float tensors `[N, J]`, the workers' own of the error
            feedback.
        shared: Tuple of tensors, those that the workers share.
        memory: Tuple of tensors `[N, ...]`, what the sparsifier remembers.
        errors: Tuple of none or of one float tensor `[N, rows, J]`, what was
            rounded off the cross gradients for each neighbour.
    """

    weights: tf.Tensor
    arrays: tuple[tf.Tensor, ...]
    local: tuple[tf.Tensor, ...] = ()
    shared: tuple[tf.Tensor, ...] = ()
    memory: tuple[tf.Tensor, ...] = ()
    errors: tuple[tf.Tensor, ...] = ()


class DenseDescent(NamedTuple):
    """Steps with the mean of the workers' gradients.

    Args:
        inner: `MomentumSGD` or `Adam`.
    """

    inner: inner_optimizers.Inner

    def initial_state(self, weights: tf.Tensor) -> State:
        """`State` before the first step, with these weights `[J]`."""
        return State(weights, (tf.zeros_like(weights),) * self.inner.num_arrays)

    def step(
        self, state: State, gradients: tf.Tensor, t: tf.Tensor, rate: tf.Tensor
    ) -> State:
        """The state after a step, as of `SparseDescent`."""
        aggregate = tf.reduce_mean(gradients, axis=0)
        change, arrays = self.inner(state.arrays, aggregate, t, rate)
        return State(state.weights - change, arrays)


class SparseDescent(NamedTuple):
    """Steps with the sum of the entries that the workers send.

    Args:
        sparsifier: `tf_regtopk.Sparsifier`.
        error_feedback: `tf_regtopk.ErrorFeedback`.
        codec: `tf_regtopk.Codec`.
        num_workers: N.
        inner: `MomentumSGD` or `Adam`.
        topology: `AllGather` or `ReduceScatter`.
    """

    sparsifier: sparsifiers.Sparsifier
    error_feedback: error_feedback_lib.ErrorFeedback
    codec: codecs.Codec
    num_workers: int
    inner: inner_optimizers.Inner
    topology: topology_lib.EntryTopology = topology_lib.AllGather()

    def initial_state(self, weights: tf.Tensor) -> State:
        """`State` before the first step, with these weights `[J]`."""
        size, dtype = weights.shape[0], weights.dtype
        k = self.sparsifier.num_selected(size)

        def for_each_worker(
            values: tuple[tf.Tensor, ...],
        ) -> tuple[tf.Tensor, ...]:
            return tuple(
                tf.stack([value] * self.num_workers) for value in values
            )

        return State(
            weights,
            (tf.zeros_like(weights),) * self.inner.num_arrays,
            for_each_worker(self.error_feedback.initial_local(size, dtype)),
            self.error_feedback.initial_shared(size, dtype),
            for_each_worker(self.sparsifier.initial_memory(k, size, dtype)),
        )

    def step(
        self, state: State, gradients: tf.Tensor, t: tf.Tensor, rate: tf.Tensor
    ) -> State:
        """The state after a step.

        Args:
            state: `State` before it.
            gradients: Float tensor `[N, J]`, those of the workers' own losses.
            t: Scalar int32 tensor, the number of steps before.
            rate: Scalar float tensor, the learning rate.

        Returns:
            `State`.
        """
        method, context = self._round(state, t, rate)
        payloads, sent = self._send(method, state, gradients, context)
        total, _, taken_over, accepted = self._exchange(
            method, payloads, sent, t
        )
        context = context._replace(accepted=accepted)
        aggregate, shared = round_lib.aggregate(
            method, total, state.shared, context
        )
        local, memory, _ = tf.map_fn(
            # With something to return where nothing is kept.
            lambda of_worker: (
                *round_lib.settle(
                    method,
                    of_worker[0],
                    of_worker[1],
                    total,
                    context,
                    taken_over=round_lib.TakenOver(*of_worker[2])
                    if taken_over
                    else None,
                ),
                of_worker[0].indices,
            ),
            (sent, state.memory, taken_over),
            fn_output_signature=(
                specs(state.local),
                specs(state.memory),
                tf.TensorSpec(sent.indices.shape[1:], tf.int32),
            ),
        )
        change, arrays = self.inner(state.arrays, aggregate, t, rate)
        weights = state.weights - change
        return State(weights, arrays, local, shared, memory)

    def sent_bytes(self, size: int, dtype: tf.DType = tf.float32) -> float:
        """Counts the bytes that each worker would send per step.

        Args:
            size: J.
            dtype: Float dtype of the gradient.
        """
        k = self.sparsifier.num_selected(size)
        return self.topology.sent_bytes(
            wire_report.payload_bytes(self._payload_codec(k, size, dtype)),
            topology_lib.Cluster(self.num_workers, self.num_workers),
        )

    def telemetry(
        self, state: State, gradients: tf.Tensor, t: tf.Tensor, rate: tf.Tensor
    ) -> list[tuple[tf.Tensor, ...]]:
        """Measures the step that `step` would take.

        Args:
            state: As of `step`.
            gradients: As of `step`.
            t: As of `step`.
            rate: As of `step`.

        Returns:
            For each worker what `telemetry.of_settle` returns, of one variable
            of J entries. `telemetry.by_name` gives the numbers their names.
        """
        method, context = self._round(state, t, rate)
        size = state.weights.shape[0]
        start = telemetry.initial([size], self.sparsifier, has_ages=False)
        found, all_payloads, all_sent = [], [], []
        for rank in range(self.num_workers):
            gradient = gradients[rank] / self.num_workers
            before = round_lib.State(
                tuple(tensor[rank] for tensor in state.local),
                state.shared,
                tuple(tensor[rank] for tensor in state.memory),
                start,
            )
            payload, sent, a = round_lib.send(
                method, gradient, before, context, tf.constant(rank)
            )
            all_payloads.append(payload)
            all_sent.append(sent)
            found.append(
                telemetry.of_send(method, [size], gradient, a, before, sent, t)
            )
        total, magnitudes, _, _ = self._exchange(
            method,
            tf.stack(all_payloads),
            tf.nest.map_structure(lambda *of_all: tf.stack(of_all), *all_sent),
            t,
        )
        return [
            telemetry.of_settle(of_one, magnitudes, total) for of_one in found
        ]

    def _round(
        self, state: State, t: tf.Tensor, rate: tf.Tensor
    ) -> tuple[round_lib.Method, error_feedback_lib.StepContext]:
        size, dtype = state.weights.shape[0], state.weights.dtype
        k = self.sparsifier.num_selected(size)
        method = round_lib.Method(
            self.sparsifier,
            self.error_feedback,
            self._payload_codec(k, size, dtype),
            (selection.Group(size, k),),
        )
        return method, error_feedback_lib.StepContext(
            self.num_workers, k / size, rate, t
        )

    def _payload_codec(
        self, k: int, size: int, dtype: tf.DType
    ) -> codecs.PayloadCodec | codecs.ScatteredCodec:
        return scattered.payload_codec(
            self.codec, k, size, dtype, self.topology, self.num_workers
        )

    def _exchange(
        self,
        method: round_lib.Method,
        payloads: tf.Tensor,
        sent: round_lib.Sent,
        t: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor, tuple[tf.Tensor, ...], tf.Tensor | None]:
        """Sums what all workers have sent.

        Args:
            method: `round.Method`.
            payloads: int32 tensor `[N, words]`.
            sent: `Sent` of tensors `[N, ...]`.
            t: Scalar int32 tensor, the number of steps before.

        Returns:
            `(total, magnitudes, taken_over, accepted)`: a float tensor `[J]`;
            the sum of the magnitudes of all entries; a `round.TakenOver` of
            tensors `[N, ...]`, or nothing; and `StepContext.accepted`.
        """
        codec = method.payload_codec
        if not isinstance(codec, codecs.ScatteredCodec):
            total = scatter_sum.sum_entries(
                sent.indices, sent.values, codec.size
            )
            return total, tf.reduce_sum(tf.abs(sent.values)), (), None
        n, number = self.num_workers, codec.to_all.k
        # What each owner receives.
        received = tf.transpose(
            tf.reshape(payloads, [n, n, codec.num_words_to_owner]), [1, 0, 2]
        )
        payloads, kept = tf.map_fn(
            lambda of_owner: codec.reduce(of_owner, t),
            received,
            fn_output_signature=(
                tf.TensorSpec([codec.num_words_to_all], tf.int32),
                scattered.Kept(
                    tf.TensorSpec([number], tf.int32),
                    tf.TensorSpec([number], codec.dtype),
                    tf.TensorSpec([number], codec.dtype),
                ),
            ),
        )
        indices, values, _ = codec.decode(payloads)
        facts = codec.facts(payloads)
        return (
            scatter_sum.sum_entries(indices, values, codec.size),
            tf.cast(facts.magnitudes, codec.dtype),
            round_lib.TakenOver(kept.indices, kept.error),
            tf.cast(facts.num_accepted, codec.dtype) / (n * codec.size),
        )

    def _send(
        self,
        method: round_lib.Method,
        state: State,
        gradients: tf.Tensor,
        context: error_feedback_lib.StepContext,
    ) -> tuple[tf.Tensor, round_lib.Sent]:
        """Payloads and sends of all workers, of tensors `[N, ...]`."""

        def send(of_worker: tuple[Any, ...]) -> tuple[tf.Tensor, Any]:
            rank, gradient, local, memory = of_worker
            before = round_lib.State(local, state.shared, memory)
            return round_lib.send(method, gradient, before, context, rank)[:2]

        k = method.payload_codec.k
        found: tuple[tf.Tensor, round_lib.Sent] = tf.map_fn(
            send,
            (
                tf.range(self.num_workers),
                gradients / self.num_workers,
                state.local,
                state.memory,
            ),
            fn_output_signature=(
                tf.TensorSpec([method.payload_codec.num_words], tf.int32),
                round_lib.Sent(
                    tf.TensorSpec([k], tf.int32),
                    tf.TensorSpec([k], state.weights.dtype),
                    specs(state.local),
                ),
            ),
        )
        return found


def specs(values: Iterable[tf.Tensor]) -> tuple[tf.TensorSpec, ...]:
    """Returns the specs of one worker's part of tensors `[N, ...]`."""
    return tuple(tf.TensorSpec(v.shape[1:], v.dtype) for v in values)
