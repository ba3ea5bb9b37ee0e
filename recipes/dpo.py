"""Align a GRIN-MoE with preferences (DPO): all weights against a frozen copy, or LoRA against the model without it.

    accelerate launch recipes/dpo.py --config recipes/configs/dpo_tiny.yaml --learning_rate 1e-6

Rows have `prompt`, `chosen` and `rejected`, all as messages or all as text; `prompt` may be missing where `chosen` and
`rejected` are whole conversations that begin alike. Training routes greedily, so that log-ratios carry no routing
noise. `--help` lists every argument: these, and TRL's DPOConfig.
"""

from datasets import Dataset
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import set_seed
from trl import DPOConfig

from modeling_grin.publishing.card import write_cards
from modeling_grin.publishing.merging import save_merged
from modeling_grin.publishing.record import record_run
from modeling_grin.training import RoutingCallback, data_checks
from modeling_grin.training.arguments import GREEDY_ROUTING, FineTuningArguments, RecipeParser, check_arguments
from modeling_grin.training.run import (
    distributed_config_from_accelerate,
    end_training,
    exit_on_error,
    load_adapted,
    load_config,
    load_model,
    load_tokenizer,
    load_train_and_eval,
    select_columns,
    train_and_save,
)
from modeling_grin.training.trl_trainers import GrinMoeDPOTrainer

ANSWERS = ["chosen", "rejected"]


def select(dataset: Dataset, name: str) -> Dataset:
    """Keep the columns to train on, and check their rows."""
    data_checks.check_columns(dataset, ANSWERS, name)
    implicit = "prompt" not in dataset.column_names and not data_checks.is_text(dataset, "chosen")
    columns = ANSWERS if implicit else ["prompt", *ANSWERS]
    data_checks.check_columns(dataset, columns, name)
    data_checks.check_text_or_messages(dataset, columns, name)
    return select_columns(dataset, columns)


def parse(argv: list[str] | None = None) -> tuple[FineTuningArguments, DPOConfig]:
    """Read the command line, and the YAML file that `--config` names."""
    parser = RecipeParser([FineTuningArguments, DPOConfig], description=__doc__)
    arguments, training = parser.parse_args_and_config(argv)
    arguments.config_overrides = {**GREEDY_ROUTING, **arguments.config_overrides}
    return arguments, training


def main(argv: list[str] | None = None) -> None:
    """Check, load, train, and leave the model (with LoRA: adapter and merged model) in output_dir."""
    with exit_on_error():
        arguments, training = parse(argv)
        check_arguments(arguments, training)
        set_seed(training.seed)
        tokenizer, config = load_tokenizer(arguments), load_config(arguments)
        data_checks.check_tokenizer(tokenizer, config)
        data_checks.check_preference_routing(config, dropout_is_disabled=training.disable_dropout)
        if training.max_length is not None:
            data_checks.check_sequence_length(training.max_length, config, "max_length")
        train, held_out = load_train_and_eval(arguments, training, select)

        layout = distributed_config_from_accelerate(training)
        if arguments.pipeline_parallel_size > 1 or (layout is not None and not arguments.lora_r):
            raise ValueError(
                "DPO of all weights needs whole models in each process: launch with recipes/accelerate/ddp.yaml, or "
                "set lora_r, with any layout but a pipeline"
            )
        model, reference = load_adapted(arguments, training, config, layout), None
        # The reference of LoRA is the model without the adapter.
        if not arguments.lora_r and not training.precompute_ref_log_probs:
            reference = load_model(arguments, config)  # TRL would load one with the checkpoint's own config
        trainer = GrinMoeDPOTrainer(
            model=model,
            ref_model=reference,
            args=training,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
        )
        for name, dataset in (("train_data", trainer.train_dataset), ("evaluation data", trainer.eval_dataset)):
            if dataset is not None:
                data_checks.check_columns(
                    dataset, [], f"{name}, without the rows whose prompt alone fills max_length={training.max_length},"
                )
                if training.max_length is None:
                    for answer in ("chosen_ids", "rejected_ids"):
                        pairs = zip(dataset["prompt_ids"], dataset[answer], strict=True)
                        data_checks.check_longest((len(a) + len(b) for a, b in pairs), config, name)

    trainer.add_callback(RoutingCallback(trainer))
    record_run(trainer, arguments, "DPO")
    train_and_save(trainer)
    with exit_on_error():
        write_cards(trainer)
    if arguments.lora_r and arguments.merge_adapter:
        save_merged(trainer, arguments)
        write_cards(trainer)
    end_training(trainer)


if __name__ == "__main__":
    record(main)()  # a launcher then reports the error of the rank that failed
