"""Measure what `torch.compile` gains in a training step.

The same weights in an eager and in a compiled model take turns. Compiled, the experts are transformers' `grouped_mm`
and the logits whole (`cpu_experts.uses_cpu_kernel`, `chunked_loss.can_chunk`); inductor fuses everything else. A
third, eager model has these two as well, to separate their part from the compiler's.

    python -m benchmarks.compiled_step
"""

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Annotated, Any

import torch
import typer

from benchmarks.measure import grin_config, interleave, random_rows, run_with, show, spread
from benchmarks.peers import Dtype, build_ours

MODELS = ("eager", "compiled", "eager, grouped_mm and whole logits")
COLUMNS = ["dtype, tokens", *MODELS, "speed of eager / compiled", "/ eager, grouped_mm", "compilation"]


def step(model: Any, rows: torch.Tensor, skip_logits: bool | None) -> None:
    model(input_ids=rows, labels=rows, use_cache=False, skip_logits=skip_logits).loss.backward()
    model.zero_grad(set_to_none=True)


def measure(sizes: dict[str, int], tokens: int, dtype: Dtype, rounds: int) -> tuple[dict[str, list[float]], float]:
    """Return seconds of a step (forward and backward) by model, and of the first compiled step."""
    torch.manual_seed(0)
    config = grin_config(**sizes)
    eager, plain = build_ours(config, dtype.of_torch), build_ours(config, dtype.of_torch)
    plain.set_experts_implementation("grouped_mm")
    rows = random_rows(config, tokens)
    tasks: dict[str, Callable[[], None]] = {
        "eager": partial(step, eager, rows, None),
        "compiled": partial(step, torch.compile(eager), rows, None),
        "eager, grouped_mm and whole logits": partial(step, plain, rows, False),
    }
    started = time.perf_counter()
    tasks["compiled"]()
    compilation = time.perf_counter() - started
    return interleave(tasks, rounds, "steps"), compilation


def main(
    tokens: Annotated[int, typer.Option(min=64, help="tokens per step, in rows of at most 512")] = 2048,
    dtype: Annotated[list[Dtype], typer.Option(help="dtype of the models")] = [*Dtype],  # noqa: B006
    layers: Annotated[int, typer.Option(min=1)] = 2,
    vocab_size: Annotated[int, typer.Option(min=8)] = 4096,
    hidden_size: Annotated[int, typer.Option(min=64)] = 1024,
    intermediate_size: Annotated[int, typer.Option(min=1, help="FFN size of one expert")] = 1600,
    experts: Annotated[int, typer.Option(min=2)] = 16,
    repeats: Annotated[int, typer.Option(min=2, help="rounds after one warm-up")] = 5,
    record: Annotated[bool, typer.Option(help="append the table to benchmarks/RESULTS.md")] = False,
) -> None:
    """Time a training step, eager and compiled.

    Example: python -m benchmarks.compiled_step --dtype bfloat16
    """
    sizes = {"layers": layers, "vocab_size": vocab_size, "hidden_size": hidden_size, "experts": experts,
             "intermediate_size": intermediate_size}  # fmt: skip
    rows = []
    for kind in dtype:
        seconds, compilation = run_with({}, measure, sizes, tokens, kind, repeats)
        row = [f"{kind}, {tokens}", *(f"{1e3 * median(seconds[name]):.0f} ms" for name in MODELS)]
        rows.append([*row, *(spread(seconds[name], seconds["eager"]) for name in MODELS[1:]), f"{compilation:.0f} s"])
    title = f"torch.compile: hidden {hidden_size}, FFN {intermediate_size} x {experts}, {layers} layers"
    notes = f"Forward and backward; medians of {repeats}. Compilation: the first compiled step."
    show(title, COLUMNS, rows, record, notes)


if __name__ == "__main__":
    typer.run(main)
