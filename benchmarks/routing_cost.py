"""Measure the cost of the router's gradient, sampling and estimator, as a share of a training step.

One GRIN-MoE takes turns with all estimators, one step (forward and backward) each per round, because a machine's speed
drifts; medians over the rounds, and ratios to `gshard`, a plain softmax top-k router, with the same top-k. Routing is
also timed alone, from logits to their gradient: its part of a step is too small to be seen in whole steps.

    python benchmarks/routing_cost.py --dtype bfloat16
"""

from functools import partial
from statistics import median, quantiles
from typing import Annotated, Any, Literal

import torch
import typer
from rich.progress import track

from benchmarks.measure import grin_config, interleave, peak_memory, random_rows, show
from modeling_grin import GrinMoeForCausalLM
from modeling_grin.routing_grinmoe import ROUTER_ESTIMATORS, route

# The first variant with a top-k is the control of those with the same.
VARIANTS: dict[str, dict[str, Any]] = {
    "gshard": {"router_estimator": "gshard"},
    **{name: {"router_estimator": name} for name in ROUTER_ESTIMATORS if name not in ("gshard", "sparsemixer")},
    "sparsemixer_v2 greedy": {"router_sampling": False},
    "sparsemixer_v2 frozen": {"freeze_router": True},
    "gshard top-1": {"router_estimator": "gshard", "num_experts_per_tok": 1},
    "sparsemixer top-1": {"router_estimator": "sparsemixer", "num_experts_per_tok": 1},
}


def use(model: GrinMoeForCausalLM, changes: dict[str, Any]) -> None:
    """Make `model` train as the released default does, with `changes`."""
    defaults = {"router_estimator": "sparsemixer_v2", "num_experts_per_tok": 2}
    for name, value in {**defaults, "router_sampling": True, "freeze_router": False, **changes}.items():
        setattr(model.config, name, value)
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            parameter.requires_grad_(not model.config.freeze_router)


def training_step(model: GrinMoeForCausalLM, rows: torch.Tensor, changes: dict[str, Any]) -> None:
    use(model, changes)
    model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
    model.zero_grad()


def routing_alone(logits: torch.Tensor, jitter: float, changes: dict[str, Any]) -> None:
    top_k, sampling = changes.get("num_experts_per_tok", 2), changes.get("router_sampling", True)
    estimator = changes.get("router_estimator", "sparsemixer_v2")
    routing = route(logits, top_k, jitter, estimator=estimator, training=True, sampling=sampling)
    weights = routing.weights if routing.mixture is None else routing.mixture.weights
    if not changes.get("freeze_router", False):
        torch.autograd.grad(weights, logits, torch.ones_like(weights))


def measure(
    model: GrinMoeForCausalLM, rows: torch.Tensor, variants: dict[str, dict[str, Any]], rounds: int
) -> list[list[str]]:
    """Return rows of a table: each variant's training step, its routing, and its memory."""
    config, dtype = model.config, model.dtype
    logits = torch.randn(rows.numel(), config.num_local_experts, dtype=dtype, requires_grad=True)
    steps = {name: partial(training_step, model, rows, changes) for name, changes in variants.items()}
    routings = {name: partial(routing_alone, logits, config.router_jitter_noise, c) for name, c in variants.items()}
    peaks = {name: peak_memory(step) for name, step in track(steps.items(), "memory", transient=True)}
    whole, alone = interleave(steps, rounds, "steps"), interleave(routings, 40 * rounds, "routing")
    controls: dict[int, str] = {}
    table = []
    for name, changes in variants.items():
        control = controls.setdefault(changes.get("num_experts_per_tok", 2), name)
        ratios = [own / other for own, other in zip(whole[name], whole[control], strict=True)]
        low, _, high = quantiles(ratios, n=4, method="inclusive")
        extra = config.num_hidden_layers * (median(alone[name]) - median(alone[control]))
        table.append(
            [
                name,
                f"{1e3 * median(whole[name]):.0f} ms",
                f"{median(ratios):.3f} ({low:.2f} to {high:.2f})",
                f"{1e3 * median(alone[name]):.2f} ms",
                f"{100 * extra / median(whole[control]):+.2f} %",
                f"{peaks[name] / 2**20:.0f} MiB",
                f"{peaks[name] / peaks[control]:.2f}",
            ]
        )
    return table


COLUMNS = ["estimator", "step", "x gshard", "routing", "over gshard", "memory", "x gshard"]


def main(
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="dtype of the model")] = "bfloat16",
    tokens: Annotated[int, typer.Option(min=64, help="tokens per step, in rows of at most 512")] = 4096,
    hidden_size: Annotated[int, typer.Option(min=64)] = 1024,
    intermediate_size: Annotated[int, typer.Option(min=1, help="FFN size of one expert")] = 1600,
    experts: Annotated[int, typer.Option(min=2)] = 16,
    layers: Annotated[int, typer.Option(min=1)] = 2,
    jitter: Annotated[float, typer.Option(min=0, help="router_jitter_noise")] = 0.01,
    rounds: Annotated[int, typer.Option(min=2, help="steps of each estimator; 40 times as many routings")] = 5,
    skip: Annotated[list[str] | None, typer.Option(help="estimator to leave out; repeatable")] = None,
    record: Annotated[bool, typer.Option(help="append the table to benchmarks/RESULTS.md")] = False,
) -> None:
    """Measure time and memory of a training step with every estimator, and of routing alone.

    Example: python benchmarks/routing_cost.py --dtype float32 --skip dense --rounds 3
    """
    if unknown := set(skip or []) - (set(VARIANTS) - {"gshard", "gshard top-1"}):
        raise typer.BadParameter(f"--skip {', '.join(unknown)}: not an estimator, or a control that others need")
    torch.manual_seed(0)
    sizes = hidden_size, intermediate_size, experts, layers
    config = grin_config(*sizes, router_jitter_noise=jitter, router_aux_loss_coef=0.0)
    model = GrinMoeForCausalLM(config).to(getattr(torch, dtype)).train()
    rows = random_rows(config, tokens)
    variants = {name: changes for name, changes in VARIANTS.items() if name not in (skip or [])}
    title = f"Cost per estimator: hidden {hidden_size}, FFN {intermediate_size} x {experts}, {tokens} tokens, {dtype}"
    notes = (
        "Step: forward and backward. x gshard: relative to gshard with the same top-k in the same round, median and "
        "quartiles. Routing: one layer's, from logits to their gradient. Over gshard: the extra time of all layers, "
        "as a share of a step. Memory: the peak of a step's tensors over weights and inputs."
    )
    show(title, COLUMNS, measure(model, rows, variants, rounds), record, notes)


if __name__ == "__main__":
    typer.run(main)
