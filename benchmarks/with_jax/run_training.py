r"""Runs the programs of export_training.py by JAX, on an accelerator.

Needs jax and numpy only. Each method trains once with each learning
rate, and with the best of them from every seed. What has run is kept in
--output, as `cifar10_resnet.py` keeps it, and not run again.

    python benchmarks/with_jax/run_training.py programs --methods=topk,regtopk
"""

import argparse
import json
import os
import pathlib
import time

# Several of these may share a device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax_program
import numpy as np

# Steps that may wait to be run; each needs memory.
QUEUE = 50


class Test:
    """Images to test on, on the device.

    Args:
        predict: `jax_program.Program`.
        images: Array `[n, ...]`.
        labels: Array `[n]`.
        num_predicted: Number of images that `predict` takes.
    """

    def __init__(self, predict, images, labels, num_predicted):
        self._predict, self._labels = predict, labels
        missing = -len(images) % num_predicted
        padded = np.concatenate([images, np.repeat(images[:1], missing, 0)])
        self._images = [
            jax.device_put(part)
            for part in np.split(padded, len(padded) // num_predicted)
        ]

    def predicted(self, weights):
        """Device arrays of labels, which need not be known yet."""
        return [self._predict(weights, part)[0] for part in self._images]

    def accuracy(self, predicted):
        predicted = np.concatenate([np.asarray(part) for part in predicted])
        return float(np.mean(predicted[: len(self._labels)] == self._labels))


class Trainer:
    """The programs that all methods share, and the images.

    Args:
        directory: Where the programs are.
        index: What the exporter says of them.
    """

    def __init__(self, directory, index):
        self._directory, self._index = directory, index
        with np.load(directory / "images.npz") as arrays:
            images, labels = arrays["train_images"], arrays["train_labels"]
            test = arrays["test_images"], arrays["test_labels"]
        count = index["num_predicted"]
        self._data = (
            jax.device_put(images),
            jax.device_put(labels.astype(np.int32)),
        )
        self._gradients = jax_program.Program(directory / "gradients.mlir")
        predict = jax_program.Program(directory / "predict.mlir")
        held_out = len(images) - index["held_out"]
        self._test = {
            True: Test(predict, images[held_out:], labels[held_out:], count),
            False: Test(predict, *test, count),
        }
        self._beginnings = {}

    def method(self, name):
        """What is compiled for a method: how it starts, and steps."""
        file_name = self._index["file_names"][name]
        return (
            jax_program.Program(self._directory / f"start_{file_name}.mlir"),
            jax_program.Program(
                self._directory / f"step_{file_name}.mlir", reused=3
            ),
        )

    def train(self, method, is_tuning, learning_rate, seed):
        """One run, as `image_training.train`; `method` is compiled.

        Returns:
            Dictionary of lists: `round` and `accuracy`.
        """
        start, step = method
        weights, numbers = self._beginning(seed)
        learning_rate = jax.device_put(np.float32(learning_rate))
        rounds = self._index["setting"]["rounds"]
        every = self._index["setting"]["evaluate_every"]
        test, tested = self._test[is_tuning], {}
        state = start(jax.device_put(weights))
        for t, batch in enumerate(jax.device_put(list(numbers))):
            [gradients] = self._gradients(state[0], *self._data, batch)
            t_on_device = jax.device_put(np.int32(t))
            state = step(gradients, t_on_device, learning_rate, *state)
            if not (t + 1) % every or t + 1 == rounds:
                tested[t + 1] = test.predicted(state[0])
            if not (t + 1) % QUEUE:
                jax.block_until_ready(state)
        return {
            "round": list(tested),
            "accuracy": [test.accuracy(labels) for labels in tested.values()],
        }

    def _beginning(self, seed):
        """`(weights, numbers)`, kept for the next run of this seed."""
        if seed not in self._beginnings:
            with np.load(self._directory / f"start_{seed}.npz") as arrays:
                self._beginnings[seed] = arrays["weights"], arrays["numbers"]
        return self._beginnings[seed]


class Runs:
    """Runs kept in a file; those that are not there are run.

    Args:
        path: The file.
        index: What the exporter says.
        deadline: When no other run is to be started.
    """

    def __init__(self, path, index, deadline):
        self._path, self._index, self._deadline = path, index, deadline
        self._records = []
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            lines = path.read_text("utf-8").splitlines()
            self._records = [json.loads(line) for line in lines]

    def final_accuracy(self, train, method, is_tuning, learning_rate, seed):
        """That of a run, which `train` does if it has not been done.

        Raises:
            TimeoutError: If it has not been done, and it is too late.
        """
        setting = {
            **self._index["setting"],
            "is_tuning": is_tuning,
            "method": method,
            "learning_rate": learning_rate,
            "seed": seed,
            **self._index["versions"][method],
        }
        for record in self._records:
            if record["setting"] == setting:
                return record["result"]["accuracy"][-1]
        start = time.monotonic()
        if start > self._deadline:
            raise TimeoutError(f"Not run: {method}, {learning_rate:g}, {seed}")
        result = train(is_tuning, learning_rate, seed)
        seconds = time.monotonic() - start
        result["bytes_a_step"] = self._index["bytes_a_step"][method]
        with self._path.open("a", encoding="utf-8") as f:
            f.write(json.dumps({"setting": setting, "result": result}) + "\n")
        print(
            f"{method:20} {'tuning' if is_tuning else 'test':6} "
            f"{learning_rate:<6g} seed {seed:<5} "
            f"{seconds / setting['rounds']:.4f} s a step  "
            + " ".join(f"{accuracy:.4f}" for accuracy in result["accuracy"]),
            flush=True,
        )
        return result["accuracy"][-1]


def run_method(name, trainer, runs, index):
    """Tunes a method, and runs it from every seed, as `comparison.run`."""
    compiled = []

    def train(*setting):
        if not compiled:
            compiled.append(trainer.method(name))
        return trainer.train(compiled[0], *setting)

    rates = index["learning_rates"]
    tuning = {
        rate: np.mean(
            [
                runs.final_accuracy(train, name, True, rate, seed)
                for seed in index["tuning_seeds"]
            ]
        )
        for rate in (rates if len(rates) > 1 else ())
    }
    best = max(rates, key=tuning.get) if tuning else rates[0]
    for seed in index["seeds"]:
        runs.final_accuracy(train, name, False, best, seed)


def main(start):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("programs", type=pathlib.Path, help="Their folder.")
    parser.add_argument("--output", type=pathlib.Path, default="runs.jsonl")
    parser.add_argument("--methods", help="Some of them; all by default.")
    parser.add_argument(
        "--max_seconds",
        type=float,
        default=float("inf"),
        help="Seconds after which no other run is started.",
    )
    args = parser.parse_args()
    index = json.loads((args.programs / "index.json").read_text("utf-8"))
    names = args.methods.split(",") if args.methods else index["bytes_a_step"]
    trainer = Trainer(args.programs, index)
    device = jax.devices()[0].device_kind
    print(
        f"{device}, JAX {jax.__version__}: ready after "
        f"{time.monotonic() - start:.1f} s",
        flush=True,
    )
    runs = Runs(args.output, index, start + args.max_seconds)
    try:
        for name in names:
            run_method(name, trainer, runs, index)
    except TimeoutError as error:
        print(f"{error}: {args.max_seconds:g} s are over", flush=True)


if __name__ == "__main__":
    main(time.monotonic())
