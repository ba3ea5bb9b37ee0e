"""Checkpoints in the layout of the release, written without the code under test."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# `microsoft/GRIN-MoE`'s config.json, sizes aside.
RELEASED_CONFIG = {
    "_name_or_path": "GRIN-MoE",
    "architectures": ["GRIN-MoE"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_grinmoe.GRINMoEConfig",
        "AutoModelForCausalLM": "modeling_grinmoe.GRINMoEForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "input_jitter_noise": 0.01,
    "lm_head_bias": True,
    "max_position_embeddings": 4096,
    "model_type": "grinmoe",
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.0,
    "router_jitter_noise": 0.01,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.2",
    "use_cache": True,
}
TINY_SIZES = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 6,
}

# For tests of flex_attention, which CPUs with AVX2 alone refuse at TINY_SIZES' heads of 8.
FLEX_SIZES = {"head_dim": 24}


def released_config(**overrides: Any) -> dict[str, Any]:
    """The released config.json at tiny sizes."""
    return {**RELEASED_CONFIG, **TINY_SIZES, **overrides}


def released_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors under the released names: no zeros, no unit norms, no zero biases."""
    generator = torch.Generator().manual_seed(seed)
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    query, key = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    dtype = getattr(torch, config["torch_dtype"])
    tensors = {}

    def add(name: str, *shape: int, mean: float = 0.0, std: float = 0.2) -> None:
        tensors[name] = (mean + std * torch.randn(*shape, generator=generator)).to(dtype)

    def add_norm(name: str) -> None:
        add(f"{name}.weight", hidden, mean=1.0)
        add(f"{name}.bias", hidden)

    add("model.embed_tokens.weight", config["vocab_size"], hidden, std=1.0)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        add_norm(f"{prefix}.input_layernorm")
        add_norm(f"{prefix}.post_attention_layernorm")
        for name, rows, columns in (
            ("q", query, hidden),
            ("k", key, hidden),
            ("v", key, hidden),
            ("o", hidden, query),
        ):
            add(f"{prefix}.self_attn.{name}_proj.weight", rows, columns)
            if config["attention_bias"]:
                add(f"{prefix}.self_attn.{name}_proj.bias", rows)
        moe = f"{prefix}.block_sparse_moe"
        add(f"{moe}.gate.weight", config["num_local_experts"], hidden)
        for expert in range(config["num_local_experts"]):
            add(f"{moe}.experts.{expert}.w1.weight", ffn, hidden)
            add(f"{moe}.experts.{expert}.w2.weight", hidden, ffn)
            add(f"{moe}.experts.{expert}.w3.weight", ffn, hidden)
    add_norm("model.norm")
    if not config["tie_word_embeddings"]:
        add("lm_head.weight", config["vocab_size"], hidden)
    if config["lm_head_bias"]:
        add("lm_head.bias", config["vocab_size"])
    if config.get("router_bias_update_rate"):
        for layer in range(config["num_hidden_layers"]):
            bias = 0.2 * torch.randn(config["num_local_experts"], generator=generator)
            tensors[f"model.layers.{layer}.block_sparse_moe.e_score_correction_bias"] = bias  # always float32
    return tensors


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, shapes, dtypes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].view(torch.uint8).equal(tensor.contiguous().view(torch.uint8)), name


def write_release(
    folder: Path, num_shards: int = 1, **overrides: Any
) -> tuple[Path, dict[str, Any], dict[str, torch.Tensor]]:
    """Write a checkpoint in the layout of the release; its folder, config and tensors."""
    config = released_config(**overrides)
    tensors = released_tensors(config)
    return write_checkpoint(folder, config, tensors, num_shards), config, tensors


def fused(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The same tensors with each layer's experts stacked: gate_up_proj `[E, 2F, H]`, down_proj `[E, H, F]`."""
    tensors = dict(tensors)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.block_sparse_moe.experts"
        experts = range(config["num_local_experts"])
        w1, w2, w3 = ([tensors.pop(f"{prefix}.{e}.{part}.weight") for e in experts] for part in ("w1", "w2", "w3"))
        tensors[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(w1, w3, strict=True)])
        tensors[f"{prefix}.down_proj"] = torch.stack(w2)
    return tensors


def changed(tensors: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """With other tensors, and without what begins with the names that are None."""
    lost = tuple(name for name, tensor in changes.items() if tensor is None)
    kept = {name: tensor for name, tensor in tensors.items() if not lost or not name.startswith(lost)}
    return kept | {name: tensor for name, tensor in changes.items() if tensor is not None}


def write_checkpoint(
    folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], num_shards: int = 1
) -> Path:
    """Write config.json and safetensors, with an index when there is more than one shard; tensors dealt in turn, so
    that one layer's experts lie in every shard."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[shard::num_shards]}
        save_file(part, folder / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file_name))
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
