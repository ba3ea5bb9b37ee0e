"""Write `run.json`, which a run leaves for its model card.

The trainer only leaves a pickle of its arguments, which nobody should open. `run.json` has the settings that decide a
run's result: no tokens, since only listed fields are written, and of local paths only the last part.
"""

import glob
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
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

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "trl", "peft")


def describe_source(name: str | None, dataset: Any = None, **hub_fields: str | None) -> dict[str, Any] | None:
    """Describe a model or data set, with its number of rows, packed ones if packing is on."""
    if name is None:
        return None
    rows = {"rows": len(dataset)} if hasattr(dataset, "__len__") else {}
    if glob.glob(name, recursive=True):
        return {"name": Path(name).resolve().name, "hub": False, **rows}
    return {"name": name, "hub": True, **hub_fields, **rows}


def describe_device(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{device.type.upper()} ({platform.machine()}, {os.cpu_count()} cores)"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"


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
    eval_data = None if trainer.eval_dataset is None else arguments.eval_data or arguments.train_data
    record = {
        "method": method,
        "base_model": describe_source(arguments.model_name_or_path),
        "train_data": describe_source(
            arguments.train_data, trainer.train_dataset,
            split=arguments.train_split or "train", config=arguments.dataset_config,
        ),
        "eval_data": describe_source(
            eval_data, trainer.eval_dataset,
            split=arguments.train_split or "train" if arguments.eval_fraction else arguments.eval_split or "test",
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
        "hardware": {"device": describe_device(trainer.args.device), "processes": trainer.args.world_size},
        "versions": {
            "python": platform.python_version(), "grin-moe": __version__, **{name: version(name) for name in PACKAGES},
        },
    }  # fmt: skip
    folder = Path(trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RUN_FILE, json.dumps(record, indent=2) + "\n")
