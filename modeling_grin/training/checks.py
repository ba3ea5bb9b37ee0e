"""What can be known to go wrong before a training run starts: one small function and one clear sentence each.

Every `check_` returns nothing, or raises ValueError.
"""

import inspect
import random
import reprlib
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from pyarrow.compute import min_max
from pyarrow.types import is_large_list, is_list
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.trainer_pt_utils import safe_globals

from ..routing_grinmoe import noise_settings

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


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Raise unless every token of the tokenizer has an embedding."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise ValueError(
            f"The tokenizer has ids up to {largest}, the model's vocab_size is {config.vocab_size}: "
            f"take the tokenizer the model was trained with, or call model.resize_token_embeddings({largest + 1})"
        )


def check_token_ids(smallest: int, largest: int, config: PreTrainedConfig, name: str) -> None:
    """Raise unless the ids of the tokens called `name`, from `smallest` to `largest`, all have an embedding."""
    if smallest < 0 or largest >= config.vocab_size:
        raise ValueError(
            f"{name} must be ids from 0 to {config.vocab_size - 1} (vocab_size - 1); got ids from {smallest} to "
            f"{largest}: take the tokenizer the model was trained with, or resize the embeddings"
        )


def check_dataset_ids(dataset: Any, config: PreTrainedConfig, name: str) -> None:
    """Raise unless all `input_ids` of a tokenized `datasets.Dataset` have an embedding; other data is let pass."""
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        return
    for table in dataset.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=10_000):
        for rows in table["input_ids"].chunks:
            found = min_max(rows.flatten() if is_list(rows.type) or is_large_list(rows.type) else rows).as_py()
            if found["max"] is not None:
                check_token_ids(found["min"], found["max"], config, f"input_ids of {name}")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Raise unless every token has an embedding, and both agree on the ids of bos, eos and pad where both have one."""
    check_vocabulary(tokenizer, config)
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
    """Raise unless equal passes in training compute alike, so that ratios, margins and KL carry no noise.

    Args:
        dropout_is_disabled: as by trl's `disable_dropout`, which reaches the experts' dropout and not attention's.
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


def check_frozen_router(config: PreTrainedConfig, *, lora_router: bool) -> None:
    """Raise if the routers are to be frozen and adapted at once."""
    if config.freeze_router and lora_router:
        raise ValueError("freeze_router and lora_router are at odds: choose one")


def check_config_fields(config_class: type[PreTrainedConfig], values: dict[str, Any], name: str) -> None:
    """Raise for a key of `values`, given in the argument `name`, that is no field of the configuration class."""
    known = set(config_class.__dataclass_fields__) | set(config_class.attribute_map)
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{name}: {config_class.__name__} has no field {', '.join(unknown)}")


# ---- Files that a run resumes from ----


def load_saved(path: Path) -> Any:
    """What `torch.save` wrote to `path`: tensors and plain values, mapped into memory."""
    try:
        with safe_globals():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError, ...
        raise ValueError(f"{path} cannot be read as tensors and plain values ({type(error).__name__})") from error


def check_optimizer_state(state: Any, optimizer: Optimizer, path: Path) -> None:
    """Raise unless `state`, of the file `path`, is of such an optimizer over the same parameters.

    torch compares the sizes of the groups alone, and its fused AdamW writes beyond moments that are too small.
    """
    try:
        saved = [list(group["params"]) for group in state["param_groups"]]
        kept = state["state"]
        assert all(isinstance(values, dict) for values in kept.values())
    except (AssertionError, AttributeError, KeyError, TypeError):
        raise ValueError(f"{path} is not an optimizer's state: take the file of a checkpoint of this run") from None
    groups = [group["params"] for group in optimizer.param_groups]
    if (sizes := [len(group) for group in saved]) != (own := [len(group) for group in groups]):
        raise ValueError(
            f"{path} has groups of {sizes} parameters and the optimizer groups of {own}: resume with the model, "
            "adapter and optimizer that wrote it, or start from the weights alone"
        )
    expected = list_moments(optimizer, state["param_groups"][0])
    for number, (index, parameter) in enumerate(zip(chain(*saved), chain(*groups), strict=True)):
        values = kept.get(index, {})
        if not values or expected is None:  # a parameter that no gradient has reached yet
            continue
        if values.keys() != expected.keys():
            raise ValueError(
                f"{path} has {', '.join(sorted(map(str, values)))} of a parameter, {type(optimizer).__name__} keeps "
                f"{', '.join(sorted(expected))}: resume with the optimizer that wrote it"
            )
        for name, value in values.items():
            shape, needed = list(getattr(value, "shape", ())), list(parameter.shape) if expected[name] else []
            if shape != needed:
                raise ValueError(
                    f"{path}: {name} of parameter {number} has shape {shape}, needed is {needed}: resume with the "
                    "model that wrote it, or start from the weights alone"
                )


def list_moments(optimizer: Optimizer, saved_group: dict[str, Any]) -> dict[str, bool] | None:
    """What an optimizer of torch's keeps of a parameter, each with whether it has the parameter's shape (else it is
    one number); None for other optimizers, and where it has other shapes."""
    optimizer_class = type(optimizer)
    if not optimizer_class.__module__.startswith("torch.optim"):
        return None
    known = set(inspect.signature(optimizer_class).parameters) - {"params", "foreach", "fused", "capturable"}
    settings = {**optimizer.param_groups[0], **saved_group}
    parameter = nn.Parameter(torch.zeros(2, 3))
    parameter.grad = torch.zeros_like(parameter)
    probe = optimizer_class([parameter], **{name: settings[name] for name in known & settings.keys()})
    probe.step()
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in probe.state[parameter].items()}
    if not set(shapes.values()) <= {(), (2, 3)}:
        return None
    return {name: shape == (2, 3) for name, shape in shapes.items()}


def check_scheduler_state(state: Any, scheduler: LRScheduler, path: Path, *, same_groups: bool = True) -> None:
    """Raise unless `state`, of the file `path`, is of such a scheduler, over as many groups if `same_groups`."""
    own = scheduler.state_dict()
    needed = {name for name in own if name == "_last_lr" or not name.startswith("_")}
    if not isinstance(state, dict) or (missing := sorted(needed - state.keys())):
        lacks = f", which keeps {', '.join(missing)}, too" if isinstance(state, dict) else ""
        raise ValueError(
            f"{path} is not the state of a {type(scheduler).__name__}{lacks}: resume with the lr_scheduler_type that "
            "wrote it"
        )
    for name in sorted(needed):
        is_list = isinstance(own[name], list)
        if is_list != isinstance(state[name], list) or (
            is_list and same_groups and len(state[name]) != len(own[name])
        ):
            raise ValueError(
                f"{path}: {name} must be {reprlib.repr(own[name])} or the like, one value for each parameter group; "
                f"got {reprlib.repr(state[name])}"
            )


def check_generators(state: Any, path: Path) -> None:
    """Raise unless `state`, of the file `path`, sets the random generators; those of this process are left alone."""
    try:
        random.Random().setstate(state["python"])
        np.random.RandomState().set_state(state["numpy"])
        torch.Generator().set_state(state["cpu"])
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"{path} is not the state of random generators ({type(error).__name__}: {error}): remove it, and the run "
            "resumes with other random numbers"
        ) from error
