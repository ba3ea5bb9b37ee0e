"""Each part of `make gpu` runs on a CPU at debug size, and the command gathers what the parts found."""

import importlib
import json
import math
import sys

import pytest
import torch

from benchmarks.gpu import run
from benchmarks.gpu.device import DEBUG

EXACT = ("choices that differ", "jittered numbers that differ", "gradients that differ")


@pytest.fixture(autouse=True)
def _no_inductor(monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)


@pytest.mark.parametrize("part", run.PARTS)
def test_part_measures_numbers(part):
    rows = list(importlib.import_module(f"benchmarks.gpu.{part}").measure(DEBUG))
    assert len({row.name for row in rows}) == len(rows) > 0
    assert all(math.isfinite(row.value) for row in rows)
    assert all(row.value == 0 for row in rows if row.name.startswith(EXACT))
    assert all(row.value < 0.2 for row in rows if row.unit in ("relative", "largest difference"))


def test_a_part_that_fails_costs_the_others_nothing(monkeypatch, tmp_path, capsys):
    def call(command, check, timeout):
        name = command[command.index("--part") + 1]
        if name == "big":
            raise run.subprocess.TimeoutExpired(command, timeout)
        (tmp_path / f"{name}.json").write_text(
            json.dumps([{"name": "x", "value": 1.0, "unit": "ms", "predicted": 2.0}])
        )

    monkeypatch.setattr(run.subprocess, "run", call)
    monkeypatch.setattr(sys, "argv", ["run", "--debug", "--output", str(tmp_path)])
    run.main()
    parts = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert parts.keys() == run.PARTS.keys() and "error" in parts["big"]
    assert "big        failed" in capsys.readouterr().out


def test_without_a_gpu_only_debug_sizes_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["run", "--output", str(tmp_path)])
    with pytest.raises(SystemExit):
        run.main()
    assert "no GPU here; use --debug" in capsys.readouterr().err
