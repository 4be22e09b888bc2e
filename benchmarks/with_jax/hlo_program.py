"""What XLA's final program for a GPU launches, counted in its text."""

import collections
import re

# What launches nothing.
BOOKKEEPING = {
    "after-all",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "copy-done",
    "get-tuple-element",
    "parameter",
    "tuple",
    "while",
}


def count(text):
    """Counts what a program launches.

    Args:
        text: As XLA writes it.

    Returns:
        Dictionary: `kernels`, each fusion, copy, sort, library call and other
        operation that computes, in the entry computation and in those it calls,
        a loop's body as often as it runs, and of a branch the first side; `in
        all`, with each loop's body once, and both sides; `scatters`, `sorts`,
        `branches`; `loops`, how often each runs, ? where XLA does not know;
        `f64`.
    """
    program = _Program(text)
    launched, in_all = 0, 0
    found, loops = collections.Counter(), []
    for operation, line, times in program.launched(program.entry):
        found[operation] += 1
        if operation == "while":
            loops.append(str(_trips(line) or "?"))
        if operation not in BOOKKEEPING:
            in_all += 1
            launched += times
    return {
        "kernels": launched,
        "in all": in_all,
        "scatters": len(re.findall(r" scatter\(", text)),
        "sorts": found["sort"],
        "branches": found["conditional"],
        "f64": "yes" if "f64[" in text else "no",
        "loops": " ".join(loops) or "none",
    }


class _Program:
    """The computations of a program: `(operation, line)` of each by name."""

    def __init__(self, text):
        self._computations, operations = {}, []
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
            if match := re.match(r"(ENTRY )?%(\S+) \(.*\{$", line):
                operations = self._computations[match[2]] = []
                if match[1]:
                    self.entry = match[2]
            elif match := re.match(
                r"\s+(?:ROOT )?%\S+ = (?:\(.*?\)|\S+) ([a-z][\w-]*)\(", line
            ):
                operations.append((match[1], line))

    def launched(self, name):
        """`(operation, line, times)`, of a computation and what it calls."""
        for operation, line in self._computations[name]:
            yield operation, line, 1
            for called, times in _called(operation, line):
                for inner, inner_line, inner_times in self.launched(called):
                    yield inner, inner_line, times * inner_times


def _called(operation, line):
    """`(computation, times)` of what an operation launches one by one."""
    if operation == "while":
        trips = _trips(line)
        yield re.search(r"body=%([^\s,]+)", line)[1], trips or 1
        if not trips:
            yield re.search(r"condition=%([^\s,]+)", line)[1], 1
    elif operation == "conditional":
        if branches := re.search(r"branch_computations=\{(.*?)\}", line):
            names = re.findall(r"%([^\s,]+)", branches[1])
        else:
            names = re.findall(r"(?:true|false)_computation=%([^\s,]+)", line)
        for i, name in enumerate(names):
            yield name, int(i == 0)
    elif operation == "call":
        yield re.search(r"to_apply=%([^\s,]+)", line)[1], 1


def _trips(line):
    """How often a loop runs; None if XLA does not know."""
    match = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    return int(match[1]) if match else None
