"""Checks of data, tokenizers and configs before a run: each `check_` passes, or raises ValueError."""

import reprlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from datasets import Dataset
from pyarrow.compute import min_max
from pyarrow.types import is_large_list, is_list
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..routing_grinmoe import noise_settings

IGNORED = -100  # label of a token without loss, as in torch's cross_entropy


def check_columns(dataset: Dataset, columns: Sequence[str], name: str) -> None:
    """Require rows and all of `columns`; `name` is what errors call the dataset."""
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty")
    if missing := [column for column in columns if column not in dataset.column_names]:
        raise ValueError(f"{name} has no column {', '.join(missing)}; its columns are {sorted(dataset.column_names)}")


def is_text(dataset: Dataset, column: str) -> bool:
    """Return whether a column holds strings."""
    return getattr(dataset.features[column], "dtype", None) in ("string", "large_string")


def check_text(dataset: Dataset, columns: Sequence[str], name: str) -> None:
    """Require text in every row of each of `columns`, in a dataset as it was loaded."""
    for column in columns:
        if not is_text(dataset, column):
            raise ValueError(f"{name}: column {column} must hold text; got {dataset.features[column]}")
        if dataset.data.column(column).null_count:  # known without reading the rows
            row = dataset.data.column(column).is_null().index(True).as_py()
            raise ValueError(f"{name}, row {row}: {column} must be text; got null")


def check_rows(
    dataset: Dataset, columns: Sequence[str], name: str, is_right: Callable[[Any], bool], rule: str
) -> None:
    """Require `is_right` of every row of each of `columns`; errors quote `rule`."""
    for column in columns:
        for row, value in enumerate(dataset[column]):
            if not is_right(value):
                raise ValueError(f"{name}, row {row}: {column} {rule}; got {reprlib.repr(value)}")


def is_conversation(messages: Any) -> bool:
    """Return whether a value is a list of messages, each with `role` and `content` as text."""
    return bool(messages) and isinstance(messages, list) and all(
        isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in messages
    )  # fmt: skip


def check_messages(dataset: Dataset, columns: Sequence[str], name: str) -> None:
    """Require a conversation in every row of each of `columns`."""
    rule = "must be a list of messages, each with role and content as text"
    check_rows(dataset, columns, name, is_conversation, rule)


def check_assistant_turns(dataset: Dataset, name: str) -> None:
    """Require an assistant turn in every row of `messages`: a loss on those turns alone needs one."""
    check_rows(
        dataset, ["messages"], name, lambda messages: any(message["role"] == "assistant" for message in messages),
        "must have an assistant turn, or assistant_only_loss masks all its labels",
    )  # fmt: skip


def check_text_or_messages(dataset: Dataset, columns: Sequence[str], name: str) -> None:
    """Require text in all of `columns`, or conversations in all of them."""
    text = [column for column in columns if is_text(dataset, column)]
    if text and (others := [column for column in columns if column not in text]):
        raise ValueError(
            f"{name}: {' and '.join(text)} holds text and {' and '.join(others)} does not; make all of them text, or "
            "all of them lists of messages"
        )
    (check_text if text else check_messages)(dataset, columns, name)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Require an embedding for every token of the tokenizer."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {largest}, the model's vocab_size is {config.vocab_size}: "
            f"take the tokenizer the model was trained with, or call model.resize_token_embeddings({largest + 1})"
        )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Require an embedding for every token, and the same bos, eos and pad ids where both name them."""
    check_vocabulary(tokenizer, config)
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ours, theirs = getattr(tokenizer, field), getattr(config, field)
        known = theirs if isinstance(theirs, list) else [theirs]
        if ours is not None and theirs is not None and ours not in known:
            raise ValueError(
                f"{field} is {ours} ({tokenizer.convert_ids_to_tokens(ours)}) in the tokenizer and {theirs} in the "
                "model's config: take the tokenizer the model was trained with, or set it in model_config"
            )


def check_token_ids(smallest: int, largest: int, config: PreTrainedConfig, name: str) -> None:
    """Require an embedding for the token ids called `name`, which reach from `smallest` to `largest`."""
    if smallest < 0 or largest >= config.vocab_size:
        raise ValueError(
            f"{name} must be ids from 0 to {config.vocab_size - 1} (vocab_size - 1); got ids from {smallest} to "
            f"{largest}: take the tokenizer the model was trained with, or resize the embeddings"
        )


def check_dataset_ids(dataset: Any, config: PreTrainedConfig, name: str) -> None:
    """Require an embedding for all `input_ids` of a tokenized `datasets.Dataset`; let other data pass."""
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        return
    for table in dataset.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=10_000):
        for rows in table["input_ids"].chunks:
            found = min_max(rows.flatten() if is_list(rows.type) or is_large_list(rows.type) else rows).as_py()
            if found["max"] is not None:
                check_token_ids(found["min"], found["max"], config, f"input_ids of {name}")


def check_sequence_length(length: int, config: PreTrainedConfig, field: str) -> None:
    """Require that sequences of `length` tokens, the value of the argument `field`, fit the model's context."""
    if length > config.max_position_embeddings:
        raise ValueError(
            f"{field}={length} is longer than the model's context of "
            f"max_position_embeddings={config.max_position_embeddings} tokens"
        )


def check_longest(lengths: Iterable[int], config: PreTrainedConfig, name: str) -> None:
    """Require that rows of `lengths` tokens fit the model's context."""
    for row, length in enumerate(lengths):
        if length > config.max_position_embeddings:
            raise ValueError(
                f"{name}, row {row}: {length} tokens are more than the model's context of "
                f"max_position_embeddings={config.max_position_embeddings}; set max_length to cut them"
            )


def check_labels(dataset: Dataset, name: str) -> None:
    """Require a token with a loss in the tokenized `dataset`; the first token of a row never has one."""
    if not any(label != IGNORED for labels in dataset["labels"] for label in labels[1:]):
        raise ValueError(
            f"{name}: all labels are masked, so there is nothing to learn; max_length may be too short for the "
            "prompts, or the loss be asked for on turns that are not there"
        )


def check_preference_routing(config: PreTrainedConfig, *, dropout_is_disabled: bool = True) -> None:
    """Require that equal passes in training compute alike, so that ratios, margins and KL carry no noise.

    Args:
        dropout_is_disabled: by trl's `disable_dropout`, which reaches the experts' dropout and not the attention's.
    """
    settings = noise_settings(config)
    dropouts = ("attention_dropout",) if dropout_is_disabled else ("attention_dropout", "expert_dropout")
    settings |= {field: 0 for field in dropouts if getattr(config, field) > 0}
    if settings:
        values = ", ".join(f"{field}={getattr(config, field)}" for field in settings)
        raise ValueError(
            f"{values} is at odds with losses that compare two forward passes, which would carry its noise: set "
            f"{', '.join(f'{field}={value}' for field, value in settings.items())} in the model's config"
        )
