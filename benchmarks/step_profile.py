"""Measure the operators of a training step with torch's profiler, before and after.

Before: transformers' `grouped_mm` and whole logits. After: this package's experts and chunked loss, the same weights.

    python -m benchmarks.step_profile
"""

from statistics import median
from typing import Annotated, Literal

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import ALLOCATORS, grin_config, random_rows, run_with, show
from benchmarks.peers import Dtype, build_ours

COLUMNS = ["operator", "before", "calls", "after", "calls"]


def measure(sizes: dict[str, int], tokens: int, dtype: Dtype, rounds: int) -> list[dict[str, tuple[float, int]]]:
    """Return, before and after, each operator's median own milliseconds in a step, and its calls."""
    torch.manual_seed(0)
    config = grin_config(**sizes)
    model, rows = build_ours(config, dtype.of_torch), random_rows(config, tokens)
    own = model.config._experts_implementation
    found: list[list[dict[str, tuple[float, int]]]] = [[], []]
    for turn in range(rounds + 1):
        for steps, implementation, skip_logits in zip(found, ("grouped_mm", own), (False, None), strict=True):
            model.set_experts_implementation(implementation)
            with profile(activities=[ProfilerActivity.CPU]) as record:
                model(input_ids=rows, labels=rows, use_cache=False, skip_logits=skip_logits).loss.backward()
            model.zero_grad(set_to_none=True)
            events = record.key_averages()
            step = {
                event.key.removeprefix("aten::"): (event.self_cpu_time_total / 1e3, event.count) for event in events
            }
            step["the whole step"] = sum(event.self_cpu_time_total for event in events) / 1e3, 1
            if turn > 0:
                steps.append(step)
    return [
        {
            name: (median(step.get(name, (0.0, 0))[0] for step in steps), steps[0].get(name, (0.0, 0))[1])
            for name in steps[0]
        }
        for steps in found
    ]


def main(
    tokens: Annotated[int, typer.Option(min=64, help="tokens per step, in rows of at most 512")] = 2048,
    dtype: Annotated[Dtype, typer.Option(help="dtype of the model")] = Dtype.bfloat16,
    layers: Annotated[int, typer.Option(min=1)] = 2,
    vocab_size: Annotated[int, typer.Option(min=8)] = 4096,
    hidden_size: Annotated[int, typer.Option(min=64)] = 1024,
    intermediate_size: Annotated[int, typer.Option(min=1, help="FFN size of one expert")] = 1600,
    experts: Annotated[int, typer.Option(min=2)] = 16,
    allocator: Annotated[Literal["keep", "default"], typer.Option(help="keep: freed memory stays mapped")] = "default",
    operators: Annotated[int, typer.Option(min=1, help="rows of the table")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="steps after one warm-up")] = 5,
    record: Annotated[bool, typer.Option(help="append the table to benchmarks/RESULTS.md")] = False,
) -> None:
    """Show the operators of a training step that take the most time, before and after.

    Example: python -m benchmarks.step_profile --dtype float32
    """
    sizes = {"layers": layers, "vocab_size": vocab_size, "hidden_size": hidden_size, "experts": experts,
             "intermediate_size": intermediate_size}  # fmt: skip
    before, after = run_with(ALLOCATORS[allocator], measure, sizes, tokens, dtype, repeats)
    names = sorted({*before, *after}, key=lambda name: -max(found.get(name, (0, 0))[0] for found in (before, after)))
    rows = []
    for name in names[: operators + 1]:
        cells = [
            (f"{ms:.0f} ms", str(calls)) for ms, calls in (found.get(name, (0.0, 0)) for found in (before, after))
        ]
        rows.append([name, *cells[0], *cells[1]])
    title = (
        f"Profile of a training step: hidden {hidden_size}, FFN {intermediate_size} x {experts}, {layers} layers, "
        f"vocabulary {vocab_size}, {tokens} tokens, {dtype}, allocator: {allocator}"
    )
    notes = (
        f"Own time of each operator, forward and backward, medians of {repeats} steps. Before: grouped_mm and whole "
    )
    show(title, COLUMNS, rows, record, notes + "logits; after: grinmoe and the chunked loss.")


if __name__ == "__main__":
    typer.run(main)
