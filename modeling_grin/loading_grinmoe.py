"""Loading policy: every tensor of a checkpoint finds its place, and every parameter its tensor, or loading raises.

transformers finds missing, unexpected and mis-shaped tensors, and warns about some of them. This mixin turns its
`loading_info` into one error that names them.
"""

import importlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import GenerationMixin, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import find_adapter_config_file, is_peft_available
from transformers.utils.hub import cached_file

from .carried_estimator_grinmoe import HUB_ARGUMENTS, load_estimator
from .compat_grinmoe import require_layouts
from .configuration_grinmoe import GrinMoeConfig
from .layout_grinmoe import ExpertConverter, register_expert_layout, released_names
from .linear_experts_grinmoe import (
    LINEAR_EXPERTS,
    GrinMoeLinearExperts,
    check_quantized,
    disable_bnb_cpu_repacking,
    exclude_router_from_quantization,
)
from .packed_grinmoe import load_packed, open_tensors, pack_layers, packed_layers
from .patterns_grinmoe import adaptable_names, check_patterns

# Implementations that do not call `GrinMoeExperts._apply_gate`, which has the dropout.
WITHOUT_DROPOUT = {"eager", "sonicmoe"}
FUSED_EXPERTS = (
    '. Its experts are fused: load it without experts_implementation="linear" and quantization_config, save it with '
    "save_pretrained, and load that"
)


class CheckpointMismatch(ValueError, RuntimeError):
    """The tensors of a checkpoint do not fit the model. RuntimeError is what transformers raises for shapes."""


class GrinMoeLoadingMixin(PreTrainedModel):
    """Strict loading, the layouts of the experts, and quantised checkpoints."""

    default_experts_implementation: str | None = None
    """Implementation to use if none is asked for; None: transformers' choice. The package sets its own."""

    _missing_tensors: set[str] | None = None
    """After a non-strict `load_state_dict`: the released names that no state dict has supplied yet."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # Here and not in the package's __init__: these lines serve subclasses with a model type of their own, and
        # travel to the Hub with a checkpoint's code.
        if cls.config_class is not None:
            model_type, names = cls.config_class.model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
            register_expert_layout(model_type)
            # The Auto classes' `register` leaves this table alone. For its classes Trainer shifts the labels of label
            # smoothing; pipelines, model cards and lm-eval read it as well.
            if issubclass(cls, GenerationMixin) and cls.__name__ not in names.values():
                names[cls.__name__ if model_type in names else model_type] = cls.__name__

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """`PreTrainedModel.from_pretrained`, from safetensors only, that loads every tensor or raises.

        With `trust_remote_code=True` it runs the file of a user's own estimator that the checkpoint carries.

        Raises:
            ValueError: the checkpoint lacks a tensor that the model needs (a new head aside), has it in another shape
                (unless `ignore_mismatched_sizes`), has tensors without a place, or one of its files is damaged.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors=False would load a pickle, which can run any code; convert it first")
        kwargs["use_safetensors"] = True
        if kwargs.get("distributed_config") is not None or kwargs.get("tp_plan") is not None:
            require_layouts()
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = exclude_router_from_quantization(kwargs["quantization_config"])
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except Exception as error:  # damaged files end in many types: SafetensorError, JSONDecodeError, KeyError, ...
            if damaged := ", ".join(find_damaged_files(pretrained_model_name_or_path, **kwargs)):
                raise ValueError(
                    f"{damaged}: damaged ({type(error).__name__}: {error}). Download or copy it again."
                ) from error
            raise
        model = loaded[0] if kwargs.get("output_loading_info") else loaded
        # Forget which conversions this checkpoint needed: `save_pretrained` writes the released layout in any case.
        model._weight_conversions = None
        if getattr(model, "is_quantized", False):
            check_quantized(model)
            disable_bnb_cpu_repacking(model)
        for module in model.modules():
            if hasattr(module, "freeze_router"):
                module.freeze_router()  # once more: loading has made new parameters
        if kwargs.get("trust_remote_code") and pretrained_model_name_or_path is not None:
            load_estimator(model.config.router_estimator, pretrained_model_name_or_path, **kwargs)
        return loaded

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        if mesh_manager is not None:
            pack_layers(model)
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        loaded = set()
        if packed_layers(model):
            state_dict = open_tensors(checkpoint_files)
            loaded = load_packed(model, state_dict, load_config.device_map[""])
        if model.config._experts_implementation == LINEAR_EXPERTS:
            mapping = [entry for entry in load_config.weight_mapping or [] if not isinstance(entry, ExpertConverter)]
            load_config = replace(load_config, weight_mapping=mapping)
        info, offload_index = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, expected_keys
        )
        info.missing_keys -= loaded
        if expected_keys is None:  # the whole model, and not an adapter
            raise_on_mismatch(model, info, load_config.ignore_mismatched_sizes)
        return info, offload_index

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As in torch, of released or fused experts.

        Trainer resumes with `strict=False`, shard by shard, and only warns: here, tensors that no call has supplied
        raise in the next forward pass.

        Raises:
            ValueError: with `strict=False`, `state_dict` has tensors without a place in the model (another task's
                head aside).
        """
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        children = dict(self.named_children())
        if foreign := [name for name in result.unexpected_keys if name.split(".")[0] in children]:
            raise ValueError(f"the checkpoint has tensors that {type(self).__name__} lacks: {', '.join(foreign[:5])}")
        missing = released_names(result.missing_keys, self.config.num_local_experts) - set(self.all_tied_weights_keys)
        missing = {name for name in missing if not is_optional_tensor(name)}
        if missing or self._missing_tensors:
            if self._missing_tensors is None:
                self.register_forward_pre_hook(raise_on_missing_tensors)
            self._missing_tensors = missing & self._missing_tensors if self._missing_tensors else missing
        return result

    def load_adapter(self, *args, **kwargs):
        """As in transformers, but an adapter that fits only in part is an error.

        Raises:
            ValueError: the adapter has tensors without a place in the model, or lacks some; or its config has regular
                expressions that cannot be matched (`patterns_grinmoe.py`).
        """
        source = args[0] if args else kwargs.get("peft_model_id")
        if source is not None and kwargs.get("peft_config") is None:
            hub = {**(kwargs.get("adapter_kwargs") or {}), "local_files_only": kwargs.get("local_files_only", False)}
            hub = {key: value for key, value in hub.items() if key in HUB_ARGUMENTS}
            if (file := find_adapter_config_file(source, **hub)) is not None:
                check_patterns(json.loads(Path(file).read_text("utf-8")), adaptable_names(self), source)
        info = super().load_adapter(*args, **kwargs)
        if names := sorted({*info.unexpected_keys, *info.missing_keys}):
            raise ValueError(
                f"the adapter and {type(self).__name__} differ in {len(names)} tensor(s): {', '.join(names[:3])}, ... "
                "Adapters of w1, w2 and w3 need a model loaded with experts_implementation='linear'; "
                "adapters of gate_up_proj and down_proj one without."
            )
        return info

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """As in transformers, and `"linear"`: experts of `nn.Linear` modules, as quantisers need them.

        Raises:
            ValueError: the implementation would ignore `expert_dropout` or a `quantization_config`, or needs other
                modules than the model was built with.
        """
        is_linear = requested_experts == LINEAR_EXPERTS
        if getattr(self.config, "quantization_config", None) is not None:
            if requested_experts is not None and not is_linear:
                raise ValueError(
                    f"experts_implementation={requested_experts!r} has fused experts, which quantization_config would "
                    f"leave as they are; leave it out or use {LINEAR_EXPERTS!r}"
                )
            is_linear = True
        for module in self.modules():
            if hasattr(module, "experts") and isinstance(module.experts, GrinMoeLinearExperts) != is_linear:
                raise ValueError(
                    f"experts_implementation={requested_experts!r} needs other modules than this model was built "
                    "with; give it to from_pretrained"
                )
        if is_linear:
            return LINEAR_EXPERTS
        implementation = super().get_correct_experts_implementation(
            requested_experts or self.default_experts_implementation
        )
        if implementation in WITHOUT_DROPOUT and self.config.expert_dropout > 0:
            raise ValueError(f"experts_implementation={implementation!r} has no dropout; set expert_dropout=0")
        return implementation

    def _resolve_parallel_plans(self, distributed_config):
        """As in transformers, for layouts that the model can have (`check_parallel_sizes`)."""
        check_parallel_sizes(self.config, tp_size=distributed_config.tp_size, fsdp_size=distributed_config.fsdp_size)
        return super()._resolve_parallel_plans(distributed_config)


def is_optional_tensor(name: str) -> bool:
    """Whether a checkpoint may lack a tensor: a new task's head, a scale that begins as ones, or a bias as zeros."""
    return name == "score.weight" or name.endswith((".output_scale", ".e_score_correction_bias"))


def find_new_heads(model: PreTrainedModel, missing: Iterable[str]) -> set[str]:
    """Return the `missing` tensors that may be new: of a head, if all of it is missing, and what the class lists."""
    decoders = {name.split(".")[0] for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    absent = {*missing, *model.all_tied_weights_keys}
    # A model that is a decoder itself is the module "": it has no head.
    kept = {name.split(".")[0] for name in model.state_dict() if name not in absent} | (decoders - {""})
    ignored = model._keys_to_ignore_on_load_missing or ()
    return {
        name
        for name in missing
        if (decoders != {""} and name.split(".")[0] not in kept)
        or is_optional_tensor(name)
        or any(re.search(pattern, name) for pattern in ignored)
    }


def raise_on_mismatch(model: PreTrainedModel, info: Any, ignore_mismatched_sizes: bool) -> None:
    """Raise `CheckpointMismatch` unless a load's `LoadStateDictInfo` says that checkpoint and `model` have the same
    tensors. A new head may be missing, and another task's head is left over."""
    # transformers says it in two lines, after a traceback.
    problems = [f"{name}: {message.splitlines()[-2]}" for name, message in info.conversion_errors.items()]
    problems += info.error_msgs
    missing = info.missing_keys - set(model.all_tied_weights_keys) - info.conversion_errors.keys()
    problems += [f"{name} is missing" for name in sorted(missing - find_new_heads(model, missing))]
    if not ignore_mismatched_sizes:
        problems += [
            f"{name} has shape {list(shape)}, the config says {list(expected)}"
            for name, shape, expected in sorted(info.mismatched_keys)
        ]
    prefix = f"{model.base_model_prefix}."  # checkpoints of the bare model lack it
    modules = {name.removeprefix(prefix).split(".")[0] for name in model.state_dict()}
    unexpected = [name for name in sorted(info.unexpected_keys) if name.removeprefix(prefix).split(".")[0] in modules]
    problems += [f"{name} is not part of the model that the config describes" for name in unexpected]
    is_fused = any(name.endswith(".experts.gate_up_proj") for name in unexpected)
    raise_on_problems(model, problems, FUSED_EXPERTS if is_fused else "")


def check_names(model: PreTrainedModel, files: Iterable[str | os.PathLike]) -> None:
    """Raise `CheckpointMismatch` unless safetensors files in the released layout have exactly `model`'s tensors."""
    needed = released_names(model.state_dict(), model.config.num_local_experts)
    found = open_tensors(files).keys()
    problems = [f"{name} is missing" for name in sorted(needed - found - set(model.all_tied_weights_keys))]
    problems += [f"{name} is not part of the model" for name in sorted(found - needed)]
    raise_on_problems(model, problems)


def raise_on_problems(model: PreTrainedModel, problems: list[str], hint: str = "") -> None:
    """Raise `CheckpointMismatch` with the first `problems`, if there are any."""
    if problems:
        shown = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
        raise CheckpointMismatch(
            f"{len(problems)} tensor(s) of the checkpoint do not fit {type(model).__name__}: {shown}{hint}"
        )


def raise_on_missing_tensors(model: GrinMoeLoadingMixin, args: tuple = ()) -> None:
    """Raise ValueError if a non-strict `load_state_dict` has not filled the model. A forward pre-hook."""
    if names := sorted(model._missing_tensors or ()):
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise ValueError(
            f"{len(names)} tensor(s) of {type(model).__name__} were not in what load_state_dict(strict=False) was "
            f"given and kept their old values: {shown}. The checkpoint is incomplete or another model's; if the old "
            "values are wanted, say so by model.load_state_dict(model.state_dict())."
        )


def list_adapter_targets(model_type: str) -> None:
    """Give a model type what peft adapts by default in Mixtral, whose modules have our names.

    A model asks for it when it is made: peft takes seconds to import, and reading a config does not need it.
    """
    if not is_peft_available():
        return
    for name, table in vars(importlib.import_module("peft.utils.constants")).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and "mixtral" in table:
            table.setdefault(model_type, table["mixtral"])


def check_parallel_sizes(config: GrinMoeConfig, *, tp_size: int = 1, pp_size: int = 1, fsdp_size: int = 1) -> None:
    """Raise ValueError, naming the field, if `config` cannot be split over these numbers of ranks.

    Tensor parallelism splits heads and every expert evenly, and the vocabulary as it may. A pipeline's stage (or
    chunk) has at least one layer. FSDP deals out whole experts, as many to each rank, except the last one.
    """
    for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if (size := getattr(config, field)) % tp_size:
            raise ValueError(f"{field}={size} is not divisible by tp_size={tp_size}: choose a tp_size that divides it")
    if tp_size > 1 and config._experts_implementation == LINEAR_EXPERTS:
        raise ValueError(
            "tensor parallelism shards fused experts: load without quantization_config and experts_implementation, or "
            "use FSDP2 or a pipeline"
        )
    if pp_size > config.num_hidden_layers:
        raise ValueError(
            f"num_hidden_layers={config.num_hidden_layers} layers do not make {pp_size} pipeline stages (or chunks, "
            "if a rank has several): use fewer"
        )
    experts_per_rank = -(-config.num_local_experts // fsdp_size)
    if fsdp_size > (ranks := -(-config.num_local_experts // experts_per_rank)):
        raise ValueError(
            f"num_local_experts={config.num_local_experts} gives experts to {ranks} of fsdp_size={fsdp_size} ranks: "
            f"use fsdp_size={ranks}, and dp_replicate_size or tp_size for the other ranks"
        )


def is_readable(path: Path) -> bool:
    """Whether a safetensors file, or an index of such files, is whole."""
    try:
        if path.suffix == ".json":
            index = json.loads(path.read_text(encoding="utf-8"))
            return isinstance(index["metadata"], dict) and {*map(type, index["weight_map"].values())} == {str}
        safe_open(path, framework="pt").__exit__(None, None, None)
    except (SafetensorError, ValueError, RecursionError, KeyError, TypeError, AttributeError):  # no JSON, or no text
        return False
    return True


def find_damaged_files(pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> list[str]:
    """The safetensors files and JSON indices beside the checkpoint's config.json that cannot be read."""
    hub = {key: kwargs[key] for key in ("cache_dir", "revision", "subfolder", "token") if key in kwargs}
    try:
        config_file = cached_file(pretrained_model_name_or_path, "config.json", local_files_only=True, **hub)
    except OSError:  # no such checkpoint
        return []
    folder = Path(str(config_file)).parent
    return [str(path) for path in sorted(folder.glob("*.safetensors*")) if not is_readable(path)]
