"""Write a checkpoint: streamed, in a folder beside the destination, which takes its name when it is complete.

Killed at any moment, a conversion leaves no destination or a whole one, and beside it what `resume` continues from.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from modeling_grin.files import replacing, write_whole
from modeling_grin.safetensors_header import encode_header

from .forms import Groups
from .headers import INDEX_FILE
from .tensors import DTYPE_NAMES, ConversionError, StoredTensor, is_finite

LOCK = "lock"  # held by the process that writes in the folder
PLAN = "plan.json"  # what is made of what: only the same conversion is continued
RESULT = "result"

Output = tuple[torch.Tensor, list[StoredTensor]]
"""A tensor to be written, without memory, and the parts that follow one another in its bytes."""
Progress = Callable[[int, int], None]
"""Called with the bytes that have been written since the last call, and with those in all."""


def incomplete_folder(destination: Path) -> Path:
    """Return where `destination` is made."""
    return destination.with_name(f".{destination.name}.incomplete")


@contextmanager
def locked(destination: Path) -> Iterator[Path]:
    """Create `incomplete_folder` if it is absent, and lock it for this process. A killed process loses its lock."""
    folder = incomplete_folder(destination)
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = (folder / LOCK).open("w")
        except FileNotFoundError:  # another process has finished and removed the folder since
            continue
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed
            except BlockingIOError as error:
                raise ConversionError(f"{destination} is being made by another process: let it end") from error
            if (folder / LOCK).exists() and os.path.samestat(os.fstat(lock.fileno()), (folder / LOCK).stat()):
                yield folder
                return


@contextmanager
def staged(destination: Path, plan: dict[str, Any], resume: bool) -> Iterator[Path]:
    """Yield where to make `destination`: a path that gets its name at the end of the block, if nothing was raised.

    An error leaves nothing behind; a kill, or Ctrl-C, leaves what has been done, in `.{name}.incomplete` beside it,
    and so does a full disk when that is continued.

    Args:
        plan: everything that the result depends on, in JSON.
        resume: continue what an interrupted conversion with the same plan has left.
    """
    with locked(destination) as folder:
        was_interrupted = (folder / PLAN).exists()
        if was_interrupted:
            if not resume:
                raise ConversionError(f"{folder} was interrupted: continue it with --resume, or delete it")
            begun = json.loads((folder / PLAN).read_text(encoding="utf-8"))
            as_json = json.loads(json.dumps(plan))  # tuples are lists there
            if changed := [key for key, value in as_json.items() if begun.get(key) != value]:
                others = " and ".join(changed)
                raise ConversionError(f"{folder} was begun with another {others}: delete it, and start anew")
        elif not is_free(destination):  # the process that had the lock before has made it
            shutil.rmtree(folder)
            raise ConversionError(f"{destination} has just been made by another process: nothing was left to do")
        try:
            write_whole(folder / PLAN, json.dumps(plan))
            yield folder / RESULT
        except Exception as error:
            is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            if not (is_full and was_interrupted):
                shutil.rmtree(folder)
            if is_full:
                raise ConversionError(f"{destination}: the disk is full: {error}") from error
            raise
        publish(folder / RESULT, destination)
        shutil.rmtree(folder)


def publish(result: Path, destination: Path) -> None:
    """Give a file or folder its name; never replace another that has appeared there."""
    try:
        if result.is_dir():
            result.rename(destination)  # fails for a folder with something in it
        else:
            os.link(result, destination)  # a rename would replace what is there
    except OSError as error:
        if destination.exists():
            advice = f"move it away, and give {result}, which is complete, its name"
            raise ConversionError(f"{destination} has appeared meanwhile: {advice}") from error
        result.rename(destination)  # on a disk without hard links


def check_destination(destination: Path, source: Path) -> None:
    """Raise ConversionError unless `destination` can be made; a folder may replace an empty folder."""
    if source in (destination, *destination.parents):
        raise ConversionError(f"the destination {destination} lies in the source: give another one")
    if not is_free(destination):
        left = incomplete_folder(destination)
        also = f"; {left}, which an interrupted conversion has left, can be deleted" if left.exists() else ""
        raise ConversionError(f"{destination} exists: give another destination, or move it away{also}")


def is_free(destination: Path) -> bool:
    """Whether there is nothing, or an empty folder."""
    return not destination.exists() or (destination.is_dir() and not any(destination.iterdir()))


def fingerprint(path: Path) -> list[tuple[str, int, int]]:
    """Return names, sizes and times of a folder's files, or a file's: a resumed source must still be the same."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [(os.path.relpath(file, path), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def check_space(path: Path, nbytes: int) -> None:
    """Raise OSError unless a file or folder of `nbytes` fits the disk, together with what is there of it."""
    present = sum(file.stat().st_blocks * 512 for file in [path, *path.glob("*")] if file.exists())
    free = shutil.disk_usage(path if path.is_dir() else path.parent).free
    if free + present < nbytes:
        missing = f"{(nbytes - present) / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
        raise OSError(errno.ENOSPC, missing)


def checked_chunks(tensor: StoredTensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Yield the chunks of `tensor` in `dtype`; raise ConversionError for values that are not finite in either."""
    for chunk in tensor.chunks():
        if not is_finite(chunk):
            raise ConversionError(f"{tensor.where} holds NaN or infinite values: the checkpoint is damaged")
        cast = chunk.to(dtype)
        if cast is not chunk and not is_finite(cast):
            largest = chunk.abs().max().item()
            raise ConversionError(f"{tensor.where} holds {largest:g}, beyond the range of {dtype}: use bfloat16")
        yield cast


def outputs(groups: Groups, tensors: Mapping[str, StoredTensor], dtype: torch.dtype | None) -> dict[str, Output]:
    """Return the tensors of a form, made of the released ones."""
    made = {}
    for name, (shape, parts) in groups.items():
        stored = [tensors[part] for part in parts]
        if dtype is None and len(dtypes := {part.dtype for part in stored}) > 1:
            raise ConversionError(f"{name} would be made of {', '.join(map(str, dtypes))}: choose one with --dtype")
        made[name] = torch.empty(shape, dtype=dtype or stored[0].dtype, device="meta"), stored
    return made


def write_safetensors(made: Mapping[str, Output], folder: Path, max_shard_size: int | str, progress: Progress) -> None:
    """Write safetensors files as `save_pretrained` names and splits them; files that are there are complete."""
    tensors = {name: tensor for name, (tensor, _) in made.items()}
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    total = sum(tensor.nbytes for tensor in tensors.values())
    for file_name, names in split.filename_to_tensors.items():
        if (folder / file_name).exists():
            progress(sum(tensors[name].nbytes for name in names), total)
            continue
        with replacing(folder / file_name) as part:
            write_file({name: made[name] for name in names}, part, lambda nbytes: progress(nbytes, total))
    if split.is_sharded:
        metadata = {"total_parameters": sum(tensor.numel() for tensor in tensors.values()), "total_size": total}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        write_whole(folder / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_file(made: Mapping[str, Output], path: Path, advance: Callable[[int], None]) -> None:
    """Write one safetensors file, chunk by chunk; safetensors itself writes whole tensors only."""
    header: dict[str, Any] = {}
    end = 0
    for name, (tensor, _) in made.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
    with path.open("wb") as file:
        file.write(encode_header(header))
        for tensor, parts in made.values():
            for part in parts:
                for chunk in checked_chunks(part, tensor.dtype):
                    file.write(chunk.view(torch.uint8).numpy().data)
                    advance(chunk.nbytes)
