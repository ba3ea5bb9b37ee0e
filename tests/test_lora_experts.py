"""LoRA on fused experts: plain loops in float64, peft's own way, and what is never made."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_grin import GrinMoeConfig, experts_grinmoe
from modeling_grin.experts_grinmoe import run_experts
from modeling_grin.modeling_grinmoe import GrinMoeExperts

H, F, E, TOP_K, ALPHA = 24, 16, 5, 2, 6
PARAMETERS = ["gate_up_proj", "down_proj"]
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["grinmoe", "grouped_mm"])


class Block(nn.Module):
    def __init__(self, implementation, **settings):
        super().__init__()
        sizes = {"hidden_size": H, "intermediate_size": F, "num_local_experts": E, "num_attention_heads": 4}
        config = GrinMoeConfig(**{**sizes, **settings}, num_key_value_heads=2)
        config._experts_implementation = implementation
        self.experts = GrinMoeExperts(config)


def make_block(implementation, dtype=torch.float64, ranks=(3,), targets=PARAMETERS, **settings):
    """peft's wrappers around experts, with an adapter of each of `ranks`, all active. The weights are always alike."""
    generator = torch.Generator().manual_seed(0)
    block = Block(implementation, **settings)
    for number, rank in enumerate(ranks):
        lora = LoraConfig(r=rank, lora_alpha=ALPHA, target_parameters=[f"experts.{name}" for name in targets])
        if number == 0:
            block = get_peft_model(block, lora)
        else:
            block.add_adapter(f"adapter{number}", lora)
    block.base_model.set_adapter(list(block.peft_config))
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.requires_grad_("lora_" in name)
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return block.to(dtype)


def make_inputs(dtype=torch.float64, num_tokens=40):
    """Tokens, experts, weights and the gradient of the output; one expert has no token."""
    generator = torch.Generator().manual_seed(1)
    index = torch.rand(num_tokens, E - 1, generator=generator).argsort(dim=-1)[:, :TOP_K]
    tokens, weights, grad = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((num_tokens, H), (num_tokens, TOP_K), (num_tokens, H))
    )
    return tokens.requires_grad_(), index, weights.requires_grad_(), grad


def run(block, compute, dtype=torch.float64, num_tokens=40):
    """Output, and the gradients of tokens, weights and adapters by name."""
    tokens, index, weights, grad_output = make_inputs(dtype, num_tokens)
    output = compute(block.get_base_model().experts, tokens, index, weights)
    learnt = {name: p for name, p in block.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(output, [tokens, weights, *learnt.values()], grad_output)
    return dict(zip(["output", "tokens", "weights", *learnt], [output, *grads], strict=True))


def loops(experts, tokens, index, weights):
    """Expert by expert with W + s B A, by peft's definition of its matrices."""
    matrices, module = {}, experts
    while hasattr(module, "parameter_name"):
        parameter = getattr(module.get_base_layer(), module.parameter_name)
        for expert in range(E):
            matrix = parameter[expert]
            for adapter in module.active_adapters:
                a, b, r = module.lora_A[adapter].weight, module.lora_B[adapter].weight, module.r[adapter]
                matrix = matrix + ALPHA / r * b[:, expert::E] @ a[expert * r : (expert + 1) * r]
            matrices[module.parameter_name, expert] = matrix
        module = module.base_layer
    rows = []
    for token, chosen, factors in zip(tokens, index.tolist(), weights, strict=True):
        row = torch.zeros_like(token)
        for expert, factor in zip(chosen, factors, strict=True):
            w13, w2 = (matrices.get((name, expert), getattr(module, name)[expert]) for name in PARAMETERS)
            row = row + factor * (w2 @ (nn.functional.silu(w13[:F] @ token) * (w13[F:] @ token)))
        rows.append(row)
    return torch.stack(rows)


def assert_close(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value.norm() > 0, name
        assert (actual[name].double() - value).norm() <= tolerance * value.norm(), name


@pytest.mark.parametrize(
    ("implementation", "dtype", "tolerance"),
    [("grinmoe", torch.float64, 1e-13), ("grinmoe", torch.float32, 1e-6), ("grouped_mm", torch.float32, 1e-6)],
)
@pytest.mark.parametrize(
    ("ranks", "targets"), [((3,), PARAMETERS), ((8, 2), PARAMETERS), ((2,), PARAMETERS[:1]), ((2,), PARAMETERS[1:])],
    ids=["both", "two adapters", "gate_up_proj", "down_proj"],
)  # fmt: skip
def test_output_and_gradients_are_those_of_plain_loops_in_float64(implementation, dtype, tolerance, ranks, targets):
    block = make_block(implementation, dtype, ranks, targets)
    assert_close(run(block, run_experts, dtype), run(block.double(), loops), tolerance)


@IMPLEMENTATIONS
def test_autocast_computes_in_bfloat16_and_keeps_gradients_in_float32(implementation):
    block = make_block(implementation, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(block, run_experts, torch.float32)
    assert {value.dtype for value in actual.values()} == {torch.float32}
    assert_close(actual, run(make_block(implementation), loops), 3e-2)
    assert not torch.equal(actual["output"], run(block, run_experts, torch.float32)["output"])


@IMPLEMENTATIONS
def test_adapters_far_below_the_resolution_of_bfloat16_weights_act(implementation):
    """W + BA rounded to bfloat16 would lose nearly all of a BA of 2e-4 of W."""
    block = make_block(implementation, torch.bfloat16)
    for name, parameter in block.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float() * (3e-4 if "lora_B" in name else 1)
    grads = {name: value for name, value in run(block, run_experts, torch.bfloat16).items() if "lora_" in name}
    exact = run(block.double(), loops)
    assert_close(grads, {name: exact[name] for name in grads}, 3e-2)


@IMPLEMENTATIONS
def test_disabled_and_merged_adapters(implementation):
    tokens, index, weights, _ = make_inputs(torch.float32)
    block = make_block(implementation, torch.float32)
    experts = block.get_base_model().experts
    adapted, plain = run_experts(experts, tokens, index, weights), experts.get_base_layer()(tokens, index, weights)
    assert (adapted - plain).norm() > 0.1 * plain.norm()
    with block.disable_adapter():
        assert torch.equal(run_experts(experts, tokens, index, weights), plain)
    block.merge_adapter()
    torch.testing.assert_close(run_experts(experts, tokens, index, weights), adapted, rtol=1e-4, atol=1e-4)
    with block.disable_adapter():  # peft takes the adapters out again, by a subtraction
        torch.testing.assert_close(run_experts(experts, tokens, index, weights), plain, rtol=1e-4, atol=1e-4)


class Largest(TorchDispatchMode):
    """The most elements of a floating-point tensor that an operation has made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            # Views of the weights are as large, and have their memory.
            if isinstance(tensor, torch.Tensor) and not function.is_view and tensor.is_floating_point():
                self.numel = max(self.numel, tensor.numel())
        return result


@IMPLEMENTATIONS
@pytest.mark.parametrize("summed", [False, True], ids=["apart", "as W + BA"])
def test_nothing_of_the_size_of_the_weights_is_made(implementation, summed, monkeypatch):
    block = make_block(implementation, torch.bfloat16, intermediate_size=256)
    smallest = E * H * 256
    if summed:  # the test can fail
        monkeypatch.setattr(experts_grinmoe, "find_lora", lambda experts: (experts, {}))
    with Largest() as largest:
        run(block, run_experts, torch.bfloat16, num_tokens=8)
    assert (largest.numel >= smallest) == summed
