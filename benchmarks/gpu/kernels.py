"""Ceilings of the GPU, and the times of kernels alone: jitter, choice of experts, experts, attention."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

from benchmarks.gpu.device import DEVICE, Row, Sizes, milliseconds
from modeling_grin import gpu_kernels_grinmoe as gpu
from modeling_grin.modeling_grinmoe import GrinMoeExperts
from modeling_grin.routing_grinmoe import jitter_input, route

PREDICTED_JITTER, PREDICTED_CHOICE, PREDICTED_GROUPED, PREDICTED_DENSE = 0.05, 0.015, 600, 750
PREDICTED_FLASH, PREDICTED_MASKED = 400, 150


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def ceilings(sizes: Sizes) -> list[Row]:
    source = torch.zeros(sizes.copied, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copying = milliseconds(lambda: target.copy_(source))
    a, b = randn(sizes.product, sizes.product), randn(sizes.product, sizes.product)
    multiplying = milliseconds(lambda: a @ b)
    return [
        Row("copy", 2e-9 * sizes.copied / copying, "TB/s", 4.3),
        Row("large product", 2e-9 * sizes.product**3 / multiplying, "TFLOP/s", 790),
    ]


def routing(sizes: Sizes) -> list[Row]:
    rows = []
    for num_tokens in sizes.tokens:
        keys = torch.empty(num_tokens, dtype=torch.int64, device=DEVICE).random_()
        hidden, logits = randn(num_tokens, sizes.hidden_size), randn(num_tokens, sizes.num_local_experts)
        tasks: dict[str, tuple[Callable[[], Any], float]] = {
            "jitter": (partial(jitter_input, hidden, 0.01, keys), PREDICTED_JITTER * num_tokens / 8192),
            "choice of experts": (partial(route, logits, 2, 0.01, training=True, keys=keys), PREDICTED_CHOICE),
        }
        for name, (task, predicted) in tasks.items():
            for is_on in (True, False):
                with mock.patch.multiple(gpu, IS_ON=is_on):
                    kind = "kernel" if is_on else "torch"
                    time = milliseconds(task)
                rows.append(Row(f"{name}, {kind}, {num_tokens} tokens", time, "ms", predicted if is_on else None))
    return rows


def make_experts(sizes: Sizes) -> GrinMoeExperts:
    with DEVICE:
        experts = GrinMoeExperts(sizes.config(1, experts_implementation="grinmoe")).to(torch.bfloat16)
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    return experts


def many_tokens(sizes: Sizes) -> list[Row]:
    """Experts forward and backward against one dense network of their width, at equal work."""
    experts, rows = make_experts(sizes), []
    width, hidden_size = sizes.intermediate_size, sizes.hidden_size
    dense = [torch.nn.Linear(i, o, bias=False, device=DEVICE, dtype=torch.bfloat16)
             for i, o in ((hidden_size, 2 * width), (width, hidden_size))]  # fmt: skip

    def run_dense(x: torch.Tensor) -> None:
        gate, up = dense[0](x).chunk(2, dim=-1)
        dense[1](torch.nn.functional.silu(gate) * up).sum().backward()

    def run(x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> None:
        experts(x, chosen, weights).sum().backward()

    for per_expert in sizes.experts_rows:
        num_tokens = per_expert * sizes.num_local_experts // 2
        x, weights = randn(num_tokens, hidden_size).requires_grad_(), randn(num_tokens, 2)
        chosen = torch.rand(num_tokens, sizes.num_local_experts, device=DEVICE).topk(2).indices
        work = 3 * 2 * 2 * num_tokens * 3 * width * hidden_size  # forward and twice backward, K = 2
        tera = 1e-9 * work / milliseconds(partial(run, x, chosen, weights))
        rows.append(Row(f"experts, {per_expert} rows each", tera, "TFLOP/s", PREDICTED_GROUPED))
        x = randn(2 * num_tokens, hidden_size).requires_grad_()
        tera = 1e-9 * work / milliseconds(partial(run_dense, x))
        rows.append(Row(f"dense, {2 * num_tokens} rows", tera, "TFLOP/s", PREDICTED_DENSE))
    return rows


@torch.no_grad()
def few_tokens(sizes: Sizes) -> list[Row]:
    """Experts of few tokens, as a share of what reading the chosen matrices would take."""
    experts, rows = make_experts(sizes).eval(), []
    per_expert = sum(parameter[0].nbytes for parameter in experts.parameters())
    ways = {
        "ours": experts,
        "grouped_mm": partial(grouped_mm_experts_forward, experts),
        "batched_mm": partial(batched_mm_experts_forward, experts),
    }
    for num_tokens in (1, 8, 32):
        chosen = torch.rand(num_tokens, sizes.num_local_experts, device=DEVICE).topk(2).indices
        inputs = randn(num_tokens, sizes.hidden_size), chosen, randn(num_tokens, 2)
        read = per_expert * len(chosen.unique())
        for name, way in ways.items():
            if name == "batched_mm" and num_tokens > 8:
                continue  # it copies 5 GB
            time = milliseconds(partial(way, *inputs))
            rows.append(Row(f"experts of {num_tokens} tokens, {name}", 1e-9 * read / time, "TB/s"))
    return rows


def attention(sizes: Sizes) -> list[Row]:
    """Forward and backward: with a mask, in flash, and in flash with the window."""
    heads, width = sizes.num_attention_heads, sizes.hidden_size // sizes.num_attention_heads
    rows = []
    for length in sizes.lengths:
        batch = max(sizes.tokens) // length
        query = randn(batch, heads, length, width).requires_grad_()
        key, value = (randn(batch, sizes.num_key_value_heads, length, width).requires_grad_() for _ in range(2))
        distance = torch.arange(length, device=DEVICE)[:, None] - torch.arange(length, device=DEVICE)
        mask = (distance >= 0) & (distance <= sizes.sliding_window)

        def with_mask(query=query, key=key, value=value, mask=mask) -> None:
            groups = heads // sizes.num_key_value_heads
            key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
            scaled_dot_product_attention(query, key, value, mask).sum().backward()

        def causal(query=query, key=key, value=value) -> None:
            scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).sum().backward()

        def windowed(query=query, key=key, value=value, length=length) -> None:
            states = (t.transpose(1, 2) for t in (query, key, value))
            torch.ops.aten._flash_attention_forward(
                *states, None, None, length, length, 0.0, True, False,
                scale=width**-0.5, window_size_left=sizes.sliding_window, window_size_right=0,
            )[0].sum().backward()  # fmt: skip

        square = 3.5 * 4e-9 * batch * heads * length**2 * width
        seen = square / length**2 * float(mask.sum())
        tasks = {"mask": (with_mask, square, PREDICTED_MASKED), "causal": (causal, square / 2, PREDICTED_FLASH)}
        if DEVICE.type == "cuda":
            tasks["window"] = windowed, seen, PREDICTED_FLASH
        for name, (task, work, predicted) in tasks.items():
            rows.append(Row(f"attention, {name}, rows of {length}", work / milliseconds(task), "TFLOP/s", predicted))
    return rows


def measure(sizes: Sizes) -> Iterator[Row]:
    for part in (ceilings, routing, many_tokens, few_tokens, attention):
        yield from part(sizes)
