"""Runs upstream's tests on each architecture and compares: ours may do no worse than any stock one.

A test's outcome for ours is a difference if a stock architecture has a better one. `differences.py` lists those that
are meant, with the reason; the run fails for one that is not listed, and for a listed one that is no longer there.
"""

import collections
import fnmatch
import functools
import os
import sys

import pytest
import sources
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
sources.prepare()

from differences import DIFFERENCES  # noqa: E402
from models import KINDS, OURS  # noqa: E402

# From good to bad. Partly: subtests were skipped, or lines of the test left out that a stock architecture runs.
OUTCOMES = ("passed", "partly", "skipped", "failed")

outcomes = collections.defaultdict(dict)  # test -> architecture -> outcome
lines = collections.defaultdict(dict)  # test -> architecture -> lines of upstream's files that a passed test ran
problems = []

# Whether a model compiles in one graph shows without the C++ that inductor takes minutes for.
compile_with = torch.compile


@functools.wraps(compile_with)
def compile_quickly(*args, mode=None, options=None, backend=None, **kwargs):
    return compile_with(*args, backend="aot_eager", **kwargs)


torch.compile = compile_quickly


@functools.cache
def name_upstream(path):
    """The name of a file of upstream's tests; None for other files."""
    folder, name = os.path.split(path)
    return name if folder.startswith(str(sources.CACHE)) and name.startswith("test_") else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Note the lines of upstream's test files that the test runs."""
    found = set()

    def trace(frame, event, argument):
        name = name_upstream(frame.f_code.co_filename)
        if name and event == "line":
            found.add(f"{name}:{frame.f_lineno}")
        return trace if name else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return (yield)
    finally:
        sys.settrace(before)
        item.user_properties.append(("lines", sorted(found)))


def pytest_runtest_logreport(report):
    test, kind = report.nodeid, None
    for name, suffix in KINDS.items():
        head, is_of_kind, tail = report.nodeid.partition(f"{suffix}::")
        if is_of_kind:
            test, kind = f"{head}::{tail}", name
    outcome = report.outcome
    if outcome == "skipped" and hasattr(report, "context"):  # of a subtest
        outcome = "partly"
    if report.when == "call" and outcome == "passed":
        lines[test][kind] = set(dict(report.user_properties).get("lines", ()))
    if report.when == "call" or outcome != "passed":
        outcomes[test][kind] = max(outcomes[test].get(kind, "passed"), outcome, key=OUTCOMES.index)


def compare() -> None:
    """Fill `problems`: differences that are not listed, and lists that do not hold."""
    holds = {}  # pattern -> whether a test that it names differs
    for test, by_kind in outcomes.items():
        stock = [kind for kind in by_kind if kind != OURS]
        if OURS not in by_kind or not stock:
            continue
        left_out = set().union(*(lines[test].get(kind, ()) for kind in stock)) - lines[test].get(OURS, set())
        if by_kind[OURS] == "passed" and left_out:
            by_kind[OURS] = "partly"
        differs = OUTCOMES.index(by_kind[OURS]) > min(OUTCOMES.index(by_kind[kind]) for kind in stock)
        patterns = [pattern for pattern in DIFFERENCES if fnmatch.fnmatchcase(test, pattern)]
        holds |= {pattern: holds.get(pattern, False) or differs for pattern in patterns}
        if differs and not patterns:
            without = f", without {' '.join(sorted(left_out))}" if by_kind[OURS] == "partly" else ""
            problems.append(f"DIFFERS {test}: {by_kind}{without}")
    problems.extend(f"LISTED, BUT NO DIFFERENCE {pattern}" for pattern, differs in holds.items() if not differs)


def pytest_sessionfinish(session):
    compare()
    if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED if problems else pytest.ExitCode.OK


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("ours beside stock")
    counts = collections.Counter()
    for test, by_kind in outcomes.items():
        counts.update((test.partition("::")[0], str(kind), outcome) for kind, outcome in by_kind.items())
    for battery, kind in sorted({key[:2] for key in counts}):
        row = "  ".join(f"{counts[battery, kind, outcome]:5} {outcome}" for outcome in OUTCOMES)
        terminalreporter.write_line(f"{battery:24} {kind:8} {row}")
    for problem in problems:
        terminalreporter.write_line(problem, red=True)
