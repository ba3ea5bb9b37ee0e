"""Attention masks with the released sliding window."""

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .compat_grinmoe import CACHE, cache_name
from .configuration_grinmoe import GrinMoeConfig, VisibleWindowConfig
from .window_attention_grinmoe import can_use_flash

SMALL_HEAD_DIMS = (8, 16)  # torch's flex_attention is wrong with these on CPUs that have AVX2 and no AVX512


def create_mask(
    config: GrinMoeConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    position_ids: torch.Tensor | None,
) -> Any:
    """Create the causal mask with the released window, in the form that the attention implementation takes.

    Where the window hides no key, or torch's flash kernel can apply it, it is left out: without padding and packing
    there is no mask then.
    """
    if config._attn_implementation == "flex_attention":
        check_flex_attention(config, cache, inputs_embeds.device)
    visible = VisibleWindowConfig(config)
    mask_cache = cache if cache_name(cache) == CACHE else None
    if isinstance(mask_cache, Cache):
        num_keys, _ = mask_cache.get_mask_sizes(inputs_embeds.shape[1], 0)
    else:
        num_keys = inputs_embeds.shape[1] if attention_mask is None else attention_mask.shape[-1]
    window = visible.sliding_window
    given: dict[str, Any] = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
    given |= {"config": visible, "position_ids": position_ids, CACHE: mask_cache}
    if window is None or num_keys <= window:
        return create_causal_mask(**given)
    is_first = num_keys == inputs_embeds.shape[1] and not getattr(cache, "is_compileable", False)
    if is_first and can_use_flash(config, inputs_embeds) and create_causal_mask(**given) is None:
        return None
    return create_sliding_window_causal_mask(**given)


def check_flex_attention(config: GrinMoeConfig, cache: Cache | None, device: torch.device) -> None:
    """Raise ValueError where flex_attention would fail, or compute wrong numbers."""
    if getattr(cache, "is_compileable", False):
        # transformers 5.23 fails in `generate`, and without a window reads the cache's length after it has grown.
        raise ValueError("flex_attention cannot use a static cache; use a dynamic one, or attn_implementation='sdpa'")
    # torch 2.13 and 2.14 compile it for blocks of 16 keys, one vector of AVX512 and two of AVX2. Of a last block of 8
    # keys the kernel for small heads writes both, the second one over the scores of the next query.
    has_small_heads = config.head_dim in SMALL_HEAD_DIMS
    if device.type == "cpu" and has_small_heads and torch.backends.cpu.get_cpu_capability() == "AVX2":
        raise ValueError(
            f"flex_attention must not be used with head_dim={config.head_dim} on a CPU with AVX2 and without AVX512, "
            "where torch computes wrong numbers; use attn_implementation='sdpa'"
        )
