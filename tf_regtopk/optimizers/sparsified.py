"""The optimizer wrapper: its arguments, choices and reports."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Any
from typing import Literal
from typing import Never

import keras
import numpy as np
import tensorflow as tf

from tf_regtopk import codecs
from tf_regtopk import error_feedback as error_feedback_lib
from tf_regtopk import hyper_parameters
from tf_regtopk import keras_internals
from tf_regtopk import sparsifiers
from tf_regtopk import training_validation
from tf_regtopk import validation
from tf_regtopk import version
from tf_regtopk.distribute import agreement
from tf_regtopk.distribute import replica_state
from tf_regtopk.distribute import topology as topology_lib
from tf_regtopk.error_feedback import error_accumulation
from tf_regtopk.optimizers import clipping as clipping_lib
from tf_regtopk.optimizers import description
from tf_regtopk.optimizers import momentum
from tf_regtopk.optimizers import notices
from tf_regtopk.optimizers import replica_saving
from tf_regtopk.optimizers import seeds
from tf_regtopk.optimizers import topology_argument
from tf_regtopk.saving import saved_config
from tf_regtopk.steps import auto_exchange
from tf_regtopk.steps import flat_buffer
from tf_regtopk.steps import layout as layout_lib
from tf_regtopk.steps import local_accumulation
from tf_regtopk.steps import partition as partition_lib
from tf_regtopk.steps import step
from tf_regtopk.steps import variable_rules


@keras.saving.register_keras_serializable(package="tf_regtopk")
class SparsifiedOptimizer(replica_saving.ReplicaSaving):
    r"""Wraps a Keras optimizer so that replicas exchange only k entries a step.

    Each step, replica n of N, with residual error `e_n` and gradient `g_n`:

        a_n    = e_n + g_n                      accumulate
        s_n    = mask of the k largest |scores| of a_n      score, select
        sent_n = decode(encode(s_n * a_n))      s_n * a_n, if nothing is rounded
        agg    = sum over n of sent_n           exchange, sum
        e_n    = a_n - sent_n
        inner optimizer's update with agg

    The first and the last two lines are those of the default `error_feedback`.

    The inner optimizer sees `agg` as it would see the sum of the replicas' full
    gradients, with its own weight decay, moving average and learning-rate
    schedule. Its clipping (`clipnorm`, `clipvalue`, `global_clipnorm`) acts on
    the aggregate, where plain Keras clips each replica's gradient before the
    sum (see `clipping`). The wrapper takes the inner optimizer over: do not use
    that one elsewhere as well.

    If any replica's gradient holds NaN or infinity, no replica takes the step:
    weights, inner optimizer and errors stay as they are, and `skipped_steps`
    counts it. If the inner optimizer makes weights NaN or infinite of finite
    gradients, the next step that is skipped and the end of `fit` warn of it.

    Without a strategy, or with a single replica, nothing is exchanged, but
    entries are selected all the same, unless `exchange` is `"dense"` or
    `"auto"`.

    The residual errors and what the sparsifier remembers are saved and loaded
    with the model, by Keras and by `tf.train.Checkpoint`, and training goes on
    to the bit. Another number of replicas gets the same total of errors. Of
    several workers each saves its own, see `Backup` and `worker_path`.
    `model.set_weights` leaves both as they are. `wrap` does all this for a
    model that is compiled already.

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
            `"per_variable"` selects in each variable separately. A variable
            whose gradient is None stays as it is, and so does its residual
            error. `tf.IndexedSlices` (of embeddings) reach the inner optimizer
            as dense gradients.
        dense_below: Variables with fewer entries than this are exchanged
            densely, by an all-reduce, and have no residual error, but the
            momentum of `error_feedback` (and a `clip_norm` of their own).
            Without momentum the inner optimizer sees what it would have seen
            without the wrapper.
        dense: List of patterns, such as `["bias", "*/embeddings"]`, or a
            function that takes a `keras.Variable` and returns whether it is
            meant: further variables that are exchanged densely. A pattern is
            matched with the names and the paths of variables, and `*` stands
            for any characters.
        densities: Dict from pattern to the density of the variables that match
            it. Each of these variables selects its own entries, and keeps its
            density when `set_density` changes that of the others.
        clipping: `"aggregate"`: the inner optimizer clips the sum; or
            `"replica"`: each replica's gradient is clipped before the error is
            added, as plain Keras does it.
        exchange: `"sparse"`; `"dense"`, which sums whole gradients by an
            all-reduce, without sparsifier, codec and error, but with the
            momentum of `error_feedback`; or `"auto"`, which runs both a few
            times when the optimizer is built, on all workers at once, and takes
            the faster one, or the dense one if they differ by less than 5 %
            (`chosen_exchange`, `exchange_seconds`). With `ReduceScatter` a
            third one is run, the all-gather of as many entries.
        topology: `AllGather`, `Hierarchical`, `ReduceScatter`, `AllReduce` or
            another `Topology`: who exchanges gradients with whom. `AllReduce()`
            is `exchange="dense"`. Defaults to `AllGather()`.
        hierarchical: Boolean. True is `topology=Hierarchical()`: the replicas
            of each worker sum their gradients densely, and workers exchange
            entries. N then is the number of workers, and each sends its payload
            once, however many devices it has.
        accumulation_steps: Integer m. Each replica adds up the gradients of m
            batches, and the replicas exchange only the mean of the m: as one
            batch m times larger would be. The other m - 1 batches send
            nothing. `iterations`, and with it learning-rate schedules, counts
            exchanges. A number that is not finite skips the exchange of all m
            batches. All m must have gradients of the same variables. Takes an
            array of J numbers.
        telemetry: Boolean. Whether each step also finds the numbers that
            `telemetry()` reads: norms, and how much was cancelled among the
            replicas. Takes some passes over the gradient. With `"ages"` each
            step also counts for how long entries have not been sent, in an
            array of J numbers.
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
        inner_optimizer: keras.optimizers.Optimizer,
        sparsifier: sparsifiers.Sparsifier | None = None,
        *,
        codec: codecs.Codec | None = None,
        error_feedback: error_feedback_lib.ErrorFeedback | None = None,
        scope: Literal["global", "per_variable"] = "global",
        dense_below: int = 0,
        dense: variable_rules.Pick = (),
        densities: Mapping[str, float] | None = None,
        clipping: Literal["aggregate", "replica"] = "aggregate",
        exchange: Literal["sparse", "dense", "auto"] = "sparse",
        topology: topology_lib.Topology | None = None,
        hierarchical: bool = False,
        accumulation_steps: int = 1,
        telemetry: bool | Literal["ages"] = False,
        name: str | None = None,
        # Arguments of the base class get an error that says where to set them.
        **kwargs: Never,
    ) -> None:
        training_validation.check_no_base_arguments(kwargs)
        if sparsifier is None:
            sparsifier = sparsifiers.RegTopK()
        if codec is None:
            codec = codecs.Codec()
        if error_feedback is None:
            error_feedback = error_accumulation.Accumulate()
        validation.check_instance(
            "sparsifier",
            sparsifier,
            sparsifiers.Sparsifier,
            "RegTopK(density=0.001)",
        )
        validation.check_instance(
            "codec", codec, codecs.Codec, 'Codec(values="bfloat16")'
        )
        validation.check_instance(
            "error_feedback",
            error_feedback,
            error_feedback_lib.ErrorFeedback,
            "NoFeedback()",
        )
        validation.check_choice("scope", scope, ("global", "per_variable"))
        rules = variable_rules.VariableRules(
            dense_below, dense, densities or {}
        )
        validation.check_choice("clipping", clipping, ("aggregate", "replica"))
        validation.check_choice(
            "exchange", exchange, (*layout_lib.EXCHANGES, "auto")
        )
        validation.check_boolean("hierarchical", hierarchical)
        validation.check_integer("accumulation_steps", accumulation_steps, 1)
        validation.check_boolean("telemetry", telemetry, others=["ages"])
        topology = topology_argument.choose(topology, hierarchical)
        topology_argument.check(topology, codec, exchange)
        if not isinstance(topology, topology_lib.EntryTopology):
            exchange = "dense"
        if exchange != "sparse":
            error_feedback.when_dense()  # A rule without one raises here.
        super().__init__(inner_optimizer, name=name)
        if clipping == "replica":
            training_validation.check_no_parts(inner_optimizer)
        else:
            clipping_lib.warn_if_after_momentum(inner_optimizer, error_feedback)
        momentum.warn_if_doubled(inner_optimizer, error_feedback)
        seeds.warn_if_shared(sparsifier, codec)
        self.sparsifier = sparsifier
        self.codec = codec
        self.error_feedback = error_feedback
        self.scope = scope
        self.rules = rules
        self.clips_replicas = clipping == "replica"
        self.exchange = exchange
        self.topology = topology
        self.accumulation_steps = int(accumulation_steps)
        self.has_telemetry = telemetry

    def __repr__(self) -> str:
        if not hasattr(self, "has_telemetry"):  # Still being created.
            return object.__repr__(self)
        index_code = None
        if self.built:
            index_code = self._report(is_quick=True).index_code
        return description.describe(self, index_code)

    def tells_of_overflow(self) -> tf.Tensor:
        are_current = tf.reduce_all(self._are_current())
        if self._accumulation is None:
            return are_current
        return are_current & self._accumulation.ends_with_next_batch()

    def discard_accumulated(self) -> None:
        """Forgets the gradients of the batches since the last exchange.

        With `accumulation_steps`, where layers are to be frozen or unfrozen
        before these batches are enough for a step. Several workers call it at
        the same step, because they count batches alike.

        Raises:
            ValueError: If the optimizer is not built.

        Example:

        >>> variable = tf.Variable([1.0])
        >>> optimizer = SparsifiedOptimizer(
        ...     keras.optimizers.SGD(1.0), accumulation_steps=2)
        >>> for gradient in (8.0, 0.25, 0.75):
        ...     if gradient == 0.25:
        ...         optimizer.discard_accumulated()
        ...     optimizer.apply([tf.constant([gradient])], [variable])
        >>> float(variable[0])
        0.5
        """
        training_validation.check_built(self, "discard_accumulated")
        if self._accumulation is not None:
            with tf.init_scope():
                self._accumulation.clear()

    def _are_current(self) -> tf.Tensor:
        """Returns for each device whether no change came after tracing."""
        return tf.equal(self._changes_of_replicas.variables(), self.changes)

    def _step(
        self,
        gradients: Sequence[flat_buffer.Gradient],
        apply: Callable[[Sequence[flat_buffer.Gradient]], None],
        skip: Callable[[], None],
    ) -> tf.Tensor:
        if self._accumulation is None:
            return self._take_step(gradients, apply, skip)
        return self._accumulation.step(gradients, self._take_step, apply, skip)

    def _take_step(
        self,
        gradients: Sequence[flat_buffer.Gradient],
        apply: Callable[[Sequence[flat_buffer.Gradient]], None],
        skip: Callable[[], None],
    ) -> tf.Tensor:
        if self.clips_replicas:
            gradients = self._clipped(gradients)
        return step.take_step(
            self._partition,
            gradients,
            self._read_progress(),
            self._are_current(),
            apply,
            skip,
        )

    def _clipped(
        self, gradients: Sequence[flat_buffer.Gradient]
    ) -> list[flat_buffer.Gradient]:
        """Clips gradients, but no values to overwrite with."""
        clipped = [*gradients]
        slots = variable_rules.summed_slots(self._trainable_variables)
        of_slots = self._clip([gradients[slot] for slot in slots])
        for slot, gradient in zip(slots, of_slots, strict=True):
            clipped[slot] = gradient
        return clipped

    def _kept(self) -> list[tuple[str, tf.Variable | keras.Variable]]:
        weights = super()._kept()
        if not self.built or tf.distribute.in_cross_replica_context():
            return weights  # The sums are the replicas' own.
        # The sums come first, because they are the cause where both are lost.
        return [
            *(
                (
                    f"Sum {i} of {self.error_feedback} holds NaN or infinity, "
                    "though all gradients were finite: too large ones have "
                    "been added up. Go back to a backup, and scale the loss "
                    "down or clip the gradients.",
                    variable,
                )
                for i, variable in enumerate(self._partition.kept_sums())
            ),
            *weights,
        ]

    def _read_progress(self) -> error_feedback_lib.Progress:
        rate = tf.zeros([])  # Where the rule of error feedback needs none.
        if self.error_feedback.needs_learning_rate:
            rate = tf.convert_to_tensor(self.learning_rate)
        return error_feedback_lib.Progress(
            tf.cast(rate, tf.float32), self._iterations.value.read_value()
        )

    def _build(self, variables: Sequence[keras.Variable]) -> None:
        # Workers compare these first, because TensorFlow then sends each new
        # variable of the first worker to all others.
        agreement.check(lambda: self._facts(variables))
        super()._build(variables)

    def _create_state(self, variables: Sequence[keras.Variable]) -> None:
        self._participants = topology_lib.Participants(self.topology)
        # Changes are counted, because functions traced before must raise.
        self.changes = 0
        self._changes_of_replicas = replica_state.ReplicaState(
            lambda: tf.constant(0, tf.int64)
        )
        self._exchange_seconds: dict[str, float] | None = None
        self._partition = self._new_partition(
            self._choose_exchange(variables)
            if self.exchange == "auto"
            else self.exchange,
            variables,
        )
        self._accumulation = None
        if self.accumulation_steps > 1:
            self._accumulation = local_accumulation.LocalAccumulation(
                variables, self.accumulation_steps
            )
        if self._participants.cluster.worker == 0:
            notices.tell_what_is_sent(
                self._report(is_quick=True),
                type(self.sparsifier).__name__,
                self._partition.density,
            )

    def _facts(self, variables: Sequence[keras.Variable]) -> dict[str, Any]:
        """Returns the arguments in which all workers must agree."""
        config = self.get_config()
        return {
            "version": version.__version__,
            "trainable_variables": [
                (list(variable.shape), variable.dtype) for variable in variables
            ],
            **{
                name: saved_config.without_names(config[name])
                for name in (
                    "sparsifier",
                    "codec",
                    "error_feedback",
                    "scope",
                    "dense_below",
                    "dense",
                    "densities",
                    "clipping",
                    "exchange",
                    "topology",
                    "telemetry",
                    "inner_optimizer",
                )
            },
            "accumulation_steps": self.accumulation_steps,
        }

    def _new_partition(
        self, kind: layout_lib.Exchange, variables: Sequence[keras.Variable]
    ) -> partition_lib.Partition:
        layout = layout_lib.Layout(
            kind,
            variables,
            self._participants,
            layout_lib.Choices(
                self.sparsifier,
                self.codec,
                self.error_feedback,
                self.scope,
                self.rules,
                self.has_telemetry,
            ),
        )
        return partition_lib.Partition(layout, variables)

    def _choose_exchange(
        self, variables: Sequence[keras.Variable]
    ) -> layout_lib.Exchange:
        """The fastest exchange, of gradients that are random numbers."""
        if self._participants.count == 1:
            return "dense"
        self._exchange_seconds = auto_exchange.measure(
            {
                kind: auto_exchange.trial(
                    self._new_partition(kind, variables), variables
                )
                for kind in layout_lib.candidates(self.topology)
            }
        )
        return auto_exchange.choose(self._exchange_seconds)

    def _report(self, is_quick: bool = False) -> codecs.WireReport:
        return dataclasses.replace(
            self._partition.layout.wire_report(
                self._partition.density, is_quick
            ),
            exchange=self._partition.layout.kind,
            exchange_seconds=self._exchange_seconds,
        )

    @property
    def dense_below(self) -> int:
        """Variables with fewer entries than this are exchanged densely."""
        return self.rules.dense_below

    @property
    def dense(self) -> variable_rules.Pick:
        """Patterns or a function, for the variables exchanged densely."""
        return self.rules.dense

    @property
    def densities(self) -> dict[str, float]:
        """The densities of the variables that match a pattern."""
        return dict(self.rules.densities)

    @property
    def clipping(self) -> Literal["aggregate", "replica"]:
        """Says whether the sum is clipped, or each replica's gradient."""
        return "replica" if self.clips_replicas else "aggregate"

    @property
    def hierarchical(self) -> bool:
        """True if the replicas of a worker act as one, as by `Hierarchical`."""
        return topology_argument.is_hierarchical(self.topology)

    @property
    def chosen_exchange(self) -> layout_lib.Exchange | None:
        """`"sparse"` or `"dense"`; None if it is to be chosen when built.

        Or `"all_gather"`, if `exchange="auto"` has chosen the all-gather in
        place of a `ReduceScatter`.
        """
        if self.built:
            return self._partition.layout.kind
        return None if self.exchange == "auto" else self.exchange

    @property
    def exchange_seconds(self) -> dict[str, float] | None:
        """Seconds a step of each exchange by `exchange="auto"`, or None."""
        return self._exchange_seconds if self.built else None

    @property
    def density(self) -> float | None:
        """The share of the entries that is sent, the sparsifier's at first.

        None if it depends on the variables, and the optimizer is not built.
        """
        if self.built:
            return self._partition.density
        return self.sparsifier.density

    @property
    def default_density(self) -> float:
        """The share of the entries that the sparsifier sends by itself."""
        training_validation.check_built(self, "default_density")
        return self._partition.layout.default_density

    def set_density(self, density: float) -> None:
        """Sends another share of the entries from the next step on.

        As `DensityWarmup` does under `model.fit`. The residual errors stay;
        what the sparsifier remembers of the last step is dropped. The density
        is saved and loaded with the errors, and `sparsifier.density` stays.

        A function that takes steps must be traced again, for `fit` with
        `model.make_train_function(force=True)`. The old one raises an error;
        with `jit_compile=True` it cannot, and skips its steps instead. Each new
        density takes memory until the process ends, because TensorFlow keeps
        every program that XLA has compiled.

        Args:
            density: Float in (0, 1].

        Raises:
            TypeError: If the density is no number.
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
        training_validation.check_built(self, "set_density")
        validation.check_density("density", density)
        dataclasses.replace(self.sparsifier, density=density)  # Checks it too.
        self._change(lambda: self._partition.start_with(float(density)))

    def _change(self, change: Callable[[], None]) -> None:
        """Changes what a step does, for functions that are traced anew."""
        with tf.init_scope(), keras_internals.strategy_of(self).scope():
            change()
        self.changes += 1
        num_local = len(self._changes_of_replicas.replicas)
        self._changes_of_replicas.assign_local([[self.changes]] * num_local)

    def wire_report(self) -> codecs.WireReport:
        """Returns the bytes that each replica sends per step, to print.

        The report is made from the shapes of the variables and a payload of
        random entries, so that a built optimizer has it before training.

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
        training_validation.check_built(self, "wire_report")
        return self._report()

    def telemetry(self) -> list[dict[str, Any]]:
        """Returns numbers about the last step, for each replica.

        Of the variables that are exchanged sparsely: `"gradient"`,
        `"accumulated"`, `"sent"` and `"residual"`, the Euclidean norms of the
        gradient, with the error added, of the part that was sent and of the
        part that was held back; `"selected"`, the number of entries sent; each
        of these by variable as well (`"gradient_by_variable"`);
        `"unlike_top_k"`, how many of them Top-k would not have sent;
        `"cancelled"`, the share of all that was sent which cancelled out in the
        sum over the replicas; `"sample_failed"`, 1 if the selection had to look
        at all scores because its sample said too little;
        `"exchange_seconds"`, from this replica's payload to those of all, as
        the host sees it; and what the sparsifier measures, such as `"damped"`
        and `"selected_again"` of `RegTopK`. With `telemetry="ages"` also
        `"age"` and `"oldest"`, the mean and the largest number of steps since
        an entry was last sent.

        Returns:
            For each replica of this process (of each worker with
            `hierarchical`) a dict of floats and of arrays with a number for
            each of the variables exchanged sparsely (`sparse_variables` has
            their paths). Empty if the exchange is dense.

        Raises:
            ValueError: If the optimizer is not built, or was not created with
                `telemetry=True`.

        Example:

        >>> optimizer = SparsifiedOptimizer(
        ...     keras.optimizers.SGD(), sparsifiers.TopK(density=0.5),
        ...     telemetry=True)
        >>> variable = tf.Variable([0.0, 0.0])
        >>> optimizer.apply([tf.constant([3.0, 4.0])], [variable])
        >>> [of_replica] = optimizer.telemetry()
        >>> of_replica["gradient"], of_replica["sent"], of_replica["residual"]
        (5.0, 4.0, 3.0)
        """
        training_validation.check_built(self, "telemetry")
        if not self.has_telemetry:
            raise ValueError(
                "The optimizer must be created with `telemetry=True` to read "
                "its telemetry. Received: telemetry=False"
            )
        return self._partition.telemetry()

    @property
    def sparse_variables(self) -> list[str]:
        """The paths of the variables exchanged sparsely, as in `telemetry`."""
        training_validation.check_built(self, "sparse_variables")
        return self._partition.layout.sparse_paths()

    def residual_errors(self) -> list[list[np.ndarray]]:
        """Returns the residual error of each replica of this process.

        Returns:
            For each replica (each worker with `hierarchical`) a list of NumPy
            arrays of the shapes of the variables that are exchanged sparsely.

        Raises:
            ValueError: If the optimizer is not built, or the rule of error
                feedback keeps no residual error.
        """
        training_validation.check_built(self, "residual_errors")
        return self._partition.residual_errors()

    def get_config(self) -> dict[str, Any]:
        hyper_parameters.warn_if_unregistered(
            self.sparsifier,
            self.codec.values,
            self.error_feedback,
            self.topology,
        )
        return {
            **super().get_config(),
            "sparsifier": keras.saving.serialize_keras_object(self.sparsifier),
            "codec": keras.saving.serialize_keras_object(self.codec),
            "error_feedback": keras.saving.serialize_keras_object(
                self.error_feedback
            ),
            "scope": self.scope,
            "dense_below": self.dense_below,
            "dense": keras.saving.serialize_keras_object(self.dense),
            "densities": self.densities,
            "clipping": self.clipping,
            "exchange": self.exchange,
            "topology": keras.saving.serialize_keras_object(self.topology),
            "telemetry": self.has_telemetry,
            # The key is left out at 1, because earlier versions lack it.
            **(
                {"accumulation_steps": self.accumulation_steps}
                if self.accumulation_steps > 1
                else {}
            ),
        }
