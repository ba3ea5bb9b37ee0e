"""Masks are made only where the window hides a key: without one, SDPA runs its flash kernel."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, StaticCache

from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM
from modeling_grin.masks_grinmoe import create_mask

WINDOW = 7  # W: a query sees itself and W keys before it
CONFIG = GrinMoeConfig(
    vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, num_local_experts=4, sliding_window=WINDOW, bos_token_id=None, eos_token_id=None,
    pad_token_id=None,
)  # fmt: skip


def mask_of(length, cache=None, attention_mask=None, past=0):
    config = GrinMoeConfig.from_dict(CONFIG.to_dict(), attn_implementation="sdpa")
    positions = torch.arange(past, past + length)[None]
    return create_mask(
        config,
        inputs_embeds=torch.zeros(1, length, 16),
        attention_mask=attention_mask,
        cache=cache,
        position_ids=positions,
    )


def visible_keys(length):
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return ((distance >= 0) & (distance <= WINDOW))[None, None]


@pytest.mark.parametrize("has_padding_mask", [False, True])
def test_no_mask_up_to_one_key_more_than_the_window(has_padding_mask):
    def own_mask(length):
        return mask_of(length, attention_mask=torch.ones(1, length, dtype=torch.int64) if has_padding_mask else None)

    assert own_mask(1) is own_mask(WINDOW) is own_mask(WINDOW + 1) is None
    assert torch.equal(own_mask(WINDOW + 2), visible_keys(WINDOW + 2))


def test_padding_still_makes_a_mask():
    padding = torch.ones(1, WINDOW + 1, dtype=torch.int64)
    padding[0, 0] = 0
    expected = torch.tril(torch.ones(WINDOW + 1, WINDOW + 1, dtype=torch.bool))
    mask = mask_of(WINDOW + 1, attention_mask=padding)
    assert torch.equal(mask[0, 0, 1:], (expected & (padding[0] != 0))[1:])


def test_packed_sequences_still_make_a_mask():
    config = GrinMoeConfig.from_dict(CONFIG.to_dict(), attn_implementation="sdpa")
    positions = torch.tensor([[*range(5), *range(3)]])
    mask = create_mask(
        config, inputs_embeds=torch.zeros(1, 8, 16), attention_mask=None, cache=None, position_ids=positions
    )
    assert torch.equal(mask[0, 0], torch.block_diag(*(torch.tril(torch.ones(n, n)) for n in (5, 3))).bool())


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@torch.no_grad()
def test_masks_beside_a_cache(kind, monkeypatch):
    """A cache that keeps the window's keys alone needs no mask for one token; logits say that all is seen."""
    torch.manual_seed(0)
    model = GrinMoeForCausalLM(CONFIG).eval()
    masks = []

    def spy(query, key, value, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    ids = torch.randint(32, (1, 3 * WINDOW))
    expected = model(ids, use_cache=False).logits
    masks.clear()
    cache = kind(config=model.config, **({"max_cache_len": 3 * WINDOW} if kind is StaticCache else {}))
    parts = [ids[:, : WINDOW + 1], *ids[:, WINDOW + 1 :].split(1, dim=1)]
    logits = torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)
    assert (logits - expected).abs().max() < 1e-5
    assert masks[0] is None, "an empty cache"
    if kind is DynamicCache:
        assert all(mask is None for mask in masks)
