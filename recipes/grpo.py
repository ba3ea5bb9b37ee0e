"""Train a GRIN-MoE by reinforcement (GRPO) towards answers like given ones: all weights, or LoRA.

    accelerate launch recipes/grpo.py --config recipes/configs/grpo_debug.yaml --learning_rate 1e-6

Rows have `prompt`, messages or text, and `answer`, text; `similarity` is the reward, to be replaced by your own. Every
pass routes greedily, so that the ratios of probabilities carry no routing noise. `--help` lists every argument: these,
and TRL's GRPOConfig.
"""

from difflib import SequenceMatcher
from typing import Any

from datasets import Dataset
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import set_seed
from trl import GRPOConfig

from modeling_grin.publishing.merging import run_to_the_end
from modeling_grin.training import RoutingCallback, data_checks, run
from modeling_grin.training.arguments import GREEDY_ROUTING, FineTuningArguments, RecipeParser
from modeling_grin.training.trl_trainers import GrinMoeGRPOTrainer


def similarity(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """The reward: from 0 to 1, the share of characters that a completion and its answer have in common, in order."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    pairs = zip(texts, answer, strict=True)
    return [SequenceMatcher(None, text, right, autojunk=False).ratio() for text, right in pairs]


def select(dataset: Dataset, name: str) -> Dataset:
    """Keep the columns to train on, and check them."""
    data_checks.check_columns(dataset, ["prompt", "answer"], name)
    data_checks.check_kinds(dataset, ["prompt"], name, ["messages", "text"])
    data_checks.check_kinds(dataset, ["answer"], name)
    return dataset.select_columns(["prompt", "answer"])


def parse(argv: list[str] | None = None) -> tuple[FineTuningArguments, GRPOConfig]:
    """Read the command line, and the YAML file that `--config` names."""
    parser = RecipeParser(FineTuningArguments, GRPOConfig, description=__doc__)
    arguments, training = parser.parse_args_and_config(argv)
    arguments.config_overrides = {**GREEDY_ROUTING, "router_aux_loss_coef": 0.0, **arguments.config_overrides}
    return arguments, training


def main(argv: list[str] | None = None) -> None:
    """Check, load, train, and leave the model (with LoRA: adapter and merged model) in output_dir."""
    with run.exit_on_error():
        arguments, training = parse(argv)
        set_seed(training.seed)
        tokenizer, config = run.load_tokenizer(arguments), run.load_config(arguments)
        data_checks.check_tokenizer(tokenizer, config)
        data_checks.check_preference_routing(config, dropout_is_disabled=training.disable_dropout)
        train, held_out = run.load_train_and_eval(arguments, training, select)
        layout = run.distributed_config_from_accelerate(training)
        is_whole = layout is None or (layout.tp_size == 1 and arguments.lora_r > 0)
        if arguments.pipeline_parallel_size > 1 or not is_whole:
            raise ValueError(
                "GRPO generates and compares on each rank: launch with recipes/accelerate/ddp.yaml, or with fsdp2.yaml"
                " and lora_r"
            )
        trainer = GrinMoeGRPOTrainer(
            model=run.load_adapted(arguments, training, config, layout),
            reward_funcs=similarity,
            args=training,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
        )

    trainer.add_callback(RoutingCallback(trainer))
    run_to_the_end(trainer, arguments, "GRPO")


if __name__ == "__main__":
    record(main)()  # a launcher then reports the error of the rank that failed
