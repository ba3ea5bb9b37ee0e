"""Checks of a forward pass: arguments that would be lost or fail later, and settings that cost users days."""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.utils import TransformersKwargs, logging

from .layout_grinmoe import EXPERT_WEIGHTS
from .linear_experts_grinmoe import LINEAR_EXPERTS, warn_of_partial_quantization

logger = logging.get_logger(__name__)

# Keywords that a forward pass may get beside the arguments that it names.
KNOWN_KEYWORDS = {
    *TransformersKwargs.__annotations__,
    "output_selected_experts",
    "shift_labels",  # the loss of a language model
    *("debug_io", "debug_io_dir", "prune_layers"),  # transformers' tracing of a forward pass
    "margin",  # trl's RewardTrainer gives the whole batch to the model
    "logits_to_keep",  # trl's DistillationTrainer gives it to the decoder, which keeps every position
}


def check_forward(model: PreTrainedModel, inputs_embeds: torch.Tensor, keywords: dict[str, Any], cache: Any) -> None:
    """Check embeddings `[batch, sequence, H]` and the keywords that the decoder's forward pass does not name, and warn
    once about settings that are probably mistakes."""
    refuse_unknown_keywords(model, keywords, cache)
    refuse_empty(inputs_embeds)
    as_loaded = getattr(model.config, "quantization_config", None) is None
    if as_loaded and len(model.layers) > 0 and not torch.compiler.is_compiling():
        warn_of_partial_quantization(model.layers[0])
    warn_of_emulation(inputs_embeds)


def refuse_unknown_keywords(model: PreTrainedModel, keywords: dict[str, Any], cache: Any) -> None:
    """Raise TypeError for keywords that neither transformers nor the attention implementation of `model` knows.

    Otherwise `**kwargs` would carry them down to the attention, where they are lost. A value of None passes.
    """
    unknown = {name for name, value in keywords.items() if value is not None} - KNOWN_KEYWORDS
    if not unknown:
        return
    implementation = model.config._attn_implementation
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    unknown -= inspect.signature(attention).parameters.keys()
    if "flash" in implementation:
        unknown -= inspect.signature(_flash_attention_forward).parameters.keys()
    if implementation == "flex_attention":
        unknown.discard("kernel_options")
    if isinstance(cache, PagedAttentionCache):
        unknown -= PagedAttentionArgs.__annotations__.keys()
    if unknown:
        raise TypeError(
            f"{type(model).__name__}.forward got keywords that it does not know: {', '.join(sorted(unknown))}; "
            "correct their spelling or leave them out"
        )


def refuse_empty(inputs: torch.Tensor) -> None:
    """Raise ValueError unless `inputs` `[batch, sequence, ...]` have a row and a token: attention reshapes neither."""
    if 0 in inputs.shape[:2]:
        raise ValueError(
            f"input_ids (or inputs_embeds) must have at least one row and one token; got a batch of {inputs.shape[0]} "
            f"rows and {inputs.shape[1]} tokens; leave empty batches out"
        )


def warn_of_emulation(hidden_states: torch.Tensor) -> None:
    """Say once that this CPU lacks instructions for the dtype that the forward pass computes in."""
    if hidden_states.device.type != "cpu" or torch.compiler.is_compiling() or not torch.backends.mkldnn.is_available():
        return
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden_states.dtype
    has_instructions = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if dtype in has_instructions and not has_instructions[dtype]():
        name = str(dtype).removeprefix("torch.")
        logger.warning_once(
            f"This CPU has no instructions for {name}, which takes several times as long as float32: load the model "
            "with dtype=torch.float32, and train without bf16 and fp16."
        )


def find_expert_adapters(decoder: nn.Module) -> bool | None:
    """True if the experts have adapters, otherwise None; warn once if other matrices have adapters.

    Fused experts are parameters, which peft's `target_modules` never match.

    Raises:
        ValueError: experts have Poly's adapters, which mix by rows of the batch; experts see tokens `[tokens, H]`.
    """
    matrices = nn.Linear | MixtralExperts  # peft adapts norms and embeddings as well
    names = {
        name: module
        for name, module in decoder.named_modules()
        if hasattr(module, "get_base_layer") and isinstance(module.get_base_layer(), matrices)
    }
    of_experts = [name for name in names if ".experts" in name]
    if any(".poly." in type(names[name]).__module__ for name in of_experts):
        raise ValueError(
            f"`target_modules` of Poly must match no expert; got {of_experts[0]}: Poly mixes its adapters by rows of "
            "the batch, and an expert sees tokens of many rows; name attention's projections, or use LoRA"
        )
    if of_experts:
        return True
    if names:
        logger.warning_once(
            f"adapters are on {', '.join(sorted({name.rpartition('.')[2] for name in names}))} and on no "
            "expert; 95 % of the released weights are in experts. LoRA adapts fused experts by "
            f"target_parameters={[f'experts.{name}' for name in EXPERT_WEIGHTS]} or by "
            "modeling_grin.training.add_lora; every method adapts w1, w2 and w3 of a model that was loaded with "
            f"experts_implementation={LINEAR_EXPERTS!r}."
        )
    return None
