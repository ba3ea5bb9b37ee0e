"""Fine-tune a GRIN-MoE on chats, prompts with completions, or plain text: all weights, or LoRA.

    accelerate launch recipes/sft.py --config recipes/configs/sft_tiny.yaml --learning_rate 1e-5

Rows have `messages`, or `prompt` and `completion`, or `text` (dataset_text_field). `--help` lists every argument:
these, and TRL's SFTConfig.
"""

from functools import partial

from datasets import Dataset
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import set_seed
from trl import SFTConfig

from modeling_grin.training import RoutingCallback, checks
from modeling_grin.training.layouts import take_launched_layout
from modeling_grin.training.recipes import (
    FineTuningArguments,
    RecipeParser,
    check_arguments,
    check_merge,
    clear_errors,
    end_training,
    load_config,
    load_for_fine_tuning,
    load_tokenizer,
    load_train_and_eval,
    save_merged,
    select_columns,
    train_and_save,
)
from modeling_grin.training.trl_trainers import GrinMoeSFTTrainer


def find_columns(dataset: Dataset, name: str, training: SFTConfig) -> list[str]:
    """The columns that hold the conversation or text, of those TRL knows; ValueError if there are none."""
    known = (["messages"], ["prompt", "completion"], [training.dataset_text_field])
    for columns in known:
        if set(columns) <= set(dataset.column_names):
            return columns
    wanted = " or ".join(" and ".join(columns) for columns in known)
    raise ValueError(f"{name} has none of the columns {wanted}; it has {sorted(dataset.column_names)}")


def select(dataset: Dataset, name: str, training: SFTConfig) -> Dataset:
    """The columns to train on, of data called `name`.

    Raises:
        ValueError: there are none, or rows that nothing can be learnt from.
    """
    columns = find_columns(dataset, name, training)
    checks.check_dataset(dataset, columns, name)
    if columns == ["messages"]:
        checks.check_messages(dataset, columns, name)
        if training.assistant_only_loss:
            checks.check_assistant_turns(dataset, name)
    elif columns == [training.dataset_text_field]:
        checks.check_text(dataset, columns, name)
    else:
        checks.check_text_or_messages(dataset, columns, name)
    return select_columns(dataset, columns)


def parse(argv: list[str] | None = None) -> tuple[FineTuningArguments, SFTConfig]:
    """The arguments of the command line, and of the YAML file that `--config` names."""
    return RecipeParser([FineTuningArguments, SFTConfig], description=__doc__).parse_args_and_config(argv)


def main(argv: list[str] | None = None) -> None:
    """Check, load, train, and leave the model (with LoRA: adapter, and merged model) in output_dir."""
    with clear_errors():
        arguments, training = parse(argv)
        check_arguments(arguments, training)
        set_seed(training.seed)
        tokenizer, config = load_tokenizer(arguments), load_config(arguments)
        checks.check_tokenizer(tokenizer, config)
        checks.check_frozen_router(config, lora_router=arguments.lora_r > 0 and arguments.lora_router)
        if training.max_length is not None:
            checks.check_sequence_length(training.max_length, config, "max_length")
        train, held_out = load_train_and_eval(arguments, training, partial(select, training=training))
        layout = take_launched_layout(training, arguments.pipeline_parallel_size)
        model = load_for_fine_tuning(arguments, config, layout)
        trainer = GrinMoeSFTTrainer(
            model=model,
            args=training,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            exact_balance=arguments.exact_balance,
        )
        check_merge(arguments, trainer)
        for name, dataset in (("train_data", trainer.train_dataset), ("evaluation data", trainer.eval_dataset)):
            if dataset is not None:
                checks.check_labels(dataset, name)
                if training.max_length is None:
                    checks.check_longest(map(len, dataset["input_ids"]), config, name)

    if arguments.pipeline_parallel_size == 1:
        trainer.add_callback(RoutingCallback(trainer))
    train_and_save(trainer, arguments, "SFT")
    if arguments.lora_r and arguments.merge_adapter:
        save_merged(trainer)
    end_training(trainer)


if __name__ == "__main__":
    record(main)()  # a launcher then reports the error of the rank that failed
