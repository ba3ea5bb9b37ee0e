"""The `grin-moe` command itself: what it imports before there is work, and untrusted text on its way to a terminal."""

import json
import os
import shutil
import subprocess
import sys
import unicodedata
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from checkpoints import released_config, released_tensors, write_checkpoint
from safetensors.torch import save_file

import grin_moe_cli
from grin_moe_cli.terminal import escape

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "transformers", "matplotlib", "scipy", "numpy", "huggingface_hub", "gguf", "modeling_grin"}

RED, TITLE = "\x1b[31m", "\x1b]0;owned\x07"  # CSI; OSC 0 sets a terminal's title, OSC 52 its clipboard
HOSTILE = f"{RED}{TITLE}\x9b1m\u202e[bold]x"  # C1's CSI, text turned around, rich's markup
SHOWN = "\\x1b[31m\\x1b]0;owned\\x07\\x9b1m\\u202e[bold]x"


def run_in_process(*arguments: str) -> tuple[int, str, set[str]]:
    """Exit code, output, and the modules of `HEAVY` that were imported."""
    code = (
        "import sys, grin_moe_cli\n"
        "try: grin_moe_cli.main()\n"
        f"finally: print('imported', *sorted({HEAVY!r} & sys.modules.keys()), file=sys.stderr)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, timeout=120
    )
    output, _, imported = result.stderr.rpartition("imported")
    return result.returncode, result.stdout + output, set(imported.split())


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--help"], 0, "convert"),
        (["inspekt"], 2, "inspect"),
        (["recipes", "ls"], 0, "sft"),
        (["inspect", "microsoft/GRIN-MoE"], 2, "does not exist"),
    ],
)
def test_nothing_heavy_is_imported_before_there_is_work(arguments, code, text):
    """Asked for help, or mistyped, the command answers at once; torch and transformers take seconds to import."""
    returncode, output, imported = run_in_process(*arguments)
    assert (returncode, imported) == (code, set()) and text in output


# ---- Untrusted text: one scene for each way to the terminal ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = released_config()
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "model", config, released_tensors(config))


def test_escaped_text():
    assert escape("plain äöü 漢字\n\t") == "plain äöü 漢字\n\t"
    assert escape(HOSTILE) == SHOWN.replace("[bold]", "\\[bold]")
    assert escape(Path("a\udc80")) == "a\\udc80", "a file's name that is no text in UTF-8"


def hostile_adapter(folder, checkpoint):
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": HOSTILE, "r": 2, "lora_alpha": 4, HOSTILE: HOSTILE}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"x": torch.ones(2)}, folder / "adapter_model.safetensors")
    return ["inspect", folder]


def hostile_names(folder, checkpoint):
    shutil.copytree(checkpoint, folder)
    (folder / f"LICENSE{HOSTILE}").touch()
    return ["convert", folder, folder.parent / "result", "--to", "fused"]


def hostile_push(folder, checkpoint):
    hostile_names(folder, checkpoint)
    return ["push", folder, "me/x", "--dry-run"]


def hostile_config(folder, checkpoint):
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text()) | {"hidden_act": HOSTILE}
    (folder / "config.json").write_text(json.dumps(config))
    return ["inspect", folder]


def hostile_path(folder, checkpoint):
    return ["inspect", HOSTILE]


@pytest.mark.parametrize("scene", [hostile_adapter, hostile_names, hostile_push, hostile_config, hostile_path])
def test_untrusted_text_reaches_no_terminal(scene, checkpoint, tmp_path, monkeypatch, capfd):
    """Not what a terminal obeys; what it is can be read."""
    monkeypatch.setattr(sys, "argv", ["grin-moe", *map(str, scene(tmp_path / "hostile", checkpoint))])
    monkeypatch.setenv("COLUMNS", "2000")
    with suppress(SystemExit):
        grin_moe_cli.main()
    captured = capfd.readouterr()
    output = captured.out + captured.err
    bad = {c for c in output if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in "\n\t"}
    assert not bad, (bad, output)
    assert "x1b" in output, output
