"""What the recipes share: arguments from YAML and the command line, data, model and tokenizer, and the end of a run.

The recipes themselves are scripts to copy and edit (`grin-moe recipes ls`); this module they import.
"""

import json
import shutil
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import snapshot_download
from peft import PeftModel
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig
from trl import TrlParser

from ..configuration_grinmoe import GrinMoeConfig
from ..data import find_files, load_data
from ..files import write_whole
from ..loading_grinmoe import check_parallel_sizes
from ..modeling_grinmoe import GrinMoeForCausalLM
from ..publishing.card import may_write_card, write_card
from ..publishing.record import record_run
from . import add_lora, checks, last_complete_checkpoint, merge_lora
from .checkpoints import find_problems
from .pipeline import DEFAULT_SCHEDULE, SCHEDULES, check_pipeline, pipeline_model

CHAT_SETTINGS = ("tools", "chat_template_kwargs")  # columns of rows with conversations

DTYPES = ("float32", "bfloat16", "float16")

PROOF_SHAPE = (16, 128)  # sequences and tokens of the training data, at most, that a merge is proven on


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
    model_config: dict | None = field(
        default=None,
        metadata={
            "help": "Fields of GrinMoeConfig to set, as a mapping (JSON on the command line: those fields only)."
        },
    )
    config_overrides: dict[str, Any] = field(init=False)  # `model_config`, checked, and what other arguments set
    dtype: str = field(
        default="float32",
        metadata={"help": "Type of the weights in training. float32 with `bf16: true` keeps float32 master weights."},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention, as in `from_pretrained`."})
    experts_implementation: str | None = field(
        default=None,
        metadata={"help": "Experts, as in `from_pretrained`; `linear` keeps LoRA apart from bfloat16 weights."},
    )
    pipeline_parallel_size: int = field(
        default=1,
        metadata={
            "help": "Stages of a pipeline; its micro-batches are those of gradient_accumulation_steps. Others are "
            "layouts that accelerate is told of: recipes/accelerate has its files. Not for DPO and LoRA."
        },
    )
    pipeline_schedule: str = field(
        default=DEFAULT_SCHEDULE, metadata={"help": f"Order of the pipeline's work: {', '.join(SCHEDULES)}."}
    )
    exact_balance: bool = field(
        default=False,
        metadata={"help": "Make the load-balance loss exact under gradient accumulation, for one more forward pass."},
    )

    def __post_init__(self) -> None:
        self.config_overrides = dict(self.model_config or {})
        checks.check_config_fields(GrinMoeConfig, self.config_overrides, "model_config")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype} is none of {', '.join(DTYPES)}")
        if self.pipeline_parallel_size < 1:
            raise ValueError(f"pipeline_parallel_size={self.pipeline_parallel_size} must be at least 1")
        if self.pipeline_schedule not in SCHEDULES:
            raise ValueError(f"pipeline_schedule={self.pipeline_schedule} is none of {', '.join(SCHEDULES)}")
        if self.pipeline_schedule != DEFAULT_SCHEDULE and self.pipeline_parallel_size == 1:
            raise ValueError(
                f"pipeline_schedule={self.pipeline_schedule} means nothing without a pipeline: set "
                "pipeline_parallel_size"
            )
        if self.eval_fraction is not None:
            if not 0 < self.eval_fraction < 1:
                raise ValueError(f"eval_fraction={self.eval_fraction} must be between 0 and 1")
            if self.eval_data or self.eval_split:
                raise ValueError("eval_fraction and eval_data or eval_split are at odds: choose one")


@dataclass
class FineTuningArguments(RecipeArguments):
    """What fine-tuning adds: what is trained."""

    freeze_router: bool | None = field(
        default=None, metadata={"help": "Leave the routers' weights as they are; by default as in the model's config."}
    )
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
        if self.freeze_router is not None:
            self.config_overrides["freeze_router"] = self.freeze_router
        for option in fields(self):
            if option.name.startswith("lora_") and not self.lora_r and getattr(self, option.name) != option.default:
                raise ValueError(f"{option.name}={getattr(self, option.name)} means nothing without LoRA: set lora_r")
        if self.load_in_4bit:
            if not self.lora_r:
                raise ValueError("load_in_4bit needs LoRA, since 4-bit weights cannot be trained: set lora_r")
            self.merge_adapter = False  # the bfloat16 weights are what it has to be merged into


class RecipeParser(TrlParser):
    """TRL's parser of YAML and command line; numbers in the YAML are checked, `--model_config` sets fields one by one,
    and errors are raised without the usage."""

    def __init__(self, dataclass_types: Sequence[type], **kwargs: Any) -> None:
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self._model_config: dict[str, Any] = {}  # the YAML's
        for action in self._actions:
            if action.dest == "model_config":
                action.type = self._merge_model_config

    def _merge_model_config(self, given: str) -> dict[str, Any]:
        """The YAML's `model_config` with the fields set that the command line gives."""
        try:
            chosen = json.loads(given)
        except json.JSONDecodeError as error:
            raise ArgumentTypeError(f"{given} is not JSON ({error})") from error
        if not isinstance(chosen, dict):
            raise ArgumentTypeError(f'{given} is no JSON object, such as {{"expert_dropout": 0.1}}')
        return {**self._model_config, **chosen}

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        self._model_config = config.get("model_config") or {}
        if not isinstance(self._model_config, dict):
            raise ValueError(f"model_config must be a mapping in the YAML file, and is {self._model_config!r}")
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
def errors_of(argument: str, name: str) -> Iterator[None]:
    """Around what loads the model or tokenizer `name`, the value of `argument`: errors say so, in one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        place = "" if Path(name).exists() else "no such folder here, and as a model of the Hub: "
        raise ValueError(f"{argument}={name}: {place}{' '.join(str(error).split())}") from error


@contextmanager
def clear_errors() -> Iterator[None]:
    """Around what is done before training and after: an error about data, files or arguments ends the run with its
    sentence."""
    try:
        yield
    except (ValueError, OSError) as error:
        get_error_handler().record_exception(error)  # a launcher reports it as that of the rank
        raise SystemExit(f"error: {error}") from error


def load_train_and_eval(
    arguments: RecipeArguments, training: TrainingArguments, prepare: Callable[[Dataset, str], Dataset]
) -> tuple[Dataset, Dataset | None]:
    """The training rows and those to evaluate on.

    Args:
        prepare: is given a dataset and what to call it in errors, checks its rows and returns the columns to use.

    Raises:
        ValueError: data that cannot be found or read; what `prepare` raises.
    """
    train = load_data(arguments.train_data, split=arguments.train_split, config=arguments.dataset_config)
    train = prepare(train, f"train_data={arguments.train_data}")
    if arguments.eval_fraction:
        parts = train.train_test_split(test_size=arguments.eval_fraction, seed=training.seed)
        return parts["train"], parts["test"]
    if not (arguments.eval_data or arguments.eval_split):
        return train, None
    name = arguments.eval_data or arguments.train_data
    held_out = load_data(name, split=arguments.eval_split or "test", config=arguments.dataset_config)
    return train, prepare(held_out, f"eval_data={name}")


def select_columns(dataset: Dataset, columns: Sequence[str]) -> Dataset:
    """`columns`, and what TRL reads beside conversations; others it could take for another format of the rows."""
    return dataset.select_columns([*columns, *(name for name in CHAT_SETTINGS if name in dataset.column_names)])


def check_arguments(arguments: RecipeArguments, training: TrainingArguments) -> None:
    """Raise ValueError if evaluation is asked for without data for it, if splits or configurations of local files are
    asked for, which have none, or if there is nothing to resume from."""
    evaluate = arguments.eval_data or arguments.eval_split or arguments.eval_fraction
    if training.eval_strategy != "no" and not evaluate:
        raise ValueError(
            f"eval_strategy={training.eval_strategy.value} needs one of eval_data, eval_split and eval_fraction"
        )
    train_is_local = bool(find_files(arguments.train_data))
    eval_is_local = bool(find_files(arguments.eval_data)) if arguments.eval_data else train_is_local
    for name, is_ignored in (
        ("train_split", train_is_local and arguments.train_split != "train"),
        ("eval_split", eval_is_local and arguments.eval_split is not None),
        ("dataset_config", train_is_local and eval_is_local and arguments.dataset_config is not None),
    ):
        if is_ignored:
            raise ValueError(
                f"{name}={getattr(arguments, name)} is for datasets on the Hub, and the data are local files: leave "
                "it out, and give files to evaluate on as eval_data or a share of the rows as eval_fraction"
            )
    given = resume_from(training)
    if isinstance(given, str) and (problems := find_problems(given)):
        raise ValueError(f"resume_from_checkpoint={given} is not a complete checkpoint: {', '.join(problems)}")
    if given is True:
        folder = Path(training.output_dir)
        if not folder.is_dir() or last_complete_checkpoint(folder)[0] is None:
            raise ValueError(f"output_dir={folder} has no complete checkpoint to resume from")


def load_tokenizer(arguments: RecipeArguments) -> PreTrainedTokenizerBase:
    """The tokenizer the arguments name."""
    argument = "tokenizer_name_or_path" if arguments.tokenizer_name_or_path else "model_name_or_path"
    name = getattr(arguments, argument)
    if name is None:
        raise ValueError("model_name_or_path is not set: give the folder or the Hub name of a checkpoint")
    with errors_of(argument, name):
        return AutoTokenizer.from_pretrained(name)


def load_config(arguments: RecipeArguments) -> GrinMoeConfig:
    """The checkpoint's configuration, `model_config` applied; quick, so that checks come before the weights."""
    name = str(arguments.model_name_or_path)
    with errors_of("model_name_or_path", name):
        return GrinMoeConfig.from_pretrained(name, **arguments.config_overrides)


def model_settings(arguments: RecipeArguments) -> dict[str, Any]:
    """What the arguments say of how a model is made, as in `from_pretrained` and `from_config`."""
    names = ("dtype", "attn_implementation", "experts_implementation")
    return {name: getattr(arguments, name) for name in names}


def check_layout(arguments: RecipeArguments, config: GrinMoeConfig, layout: DistributedConfig | None) -> None:
    """Raise ValueError if the model cannot be spread over the launched processes as it is asked for."""
    tp_size, fsdp_size = (1, 1) if layout is None else (layout.tp_size, layout.fsdp_size)
    if arguments.pipeline_parallel_size > 1:
        check_pipeline(config, arguments.pipeline_parallel_size, tp_size, arguments.pipeline_schedule)
    else:
        check_parallel_sizes(config, tp_size=tp_size, fsdp_size=fsdp_size)


def load_model(
    arguments: RecipeArguments,
    config: GrinMoeConfig,
    layout: DistributedConfig | None = None,
    name: str | None = None,
    **settings: Any,
) -> GrinMoeForCausalLM:
    """The checkpoint's model with the given configuration, or this rank's part of it.

    Args:
        name: the checkpoint's, by default as the arguments say.
        layout: of `take_launched_layout`. In a pipeline its tensor-parallel ranks are those of each stage, and all
            ranks beyond the stages are data-parallel.
        settings: as in `from_pretrained`.
    """
    check_layout(arguments, config, layout)
    name = name or str(arguments.model_name_or_path)
    settings |= model_settings(arguments)
    with errors_of("model_name_or_path", name):
        if arguments.pipeline_parallel_size == 1:
            return GrinMoeForCausalLM.from_pretrained(name, config=config, distributed_config=layout, **settings)
        return pipeline_model(
            name if Path(name).is_dir() else snapshot_download(name),
            config,
            pp_size=arguments.pipeline_parallel_size,
            tp_size=1 if layout is None else layout.tp_size,
            schedule=arguments.pipeline_schedule,
            **settings,
        )


def make_model(
    arguments: RecipeArguments, config: GrinMoeConfig, training: TrainingArguments, layout: DistributedConfig | None
) -> GrinMoeForCausalLM:
    """A new model with random weights, or this rank's part of it.

    Where ranks have parts, the main process makes the model, in the CPU's memory, and writes it to output_dir/initial,
    so that it is the same in every layout. A resumed run reads the checkpoint instead.
    """
    if layout is None and arguments.pipeline_parallel_size == 1:
        return GrinMoeForCausalLM._from_config(config, **model_settings(arguments))
    check_layout(arguments, config, layout)
    resumed = resume_from(training)
    if resumed:
        checkpoint = last_complete_checkpoint(training.output_dir)[0] if resumed is True else resumed
        return load_model(arguments, config, layout, str(checkpoint))
    folder = Path(training.output_dir) / "initial"
    with training.main_process_first(desc="new model"):
        if training.should_save:
            incomplete = folder.with_name(f"{folder.name}.incomplete")
            for path in (incomplete, folder):
                shutil.rmtree(path, ignore_errors=True)
            GrinMoeForCausalLM._from_config(config, **model_settings(arguments)).save_pretrained(incomplete)
            incomplete.rename(folder)
    return load_model(arguments, config, layout, str(folder))


def load_for_fine_tuning(
    arguments: FineTuningArguments, config: GrinMoeConfig, layout: DistributedConfig | None = None
) -> GrinMoeForCausalLM | PeftModel:
    """`load_model`, with LoRA on it if the arguments ask for that.

    Raises:
        ValueError: the adapter is to be merged into a checkpoint that is quantised, or trained on a model in parts.
    """
    if arguments.lora_r and (layout is not None or arguments.pipeline_parallel_size > 1):
        raise ValueError(
            "LoRA needs the whole model in each process: launch with recipes/accelerate/ddp.yaml, with load_in_4bit "
            "where memory is short"
        )
    if arguments.lora_r and arguments.merge_adapter and getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"merge_adapter cannot merge into the quantised weights of {arguments.model_name_or_path}: set it to "
            "false, and merge into the checkpoint they were made of"
        )
    settings: dict[str, Any] = {}
    if arguments.load_in_4bit:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=arguments.dtype,
        )
    model = load_model(arguments, config, layout, **settings)
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


def resume_from(training: TrainingArguments) -> str | bool | None:
    """`resume_from_checkpoint` as `Trainer.train` takes it: True for the newest in output_dir, or a folder."""
    given = training.resume_from_checkpoint
    return {"true": True, "false": None, "none": None}.get(str(given).lower(), given)


def train_and_save(trainer: Trainer, arguments: RecipeArguments, method: str) -> None:
    """Train, or go on with it; evaluate; leave model, tokenizer, state, metrics and card in output_dir.

    Args:
        method: pretraining, SFT or DPO, for the card.
    """
    folder = Path(trainer.args.output_dir)
    record_run(trainer, arguments, method)
    result = trainer.train(resume_from_checkpoint=resume_from(trainer.args))
    trainer.save_metrics("train", result.metrics)
    if trainer.eval_dataset is not None:
        trainer.save_metrics("eval", trainer.evaluate())
    card = folder / "README.md"
    edited = None if may_write_card(folder) else card.read_bytes()  # before peft's save writes into it
    trainer.save_model()
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return
    if edited is not None:
        write_whole(card, edited)
    else:
        with clear_errors():
            write_card(folder, force=True)


def end_training(trainer: Trainer) -> None:
    """All ranks leave the process group, before they exit.

    DDP's wrapper goes first. If it were the last to hold the group, freeing it would end gloo's threads while Python's
    lock is held, for which one of them may be waiting: such a run never ends.
    """
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()


def check_merge(arguments: FineTuningArguments, trainer: Trainer) -> None:
    """Raise ValueError if `merge_adapter` asks for what this launch cannot do."""
    if arguments.lora_r and arguments.merge_adapter and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError("merge_adapter needs whole weights in each process: set it to false, and merge afterwards")


def proof_ids(dataset: Dataset) -> torch.Tensor:
    """Tokens of a tokenized dataset's first rows, one after the other: `[batch, sequence]`, at most PROOF_SHAPE."""
    columns = ["input_ids"] if "input_ids" in dataset.column_names else ["prompt_ids", "chosen_ids"]
    stream = chain.from_iterable(row[column] for row in dataset for column in columns)
    ids = torch.tensor(list(islice(stream, PROOF_SHAPE[0] * PROOF_SHAPE[1])))
    length = min(len(ids), PROOF_SHAPE[1])
    return ids[: len(ids) // length * length].view(-1, length)


def save_merged(trainer: Trainer) -> None:
    """Write the model with its adapter merged into it, the tokenizer and the card to output_dir/merged.

    The merge is proven on training data; one that is refused ends the run with a sentence that says why.
    """
    folder = Path(trainer.args.output_dir) / "merged"
    model = trainer.accelerator.unwrap_model(trainer.model)
    with clear_errors():
        merged = merge_lora(model, proof_ids(trainer.train_dataset).to(model.device))
    if trainer.args.should_save:
        merged.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
        if may_write_card(folder):
            write_card(folder, run=folder.parent)
