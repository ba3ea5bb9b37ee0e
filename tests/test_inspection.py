"""`grin-moe inspect` and `grin-moe convert`, as a user calls them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import fused, released_config, released_tensors, write_checkpoint, write_release
from safetensors.torch import load_file
from typer.testing import CliRunner

from conversion import ConversionError, convert, inspect
from conversion.summary import summarize
from grin_moe_cli import app
from modeling_grin import GrinMoeForCausalLM
from modeling_grin.training import add_lora

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tensors():
    return released_tensors(released_config())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tensors):
    return write_checkpoint(tmp_path_factory.mktemp("inspection") / "model", released_config(), tensors, 3)


def grin_moe(*arguments: str | Path, expect: int = 0) -> str:
    """What the command prints."""
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "120"})
    assert result.exit_code == expect, result.output
    return result.stdout


def test_what_is_there(folder, tensors):
    found = inspect(folder)
    assert (found.form, found.model) == ("hub", "GrinMoeForCausalLM")
    assert found.parameters == sum(tensor.numel() for tensor in tensors.values())
    # Two of six experts are used.
    experts = sum(tensor.numel() for name, tensor in tensors.items() if ".experts." in name)
    assert found.active_parameters == found.parameters - experts * 4 // 6
    assert found.dtypes == {"bfloat16": found.parameters}
    assert found.files == {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    assert found.config["num_local_experts"] == 6
    assert found.config["sliding_window"] == 2047
    assert found.problems == [] and found.difference is None


def test_a_summary_is_what_inspect_says(tmp_path, folder, tensors):
    """Of the plain cases; of anything else there is none."""
    model = GrinMoeForCausalLM.from_pretrained(folder, dtype="float32")
    model.config.eos_token_id = model.config.pad_token_id = 3
    model.save_pretrained(tmp_path / "saved")
    convert(folder, tmp_path / "fused", to="fused", check=False)
    changes = {"tied": {"tie_word_embeddings": True}, "no biases": {"attention_bias": False, "lm_head_bias": False}}
    for name, change in {**changes, "heads": {"head_dim": 10, "sliding_window": None}}.items():
        write_release(tmp_path / name, **change)
    for path in (folder, *tmp_path.iterdir()):
        assert summarize(path) == inspect(path)

    for number, change in enumerate((
        {"model_type": "phimoe"}, {"architectures": ["PhimoeForCausalLM"]}, {"hidden_act": "gelu"},
        {"vocab_size": 130}, {"hidden_size": "32"}, {"num_hidden_layers": 10**9}, {"rope_theta": None},
        {"rope_scaling": {"type": "longrope"}}, {"quantization_config": {}}, {"text_config": {}},
        {"num_experts_per_tok": 7}, {"router_estimator": "dense"}, {"hidden_act": ["silu"]},
    )):  # fmt: skip
        write_checkpoint(tmp_path / str(number), released_config(**change), tensors)
        assert summarize(tmp_path / str(number)) is None, change
    (tmp_path / "saved" / "model.safetensors").write_bytes(b"")
    (tmp_path / "fused" / "other.safetensors").write_bytes(b"")
    assert all(summarize(tmp_path / name) is None for name in ("saved", "fused", "nowhere"))


def test_a_summary_needs_no_torch(folder):
    code = f"""
import sys
from pathlib import Path
from conversion.summary import summarize
assert summarize(Path({str(folder)!r})).form == "hub" and not {{"torch", "transformers"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_verify_finds_damage(tmp_path, tensors):
    damaged = {name: tensor.clone() for name, tensor in tensors.items()}
    damaged["model.layers.1.block_sparse_moe.experts.4.w2.weight"][0, :3] = torch.nan
    damaged["model.norm.bias"][7] = torch.inf
    folder = write_checkpoint(tmp_path / "model", released_config(), damaged, 2)
    assert inspect(folder).problems == []  # headers are right
    problems = inspect(folder, verify=True).problems
    assert len(problems) == 2
    assert any("experts.4.w2.weight" in problem and "3 NaN or infinite" in problem for problem in problems)
    assert any("model.norm.bias" in problem and "1 NaN" in problem for problem in problems)
    assert "wrong" in grin_moe("inspect", folder, "--verify", expect=1)


def test_the_same_in_every_form(tmp_path, folder, tensors):
    for to in ("fused", "phimoe"):
        convert(folder, tmp_path / to, to=to, max_shard_size="30KB")
        found = inspect(tmp_path / to, against=folder)
        assert found.form == to and found.difference == {} and found.problems == []


def test_what_differs(tmp_path, folder, tensors):
    config = released_config()
    other = {name: tensor.clone() for name, tensor in tensors.items()}
    other["model.layers.0.block_sparse_moe.experts.2.w3.weight"][1, 1] += 0.5
    other["model.layers.0.self_attn.q_proj.bias"] = other["model.layers.0.self_attn.q_proj.bias"].float()
    write_checkpoint(tmp_path / "other", config, fused(other, config))
    changed = inspect(tmp_path / "other", against=folder, verify=True).difference
    assert changed == {
        "model.layers.0.block_sparse_moe.experts.2.w3.weight": pytest.approx(0.5, abs=0.01),
        "model.layers.0.self_attn.q_proj.bias": 0,
    }

    write_release(tmp_path / "smaller", num_hidden_layers=1)
    changed = inspect(tmp_path / "smaller", against=folder).difference
    assert changed["model.layers.1.self_attn.q_proj.bias"] is None


def test_gguf(tmp_path, folder):
    convert(folder, tmp_path / "model.gguf", to="gguf", dtype="f32")
    found = inspect(tmp_path / "model.gguf", verify=True)
    # Two of the sixths of all experts; what is added to the release are the norms' and biases' zeros, here none.
    assert (found.form, found.model, found.problems) == ("gguf", "phimoe", [])
    assert found.parameters == inspect(folder).parameters
    assert found.active_parameters == inspect(folder).active_parameters
    assert found.config["phimoe.context_length"] == 2048
    with pytest.raises(ConversionError, match="but not be compared"):
        inspect(tmp_path / "model.gguf", against=folder)
    with (tmp_path / "model.gguf").open("r+b") as file:
        file.seek(-4000, os.SEEK_END)
        file.write(b"\xff" * 64)
    assert inspect(tmp_path / "model.gguf").problems == []
    [problem] = inspect(tmp_path / "model.gguf", verify=True).problems
    assert "holds NaN or infinite values" in problem


def test_adapter(tmp_path, folder):
    add_lora(GrinMoeForCausalLM.from_pretrained(folder, dtype="float32"), r=3).save_pretrained(tmp_path / "lora")
    found = inspect(tmp_path / "lora", verify=True)
    assert (found.form, found.config["r"], found.problems) == ("adapter", 3, [])
    assert found.parameters == sum(t.numel() for t in load_file(tmp_path / "lora/adapter_model.safetensors").values())
    assert "adapter" in grin_moe("inspect", tmp_path / "lora")


def test_commands(folder, tmp_path):
    text = grin_moe("inspect", folder, "--verify")
    assert "(hub, GrinMoeForCausalLM)" in " ".join(text.split())
    assert "a token uses" in text and "no value is NaN or infinite" in text
    found = json.loads(grin_moe("inspect", folder, "--verify", "--against", folder, "--json"))
    assert found["difference"] == {} and found["form"] == "hub"
    text = grin_moe("convert", folder, tmp_path / "result", "--to", "fused", "--max-shard-size", "100KB")
    assert "differ by 0 of the largest" in text
    report = json.loads(grin_moe("convert", folder, tmp_path / "json", "--to", "phimoe", "--json"))
    assert report["form"] == "hub" and report["difference"] < 1e-6
