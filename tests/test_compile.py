"""torch.compile of the forward pass in eval: no graph breaks, and the same logits."""

from functools import partial

import pytest
import torch
from models import assert_close, random_ids, tiny_model
from transformers import CompileConfig

pytestmark = pytest.mark.usefixtures("far_from_ties")
WINDOW, LENGTH = 7, 20  # beyond the window
build = partial(tiny_model, sliding_window=WINDOW)


@pytest.fixture(autouse=True)
def _no_grad():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


PADDING = torch.stack([torch.arange(LENGTH) >= start for start in (0, 9)]).long()
PACKED = torch.tensor([[*range(LENGTH - 8), *range(8)]]).expand(2, -1)
ROUTING = {"output_router_logits": True, "output_selected_experts": True}


@pytest.mark.parametrize(
    ("attention", "experts", "inputs"),
    [
        ("eager", "grinmoe", {"use_cache": False}),
        ("sdpa", "grinmoe", {"use_cache": True}),
        ("sdpa", "batched_mm", {"use_cache": False}),
        ("sdpa", "grouped_mm", {"use_cache": True, "attention_mask": PADDING}),
        ("sdpa", "grouped_mm", {"use_cache": False, "position_ids": PACKED}),
        ("sdpa", "grouped_mm", {"use_cache": False, **ROUTING}),
    ],
    ids=["eager", "cached", "batched_mm", "padded", "packed", "router logits"],
)
def test_fullgraph_equals_eager(attention, experts, inputs):
    model, ids = build(attention, experts), random_ids(2, LENGTH)
    expected = model(ids, **inputs)
    outputs = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, **inputs)
    assert_close(outputs.logits, expected.logits)
    if inputs["use_cache"]:
        for layer, expected_layer in zip(outputs.past_key_values.layers, expected.past_key_values.layers, strict=True):
            assert layer.keys.shape[2] == WINDOW
            assert_close(layer.keys, expected_layer.keys)
            assert_close(layer.values, expected_layer.values)
    if "output_router_logits" in inputs:
        assert_close(torch.stack(outputs.router_logits), torch.stack(expected.router_logits))
        assert all(map(torch.equal, outputs.selected_experts, expected.selected_experts))
        torch.testing.assert_close(outputs.aux_loss, expected.aux_loss, rtol=1e-5, atol=0)


def test_compiled_generation_with_a_static_cache():
    """What `generate(cache_implementation="static")` does by itself on a GPU, across the end of the window."""
    model, ids = build(experts="grouped_mm"), random_ids(2, 5)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False}
    expected = model.generate(ids * mask, **settings)
    compile_config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compile_config._compile_all_devices = True
    torch._dynamo.utils.counters.clear()
    actual = model.generate(ids * mask, **settings, cache_implementation="static", compile_config=compile_config)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert torch.equal(actual, expected)


def assert_training_steps_equal(num_steps=1, compiling=None, **settings):
    """Loss and every gradient of each step, draws and all."""
    model = tiny_model(router_jitter_noise=0.3, **settings).train()
    compiled = torch.compile(model, **(compiling or {"backend": "aot_eager", "fullgraph": True}))
    ids = torch.randint(0, 131, (2, 16), generator=torch.Generator().manual_seed(0))
    for step in range(num_steps):
        model.begin_step(step, seed=3, num_tokens=ids.numel())
        results = []
        for forward in (model, compiled):
            model.zero_grad()
            loss = forward(ids, labels=ids, use_cache=False).loss
            loss.backward()
            results.append((loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
        torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=0)
        torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("estimator", ["sparsemixer_v2", "dense"])
@torch.enable_grad()
def test_compiled_training_step_equals_eager(estimator):
    assert_training_steps_equal(router_estimator=estimator)


@torch.enable_grad()
def test_inductor_draws_the_same_noise_in_one_graph_for_all_steps():
    """torch's own generator gives other numbers in inductor; a step's number must not be compiled in."""
    torch._dynamo.utils.counters.clear()
    assert_training_steps_equal(3, {"fullgraph": True}, num_hidden_layers=1, num_local_experts=3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@torch.enable_grad()
def test_compiled_training_step_with_the_balance_loss():
    """Its sum over ranks is Python's business, for which the graph breaks; layers are still compiled once for all."""
    sizes = {"num_hidden_layers": 4, "hidden_size": 8, "intermediate_size": 4}
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=2):
        assert_training_steps_equal(2, {"backend": "aot_eager"}, router_aux_loss_coef=0.5, **sizes)
