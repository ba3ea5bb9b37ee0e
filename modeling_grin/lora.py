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

# A merge must keep at least the rest of what the adapters change, unless it loses no more than float32 would.
LARGEST_SHARE_LOST = 0.5
FLOAT32_ROUNDING = 3e-5  # relative to the weight, of a layer's output on a basis

# Fields of LoraConfig that peft honours for modules, and ignores or refuses for parameters, which fused experts are.
MODULE_SETTINGS = ("lora_dropout", "layers_to_transform", "layers_pattern", "exclude_modules")


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
        ValueError: nothing was asked for, or what `model` does not have; `router=True` with `config.freeze_router`;
            `lora_dropout`, `layers_to_transform`, `layers_pattern` or `exclude_modules` with fused experts; or modules
            to train in full in a model that is spread over ranks. The model is unchanged.
    """
    if router and model.config.freeze_router:
        raise ValueError("router=True trains the routers that config.freeze_router=True freezes; change one of them")
    fused = experts and any(name.endswith(EXPERT_PARAMETERS) for name, _ in model.named_parameters())
    modules = ATTENTION_MODULES * attention + ROUTER_MODULES * router + EXPERT_MODULES * (experts and not fused)
    if not (modules or fused):
        raise ValueError("LoRA has nothing to adapt: set attention, router or experts to True")
    names = [name for name, _ in model.named_modules()]
    for module in modules:  # peft is content if others are there
        if not any(name.endswith(f".{module}") for name in names):
            raise ValueError(
                f"no module of {type(model).__name__} is named {module}; load the model with GrinMoeForCausalLM, or "
                "leave its group out (attention, router, experts)"
            )
    for field in MODULE_SETTINGS if fused else ():
        if (value := settings.get(field)) is not None and (field, value) != ("lora_dropout", 0):
            raise ValueError(
                f"{field}={value} cannot act on fused experts, which peft adapts as parameters; load the model with "
                'experts_implementation="linear", or set experts=False'
            )
    tasks = {GrinMoeForCausalLM: "CAUSAL_LM", GrinMoeForSequenceClassification: "SEQ_CLS"}
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        target_modules=list(modules),
        target_parameters=list(EXPERT_PARAMETERS) if fused else [],
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
        if ".self_attn." in name and "tp" in axes:
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
    """Return whether a layer computes with W + BA alone; DoRA, adapters with a bias and the like do not."""
    if type(layer) not in (Linear, ParamWrapper):  # subclasses are for quantised weights
        return False
    return not layer.lora_variant and not any(layer.lora_bias.values())


def add_products(name: str, layer: LoraLayer) -> torch.Tensor:
    """Return a layer's weight plus its active adapters' products, added in float32, in the weight's dtype.

    For each matrix, `[out, in]` or one of `[E, out, in]`, a product is `scaling * B A`, where A is `[E r, in]`, one
    expert's ranks after the other's, and B is `[out, r E]`, one rank's experts after the other's.
    """
    attribute = getattr(layer, "parameter_name", "weight")
    weight = getattr(layer.get_base_layer(), attribute)
    adapters = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    merged = torch.empty_like(weight)
    matrices = weight.reshape(-1, *weight.shape[-2:])  # [E, out, in], E = 1 for a single matrix
    squares = torch.zeros(3, dtype=torch.float64)  # of the loss, of the products, of the weight
    # One expert at a time, whose matrix in float32 is small next to the layer's.
    for expert, (matrix, result) in enumerate(zip(matrices, merged.view(matrices.shape), strict=True)):
        matrix = matrix.to(dtype)
        change = torch.zeros_like(matrix)
        for adapter in adapters:
            a = layer.lora_A[adapter].weight.to(matrix).unflatten(0, (len(matrices), -1))[expert]  # [r, in]
            b = layer.lora_B[adapter].weight.to(matrix).unflatten(1, (-1, len(matrices)))[..., expert]  # [out, r]
            change += layer.scaling[adapter] * (b @ a)
        result.copy_(matrix + change)
        lost = result.to(dtype) - matrix - change
        squares += torch.stack([lost.norm(), change.norm(), matrix.norm()]).cpu().double().square()
    lost_norm, change_norm, norm = squares.sqrt().tolist()
    where = f"{name.replace('.base_layer', '')}.{attribute}"
    check_loss(where, lost_norm, change_norm, torch.finfo(torch.float32).eps * norm)
    return merged


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
    """Merge the active adapters into the weights: W + BA, added in float32 and rounded once.

    Layers that compute otherwise, such as DoRA's, are merged by peft, and must give the same outputs for a basis.
    Rounding must not lose more than half of the adapters' change. Meanwhile the unmerged weights are kept: up to twice
    the memory.

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
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError("the adapters are merged already; call unmerge_adapter() first, so the merge is checked")
        if any(not parameter.is_floating_point() for parameter in layer.get_base_layer().parameters(recurse=False)):
            raise merge_error(f"{name} is quantised")
    merged = {layer: add_products(name, layer) for name, layer in layers.items() if is_plain(layer)}
    others = {name: layer for name, layer in layers.items() if layer not in merged}
    unmerged = [
        (weight, weight.data) for layer in others.values() for weight in layer.get_base_layer().parameters(False)
    ]
    training = peft_model.training
    peft_model.eval()
    try:
        adapted = {name: apply_to_basis(layer) for name, layer in others.items()}
        with peft_model.disable_adapter():
            plain = {name: apply_to_basis(layer) for name, layer in others.items()}
        for name, layer in others.items():
            layer.merge(safe_merge=True)  # into new tensors
            lost = (apply_to_basis(layer) - adapted[name]).norm().item()
            change = (adapted[name] - plain[name]).norm().item()
            check_loss(name, lost, change, FLOAT32_ROUNDING * plain[name].norm().item())
    except Exception:
        for weight, data in unmerged:
            weight.data = data
        for layer in others.values():
            layer.merged_adapters.clear()
        raise
    finally:
        peft_model.train(training)
    for layer, weight in merged.items():
        getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight")).data = weight
    for layer in layers.values():
        layer.merged_adapters[:] = layer.active_adapters
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        return peft_model.merge_and_unload()
