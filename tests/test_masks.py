"""What a token sees (window, padding, packing), and the implementations of attention and experts a user may name."""

import copy
import pickle
from collections import defaultdict
from itertools import product

import pytest
import torch
from checkpoints import FLEX_SIZES, released_config, released_tensors
from models import assert_close, random_ids, relative_error, tiny_model
from reference import reference_logits
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_flash_attention_utils import _process_flash_attention_kwargs

from modeling_grin import GrinMoeConfig, masks_grinmoe, route
from modeling_grin.masks_grinmoe import AttentionConfig, can_use_flash, create_mask

pytestmark = pytest.mark.usefixtures("far_from_ties")
ATTENTION = ["eager", "sdpa", "flex_attention"]
EXPERTS = ["grinmoe", "eager", "grouped_mm", "batched_mm"]
LENGTH = 24
WINDOW = 7  # W: a query sees itself and W keys before it


@pytest.fixture(autouse=True)
def _quick_flex_attention():
    """flex_attention has no backward pass on CPU, and compiles for every mask: 6 s each. test_parity compiles it."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield


def build(attention=None, experts=None, **overrides):
    return tiny_model(attention, experts, **{**FLEX_SIZES, "sliding_window": WINDOW, **overrides})


def make_cache(kind, model, length):
    return kind(config=model.config, **({"max_cache_len": length} if kind is StaticCache else {}))


def attend(query, key, value, window, padding=None, scale=None):
    """Attention of `[batch, heads, sequence, head_dim]`, by its definition: `window` keys before the query's own."""
    query_length, key_length = query.shape[2], key.shape[2]
    distance = torch.arange(key_length - query_length, key_length)[:, None] - torch.arange(key_length)
    visible = (distance >= 0) & (distance <= (key_length if window is None else window))
    if padding is not None:
        visible = visible & padding[:, None, None, -key_length:].bool()
    return scaled_dot_product_attention(query, key, value, visible, scale=scale, enable_gqa=True).transpose(1, 2), None


class FlashAttentionStandIn:
    """FlashAttention's contract on a CPU: the mask is None or 2-D padding, the window comes as an argument.

    transformers' own code turns that argument into FlashAttention's `window_size`, which is then applied with
    FlashAttention's meaning: (left, right) keys beside the query's own.
    """

    name = "stand_in"  # a name with "flash" in it would make transformers look for a kernel

    def __init__(self):
        self.calls = []

    def __call__(self, module, query, key, value, attention_mask, scaling, sliding_window, **kwargs):
        flash_kwargs = _process_flash_attention_kwargs(
            query_length=query.shape[2], key_length=key.shape[2], is_causal=True, sliding_window=sliding_window,
            supports_mapping=defaultdict(bool, window_size=True),
        )  # fmt: skip
        window, _ = flash_kwargs.get("window_size", (None, None))
        self.calls.append({"sliding_window": sliding_window, "window": window, **kwargs})
        assert attention_mask is None or attention_mask.dim() == 2
        return attend(query, key, value, window, attention_mask, scaling)


@pytest.fixture
def flash_stand_in():
    stand_in = FlashAttentionStandIn()
    AttentionInterface.register(stand_in.name, stand_in)
    AttentionMaskInterface.register(stand_in.name, flash_attention_mask)
    yield stand_in
    del AttentionInterface._global_mapping[stand_in.name]
    del AttentionMaskInterface._global_mapping[stand_in.name]


# --- the window: W in the config means W + 1 visible keys ------------------------------------------------------------


@pytest.mark.parametrize("window", [3, None])
def test_flash_attention_gets_the_window_and_the_positions_that_mark_packed_sequences(flash_stand_in, window):
    ids, positions = random_ids(2, LENGTH), torch.arange(LENGTH).expand(2, -1)
    logits = build(flash_stand_in.name, sliding_window=window)(ids, position_ids=positions).logits
    visible = None if window is None else window + 1
    assert [call["sliding_window"] for call in flash_stand_in.calls] == [visible] * 2
    assert all(call["window"] in (None, window) for call in flash_stand_in.calls)
    assert all(torch.equal(call["position_ids"], positions) for call in flash_stand_in.calls)
    assert_close(logits, build("eager", sliding_window=window)(ids).logits)


def released_window_logits(config, tensors, ids, visible_keys):
    """Closed form, float64, of one layer whose queries are zero (attention: the mean of the visible values) and whose
    experts give zero."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def project(x, name):
        return linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    layer = "model.layers.0"
    stream = weights["model.embed_tokens.weight"][ids[0]]
    values = project(norm(stream, f"{layer}.input_layernorm"), f"{layer}.self_attn.v_proj")
    sums = torch.cat([torch.zeros_like(values[:1]), values.cumsum(0)])
    end = torch.arange(1, len(stream) + 1)
    start = (end - visible_keys).clamp(min=0)
    mean = (sums[end] - sums[start]) / (end - start)[:, None]
    stream = stream + project(mean, f"{layer}.self_attn.o_proj")
    return project(norm(stream, "model.norm"), "lm_head")[None]


@pytest.mark.parametrize(
    ("attention", "kind"),
    [
        *product((*ATTENTION, FlashAttentionStandIn.name), (None, DynamicCache)),
        *product(("eager", "sdpa"), (StaticCache,)),
    ],
)
def test_released_window_of_2047_means_2048_keys(flash_stand_in, attention, kind):
    sizes = {"hidden_size": 16, "head_dim": 4, "num_key_value_heads": 4, "num_hidden_layers": 1}
    config = released_config(torch_dtype="float32", **{**FLEX_SIZES, **sizes})
    tensors = released_tensors(config)
    for name, tensor in tensors.items():
        if ".q_proj." in name or ".w2." in name:
            tensor.zero_()
    model = build(attention, tensors=tensors, sliding_window=config["sliding_window"], **sizes)
    ids = random_ids(1, 2100)
    ids[0, :60] = 7  # each of these values moves the mean the same way when it leaves the window

    if kind is None:
        logits = model(ids, use_cache=False).logits
    else:
        cache = make_cache(kind, model, 2100)
        steps = [ids[:, :2040], *ids[:, 2040:].split(1, dim=1)]
        logits = torch.cat([model(step, past_key_values=cache).logits for step in steps], dim=1)

    assert_close(logits, released_window_logits(config, tensors, ids, 2048))
    for off_by_one in (2047, 2049):
        assert relative_error(logits, released_window_logits(config, tensors, ids, off_by_one)) > 1e-4


# --- padding and packing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attention", "experts", "side"),
    [
        *product([*ATTENTION, FlashAttentionStandIn.name], ["grinmoe"], ["left", "right"]),
        *product(["sdpa"], EXPERTS[1:], ["left"]),  # experts see tokens, whatever their order
    ],
)
def test_padded_batch_equals_its_sequences(flash_stand_in, attention, experts, side):
    model = build(attention, experts)
    ids, lengths = random_ids(3, LENGTH), [LENGTH, 15, 5]
    mask = torch.stack([torch.arange(LENGTH) < length for length in lengths]).long()
    if side == "left":
        mask = mask.flip(1)
    alone = build("eager", "eager")
    single = [alone(row[row_mask][None]).logits[0] for row, row_mask in zip(ids, mask.bool(), strict=True)]
    for positions in (None, (mask.cumsum(1) - 1).clamp(min=0)):
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        assert logits.isfinite().all()
        for row, row_mask, expected in zip(logits, mask.bool(), single, strict=True):
            assert_close(row[row_mask], expected)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("attention", ATTENTION)
def test_packed_sequences_equal_the_separate_ones(attention, use_cache):
    """Positions that start again at 0 separate sequences, whether or not a cache is asked for (the config does)."""
    model = build(attention)
    sequences = random_ids(1, LENGTH)[0].split([11, 3, 10])
    positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])[None]
    logits = model(torch.cat(sequences)[None], position_ids=positions, use_cache=use_cache).logits
    assert_close(logits, torch.cat([model(sequence[None]).logits for sequence in sequences], dim=1))


# --- masks are made only where the window hides a key: without one, SDPA runs its flash kernel -----------------------


@pytest.mark.parametrize("has_padding_mask", [False, True])
def test_no_mask_up_to_one_key_more_than_the_window(has_padding_mask):
    config = GrinMoeConfig(**released_config(sliding_window=WINDOW), attn_implementation="sdpa")

    def own_mask(length):
        padding = torch.ones(1, length, dtype=torch.int64) if has_padding_mask else None
        return create_mask(config, torch.zeros(1, length, 32), padding, None, torch.arange(length)[None])

    assert own_mask(1) is own_mask(WINDOW) is own_mask(WINDOW + 1) is None
    distance = torch.arange(WINDOW + 2)[:, None] - torch.arange(WINDOW + 2)
    assert torch.equal(own_mask(WINDOW + 2)[0, 0], (distance >= 0) & (distance <= WINDOW))


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_masks_beside_a_cache(kind, monkeypatch):
    """A cache that keeps the window's keys alone needs no mask for one token; logits say that all is seen."""
    model, masks, ids = build("sdpa"), [], random_ids(1, 3 * WINDOW)

    def spy(query, key, value, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **kwargs)

    expected = model(ids, use_cache=False).logits
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    cache = make_cache(kind, model, 3 * WINDOW)
    parts = [ids[:, : WINDOW + 1], *ids[:, WINDOW + 1 :].split(1, dim=1)]
    assert_close(torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1), expected)
    assert masks[0] is None, "an empty cache"
    assert kind is StaticCache or all(mask is None for mask in masks)


# --- rows beyond the window in torch's flash kernel, which has no CPU form: a stand-in with its meaning of the window


def torchs_flash(
    query, key, value, cum_q, cum_k, max_q, max_k, dropout, is_causal, debug, *, scale, window_size_left,
    window_size_right,
):  # fmt: skip
    """FlashAttention's contract: `[batch, sequence, heads, head_dim]`, the window as keys beside the query's own."""
    assert (cum_q, cum_k, max_q, max_k) == (None, None, query.shape[1], key.shape[1])
    assert (dropout, is_causal, debug, window_size_right) == (0.0, True, False, 0)
    return attend(*(t.transpose(1, 2) for t in (query, key, value)), window_size_left, scale=scale)


@pytest.fixture
def calls(monkeypatch):
    """A GPU with the stand-in; how often it was called."""
    calls = []

    def flash(*args, **kwargs):
        calls.append(args[0].shape)
        return torchs_flash(*args, **kwargs)

    monkeypatch.setattr(masks_grinmoe, "can_use_flash", lambda *args: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
    return calls


@pytest.mark.parametrize(
    ("length", "inputs", "num_calls"),
    [
        (WINDOW + 1, {}, 0),  # SDPA by itself
        (WINDOW + 2, {}, 2),
        (30, {}, 2),
        (30, {"attention_mask": torch.ones(2, 30, dtype=torch.long).index_fill(1, torch.arange(3), 0)}, 0),
        (30, {"position_ids": torch.cat([torch.arange(18), torch.arange(12)]).expand(2, -1)}, 0),
    ],
    ids=["within", "just beyond", "beyond", "padding", "packing"],
)
def test_flash_has_the_released_window(calls, length, inputs, num_calls):
    ids = random_ids(2, length)
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    logits, expected = (build(name)(ids, use_cache=False, **inputs).logits[real] for name in ("sdpa", "eager"))
    assert_close(logits, expected)
    assert len(calls) == num_calls


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_flash_beside_a_cache_is_for_the_first_pass(calls, kind):
    model, ids = build("sdpa"), random_ids(1, 33)
    cache = make_cache(kind, model, 33)
    parts = [model(part, past_key_values=cache).logits for part in (ids[:, :20], ids[:, 20:32], ids[:, 32:])]
    assert_close(torch.cat(parts, dim=1), build("eager")(ids, use_cache=False).logits)
    assert len(calls) == (2 if kind is DynamicCache else 0)


@torch.enable_grad()
def test_the_kernel_takes_these_arguments_and_has_a_gradient():
    """On the meta device, with fewer heads of keys than of queries."""
    shapes = ((2, 12, 4, 16), (2, 12, 2, 16), (2, 12, 2, 16))
    states = [torch.empty(s, device="meta", dtype=torch.bfloat16, requires_grad=True) for s in shapes]
    output, *_ = torch.ops.aten._flash_attention_forward(
        *states, None, None, 12, 12, 0.0, True, False, scale=0.25, window_size_left=7, window_size_right=0
    )
    output.backward(torch.empty_like(output))
    assert [state.grad.shape for state in states] == list(map(torch.Size, shapes))


def test_a_cpu_never_uses_it_and_a_config_can_be_copied():
    model = build("sdpa")
    assert not can_use_flash(model.config, torch.zeros(1, 9, 16, dtype=torch.bfloat16))
    own = model.model.layers[0].self_attn.config
    for copied in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert isinstance(copied, AttentionConfig) and copied.hidden_size == 32
        assert copied._attn_implementation == "grinmoe_sdpa"
    model.set_attn_implementation("eager")
    assert own._attn_implementation == "eager"


# --- implementations and outputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_implementations_equal_the_reference(attention, experts):
    config = released_config(torch_dtype="float32", sliding_window=WINDOW, **FLEX_SIZES)
    ids = random_ids(1, LENGTH)
    expected = reference_logits(config, released_tensors(config), ids[0].tolist())
    model = build(attention, experts)
    assert (model.config._attn_implementation, model.config._experts_implementation) == (attention, experts)
    assert_close(model(ids).logits[0], expected)


def test_router_logits_reproduce_the_selected_experts():
    model = build()
    outputs = model.model(random_ids(2, LENGTH), output_router_logits=True, output_selected_experts=True)
    for logits, selected in zip(outputs.router_logits, outputs.selected_experts, strict=True):
        routing = route(logits, model.config.num_experts_per_tok, model.config.router_jitter_noise, training=False)
        assert torch.equal(routing.experts, selected)
        assert len(selected.unique()) > model.config.num_experts_per_tok
