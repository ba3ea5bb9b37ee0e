"""Merge LoRA adapters into their base model."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from modeling_grin.layout_grinmoe import EXPERT_WEIGHTS
from modeling_grin.linear_experts_grinmoe import LINEAR_EXPERTS
from modeling_grin.patterns_grinmoe import adaptable_names, check_patterns

from .checkpoint import Checkpoint
from .forms import check_fit, released_tensors
from .headers import ADAPTER_CONFIG_FILE, read_adapter_config
from .tensors import ConversionError, StoredTensor, read_tensors
from .verify import load_model

ADAPTER_FILE = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # of every name in it


def find_base(adapter: Path, base: Path | None) -> Path:
    """Return the folder of an adapter's base model: `base`, or what the adapter's config names; nothing is fetched."""
    named = base if base is not None else read_adapter_config(adapter)["base_model_name_or_path"]
    if named is None or not Path(named).is_dir():
        raise ConversionError(f"the base model of {adapter}, {named}, is not a folder: give it with --base FOLDER")
    return Path(named)


def read_adapter(folder: Path) -> dict[str, StoredTensor]:
    """Return an adapter's tensors, unread, by the names that peft gives them."""
    if not (folder / ADAPTER_FILE).is_file():
        raise ConversionError(f"{folder} has no {ADAPTER_FILE}: load the adapter with peft, and save it again")
    return read_tensors(folder / ADAPTER_FILE)


def merge_adapter(adapter: Path, checkpoint: Checkpoint, dtype: torch.dtype | None) -> Checkpoint:
    """Merge a LoRA adapter into its base model, matrix by matrix when they are read; the merge is proven, or refused.

    With DoRA and the like the whole model is in memory, up to twice.

    Args:
        checkpoint: the base model, of any form.
        dtype: what is merged in; by default the base's own.

    Returns:
        A checkpoint of form `adapter`, with the base's path: tokenizer and generation settings are there.

    Raises:
        ConversionError: adapter and base do not fit, tensor by tensor, or rounding loses the adapter's change.
    """
    try:
        from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
        from peft.tuners.tuners_utils import BaseTunerLayer

        from modeling_grin.lora import is_plain
    except ImportError as error:
        raise ConversionError("merging an adapter needs peft: pip install 'grin-moe[train]'") from error

    adapter_config, found = read_adapter_config(adapter), read_adapter(adapter)
    base, dtypes = checkpoint.path, {tensor.dtype for tensor in checkpoint.tensors.values()}
    if dtype is None and len(dtypes) > 1:
        raise ConversionError(f"{base} has tensors of {', '.join(sorted(map(str, dtypes)))}: choose one with --dtype")
    config = copy.deepcopy(checkpoint.config)
    if any(".block_sparse_moe.experts.0." in name for name in found):
        config._experts_implementation = LINEAR_EXPERTS
    try:
        with torch.device("meta"):
            skeleton = checkpoint.model_class(config)
            check_patterns(adapter_config, adaptable_names(skeleton), adapter / ADAPTER_CONFIG_FILE)
            adapted = get_peft_model(skeleton, PeftConfig.from_pretrained(str(adapter)))
    except Exception as error:  # of any type: peft meets a config that anybody may have written
        raise ConversionError(f"{adapter} does not fit {base}: {error}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(adapted).items()}
    check_fit(found, shapes, str(adapter), str(base))
    layers = {n: m for n, m in adapted.get_base_model().named_modules() if isinstance(m, BaseTunerLayer)}
    if all(map(is_plain, layers.values())):
        merged = {**checkpoint.tensors, **merge_matrices(layers, found, checkpoint, dtype, adapter)}
        in_full = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in found.items() if ".lora_" not in name}
        return Checkpoint(base, "adapter", checkpoint.config, {**merged, **in_full})
    return merge_in_memory(adapter, replace(checkpoint, config=config), dtype)


def merge_matrices(
    layers: Mapping[str, Any],
    found: Mapping[str, StoredTensor],
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
    adapter: Path,
) -> dict[str, StoredTensor]:
    """Return the released matrices with the adapters `found`, added in float32 whenever a matrix is read.

    All are read once before: rounding to `dtype`, by default the base's, must not lose a layer's change.
    """
    from modeling_grin.lora import check_loss

    merged: dict[str, StoredTensor] = {}
    for layer_name, layer in layers.items():
        (scaling,) = layer.scaling.values()
        a, b = (found[f"{PEFT_PREFIX}{layer_name}.lora_{factor}.weight"].read().float() for factor in "AB")
        name = layer_name.replace(".base_layer", "")
        if parameter := getattr(layer, "parameter_name", None):
            num_experts, parts = layer.num_experts, EXPERT_WEIGHTS[parameter]
            a, b = a.unflatten(0, (num_experts, -1)), b.unflatten(1, (-1, num_experts)).movedim(2, 0)
            matrices = {
                f"{name}.{expert}.{part}.weight": (a[expert], rows)
                for expert in range(num_experts)
                for part, rows in zip(parts, b[expert].chunk(len(parts)), strict=True)
            }
        else:
            matrices = {f"{name}.weight": (a, b)}
        squares = torch.zeros(3, dtype=torch.float64)  # of the loss, of the change, of the weight
        for matrix, (own_a, own_b) in matrices.items():
            stored = replace(checkpoint.tensors[matrix], dtype=dtype or checkpoint.tensors[matrix].dtype)
            read = partial(add_product, stored, scaling * own_b, own_a)
            merged[matrix] = replace(stored, read=read, path=None)
            weight, result, change = stored.read().to(stored.dtype).float(), read().float(), scaling * own_b @ own_a
            squares += torch.stack([(result - weight - change).norm(), change.norm(), weight.norm()]).double().square()
        lost, change_norm, norm = squares.sqrt().tolist()
        try:
            check_loss(name, lost, change_norm, torch.finfo(torch.float32).eps * norm)
        except ValueError as error:
            raise ConversionError(f"{adapter}: {error}") from error
    return merged


def add_product(weight: StoredTensor, b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Return `weight + b @ a` in the dtype that `weight` is to have."""
    return torch.addmm(weight.read().to(weight.dtype).float(), b, a).to(weight.dtype)


def merge_in_memory(adapter: Path, checkpoint: Checkpoint, dtype: torch.dtype | None) -> Checkpoint:
    """`merge_adapter` with the whole model, by `merge_lora`."""
    from peft import PeftModel

    from modeling_grin.lora import merge_lora

    base = checkpoint.path
    try:
        merged = merge_lora(PeftModel.from_pretrained(load_model(checkpoint, dtype), str(adapter)))
    except ValueError as error:
        raise ConversionError(f"{adapter}: {error}") from error
    stored = {
        name: StoredTensor(tuple(tensor.shape), tensor.dtype, f"merged {name}", partial(torch.Tensor.detach, tensor))
        for name, tensor in merged.state_dict().items()
    }
    _, tensors = released_tensors(stored, checkpoint.config, f"{base} with {adapter}")
    return Checkpoint(base, "adapter", checkpoint.config, tensors)
