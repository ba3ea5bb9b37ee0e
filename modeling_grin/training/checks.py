"""What can be known to go wrong before a training run starts: one small function and one clear sentence each.

Every function returns nothing, or raises ValueError.
"""

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


def check_preference_routing(config: PreTrainedConfig) -> None:
    """Raise unless two passes in training route alike, so that log-ratios carry no routing noise."""
    for field, greedy in (("router_sampling", False), ("input_jitter_noise", 0), ("attention_dropout", 0)):
        if (value := getattr(config, field)) != greedy:
            raise ValueError(
                f"{field}={value} is at odds with preference training, whose log-ratios would carry its noise; "
                f"set {field}={greedy} in the model's config"
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
