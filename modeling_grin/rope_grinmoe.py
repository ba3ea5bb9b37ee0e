"""Rotary positions, with the release's own scales of LongRoPE."""

from typing import Any

import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .configuration_grinmoe import GrinMoeConfig


class GrinMoeRotaryEmbedding(LlamaRotaryEmbedding):
    """RoPE of any type; LongRoPE as in the remote code of Phi-3.5-MoE, with the release's own scales.

    A forward pass uses LongRoPE's long factors if a row goes beyond `original_max_position_embeddings`, by its
    positions. Cached keys keep their rotation; `generate` computes them again where the factors change.
    """

    def __init__(self, config: GrinMoeConfig):
        super().__init__(config)
        rope: dict[str, Any] = dict(config.rope_parameters or {})
        self.mscales = None
        if self.rope_type == "longrope" and rope.get("long_mscale") is not None:
            self.mscales = rope["short_mscale"], rope["long_mscale"]
            self.original_length = rope["original_max_position_embeddings"]
            self.attention_scaling = 1.0  # replaced by the release's

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines `[rows, positions, head_dim]` of `position_ids` `[rows, positions]`, in `x`'s dtype."""
        if self.mscales is None:
            return super().forward(x, position_ids)
        short_mscale, long_mscale = self.mscales
        mscale = torch.where(position_ids.max() >= self.original_length, long_mscale, short_mscale)
        cos, sin = super().forward(mscale, position_ids)  # float32 until they are scaled
        return (cos * mscale).to(x.dtype), (sin * mscale).to(x.dtype)
