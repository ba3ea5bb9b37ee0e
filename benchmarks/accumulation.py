"""Measure what a micro-batch loses without the experts' counts of later micro-batches of its optimizer step.

The load-balance loss's gradient with respect to a random router's weight, for an optimizer step split into
micro-batches: with f of each micro-batch by itself, with f of the step so far (what the model does by default), and
with f of the whole step (`exact_balance`), against the step in one piece. Cosine, and norm of the difference over the
norm of the exact gradient; medians over random routers and tokens.

    python benchmarks/accumulation.py --record
"""

from statistics import median
from typing import Annotated

import torch
import typer

from benchmarks.measure import show
from modeling_grin import route
from modeling_grin.balance_grinmoe import BalanceLoss, BalanceWindow, balance_gradient, count_experts

HIDDEN_SIZE = 64
KINDS = ("by itself", "the step so far", "the whole step")


def gradient(
    weight: torch.Tensor, micro_batches: tuple[torch.Tensor, ...], kind: str, num_tokens: int
) -> torch.Tensor:
    """Return the balance loss's gradient for the router's `weight` `[E, H]`, from `micro_batches` `[tokens, H]`."""
    num_experts = weight.shape[0]
    logits = [tokens @ weight.T for tokens in micro_batches]
    counted = [torch.ones(len(z), dtype=torch.bool) for z in logits]
    experts = [route(z, 2, 0.0, training=False).experts for z in logits]
    counts = [count_experts(chosen, c, num_experts)[None] for chosen, c in zip(experts, counted, strict=True)]
    whole = torch.stack(counts).sum(dim=0)
    window = BalanceWindow(num_tokens, whole if kind == "the whole step" else None)
    total = torch.zeros_like(weight)
    for tokens, z, c, chosen in zip(micro_batches, logits, counted, experts, strict=True):
        if kind == "by itself":
            window = BalanceWindow(num_tokens)
        balance = BalanceLoss(1.0, 1, num_experts, window, c, None)
        balance.count((chosen,))
        total += balance_gradient(z, balance.token_weight, balance.fractions[0], balance.z_weight).T @ tokens
    return total


COLUMNS = [
    "micro-batches",
    "tokens each",
    *(f"{measure}, f of {kind}" for kind in KINDS for measure in ("cos", "diff")),
]


def main(
    experts: Annotated[int, typer.Option(min=2)] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="random routers and tokens")] = 11,
    record: Annotated[bool, typer.Option(help="append the table to benchmarks/RESULTS.md")] = False,
) -> None:
    """Compare the load-balance gradient of an optimizer step in micro-batches with the step in one piece.

    Example: python benchmarks/accumulation.py --repeats 3
    """
    table = []
    for num_micro_batches in (2, 4, 8):
        for size in (64, 512, 4096):
            figures: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
            for seed in range(repeats):
                generator = torch.Generator().manual_seed(seed)
                weight = torch.randn(experts, HIDDEN_SIZE, generator=generator) / HIDDEN_SIZE**0.5
                tokens = torch.randn(num_micro_batches * size, HIDDEN_SIZE, generator=generator)
                exact = gradient(weight, (tokens,), "the step so far", len(tokens))
                for kind in KINDS:
                    split = gradient(weight, tokens.split(size), kind, len(tokens))
                    cosine = torch.nn.functional.cosine_similarity(split.flatten(), exact.flatten(), dim=0).item()
                    figures[kind].append((cosine, ((split - exact).norm() / exact.norm()).item()))
            medians = [median(column) for kind in KINDS for column in zip(*figures[kind], strict=True)]
            table.append([str(num_micro_batches), str(size), *(f"{number:.3f}" for number in medians)])
    show(f"Load balance under accumulation: {experts} experts, top-2", COLUMNS, table, record)


if __name__ == "__main__":
    typer.run(main)
