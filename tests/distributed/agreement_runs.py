"""Two ranks that should stop. All of them raise alike, so that the process group goes on to the next case."""

from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import runs
import torch.distributed as dist
from on_cpu import as_on_gpus
from transformers import TrainerCallback, TrainingArguments
from transformers.distributed import DistributedConfig

from modeling_grin import GrinMoeForCausalLM
from modeling_grin.training.pipeline import pipeline_model

LAYOUTS = {"DDP": None, "FSDP2": {"fsdp_size": 2}, "tensor": {"tp_size": 2}}
SETTINGS = {"seed": [3, 4], "max_steps": [2, 3], "learning_rate": [0.1, 0.2]}


class Spoil(TrainerCallback):
    """In the second step, the last rank's gradients are of a loss that is NaN."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1 and dist.get_rank() == 1:
            norm = getattr(model, "module", model).model.norm
            norm.register_forward_hook(lambda module, args, output: output * float("nan"))


def error_of(trainer) -> str:
    try:
        trainer.train()
    except ValueError as error:
        return str(error)
    return "none"


def replace_one():
    """`Path.replace` that works once."""
    replace, left = Path.replace, iter([True])

    def replace_or_fail(path: Path, target: Path) -> None:
        if not next(left, False):
            raise OSError
        replace(path, target)

    return replace_or_fail


def save_distributed(folder: Path) -> None:
    """Save two ranks' shards over those of a run with more ranks; then again, with rank 0 failing amid the moves."""
    model = GrinMoeForCausalLM.from_pretrained(
        folder / "start", distributed_config=DistributedConfig(fsdp_size=2), dtype="float32"
    )
    for name in ("saved", "failed"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "shard-00003-model-00001-of-00001.safetensors").touch()
        failing = mock.patch("pathlib.Path.replace", autospec=True, side_effect=replace_one())
        with failing if name == "failed" else nullcontext():
            try:
                model.save_pretrained(folder / name, distributed_checkpoint=True)
            except OSError:
                model.barrier_after_gathered_checkpoint_save(model.config.distributed_config)


def stop(folder: Path, case: str) -> dict[str, str]:
    """This rank's errors, by what is wrong; `save_distributed` at the end."""
    TrainingArguments(output_dir=folder, use_cpu=True)  # starts the process group
    rank = dist.get_rank()
    errors = {}
    for name, values in SETTINGS.items():
        trainer = runs.make_trainer(folder / name, runs.make_model(), micro_batch=2, **{name: values[rank]})
        errors[name] = error_of(trainer)
    model = runs.make_model(router_aux_loss_coef=[0.1, 0.2][rank])
    errors["config"] = error_of(runs.make_trainer(folder / "config", model, micro_batch=2))

    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 3, "callbacks": [Spoil()]}
    for name, layout in LAYOUTS.items():
        model = runs.make_model()
        if layout is not None:
            as_on_gpus()  # from here on
            config = DistributedConfig(**layout)
            model = GrinMoeForCausalLM.from_pretrained(folder / "start", distributed_config=config)
        errors[name] = error_of(runs.make_trainer(folder / name, model, micro_batch=2, **saving))
    model = pipeline_model(folder / "start", pp_size=2)
    trainer = runs.make_trainer(folder / "pipeline", model, accumulation=2, micro_batch=2, **saving)
    errors["pipeline"] = error_of(trainer)
    save_distributed(folder)
    save_distributed(folder)
    return errors
