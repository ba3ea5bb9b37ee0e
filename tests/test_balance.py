"""The load-balance loss: its value where it is known, what it counts, and where its gradient goes."""

import pytest
import torch

from modeling_grin import (
    GrinMoeConfig,
    GrinMoeForCausalLM,
    GrinMoeForSequenceClassification,
    load_balancing_loss,
)


def one_hot_logits(experts, num_experts):
    """Router logits whose softmax is (almost) the indicator of `experts` `[tokens]`."""
    return 100.0 * torch.nn.functional.one_hot(experts, num_experts).float()


def test_balanced_router_scores_one():
    experts = torch.arange(16).remainder(8).unsqueeze(1)
    loss = load_balancing_loss((one_hot_logits(experts[:, 0], 8),), (experts,))
    assert loss.item() == pytest.approx(1.0, rel=1e-6)
    uniform = load_balancing_loss((torch.zeros(16, 8),), (torch.zeros(16, 1, dtype=torch.long),))
    assert uniform.item() == pytest.approx(1.0, rel=1e-6), "a uniform softmax scores 1 whatever f is"


def test_two_layers_collapsed_onto_different_experts_score_as_collapse():
    logits = torch.full((16, 4), -100.0)
    first, second = logits.clone(), logits.clone()
    first[:, :2] = 0.0
    second[:, 2:] = 0.0
    experts = (torch.tensor([[0, 1]]).expand(16, 2), torch.tensor([[2, 3]]).expand(16, 2))
    assert load_balancing_loss((first, second), experts).item() == pytest.approx(2.0, rel=1e-6)  # E / K


def test_equals_the_formula_and_counts_the_dispatched_experts():
    """L = n sum_i f_i E[softmax(z)_i] by loops, with dispatched experts that are not the logits' top-k."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(10, 6, generator=generator) for _ in range(3)]
    experts = [torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(10)]) for _ in range(3)]
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    real = [t for t in range(10) if mask.flatten()[t]]
    total = 0.0
    for z, chosen in zip(logits, experts, strict=True):
        for i in range(6):
            fraction = sum(chosen[t].tolist().count(i) for t in real) / (2 * len(real))
            total += 6 * fraction * sum(z[t].softmax(-1)[i].item() for t in real) / len(real)
    loss = load_balancing_loss(tuple(logits), tuple(experts), mask)
    assert loss.item() == pytest.approx(total / 3, rel=1e-5)
    grown = torch.cat([torch.ones(2, 3, dtype=torch.long), mask], dim=1)  # a mask that covers cached tokens, too
    assert load_balancing_loss(tuple(logits), tuple(experts), grown).item() == loss.item()


@pytest.fixture
def model():
    config = GrinMoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, router_jitter_noise=0.0, input_jitter_noise=0.0,
        eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return GrinMoeForCausalLM(config)


def test_acts_in_training_and_is_reported_apart(model):
    ids = torch.arange(20).reshape(2, 10)
    plain = model.train()(ids, labels=ids)
    assert plain.aux_loss is None and plain.router_logits is None
    model.config.router_aux_loss_coef = 0.5
    balanced = model(ids, labels=ids)
    assert balanced.loss.item() == pytest.approx(plain.loss.item() + 0.5 * balanced.aux_loss.item(), rel=1e-6)
    evaluated = model.eval()(ids, labels=ids, output_router_logits=True)
    assert evaluated.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6), "evaluation is the cross-entropy alone"
    assert evaluated.aux_loss.item() >= 0.9 and len(evaluated.router_logits) == 2


def test_gradient_reaches_the_router_through_the_softmax_alone(model):
    ids = torch.arange(20).reshape(2, 10)
    model.eval()(ids, output_router_logits=True).aux_loss.backward()
    last = model.model.layers[-1].block_sparse_moe
    assert last.gate.weight.grad.abs().max() > 0
    assert last.experts.down_proj.grad is None


def test_a_mask_that_says_nothing_of_padding_counts_every_token(model):
    ids = torch.arange(20).reshape(2, 10)
    causal = torch.ones(10, 10).tril().log()[None, None].expand(2, 1, 10, 10)
    four_d = model.eval()(ids, attention_mask=causal, output_router_logits=True).aux_loss
    assert four_d.item() == pytest.approx(model(ids, output_router_logits=True).aux_loss.item(), rel=1e-5)


@pytest.mark.parametrize("estimator", ["sparsemixer_v2", "sparsemixer_v2_star", "gshard", "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_it_stays_in_float32(model, dtype, estimator):
    model.config.router_aux_loss_coef, model.config.router_estimator = 0.5, estimator
    ids = torch.arange(20).reshape(2, 10)
    with torch.autocast("cpu", dtype=dtype):
        output = model.train()(ids, labels=ids)
    output.loss.backward()
    assert output.aux_loss.dtype == torch.float32
    assert output.aux_loss.item() == pytest.approx(model(ids, labels=ids).aux_loss.item(), rel=0.3)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_classifier_learns_with_it_too(model):
    torch.manual_seed(0)
    classifier = GrinMoeForSequenceClassification(model.config).train()
    ids, labels = torch.arange(20).reshape(2, 10), torch.tensor([0, 1])
    plain = classifier(ids, labels=labels).loss
    model.config.router_aux_loss_coef = 0.5
    balanced = classifier(ids, labels=labels).loss
    logits, experts = (
        classifier.model(ids, output_router_logits=True, output_selected_experts=True)[key]
        for key in ("router_logits", "selected_experts")
    )
    assert balanced.item() == pytest.approx((plain + 0.5 * load_balancing_loss(logits, experts)).item(), rel=1e-5)
    evaluated = classifier.eval()(ids, labels=labels, output_router_logits=True)
    assert evaluated.loss.item() == pytest.approx(plain.item(), rel=1e-5)
    assert len(evaluated.router_logits) == 2
    assert evaluated.aux_loss >= 0.9
