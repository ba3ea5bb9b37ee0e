"""Whether a GPU computes the right numbers: kernels against torch, 16 bits against 32, resuming bit for bit."""

from collections.abc import Iterator
from unittest import mock

import torch
from transformers.integrations.moe import grouped_mm_experts_forward

from benchmarks.gpu.device import DEVICE, Row, Sizes, build, random_ids, relative_error
from benchmarks.peers import build_stock
from modeling_grin import gpu_kernels_grinmoe as gpu
from modeling_grin.masks_grinmoe import AttentionConfig, create_mask
from modeling_grin.modeling_grinmoe import GrinMoeExperts
from modeling_grin.routing_grinmoe import jitter_input, route


def check_routing(sizes: Sizes) -> list[Row]:
    """The Triton kernels against the torch code."""
    rows, num_tokens = [], max(sizes.tokens)
    keys = torch.empty(num_tokens, dtype=torch.int64, device=DEVICE).random_()
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        logits = torch.randn(num_tokens, sizes.num_local_experts, device=DEVICE).to(dtype)
        hidden = torch.randn(num_tokens, sizes.hidden_size, device=DEVICE).to(dtype)
        results = []
        for use in (True, False):
            with mock.patch.multiple(gpu, IS_ON=use):
                leaf = logits.clone().requires_grad_()
                routing = route(leaf, 2, 0.3, training=True, keys=keys)
                (gradient,) = torch.autograd.grad(routing.weights[:, 0].sum(), leaf)
                results.append((routing.experts, routing.weights.detach(), gradient, jitter_input(hidden, 0.01, keys)))
        (experts, weights, gradient, jittered), expected = results
        rows += [
            Row(f"choices that differ, {name}", float((experts != expected[0]).sum()), "", 0),
            Row(f"weights, {name}", float((weights - expected[1]).abs().max()), "largest difference"),
            Row(f"router's gradient, {name}", float((gradient - expected[2]).abs().max()), "largest difference"),
            Row(f"jittered numbers that differ, {name}", float((jittered != expected[3]).sum()), "", 0),
        ]
    return rows


@torch.no_grad()
def check_experts(sizes: Sizes) -> list[Row]:
    """The experts of few tokens against transformers' grouped_mm, both in bfloat16."""
    with DEVICE:
        experts = GrinMoeExperts(sizes.config(1, experts_implementation="grinmoe")).to(torch.bfloat16).eval()
        for parameter in experts.parameters():
            parameter.normal_(std=0.02)
        hidden = torch.randn(8, sizes.hidden_size, dtype=torch.bfloat16)
        chosen = torch.rand(8, sizes.num_local_experts).topk(2).indices
        weights = torch.rand(8, 2, dtype=torch.bfloat16)
    expected = grouped_mm_experts_forward(experts, hidden, chosen, weights)
    return [Row("experts of few tokens", relative_error(experts(hidden, chosen, weights), expected), "relative")]


def check_window(sizes: Sizes) -> list[Row]:
    """A layer's attention beyond the window, in flash and with a mask: output and gradient, both in bfloat16."""
    length, config = max(sizes.lengths), sizes.config(1, attn_implementation="sdpa")
    model = build(config)
    attention, results = model.model.layers[0].self_attn, []
    assert isinstance(attention.config, AttentionConfig)
    hidden = torch.randn(1, length, sizes.hidden_size, device=DEVICE, dtype=torch.bfloat16)
    positions = torch.arange(length, device=DEVICE)[None]
    for use in (True, False):
        with mock.patch.multiple(gpu, IS_ON=use):
            leaf = hidden.clone().requires_grad_()
            mask = create_mask(model.config, leaf, None, None, positions)
            embeddings = model.model.rotary_emb(leaf, positions)
            output, _ = attention(leaf, position_embeddings=embeddings, attention_mask=mask)
            results.append((output, *torch.autograd.grad(output.float().square().sum(), leaf)))
    (output, gradient), expected = results
    return [
        Row("attention beyond the window, output", relative_error(output, expected[0]), "relative"),
        Row("attention beyond the window, gradient", relative_error(gradient, expected[1]), "relative"),
    ]


def check_precision(sizes: Sizes) -> list[Row]:
    """Logits and gradients of two layers: bfloat16 against float32 for ours and stock Phimoe, and GPU against CPU."""
    config = sizes.config(2, router_sampling=False, input_jitter_noise=0.0)
    exact = build(config, torch.float32)
    ids, found = random_ids(sizes.vocab_size, 1, min(sizes.lengths)), {}
    low = {"ours": build(config)}
    low["ours"].load_state_dict(exact.state_dict())
    low["phimoe"] = build_stock(low["ours"]).eval()
    expected = exact.eval()(ids, use_cache=False).logits.detach()
    for name, model in low.items():
        found[name] = relative_error(model.eval()(ids, use_cache=False).logits.detach(), expected)
    short = ids[:, :16].cpu()
    on_device = exact(ids[:, :16], use_cache=False).logits.detach()
    rows = [Row(f"logits in bfloat16, {name}", error, "relative") for name, error in found.items()]
    del low
    return [*rows, Row("float32 on a CPU", relative_error(exact.cpu()(short).logits.detach(), on_device), "relative")]


def check_resuming(sizes: Sizes) -> list[Row]:
    """Two steps in one go, and the second one again from the first one's weights, with deterministic algorithms."""
    model = build(sizes.config(1))
    ids = random_ids(sizes.vocab_size, 2, max(sizes.lengths))
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        gradients = []
        for _ in range(2):
            model.load_state_dict(start)
            model.begin_step(1, seed=0, num_tokens=ids.numel())
            model.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    differing = sum(not torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    return [Row("gradients that differ when a step is repeated", differing, "", 0)]


def measure(sizes: Sizes) -> Iterator[Row]:
    for check in (check_routing, check_experts, check_window, check_precision, check_resuming):
        yield from check(sizes)
