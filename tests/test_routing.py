"""Routing against loops, closed forms and transformers' own SparseMixer: keep set, sampling, weights, gradients."""

import math

import pytest
import torch
from transformers.models.phimoe.modeling_phimoe import sparsemixer as stock_sparsemixer

from modeling_grin import GrinMoeConfig, RoutingNoise, draw_noise, route
from modeling_grin.modeling_grinmoe import GrinMoeSparseMoeBlock
from modeling_grin.noise_grinmoe import fold_in, split_keys
from modeling_grin.routing_grinmoe import ROUTER_ESTIMATORS, jitter_input
from modeling_grin.training_grinmoe import LayerPass, TrainingPass

EPS = 0.15  # wide enough for several kept experts on random logits


def random_logits(num_tokens=64, num_experts=8, seed=0, dtype=torch.float64):
    return torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed), dtype=dtype) + 0.5


def kept_experts(z, taken, eps):
    """The keep set as REFERENCE has it: (z* - z_i) / max(|z_i|, z*) <= 2 eps, over the experts not taken."""
    left = [i for i in range(len(z)) if i not in taken]
    top = max(z[i] for i in left)
    return [i for i in left if z[i] == top or (top - z[i]) / max(abs(z[i]), top) <= 2 * eps]


def masked_softmax(z, kept):
    top = max(z[i] for i in kept)
    total = sum(math.exp(z[i] - top) for i in kept)
    return {i: math.exp(z[i] - top) / total for i in kept}


@pytest.mark.parametrize("num_experts", [4, 16, 64])
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
@pytest.mark.parametrize("shift", [0.0, -5.0], ids=["mixed", "all-negative"])
def test_inference_takes_the_best_and_does_not_renormalise(num_experts, top_k, shift):
    logits = random_logits(num_experts=num_experts, seed=num_experts + top_k) + shift
    routing = route(logits, top_k, EPS, training=False)
    for z, weights, experts in zip(logits.tolist(), routing.weights, routing.experts.tolist(), strict=True):
        taken = []
        for k in range(top_k):
            probs = masked_softmax(z, kept_experts(z, taken, EPS))
            best = max(probs, key=probs.get)
            assert experts[k] == best
            assert weights[k].item() == pytest.approx(probs[best], rel=1e-12)
            taken.append(best)
    assert (routing.weights < 1).any(), "no near-tie: the test would not see a wrong softmax"


def closed_form(logits, top_k, eps, noise, upstream):
    """Weights, experts and dz of SparseMixer-v2 with the draws given: dz = sum_k g_k p_D (onehot(D) - p)."""
    weights, experts = torch.zeros(len(logits), top_k).double(), torch.zeros(len(logits), top_k).long()
    gradient = torch.zeros_like(logits)
    for t, z in enumerate(logits.tolist()):
        taken = []
        for k in range(top_k):
            p = masked_softmax(z, kept_experts(z, taken, eps))
            drawn = max(p, key=lambda i: z[i] + noise.gumbel[k, t, i].item())
            is_argmax = drawn == max(p, key=p.get)
            scale = 1.0 if is_argmax or noise.uniform[k, t].item() < 1 / 4 else 0.3333
            weights[t, k], experts[t, k] = scale * p[drawn], drawn
            for i in p:
                gradient[t, i] += upstream[t, k] * p[drawn] * ((i == drawn) - p[i])
            taken.append(drawn)
    return weights, experts, gradient


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_training_equals_the_closed_form_with_the_draws_fixed(top_k):
    logits = random_logits(num_tokens=256, seed=top_k).requires_grad_()
    noise = draw_noise(logits, top_k, torch.Generator().manual_seed(1))
    upstream = random_logits(num_tokens=256, num_experts=top_k, seed=9)
    routing = route(logits, top_k, EPS, training=True, noise=noise)
    (routing.weights * upstream).sum().backward()

    weights, experts, gradient = closed_form(logits.detach(), top_k, EPS, noise, upstream)
    assert torch.equal(routing.experts, experts)
    torch.testing.assert_close(routing.weights.detach(), weights, rtol=1e-12, atol=0)
    torch.testing.assert_close(logits.grad, gradient, rtol=1e-10, atol=1e-14)
    argmax = route(logits, top_k, EPS, training=False).experts
    assert (experts != argmax).any() and (weights < 1 / 3).any(), "every draw was the argmax: nothing was tested"


def test_training_equals_transformers_sparsemixer_with_the_same_draws():
    """Stock code, an independent implementation of the release's, top-2: same experts, weights and gradient."""
    logits = random_logits(num_tokens=512, dtype=torch.float32).requires_grad_()
    upstream = random_logits(num_tokens=512, num_experts=2, seed=9, dtype=torch.float32)
    torch.manual_seed(3)
    stock_weights, stock_experts = stock_sparsemixer(logits, jitter_eps=EPS, training=True)
    (stock_gradient,) = torch.autograd.grad((stock_weights * upstream).sum(), logits)

    torch.manual_seed(3)  # the stock code's draws, in its order; it draws the last one twice
    exponential_1, uniform_1 = torch.empty(512, 8).exponential_(), torch.rand(512, 1)
    exponential_2, uniform_2 = torch.empty(512, 8).exponential_(), torch.rand(512, 1).uniform_()
    noise = RoutingNoise(
        gumbel=-torch.stack([exponential_1, exponential_2]).log(),
        uniform=1 - torch.stack([uniform_1[:, 0], uniform_2[:, 0]]),  # stock: B = [uniform > 3/4]
    )
    routing = route(logits, 2, EPS, training=True, noise=noise)
    (gradient,) = torch.autograd.grad((routing.weights * upstream).sum(), logits)
    assert torch.equal(routing.experts, stock_experts)
    torch.testing.assert_close(routing.weights, stock_weights, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, stock_gradient, rtol=1e-5, atol=1e-7)


def chi_square_p_value(counts, probabilities):
    expected = counts.sum() * probabilities
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sampling_frequencies_are_masked_softmax(dtype):
    """First choice, second choice given the first, and Heun's points: chi-square at the 0.1 % level, seed fixed."""
    num_draws = 200_000
    row = torch.tensor([2.0, 1.875, 1.75, 1.0, 1.9375], dtype=dtype)  # exact in bf16
    z = row.tolist()
    torch.manual_seed(0)
    routing = route(row.expand(num_draws, -1), 2, 0.07, training=True)

    probs = masked_softmax(z, kept_experts(z, [], 0.07))
    assert sorted(probs) == [0, 1, 2, 4], "the keep set this test was written for"
    counts = torch.bincount(routing.experts[:, 0], minlength=5).double()
    assert counts[3] == 0
    expected = torch.tensor(list(probs.values())).double()
    assert chi_square_p_value(counts[list(probs)], expected) > 1e-3
    for first in probs:
        second = masked_softmax(z, kept_experts(z, [first], 0.07))
        counts = torch.bincount(routing.experts[routing.experts[:, 0] == first, 1], minlength=5).double()
        assert counts.sum() == counts[list(second)].sum()
        assert chi_square_p_value(counts[list(second)], torch.tensor(list(second.values())).double()) > 1e-3

    not_argmax = routing.experts[:, 0] != 0
    prob = torch.tensor([probs.get(i, 0.0) for i in range(5)])[routing.experts[:, 0]]
    at_end = torch.isclose(routing.weights[:, 0], prob, rtol=1e-4)
    assert at_end[~not_argmax].all()
    counts = torch.stack([at_end[not_argmax].sum(), (~at_end[not_argmax]).sum()]).double()
    assert chi_square_p_value(counts, torch.tensor([0.25, 0.75]).double()) > 1e-3


def test_nothing_flows_through_the_keep_set_or_to_dropped_experts():
    logits = random_logits().requires_grad_()
    noise = draw_noise(logits, 1, torch.Generator().manual_seed(2))
    route(logits, 1, EPS, training=True, noise=noise).weights.sum().backward()
    for z, gradient in zip(logits.tolist(), logits.grad, strict=True):
        dropped = [i for i in range(8) if i not in kept_experts(z, [], EPS)]
        assert gradient[dropped].eq(0).all()
    # A softmax's gradient sums to zero; any path through z* or the threshold would show here.
    assert logits.grad.sum(-1).abs().max() < 1e-15
    assert logits.grad.abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("rows", "jitter_eps"),
    [
        ([[3.0, 1.0, -1.0, 0.5]], 0.0),  # one kept expert
        ([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [-2.0, -2.0, -2.0, -2.0]], 0.01),  # equal logits
        ([[-1.0, -2.0, -3.0, -1.01]], 0.1),  # all negative
        ([[-1.0, -2.0, -3.0, -1.01]], 10.0),  # all kept
        ([[1e4, -1e4, 1e-4, 0.0]], 0.01),  # far apart
        ([[0.0, -0.0, 1e-7, -1e-7]], 0.01),  # around zero
        ([[2.0, -torch.inf, 1.99, 0.0]], 0.01),  # an expert that the caller masked out
    ],
)
def test_no_nan_forward_or_backward(rows, jitter_eps, training, dtype):
    logits = torch.tensor(rows, dtype=dtype, requires_grad=True)
    for top_k in (1, 2, 3):
        torch.manual_seed(0)
        routing = route(logits, top_k, jitter_eps, training=training)
        assert torch.isfinite(routing.weights).all() and (routing.weights > 0).all()
        assert all(len(set(row)) == top_k for row in routing.experts.tolist())
        (gradient,) = torch.autograd.grad(routing.weights.sum(), logits)
        assert torch.isfinite(gradient).all()
        if jitter_eps == 0.0:
            assert routing.weights.eq(1).all() and gradient.eq(0).all(), "one kept expert: nothing to learn"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("possible", [0, 1, 2, 3])
@pytest.mark.parametrize("estimator", sorted(ROUTER_ESTIMATORS))
def test_experts_ruled_out_have_no_weight_and_no_token_has_one_twice(estimator, possible, training):
    """Of the other experts weights and gradients are those of a router that has no more than these."""
    top_k = 1 if estimator == "sparsemixer" else 3
    num_experts = 6
    left = torch.tensor([4, 1, 3])[:possible].sort().values
    values = random_logits(8, num_experts)
    logits = torch.full_like(values, -torch.inf).index_copy(1, left, values[:, left]).requires_grad_()
    noise = draw_noise(values, top_k, torch.Generator().manual_seed(0))
    routing = route(logits, top_k, 0.4, estimator=estimator, training=training, noise=noise)
    assert all(len(set(experts)) == top_k for experts in routing.experts.tolist())
    (routing.weights.sum() + (0 if routing.mixture is None else routing.mixture.weights.square().sum())).backward()
    assert torch.isfinite(logits.grad).all()
    chosen = min(top_k, possible)
    assert torch.equal(routing.weights[:, chosen:], torch.zeros(8, top_k - chosen).double())
    if chosen == 0:
        assert not logits.grad.any()
        return

    few = values[:, left].requires_grad_()
    own_noise = RoutingNoise(noise.gumbel[:chosen, :, left], noise.uniform[:chosen])
    expected = route(few, chosen, 0.4, estimator=estimator, training=training, noise=own_noise)
    (expected.weights.sum() + (0 if expected.mixture is None else expected.mixture.weights.square().sum())).backward()
    torch.testing.assert_close(routing.weights[:, :chosen], expected.weights)
    assert torch.equal(routing.experts[:, :chosen], left[expected.experts])
    torch.testing.assert_close(logits.grad[:, left], few.grad)


def test_low_precision_logits_are_routed_in_float32():
    logits = random_logits(dtype=torch.bfloat16)
    routing = route(logits, 2, EPS, training=False)
    exact = route(logits.float(), 2, EPS, training=False)
    assert routing.weights.dtype == torch.float32
    assert torch.equal(routing.weights, exact.weights) and torch.equal(routing.experts, exact.experts)


def make_layer_pass(keys):
    """A pass that has the layer's `keys`, and no balance loss."""
    return LayerPass(TrainingPass(torch.ones(len(keys), dtype=torch.bool), None, None, None), split_keys(keys))


@pytest.fixture
def block():
    config = GrinMoeConfig(
        hidden_size=16, intermediate_size=12, num_attention_heads=2, num_key_value_heads=1, num_local_experts=5,
        router_jitter_noise=0.3, input_jitter_noise=0.0, experts_implementation="eager",
    )  # fmt: skip
    block = GrinMoeSparseMoeBlock(config).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return block


def test_block_gradients_equal_the_closed_form(block):
    """Gate and experts, draws fixed, float64: the router gets dz from <g, Expert(x)>, the experts c p_D g."""
    hidden = random_logits(num_tokens=24, num_experts=16, seed=4).requires_grad_()
    upstream = random_logits(num_tokens=24, num_experts=16, seed=5)
    keys = torch.empty(24, dtype=torch.int64).random_(generator=torch.Generator().manual_seed(7))
    output, logits, experts = block.train()(hidden[None], make_layer_pass(keys))
    (output[0] * upstream).sum().backward()

    noise = draw_noise(logits, 2, keys=fold_in(keys, 0))
    x = hidden.detach()
    gate = block.gate.weight.detach()
    gate_up = block.experts.gate_up_proj.detach().clone().requires_grad_()
    down = block.experts.down_proj.detach().clone().requires_grad_()
    expert_outputs = torch.stack(  # [expert, token, hidden]
        [(torch.nn.functional.silu(x @ w[:12].T) * (x @ w[12:].T)) @ v.T for w, v in zip(gate_up, down, strict=True)]
    )
    chosen = expert_outputs[experts.T, torch.arange(24)]  # [k, token, hidden]
    weights, closed_experts, dz = closed_form(x @ gate.T, 2, 0.3, noise, (chosen.detach() * upstream).sum(-1).T)
    assert torch.equal(experts, closed_experts) and (weights < 0.5).any()
    torch.testing.assert_close(output[0].detach(), (weights.T[..., None] * chosen).sum(0).detach())
    torch.testing.assert_close(block.gate.weight.grad, dz.T @ x, rtol=1e-9, atol=1e-12)
    (weights.T[..., None] * chosen * upstream).sum().backward()
    torch.testing.assert_close(block.experts.gate_up_proj.grad, gate_up.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(block.experts.down_proj.grad, down.grad, rtol=1e-9, atol=1e-12)


def test_input_jitter_is_applied_once_out_of_place_and_in_training_only(block):
    block.config.input_jitter_noise = 0.1
    seen = {}
    block.gate.register_forward_pre_hook(lambda module, args: seen.update(gate=args[0]))
    block.experts.register_forward_pre_hook(lambda module, args: seen.update(experts=args[0]))
    hidden = random_logits(num_tokens=6, num_experts=16)[None]
    before = hidden.clone()

    block.train()(hidden)
    assert torch.equal(hidden, before), "the caller's tensor was changed"
    assert torch.equal(seen["gate"], seen["experts"]), "router and experts must see the same input"
    factor = seen["gate"] / hidden[0]
    assert factor.min() >= 0.9 and factor.max() <= 1.1
    assert factor.std() == pytest.approx(0.2 / math.sqrt(12), rel=0.2), "twice jittered, or not uniform"
    assert factor.flatten().unique().numel() == factor.numel(), "one draw per element"

    block.eval()(hidden)
    assert torch.equal(seen["gate"], before[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_input_jitter_is_unbiased_in_low_precision(block, dtype):

    torch.manual_seed(0)
    keys = torch.empty(1000, dtype=torch.int64).random_()
    jittered = jitter_input(torch.ones(1000, 100, dtype=dtype), 0.01, keys)
    assert jittered.dtype == dtype
    assert jittered.float().mean().item() == pytest.approx(1.0, abs=1e-4)


def test_unknown_estimator_is_named():
    with pytest.raises(ValueError, match="no_such_estimator"):
        route(random_logits(), 2, 0.01, estimator="no_such_estimator", training=True)


@pytest.mark.parametrize("num_tokens", [3, 700])
def test_input_jitter_scales_gradients_as_it_scales_inputs(num_tokens):
    tokens = torch.randn(num_tokens, 8, dtype=torch.float64, requires_grad=True)
    keys = torch.randint(2**60, (num_tokens,))
    output = jitter_input(tokens, 0.1, keys)
    (gradient,) = torch.autograd.grad(output, tokens, upstream := torch.randn_like(output))
    noise = (output / tokens).detach()
    torch.testing.assert_close(gradient, upstream * noise)
    assert (noise - 1).abs().max() < 0.1 and noise.unique().numel() > 7 * num_tokens
    one_by_one = torch.cat(
        [jitter_input(token[None], 0.1, key[None]) for token, key in zip(tokens, keys, strict=True)]
    )
    assert torch.equal(output, one_by_one), "chunks do not show"
