"""LoRA on attention, router and experts: adapters that are where they were asked for, merges that prove themselves.

The experts of a layer are two 3-D parameters, which peft adapts through `target_parameters`, with `r` ranks for every
expert; in the layout with one `nn.Linear` per expert matrix (`w1`, `w2`, `w3`) they are modules like any other.
E experts, r ranks.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear, LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear

from .layout_grinmoe import EXPERT_WEIGHTS
from .modeling_grinmoe import GrinMoeForCausalLM, GrinMoeForSequenceClassification, GrinMoePreTrainedModel

# Ends of the names of each group's modules, and of the fused experts' parameters.
ATTENTION_MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
ROUTER_MODULES = ("block_sparse_moe.gate",)
EXPERT_MODULES = tuple(part for parts in EXPERT_WEIGHTS.values() for part in parts)
EXPERT_PARAMETERS = tuple(f"block_sparse_moe.experts.{name}" for name in EXPERT_WEIGHTS)

GROUPS = {".self_attn.": "attention", ".block_sparse_moe.gate": "router", ".block_sparse_moe.experts": "experts"}
NO_GROUP = "in full"  # `modules_to_save` and heads of new tasks, which have no adapters

# A merge must keep at least the rest of what the adapters change, unless it loses no more than float32 would.
LARGEST_SHARE_LOST = 0.5
FLOAT32_ROUNDING = 3e-5  # relative to the weight, of a layer's output on a basis

# Fields of LoraConfig that peft honours for modules and ignores for parameters, which fused experts are.
MODULE_SETTINGS = ("layers_to_transform", "layers_pattern", "exclude_modules")


def group_of(name: str) -> str:
    """Return the group that a module or parameter belongs to."""
    return next((group for part, group in GROUPS.items() if part in name), NO_GROUP)


def find_targets(model: nn.Module, suffixes: tuple[str, ...], group: str) -> list[str]:
    """Return the names of the modules and parameters of `group` that end with one of `suffixes`."""
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    endings = tuple(f".{suffix}" for suffix in suffixes)
    return [name for name in names if name.endswith(endings) and group_of(name) == group]


def add_lora(
    model: GrinMoePreTrainedModel,
    *,
    attention: bool = True,
    router: bool = False,
    experts: bool = True,
    r: int = 16,
    lora_alpha: int = 32,
    **settings: Any,
) -> PeftModel:
    """Put LoRA adapters on `model`, in place, and freeze all else.

    Args:
        attention: adapt `q_proj`, `k_proj`, `v_proj` and `o_proj`.
        router: adapt the routers, `gate`.
        experts: adapt all matrices of all experts, each expert with `r` ranks of its own.
        r, lora_alpha: rank, and numerator of the scale `lora_alpha / r`, of every adapter.
        settings: other fields of `peft.LoraConfig`, such as `rank_pattern` or `use_rslora`.

    Raises:
        ValueError: nothing was asked for; a group matches nothing in `model`; `router=True` with
            `config.freeze_router`; `lora_dropout`, `layers_to_transform`, `layers_pattern` or `exclude_modules` with
            fused experts; or modules to train in full in a model that is spread over ranks. The model is unchanged.
    """
    if router and model.config.freeze_router:
        raise ValueError("router=True trains the routers that config.freeze_router=True freezes; change one of them")
    fused = find_targets(model, EXPERT_PARAMETERS, "experts") if experts else []
    chosen: list[tuple[bool, str, tuple[str, ...]]] = [
        (attention, "attention", ATTENTION_MODULES),
        (router, "router", ROUTER_MODULES),
        (experts, "experts", EXPERT_PARAMETERS if fused else EXPERT_MODULES),
    ]
    wanted = {group: suffixes for is_chosen, group, suffixes in chosen if is_chosen}
    if not wanted:
        raise ValueError("LoRA has nothing to adapt: set attention, router or experts to True")
    for group, suffixes in wanted.items():
        if not find_targets(model, suffixes, group):
            raise ValueError(
                f"{group}=True matches nothing in {type(model).__name__}: no name ends with {' or '.join(suffixes)}"
            )
    if fused and settings.get("lora_dropout", 0) > 0:
        raise ValueError(
            f"lora_dropout={settings['lora_dropout']} cannot act on fused experts, whose adapters peft adds to the "
            "weights; set it to 0, or experts=False"
        )
    for field in MODULE_SETTINGS:
        if fused and settings.get(field) is not None:
            raise ValueError(
                f"{field}={settings[field]} cannot choose among fused experts, which peft adapts in all layers; load "
                'the model with experts_implementation="linear", or set experts=False'
            )

    parameters = wanted.pop("experts") if fused else ()
    tasks = {GrinMoeForCausalLM: "CAUSAL_LM", GrinMoeForSequenceClassification: "SEQ_CLS"}
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        target_modules=[suffix for suffixes in wanted.values() for suffix in suffixes],
        target_parameters=list(parameters),
        **{"task_type": next((task for cls, task in tasks.items() if isinstance(model, cls)), None), **settings},
    )
    is_spread = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    if is_spread and (config.modules_to_save or config.task_type == "SEQ_CLS"):
        raise ValueError(
            "modules_to_save, and the new head of a classifier, are trained in full, and must be whole on every rank: "
            "use DDP, or train all weights"
        )
    with whole_weights(model):
        adapted = get_peft_model(model, config)
    model.base_model.adapts_experts = experts
    spread_adapters(adapted)
    return adapted


@contextmanager
def whole_weights(model: GrinMoePreTrainedModel) -> Iterator[None]:
    """Show peft a model that is spread over ranks as if it were whole: else it makes adapters of the parts' sizes.

    The spread weights are frozen.
    """
    mesh = getattr(model, "_device_mesh", None)
    spread = [
        (module, name, weight)
        for module in model.modules()
        for name, weight in module.named_parameters(recurse=False, remove_duplicate=False)
        if isinstance(weight, DTensor)
    ]
    for module, name, weight in spread:
        weight.requires_grad_(False)
        whole = torch.zeros((), dtype=weight.dtype, device=weight.device_mesh.device_type).expand(weight.shape)
        is_packed = name == "weight" and hasattr(module, "pack")
        module._parameters[name] = (  # one number
            module.pack(whole, bnb_quantized=True) if is_packed else nn.Parameter(whole, requires_grad=False)
        )
    model._device_mesh = None
    try:
        yield
    finally:
        model._device_mesh = mesh
        for module, name, weight in spread:
            module._parameters[name] = weight


def spread_adapters(model: PeftModel) -> None:
    """Let adapters, which every rank has whole, compute with a rank's part of a model that is spread over ranks.

    FSDP gathers the matrices before they are used. Tensor parallelism leaves each rank a part of an attention
    projection's outputs or inputs: so do the adapters here, and the gradients of the parts are summed. The experts'
    are `lora_experts_grinmoe.of_rank`'s.
    """
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        weight = layer.get_base_layer().weight if not isinstance(layer, ParamWrapper) else layer.get_param()
        if not isinstance(weight, DTensor):
            continue
        axes = dict(zip(weight.device_mesh.mesh_dim_names or ("tp",), weight.placements, strict=True))
        if group_of(name) == "attention" and "tp" in axes:
            if not is_plain(layer):
                raise ValueError(f"{name}: tensor parallelism needs plain LoRA, without DoRA and the like")
            mesh = weight.device_mesh["tp"] if len(axes) > 1 else weight.device_mesh
            for adapter in layer.lora_A:
                split(layer.lora_A[adapter], layer.lora_B[adapter], mesh, by_outputs=axes["tp"].is_shard(0))


def split(a: nn.Linear, b: nn.Linear, mesh: DeviceMesh, by_outputs: bool) -> None:
    """Let `b(a(x))` return this rank's part of the outputs; or take its part of the inputs, and sum over ranks."""
    from transformers.distributed.parallel_utils import _AllReduceBackward, _AllReduceForward

    group, num_ranks, rank = mesh.get_group(), mesh.size(), mesh.get_local_rank()

    def part(weight: torch.Tensor, dim: int) -> torch.Tensor:
        return _AllReduceBackward.apply(weight, group).chunk(num_ranks, dim)[rank]

    if by_outputs:
        summed = _AllReduceBackward.apply
        a.forward = lambda input: linear(summed(input, group), summed(a.weight, group))  # type: ignore[method-assign]
        b.forward = lambda input: linear(input, part(b.weight, 0))  # type: ignore[method-assign]
    else:
        a.forward = lambda input: _AllReduceForward.apply(  # type: ignore[method-assign]
            linear(input, part(a.weight, 1)), group
        )


def merge_error(reason: str) -> ValueError:
    """Make the error for a merge that is not what it should be."""
    return ValueError(
        f"the merge is refused: {reason}; nothing has been merged. Keep the adapters, or load the base model in "
        "float32, without quantization, and merge there."
    )


def is_plain(layer: BaseTunerLayer) -> bool:
    """Return whether a layer computes with W + BA; DoRA and the like do not."""
    return type(layer) in (Linear, ParamWrapper) and not layer.lora_variant  # subclasses are for quantised weights


def check_weight(name: str, layer: LoraLayer, unmerged: torch.Tensor, merged: torch.Tensor) -> None:
    """Raise ValueError unless `merged` is `unmerged` plus the products of `layer`'s active adapters, within rounding.

    Both are `[out, in]` or `[E, out, in]`. The products follow from the adapters' definition, not from peft's code:
    `scaling * B A` for each matrix, where A is `[E r, in]`, one expert's ranks after the other's, and B is
    `[out, r E]`, one rank's experts after the other's.
    """
    adapters = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    rounding = torch.finfo(merged.dtype)
    dtype = torch.promote_types(merged.dtype, torch.float32)
    weights = unmerged.reshape(-1, *unmerged.shape[-2:])  # [E, out, in], E = 1 for a single matrix
    num_experts = len(weights)
    squares = torch.zeros(3, dtype=torch.float64)  # of the loss, of the products, of the weight
    # One expert at a time, whose matrix in float32 is small next to the layer's.
    for expert, (weight, result) in enumerate(zip(weights, merged.reshape(weights.shape), strict=True)):
        weight = weight.to(dtype)
        delta, size = torch.zeros_like(weight), weight.abs()
        for adapter in adapters:
            a = layer.lora_A[adapter].weight.to(weight).unflatten(0, (num_experts, -1))[expert]  # [r, in]
            b = layer.lora_B[adapter].weight.to(weight).unflatten(1, (-1, num_experts))[..., expert]  # [out, r]
            scaling = layer.scaling[adapter]
            delta += scaling * (b @ a)
            size += abs(scaling) * (b.abs() @ a.abs())  # all terms, because their sum may be small
        error = result.to(dtype) - weight - delta
        # At most half an epsilon for each rounding: when a product is made, scaled and cast, and when it is added.
        allowed = (1 + len(adapters)) * rounding.eps * size.clamp(min=rounding.smallest_normal)
        if not (error.abs() <= allowed).all():  # a NaN is no <= either
            matrix = f"{name}[{expert}]" if unmerged.ndim == 3 else name
            raise merge_error(
                f"{matrix} is not W + BA rounded to {merged.dtype}: it differs by {error.norm():.2g}, where BA has "
                f"the norm {delta.norm():.2g}"
            )
        squares += torch.stack([error.norm(), delta.norm(), weight.norm()]).cpu().double().square()
    lost, change, norm = squares.sqrt().tolist()
    check_loss(name, lost, change, torch.finfo(torch.float32).eps * norm)


def check_loss(name: str, lost: float, change: float, rounding: float) -> None:
    """Raise ValueError if a merge loses more than half of the adapters' change, and more than float32's rounding."""
    if not lost <= max(LARGEST_SHARE_LOST * change, rounding):
        raise merge_error(f"{name} loses {lost:.2g} of the adapters' change, whose norm is {change:.2g}")


def apply_to_basis(layer: BaseTunerLayer) -> torch.Tensor:
    """Return what a layer makes of every unit vector, or of every token: its matrix, adapters included, and bias."""
    base = layer.get_base_layer()
    if isinstance(base, nn.Embedding):
        return layer(torch.arange(base.num_embeddings, device=base.weight.device)).float()
    return layer(torch.eye(base.in_features, dtype=base.weight.dtype, device=base.weight.device)).float()


@torch.no_grad()
def merge_lora(peft_model: PeftModel) -> GrinMoePreTrainedModel:
    """Merge the active adapters into the weights, and prove it for each of them.

    Every weight must be W + BA, computed anew from the adapters in float32, within rounding to its dtype. Layers that
    compute otherwise, such as DoRA's, must give the same outputs for a basis. Rounding must not lose more than half of
    the adapters' change. Meanwhile the unmerged weights are kept: up to twice the memory.

    Args:
        peft_model: as `add_lora` or `PeftModel.from_pretrained` returns it.

    Returns:
        The base model, merged, in the mode `peft_model` was in. It is saved in the released layout.

    Raises:
        ValueError: the merge is wrong, the dtype of the weights cannot hold it, or they are quantised; names the
            weight, and leaves `peft_model` as it was. Or adapters have been merged before.
    """
    base_model = peft_model.get_base_model()
    layers = {name: module for name, module in base_model.named_modules() if isinstance(module, BaseTunerLayer)}
    if any(layer.merged for layer in layers.values()):
        raise ValueError("the adapters are merged already; call unmerge_adapter() first, so that the merge is checked")

    # safe_merge writes new tensors, so that these stay as they are; peft's unmerge() would subtract, which rounds.
    modules = [layer.get_base_layer() for layer in layers.values()]
    unmerged = {(module, name): (parameter, parameter.data) for module in modules
                for name, parameter in module.named_parameters(recurse=False)}  # fmt: skip
    for name, layer in layers.items():
        if any(not parameter.is_floating_point() for parameter in layer.get_base_layer().parameters(recurse=False)):
            raise merge_error(f"{name} is quantised")
    training = peft_model.training
    peft_model.eval()
    others = {name: layer for name, layer in layers.items() if not is_plain(layer)}
    try:
        adapted = {name: apply_to_basis(layer) for name, layer in others.items()}
        with peft_model.disable_adapter():
            plain = {name: apply_to_basis(layer) for name, layer in others.items()}
        peft_model.merge_adapter(safe_merge=True)
        for name, layer in layers.items():
            if name in others:
                lost = (apply_to_basis(layer) - adapted[name]).norm().item()
                change = (adapted[name] - plain[name]).norm().item()
                check_loss(name, lost, change, FLOAT32_ROUNDING * plain[name].norm().item())
            else:
                module, weight = layer.get_base_layer(), getattr(layer, "parameter_name", "weight")
                name = f"{name.replace('.base_layer', '')}.{weight}"
                check_weight(name, layer, unmerged[module, weight][1], getattr(module, weight))
    except Exception:
        for (module, name), (parameter, data) in unmerged.items():
            setattr(module, name, parameter)
            parameter.data = data
        for layer in layers.values():
            layer.merged_adapters.clear()
        raise
    finally:
        peft_model.train(training)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        return peft_model.merge_and_unload()
