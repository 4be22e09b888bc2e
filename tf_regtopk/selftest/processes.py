"""Processes that run the self-test's checks, several at a time."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

COMMAND = (sys.executable, "-m", "tf_regtopk.selftest.checks")


class Child:
    """A process that runs some of the checks.

    Args:
        names: Names of the checks.
        folder: Folder of the process's files.
        settings: Settings of `checks`, without the names and the output.
        environ: Environment variables of the process.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: pathlib.Path,
        settings: Mapping[str, Any],
        environ: Mapping[str, str],
    ) -> None:
        self.left = list(names)
        self.has_finished = False
        self.since = time.monotonic()
        stem = f"{names[0]}-{time.monotonic_ns()}"
        self.output = folder / f"{stem}.jsonl"
        self.output.touch()
        self.stderr = folder / f"{stem}.txt"
        self._read = 0
        settings = {
            **settings,
            "checks": list(names),
            "output": str(self.output),
        }
        with open(self.stderr, "wb") as stderr:
            self.popen = subprocess.Popen(
                [*COMMAND, json.dumps(settings)],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def new_lines(self) -> list[dict[str, Any]]:
        """Returns the reports of the process since the last call, as dicts."""
        data = self.output.read_bytes()
        end = data.rfind(b"\n") + 1
        lines = data[self._read : end].splitlines()
        self._read = end
        return [json.loads(line) for line in lines]

    def wait_for_facts(self, limit: float) -> dict[str, Any] | None:
        """Waits for facts about the machine, None if the process gives none."""
        deadline = time.monotonic() + limit
        while True:
            ended = self.popen.poll() is not None
            first, end, _ = self.output.read_bytes().partition(b"\n")
            if end:
                return json.loads(first)
            if ended or time.monotonic() > deadline:
                return None
            time.sleep(0.05)

    def end(self) -> None:
        """Terminates the process and all processes that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()

    @property
    def all_words(self) -> list[str]:
        """Lines that the process has written to its standard streams."""
        lines = self.stderr.read_text("utf-8", errors="replace").splitlines()
        return [line for line in lines if line.strip()]

    @property
    def last_words(self) -> list[str]:
        """Last lines that the process has written to its standard streams."""
        return self.all_words[-40:]


class Run:
    """All checks, several at a time, with a line for each check that has ended.

    Args:
        batches: Lists of names of checks, each for a process.
        alone: Names of the checks during which nothing else may run.
        jobs: Number of processes that run at once.
        limit: Seconds of a check.
        start: Function of a list of names that returns a `Child`.
        show: Function of a result, a dict.

    Attributes:
        facts: Facts about the machine that the processes report, a dict.
    """

    def __init__(
        self,
        batches: Iterable[Sequence[str]],
        alone: Iterable[str],
        jobs: int,
        limit: float,
        start: Callable[[list[str]], Child],
        show: Callable[[dict[str, Any]], None],
    ) -> None:
        self._waiting = [list(batch) for batch in batches]
        self._alone = set(alone)
        self._jobs = jobs
        self._limit = limit
        self._start = start
        self._show = show
        self._children: list[Child] = []
        # The last report of each case, by the names of the check and the case.
        self._cases: dict[str, dict[str, dict[str, Any]]] = {}
        self.facts: dict[str, Any] = {}

    def add(self, child: Child) -> None:
        """Watches a process that has been started already."""
        self._children.append(child)

    def wait(self) -> None:
        """Runs all checks."""
        try:
            while self._waiting or self._children:
                self._start_some()
                for child in list(self._children):
                    self._look_at(child)
                time.sleep(0.05)
        finally:
            for child in self._children:
                child.end()

    def _start_some(self) -> None:
        while self._waiting and len(self._children) < self._jobs:
            busy = any(self._alone & set(c.left) for c in self._children)
            if busy or (self._children and self._alone & set(self._waiting[0])):
                return
            self._children.append(self._start(self._waiting.pop(0)))

    def _look_at(self, child: Child) -> None:
        ended = child.popen.poll() is not None
        for line in child.new_lines():
            self._take(child, line)
        if not ended and time.monotonic() - child.since < self._limit:
            return
        child.end()
        self._children.remove(child)
        if not child.left:
            return
        if not ended:
            self._finish(
                child, child.left[0], f"no end after {self._limit:g} s"
            )
        elif child.popen.returncode or not child.has_finished:
            words = " | ".join(child.last_words[-3:])
            self._finish(
                child,
                child.left[0],
                f"the process ended with status {child.popen.returncode}: "
                f"{words}",
            )
        # The checks that are left get another process, because this one has
        # ended.
        if child.left:
            self._waiting.insert(0, child.left)

    def _take(self, child: Child, line: dict[str, Any]) -> None:
        name = line.get("check")
        if name is None:
            self.facts.update(line)
        elif "case" in line:
            cases = self._cases.setdefault(name, {})
            cases[line["case"]] = line
        elif line["status"] == "running":
            child.since = time.monotonic()
        elif line["status"] == "done":
            self._finish(child, name)

    def _finish(
        self, child: Child, name: str, reason: str | None = None
    ) -> None:
        cases = list(self._cases.get(name, {}).values())
        if reason is not None:
            stuck = [c for c in cases if c["status"] == "running"]
            if not stuck:
                stuck = [{"check": name, "case": "start"}]
                cases += stuck
            stuck[0].update(status="failed", found=reason)
        result = {
            "check": name,
            **outcome_of(cases),
            "seconds": round(time.monotonic() - child.since, 1),
            "cases": cases,
        }
        if result["status"] == "failed":
            result["output"] = child.last_words
        child.left.remove(name)
        child.has_finished = True
        child.since = time.monotonic()
        self._show(result)


def outcome_of(cases: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Returns the status of a check, and the findings of its cases in words."""
    by_status = {
        status: [case for case in cases if case["status"] == status]
        for status in ("ok", "failed", "skipped")
    }
    failed = by_status["failed"]
    if failed:
        found = "; ".join(f"{c['case']}: {c['found']}" for c in failed[:3])
        if len(failed) > 3:
            found += f"; and {len(failed) - 3} more"
        found = f"{len(failed)} of {len(cases)} cases: {found}"
        return {"status": "failed", "found": found}
    told = [c for c in cases if c.get("found")]
    found = "; ".join(
        c["found"] if len(told) == 1 else f"{c['case']}: {c['found']}"
        for c in told
    )
    if by_status["ok"]:
        count = len(by_status["ok"])
        number = f"{count} case{'s' * (count > 1)}"
        return {
            "status": "ok",
            "found": ". ".join(filter(None, (number, found))),
        }
    return {"status": "skipped", "found": found}
