"""Loss scaling for `mixed_float16` that all replicas agree on."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_regtopk import training_validation
from tf_regtopk import validation
from tf_regtopk.optimizers import wrapper
from tf_regtopk.steps import flat_buffer
from tf_regtopk.steps import own_gradients


@keras.saving.register_keras_serializable(package="tf_regtopk")
class LossScaleOptimizer(keras.optimizers.LossScaleOptimizer):
    """`keras.optimizers.LossScaleOptimizer` for several replicas.

    Small float16 gradients would be rounded to 0. So the loss is multiplied by
    a scale, and the gradients are divided by it:

        step skipped, on any replica a NaN or infinity:  scale = scale / 2
        `dynamic_growth_steps` taken in a row:           scale = scale * 2

    With `accumulation_steps` a step is an exchange: batches that are only added
    up leave the scale as it is.

    Keras's own looks for NaN and infinity in one replica's gradients only, and
    while others overflow leaves the scale as it is; several workers may even
    wait for each other for ever. This one asks the wrapped optimizer, whose
    exchange tells it of all replicas.

    Args:
        inner_optimizer: A `SparsifiedOptimizer`.
        initial_scale: Positive float. The scale to begin with.
        dynamic_growth_steps: Integer. See above.
        name: String. The name of the optimizer.

    Raises:
        TypeError: If `inner_optimizer` is another optimizer, or an argument of
            another type.
        ValueError: If an argument breaks its rule.

    Example:

    ```python
    keras.config.set_dtype_policy("mixed_float16")
    with tf.distribute.MirroredStrategy().scope():
        model = keras.Sequential([keras.layers.Dense(10)])
        model.compile(
            optimizer=tf_regtopk.LossScaleOptimizer(
                tf_regtopk.SparsifiedOptimizer(keras.optimizers.SGD(0.1))
            ),
            loss="mse",
        )
    ```
    """

    def __init__(
        self,
        inner_optimizer: wrapper.OptimizerWrapper,
        initial_scale: float = 2.0**15,
        dynamic_growth_steps: int = 2000,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(inner_optimizer, wrapper.OptimizerWrapper):
            raise TypeError(
                "`inner_optimizer` must be a `SparsifiedOptimizer`. "
                f"Received: inner_optimizer={inner_optimizer!r}"
            )
        validation.check_number(
            "initial_scale", initial_scale, "positive", lambda scale: scale > 0
        )
        validation.check_integer(
            "dynamic_growth_steps", dynamic_growth_steps, 1
        )
        super().__init__(
            inner_optimizer,
            initial_scale=initial_scale,
            dynamic_growth_steps=dynamic_growth_steps,
            name=name,
            **kwargs,
        )
        inner_optimizer.is_scaled_locally = False
        inner_optimizer.expects_skips = True

    def build(self, var_list: Sequence[keras.Variable]) -> None:
        """Creates the variables of this and of the inner optimizer.

        Args:
            var_list: List of the trainable variables.
        """
        if self.built:
            return
        wrapper.build_once_for_all_replicas(
            self, lambda: super(LossScaleOptimizer, self).build(var_list)
        )

    def load_own_variables(self, store: Mapping[str, np.ndarray]) -> None:
        own = self._variables
        names = [*store.keys()]
        of_inner = {
            str(int(name) - len(own)): np.asarray(store[name])
            for name in names
            if name.isdigit() and int(name) >= len(own)
        }
        if (
            self.built
            and len(names) == len(own) + len(of_inner)
            and self.inner_optimizer.could_load(of_inner)
        ):
            # Keras's own has saved this, around the plain inner optimizer.
            for i, variable in enumerate(own):
                variable.assign(store[str(i)])
            return
        super().load_own_variables(store)

    def exclude_from_weight_decay(
        self,
        var_list: Sequence[keras.Variable] | None = None,
        var_names: Sequence[str] | None = None,
    ) -> None:
        """Excludes variables from the weight decay of the inner optimizer.

        Args:
            var_list: As of `keras.optimizers.Optimizer`.
            var_names: As of `keras.optimizers.Optimizer`.
        """
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def apply(
        self,
        grads: Sequence[flat_buffer.Gradient],
        trainable_variables: Sequence[keras.Variable] | None = None,
    ) -> None:
        """Divides the gradients by the scale, applies them, adapts the scale.

        Args:
            grads: List of this replica's gradients of the scaled loss.
            trainable_variables: List of the variables that they belong to.
        """
        self.inner_optimizer.check_context()
        grads = list(grads)
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
        if not self.built:
            if trainable_variables is None:
                raise training_validation.variables_needed()
            self.build(trainable_variables)
        scale = self.dynamic_scale.value
        variables = trainable_variables or self._trainable_variables
        unscaled = own_gradients.unscaled(grads, variables, scale)
        tells = self.inner_optimizer.tells_of_overflow()
        taken = self.inner_optimizer.apply_if_finite(
            unscaled, trainable_variables
        )
        counter = self.step_counter.value
        grows = taken & (counter >= self.dynamic_growth_steps - 1)
        factor = tf.where(taken, tf.where(grows, 2.0, 1.0), 0.5)
        factor = tf.where(tells, factor, 1.0)
        # Neither 0 nor infinity, from which there would be no way back.
        self.dynamic_scale.assign(
            tf.clip_by_value(scale * factor, 2.0**-126, 2.0**127)
        )
        in_a_row = tf.where(taken & ~grows, counter + 1, 0)
        self.step_counter.assign(tf.where(tells, in_a_row, counter))
