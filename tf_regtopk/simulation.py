r"""Many workers of sparsified gradient descent in one compiled program.

For research on small problems, of which the exchange between replicas would
take all the time: all steps of all workers are one call, on one device, without
a strategy. The step itself is the one of `SparsifiedOptimizer`
(`steps/round.py`), taken for one worker after the other.

    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(0.01), tf_regtopk.RegTopK(density=0.1))
    run = simulation.gradient_descent(
        simulation.descent_of(optimizer, num_workers=20),
        gradients_of, measure, num_steps=2500)
    curve = run(weights, 0.01, data)
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple
from typing import TypeAlias

import keras
import tensorflow as tf

from tf_regtopk import codecs
from tf_regtopk import error_feedback as error_feedback_lib
from tf_regtopk import selection
from tf_regtopk import sparsifiers
from tf_regtopk import validation
from tf_regtopk.codecs import scattered
from tf_regtopk.codecs import wire_report
from tf_regtopk.distribute import reduce_scatter
from tf_regtopk.distribute import topology as topology_lib
from tf_regtopk.kernels import ownership
from tf_regtopk.kernels import scatter_sum
from tf_regtopk.kernels import tracing
from tf_regtopk.optimizers import sparsified
from tf_regtopk.steps import round as round_lib
from tf_regtopk.steps import telemetry

# What one vector of weights on one device has no counterpart of.
_SPARSIFIED = {
    "scope": "global",
    "dense_below": 0,
    "dense": (),
    "densities": {},
    "clipping": "aggregate",
    "exchange": "sparse",
    "accumulation_steps": 1,
}
# What Keras adds to the equations of an optimizer.
_INNER = {
    "weight_decay": None,
    "clipnorm": None,
    "clipvalue": None,
    "global_clipnorm": None,
    "use_ema": False,
    "gradient_accumulation_steps": None,
    "loss_scale_factor": None,
}

# What the gradients are of, such as the workers' data sets.
Data: TypeAlias = tuple[tf.Tensor, ...]


class MomentumSGD(NamedTuple):
    """The descent of `keras.optimizers.SGD`.

        v = momentum v + rate g,        weights = weights - v

    Args:
        momentum: Float in [0, 1).
    """

    momentum: float = 0.0

    @property
    def num_arrays(self) -> int:
        """Number of arrays of the weights' size that it keeps."""
        return 1

    def __call__(
        self,
        arrays: tuple[tf.Tensor, ...],
        g: tf.Tensor,
        t: tf.Tensor,
        rate: float | tf.Tensor,
    ) -> tuple[tf.Tensor, tuple[tf.Tensor, ...]]:
        """Returns the change to subtract.

        Args:
            arrays: Tuple of what it keeps; zeros at first.
            g: Float tensor `[J]`.
            t: Scalar int32 tensor, the number of steps before.
            rate: Scalar, the learning rate.

        Returns:
            `(change, arrays)`.
        """
        del t
        v = self.momentum * arrays[0] + rate * g
        return v, (v,)


class Adam(NamedTuple):
    """The descent of `keras.optimizers.Adam`, called like `MomentumSGD`.

        m = beta_1 m + (1 - beta_1) g,      v = beta_2 v + (1 - beta_2) g^2
        scale = rate sqrt(1 - beta_2^(t+1)) / (1 - beta_1^(t+1))
        weights = weights - scale m / (sqrt(v) + eps)

    Args:
        beta_1: Float in [0, 1).
        beta_2: Float in [0, 1).
        epsilon: Positive float.
    """

    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-7

    @property
    def num_arrays(self) -> int:
        """Number of arrays kept between steps."""
        return 2

    def __call__(
        self,
        arrays: tuple[tf.Tensor, ...],
        g: tf.Tensor,
        t: tf.Tensor,
        rate: float | tf.Tensor,
    ) -> tuple[tf.Tensor, tuple[tf.Tensor, ...]]:
        """Returns the change to subtract, see `MomentumSGD`."""
        m, v = arrays
        m = self.beta_1 * m + (1 - self.beta_1) * g
        v = self.beta_2 * v + (1 - self.beta_2) * g**2
        power = tf.cast(t + 1, g.dtype)
        scale = tf.sqrt(1 - self.beta_2**power) / (1 - self.beta_1**power)
        return rate * (scale * m / (tf.sqrt(v) + self.epsilon)), (m, v)


class State(NamedTuple):
    """The values that a step changes.

    Args:
        weights: Float tensor `[J]`.
        arrays: Tuple of what the inner optimizer keeps.
        local: Tuple of float tensors `[N, J]`, the workers' own of the error
            feedback.
        shared: Tuple of tensors, those that the workers share.
        memory: Tuple of tensors `[N, ...]`, what the sparsifier remembers.
    """

    weights: tf.Tensor
    arrays: tuple[tf.Tensor, ...]
    local: tuple[tf.Tensor, ...] = ()
    shared: tuple[tf.Tensor, ...] = ()
    memory: tuple[tf.Tensor, ...] = ()


class DenseDescent(NamedTuple):
    """Steps with the mean of the workers' gradients.

    Args:
        inner: `MomentumSGD` or `Adam`.
    """

    inner: MomentumSGD | Adam

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
    inner: MomentumSGD | Adam
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
                _specs(state.local),
                _specs(state.memory),
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
            state: As of `step`, and so the others.
            gradients: See above.
            t: See above.
            rate: See above.

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
    ) -> tuple[round_lib.Method, error_feedback_lib.Step]:
        size, dtype = state.weights.shape[0], state.weights.dtype
        k = self.sparsifier.num_selected(size)
        method = round_lib.Method(
            self.sparsifier,
            self.error_feedback,
            self._payload_codec(k, size, dtype),
            (selection.Group(size, k),),
        )
        return method, error_feedback_lib.Step(
            self.num_workers, k / size, rate, t
        )

    def _payload_codec(
        self, k: int, size: int, dtype: tf.DType
    ) -> codecs.PayloadCodec | codecs.ScatteredCodec:
        topology = self.topology
        if self.num_workers == 1 or not isinstance(
            topology, reduce_scatter.ReduceScatter
        ):
            return self.codec.payload(k, size, dtype)
        return codecs.ScatteredCodec.of(
            self.codec,
            ownership.Ownership(size, self.num_workers),
            k,
            topology.capacity,
            topology.keep,
            dtype,
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
            tensors `[N, ...]`, or nothing; and `Step.accepted`.
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
        context: error_feedback_lib.Step,
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
                    _specs(state.local),
                ),
            ),
        )
        return found


def descent_of(
    optimizer: keras.optimizers.Optimizer, num_workers: int
) -> DenseDescent | SparseDescent:
    """The steps that an optimizer takes under a strategy of N replicas.

    Args:
        optimizer: `keras.optimizers.SGD` or `keras.optimizers.Adam`, or
            `SparsifiedOptimizer` around one of them. Its learning rate is left
            out, because every step is given one.
        num_workers: N.

    Returns:
        `DenseDescent`, or `SparseDescent` of a `SparsifiedOptimizer`.

    Raises:
        TypeError: If the optimizer is another one.
        ValueError: If it has an option that is not simulated.

    Example:

    >>> descent_of(keras.optimizers.SGD(momentum=0.5), num_workers=20)
    DenseDescent(inner=MomentumSGD(momentum=0.5))
    """
    validation.check_integer("num_workers", num_workers, minimum=1)
    if not isinstance(optimizer, sparsified.SparsifiedOptimizer):
        return DenseDescent(_inner(optimizer))
    _check_options(optimizer, _SPARSIFIED)
    if not isinstance(
        optimizer.topology,
        (topology_lib.AllGather, reduce_scatter.ReduceScatter),
    ):
        raise ValueError(
            "`topology` must be `AllGather` or `ReduceScatter` in a "
            f"simulation. Received: topology={optimizer.topology!r}"
        )
    return SparseDescent(
        optimizer.sparsifier,
        optimizer.error_feedback,
        optimizer.codec,
        num_workers,
        _inner(optimizer.inner_optimizer),
        optimizer.topology,
    )


def gradient_descent(
    descent: DenseDescent | SparseDescent,
    gradients_of: Callable[[tf.Tensor, Data, tf.Tensor], tf.Tensor],
    measure: Callable[[tf.Tensor, Data], tf.Tensor],
    num_steps: int,
) -> Callable[[tf.Tensor, float | tf.Tensor, Data], tf.Tensor]:
    """Makes a function that takes all steps, compiled by XLA.

    It is compiled once, and serves any start, learning rate and data of the
    same shapes, such as those of many seeds.

    Args:
        descent: What `descent_of` returns.
        gradients_of: Function of the weights `[J]`, the data and the number of
            the step that returns the gradients `[N, J]` of the workers' own
            losses.
        measure: Function of the weights and the data that returns a scalar.
        num_steps: Number of steps.

    Returns:
        Function of the weights `[J]` to start with, the learning rate, and the
        data, a tuple of tensors. It returns `measure` of the weights after each
        step, a float tensor `[num_steps]`.

    Example:

    >>> # The worker n has the loss ||w - c_n||^2 / 2, and sends one of two
    >>> # entries.
    >>> import tf_regtopk
    >>> optimizer = tf_regtopk.SparsifiedOptimizer(
    ...     keras.optimizers.SGD(), tf_regtopk.TopK(density=0.5))
    >>> run = gradient_descent(
    ...     descent_of(optimizer, num_workers=2),
    ...     gradients_of=lambda w, data, t: w - data[0],
    ...     measure=lambda w, data: tf.norm(w - tf.reduce_mean(data[0], 0)),
    ...     num_steps=3)
    >>> centres = tf.constant([[3.0, 0.0], [1.0, 2.0]])
    >>> run(tf.zeros([2]), 0.5, (centres,)).numpy().round(2)
    array([1.35, 0.7 , 0.31], dtype=float32)
    """

    def step(
        t: tf.Tensor,
        state: State,
        measured: tf.Tensor,
        rate: tf.Tensor,
        data: Data,
    ) -> tuple[tf.Tensor, State, tf.Tensor]:
        gradients = gradients_of(state.weights, data, t)
        state = descent.step(state, gradients, t, rate)
        measured = tf.tensor_scatter_nd_update(
            measured, [[t]], [measure(state.weights, data)]
        )
        return t + 1, state, measured

    @tracing.compiled
    def take_steps(
        weights: tf.Tensor, rate: tf.Tensor, data: Data
    ) -> tf.Tensor:
        return tf.while_loop(
            lambda t, *_: t < num_steps,
            lambda t, state, measured: step(t, state, measured, rate, data),
            (
                tf.constant(0),
                descent.initial_state(weights),
                tf.zeros([num_steps], weights.dtype),
            ),
        )[-1]

    def run(
        weights: tf.Tensor, learning_rate: float | tf.Tensor, data: Data
    ) -> tf.Tensor:
        weights = tf.convert_to_tensor(weights)
        if tf.is_tensor(learning_rate):
            rate = tf.cast(learning_rate, weights.dtype)
        else:  # A cast would round it to float32 before.
            rate = tf.constant(learning_rate, weights.dtype)
        return take_steps(weights, rate, data)

    return run


def _inner(optimizer: keras.optimizers.Optimizer) -> MomentumSGD | Adam:
    """The equations of a Keras optimizer."""
    # A subclass may have other equations.
    if type(optimizer) is keras.optimizers.SGD:
        _check_options(optimizer, {**_INNER, "nesterov": False})
        return MomentumSGD(optimizer.momentum)
    if type(optimizer) is keras.optimizers.Adam:
        _check_options(optimizer, {**_INNER, "amsgrad": False})
        return Adam(optimizer.beta_1, optimizer.beta_2, optimizer.epsilon)
    raise TypeError(
        "`optimizer` must be `keras.optimizers.SGD`, `keras.optimizers.Adam`, "
        "or `SparsifiedOptimizer` around one of them. "
        f"Received: optimizer={optimizer!r}"
    )


def _check_options(
    optimizer: keras.optimizers.Optimizer, expected: Mapping[str, Any]
) -> None:
    for name, value in expected.items():
        received = getattr(optimizer, name)
        if received != value:
            raise ValueError(
                f"`{name}` must be {value!r} in a simulation. "
                f"Received: {name}={received!r}"
            )


def _specs(values: Iterable[tf.Tensor]) -> tuple[tf.TensorSpec, ...]:
    """Returns the specs of one worker's part of tensors `[N, ...]`."""
    return tuple(tf.TensorSpec(v.shape[1:], v.dtype) for v in values)
