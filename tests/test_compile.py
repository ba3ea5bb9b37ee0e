"""torch.compile of the forward pass in eval: no graph breaks, and the same logits."""

import tempfile
from pathlib import Path

import pytest
import torch
from checkpoints import released_config, released_tensors, write_checkpoint
from transformers import CompileConfig

from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM

pytestmark = pytest.mark.usefixtures("far_from_ties")
WINDOW, LENGTH = 7, 20  # beyond the window


@pytest.fixture(autouse=True)
def _no_grad():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def build(attention="sdpa", experts="grouped_mm", **overrides):
    """A float32 model with the tensors of a tiny released checkpoint; it stops at no token."""
    settings = {"sliding_window": WINDOW, "eos_token_id": None, "pad_token_id": 0, **overrides}
    config = released_config(torch_dtype="float32", **settings)
    model = GrinMoeForCausalLM(
        GrinMoeConfig.from_dict(config, attn_implementation=attention, experts_implementation=experts)
    )
    model.load_state_dict(released_tensors(config))
    return model.eval()


def random_ids(*shape):
    return torch.randint(1, 131, shape, generator=torch.Generator().manual_seed(1))


def assert_close(actual, expected, tolerance=1e-5):
    assert actual.shape == expected.shape
    assert ((actual - expected).abs().max() / expected.abs().max()).item() < tolerance


def assert_compiled_equals_eager(model, backend, **inputs):
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    expected = model(**inputs)
    outputs = compiled(**inputs)
    assert_close(outputs.logits, expected.logits)
    if inputs.get("use_cache"):
        for layer, expected_layer in zip(outputs.past_key_values.layers, expected.past_key_values.layers, strict=True):
            assert layer.keys.shape[2] == WINDOW
            assert_close(layer.keys, expected_layer.keys)
            assert_close(layer.values, expected_layer.values)


@pytest.mark.parametrize(
    ("attention", "experts", "use_cache"),
    [
        ("eager", "grinmoe", False),
        ("sdpa", "grinmoe", True),
        ("sdpa", "grouped_mm", True),
        ("sdpa", "batched_mm", False),
    ],
)
def test_fullgraph_equals_eager(attention, experts, use_cache):
    model = build(attention, experts)
    assert_compiled_equals_eager(model, "aot_eager", input_ids=random_ids(2, LENGTH), use_cache=use_cache)


def test_fullgraph_of_a_padded_batch():
    mask = torch.stack([torch.arange(LENGTH) >= start for start in (0, 9)]).long()
    assert_compiled_equals_eager(
        build(), "aot_eager", input_ids=random_ids(2, LENGTH) * mask, attention_mask=mask, use_cache=True
    )


def test_fullgraph_of_packed_sequences():
    position_ids = torch.tensor([[*range(LENGTH - 8), *range(8)]])
    model, ids = build(), random_ids(1, LENGTH)
    assert_compiled_equals_eager(model, "aot_eager", input_ids=ids, position_ids=position_ids)
    assert (model(ids, position_ids=position_ids).logits - model(ids).logits)[:, -8:].abs().max() > 1e-2


def test_fullgraph_with_router_logits():
    model, ids = build(), random_ids(2, LENGTH)
    settings = {"output_router_logits": True, "output_selected_experts": True}
    expected = model(ids, **settings)
    outputs = torch.compile(model, backend="aot_eager", fullgraph=True)(ids, **settings)
    assert_close(outputs.logits, expected.logits)
    assert_close(torch.stack(outputs.router_logits), torch.stack(expected.router_logits))
    assert all(map(torch.equal, outputs.selected_experts, expected.selected_experts))
    assert_close(outputs.aux_loss, expected.aux_loss)


def test_compiled_generation_with_a_static_cache():
    """What `generate(cache_implementation="static")` does by itself on a GPU, across the end of the window."""
    model, ids = build(), random_ids(2, 5)
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


def training_model(**overrides):
    config = released_config(torch_dtype="float32", router_jitter_noise=0.3, **overrides)
    with tempfile.TemporaryDirectory() as folder:
        model = GrinMoeForCausalLM.from_pretrained(write_checkpoint(Path(folder), config, released_tensors(config)))
    return model.train()


def assert_training_steps_equal(model, compiled, num_steps=1):
    """Loss and every gradient of each step, draws and all."""
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
        for ours, eager in zip(results[1][1], results[0][1], strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("estimator", ["sparsemixer_v2", "dense"])
@torch.enable_grad()
def test_compiled_training_step_equals_eager(estimator):
    model = training_model(router_estimator=estimator)
    assert_training_steps_equal(model, torch.compile(model, backend="aot_eager", fullgraph=True))


@torch.enable_grad()
def test_inductor_draws_the_same_noise_in_one_graph_for_all_steps():
    """torch's own generator gives other numbers in inductor; a step's number must not be compiled in."""
    model = training_model(num_hidden_layers=1, num_local_experts=3)
    torch._dynamo.utils.counters.clear()
    assert_training_steps_equal(model, torch.compile(model, fullgraph=True), num_steps=3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@torch.enable_grad()
def test_compiled_training_step_with_the_balance_loss():
    """Its sum over ranks is Python's business, for which the graph breaks; layers are still compiled once for all."""
    model = training_model(router_aux_loss_coef=0.5, num_hidden_layers=4, hidden_size=8, intermediate_size=4)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=2):
        assert_training_steps_equal(model, torch.compile(model, backend="aot_eager"), num_steps=2)
