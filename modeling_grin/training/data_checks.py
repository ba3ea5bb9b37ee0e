"""Checks of data, tokenizers and configs before a run: each `check_` passes, or raises ValueError."""

import reprlib
from collections.abc import Sequence
from typing import Any

from datasets import Dataset, LargeList, List
from pyarrow.compute import list_flatten, min_max
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..routing_grinmoe import noise_settings


def check_columns(dataset: Dataset, columns: Sequence[str], name: str) -> None:
    """Require rows and all of `columns`; `name` is what errors call the dataset."""
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty")
    if missing := [column for column in columns if column not in dataset.column_names]:
        raise ValueError(f"{name} has no column {', '.join(missing)}; its columns are {sorted(dataset.column_names)}")


def kind_of(feature: Any) -> str:
    """Return what a column seems to hold: `text`, `messages` (lists), or else its feature."""
    if getattr(feature, "dtype", None) in ("string", "large_string"):
        return "text"
    return "messages" if isinstance(feature, (list, List, LargeList)) else str(feature)


def is_conversation(messages: Any) -> bool:
    """Return whether a value is a list of messages, each with `role` and `content` as text."""
    return bool(messages) and isinstance(messages, list) and all(
        isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in messages
    )  # fmt: skip


def check_kinds(dataset: Dataset, columns: Sequence[str], name: str, allowed: Sequence[str] = ("text",)) -> None:
    """Require one of the kinds `allowed`, the same in all of `columns`, in every row of a dataset as it was loaded."""
    kinds = {column: kind_of(dataset.features[column]) for column in columns}
    if len({*kinds.values()}) > 1 or not {*kinds.values()} <= {*allowed}:
        found = ", ".join(f"{kind} in {column}" for column, kind in kinds.items())
        raise ValueError(f"{name} must hold {' or '.join(allowed)} in {' and '.join(columns)}; got {found}")
    for column, kind in kinds.items():
        if kind == "text" and not dataset.data.column(column).null_count:  # known without reading the rows
            continue
        is_right, rule = (
            (lambda value: isinstance(value, str), "text")
            if kind == "text"
            else (is_conversation, "a list of messages, each with role and content as text")
        )
        for row, value in enumerate(dataset[column]):
            if not is_right(value):
                raise ValueError(f"{name}, row {row}: {column} must be {rule}; got {reprlib.repr(value)}")


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


def check_sequence_length(length: int | None, config: PreTrainedConfig, field: str) -> None:
    """Require that sequences of `length` tokens, the value of the argument `field`, fit the model's context."""
    if length is not None and length > config.max_position_embeddings:
        raise ValueError(
            f"{field}={length} is longer than the model's context of "
            f"max_position_embeddings={config.max_position_embeddings} tokens"
        )


def check_rows(dataset: Any, config: PreTrainedConfig, name: str) -> None:
    """Require an embedding for all `input_ids` of a tokenized `datasets.Dataset`; let other data pass."""
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        return
    for table in dataset.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=10_000):
        found = min_max(list_flatten(table["input_ids"])).as_py()
        if found["max"] is not None:
            check_token_ids(found["min"], found["max"], config, f"input_ids of {name}")


def check_longest(dataset: Dataset, columns: Sequence[str], config: PreTrainedConfig, name: str) -> None:
    """Require that rows of tokens, `columns` one after the other, fit the model's context."""
    for row, parts in enumerate(zip(*(dataset[column] for column in columns), strict=True)):
        if (length := sum(map(len, parts))) > config.max_position_embeddings:
            raise ValueError(
                f"{name}, row {row}: {length} tokens are more than the model's context of "
                f"max_position_embeddings={config.max_position_embeddings}; set max_length to cut them"
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
