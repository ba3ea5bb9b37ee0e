"""Trainer's checkpoint folders: which are complete, and whether their files fit the run that resumes from them.

A run that is killed while it saves leaves a folder that looks like the newest checkpoint. Completeness is judged by
headers and directories, which are written first (safetensors) or last (torch.save's zip archives): a file that was cut
off anywhere is found without reading its tensors.
"""

import json
import os
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors import safe_open
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..files import check_archive
from ..loading_grinmoe import is_readable

# Checkpoints are written in here, and moved out when they are complete. The name is one that Trainer neither takes for
# a checkpoint nor uploads to the Hub (`_*`).
STAGING_FOLDER = "_incomplete"

OPTIMIZER_FOLDER = "optimizer"  # every rank writes its part there
FILE_LIST = "files.json"  # names those files

NEEDED = {
    "model.safetensors (or its index, or an adapter's)": (
        "model.safetensors",
        SAFE_WEIGHTS_INDEX_NAME,
        "adapter_model.safetensors",
        "*/adapter_model.safetensors",
        "pytorch_model_fsdp.bin",
        "pytorch_model_fsdp_*/.metadata",  # a sharded checkpoint's last file
    ),
    TRAINER_STATE_NAME: (TRAINER_STATE_NAME,),  # Trainer writes it last
}
# Trainer saves these beside the weights unless `save_only_model`.
TRAINING_STATE = {
    "optimizer.pt": ("optimizer.pt", "optimizer.bin", "optimizer_*/.metadata", f"{OPTIMIZER_FOLDER}/{FILE_LIST}"),
    "scheduler.pt": ("scheduler.pt",),
    "rng_state.pth": ("rng_state*.pth",),
}
DAMAGED = "is cut off or damaged"
# What optimizers keep of a parameter in its shape, by torch's names.
MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg"}

# ---- Complete or not ----


def read_listed(path: Path) -> Iterable[str]:
    """Return the names of files beside `path` that it lists; raise an error of any kind if it is not whole."""
    if path.name == SAFE_WEIGHTS_INDEX_NAME:
        return json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
    if path.name == FILE_LIST:
        return iter(json.loads(path.read_text(encoding="utf-8")))
    if path.name == TRAINER_STATE_NAME:
        TrainerState.load_from_json(str(path))
    elif path.suffix in (".pt", ".pth", ".bin"):
        check_archive(path)
    elif path.suffix == ".safetensors" and not is_readable(path):
        raise ValueError(DAMAGED)
    return ()


def find_problems(checkpoint: str | os.PathLike) -> list[str]:
    """Return what keeps a folder from being a complete Trainer checkpoint, a few words each; empty if it is one."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return ["there is no such folder"]
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    def has_any(patterns: Iterable[str]) -> bool:
        return any(fnmatch(file, pattern) for file in files for pattern in patterns)

    only_the_model = not any(map(has_any, TRAINING_STATE.values()))
    needed = NEEDED if only_the_model else NEEDED | TRAINING_STATE
    missing = {name for name, patterns in needed.items() if not has_any(patterns)}
    ranks = [int(match[1]) for file in files if (match := re.fullmatch(r"rng_state_(\d+)\.pth", file))]
    if ranks:  # at least two processes
        missing |= {f"rng_state_{rank}.pth" for rank in range(max(2, max(ranks) + 1))} - files
    damaged = {}
    for file in files:
        try:
            missing |= {Path(file).with_name(name).as_posix() for name in read_listed(folder / file)} - files
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
            damaged[file] = str(error) if type(error) is ValueError else DAMAGED
    return [f"{name} is missing" for name in sorted(missing)] + [f"{file} {damaged[file]}" for file in sorted(damaged)]


def has_only_the_model(checkpoint: str | os.PathLike) -> bool:
    """Return whether a complete checkpoint was saved with `save_only_model`."""
    return not Path(checkpoint, "scheduler.pt").exists()


def find_non_finite(checkpoint: str | os.PathLike, part: int = 0, num_parts: int = 1) -> str | None:
    """Return the name of a tensor with a NaN or infinity in a checkpoint's safetensors files of weights, or None.

    Args:
        part, num_parts: read every `num_parts`-th tensor only, from number `part` on.
    """
    number = 0
    for path in sorted(Path(checkpoint).glob("**/*model*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                number += 1
                if number % num_parts != part:
                    continue
                tensor = tensors.get_tensor(name)
                # torch has no isfinite for float8.
                if not torch.isfinite(tensor.float() if tensor.dtype.itemsize == 1 else tensor).all():
                    return name
    return None


def last_complete_checkpoint(
    output_dir: str | os.PathLike,
    find: Callable[[str | os.PathLike], list[str]] = find_problems,
) -> tuple[str | None, dict[str, list[str]]]:
    """Find the complete checkpoint of the latest step in a run's folder, and what each incomplete one lacks.

    Args:
        find: returns what keeps a checkpoint from being resumed; called from the latest on until one has no problem.

    Returns:
        The path, or None; and path -> `find_problems` of the checkpoints that are incomplete or were never finished.
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


# ---- Files that fit the run ----


def check_optimizer_state(path: Path, optimizer: Optimizer) -> None:
    """Require moments of the parameters' shapes in the file of an optimizer's state.

    torch compares the sizes of the groups alone, and its fused AdamW writes beyond moments that are too small.
    """
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(parameters):
        for name in MOMENTS & state.get(index, {}).keys():
            value = state[index][name]
            if isinstance(value, torch.Tensor) and value.shape != parameter.shape:
                raise ValueError(
                    f"{path}: {name} of parameter {index} must have shape {list(parameter.shape)}; got "
                    f"{list(value.shape)}: resume with the model that wrote it, or start from the weights alone"
                )


def load_scheduler_state(path: Path, scheduler: LRScheduler) -> dict:
    """Read the file of a scheduler's state; raise ValueError if it is of another kind of scheduler."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if missing := sorted({name for name in scheduler.state_dict() if not name.startswith("_")} - state.keys()):
        raise ValueError(
            f"{path} is not the state of a {type(scheduler).__name__}; it lacks {', '.join(missing)}: resume with the "
            "lr_scheduler_type that wrote it"
        )
    return state
