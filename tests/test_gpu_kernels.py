"""The Triton kernels against the torch code that they stand for, in Triton's interpreter: `make test-triton`."""

import os
from types import SimpleNamespace

import pytest
import torch
from models import tiny_model
from torch.nn.functional import silu

from modeling_grin import GrinMoeConfig, route
from modeling_grin import gpu_kernels_grinmoe as gpu
from modeling_grin.kernels.gpu_experts import MAX_SLOTS, few_slots_experts, uses_few_slots_kernel
from modeling_grin.modeling_grinmoe import GrinMoeExperts
from modeling_grin.routing_grinmoe import RoutingNoise, TokenKeys, choose, draw_noise, jitter_input

needs_interpreter = pytest.mark.skipif(
    gpu.triton is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton's kernels run on a CPU in its interpreter only: make test-triton",
)
NUM_TOKENS = 1300  # times 1 + 2 + 3 + 4 choices, times 4 numbers of experts: 52,000


@pytest.fixture
def kernels(monkeypatch):
    """Kernels take the place of the torch code, in large programs, which the interpreter runs faster."""
    monkeypatch.setattr(gpu, "can_launch", lambda tensor: True)
    monkeypatch.setattr(gpu, "TOKENS_PER_PROGRAM", 512)


def make_logits(num_tokens, num_experts, seed):
    """Normal, rounded to quarters (ties), zero, of bfloat16, large, and partly -inf logits."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator)
    kinds = torch.arange(num_tokens) % 6
    logits[kinds == 1] = (4 * logits[kinds == 1]).round() / 4
    logits[kinds == 2] = 0
    logits[kinds == 3] = logits[kinds == 3].bfloat16().float()
    logits[kinds == 4] *= 1e4
    impossible = torch.rand(num_tokens, num_experts, generator=generator) < 0.3
    return logits.masked_fill((kinds == 5)[:, None] & impossible, -torch.inf)


def make_keys(num_tokens, seed=0):
    return torch.empty(num_tokens, dtype=torch.int64).random_(generator=torch.Generator().manual_seed(seed))


def assert_equal_routing(logits, top_k, **settings):
    """Same experts; weights and gradients to rounding. The oracle gets its noise drawn, and so takes torch's code."""
    ours, oracle = (logits.clone().requires_grad_() for _ in range(2))
    routing = route(ours, top_k, **settings)
    keys = settings.pop("keys", None)
    noise = None if keys is None else draw_noise(logits, top_k, keys=keys)
    if noise is None:
        zeros = torch.zeros(top_k, *logits.shape)
        noise = RoutingNoise(zeros, zeros[..., 0]) if settings["training"] else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "can_launch", lambda tensor: False)
        expected = route(oracle, top_k, **settings, noise=noise)
    assert torch.equal(routing.experts, expected.experts)
    assert routing.weights.dtype == torch.float32
    torch.testing.assert_close(routing.weights, expected.weights, rtol=0, atol=1e-6)
    upstream = torch.randn(routing.weights.shape, generator=torch.Generator().manual_seed(1))
    gradients = [
        torch.autograd.grad((weights * upstream).sum(), leaf)[0]
        for weights, leaf in ((routing.weights, ours), (expected.weights, oracle))
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)
    return routing


@needs_interpreter
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
@pytest.mark.parametrize("num_experts", [8, 16, 33, 64])
def test_sampled_choices(kernels, num_experts, top_k):
    logits = make_logits(NUM_TOKENS, num_experts, seed=num_experts + top_k)
    settings = {"training": True, "keys": make_keys(NUM_TOKENS), "jitter_eps": 0.3}
    experts = assert_equal_routing(logits, top_k, **settings).experts
    assert (experts[:, 0] != logits.argmax(-1)).any(), "some tokens must not get their best expert"


@needs_interpreter
@pytest.mark.parametrize("jitter_eps", [0.0, 0.01])
@pytest.mark.parametrize(
    "settings",
    [{"training": False}, {"training": True, "sampling": False}, {"training": True, "keys": make_keys(300)}],
)
@pytest.mark.parametrize("estimator", ["sparsemixer_v2", "sparsemixer_v2_star"])
def test_modes_and_estimators(kernels, estimator, settings, jitter_eps):
    assert_equal_routing(make_logits(300, 16, seed=5), 2, estimator=estimator, jitter_eps=jitter_eps, **settings)


@needs_interpreter
@pytest.mark.parametrize("argmax_exception", [False, True])
def test_points_of_the_rule(kernels, monkeypatch, argmax_exception):
    """In programs of the size that a GPU runs, the last one with tokens to spare; of bfloat16 logits, in float32."""
    monkeypatch.undo()
    logits, keys = make_logits(100, 12, seed=2).bfloat16(), make_keys(100)
    settings = 2, 0.3, 0.25, argmax_exception
    experts, _, at_end = gpu.choose(logits, keys, *settings)
    finite = logits.float().clamp(min=torch.finfo(torch.float32).min)
    expected = choose(finite, 2, 0.3, TokenKeys(keys), 0.25, argmax_exception)
    assert torch.equal(experts, expected.experts) and torch.equal(at_end, expected.at_end)
    assert at_end.any() and not at_end.all()


@needs_interpreter
@pytest.mark.parametrize("shape", [(9, 4098), (3, 5), (1, 1), (0, 8)])
def test_jitter_is_exact(kernels, shape):
    generator = torch.Generator().manual_seed(0)
    hidden, upstream = (torch.randn(shape, generator=generator) for _ in range(2))
    keys, results = make_keys(shape[0]), []
    for use in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpu, "can_launch", lambda tensor, use=use: use)
            leaf = hidden.clone().requires_grad_()
            output = jitter_input(leaf, 0.01, keys)
            results.append((output, *torch.autograd.grad(output, leaf, upstream)))
    assert all(map(torch.equal, *results))


JITTER = {"router_jitter_noise": 0.3, "input_jitter_noise": 0.05, "router_aux_loss_coef": 0.1}


def training_step(model, call, ids):
    model.begin_step(0, seed=1, num_tokens=ids.numel())
    model.zero_grad()
    loss = call(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@needs_interpreter
@pytest.mark.usefixtures("far_from_ties")
def test_a_training_step_has_three_launches_a_layer_and_the_same_gradients(kernels, monkeypatch):
    model, launched = tiny_model(**JITTER).train(), []
    launch = gpu.launch
    monkeypatch.setattr(
        gpu, "launch", lambda kernel, *args, **named: (launched.append(kernel), launch(kernel, *args, **named))
    )
    ids = torch.arange(40).reshape(2, 20)
    ours = training_step(model, model, ids)
    kinds = [gpu.jitter_kernel, gpu.choose_kernel, gpu.choose_backward_kernel]
    assert [launched.count(kind) for kind in kinds] == [4, 2, 2], "jitter is its own backward pass"
    monkeypatch.setattr(gpu, "can_launch", lambda tensor: False)
    for actual, expected in zip(ours, training_step(model, model, ids), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@needs_interpreter
@pytest.mark.usefixtures("far_from_ties")
def test_kernels_break_no_graph(kernels):
    model, ids = tiny_model(experts="grouped_mm", **JITTER).train(), torch.arange(40).reshape(2, 20)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = training_step(model, model, ids)
    for actual, eager in zip(training_step(model, compiled, ids), expected, strict=True):
        torch.testing.assert_close(actual, eager, rtol=1e-4, atol=1e-5)


def test_one_setting_switches_the_kernels_off(monkeypatch):
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    monkeypatch.setattr(gpu, "triton", object())
    assert gpu.use_kernels(on_gpu)
    assert not gpu.use_kernels(torch.zeros(1)), "on a CPU"
    assert not gpu.use_kernels(SimpleNamespace(is_cuda=True, dtype=torch.float64)), "more than the kernels' precision"
    monkeypatch.setattr(gpu, "IS_ON", False)
    assert not gpu.use_kernels(on_gpu)


# Experts of a few tokens, against float64 loops


def make_experts(num_experts=5, hidden_size=40, intermediate_size=72):
    config = GrinMoeConfig(
        hidden_size=hidden_size, intermediate_size=intermediate_size, num_local_experts=num_experts,
        num_attention_heads=2, num_key_value_heads=1, experts_implementation="grinmoe",
    )  # fmt: skip
    experts = GrinMoeExperts(config).eval()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(parameter.shape)))
    return experts


def make_inputs(num_tokens, top_k, num_experts=5, hidden_size=40):
    generator = torch.Generator().manual_seed(num_tokens)
    hidden_states = torch.randn(num_tokens, hidden_size, generator=generator)
    chosen = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices
    return hidden_states, chosen, torch.rand(num_tokens, top_k, generator=generator)


def loops(experts, hidden_states, chosen, weights):
    output = torch.zeros_like(hidden_states, dtype=torch.float64)
    for token, slots in enumerate(chosen.tolist()):
        for slot, expert in enumerate(slots):
            gate, up = (experts.gate_up_proj[expert].double() @ hidden_states[token].double()).chunk(2)
            own = experts.down_proj[expert].double() @ (silu(gate) * up)
            output[token] += weights[token, slot].double() * own
    return output


@needs_interpreter
@pytest.mark.parametrize(("num_tokens", "top_k"), [(1, 1), (1, 2), (7, 2), (16, 4)])
@torch.no_grad()
def test_equals_loops(monkeypatch, num_tokens, top_k):
    """Sizes that no block divides; experts that no token chose among them."""
    monkeypatch.setattr(gpu, "can_launch", lambda tensor: True)
    experts, inputs = make_experts(), make_inputs(num_tokens, top_k)
    assert uses_few_slots_kernel(experts, inputs[0], inputs[1])
    expected = loops(experts, *inputs)
    torch.testing.assert_close(
        few_slots_experts(*inputs, *experts.parameters()).double(), expected, rtol=1e-6, atol=5e-6
    )


def test_is_for_a_few_tokens_of_inference(monkeypatch):
    experts, (hidden_states, chosen, _) = make_experts(), make_inputs(MAX_SLOTS // 2 + 1, 2)
    few = hidden_states[:-1], chosen[:-1]
    with torch.no_grad():
        assert not uses_few_slots_kernel(experts, *few), "on a CPU"
        monkeypatch.setattr(gpu, "can_launch", lambda tensor: True)
        assert uses_few_slots_kernel(experts, *few)
        assert not uses_few_slots_kernel(experts, hidden_states, chosen), "many slots"
        assert not uses_few_slots_kernel(experts, few[0].bfloat16(), few[1]), "weights of another dtype"
    assert not uses_few_slots_kernel(experts, *few), "gradients"
