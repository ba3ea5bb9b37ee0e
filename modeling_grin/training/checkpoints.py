"""Trainer's checkpoint folders: which are complete, and what the others lack.

A run that is killed while it saves leaves a folder that looks like the newest checkpoint. Files are judged by their
headers and directories, which are written first (safetensors) or last (torch.save's zip archives): a file that was cut
off anywhere is found, without reading its tensors.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import TrainerState

from ..files import check_archive
from ..loading_grinmoe import is_readable

# Checkpoints are written in here, and moved out when they are complete. The name is one that Trainer neither takes for
# a checkpoint nor uploads to the Hub (`_*`).
STAGING_FOLDER = "_incomplete"

OPTIMIZER_FOLDER = "optimizer"  # where every rank writes its part
FILE_LIST = "files.json"  # in there: the names of the files

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "*/adapter_model.safetensors",
    "pytorch_model_fsdp.bin",
    "pytorch_model_fsdp_*/.metadata",  # a sharded checkpoint's last file
)
# What Trainer saves beside the weights unless `save_only_model`.
TRAINING_STATE = {
    "optimizer.pt": ("optimizer.pt", "optimizer.bin", "optimizer_*/.metadata", f"{OPTIMIZER_FOLDER}/{FILE_LIST}"),
    "scheduler.pt": ("scheduler.pt",),
    "rng_state.pth": ("rng_state*.pth",),
}


def find_problems(checkpoint: str | os.PathLike) -> list[str]:
    """What keeps a folder from being a complete Trainer checkpoint, a few words each; none: it is complete."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return ["there is no such folder"]
    problems = []

    def has_any(patterns: tuple[str, ...]) -> bool:
        return any(True for pattern in patterns for _ in folder.glob(pattern))

    if not has_any(WEIGHTS):
        problems.append("model.safetensors (or its index, or an adapter's) is missing")
    index = folder / "model.safetensors.index.json"
    if index.is_file() and is_readable(index):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        problems += [f"{shard} is missing" for shard in sorted(shards) if not (folder / shard).is_file()]

    optimizer = folder / OPTIMIZER_FOLDER
    if (optimizer / FILE_LIST).is_file():
        try:
            parts = json.loads((optimizer / FILE_LIST).read_text(encoding="utf-8"))
            problems += [f"{OPTIMIZER_FOLDER}/{part} is missing" for part in parts if not (optimizer / part).is_file()]
        except (ValueError, RecursionError, TypeError):  # no JSON, or no list of names
            problems.append(f"{OPTIMIZER_FOLDER}/{FILE_LIST} is cut off or damaged")

    has_state = {name: has_any(patterns) for name, patterns in TRAINING_STATE.items()}
    if any(has_state.values()):  # else only the model was saved
        problems += [f"{name} is missing" for name, found in has_state.items() if not found]
    ranks = [int(match[1]) for path in folder.iterdir() if (match := re.fullmatch(r"rng_state_(\d+)\.pth", path.name))]
    if ranks:  # several processes, so two of them at least
        absent = set(range(max(2, max(ranks) + 1))) - set(ranks)
        problems += [f"rng_state_{rank}.pth is missing" for rank in sorted(absent)]

    damaged = [path for path in sorted(folder.rglob("*.safetensors*")) if not is_readable(path)]
    problems += [f"{path.relative_to(folder)} is cut off or damaged" for path in damaged]
    for path in (path for pattern in ("*.pt", "*.pth", "*.bin") for path in sorted(folder.glob(pattern))):
        try:
            check_archive(path)
        except ValueError as error:
            problems.append(f"{path.name} {error}")

    state = folder / "trainer_state.json"  # Trainer writes it last
    try:
        TrainerState.load_from_json(str(state))
    except FileNotFoundError:
        problems.append(f"{state.name} is missing")
    except (ValueError, RecursionError, TypeError, AttributeError):
        problems.append(f"{state.name} is cut off or damaged")
    return problems


def has_only_the_model(checkpoint: str | os.PathLike) -> bool:
    """Whether a complete checkpoint was saved with `save_only_model`."""
    return not any(Path(checkpoint).glob("scheduler.pt"))


def find_non_finite(checkpoint: str | os.PathLike, part: int = 0, num_parts: int = 1) -> str | None:
    """The first tensor with a NaN or infinity in a checkpoint's safetensors files, None where there is no such one.

    Args:
        part, num_parts: read every `num_parts`-th tensor only, from number `part` on.
    """
    number = 0
    for path in sorted(Path(checkpoint).glob("**/*model*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                number += 1
                if number % num_parts == part and not has_finite_values(tensors.get_tensor(name)):
                    return name
    return None


def has_finite_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor has neither a NaN nor an infinity."""
    if tensor.is_floating_point() and tensor.dtype.itemsize == 1:  # torch has no isfinite for float8
        tensor = tensor.float()
    return bool(torch.isfinite(tensor).all())


def last_complete_checkpoint(
    output_dir: str | os.PathLike,
    find: Callable[[str | os.PathLike], list[str]] = find_problems,
) -> tuple[str | None, dict[str, list[str]]]:
    """The complete checkpoint of the latest step in a run's folder, and what each incomplete one lacks.

    Args:
        find: what keeps a checkpoint from being resumed from, asked from the latest on until one has no problem.

    Returns:
        The path, None where there is none; and path -> `find_problems` of the checkpoints that are incomplete or were
        never finished.
    """
    checkpoints = {
        int(match[1]): path
        for path in Path(output_dir).glob("checkpoint-*")
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    complete, incomplete = None, {}
    for step in sorted(checkpoints, reverse=True):
        if problems := (find if complete is None else find_problems)(checkpoints[step]):
            incomplete[str(checkpoints[step])] = problems
        elif complete is None:
            complete = str(checkpoints[step])
    for path in sorted(Path(output_dir, STAGING_FOLDER).glob("checkpoint-*")):
        incomplete[str(path)] = ["saving it was interrupted"]
    return complete, incomplete
