"""Fine-tune a GRIN-MoE on chats, prompts with completions, or plain text: all weights, or LoRA.

    accelerate launch recipes/sft.py --config recipes/configs/sft_tiny.yaml --learning_rate 1e-5

Rows have `messages`, or `prompt` and `completion`, or `text` (dataset_text_field). `--help` lists every argument:
these, and TRL's SFTConfig.
"""

from datasets import Dataset
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import set_seed
from trl import SFTConfig

from modeling_grin.publishing.card import write_cards
from modeling_grin.publishing.merging import save_merged
from modeling_grin.publishing.record import record_run
from modeling_grin.training import RoutingCallback, data_checks
from modeling_grin.training.arguments import FineTuningArguments, RecipeParser, check_arguments
from modeling_grin.training.run import (
    distributed_config_from_accelerate,
    end_training,
    exit_on_error,
    load_adapted,
    load_config,
    load_tokenizer,
    load_train_and_eval,
    select_columns,
    train_and_save,
)
from modeling_grin.training.trl_trainers import GrinMoeSFTTrainer


def parse(argv: list[str] | None = None) -> tuple[FineTuningArguments, SFTConfig]:
    """Read the command line, and the YAML file that `--config` names."""
    return RecipeParser([FineTuningArguments, SFTConfig], description=__doc__).parse_args_and_config(argv)


def main(argv: list[str] | None = None) -> None:
    """Check, load, train, and leave the model (with LoRA: adapter and merged model) in output_dir."""
    with exit_on_error():
        arguments, training = parse(argv)
        check_arguments(arguments, training)
        set_seed(training.seed)
        tokenizer, config = load_tokenizer(arguments), load_config(arguments)
        data_checks.check_tokenizer(tokenizer, config)
        if training.max_length is not None:
            data_checks.check_sequence_length(training.max_length, config, "max_length")

        def select(dataset: Dataset, name: str) -> Dataset:
            """Keep the columns to train on, and check that there is something to learn from every row."""
            known = (["messages"], ["prompt", "completion"], [training.dataset_text_field])
            columns = next((columns for columns in known if set(columns) <= set(dataset.column_names)), None)
            if columns is None:
                wanted = " or ".join(" and ".join(columns) for columns in known)
                raise ValueError(f"{name} must have the columns {wanted}; got {sorted(dataset.column_names)}")
            data_checks.check_columns(dataset, columns, name)
            if columns == ["messages"]:
                data_checks.check_messages(dataset, columns, name)
                if training.assistant_only_loss:
                    data_checks.check_assistant_turns(dataset, name)
            elif len(columns) == 1:
                data_checks.check_text(dataset, columns, name)
            else:
                data_checks.check_text_or_messages(dataset, columns, name)
            return select_columns(dataset, columns)

        train, held_out = load_train_and_eval(arguments, training, select)
        layout = distributed_config_from_accelerate(training, arguments.pipeline_parallel_size)
        model = load_adapted(arguments, training, config, layout)
        trainer = GrinMoeSFTTrainer(
            model=model,
            args=training,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            exact_balance=arguments.exact_balance,
        )
        for name, dataset in (("train_data", trainer.train_dataset), ("evaluation data", trainer.eval_dataset)):
            if dataset is not None:
                data_checks.check_labels(dataset, name)
                if training.max_length is None:
                    data_checks.check_longest(map(len, dataset["input_ids"]), config, name)

    if arguments.pipeline_parallel_size == 1:
        trainer.add_callback(RoutingCallback(trainer))
    record_run(trainer, arguments, "SFT")
    train_and_save(trainer)
    with exit_on_error():
        write_cards(trainer)
    if arguments.lora_r and arguments.merge_adapter:
        save_merged(trainer, arguments)
        write_cards(trainer)
    end_training(trainer)


if __name__ == "__main__":
    record(main)()  # a launcher then reports the error of the rank that failed
