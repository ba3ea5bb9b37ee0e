"""LoRA on fused experts: `W x + s B (A x)`, so that neither W + s B A nor a gradient of W is ever made.

peft adapts a 3-D parameter by adding `s B A` to it in every forward pass. Here a layer reads the factors from peft's
wrappers and runs the experts underneath with them: names, state and files stay peft's.

Shapes: T tokens, K experts per token, S = T K slots, E experts, r ranks of all active adapters together.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.integrations.moe import _grouped_linear

from .layout_grinmoe import EXPERT_WEIGHTS

RANK_MULTIPLE = 8  # of ranks, which are filled up with zeros: torch's grouped_mm wants rows of multiples of 16 bytes


Factors = tuple[torch.Tensor, torch.Tensor]
"""The adapters of one fused parameter `[E, out, in]`: A `[E, r, in]` and s B `[E, out, r]`."""
Lora = dict[str, Factors]
"""Fused parameter -> its adapters."""


def find_lora(experts: nn.Module) -> tuple[nn.Module, Lora]:
    """The module that peft's `ParamWrapper`s are around, and what their active adapters add to its parameters.

    peft has one wrapper for each parameter, around each other. `lora_A` `[E r, in]` has one expert's ranks after the
    other's, and `lora_B` `[out, r E]` one rank's experts after the other's.
    """
    lora: Lora = {}
    module: Any = experts
    while hasattr(module, "parameter_name"):
        if module.disable_adapters and module.merged:
            module.unmerge()
        active = () if module.disable_adapters or module.merged else module.active_adapters
        names = [name for name in active if name in module.lora_A]
        if names:
            num_experts = module.num_experts
            a = [module.lora_A[name].weight.unflatten(0, (num_experts, -1)) for name in names]
            b = [
                module.scaling[name] * module.lora_B[name].weight.unflatten(1, (-1, num_experts)).permute(2, 0, 1)
                for name in names
            ]
            factors = torch.cat(a, dim=1), torch.cat(b, dim=2)
            lora[module.parameter_name] = of_rank(factors, module.parameter_name, module.get_param())
        module = module.base_layer
    return module, lora


def of_rank(factors: Factors, name: str, weight: torch.Tensor) -> Factors:
    """The part of `factors` that belongs to a tensor-parallel rank's part of `weight`.

    Every rank has all factors. Each computes with the part of its intermediate features, so that gradients are summed.
    """
    if not isinstance(weight, DTensor):
        return factors
    from transformers.distributed.parallel_utils import _AllReduceBackward  # not in the oldest versions

    mesh = weight.device_mesh["tp"] if weight.device_mesh.ndim > 1 else weight.device_mesh
    a, b = (_AllReduceBackward.apply(factor, mesh.get_group()) for factor in factors)
    num_ranks, rank = mesh.size(), mesh.get_local_rank()
    if name == "down_proj":
        return a.chunk(num_ranks, dim=2)[rank], b
    parts = b.unflatten(1, (len(EXPERT_WEIGHTS[name]), num_ranks, -1))  # [E, parts, ranks, F / ranks, r]
    return a, parts[:, :, rank].flatten(1, 2)


def lora_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, lora: Lora
) -> torch.Tensor:
    """transformers' `grouped_mm` with adapters: `[T, H]`, `[T, K]`, `[T, K]` -> `[T, H]`.

    The factors are applied in the dtype of the weights that they belong to, as under autocast.
    """
    num_experts, top_k = self.num_experts, top_k_index.shape[-1]
    expert_of_row, order = top_k_index.reshape(-1).sort(stable=True)
    ends = torch.searchsorted(expert_of_row, torch.arange(num_experts, device=order.device), right=True).int()

    def project(rows: torch.Tensor, name: str) -> torch.Tensor:
        weight = getattr(self, name)
        output = _grouped_linear(rows, weight, ends)
        if name in lora:
            a, b = (factor.to(weight.dtype) for factor in lora[name])
            missing = -a.shape[1] % RANK_MULTIPLE
            a, b = nn.functional.pad(a, (0, 0, 0, missing)), nn.functional.pad(b, (0, missing))
            output += _grouped_linear(_grouped_linear(rows, a, ends), b, ends)
        return output

    outputs = project(self._apply_gate(project(hidden_states[order // top_k], "gate_up_proj")), "down_proj")  # [S, H]
    weighted = (outputs * top_k_weights.reshape(-1)[order, None])[order.argsort()]
    return weighted.unflatten(0, (-1, top_k)).sum(dim=1).to(hidden_states.dtype)
