r"""Machines of one training come, go and fail at random moments.

Each machine is a launcher with one worker, on an address of its own of this
machine. The training has to go on with those that are there, to finish, to
repeat no more than the steps since the last backup, and to lose nothing: after
each resume the sums over all replicas of what each remembers, what all of them
share, and the weights are compared with what was saved.

    python tests/soak/elastic.py --changes=30

There is a run for each rule of error feedback. Takes about half an hour.
"""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from absl import app
from absl import flags
import tqdm

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "support"))

import paths

from tf_regtopk.launch import shares

PROGRAM = pathlib.Path(__file__).parents[1] / "support" / "elastic_program.py"
LEAST, MOST = 2, 6
# Steps between two backups, as of the program.
EVERY_STEPS = 10
# Seconds for all to notice a loss, to start, and to compile, on two cores.
LIMIT = 400
# Float rounding of the sum over replicas, and of the sums of many steps.
LOST, SUM_DIFFERS = 1e-5, 1e-3


def define_flags():
    flags.DEFINE_integer("changes", 30, "Changes in all.", lower_bound=1)
    flags.DEFINE_list(
        "rules", ["accumulate", "ef21", "shift"], "Error feedback."
    )
    flags.DEFINE_integer("seed", 0, "Seed of changes and moments.")


class Machine:
    """A launcher with one worker."""

    def __init__(self, number, port, directory, rule):
        self.name = f"127.0.0.{number}"
        path = directory / f"machine-{number}.txt"
        self._output = path.open("ab")
        self.popen = subprocess.Popen(
            [
                *(sys.executable, "-m", "tf_regtopk.run", "--show=all"),
                f"--rendezvous=127.0.0.1:{port}",
                f"--nodes={LEAST}:{MOST}",
                f"--host={self.name}",
                "--max_restarts=1000",
                "--grace_seconds=100",
                f"--start_timeout={LIMIT}",
                "--device=cpu",
                *map(str, (PROGRAM, directory, rule)),
            ],
            env={
                **os.environ,
                "PYTHONPATH": str(paths.ROOT),
                "TF_REGTOPK_SECRET": "soak",
                "TF_CPP_MIN_LOG_LEVEL": "2",
            },
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )

    @property
    def worker(self):
        """Number of the worker's process, None if there is none now."""
        path = f"/proc/{self.popen.pid}/task/{self.popen.pid}/children"
        with open(path) as file:
            children = file.read().split()
        return int(children[0]) if children else None

    def signal_worker(self, sign):
        while not (worker := self.worker):
            time.sleep(0.1)
        os.kill(worker, sign)

    def end(self):
        self.popen.kill()
        self.popen.wait()
        self._output.close()


class Run:
    """A training, and the changes that befall it."""

    def __init__(self, rule, rng, directory):
        self._rule, self._rng, self._directory = rule, rng, directory
        [self._port] = shares.free_ports(1, "127.0.0.1")
        self.machines = {}
        for _ in range(3):
            self.add()

    def add(self):
        number = min(set(range(1, 2 * MOST)) - set(self.machines))
        self.machines[number] = Machine(
            number, self._port, self._directory, self._rule
        )
        return f"{number} comes"

    def lose(self):
        number = self._rng.choice(list(self.machines))
        self.machines.pop(number).end()
        return f"{number} is lost"

    def leave(self):
        number = self._rng.choice(list(self.machines))
        machine = self.machines.pop(number)
        machine.popen.terminate()
        assert machine.popen.wait(LIMIT) == 128 + signal.SIGTERM
        machine.end()
        return f"{number} leaves"

    def kill(self):
        number = self._rng.choice(list(self.machines))
        self.machines[number].signal_worker(signal.SIGKILL)
        return f"the worker of {number} is killed"

    def stop(self):
        number = self._rng.choice(list(self.machines))
        self.machines[number].signal_worker(signal.SIGSTOP)
        return f"the worker of {number} is stopped"

    def change(self):
        """Makes a random change, and says which."""
        changes = [self.kill, self.stop]
        if len(self.machines) > LEAST:
            changes += [self.lose, self.leave]
        if len(self.machines) < MOST:
            changes += [self.add, self.add]
        return self._rng.choice(changes)()

    @property
    def ledger(self):
        path = self._directory / "ledger.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def wait_for_step(self, num_entries):
        """Waits for a step by all machines, after so many entries.

        Nobody has begun the resume that it belongs to before those.
        """
        deadline = time.monotonic() + LIMIT
        while True:
            num_workers = None
            for entry in self.ledger[num_entries:]:
                num_workers = entry.get("num_workers", num_workers)
                is_step = entry["event"] == "step"
                if is_step and num_workers == len(self.machines):
                    return
            assert time.monotonic() < deadline, self.ledger[-3:]
            for machine in self.machines.values():
                assert machine.popen.poll() is None, machine.name
            time.sleep(0.1)

    def finish(self):
        """Lets the training end, and checks that all machines succeed."""
        (self._directory / "enough").touch()
        for machine in self.machines.values():
            assert machine.popen.wait(LIMIT) == 0, machine.name
        assert self.ledger[-1]["event"] == "done"

    def end(self):
        for machine in self.machines.values():
            machine.end()


def check(ledger):
    """Raises unless nothing was lost. Returns resumes and repeated steps."""
    newest, repeated, resumes = 0, [], 0
    for entry in ledger:
        if entry["event"] == "resumed":
            resumes += 1
            repeated.append(newest - entry["number"])
            # A step may be under way that nobody has written down.
            assert -1 <= repeated[-1] <= EVERY_STEPS, (newest, entry)
            if "lost" in entry:
                assert entry["same_shared"] and entry["same_on_all"], entry
                assert entry["lost"] <= LOST, entry
                assert entry.get("sum_differs", 0) <= SUM_DIFFERS, entry
        elif entry["event"] == "step":
            newest = entry["number"]
    return resumes, repeated


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    rng = random.Random(args.seed)
    root = pathlib.Path(tempfile.mkdtemp())
    for i, rule in enumerate(args.rules):
        directory = root / rule
        directory.mkdir()
        run = Run(rule, rng, directory)
        count = (args.changes + i) // len(args.rules)
        try:
            run.wait_for_step(0)
            for _ in tqdm.trange(count, desc=rule):
                # Every third comes while the change before is under way.
                is_early = rng.random() < 1 / 3
                time.sleep(rng.uniform(0, 3))
                num_entries = len(run.ledger)
                begin = time.monotonic()
                done = run.change()
                if not is_early:
                    run.wait_for_step(num_entries)
                    done += f"; goes on after {time.monotonic() - begin:.0f} s"
                tqdm.tqdm.write(f"{done}, with {len(run.machines)} machines")
            if is_early:
                run.wait_for_step(num_entries)
            run.finish()
        finally:
            run.end()
        resumes, repeated = check(run.ledger)
        lost = max(entry.get("lost", 0) for entry in run.ledger)
        differs = max(entry.get("sum_differs", 0) for entry in run.ledger)
        print(
            f"{rule}: {count} changes, {resumes} starts, steps repeated: "
            f"{repeated}; relative difference of the sums before and after at "
            f"most {lost:.1e}, of shared sums {differs:.1e}"
        )
    shutil.rmtree(root)


if __name__ == "__main__":
    define_flags()
    app.run(main)
