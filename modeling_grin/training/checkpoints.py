"""Trainer's checkpoint folders: which are complete, and which files fit the run that resumes from them.

A run that is killed while it saves leaves a folder that looks like the newest checkpoint. Completeness is judged by
headers and directories, which are written first (safetensors) or last (torch.save's zip archives): a file that was cut
off anywhere is found without reading its tensors.
"""

import inspect
import json
import os
import random
import re
import reprlib
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from ..files import check_archive
from ..loading_grinmoe import is_readable

# Checkpoints are written in here, and moved out when they are complete. The name is one that Trainer neither takes for
# a checkpoint nor uploads to the Hub (`_*`).
STAGING_FOLDER = "_incomplete"

OPTIMIZER_FOLDER = "optimizer"  # every rank writes its part there
FILE_LIST = "files.json"  # names those files

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "*/adapter_model.safetensors",
    "pytorch_model_fsdp.bin",
    "pytorch_model_fsdp_*/.metadata",  # a sharded checkpoint's last file
)
# Trainer saves these beside the weights unless `save_only_model`.
TRAINING_STATE = {
    "optimizer.pt": ("optimizer.pt", "optimizer.bin", "optimizer_*/.metadata", f"{OPTIMIZER_FOLDER}/{FILE_LIST}"),
    "scheduler.pt": ("scheduler.pt",),
    "rng_state.pth": ("rng_state*.pth",),
}
DAMAGED = "is cut off or damaged"

# ---- Complete or not ----


def find_problems(checkpoint: str | os.PathLike) -> list[str]:
    """Return what keeps a folder from being a complete Trainer checkpoint, a few words each; empty if it is one."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return ["there is no such folder"]
    problems = []

    def has_any(patterns: tuple[str, ...]) -> bool:
        return any(True for pattern in patterns for _ in folder.glob(pattern))

    def require_listed(listing: str, read_names: Callable[[Any], Any]) -> None:
        """The files that a JSON file beside them lists."""
        path = folder / listing
        try:
            names = sorted(set(read_names(json.loads(path.read_text(encoding="utf-8")))))
            missing = [name for name in names if not (path.parent / name).is_file()]
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):  # no JSON, or no list of names
            problems.append(f"{listing} {DAMAGED}")
        else:
            problems.extend(f"{(path.parent / name).relative_to(folder)} is missing" for name in missing)

    if not has_any(WEIGHTS):
        problems.append("model.safetensors (or its index, or an adapter's) is missing")
    if (folder / "model.safetensors.index.json").is_file():
        require_listed("model.safetensors.index.json", lambda index: index["weight_map"].values())
    if (folder / OPTIMIZER_FOLDER / FILE_LIST).is_file():
        require_listed(f"{OPTIMIZER_FOLDER}/{FILE_LIST}", iter)

    has_state = {name: has_any(patterns) for name, patterns in TRAINING_STATE.items()}
    if any(has_state.values()):  # else only the model was saved
        problems += [f"{name} is missing" for name, found in has_state.items() if not found]
    ranks = [int(match[1]) for path in folder.iterdir() if (match := re.fullmatch(r"rng_state_(\d+)\.pth", path.name))]
    if ranks:  # at least two processes
        absent = set(range(max(2, max(ranks) + 1))) - set(ranks)
        problems += [f"rng_state_{rank}.pth is missing" for rank in sorted(absent)]

    problems += [
        f"{path.relative_to(folder)} {DAMAGED}"
        for path in sorted(folder.rglob("*.safetensors"))
        if not is_readable(path)
    ]
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
        problems.append(f"{state.name} {DAMAGED}")
    return problems


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
                if number % num_parts == part and not has_finite_values(tensors.get_tensor(name)):
                    return name
    return None


def has_finite_values(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has neither a NaN nor an infinity."""
    if tensor.is_floating_point() and tensor.dtype.itemsize == 1:  # torch has no isfinite for float8
        tensor = tensor.float()
    return bool(torch.isfinite(tensor).all())


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


def load_saved(path: Path) -> Any:
    """Read tensors and plain values that `torch.save` wrote, mapped into memory."""
    try:
        with safe_globals():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError, ...
        raise ValueError(f"{path} cannot be read as tensors and plain values ({type(error).__name__})") from error


def check_optimizer_state(state: Any, optimizer: Optimizer, path: Path) -> None:
    """Require a state of such an optimizer over the same parameters; `path` is its file.

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
        if not values or expected is None:  # no gradient has reached this parameter yet
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
                    f"{path}: {name} of parameter {number} must have shape {needed}; got {shape}: resume with the "
                    "model that wrote it, or start from the weights alone"
                )


def list_moments(optimizer: Optimizer, saved_group: dict[str, Any]) -> dict[str, bool] | None:
    """Return what one of torch's optimizers keeps of a parameter: name -> whether it has the parameter's shape, or is
    one number. None for other optimizers, and for those that keep other shapes."""
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
    """Require a state of such a scheduler, over as many parameter groups if `same_groups`; `path` is its file."""
    own = scheduler.state_dict()
    needed = {name for name in own if name == "_last_lr" or not name.startswith("_")}
    if not isinstance(state, dict) or (missing := sorted(needed - state.keys())):
        lacks = f"; it lacks {', '.join(missing)}" if isinstance(state, dict) else ""
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
    """Require a state of the random generators; `path` is its file. Leaves this process's generators alone."""
    try:
        random.Random().setstate(state["python"])
        np.random.RandomState().set_state(state["numpy"])
        torch.Generator().set_state(state["cpu"])
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"{path} is not the state of random generators ({type(error).__name__}: {error}): remove it, and the run "
            "resumes with other random numbers"
        ) from error
