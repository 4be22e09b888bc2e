"""Models that know their loss at the weights of neighbours."""

from collections.abc import Sequence
import functools
from typing import Any
from typing import TYPE_CHECKING

import keras
import tensorflow as tf

from tf_regtopk.optimizers import decentralized
from tf_regtopk.steps import flat_buffer

# The values of variables, for a `keras.StatelessScope`.
_Mapping = Sequence[tuple[keras.Variable, tf.Tensor]]

# No model itself: Keras gives a functional model's class other bases, and with
# it all of the models from which the class derives.
if TYPE_CHECKING:
    from keras import Model as _Base
else:
    _Base = object


class CrossGradientTraining(_Base):
    r"""Trains a model with the `CrossGradients` of its optimizer.

    For a class that derives from this one first, and from `keras.Model` or
    `keras.Sequential` second:

    ```python
    class Network(tf_regtopk.CrossGradientTraining, keras.Model):
        ...

    with strategy.scope():
        model = Network(inputs, outputs)
        model.compile(
            tf_regtopk.DecentralizedOptimizer(
                keras.optimizers.SGD(0.1),
                tf_regtopk.Ring(),
                cross_gradients=tf_regtopk.CrossGradients()),
            loss="mse")
    ```

    `train_step` is that of the other class. In it the optimizer takes the
    gradient of this replica's batch at the weights of each neighbour: the model
    is called once more for each, with `training=True`, and the loss is that of
    `compute_loss`. What these calls do to Keras variables is dropped: moving
    statistics, seeds and metrics change once a step, and dropout is the same at
    all weights. (A `tf.Variable` that a layer of your own assigns, is assigned
    in each call.)

    A class whose `train_step` has another loss overrides `cross_gradient_loss`
    as well.
    """

    def train_step(self, data: Any) -> Any:
        """Takes a step, see `keras.Model.train_step`."""
        optimizer = self._cross_optimizer()
        # The own pass changes them.
        before = [
            (variable, tf.convert_to_tensor(variable))
            for variable in self.non_trainable_variables
        ]
        with optimizer.with_gradients_at(
            functools.partial(self._gradients_at, data, before)
        ):
            return super().train_step(data)

    def cross_gradient_loss(self, data: Any) -> tf.Tensor:
        """Returns the loss of a batch that `train_step` differentiates.

        Args:
            data: As of `train_step`.

        Returns:
            Scalar tensor, divided by the number of replicas, as Keras's are.
        """
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        return self.compute_loss(
            x=x,
            y=y,
            y_pred=self(x, training=True),
            sample_weight=sample_weight,
        )

    def _gradients_at(
        self,
        data: Any,
        before: _Mapping,
        variables: Sequence[keras.Variable],
        values: Sequence[tf.Tensor],
    ) -> list[flat_buffer.Gradient]:
        """See `decentralized.GradientsAt`."""
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            mapping = [*before, *zip(variables, values, strict=True)]
            with keras.StatelessScope(mapping, collect_losses=True):
                loss = self.cross_gradient_loss(data)
            loss = self.optimizer.scale_loss(loss)
        gradients: list[flat_buffer.Gradient] = tape.gradient(loss, values)
        return gradients

    def _cross_optimizer(self) -> decentralized.DecentralizedOptimizer:
        """The optimizer, or an error."""
        optimizer = self.optimizer
        if (
            not isinstance(optimizer, decentralized.DecentralizedOptimizer)
            or optimizer.cross_gradients is None
        ):
            raise ValueError(
                "A model of a class that derives from `CrossGradientTraining` "
                "must be compiled with a `DecentralizedOptimizer(..., "
                "cross_gradients=CrossGradients())`. Received: "
                f"optimizer={optimizer!r}"
            )
        return optimizer
