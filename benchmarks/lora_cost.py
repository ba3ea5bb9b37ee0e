"""Measure the cost of LoRA on fused and on linear experts, against LoRA on attention alone and full training.

"as W + BA" is peft's own way with fused experts, which the model does not take.

One model of each kind takes turns, one step (forward and backward) each per round; medians over the rounds, and ratios
to LoRA on attention alone in the same round. Memory is the peak of a step's tensors over weights and inputs, without
and with activation checkpointing.

    python benchmarks/lora_cost.py --record
"""

import contextlib
import io
from functools import partial
from statistics import median
from typing import Annotated, Any
from unittest import mock

import torch
import typer

from benchmarks.measure import interleave, peak_memory, show, spread
from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM, experts_grinmoe
from modeling_grin.training import add_lora

CONTROL, GROUPED = "LoRA on attention", "grouped_mm: LoRA on attention"
AS_SUM = "and on fused experts, as W + BA"
# Experts' implementation, and the groups that LoRA adapts; None: all weights are trained.
VARIANTS: dict[str, tuple[str, dict[str, bool] | None]] = {
    CONTROL: ("grinmoe", {"experts": False}),
    "and on fused experts": ("grinmoe", {"experts": True}),
    AS_SUM: ("grinmoe", {"experts": True}),
    "and on linear experts": ("linear", {"experts": True}),
    "all weights": ("grinmoe", None),
    GROUPED: ("grouped_mm", {"experts": False}),
    "grouped_mm: and on fused experts": ("grouped_mm", {"experts": True}),
}


def build(config: GrinMoeConfig, experts_implementation: str, groups: dict[str, bool] | None) -> Any:
    """Return a model in training, with adapters on `groups`."""
    torch.manual_seed(0)
    config = GrinMoeConfig(**{**config.to_dict(), "experts_implementation": experts_implementation})
    model: Any = GrinMoeForCausalLM(config)
    if groups is not None:
        with contextlib.redirect_stdout(io.StringIO()):
            model = add_lora(model, r=8, **groups)
    return model.train()


def step(model: Any, rows: torch.Tensor, name: str) -> None:
    find_lora = (lambda experts: (experts, {})) if name == AS_SUM else experts_grinmoe.find_lora
    with mock.patch.object(experts_grinmoe, "find_lora", find_lora):
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
    model.zero_grad()


COLUMNS = ["trained", "step", "x attention", "memory", "checkpointed"]


def main(
    hidden_size: Annotated[int, typer.Option(min=64)] = 384,
    intermediate_size: Annotated[int, typer.Option(min=1, help="FFN size of one expert")] = 600,
    experts: Annotated[int, typer.Option(min=2)] = 16,
    layers: Annotated[int, typer.Option(min=1)] = 4,
    tokens: Annotated[int, typer.Option(min=64, help="tokens per step, in rows of at most 256")] = 1024,
    rounds: Annotated[int, typer.Option(min=2)] = 7,
    record: Annotated[bool, typer.Option(help="append the table to benchmarks/RESULTS.md")] = False,
) -> None:
    """Measure time and memory of a training step, by the parts that LoRA adapts; float32.

    Example: python benchmarks/lora_cost.py --rounds 3
    """
    config = GrinMoeConfig(
        vocab_size=1024,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 64,
        num_local_experts=experts,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    length = min(tokens, 256)
    rows = torch.randint(config.vocab_size, (tokens // length, length))
    models = {name: build(config, *variant) for name, variant in VARIANTS.items()}
    steps = {name: partial(step, model, rows, name) for name, model in models.items()}
    seconds = interleave(steps, rounds, "steps")
    plain = {name: peak_memory(task) for name, task in steps.items()}
    for model in models.values():
        model.activation_checkpointing_enable({"use_reentrant": False})
    checkpointed = {name: peak_memory(task) for name, task in steps.items()}

    table = []
    for name in VARIANTS:
        control = GROUPED if name.startswith("grouped_mm") else CONTROL
        memory = [f"{peak[name] / 2**20:.0f} MiB" for peak in (plain, checkpointed)]
        time = f"{1e3 * median(seconds[name]):.0f} ms"
        table.append([name, time, spread(seconds[name], seconds[control]), *memory])
    title = f"LoRA on experts: hidden {hidden_size}, FFN {intermediate_size} x {experts}, {layers} layers, "
    show(f"{title}{tokens} tokens, float32", COLUMNS, table, record)


if __name__ == "__main__":
    typer.run(main)
