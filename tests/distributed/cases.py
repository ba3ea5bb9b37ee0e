"""Many cases in one launch: functions of `runs`, `sharded_runs` and `pipeline_runs`; how far results are apart."""

import importlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from launch import run_ranks
from processes import call


def run_cases(module: str, folder: Path, num_ranks: int, cases: dict[str, dict], **defaults: Any) -> dict[str, list]:
    """name -> what the case returned on every rank, in the cases' order.

    A case has the arguments of the function of `module` that it names as `run`, all but `folder` and `name`.
    """
    file = folder / "cases.json"
    file.write_text(json.dumps({name: {**defaults, **case} for name, case in cases.items()}))
    call(run_ranks, "cases", num_ranks, module, str(folder), str(file))
    return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(num_ranks)] for name in cases}


def main(module: str, folder: str, file: str) -> None:
    """One rank."""
    for name, case in json.loads(Path(file).read_text()).items():
        run = getattr(importlib.import_module(module), case.pop("run"))
        torch.save(run(Path(folder), name, **case), Path(folder, f"{name}-{os.environ.get('RANK', 0)}.pt"))


def difference(actual, expected):
    """The largest relative difference of a tensor, by its norm."""
    assert actual.keys() == expected.keys()
    return max(float((actual[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


def moved(parameters, start):
    """How far training has moved each parameter: their values would hide errors of updates."""
    return {name: parameters[name].double() - start[name].detach().double() for name in start}


def update_difference(actual, expected, start):
    """The largest relative difference of a parameter's update. Updates under a hundredth of the whole one's norm, some
    of them 0 by symmetry, are compared with that."""
    assert actual.keys() == expected.keys() == start.keys()
    ours, theirs = moved(actual, start), moved(expected, start)
    norm = torch.stack([update.norm() for update in theirs.values()]).norm()
    assert norm > 0.1  # the runs have learnt something
    return max(float((ours[name] - theirs[name]).norm() / max(theirs[name].norm(), norm / 100)) for name in start)


def log_difference(actual, expected):
    """The largest relative difference of a step's loss or norm."""
    assert [entry["step"] for entry in actual] == [entry["step"] for entry in expected]
    pairs = zip(actual, expected, strict=True)
    return max(abs(a[key] / e[key] - 1) for a, e in pairs for key in ("loss", "grad_norm"))
