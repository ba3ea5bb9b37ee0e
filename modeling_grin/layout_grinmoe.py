"""Layout of the experts: how the released tensors become the model's parameters, and back.

Names are the same except for the experts: a file has one matrix per expert, `experts.{e}.w1.weight` (gate), `w3` (up)
and `w2` (down); the model has fused parameters, `experts.gate_up_proj` `[E, 2F, H]` (w1 above w3) and
`experts.down_proj` `[E, H, F]`. Files in the fused layout load as well. Experts of `nn.Linear` modules
(`linear_experts_grinmoe.py`) have the files' names. E experts, F intermediate_size, H hidden_size.
"""

from collections.abc import Iterable

import torch
from torch import nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter

# Fused parameter -> the released matrices of each expert that it holds, in this order.
EXPERT_WEIGHTS = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}


def released_names(names: Iterable[str], num_experts: int) -> set[str]:
    """Replace the names of fused experts in `names` with the names of the released matrices they hold."""
    released = set()
    for name in names:
        module, _, attribute = name.rpartition(".")
        parts = EXPERT_WEIGHTS.get(attribute, ())
        released |= {f"{module}.{expert}.{part}.weight" for expert in range(num_experts) for part in parts} or {name}
    return released


class FuseExperts(ConversionOps):
    """The released matrices of all experts `[rows, columns]`, in their files' pages or on a device, as one parameter.

    transformers' own operations stack w1, stack w3 and concatenate both, into new pages each time; getting pages from
    the system costs more than copying. This one copies each matrix once, into its place.
    """

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs) -> dict[str, torch.Tensor]:
        """`[E, parts * rows, columns]`; of all experts, rows and columns, or of this rank's.

        Raises:
            ValueError: experts differ in their matrices or in these matrices' shapes.
        """
        parts = [input_dict.pop(pattern) for pattern in source_patterns]
        if len({len(part) for part in parts}) > 1:
            counts = " and ".join(f"{len(part)} {name}" for part, name in zip(parts, source_patterns, strict=True))
            raise ValueError(f"an expert lacks a matrix: there are {counts}")
        if len(shapes := {tuple(matrix.shape) for part in parts for matrix in part}) > 1:
            raise ValueError(f"{' and '.join(source_patterns)} have different sizes: {sorted(shapes)}")
        matrices = [matrix for expert in zip(*parts, strict=True) for matrix in expert]
        return {target_patterns[0]: torch.cat(matrices).unflatten(0, (len(parts[0]), -1))}

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitExperts()


class SplitExperts(ConversionOps):
    """Splits a fused parameter into views, the released matrices, for files that are about to be written."""

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs) -> dict[str, torch.Tensor]:
        """Names, with the expert's number in the place of `*`, and `[rows, columns]` each."""
        (fused,) = input_dict[source_patterns[0]]
        parts = zip(target_patterns, fused.chunk(len(target_patterns), dim=1), strict=True)
        return {name.replace("*", str(expert)): matrix for name, part in parts for expert, matrix in enumerate(part)}

    @property
    def reverse_op(self) -> ConversionOps:
        return FuseExperts()


class ExpertConverter(WeightConverter):
    """Converts between released and fused experts, and leaves adapters of single experts (`w1.lora_A`) alone.

    peft also applies a model type's conversions to its adapters, whether the model is fused or not.
    """

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return (source_key, None) if ".lora_" in source_key else super().rename_source_key(source_key)


def register_expert_layout(model_type: str) -> None:
    """Make `from_pretrained` fuse the experts of a model type, and `save_pretrained` split them again."""
    mapping = [
        ExpertConverter(
            source_patterns=[f".experts.*.{part}.weight" for part in parts],
            target_patterns=f".experts.{name}",
            operations=[FuseExperts()],
        )
        for name, parts in EXPERT_WEIGHTS.items()
    ]
    register_checkpoint_conversion_mapping(model_type, mapping, overwrite=True)


def read_either_layout(
    experts: nn.Module, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
) -> None:
    """A `load_state_dict` hook of a layer's experts: fuse released matrices, all or some, and refuse foreign adapters.

    Trainer and peft load with `strict=False`, which only warns about names that it does not know.
    """
    adapters = [key for key in state_dict if key.startswith(prefix) and ".lora_" in key[len(prefix) - 1 :]]
    if adapters and adapters[0] not in experts.state_dict(prefix=prefix):
        error_msgs.append(
            f"{adapters[0]} was trained on other modules than {type(experts).__name__}: load the model with "
            "experts_implementation='linear' for adapters of w1, w2 and w3, and without it for adapters of "
            "gate_up_proj and down_proj."
        )
    for name, parts in EXPERT_WEIGHTS.items():
        if not hasattr(experts, name):  # `nn.Linear` modules, which have the files' names
            return
        parameter = getattr(experts, name).detach()
        slots = {
            f"{prefix}{expert}.{part}.weight": (expert, i)
            for expert in range(parameter.shape[0])
            for i, part in enumerate(parts)
        }
        found = [key for key in slots if key in state_dict]
        if not found:
            continue
        if local_metadata.get("assign_to_params_buffers"):
            # `assign=True`: this tensor becomes the parameter, in the checkpoint's dtype, even in place of a meta one.
            # NaN marks the experts that no shard has supplied yet.
            first = state_dict[found[0]]
            fused = torch.full_like(parameter, torch.nan, dtype=first.dtype, device=first.device)
            if not parameter.is_meta:
                fused.copy_(parameter)
        else:
            fused = parameter.clone()
        matrices = fused.unflatten(1, (len(parts), -1))  # [E, parts, rows, columns]
        for key in found:
            tensor, target = state_dict.pop(key), matrices[slots[key]]
            if tensor.shape == target.shape:
                target.copy_(tensor)
            else:
                shapes = f"{tuple(tensor.shape)} in the checkpoint, {tuple(target.shape)} in the model."
                error_msgs.append(f"size mismatch for {key}: {shapes}")
        state_dict[f"{prefix}{name}"] = fused
        missing_keys.extend(key for key in slots if key not in found)
