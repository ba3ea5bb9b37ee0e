"""Processes for tests, forked from one that has everything imported: imports take longer than most of what is run."""

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
TIMEOUT = 900.0  # seconds after which a run hangs, however busy the machine is
IMPORTED = [
    "recipes.pretrain", "recipes.sft", "conversion", "cases", "launch", "sharded_runs", "pipeline_runs",
    "failure_runs", "frozen",
]  # fmt: skip
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "CI": "1",  # trl counts its runs elsewhere
    "PYTHONFAULTHANDLER": "1",
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "distributed"))),
}


def get_context():
    """multiprocessing's context, whose processes begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


def call(function: Callable, *args) -> str:
    """Call `function` in a process of its own; what is printed there, or a failure with it."""
    with tempfile.NamedTemporaryFile("r", errors="replace") as file:
        process = get_context().Process(target=redirect, args=(file.name, function, *args))
        process.start()
        process.join(TIMEOUT)
        failure = end(psutil.Process(process.pid)) if process.is_alive() else f"exit code {process.exitcode}"
        process.join()
        output = file.read()
    assert process.exitcode == 0, f"{failure}: {function.__name__}{args}\n{output[-50_000:]}"
    return output


def redirect(path: str, function: Callable, *args) -> None:
    with open(path, "w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    faulthandler.enable()
    function(*args)


def run(command: Sequence[str | Path]) -> str:
    """Run `python command` in a process that imports everything itself; its output, or a failure with it."""
    shown = " ".join(Path(part).name for part in map(str, command))
    with tempfile.TemporaryFile("w+") as file:  # a pipe would be held open by ranks that hang
        process = psutil.Popen(
            [sys.executable, *map(str, command)], env=os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
            stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            process.wait(TIMEOUT)
        except psutil.TimeoutExpired:
            shown = f"{end(process)}: {shown}"
            process.wait()
        file.seek(0)
        output = file.read()
    assert process.returncode == 0, f"failed: {shown}\n{output[-50_000:]}"
    return output


def end(process: psutil.Process) -> str:
    """End a process that hangs, and its children: each says where it is, see PYTHONFAULTHANDLER."""
    stuck = [*process.children(recursive=True), process]
    for member in stuck:
        member.send_signal(signal.SIGABRT)
    for member in psutil.wait_procs(stuck, timeout=5)[1]:
        member.kill()
    return f"no end after {TIMEOUT} s"
