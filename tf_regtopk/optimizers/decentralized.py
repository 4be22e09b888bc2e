"""The optimizer of replicas that average their weights with neighbours."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import contextvars
from typing import Any
from typing import ClassVar
from typing import Never
from typing import TypeAlias

import keras
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
from tf_regtopk.distribute import branches
from tf_regtopk.distribute import mixing
from tf_regtopk.distribute import mixing_rules
from tf_regtopk.distribute import mixing_topologies
from tf_regtopk.distribute import replica_state
from tf_regtopk.kernels import tracing
from tf_regtopk.log import logger
from tf_regtopk.optimizers import averaging
from tf_regtopk.optimizers import decentralized_checks as checks
from tf_regtopk.optimizers import decentralized_saving
from tf_regtopk.optimizers import exchange_schedule
from tf_regtopk.optimizers import layer_mask as layer_mask_lib
from tf_regtopk.optimizers import seeds
from tf_regtopk.saving import saved_config
from tf_regtopk.steps import cross_gradients as cross_gradients_lib
from tf_regtopk.steps import flat_buffer
from tf_regtopk.steps import gossip
from tf_regtopk.steps import own_gradients
from tf_regtopk.steps import variable_rules

# Function of variables, and of other values for them, that returns the
# gradients of this replica's loss at these values.
GradientsAt: TypeAlias = Callable[
    [Sequence[keras.Variable], Sequence[tf.Tensor]],
    Sequence[flat_buffer.Gradient],
]
# A variable of the context, because replicas of a process are threads.
_gradients_at: contextvars.ContextVar[GradientsAt | None] = (
    contextvars.ContextVar("gradients_at", default=None)
)


@keras.saving.register_keras_serializable(package="tf_regtopk")
class DecentralizedOptimizer(decentralized_saving.DecentralizedSaving):
    r"""Wraps a Keras optimizer so that each replica has weights of its own.

    Each step replica i averages its weights with those of its neighbours only,
    and then takes a step of the inner optimizer with its own gradient. With
    gamma the `consensus_step_size`:

        a_i    = accumulate(state_i, x_i)
        sent_i = decode(encode(s_i * a_i))          s_i: the entries selected
        d_i    = sum over j of (W - I)_ij sent_j    `mixing_rule`, by default
        x_i    = x_i + gamma aggregate(state_i, d_i)
        inner optimizer's update of x_i with the gradient of replica i

    `NoFeedback()` makes this D-PSGD, `EF21()` CHOCO-SGD, and `Accumulate()`
    DeepSqueeze. The gradients are those of the weights before the exchange, and
    the inner optimizer's clipping, momentum and weight decay are each replica's
    own. A gradient that holds NaN or infinity counts as zeros (and in
    `zeroed_gradients`): the replica goes on exchanging, because nobody could
    tell all others to skip the step. `cross_gradients` make this NGC or
    CompNGC, where the gradient depends on the weights and the data of the
    neighbours as well.

    While `fit` runs, the weights that Keras saves, evaluates or gives out are
    those of the first replica, or each replica's own. `averaged` gives all of
    them the mean, and so does the end of `fit` (of the optimizer that the model
    is compiled with). `Backup` saves what each replica keeps, so that `fit` can
    be resumed to the bit; a model that Keras saves starts with new slots.

    Args:
        inner_optimizer: The `keras.optimizers.Optimizer` to wrap, without
            `use_ema` and without loss scaling.
        topology: `OnePeerExponential`, `Ring` or another `MixingTopology`: who
            averages with whom. Defaults to `OnePeerExponential()`.
        sparsifier: `Dense`, `TopK` or another `Sparsifier` that remembers
            nothing. Defaults to `Dense()`.
        codec: `Codec`, how entries are written, in a fixed length. Defaults to
            `Codec()`, which rounds nothing.
        error_feedback: `NoFeedback()`, `EF21()` or `Accumulate()`, what becomes
            of what is not sent or rounded away. `EF21` needs a topology that
            is the same in all steps. Defaults to `NoFeedback()`.
        mixing_rule: `NonlinearGossip(...)`, `AverageTracker()` or another
            `MixingRule`: what a replica makes of what its neighbours have
            sent. Defaults to `LinearGossip()`.
        consensus_step_size: Float gamma in (0, 1]. The fewer entries are sent,
            the smaller it has to be: for Top-k of a tenth at most 0.4.
        communication_period: Integer. The replicas exchange in the first of so
            many steps; the other steps are each replica's own. May be set
            during training, as `SkewScout` does: outside of the replicas, on
            all workers to the same number.
        layer_mask: `LayerMask`, the layers that only some of the replicas
            train, or None.
        cross_gradients: `CrossGradients`, for a model whose class derives from
            `CrossGradientTraining`, or None.
        average_at_end: Boolean. Whether all replicas have the mean of the
            weights at the end of `fit`.
        name: String. The name of the optimizer.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument breaks its rule, or does not go with another.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile(
    ...     optimizer=DecentralizedOptimizer(
    ...         keras.optimizers.SGD(0.1), mixing_topologies.Ring()),
    ...     loss="mse")
    >>> history = model.fit(tf.ones([8, 3]), tf.ones([8, 1]), verbose=0)
    """

    exchanges_gradients: ClassVar[bool] = False

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer,
        topology: mixing.MixingTopology | None = None,
        *,
        sparsifier: sparsifiers.Sparsifier | None = None,
        codec: codecs.Codec | None = None,
        error_feedback: error_feedback_lib.ErrorFeedback | None = None,
        mixing_rule: mixing_rules.MixingRule | None = None,
        consensus_step_size: float = 1.0,
        communication_period: int = 1,
        layer_mask: layer_mask_lib.LayerMask | None = None,
        cross_gradients: cross_gradients_lib.CrossGradients | None = None,
        average_at_end: bool = True,
        name: str | None = None,
        # Arguments of the base class get an error that says where to set them.
        **kwargs: Never,
    ) -> None:
        checks.check_no_base_arguments(kwargs)
        if topology is None:
            topology = mixing_topologies.OnePeerExponential()
        if sparsifier is None:
            sparsifier = sparsifiers.Dense()
        if codec is None:
            codec = codecs.Codec()
        if error_feedback is None:
            error_feedback = error_feedback_lib.NoFeedback()
        if mixing_rule is None:
            mixing_rule = mixing_rules.LinearGossip()
        checks.check_parts(topology, sparsifier, codec, error_feedback)
        checks.check_mixing_rule(mixing_rule, sparsifier, codec, error_feedback)
        checks.check_inner_optimizer(inner_optimizer)
        validation.check_number(
            "consensus_step_size",
            consensus_step_size,
            "in (0, 1]",
            lambda gamma: 0 < gamma <= 1,
        )
        validation.check_integer(
            "communication_period", communication_period, 1
        )
        checks.check_layer_mask(layer_mask)
        checks.check_cross_gradients(
            cross_gradients,
            sparsifier=sparsifier,
            codec=codec,
            error_feedback=error_feedback,
            mixing_rule=mixing_rule,
            communication_period=communication_period,
            layer_mask=layer_mask,
        )
        validation.check_boolean("average_at_end", average_at_end)
        super().__init__(inner_optimizer, name=name)
        seeds.warn_if_shared(sparsifier, codec)
        self.topology = topology
        self.sparsifier = sparsifier
        self.codec = codec
        self.error_feedback = error_feedback
        self.mixing_rule = mixing_rule
        self.consensus_step_size = float(consensus_step_size)
        self._schedule = exchange_schedule.ExchangeSchedule(
            int(communication_period)
        )
        self.layer_mask = layer_mask
        self.cross_gradients = cross_gradients
        self.average_at_end = average_at_end
        # The step after which all replicas were given the same weights.
        self._agreed_at: int | None = None

    def _build(self, variables: Sequence[keras.Variable]) -> None:
        # First, because new variables of the first worker go to all others.
        agreement.check(lambda: self._facts(variables))
        super()._build(variables)

    def _check_inner_optimizer(self) -> None:
        checks.check_inner_optimizer(self.inner_optimizer)

    def _create_state(self, variables: Sequence[keras.Variable]) -> None:
        self._schedule.build(self.add_variable)
        strategy = tf.distribute.get_strategy()
        self._num_replicas = strategy.num_replicas_in_sync
        # Replicas may differ, where another optimizer like this has not
        # averaged them. All rules start with weights that are alike.
        if self._num_replicas > 1 and not averaging.are_alike(
            variables, strategy
        ):
            logger.warning(
                "The replicas had weights of their own. '%s' starts with their "
                "mean",
                self.name,
            )
            averaging.average(variables, strategy)
        checks.check_constant(
            self.topology, self.error_feedback, self._num_replicas
        )
        checks.check_symmetric(
            self.topology, self.mixing_rule, self._num_replicas
        )
        self._masking: layer_mask_lib.Masking | None = None
        checks.check_no_gradient_groups(
            self.topology,
            self._num_replicas,
            layer_mask=self.layer_mask,
            cross_gradients=self.cross_gradients,
        )
        if self.layer_mask is not None:
            self._masking = layer_mask_lib.Masking(
                self.layer_mask, variables, self._num_replicas
            )
        self._zeroed = replica_state.ReplicaState(
            lambda: tf.constant(0, tf.int64)
        )
        # A single replica has nobody to exchange with, and replicas without
        # weights nothing.
        self._gossip = None
        if self._num_replicas > 1 and any(
            map(variable_rules.can_be_summed, variables)
        ):
            self._gossip = gossip.Gossip(
                variables,
                gossip.Choices(
                    self.topology,
                    self.sparsifier,
                    self.codec,
                    self.error_feedback,
                    self.mixing_rule,
                    self.consensus_step_size,
                    self.cross_gradients,
                ),
            )

    def _facts(self, variables: Sequence[keras.Variable]) -> dict[str, Any]:
        """Returns the arguments in which all workers must agree."""
        config = self.get_config()
        del config["name"]
        return {
            "version": version.__version__,
            "trainable_variables": [
                (list(variable.shape), variable.dtype) for variable in variables
            ],
            **{
                name: saved_config.without_names(value)
                for name, value in config.items()
            },
        }

    @tracing.untranslated
    def apply_if_finite(
        self,
        grads: Iterable[flat_buffer.Gradient],
        trainable_variables: Iterable[keras.Variable] | None = None,
    ) -> tf.Tensor:
        """Exchanges weights with neighbours, and applies gradients.

        Returns:
            Scalar bool tensor, True: no step is skipped.
        """
        checks.check_no_loss_scaling(self)
        checks.check_knows_loss(
            self.cross_gradients, _gradients_at.get() is not None
        )
        return super().apply_if_finite(grads, trainable_variables)

    @contextlib.contextmanager
    def with_gradients_at(self, gradients_at: GradientsAt) -> Iterator[None]:
        """Tells steps how to take gradients at weights of neighbours.

        For `cross_gradients` in a training loop of your own; a model whose
        class derives from `CrossGradientTraining` does so itself. To be used
        in a replica context, around `apply` or `apply_gradients`.

        Args:
            gradients_at: Function of a list of variables, and of a list of
                tensors of their shapes, that returns a list of the gradients of
                this replica's loss at these values, or None where there is
                none. As everywhere the loss is divided by the number of
                replicas. It is called once for each neighbour, and must leave
                all variables as they are.

        Example:

        ```python
        def gradients_at(variables, values):
            with tf.GradientTape() as tape:
                tape.watch(values)
                with keras.StatelessScope(zip(variables, values)):
                    loss = loss_of(model(x))
            return tape.gradient(loss, values)

        with optimizer.with_gradients_at(gradients_at):
            optimizer.apply(gradients, model.trainable_variables)
        ```
        """
        token = _gradients_at.set(gradients_at)
        try:
            yield
        finally:
            _gradients_at.reset(token)

    def _step(
        self,
        gradients: Sequence[flat_buffer.Gradient],
        apply: Callable[[Sequence[flat_buffer.Gradient]], None],
        skip: Callable[[], None],
    ) -> tf.Tensor:
        del skip
        number = self._iterations.value.read_value()
        own = self._own(gradients)
        if self._gossip is not None and self.cross_gradients is not None:
            _, exchange = self._schedule.take_turn()
            own = self._gossip.mix_with_cross_gradients(
                own, self._own_at, exchange
            )
        elif self._gossip is not None:
            own = self._gossip.average_gradients(own, number)
            self._mix()
        if self._masking is None:
            apply(own)
        else:
            kept = self._masking.weights()
            apply(self._masking.gradients(own))
            self._masking.restore(kept)
        return tf.constant(True)

    def _own(
        self, gradients: Sequence[flat_buffer.Gradient]
    ) -> list[flat_buffer.Gradient]:
        """The gradients of this replica's own loss; counts those taken as 0."""
        # Others are values to assign, and stay as they are.
        slots = variable_rules.summed_slots(self._trainable_variables)
        scaled, is_finite = own_gradients.own_gradients(
            [gradients[i] for i in slots], self._num_replicas
        )
        zeroed = self._zeroed.variables()
        zeroed.assign_add(tf.cast(~is_finite, zeroed.dtype))
        own = [*gradients]
        for i, gradient in zip(slots, scaled, strict=True):
            own[i] = gradient
        return own

    def _own_at(
        self, weights: Sequence[tf.Tensor | None]
    ) -> list[flat_buffer.Gradient]:
        """The gradients at other weights, see `gossip.GradientsAt`."""
        gradients_at = _gradients_at.get()
        assert gradients_at is not None
        variables = self._trainable_variables
        values = [
            tf.convert_to_tensor(variable) if value is None else value
            for variable, value in zip(variables, weights, strict=True)
        ]
        found = list(gradients_at(variables, values))
        training_validation.check_gradient_shapes(found, variables)
        return self._own(self._unscaled(found))

    def _mix(self) -> None:
        """Exchanges weights with neighbours, if it is time to."""
        assert self._gossip is not None
        is_time, number = self._schedule.take_turn()
        branches.call_on_all_replicas(
            is_time, self._gossip.mix, lambda _: None, (number,)
        )

    @property
    def counters(self) -> list[keras.Variable]:
        return [*super().counters, *self._schedule.variables]

    @property
    def communication_period(self) -> int:
        """In the first of how many steps the replicas exchange."""
        return self._schedule.period

    @communication_period.setter
    def communication_period(self, period: int) -> None:
        validation.check_integer("communication_period", period, 1)
        checks.check_cross_gradients(
            self.cross_gradients, communication_period=period
        )
        self._schedule.set_period(int(period))

    @property
    def zeroed_gradients(self) -> list[int]:
        """Counts, for each replica of this process, the gradients taken as 0.

        They held NaN or infinity.
        """
        training_validation.check_built(self, "zeroed_gradients")
        return [int(count) for [count] in self._zeroed.local_arrays()]

    @property
    def replicas_agree(self) -> bool:
        """True if all replicas are known to have the same weights."""
        if not self.built or self._num_replicas == 1:
            return True
        if int(self._iterations.numpy()) in (0, self._agreed_at):
            return True
        # Those of other workers cannot be asked, as only one worker may save.
        strategy = keras_internals.strategy_of(self)
        return averaging.are_local(strategy) and averaging.are_alike(
            self._trainable_variables, strategy
        )

    def note_agreement(self, agrees: bool) -> None:
        """Notes that all replicas were given the same weights, or their own.

        Args:
            agrees: Boolean.
        """
        self._agreed_at = int(self._iterations.numpy()) if agrees else None

    def average_weights(self) -> None:
        """Gives all replicas the mean of their trainable weights.

        To be called outside of the replicas, on all workers at the same time.
        (`averaged` does so for a while, with all weights of a model.)
        """
        training_validation.check_built(self, "average_weights")
        if self._num_replicas > 1:
            averaging.average(
                self._trainable_variables, keras_internals.strategy_of(self)
            )
        self.note_agreement(True)

    def use_tracked_average(self) -> None:
        """Gives each replica what it has tracked of the mean of the weights.

        With `mixing_rule=AverageTracker()`, outside of the replicas. (`tracked`
        does so for a while.) Nothing is sent.

        Raises:
            ValueError: If the optimizer is not built, or has another rule.
        """
        training_validation.check_built(self, "use_tracked_average")
        checks.check_tracks(self.mixing_rule)
        if self._gossip is not None:
            strategy = keras_internals.strategy_of(self)
            strategy.run(
                tf.function(self._gossip.use_tracked_average, autograph=False)
            )
        self.note_agreement(False)

    def finalize_variable_values(
        self, var_list: Sequence[keras.Variable]
    ) -> None:
        super().finalize_variable_values(var_list)
        if not self.built:
            return
        if any(self.zeroed_gradients):
            logger.warning(
                "Gradients that held NaN or infinity were taken as 0: %s of "
                "the replicas of this process",
                self.zeroed_gradients,
            )
        if self.average_at_end:
            self.average_weights()

    def wire_report(self) -> codecs.WireReport:
        """Returns the bytes that each replica sends per step, to print.

        Raises:
            ValueError: If the optimizer is not built, or nothing is sent: by a
                single replica, or without weights.
        """
        training_validation.check_built(self, "wire_report")
        if self._gossip is None:
            raise ValueError(
                "`wire_report` must be asked of several replicas that have "
                f"weights. Received: {self._num_replicas} with the shapes "
                f"{[tuple(v.shape) for v in self._trainable_variables]}"
            )
        return self._gossip.wire_report(self.communication_period)

    def get_config(self) -> dict[str, Any]:
        parts = {
            "topology": self.topology,
            "sparsifier": self.sparsifier,
            "codec": self.codec,
            "error_feedback": self.error_feedback,
            "mixing_rule": self.mixing_rule,
            "layer_mask": self.layer_mask,
            "cross_gradients": self.cross_gradients,
        }
        hyper_parameters.warn_if_unregistered(*parts.values())
        return {
            **super().get_config(),
            **{
                name: keras.saving.serialize_keras_object(part)
                for name, part in parts.items()
            },
            "consensus_step_size": self.consensus_step_size,
            # The variables have what it has become since.
            "communication_period": self._schedule.first_period,
            "average_at_end": self.average_at_end,
        }
