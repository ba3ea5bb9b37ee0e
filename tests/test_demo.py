"""`make demo` in a few steps: every stage runs, and leaves what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

DEMO = Path(__file__).parent.parent / "recipes" / "demo.py"


def test_demo_trains_saves_reloads_and_generates(tmp_path):
    result = subprocess.run(
        [sys.executable, str(DEMO), "--max-steps", "12", "--output-dir", "out"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    before, after = map(float, result.stdout.split("validation loss ")[1].split("\n")[0].split(" -> "))
    assert after < before - 0.2
    assert "def __init__(self, name, value=None):" in result.stdout
    assert "12/12" in result.stderr, "a progress bar is shown"
    for picture in ("loss.png", "expert_load.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    with safe_open(tmp_path / "out" / "trained" / "model.safetensors", framework="pt") as checkpoint:
        assert "model.layers.3.block_sparse_moe.experts.7.w2.weight" in checkpoint.keys()  # noqa: SIM118
    assert json.loads((tmp_path / "out" / "trained" / "config.json").read_text())["model_type"] == "grinmoe"


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--max-steps", "0"], "max-steps"), (["--steps", "3"], "--steps")]
)
def test_demo_names_a_wrong_argument(arguments, message, tmp_path):
    result = subprocess.run([sys.executable, str(DEMO), *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []
