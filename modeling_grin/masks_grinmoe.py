"""Masks with the released sliding window, and torch's flash kernel for rows beyond it.

SDPA knows no window and would need a mask of the full square. On CUDA, in 16 bits, without padding, packing or cached
keys, `attn_implementation="sdpa"` calls torch's flash kernel, which takes the window. The environment variable
`GRIN_GPU_KERNELS=0` switches it off.
"""

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .compat_grinmoe import CACHE, cache_name
from .configuration_grinmoe import GrinMoeConfig, VisibleWindowConfig
from .experts_grinmoe import autocast_dtype
from .gpu_kernels_grinmoe import is_on

SMALL_HEAD_DIMS = (8, 16)  # torch's flex_attention is wrong with these on CPUs that have AVX2 and no AVX512
FLASH_DTYPES = (torch.bfloat16, torch.float16)
FLASH_CAPABILITY = (8, 0)


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


def fits_flash(head_dim: int) -> bool:
    """Whether torch's flash kernel takes heads of this size."""
    return head_dim <= 256 and head_dim % 8 == 0


def can_use_flash(config: GrinMoeConfig, inputs_embeds: torch.Tensor) -> bool:
    """Whether torch's flash kernel can compute attention in a forward pass with these embeddings."""
    head_dim: Any = config.head_dim
    return (
        config._attn_implementation == "sdpa"
        and is_on()
        and inputs_embeds.is_cuda
        and (autocast_dtype("cuda") or inputs_embeds.dtype) in FLASH_DTYPES
        and fits_flash(head_dim)
        and torch.backends.cuda.is_flash_attention_available()
        and torch.backends.cuda.flash_sdp_enabled()
        and torch.cuda.get_device_capability(inputs_embeds.device) >= FLASH_CAPABILITY
    )


def sdpa_with_window_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' `sdpa_attention_forward`, and the flash kernel where `create_mask` left the window to it.

    Args:
        query: `[batch, heads, sequence, head_dim]`; `key` and `value` with `num_key_value_heads`.
        sliding_window: how many keys a query sees, its own included.

    Returns:
        `[batch, sequence, heads, head_dim]`, and None.
    """
    length = query.shape[2]
    if attention_mask is not None or sliding_window is None or not length == key.shape[2] > sliding_window:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    dtype = autocast_dtype(query.device.type) or query.dtype
    inputs = (states.transpose(1, 2).to(dtype) for states in (query, key, value))
    output, *_ = torch.ops.aten._flash_attention_forward(
        *inputs, None, None, length, length, dropout, True, False,
        scale=scaling, window_size_left=sliding_window - 1, window_size_right=0,
    )  # fmt: skip
    return output, None


AttentionInterface.register("grinmoe_sdpa", sdpa_with_window_forward)


class AttentionConfig(VisibleWindowConfig):
    """A config as attention layers read it: `sdpa` means `sdpa_with_window_forward`.

    Masks, generation and checks go by the name `sdpa`, which therefore stays in the config itself.
    """

    @property
    def _attn_implementation(self) -> str:
        name = self._config._attn_implementation
        return "grinmoe_sdpa" if name == "sdpa" else name
