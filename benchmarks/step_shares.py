"""Measure the shares of a training step: routing, balance loss, statistics and the rest.

Each part of a GRIN-MoE's step (forward and backward) is timed alone, on its inputs in a real step: the model's special
parts are too small to be seen by leaving them out. They take turns with whole steps, and with steps of the decoder
without the head: the difference is the head and the loss. A layer's parts are the first layer's, times the layers.

    python -m benchmarks.step_shares
"""

from collections.abc import Callable
from functools import partial
from itertools import chain
from statistics import median
from typing import Annotated, Any, Literal

import torch
import typer
from rich.progress import track
from torch import nn

from benchmarks.callback_cost import balance_alone
from benchmarks.measure import ALLOCATORS, grin_config, interleave, random_rows, run_with, show
from benchmarks.peers import Dtype, build_ours, step
from modeling_grin import GrinMoeForCausalLM
from modeling_grin.balance_grinmoe import count_experts
from modeling_grin.noise_grinmoe import layer_keys, random_key, token_keys
from modeling_grin.routing_grinmoe import jitter_input, route
from modeling_grin.training.callback import routing_sums

SMALL_ROUNDS = 20  # rounds of the small parts for each of the large ones
OF_BALANCE, OF_CALLBACK = "of that, counting experts", "RoutingCallback, when it is on"
IN_DECODER = ("experts", "attention", "router", "sampling and estimator", "noise keys", "input jitter", "balance loss")
PARTS = ("whole", *IN_DECODER, OF_BALANCE, "norms, residuals, embedding", "head and loss", OF_CALLBACK)


def decoder_step(model: GrinMoeForCausalLM, rows: torch.Tensor, gradient: torch.Tensor) -> None:
    model.model(input_ids=rows, use_cache=False).last_hidden_state.backward(gradient)
    model.zero_grad(set_to_none=True)


def there_and_back(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], object]:
    """Return a task: `function` forward, and backward to the `args` with gradients and to a module's parameters."""
    args = tuple(arg.detach().requires_grad_() if torch.is_floating_point(arg) else arg for arg in args)
    learnt = [arg for arg in args if arg.requires_grad]
    if isinstance(function, nn.Module):
        learnt += function.parameters()

    def forward() -> torch.Tensor:
        output = function(*args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    gradient = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), learnt, gradient)


def given_to(modules: dict[str, nn.Module], run: Callable[[], object]) -> dict[str, tuple[tuple, dict[str, Any]]]:
    """Return each module's arguments while `run` ran."""
    given: dict[str, tuple[tuple, dict[str, Any]]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple, dict[str, Any]], None]:
        return lambda _, args, kwargs: given.update({name: (args, kwargs)})

    hooks = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    run()
    for handle in hooks:
        handle.remove()
    return given


def time_parts(sizes: dict[str, int], tokens: int, dtype: Dtype, rounds: int) -> dict[str, float]:
    """Return the seconds that a step spends on each part, in the order of the table."""
    torch.manual_seed(0)
    config = grin_config(**sizes)
    model = build_ours(config, dtype.of_torch)
    rows = random_rows(config, tokens)
    layer: Any = model.model.layers[0]
    moe = layer.block_sparse_moe
    modules = {"experts": moe.experts, "attention": layer.self_attn, "router": moe.gate}

    seen: list[Any] = []
    model.model.routing_observer = lambda *routing: seen.extend(routing)
    given = given_to(modules, lambda: model(input_ids=rows, use_cache=False))
    model.model.routing_observer = None
    logits, experts, counted = seen
    positions = torch.arange(rows.shape[1]).expand_as(rows)
    keys = torch.empty(tokens, dtype=torch.int64).random_()

    def noise_keys() -> None:
        of_tokens = token_keys(random_key(), rows, counted.view_as(rows), positions)
        layer_keys(of_tokens, range(config.num_hidden_layers))

    def sample(z: torch.Tensor) -> torch.Tensor:
        return route(z, config.num_experts_per_tok, config.router_jitter_noise, training=True, keys=keys).weights

    def jitter(hidden_states: torch.Tensor) -> torch.Tensor:
        return jitter_input(hidden_states, config.input_jitter_noise, keys)

    of_layer = {name: there_and_back(module, *given[name][0], **given[name][1]) for name, module in modules.items()}
    of_layer |= {
        "sampling and estimator": there_and_back(sample, logits[0]),
        "input jitter": there_and_back(jitter, given["router"][0][0]),
        OF_BALANCE: partial(count_experts, experts[0], counted, config.num_local_experts),
    }
    of_step: dict[str, Callable[[], object]] = {
        "whole": partial(step, model, rows),
        "decoder": partial(decoder_step, model, rows, torch.randn(*rows.shape, config.hidden_size).to(model.dtype)),
        "noise keys": noise_keys,
        "balance loss": partial(balance_alone, config, logits, experts, counted),
        OF_CALLBACK: partial(routing_sums, logits, experts, counted, config.router_jitter_noise),
    }
    tasks = of_layer | of_step
    large = {name: tasks.pop(name) for name in ("whole", "decoder", "experts", "attention")}
    timed = interleave(large, rounds, "large parts") | interleave(tasks, SMALL_ROUNDS * rounds, "small parts")
    timed["head and loss"] = [a - b for a, b in zip(timed["whole"], timed["decoder"], strict=True)]
    found = {
        name: median(seconds) * (config.num_hidden_layers if name in of_layer else 1)
        for name, seconds in timed.items()
    }
    found["norms, residuals, embedding"] = found["decoder"] - sum(found[name] for name in IN_DECODER)
    return {name: found[name] for name in PARTS}


def main(
    tokens: Annotated[list[int], typer.Option(min=64, help="tokens per step; repeatable")] = [2048, 8192],  # noqa: B006
    dtype: Annotated[Dtype, typer.Option(help="dtype of the model")] = Dtype.bfloat16,
    hidden_size: Annotated[int, typer.Option(min=64)] = 1024,
    intermediate_size: Annotated[int, typer.Option(min=1, help="FFN size of one expert")] = 1600,
    experts: Annotated[int, typer.Option(min=2)] = 16,
    layers: Annotated[int, typer.Option(min=1)] = 2,
    vocab_size: Annotated[int, typer.Option(min=2)] = 4096,
    allocator: Annotated[Literal["keep", "default"], typer.Option(help="keep: freed memory stays mapped")] = "keep",
    repeats: Annotated[int, typer.Option(min=2, help="rounds after one warm-up")] = 5,
    record: Annotated[bool, typer.Option(help="append the table to benchmarks/RESULTS.md")] = False,
) -> None:
    """Measure the shares of a training step's time.

    Example: python -m benchmarks.step_shares --dtype float32 --tokens 2048
    """
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "experts": experts,
             "layers": layers, "vocab_size": vocab_size}  # fmt: skip
    found = {
        number: run_with(ALLOCATORS[allocator], time_parts, sizes, number, dtype, repeats)
        for number in track(tokens, "tokens", transient=True)
    }
    columns = ["part", *(column for number in tokens for column in (f"{number} tokens", "share"))]
    table = []
    for name in PARTS:
        cells = ((f"{1e3 * times[name]:.2f} ms", f"{times[name] / times['whole']:.2%}") for times in found.values())
        table.append([name, *chain(*cells)])
    title = f"Shares of a training step: hidden {hidden_size}, FFN {intermediate_size} x {experts}, {layers} layers, "
    notes = (
        "Forward and backward; each part timed alone, on its inputs in a step, medians. Head and loss: the whole "
        "step without the decoder. Norms, residuals, embedding: the decoder without its parts, and the difference "
        "between parts in a step and alone. The balance loss has only its counts and a gradient. The timed step does "
        "not include RoutingCallback's observation."
    )
    title += f"vocabulary {vocab_size}, {dtype}, {repeats} rounds, allocator: {allocator}"
    show(title, columns, table, record, notes)


if __name__ == "__main__":
    typer.run(main)
