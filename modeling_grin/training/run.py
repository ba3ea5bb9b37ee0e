"""The recipes' work around training: load data, tokenizer and model; train, and save the model."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import FullyShardedDataParallelPlugin, ParallelismConfig
from datasets import Dataset
from huggingface_hub import snapshot_download
from peft import PeftModel
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.distributed import DistributedConfig
from transformers.utils import strtobool

from ..compat_grinmoe import require_layouts
from ..configuration_grinmoe import GrinMoeConfig
from ..data import find_files, load_data
from ..lora import add_lora
from ..modeling_grinmoe import GrinMoeForCausalLM
from .arguments import FineTuningArguments, RecipeArguments
from .checkpoints import find_problems, last_complete_checkpoint
from .pipeline import pipeline_model

CHAT_SETTINGS = ("tools", "chat_template_kwargs")  # TRL reads these columns beside conversations

# ---- Errors ----


@contextmanager
def name_in_errors(name: str) -> Iterator[None]:
    """Put the name of a checkpoint before errors of loading it, which often lack it."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{name}, as a folder here and as a name on the Hub: {error}") from error


@contextmanager
def exit_on_error() -> Iterator[None]:
    """End the run with one sentence on an error about data, files or arguments, before training and after it."""
    try:
        yield
    except (ValueError, OSError) as error:
        get_error_handler().record_exception(error)  # a launcher reports it as the rank's
        raise SystemExit(f"error: {' '.join(str(error).split())}") from error


# ---- Data ----


def load_train_and_eval(
    arguments: RecipeArguments, training: TrainingArguments, select: Callable[[Dataset, str], Dataset]
) -> tuple[Dataset, Dataset | None]:
    """Load the training rows, and those to evaluate on if the arguments name some.

    Args:
        select: checks the rows of a dataset, which errors call by the second argument, and returns the columns to use.

    Raises:
        ValueError: the data are wrong, or there is no checkpoint to resume from.
    """
    resumed = checkpoint_to_resume(training)
    if isinstance(resumed, str) and (problems := find_problems(resumed)):
        raise ValueError(f"{resumed} is not a complete checkpoint: {', '.join(problems)}")
    if resumed is True and last_complete_checkpoint(training.output_dir)[0] is None:
        raise ValueError(f"{training.output_dir} has no complete checkpoint to resume from")
    config = arguments.dataset_config
    train = load_data(arguments.train_data, split=arguments.train_split, config=config)
    train = select(train, f"train_data={arguments.train_data}")
    if arguments.eval_fraction:
        parts = train.train_test_split(test_size=arguments.eval_fraction, seed=training.seed)
        return parts["train"], parts["test"]
    if not (arguments.eval_data or arguments.eval_split):
        return train, None
    name = arguments.eval_data or arguments.train_data
    config = None if find_files(name) else config  # the training data's on the Hub
    held_out = load_data(name, split=arguments.eval_split, config=config, default_split="test")
    return train, select(held_out, f"eval_data={name}")


def select_columns(dataset: Dataset, columns: Sequence[str]) -> Dataset:
    """Keep `columns` and the chat settings; TRL could take others for another format of the rows."""
    return dataset.select_columns([*columns, *(name for name in CHAT_SETTINGS if name in dataset.column_names)])


# ---- Tokenizer and model ----


def load_tokenizer(arguments: RecipeArguments) -> PreTrainedTokenizerBase:
    """Load the tokenizer that the arguments name, or the model's."""
    name = arguments.tokenizer_name_or_path or arguments.model_name_or_path
    if name is None:
        raise ValueError("model_name_or_path must be the folder or the Hub name of a checkpoint; got none")
    with name_in_errors(name):
        return AutoTokenizer.from_pretrained(name)


def load_config(arguments: RecipeArguments) -> GrinMoeConfig:
    """Load the checkpoint's configuration, with `model_config` applied; quick, for checks before the weights."""
    name = str(arguments.model_name_or_path)
    with name_in_errors(name):
        return GrinMoeConfig.from_pretrained(name, **arguments.config_overrides)


def distributed_config_from_accelerate(
    training: TrainingArguments, pipeline_parallel_size: int = 1
) -> DistributedConfig | None:
    """Return FSDP2 and tensor parallelism as the config file of `accelerate launch` sets them; None for neither.

    transformers then spreads the model while it loads: each rank reads its own part. The settings are taken out of the
    environment, or accelerate would shard the model a second time. In bfloat16 training FSDP2 gathers bfloat16 copies
    of its float32 weights, and reduces gradients in float32.

    Args:
        pipeline_parallel_size: more than 1: the layout's tensor-parallel size is a stage's, and the number of
            processes decides its other sizes.

    Raises:
        ValueError: a setting of the config file that has no counterpart here, or sizes that do not multiply to the
            number of processes.
    """
    use_fsdp, use_sizes = (
        strtobool(os.environ.pop(name, "false"))
        for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG")
    )
    if not (use_fsdp or use_sizes):
        return None
    require_layouts()
    is_pipeline = pipeline_parallel_size > 1
    sizes = ParallelismConfig() if use_sizes else ParallelismConfig(dp_shard_size=training.world_size)
    plugin = FullyShardedDataParallelPlugin(**({} if use_fsdp else {"fsdp_version": 2}))
    offload = use_fsdp and isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    refused = {
        "parallelism_config_cp_size or _sp_size": sizes.cp_size * sizes.sp_size > 1,
        f"fsdp_version={plugin.fsdp_version} instead of 2": plugin.fsdp_version != 2,
        "fsdp_activation_checkpointing, but activation_checkpointing of the recipe": plugin.activation_checkpointing,
        "in a pipeline fsdp_offload_params or dp_replicate_size": is_pipeline
        and (offload or sizes.dp_replicate_size > 1),
    }
    if names := [name for name, is_set in refused.items() if is_set]:
        raise ValueError(f"the launch's config file must not set {'; '.join(names)}: see recipes/accelerate")
    if not is_pipeline and sizes.total_size != training.world_size:
        raise ValueError(
            f"parallelism_config must multiply to the {training.world_size} processes of the launch; got "
            f"dp_replicate_size={sizes.dp_replicate_size} x dp_shard_size={sizes.dp_shard_size} x "
            f"tp_size={sizes.tp_size}: set --num_processes or --parallelism_config_dp_shard_size"
        )
    return DistributedConfig(
        fsdp_size=sizes.dp_shard_size,
        dp_replicate_size=sizes.dp_replicate_size,
        tp_size=sizes.tp_size,
        fsdp_cpu_offload=offload,
        fsdp_mixed_precision=training.mixed_precision == "bf16",
    )


def model_settings(arguments: RecipeArguments) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that say how a model computes."""
    names = ("dtype", "attn_implementation", "experts_implementation")
    return {name: getattr(arguments, name) for name in names}


def load_model(
    arguments: RecipeArguments,
    config: GrinMoeConfig,
    layout: DistributedConfig | None = None,
    name: str | None = None,
) -> GrinMoeForCausalLM:
    """Load the checkpoint's model with the given configuration, or this rank's part of it.

    Args:
        layout: `distributed_config_from_accelerate`'s. In a pipeline its tensor-parallel ranks are each stage's, and
            all ranks beyond the stages are data-parallel.
        name: another checkpoint than the arguments'.
    """
    name = name or str(arguments.model_name_or_path)
    settings = model_settings(arguments)
    if isinstance(arguments, FineTuningArguments) and arguments.load_in_4bit:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=arguments.dtype,
        )  # fmt: skip
    if arguments.pipeline_parallel_size == 1:
        return GrinMoeForCausalLM.from_pretrained(name, config=config, distributed_config=layout, **settings)
    return pipeline_model(
        name if Path(name).is_dir() else snapshot_download(name), config,
        pp_size=arguments.pipeline_parallel_size, tp_size=1 if layout is None else layout.tp_size,
        schedule=arguments.pipeline_schedule, **settings,
    )  # fmt: skip


def make_model(
    arguments: RecipeArguments, config: GrinMoeConfig, training: TrainingArguments, layout: DistributedConfig | None
) -> GrinMoeForCausalLM:
    """Make a model with random weights, or this rank's part of it.

    Where ranks have parts, the main process makes the model, in the CPU's memory, and writes it to output_dir/initial,
    so that it is the same in every layout. A resumed run reads the checkpoint instead.
    """
    if layout is None and arguments.pipeline_parallel_size == 1:
        return AutoModelForCausalLM.from_config(config, **model_settings(arguments))
    resumed = checkpoint_to_resume(training)
    if resumed:
        checkpoint = last_complete_checkpoint(training.output_dir)[0] if resumed is True else resumed
        return load_model(arguments, config, layout, str(checkpoint))
    folder = Path(training.output_dir) / "initial"
    with training.main_process_first(desc="new model"):
        if training.should_save:
            AutoModelForCausalLM.from_config(config, **model_settings(arguments)).save_pretrained(folder)
    return load_model(arguments, config, layout, str(folder))


def load_adapted(
    arguments: FineTuningArguments,
    training: TrainingArguments,
    config: GrinMoeConfig,
    layout: DistributedConfig | None = None,
) -> GrinMoeForCausalLM | PeftModel:
    """`load_model`, with adapters if the arguments ask for LoRA; the main process prints how much is trained."""
    if arguments.lora_r and arguments.merge_adapter and getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"merge_adapter cannot merge into the quantised weights of {arguments.model_name_or_path}: set it to "
            "false, and merge into the checkpoint they were made of"
        )
    model = load_model(arguments, config, layout)
    if not arguments.lora_r:
        return model
    adapted = add_lora(
        model,
        attention=arguments.lora_attention,
        router=arguments.lora_router,
        experts=arguments.lora_experts,
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
    )
    adapted.create_or_update_model_card = lambda folder: None  # the run's own card comes at its end
    if training.process_index == 0:
        adapted.print_trainable_parameters()
    return adapted


# ---- Training and its end ----


def checkpoint_to_resume(training: TrainingArguments) -> str | bool | None:
    """Return `resume_from_checkpoint` as `Trainer.train` takes it: a folder, or True for the newest in output_dir."""
    given = training.resume_from_checkpoint
    return {"true": True, "false": None, "none": None}.get(str(given).lower(), given)


def train_and_save(trainer: Trainer) -> None:
    """Train or resume, evaluate, and leave model, tokenizer, state and metrics in output_dir."""
    result = trainer.train(resume_from_checkpoint=checkpoint_to_resume(trainer.args))
    trainer.save_metrics("train", result.metrics)
    if trainer.eval_dataset is not None:
        trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_model()
    trainer.save_state()


def end_training(trainer: Trainer) -> None:
    """Let all ranks leave the process group before they exit.

    DDP's wrapper goes first. If it were the last to hold the group, freeing it would end gloo's threads while Python's
    lock is held, for which one of them may be waiting: such a run never ends.
    """
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()
