"""`experts_implementation="grinmoe"`: the same function and gradients as transformers' loop over experts."""

from functools import partial

import pytest
import torch
from checkpoints import TINY_SIZES
from models import tiny_model
from transformers import PhimoeConfig, PhimoeForCausalLM
from transformers.models.phimoe.modeling_phimoe import PhimoeExperts

from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM
from modeling_grin.experts_grinmoe import run_experts
from modeling_grin.kernels.cpu_experts import ROW_MULTIPLE
from modeling_grin.modeling_grinmoe import GrinMoeExperts

H, F, E = 24, 20, 8


def make_experts(implementation, dtype=torch.float64, seed=0, kind=GrinMoeExperts, **settings):
    """Experts with weights that `seed` alone decides."""
    config_class = GrinMoeConfig if kind is GrinMoeExperts else PhimoeConfig
    config = config_class(hidden_size=H, intermediate_size=F, num_local_experts=E, num_attention_heads=4,
                          num_key_value_heads=2, **settings)  # fmt: skip
    config._experts_implementation = implementation
    experts = kind(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            parameter = getattr(experts, name)
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return experts


def make_inputs(num_tokens, top_k, num_used=E, dtype=torch.float64, seed=1):
    """Tokens, experts, weights, and the gradient of the output; only the last `num_used` experts are chosen."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    order = torch.rand(num_tokens, num_used, generator=generator).argsort(dim=-1)
    return randn(num_tokens, H), E - num_used + order[:, :top_k], randn(num_tokens, top_k), randn(num_tokens, H)


def run(experts, tokens, index, weights, grad_output, compute=None):
    """Output of `compute`, by default the experts themselves, and the gradients of tokens, weights and parameters."""
    tokens, weights = tokens.clone().requires_grad_(), weights.clone().requires_grad_()
    output = (compute or experts)(tokens, index, weights)
    learnt = [p for p in experts.parameters() if p.requires_grad]
    return output, *torch.autograd.grad(output, [tokens, weights, *learnt], grad_output)


def assert_close(actual, expected, tolerance):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape and (a.double() - b.double()).norm() <= tolerance * b.double().norm()


@pytest.mark.parametrize("num_used", [3, E], ids=["experts without tokens", "all experts"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("num_tokens", [1, 5, 40, 700])
def test_equals_stock_phimoe_in_float64(num_tokens, top_k, num_used):
    inputs = make_inputs(num_tokens, top_k, num_used)
    actual = run(make_experts("grinmoe"), *inputs)
    assert_close(actual, run(make_experts("eager", kind=PhimoeExperts), *inputs), 1e-13)
    assert (actual[3][: E - num_used] == 0).all(), "an expert without tokens has a gradient of zero"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_lower_precision_is_as_near_to_float64_as_stock_phimoe(dtype, tolerance):
    inputs = make_inputs(300, 2)
    expected = run(make_experts("eager", kind=PhimoeExperts), *inputs)
    inputs = tuple(t if t.dtype == torch.int64 else t.to(dtype) for t in inputs)
    assert_close(run(make_experts("grinmoe", dtype), *inputs), expected, tolerance)


def test_an_expert_with_all_tokens_a_weight_of_zero_and_one_chosen_twice():
    tokens, _, weights, grad_output = make_inputs(50, 2)
    weights[3] = 0
    index = torch.full((50, 2), 5)
    expected = run(make_experts("eager", kind=PhimoeExperts), tokens, index, weights, grad_output)
    assert_close(run(make_experts("grinmoe"), tokens, index, weights, grad_output), expected, 1e-13)


def test_no_tokens():
    output, grad, *_, grad_down = run(make_experts("grinmoe"), *make_inputs(0, 2))
    assert output.shape == grad.shape == (0, H) and (grad_down == 0).all()


@pytest.mark.parametrize("frozen", [("gate_up_proj",), ("down_proj",), ("gate_up_proj", "down_proj")], ids=str)
def test_frozen_weights_get_no_gradient(frozen):
    inputs = make_inputs(40, 2)
    found = []
    for implementation in ("grinmoe", "eager"):
        experts = make_experts(implementation)
        for name in frozen:
            getattr(experts, name).requires_grad_(False)
        found.append(run(experts, *inputs))
    assert_close(*found, 1e-13)


@pytest.mark.parametrize("num_tokens", [1, 2, 90])
def test_inference_equals_training(num_tokens):
    experts, (tokens, index, weights, _) = make_experts("grinmoe"), make_inputs(num_tokens, 2)
    expected = experts(tokens, index, weights)
    with torch.no_grad():
        torch.testing.assert_close(experts(tokens, index, weights), expected, rtol=1e-13, atol=1e-14)


def test_under_autocast_weights_and_their_gradients_stay_in_float32():
    inputs = make_inputs(300, 2)
    expected = run(make_experts("eager", kind=PhimoeExperts), *inputs)
    inputs = tuple(t if t.dtype == torch.int64 else t.float() for t in inputs)
    experts = make_experts("grinmoe", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(experts, *inputs, compute=partial(run_experts, experts))
    assert all(tensor.dtype == torch.float32 for tensor in actual)
    assert_close(actual, expected, 1e-2)
    assert (actual[0].double() - expected[0]).norm() > 1e-4 * expected[0].norm(), "computed in bfloat16"


@pytest.mark.parametrize("settings", [{"hidden_act": "gelu"}, {"expert_dropout": 0.5}], ids=str)
def test_what_it_does_not_cover_is_left_to_transformers(settings):
    inputs = make_inputs(40, 2, dtype=torch.float32)
    found = []
    for implementation in ("grinmoe", "grouped_mm"):
        torch.manual_seed(0)
        found.append(run(make_experts(implementation, torch.float32, **settings).train(), *inputs))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    swiglu = run(make_experts("grinmoe", torch.float32), *inputs)
    assert not torch.allclose(found[0][0], swiglu[0])


def test_keeps_gate_and_up_alone():
    def saved_bytes(implementation):
        kept = {}
        experts, (tokens, index, weights, _) = (
            make_experts(implementation, torch.float32),
            make_inputs(300, 2, dtype=torch.float32),
        )
        own = {p.data_ptr() for p in experts.parameters()}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes(), tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            experts(tokens.requires_grad_(), index, weights.requires_grad_())
        return sum(nbytes for nbytes, _ in kept.values())

    rows = 300 * 2 + E * ROW_MULTIPLE
    assert saved_bytes("grinmoe") <= 4 * (rows * 2 * F + 300 * (H + 2)) < 0.6 * saved_bytes("grouped_mm")


def test_is_the_default_and_stock_models_may_name_it():
    assert tiny_model().config._experts_implementation == "grinmoe"
    stock = PhimoeForCausalLM(PhimoeConfig(**TINY_SIZES, pad_token_id=None)).eval()
    ids = torch.randint(131, (2, 9))
    expected = stock(ids).logits
    stock.set_experts_implementation("grinmoe")
    torch.testing.assert_close(stock(ids).logits, expected)


@pytest.mark.parametrize("module", [__name__, "a_notebook"])
def test_can_be_changed_in_a_users_own_class(module):
    """Whose module does not repeat what transformers looks for in the source, or has none."""
    Own = type("Own", (GrinMoeForCausalLM,), {"__module__": module})
    model = Own(tiny_model().config)
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    implementations = {(c._experts_implementation, c._attn_implementation) for c in (model.config, model.model.config)}
    assert implementations == {("eager", "eager")}
