"""A worker of `time_to_accuracy.py`: one of `cifar10_long.py`, as a process."""

import pathlib
import types

import cifar10_resnet
import image_training
import methods as study_methods
import numpy as np
import simulated_training

from benchmarks.cluster import methods

_NUM_PREDICTED = 500


class StudyWorker(methods.TensorFlowWorker):
    """The network, shards, batches, optimizers and rates of the study."""

    def _load(self, args):
        self._index = args["index"]
        self._flags = types.SimpleNamespace(**args["flags"])
        self._rates, self._seed = args["learning_rates"], args["seed"]
        self._scales = {}

        def load(name):
            # All workers of a machine share the pages.
            path = pathlib.Path(args["data"], f"{name}.npy")
            return np.load(path, mmap_mode="r")

        self._images, self._labels = load("train_images"), load("train_labels")
        self._test = load("test_images"), load("test_labels")
        held_out = min(cifar10_resnet.HELD_OUT, len(self._labels) // 10)
        self._numbers = image_training.numbers_of(
            self._labels[: len(self._labels) - held_out],
            self._flags,
            self._seed,
            self._flags.rounds,
        )[:, self._index]

    def can_run(self, method):
        """None, or why not."""
        del method
        return None

    def _model(self, size):
        del size
        self._keras.utils.set_random_seed(self._seed)
        return cifar10_resnet.build_model(self._flags)

    def _optimizer(self, method):
        name = "dense" if method == "local" else method
        optimizer = study_methods.make_optimizer(
            *(name, self._flags, 1.0),
            *(self._flags.density, self._flags.momentum),
        )
        # Some take a multiple of the learning rate.
        self._scales[method] = float(
            self._keras.ops.convert_to_numpy(optimizer.learning_rate)
        )
        return optimizer

    def _before_step(self, method, number):
        number %= len(self._numbers)
        rate = simulated_training.learning_rate_at(
            *(number, len(self._numbers), self._rates[method]),
            *(self._flags.warm_up, self._flags.schedule),
        )
        self._optimizers[method].learning_rate = self._scales[method] * rate
        batch = self._numbers[number]
        return (
            self._tf.constant(self._images[batch]),
            self._tf.constant(self._labels[batch]),
        )

    def accuracy(self, method):
        """That of the first worker's model on the test images; else None."""
        if self._index:
            return None
        model = self._models[method == "local"]
        images, labels = self._test
        predict = self._tf.function(
            lambda images: self._tf.argmax(model(images, training=False), -1)
        )
        predicted = [
            predict(self._tf.constant(images[i : i + _NUM_PREDICTED])).numpy()
            for i in range(0, len(images), _NUM_PREDICTED)
        ]
        return float(np.mean(np.concatenate(predicted) == labels))
