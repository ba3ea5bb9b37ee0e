"""Measure how a training step's time grows with experts and tokens, beside a model of the machine's bandwidth.

Time per token of forward and backward, at fixed active parameters: with more experts, whose weights and gradients pass
through memory once per step, and with more tokens per step, which share that. A model of three terms predicts it. Its
rates are measured in the same process, in turns with the steps:

    products:    operations / rate of large matrix products
    weights:     bytes x (2 reads / read bandwidth + 1 write of the gradient / write bandwidth)
    activations: bytes of all other tensors that a step makes x (1 write + 1 read)

    python -m benchmarks.expert_scaling
"""

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import torch
import typer
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from rich.progress import track

from benchmarks.measure import ALLOCATORS, allocations, grin_config, interleave, random_rows, run_with, show
from benchmarks.peers import Dtype, build_ours, step
from modeling_grin import GrinMoeForCausalLM

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "expert_scaling.png"
PRODUCT_ROWS = 4096  # enough that reading the weights does not show
BUFFER_BYTES = 2**28  # more than any cache
COLORS = {Dtype.float32: "C0", Dtype.bfloat16: "C1"}


@dataclass
class Point:
    """One size, and the seconds of its step: measured, and the terms of the prediction."""

    dtype: Dtype
    experts: int
    tokens: int
    measured: float
    products: float
    weights: float
    activations: float

    @property
    def predicted(self) -> float:
        return self.products + self.weights + self.activations

    def per_token(self, part: str) -> float:
        """Return microseconds per token."""
        return 1e6 * getattr(self, part) / self.tokens


def operations(model: GrinMoeForCausalLM, rows: torch.Tensor) -> float:
    """Return the floating-point operations of a step's matrix products, forward and backward."""
    config = model.config
    active = 0.0
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and name != "model.embed_tokens.weight":  # which is looked up, not multiplied
            share = config.num_experts_per_tok / config.num_local_experts if ".experts." in name else 1.0
            active += share * parameter.numel()
    # Two products forward and five backward, of 2 operations each, for half of the pairs of positions.
    attention = 7 * rows.shape[1] * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return rows.numel() * (6 * active + attention)


def products(rows: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Compute what a linear layer does in a step: output, input's gradient and weight's gradient."""
    return rows @ weight.T, gradient @ weight, gradient.T @ rows


def write_fresh() -> None:
    """Fill memory that the process has not had before."""
    with mmap.mmap(-1, BUFFER_BYTES) as pages:
        torch.frombuffer(pages, dtype=torch.int64).fill_(1)


def measure(sizes: dict[str, int], tokens: int, dtype: Dtype, allocator: str, rounds: int) -> Point:
    """Measure one point in a process with that allocator: gradients go to fresh memory, or to memory it had before."""
    torch.manual_seed(0)
    config = grin_config(**sizes)
    model = build_ours(config, dtype.of_torch)
    rows = random_rows(config, tokens)
    inputs = torch.randn(PRODUCT_ROWS, config.hidden_size).to(model.dtype)
    weight = torch.randn(2 * config.intermediate_size, config.hidden_size).to(model.dtype)
    gradient = torch.randn(PRODUCT_ROWS, 2 * config.intermediate_size).to(model.dtype)
    buffer = torch.ones(BUFFER_BYTES // 8, dtype=torch.int64)
    tasks: dict[str, Callable[[], object]] = {
        "step": partial(step, model, rows),
        "products": partial(products, inputs, weight, gradient),
        "read": buffer.sum,
        "write": partial(buffer.fill_, 1) if allocator == "keep" else write_fresh,
    }
    seconds = {name: median(values) for name, values in interleave(tasks, rounds, "steps").items()}
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    gradients_and_others = allocations(tasks["step"]).clamp(min=0).sum().item()
    return Point(
        dtype=dtype,
        experts=config.num_local_experts,
        tokens=tokens,
        measured=seconds["step"],
        products=operations(model, rows) * seconds["products"] / (6 * inputs.numel() * weight.shape[0]),
        weights=weight_bytes * (2 * seconds["read"] + seconds["write"]) / BUFFER_BYTES,
        activations=(gradients_and_others - weight_bytes) * (seconds["read"] + seconds["write"]) / BUFFER_BYTES,
    )


def draw(by_experts: list[Point], by_tokens: list[Point], path: Path) -> None:
    """Draw the time per token: points are measured, lines predicted."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, points, field in zip(axes, (by_experts, by_tokens), ("experts", "tokens"), strict=True):
        for dtype in dict.fromkeys(point.dtype for point in points):
            found = [point for point in points if point.dtype == dtype]
            places = [getattr(point, field) for point in found]
            for part, style, label in (
                ("measured", "o", "measured"),
                ("predicted", "-", "predicted"),
                ("products", ":", "of it, matrix products"),
            ):
                times = [point.per_token(part) for point in found]
                ax.plot(places, times, style, color=COLORS[dtype], label=f"{dtype}, {label}")
        ticks = sorted({getattr(point, field) for point in points})
        ax.set(xscale="log", yscale="log")
        ax.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_minor_locator(NullLocator())
        ax.grid(alpha=0.3)
    axes[0].set(xlabel=f"experts, {by_experts[0].tokens:,} tokens per step", ylabel="µs per token")
    axes[1].set(xlabel=f"tokens per step, {by_tokens[0].experts} experts")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=110)


COLUMNS = ["dtype, experts, tokens", "tokens per expert", "step", "µs per token", "predicted", "products", "weights",
           "activations", "measured / predicted"]  # fmt: skip


def row(point: Point) -> list[str]:
    return [
        f"{point.dtype}, {point.experts}, {point.tokens}",
        f"{2 * point.tokens / point.experts:g}",
        f"{1e3 * point.measured:.0f} ms",
        *(f"{point.per_token(part):.1f}" for part in ("measured", "predicted", "products", "weights", "activations")),
        f"{point.measured / point.predicted:.2f}",
    ]


def main(
    experts: Annotated[list[int], typer.Option(min=2, help="experts; repeatable")] = [8, 16, 32, 64, 128],  # noqa: B006
    tokens: Annotated[list[int], typer.Option(min=64, help="tokens per step")] = [512, 1024, 2048, 4096, 8192],  # noqa: B006
    dtype: Annotated[list[Dtype], typer.Option(help="dtype of the models")] = [*Dtype],  # noqa: B006
    fixed_experts: Annotated[int, typer.Option(min=2, help="experts while tokens vary")] = 16,
    fixed_tokens: Annotated[int, typer.Option(min=64, help="tokens while experts vary")] = 2048,
    hidden_size: Annotated[int, typer.Option(min=64)] = 1024,
    intermediate_size: Annotated[int, typer.Option(min=1, help="FFN size of one expert")] = 1600,
    layers: Annotated[int, typer.Option(min=1)] = 2,
    allocator: Annotated[Literal["keep", "default"], typer.Option(help="keep: freed memory stays mapped")] = "keep",
    repeats: Annotated[int, typer.Option(min=2, help="rounds after one warm-up")] = 5,
    image: Annotated[Path, typer.Option(help="file of the plot")] = IMAGE,
    record: Annotated[bool, typer.Option(help="append the table to benchmarks/RESULTS.md")] = False,
) -> None:
    """Measure the time per token against experts and tokens, beside a model of rates and bandwidths.

    Example: python -m benchmarks.expert_scaling --dtype bfloat16 --repeats 3
    """
    sizes = [(number, fixed_tokens) for number in experts], [(fixed_experts, number) for number in tokens]
    points: dict[tuple[Dtype, int, int], Point] = {}
    combinations = [(name, *size) for name in dtype for size in dict.fromkeys(chain(*sizes))]
    for name, num_experts, num_tokens in track(combinations, "sizes", transient=True):
        values = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "layers": layers}
        arguments = {**values, "experts": num_experts}, num_tokens, name, allocator, repeats
        points[name, num_experts, num_tokens] = run_with(ALLOCATORS[allocator], measure, *arguments)
    by_experts, by_tokens = ([points[name, *size] for name in dtype for size in sweep] for sweep in sizes)
    draw(by_experts, by_tokens, image)
    title = f"Scaling of a training step: hidden {hidden_size}, FFN {intermediate_size}, top-2, {layers} layers, "
    notes = (
        "Step: forward and backward, median. In µs per token: predicted is the sum of the next three. Products: "
        f"operations over the rate of a linear layer's three products with {PRODUCT_ROWS} rows. Weights: two reads "
        "and one write of their gradients, over the bandwidths. Activations: one write and one read of all other "
        "tensors of a step. The prediction ignores that smaller products are slower, and all arithmetic outside "
        "products."
    )
    table = [row(point) for point in points.values()]
    show(f"{title}{repeats} rounds, allocator: {allocator}", COLUMNS, table, record, notes)


if __name__ == "__main__":
    typer.run(main)
