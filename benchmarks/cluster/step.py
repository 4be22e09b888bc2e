r"""Time and bytes of a training step over networks of different speed.

Workers are processes in network namespaces of their own, joined by links that
are shaped (see `namespaces.py`). All methods train the same network (see
`methods.py`), and run in turn within each round, so that a busy machine
hurts all alike; the workers of all methods stay alive, and those whose turn it
is not wait. Needs root, and `ip` and `tc` of iproute2; ends with status 2 where
they are missing.

    python -m benchmarks.cluster.step

Methods: `dense` is Keras's SGD, which sums gradients by an all-reduce;
`sparse:DENSITY:INDICES+VALUES` is SparsifiedOptimizer with RegTopK and that
Codec, and `owners:DENSITY:INDICES+VALUES` the same with a ReduceScatter;
`buckets4:DENSITY:INDICES+VALUES` has a `sparse` optimizer for each quarter of
the variables, which may exchange beside the rest of the backward pass;
`auto:DENSITY` is the one that chooses when it is built, so it is built
anew in each network; `ddp`, `ddp:fp16`, `ddp:powersgd1` and `ddp:powersgd4` are
PyTorch's data-parallel module and its hooks over gloo, left out without torch.

What is reported for each network, size and method:

*   the median time of a step, that of the slowest worker, its 10 to 90 % range,
    and how many times faster it is than `dense`;
*   the share of a step that the exchange takes: 1 - (time of a step of all
    workers at once that computes the gradient and applies it locally, measured
    in the same rounds) / (time of the step). Compressing, sending and waiting
    for each other all count as the exchange;
*   bytes a step that a worker's interface has sent, headers of packets and
    acknowledgements included, beside what `wire_report` says. A packet that is
    cut only after the interface counts as one, and so do its headers;
*   the network: throughput of one TCP connection, and round trip of 64 bytes.
"""

import importlib.util
import json
import os
import platform
import sys
import tempfile
from typing import NamedTuple

from absl import app
from absl import flags
import tqdm

from benchmarks.cluster import launcher
from benchmarks.cluster import namespaces
from benchmarks.cluster import report

_METHODS = [
    "dense",
    "sparse:0.001:int32+float32",
    "sparse:0.001:auto",
    "sparse:0.001:auto+natural",
    "sparse:0.01:int32+float32",
    "sparse:0.01:auto",
    "sparse:0.01:auto+natural",
    "owners:0.001:auto",
    "owners:0.01:auto",
    "auto:0.001",
    "ddp",
    "ddp:fp16",
    "ddp:powersgd1",
    "ddp:powersgd4",
]
_MIN_ROUNDS = 3
_MAX_STEPS = 100


def define_flags():
    flags.DEFINE_list("networks", ["unshaped", "1gbit", "100mbit", "5ms"], "")
    flags.DEFINE_list("sizes", ["1000000", "11000000"], "Parameters, about.")
    flags.DEFINE_list("methods", _METHODS, "See above.")
    flags.DEFINE_integer("num_workers", 4, "Workers.", lower_bound=2)
    flags.DEFINE_integer("hidden_layers", 2, "Of the network.", lower_bound=1)
    flags.DEFINE_integer(
        "batch_size", 16, "Examples a worker and step.", lower_bound=1
    )
    flags.DEFINE_integer("rounds", 5, "Timed rounds.", lower_bound=1)
    flags.DEFINE_float("seconds_per_turn", 1.0, "Of a method in a round.")
    flags.DEFINE_integer(
        "timeout", 300, "Seconds that a worker may take to answer."
    )
    # More threads than cores wait for each other: with the default on 2 cores
    # TensorFlow's 4 workers take longer for all methods, PyTorch's as long.
    flags.DEFINE_integer("tensorflow_threads", 1, "Of a worker; 0: default.")
    flags.DEFINE_integer("torch_threads", 1, "As above.")
    flags.DEFINE_integer(
        "profile_steps",
        0,
        "Steps that the first worker traces after those of each network, of "
        "TensorFlow's methods, for TensorBoard's profiler: in `output_dir`, a "
        "folder for each network, size and method.",
        lower_bound=0,
    )
    flags.DEFINE_string("output_dir", "results/cluster", "For results.")


def choose_steps(step_seconds, seconds_per_turn, rounds):
    """`(lead-in steps, timed steps)` of a turn, and rounds to take part in.

    A slow method takes one step a turn, without a step before it, and part in
    fewer rounds, though in at least 3.
    """
    if step_seconds > seconds_per_turn:
        affordable = round(rounds * seconds_per_turn / step_seconds)
        return 0, 1, min(rounds, max(_MIN_ROUNDS, affordable))
    steps = int(seconds_per_turn / step_seconds)
    return 1, min(max(1, steps), _MAX_STEPS), rounds


def takes_part(round_number, rounds, own_rounds):
    """Whether one that takes part in `own_rounds` does so in this one."""
    before = round_number * own_rounds // rounds
    return (round_number + 1) * own_rounds // rounds > before


class Pace(NamedTuple):
    """How long methods are timed.

    Args:
        rounds: Timed rounds.
        seconds_per_turn: Of a method in a round.
    """

    rounds: int
    seconds_per_turn: float


def measure(
    methods, workers_of, pace, title, progress, before_round=lambda number: None
):
    """Times methods that are built in the network as it is.

    Args:
        methods: Their names.
        workers_of: Function of a method that returns its `Workers`.
        pace: `Pace`.
        title: Of the progress bar.
        progress: The bar, which counts turns.
        before_round: Function that is called with the number of each round,
            before its turns.

    Returns:
        Dict from method to a record.
    """
    plans, turns, numbers = {}, {m: [] for m in methods}, {}

    def take(method, lead_in, steps):
        progress.set_description(f"{title} {method}")
        answers = workers_of(method).ask(
            do="steps",
            method=method,
            first=numbers.get(method, 0),
            lead_in=lead_in,
            steps=steps,
        )
        numbers[method] = numbers.get(method, 0) + lead_in + steps
        progress.update()
        return answers

    for method in methods:
        # The first step in a changed network is not like the others, because
        # it may compile.
        take(method, 0, 1)
        for lead_in, steps in ((0, 1), (1, 2)):
            answers = take(method, lead_in, steps)
            seconds = max(sum(a["seconds"]) / steps for a in answers)
            if seconds >= pace.seconds_per_turn:
                break
        plans[method] = choose_steps(
            seconds, pace.seconds_per_turn, pace.rounds
        )
    for number in range(pace.rounds):
        before_round(number)
        for method, (lead_in, steps, rounds) in plans.items():
            if takes_part(number, pace.rounds, rounds):
                turns[method].append(take(method, lead_in, steps))
    return {
        method: report.make_record(turns[method], namespaces.HEADER_BYTES)
        for method in methods
    }


def build(method, size, workers, progress, **command):
    """Builds a method on all workers; returns what it is, or None."""
    progress.set_description(f"building {size:,} {method}")
    answer = workers[report.kind_of(method)].ask(
        do="build", method=method, size=size, **command
    )[0]
    progress.update()
    if "refusal" in answer:
        tqdm.tqdm.write(f"Without {method}: {answer['refusal']}")
        return None
    return answer


def run(network, workers, methods, summary, progress):
    """Measures all that the flags ask for, into `summary`."""
    args = flags.FLAGS
    for size in map(int, args.sizes):
        network.change("unshaped")
        built = {
            m: build(m, size, workers, progress)
            for m in methods
            if not m.startswith("auto")
        }
        for name in args.networks:
            means = network.change(name)
            if name not in summary["networks"]:
                summary["networks"][name] = {
                    "means": means,
                    **network.probe(),
                    "switch": network.switch_statistics(),
                }
            for m in methods:
                if m.startswith("auto"):
                    built[m] = build(m, size, workers, progress, steps=2)
            records = measure(
                [m for m in methods if built[m]],
                lambda method: workers[report.kind_of(method)],
                Pace(args.rounds, args.seconds_per_turn),
                f"{name} {size:,}",
                progress,
            )
            for method, record in records.items():
                # Before the numbers, what they are of.
                record = {
                    "network": name,
                    "size": size,
                    "method": method,
                    **built[method],
                    **record,
                }
                summary["results"].append(record)
            if switch := network.switch_statistics():
                summary["networks"][name]["switch"] = switch
            report.compare(summary["results"])
            write(summary)
            if args.profile_steps:
                profile(filter(built.get, methods), name, size, workers)
        for kind in workers.values():
            kind.ask(do="free")


def profile(methods, network, size, workers):
    """Traces steps of TensorFlow's methods on the first worker."""
    args = flags.FLAGS
    for method in methods:
        if report.kind_of(method) == "tensorflow":
            folder = f"profile/{network}/{size}/{method.replace(':', '_')}"
            workers["tensorflow"].ask(
                do="profile",
                method=method,
                steps=args.profile_steps,
                folder=os.path.abspath(os.path.join(args.output_dir, folder)),
            )


def write(summary):
    os.makedirs(flags.FLAGS.output_dir, exist_ok=True)
    path = os.path.join(flags.FLAGS.output_dir, "summary.json")
    with open(path, "w", encoding="utf-8") as f:
        json.dump(summary, f, indent=2)


def start_and_run(methods):
    """Makes the network, starts the workers, and ends both in any case."""
    args = flags.FLAGS
    training = {
        "hidden_layers": args.hidden_layers,
        "batch_size": args.batch_size,
    }
    threads = {
        kind: args[f"{kind}_threads"].value
        for kind in map(report.kind_of, methods)
    }
    summary = {
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "kernel": platform.release(),
            "python": platform.python_version(),
        },
        "config": {
            "num_workers": args.num_workers,
            "rounds": args.rounds,
            "seconds_per_turn": args.seconds_per_turn,
            "threads": threads,
            **training,
        },
        "networks": {},
        "results": [],
    }
    num_auto = sum(m.startswith("auto") for m in methods)
    turns = len(args.networks) * (num_auto + len(methods) * (args.rounds + 3))
    total = len(args.sizes) * (len(methods) - num_auto + turns)
    with (
        tempfile.TemporaryDirectory() as log_dir,
        namespaces.Network(args.num_workers) as network,
        launcher.Workers.start_all(
            threads, network, log_dir, args.timeout, training
        ) as workers,
        tqdm.tqdm(total=total, mininterval=1.0) as progress,
    ):
        print("Started the workers.", flush=True)
        for kind in workers.values():
            summary["machine"] |= kind.versions
        run(network, workers, methods, summary, progress)
    return summary


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    if reason := namespaces.why_not():
        print(f"This benchmark cannot run here: {reason}.", file=sys.stderr)
        return 2
    args = flags.FLAGS
    for name in args.networks:
        namespaces.parse_condition(name)
    methods = list(args.methods)
    if not importlib.util.find_spec("torch"):
        methods = [m for m in methods if report.kind_of(m) != "torch"]
        if len(methods) < len(args.methods):
            print("Without PyTorch's methods: torch is not installed.")
    for kind in {report.kind_of(m) for m in methods}:
        if report.LOCAL[kind] not in methods:
            methods.append(report.LOCAL[kind])

    summary = launcher.run_and_clean_up(start_and_run, methods)
    if summary is None:
        return 1
    write(summary)
    figure = os.path.join(args.output_dir, "figure.png")
    report.plot(summary, figure)
    print(report.text_table(summary["results"]))
    print(json.dumps(summary["networks"], indent=2))
    print(f"Wrote summary.json and figure.png in {args.output_dir}.")
    return 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
