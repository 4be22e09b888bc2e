"""The optimizer wrapper: one training step, from gradients to the update."""

import copy
import math

import keras
import tensorflow as tf

from tf_regtopk import aggregation
from tf_regtopk import codec
from tf_regtopk import error_feedback
from tf_regtopk import exchange
from tf_regtopk import flat_buffer
from tf_regtopk import keras_internals
from tf_regtopk import replica_state
from tf_regtopk import selection
from tf_regtopk import sparsifiers
from tf_regtopk import validation


@keras.saving.register_keras_serializable(package="tf_regtopk")
class SparsifiedOptimizer(keras.optimizers.Optimizer):
    r"""Wraps a Keras optimizer so that replicas exchange only k entries a step.

    Each step, replica n of N, with residual error `e_n` and gradient `g_n`:

        a_n   = e_n + g_n                       accumulate
        s_n   = the k largest scores of a_n     score, select
        agg   = sum over n of s_n * a_n         exchange, sum
        e_n   = a_n - s_n * a_n
        inner optimizer's update with agg

    The inner optimizer sees `agg` as it would see the sum of the replicas' full
    gradients, with its own weight decay, moving average and learning-rate
    schedule.  Its clipping (`clipnorm`, `clipvalue`, `global_clipnorm`) acts on
    the aggregate, where plain Keras clips each replica's gradient before the
    sum.  The wrapper takes the inner optimizer over: do not use that one
    elsewhere as well.

    Without a strategy, or with a single replica, nothing is exchanged, but
    entries are selected all the same.

    The residual errors and what the sparsifier remembers are not saved: after
    loading a model or weights, both start afresh on every replica, and gradient
    that had not been sent is lost.  All else is saved and loaded as usual.

    Args:
        inner_optimizer: The `keras.optimizers.Optimizer` to wrap. Created in
            the scope of the same strategy. For loss scaling put
            `keras.optimizers.LossScaleOptimizer` around the wrapper.
        sparsifier: `RegTopK`, `TopK`, `RandomK` or another `Sparsifier`.
            Defaults to `RegTopK()`.
        scope: `"global"` selects k entries of the concatenation of all
            gradients, in the order of the trainable variables;
            `"per_variable"` selects in each variable separately. A gradient
            that is None counts as zeros, keeps its variable's residual error
            and leaves the variable alone.
        dense_below: Variables with fewer entries than this are exchanged
            densely, by an all-reduce, and have no residual error.
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
        scope="global",
        dense_below=0,
        name=None,
        **kwargs,
    ):
        validation.check_keras()
        validation.check_no_base_arguments(kwargs)
        validation.check_inner_optimizer(inner_optimizer, type(self))
        if sparsifier is None:
            sparsifier = sparsifiers.RegTopK()
        if not isinstance(sparsifier, sparsifiers.Sparsifier):
            raise TypeError(
                "`sparsifier` must be a `Sparsifier` such as "
                f"`RegTopK(density=0.001)`. Received: sparsifier={sparsifier!r}"
            )
        validation.check_choice("scope", scope, ("global", "per_variable"))
        validation.check_integer("dense_below", dense_below, minimum=0)
        validation.check_strategy()
        validation.check_same_strategy(
            "inner_optimizer", keras_internals.strategy_of(inner_optimizer)
        )

        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer
        self.sparsifier = sparsifier
        self.scope = scope
        self.dense_below = dense_below
        keras_internals.take_aggregated_gradients(inner_optimizer)

    def build(self, var_list):
        """Creates the state of the inner optimizer and of every replica.

        Args:
            var_list: List of the trainable variables.
        """
        strategy = keras_internals.strategy_of(self)
        if tf.distribute.has_strategy():
            validation.check_same_strategy("optimizer", strategy)
        # Lifted out of any graph and into the scope, so that the first call of
        # `apply` may come from anywhere.
        with tf.init_scope(), strategy.scope():
            self.inner_optimizer.build(var_list)
            super().build(var_list)
            self._sparse_slots, self._dense_slots = self._partition(var_list)
            self._buffer = flat_buffer.FlatBuffer.for_variables(
                [var_list[slot] for slot in self._sparse_slots]
            )
            self._groups = self._buffer.groups(
                self.scope, self.sparsifier.num_selected
            )
            self._state = replica_state.ReplicaState(
                self._buffer.size,
                self._buffer.dtype,
                self.sparsifier.initial_memory(
                    sum(group.k for group in self._groups), self._buffer.dtype
                ),
            )

    def _partition(self, variables):
        """The slots of variables exchanged sparsely, and of those densely."""
        sparse, dense = [], []
        for slot, variable in enumerate(variables):
            # Such a "gradient" is the variable's next value (float8 scales):
            # nothing to sum, the inner optimizer assigns it.
            if getattr(variable, "overwrite_with_gradient", False):
                continue
            size = math.prod(variable.shape)
            is_sparse = size > 0 and size >= self.dense_below
            (sparse if is_sparse else dense).append(slot)
        return tuple(sparse), tuple(dense)

    def apply(self, grads, trainable_variables=None):
        """Exchanges the gradients and lets the inner optimizer apply them.

        Args:
            grads: List of this replica's gradients: tensors, `tf.IndexedSlices`
                or None.
            trainable_variables: List of the variables that the gradients belong
                to. Defaults to those the optimizer was built with.
        """
        grads = list(grads)
        if not grads:
            return
        validation.check_replica_context()
        validation.check_not_compiled_as_a_whole(
            keras_internals.in_xla_context()
        )
        variables = self._variables_of(grads, trainable_variables)
        self.inner_optimizer.apply(self._aggregate(grads, variables), variables)
        self._iterations.assign_add(1)

    def _variables_of(self, grads, trainable_variables):
        """The variables of `grads`; builds the optimizer on the first call."""
        if trainable_variables is not None:
            variables = list(trainable_variables)
            if not self.built:
                # All replicas meet here, and one of them builds for all.
                tf.distribute.get_replica_context().merge_call(
                    lambda strategy: self.build(variables)
                )
        elif self.built:
            variables = self._trainable_variables
        else:
            raise ValueError(
                "`trainable_variables` must be given until the optimizer is "
                "built. Received: trainable_variables=None"
            )
        if len(grads) != len(variables):
            raise ValueError(
                "`grads` must hold one gradient for each variable. Received: "
                f"{len(grads)} gradients for {len(variables)} variables"
            )
        return variables

    def _aggregate(self, grads, variables):
        """`grads`, each replaced by its sum over the replicas; None stays."""
        by_slot = dict(zip(map(self._slot_of, variables), grads, strict=True))

        def present(slots):
            return [s for s in slots if by_slot.get(s) is not None]

        if present(self._sparse_slots):
            aggregate = self._exchange_entries(
                [by_slot.get(slot) for slot in self._sparse_slots]
            )
            aggregate = dict(zip(self._sparse_slots, aggregate, strict=True))
            by_slot |= {s: aggregate[s] for s in present(self._sparse_slots)}
        dense_slots = present(self._dense_slots)
        dense = exchange.all_reduce_sum([by_slot[s] for s in dense_slots])
        by_slot |= dict(zip(dense_slots, dense, strict=True))
        return list(by_slot.values())

    def _slot_of(self, variable):
        """The place of a variable in the list the optimizer was built with."""
        try:
            return self._get_variable_index(variable)
        except KeyError:
            raise ValueError(
                "`trainable_variables` must be those the optimizer was built "
                f"with. Received the unknown variable: {variable}"
            ) from None

    def _exchange_entries(self, gradients):
        """One step of the algorithm, from the gradients to their aggregate.

        Args:
            gradients: For each sparsely exchanged variable this replica's
                gradient, or None.

        Returns:
            List of dense gradients, the same on every replica: for each of
            these variables the sum of the entries that the replicas sent.
        """
        gradients = self._buffer.densify(gradients)
        error, memory = self._state.read()
        payload, indices, sent, error = self._select_entries(
            gradients, error, memory, self._iterations.value
        )
        payloads = exchange.all_gather(payload)
        aggregate, memory = self._sum_entries(payloads, indices, sent)
        self._state.assign(error, memory)
        return aggregate

    @tf.function(jit_compile=True, autograph=False)
    def _select_entries(self, gradients, error, memory, step):
        """Accumulate -> score -> select, on one replica."""
        g = self._buffer.flatten(gradients)
        a = error_feedback.accumulate(error, g)
        # A variable without a gradient takes no part, and keeps its error.
        candidates = self._buffer.clear_missing(a, gradients)
        scores = self.sparsifier.score(candidates, memory, step)
        indices = selection.select_largest(scores, self._groups)
        sent = tf.gather(candidates, indices)
        payload = codec.encode(indices, sent)
        error = error_feedback.residual_error(a, indices, sent)
        return payload, indices, sent, error

    @tf.function(jit_compile=True, autograph=False)
    def _sum_entries(self, payloads, indices, sent):
        """Sum what all replicas sent, and remember what this one did."""
        all_indices, all_values = codec.decode(
            payloads, indices.shape[0], sent.dtype
        )
        aggregate = aggregation.sum_entries(
            all_indices, all_values, self._buffer.size
        )
        memory = self.sparsifier.remember(
            indices, sent, tf.gather(aggregate, indices)
        )
        return self._buffer.split(aggregate), memory

    @property
    def variables(self):
        return self._variables + self.inner_optimizer.variables

    @property
    def learning_rate(self):
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self):
        return self.inner_optimizer.iterations

    def apply_gradients(self, grads_and_vars):
        super().apply_gradients(grads_and_vars)
        return self.iterations

    def scale_loss(self, loss):
        return self.inner_optimizer.scale_loss(loss)

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def finalize_variable_values(self, var_list):
        self.inner_optimizer.finalize_variable_values(var_list)

    def load_own_variables(self, store):
        super().load_own_variables(store)
        # What was not sent belongs to the weights as they were before.
        self._state.reset()

    def get_config(self):
        # Not the base class's: its arguments belong to the inner optimizer.
        serialize = keras.saving.serialize_keras_object
        return {
            "name": self.name,
            "inner_optimizer": serialize(self.inner_optimizer),
            "sparsifier": serialize(self.sparsifier),
            "scope": self.scope,
            "dense_below": self.dense_below,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = copy.deepcopy(config)  # Keras writes into nested ones.
        for name in ("inner_optimizer", "sparsifier"):
            config[name] = keras.saving.deserialize_keras_object(
                config[name], custom_objects=custom_objects
            )
        return cls(**config)
