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

from modeling_grin.publishing.merging import run_to_the_end
from modeling_grin.training import RoutingCallback, data_checks, run
from modeling_grin.training.arguments import GREEDY_ROUTING, FineTuningArguments, RecipeParser
from modeling_grin.training.trl_trainers import GrinMoeDPOTrainer

ANSWERS = ["chosen", "rejected"]


def select(dataset: Dataset, name: str) -> Dataset:
    """Keep the columns to train on, and check them."""
    data_checks.check_columns(dataset, ANSWERS, name)
    implicit = "prompt" not in dataset.column_names and data_checks.kind_of(dataset.features["chosen"]) == "messages"
    columns = ANSWERS if implicit else ["prompt", *ANSWERS]
    data_checks.check_columns(dataset, columns, name)
    data_checks.check_kinds(dataset, columns, name, ["messages", "text"])
    return run.select_columns(dataset, columns)


def parse(argv: list[str] | None = None) -> tuple[FineTuningArguments, DPOConfig]:
    """Read the command line, and the YAML file that `--config` names."""
    parser = RecipeParser(FineTuningArguments, DPOConfig, description=__doc__)
    arguments, training = parser.parse_args_and_config(argv)
    arguments.config_overrides = {**GREEDY_ROUTING, **arguments.config_overrides}
    return arguments, training


def main(argv: list[str] | None = None) -> None:
    """Check, load, train, and leave the model (with LoRA: adapter and merged model) in output_dir."""
    with run.exit_on_error():
        arguments, training = parse(argv)
        set_seed(training.seed)
        tokenizer, config = run.load_tokenizer(arguments), run.load_config(arguments)
        data_checks.check_tokenizer(tokenizer, config)
        data_checks.check_preference_routing(config, dropout_is_disabled=training.disable_dropout)
        data_checks.check_sequence_length(training.max_length, config, "max_length")
        train, held_out = run.load_train_and_eval(arguments, training, select)
        layout = run.distributed_config_from_accelerate(training)
        if arguments.pipeline_parallel_size > 1 or (layout is not None and not arguments.lora_r):
            raise ValueError(
                "DPO of all weights needs whole models in each process: launch with recipes/accelerate/ddp.yaml, or "
                "set lora_r, with any layout but a pipeline"
            )
        reference = None  # of LoRA: the model without the adapter
        if not arguments.lora_r and not training.precompute_ref_log_probs:
            reference = run.load_model(arguments, config)  # TRL would load one with the checkpoint's own config
        trainer = GrinMoeDPOTrainer(
            model=run.load_adapted(arguments, training, config, layout),
            ref_model=reference,
            args=training,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
        )
        for rows, name in ((trainer.train_dataset, "train_data"), (trainer.eval_dataset, "evaluation data")):
            if rows is None:
                continue
            left = f"{name}, without the rows whose prompt alone fills max_length={training.max_length},"
            data_checks.check_columns(rows, [], left)
            if training.max_length is None:
                for answer in ("chosen_ids", "rejected_ids"):
                    data_checks.check_longest(rows, ["prompt_ids", answer], config, name)

    trainer.add_callback(RoutingCallback(trainer))
    run_to_the_end(trainer, arguments, "DPO")


if __name__ == "__main__":
    record(main)()  # a launcher then reports the error of the rank that failed
