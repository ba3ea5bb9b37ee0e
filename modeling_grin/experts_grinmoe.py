"""How a layer runs its experts: under autocast, and where their weighted sum needs gradients of its own.

Shapes: T tokens, H hidden_size, K experts per token, S slots of a mixture.
"""

from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .linear_experts_grinmoe import GrinMoeLinearExperts
from .lora_experts_grinmoe import find_lora
from .routing_grinmoe import Routing, mix_outputs

ROW_BYTES = 16  # torch's grouped_mm wants rows of a multiple of it


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast computes linear layers in on a device; None if it is off."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def run_experts(
    experts: nn.Module, tokens: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The weighted sum of each token's experts: `[T, H]`, `[T, K]`, `[T, K]` -> `[T, H]`.

    transformers' implementations compute in the dtype of the weights and ignore autocast: float32 weights would mean
    float32 experts. Here they get copies in autocast's dtype, like any linear layer.
    """
    module: Any
    module, lora = find_lora(experts)
    keywords = {"lora": lora} if lora else {}
    dtype = autocast_dtype(tokens.device.type)
    if dtype is None or isinstance(module, GrinMoeLinearExperts) or hasattr(module, "base_layer"):
        return module(tokens, top_k_index, top_k_weights, **keywords)
    implementation = ALL_EXPERTS_FUNCTIONS.get(module.config._experts_implementation)
    if (casts_weights := getattr(implementation, "casts_weights", None)) and casts_weights(module, tokens):
        return module(tokens.to(dtype), top_k_index, top_k_weights, **keywords).to(tokens.dtype)
    parameters = dict(module.named_parameters())
    local = [p.to_local() if hasattr(p, "to_local") else p for p in parameters.values()]
    if any(p.shape[-1] * dtype.itemsize % ROW_BYTES for p in local):
        return module(tokens, top_k_index, top_k_weights, **keywords)
    cast = {name: parameter.to(dtype) for name, parameter in parameters.items()}
    if tokens.device.type == "cpu":
        return functional_call(module, cast, (tokens, top_k_index, top_k_weights), keywords)
    # As linear layers do: CUDA's autocast leaves a LayerNorm's output in float32.
    inputs = tokens.to(dtype), top_k_index, top_k_weights.to(dtype)
    return functional_call(module, cast, inputs, keywords).to(tokens.dtype)


def mix_experts(experts: nn.Module, tokens: torch.Tensor, routing: Routing) -> torch.Tensor:
    """The layer's sum over experts, `[T, H]` -> `[T, H]`.

    A `Mixture` needs the output of each slot's expert by itself. Slots whose experts do not learn keep nothing for the
    backward pass.
    """
    mixture = routing.mixture
    if mixture is None:
        return run_experts(experts, tokens, routing.experts, routing.weights.to(tokens.dtype))
    num_learning = mixture.expert_weights.shape[1]
    outputs = run_slots(experts, tokens, mixture.experts[:, :num_learning])
    if num_learning < mixture.experts.shape[1]:
        with torch.no_grad():
            others = run_slots(experts, tokens, mixture.experts[:, num_learning:])
        outputs = torch.cat([outputs, others], dim=1)
    return mix_outputs(outputs, mixture)


def run_slots(experts: nn.Module, tokens: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The output of each slot's expert, `[T, H]`, `[T, S]` -> `[T, S, H]`; to any implementation a slot is a row."""
    rows, ones = tokens.repeat_interleave(slots.shape[1], dim=0), tokens.new_ones(slots.numel(), 1)
    return run_experts(experts, rows, slots.reshape(-1, 1), ones).reshape(*slots.shape, -1)
