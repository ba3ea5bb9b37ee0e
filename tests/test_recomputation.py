"""Activation checkpointing of every kind: the gradients of the plain backward pass bit for bit, sampling on."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_apply_ac
from checkpoints import released_config, released_tensors
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from modeling_grin import ROUTER_ESTIMATORS, GrinMoeConfig, GrinMoeForCausalLM

IDS = torch.randint(0, 131, (2, 24), generator=torch.Generator().manual_seed(0))


def make_model(**overrides):
    settings = {"torch_dtype": "float32", "num_local_experts": 12, "router_jitter_noise": 0.3,
                "input_jitter_noise": 0.1, "router_aux_loss_coef": 0.5, **overrides}  # fmt: skip
    config = released_config(**settings)
    model = GrinMoeForCausalLM(GrinMoeConfig.from_dict(dict(config)))
    model.load_state_dict(released_tensors(config))
    return model.train()


def keep_attention(ctx, op, *args, **kwargs):
    attention = op == torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    return CheckpointPolicy.MUST_SAVE if attention else CheckpointPolicy.PREFER_RECOMPUTE


def wrap_as_accelerate_does(model):
    """accelerate's own function for FSDP2's `activation_checkpointing`; it replays no generator."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", activation_checkpointing=True
    )
    plugin.set_auto_wrap_policy(model)
    fsdp2_apply_ac(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)), model)


KINDS = {
    "not reentrant": lambda model: model.gradient_checkpointing_enable({"use_reentrant": False}),
    "reentrant": lambda model: model.gradient_checkpointing_enable({"use_reentrant": True}),
    "no generator replayed": lambda model: model.gradient_checkpointing_enable(
        {"use_reentrant": False, "preserve_rng_state": False}
    ),
    "reentrant, no generator replayed": lambda model: model.gradient_checkpointing_enable(
        {"use_reentrant": True, "preserve_rng_state": False}
    ),
    "selective": lambda model: model.gradient_checkpointing_enable(
        {"use_reentrant": False, "context_fn": lambda: create_selective_checkpoint_contexts(keep_attention)}
    ),
    "accelerate's for FSDP2": wrap_as_accelerate_does,
}


def run(model, steps=2):
    """Losses and gradients of micro-batches of one optimizer step, and how often the routing was observed."""
    model.enable_input_require_grads()
    observed = []
    model.model.routing_observer = lambda logits, experts, counted: observed.append(experts)
    model.begin_step(4, seed=1, num_tokens=steps * IDS.numel())
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
    counts = model.model.optimizer_step.window.latest_counts
    gradients = {
        name.replace("_checkpoint_wrapped_module.", ""): parameter.grad for name, parameter in model.named_parameters()
    }
    return losses, gradients, observed, counts


@pytest.mark.parametrize(
    ("kind", "estimator"),
    [(kind, "sparsemixer_v2") for kind in KINDS] + [("not reentrant", "sparsemixer_v2_star"), ("reentrant", "dense")],
)
def test_gradients_and_counters_are_those_without(kind, estimator):
    assert estimator in ROUTER_ESTIMATORS
    losses, gradients, observed, counts = run(make_model(router_estimator=estimator))
    model = make_model(router_estimator=estimator)
    KINDS[kind](model)
    recomputed = []
    model.model.layers[0].block_sparse_moe.register_forward_pre_hook(lambda *args: recomputed.append(1))
    their_losses, their_gradients, their_observed, their_counts = run(model)
    assert len(recomputed) == 4, "two micro-batches, each forward pass run again"
    assert their_losses == losses
    assert their_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(their_gradients[name], gradient), name
    assert len(their_observed) == len(observed) == 2, "once for each micro-batch"
    for ours, theirs in zip(observed, their_observed, strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert torch.equal(their_counts, counts)
    assert model.model.layers[0].block_sparse_moe.gate.weight.grad.abs().max() > 0


def test_experts_without_a_token():
    """One row of three tokens and twelve experts: most have none, in the forward pass and in the recomputation."""
    ids, found = IDS[:1, :3], []
    for kind in (None, *KINDS):
        model = make_model()
        if kind is not None:
            KINDS[kind](model)
        model.enable_input_require_grads()
        model.begin_step(0)
        model(ids, labels=ids, use_cache=False).loss.backward()
        found.append(model.model.layers[1].block_sparse_moe.experts.down_proj.grad)
    assert (found[0].flatten(1).abs().amax(1) == 0).sum() >= 6
    assert all(torch.equal(gradient, found[0]) for gradient in found)


def test_without_a_step_the_key_travels_with_the_forward_pass():
    """No `begin_step`, and nobody replays torch's generator: the key was drawn outside of what is recomputed."""
    found = []
    for kind in (None, "no generator replayed", "accelerate's for FSDP2"):
        model = make_model()
        if kind is not None:
            KINDS[kind](model)
        torch.manual_seed(3)
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        found.append(model.model.layers[0].block_sparse_moe.gate.weight.grad)
    assert all(torch.equal(gradient, found[0]) for gradient in found)
