"""Experts with one `nn.Linear` per matrix, the layout that quantisers and LoRA understand; and quantised loading.

bitsandbytes, torchao and others replace `nn.Linear` and leave 3-D parameters alone, which are 95 % of a GRIN-MoE.
`experts_implementation="linear"`, which a `quantization_config` implies, puts these modules in the place of
`GrinMoeExperts`. Their tensors have the released names, `experts.{e}.w1.weight`, and need no conversion.
Shapes: T tokens, H hidden_size, F intermediate_size, E num_local_experts, K num_experts_per_tok.
"""

import copy
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging

from .configuration_grinmoe import GrinMoeConfig

LINEAR_EXPERTS = "linear"  # the experts_implementation with one `nn.Linear` per matrix

# Skip-list field of each quantiser -> the pattern that matches our router in it. Some compare names of modules, others
# names of parameters, which need the whole path.
SKIP_LISTS = {"llm_int8_skip_modules": "gate", "skip_modules": "gate", "modules_to_not_convert": r".*\.gate"}
HEADS = ("lm_head", "score")  # not quantised either, unless the user has a list

# Where the classes of quantised layers and weights are defined.
QUANTIZERS = ("torchao", "torch.ao.", "optimum.", "hqq", "bitsandbytes", "gptqmodel", "awq", "compressed_tensors")

logger = logging.get_logger(__name__)


class GrinMoeLinearExpert(nn.Module):
    """One expert, a SwiGLU network `w2(act(w1 x) * (w3 x))`."""

    def __init__(self, config: GrinMoeConfig):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.expert_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[tokens, H] -> [tokens, H]`."""
        return self.w2(self.dropout(self.act_fn(self.w1(hidden_states)) * self.w3(hidden_states)))


class GrinMoeLinearExperts(nn.ModuleList):
    """All experts of a layer; computes what `GrinMoeExperts` computes."""

    def __init__(self, config: GrinMoeConfig):
        super().__init__(GrinMoeLinearExpert(config) for _ in range(config.num_local_experts))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`[T, H]`, chosen experts `[T, K]` and their weights `[T, K]` -> `[T, H]`."""
        order = top_k_index.reshape(-1).argsort(stable=True)
        counts = torch.bincount(top_k_index.reshape(-1), minlength=len(self)).tolist()  # the layer's only sync
        rows = hidden_states[order // top_k_index.shape[-1]].split(counts)
        # With gradients, experts without a token run as well: their parameters get zeros instead of no gradient, like
        # fused ones and as data-parallel training expects.
        learning = torch.is_grad_enabled()
        outputs = torch.cat([expert(own) for expert, own in zip(self, rows, strict=True) if learning or len(own)])
        weighted = (outputs * top_k_weights.reshape(-1)[order, None])[order.argsort()]
        return weighted.unflatten(0, top_k_index.shape).sum(dim=1).to(hidden_states.dtype)


def exclude_router_from_quantization(quantization_config: Any) -> Any:
    """Copy a quantisation config (an object or a dict), so that it skips the routers and, without a list, the heads.

    Routing compares nearly equal numbers. The list is saved with the config, for readers of the checkpoint.
    """
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    quantization_config = copy.deepcopy(quantization_config)  # or None
    for field, router in SKIP_LISTS.items():
        if hasattr(quantization_config, field):
            skipped = getattr(quantization_config, field)
            skipped = list(HEADS) if skipped is None else list(skipped)
            setattr(quantization_config, field, skipped + [router] * (router not in skipped))
    return quantization_config


def check_quantized(model: PreTrainedModel) -> None:
    """Raise ValueError if a quantiser has left experts as they were unasked, or has quantised the routers; or if a
    checkpoint's quantised matrices are missing, or have other shapes than the config says."""
    config = model.config.quantization_config
    method = getattr(config.quant_method, "value", config.quant_method)
    skipped = [pattern for field in SKIP_LISTS for pattern in getattr(config, field, None) or []]
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if type(module).__module__.startswith("bitsandbytes") and type(weight) is nn.Parameter:
            raise ValueError(
                f"{name}.weight of the checkpoint is not quantised: list {name.rpartition('.')[2]!r} among the "
                "modules that the config's quantization_config leaves alone"
            )
        state = getattr(module, "quant_state", None)  # of bitsandbytes' 4-bit layers
        if state is not None and tuple(state.shape) != (module.out_features, module.in_features):
            raise ValueError(
                f"{name}.weight of the checkpoint was quantised from shape {list(state.shape)}, the config says "
                f"{[module.out_features, module.in_features]}"
            )
        if model.hf_quantizer.pre_quantized:
            continue
        is_quantized = type(module) is not nn.Linear or type(weight) not in (nn.Parameter, DTensor)
        if name.endswith("block_sparse_moe.gate") and is_quantized:
            raise ValueError(f"quantization_config ({method}) has quantised the router {name}; it must be left alone")
        is_of_expert = isinstance(model.get_submodule(name.rpartition(".")[0]), GrinMoeLinearExpert)
        if is_of_expert and type(module) is nn.Linear and not is_quantized and should_convert_module(name, skipped):
            raise ValueError(
                f"quantization_config ({method}) has left {name} as it was: choose a method or a group size that "
                f"takes {module.out_features} x {module.in_features} matrices, or list the module among those to "
                "leave alone"
            )


def warn_of_partial_quantization(layer: nn.Module) -> None:
    """Warn once if a quantiser has changed a decoder layer after loading, which nothing else tells the model.

    Quantisers look for `nn.Linear`: they miss fused experts, and hit the router.
    """

    def is_of_quantizer(linear: Any) -> bool:  # and not of an adapter or a sharding
        types = type(linear), type(getattr(linear, "weight", None))
        return any(kind.__module__.startswith(QUANTIZERS) for kind in types)

    block: Any = layer.block_sparse_moe
    attention: Any = layer.self_attn
    router = is_of_quantizer(block.gate)
    if not (router or is_of_quantizer(attention.q_proj)):
        return
    if not isinstance(block.experts, GrinMoeLinearExperts):
        logger.warning_once(
            "The model was quantised, and its experts, 95 % of the weights, were not: quantisers see `nn.Linear` "
            'alone. Load it with experts_implementation="linear" first, or with a quantization_config.'
        )
    if router:
        logger.warning_once(
            "The routers (`block_sparse_moe.gate`) were quantised, which changes the experts that tokens go to: leave "
            "them out by the quantiser's filter, or load with a quantization_config, which does."
        )


def disable_bnb_cpu_repacking(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in the first forward pass of `eval()`, on CPUs with AVX512-BF16.

    Repacked weights have no gradient with respect to the input, for good, so that training after an evaluation fails.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
