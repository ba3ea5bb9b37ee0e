"""transformers' own Trainer: all weights learn, routers may be frozen, and bf16 computes experts in bfloat16."""

import pytest
import runs
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Trainer

from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM


@pytest.mark.parametrize("freeze_router", [False, True])
def test_all_weights_learn_but_frozen_routers(tmp_path, freeze_router):
    """With the balance loss on, whose gradient goes to the routers first of all. What is saved is what was trained."""
    model = runs.make_model(freeze_router=freeze_router, router_aux_loss_coef=0.1, router_jitter_noise=0.2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = {"optim": "adamw_torch", "learning_rate": 5e-3, "max_steps": 30, "eval_dataset": runs.Rows(8)}
    trainer = runs.make_trainer(tmp_path, model, trainer_class=Trainer, **settings)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    last = trainer.evaluate()["eval_loss"]
    assert last < first - 0.8
    unmoved = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    routers = {f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(2)}
    assert unmoved == (routers if freeze_router else set())

    trainer.save_model(tmp_path / "final")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    trainer = runs.make_trainer(tmp_path, reloaded, trainer_class=Trainer, **settings)
    assert trainer.evaluate()["eval_loss"] == last


def test_bf16_keeps_float32_weights_that_hold_small_updates(tmp_path):
    """AdamW's first step moves each weight by the learning rate: 1e-6 is far below bfloat16's resolution of them."""
    model = runs.make_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = {"optim": "adamw_torch", "learning_rate": 1e-6, "max_steps": 1, "bf16": True}
    trainer = runs.make_trainer(tmp_path, model, trainer_class=Trainer, **settings)
    trainer.train()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    states = [tensor for state in trainer.optimizer.state.values() for tensor in state.values()]
    assert len(states) >= 2 * len(before) and {tensor.dtype for tensor in states} == {torch.float32}
    weight, old = model.lm_head.weight, before["lm_head.weight"]
    assert ((weight != old) | (old.abs() < 1e-2))[5:].float().mean() > 0.99


def test_an_experts_implementation_without_dropout_is_refused():
    settings = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="'sonicmoe' has no dropout"):
        GrinMoeForCausalLM(GrinMoeConfig(**settings, num_key_value_heads=1, num_local_experts=2, vocab_size=32,
                                         expert_dropout=0.1, experts_implementation="sonicmoe"))  # fmt: skip


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("estimator", ["sparsemixer_v2", "dense"])
def test_autocast_computes_experts_in_bfloat16(implementation, estimator):
    """transformers' implementations go by the weights' dtype: with float32 weights nothing would be gained."""
    model = runs.make_model(experts_implementation=implementation, router_estimator=estimator).train()
    ids = torch.randint(5, 131, (2, 12), generator=torch.Generator().manual_seed(0))
    dtypes = set()

    class Matmuls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            sizes = [tuple(arg.shape[-2:]) for arg in args if isinstance(arg, torch.Tensor)]
            if "mm" in str(func) and any(24 in size for size in sizes):  # the experts' intermediate_size
                dtypes.update(arg.dtype for arg in args if isinstance(arg, torch.Tensor) and arg.is_floating_point())
            return func(*args, **(kwargs or {}))

    model.begin_step(0, seed=0)
    reference = model(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16), Matmuls():
        model.begin_step(0, seed=0)
        loss = model(ids, labels=ids).loss
    assert dtypes == {torch.bfloat16}
    assert loss.item() == pytest.approx(reference.item(), rel=1e-2)
    loss.backward()
    assert {parameter.grad.dtype for parameter in model.model.layers[0].parameters()} == {torch.float32}
