"""What can be known to go wrong before a training run starts: one small function and one clear sentence each.

Every `check_` returns nothing, or raises ValueError.
"""

import reprlib
from collections.abc import Iterable, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

IGNORED = -100  # the label of a token without loss, as in torch's cross_entropy


def check_dataset(dataset: Dataset, columns: Sequence[str], name: str) -> None:
    """Raise unless `dataset` (called `name` in the message) has rows and all of `columns`."""
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty")
    if missing := [column for column in columns if column not in dataset.column_names]:
        raise ValueError(f"{name} has no column {', '.join(missing)}; its columns are {sorted(dataset.column_names)}")


def is_text(dataset: Dataset, column: str) -> bool:
    """Whether a column of `dataset` holds strings."""
    return getattr(dataset.features[column], "dtype", None) in ("string", "large_string")


def check_text(dataset: Dataset, columns: Sequence[str], name: str) -> None:
    """Raise unless each of `columns` of a dataset as it was loaded holds text, in every row."""
    for column in columns:
        if not is_text(dataset, column):
            raise ValueError(f"{name}: column {column} holds {dataset.features[column]}, and must hold text")
        if dataset.data.column(column).null_count:  # known without reading the rows
            row = dataset.data.column(column).is_null().index(True).as_py()
            raise ValueError(f"{name}, row {row}: {column} is null, and must be text")


def check_messages(dataset: Dataset, columns: Sequence[str], name: str) -> None:
    """Raise unless each of `columns` holds a conversation, in every row: a list of messages with role and content."""
    for column in columns:
        for row, messages in enumerate(dataset[column]):
            if not (messages and isinstance(messages, list) and all(map(_is_message, messages))):
                raise ValueError(
                    f"{name}, row {row}: {column} is {reprlib.repr(messages)}, and must be a list of messages, each "
                    "with role and content as text"
                )


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def check_text_or_messages(dataset: Dataset, columns: Sequence[str], name: str) -> None:
    """Raise unless all of `columns` hold text, or all hold conversations, in every row."""
    text = [column for column in columns if is_text(dataset, column)]
    if text and (others := [column for column in columns if column not in text]):
        raise ValueError(
            f"{name}: {' and '.join(text)} holds text and {' and '.join(others)} does not: make all of them text, or "
            "all of them lists of messages"
        )
    (check_text if text else check_messages)(dataset, columns, name)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Raise unless every token has an embedding, and both agree on the ids of bos, eos and pad where both have one."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise ValueError(
            f"The tokenizer has ids up to {largest}, the model's vocab_size is {config.vocab_size}: "
            "take the tokenizer the model was trained with, or resize the embeddings"
        )
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ours, theirs = getattr(tokenizer, field), getattr(config, field)
        known = theirs if isinstance(theirs, list) else [theirs]
        if ours is not None and theirs is not None and ours not in known:
            raise ValueError(
                f"{field} is {ours} ({tokenizer.convert_ids_to_tokens(ours)}) in the tokenizer and {theirs} in the "
                "model's config: take the tokenizer the model was trained with, or set it in model_config"
            )


def check_sequence_length(length: int, config: PreTrainedConfig, field: str) -> None:
    """Raise if sequences of `length` tokens, the value of the argument `field`, exceed the model's context."""
    if length > config.max_position_embeddings:
        raise ValueError(
            f"{field}={length} is longer than the model's context of "
            f"max_position_embeddings={config.max_position_embeddings} tokens"
        )


def check_longest(lengths: Iterable[int], config: PreTrainedConfig, name: str) -> None:
    """Raise if one of `lengths`, in tokens, of the rows of the data called `name` exceeds the model's context."""
    for row, length in enumerate(lengths):
        if length > config.max_position_embeddings:
            raise ValueError(
                f"{name}, row {row}: {length} tokens are more than the model's context of "
                f"max_position_embeddings={config.max_position_embeddings}; set max_length to cut them"
            )


def check_assistant_turns(dataset: Dataset, name: str, column: str = "messages") -> None:
    """Raise if a chat in `column` has no turn of the assistant: with a loss on those only, it has nothing to learn."""
    for row, messages in enumerate(dataset[column]):
        if not any(message["role"] == "assistant" for message in messages):
            raise ValueError(
                f"{name}, row {row}: no assistant turn in {column}, so assistant_only_loss masks all its labels; "
                "remove such rows, or set assistant_only_loss to false"
            )


def check_labels(dataset: Dataset, name: str) -> None:
    """Raise if no token of the tokenized `dataset` (column `labels`) has a loss. The first of a row never has."""
    if not any(label != IGNORED for labels in dataset["labels"] for label in labels[1:]):
        raise ValueError(
            f"{name}: all labels are masked, so there is nothing to learn; max_length may be too short for the "
            "prompts, or the loss be asked for on turns that are not there"
        )


def check_preference_routing(config: PreTrainedConfig, *, dropout_is_disabled: bool = True) -> None:
    """Raise unless two passes in training compute alike, so that log-ratios carry no noise.

    Args:
        dropout_is_disabled: as by trl's `disable_dropout`, which reaches the experts' dropout and not attention's.
    """
    noise: dict[str, Any] = {"router_sampling": False, "input_jitter_noise": 0, "attention_dropout": 0}
    if not dropout_is_disabled:
        noise["expert_dropout"] = 0
    for field, none in noise.items():
        if (value := getattr(config, field)) != none:
            raise ValueError(
                f"{field}={value} is at odds with preference training, whose log-ratios would carry its noise; "
                f"set {field}={none} in the model's config"
            )


def check_frozen_router(config: PreTrainedConfig, *, lora_router: bool) -> None:
    """Raise if the routers are to be frozen and adapted at once."""
    if config.freeze_router and lora_router:
        raise ValueError("freeze_router and lora_router are at odds: choose one")


def check_config_fields(config_class: type[PreTrainedConfig], values: dict[str, Any], name: str) -> None:
    """Raise for a key of `values`, given in the argument `name`, that is no field of the configuration class."""
    known = set(config_class.__dataclass_fields__) | set(config_class.attribute_map)
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{name}: {config_class.__name__} has no field {', '.join(unknown)}")
