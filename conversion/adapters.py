"""Merge LoRA adapters into their base model."""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from modeling_grin.linear_experts_grinmoe import LINEAR_EXPERTS
from modeling_grin.patterns_grinmoe import adaptable_names, check_patterns

from .checkpoint import Checkpoint
from .forms import model_class_of, released_tensors
from .headers import ADAPTER_CONFIG_FILE, read_adapter_config
from .tensors import ConversionError, StoredTensor, read_tensors
from .verify import load_model

ADAPTER_FILE = "adapter_model.safetensors"


def find_base(adapter: Path, base: Path | None) -> Path:
    """Return the folder of an adapter's base model: `base`, or what the adapter's config names.

    Raises:
        ConversionError: there is no such folder; nothing is fetched.
    """
    named = base if base is not None else read_adapter_config(adapter)["base_model_name_or_path"]
    if named is None or not Path(named).is_dir():
        raise ConversionError(f"the base model of {adapter}, {named}, is not a folder: give it with --base FOLDER")
    return Path(named)


def read_adapter(folder: Path) -> dict[str, StoredTensor]:
    """Return an adapter's tensors, unread, by the names that peft gives them."""
    if not (folder / ADAPTER_FILE).is_file():
        raise ConversionError(
            f"{folder} has no {ADAPTER_FILE}: load the adapter with peft and save it again with safe_serialization"
        )
    return read_tensors(folder / ADAPTER_FILE)


def merge_adapter(adapter: Path, checkpoint: Checkpoint, dtype: torch.dtype | None) -> Checkpoint:
    """Merge a LoRA adapter into its base model; the merge is proven, or refused.

    The whole model is in memory, up to twice.

    Args:
        checkpoint: the base model, of any form.
        dtype: what the base is loaded and merged in; by default its own.

    Returns:
        A checkpoint of form `adapter`, with the base's path: tokenizer and generation settings are there.

    Raises:
        ConversionError: adapter and base do not fit, tensor by tensor; merged logits differ from those with the
            adapter on (`merge_lora`); peft is not installed.
    """
    try:
        from peft import PeftModel, get_peft_model_state_dict

        from modeling_grin.lora import merge_lora
    except ImportError as error:
        raise ConversionError("merging an adapter needs peft: pip install 'grin-moe[train]'") from error

    adapter_config, found = read_adapter_config(adapter), read_adapter(adapter)
    base, dtypes = checkpoint.path, {tensor.dtype for tensor in checkpoint.tensors.values()}
    if dtype is None and len(dtypes) > 1:
        raise ConversionError(f"{base} has tensors of {', '.join(sorted(map(str, dtypes)))}: choose one with --dtype")
    config = copy.deepcopy(checkpoint.config)
    if any(".block_sparse_moe.experts.0." in name for name in found):
        config._experts_implementation = LINEAR_EXPERTS
    with torch.device("meta"):
        skeleton = model_class_of(checkpoint.tensors)(config)
    try:
        check_patterns(adapter_config, adaptable_names(skeleton), adapter / ADAPTER_CONFIG_FILE)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    model = load_model(replace(checkpoint, config=config), dtype)
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter))
    except Exception as error:  # of any type: peft meets a config that anybody may have written
        raise ConversionError(f"{adapter} does not fit {base}: {error}") from error
    # peft warns about tensors that it has no place for, and leaves missing ones as they were initialised.
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
