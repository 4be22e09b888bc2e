r"""Ends and stops workers of `examples/multi_worker.py` at random moments.

Each worker has a launcher of its own. After each fault the other workers have
to end within the time promised, and their launchers have to say why; and the
same command has to go on from the last backup. In the end the weights have to
equal, to the bit, those of a run that nothing happened to.

    python tests/soak/worker_faults.py --faults=20

Every third fault hits a worker while it writes a backup. Takes about ten
minutes.
"""

import hashlib
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import zipfile

from absl import app
from absl import flags
import tqdm

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "support"))

import multi_worker_launcher
import paths

from tf_regtopk.launch import bootstrap

EXAMPLE = paths.EXAMPLES / "multi_worker.py"
# Python and TensorFlow start before the timeout runs, TensorFlow's heartbeat
# takes up to 15 s, and the launchers take some to look for the cause.
GRACE_SECONDS = 40
WHILE_WRITING = " while it wrote"

flags.DEFINE_integer("faults", 20, "Faults to cause.", lower_bound=1)
flags.DEFINE_integer("workers", 3, "Number of workers.", lower_bound=2)
flags.DEFINE_integer("epochs", 25, "Epochs of the run.", lower_bound=1)
flags.DEFINE_integer("timeout_seconds", 15, "As of the example.")
flags.DEFINE_integer("seed", 0, "Seed of the moments.")


def start(directory):
    """Starts all workers on new ports, and returns their processes."""
    args = flags.FLAGS
    addresses = multi_worker_launcher.free_addresses(args.workers)
    return [
        multi_worker_launcher.Process(
            [
                *("-m", "tf_regtopk.run", "--show=all"),
                f"--start_timeout={args.timeout_seconds + GRACE_SECONDS}",
                EXAMPLE,
                f"--output_dir={directory / 'output'}",
                f"--epochs={args.epochs}",
                f"--batch_size={24 * args.workers}",
                f"--timeout_seconds={args.timeout_seconds}",
            ],
            directory / f"worker_{i}.txt",
            TF_CONFIG=multi_worker_launcher.tf_config(addresses, i),
            TF_CPP_MIN_LOG_LEVEL="2",
        )
        for i in range(args.workers)
    ]


def wait_for_success(workers, seconds):
    for worker in workers:
        status = worker.wait(seconds)
        assert status == 0, f"Exit status {status}:\n{worker.output[-3000:]}"


def fingerprint(directory):
    """Of the weights in the model that the first worker has written."""
    with zipfile.ZipFile(directory / "output" / "model.keras") as archive:
        return hashlib.sha256(archive.read("model.weights.h5")).hexdigest()


def complete_epoch(directory):
    """The newest epoch that all workers have backed up, 0 if there is none."""
    folder = directory / "output" / "backup"
    names = os.listdir(folder) if folder.exists() else []
    epochs = [name.split(".")[0] for name in names if name[:6] == "epoch-"]
    return max(
        (
            int(epoch[6:])
            for epoch in epochs
            if epochs.count(epoch) == flags.FLAGS.workers
        ),
        default=0,
    )


def check_resumed(workers, first_epoch):
    """Raises if the first worker has begun to train from before."""
    output = workers[0].output
    resumed = re.findall(r"Resuming \S+ after epoch (\d+)", output)
    if first_epoch and "Epoch " in output:
        assert resumed and int(resumed[0]) >= first_epoch, output[:3000]


def wait_for_write(directory, workers, number, seconds):
    """Waits until a worker writes a backup. Says whether it does."""
    name = f".worker-{number}-of-{len(workers)}."
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and workers[number].popen.poll() is None:
        folder = directory / "output" / "backup"
        names = os.listdir(folder) if folder.exists() else []
        if any(n.startswith("partial") and name in n for n in names):
            return True
        time.sleep(0.0002)
    return False


def cause_fault(directory, number, rng, seconds):
    """Starts the workers and harms one. Says what happened."""
    args = flags.FLAGS
    victim = rng.randrange(args.workers)
    sign = rng.choice([signal.SIGKILL, signal.SIGSTOP])
    first_epoch = complete_epoch(directory)
    workers = start(directory)
    try:
        is_writing = False
        if number % 3 == 0:
            is_writing = wait_for_write(directory, workers, victim, seconds)
        else:
            time.sleep(rng.uniform(0, 0.8 * seconds))
        if any(w.popen.poll() == bootstrap.PORT_TAKEN for w in workers):
            return "port taken"
        if any(w.popen.poll() == 0 for w in workers):
            wait_for_success(workers, args.timeout_seconds + GRACE_SECONDS)
            check_resumed(workers, first_epoch)
            return "finished"
        others = [w for i, w in enumerate(workers) if i != victim]
        started = workers[victim].wait_for("(processes ", GRACE_SECONDS)
        assert all(w.popen.poll() is None for w in workers), workers
        os.kill(int(re.search(r"\(processes (\d+)\)", started)[1]), sign)
        begin = time.monotonic()
        for other in others:
            status = other.wait(args.timeout_seconds + 2 * GRACE_SECONDS)
            if status:  # Else it had done its part.
                assert status == bootstrap.LOST_A_WORKER, other.output[-3000:]
                assert "(`--start_timeout`)" in other.output or (
                    "Error: " in other.output
                ), other.output[-3000:]
        ended = time.monotonic() - begin
        check_resumed(workers, first_epoch)
        return (
            f"{sign.name} to worker {victim}"
            f"{WHILE_WRITING if is_writing else ''}, after epoch {first_epoch} "
            f"or later: the others ended in {ended:.1f} s"
        )
    finally:
        for worker in workers:
            worker.end()


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    rng = random.Random(args.seed)
    root = pathlib.Path(tempfile.mkdtemp())
    try:
        expected_dir, directory = root / "expected", root / "faults"
        for folder in (expected_dir, directory):
            folder.mkdir()
        begin = time.monotonic()
        wait_for_success(start(expected_dir), 600)
        seconds = time.monotonic() - begin
        expected = fingerprint(expected_dir)
        print(f"Without faults: {seconds:.0f} s, weights {expected[:12]}")

        faults = 0
        writes_hit = 0
        with tqdm.tqdm(total=args.faults, desc="faults") as bar:
            while faults < args.faults:
                event = cause_fault(directory, faults, rng, seconds)
                bar.write(event)
                writes_hit += WHILE_WRITING in event
                if event == "finished":
                    assert fingerprint(directory) == expected
                    shutil.rmtree(directory / "output")
                elif event != "port taken":
                    faults += 1
                    bar.update()
        first_epoch = complete_epoch(directory)
        workers = start(directory)
        wait_for_success(workers, 600)
        check_resumed(workers, first_epoch)
        assert fingerprint(directory) == expected
        print(
            f"The same weights after {faults} faults, of which {writes_hit} "
            "in the middle of a write."
        )
        assert writes_hit or args.faults < 6
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    app.run(main)
