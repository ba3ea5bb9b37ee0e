"""Pre-train a GRIN-MoE on plain text, from scratch or on from a checkpoint.

    accelerate launch recipes/pretrain.py --config recipes/configs/pretrain_tiny.yaml --learning_rate 1e-3

Texts are joined into one stream, <|endoftext|> after each, and cut into blocks; attention crosses from one text of a
block to the next. `--help` lists every argument: these, and transformers' TrainingArguments.
"""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from datasets import Dataset
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments, default_data_collator, set_seed

from modeling_grin import GrinMoeConfig, GrinMoeTokenizer
from modeling_grin.publishing.merging import run_to_the_end
from modeling_grin.training import GrinMoeTrainer, RoutingCallback, data_checks, run
from modeling_grin.training.arguments import RecipeArguments, RecipeParser, option


@dataclass
class PretrainArguments(RecipeArguments):
    """The text of pre-training, its blocks, and a vocabulary of its own."""

    text_column: str = option("text", "Column of the text.")
    block_size: int = option(4096, "Tokens per row.")
    tokenizer_vocab_size: int | None = option(None, "Learn a tokenizer of this size from the training data.")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [self.tokenizer_vocab_size, self.tokenizer_name_or_path or self.model_name_or_path]
        if sum(value is not None for value in given) != 1:
            raise ValueError(
                "Give one of tokenizer_vocab_size and tokenizer_name_or_path (or a checkpoint, model_name_or_path)"
            )


def get_tokenizer(
    arguments: PretrainArguments, training: TrainingArguments, texts: Dataset
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that the arguments name, or learn one from `texts`.

    A resumed run takes the learnt one from output_dir/tokenizer, or from the checkpoint that it is given.
    """
    if arguments.tokenizer_vocab_size is None:
        return run.load_tokenizer(arguments)
    folder, resumed = Path(training.output_dir, "tokenizer"), run.checkpoint_to_resume(training)
    if isinstance(resumed, str):
        return AutoTokenizer.from_pretrained(resumed)
    with training.main_process_first(desc="tokenizer"):
        if training.should_save and not resumed:
            rows = (batch[arguments.text_column] for batch in texts.iter(batch_size=1000))
            GrinMoeTokenizer.train_from_iterator(rows, arguments.tokenizer_vocab_size).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def get_config(arguments: PretrainArguments, tokenizer: PreTrainedTokenizerBase) -> GrinMoeConfig:
    """Load the checkpoint's configuration, or make one for the tokenizer, with `model_config` applied."""
    if arguments.model_name_or_path is not None:
        return run.load_config(arguments)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return GrinMoeConfig(**{"vocab_size": len(tokenizer), **special, **arguments.config_overrides})


def pack(texts: Dataset, column: str, tokenizer: PreTrainedTokenizerBase, block_size: int) -> Dataset:
    """Cut texts into rows of `block_size` tokens. Of each thousand texts the last tokens, which fill no row, go."""

    def tokenize_and_cut(batch: dict) -> dict:
        encoded = tokenizer(batch[column], verbose=False)["input_ids"]
        stream = list(chain.from_iterable([*ids, tokenizer.eos_token_id] for ids in encoded))
        rows = [stream[i : i + block_size] for i in range(0, len(stream) - block_size + 1, block_size)]
        # With labels of their own: a collator that makes them would mask <|endoftext|>, which is also the padding.
        return {"input_ids": rows, "labels": rows}

    return texts.map(tokenize_and_cut, batched=True, remove_columns=texts.column_names, desc="Packing")


def parse(argv: list[str] | None = None) -> tuple[PretrainArguments, TrainingArguments]:
    """Read the command line, and the YAML file that `--config` names."""
    return RecipeParser(PretrainArguments, TrainingArguments, description=__doc__).parse_args_and_config(argv)


def main(argv: list[str] | None = None) -> None:
    """Check, load, train, and leave the model in the released layout in output_dir."""
    with run.exit_on_error():
        arguments, training = parse(argv)
        set_seed(training.seed)

        def select(dataset: Dataset, name: str) -> Dataset:
            """Keep the column of the text."""
            data_checks.check_columns(dataset, [arguments.text_column], name)
            data_checks.check_kinds(dataset, [arguments.text_column], name)
            return dataset.select_columns(arguments.text_column)

        train_texts, eval_texts = run.load_train_and_eval(arguments, training, select)
        tokenizer = get_tokenizer(arguments, training, train_texts)
        config = get_config(arguments, tokenizer)
        data_checks.check_tokenizer(tokenizer, config)
        data_checks.check_sequence_length(arguments.block_size, config, "block_size")
        with training.main_process_first(desc="packing"):
            rows, eval_rows = (
                None if texts is None else pack(texts, arguments.text_column, tokenizer, arguments.block_size)
                for texts in (train_texts, eval_texts)
            )
        for packed, name in ((rows, "train_data"), (eval_rows, "evaluation data")):
            if packed is not None:
                cut = f"{name}, cut into rows of block_size={arguments.block_size} tokens,"
                data_checks.check_columns(packed, [], cut)
        layout = run.distributed_config_from_accelerate(training, arguments.pipeline_parallel_size)
        if arguments.model_name_or_path is not None:
            model = run.load_model(arguments, config, layout)
        else:
            model = run.make_model(arguments, config, training, layout)
            model.generation_config.eos_token_id = tokenizer.stop_token_ids
        trainer = GrinMoeTrainer(
            model=model,
            args=training,
            train_dataset=rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            data_collator=default_data_collator,
            exact_balance=arguments.exact_balance,
        )

    if arguments.pipeline_parallel_size == 1:
        trainer.add_callback(RoutingCallback(trainer))
    run_to_the_end(trainer, arguments, "pretraining")


if __name__ == "__main__":
    record(main)()  # a launcher then reports the error of the rank that failed
