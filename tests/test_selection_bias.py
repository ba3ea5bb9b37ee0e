"""Loss-free balancing (arXiv 2408.15664): a bias that takes part in the choice of experts, moved by their load."""

import pytest
import runs
import torch
from transformers import Trainer

from conversion import convert
from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM, route
from modeling_grin.routing_grinmoe import apply_bias
from modeling_grin.training import add_lora

RATE = 0.05


def biases(model) -> torch.Tensor:
    """`[L, E]`."""
    return torch.stack([layer.block_sparse_moe.e_score_correction_bias for layer in model.base_model.layers])


def random_logits(tokens: int = 30, experts: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tokens, experts, generator=generator, dtype=torch.float64), torch.randn(
        experts, generator=generator
    )


@pytest.mark.parametrize("training", [False, True])
def test_a_rule_without_draws_weights_by_the_scores_alone(training):
    """Equation 3 of the paper: the top-k of s + b, weighted by s; here s = softmax(z)."""
    logits, bias = random_logits()
    leaf = logits.clone().requires_grad_()
    config = GrinMoeConfig(router_estimator="gshard")
    given, replayed = apply_bias(leaf, bias, config, None)
    routing = route(given, 2, 0.1, estimator="gshard", training=training, replayed=replayed)
    scores = logits.clone().requires_grad_()
    weights = []
    for row, experts in zip(scores, routing.experts, strict=True):
        probs = row.exp() / row.exp().sum()
        order = sorted(range(6), key=lambda i: -(probs[i].item() + bias[i].item()))
        assert experts.tolist() == order[:2]
        chosen = torch.stack([probs[i] for i in order[:2]])
        weights.append(chosen / chosen.sum())
    expected = torch.stack(weights)
    torch.testing.assert_close(routing.weights, expected, rtol=1e-6, atol=1e-8)
    assert (routing.experts != logits.topk(2).indices).any(), "the bias must decide something"
    slope = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (routing.weights * slope).sum().backward()
    (expected * slope).sum().backward()
    torch.testing.assert_close(leaf.grad, scores.grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("estimator", ["sparsemixer_v2", "midpoint", "gshard_sampled"])
@pytest.mark.parametrize("training", [False, True])
def test_a_rule_that_draws_draws_from_shifted_logits(estimator, training):
    logits, bias = random_logits()
    given, replayed = apply_bias(logits, bias, GrinMoeConfig(router_estimator=estimator), None)
    assert replayed is None
    assert torch.equal(given, logits + bias)
    keys = torch.arange(len(logits))
    routing = route(given, 2, 0.3, estimator=estimator, training=training, keys=keys)
    assert (routing.experts != route(logits, 2, 0.3, estimator=estimator, training=training, keys=keys).experts).any()


def test_replayed_experts_go_before_the_bias():
    logits, bias = random_logits(3)
    given = torch.tensor([[0, 1], [-1, -1], [5, 2]])
    _, replayed = apply_bias(logits, bias, GrinMoeConfig(router_estimator="gshard"), given)
    chosen = (logits.softmax(-1) + bias).topk(2).indices
    assert replayed.tolist() == [[0, 1], chosen[1].tolist(), [5, 2]]


@pytest.mark.parametrize("estimator", ["sparsemixer_v2", "midpoint"])
def test_replaying_the_best_experts_in_inference_changes_nothing(estimator):
    logits, _ = random_logits()
    best = route(logits, 2, 0.3, estimator=estimator, training=False)
    replayed = route(logits, 2, 0.3, estimator=estimator, training=False, replayed=best.experts)
    assert torch.equal(replayed.weights, best.weights)
    # Another expert than the best one is weighted by its p: inference has no c.
    second = best.experts.flip(-1)
    weights = route(logits, 2, 0.3, estimator=estimator, training=False, replayed=second).weights
    other = route(logits, 2, 0.3, estimator="euler", training=True, sampling=False, replayed=second).weights
    assert torch.equal(weights, other)


@pytest.mark.parametrize("estimator", ["sparsemixer_v2", "gshard"])
def test_a_step_moves_each_bias_by_its_load(estimator):
    model = runs.make_model(router_estimator=estimator, router_bias_update_rate=RATE, router_aux_loss_coef=0.0).train()
    before = biases(model)
    ids = torch.randint(5, 131, (2, 3, 10), generator=torch.Generator().manual_seed(3))
    model.begin_step(0, num_tokens=60)
    chosen = []
    for batch in ids:
        outputs = model(batch, labels=batch, output_selected_experts=True)
        outputs.loss.backward()
        chosen.append(torch.stack(outputs.selected_experts))
        assert torch.equal(biases(model), before), "passes of one step route alike"
    model.end_step()
    experts = torch.cat(chosen, dim=1)
    for layer, moved in enumerate(biases(model) - before):
        load = [experts[layer].flatten().tolist().count(expert) for expert in range(len(moved))]
        mean = sum(load) / len(load)
        signs = [(mean > count) - (mean < count) for count in load]
        torch.testing.assert_close(moved, RATE * torch.tensor(signs, dtype=torch.float32))


def test_a_step_of_unknown_size_is_refused_and_frozen_routers_stay():
    model = runs.make_model(router_bias_update_rate=RATE).train()
    with pytest.raises(ValueError, match=r"router_bias_update_rate=0.05 needs the step's load: call begin_step"):
        model.end_step()
    model.config.freeze_router = True
    before = biases(model)
    model.end_step()
    assert torch.equal(biases(model), before)


def test_saved_and_loaded_in_float32(tmp_path):
    model = runs.make_model(router_estimator="gshard", router_bias_update_rate=RATE).eval()
    model.save_pretrained(tmp_path / "saved")
    for folder in ("saved", "converted"):
        if folder == "converted":
            convert(tmp_path / "saved", tmp_path / "converted", to="fused")
        loaded = GrinMoeForCausalLM.from_pretrained(tmp_path / folder, dtype="bfloat16").eval()
        assert biases(loaded).dtype == torch.float32
        assert torch.equal(biases(loaded), biases(model))
    ids = torch.arange(5, 25)[None]
    loaded = GrinMoeForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    for layer in model.base_model.layers:
        layer.block_sparse_moe.e_score_correction_bias.zero_()
    assert (loaded(ids).logits != model(ids).logits).any()


def test_biases_begin_as_zeros_on_a_checkpoint_without_them(tmp_path):
    model = runs.make_model().eval()
    model.save_pretrained(tmp_path)
    loaded = GrinMoeForCausalLM.from_pretrained(tmp_path, router_bias_update_rate=RATE).eval()
    ids = torch.arange(5, 25)[None]
    assert not biases(loaded).any()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


SETTINGS = {"router_estimator": "gshard", "router_bias_update_rate": RATE, "router_aux_loss_coef": 0.0}


def test_the_trainer_moves_biases_alike_however_a_step_is_split(tmp_path):
    found = []
    for accumulation in (1, 4):
        model = runs.make_model(**SETTINGS)
        trainer = runs.make_trainer(tmp_path, model, accumulation, runs.GLOBAL_BATCH // accumulation)
        trainer.train()
        found.append(biases(model))
    assert torch.equal(*found)
    moved = (found[0] - biases(runs.make_model(**SETTINGS))).abs()
    assert moved.max() == pytest.approx(RATE * runs.STEPS)


def test_a_collapsed_router_becomes_balanced(tmp_path):
    """Every token wants the experts 0 and 1, and nothing but the biases moves."""
    loads = {}
    for rate in (0.0, 0.01):
        model = runs.make_model(**{**SETTINGS, "router_bias_update_rate": rate})
        for layer in model.base_model.layers:
            layer.post_attention_layernorm.bias.data[0] = 4.0
            layer.block_sparse_moe.gate.weight.data[:, 0] = torch.tensor([1.0, 1, 0, 0, 0, 0])
        runs.make_trainer(tmp_path, model, max_steps=60, learning_rate=0.0).train()
        rows = torch.stack([row["input_ids"] for row in runs.Rows().rows])
        with torch.no_grad():
            experts = torch.stack(model.eval()(rows, output_selected_experts=True).selected_experts)
        counts = torch.stack([layer.flatten().bincount(minlength=6) for layer in experts])
        loads[rate] = (counts.amax(-1) / counts.float().mean(-1)).mean()
    assert loads[0.0] > 2.9  # at most 3: two of six experts get everything
    assert loads[0.01] < 1.8


def test_a_resumed_run_has_the_biases_of_one_that_never_stopped(tmp_path):
    found = {}
    for name, resumed in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoint-2"))):
        model = runs.make_model(3 if resumed is None else 4, **SETTINGS)
        arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        trainer = runs.make_trainer(tmp_path / name, model, **arguments)
        trainer.train(resume_from_checkpoint=resumed)
        found[name] = biases(model)
    assert torch.equal(found["whole"], found["resumed"])


def test_adapters_leave_the_biases_alone(tmp_path):
    """Their files have none."""
    model = add_lora(runs.make_model(**SETTINGS))
    runs.make_trainer(tmp_path, model).train()
    assert torch.equal(biases(model.get_base_model()), biases(runs.make_model(**SETTINGS)))


def test_plain_trainer_leaves_the_biases_alone(tmp_path):
    """It announces no step; `docs/training.md` says so."""
    model = runs.make_model(**SETTINGS)
    runs.make_trainer(tmp_path, model, trainer_class=Trainer).train()
    assert torch.equal(biases(model), biases(runs.make_model(**SETTINGS)))
