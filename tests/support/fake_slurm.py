"""Plays Slurm's `sbatch` and `srun`, for jobs that fit on this machine.

    python fake_slurm.py sbatch [options] script [arguments]
    python fake_slurm.py srun [options] program [arguments]

What the programs see in their environment is what Slurm 22.05 sets. A job's
number comes from `FAKE_SLURM_JOB_ID`. Of an `sbatch` that a test can wait for,
this one returns when the script has ended, with its exit status.
"""

import argparse
import os
import pathlib
import shlex
import subprocess
import sys
import time


def sbatch(argv):
    parser = argparse.ArgumentParser("sbatch", allow_abbrev=False)
    parser.add_argument("--job-name")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--ntasks-per-node", type=int, required=True)
    parser.add_argument("--cpus-per-task", type=int)
    parser.add_argument("--time")
    parser.add_argument("--requeue", action="store_true")
    parser.add_argument("--open-mode", choices=["append", "truncate"])
    script = next(i for i, arg in enumerate(argv) if arg[:1] != "-")
    lines = pathlib.Path(argv[script]).read_text("utf-8").splitlines()
    if lines[0] != "#!/bin/bash":
        raise SystemExit("sbatch: the script has no line that says its shell")
    directives = [
        word
        for line in lines
        if line.startswith("#SBATCH")
        for word in shlex.split(line)[1:]
    ]
    args = parser.parse_args(directives + argv[:script])
    env = {
        "SLURM_JOB_ID": os.environ["FAKE_SLURM_JOB_ID"],
        "SLURM_JOB_NUM_NODES": args.nodes,
        "SLURM_NTASKS_PER_NODE": args.ntasks_per_node,
    }
    if args.cpus_per_task:
        env["SLURM_CPUS_PER_TASK"] = args.cpus_per_task
    env = {name: str(value) for name, value in env.items()}
    return subprocess.run(
        ["bash", *argv[script:]], env={**os.environ, **env}, check=False
    ).returncode


def srun(argv):
    parser = argparse.ArgumentParser("srun", allow_abbrev=False)
    parser.add_argument("--kill-on-bad-exit", type=int, default=0)
    program = next(i for i, arg in enumerate(argv) if arg[:1] != "-")
    args = parser.parse_args(argv[:program])
    if os.environ["SLURM_JOB_NUM_NODES"] != "1":
        raise SystemExit("srun: there is one node here")
    num_tasks = int(os.environ["SLURM_NTASKS_PER_NODE"])
    tasks = []
    try:
        for number in range(num_tasks):
            env = {
                "SLURMD_NODENAME": "localhost",
                "SLURM_LOCALID": number,
                "SLURM_NODEID": 0,
                "SLURM_NTASKS": num_tasks,
                "SLURM_PROCID": number,
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_STEP_NUM_NODES": 1,
                "SLURM_STEP_NUM_TASKS": num_tasks,
                "SLURM_STEP_TASKS_PER_NODE": num_tasks,
            }
            env = {name: str(value) for name, value in env.items()}
            tasks.append(
                subprocess.Popen(argv[program:], env={**os.environ, **env})
            )
        while None in (statuses := [task.poll() for task in tasks]):
            if args.kill_on_bad_exit and any(statuses):
                break
            time.sleep(0.1)
    finally:
        for task in tasks:
            task.terminate()
        statuses = [task.wait() for task in tasks]
    return max(s if s >= 0 else 128 - s for s in statuses)


if __name__ == "__main__":
    roles = {"sbatch": sbatch, "srun": srun}
    sys.exit(roles[sys.argv[1]](sys.argv[2:]))
