"""Choices in fine-tuning with the real trainers: frozen routers, expert dropout, NEFTune, clipping, bf16."""

import math

import pytest
import torch
from checkpoints import released_config, released_tensors, write_checkpoint
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    DefaultDataCollator,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from modeling_grin.lora import add_lora


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, trained_tokenizer):
    """Released layout, float32, the trained tokenizer's vocabulary, wide routing noise."""
    config = released_config(
        torch_dtype="float32", router_jitter_noise=0.2, vocab_size=len(trained_tokenizer), eos_token_id=3
    )
    tensors = {name: tensor if "norm" in name else 0.5 * tensor for name, tensor in released_tensors(config).items()}
    return write_checkpoint(tmp_path_factory.mktemp("base"), config, tensors)


@pytest.fixture(scope="module")
def dataset():
    """Rows of 16 tokens that count up, so that there is something to learn."""
    starts = torch.randint(0, 100, (32,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [[start + step for step in range(16)] for start in starts]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


class Watch(TrainerCallback):
    """Gradients as the optimizer is about to see them, and whatever `on_step_begin` is given to do."""

    def __init__(self, at_step_begin=None):
        self.gradients = {}
        self.at_step_begin = at_step_begin

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.at_step_begin is not None:
            self.at_step_begin(model)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def train(model, dataset, output_dir, *, callback=None, **arguments):
    defaults = {"max_steps": 3, "learning_rate": 5e-3, "per_device_train_batch_size": 8, "logging_steps": 1}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=output_dir, report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no",
            **{**defaults, **arguments},
        ),
        train_dataset=dataset,
        data_collator=DefaultDataCollator(),
        callbacks=[callback] if callback else None,
    )  # fmt: skip
    trainer.train()
    return trainer


def parameters_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ---- Frozen routers ----


@pytest.mark.parametrize("freeze_router", [False, True])
def test_freeze_router_holds_the_routers_and_nothing_else(checkpoint, dataset, tmp_path, freeze_router):
    """With the balance loss on, whose gradient goes to the routers first of all."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, freeze_router=freeze_router, router_aux_loss_coef=0.1)
    before = parameters_of(model)
    train(model, dataset, tmp_path)
    unmoved = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    routers = {f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(2)}
    assert unmoved == (routers if freeze_router else set())


# ---- Noise in training: expert dropout, NEFTune ----


def test_expert_dropout_trains_and_is_replayed_by_checkpointing(checkpoint, dataset, tmp_path):
    """Dropout, routing and jitter drawn once: recomputed or not, the same weights bit for bit."""

    def run(expert_dropout, **arguments):
        set_seed(0)
        model = AutoModelForCausalLM.from_pretrained(checkpoint, expert_dropout=expert_dropout)
        return train(model, dataset, tmp_path, max_steps=8, **arguments)

    plain = run(0.3)
    assert losses_of(plain)[-1] < losses_of(plain)[0] - 0.5
    for use_reentrant in (False, True):
        arguments = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
        recomputed = parameters_of(run(0.3, **arguments).model)
        for name, expected in plain.model.named_parameters():
            assert torch.equal(recomputed[name], expected), (use_reentrant, name)
    assert losses_of(run(0.0))[0] != losses_of(plain)[0]


@pytest.mark.parametrize("lora", [False, True])
def test_neftune_acts_in_training_and_stops_with_it(checkpoint, dataset, tmp_path, lora):
    """Noise U(-a, a) with a = alpha / sqrt(length * hidden_size), on the embeddings of each training forward pass."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    embedding = model.get_input_embeddings()
    if lora:
        model = add_lora(model, r=2)
    noises, handles = [], []

    def record(module, inputs, output):
        noises.append((output - module.weight[inputs[0]]).detach())

    watch = Watch(lambda _: handles or handles.append(embedding.register_forward_hook(record)))
    train(model, dataset, tmp_path, callback=watch, neftune_noise_alpha=5.0, learning_rate=1e-3)
    bound = 5.0 / math.sqrt(16 * 32)
    assert len(noises) == 3
    for noise in noises:
        assert 0.99 * bound < noise.abs().max() <= bound * (1 + 1e-5)
        assert noise.mean().abs() < 5 * bound / math.sqrt(3 * noise.numel())
    assert not torch.allclose(noises[0], noises[1])

    handles[0].remove()
    ids = torch.arange(16)[None]
    assert torch.equal(embedding.train()(ids), embedding.weight[ids])
    assert not hasattr(embedding, "neftune_noise_alpha")


# ---- Precision and clipping ----


def test_clipping_sees_the_experts_gradients(checkpoint, dataset, tmp_path):
    """Trainer's `grad_norm` is the float64 norm of all gradients, experts included, and all are scaled by it."""

    def run(max_grad_norm):
        watch = Watch()
        set_seed(0)
        model = AutoModelForCausalLM.from_pretrained(checkpoint, router_aux_loss_coef=0.1)
        trainer = train(model, dataset, tmp_path, callback=watch, max_steps=1, max_grad_norm=max_grad_norm)
        return watch.gradients, trainer.state.log_history[0].get("grad_norm")

    raw, _ = run(0.0)
    squares = {name: gradient.double().square().sum().item() for name, gradient in raw.items()}
    norm = math.sqrt(sum(squares.values()))
    experts = math.sqrt(sum(square for name, square in squares.items() if ".experts." in name))
    assert experts > 0.2 * norm  # enough to be missed
    max_grad_norm = 0.1 * experts

    clipped, reported = run(max_grad_norm)
    assert reported == pytest.approx(norm, rel=1e-5)
    assert clipped.keys() == raw.keys()
    for name, gradient in clipped.items():
        torch.testing.assert_close(gradient, raw[name] * (max_grad_norm / norm), rtol=1e-4, atol=1e-9, msg=name)


def test_bf16_keeps_float32_weights_that_hold_small_updates(checkpoint, dataset, tmp_path):
    """AdamW's first step moves each weight by the learning rate: 1e-6 is far below bfloat16's resolution of them."""

    def share_moved(model, watch, before):
        moved = total = 0
        for name, parameter in model.named_parameters():
            learnt = (watch.gradients[name] != 0) & (before[name].abs() > 1e-2)
            moved += ((parameter != before[name]) & learnt).sum().item()
            total += learnt.sum().item()
        return moved / total

    dtypes = set()

    def watch_dtypes(model):
        for layer in model.model.layers:
            layer.self_attn.q_proj.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))

    watch = Watch(watch_dtypes)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    before = parameters_of(model)
    trainer = train(model, dataset, tmp_path, callback=watch, max_steps=1, learning_rate=1e-6, bf16=True)
    assert dtypes == {torch.bfloat16}  # what is computed
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}  # what is kept
    assert {gradient.dtype for gradient in watch.gradients.values()} == {torch.float32}
    states = [tensor for state in trainer.optimizer.state.values() for tensor in state.values()]
    assert len(states) >= 2 * len(before)
    assert {tensor.dtype for tensor in states} == {torch.float32}
    assert share_moved(model, watch, before) > 0.99

    watch = Watch()
    pure = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="bfloat16")
    before = parameters_of(pure)
    train(pure, dataset, tmp_path, callback=watch, max_steps=1, learning_rate=1e-6, bf16=True)
    assert share_moved(pure, watch, before) == 0.0
