"""Read local files and datasets of the Hub, and batch their tokens."""

import glob
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

FORMATS = {  # of local files, by suffix
    ".jsonl": "json", ".json": "json", ".parquet": "parquet",
    **dict.fromkeys((".txt", ".md", ".rst", ".py"), "text"),
}  # fmt: skip
MAX_PIECE = 2**18  # characters tokenized at once


def find_files(name: str) -> list[str]:
    """Find the local data files of `name`, a file, folder or glob; none if it may be a name on the Hub.

    Raises:
        ValueError: `name` is a path that does not exist, or a folder or glob without data files.
    """
    path = Path(name)
    if path.is_file():
        return [name]
    if path.is_dir():
        files = [str(file) for file in sorted(path.rglob("*")) if file.is_file() and file.suffix in FORMATS]
    elif glob.has_magic(name):
        files = sorted(file for file in glob.glob(name, recursive=True) if Path(file).is_file())
    elif path.suffix in FORMATS or path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise ValueError(f"{name}: no such file or folder")
    else:
        return []
    if not files:
        raise ValueError(f"{name}: no data files in it; these are read: {', '.join(FORMATS)}")
    return files


def load_data(
    name: str,
    *,
    split: str | None = None,
    config: str | None = None,
    default_split: str = "train",
    streaming: bool = False,
) -> "Dataset | IterableDataset":
    """Load the rows of local files, or of a dataset on the Hub if there is no such file.

    Args:
        name: a file, folder or glob, or a name on the Hub.
        split, config: of a dataset on the Hub.
        default_split: of a dataset on the Hub, where `split` is None.
        streaming: read rows on demand, without a copy in the cache of `datasets`.

    Raises:
        ValueError: there are no files, their formats differ or are unknown, they cannot be read, or a split or
            configuration is given for local files.
    """
    from datasets import load_dataset

    files = find_files(name)
    if not files:
        try:
            return load_dataset(name, config, split=split or default_split, streaming=streaming)
        except Exception as error:  # of many types: not found, no connection, unknown split or configuration
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{name}: no such file or folder here, and as a dataset of the Hub: {reason}") from error
    if split or config:
        raise ValueError(f"{name}: splits and configurations are of datasets on the Hub, and this is a local file")
    if unknown := [file for file in files if Path(file).suffix not in FORMATS]:
        raise ValueError(f"{unknown[0]}: unknown format; these are read: {', '.join(FORMATS)}")
    builder, *others = sorted({FORMATS[Path(file).suffix] for file in files})
    if others:
        raise ValueError(f"{name} holds files of several formats ({builder}, {', '.join(others)}); give a glob of one")
    if not any(Path(file).stat().st_size for file in files):
        raise ValueError(f"{name} is empty")
    settings = {"sample_by": "document"} if builder == "text" else {}
    try:
        return load_dataset(builder, data_files=files, split="train", streaming=streaming, **settings)
    except Exception as error:  # of many types; the cause tells
        raise ValueError(f"{name} cannot be read as {builder}: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """The first line of an error of `datasets`, or of its cause."""
    return (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]


def stream_data(name: str) -> Iterator[dict[str, Any]]:
    """Read the rows of `load_data` one at a time; a dataset of the Hub may be NAME:CONFIG:SPLIT.

    Raises:
        ValueError: as `load_data`, or a row cannot be read.
    """
    dataset, config, split = [*name.split(":"), "", ""][:3] if not Path(name).exists() else (name, "", "")
    rows = load_data(dataset, config=config or None, split=split, streaming=True)
    try:
        yield from rows
    except Exception as error:
        raise ValueError(f"{name} cannot be read: {reason_of(error)}") from error


def split_text(text: str) -> Iterator[str]:
    """Cut a text into pieces of at most MAX_PIECE characters, after a line if possible."""
    start = 0
    while len(text) - start > MAX_PIECE:
        end = text.rfind("\n", start, start + MAX_PIECE) + 1 or start + MAX_PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def tokenize(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, name: str) -> Iterator[list[int]]:
    """Tokenize a row's `messages` by the chat template, or its `text` piece by piece."""
    if row.get("messages") is not None:
        if tokenizer.chat_template is None:
            raise ValueError(f"{name} has rows with messages, and the tokenizer has no chat template for them")
        yield tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]
    elif isinstance(text := row.get("text"), str):
        for number, piece in enumerate(split_text(text)):
            yield tokenizer(piece, add_special_tokens=number == 0, verbose=False)["input_ids"]
    else:
        raise ValueError(f"{name} has a row with neither messages nor text; its columns are {sorted(row)}")


def token_rows(
    name: str, tokenizer: PreTrainedTokenizerBase, sequence: int, max_tokens: int | None = None
) -> Iterator[tuple[list[int], bool]]:
    """Tokenize the texts and conversations of `stream_data`, in rows of at most `sequence` tokens.

    A longer text takes several rows, and no row holds two texts; each row comes with whether it starts one. Only one
    text is in memory at a time.

    Args:
        name: as in `stream_data`; rows have `messages`, for the chat template, or `text`.
        max_tokens: of all rows together; the last row is cut short.

    Raises:
        ValueError: the data cannot be read, or have neither `messages` nor `text`.
    """
    left, seen = max_tokens, False
    for row in stream_data(name):
        ids = chain.from_iterable(tokenize(row, tokenizer, name))
        starts_text = True
        while piece := list(islice(ids, sequence if left is None else min(sequence, left))):
            yield piece, starts_text
            seen, starts_text = True, False
            left = None if left is None else left - len(piece)
        if left == 0:
            return
    if not seen:
        raise ValueError(f"{name}: there is no text in it")


def batched(rows: Iterable[tuple[list[int], bool]], batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batch the rows of `token_rows`: model inputs `[batch, sequence]`, padded on the right, and `starts` `[batch]`,
    whether a row starts a text."""
    rows = iter(rows)
    while batch := list(islice(rows, batch_size)):
        length = max(len(ids) for ids, _ in batch)
        yield {
            "input_ids": torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in batch]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in batch]),
            "starts": torch.tensor([starts for _, starts in batch]),
        }
