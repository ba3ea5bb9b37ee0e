"""Routing replay: the pass that made the routes, other weights by a definition in plain loops, and what is refused."""

import pytest
import torch
from models import tiny_model

from modeling_grin import route
from modeling_grin.routing_grinmoe import HEUN_POINT_IN_CODE, ROUTER_ESTIMATORS

EXPERTS, LAYERS, BATCH, LENGTH, TOP_K = 6, 2, 2, 9, 2
IDS = torch.randint(5, 131, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0
NOISY = {"router_jitter_noise": 0.3, "input_jitter_noise": 0.0, "router_sampling": True}


def make_model(seed=3, **overrides):
    return tiny_model(seed=seed, **{"router_aux_loss_coef": 0.5, **NOISY, **overrides}).train()


def run(model, step=None, **inputs):
    """Outputs of a pass, and its loss by which gradients are found."""
    if step is not None:
        model.begin_step(step, num_tokens=int(MASK.sum()))
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS, **inputs}
    return model(**inputs, use_cache=False, skip_logits=False, output_selected_experts=True)


def backward(model, outputs):
    model.zero_grad()
    outputs.loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def as_rows(selected):
    """`[batch, sequence, layers, K]`."""
    return torch.stack(selected, dim=1).unflatten(0, (BATCH, LENGTH))


def random_experts(seed=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(BATCH, LENGTH, LAYERS, EXPERTS, generator=generator).argsort(dim=-1)[..., :TOP_K]


# Gumbel-softmax's gradient depends on noise that a replayed choice does not have.
REPLAYABLE = set(ROUTER_ESTIMATORS) - {"sparsemixer", "gumbel_straight_through"}


@pytest.mark.parametrize("estimator", sorted(REPLAYABLE))
def test_the_pass_that_made_the_routes(estimator):
    """Bit for bit; with the noise of that step, and with greedy routing, where the choices were others."""
    model = make_model(router_estimator=estimator)
    made = run(model, step=1)
    expected = backward(model, made)
    with model.replay_routing(made.selected_experts):
        replayed = run(model, step=1)
    assert torch.equal(replayed.logits, made.logits)
    gradients = backward(model, replayed)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)

    model.config.router_sampling = False
    with model.replay_routing(as_rows(made.selected_experts)):
        greedy = run(model)
    for actual, layer in zip(greedy.selected_experts, made.selected_experts, strict=True):
        assert torch.equal(actual, layer)
    is_sampled = not all(map(torch.equal, run(model).selected_experts, made.selected_experts))
    assert is_sampled == ROUTER_ESTIMATORS[estimator].sampled


def test_rollouts_in_evaluation_are_trained_on_their_own_routes():
    """Other weights than those that made them would choose others."""
    actor, learner = make_model(3), make_model(4, router_sampling=False)
    with torch.no_grad():
        made = run(actor.eval()).selected_experts
    with learner.replay_routing(made):
        outputs = run(learner)
    assert all(map(torch.equal, outputs.selected_experts, made))
    assert not all(map(torch.equal, run(learner).selected_experts, made))
    gradients = backward(learner, outputs)
    assert all(gradients[name].norm() > 0 for name in gradients if "gate.weight" in name)
    with torch.no_grad(), actor.replay_routing(random_experts()):
        evaluated = run(actor)
    assert torch.equal(as_rows(evaluated.selected_experts), random_experts())


@pytest.mark.parametrize(("sampling", "estimator"), [(False, "sparsemixer_v2"), (True, "sparsemixer_v2"),
                                                     (False, "gshard"), (False, "dense")])  # fmt: skip
def test_weights_and_gradients_follow_from_the_logits_of_today(sampling, estimator):
    """Plain loops in float64: p of a softmax over the keep set and the replayed expert, of those that are left."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(40, EXPERTS, generator=generator, dtype=torch.float64).requires_grad_()
    replayed = torch.rand(40, EXPERTS, generator=generator).argsort(dim=-1)[:, :TOP_K]
    factor, r, keys = torch.randn(40, TOP_K, generator=generator, dtype=torch.float64), 0.1, torch.arange(40)
    routing = route(z, TOP_K, r, estimator=estimator, training=True, sampling=sampling, keys=keys, replayed=replayed)
    assert torch.equal(routing.experts, replayed)
    (gradient,) = torch.autograd.grad((routing.weights * factor).sum(), z)

    total, outside = torch.zeros((), dtype=torch.float64), 0
    for token in range(40):
        left = list(range(EXPERTS))
        softmax = z[token].softmax(-1)
        for k, expert in enumerate(replayed[token].tolist()):
            best = max(z[token, i].item() for i in left)
            kept = {i for i in left if (best - z[token, i].item()) / max(abs(z[token, i].item()), best) <= 2 * r}
            outside += expert not in kept
            among = sorted(kept | {expert})
            p = z[token, among].softmax(-1)[among.index(expert)]
            if estimator != "sparsemixer_v2":
                p = softmax[expert] / (softmax[replayed[token]].sum() if estimator == "gshard" else 1)
            scales = [1.0] if not sampling or z[token, expert] == best else [1.0, HEUN_POINT_IN_CODE]
            assert min(abs(routing.weights[token, k].item() - scale * p.item()) for scale in scales) < 1e-12
            total = total + factor[token, k] * p
            left.remove(expert)
    assert outside > 10
    torch.testing.assert_close(gradient, torch.autograd.grad(total, z)[0], rtol=1e-12, atol=1e-12)


def test_tokens_that_are_left_out_route_as_ever():
    model = make_model(router_sampling=False)
    own, experts = as_rows(run(model).selected_experts), random_experts()
    experts[:, 4:] = -1
    with model.replay_routing(experts):
        actual = as_rows(run(model).selected_experts)
    assert torch.equal(actual[:, :4], experts[:, :4])
    assert torch.equal(actual[:, 4:, 0], own[:, 4:, 0])  # later layers see other tokens before
    experts[:] = -1
    with model.replay_routing(experts):
        assert torch.equal(as_rows(run(model).selected_experts), own)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_recomputed_on_the_same_routes(reentrant):
    model, found = make_model(), []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with model.replay_routing(random_experts()):
            outputs = run(model, step=1)
        found.append(backward(model, outputs))  # after the context
    assert all(torch.equal(found[1][name], found[0][name]) for name in found[0])


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (random_experts()[0], r"must be a tensor of shape \[batch, sequence, layers, .*; got a tensor \[9, 2, 2\]"),
        (random_experts()[:, :, :1], "must have 2 layers and 2 experts per token; got 1 and 2"),
        (torch.zeros(BATCH, LENGTH, LAYERS, TOP_K), r"must be different numbers from 0 to 5 .*; got \[0, 0\]"),
        (torch.full((BATCH, LENGTH, LAYERS, TOP_K), 6), r"must be different numbers from 0 to 5 .*; got \[6, 6\]"),
        (torch.tensor([-1, 3]).expand(BATCH, LENGTH, LAYERS, TOP_K), r"or all -1; got \[-1, 3\]"),
        (random_experts()[:, 1:], "have 16 tokens, padding included, and the forward pass has 18"),
    ],
)
def test_routes_that_cannot_be(experts, message):
    model = make_model()
    with pytest.raises(ValueError, match=message), model.replay_routing(experts):
        run(model)
    assert model.model.replayed_experts is None
