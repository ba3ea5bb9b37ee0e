"""Describe a checkpoint by its headers alone: torch and transformers take seconds to import, this takes none."""

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

INT, FLOAT = {int}, {int, float}
# The fields that decide what a model computes, and their types or values in a plain config.
FIELDS: dict[str, set] = {
    "vocab_size": INT,
    "hidden_size": INT,
    "intermediate_size": INT,
    "num_hidden_layers": INT,
    "num_attention_heads": INT,
    "num_key_value_heads": INT,
    "head_dim": INT,
    "num_local_experts": INT,
    "num_experts_per_tok": INT,
    "max_position_embeddings": INT,
    "sliding_window": {int, type(None)},
    "hidden_act": {"silu"},
    "rms_norm_eps": FLOAT,
    "attention_bias": {bool},
    "lm_head_bias": {bool},
    "router_estimator": {"sparsemixer_v2"},
    "router_jitter_noise": FLOAT,
    "moe_output_scale": {False},
    "tie_word_embeddings": {bool},
    "rope_parameters": {dict},
}
COMPLETE = "every tensor that the config asks for is there once, with its shape, and no other"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Objects in a plain config that say nothing about what the model computes.
OTHER_OBJECTS = {"auto_map", "rope_parameters", "id2label", "label2id"}


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
        dtypes: Counter[str] = Counter()
        for shape, dtype in tensors.values():
            dtypes[DTYPES[dtype]] += math.prod(shape)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError):
        return None
    experts = sum(math.prod(shape) for name, (shape, _) in tensors.items() if ".experts." in name)
    idle = experts * (config["num_local_experts"] - config["num_experts_per_tok"]) // config["num_local_experts"]
    return Inspection(
        path=str(folder),
        form="fused" if fused else "hub",
        model="GrinMoeForCausalLM",
        config=config,
        parameters=dtypes.total(),
        active_parameters=dtypes.total() - idle,
        dtypes=dict(dtypes),
        files=files,
        checks=[COMPLETE],
    )


def read_plain_config(folder: Path) -> dict[str, Any]:
    """Return `FIELDS` of a config of default choices, as `GrinMoeConfig` has them, or raise ValueError."""
    values = json.loads((folder / "config.json").read_bytes())
    rope = {"rope_theta": values.get("rope_theta"), "rope_type": "default"}
    absent = {"rope_parameters": rope, "moe_output_scale": False, "router_estimator": "sparsemixer_v2"}
    absent["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    values = absent | {name: value for name, value in values.items() if value is not None or name == "sliding_window"}
    config = {name: values[name] for name in FIELDS}
    rope = config["rope_parameters"]
    is_plain = (
        values["model_type"] == "grinmoe"
        and values["architectures"] in (["GRIN-MoE"], ["GrinMoeForCausalLM"])  # they say what the window means
        and all(
            type(value) in FIELDS[name] or value in FIELDS[name] for name, value in config.items() if value != rope
        )
        and rope.keys() == {"rope_theta", "rope_type"}
        and rope["rope_type"] == "default"
        and type(rope["rope_theta"]) in FLOAT
        and not any(isinstance(value, dict) and name not in OTHER_OBJECTS for name, value in values.items())
        and all(value > 0 for name, value in config.items() if FIELDS[name] is INT)
        and config["num_experts_per_tok"] <= config["num_local_experts"]
    )
    if not is_plain or values.get("rope_scaling") is not None:
        raise ValueError("not a plain config")
    return config


def read_plain_headers(folder: Path) -> tuple[dict[str, tuple[tuple[int, ...], str]], dict[str, int]]:
    """Return name -> (shape, dtype) of a folder's tensors, and its files' sizes, or raise ValueError."""
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_bytes())["weight_map"] if index.exists() else None
    files = sorted(folder.glob("*.safetensors"))
    tensors: dict[str, tuple[tuple[int, ...], str]] = {}
    found: dict[str, str] = {}
    for path in files:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                part = file.get_slice(name)
                found[name], tensors[name] = path.name, (tuple(part.get_shape()), part.get_dtype())
    others = (folder / ".metadata", folder / "adapter_config.json")
    expected = found if places is None else places
    if found != expected or any(path.exists() for path in others) or (places is None and len(files) != 1):
        raise ValueError("not plain safetensors")
    return tensors, {path.name: path.stat().st_size for path in files}


def expected_shapes(config: dict[str, Any], fused: bool) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the tensors of a language model."""
    hidden, ffn, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    query, key = (config[f"num_{heads}_heads"] * config["head_dim"] for heads in ("attention", "key_value"))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}

    def add(name: str, *shape: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    for layer in (f"model.layers.{n}" for n in range(config["num_hidden_layers"])):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            add(f"{layer}.{norm}", hidden, bias=True)
        for name, rows, columns in (
            ("q", query, hidden),
            ("k", key, hidden),
            ("v", key, hidden),
            ("o", hidden, query),
        ):
            add(f"{layer}.self_attn.{name}_proj", rows, columns, bias=config["attention_bias"])
        moe = f"{layer}.block_sparse_moe"
        add(f"{moe}.gate", experts, hidden, bias=False)
        if fused:
            shapes[f"{moe}.experts.gate_up_proj"] = (experts, 2 * ffn, hidden)
            shapes[f"{moe}.experts.down_proj"] = (experts, hidden, ffn)
        for expert in range(0 if fused else experts):
            for name, *shape in (("w1", ffn, hidden), ("w2", hidden, ffn), ("w3", ffn, hidden)):
                add(f"{moe}.experts.{expert}.{name}", *shape, bias=False)
    add("model.norm", hidden, bias=True)
    if config["lm_head_bias"]:
        shapes["lm_head.bias"] = (config["vocab_size"],)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes
