"""What the recipes share: arguments from YAML and the command line, data, model and tokenizer, and the end of a run.

The recipes themselves are scripts to copy and edit (`grin-moe recipes ls`); this module they import.
"""

import glob
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from peft import PeftModel
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase, Trainer, TrainingArguments
from trl import TrlParser

from ..configuration_grinmoe import GrinMoeConfig
from ..modeling_grinmoe import GrinMoeForCausalLM
from . import add_lora, checks, last_complete_checkpoint, merge_lora

FORMATS = {  # of local files, by suffix
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".py": "text",
}

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class RecipeArguments:
    """Model and data of a recipe; everything else is in the trainer's own arguments."""

    train_data: str = field(
        metadata={
            "help": "Training data: a file, folder or glob of jsonl, json, parquet or text (one row a file), "
            "or the name of a dataset on the Hub."
        }
    )
    train_split: str = field(default="train", metadata={"help": "Split of `train_data` on the Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    eval_data: str | None = field(default=None, metadata={"help": "Evaluation data, as `train_data`."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split on the Hub to evaluate on, of `train_data` if there is no `eval_data`."}
    )
    eval_fraction: float | None = field(
        default=None, metadata={"help": "Share of the training rows that is held out for evaluation instead."}
    )
    model_name_or_path: str | None = field(default=None, metadata={"help": "Checkpoint to start from."})
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "Tokenizer; by default the model's."})
    model_config: dict | str | None = field(
        default=None, metadata={"help": "Fields of GrinMoeConfig to set, as a mapping (JSON on the command line)."}
    )
    config_overrides: dict[str, Any] = field(init=False)  # `model_config`, read and checked
    dtype: str = field(
        default="float32",
        metadata={"help": "Type of the weights in training. float32 with `bf16: true` keeps float32 master weights."},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention, as in `from_pretrained`."})
    exact_balance: bool = field(
        default=False,
        metadata={"help": "Make the load-balance loss exact under gradient accumulation, for one more forward pass."},
    )

    def __post_init__(self) -> None:
        given = self.model_config
        self.config_overrides = json.loads(given) if isinstance(given, str) else dict(given or {})
        checks.check_config_fields(GrinMoeConfig, self.config_overrides, "model_config")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype} is none of {', '.join(DTYPES)}")
        if self.eval_fraction is not None:
            if not 0 < self.eval_fraction < 1:
                raise ValueError(f"eval_fraction={self.eval_fraction} must be between 0 and 1")
            if self.eval_data or self.eval_split:
                raise ValueError("eval_fraction and eval_data or eval_split are at odds: choose one")


@dataclass
class FineTuningArguments(RecipeArguments):
    """What fine-tuning adds: what is trained."""

    freeze_router: bool = field(default=False, metadata={"help": "Leave the routers' weights as they are."})
    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA; 0 trains all weights instead."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA's scale is lora_alpha / lora_r."})
    lora_attention: bool = field(default=True, metadata={"help": "LoRA on the attention projections."})
    lora_router: bool = field(default=False, metadata={"help": "LoRA on the routers."})
    lora_experts: bool = field(default=True, metadata={"help": "LoRA on the experts."})
    merge_adapter: bool = field(
        default=True,
        metadata={"help": "Also write output_dir/merged, the model with the adapter merged into it; not from 4 bits."},
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Hold the weights in 4 bits (bitsandbytes' nf4) while LoRA trains."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.freeze_router:
            self.config_overrides["freeze_router"] = True
        if self.load_in_4bit:
            if not self.lora_r:
                raise ValueError("load_in_4bit needs LoRA, since 4-bit weights cannot be trained: set lora_r")
            self.merge_adapter = False  # the bfloat16 weights are what it has to be merged into


class RecipeParser(TrlParser):
    """TRL's parser of YAML and command line; numbers in the YAML are checked, and errors raised without the usage."""

    def __init__(self, dataclass_types: Sequence[type], **kwargs: Any) -> None:
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        # argparse converts and checks a default that is a string, and takes any other as it is.
        return super().set_defaults_with_config(
            **{key: str(value) if type(value) in (int, float) else value for key, value in config.items()}
        )

    def parse_args_and_config(self, args: Iterable[str] | None = None, **kwargs: Any) -> tuple:
        # TRL knows `--config file` alone, and would take `--config=file` for an unknown argument.
        given = sys.argv[1:] if args is None else args
        split = (arg.split("=", 1) if arg.startswith("--config=") else [arg] for arg in given)
        return super().parse_args_and_config([*chain.from_iterable(split)], **kwargs)

    def error(self, message: str):
        raise ValueError(message)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Around what comes before training: an error about data, files or arguments ends the run with its sentence."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def find_files(name: str) -> list[str]:
    """The local data files that `name` (a file, folder or glob) means; none if it may be a name on the Hub.

    Raises:
        ValueError: `name` is a path that does not exist, or a folder or glob without data files.
    """
    path = Path(name)
    if path.is_file():
        return [name]
    if path.is_dir():
        files = [str(file) for file in sorted(path.rglob("*")) if file.is_file() and file.suffix in FORMATS]
    elif glob.has_magic(name):
        files = sorted(file for file in glob.glob(name, recursive=True) if Path(file).is_file())
    elif path.suffix in FORMATS or path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise ValueError(f"{name}: no such file or folder")
    else:
        return []
    if not files:
        raise ValueError(f"{name}: no data files in it; these are read: {', '.join(FORMATS)}")
    return files


def load_data(name: str, *, split: str = "train", config: str | None = None) -> Dataset:
    """The rows of local files, or of a dataset on the Hub where there is no such file; see `RecipeArguments`.

    Args:
        name: a file, folder or glob, or a name on the Hub.
        split, config: of a dataset on the Hub. Local files have neither.

    Raises:
        ValueError: nothing is there, the files have several formats or none that is known, or cannot be read.
    """
    files = find_files(name)
    if not files:
        try:
            return load_dataset(name, config, split=split)
        except Exception as error:  # of many types: not found, no connection, unknown split or configuration
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{name}: no such file or folder here, and as a dataset of the Hub: {reason}") from error
    if unknown := [file for file in files if Path(file).suffix not in FORMATS]:
        raise ValueError(f"{unknown[0]}: unknown format; these are read: {', '.join(FORMATS)}")
    formats = {FORMATS[Path(file).suffix] for file in files}
    if len(formats) > 1:
        raise ValueError(f"{name} holds files of several formats ({', '.join(sorted(formats))}); give a glob of one")
    if not any(Path(file).stat().st_size for file in files):
        raise ValueError(f"{name} is empty")
    (builder,) = formats
    settings = {"sample_by": "document"} if builder == "text" else {}
    try:
        return load_dataset(builder, data_files=files, split="train", **settings)
    except Exception as error:  # damaged files end in many types, the telling one inside
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ValueError(f"{name} cannot be read as {builder}: {reason}") from error


def load_train_and_eval(
    arguments: RecipeArguments, training: TrainingArguments, columns: Sequence[str]
) -> tuple[Dataset, Dataset | None]:
    """The training rows and those to evaluate on, which have `columns`.

    Raises:
        ValueError: data that cannot be found or read, has no rows or lacks a column.
    """
    train = load_data(arguments.train_data, split=arguments.train_split, config=arguments.dataset_config)
    checks.check_dataset(train, columns, f"train_data={arguments.train_data}")
    if arguments.eval_fraction:
        parts = train.train_test_split(test_size=arguments.eval_fraction, seed=training.seed)
        return parts["train"], parts["test"]
    if not (arguments.eval_data or arguments.eval_split):
        return train, None
    name = arguments.eval_data or arguments.train_data
    held_out = load_data(name, split=arguments.eval_split or "test", config=arguments.dataset_config)
    checks.check_dataset(held_out, columns, f"eval_data={name}")
    return train, held_out


def check_arguments(arguments: RecipeArguments, training: TrainingArguments) -> None:
    """Raise ValueError if evaluation is asked for without data for it, or there is nothing to resume from."""
    evaluate = arguments.eval_data or arguments.eval_split or arguments.eval_fraction
    if training.eval_strategy != "no" and not evaluate:
        raise ValueError(
            f"eval_strategy={training.eval_strategy.value} needs one of eval_data, eval_split and eval_fraction"
        )
    if resume_from(training) is True:
        folder = Path(training.output_dir)
        if not folder.is_dir() or last_complete_checkpoint(folder)[0] is None:
            raise ValueError(f"output_dir={folder} has no complete checkpoint to resume from")


def load_tokenizer(arguments: RecipeArguments) -> PreTrainedTokenizerBase:
    """The tokenizer the arguments name."""
    name = arguments.tokenizer_name_or_path or arguments.model_name_or_path
    if name is None:
        raise ValueError("model_name_or_path is not set: give the folder or the Hub name of a checkpoint")
    return AutoTokenizer.from_pretrained(name)


def load_config(arguments: RecipeArguments) -> GrinMoeConfig:
    """The checkpoint's configuration, `model_config` applied; quick, so that checks come before the weights."""
    return GrinMoeConfig.from_pretrained(arguments.model_name_or_path, **arguments.config_overrides)


def load_model(arguments: RecipeArguments, config: GrinMoeConfig, **settings: Any) -> GrinMoeForCausalLM:
    """The checkpoint's model with the given configuration; `settings` as in `from_pretrained`."""
    return GrinMoeForCausalLM.from_pretrained(
        arguments.model_name_or_path,
        config=config,
        dtype=arguments.dtype,
        attn_implementation=arguments.attn_implementation,
        **settings,
    )


def load_for_fine_tuning(arguments: FineTuningArguments, config: GrinMoeConfig) -> GrinMoeForCausalLM | PeftModel:
    """`load_model`, with LoRA on it if the arguments ask for that."""
    settings: dict[str, Any] = {}
    if arguments.load_in_4bit:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=arguments.dtype,
        )
    model = load_model(arguments, config, **settings)
    if not arguments.lora_r:
        return model
    return add_lora(
        model,
        attention=arguments.lora_attention,
        router=arguments.lora_router,
        experts=arguments.lora_experts,
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
    )


def hub_dataset(arguments: RecipeArguments) -> str | None:
    """The name of the training data on the Hub, for the model card; None for local files."""
    return None if find_files(arguments.train_data) else arguments.train_data


def resume_from(training: TrainingArguments) -> str | bool | None:
    """`resume_from_checkpoint` as `Trainer.train` takes it: True for the newest in output_dir, or a folder."""
    given = training.resume_from_checkpoint
    return {"true": True, "false": None, "none": None}.get(str(given).lower(), given)


def train_and_save(trainer: Trainer) -> None:
    """Train, or go on with it; evaluate; leave model, tokenizer, state and metrics in output_dir."""
    result = trainer.train(resume_from_checkpoint=resume_from(trainer.args))
    trainer.save_metrics("train", result.metrics)
    if trainer.eval_dataset is not None:
        trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_model()
    trainer.save_state()


def check_merge(arguments: FineTuningArguments, trainer: Trainer) -> None:
    """Raise ValueError if `merge_adapter` asks for what this launch cannot do."""
    if arguments.lora_r and arguments.merge_adapter and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError("merge_adapter needs whole weights in each process: set it to false, and merge afterwards")


def save_merged(trainer: Trainer) -> None:
    """Write the model with its adapter merged into it, and the tokenizer, to output_dir/merged."""
    folder = Path(trainer.args.output_dir) / "merged"
    merged = merge_lora(trainer.accelerator.unwrap_model(trainer.model))
    if trainer.args.should_save:
        merged.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
