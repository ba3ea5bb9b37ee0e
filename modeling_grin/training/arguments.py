"""The recipes' arguments, from a YAML file and the command line."""

import json
import sys
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from itertools import chain
from typing import Any

from trl import TrlParser

from ..configuration_grinmoe import GrinMoeConfig
from ..planning.schedules import SCHEDULES
from .pipeline import DEFAULT_SCHEDULE

GREEDY_ROUTING = {"router_sampling": False, "input_jitter_noise": 0.0}  # for losses that compare forward passes


def option(default: Any, help: str) -> Any:
    """A field of the arguments, with its line in `--help`."""
    return field(default=default, metadata={"help": help})


@dataclass
class RecipeArguments:
    """Model and data of a recipe; all else is in the trainer's own arguments."""

    train_data: str = option(
        MISSING,
        "Training data: a file, folder or glob of jsonl, json, parquet or text (one row a file), or the name of a "
        "dataset on the Hub.",
    )
    train_split: str | None = option(None, "Split on the Hub of `train_data`: train.")
    dataset_config: str | None = option(None, "Configuration of a dataset on the Hub.")
    eval_data: str | None = option(None, "Evaluation data, as `train_data`.")
    eval_split: str | None = option(
        None, "Split on the Hub to evaluate on, of `train_data` unless `eval_data` is set."
    )
    eval_fraction: float | None = option(None, "Share of the training rows to hold out for evaluation instead.")
    model_name_or_path: str | None = option(None, "Checkpoint to start from.")
    tokenizer_name_or_path: str | None = option(None, "Tokenizer; by default the model's.")
    model_config: dict | None = option(  # noqa: RUF009
        None, "Fields of GrinMoeConfig to set, as a mapping; on the command line JSON of the fields to change."
    )
    config_overrides: dict[str, Any] = field(init=False)  # `model_config` and the fields that other arguments set
    dtype: str = option(
        "float32", "Type of the weights in training. float32 with `bf16: true` keeps float32 master weights."
    )
    attn_implementation: str | None = option(None, "Attention, as in `from_pretrained`.")
    experts_implementation: str | None = option(
        None, "Experts, as in `from_pretrained`; `linear` has a module for each matrix."
    )
    pipeline_parallel_size: int = option(
        1,
        "Stages of a pipeline, whose micro-batches are those of gradient_accumulation_steps. Not for DPO "
        "and GRPO. Accelerate's config file sets all other layouts: see recipes/accelerate.",
    )
    pipeline_schedule: str = option(DEFAULT_SCHEDULE, f"Order of the pipeline's work: {', '.join(SCHEDULES)}.")
    exact_balance: bool = option(
        False, "Make the load-balance loss exact under gradient accumulation, for one more forward pass."
    )

    def __post_init__(self) -> None:
        self.config_overrides = dict(self.model_config or {})
        known = set(GrinMoeConfig.__dataclass_fields__) | set(GrinMoeConfig.attribute_map)
        if unknown := sorted(set(self.config_overrides) - known):
            raise ValueError(f"model_config: GrinMoeConfig has no field {', '.join(unknown)}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be float32, bfloat16 or float16; got {self.dtype}")
        if self.pipeline_schedule != DEFAULT_SCHEDULE and self.pipeline_parallel_size == 1:
            raise ValueError(
                f"pipeline_schedule={self.pipeline_schedule} needs a pipeline: set pipeline_parallel_size"
            )
        if self.eval_fraction is not None and (self.eval_data or self.eval_split):
            raise ValueError("eval_fraction and eval_data or eval_split are at odds: choose one")


@dataclass
class FineTuningArguments(RecipeArguments):
    """Arguments that choose the weights to fine-tune."""

    freeze_router: bool | None = option(
        None, "Leave the routers' weights as they are; by default as in the model's config."
    )
    lora_r: int = option(0, "Rank of LoRA; 0 trains all weights instead.")
    lora_alpha: int = option(32, "Numerator of LoRA's scale, lora_alpha / lora_r.")
    lora_attention: bool = option(True, "Adapt the attention projections.")
    lora_router: bool = option(False, "Adapt the routers.")
    lora_experts: bool = option(True, "Adapt the experts.")
    merge_adapter: bool = option(
        True, "Also write output_dir/merged, the checkpoint's model with the adapter merged into it."
    )
    load_in_4bit: bool = option(False, "Hold the weights in 4 bits (bitsandbytes' nf4) while LoRA trains.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.freeze_router is not None:
            self.config_overrides["freeze_router"] = self.freeze_router
        for option in fields(self):
            if (
                option.name.startswith(("lora_", "load_in_4bit"))
                and not self.lora_r
                and getattr(self, option.name) != option.default
            ):
                raise ValueError(f"{option.name}={getattr(self, option.name)} needs LoRA: set lora_r")


class RecipeParser(TrlParser):
    """TRL's parser of YAML and command line, where `--model_config` changes fields of the YAML's."""

    def __init__(self, *dataclass_types: type, description: str | None = None):
        super().__init__(dataclass_types, description=description, allow_abbrev=False)
        self.set_defaults_with_config()

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        def json_object(given: str) -> dict[str, Any]:
            return (config.get("model_config") or {}) | json.loads(given)

        next(action for action in self._actions if action.dest == "model_config").type = json_object
        return super().set_defaults_with_config(**config)

    def parse_args_and_config(self, args: Iterable[str] | None = None, **kwargs: Any) -> tuple:
        # TRL knows `--config file`, and would take `--config=file` for an unknown argument.
        split = (arg.split("=", 1) if arg.startswith("--config=") else [arg] for arg in args or sys.argv[1:])
        return super().parse_args_and_config([*chain.from_iterable(split)], **kwargs)

    def error(self, message: str):
        raise ValueError(message)  # without the usage, which has hundreds of lines
