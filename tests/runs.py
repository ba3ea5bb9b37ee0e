"""Small training runs, in one process or several (`distributed/cases.py`)."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import released_config, released_tensors
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM
from modeling_grin.training import GrinMoeTrainer

ROWS, LENGTH, GLOBAL_BATCH, STEPS = 16, 12, 8, 2
LEARNING_RATE = 0.2  # large, so that the update can be told from rounding
COEFFICIENT = 1.0


def make_model(seed: int = 3, **overrides) -> GrinMoeForCausalLM:
    """A tiny model with random weights, no zeros and no unit norms; deterministic routing unless `overrides` say."""
    settings = {"torch_dtype": "float32", "router_jitter_noise": 0.0, "input_jitter_noise": 0.0,
                "router_aux_loss_coef": COEFFICIENT}  # fmt: skip
    values = released_config(**{**settings, **overrides})
    model = GrinMoeForCausalLM(GrinMoeConfig(**values))
    model.load_state_dict(released_tensors(values, seed))
    return model


class Rows(Dataset):
    """Rows of random tokens, of different lengths, padded left or right, each with other labels masked."""

    def __init__(self, num_rows: int = ROWS):
        generator = torch.Generator().manual_seed(11)
        self.rows = []
        for row in range(num_rows):
            size = int(torch.randint(4, LENGTH + 1, (), generator=generator))
            ids = torch.randint(5, 131, (size,), generator=generator)
            masked = torch.rand(size, generator=generator) < 0.4
            masked[size // 2] = False  # one label at least
            labels = ids.masked_fill(masked, -100)
            pad = (LENGTH - size, 0) if row % 2 else (0, LENGTH - size)
            self.rows.append(
                {
                    "input_ids": torch.nn.functional.pad(ids, pad, value=2),
                    "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), pad),
                    "labels": torch.nn.functional.pad(labels, pad, value=-100),
                }
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


def make_trainer(
    output_dir, model, accumulation=1, micro_batch=8, trainer_class=GrinMoeTrainer, callbacks=None,
    exact_balance=None, distributed_checkpoint=None, eval_dataset=None, **arguments,
):  # fmt: skip
    """A trainer of `STEPS` steps of plain gradient descent on rows in order, unless `arguments` say otherwise."""
    defaults = {"train_sampling_strategy": "sequential", "max_steps": STEPS, "optim": "sgd", "max_grad_norm": 0.0,
                "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "save_strategy": "no"}  # fmt: skip
    return trainer_class(
        model=model,
        args=TrainingArguments(
            output_dir=output_dir, per_device_train_batch_size=micro_batch, gradient_accumulation_steps=accumulation,
            report_to="none", disable_tqdm=True, use_cpu=True, **{**defaults, **arguments},
        ),
        train_dataset=Rows(),
        eval_dataset=eval_dataset,
        callbacks=callbacks,
        **({} if exact_balance is None else {"exact_balance": exact_balance}),
        **({} if distributed_checkpoint is None else {"distributed_checkpoint": distributed_checkpoint}),
    )  # fmt: skip


def parameters(trainer) -> dict[str, torch.Tensor]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train_case(folder, name, config=None, **arguments) -> dict[str, torch.Tensor]:
    """The parameters after training."""
    trainer = make_trainer(folder / f"{name}-run", make_model(**(config or {})), **arguments)
    trainer.train()
    return parameters(trainer)


class Gradients(TrainerCallback):
    """The gradients of the first step, whole."""

    def __init__(self):
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if not self.gradients:
            named = getattr(model, "module", model).named_parameters()
            self.gradients = {name: whole(parameter.grad) for name, parameter in named if parameter.grad is not None}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def balance_gradients(make: Callable[[float, Gradients], Trainer]) -> dict[str, torch.Tensor]:
    """What the load-balance loss adds to the gradients of the first step: with coefficient 1 and without, by trainers
    that `make` builds with a coefficient and a callback."""
    found = []
    for coefficient in (1.0, 0.0):
        callback = Gradients()
        make(coefficient, callback).train()
        found.append(callback.gradients)
    return {name: found[0][name] - found[1][name] for name in found[0]}


# Stock Phimoe and GRIN-MoE of the same tensors route alike: without a keep set there is nothing to sample.
ROUTED_ALIKE = {
    "torch_dtype": "float32",
    "router_jitter_noise": 0.0,
    "input_jitter_noise": 0.0,
    "sliding_window": None,
}
PHIMOE = {"model_type": "phimoe", "architectures": ["PhimoeForCausalLM"], "rope_scaling": None}
TIMES = ("train_", "total_flos", "step_time", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


def train_stock(trainer) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """What a trainer logs in training except times, and the parameters after it, by Phimoe's names."""
    set_seed(7)
    trainer.train()
    logged = [{k: v for k, v in log.items() if not k.startswith(TIMES)} for log in trainer.state.log_history]
    named = trainer.model.named_parameters()
    names = {name: name.replace(".block_sparse_moe.", ".mlp.").replace(".gate.", ".router.") for name, _ in named}
    return logged, {names[name]: parameter.detach() for name, parameter in trainer.model.named_parameters()}


def assert_trained_alike(actual, expected, rtol=1e-4, atol=2e-5) -> None:
    """Two results of `train_stock`: every logged number, and every parameter."""
    for log, expected_log in zip(actual[0], expected[0], strict=True):
        assert log == pytest.approx(expected_log, rel=rtol, abs=atol, nan_ok=True)
    assert actual[1].keys() == expected[1].keys()
    for name, parameter in actual[1].items():
        torch.testing.assert_close(parameter, expected[1][name], rtol=rtol, atol=atol, msg=name)


# Sampling and dropout on, rows shuffled, AdamW, a learning rate that changes, saved in the middle of an epoch.
RESUME_CONFIG = {"router_jitter_noise": 0.1, "input_jitter_noise": 0.05, "expert_dropout": 0.1,
                 "attention_dropout": 0.1, "router_aux_loss_coef": 0.1}  # fmt: skip
RESUME_ARGUMENTS = {"max_steps": 9, "optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "linear",
                    "max_grad_norm": 1.0, "train_sampling_strategy": "random", "logging_steps": 1, "micro_batch": 2,
                    "save_strategy": "steps"}  # fmt: skip


def resume_case(
    folder, case, resumed_at: int, trainer_class=GrinMoeTrainer, config=None, **arguments
) -> dict[str, Any]:
    """A run of 9 steps, and one that begins with other weights and resumes from the first's checkpoint.

    Returns the parameters and losses of both, `whole`, `resumed`, `whole_losses`, `resumed_losses`, and the names of
    what they left: `folders` and, in the checkpoint, `files`.
    """
    results: dict[str, Any] = {}
    output_dir = folder / f"{case}-run"
    arguments = {**RESUME_ARGUMENTS, "save_steps": resumed_at, **arguments}
    for name, seed in (("whole", 3), ("resumed", 4)):
        model = make_model(seed, **{**RESUME_CONFIG, **(config or {})})
        set_seed(seed)
        trainer = make_trainer(Path(output_dir, name), model, trainer_class=trainer_class, **arguments)
        checkpoint = Path(output_dir, "whole", f"checkpoint-{resumed_at}")
        trainer.train(resume_from_checkpoint=str(checkpoint) if name == "resumed" else None)
        results[name] = parameters(trainer)
        results[f"{name}_losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    results["folders"] = sorted(path.name for path in Path(output_dir).glob("*/*"))
    results["files"] = sorted(path.name for path in checkpoint.iterdir())
    return results


# Moments of the third step's save, by the audit event that comes just before: what the run does, and to which path.
MOMENTS = {
    "in the files": ("open", 0, "checkpoint-3/config.json"),
    "all written": ("os.rename", 1, "run/checkpoint-3"),
    "named": ("shutil.rmtree", 0, "_incomplete"),
}


class KillInSave(TrainerCallback):
    """SIGKILL for this process at one of MOMENTS of the third step's save."""

    def __init__(self, moment: str):
        self.moment, self.output_dir = moment, None
        sys.addaudithook(self.hook)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.output_dir = Path(args.output_dir)

    def hook(self, event: str, args: tuple) -> None:
        wanted, place, path = MOMENTS[self.moment]
        if self.output_dir is None or event != wanted or not str(args[place]).endswith(path):
            return
        if self.moment != "named" or (self.output_dir / "checkpoint-3").is_dir():
            os.kill(os.getpid(), signal.SIGKILL)


def save_until_killed(output_dir, trainer_class: type, moment: str) -> None:
    """Save after every step."""
    make_killed_trainer(output_dir, trainer_class, callbacks=[KillInSave(moment)]).train()


def make_killed_trainer(output_dir, trainer_class=GrinMoeTrainer, **arguments):
    settings = {**RESUME_ARGUMENTS, "save_steps": 1, "save_total_limit": 3, **arguments}
    set_seed(3)
    return make_trainer(output_dir, make_model(**RESUME_CONFIG), trainer_class=trainer_class, **settings)
