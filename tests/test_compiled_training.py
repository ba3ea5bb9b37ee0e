"""torch.compile of training, layer by layer, with the load-balance loss: no graph breaks."""

import pytest
import torch

from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM

pytestmark = pytest.mark.usefixtures("far_from_ties")
IDS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch._dynamo.reset()
    config = GrinMoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, router_jitter_noise=0.3, input_jitter_noise=0.05,
        router_aux_loss_coef=0.5, initializer_range=0.3, eos_token_id=2, pad_token_id=2,
        experts_implementation="grouped_mm",
    )  # fmt: skip
    torch.manual_seed(0)
    return GrinMoeForCausalLM(config).train()


def step(model, call, number):
    model.begin_step(number, seed=3, num_tokens=IDS.numel())
    model.zero_grad()
    loss = call(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]


def assert_equal_steps(actual, expected):
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=0)
    for ours, eager in zip(actual[1], expected[1], strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


def test_each_layer_is_one_graph_for_all_layers_and_steps(model):
    expected = [step(model, model, number) for number in range(2)]
    torch._dynamo.utils.counters.clear()
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    for number in range(2):
        assert_equal_steps(step(model, model, number), expected[number])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
