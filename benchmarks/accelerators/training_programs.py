"""The training of cifar10_resnet.py as functions that can be exported."""

import image_training
import keras
import methods
import numpy as np
import tensorflow as tf

import tf_regtopk
from tf_regtopk import simulation


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

        def gradient(numbers):
            with tf.GradientTape() as tape:
                tape.watch(weights)
                logits = self._logits(weights, tf.gather(images, numbers), True)
                loss = self._loss(tf.gather(labels, numbers), logits)
            return tape.gradient(loss, weights)

        # One worker after the other: compiled once, whatever their number.
        return tf.map_fn(
            gradient,
            numbers,
            fn_output_signature=tf.TensorSpec(weights.shape, weights.dtype),
        )

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
    """

    def __init__(self, name, args, model):
        optimizer = methods.make_optimizer(
            name,
            args,
            1.0,
            args.density,
            args.momentum,
            adam=args.inner_optimizer == "adam",
        )
        self.version = methods.version(name)
        # Some take a multiple of the learning rate.
        self._scale = float(optimizer.learning_rate)
        self._descent = simulation.descent_of(optimizer, args.num_workers)
        if isinstance(optimizer, tf_regtopk.SparsifiedOptimizer):
            optimizer.build(model.trainable_variables)
            report = optimizer.wire_report()
            cluster = tf_regtopk.Cluster(args.num_workers)
            self.bytes_a_step = round(
                tf_regtopk.AllGather().sent_bytes(report.payload_bytes, cluster)
                + tf_regtopk.AllReduce().sent_bytes(
                    report.dense_below_bytes, cluster
                )
            )
        else:
            self.bytes_a_step = image_training.bytes_a_step(
                optimizer, model, args.num_workers
            )

    def start(self, weights):
        """The list of arrays of the state before the first step."""
        return tf.nest.flatten(self._descent.initial_state(weights))

    def step(self, gradients, t, learning_rate, *arrays):
        """Those after a step, of which the weights are the first."""
        weights = tf.TensorSpec(gradients.shape[1:], gradients.dtype)
        state = tf.nest.pack_sequence_as(
            tf.function(self._descent.initial_state)
            .get_concrete_function(weights)
            .structured_outputs,
            arrays,
        )
        return tf.nest.flatten(
            self._descent.step(state, gradients, t, self._scale * learning_rate)
        )
