"""torch's own flash kernel with the released window, for rows beyond it: SDPA would need a mask of the full square.

`attn_implementation="sdpa"` uses it by itself on CUDA, in 16 bits, without padding, packing or cached keys. The
environment variable `GRIN_GPU_KERNELS=0` switches it off.
"""

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .configuration_grinmoe import GrinMoeConfig
from .experts_grinmoe import autocast_dtype
from .gpu_kernels_grinmoe import is_on

SDPA_WITH_WINDOW = "grinmoe_sdpa"
FLASH_DTYPES = (torch.bfloat16, torch.float16)
FLASH_CAPABILITY = (8, 0)
MAX_HEAD_DIM = 256


def fits_flash(head_dim: int) -> bool:
    """Whether torch's flash kernel takes heads of this size."""
    return head_dim <= MAX_HEAD_DIM and head_dim % 8 == 0


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
    """transformers' `sdpa_attention_forward`, which knows no window; where `create_mask` left it to us, flash.

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


AttentionInterface.register(SDPA_WITH_WINDOW, sdpa_with_window_forward)


class AttentionConfig:
    """A config as transformers' attention layers read it: `sdpa` means `sdpa_with_window_forward`.

    Masks, generation and checks go by the name `sdpa`, which therefore stays in the config itself.
    """

    def __init__(self, config: GrinMoeConfig):
        self._config = config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_config":  # while it is copied
            raise AttributeError(name)
        return getattr(self._config, name)

    @property
    def _attn_implementation(self) -> str:
        name = self._config._attn_implementation
        return SDPA_WITH_WINDOW if name == "sdpa" else name
