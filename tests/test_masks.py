"""What a token sees (window, padding, packing), and the implementations of attention and experts a user may name."""

from collections import defaultdict
from itertools import product

import pytest
import torch
from checkpoints import FLEX_SIZES, released_config, released_tensors
from reference import reference_logits
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_flash_attention_utils import _process_flash_attention_kwargs

from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM, route

pytestmark = pytest.mark.usefixtures("far_from_ties")
ATTENTION = ["eager", "sdpa", "flex_attention"]
EXPERTS = ["grinmoe", "eager", "grouped_mm", "batched_mm"]
LENGTH = 24


@pytest.fixture(autouse=True)
def _quick_flex_attention():
    """flex_attention has no backward pass on CPU, and compiles for every mask: 6 s each. test_parity compiles it."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield


def make_config(**overrides):
    return released_config(torch_dtype="float32", **{**FLEX_SIZES, **overrides})


def build(attention=None, experts=None, tensors=None, **overrides):
    """A float32 model with (by default, the) tensors of a tiny released checkpoint."""
    config = make_config(eos_token_id=None, pad_token_id=None, **overrides)
    model = GrinMoeForCausalLM(
        GrinMoeConfig.from_dict(config, attn_implementation=attention, experts_implementation=experts)
    )
    model.load_state_dict(tensors or released_tensors(config))
    return model.eval()


def random_ids(*shape, vocab_size=131):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def assert_close(actual, expected, tolerance=1e-5):
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) < tolerance


class FlashAttentionStandIn:
    """FlashAttention's contract on a CPU: the mask is None or 2-D padding, the window comes as an argument.

    transformers' own code turns that argument into FlashAttention's `window_size`, which is then applied with
    FlashAttention's meaning: (left, right) keys beside the query's own.
    """

    name = "stand_in"  # a name with "flash" in it would make transformers look for a kernel

    def __init__(self):
        self.calls = []

    def __call__(self, module, query, key, value, attention_mask, scaling, sliding_window, **kwargs):
        query_length, key_length = query.shape[2], key.shape[2]
        flash_kwargs = _process_flash_attention_kwargs(
            query_length=query_length, key_length=key_length, is_causal=True, sliding_window=sliding_window,
            supports_mapping=defaultdict(bool, window_size=True),
        )  # fmt: skip
        window_size = flash_kwargs.get("window_size")
        self.calls.append({"sliding_window": sliding_window, "window_size": window_size, **kwargs})
        distance = torch.arange(key_length - query_length, key_length)[:, None] - torch.arange(key_length)
        visible = distance >= 0
        if window_size is not None:
            visible = visible & (distance <= window_size[0])
        if attention_mask is not None:
            assert attention_mask.dim() == 2
            visible = visible & attention_mask[:, None, None, -key_length:].bool()
        output = scaled_dot_product_attention(query, key, value, visible, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2), None


@pytest.fixture
def flash_stand_in():
    stand_in = FlashAttentionStandIn()
    AttentionInterface.register(stand_in.name, stand_in)
    AttentionMaskInterface.register(stand_in.name, flash_attention_mask)
    yield stand_in
    del AttentionInterface._global_mapping[stand_in.name]
    del AttentionMaskInterface._global_mapping[stand_in.name]


# --- the window: W in the config means W + 1 visible keys ------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("attention", [*ATTENTION, FlashAttentionStandIn.name])
def test_key_at_distance_w_is_the_last_one_seen(flash_stand_in, attention, window, use_cache):
    model = build(attention, num_hidden_layers=1, sliding_window=window)
    ids, changed = random_ids(1, LENGTH), 3
    other_ids = ids.clone()
    other_ids[0, changed] = (ids[0, changed] + 1) % model.config.vocab_size
    logits, other_logits = (model(x, use_cache=use_cache).logits[0] for x in (ids, other_ids))

    assert relative_error(other_logits[changed + window], logits[changed + window]) > 1e-3
    assert_close(other_logits[changed + window + 1 :], logits[changed + window + 1 :], 1e-6)


@pytest.mark.parametrize("window", [1, 4, LENGTH - 1, None])
def test_attention_weights_are_positive_inside_the_window_and_zero_outside(window):
    model = build("eager", sliding_window=window)
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    visible = (distance >= 0) & (distance <= (LENGTH if window is None else window))
    for weights in model(random_ids(2, LENGTH), output_attentions=True).attentions:
        assert torch.equal(weights > 0, visible.expand_as(weights))


@pytest.mark.parametrize("window", [3, None])
def test_flash_attention_gets_a_window_of_w_keys_before_the_query(flash_stand_in, window):
    ids = random_ids(2, LENGTH)
    logits = build(flash_stand_in.name, sliding_window=window)(ids).logits
    visible = None if window is None else window + 1
    assert [call["sliding_window"] for call in flash_stand_in.calls] == [visible] * 2
    assert all(call["window_size"] is None or call["window_size"][0] == window for call in flash_stand_in.calls)
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
    ("attention", "cache"),
    [(attention, cache) for attention in (*ATTENTION, FlashAttentionStandIn.name) for cache in ("no cache", "dynamic")]
    + [("eager", "static"), ("sdpa", "static")],
)
def test_released_window_of_2047_means_2048_keys(flash_stand_in, attention, cache):
    sizes = {"hidden_size": 16, "head_dim": 4, "num_key_value_heads": 4, "num_hidden_layers": 1}
    config = make_config(**sizes)
    assert config["sliding_window"] == 2047
    tensors = released_tensors(config)
    for name, tensor in tensors.items():
        if ".q_proj." in name or ".w2." in name:
            tensor.zero_()
    model = build(attention, tensors=tensors, **sizes)
    ids = random_ids(1, 2100)
    ids[0, :60] = 7  # each of these values moves the mean the same way when it leaves the window

    if cache == "no cache":
        logits = model(ids, use_cache=False).logits
    else:
        cache = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, 2100)
        steps = [ids[:, :2040], *ids[:, 2040:].split(1, dim=1)]
        logits = torch.cat([model(step, past_key_values=cache).logits for step in steps], dim=1)

    expected = released_window_logits(config, tensors, ids, 2048)
    assert_close(logits, expected)
    for off_by_one in (2047, 2049):
        assert relative_error(logits, released_window_logits(config, tensors, ids, off_by_one)) > 1e-4


# --- padding and packing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attention", "experts", "side", "positions"),
    [
        *product(
            [*ATTENTION, FlashAttentionStandIn.name], ["grinmoe"], ["left", "right"], ["default", "from the mask"]
        ),
        *product(["sdpa"], EXPERTS, ["left"], ["from the mask"]),  # experts see tokens, whatever their order
    ],
)
def test_padded_batch_equals_its_sequences(flash_stand_in, attention, experts, side, positions):
    model = build(attention, experts, sliding_window=7)
    ids, lengths = random_ids(3, LENGTH), [LENGTH, 15, 5]
    mask = torch.stack([torch.arange(LENGTH) < length for length in lengths]).long()
    if side == "left":
        mask = mask.flip(1)
    position_ids = None if positions == "default" else (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=position_ids).logits
    assert logits.isfinite().all()

    single = build("eager", "eager", sliding_window=7)
    for row, row_mask in enumerate(mask.bool()):
        assert_close(logits[row, row_mask], single(ids[row : row + 1, row_mask]).logits[0])


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("attention", ATTENTION)
def test_packed_sequences_equal_the_separate_ones(attention, use_cache):
    """Positions that start again at 0 separate sequences, whether or not a cache is asked for (the config does)."""
    model = build(attention, sliding_window=7)
    sequences = random_ids(1, LENGTH)[0].split([11, 3, 10])
    positions = [torch.arange(len(sequence)) for sequence in sequences]
    packed, packed_positions = torch.cat(sequences)[None], torch.cat(positions)[None]
    logits = model(packed, position_ids=packed_positions, use_cache=use_cache).logits
    assert_close(logits, torch.cat([model(sequence[None]).logits for sequence in sequences], dim=1))


def test_packed_sequences_equal_the_reference():
    config = make_config(sliding_window=7)
    lengths = [11, 3, 10]
    ids = random_ids(1, sum(lengths))
    positions = [position for length in lengths for position in range(length)]
    segments = [segment for segment, length in enumerate(lengths) for _ in range(length)]
    expected = reference_logits(config, released_tensors(config), ids[0].tolist(), positions, segments)
    assert_close(build(sliding_window=7)(ids, position_ids=torch.tensor([positions])).logits[0], expected)


# --- implementations and outputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_implementations_equal_the_reference(attention, experts):
    config = make_config(sliding_window=7)
    ids = random_ids(1, LENGTH)
    expected = reference_logits(config, released_tensors(config), ids[0].tolist())
    model = build(attention, experts, sliding_window=7)
    assert (model.config._attn_implementation, model.config._experts_implementation) == (attention, experts)
    assert_close(model(ids).logits[0], expected)


@pytest.mark.parametrize("attention", ATTENTION)
def test_no_window(attention):
    """sliding_window=None: everything before is seen, as with a window that reaches back to the first token."""
    ids = random_ids(2, LENGTH)
    logits = build(attention, sliding_window=None)(ids).logits
    assert_close(logits, build(attention, sliding_window=LENGTH - 1)(ids).logits)
    assert relative_error(build(attention, sliding_window=LENGTH - 2)(ids).logits[:, -1], logits[:, -1]) > 1e-4


def test_flash_attention_gets_the_positions_that_mark_packed_sequences(flash_stand_in):
    position_ids = torch.tensor([[*range(LENGTH - 9), *range(9)]])
    build(flash_stand_in.name)(random_ids(1, LENGTH), position_ids=position_ids)
    assert all(torch.equal(call["position_ids"], position_ids) for call in flash_stand_in.calls)


def test_own_experts_function_is_called():
    calls = []

    def own_experts(experts, hidden_states, top_k_index, top_k_weights):
        calls.append(top_k_index)
        output = torch.zeros_like(hidden_states)
        for token, (chosen, weights) in enumerate(zip(top_k_index.tolist(), top_k_weights, strict=True)):
            for expert, weight in zip(chosen, weights, strict=True):
                gate, up = linear(hidden_states[token], experts.gate_up_proj[expert]).chunk(2)
                inner = torch.nn.functional.silu(gate) * up
                output[token] += weight * linear(inner, experts.down_proj[expert])
        return output

    ids = random_ids(2, LENGTH)
    ALL_EXPERTS_FUNCTIONS.register("own_experts", own_experts)
    try:
        logits = build(experts="own_experts")(ids).logits
    finally:
        del ALL_EXPERTS_FUNCTIONS._global_mapping["own_experts"]
    assert [call.shape for call in calls] == [(2 * LENGTH, 2)] * 2  # once per layer
    assert_close(logits, build(experts="eager")(ids).logits)


@pytest.mark.parametrize("kind", ["attn", "experts"])
def test_unknown_implementation_is_refused(kind):
    message = f'`{kind}_implementation="misspelt"` is not supported'
    names = {"attn": {"attention": "misspelt"}, "experts": {"experts": "misspelt"}}[kind]
    with pytest.raises(ValueError, match=message):
        build(**names)
    model = build()
    with pytest.raises(ValueError, match=message):
        getattr(model, f"set_{kind}_implementation")("misspelt")


@pytest.mark.parametrize("experts", EXPERTS)
def test_router_logits_reproduce_the_selected_experts(experts):
    model = build(experts=experts)
    outputs = model.model(random_ids(2, LENGTH), output_router_logits=True, output_selected_experts=True)
    for logits, selected in zip(outputs.router_logits, outputs.selected_experts, strict=True):
        routing = route(logits, model.config.num_experts_per_tok, model.config.router_jitter_noise, training=False)
        assert torch.equal(routing.experts, selected)
        assert len(selected.unique()) > model.config.num_experts_per_tok
