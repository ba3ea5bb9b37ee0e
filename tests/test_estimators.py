"""The router-gradient estimators against closed forms with the draws fixed, and inside a training model."""

import pytest
import torch

from modeling_grin import ROUTER_ESTIMATORS, GrinMoeConfig, GrinMoeForCausalLM, draw_noise, route
from modeling_grin.modeling_grinmoe import GrinMoeSparseMoeBlock
from modeling_grin.noise_grinmoe import fold_in

EPS = 0.4
TOP_K = {"sparsemixer": 1}
# As the paper's algorithms have them: temperature, P(B = 1), scale at the inner point, factor of the gate's gradient,
# factor of the expert's (None: the forward scale).
FAMILY = {
    "sparsemixer_v2": (1, 1 / 4, 0.3333, 1, None),
    "sparsemixer_v2_paper": (1, 1 / 4, 1 / 3, 1, 1),
    "sparsemixer_v2_star": (2, 5 / 8, 1 / 3, 2, 2),
    "sparsemixer": (1, 1 / 2, 1 / 2, 2, None),
}


def make_block(estimator):
    config = GrinMoeConfig(
        hidden_size=8, intermediate_size=8, num_attention_heads=2, num_key_value_heads=1, num_local_experts=5,
        num_experts_per_tok=TOP_K.get(estimator, 2), router_jitter_noise=EPS, input_jitter_noise=0.0,
        router_estimator=estimator, experts_implementation="eager",
    )  # fmt: skip
    block = GrinMoeSparseMoeBlock(config).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.6, generator=generator)
    return block


def expert_outputs(block, x):
    """`[E, T, H]`, differentiable in the block's own parameters."""
    silu = torch.nn.functional.silu
    return torch.stack(
        [
            (silu(x @ w[:8].T) * (x @ w[8:].T)) @ v.T
            for w, v in zip(block.experts.gate_up_proj, block.experts.down_proj, strict=True)
        ]
    )


def run(block, x, upstream, seed=7):
    """One training step through the real block: output and the gradients of gate, experts and input."""
    block.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    output, _, selected = block.train()(x[None])
    (output[0] * upstream).sum().backward()
    return output[0].detach(), selected, [block.gate.weight.grad, block.experts.down_proj.grad, x.grad]


@pytest.fixture
def x():
    return torch.randn(32, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def upstream():
    return torch.randn(32, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("estimator", FAMILY)
def test_sparsemixer_family_equals_its_algorithm(estimator, x, upstream):
    """y = factor h + detach(c h - factor h), token by token, with the draws of the block's own generator."""
    temperature, end_probability, inner, gate_factor, expert_factor = FAMILY[estimator]
    block = make_block(estimator)
    output, selected, gradients = run(block, x, upstream)

    torch.manual_seed(7)
    top_k = TOP_K.get(estimator, 2)
    token_keys = torch.empty(len(x), dtype=torch.int64).random_()
    routing_keys = fold_in(token_keys, 0)
    noise = draw_noise(x @ block.gate.weight.detach().T, top_k, keys=routing_keys)
    block.zero_grad()
    leaf = x.clone().requires_grad_()
    z, experts = leaf @ block.gate.weight.T / temperature, expert_outputs(block, leaf)
    total, scales = 0.0, []
    for t in range(len(x)):
        left = list(range(5))
        for k in range(top_k):
            best = max(left, key=lambda i: z[t, i].item())
            top = z[t, best].item()
            kept = [i for i in left if (top - z[t, i].item()) / max(abs(z[t, i].item()), top) <= 2 * EPS]
            p = z[t, kept].softmax(0)
            drawn = max(kept, key=lambda i: z[t, i].item() + noise.gumbel[k, t, i].item())
            assert selected[t, k] == drawn
            prob = p[kept.index(drawn)]
            scale = 1.0 if drawn == best or noise.uniform[k, t] < end_probability else inner
            scales.append(scale)
            gate_part = gate_factor * prob * experts[drawn, t].detach()
            expert_part = (scale if expert_factor is None else expert_factor) * prob.detach() * experts[drawn, t]
            value = scale * prob * experts[drawn, t]
            total = (
                total + ((gate_part + expert_part + (value - gate_part - expert_part).detach()) * upstream[t]).sum()
            )
            left.remove(drawn)
    total.backward()
    assert inner in scales and 1.0 in scales, "both points of the rule must have been drawn"
    torch.testing.assert_close((output * upstream).sum(), total.detach(), rtol=1e-10, atol=0)
    for ours, expected in zip(
        gradients, [block.gate.weight.grad, block.experts.down_proj.grad, leaf.grad], strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_v2_and_its_paper_form_differ_by_the_scale_in_the_experts_gradient_only(x, upstream):
    noise = draw_noise(torch.empty(32, 5, dtype=torch.float64), 2, torch.Generator().manual_seed(3))
    z = torch.randn(32, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    code, paper = (
        route(z, 2, EPS, estimator=name, training=True, noise=noise)
        for name in ("sparsemixer_v2", "sparsemixer_v2_paper")
    )
    assert torch.equal(code.experts, paper.experts)
    (from_code,) = torch.autograd.grad((code.weights * upstream[:, :2]).sum(), z)
    (from_paper,) = torch.autograd.grad((paper.weights * upstream[:, :2]).sum(), z)
    torch.testing.assert_close(from_code, from_paper, rtol=1e-12, atol=0)
    scale = paper.weights.detach() / paper.mixture.expert_weights
    assert sorted(scale.unique().round(decimals=9).unique().tolist()) == pytest.approx([1 / 3, 1.0])
    torch.testing.assert_close(code.weights.detach(), paper.weights.detach(), rtol=2e-4, atol=0)  # 0.3333 and 1/3


def test_gshard_is_top_k_of_softmax_with_the_gates_gradient(x, upstream):
    block = make_block("gshard")
    output, selected, gradients = run(block, x, upstream)
    block.zero_grad()
    leaf = x.clone().requires_grad_()
    probs = (leaf @ block.gate.weight.T).softmax(-1)
    experts = expert_outputs(block, leaf)
    assert torch.equal(selected.sort().values, probs.topk(2).indices.sort().values)
    chosen = probs.gather(1, selected)
    weights = chosen / chosen.sum(-1, keepdim=True)
    expected = sum(weights[:, k, None] * experts[selected[:, k], torch.arange(32)] for k in range(2))
    (expected * upstream).sum().backward()
    torch.testing.assert_close(output, expected.detach())
    for ours, other in zip(gradients, [block.gate.weight.grad, block.experts.down_proj.grad, leaf.grad], strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimator", ["dense", "dense_shares"])
def test_dense_equals_autograd_through_the_soft_mixtures_straight_through_form(estimator, x, upstream):
    """Forward top-2; the router's gradient is the soft mixture's, over all experts. With shares, both are divided by
    the sum of the chosen probabilities, which has no gradient."""
    block = make_block(estimator)
    output, selected, gradients = run(block, x, upstream)
    block.zero_grad()
    leaf = x.clone().requires_grad_()
    probs = (leaf @ block.gate.weight.T).softmax(-1)  # [T, E]
    if estimator == "dense_shares":
        probs = probs / probs.detach().topk(2).values.sum(-1, keepdim=True)
    experts = expert_outputs(block, leaf)  # [E, T, H]
    soft = torch.einsum("te,eth->th", probs, experts.detach())
    mask = torch.zeros_like(probs).scatter(1, selected, 1.0)
    sparse = torch.einsum("te,eth->th", mask * probs.detach(), experts)
    (((soft - soft.detach()) + sparse) * upstream).sum().backward()
    torch.testing.assert_close(output, sparse.detach())
    for ours, other in zip(gradients, [block.gate.weight.grad, block.experts.down_proj.grad, leaf.grad], strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-12)


def test_experts_that_do_not_learn_have_no_backward_pass(x, upstream):
    """`dense` runs 5 experts for each token, of which 2 are part of the graph."""
    block, rows = make_block("dense").float(), []
    forward = block.experts.forward

    def count(hidden_states, *args):
        rows.append((len(hidden_states), torch.is_grad_enabled()))
        return forward(hidden_states, *args)

    block.experts.forward = count
    run(block, x.float(), upstream.float())
    assert rows == [(2 * 32, True), (3 * 32, False)]


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("estimator", ROUTER_ESTIMATORS)
def test_every_experts_implementation_gives_the_same_gradients(estimator, implementation, x, upstream):
    # float32, since grouped_mm has no float64 kernel
    eager = run(make_block(estimator).float(), x.float(), upstream.float())
    block = make_block(estimator).float()
    block.config._experts_implementation = implementation
    other = run(block, x.float(), upstream.float())
    torch.testing.assert_close(other[0], eager[0])
    for ours, expected in zip(other[2], eager[2], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("estimator", ROUTER_ESTIMATORS)
def test_inference_follows_each_methods_own_rule(estimator):
    z = torch.tensor([[2.0, 1.9, 0.5, -1.0]], dtype=torch.float64)
    top_k = TOP_K.get(estimator, 2)
    routing = route(z, top_k, 0.05, estimator=estimator, training=False)
    soft = z[0].softmax(0)
    near_tie = z[0, :2]
    expected = {
        "sparsemixer_v2": [near_tie.softmax(0)[0].item(), 1.0],
        "sparsemixer_v2_paper": [near_tie.softmax(0)[0].item(), 1.0],
        "sparsemixer_v2_star": [(near_tie / 2).softmax(0)[0].item(), 1.0],
        "sparsemixer": [near_tie.softmax(0)[0].item()],
        "gshard": (soft[:2] / soft[:2].sum()).tolist(),
        "dense": soft[:2].tolist(),
    }
    expected |= dict.fromkeys(("dense_shares", "gshard_sampled"), expected["gshard"])
    masked = ("euler", "midpoint", "joint_ray", "reinmax", "gumbel_straight_through")
    expected |= dict.fromkeys(masked, expected["sparsemixer_v2"])
    assert routing.experts.tolist() == [[0, 1][:top_k]]
    assert routing.weights[0].tolist() == pytest.approx(expected[estimator], rel=1e-12)
    assert routing.mixture is None


@pytest.mark.parametrize("num_experts", [1, 3, 64])
@pytest.mark.parametrize("estimator", ROUTER_ESTIMATORS)
def test_any_number_of_experts_and_any_top_k(estimator, num_experts):
    z = torch.randn(40, num_experts, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for top_k in {1, min(2, num_experts), min(3, num_experts)} if estimator not in TOP_K else {1}:
        torch.manual_seed(0)
        routing = route(z, top_k, EPS, estimator=estimator, training=True)
        assert routing.weights.shape == routing.experts.shape == (40, top_k)
        assert all(len(set(row)) == top_k for row in routing.experts.tolist())
        (gradient,) = torch.autograd.grad(routing.weights.sum(), z)
        assert torch.isfinite(gradient).all()


def test_greedy_training_takes_the_best_experts_with_the_estimators_gradient():
    z = torch.randn(64, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for estimator in ("sparsemixer_v2", "sparsemixer_v2_star"):
        greedy = route(z, 2, EPS, estimator=estimator, training=True, sampling=False)
        inference = route(z, 2, EPS, estimator=estimator, training=False)
        assert torch.equal(greedy.experts, inference.experts)
        torch.testing.assert_close(greedy.weights, inference.weights)
        factor = 2 if estimator.endswith("star") else 1
        (ours,) = torch.autograd.grad(greedy.weights.sum(), z)
        (expected,) = torch.autograd.grad(factor * inference.weights.sum(), z)
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("estimator", ROUTER_ESTIMATORS)
def test_greedy_training_is_one_setting(estimator):
    """`router_sampling=False`: training routes as inference does, and twice alike."""
    model = tiny_model(
        router_estimator=estimator, num_experts_per_tok=TOP_K.get(estimator, 2), router_sampling=False,
        input_jitter_noise=0.0,
    )  # fmt: skip
    ids = torch.arange(40).reshape(2, 20)
    logits = model.train()(ids).logits
    assert torch.equal(logits, model(ids).logits)
    torch.testing.assert_close(logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-6)
    model.config.router_sampling = True
    sampled = [model.train()(ids).logits for _ in range(2)]
    assert torch.equal(*sampled) == (estimator in ("gshard", "dense", "dense_shares"))


@pytest.mark.parametrize(("estimator", "top_k"), [("sparsemixer", 2), ("gshard", 5), ("sparsemixer_v2", 0)])
def test_route_refuses_what_a_method_is_not_defined_for(estimator, top_k):
    with pytest.raises(ValueError, match=f"{estimator}' is not defined for top_k={top_k} of 4 experts"):
        route(torch.zeros(3, 4), top_k, EPS, estimator=estimator, training=True)


def tiny_model(**settings):
    torch.manual_seed(0)
    return GrinMoeForCausalLM(
        GrinMoeConfig(
            vocab_size=64, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=4, router_jitter_noise=0.5, eos_token_id=2, pad_token_id=2,
            **settings,
        )
    )  # fmt: skip


@pytest.mark.parametrize("reloaded", [False, True])
def test_frozen_router_learns_nothing_and_everything_else_does(reloaded, tmp_path):
    model = tiny_model(freeze_router=True)
    if reloaded:
        model.save_pretrained(tmp_path)
        model = GrinMoeForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(40).reshape(2, 20)
    model.train()(ids, labels=ids).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == [f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(2)]
    model.save_pretrained(tmp_path)
    thawed = GrinMoeForCausalLM.from_pretrained(tmp_path, freeze_router=False)
    assert all(parameter.requires_grad for parameter in thawed.parameters())


@pytest.mark.parametrize("estimator", ROUTER_ESTIMATORS)
def test_trains_and_the_checkpoint_records_the_estimator(estimator, tmp_path):
    model = tiny_model(router_estimator=estimator, num_experts_per_tok=TOP_K.get(estimator, 2)).train()
    ids = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    model.save_pretrained(tmp_path)
    reloaded = GrinMoeForCausalLM.from_pretrained(tmp_path)
    assert reloaded.config.router_estimator == estimator
    assert torch.equal(reloaded.eval()(ids).logits, model.eval()(ids).logits)


def test_output_scale_of_sparsemixer_is_learnt_and_saved(tmp_path):
    model = tiny_model(router_estimator="sparsemixer", num_experts_per_tok=1, moe_output_scale=True).train()
    ids = torch.arange(40).reshape(2, 20)
    block = model.model.layers[0].block_sparse_moe
    seen = {}
    block.experts.register_forward_hook(lambda module, args, output: seen.update(experts=output))
    block.register_forward_hook(lambda module, args, output: seen.update(block=output[0]))
    with torch.no_grad():
        block.output_scale.normal_()
    model(ids, labels=ids).loss.backward()
    assert block.output_scale.grad.abs().max() > 0
    torch.testing.assert_close(seen["block"].flatten(0, 1), seen["experts"] * block.output_scale)
    model.save_pretrained(tmp_path)
    reloaded = GrinMoeForCausalLM.from_pretrained(tmp_path).model.layers[0].block_sparse_moe
    assert torch.equal(reloaded.output_scale, block.output_scale)


def test_output_scale_begins_as_ones_on_a_checkpoint_without_it(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    scaled = GrinMoeForCausalLM.from_pretrained(tmp_path, moe_output_scale=True)
    ids = torch.arange(20)[None]
    assert torch.equal(scaled.model.layers[1].block_sparse_moe.output_scale, torch.ones(16))
    assert torch.equal(scaled.eval()(ids).logits, model.eval()(ids).logits)


def test_sparsemixer_is_refused_for_more_than_one_choice():
    with pytest.raises(ValueError, match="num_experts_per_tok=2 must be at most 1: router_estimator='sparsemixer'"):
        GrinMoeConfig(router_estimator="sparsemixer")
