"""Cases of models that are spread over ranks by `DistributedConfig`.

In every case `checkpoint` names a folder in FOLDER, and `layout` has the arguments of `DistributedConfig`; None: one
process or DDP.
"""

from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch
from zlib import crc32

import runs
import torch
import torch.distributed as dist
from on_cpu import as_on_gpus
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.distributed import DistributedConfig

from modeling_grin import GrinMoeForCausalLM, GrinMoeForSequenceClassification
from modeling_grin.kernels import chunked_loss
from modeling_grin.training import GrinMoeTrainer, add_lora, sharded

STEPS, SAVED_AT = 3, 1
GLOBAL_MICRO_BATCH = 4  # rows of a micro-batch over all data-parallel ranks
TRAINING = {"max_steps": STEPS, "accumulation": 2, "optim": "adamw_torch", "learning_rate": 1e-2, "logging_steps": 1,
            "max_grad_norm": 0.5, "lr_scheduler_type": "linear", "weight_decay": 0.1,
            # Gradients that are all but 0 are left out of it: Adam makes their rounding as large as anything.
            "adam_epsilon": 1e-3}  # fmt: skip
SAVING = {"save_strategy": "steps", "save_steps": SAVED_AT, "distributed_checkpoint": True}


def load(folder: Path, checkpoint: str, layout: dict[str, int] | None, model_class=GrinMoeForCausalLM, **settings):
    TrainingArguments(output_dir=folder, use_cpu=True)  # starts the process group
    if layout is not None:
        as_on_gpus()  # from here on: cases of DDP come before
        torch.Tensor.pin_memory = lambda tensor: tensor  # for a copy to a GPU, of which there is none
        settings["distributed_config"] = DistributedConfig(**layout)
    return model_class.from_pretrained(folder / checkpoint, **settings)


def describe(tensor: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    """Placements, and the shape of this rank's part."""
    if isinstance(tensor, DTensor):
        return str(tensor.placements), tuple(tensor.to_local().shape)
    return "whole", tuple(tensor.shape)


def parameters(trainer) -> dict[str, torch.Tensor]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: runs.whole(tensor) for name, tensor in tensors.items() if "inv_freq" not in name}


def count_forwards(layer: torch.nn.Module) -> list[None]:
    """Grows by an element for each forward pass of a decoder layer in training, also when it is recomputed."""
    forwards: list[None] = []
    # The layer's own hooks are called once.
    layer.input_layernorm.register_forward_pre_hook(
        lambda module, args: forwards.append(None) if module.training else None
    )
    return forwards


def count_chunked():
    """A context, whose `call_count` is of losses without whole logits."""
    loss = chunked_loss.chunked_causal_lm_loss
    return patch.object(chunked_loss, "chunked_causal_lm_loss", wraps=loss)


class GradientCounts(TrainerCallback):
    """What FSDP2 does with gradients in a training run, from micro-batch to micro-batch.

    `groups`: of parameters that are gathered and reduced together; `offloaded`: those whose parts are in the CPU's
    memory; `held`: whole gradients that were left after a micro-batch, of all but the last; `reduce_scatters`, and
    `all_reduces` of gradients.
    """

    def __init__(self):
        self.counts = dict.fromkeys(("groups", "offloaded", "held", "reduce_scatters", "all_reduces"), 0)

    def on_train_begin(self, args, state, control, model, **kwargs):
        modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self.groups = [group for module in modules for group in module._get_fsdp_state()._fsdp_param_groups]
        self.parameters = [parameter for group in self.groups for parameter in group.fsdp_params]
        self.counts["groups"] = len(self.groups)
        self.counts["offloaded"] = sum(all(p.offload_to_cpu for p in group.fsdp_params) for group in self.groups)

    def on_substep_end(self, args, state, control, **kwargs):
        self.counts["held"] += sum(p.unsharded_accumulated_grad is not None for p in self.parameters)

    @contextmanager
    def counting(self):
        reduce_scatter, all_reduce = dist.reduce_scatter_single, dist.all_reduce

        def count_reduce_scatter(*args, **kwargs):
            self.counts["reduce_scatters"] += 1
            return reduce_scatter(*args, **kwargs)

        def count_all_reduce(tensor, *args, group=None, **kwargs):
            of_copies = [mine._all_reduce_process_group for mine in self.groups if mine._is_hsdp]
            self.counts["all_reduces"] += group in of_copies
            return all_reduce(tensor, *args, group=group, **kwargs)

        with (
            patch.object(dist, "reduce_scatter_single", count_reduce_scatter),
            patch.object(dist, "all_reduce", count_all_reduce),
        ):
            yield


class Tokenizer:
    """Stands for one where Trainer saves it."""

    def save_pretrained(self, folder):
        Path(folder, "tokenizer.json").write_text("{}")


def adapt(model, seed: int, **lora):
    """Add adapters that do something, peft begins with B = 0; their values depend on their names and on `seed`."""
    adapted = add_lora(model, **lora)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            generator = torch.Generator().manual_seed(seed + crc32(name.encode()))
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return adapted


def make_trainer(
    folder, name, checkpoint, layout, config=None, lora=None, trainer_class=GrinMoeTrainer, **arguments
):  # fmt: skip
    model = load(folder, checkpoint, layout, **(config or {}))
    if lora is not None:
        model = adapt(model, **lora)
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    dp_size = num_ranks // (1 if layout is None else layout.get("tp_size", 1))
    arguments = {**TRAINING, "micro_batch": GLOBAL_MICRO_BATCH // dp_size, **arguments}
    return runs.make_trainer(folder / f"{name}-run", model, trainer_class=trainer_class, **arguments)


def train(
    folder: Path, name: str, resume_from: str | None = None, noise_of_rank: bool = False, saved: bool = False, **case
) -> dict[str, Any]:
    """Train, or resume from a checkpoint in FOLDER.

    Returns `parameters` after training and `gradients` of the first step, whole, Trainer's `logs`, the `forwards` of a
    layer, recomputation included, of the `chunked` loss, and what `GradientCounts` counted.
    `noise_of_rank`: a mistake, each rank with routing noise of its own. `saved`: `save_model`, too.
    """
    first, fsdp = runs.Gradients(), GradientCounts()
    set_seed(5)
    trainer = make_trainer(folder, name, callbacks=[first, fsdp], **case)
    if noise_of_rank:  # the trainer itself refuses ranks with seeds of their own
        begin_step = trainer.model.begin_step
        trainer.model.begin_step = lambda *given, **more: begin_step(*given, **more | {"seed": dist.get_rank()})
    forwards = count_forwards(trainer.model.get_decoder().layers[0])
    with fsdp.counting(), count_chunked() as chunked:
        trainer.train(None if resume_from is None else str(folder / resume_from))
    if saved:
        trainer.processing_class = Tokenizer()
        sharded.MAX_SHARD_SIZE = "40KB"
        trainer.save_model(folder / f"{name}-saved")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "parameters": parameters(trainer),
        "gradients": first.gradients,
        "logs": logs,
        "forwards": len(forwards),
        "chunked": chunked.call_count,
        **fsdp.counts,
    }


def train_best(folder: Path, name: str, **case) -> dict[str, Any]:
    """Train with `load_best_model_at_end`: the losses of its `evaluations`, and `evaluation` of what is left."""
    set_seed(5)
    trainer = make_trainer(
        folder, name, eval_dataset=runs.Rows(4), eval_strategy="steps", eval_steps=1, save_strategy="best",
        metric_for_best_model="eval_loss", load_best_model_at_end=True, per_device_eval_batch_size=4, **case,
    )  # fmt: skip
    trainer.train()
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return {"evaluations": evaluations, "evaluation": trainer.evaluate()["eval_loss"]}


def train_plain(folder: Path, name: str, **case) -> dict[str, Any]:
    """Train with transformers' own Trainer, which announces no steps to the model; the first step's `gradients`."""
    set_seed(5)
    first = runs.Gradients()
    make_trainer(folder, name, trainer_class=Trainer, callbacks=[first], **case).train()
    return {"gradients": first.gradients}


@torch.no_grad()
def infer(folder: Path, name: str, checkpoint: str, layout: dict[str, int] | None, tp_plan: str | None = None):
    """Returns `logits`, greedily `generated` ids, a classifier's `hidden` states and the shape of its logits,
    `classified`, and `placements`, each parameter's `describe`."""
    settings = {} if tp_plan is None else {"tp_plan": tp_plan}
    model = load(folder, checkpoint, layout, **settings).eval()
    ids = torch.stack([runs.Rows()[0]["input_ids"].clamp(min=5), torch.arange(5, 5 + runs.LENGTH)])
    classifier = load(folder, checkpoint, layout, GrinMoeForSequenceClassification, num_labels=3, **settings)
    classifier.eval()
    return {
        "logits": runs.whole(model(ids).logits),
        "generated": model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None),
        "hidden": runs.whole(classifier.model(ids).last_hidden_state),
        "classified": tuple(classifier(ids).logits.shape),
        "placements": {name: describe(parameter) for name, parameter in model.named_parameters()},
    }


def replay(folder: Path, name: str, checkpoint, layout, routes: list, config: dict[str, Any]) -> dict[str, Any]:
    """One pass in training on `routes`, `[batch, sequence, layers, K]`: gradients, and the `experts` it chose."""
    model = load(folder, checkpoint, layout, **config).train()
    ids, experts = torch.arange(5, 5 + 2 * runs.LENGTH).reshape(2, -1), torch.tensor(routes)
    with model.replay_routing(experts):
        outputs = model(ids, labels=ids, output_selected_experts=True)
    outputs.loss.backward()
    gradients = {name: runs.whole(parameter.grad) for name, parameter in model.named_parameters()}
    return {"gradients": gradients, "experts": torch.stack(outputs.selected_experts, dim=1)}


def refusals(folder: Path, name: str, attempts: dict[str, dict[str, Any]], checkpoint=None) -> dict[str, str]:
    """The messages of the ValueErrors that training runs end with, by the attempt's name."""
    messages = {}
    for attempt, case in attempts.items():
        try:
            train(folder, f"{name}-{attempt}", **case)
        except ValueError as error:
            messages[attempt] = str(error)
    return messages
