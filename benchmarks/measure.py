"""Shared by the benchmarks: sizes and data, taking turns, counting memory, fresh processes, tables in RESULTS.md."""

import datetime
import multiprocessing
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from torch.profiler import ProfilerActivity, profile

from modeling_grin import GrinMoeConfig

console = Console()

RESULTS = Path(__file__).parent / "RESULTS.md"
# glibc's settings, for processes that are started with them. A step of training frees what the next one allocates:
# left to itself the allocator gives large blocks back, and each step waits for the system to clear fresh pages.
ALLOCATORS: dict[str, dict[str, str]] = {
    "keep": {
        "MALLOC_MMAP_THRESHOLD_": str(2**32),
        "MALLOC_TRIM_THRESHOLD_": str(2**34),
        "MALLOC_TOP_PAD_": str(2**26),
    },
    "default": {},
}

ROW = 512  # tokens in a row of a batch
# Of the load-balance loss, as in the recipes for training from scratch; the release has 0, which leaves the loss out.
COEFFICIENT = 0.01


def grin_config(
    hidden_size: int = 1024,
    intermediate_size: int = 1600,
    experts: int = 16,
    layers: int = 2,
    vocab_size: int = 4096,
    top_k: int = 2,
    **settings: Any,
) -> GrinMoeConfig:
    """Return the release's config at other sizes, with the load-balance loss; `settings` are other fields."""
    return GrinMoeConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=max(1, hidden_size // 256),
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **{"router_aux_loss_coef": COEFFICIENT, **settings},
    )


def random_rows(config: GrinMoeConfig, tokens: int) -> torch.Tensor:
    """Return int64 `[rows, positions]` with `tokens` in all, in rows of at most `ROW`.

    Raises:
        ValueError: more tokens than a row, and no multiple of it.
    """
    length = min(tokens, ROW)
    if tokens % length:
        raise ValueError(f"{tokens} tokens: must be a multiple of {length}")
    return torch.randint(config.vocab_size, (tokens // length, length))


def interleave(tasks: Mapping[str, Callable[[], Any]], rounds: int, what: str) -> dict[str, list[float]]:
    """Return the seconds of every task in every round, after one warm-up; each round begins with another task."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    names = list(tasks)
    for turn in track(range(rounds + 1), what, transient=True):
        first = 2 * turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            tasks[name]()
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def allocations(task: Callable[[], Any]) -> torch.Tensor:
    """Return the bytes of tensors that `task` allocated (positive) and freed (negative), in order, int64."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own chatter
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        task()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    return torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])


def peak_memory(task: Callable[[], Any]) -> int:
    """Return the most bytes of tensors that `task` held at a time, over the bytes before it."""
    return int(allocations(task).cumsum(0).max())


def run_with(environment: Mapping[str, str], function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a module's `function` in a new process with `environment` added; return its result."""
    spawn = multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, environment), ProcessPoolExecutor(1, spawn) as executor:
        return executor.submit(function, *arguments).result()


def spread(own: Sequence[float], other: Sequence[float]) -> str:
    """Return median and quartiles of the ratios `own / other`, round by round."""
    low, middle, high = quantiles([a / b for a, b in zip(own, other, strict=True)], n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], record: bool, notes: str = "") -> None:
    """Print a table; with `record`, append it to RESULTS.md with date, versions, machine and command."""
    table = Table(Column(columns[0], no_wrap=True), *columns[1:], title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if not record:
        return
    packages = ", ".join(f"{name} {version(name)}" for name in ("grin-moe", "torch", "transformers"))
    machine = f"Python {platform.python_version()}; CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    module = sys.modules["__main__"].__spec__  # of `python -m`
    program = ["-m", module.name] if module else [f"benchmarks/{Path(sys.argv[0]).name}"]
    command = shlex.join(["python", *program, *sys.argv[1:]])
    lines = [f"\n## {title}\n", f"{datetime.date.today()}. {packages}, {machine}.\n", f"`{command}`\n"]
    lines += ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)]
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write("\n".join([*lines, *([f"\n{notes}"] if notes else [])]) + "\n")
    console.print(f"appended to {RESULTS.name}")
