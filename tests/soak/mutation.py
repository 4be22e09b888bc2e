r"""Changes the core in small ways, one at a time, and runs its tests on each.

    python tests/soak/mutation.py --mutants=40

cosmic-ray, of the extra `mutation`, makes the mutants; a seed draws some of
them, evenly from the packages of the core. A mutant that no test notices is
printed with its diff; those explained in `HARMLESS` are not tried. Fails if
more than `--max_survivors` survive. Takes half an hour on one core.

Nothing is drawn from docstrings and other strings (cosmic-ray leaves them
alone), annotations, `raise`, `warnings.warn` and `__str__`, nor what Python
does not compile, warns of, or takes for the same.
"""

import ast
import collections
import contextlib
import dataclasses
import difflib
import importlib
import itertools
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings

from absl import app
from absl import flags

ROOT = pathlib.Path(__file__).resolve().parents[2]
# What tests each package beside `tests/unit/<package>`: what finds most in
# little time comes first.
TESTS = {
    "selection": [],
    "kernels": [
        "unit/codecs/test_bit_packing.py",
        "unit/codecs/test_index_codecs.py",
        "unit/sparsifiers/test_random_k.py",
        "unit/selection/test_kth_largest.py",
        "unit/selection/test_largest.py",
        "unit/selection/test_group_sampling.py",
    ],
    "codecs": [
        "unit/saving/test_saved_config.py",
        "integration/test_payloads.py",
        "integration/test_saved_files.py",
    ],
    "sizes": ["unit/codecs/test_index_codecs.py"],
    "steps": [
        "unit/optimizers/test_sparsified.py",
        "integration/test_custom_loop.py",
        "integration/test_non_finite.py",
        "integration/test_exchange.py",
    ],
    "error_feedback": [
        "unit/saving/test_saved_config.py",
        "unit/steps/test_round.py",
        "integration/test_reference.py",
    ],
    "sparsifiers": [
        "unit/saving/test_saved_config.py",
        "unit/steps/test_round.py",
        "unit/steps/test_telemetry.py",
        "integration/test_reference.py",
    ],
    "saving": [
        "integration/test_saving.py",
        "integration/test_bad_files.py",
        "integration/test_resume.py",
    ],
    "distribute": [
        "unit/keras_internals/test_neighbours.py",
        "unit/steps/test_gossip_round.py",
        "integration/test_decentralized.py",
        "integration/test_reduce_scatter.py",
    ],
    "callbacks": [
        "integration/test_bad_files.py",
        "integration/test_saving.py",
    ],
}
# Mutants that no test can notice, or need not, by the reason: the module, the
# line, and what it becomes (None: whatever it becomes).
HARMLESS = {
    "It changes what takes time and memory, and not the result.": [
        (
            "kernels/bitmap.py",
            "words_a_row = 1 if device_kind.is_gpu() else 8",
            None,
        ),
        ("selection/group_sampling.py", "_SMALLEST_SAMPLED = 1 << 13", None),
        (
            "selection/sampling.py",
            "room = num_undecided + _MARGIN * math.sqrt(num_undecided) + 1",
            None,  # `pytest -m slow` notices.
        ),
        ("selection/keys.py", "WIDE_DIGIT, NARROW_DIGIT = 16, 8", None),
        (
            "sparsifiers/top_k.py",
            "selects_non_finite: ClassVar[bool] = True",
            None,
        ),
    ],
    "Both have an entry a variable, replica or group: it never fails.": [
        (
            "codecs/index_codecs.py",
            "*map(self.decode, tf.unstack(words)), strict=True",
            None,
        ),
        (
            "selection/group_sampling.py",
            "for part, bound in zip(parts, bounds, strict=True)",
            None,
        ),
        (
            "steps/flat_buffer.py",
            "variables = zip(has_gradient, self.sizes, strict=True)",
            None,
        ),
    ],
    "The first and the last of one are the same.": [
        (
            "codecs/bit_packing.py",
            "return tf.concat(packed, axis=0)",
            "return tf.concat(packed, axis= -1)",
        ),
        ("codecs/header.py", "bits = bits[:, 0]", "bits = bits[:, -1]"),
        (
            "error_feedback/error_accumulation.py",
            "u = self.momentum * u[0] + gradient",
            "u = self.momentum * u[ -1] + gradient",
        ),
        (
            "selection/largest.py",
            "or scores.shape[0] < _SMALLEST_SAMPLED",
            "or scores.shape[ -1] < _SMALLEST_SAMPLED",
        ),
    ],
    "Random bits of values do not change how many words are sent.": [
        ("codecs/wire_report.py", "stream=(0, 0),", None),
    ],
    "k is never larger than J.": [
        (
            "kernels/scatter_sum.py",
            "if k == size: # Every replica has sent all entries, in their "
            "order.",
            "if k >= size: # Every replica has sent all entries, in their "
            "order.",
        ),
    ],
    "There is always a group.": [
        (
            "selection/keys.py",
            "if len(ks) == 1 and device_kind.is_gpu():",
            "if len(ks) <= 1 and device_kind.is_gpu():",
        ),
    ],
    "It is 0 times either.": [
        (
            "steps/missing.py",
            "start = tf.cast(flat[0] != flat[0], tf.int32) * 0",
            "start = tf.cast(flat[0] >= flat[0], tf.int32) * 0",
        ),
    ],
}
# A mutant may ask for any amount of memory; more than this fails.
MOST_MEMORY = 16 << 30


def define_flags():
    flags.DEFINE_integer(
        "mutants", 40, "How many to draw.", lower_bound=1, short_name="n"
    )
    flags.DEFINE_integer(
        "first",
        0,
        "How many of those drawn to leave out, as after an interruption.",
        lower_bound=0,
    )
    flags.DEFINE_integer("seed", 0, "Seed of the draw.", lower_bound=0)
    flags.DEFINE_integer(
        "max_survivors", 4, "Fails if more survive.", lower_bound=0
    )
    flags.DEFINE_integer(
        "timeout_seconds",
        900,
        "Seconds after which the tests of a mutant are ended.",
        lower_bound=1,
    )
    flags.DEFINE_integer("jobs", 1, "Mutants to test at once.", lower_bound=1)
    flags.DEFINE_boolean(
        "check_original",
        True,
        "Whether to begin with the tests on the code as it is: they must pass.",
    )


# ----- The mutants -----


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A module of the core with a change.

    Args:
        module: Path of the module in the repository.
        line: Number of the line that changes.
        operator: What cosmic-ray calls the change.
        original: Source of the module.
        source: Source with the change.
    """

    module: str
    line: int
    operator: str
    original: str
    source: str

    @property
    def package(self):
        return self.module.split("/")[1]

    @property
    def diff(self):
        lines = difflib.unified_diff(
            self.original.splitlines(),
            self.source.splitlines(),
            self.module,
            "mutant",
            n=2,
            lineterm="",
        )
        return "\n".join(lines)

    @property
    def reason(self):
        """The reason in `HARMLESS`, None if there is none."""
        changed = {"-": [], "+": []}
        for line in self.diff.splitlines()[2:]:
            if line[0] in changed:
                changed[line[0]] += line[1:].split()
        old, new = map(" ".join, changed.values())
        for reason, mutants in HARMLESS.items():
            for module, line, mutated in mutants:
                if (
                    self.module == f"tf_regtopk/{module}"
                    and line == old
                    and mutated in (None, new)
                ):
                    return reason
        return None

    def __str__(self):
        return f"{self.module}:{self.line} {self.operator}"


def all_mutations(modules):
    """cosmic-ray's mutations of the modules, in the order of their places."""
    # Here, because pytest imports this file to look for doctests, also where
    # cosmic-ray is not installed.
    from cosmic_ray import commands
    from cosmic_ray import work_db

    with (
        tempfile.TemporaryDirectory() as folder,
        work_db.use_db(
            os.path.join(folder, "work.sqlite"), work_db.WorkDB.Mode.create
        ) as db,
    ):
        commands.init(modules, db, {})
        mutations = [
            mutation for item in db.work_items for mutation in item.mutations
        ]
    return sorted(
        mutations,
        key=lambda m: (
            str(m.module_path),
            m.start_pos,
            m.operator_name,
            m.occurrence,
        ),
    )


def writes_text(node):
    """Whether a node of a module matters only to those who read text."""
    match node:
        case ast.Raise():
            return True
        case ast.Call(func=ast.Attribute(ast.Name("warnings"), "warn")):
            return True
        case ast.FunctionDef(name="__str__" | "__repr__"):
            return True
    return False


def left_out(source):
    """List of the first and last positions, (line, column), of such code."""
    spans = []
    for node in ast.walk(ast.parse(source)):
        parts = [
            getattr(node, name, None) for name in ("annotation", "returns")
        ]
        for part in [node] * writes_text(node) + [p for p in parts if p]:
            spans.append(
                (
                    (part.lineno, part.col_offset),
                    (part.end_lineno, part.end_col_offset),
                )
            )
    return spans


def meaning(source):
    """What Python makes of a module, None if it does not compile."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # As for `is` with a literal.
            compile(source, "mutant", "exec", dont_inherit=True)
    except SyntaxError:
        return None
    return ast.dump(ast.parse(source))


def candidates(package):
    """Iterator of a package's mutants in random order, of a place one."""
    from cosmic_ray import mutating
    from cosmic_ray import plugins

    rng = random.Random(f"{flags.FLAGS.seed} {package}")
    modules = sorted((ROOT / "tf_regtopk" / package).glob("*.py"))
    sources = {str(path): path.read_text(encoding="utf-8") for path in modules}
    spans = {path: left_out(source) for path, source in sources.items()}
    # An operator may be replaced by ten others, and yet is one place.
    places = collections.defaultdict(list)
    for mutation in all_mutations(modules):
        path = str(mutation.module_path)
        if not any(
            first <= mutation.start_pos < last for first, last in spans[path]
        ):
            places[path, mutation.start_pos].append(mutation)
    order = list(places)
    rng.shuffle(order)
    for path, start in order:
        mutation = rng.choice(places[path, start])
        operator = plugins.get_operator(mutation.operator_name)()
        source = mutating.mutate_code(
            sources[path], operator, mutation.occurrence
        )
        if meaning(source) not in (None, meaning(sources[path])):
            yield Mutant(
                module=pathlib.Path(path).relative_to(ROOT).as_posix(),
                line=start[0],
                operator=mutation.operator_name.split("/")[-1],
                original=sources[path],
                source=source,
            )


def draw(number):
    """The first mutants, one of each package after the other."""
    rounds = itertools.zip_longest(*map(candidates, TESTS))
    drawn = (m for mutants in rounds for m in mutants if m is not None)
    return list(itertools.islice(drawn, number))


# ----- Their tests -----


def tests_of(package, module):
    """Paths of the tests of a package, those of one of its modules first."""
    paths = []
    for name in (f"unit/{package}", *TESTS[package]):
        path = ROOT / "tests" / name
        paths += sorted(path.glob("test_*.py")) if path.is_dir() else [path]
    paths = [path.relative_to(ROOT).as_posix() for path in paths]
    own = f"tests/unit/{package}/test_{pathlib.Path(module).name}"
    paths.sort(key=lambda path: path != own)
    # Its doctests come before.
    return list(dict.fromkeys([module, *paths]))


def copy_repository(folder):
    """Copies what Git knows or would add, as it is now."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).exists():  # Else it is deleted, and not committed.
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((ROOT / name).read_bytes())
    return folder


class Trial:
    """Tests that run in a copy of the repository, by a process of their own.

    The process is a fork of this one, which has imported TensorFlow.

    Args:
        folder: The copy.
        tests: Paths of the tests, in the order in which they run.
        mutant: `Mutant`, or None for the code as it is.
        timeout: Seconds after which the tests are ended.
    """

    def __init__(self, folder, tests, mutant, timeout):
        self.folder, self.mutant, self._timeout = folder, mutant, timeout
        self._write(mutant and mutant.source)
        self._begin = time.monotonic()
        sys.stdout.flush()
        self._pid = os.fork()
        if not self._pid:
            _run_pytest(folder, tests)

    @property
    def seconds(self):
        return time.monotonic() - self._begin

    @property
    def output(self):
        path = self.folder / "output.txt"
        return path.read_text(encoding="utf-8", errors="replace")

    def outcome(self):
        """Says how the tests ended, and puts the code back; None: not yet."""
        ended, status = os.waitpid(self._pid, os.WNOHANG)
        if not ended:
            if self.seconds < self._timeout:
                return None
            self.end()
            return "timed out"
        self._clean()
        status = os.waitstatus_to_exitcode(status)
        return "killed" if status else "survived"

    def end(self):
        """Ends the tests."""
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        self._clean()

    def _clean(self):
        # The tests may have left processes.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        self._write(self.mutant and self.mutant.original)

    def _write(self, source):
        if source is not None:
            path = self.folder / self.mutant.module
            path.write_text(source, encoding="utf-8")


def _run_pytest(folder, tests):
    """Ends this process with the status of pytest."""
    # Here, because Windows has none, and pytest imports this file.
    import resource

    status = 70
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for limit, value in (
            (resource.RLIMIT_AS, MOST_MEMORY),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(limit, (value, value))
        mode = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        output = os.open(folder / "output.txt", mode)
        for stream in (1, 2):
            os.dup2(output, stream)
        temporary = folder / "tmp"
        temporary.mkdir(exist_ok=True)
        tempfile.tempdir = str(temporary)
        # Bytecode of another mutant of the same second would pass for that of
        # this one.
        sys.dont_write_bytecode = True
        os.environ |= {
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": str(folder),
            "TMPDIR": str(temporary),
        }
        os.chdir(folder)
        ours = (str(ROOT), *(str(path) for path in (ROOT / "tests").iterdir()))
        sys.path[:] = [str(folder), *(p for p in sys.path if p not in ours)]
        # First, because pytest would import a module with doctests alone, and
        # the package would then import it once more.
        package = importlib.import_module("tf_regtopk")
        assert pathlib.Path(package.__file__).is_relative_to(folder)

        import pytest

        status = pytest.main(
            ["-x", "-q", "-n0", "-m", "not slow", "-p", "no:cacheprovider"]
            + ["--no-header", "--tb=short", f"--rootdir={folder}", *tests]
        )
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def check_original(mutants, folder):
    """Raises unless the tests of all mutants pass on the code as it is."""
    tests = {t: None for m in mutants for t in tests_of(m.package, m.module)}
    timeout = flags.FLAGS.timeout_seconds * len(TESTS)
    trial = Trial(folder, [*tests], None, timeout)
    try:
        while (outcome := trial.outcome()) is None:
            time.sleep(0.1)
    except BaseException:
        trial.end()
        raise
    assert outcome == "survived", f"Tests {outcome}: {trial.output[-3000:]}"
    print(f"The tests of the code as it is: {trial.seconds:.0f} s", flush=True)


def run(mutants, folders):
    """Yields each mutant with its outcome."""
    waiting, running = list(mutants), []
    try:
        while waiting or running:
            while waiting and folders:
                mutant = waiting.pop(0)
                tests = tests_of(mutant.package, mutant.module)
                timeout = flags.FLAGS.timeout_seconds
                running.append(Trial(folders.pop(), tests, mutant, timeout))
            time.sleep(0.1)
            for trial in running[:]:
                if outcome := trial.outcome():
                    running.remove(trial)
                    folders.append(trial.folder)
                    yield trial, outcome
    finally:
        for trial in running:
            trial.end()


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    # So that the copy goes and the tests end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    drawn = draw(args.mutants)[args.first :]
    harmless = [m for m in drawn if m.reason]
    for mutant in harmless:
        print(f"harmless: {mutant}: {mutant.reason}")
    mutants = [m for m in drawn if not m.reason]
    # Forks of this process need not import it. A library's threads would be
    # missing in them.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    sys.path.append(str(ROOT / "tests" / "support"))
    importlib.import_module("logical_devices")
    importlib.import_module("keras")
    importlib.import_module("pytest")
    assert len(os.listdir("/proc/self/task")) == 1
    counts, survivors = collections.Counter(), []
    with tempfile.TemporaryDirectory() as directory:
        folders = [
            copy_repository(pathlib.Path(directory).resolve() / str(i))
            for i in range(args.jobs)
        ]
        if args.check_original:
            check_original(mutants, folders[0])
        for trial, outcome in run(mutants, folders):
            counts[outcome] += 1
            by = re.search(r"^(?:FAILED|ERROR) (\S+)", trial.output, re.M)
            print(
                f"[{counts.total()}/{len(mutants)}] {outcome} after "
                f"{trial.seconds:.0f} s{f' by {by[1]}' if by else ''}: "
                f"{trial.mutant}",
                flush=True,
            )
            if outcome == "survived":
                survivors.append(trial.mutant)
                print(trial.mutant.diff, flush=True)
    for mutant in survivors:
        print(f"\nsurvived: {mutant}\n{mutant.diff}")
    print(
        f"\n{len(drawn)} mutants: {counts['killed']} killed, "
        f"{counts['timed out']} timed out, {counts['survived']} survived, "
        f"{len(harmless)} harmless."
    )
    return int(counts["survived"] > args.max_survivors)


if __name__ == "__main__":
    define_flags()
    app.run(main)
