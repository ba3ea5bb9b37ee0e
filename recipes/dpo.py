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
    load_model,
    load_tokenizer,
    load_train_and_eval,
    save_merged,
    select_columns,
    train_and_save,
)
from modeling_grin.training.trl_trainers import GrinMoeDPOTrainer

ANSWERS = ["chosen", "rejected"]
GREEDY_ROUTING = {"router_sampling": False, "input_jitter_noise": 0.0}


def select(dataset: Dataset, name: str) -> Dataset:
    """The columns to train on, of data called `name`; ValueError if one is missing, or holds something else."""
    checks.check_dataset(dataset, ANSWERS, name)
    implicit = "prompt" not in dataset.column_names and not checks.is_text(dataset, "chosen")
    columns = ANSWERS if implicit else ["prompt", *ANSWERS]
    checks.check_dataset(dataset, columns, name)
    checks.check_text_or_messages(dataset, columns, name)
    return select_columns(dataset, columns)


def parse(argv: list[str] | None = None) -> tuple[FineTuningArguments, DPOConfig]:
    """The arguments of the command line, and of the YAML file that `--config` names."""
    parser = RecipeParser([FineTuningArguments, DPOConfig], description=__doc__)
    arguments, training = parser.parse_args_and_config(argv)
    arguments.config_overrides = {**GREEDY_ROUTING, **arguments.config_overrides}
    return arguments, training


def main(argv: list[str] | None = None) -> None:
    """Check, load, train, and leave the model (with LoRA: adapter, and merged model) in output_dir."""
    with clear_errors():
        arguments, training = parse(argv)
        check_arguments(arguments, training)
        set_seed(training.seed)
        tokenizer, config = load_tokenizer(arguments), load_config(arguments)
        checks.check_tokenizer(tokenizer, config)
        checks.check_preference_routing(config, dropout_is_disabled=training.disable_dropout)
        checks.check_frozen_router(config, lora_router=arguments.lora_r > 0 and arguments.lora_router)
        if training.max_length is not None:
            checks.check_sequence_length(training.max_length, config, "max_length")
        train, held_out = load_train_and_eval(arguments, training, select)
        if take_launched_layout(training) is not None or arguments.pipeline_parallel_size > 1:
            raise ValueError(
                "DPO needs whole models in each process: launch with recipes/accelerate/ddp.yaml, with lora_r where "
                "memory is short"
            )
        model = load_for_fine_tuning(arguments, config)
        # With LoRA the reference is the model as the adapter found it. TRL would load another with a default config.
        separate = not arguments.lora_r and not training.precompute_ref_log_probs
        trainer = GrinMoeDPOTrainer(
            model=model,
            ref_model=load_model(arguments, config) if separate else None,
            args=training,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
        )
        check_merge(arguments, trainer)
        for name, dataset in (("train_data", trainer.train_dataset), ("evaluation data", trainer.eval_dataset)):
            if dataset is not None:
                checks.check_dataset(
                    dataset, [], f"{name}, without the rows whose prompt alone fills max_length={training.max_length},"
                )
                if training.max_length is None:
                    for answer in ("chosen_ids", "rejected_ids"):
                        pairs = zip(dataset["prompt_ids"], dataset[answer], strict=True)
                        checks.check_longest((len(a) + len(b) for a, b in pairs), config, name)

    trainer.add_callback(RoutingCallback(trainer))
    train_and_save(trainer, arguments, "DPO")
    if arguments.lora_r and arguments.merge_adapter:
        save_merged(trainer)
    end_training(trainer)


if __name__ == "__main__":
    record(main)()  # a launcher then reports the error of the rank that failed
