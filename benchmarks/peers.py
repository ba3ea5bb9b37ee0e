"""The models compared with ours: transformers' Phimoe, and a dense one with as many active parameters.

All have the same sizes, attention (sdpa) and dtype, biases in attention and head, and LayerNorms; ours and Phimoe also
the same noise, and one set of weights.
"""

from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PhimoeConfig, PhimoeForCausalLM

from conversion.phimoe_config import phimoe_config
from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM

STOCK_EXPERTS = "grouped_mm"  # the fastest of transformers' implementations here


class Dtype(StrEnum):
    """Dtypes of the models. (Typer takes no lists of literals.)"""

    float32 = "float32"
    bfloat16 = "bfloat16"

    @property
    def of_torch(self) -> torch.dtype:
        return getattr(torch, self)


def build_ours(config: GrinMoeConfig, dtype: torch.dtype) -> GrinMoeForCausalLM:
    """Build our model with its default experts, and begin a step as a trainer does."""
    ours = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    ours.begin_step(0)
    return ours


def build_stock(ours: GrinMoeForCausalLM, experts_implementation: str = STOCK_EXPERTS) -> PhimoeForCausalLM:
    """Build transformers' Phimoe with the parameters of `ours`, its own load-balance loss and the same coefficient."""
    config = PhimoeConfig.from_dict({**phimoe_config(ours.config), "output_router_logits": True})
    choice = {"dtype": ours.dtype, "experts_implementation": experts_implementation}
    stock = AutoModelForCausalLM.from_config(config, **choice)
    weights = {}
    for name, parameter in ours.named_parameters():
        name = name.replace("block_sparse_moe.gate", "mlp.router").replace("block_sparse_moe.experts", "mlp.experts")
        weights[name] = parameter
    stock.load_state_dict(weights, assign=True)
    return stock.train()


def build_dense(config: GrinMoeConfig, dtype: torch.dtype) -> LlamaForCausalLM:
    """Build transformers' Llama with GRIN's norms and head: one SwiGLU network as wide as `config`'s top-k experts."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "head_dim", "hidden_act", "max_position_embeddings", "attention_bias", "rope_parameters",
             "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
    width = config.num_experts_per_tok * config.intermediate_size
    llama = LlamaConfig(intermediate_size=width, **{name: getattr(config, name) for name in names})
    dense = AutoModelForCausalLM.from_config(llama, dtype=dtype)
    norm = partial(nn.LayerNorm, config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
    for layer in dense.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = norm(), norm()
    dense.model.norm = norm()
    dense.lm_head.bias = nn.Parameter(torch.zeros(config.vocab_size, dtype=dtype))
    return dense.train()


def forward_backward(model: Any, rows: torch.Tensor) -> None:
    """Run a training step up to the gradients."""
    model(input_ids=rows, labels=rows, use_cache=False).loss.backward()


def step(model: Any, rows: torch.Tensor) -> None:
    """Run a training step without its optimizer, and clear the gradients."""
    forward_backward(model, rows)
    model.zero_grad(set_to_none=True)
