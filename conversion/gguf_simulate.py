"""Compute in torch what llama.cpp computes from a GGUF file, to check an export."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import nn

from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM
from modeling_grin.routing_grinmoe import inference_rule

from . import verify
from .checkpoint import Checkpoint
from .gguf_export import ARCHITECTURE, MODULES, context_length, export_gguf, list_places

TOLERANCE = 1e-5  # of weights in float32
ROUTER_SHIFT = 20  # see `load_gguf`


class RmsNorm(nn.LayerNorm):
    """llama.cpp's norm in the `phimoe` graph, `LLM_NORM_RMS` with a bias."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normalised = nn.functional.rms_norm(hidden_states, self.normalized_shape, self.weight, self.eps)
        return normalised + self.bias


def load_gguf(path: Path, dtype: torch.dtype = torch.float32, *, router_shift: int = 0) -> GrinMoeForCausalLM:
    """Load a file of `export_gguf` as the model that llama.cpp computes, with its norms and routing, in torch.

    Its hidden states are the original model's, minus their mean over the hidden dimension. The routers are multiplied
    by 2^-`router_shift` once more. In float64, 20 makes the weights of a token's experts equal, so that any difference
    from the model is in the weights. (Not for GShard's routers.)
    """
    reader = gguf.GGUFReader(path)

    def field(name: str) -> Any:
        return reader.fields[f"{ARCHITECTURE}.{name}"].contents()

    top_k = field("expert_used_count")
    config = GrinMoeConfig(
        vocab_size=field("vocab_size"),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=field("attention.head_count"),
        num_key_value_heads=field("attention.head_count_kv"),
        num_local_experts=field("expert_count"),
        num_experts_per_tok=top_k,
        max_position_embeddings=field("context_length"),
        sliding_window=None,
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        router_jitter_noise=0.0,
        router_estimator="gshard" if top_k > 1 else "sparsemixer_v2",  # normalised; a single weight is 1
    )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    state: dict[str, torch.Tensor] = {}
    for place in list_places(config):
        tensor = tensors[place.name]
        values = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type))).to(dtype)
        parts = values if "{e}" in MODULES[place.kind] else [values]
        state.update(zip(place.sources, parts, strict=True))
    model = GrinMoeForCausalLM(config).to(dtype)
    model.set_experts_implementation("eager")  # the one that also computes in float64
    model.load_state_dict(state)
    for layer in model.model.layers:
        layer.block_sparse_moe.gate.weight.data *= 2.0**-router_shift
    for name, module in list(model.named_modules()):
        if type(module) is nn.LayerNorm:
            norm = RmsNorm(module.normalized_shape, module.eps, dtype=dtype)
            norm.load_state_dict(module.state_dict())
            model.set_submodule(name, norm)
    return model.eval()


def compare_gguf(checkpoint: Checkpoint, path: Path, input_ids: torch.Tensor, *, is_exact: bool) -> float:
    """Compare llama.cpp's logits with the model's, both without near-ties; return the relative difference.

    `is_exact` says whether the file is F32. If not, an F32 file is made beside it and compared, because rounded
    weights would hide an error of the folds.
    """
    if not is_exact:
        unrounded = path.with_name(f"{path.name}.f32")
        export_gguf(checkpoint, unrounded, file_type="f32")
        compare_gguf(checkpoint, unrounded, input_ids, is_exact=True)
        unrounded.unlink()

    input_ids = input_ids[:, : context_length(checkpoint.config)]
    config = copy.deepcopy(checkpoint.config)
    config.router_jitter_noise = 0.0
    model = verify.load_model(dataclasses.replace(checkpoint, config=config), verify.DTYPE)
    shift = 0 if inference_rule(checkpoint.config) == "gshard" else ROUTER_SHIFT
    before = verify.compute(model, input_ids)
    after = verify.compute(load_gguf(path, verify.DTYPE, router_shift=shift), input_ids)
    # Centring takes the mean out of the residual stream, as every norm does anyway.
    *residual, _, _ = before
    before |= {name: before[name] - before[name].mean(dim=-1, keepdim=True) for name in residual}
    return verify.compare(before, after, TOLERANCE if is_exact else torch.inf)
