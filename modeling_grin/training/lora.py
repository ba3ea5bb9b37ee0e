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
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.console import Console
from rich.table import Table
from torch import nn

from ..checkpoint_grinmoe import EXPERT_WEIGHTS
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
# The error must also stay below this share of what the adapters change, unless it is rounding of float32 either way.
LARGEST_SHARE_LOST = 0.5
FLOAT32_ROUNDING = 3e-5

PROBE_SHAPE = (4, 128)  # sequences, tokens


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
            W + BA rounded to the dtype of W, so that in bfloat16 most of a small BA is lost: load them in float32, or
            with `experts_implementation="linear"`, where W and BA are applied apart.
        r, lora_alpha: rank, and numerator of the scale `lora_alpha / r`, of every adapter.
        settings: other fields of `peft.LoraConfig`, such as `rank_pattern` or `use_rslora`.

    Raises:
        ValueError: nothing was asked for; a group that was asked for matches nothing in `model`; `router=True` with
            `config.freeze_router`; or `lora_dropout` with fused experts. The model is unchanged.
    """
    if router and model.config.freeze_router:
        raise ValueError("router=True trains the routers that config.freeze_router=True freezes; change one of them")
    fused = experts and bool(find_targets(model, EXPERT_PARAMETERS, "experts"))
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
    if os.environ.get("RANK", "0") == "0":
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


def warn_of_unproven_experts(model: PeftModel, router_logits: list[torch.Tensor]) -> None:
    """Warn if some experts, where experts have adapters, had no part in the proof."""
    if not any(isinstance(module, BaseTunerLayer) and group_of(name) == "experts"
               for name, module in model.named_modules()):  # fmt: skip
        return
    config = model.get_base_model().config
    # Inference takes the largest logits, whatever the keep set.
    reached = sum(logits.topk(config.num_experts_per_tok).indices.unique().numel() for logits in router_logits)
    num_experts = len(router_logits) * config.num_local_experts
    if reached < num_experts:
        warnings.warn(
            f"{num_experts - reached} of {num_experts} experts got no token of the probe: their merged weights are "
            "unproven; give merge_lora more input_ids, of the kind that the model was trained on",
            stacklevel=4,
        )


@torch.no_grad()
def merge_lora(peft_model: PeftModel, input_ids: torch.Tensor | None = None) -> GrinMoePreTrainedModel:
    """Merge the active adapters into the weights, and prove it on `input_ids`: merged logits = adapter-on logits.

    Both are computed in eval mode, on the same routing; the routers' logits are compared as well. The relative error
    must not exceed `MERGE_TOLERANCE` for the dtype of the weights, nor half of what the adapters change. While this
    is checked, the unmerged weights are kept: up to twice the memory.

    Args:
        peft_model: as `add_lora` or `PeftModel.from_pretrained` returns it.
        input_ids: `[batch, sequence]`, on the model's device; 4 x 128 random tokens by default. The adapters of
            experts that get none of the tokens cannot be proven, which is warned of.

    Returns:
        The base model, merged, in the mode `peft_model` was in. It is saved in the released layout.

    Raises:
        ValueError: the merge is wrong, or the dtype of the weights cannot hold it: `peft_model` is as it was. Or
            there is nothing to compare with, because adapters have been merged before.
    """
    layers = [module for module in peft_model.modules() if isinstance(module, BaseTunerLayer)]
    if any(layer.merged for layer in layers):
        raise ValueError("the adapters are merged already; call unmerge_adapter() first, so that the merge is checked")
    base_model = peft_model.get_base_model()
    if input_ids is None:
        generator = torch.Generator().manual_seed(0)
        input_ids = torch.randint(base_model.config.vocab_size, PROBE_SHAPE, generator=generator).to(peft_model.device)

    # safe_merge writes new tensors, so that these stay as they are; peft's unmerge() would subtract, which rounds.
    modules = [layer.get_base_layer() for layer in layers]
    unmerged = [(module, name, parameter, parameter.data) for module in modules
                for name, parameter in module.named_parameters(recurse=False)]  # fmt: skip
    training = peft_model.training
    peft_model.eval()
    try:
        adapted = run(peft_model, input_ids)
        routing = adapted[:-1]
        with peft_model.disable_adapter():
            effect = relative_error(run(peft_model, input_ids, routing), adapted)
        limit = max(min(MERGE_TOLERANCE[base_model.dtype], LARGEST_SHARE_LOST * effect), FLOAT32_ROUNDING)
        peft_model.merge_adapter(safe_merge=True)
        error = relative_error(run(peft_model, input_ids, routing), adapted)
        if not error <= limit:  # NaN, too
            raise ValueError(
                f"the merge is refused: merged and adapter-on logits differ by {error:.2g} (relative), where the "
                f"adapters change them by {effect:.2g} and up to {limit:.2g} would be rounding of {base_model.dtype} "
                "weights; nothing has been merged. Keep the adapters, or load the base model in float32, without "
                "quantization, and merge there."
            )
    except Exception:
        for module, name, parameter, data in unmerged:
            setattr(module, name, parameter)
            parameter.data = data
        for layer in layers:
            layer.merged_adapters.clear()
        raise
    finally:
        peft_model.train(training)
    warn_of_unproven_experts(peft_model, routing)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        return peft_model.merge_and_unload()
