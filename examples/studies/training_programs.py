"""The training of an image model as pure functions of tensors.

`benchmarks/accelerators/export_training.py` exports them, and
`simulated_training.py` calls them.
"""

import math
import pathlib
import sys

import keras
import numpy as np
import tensorflow as tf

sys.path.append(str(pathlib.Path(__file__).parent.parent))

import image_training
import methods
import powersgd

import tf_regtopk
from tf_regtopk import simulation
from tf_regtopk.steps import telemetry

# Whose residual errors a worker takes for sent when it looks ahead.
LOOK_AHEAD = ("all", "own")


class Network:
    """The model as functions of its weights in one vector.

    Args:
        model: A built Keras model without variables that are not trained.
    """

    def __init__(self, model):
        if model.non_trainable_variables:
            raise ValueError(
                "`model` must have trainable variables only. Received: "
                f"{[v.path for v in model.non_trainable_variables]}"
            )
        self._model = model
        self._loss = keras.losses.SparseCategoricalCrossentropy(
            from_logits=True
        )
        self._shapes = [tuple(v.shape) for v in model.trainable_variables]
        self._sizes = [int(np.prod(shape)) for shape in self._shapes]
        self.size = sum(self._sizes)

    def gradients(self, weights, images, labels, numbers):
        """Each worker's, of its own mean loss.

        Args:
            weights: Float tensor `[J]`.
            images: All images `[n, height, width, channels]`.
            labels: int32 tensor `[n]`.
            numbers: int32 tensor `[N, batch]`, those in the workers' batches.

        Returns:
            Float tensor `[N, J]`.
        """
        # One worker after the other: compiled once, whatever their number.
        return tf.map_fn(
            lambda numbers: self.gradient(
                weights, tf.gather(images, numbers), tf.gather(labels, numbers)
            ),
            numbers,
            fn_output_signature=tf.TensorSpec(weights.shape, weights.dtype),
        )

    def gradient(self, weights, images, labels):
        """The gradient `[J]` of the mean loss of one worker's batch."""
        with tf.GradientTape() as tape:
            tape.watch(weights)
            logits = self._logits(weights, images, True)
            loss = self._loss(labels, logits)
        return tape.gradient(loss, weights)

    def predict(self, weights, images):
        logits = self._logits(weights, images, False)
        return tf.argmax(logits, axis=-1, output_type=tf.int32)

    def _logits(self, weights, images, training):
        values = [
            tf.reshape(part, shape)
            for part, shape in zip(
                tf.split(weights, self._sizes), self._shapes, strict=True
            )
        ]
        return self._model.stateless_call(
            values, [], images, training=training
        )[0]


class Method:
    """A method of the example: how a step goes after the gradients.

    Args:
        name: As of `methods.make_optimizer`.
        args: The flags.
        model: A built Keras model.
        density: As of `methods.make_optimizer`; None for that of the flags.
    """

    def __init__(self, name, args, model, density=None):
        optimizer = methods.make_optimizer(
            name,
            args,
            1.0,
            args.density if density is None else density,
            args.momentum,
            adam=args.inner_optimizer == "adam",
        )
        self.version = methods.version(name)
        # Some take a multiple of the learning rate.
        self._scale = float(optimizer.learning_rate)
        self.is_sparse = isinstance(optimizer, tf_regtopk.SparsifiedOptimizer)
        shapes = [v.shape for v in model.trainable_variables]
        self._descent = powersgd.descent_of(optimizer, args.num_workers, shapes)
        if isinstance(self._descent, simulation.DenseDescent):
            self.bytes_a_step = image_training.bytes_a_step(
                optimizer, model, args.num_workers
            )
        else:
            size = sum(map(math.prod, shapes))
            self.bytes_a_step = round(self._descent.sent_bytes(size))

    def start(self, weights):
        """The list of arrays of the state before the first step."""
        return tf.nest.flatten(self._descent.initial_state(weights))

    def go_on(self, arrays):
        """The state after steps with another density.

        What the sparsifier remembers of the last one is dropped, as by
        `SparsifiedOptimizer.set_density`.
        """
        before = self._state(arrays[0], arrays)
        start = self._descent.initial_state(before.weights)
        return tf.nest.flatten(before._replace(memory=start.memory))

    def step(self, gradients, t, learning_rate, *arrays):
        """Those after a step, of which the weights are the first."""
        return tf.nest.flatten(
            self._descent.step(
                self._state(gradients[0], arrays),
                gradients,
                t,
                self._scale * learning_rate,
            )
        )

    def check_look_ahead(self):
        """Raises unless what is held back is applied as a step of SGD."""
        rule = getattr(self._descent, "error_feedback", None)
        if rule is None or rule.residual_place is None:
            raise ValueError(
                "`look_ahead` must be none for methods without a residual "
                f"error. Received: {self._descent!r}"
            )
        if self._descent.inner != simulation.MomentumSGD(0.0):
            raise ValueError(
                "`look_ahead` must be none where the inner optimizer is not "
                f"plain SGD. Received: {self._descent.inner!r}"
            )

    def look_ahead(self, whose, learning_rate, *arrays):
        """The weights if the residual errors e had been sent, `[N, J]`.

            x - rate (sum of all e)     or     x - rate N e of worker n

        Args:
            whose: One of `LOOK_AHEAD`.
            learning_rate: Scalar float tensor.
            *arrays: As of `step`.
        """
        state = self._state(arrays[0], arrays)
        e = state.local[self._descent.error_feedback.residual_place]
        n = self._descent.num_workers
        held = n * e
        if whose == "all":
            held = tf.broadcast_to(tf.reduce_sum(e, axis=0), e.shape)
        return state.weights - self._scale * learning_rate * held

    def telemetry(self, gradients, t, learning_rate, *arrays):
        """The numbers of each worker, as of `SparseDescent.telemetry`."""
        return self._descent.telemetry(
            self._state(gradients[0], arrays),
            gradients,
            t,
            self._scale * learning_rate,
        )

    def by_name(self, of_workers):
        """Means over the workers of what `telemetry` returned, by name.

        Counts are shares of the k entries, the residual error one of the
        gradient.
        """
        sparsifier = self._descent.sparsifier
        rows = [
            telemetry.by_name([a.numpy() for a in arrays], [1], [0], sparsifier)
            for arrays in of_workers
        ]
        means = {
            name: float(np.mean([r[name] for r in rows])) for name in rows[0]
        }
        k = means["selected"]
        shares = ("unlike_top_k", *sparsifier.measured)
        return {name: means[name] / k for name in shares} | {
            "cancelled": means["cancelled"],
            "residual": means["residual"] / means["gradient"],
        }

    def _state(self, like_weights, arrays):
        weights = tf.TensorSpec(like_weights.shape, like_weights.dtype)
        return tf.nest.pack_sequence_as(
            tf.function(self._descent.initial_state)
            .get_concrete_function(weights)
            .structured_outputs,
            arrays,
        )
