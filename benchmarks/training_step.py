"""Measure speed and memory of a training step, beside stock Phimoe and a dense model.

Ours, transformers' Phimoe and a dense model with as many active parameters (`peers.py`) take turns, one step each per
round: forward and backward, and then the optimizer (AdamW, fused), timed apart; medians over the rounds, and speeds
relative to the others in the same round. Each combination of sizes is measured in a fresh process.

    python -m benchmarks.training_step
    python -m benchmarks.training_step --memory
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from statistics import median
from typing import Annotated, Any, Literal

import torch
import typer
from rich.progress import track

from benchmarks.measure import ALLOCATORS, grin_config, interleave, peak_memory, random_rows, run_with, show, spread
from benchmarks.peers import (
    STOCK_EXPERTS,
    Dtype,
    build_dense,
    build_ours,
    build_stock,
    forward_backward,
    step,
)


def update(optimizer: torch.optim.Optimizer) -> None:
    """Run the rest of a training step, in Trainer's order."""
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def time_steps(
    sizes: dict[str, int], tokens: int, dtype: Dtype, experts_implementation: str, rounds: int
) -> dict[str, list[float]]:
    """By model, the seconds of a step up to its gradients in every round, and under `"<model>, AdamW"` the whole's."""
    torch.manual_seed(0)
    config = grin_config(**sizes)
    ours = build_ours(config, dtype.of_torch)
    models = {
        "ours": ours,
        "dense": build_dense(config, ours.dtype),
        "stock": build_stock(ours, experts_implementation),
    }
    rows = random_rows(config, tokens)
    # Rate 0: every round has the same weights.
    shared, own = (torch.optim.AdamW(models[name].parameters(), lr=0.0, fused=True) for name in ("ours", "dense"))
    optimizers = {"ours": shared, "dense": own, "stock": shared}
    tasks: dict[str, Callable[[], None]] = {}
    for name, model in models.items():  # in pairs, which `interleave` does not part: it begins at every other task
        tasks[name] = partial(forward_backward, model, rows)
        tasks[f"{name}, AdamW"] = partial(update, optimizers[name])
    seconds = interleave(tasks, rounds, "steps")
    for name in models:
        whole = zip(seconds[name], seconds[f"{name}, AdamW"], strict=True)
        seconds[f"{name}, AdamW"] = [sum(parts) for parts in whole]
    return seconds


def count_memory(sizes: dict[str, int], tokens: int, dtype: Dtype, experts_implementation: str) -> dict[str, int]:
    """Return the bytes of the weights, and a step's peak over them, by model and with checkpointing."""
    torch.manual_seed(0)
    config = grin_config(**sizes)
    ours = build_ours(config, dtype.of_torch)
    rows = random_rows(config, tokens)
    found = {"weights": sum(parameter.nbytes for parameter in ours.parameters())}
    models: dict[str, Any] = {"ours": ours, "stock": build_stock(ours, experts_implementation)}
    for name, model in models.items():
        found[name] = peak_memory(partial(step, model, rows))
        model.activation_checkpointing_enable()
        found[f"{name}, checkpointed"] = peak_memory(partial(step, model, rows))
    return found


SIZES = "layers, vocabulary, tokens, dtype"
TIME_COLUMNS = ["ours", "dense", "stock", "speed / dense", "/ stock", "with AdamW", "/ dense", "/ stock"]
MEMORY_COLUMNS = ["weights", "stock", "ours", "/ stock", "stock, ckpt.", "ours, ckpt.", "/ stock", "/ stock, ckpt."]


def time_row(seconds: dict[str, list[float]]) -> list[str]:
    def milliseconds(name: str) -> str:
        return f"{1e3 * median(seconds[name]):.0f} ms"

    cells = [milliseconds(name) for name in ("ours", "dense", "stock")]
    cells += [spread(seconds[name], seconds["ours"]) for name in ("dense", "stock")]
    cells.append(milliseconds("ours, AdamW"))
    return cells + [spread(seconds[f"{name}, AdamW"], seconds["ours, AdamW"]) for name in ("dense", "stock")]


def memory_row(found: dict[str, int]) -> list[str]:
    def mebibytes(name: str) -> str:
        return f"{found[name] / 2**20:.0f} MiB"

    def ratio(name: str, other: str) -> str:
        return f"{found[name] / found[other]:.2f}"

    cells = [mebibytes("weights"), mebibytes("stock"), mebibytes("ours"), ratio("ours", "stock")]
    cells += [mebibytes("stock, checkpointed"), mebibytes("ours, checkpointed")]
    return [*cells, *(ratio("ours, checkpointed", other) for other in ("stock", "stock, checkpointed"))]


def main(
    layers: Annotated[list[int], typer.Option(min=1, help="number of layers; repeatable")] = [2, 4],  # noqa: B006
    vocab_size: Annotated[list[int] | None, typer.Option(help="[default: 4096 and 32064; 32064 for memory]")] = None,
    tokens: Annotated[list[int], typer.Option(min=64, help="tokens per step, in rows of at most 512")] = [2048, 8192],  # noqa: B006
    dtype: Annotated[list[Dtype], typer.Option(help="dtype of the models")] = [*Dtype],  # noqa: B006
    hidden_size: Annotated[int, typer.Option(min=64)] = 1024,
    intermediate_size: Annotated[int, typer.Option(min=1, help="FFN size of one expert")] = 1600,
    experts: Annotated[int, typer.Option(min=2)] = 16,
    stock_experts: Annotated[str, typer.Option(help="stock's experts_implementation")] = STOCK_EXPERTS,
    allocator: Annotated[Literal["keep", "default"], typer.Option(help="keep: freed memory stays mapped")] = "keep",
    repeats: Annotated[int, typer.Option(min=2, help="rounds after one warm-up")] = 5,
    memory: Annotated[bool, typer.Option("--memory", help="peak memory instead of time")] = False,
    record: Annotated[bool, typer.Option(help="append the table to benchmarks/RESULTS.md")] = False,
) -> None:
    """Measure time, or peak memory, of a training step: ours, dense and stock Phimoe.

    Example: python -m benchmarks.training_step --layers 2 --vocab-size 4096 --dtype bfloat16
    """
    if vocab_size is None:
        vocab_size = [32064] if memory else [4096, 32064]
    table = []
    combinations = list(product(layers, vocab_size, tokens, dtype))
    for num_layers, size, num_tokens, name in track(combinations, "combinations", transient=True):
        sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "experts": experts,
                 "layers": num_layers, "vocab_size": size}  # fmt: skip
        arguments = sizes, num_tokens, name, stock_experts
        if memory:
            row = memory_row(run_with(ALLOCATORS[allocator], count_memory, *arguments))
        else:
            row = time_row(run_with(ALLOCATORS[allocator], time_steps, *arguments, repeats))
        table.append([f"{num_layers}, {size}, {num_tokens}, {name}", *row])
    title = f"hidden {hidden_size}, FFN {intermediate_size} x {experts}, stock's experts {stock_experts}"
    if memory:
        notes = (
            "The peak of a step's tensors (forward and backward, gradients included) over the weights. Ckpt.: with "
            "activation checkpointing of every layer."
        )
        show(f"Memory of a training step: {title}", [SIZES, *MEMORY_COLUMNS], table, record, notes)
    else:
        notes = (
            "Milliseconds are medians of forward and backward. Speeds are ours relative to the other's in the same "
            "round, median and quartiles. With AdamW: including the optimizer's step; all experts have one, so the "
            "dense model's is several times smaller. Dense: Llama with GRIN's norms and head, as many active "
            "parameters, loss of the whole logits. Load-balance loss and noise are on, in ours and in stock."
        )
        title = f"Training step: {title}, {repeats} rounds, allocator: {allocator}"
        show(title, [SIZES, *TIME_COLUMNS], table, record, notes)


if __name__ == "__main__":
    typer.run(main)
