"""The optimizer wrapper: one training step, from gradients to the update."""

import dataclasses
import math

import keras
import tensorflow as tf

from tf_regtopk import aggregation
from tf_regtopk import codec as codec_lib
from tf_regtopk import error_feedback as error_feedback_lib
from tf_regtopk import exchange
from tf_regtopk import finiteness
from tf_regtopk import flat_buffer
from tf_regtopk import keras_internals
from tf_regtopk import replica_state
from tf_regtopk import saved_state
from tf_regtopk import selection
from tf_regtopk import sparsifiers
from tf_regtopk import validation
from tf_regtopk import wire
from tf_regtopk import worker_files
from tf_regtopk import wrapper


@keras.saving.register_keras_serializable(package="tf_regtopk")
class SparsifiedOptimizer(wrapper.OptimizerWrapper):
    r"""Wraps a Keras optimizer so that replicas exchange only k entries a step.

    Each step, replica n of N, with residual error `e_n` and gradient `g_n`:

        a_n    = e_n + g_n                      accumulate
        s_n    = the k largest scores of a_n    score, select
        sent_n = decode(encode(s_n * a_n))      s_n * a_n, if encoded as it is
        agg    = sum over n of sent_n           exchange, sum
        e_n    = a_n - sent_n
        inner optimizer's update with agg

    The first and the last two lines are those of the default `error_feedback`.

    The inner optimizer sees `agg` as it would see the sum of the replicas' full
    gradients, with its own weight decay, moving average and learning-rate
    schedule.  Its clipping (`clipnorm`, `clipvalue`, `global_clipnorm`) acts on
    the aggregate, where plain Keras clips each replica's gradient before the
    sum.  The wrapper takes the inner optimizer over: do not use that one
    elsewhere as well.

    If any replica's gradient holds NaN or infinity, no replica takes the step:
    weights, inner optimizer and errors stay as they are, and `skipped_steps`
    counts it.

    Without a strategy, or with a single replica, nothing is exchanged, but
    entries are selected all the same.

    The residual errors and what the sparsifier remembers are saved and loaded
    with the model, by Keras and by `tf.train.Checkpoint`, and training goes on
    to the bit. Another number of replicas gets the same total of errors. Of
    several workers each saves its own, see `Backup` and `worker_path`.
    `model.set_weights` leaves both as they are.

    Args:
        inner_optimizer: The `keras.optimizers.Optimizer` to wrap. Created in
            the scope of the same strategy. For loss scaling put
            `LossScaleOptimizer` of this package around the wrapper.
        sparsifier: `RegTopK`, `TopK`, `RandomK`, `Dense` or another
            `Sparsifier`. Defaults to `RegTopK()`.
        codec: `Codec`, how entries are written. Defaults to `Codec()`, which
            rounds nothing.
        error_feedback: `Accumulate`, `EF21`, `LearnedShift`, `NoFeedback` or
            another `ErrorFeedback`: what becomes of what is not sent or
            rounded away. Defaults to `Accumulate()`.
        scope: `"global"` selects k entries of the concatenation of all
            gradients, in the order of the trainable variables;
            `"per_variable"` selects in each variable separately. A gradient
            that is None counts as zeros, keeps its variable's residual error
            and leaves the variable alone. `tf.IndexedSlices` (of embeddings)
            reach the inner optimizer as dense gradients.
        dense_below: Variables with fewer entries than this are exchanged
            densely, by an all-reduce, and have no residual error: the inner
            optimizer sees what it would have seen without the wrapper.
        name: String. The name of the optimizer.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument breaks its rule, an argument of the base
            class is given, the strategy in scope is not supported, or the Keras
            backend is not TensorFlow.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile(
    ...     optimizer=SparsifiedOptimizer(
    ...         keras.optimizers.SGD(0.1, momentum=0.9),
    ...         sparsifier=sparsifiers.RegTopK(density=0.25)),
    ...     loss="mse")
    >>> history = model.fit(tf.ones([8, 3]), tf.ones([8, 1]), verbose=0)

    Source: Bereyhi, Liang, Boudreau, Afana, "Regularized Top-k: A Bayesian
    Framework for Gradient Sparsification".
    """

    def __init__(
        self,
        inner_optimizer,
        sparsifier=None,
        *,
        codec=None,
        error_feedback=None,
        scope="global",
        dense_below=0,
        name=None,
        **kwargs,
    ):
        validation.check_no_base_arguments(kwargs)
        if sparsifier is None:
            sparsifier = sparsifiers.RegTopK()
        if codec is None:
            codec = codec_lib.Codec()
        if error_feedback is None:
            error_feedback = error_feedback_lib.Accumulate()
        validation.check_instance(
            "sparsifier",
            sparsifier,
            sparsifiers.Sparsifier,
            "RegTopK(density=0.001)",
        )
        validation.check_instance(
            "codec", codec, codec_lib.Codec, 'Codec(values="bfloat16")'
        )
        validation.check_instance(
            "error_feedback",
            error_feedback,
            error_feedback_lib.ErrorFeedback,
            "NoFeedback()",
        )
        validation.check_choice("scope", scope, ("global", "per_variable"))
        validation.check_integer("dense_below", dense_below, minimum=0)
        super().__init__(inner_optimizer, name=name)
        self.sparsifier = sparsifier
        self.codec = codec
        self.error_feedback = error_feedback
        self.scope = scope
        self.dense_below = dense_below

    def _exchange(self, gradients):
        """Select -> exchange: the first half of a step; nothing is kept yet."""
        dense = {
            slot: gradients[slot]
            for slot in self._dense_slots
            if gradients[slot] is not None
        }
        totals = exchange.all_reduce_sum(list(dense.values()))
        is_finite = finiteness.are_finite(totals)
        # What the inner optimizer is to see as it is.
        exchanged = {
            slot: gradient
            for slot, gradient in enumerate(gradients)
            if gradient is not None and slot not in self._sparse_slots
        } | dict(zip(dense, totals, strict=True))

        sparse = [gradients[slot] for slot in self._sparse_slots]
        if all(gradient is None for gradient in sparse):
            return is_finite, (exchanged, ())
        local, shared = self._feedback_state.variables()
        memory = self._memory.variables()
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        stream = (self._iterations.value, tf.convert_to_tensor(replica))
        payload, num_used, *rest = self._select_entries(
            self._buffer.densify(sparse),
            _read(local),
            _read(shared),
            _read(memory),
            self._read_learning_rate(),
            stream,
            self.density_changes,
        )
        payloads = exchange.all_gather(
            payload, num_used if self._payload_codec.is_variable else None
        )
        magnitudes, payloads = exchange.split_header(
            payloads, stream[0], self._buffer.dtype
        )
        *entries, is_valid, are_finite = self._decode(
            payloads, self.density_changes
        )
        is_finite &= (
            validation.check_traced_density(
                self.density_changes, self._density_changes.variables()
            )
            & exchange.check_payloads(is_valid)
            & are_finite
            & finiteness.is_sum_finite(magnitudes)
        )
        return is_finite, (exchanged, (*entries, *rest))

    def _aggregate(self, exchanged, has_gradient):
        """Sum -> remember -> clear the error: the second half of a step."""
        exchanged, entries = exchanged
        aggregate = [exchanged.get(slot) for slot in range(len(has_gradient))]
        if entries:
            *entries, accumulated = entries
            local, shared = self._feedback_state.variables()
            memory = self._memory.variables()
            for i, value in accumulated.items():
                local[i].assign(value)
            present = tuple(
                has_gradient[slot] or None for slot in self._sparse_slots
            )
            total = self._add_entries(
                *entries,
                local,
                shared,
                memory,
                self._read_learning_rate(),
                self._iterations.value,
                present,
            )
            for slot, part in zip(
                self._sparse_slots, self._buffer.split(total), strict=True
            ):
                aggregate[slot] = part if has_gradient[slot] else None
        return aggregate

    @tf.function(jit_compile=True, autograph=False)
    def _select_entries(
        self, gradients, local, shared, memory, learning_rate, stream, changes
    ):
        """Accumulate -> score -> select -> encode, on one replica."""
        del changes  # Another density is another program.
        step, _ = stream
        g = self._buffer.flatten(gradients)
        a, accumulated = self.error_feedback.accumulate(
            local, shared, g, self._step_of(learning_rate, step)
        )
        # Where there is no gradient nothing is sent.
        a = self._buffer.clear_missing(a, gradients)
        scores = self.sparsifier.score(a, memory, step)
        validation.check_scores(scores, a)
        indices = selection.select_largest(scores, self._groups, step)
        a = self.sparsifier.restore(a, scores, memory, indices)
        values = selection.take(a, indices)
        payload, sent = self._payload_codec.encode(indices, values, stream)
        magnitude = finiteness.largest_magnitude(
            values if self.sparsifier.selects_non_finite else a, sent
        )
        payload, num_used = exchange.add_header(
            magnitude, step, payload, self._payload_codec.num_used(payload)
        )
        if self.error_feedback.keeps_a:
            accumulated = (a, *accumulated[1:])
        accumulated = self._keep_missing(local, accumulated, gradients)
        accumulated = {
            i: value for i, value in enumerate(accumulated) if value is not None
        }
        return payload, num_used, indices, sent, accumulated

    @tf.function(jit_compile=True, autograph=False)
    def _decode(self, payloads, changes):
        """The entries of all replicas, on each replica."""
        del changes
        indices, values, is_valid = self._payload_codec.decode(payloads)
        if values.shape[1] == self._buffer.size:
            # Nobody reads them, and they take as much memory as the values.
            indices = indices[:, :0]
        return indices, values, is_valid, finiteness.are_finite([values])

    @tf.function(jit_compile=True, autograph=False)
    def _add_entries(
        self,
        all_indices,
        values,
        indices,
        sent,
        local,
        shared,
        memory,
        learning_rate,
        number,
        present,
    ):
        """Sum -> remember what became of this replica's entries."""
        step = self._step_of(learning_rate, number)
        total = self._buffer.clear_missing(
            aggregation.sum_entries(all_indices, values, self._buffer.size),
            present,
        )
        _assign(
            memory,
            self.sparsifier.remember(
                indices, sent, selection.take(total, indices)
            ),
        )
        old = _read(shared)
        aggregate, new = self.error_feedback.aggregate(old, total, step)
        _assign(shared, self._keep_missing(old, new, present))
        # Last, and in place, because only now nothing else needs a.
        old = _read(local)
        new = self.error_feedback.update(old, indices, sent, step)
        _assign(local, self._keep_missing(old, new, present))
        return aggregate

    def _keep_missing(self, old, new, gradients):
        """State stays as it is where there is no gradient."""
        return [
            after
            if after is None or after.shape != [self._buffer.size]
            else self._buffer.keep_missing(before, after, gradients)
            for before, after in zip(old, new, strict=True)
        ]

    def _read_learning_rate(self):
        """The inner optimizer's, where the rule of error feedback needs it."""
        if not self.error_feedback.needs_learning_rate:
            return tf.zeros([])
        return tf.cast(tf.convert_to_tensor(self.learning_rate), tf.float32)

    def _step_of(self, learning_rate, number):
        return error_feedback_lib.Step(
            self._feedback_state.num_replicas,
            self._payload_codec.indices.k / self._buffer.size,
            learning_rate,
            number,
        )

    def _create_state(self, variables):
        self._sparse_slots, self._dense_slots = self._partition(variables)
        self._buffer = flat_buffer.FlatBuffer.for_variables(
            [variables[slot] for slot in self._sparse_slots]
        )
        self._feedback_state = replica_state.ReplicaState(
            lambda: (
                self.error_feedback.initial_local(
                    self._buffer.size, self._buffer.dtype
                ),
                self.error_feedback.initial_shared(
                    self._buffer.size, self._buffer.dtype
                ),
            )
        )
        # Functions that were traced before a change are to know of it.
        self.density_changes = 0
        self._density_changes = replica_state.ReplicaState(
            lambda: tf.constant(0, tf.int64)
        )
        self._start_with(self.sparsifier.density)

    def _start_with(self, density):
        """Creates what depends on the number of entries sent."""
        self._groups = self._groups_at(density)
        self._memory = replica_state.ReplicaState(
            lambda: self._initial_memory(density)
        )
        self._density = density
        # Of a single replica nothing is sent, and nothing has to be short.
        codec = self.codec
        if self._memory.num_replicas == 1:
            codec = dataclasses.replace(codec, indices="int32")
        self._payload_codec = self._payload_codec_of(codec)

    def _groups_at(self, density):
        sparsifier = dataclasses.replace(self.sparsifier, density=density)
        return self._buffer.groups(self.scope, sparsifier.num_selected)

    def _initial_memory(self, density):
        k = sum(group.k for group in self._groups_at(density))
        return self.sparsifier.initial_memory(k, self._buffer.dtype)

    @property
    def density(self):
        """The share of the entries that is sent, the sparsifier's at first."""
        return self._density if self.built else self.sparsifier.density

    def set_density(self, density):
        """Sends another share of the entries from the next step on.

        As `DensityWarmup` does under `model.fit`. The residual errors stay;
        what the sparsifier remembers of the last step is dropped. It is saved
        and loaded with them, and the sparsifier's own density stays what it is.

        A function that takes steps must be traced again, for `fit` with
        `model.make_train_function(force=True)`. The old one raises an error.

        Args:
            density: Float in (0, 1].

        Raises:
            ValueError: If the density is not in (0, 1], or the optimizer not
                built.

        Example:

        >>> variable = tf.Variable(tf.ones([100]))
        >>> optimizer = SparsifiedOptimizer(
        ...     keras.optimizers.SGD(), sparsifiers.TopK(density=0.01))
        >>> optimizer.build([variable])
        >>> optimizer.set_density(0.25)
        >>> optimizer.wire_report().num_selected, optimizer.density
        (25, 0.25)
        """
        validation.check_built(self, "set_density")
        density = dataclasses.replace(self.sparsifier, density=density).density
        with tf.init_scope(), keras_internals.strategy_of(self).scope():
            self._start_with(density)
        self.density_changes += 1
        num_local = len(self._density_changes.replicas)
        self._density_changes.assign_local([[self.density_changes]] * num_local)

    def _payload_codec_of(self, codec):
        """The `PayloadCodec` of a `Codec`; None if nothing is selected."""
        k = sum(group.k for group in self._groups)
        if not k:
            return None
        return codec.payload(k, self._buffer.size, self._buffer.dtype)

    def wire_report(self):
        """What each replica sends a step, as a `WireReport` to print.

        From the shapes of the variables and a payload of random entries; so it
        can be asked for before training, as soon as the optimizer is built.

        Raises:
            ValueError: If the optimizer is not built.

        Example:

        >>> model = keras.Sequential([keras.Input((9,)), keras.layers.Dense(9)])
        >>> optimizer = SparsifiedOptimizer(
        ...     keras.optimizers.SGD(), sparsifiers.TopK(density=0.1))
        >>> optimizer.build(model.trainable_variables)
        >>> optimizer.wire_report().payload_bytes
        56
        """
        validation.check_built(self, "wire_report")
        return wire.report(
            self._payload_codec_of(self.codec),
            [self._trainable_variables[slot] for slot in self._sparse_slots],
            [self._trainable_variables[slot] for slot in self._dense_slots],
            self._memory.num_replicas,
        )

    def save_state(self):
        """The state of this process's replicas, as a `SavedState`."""
        state = self._feedback_state
        feedback, memory = state.local_arrays(), self._memory.local_arrays()
        return saved_state.SavedState(
            layout=self._layout,
            moment=self.moment,
            num_replicas=state.num_replicas,
            replicas={
                n: [*feedback[i], *memory[i]]
                for i, n in enumerate(state.replicas)
            },
        )

    def load_state(self, saved):
        """Loads a `SavedState`, or raises and changes nothing."""
        saved_state.check_layout(saved, self._layout)
        state = self._feedback_state
        # Older ones could not have another than the sparsifier's.
        density = saved.moment.get("density", self.sparsifier.density)
        feedback = state.initial_arrays()
        replicas = saved_state.state_of_replicas(
            worker_files.complete(saved, state.replicas, state.num_replicas),
            state.replicas,
            state.num_replicas,
            *feedback,
            [part.numpy() for part in self._initial_memory(density)],
        )
        if density != self.density:
            self.set_density(density)
        split = sum(map(len, feedback))
        state.assign_local([parts[:split] for parts in replicas])
        self._memory.assign_local([parts[split:] for parts in replicas])

    @property
    def moment(self):
        """Tells steps and runs apart: all workers agree in it."""
        return {
            "step": int(self._iterations.numpy()),
            "density": self.density,
            "weights": saved_state.checksum(
                variable.numpy() for variable in self._trainable_variables
            ),
        }

    @property
    def _layout(self):
        """What a saved state must agree in with this optimizer."""
        sparse = [
            self._trainable_variables[slot] for slot in self._sparse_slots
        ]
        return {
            "variables": saved_state.canonical_names(
                [getattr(v, "path", v.name) for v in sparse]
            ),
            "shapes": [list(shape) for shape in self._buffer.shapes],
            "dtype": self._buffer.dtype.name,
            "scope": self.scope,
            "sparsifier": [
                type(self.sparsifier).__name__,
                keras.saving.serialize_keras_object(self.sparsifier)["config"],
            ],
            "error_feedback": [
                type(self.error_feedback).__name__,
                self.error_feedback.get_config(),
            ],
        }

    def _partition(self, variables):
        """The slots of variables exchanged sparsely, and of those densely."""
        sparse, dense = [], []
        for slot, variable in enumerate(variables):
            size = math.prod(variable.shape)
            # Of an empty variable there is nothing to exchange.  A "gradient"
            # to overwrite with (float8 scales) is no summand but the next
            # value, and the inner optimizer assigns it.
            if size and not getattr(variable, "overwrite_with_gradient", False):
                (sparse if size >= self.dense_below else dense).append(slot)
        return tuple(sparse), tuple(dense)

    def get_config(self):
        return {
            **super().get_config(),
            "sparsifier": keras.saving.serialize_keras_object(self.sparsifier),
            "codec": keras.saving.serialize_keras_object(self.codec),
            "error_feedback": keras.saving.serialize_keras_object(
                self.error_feedback
            ),
            "scope": self.scope,
            "dense_below": self.dense_below,
        }


def _read(variables):
    return tf.nest.map_structure(lambda v: v.read_value(), variables)


def _assign(variables, values):
    """Assigns those of the values that are not None."""
    for variable, value in zip(variables, values, strict=True):
        if value is not None:
            variable.assign(value)
