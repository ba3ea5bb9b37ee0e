"""LoRA on attention, router and experts: adapters that are where they were asked for, merges that prove themselves.

The experts of a layer are two 3-D parameters, which peft adapts through `target_parameters`, with `r` ranks for every
expert; in the layout with one `nn.Linear` per expert matrix (`w1`, `w2`, `w3`) they are modules like any other.
T tokens, E experts, K experts per token.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear, LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.console import Console
from rich.table import Table
from torch import nn

from ..layout_grinmoe import EXPERT_WEIGHTS
from ..modeling_grinmoe import GrinMoeForCausalLM, GrinMoeForSequenceClassification, GrinMoePreTrainedModel

# Ends of the names of what a group's adapters are put on; parameters for the fused experts, else modules.
ATTENTION_MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
ROUTER_MODULES = ("block_sparse_moe.gate",)
EXPERT_MODULES = tuple(part for parts in EXPERT_WEIGHTS.values() for part in parts)
EXPERT_PARAMETERS = tuple(f"block_sparse_moe.experts.{name}" for name in EXPERT_WEIGHTS)

# Part of a name -> the group that it belongs to.
GROUPS = {".self_attn.": "attention", ".block_sparse_moe.gate": "router", ".block_sparse_moe.experts": "experts"}
NO_GROUP = "in full"  # `modules_to_save` and heads of new tasks, which have no adapters

# The largest relative error (Frobenius norm) of what a merged model computes from the adapted model's routing. It is
# rounding, about 15 times the dtype's epsilon in 32 layers: W + BA is rounded to the dtype of W, which unmerged
# modules do not do.
MERGE_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.2}
# The error must also stay below this share of what the adapters change, in the logits as in every weight, unless it is
# rounding of float32 either way.
LARGEST_SHARE_LOST = 0.5
FLOAT32_ROUNDING = 3e-5

PROBE_SHAPE = (4, 128)  # sequences, tokens

# Fields of LoraConfig that peft honours for modules and ignores for parameters, which fused experts are.
MODULE_SETTINGS = ("layers_to_transform", "layers_pattern", "exclude_modules")


def group_of(name: str) -> str:
    """The group that a module or parameter belongs to."""
    return next((group for part, group in GROUPS.items() if part in name), NO_GROUP)


def find_targets(model: nn.Module, suffixes: tuple[str, ...], group: str) -> list[str]:
    """The names of modules and parameters of `group` that end with one of `suffixes`."""
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    endings = tuple(f".{suffix}" for suffix in suffixes)
    return [name for name in names if name.endswith(endings) and group_of(name) == group]


def print_adapters(model: PeftModel) -> None:
    """Print, for every group, what has adapters, and how many numbers are trained."""
    matched = model.base_model.targeted_module_names + model.base_model.targeted_parameter_names
    table = Table("LoRA", "on", "matched", "trained")
    for group in (*GROUPS.values(), NO_GROUP):
        names = [name for name in matched if group_of(name) == group]
        trained = sum(parameter.numel() for name, parameter in model.named_parameters()
                      if parameter.requires_grad and group_of(name) == group)  # fmt: skip
        kinds = sorted({name.rpartition(".")[2] for name in names})
        table.add_row(group, ", ".join(kinds) or "-", str(len(names)), f"{trained:,}")
    trained, total = model.get_nb_trainable_parameters()
    Console().print(table, f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%})")


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
    """Put LoRA adapters on `model` (in place; all else is frozen) and print what matched.

    Args:
        attention: adapt `q_proj`, `k_proj`, `v_proj` and `o_proj`.
        router: adapt the routers, `gate`.
        experts: adapt all matrices of all experts, each expert with `r` ranks of its own. Fused experts compute with
            W + BA rounded to the dtype of W, so that in bfloat16 most of a small BA is lost, which is warned of: load
            them in float32, or with `experts_implementation="linear"`, where W and BA are applied apart.
        r, lora_alpha: rank, and numerator of the scale `lora_alpha / r`, of every adapter.
        settings: other fields of `peft.LoraConfig`, such as `rank_pattern` or `use_rslora`.

    Raises:
        ValueError: nothing was asked for; a group that was asked for matches nothing in `model`; `router=True` with
            `config.freeze_router`; or `lora_dropout`, `layers_to_transform`, `layers_pattern` or `exclude_modules`
            with fused experts. The model is unchanged.
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
            f"lora_dropout={settings['lora_dropout']} cannot act on fused experts, whose adapters are added to the "
            "weights; set it to 0, or experts=False"
        )
    for field in MODULE_SETTINGS:
        if fused and settings.get(field) is not None:
            raise ValueError(
                f"{field}={settings[field]} cannot choose among fused experts, which peft adapts in all layers; load "
                'the model with experts_implementation="linear", or set experts=False'
            )

    is_first_rank = os.environ.get("RANK", "0") == "0"
    if fused and is_first_rank and (dtype := model.get_parameter(fused[0]).dtype).itemsize < torch.float32.itemsize:
        warnings.warn(
            f"fused experts are trained as W + BA rounded to {dtype}, which loses a small BA: load the model in "
            'float32, or with experts_implementation="linear"',
            stacklevel=2,
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
    adapted = get_peft_model(model, config)
    model.base_model.adapts_experts = experts
    if is_first_rank:
        print_adapters(adapted)
    return adapted


@contextmanager
def watch_routers(model: PeftModel, replayed: list[torch.Tensor] | None = None) -> Iterator[list[torch.Tensor]]:
    """Collect the routers' logits, `[T, E]` per layer, of one forward pass; the layers see `replayed` in their place.

    Choosing experts is not continuous: a rounding error at a near-tie sends a token elsewhere. With the routing
    replayed, two models differ by no more than their arithmetic does, and the routers' logits are compared as such.
    """
    seen: list[torch.Tensor] = []

    def swap(gate: nn.Module, inputs: tuple, logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits)
        return logits if replayed is None else replayed[len(seen) - 1]

    layers = model.get_base_model().get_decoder().layers
    hooks = [layer.block_sparse_moe.gate.register_forward_hook(swap) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def run(model: PeftModel, input_ids: torch.Tensor, routing: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
    """The router logits of each layer and, last, the model's logits (a bare decoder's hidden states)."""
    with watch_routers(model, routing) as router_logits:
        logits = model(input_ids=input_ids)[0]
    return [*router_logits, logits]


def relative_error(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest relative error, in the Frobenius norm, of a tensor in `actual`; NaN if there is one."""
    errors = [(a.float() - b.float()).norm() / b.float().norm() for a, b in zip(actual, expected, strict=True)]
    return torch.stack([error.cpu() for error in errors]).max().item()


def refusal(reason: str) -> ValueError:
    """The error for a merge that is not what it should be."""
    return ValueError(
        f"the merge is refused: {reason}; nothing has been merged. Keep the adapters, or load the base model in "
        "float32, without quantization, and merge there."
    )


def check_weight(name: str, layer: LoraLayer, unmerged: torch.Tensor, merged: torch.Tensor) -> None:
    """Raise ValueError unless `merged` is `unmerged` plus the products of `layer`'s active adapters, but for rounding.

    Both are `[out, in]` or `[E, out, in]`. The products follow from the adapters' definition, not from peft's code:
    `scaling * B A` for each matrix, where A is `[E r, in]`, one expert's ranks after the other's, and B is
    `[out, r E]`, one rank's experts after the other's.
    """
    adapters = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    rounding = torch.finfo(merged.dtype)
    dtype = torch.promote_types(merged.dtype, torch.float32)
    weights = unmerged.reshape(-1, *unmerged.shape[-2:])  # [E, out, in], E = 1 where there is but one matrix
    num_experts = len(weights)
    squares = torch.zeros(3, dtype=torch.float64)  # of what is lost, of the products, of the weight
    # One expert at a time, whose matrix in float32 is small next to the layer's.
    for expert, (weight, result) in enumerate(zip(weights, merged.reshape(weights.shape), strict=True)):
        weight = weight.to(dtype)
        delta, size = torch.zeros_like(weight), weight.abs()
        for adapter in adapters:
            a = layer.lora_A[adapter].weight.to(weight).unflatten(0, (num_experts, -1))[expert]  # [r, in]
            b = layer.lora_B[adapter].weight.to(weight).unflatten(1, (-1, num_experts))[..., expert]  # [out, r]
            scaling = layer.scaling[adapter]
            delta += scaling * (b @ a)
            size += abs(scaling) * (b.abs() @ a.abs())  # of all terms, because their sum may be small
        error = result.to(dtype) - weight - delta
        # At most half an epsilon for each rounding: when a product is made, scaled and cast, and when it is added.
        allowed = (1 + len(adapters)) * rounding.eps * size.clamp(min=rounding.smallest_normal)
        if not (error.abs() <= allowed).all():  # NaN, too
            matrix = f"{name}[{expert}]" if unmerged.ndim == 3 else name
            raise refusal(
                f"{matrix} is not W + BA rounded to {merged.dtype}: it differs by {error.norm():.2g}, where BA has "
                f"the norm {delta.norm():.2g}"
            )
        squares += torch.stack([error.norm(), delta.norm(), weight.norm()]).cpu().double().square()
    lost, change, norm = squares.sqrt().tolist()
    if lost > max(LARGEST_SHARE_LOST * change, torch.finfo(torch.float32).eps * norm):
        raise refusal(f"rounding {name} to {merged.dtype} loses {lost:.2g} of BA, whose norm is {change:.2g}")


@torch.no_grad()
def merge_lora(peft_model: PeftModel, input_ids: torch.Tensor | None = None) -> GrinMoePreTrainedModel:
    """Merge the active adapters into the weights, and prove it: W' = W + BA in every weight, and the same logits.

    Every weight must be W + BA (computed anew from the adapters, in float32) within rounding to its dtype, which must
    not lose more than half of BA. Merged and adapter-on logits are computed on `input_ids` in eval mode, on the same
    routing; the routers' logits are compared as well. The relative error must not exceed `MERGE_TOLERANCE` for the
    dtype of the weights, nor half of what the adapters change. Quantised weights, and adapters that are no plain
    product, such as DoRA's, have this second proof alone. Meanwhile the unmerged weights are kept: up to twice the
    memory.

    Args:
        peft_model: as `add_lora` or `PeftModel.from_pretrained` returns it.
        input_ids: `[batch, sequence]`, on the model's device; 4 x 128 random tokens by default.

    Returns:
        The base model, merged, in the mode `peft_model` was in. It is saved in the released layout.

    Raises:
        ValueError: the merge is wrong, or the dtype of the weights cannot hold it; names the weight, and leaves
            `peft_model` as it was. Or there is nothing to compare with, because adapters have been merged before.
    """
    base_model = peft_model.get_base_model()
    layers = {name: module for name, module in base_model.named_modules() if isinstance(module, BaseTunerLayer)}
    if any(layer.merged for layer in layers.values()):
        raise ValueError("the adapters are merged already; call unmerge_adapter() first, so that the merge is checked")
    if input_ids is None:
        generator = torch.Generator().manual_seed(0)
        input_ids = torch.randint(base_model.config.vocab_size, PROBE_SHAPE, generator=generator).to(peft_model.device)

    # safe_merge writes new tensors, so that these stay as they are; peft's unmerge() would subtract, which rounds.
    modules = [layer.get_base_layer() for layer in layers.values()]
    unmerged = {(module, name): (parameter, parameter.data) for module in modules
                for name, parameter in module.named_parameters(recurse=False)}  # fmt: skip
    training = peft_model.training
    peft_model.eval()
    try:
        adapted = run(peft_model, input_ids)
        routing = adapted[:-1]
        with peft_model.disable_adapter():
            effect = relative_error(run(peft_model, input_ids, routing), adapted)
        limit = max(min(MERGE_TOLERANCE[base_model.dtype], LARGEST_SHARE_LOST * effect), FLOAT32_ROUNDING)
        peft_model.merge_adapter(safe_merge=True)
        for name, layer in layers.items():
            # Exactly these types: their subclasses are for quantised weights.
            if type(layer) not in (Linear, ParamWrapper) or layer.lora_variant:
                continue
            module, weight = layer.get_base_layer(), getattr(layer, "parameter_name", "weight")
            merged = getattr(module, weight)
            if merged.is_floating_point():
                weight_name = f"{name.replace('.base_layer', '')}.{weight}"
                check_weight(weight_name, layer, unmerged[module, weight][1], merged)
        error = relative_error(run(peft_model, input_ids, routing), adapted)
        if not error <= limit:  # NaN, too
            raise refusal(
                f"merged and adapter-on logits differ by {error:.2g} (relative), where the adapters change them by "
                f"{effect:.2g} and up to {limit:.2g} would be rounding of {base_model.dtype} weights"
            )
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
