"""`make demo` in a few steps: every stage runs, and leaves what it says."""

import json
from pathlib import Path

from safetensors import safe_open

from recipes import demo


def test_demo_trains_saves_reloads_and_generates(tmp_path, monkeypatch, capsys):
    """On part of its texts."""
    texts = demo.read_standard_library()[:60]
    monkeypatch.setattr(demo, "read_standard_library", lambda: texts)
    monkeypatch.chdir(tmp_path)
    demo.main(Path("out"), max_steps=12)
    printed = capsys.readouterr()
    before, after = map(float, printed.out.split("validation loss ")[1].split("\n")[0].split(" -> "))
    assert after < before - 0.2
    assert "def __init__(self, name, value=None):" in printed.out
    assert "12/12" in printed.err, "a progress bar is shown"
    for picture in ("loss.png", "expert_load.png"):
        assert Path("out", picture).read_bytes().startswith(b"\x89PNG")
    with safe_open(Path("out", "trained", "model.safetensors"), framework="pt") as checkpoint:
        assert "model.layers.3.block_sparse_moe.experts.7.w2.weight" in checkpoint.keys()  # noqa: SIM118
    assert json.loads(Path("out", "trained", "config.json").read_text())["model_type"] == "grinmoe"
