"""The load-balance loss: its value where it is known, what it counts, and where its gradient goes."""

import pytest
import torch
from transformers.utils import logging

from modeling_grin import (
    GrinMoeConfig,
    GrinMoeForCausalLM,
    GrinMoeForSequenceClassification,
    load_balancing_loss,
)
from modeling_grin.balance_grinmoe import BalanceLoss, BalanceWindow, balance_gradient
from modeling_grin.training_grinmoe import TrainingPass


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
    assert load_balancing_loss(tuple(logits), tuple(experts), torch.zeros_like(mask)) == 0, "padding alone"


@pytest.fixture
def model():
    config = GrinMoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, router_jitter_noise=0.0, input_jitter_noise=0.0,
        initializer_range=0.3, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return GrinMoeForCausalLM(config).train()


def random_batch(seed, batch_size=3, length=10, padding=0):
    """Random ids whose first row begins with `padding` padding tokens, and whose labels miss some more."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 64, (batch_size, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    labels = ids.masked_fill((mask == 0) | (torch.rand(ids.shape, generator=generator) < 0.3), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_gradients_close(actual, expected, rtol=1e-5):
    assert actual.keys() == expected.keys()
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=rtol, atol=rtol * scale, msg=name)


def balance_by_hand(model, batch, fractions=None):
    """E sum_i f_i E[softmax(z)_i], mean over the layers, with a gradient, and f of each layer."""
    outputs = model.model(
        batch["input_ids"], batch["attention_mask"], output_router_logits=True, output_selected_experts=True
    )
    real = batch["attention_mask"].flatten().bool()
    total, used = 0.0, []
    for layer, (logits, experts) in enumerate(zip(outputs.router_logits, outputs.selected_experts, strict=True)):
        f = torch.bincount(experts[real].flatten(), minlength=4) / (2 * real.sum())
        used.append(f)
        f = f if fractions is None else fractions[layer]
        total = total + 4 * (f * logits[real].softmax(-1).mean(0)).sum() / 2
    return total, used


def gradients_of_the_balance_loss(model, batch, coefficient=0.5):
    """By autograd, from the definition."""
    model.config.router_aux_loss_coef = 0.0
    (coefficient * balance_by_hand(model, batch)[0]).backward()
    model.config.router_aux_loss_coef = coefficient
    return gradients(model)


def test_acts_in_training_and_is_reported_apart(model):
    batch = random_batch(0, padding=4)
    plain = model(**batch)
    assert plain.aux_loss is None and plain.router_logits is None
    plain.loss.backward()
    expected = gradients(model)
    for name, gradient in gradients_of_the_balance_loss(model, batch).items():
        expected[name] += gradient
    output = model(**batch, output_router_logits=True)
    assert output.loss.item() == plain.loss.item(), "the returned loss is the cross-entropy alone"
    by_hand = balance_by_hand(model, batch)[0].item()
    assert output.aux_loss.item() == pytest.approx(by_hand, rel=1e-6) and not output.aux_loss.requires_grad
    assert not output.router_logits[0].requires_grad, "a trainer's own balance loss would come on top"
    output.loss.backward()
    assert_gradients_close(gradients(model), expected)
    model.config.router_aux_loss_coef = 0.0
    assert model(**batch, output_router_logits=True).router_logits[0].requires_grad
    assert model.eval()(**batch, output_router_logits=True).aux_loss.item() == pytest.approx(by_hand, rel=1e-6)


def test_a_routers_gradient_is_told_apart(model):
    """Both parts add up to it; the last layer's parts are those of two backward passes."""
    batch, found = random_batch(0, padding=4), {}
    model.config.router_estimator = "gshard"  # its routers learn without near-ties
    for coefficient in (0.5, 0.0):
        model.config.router_aux_loss_coef = coefficient
        model.model.router_gradients = torch.zeros(2, 2, 4, 16)
        model(**batch).loss.backward()
        found[coefficient] = gradients(model), model.model.router_gradients
    (whole, parts), (task, none) = found[0.5], found[0.0]
    assert not none.any()
    for layer in range(2):
        name = f"model.layers.{layer}.block_sparse_moe.gate.weight"
        torch.testing.assert_close(parts[layer].sum(dim=0), whole[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(parts[1], torch.stack([task[name], whole[name] - task[name]]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_z_loss_is_the_mean_square_of_the_logsumexp(model, alpha):
    """By autograd, from the definition: mean over the tokens that are not padding, then over the layers."""
    batch = random_batch(0, padding=4)
    model.config.router_aux_loss_coef = alpha
    model(**batch).loss.backward()
    expected = gradients(model)
    model.config.router_aux_loss_coef = 0.0
    logits = model.model(batch["input_ids"], batch["attention_mask"], output_router_logits=True).router_logits
    real = batch["attention_mask"].flatten().bool()
    (0.3 * torch.stack([z[real].exp().sum(-1).log().square().mean() for z in logits]).mean()).backward()
    for name, gradient in gradients(model).items():
        expected[name] += gradient
    model.config.router_aux_loss_coef, model.config.router_z_loss_coef = alpha, 0.3
    model(**batch).loss.backward()
    assert_gradients_close(gradients(model), expected)


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
@pytest.mark.parametrize("loss", ["returned", "returned / 7", "smoothed", "embeddings", "hidden"])
def test_no_way_of_building_the_loss_loses_or_scales_it(model, loss, checkpointing):
    """A trainer may divide the loss, or make its own of the logits: the balance loss's gradient stays the same."""
    batch = random_batch(1, padding=2)
    expected = gradients_of_the_balance_loss(model, batch)
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
        model.enable_input_require_grads()
    found = []
    for coefficient in (0.5, 0.0):
        model.config.router_aux_loss_coef = coefficient
        output = model(**batch, use_cache=False, output_hidden_states=True, skip_logits=False)
        value = {
            "returned": output.loss,
            "returned / 7": output.loss / 7,
            "smoothed": -output.logits.log_softmax(-1).mean(),
            "embeddings": (output.logits**2).mean(),
            "hidden": output.hidden_states[-1].sum(),
        }[loss]
        value.backward()
        found.append(gradients(model))
    difference = {name: gradient - found[1][name] for name, gradient in found[0].items() if name in expected}
    assert_gradients_close(difference, expected, rtol=3e-5)


def test_fractions_of_a_step_grow_with_its_micro_batches(model):
    """`num_tokens` known, f of the micro-batches so far: the stated approximation, and its bound."""
    batches = [random_batch(seed, padding=seed) for seed in range(3)]
    sizes = [batch["attention_mask"].sum().item() for batch in batches]
    used = [balance_by_hand(model, batch)[1] for batch in batches]
    model.config.router_aux_loss_coef = 0.0
    expected, of_step = {}, {}
    whole = [sum(n * f[layer] for n, f in zip(sizes, used, strict=True)) / sum(sizes) for layer in range(2)]
    for m, batch in enumerate(batches):
        seen = sum(sizes[: m + 1])
        running = [sum(n * f[layer] for n, f in zip(sizes[: m + 1], used, strict=False)) / seen for layer in range(2)]
        for fractions, into in ((running, expected), (whole, of_step)):
            loss = 0.5 * sizes[m] / sum(sizes) * balance_by_hand(model, batch, fractions)[0]
            loss.backward()
            for name, gradient in gradients(model).items():
                into[name] = into.get(name, 0) + gradient
    model.config.router_aux_loss_coef = 0.5

    def train(**known):
        model.begin_step(0, num_tokens=sum(sizes), **known)
        for batch in batches:
            (0 * model(**batch).loss).backward()
        found = gradients(model)
        return {name: found[name] for name in expected}

    assert_gradients_close(train(), expected)
    counts = torch.stack([(sum(sizes) * 2 * f).round().long() for f in whole])
    assert_gradients_close(train(expert_counts=counts), of_step)
    gate = "model.layers.1.block_sparse_moe.gate.weight"
    assert not torch.allclose(expected[gate], of_step[gate], rtol=1e-3), "these batches route differently"
    assert torch.equal(counts, torch.stack([(sum(sizes) * 2 * f).round().long() for f in whole])), "left as given"


def test_bound_of_what_later_micro_batches_would_change():
    """Per token, in L1: alpha n / N times the unseen share of the step times half the range of f's difference."""
    generator = torch.Generator().manual_seed(0)
    num_experts, sizes = 8, [30, 50, 20]
    alpha, total = 0.7, sum(sizes)
    logits = [2 * torch.randn(size, num_experts, generator=generator) for size in sizes]
    counts = [torch.bincount(z.topk(2).indices.flatten(), minlength=num_experts)[None] for z in logits]
    known, running = BalanceWindow(total, sum(counts)), BalanceWindow(total)
    tightest = 0.0
    for m, z in enumerate(logits):
        gradient = {}
        for name, window in {"known": known, "running": running}.items():
            balance = BalanceLoss(alpha, 1, num_experts, window, torch.ones(len(z), dtype=torch.bool), None)
            balance.count((z.topk(2).indices,))
            gradient[name] = balance_gradient(z, balance.token_weight, balance.fractions[0], balance.z_weight)
        error = (gradient["running"] - gradient["known"]).abs().sum(-1)
        unseen = sum(sizes[m + 1 :]) / total
        if unseen == 0:
            assert error.max() < 1e-8, "the last one knows everything"
            continue
        seen, later = sum(counts[: m + 1])[0], sum(counts[m + 1 :])[0]
        difference = seen / seen.sum() - later / later.sum()
        bound = alpha * num_experts / total * unseen * (difference.max() - difference.min()) / 2
        assert (error <= bound * (1 + 1e-5)).all()
        tightest = max(tightest, (error / bound).max().item())
    assert tightest > 0.7, "and it is no idle bound"


@pytest.mark.parametrize("num_micro_batches", [1, 2, 5])
def test_micro_batches_of_equal_routing_add_up_to_the_whole_step(model, num_micro_batches):
    batch = random_batch(0, padding=3)
    expected = gradients_of_the_balance_loss(model, batch)
    model.begin_step(3, seed=1, num_tokens=num_micro_batches * batch["attention_mask"].sum().item())
    for _ in range(num_micro_batches):
        (0 * model(**batch).loss).backward()
    found = gradients(model)
    assert_gradients_close({name: found[name] for name in expected}, expected)


def test_without_a_step_a_micro_batch_acts_by_its_share_of_the_labels(model, caplog):
    """Plain Trainer gives the number of labels of the accumulation window, and adds the micro-batches' losses up."""
    batch = random_batch(0, padding=3)
    expected = gradients_of_the_balance_loss(model, batch)
    labels = (batch["labels"][:, 1:] != -100).sum()
    (0 * model(**batch, num_items_in_batch=4 * labels).loss).backward()
    found = gradients(model)
    assert_gradients_close({name: 4 * found[name] for name in expected}, expected)
    assert "begin_step" not in caplog.text
    # A trainer that keeps the labels for a loss of its own says nothing of the step, and the user is told.
    logging.warning_once.cache_clear()
    model(**{**batch, "labels": None})
    assert "a multiple of router_aux_loss_coef. Use GrinMoeTrainerMixin, or call begin_step" in caplog.text


def test_forward_passes_without_a_gradient_are_not_counted(model):
    model.config.router_aux_loss_coef = 0.5
    batch = random_batch(0)
    model.begin_step(0, num_tokens=30)
    with torch.no_grad():
        model(**random_batch(1))
    model.eval()(**random_batch(1))
    (0 * model.train()(**batch).loss).backward()
    found = gradients(model)
    model.begin_step(None)
    expected = gradients_of_the_balance_loss(model, batch)
    assert_gradients_close({name: found[name] for name in expected}, expected)


def test_gradient_reaches_the_router_through_the_softmax_alone(model):
    batch = random_batch(0)
    model.config.router_aux_loss_coef = 0.5
    (0 * model(**batch).loss).backward()
    last = model.model.layers[-1].block_sparse_moe
    assert last.gate.weight.grad.abs().max() > 0
    assert last.experts.down_proj.grad.abs().max() == 0


def test_a_mask_that_says_nothing_of_padding_counts_every_token(model):
    ids = torch.arange(20).reshape(2, 10)
    causal = torch.ones(10, 10).tril().log()[None, None].expand(2, 1, 10, 10)
    four_d = model.eval()(ids, attention_mask=causal, output_router_logits=True).aux_loss
    assert four_d.item() == pytest.approx(model(ids, output_router_logits=True).aux_loss.item(), rel=1e-5)


def test_a_mask_that_numbers_packed_sequences_counts_each_token_once():
    generator = torch.Generator().manual_seed(0)
    logits, experts = torch.randn(12, 6, generator=generator), torch.randint(0, 6, (12, 2), generator=generator)
    numbered = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 2, 3, 3, 0, 0]])
    expected = load_balancing_loss((logits,), (experts,), (numbered != 0).long())
    assert load_balancing_loss((logits,), (experts,), numbered).item() == expected.item()


@pytest.mark.parametrize("estimator", ["sparsemixer_v2", "sparsemixer_v2_star", "gshard", "dense"])
def test_under_autocast_its_gradient_stays_in_float32(model, estimator):
    model.config.router_estimator = estimator
    batch = random_batch(0, padding=2)
    found = []
    for autocast in (False, True):
        model.config.router_aux_loss_coef = 0.5
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = model(**batch, output_router_logits=True)
        assert output.aux_loss.dtype == torch.float32
        (0 * output.loss).backward()
        found.append(gradients(model)["model.layers.1.block_sparse_moe.gate.weight"])
    cosine = torch.nn.functional.cosine_similarity(found[0].flatten(), found[1].flatten(), dim=0)
    assert cosine > 0.99 and found[1].norm().item() == pytest.approx(found[0].norm().item(), rel=0.1)


def test_float16_needs_the_loss_scale(model):
    batch = random_batch(0, padding=2)
    model.config.router_aux_loss_coef = 0.5
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(ValueError, match="gradient_scale"):
        model(**batch)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.begin_step(0, gradient_scale=scaler.get_scale())
    with torch.autocast("cpu", dtype=torch.float16):
        output = model(**batch)
    scaler.scale(0 * output.loss).backward()
    scaler.unscale_(optimizer)
    found = gradients(model)
    model.begin_step(None)
    expected = gradients_of_the_balance_loss(model, batch)
    gate = "model.layers.1.block_sparse_moe.gate.weight"
    assert found[gate].norm().item() == pytest.approx(expected[gate].norm().item(), rel=0.02)


def test_a_classifier_learns_with_it_too(model):
    torch.manual_seed(0)
    classifier = GrinMoeForSequenceClassification(model.config).train()
    batch = {**random_batch(0, padding=3), "labels": torch.tensor([0, 1, 1])}
    plain = classifier(**batch).loss
    plain.backward()
    expected = gradients(classifier)
    for name, gradient in gradients_of_the_balance_loss(classifier, batch).items():
        expected[name] += gradient
    output = classifier(**batch, output_router_logits=True)
    assert output.loss.item() == plain.item()
    assert output.aux_loss.item() == pytest.approx(balance_by_hand(classifier, batch)[0].item(), rel=1e-6)
    assert len(output.router_logits) == 2
    output.loss.backward()
    assert_gradients_close(gradients(classifier), expected)
    share = classifier(**batch, num_items_in_batch=12).loss
    assert share.item() == pytest.approx(3 / 12 * plain.item(), rel=1e-6), "micro-batches add up to the mean"


def test_a_layer_on_another_device_uses_the_counts_of_the_whole_pass():
    """`device_map` puts layers elsewhere; f is filled in after they have run, and read by their backward passes."""
    counted = torch.ones(4, dtype=torch.bool)
    balance = BalanceLoss(1.0, 1, 6, BalanceWindow(), counted, None)
    layer_pass = TrainingPass(counted, None, balance, None).for_next_layer()
    logits = torch.zeros(4, 6, device="meta", requires_grad=True)
    saved = layer_pass.attach_balance(logits, torch.zeros(4, 3)).grad_fn.saved_tensors[2]
    balance.count([torch.tensor([[0, 1]] * 4)])
    assert saved.tolist() == [0.5, 0.5, 0, 0, 0, 0]
