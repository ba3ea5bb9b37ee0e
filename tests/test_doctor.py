"""`grin-moe doctor`: it names what is installed, what an engine would compute otherwise, and this machine's error."""

import json
from importlib.metadata import version

import pytest
import torch
from checkpoints import released_config, released_tensors, write_checkpoint
from parity import LONGROPE_SCALING

from grin_moe_cli.doctor import doctor, find_limits


def ask(capsys, folder):
    doctor(folder, as_json=True)
    answer = json.loads(capsys.readouterr().out)
    return {row["engine"]: row for row in answer["engines"]}, answer["error"]


def test_the_installed_versions_are_named(capsys):
    rows, error = ask(capsys, None)
    assert rows["transformers"]["installed"] == version("transformers") and rows["sglang"]["installed"] is None
    assert error is None and not any(row["limits"] for row in rows.values())
    doctor(None, as_json=False)
    assert "lm-eval" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "engine", "said"),
    [
        ({"sliding_window": 7}, "mlx-lm", "right up to 8 tokens only"),
        ({"head_dim": 10}, "mlx-lm", "must fill the hidden size"),
        ({"head_dim": 10}, "llama-cpp-python", "head_dim"),
        ({"num_experts_per_tok": 3}, "sglang", "top-2"),
        ({}, "sglang", "leave out the head's bias"),
        ({"rope_scaling": LONGROPE_SCALING, "max_position_embeddings": 512}, "vllm", "long factors are for all texts"),
        ({"moe_output_scale": True}, "vllm", "moe_output_scale must be false"),
        ({"router_bias_update_rate": 0.1}, "vllm", "router_bias_update_rate must be 0"),
    ],
)
def test_what_an_engine_makes_of_a_checkpoint(changes, engine, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(released_config(**changes)))
    assert any(said in text for text in find_limits(tmp_path)[engine])


def test_the_release_has_no_limits_in_vllm(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(released_config()))
    limits = find_limits(tmp_path)
    assert not any(limits[engine] for engine in ("transformers", "vllm", "llama-cpp-python", "trl"))


def test_this_machines_logits_are_compared(tmp_path, capsys, monkeypatch):
    config = released_config(torch_dtype="float32")
    folder = write_checkpoint(tmp_path, config, released_tensors(config))
    assert 0 < ask(capsys, folder)[1] < 1e-5
    right = torch.nn.LayerNorm.forward
    wrong = {torch.float32: 1.01, torch.float64: 1.0}
    monkeypatch.setattr(torch.nn.LayerNorm, "forward", lambda self, x: right(self, x) * wrong[x.dtype])
    assert ask(capsys, folder)[1] > 1e-4
