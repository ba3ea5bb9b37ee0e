"""Describe a checkpoint by its headers alone: torch and transformers take seconds to import, this takes none."""

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok", "max_position_embeddings",
)  # fmt: skip
# The fields that decide what a model computes, and their types or values in a plain config.
FIELDS: dict[str, set] = {
    **{name: {int} for name in SIZES},
    "sliding_window": {int, type(None)},
    "hidden_act": {"silu"},
    "rms_norm_eps": {int, float},
    "attention_bias": {bool},
    "lm_head_bias": {bool},
    "router_estimator": {"sparsemixer_v2"},
    "router_jitter_noise": {int, float},
    "moe_output_scale": {False},
    "tie_word_embeddings": {bool},
    "rope_parameters": {dict},
}
COMPLETE = "every tensor that the config asks for is there once, with its shape, and no other"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Objects in a plain config that say nothing about what the model computes.
OTHER_OBJECTS = {"auto_map", "rope_parameters", "id2label", "label2id"}

Shape = tuple[int, ...]


@dataclass
class Inspection:
    """Facts about a checkpoint.

    Args:
        config: the fields that decide what it computes; of a GGUF file its metadata, of an adapter peft's config.
        parameters, active_parameters: in all, and used by one token.
        dtypes: of the weights: name -> parameters.
        files: of the weights: name -> bytes.
        checks: what was found right, in words.
        problems: what was found wrong, in sentences.
        difference: from the checkpoint it was compared with: released tensors that differ -> largest absolute
            difference; None where one is missing or has another shape, 0 where only dtype or signs of 0 differ.
    """

    path: str
    form: str
    model: str
    config: dict[str, Any]
    parameters: int
    active_parameters: int
    dtypes: dict[str, int]
    files: dict[str, int]
    checks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    difference: dict[str, float | None] | None = None

    @classmethod
    def of_weights(
        cls, sizes: Iterable[tuple[str, str, int]], top_k: int, num_experts: int, **facts: Any
    ) -> "Inspection":
        """Count the parameters, given as (name, dtype, number) of each tensor; a token uses `top_k` experts."""
        dtypes: Counter[str] = Counter()
        experts = 0
        for name, dtype, number in sizes:
            dtypes[dtype] += number
            experts += number if ".experts." in name or "_exps." in name else 0
        active = dtypes.total() - experts * (num_experts - top_k) // num_experts
        return cls(**facts, parameters=dtypes.total(), active_parameters=active, dtypes=dict(dtypes))


def summarize(folder: Path) -> Inspection | None:
    """Return what `inspect` says about the language model in a folder, or None.

    None means that the folder is not the plain case, a sound released or fused layout under a config of default
    choices: `inspect` knows the others, and says what is wrong.
    """
    try:
        config = read_plain_config(folder)
        tensors, files = read_plain_headers(folder)
        fused = "model.layers.0.block_sparse_moe.experts.gate_up_proj" in tensors
        if config["num_hidden_layers"] * (1 if fused else config["num_local_experts"]) > len(tensors):
            return None
        if {name: shape for name, (shape, _) in tensors.items()} != expected_shapes(config, fused):
            return None
        return Inspection.of_weights(
            ((name, DTYPES[dtype], math.prod(shape)) for name, (shape, dtype) in tensors.items()),
            config["num_experts_per_tok"],
            config["num_local_experts"],
            path=str(folder),
            form="fused" if fused else "hub",
            model="GrinMoeForCausalLM",
            config=config,
            files=files,
            checks=[COMPLETE],
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError):
        return None


def read_plain_config(folder: Path) -> dict[str, Any]:
    """Return `FIELDS` of a config of default choices, as `GrinMoeConfig` has them, or raise ValueError."""
    values = json.loads((folder / "config.json").read_bytes())
    absent = {
        "rope_parameters": {"rope_theta": values.get("rope_theta"), "rope_type": "default"},
        "moe_output_scale": False,
        "router_estimator": "sparsemixer_v2",
        "head_dim": values["hidden_size"] // values["num_attention_heads"],
    }
    values = absent | {name: value for name, value in values.items() if value is not None or name == "sliding_window"}
    config = {name: values[name] for name in FIELDS}
    rope = config["rope_parameters"]
    is_plain = (
        values["model_type"] == "grinmoe"
        and values["architectures"] in (["GRIN-MoE"], ["GrinMoeForCausalLM"])  # they say what the window means
        and all(
            type(value) in FIELDS[name] or value in FIELDS[name] for name, value in config.items() if value != rope
        )
        and rope == {"rope_theta": rope["rope_theta"], "rope_type": "default"}
        and type(rope["rope_theta"]) in (int, float)
        and "rope_scaling" not in values
        and not any(isinstance(value, dict) and name not in OTHER_OBJECTS for name, value in values.items())
        and all(config[name] > 0 for name in SIZES)
        and config["num_experts_per_tok"] <= config["num_local_experts"]
    )
    if not is_plain:
        raise ValueError("not a plain config")
    return config


def read_plain_headers(folder: Path) -> tuple[dict[str, tuple[Shape, str]], dict[str, int]]:
    """Return name -> (shape, dtype) of a folder's tensors, and its files' sizes, or raise ValueError."""
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    tensors: dict[str, tuple[Shape, str]] = {}
    found: dict[str, str] = {}
    for path in files:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                part = file.get_slice(name)
                found[name], tensors[name] = path.name, (tuple(part.get_shape()), part.get_dtype())
    is_whole = json.loads(index.read_bytes())["weight_map"] == found if index.exists() else len(files) == 1
    if not is_whole or (folder / ".metadata").exists() or (folder / "adapter_config.json").exists():
        raise ValueError("not plain safetensors")
    return tensors, {path.name: path.stat().st_size for path in files}


def expected_shapes(config: dict[str, Any], fused: bool) -> dict[str, Shape]:
    """Return name -> shape of the tensors of a language model."""
    vocab, hidden, ffn = config["vocab_size"], config["hidden_size"], config["intermediate_size"]
    query, key = (config[f"num_{heads}_heads"] * config["head_dim"] for heads in ("attention", "key_value"))
    experts = config["num_local_experts"]
    layer: dict[str, Shape] = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
    }
    biases = [*layer] * config["attention_bias"] + ["input_layernorm", "post_attention_layernorm"]
    layer |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    layer |= {"block_sparse_moe.gate": (experts, hidden)}
    for expert in range(0 if fused else experts):
        prefix = f"block_sparse_moe.experts.{expert}"
        layer |= {f"{prefix}.w1": (ffn, hidden), f"{prefix}.w2": (hidden, ffn), f"{prefix}.w3": (ffn, hidden)}
    parameters: dict[str, Shape] = {f"{name}.weight": shape for name, shape in layer.items()}
    parameters |= {f"{name}.bias": layer[name][:1] for name in biases}
    if fused:
        parameters["block_sparse_moe.experts.gate_up_proj"] = (experts, 2 * ffn, hidden)
        parameters["block_sparse_moe.experts.down_proj"] = (experts, hidden, ffn)
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, hidden)}
    for n in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{n}.{name}": shape for name, shape in parameters.items()}
    shapes |= {"model.norm.weight": (hidden,), "model.norm.bias": (hidden,)}
    shapes |= {} if config["tie_word_embeddings"] else {"lm_head.weight": (vocab, hidden)}
    return shapes | ({"lm_head.bias": (vocab,)} if config["lm_head_bias"] else {})
