"""Fine-tune a GRIN-MoE on chats, prompts with completions, or plain text: all weights, or LoRA.

    accelerate launch recipes/sft.py --config recipes/configs/sft_tiny.yaml --learning_rate 1e-5

Rows have `messages`, or `prompt` and `completion`, or `text` (dataset_text_field). `--help` lists every argument:
these, and TRL's SFTConfig.
"""

from datasets import Dataset
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import set_seed
from trl import SFTConfig

from modeling_grin.publishing.merging import run_to_the_end
from modeling_grin.training import RoutingCallback, data_checks, run
from modeling_grin.training.arguments import FineTuningArguments, RecipeParser
from modeling_grin.training.trl_trainers import GrinMoeSFTTrainer

KINDS = {"messages": ["messages"], "prompt": ["messages", "text"]}


def parse(argv: list[str] | None = None) -> tuple[FineTuningArguments, SFTConfig]:
    """Read the command line, and the YAML file that `--config` names."""
    return RecipeParser(FineTuningArguments, SFTConfig, description=__doc__).parse_args_and_config(argv)


def main(argv: list[str] | None = None) -> None:
    """Check, load, train, and leave the model (with LoRA: adapter and merged model) in output_dir."""
    with run.exit_on_error():
        arguments, training = parse(argv)
        set_seed(training.seed)
        tokenizer, config = run.load_tokenizer(arguments), run.load_config(arguments)
        data_checks.check_tokenizer(tokenizer, config)
        data_checks.check_sequence_length(training.max_length, config, "max_length")

        def select(dataset: Dataset, name: str) -> Dataset:
            """Keep the columns to train on, and check them."""
            known = (["messages"], ["prompt", "completion"], [training.dataset_text_field])
            columns = next((columns for columns in known if set(columns) <= set(dataset.column_names)), None)
            if columns is None:
                wanted = " or ".join(" and ".join(columns) for columns in known)
                raise ValueError(f"{name} must have the columns {wanted}; got {sorted(dataset.column_names)}")
            data_checks.check_kinds(dataset, columns, name, KINDS.get(columns[0], ["text"]))
            if training.assistant_only_loss and columns == ["messages"]:
                for row, messages in enumerate(dataset["messages"]):
                    if all(message["role"] != "assistant" for message in messages):
                        raise ValueError(f"{name}, row {row}: messages must have an assistant turn to learn from")
            return run.select_columns(dataset, columns)

        train, held_out = run.load_train_and_eval(arguments, training, select)
        layout = run.distributed_config_from_accelerate(training, arguments.pipeline_parallel_size)
        trainer = GrinMoeSFTTrainer(
            model=run.load_adapted(arguments, training, config, layout),
            args=training,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            exact_balance=arguments.exact_balance,
        )
        for name, rows in {"train_data": trainer.train_dataset, "evaluation data": trainer.eval_dataset}.items():
            if training.max_length is None and rows is not None:
                data_checks.check_longest(rows, ["input_ids"], config, name)

    if arguments.pipeline_parallel_size == 1:
        trainer.add_callback(RoutingCallback(trainer))
    run_to_the_end(trainer, arguments, "SFT")


if __name__ == "__main__":
    record(main)()  # a launcher then reports the error of the rank that failed
