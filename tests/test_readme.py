"""README and docs: the snippet that trains learns, commands run, links lead somewhere.

`test_package.py` runs all snippets, in a fresh environment.
"""

import re
from pathlib import Path

import torch
from checkpoints import released_config, released_tensors, write_checkpoint
from snippets import DOCUMENTS, run_snippets, snippets
from typer.testing import CliRunner

from grin_moe_cli import app
from modeling_grin import GrinMoeForCausalLM
from modeling_grin.training import add_lora

ROOT = Path(__file__).parent.parent


def test_the_snippet_that_trains_learns(tiny_release, tmp_path):
    (snippet,) = (code for page in DOCUMENTS for code in snippets(page) if "save_pretrained" in code)
    ((status, output),) = run_snippets([snippet], tmp_path, tiny_release)
    assert status == 0, output
    loss = float(re.search(r"'eval_loss': '?([\d.]+)", output).group(1))
    assert loss < 6.3, "it starts at log(1024) = 6.9"
    assert (tmp_path / "0" / "trained" / "model.safetensors").is_file()
    assert (tmp_path / "0" / "expert_load.png").is_file()


def test_conversion_commands_run(tiny_release, tmp_path, monkeypatch):
    """Every `grin-moe` line of docs/conversion.md, one after the other."""
    monkeypatch.chdir(tmp_path)
    Path("GRIN-MoE").symlink_to(tiny_release)
    Path("text.txt").write_text("import this\n" * 50)
    dense = released_config(num_local_experts=1, num_experts_per_tok=1, torch_dtype="float32")
    write_checkpoint(Path("DENSE"), dense, released_tensors(dense))
    adapted = add_lora(GrinMoeForCausalLM.from_pretrained("GRIN-MoE", dtype="float32"), r=2)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained("my-lora")
    text = (ROOT / "docs" / "conversion.md").read_text(encoding="utf-8")
    # Comments are set off by two spaces; experts of the tiny release are fewer.
    commands = re.findall(r"^grin-moe (.*?)(?:  +#.*)?$", text, re.MULTILINE)
    assert len(commands) >= 8
    for command in commands:
        arguments = command.replace("--experts 8", "--experts 3").split()
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, (command, result.output, result.exception)


def test_links_lead_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
