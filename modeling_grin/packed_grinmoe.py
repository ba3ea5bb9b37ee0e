"""4-bit layers of models that are spread over ranks: each rank keeps its part of their packed bytes.

transformers shards a weight while it reads it, and bitsandbytes packs whole matrices. Here a layer gets the shape of
its packed bytes before it is sharded, and each rank then packs one matrix after the other and keeps its part. The
scales are whole on every rank.
"""

from collections.abc import Iterable
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel


def packed_layers(model: nn.Module) -> dict[str, Any]:
    """Name of the weight -> layer, of the layers that `pack_layers` has changed."""
    return {f"{name}.weight": module for name, module in model.named_modules() if hasattr(module, "packing")}


def pack_layers(model: nn.Module) -> None:
    """Give bitsandbytes' 4-bit layers on the meta device weights of packed bytes, `[bytes, 1]`, which can be sharded.

    Bytes, whatever the config's `bnb_4bit_quant_storage`: FSDP2 casts floats in mixed precision.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.packing = {**module.weight.__dict__, "quant_storage": torch.uint8}  # type: ignore[assignment]
            packed = torch.empty((module.weight.numel() + 1) // 2, 1, dtype=torch.uint8, device="meta")
            module.weight = nn.Parameter(packed, requires_grad=False)


def packed_weight(layer: Any, data: torch.Tensor, **changes: Any) -> nn.Parameter:
    """A 4-bit weight of `layer`; a whole matrix is packed when it is moved to a device."""
    from bitsandbytes.nn import Params4bit  # an optional package

    return Params4bit(data, **{**layer.packing, **changes})


def open_tensors(files: Iterable[Any]) -> dict[str, Any]:
    """Name -> slice of the tensors in safetensors files, none of which is read."""
    opened = [safe_open(file, framework="pt") for file in files]
    return {name: tensors.get_slice(name) for tensors in opened for name in tensors.keys()}  # noqa: SIM118


def load_packed(model: PreTrainedModel, tensors: dict[str, Any], device: torch.device | str) -> set[str]:
    """Fill the packed layers from a checkpoint in 16, 32 or 4 bits, and take their tensors out of `tensors`.

    Returns:
        The names of the weights that the checkpoint had.
    """
    from bitsandbytes.nn import Params4bit

    prefix, loaded = f"{model.base_model_prefix}.", set()  # a bare decoder's names lack it
    own: dict[str, list[str]] = {}
    for key in tensors:
        own.setdefault(key.removeprefix(prefix).partition(".weight")[0] + ".weight", []).append(key)
    for name, layer in packed_layers(model).items():
        keys = own.get(name.removeprefix(prefix), [])
        parts = {key: tensors.pop(key)[:] for key in keys}
        weight = next((parts.pop(key) for key in keys if key.endswith(".weight")), None)
        if weight is None:
            continue
        loaded.add(name)
        if parts:
            whole = Params4bit.from_prequantized(weight.view(torch.uint8), parts, device=device, module=layer)
        else:
            whole = packed_weight(layer, weight.to(device, model.dtype)).to(device)
        place = layer.weight
        if isinstance(place, DTensor):
            shape, offset = compute_local_shape_and_global_offset(place.shape, place.device_mesh, place.placements)
            part = whole.data[offset[0] : offset[0] + shape[0]].clone()
            whole = DTensor.from_local(
                part, place.device_mesh, place.placements, run_check=False, shape=place.shape, stride=place.stride()
            )
        layer.weight = nn.Parameter(whole, requires_grad=False) if isinstance(whole, DTensor) else whole
        layer.weight._is_hf_initialized = True
    return loaded
