"""Experts of a few tokens as a Triton kernel, in Triton's interpreter (`make test-triton`), against float64 loops."""

import os

import pytest
import torch
from torch.nn.functional import silu

from modeling_grin import GrinMoeConfig
from modeling_grin import gpu_kernels_grinmoe as gpu
from modeling_grin.kernels.gpu_experts import MAX_SLOTS, few_slots_experts, uses_few_slots_kernel
from modeling_grin.modeling_grinmoe import GrinMoeExperts

needs_interpreter = pytest.mark.skipif(
    gpu.triton is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton's kernels run on a CPU in its interpreter only: make test-triton",
)


def make_experts(num_experts=5, hidden_size=40, intermediate_size=72):
    config = GrinMoeConfig(
        hidden_size=hidden_size, intermediate_size=intermediate_size, num_local_experts=num_experts,
        num_attention_heads=2, num_key_value_heads=1, experts_implementation="grinmoe",
    )  # fmt: skip
    experts = GrinMoeExperts(config).eval()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(parameter.shape)))
    return experts


def make_inputs(num_tokens, top_k, num_experts=5, hidden_size=40):
    generator = torch.Generator().manual_seed(num_tokens)
    hidden_states = torch.randn(num_tokens, hidden_size, generator=generator)
    chosen = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices
    return hidden_states, chosen, torch.rand(num_tokens, top_k, generator=generator)


def loops(experts, hidden_states, chosen, weights):
    output = torch.zeros_like(hidden_states, dtype=torch.float64)
    for token, slots in enumerate(chosen.tolist()):
        for slot, expert in enumerate(slots):
            gate, up = (experts.gate_up_proj[expert].double() @ hidden_states[token].double()).chunk(2)
            own = experts.down_proj[expert].double() @ (silu(gate) * up)
            output[token] += weights[token, slot].double() * own
    return output


@needs_interpreter
@pytest.mark.parametrize(("num_tokens", "top_k"), [(1, 1), (1, 2), (7, 2), (16, 4)])
@torch.no_grad()
def test_equals_loops(monkeypatch, num_tokens, top_k):
    """Sizes that no block divides; experts that no token chose among them."""
    monkeypatch.setattr(gpu, "can_launch", lambda tensor: True)
    experts, inputs = make_experts(), make_inputs(num_tokens, top_k)
    assert uses_few_slots_kernel(experts, inputs[0], inputs[1])
    expected = loops(experts, *inputs)
    torch.testing.assert_close(
        few_slots_experts(*inputs, *experts.parameters()).double(), expected, rtol=1e-6, atol=5e-6
    )


def test_is_for_a_few_tokens_of_inference(monkeypatch):
    experts, (hidden_states, chosen, _) = make_experts(), make_inputs(MAX_SLOTS // 2 + 1, 2)
    few = hidden_states[:-1], chosen[:-1]
    with torch.no_grad():
        assert not uses_few_slots_kernel(experts, *few), "on a CPU"
        monkeypatch.setattr(gpu, "can_launch", lambda tensor: True)
        assert uses_few_slots_kernel(experts, *few)
        assert not uses_few_slots_kernel(experts, hidden_states, chosen), "many slots"
        assert not uses_few_slots_kernel(experts, few[0].bfloat16(), few[1]), "weights of another dtype"
    assert not uses_few_slots_kernel(experts, *few), "gradients"
