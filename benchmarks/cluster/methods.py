"""The methods that `step.py` compares, as one worker runs them.

All train the same network: 784 inputs, dense layers with ReLU and a softmax
over 10 classes, on random examples that differ from worker to worker, by SGD
with a momentum.
"""

import contextlib
import datetime
import functools
import gc
import itertools
import math
import signal

import numpy as np

_NUM_INPUTS = 784
_NUM_CLASSES = 10
_NUM_BATCHES = 16
_LEARNING_RATE = 0.01
_MOMENTUM = 0.9


def hidden_units(size, hidden_layers=2):
    """Width of the hidden layers for about `size` parameters.

    A multiple of 32, as of most networks: TensorFlow then splits the aggregate
    without copying it.

    >>> hidden_units(1_000_000), hidden_units(11_000_000)
    (672, 2944)
    >>> hidden_units(1_000_000, hidden_layers=8)
    320
    """
    linear = _NUM_INPUTS + hidden_layers + _NUM_CLASSES
    constant = max(0, size - _NUM_CLASSES)
    if hidden_layers == 1:
        units = constant / linear
    else:
        square = hidden_layers - 1
        root = math.isqrt(linear**2 + 4 * square * constant)
        units = (root - linear) / (2 * square)
    return max(1, round(units / 32) * 32 if units >= 32 else int(units))


def num_parameters(size, hidden_layers=2):
    """How many parameters that network has.

    >>> num_parameters(1_000_000)
    986506
    """
    return sum(math.prod(shape) for shape in shapes(size, hidden_layers))


def shapes(size, hidden_layers=2):
    """The shapes of its kernels and biases.

    >>> shapes(1_000_000)[:4]
    [(784, 672), (672,), (672, 672), (672,)]
    """
    units = hidden_units(size, hidden_layers)
    widths = (_NUM_INPUTS, *[units] * hidden_layers, _NUM_CLASSES)
    return [
        shape
        for inputs, outputs in itertools.pairwise(widths)
        for shape in ((inputs, outputs), (outputs,))
    ]


def batches(index, batch_size):
    """Random examples and classes of worker `index`."""
    rng = np.random.default_rng(1000 + index)
    shape = (_NUM_BATCHES, batch_size)
    inputs = rng.standard_normal((*shape, _NUM_INPUTS), np.float32)
    return inputs, rng.integers(_NUM_CLASSES, size=shape)


def cut(sizes, count):
    """Cuts variables into groups of neighbours, of about as many entries.

    Args:
        sizes: The number of entries of each variable.
        count: The number of groups.

    Returns:
        A slice for each group; fewer than `count` where variables are few.

    >>> cut([1, 1, 1, 1, 4], 2)
    [slice(0, 4, None), slice(4, 5, None)]
    """
    ends = np.cumsum(sizes)
    marks = [
        int(np.searchsorted(ends, ends[-1] * i / count - 0.5)) + 1
        for i in range(1, count)
    ]
    edges = sorted({0, *marks, len(sizes)})
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


class Buckets:
    """Optimizers that each exchange a part of the variables.

    The last variables are exchanged first, because their gradients are there
    first: the exchange may go on beside the rest of the backward pass.

    Args:
        make_optimizer: Function that returns an optimizer.
        count: The number of them.
    """

    def __init__(self, make_optimizer, count):
        self._make_optimizer, self._count = make_optimizer, count
        self._parts = []

    def build(self, variables):
        sizes = [math.prod(v.shape) for v in variables]
        for part in reversed(cut(sizes, self._count)):
            optimizer = self._make_optimizer()
            optimizer.build(variables[part])
            self._parts.append((optimizer, part))

    def apply(self, gradients, variables):
        for optimizer, part in self._parts:
            optimizer.apply(gradients[part], variables[part])


class TensorFlowWorker:
    """Keras models and this library, under its multi-worker strategy."""

    def __init__(self, args):
        import keras
        import tensorflow as tf
        from tensorflow.python.eager import context as context_lib

        import tf_regtopk

        tf.config.threading.set_intra_op_parallelism_threads(args["threads"])
        self._keras, self._tf, self._library = keras, tf, tf_regtopk
        # At 100 Mbit/s the initial value of a variable of 44 MB, on its way to
        # all workers, holds up heartbeats for more than the 10 s that
        # TensorFlow allows them; and no public function changes that.
        context = context_lib.context()
        context.configure_coordination_service = functools.partial(
            context.configure_coordination_service,
            heartbeat_timeout_in_ms=1000 * args["timeout"],
        )
        self._strategy = tf_regtopk.MultiWorkerMirroredStrategy(
            timeout_seconds=args["timeout"]
        )
        # TensorFlow takes SIGTERM for itself, and goes on.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._load(args)
        self._is_first = args["index"] == 0
        self._models, self._optimizers, self._steps = {}, {}, {}
        self.versions = {
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
        }

    def _load(self, args):
        """Keeps what is trained, and on which batches."""
        self._hidden_layers = args["hidden_layers"]
        inputs, classes = batches(args["index"], args["batch_size"])
        self._data = [
            (self._tf.constant(x), self._tf.constant(y))
            for x, y in zip(inputs, classes, strict=True)
        ]

    def can_run(self, method):
        """None, or why not."""
        if method.startswith("auto"):
            try:
                self._library.SparsifiedOptimizer(self._sgd(), exchange="auto")
            except (TypeError, ValueError) as e:
                return str(e)
        return None

    def _sgd(self):
        return self._keras.optimizers.SGD(_LEARNING_RATE, momentum=_MOMENTUM)

    def _model(self, size):
        keras = self._keras
        keras.utils.set_random_seed(0)
        units = hidden_units(size, self._hidden_layers)
        hidden = [
            keras.layers.Dense(units, activation="relu")
            for _ in range(self._hidden_layers)
        ]
        return keras.Sequential(
            [
                keras.Input((_NUM_INPUTS,)),
                *hidden,
                keras.layers.Dense(_NUM_CLASSES),
            ]
        )

    def _optimizer(self, method):
        kind, *rest = method.split(":")
        if kind in ("local", "dense"):
            return self._sgd()
        library = self._library
        if kind.startswith("buckets"):
            return Buckets(
                lambda: self._optimizer(":".join(["sparse", *rest])),
                int(kind.removeprefix("buckets")),
            )
        sparsifier = library.RegTopK(float(rest[0]))
        if kind == "auto":
            return library.SparsifiedOptimizer(
                self._sgd(), sparsifier, exchange="auto"
            )
        topology = library.AllGather()
        if kind == "owners":
            topology = library.ReduceScatter()
        return library.SparsifiedOptimizer(
            self._sgd(),
            sparsifier,
            codec=library.Codec(*rest[1].split("+")),
            topology=topology,
        )

    def weights_of(self, method):
        """A name of the weights that a method trains.

        The methods share weights, to need less memory, but `local`, which is
        outside of the strategy.
        """
        return "local" if method == "local" else "shared"

    def build(self, method, size):
        """Makes the model where there is none, and a new optimizer."""
        tf = self._tf
        # `local` is outside of the strategy: nothing is summed.
        strategy = self._strategy
        if method == "local":
            strategy = tf.distribute.get_strategy()
        num_replicas = strategy.num_replicas_in_sync
        self._optimizers.pop(method, None)
        self._steps.pop(method, None)
        gc.collect()
        with strategy.scope():
            name = self.weights_of(method)
            if name not in self._models:
                self._models[name] = self._model(size)
            model = self._models[name]
            optimizer = self._optimizers[method] = self._optimizer(method)
            optimizer.build(model.trainable_variables)

        def replica_step(inputs, classes):
            with tf.GradientTape() as tape:
                losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
                    classes, model(inputs, training=True)
                )
                # The sum over the replicas is the mean over all examples.
                loss = tf.reduce_mean(losses) / num_replicas
            variables = model.trainable_variables
            optimizer.apply(tape.gradient(loss, variables), variables)
            return loss

        self._steps[method] = tf.function(
            lambda *batch: strategy.run(replica_step, args=batch)
        )
        seconds = getattr(optimizer, "exchange_seconds", None)
        report = getattr(optimizer, "wire_report", None)
        return {
            "parameters": int(model.count_params()),
            "reported_bytes": int(report().sent_bytes) if report else None,
            "chosen_exchange": getattr(optimizer, "chosen_exchange", None),
            "exchange_seconds": seconds
            and {name: float(value) for name, value in seconds.items()},
        }

    def _before_step(self, method, number):
        """Makes ready for a step, and returns its batch."""
        del method
        return self._data[number % _NUM_BATCHES]

    def step(self, method, number):
        """Takes one step, and returns the loss when all of it is done."""
        batch = self._before_step(method, number)
        return float(self._steps[method](*batch).numpy())

    def profile(self, folder):
        """Traces, on the first worker, the steps within a `with` block."""
        if not self._is_first:
            return contextlib.nullcontext()
        return self._tf.profiler.experimental.Profile(folder)

    def free(self):
        """Forgets all models."""
        for dictionary in (self._models, self._optimizers, self._steps):
            dictionary.clear()
        self._keras.backend.clear_session()


class TorchWorker:
    """PyTorch's data-parallel module over gloo, and its hooks."""

    def __init__(self, args):
        import torch
        from torch import distributed

        if args["threads"]:
            torch.set_num_threads(args["threads"])
        self._torch, self._distributed = torch, distributed
        distributed.init_process_group(
            "gloo",
            init_method=f"tcp://{args['addresses'][0]}:{args['port']}",
            rank=args["index"],
            world_size=len(args["addresses"]),
            timeout=datetime.timedelta(seconds=args["timeout"]),
        )
        self._load(args)
        self._models, self._optimizers = {}, {}
        self.versions = {"torch": torch.__version__}

    def _load(self, args):
        """Keeps what is trained, and on which batches."""
        self._hidden_layers = args["hidden_layers"]
        inputs, classes = batches(args["index"], args["batch_size"])
        self._data = [
            (self._torch.from_numpy(x), self._torch.from_numpy(y))
            for x, y in zip(inputs, classes, strict=True)
        ]

    def can_run(self, method):
        """None, or why not."""
        del method
        return None

    def _model(self, size):
        torch = self._torch
        torch.manual_seed(0)
        units = hidden_units(size, self._hidden_layers)
        hidden, width = [], _NUM_INPUTS
        for _ in range(self._hidden_layers):
            hidden += [torch.nn.Linear(width, units), torch.nn.ReLU()]
            width = units
        return torch.nn.Sequential(
            *hidden, torch.nn.Linear(width, _NUM_CLASSES)
        )

    def build(self, method, size):
        """Makes the model and the optimizer."""
        torch = self._torch
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
        from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
        from torch.nn.parallel import DistributedDataParallel

        model = self._model(size)
        count = sum(p.numel() for p in model.parameters())
        kind, _, hook = method.partition(":")
        if kind == "ddp":
            # PowerSGD of rank 1 needs all gradients in one bucket.
            bucket = {"bucket_cap_mb": 1000} if "power" in hook else {}
            model = DistributedDataParallel(
                model, gradient_as_bucket_view=True, **bucket
            )
        if hook == "fp16":
            model.register_comm_hook(None, default_hooks.fp16_compress_hook)
        elif hook:
            state = powerSGD_hook.PowerSGDState(
                process_group=None,
                matrix_approximation_rank=int(hook.removeprefix("powersgd")),
                start_powerSGD_iter=5,
                use_error_feedback=True,
                warm_start=True,
            )
            model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        self._models[method] = model
        self._optimizers[method] = torch.optim.SGD(
            model.parameters(), _LEARNING_RATE, momentum=_MOMENTUM
        )
        return {"parameters": count}

    def _batch(self, number):
        return self._data[number % _NUM_BATCHES]

    def step(self, method, number):
        """Takes one step, and returns the loss when all of it is done."""
        inputs, classes = self._batch(number)
        optimizer = self._optimizers[method]
        optimizer.zero_grad()
        loss = self._torch.nn.functional.cross_entropy(
            self._models[method](inputs), classes
        )
        loss.backward()
        optimizer.step()
        return loss.item()

    def free(self):
        """Forgets all models."""
        self._models.clear()
        self._optimizers.clear()
