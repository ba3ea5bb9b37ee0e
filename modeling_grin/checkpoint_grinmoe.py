"""Checkpoints: how the released tensors become the model's parameters, and what is wrong when they do not.

Names are the same but for the experts: a file has one matrix per expert, `experts.{e}.w1.weight` (gate), `w3` (up) and
`w2` (down); the model has fused parameters, `experts.gate_up_proj` `[E, 2F, H]` (w1 above w3) and `experts.down_proj`
`[E, H, F]`. Files in the fused layout are read, too. Experts of `nn.Linear` modules (`linear_experts_grinmoe.py`) have
the names of the files. E experts, F intermediate_size, H hidden_size.
"""

import copy
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.hub import cached_file

from .linear_experts_grinmoe import is_quantized

# Fused parameter -> the released matrices of each expert that it holds, in this order.
EXPERT_WEIGHTS = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}

NEW_TASK_HEAD = "score.weight"

UNQUANTIZED_DTYPES = ("F64", "F32", "F16", "BF16")  # as safetensors spells them


class CheckpointMismatch(ValueError, RuntimeError):
    """The tensors of a checkpoint do not fit the model. RuntimeError is what transformers raises for shapes."""


def may_be_new(name: str) -> bool:
    """Whether a checkpoint may lack this tensor: the head of a new task, or a scale that begins as ones."""
    return name == NEW_TASK_HEAD or name.endswith(".output_scale")


def new_heads(model: PreTrainedModel, missing: Iterable[str]) -> set[str]:
    """Those of the `missing` tensors that may be new, as in transformers, which initialises and reports them.

    A decoder is never new, nor is a part of a head: of a head's module all tensors are missing. Others are what the
    class lists in `_keys_to_ignore_on_load_missing`, and what `may_be_new` says.
    """
    decoders = {name.split(".")[0] for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    absent = {*missing, *model.all_tied_weights_keys}
    # A model that is a decoder itself is the module "": it has no head.
    kept = {name.split(".")[0] for name in model.state_dict() if name not in absent} | (decoders - {""})
    ignored = model._keys_to_ignore_on_load_missing or ()
    return {
        name
        for name in missing
        if (decoders != {""} and name.split(".")[0] not in kept)
        or may_be_new(name)
        or any(re.search(pattern, name) for pattern in ignored)
    }


def released_names(names: Iterable[str], num_experts: int) -> set[str]:
    """`names`, those of fused experts replaced with the names of the released matrices they hold."""
    released = set()
    for name in names:
        module, _, attribute = name.rpartition(".")
        parts = EXPERT_WEIGHTS.get(attribute)
        if parts is None:
            released.add(name)
        else:
            released |= {f"{module}.{expert}.{part}.weight" for expert in range(num_experts) for part in parts}
    return released


def refuse_left_out(model: PreTrainedModel, args: tuple) -> None:
    """Forward hook of a model that a non-strict `load_state_dict` has not filled."""
    if names := sorted(model._left_out):
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise ValueError(
            f"{len(names)} tensor(s) of {type(model).__name__} were not in what load_state_dict(strict=False) was "
            f"given and kept their old values: {shown}. The checkpoint is incomplete or another model's; if the old "
            "values are wanted, say so by model.load_state_dict(model.state_dict())."
        )


class FuseExperts(ConversionOps):
    """The released matrices of all experts `[rows, columns]`, in their files' pages or on a device, as one parameter.

    transformers' own operations stack w1, stack w3 and concatenate the two, into new pages each time; getting pages
    from the system costs more than copying. Here each matrix is copied once, into its place.
    """

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs,
    ) -> dict[str, torch.Tensor]:
        """`[E, parts * rows, columns]`; the experts are all, or those that this rank has, and so are rows and columns.

        Raises:
            ValueError: an expert lacks one of its matrices, or has one of another shape than the others'.
        """
        parts = [input_dict.pop(pattern) for pattern in source_patterns]
        if len(shapes := {tuple(matrix.shape) for part in parts for matrix in part}) > 1:
            raise ValueError(f"{' and '.join(source_patterns)} have different shapes: {sorted(shapes)}")
        matrices = [matrix for expert in zip(*parts, strict=True) for matrix in expert]
        return {target_patterns[0]: torch.cat(matrices).unflatten(0, (len(parts[0]), -1))}

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitExperts()


class SplitExperts(ConversionOps):
    """A fused parameter as the released matrices: views of it, for files that are about to be written."""

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs,
    ) -> dict[str, torch.Tensor]:
        """Names with the expert's number in the place of `*`, and `[rows, columns]` each."""
        (fused,) = input_dict[source_patterns[0]]
        parts = zip(target_patterns, fused.chunk(len(target_patterns), dim=1), strict=True)
        return {name.replace("*", str(expert)): matrix for name, part in parts for expert, matrix in enumerate(part)}

    @property
    def reverse_op(self) -> ConversionOps:
        return FuseExperts()


class ExpertConverter(WeightConverter):
    """Between the released experts and the fused ones; adapters of single experts (`w1.lora_A`) stay what they are.

    peft applies the conversions of a model's type to its adapters, too, and asks nobody whether the model is fused.
    """

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return (source_key, None) if ".lora_" in source_key else super().rename_source_key(source_key)


def register_expert_layout(model_type: str) -> None:
    """Register the released layout with transformers: `from_pretrained` then fuses, `save_pretrained` splits again."""
    mapping = [
        ExpertConverter(
            source_patterns=[f".experts.*.{part}.weight" for part in parts],
            target_patterns=f".experts.{name}",
            operations=[FuseExperts()],
        )
        for name, parts in EXPERT_WEIGHTS.items()
    ]
    register_checkpoint_conversion_mapping(model_type, mapping, overwrite=True)


def fuse_expert_weights(
    experts: nn.Module, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
) -> None:
    """`load_state_dict` hook: accept the released layout, `{prefix}{expert}.w1.weight` and so on, whole or in part.

    Trainer resumes by giving a checkpoint's tensors, shard by shard, to `load_state_dict(strict=False)`, where names
    that match nothing would leave the experts as they are with no more than a warning.
    """
    for name, parts in EXPERT_WEIGHTS.items():
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
            # `assign=True`: what is built here becomes the parameter, in the checkpoint's dtype and also in place of a
            # meta one; NaN stands for the experts that no shard has brought yet.
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
                error_msgs.append(
                    f"size mismatch for {key}: {tuple(tensor.shape)} in the checkpoint, "
                    f"{tuple(target.shape)} in the model."
                )
        state_dict[f"{prefix}{name}"] = fused
        missing_keys.extend(key for key in slots if key not in found)


def refuse_other_adapters(
    experts: nn.Module, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
) -> None:
    """`load_state_dict` hook: refuse LoRA weights made for the other kind of expert modules.

    peft loads adapters with `strict=False`: the experts' part would be lost with no more than a warning.
    """
    adapters = [key for key in state_dict if key.startswith(prefix) and ".lora_" in key[len(prefix) - 1 :]]
    if adapters and adapters[0] not in experts.state_dict(prefix=prefix):
        error_msgs.append(
            f"{adapters[0]} was trained on other modules than {type(experts).__name__}: load the model with "
            "experts_implementation='linear' for adapters of w1, w2 and w3, and without it for those of gate_up_proj "
            "and down_proj."
        )


def describe_unquantized(model: PreTrainedModel) -> PreTrainedModel:
    """The model that a quantiser has changed, as it was built: its names and shapes, without storage."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"), init.no_init_weights():
        return type(model)(config)


def set_quantized_matrices_aside(
    model: PreTrainedModel, found: dict[str, tuple[list[int], str, str]], needed: dict[str, list[int]]
) -> list[str]:
    """Take what a quantised checkpoint has instead of matrices out of `found` and `needed`; return what is wrong.

    Of a matrix a quantiser makes tensors beside or under its name, `weight.absmax`, `qweight`, `_weight_scale`, ...:
    that there are some is what can be said here, and whether they are complete is found when they are read.
    """
    prefix = f"{model.base_model_prefix}."
    unprefixed = {name.removeprefix(prefix): name for name in needed}
    matrices = {short.removesuffix(".weight") for short, name in unprefixed.items() if len(needed[name]) == 2}
    problems = []
    for name, (shape, where, dtype) in list(found.items()):
        owner = name
        while owner and owner not in matrices:
            owner = owner.rpartition(".")[0]
        if not owner or (name in unprefixed and name != f"{owner}.weight"):
            continue  # of no matrix, or a bias
        matrix = unprefixed[f"{owner}.weight"]
        module = model.get_submodule(matrix.removesuffix(".weight"))
        replaced = isinstance(module, nn.Linear) and is_quantized(module)
        whole = name == f"{owner}.weight" and dtype in UNQUANTIZED_DTYPES  # and some quantisers store bytes as floats
        if not whole or (replaced and shape != needed.get(matrix)):
            del found[name]
            needed.pop(matrix, None)
        elif replaced:
            problems.append(
                f"{where} is not quantised: list {owner.rpartition('.')[2]!r} among the modules that the config's "
                "quantization_config leaves alone"
            )
    return problems


def check_tensors(
    model: PreTrainedModel,
    checkpoint_files: list[str],
    load_config: LoadStateDictConfig,
    *,
    heads_may_be_new: bool = True,
) -> None:
    """Compare the names and shapes in the files' headers with what `model` needs, in either layout of the experts.

    Args:
        load_config: transformers' settings of this load: its renamings (`key_mapping`) are applied first, with
            `ignore_mismatched_sizes` tensors may have another shape, and of matrices that are quantised in the files
            some tensor must be there.
        heads_may_be_new: whether the files may lack what `new_heads` says.

    Raises:
        CheckpointMismatch: tensors are missing or mis-shaped, or there are some that the model has no place for
            (those of another task's head aside).
    """
    prefix = f"{model.base_model_prefix}."  # checkpoints of the bare model lack it
    renamings = [entry for entry in load_config.weight_mapping or [] if isinstance(entry, WeightRenaming)]
    found: dict[str, tuple[list[int], str, str]] = {}  # name without the prefix -> shape, "name in file", dtype
    for file in checkpoint_files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                renamed = name
                for renaming in renamings:
                    renamed, _ = renaming.rename_source_key(renamed)
                renamed = renamed.removeprefix(prefix)
                header = tensors.get_slice(name)
                found[renamed] = header.get_shape(), f"{name} in {file}", header.get_dtype()

    needed: dict[str, list[int]] = {}
    quantizer = load_config.hf_quantizer
    described = model if quantizer is None else describe_unquantized(model)
    for name, parameter in described.state_dict().items():
        module, _, attribute = name.rpartition(".")
        if attribute in EXPERT_WEIGHTS and name.removeprefix(prefix) not in found:
            num_experts, rows, columns = parameter.shape
            parts = EXPERT_WEIGHTS[attribute]
            for expert in range(num_experts):
                for part in parts:
                    needed[f"{module}.{expert}.{part}.weight"] = [rows // len(parts), columns]
        else:
            needed[name] = list(parameter.shape)

    modules = {name.removeprefix(prefix).split(".")[0] for name in needed}
    problems = []
    if quantizer is not None and quantizer.pre_quantized:
        problems += set_quantized_matrices_aside(model, found, needed)
    missing = [name for name in needed if name.removeprefix(prefix) not in found]
    may_miss = {*model.all_tied_weights_keys, *filter(may_be_new, missing)}
    may_miss |= new_heads(described, missing) if heads_may_be_new else set()
    problems += [f"{name} is missing" for name in missing if name not in may_miss]
    for name, shape in needed.items():
        found_shape, where, _ = found.pop(name.removeprefix(prefix), (shape, "", ""))
        if found_shape != shape and not load_config.ignore_mismatched_sizes:
            problems.append(f"{where} has shape {found_shape}, the config says {shape}")
    # What is left has no place: layers, experts or biases that the config does not know of. The head of another task
    # may be left; this model has no module of its name.
    problems += [
        f"{where} is not part of the model that the config describes"
        for name, (_, where, _) in found.items()
        if name.split(".")[0] in modules
    ]
    if problems:
        shown = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
        if any(name.endswith(".experts.gate_up_proj") for name in found):
            shown += '. Its experts are fused: load it without experts_implementation="linear" and quantization_config'
            shown += ", save it with save_pretrained, and load that"
        raise CheckpointMismatch(
            f"{len(problems)} tensor(s) of the checkpoint do not fit {type(model).__name__}: {shown}"
        )


def is_readable(path: Path) -> bool:
    """Whether a safetensors file, or the index of some, is whole."""
    try:
        if path.suffix == ".json":
            index = json.loads(path.read_text(encoding="utf-8"))
            files = index["weight_map"].values()
            return (
                isinstance(index["metadata"], dict) and len(files) > 0 and all(isinstance(file, str) for file in files)
            )
        safe_open(path, framework="pt").__exit__(None, None, None)
    except (SafetensorError, ValueError, RecursionError, KeyError, TypeError, AttributeError):  # no JSON, or no text
        return False
    return True


def find_damaged_files(pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> list[str]:
    """The safetensors files and JSON indices beside the checkpoint's config.json that cannot be read."""
    hub_kwargs = {key: kwargs[key] for key in ("cache_dir", "revision", "subfolder", "token") if key in kwargs}
    try:
        config_file = cached_file(pretrained_model_name_or_path, "config.json", local_files_only=True, **hub_kwargs)
    except OSError:  # no such checkpoint
        config_file = None
    if config_file is None:
        return []
    return [str(path) for path in sorted(Path(config_file).parent.glob("*.safetensors*")) if not is_readable(path)]
