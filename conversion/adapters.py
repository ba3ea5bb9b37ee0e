"""LoRA adapters: merged into their base model, or written for the layout with a matrix per expert.

Shapes: E experts, r ranks of an adapter, H hidden_size, F intermediate_size.
"""

import copy
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from modeling_grin.checkpoint_grinmoe import EXPERT_WEIGHTS
from modeling_grin.modeling_grinmoe import LINEAR_EXPERTS
from modeling_grin.patterns_grinmoe import adaptable_names, check_patterns
from modeling_grin.saving_grinmoe import give_umasks_mode

from .checkpoint import Checkpoint
from .checks import load_model
from .forms import model_class_of, released_tensors
from .headers import ADAPTER_CONFIG_FILE, read_adapter_config, read_config, read_safetensors_header
from .tensors import ConversionError, FileTensor, StoredTensor

ADAPTER_FILE = "adapter_model.safetensors"
# What peft calls an adapter of a layer's fused experts. The wrapper of a second parameter holds that of the first.
FUSED_EXPERTS = re.compile(r"base_model\.model\.(.*\.block_sparse_moe\.experts)\.(base_layer\.)?lora_[AB]\.weight")
LINEAR_EXPERTS_NAME = re.compile(r".*\.block_sparse_moe\.experts\.\d+\.")
# Fields that peft honours for modules alone: with fused experts they did not say which have adapters.
MODULE_SETTINGS = ("layers_to_transform", "layers_pattern", "exclude_modules")


def find_base(adapter: Path, base: str | Path | None) -> Path:
    """The folder of an adapter's base model: `base`, or what the adapter's config names.

    Raises:
        ConversionError: there is no such folder; nothing is fetched.
    """
    named = base if base is not None else read_adapter_config(adapter)["base_model_name_or_path"]
    if named is None or not Path(named).is_dir():
        raise ConversionError(f"the base model of {adapter}, {named}, is not a folder: give it with --base FOLDER")
    return Path(named)


def read_adapter(folder: Path) -> dict[str, FileTensor]:
    """An adapter's tensors, unread, by the names that peft gives them."""
    if not (folder / ADAPTER_FILE).is_file():
        raise ConversionError(
            f"{folder} has no {ADAPTER_FILE}: load the adapter with peft and save it again with safe_serialization"
        )
    return read_safetensors_header(folder / ADAPTER_FILE)


def refuse_patterns(config: dict[str, Any], names: list[str], adapter: Path) -> None:
    """Raise ConversionError if the config's regular expressions cannot be matched against `names` in a short time."""
    try:
        check_patterns(config, names, adapter / ADAPTER_CONFIG_FILE)
    except ValueError as error:
        raise ConversionError(str(error)) from error


def merge_adapter(adapter: Path, checkpoint: Checkpoint, dtype: torch.dtype | None) -> Checkpoint:
    """The checkpoint that a LoRA adapter and its base model make; the merge proves itself, or is refused.

    The whole model is in memory, up to twice.

    Args:
        checkpoint: the base model, of any form.
        dtype: what the base is loaded and merged in; by default the dtype it has.

    Returns:
        Of form `adapter`, with the base's path: tokenizer and generation settings are there.

    Raises:
        ConversionError: adapter and base do not fit, tensor by tensor; merged logits differ from those with the
            adapter on (`modeling_grin.training.lora.merge_lora`); peft is not installed.
    """
    try:
        from peft import PeftModel, get_peft_model_state_dict

        from modeling_grin.training.lora import merge_lora
    except ImportError as error:
        raise ConversionError("merging an adapter needs peft: pip install 'grin-moe[train]'") from error

    adapter_config = read_adapter_config(adapter)
    found = read_adapter(adapter)
    base, dtypes = checkpoint.path, {tensor.dtype for tensor in checkpoint.tensors.values()}
    if dtype is None and len(dtypes) > 1:
        raise ConversionError(f"{base} has tensors of {', '.join(sorted(map(str, dtypes)))}: choose one with --dtype")
    config = copy.deepcopy(checkpoint.config)
    if any(LINEAR_EXPERTS_NAME.match(name) for name in found):
        config._experts_implementation = LINEAR_EXPERTS
    with torch.device("meta"):
        skeleton = model_class_of(checkpoint.tensors)._from_config(config)
    refuse_patterns(adapter_config, adaptable_names(skeleton), adapter)
    model = load_model(replace(checkpoint, config=config), dtype)
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter))
    except Exception as error:  # of any type: peft meets a config that anybody may have written
        raise ConversionError(f"{adapter} does not fit {base}: {error}") from error
    # peft warns of tensors that it has no place for, and leaves those that it misses as they were initialised.
    expected = get_peft_model_state_dict(adapted)
    for names, what in ((found.keys() - expected.keys(), "no place for"), (expected.keys() - found.keys(), "need of")):
        if names:
            raise ConversionError(
                f"{adapter} does not fit {base}, which has {what} {len(names)} of its tensors: {min(names)}, ..."
            )
    del expected
    try:
        merged = merge_lora(adapted)
    except ValueError as error:
        raise ConversionError(f"{adapter}: {error}") from error
    stored = {
        name: StoredTensor(tuple(tensor.shape), tensor.dtype, f"merged {name}", partial(torch.Tensor.detach, tensor))
        for name, tensor in merged.state_dict().items()
    }
    _, _, tensors = released_tensors(stored, checkpoint.config, f"{base} with {adapter}")
    return Checkpoint(base, "adapter", checkpoint.config, tensors)


def export_adapter(adapter: Path, base: Path | None, destination_folder: Path) -> None:
    """Write an adapter of fused experts as one LoRA for each expert's matrix, for tools that know no other.

    peft keeps the adapters of a fused weight as A `[E r, in]`, one expert's ranks after the other's, and B
    `[out, r E]`, one rank's experts after the other's. An expert's share of them is its LoRA; of `gate_up_proj`, w1
    and w3 have the same A, and each its rows of B. No number changes, nor do adapters of other modules. The result
    fits models with `experts_implementation="linear"`.

    Args:
        base: a folder with the base model's config.json, to check the shapes by.

    Raises:
        ConversionError: the adapter has none of fused experts, or does not fit the base; or its config chooses among
            layers, which peft does for modules in another way than for fused experts.
    """
    config = read_adapter_config(adapter)
    found = read_adapter(adapter)
    targets = config.get("target_parameters") or []
    if others := [name for name in targets if "layers." in name or name.rpartition(".")[2] not in EXPERT_WEIGHTS]:
        raise ConversionError(f"{adapter}: target_parameters has {others}, not the fused experts of all layers")
    for field in MODULE_SETTINGS:
        if config.get(field) is not None:
            raise ConversionError(f"{adapter}: {field}={config[field]} acts on modules alone, not on fused experts")

    tensors = {name: tensor.read() for name, tensor in found.items()}
    ranks, alphas, modules = {}, {}, set()
    wrappers = dict.fromkeys(match.groups("") for match in map(FUSED_EXPERTS.fullmatch, found) if match)
    refuse_patterns(config, [f"{experts}.{key}" for experts, _ in wrappers for key in EXPERT_WEIGHTS], adapter)
    for experts, inner in wrappers:
        adapted = [key for key in EXPERT_WEIGHTS if any(f".{experts}.{key}".endswith(f".{end}") for end in targets)]
        if len(adapted) < (2 if inner else 1):
            raise ConversionError(f"{adapter} has more adapters of {experts} than target_parameters={targets} name")
        weight = f"{experts}.{adapted[0 if inner else -1]}"
        rank = by_pattern(config, "rank_pattern", "r", weight)
        wrapper = f"base_model.model.{experts}.{inner}"
        a, b = (tensors.pop(f"{wrapper}lora_{factor}.weight", torch.empty(0)) for factor in "AB")
        check_factors(a, b, rank, weight, adapter, base)
        num_experts, parts = len(a) // rank, EXPERT_WEIGHTS[weight.rpartition(".")[2]]
        for expert in range(num_experts):
            rows = b.unflatten(1, (rank, num_experts))[..., expert].chunk(len(parts))
            for part, part_b in zip(parts, rows, strict=True):
                prefix = f"base_model.model.{experts}.{expert}.{part}"
                tensors[f"{prefix}.lora_A.weight"] = a.unflatten(0, (num_experts, rank))[expert].clone()
                tensors[f"{prefix}.lora_B.weight"] = part_b.contiguous()
        pattern = rf"{re.escape(experts)}\.\d+\.({'|'.join(parts)})"
        ranks[pattern], alphas[pattern] = rank, by_pattern(config, "alpha_pattern", "lora_alpha", weight)
        modules |= set(parts)
    if not modules:
        raise ConversionError(f"{adapter} has no adapters of fused experts: it fits single matrices as it is")

    present = config.get("target_modules") or []
    if isinstance(present, str):  # a regular expression
        config["target_modules"] = rf"({present})|.*\.({'|'.join(sorted(modules))})"
    else:
        config["target_modules"] = [*present, *sorted(modules)]
    config["target_parameters"] = None
    for field, values in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if config.get(field):
            config[field] = values | config[field]  # peft takes the first that matches
    destination_folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, destination_folder / ADAPTER_FILE, metadata={"format": "pt"})
    give_umasks_mode(destination_folder)
    text = json.dumps(config, indent=2) + "\n"
    (destination_folder / ADAPTER_CONFIG_FILE).write_text(text, encoding="utf-8")


def by_pattern(config: dict[str, Any], patterns: str, default: str, name: str) -> Any:
    """A parameter's setting as peft reads it: that of the first regular expression that fits, or the default."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return config[default]


def check_factors(a: torch.Tensor, b: torch.Tensor, rank: int, weight: str, adapter: Path, base: Path | None) -> None:
    """Raise ConversionError unless A `[E r, in]` and B `[out, r E]` fit a fused weight `[E, out, in]`, the base's."""
    fits = a.ndim == b.ndim == 2 and len(a) == b.shape[1] > 0 and len(a) % rank == 0
    if fits and base is not None:
        config = read_config(base)
        hidden, ffn = config.hidden_size, config.intermediate_size
        shape = (2 * ffn, hidden) if weight.endswith("gate_up_proj") else (hidden, ffn)
        fits = (len(a) // rank, len(b), a.shape[1]) == (config.num_local_experts, *shape)
    if not fits:
        raise ConversionError(
            f"{adapter}: {weight} has A {list(a.shape)} and B {list(b.shape)}, which are no factors of rank {rank} of "
            f"the experts{f' of {base}' if base else ''}"
        )
