"""Rows beyond the window in torch's flash kernel, which has no CPU form: a stand-in with its meaning of the window."""

import copy
import pickle

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, StaticCache

from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM, masks_grinmoe
from modeling_grin.window_attention_grinmoe import AttentionConfig, can_use_flash

WINDOW = 7  # W: a query sees itself and W keys before it


def build(attention="sdpa"):
    config = GrinMoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, sliding_window=WINDOW, initializer_range=0.3, bos_token_id=None,
        eos_token_id=None, pad_token_id=None, attn_implementation=attention,
    )  # fmt: skip
    torch.manual_seed(0)
    return GrinMoeForCausalLM(config).eval()


def flash_stand_in(
    query, key, value, cum_q, cum_k, max_q, max_k, dropout, is_causal, debug, *, scale, window_size_left,
    window_size_right,
):  # fmt: skip
    """FlashAttention's contract: `[batch, sequence, heads, head_dim]`, the window as keys beside the query's own."""
    assert (cum_q, cum_k, max_q, max_k) == (None, None, query.shape[1], key.shape[1])
    assert (dropout, is_causal, debug, window_size_right) == (0.0, True, False, 0)
    distance = torch.arange(max_q)[:, None] - torch.arange(max_k)
    visible = (distance >= 0) & (distance <= window_size_left)
    states = (t.transpose(1, 2) for t in (query, key, value))
    return scaled_dot_product_attention(*states, visible, scale=scale, enable_gqa=True).transpose(1, 2), None


@pytest.fixture
def calls(monkeypatch):
    """A GPU with the stand-in; how often it was called."""
    calls = []

    def flash(*args, **kwargs):
        calls.append(args[0].shape)
        return flash_stand_in(*args, **kwargs)

    monkeypatch.setattr(masks_grinmoe, "can_use_flash", lambda *args: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
    return calls


@pytest.mark.parametrize("length", [WINDOW + 1, WINDOW + 2, 30])
@torch.no_grad()
def test_flash_has_the_released_window(calls, length):
    ids = torch.randint(32, (2, length), generator=torch.Generator().manual_seed(0))
    logits = build()(ids, use_cache=False).logits
    assert len(calls) == (2 if length > WINDOW + 1 else 0), "within the window SDPA does by itself"
    assert (logits - build("eager")(ids, use_cache=False).logits).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["padding", "packing"])
@torch.no_grad()
def test_masks_are_made_for(calls, kind):
    ids = torch.randint(32, (2, 30), generator=torch.Generator().manual_seed(0))
    inputs = {"use_cache": False}
    if kind == "padding":
        inputs["attention_mask"] = torch.ones_like(ids).index_fill(1, torch.arange(3), 0)
    elif kind == "packing":
        inputs["position_ids"] = torch.cat([torch.arange(18), torch.arange(12)]).expand(2, -1)
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    logits, expected = (build(attention)(ids, **inputs).logits[real] for attention in ("sdpa", "eager"))
    assert (logits - expected).abs().max() < 1e-5 and not calls


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@torch.no_grad()
def test_only_the_first_pass_beside_a_cache(calls, kind):
    model, ids = build(), torch.randint(32, (1, 33), generator=torch.Generator().manual_seed(0))
    cache = kind(config=model.config, **({"max_cache_len": 33} if kind is StaticCache else {}))
    parts = [model(part, past_key_values=cache).logits for part in (ids[:, :20], ids[:, 20:32], ids[:, 32:])]
    assert (torch.cat(parts, dim=1) - build("eager")(ids, use_cache=False).logits).abs().max() < 1e-5
    assert len(calls) == (2 if kind is DynamicCache else 0)


def test_the_kernel_takes_these_arguments_and_has_a_gradient():
    """On the meta device, with fewer heads of keys than of queries."""
    shapes = ((2, 12, 4, 16), (2, 12, 2, 16), (2, 12, 2, 16))
    states = [torch.empty(s, device="meta", dtype=torch.bfloat16, requires_grad=True) for s in shapes]
    output, *_ = torch.ops.aten._flash_attention_forward(
        *states, None, None, 12, 12, 0.0, True, False, scale=0.25, window_size_left=7, window_size_right=0
    )
    output.backward(torch.empty_like(output))
    assert output.shape == shapes[0]
    assert [state.grad.shape for state in states] == list(map(torch.Size, shapes))


def test_a_cpu_never_uses_it_and_a_config_can_be_copied():
    model = build()
    assert not can_use_flash(model.config, torch.zeros(1, 9, 16, dtype=torch.bfloat16))
    own = model.model.layers[0].self_attn.config
    for copied in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert isinstance(copied, AttentionConfig) and copied.hidden_size == 16
        assert copied._attn_implementation == "grinmoe_sdpa"
    model.set_attn_implementation("eager")
    assert own._attn_implementation == "eager"
