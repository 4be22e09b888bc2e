"""Workers of `time_to_accuracy.py`: those of `cifar10_long.py` as processes."""

import pathlib
import types

import cifar10_resnet
import image_training
import methods as study_methods
import numpy as np
import resnet
import simulated_training

from benchmarks.cluster import methods

_NUM_PREDICTED = 500
_WHOLE = "whole:"
# Methods whose steps are PyTorch's, with the hook of each.
HOOKS = {
    "dense_float16": "fp16",
    "powersgd1": "powersgd1",
    "powersgd4": "powersgd4",
}


class Data:
    """The shards and batches of a worker of the study.

    Args:
        args: The arguments of a worker.
    """

    def __init__(self, args):
        self.flags = types.SimpleNamespace(**args["flags"])

        def load(name):
            # All workers of a machine share the pages.
            path = pathlib.Path(args["data"], f"{name}.npy")
            return np.load(path, mmap_mode="r")

        self._images, self._labels = load("train_images"), load("train_labels")
        self.test = load("test_images"), load("test_labels")
        held_out = min(cifar10_resnet.HELD_OUT, len(self._labels) // 10)
        self._numbers = image_training.numbers_of(
            self._labels[: len(self._labels) - held_out],
            self.flags,
            args["seed"],
            self.flags.rounds,
        )[:, args["index"]]

    def batch(self, number):
        """`(images, labels)` of a step, as arrays."""
        numbers = self._numbers[number % self.flags.rounds]
        return self._images[numbers], self._labels[numbers]


class StudyWorker(methods.TensorFlowWorker):
    """The network, shards, batches, optimizers and rates of the study.

    `whole:METHOD` is a method with weights that no other one changes.
    """

    def _load(self, args):
        self._index, self._seed = args["index"], args["seed"]
        self._data = Data(args)
        self._rates, self._scales = args["learning_rates"], {}

    def can_run(self, method):
        """None, or why not."""
        del method
        return None

    def _model(self, size):
        del size
        self._keras.utils.set_random_seed(self._seed)
        return cifar10_resnet.build_model(self._data.flags)

    def weights_of(self, method):
        if method.startswith(_WHOLE):
            return method
        return super().weights_of(method)

    def _optimizer(self, method):
        args = self._data.flags
        optimizer = study_methods.make_optimizer(
            _name(method), args, 1.0, args.density, args.momentum
        )
        # Some take a multiple of the learning rate.
        self._scales[method] = float(
            self._keras.ops.convert_to_numpy(optimizer.learning_rate)
        )
        return optimizer

    def _before_step(self, method, number):
        args = self._data.flags
        rate = simulated_training.learning_rate_at(
            *(number % args.rounds, args.rounds, self._rates[_name(method)]),
            *(args.warm_up, args.schedule),
        )
        self._optimizers[method].learning_rate = self._scales[method] * rate
        return tuple(map(self._tf.constant, self._data.batch(number)))

    def accuracy(self, method):
        """That of the first worker's model on the test images; else None."""
        if self._index:
            return None
        model = self._models[self.weights_of(method)]
        images, labels = self._data.test
        predict = self._tf.function(
            lambda images: self._tf.argmax(model(images, training=False), -1)
        )
        predicted = [
            predict(self._tf.constant(images[i : i + _NUM_PREDICTED])).numpy()
            for i in range(0, len(images), _NUM_PREDICTED)
        ]
        return float(np.mean(np.concatenate(predicted) == labels))


def _name(method):
    """The method of the study whose optimizer and rate a method has."""
    return "dense" if method == "local" else method.removeprefix(_WHOLE)


class TorchStudyWorker(methods.TorchWorker):
    """A network of the same layers under PyTorch, for the time of its steps."""

    def _load(self, args):
        self._data = Data(args)

    def _model(self, size):
        del size
        if self._data.flags.model != "resnet8":
            raise ValueError(
                "`model` must be resnet8 under PyTorch. "
                f"Received: model={self._data.flags.model!r}"
            )
        return _torch_resnet8()

    def build(self, method, size):
        """Makes the model and the optimizer of a method of `HOOKS`."""
        return super().build(f"ddp:{HOOKS[method]}", size)

    def step(self, method, number):
        """Takes one step, and returns the loss when all of it is done."""
        return super().step(f"ddp:{HOOKS[method]}", number)

    def _batch(self, number):
        images, labels = self._data.batch(number)
        torch = self._torch
        images = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        return images / 64 - 2, torch.from_numpy(labels)


def _torch_resnet8():
    """The layers of `resnet.py`'s resnet8 in PyTorch."""
    from torch import nn

    widths, _ = resnet.MODELS["resnet8"]

    def convolution(before, after, size, stride):
        return nn.Sequential(
            nn.Conv2d(
                *(before, after, size, stride),
                padding=size // 2,
                bias=False,
            ),
            nn.GroupNorm(max(1, after // 16), after, eps=1e-3),
        )

    class Block(nn.Module):
        def __init__(self, before, after):
            super().__init__()
            stride = 1 if before == after else 2
            self.body = nn.Sequential(
                convolution(before, after, 3, stride),
                nn.ReLU(),
                convolution(after, after, 3, 1),
            )
            self.shortcut = (
                nn.Identity()
                if stride == 1
                else convolution(before, after, 1, stride)
            )

        def forward(self, x):
            return nn.functional.relu(self.body(x) + self.shortcut(x))

    return nn.Sequential(
        convolution(3, widths[0], 3, 1),
        nn.ReLU(),
        *map(Block, (widths[0], *widths), widths),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(widths[-1], 10),
    )
