"""4-bit layers of models that are spread over ranks: each rank keeps its part of their packed bytes.

transformers shards a weight while it reads it, and bitsandbytes packs whole matrices. Here a layer gets the shape of
its packed bytes before it is sharded, and each rank then packs one matrix after the other and keeps its part. The
scales are whole on every rank.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel


def pack_layers(model: nn.Module) -> None:
    """Give bitsandbytes' 4-bit layers on the meta device weights of packed bytes, `[bytes, 1]`, which can be sharded.

    Bytes, whatever the config's `bnb_4bit_quant_storage`: FSDP2 casts floats. 8-bit layers raise ValueError.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            raise ValueError("weights that are spread over ranks must not have 8 bits: use load_in_4bit, or DDP")
        if type(module).__name__ == "Linear4bit":
            layer: Any = module
            kind: Any = type(layer.weight)
            layer.pack = partial(kind, **{**vars(layer.weight), "quant_storage": torch.uint8})
            packed = torch.empty((layer.weight.numel() + 1) // 2, 1, dtype=torch.uint8, device="meta")
            layer.weight = nn.Parameter(packed, requires_grad=False)


def packed_layers(model: nn.Module) -> dict[str, Any]:
    """Name of the weight -> layer, of the layers that `pack_layers` has changed."""
    return {f"{name}.weight": module for name, module in model.named_modules() if hasattr(module, "pack")}


def open_tensors(files: Iterable[Any]) -> dict[str, Any]:
    """Name -> slice of the tensors in safetensors files, none of which is read."""
    opened = [safe_open(file, framework="pt") for file in files]
    return {name: tensors.get_slice(name) for tensors in opened for name in tensors.keys()}  # noqa: SIM118


def load_packed(model: PreTrainedModel, tensors: dict[str, Any], device: torch.device | str) -> set[str]:
    """Fill the packed layers from a checkpoint in 16, 32 or 4 bits, and take what they need out of `tensors`; return
    the names of the weights that were there."""
    prefix, loaded = f"{model.base_model_prefix}.", set()  # a bare decoder's names lack it
    for name, layer in packed_layers(model).items():
        stem, place = name.removeprefix(prefix), layer.weight
        # With 4 bits, `weight.absmax` and others are beside the weight.
        parts = {key: tensors.pop(key)[:] for key in [*tensors] if key.removeprefix(prefix).startswith(stem)}
        data = next((parts.pop(key) for key in [*parts] if key.endswith(stem)), None)
        if data is None:
            continue
        weight: Any
        if parts:
            weight = layer.pack.func.from_prequantized(data.view(torch.uint8), parts, False, device, layer)
        else:
            weight = layer.pack(data.to(device, model.dtype)).to(device)  # packs when it is moved
        if isinstance(place, DTensor):
            (size, _), (start, _) = compute_local_shape_and_global_offset(
                place.shape, place.device_mesh, place.placements
            )
            part = DTensor.from_local(
                weight.data[start : start + size].clone(), place.device_mesh, place.placements, run_check=False,
                shape=place.shape, stride=place.stride(),
            )  # fmt: skip
            weight = nn.Parameter(part, requires_grad=False)
        weight._is_hf_initialized = True
        layer.weight = weight
        loaded.add(name)
    return loaded
