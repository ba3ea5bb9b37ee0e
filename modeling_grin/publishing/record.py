"""Write `run.json`, which a run leaves for its model card.

The trainer only leaves a pickle of its arguments, which nobody should open. `run.json` has the settings that decide a
run's result: no tokens, since only listed fields are written, and of local paths only the last part.
"""

import glob
import json
import os
import platform
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..compat_grinmoe import is_spread_over_ranks
from ..files import write_whole

if TYPE_CHECKING:  # needs what only training installs
    from transformers import Trainer

    from ..training.arguments import RecipeArguments

RUN_FILE = "run.json"

HYPERPARAMETERS = (  # fields of the recipes' and the trainer's arguments, in the order of the card
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay",
    "max_grad_norm", "dtype", "bf16", "fp16", "activation_checkpointing", "block_size", "max_length", "packing",
    "assistant_only_loss", "completion_only_loss", "loss_type", "beta", "label_smoothing_factor",
    "neftune_noise_alpha", "exact_balance", "lora_r", "lora_alpha", "lora_attention", "lora_router", "lora_experts",
    "load_in_4bit", "attn_implementation", "experts_implementation", "load_best_model_at_end", "seed",
)  # fmt: skip

PACKAGES = ("grin-moe", "torch", "transformers", "accelerate", "datasets", "tokenizers", "trl", "peft")


def describe_source(name: str | None) -> dict[str, Any] | None:
    """Describe a model or data set: `hub` tells a name on the Hub from the last part of a local path."""
    if name is None:
        return None
    is_local = bool(glob.glob(name, recursive=True))
    return {"name": Path(name).resolve().name if is_local else name, "hub": not is_local}


def describe_data(name: str | None, dataset: Any, **hub_fields: str | None) -> dict[str, Any] | None:
    """`describe_source` with the number of rows, packed ones if packing is on."""
    source = describe_source(name)
    if source is None:
        return None
    rows = {"rows": len(dataset)} if hasattr(dataset, "__len__") else {}
    return {**source, **(hub_fields if source["hub"] else {}), **rows}


def describe_hardware(trainer: "Trainer") -> dict[str, Any]:
    """The device, which all processes have, and the number of processes."""
    device = trainer.args.device
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 1e9
        name = f"{torch.cuda.get_device_name(device)}, {memory:.0f} GB"
    else:
        name = f"{device.type.upper()} ({platform.machine()}, {os.cpu_count()} cores)"
    return {"device": name, "processes": trainer.args.world_size}


def record_run(trainer: "Trainer", arguments: "RecipeArguments", method: str) -> None:
    """Write output_dir/run.json, from the main process.

    Args:
        trainer: just before it trains.
        arguments: the recipe's `RecipeArguments`; fields that it lacks are left out.
        method: pretraining, SFT or DPO.
    """
    if not trainer.is_world_process_zero():
        return
    training = trainer.args.to_dict()  # enums by their values
    given = {name: getattr(arguments, name, training.get(name)) for name in HYPERPARAMETERS}
    given["num_train_epochs" if training["max_steps"] > 0 else "max_steps"] = None  # the other one decides
    if not given["lora_r"]:
        given.update({name: None for name in given if name.startswith("lora_")})
    installed = {distribution.name.lower(): distribution.version for distribution in distributions()}
    eval_data = None if trainer.eval_dataset is None else arguments.eval_data or arguments.train_data
    record = {
        "method": method,
        "base_model": describe_source(arguments.model_name_or_path),
        "train_data": describe_data(
            arguments.train_data, trainer.train_dataset,
            split=arguments.train_split, config=arguments.dataset_config,
        ),
        "eval_data": describe_data(
            eval_data, trainer.eval_dataset,
            split=arguments.train_split if arguments.eval_fraction else arguments.eval_split or "test",
            config=arguments.dataset_config,
        ),
        "eval_fraction": arguments.eval_fraction,
        "config": json.loads(trainer.model.config.to_json_string()),
        "hyperparameters": {name: value for name, value in given.items() if value is not None},
        "global_batch": trainer.get_total_train_batch_size(trainer.args),  # sequences
        "parallelism": {
            "pipeline": arguments.pipeline_parallel_size,
            # Trainer's size is that of all ranks with the same rows.
            "tensor": trainer.get_tp_size() // arguments.pipeline_parallel_size,
            "fully sharded": trainer.is_fsdp_enabled or is_spread_over_ranks(trainer),
        },
        "hardware": describe_hardware(trainer),
        "versions": {
            "python": platform.python_version(),
            **{name: installed[name] for name in PACKAGES if name in installed},
        },
    }  # fmt: skip
    folder = Path(trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RUN_FILE, json.dumps(record, indent=2) + "\n")
