r"""Trains a small convolutional network with several workers.

Each worker is a process of its own, on one machine or on many. The workers
share every global batch out among them and send each other only the gradient
entries that RegTop-k selects. To try it on one machine:

```
python -m tf_regtopk.run --workers=2 examples/multi_worker.py
```

In a cluster, start the same script on every machine, with the environment
variable `TF_CONFIG` saying who the workers are and which of them this one is:

```
TF_CONFIG='{"cluster": {"worker": ["host0:12345", "host1:12345"]},
            "task": {"type": "worker", "index": 0}}' \
python examples/multi_worker.py
```

As a job of Slurm: `srun python examples/multi_worker.py --cluster=slurm`. See
`docs/cluster.md` for more.

The first worker (the chief) shows the progress and writes the results.

After every epoch each worker backs its part of the training up. When a worker
is lost, the others notice within `--timeout_seconds` and end with an error that
says which; the same command then goes on from the last backup, to the bit as if
nothing had happened. So whatever started the workers can start them again.
"""

import contextlib
import inspect
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback

from absl import app
from absl import flags
import example_utils
import keras
import numpy as np
import sklearn.datasets
import sklearn.model_selection
import tensorflow as tf

import tf_regtopk
from tf_regtopk.launch import bootstrap


def define_flags():
    flags.DEFINE_enum(
        "cluster",
        "tf_config",
        ["tf_config", "slurm"],
        "What says who the workers are: the environment variable TF_CONFIG, or "
        "the step of Slurm that this process is a task of.",
    )
    flags.DEFINE_integer(
        "port_base",
        12345,
        "With --cluster=slurm: the port of the first worker on each host. The "
        "next worker there takes the next port.",
        lower_bound=1,
        upper_bound=65535,
    )
    flags.DEFINE_integer("epochs", 10, "Passes over the images.", lower_bound=1)
    flags.DEFINE_integer(
        "batch_size",
        64,
        "Images per step, over all workers. A multiple of their number.",
        lower_bound=1,
    )
    flags.DEFINE_float("learning_rate", 0.02, "Learning rate.", lower_bound=0.0)
    example_utils.define_density_flag(0.01)
    example_utils.define_codec_flags()
    flags.DEFINE_integer(
        "seed", 0, "Seed of the weights and of the order of the images."
    )
    flags.DEFINE_string(
        "output_dir", "results/multi_worker", "Where the results go."
    )
    flags.DEFINE_string(
        "backup_dir",
        None,
        "Where the backups go, until training has ended. By default into "
        "`backup` in --output_dir. The workers may share it or not.",
    )
    flags.DEFINE_integer(
        "timeout_seconds",
        60,
        "How long a worker waits for the others, at the start and in every "
        "step, before it gives up.",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "start_timeout_seconds",
        None,
        "How long it waits at the start, if not --timeout_seconds.",
        lower_bound=1,
    )
    flags.DEFINE_boolean(
        "sequential_input",
        False,
        "Read the images without background threads, which starve where many "
        "workers share few cores.",
    )
    # So that --help lists those too.
    flags.adopt_module_key_flags(example_utils)


def load_data():
    """Loads 1,797 images of digits, 8 x 8, that ship with scikit-learn.

    Returns:
        `(x_train, y_train), (x_test, y_test)`.
    """
    digits = sklearn.datasets.load_digits()
    x = (digits.images / 16.0).astype("float32")[..., None]
    y = digits.target.astype("int32")
    x_train, x_test, y_train, y_test = sklearn.model_selection.train_test_split(
        x, y, test_size=0.2, random_state=0
    )
    return (x_train, y_train), (x_test, y_test)


def make_training_dataset(x, y, batch_size, epochs, seed):
    """Makes a data set of global batches in an order that each epoch has.

    The order depends on the seed and the epoch alone: it is the same on every
    worker, so that their parts of a batch do not overlap, and the same when
    training goes on after a break.

    Args:
        x: Images.
        y: Labels.
        batch_size: Images per global batch.
        epochs: Range of the numbers of the epochs.
        seed: Seed of the order.
    """
    num_batches = len(x) // batch_size
    order = np.concatenate(
        [
            np.random.default_rng([seed, epoch]).permutation(len(x))[
                : num_batches * batch_size
            ]
            for epoch in epochs
        ]
    )
    dataset = tf.data.Dataset.from_tensor_slices(
        order.reshape([-1, batch_size])
    ).map(lambda indices: (tf.gather(x, indices), tf.gather(y, indices)))
    return share_out(dataset)


def make_test_dataset(x, y, batch_size):
    """Makes a data set of global batches in the order given."""
    dataset = tf.data.Dataset.from_tensor_slices((x, y))
    return share_out(dataset.batch(batch_size))


def share_out(dataset):
    """Lets each worker take its part of every batch."""
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    return dataset.with_options(options)


def build_model(args):
    """Builds and compiles the model. To be called in the strategy's scope."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    model.compile(
        optimizer=tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(args.learning_rate, momentum=0.9),
            sparsifier=tf_regtopk.RegTopK(density=args.density),
            codec=tf_regtopk.Codec(args.indices, args.values),
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def train(strategy, data, args, backup_dir, verbose):
    """Trains as the flags say, from the last backup on.

    Returns:
        `(model, backup, results)`, of which the last is a dictionary.
    """
    if args.batch_size % strategy.num_replicas_in_sync:
        raise ValueError(
            "`batch_size` must be a multiple of the number of replicas, which "
            f"is {strategy.num_replicas_in_sync}. "
            f"Received: batch_size={args.batch_size}"
        )
    (x_train, y_train), (x_test, y_test) = data
    if args.batch_size > len(x_train):
        raise ValueError(
            f"`batch_size` must be at most {len(x_train)}, the number of "
            f"training images. Received: batch_size={args.batch_size}"
        )
    keras.utils.set_random_seed(args.seed)
    with strategy.scope():
        model = build_model(args)
    test_dataset = make_test_dataset(x_test, y_test, args.batch_size)
    backup = tf_regtopk.Backup(backup_dir)
    first_epoch = backup.restore(model)
    history = {}
    if first_epoch < args.epochs:
        if first_epoch and verbose:
            print(f"Resuming after epoch {first_epoch}, from {backup_dir}")
        history = model.fit(
            make_training_dataset(
                x_train,
                y_train,
                args.batch_size,
                range(first_epoch, args.epochs),
                args.seed,
            ),
            validation_data=test_dataset,
            initial_epoch=first_epoch,
            epochs=args.epochs,
            steps_per_epoch=len(x_train) // args.batch_size,
            callbacks=[backup],
            shuffle=False,  # Done by the data set.
            verbose=verbose,
        ).history
    final = model.evaluate(test_dataset, verbose=0, return_dict=True)
    return (
        model,
        backup,
        {
            "final": {name: float(value) for name, value in final.items()},
            "first_epoch": first_epoch,
            "num_replicas": strategy.num_replicas_in_sync,
            "history": {
                name: [float(value) for value in values]
                for name, values in history.items()
            },
        },
    )


# ----- One worker -----


class Cluster:
    """Who the workers are and which of them this process is.

    Args:
        tf_config: The value of the environment variable `TF_CONFIG`.
    """

    def __init__(self, tf_config):
        try:
            config = json.loads(tf_config)
            addresses = {
                f"{job} {index}": address
                for job in ("chief", "worker")
                for index, address in enumerate(config["cluster"].get(job, []))
            }
            task = config["task"]
            self.name = f"{task['type']} {task['index']}"
            self.address = addresses[self.name]
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise app.UsageError(
                "`TF_CONFIG` must be a JSON object with the addresses of a "
                '"cluster" and the "type" and "index" of a "task" in it. '
                f"Received: TF_CONFIG={tf_config}"
            ) from e
        self.is_chief = self.name == next(iter(addresses))
        self.size = len(addresses)
        self.peers = {k: v for k, v in addresses.items() if k != self.name}


def slurm_resolver(port_base):
    """Finds the workers of the Slurm step that this process is a task of.

    `SlurmClusterResolver` needs three corrections. It fails where a task has
    no GPU. It sets `CUDA_VISIBLE_DEVICES`, which Slurm has set already. And it
    sorts the hosts by name, n10 before n9, but takes a task's number in
    Slurm's order, where n9 comes first, for its place.

    Args:
        port_base: The port of the first worker on each host.

    Returns:
        A `tf.distribute.cluster_resolver.ClusterResolver`.
    """
    try:
        num_tasks = int(os.environ["SLURM_STEP_NUM_TASKS"])
        spec = tf.distribute.cluster_resolver.SlurmClusterResolver(
            port_base=port_base,
            # Any numbers that fit will do: they are not used below.
            gpus_per_node=num_tasks,
            gpus_per_task=1,
            auto_set_gpu=False,
        ).cluster_spec()
        host = os.environ["SLURMD_NODENAME"]
        port = port_base + int(os.environ["SLURM_LOCALID"])
        index = spec.as_dict()["worker"].index(f"{host}:{port}")
    except (KeyError, RuntimeError, ValueError) as e:
        variables = {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("SLURM")
        }
        raise app.UsageError(
            "`--cluster=slurm` must be used in a task that `srun` has started. "
            f"Received: {variables}, with which finding the workers ended in "
            f"{type(e).__name__}: {e}"
        ) from e
    return tf.distribute.cluster_resolver.SimpleClusterResolver(
        spec,
        task_type="worker",
        task_id=index,
        rpc_layer="grpc",
        num_accelerators={"GPU": len(tf.config.list_physical_devices("GPU"))},
    )


def describe_peers(peers):
    """Says, after some seconds, which other workers accept no connection."""
    silent = []
    # One that is just ending may still accept some.
    for attempt in range(3):
        time.sleep(attempt)
        for name, address in peers.items():
            host, port = address.rsplit(":", 1)
            try:
                socket.create_connection((host.strip("[]"), port), 1).close()
            except OSError:
                silent.append(f"{name} ({address})")
        if silent:
            return f"No connection to: {', '.join(silent)}."
    return "All of them accept connections, so one is stopped or stuck."


def watch(pid, seconds, name, peers):
    """Ends the process `pid` unless standard input closes within `seconds`."""
    if select.select([sys.stdin], [], [], seconds)[0] or os.getppid() != pid:
        return
    addresses = ", ".join(peers.values())
    print(
        f"{name} waited {seconds} s for the start of {addresses}. "
        f"{describe_peers(peers)}",
        file=sys.stderr,
        flush=True,
    )
    os.kill(pid, signal.SIGKILL)  # TensorFlow holds SIGTERM off.


@contextlib.contextmanager
def start_deadline(cluster, seconds):
    """Ends this process if the block takes longer than `seconds`.

    TensorFlow waits for the other workers with Python's lock held, where
    neither a thread nor a signal handler of Python gets to run. So another
    process has to watch.
    """
    # Not imported from this file, which would import TensorFlow first.
    code = "\n".join(
        [
            "import os, select, signal, socket, sys, time",
            inspect.getsource(describe_peers),
            inspect.getsource(watch),
            f"watch({os.getpid()}, {seconds}, {cluster.name!r}, "
            f"{cluster.peers!r})",
        ]
    )
    watcher = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE
    )
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, on_interrupt)
        watcher.stdin.close()
        watcher.wait()


def run_worker(args, tf_config, resolver=None):
    """Trains as one worker. Returns only if all went well."""
    cluster = Cluster(tf_config)
    tf.get_logger().setLevel("WARNING")
    if args.sequential_input:
        tf.data.experimental.enable_debug_mode()
    try:
        with start_deadline(
            cluster, args.start_timeout_seconds or args.timeout_seconds
        ):
            strategy = tf_regtopk.MultiWorkerMirroredStrategy(
                cluster_resolver=resolver,
                timeout_seconds=args.timeout_seconds,
            )
        # TensorFlow takes SIGTERM as a notice to save a checkpoint and goes on.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        data = load_data()
        if cluster.is_chief:  # Told now if it cannot be.
            os.makedirs(args.output_dir, exist_ok=True)
        # Building the model broadcasts its weights, which no timeout applies
        # to. So first see that everybody has come this far.
        strategy.reduce("SUM", tf.constant(1.0), axis=None)
        model, backup, results = train(
            strategy,
            data,
            args,
            args.backup_dir or os.path.join(args.output_dir, "backup"),
            verbose=1 if cluster.is_chief else 0,
        )
        if cluster.is_chief:
            model.save(os.path.join(args.output_dir, "model.keras"))
            report(cluster, args, results)
        backup.delete()
    except (Exception, KeyboardInterrupt) as e:
        status = bootstrap.status_of(e)
        if status == bootstrap.LOST_A_WORKER:
            message = (
                f"lost another worker. {describe_peers(cluster.peers)} Start "
                "all workers again to go on from the last backup."
            )
        elif status == bootstrap.PORT_TAKEN:
            message = f"could not listen on {cluster.address}."
        else:
            message = f"failed: {type(e).__name__}: {e}"
        traceback.print_exc()
        print(f"{cluster.name} {message}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # At a regular exit TensorFlow may wait for workers that are gone.
        os._exit(status)


def report(cluster, args, results):
    """Prints and writes the results."""
    history = results["history"]
    print(f"Accuracy on the test images: {results['final']['accuracy']:.3f}")

    def draw(axes):
        epochs = range(results["first_epoch"] + 1, args.epochs + 1)
        for name, ax, color in (
            ("loss", axes, "C0"),
            ("accuracy", axes.twinx(), "C1"),
        ):
            for key, style in ((name, ":"), (f"val_{name}", "-")):
                label = "test" if style == "-" else "training"
                # Nothing was left to train if the run was cut short just here.
                values = history.get(key, [np.nan] * len(epochs))
                ax.plot(epochs, values, color, ls=style, label=label)
            ax.set_ylabel(name, color=color)
        axes.set_xlabel("epoch")
        axes.legend(loc="center right")
        axes.set_title(f"{cluster.size} workers, density {args.density:g}")

    example_utils.save_results(
        args.output_dir,
        {
            "config": {
                **example_utils.config(),
                "num_workers": cluster.size,
            },
            **results,
        },
        draw,
    )


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    if args.cluster == "tf_config":
        if "TF_CONFIG" not in os.environ:
            raise app.UsageError(
                "The environment variable `TF_CONFIG` must say who the workers "
                "are. To start workers on this machine: "
                "python -m tf_regtopk.run --workers=2 examples/multi_worker.py"
            )
        return run_worker(args, os.environ["TF_CONFIG"])
    resolver = slurm_resolver(args.port_base)
    tf_config = {
        "cluster": resolver.cluster_spec().as_dict(),
        "task": {"type": resolver.task_type, "index": resolver.task_id},
    }
    return run_worker(args, json.dumps(tf_config), resolver)


if __name__ == "__main__":
    define_flags()
    app.run(main)
