"""README and docs: commands run on tiny files, the snippet that trains learns, links lead somewhere, the site builds.

`test_package.py` runs all snippets, in a fresh environment.
"""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from math import ceil
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
import typer
from checkpoints import released_config, released_tensors, write_checkpoint
from snippets import DOCUMENTS, bash_lines, run_snippets, snippets
from typer.testing import CliRunner

import modeling_grin
from grin_moe_cli import app
from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM
from modeling_grin.planning.plan import plan
from modeling_grin.planning.setting import GB, Assumptions, Training, assume
from modeling_grin.training import add_lora
from recipes import data, demo, dpo, pretrain, sft

ROOT = Path(__file__).parent.parent
RECIPES = {"pretrain": pretrain, "sft": sft, "dpo": dpo}
# Pages whose commands other modules run: test_with, test_vllm, test_mlx, test_routing_analysis, test_evaluate,
# test_card, test_push; and the benchmarks', which take long.
ELSEWHERE = {"serve", "study_routing", "evaluate", "model_cards", "publish", "performance"}
TASKS = sorted(path.stem for path in (ROOT / "docs").glob("*.md") if "```bash" in path.read_text("utf-8"))
START = {"sft": "pretrain_tiny", "dpo": "sft_tiny"}  # where a tiny config begins: an earlier page's result
QUICK = {  # what is cut short, and what has nothing to do with the command
    "data": ["--max-rows", "48", "--max-characters", "400"],
    "gradients": ["--layers", "1", "--over", "top_k"],
    "train": [
        "--use_cpu", "true", "--disable_tqdm", "true", "--max_steps", "2", "--per_device_train_batch_size", "2",
        "--gradient_accumulation_steps", "1", "--save_strategy", "no", "--eval_strategy", "no",
        "--load_best_model_at_end", "false",
    ],
}  # fmt: skip


@pytest.fixture
def folder(tiny_release, tmp_path, monkeypatch):
    """A folder with what the pages name: models, an adapter, `chats.jsonl`, a text file, the checkout's folders."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("GRIN-MoE", "my_model"):
        Path(name).symlink_to(tiny_release)
    for name in ("recipes", "examples", "constraints.txt", "setup.py"):
        if (ROOT / name).exists():
            Path(name).symlink_to(ROOT / name)
    chat = [{"role": "user", "content": "Name a router."}, {"role": "assistant", "content": "SparseMixer."}]
    Path("chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 120)
    data.main(Path("data"), max_rows=48, max_characters=400, seed=0)
    Path("text.txt").write_text("import this\n" * 50)
    dense = released_config(num_local_experts=1, num_experts_per_tok=1, torch_dtype="float32")
    write_checkpoint(Path("DENSE"), dense, released_tensors(dense))
    adapted = add_lora(GrinMoeForCausalLM.from_pretrained("GRIN-MoE", dtype="float32"), r=2)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained("my-lora")
    return tmp_path


def run(command: str, release: Path) -> None:
    """Run a command as the page has it, in this process."""
    words = shlex.split(command.replace("--experts 8", "--experts 3"))  # the tiny release has six
    if words[0] == "pip":  # test_package installs; the files must be there
        for name in words[2:]:
            assert name == "install" or name.startswith(("-", "torch", ".")) or Path(name).exists(), command
    elif words[0] in ("grin-moe", ".venv/bin/grin-moe"):
        quick = ["--tokens", "200"] if "deployed" in words else QUICK.get(words[1], [])
        result = CliRunner().invoke(app, [*words[1:], *quick])
        assert result.exit_code == 0, (command, result.output, result.exception)
        for path in Path().glob("*.yaml"):  # a copied config names the release
            path.write_text(path.read_text("utf-8").replace("microsoft/GRIN-MoE", str(release)))
    elif words[:2] == ["python", "recipes/data.py"]:
        run_script(data.main, [*words[2:], *QUICK["data"]])
    elif words[:2] == ["accelerate", "launch"]:
        (script,) = (index for index, word in enumerate(words) if word.endswith(".py"))
        recipe, options = Path(words[script]).stem, words[script + 1 :]
        if {"--config_file", "--num_processes", "--pipeline_parallel_size"} & set(words):  # test_launches runs these
            assert all(Path(word).is_file() for word in words if word.endswith((".py", ".yaml"))), command
            RECIPES[recipe].parse([*options, "--use_cpu", "true"])
            return
        if recipe in START:
            start = Path("output", START[recipe])
            start.parent.mkdir(exist_ok=True)
            if not start.exists():
                start.symlink_to(release)
            options += ["--max_length", "64"]
        RECIPES[recipe].main([*options, *QUICK["train"]])
    else:
        assert words[:2] == ["python", "-c"], f"no test runs {command}"
        if "llama_cpp" not in words[2]:  # test_gguf has it where it is installed
            exec(words[2], {})


def run_script(main: Callable, arguments: list[str]) -> None:
    application = typer.Typer()
    application.command()(main)
    typer.main.get_command(application).main(arguments, standalone_mode=False)


@pytest.mark.parametrize("page", [page for page in TASKS if page not in ELSEWHERE])
def test_commands_of_a_task_page_run(page, folder, tiny_release):
    for command in bash_lines(ROOT / "docs" / f"{page}.md"):
        run(command, tiny_release)


def test_the_snippet_that_trains_learns(tiny_release, tmp_path):
    (snippet,) = (code for page in DOCUMENTS for code in snippets(page) if "save_pretrained" in code)
    ((status, output),) = run_snippets([snippet], tmp_path, tiny_release)
    assert status == 0, output
    loss = float(re.search(r"'eval_loss': '?([\d.]+)", output).group(1))
    assert loss < 6.3, "it starts at log(1024) = 6.9"
    assert (tmp_path / "0" / "trained" / "model.safetensors").is_file()
    assert (tmp_path / "0" / "expert_load.png").is_file()


def test_links_lead_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def shrink(config):
    config.update({"hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8})
    return config


@pytest.mark.parametrize(
    ("example", "arguments", "written"),
    [
        ("watch_experts_specialise", ["--max-steps", "10"], ["specialisation.png", "model.safetensors"]),
        ("compare_estimators", ["--max-steps", "10", "--estimator", "gshard"], ["losses.png", "losses.csv"]),
    ],
)
def test_examples_run(example, arguments, written, tmp_path, monkeypatch):
    """As their commands, on part of their texts; the third needs llama.cpp."""
    monkeypatch.chdir(tmp_path)
    texts, config = demo.read_standard_library()[:60], demo.tiny_config
    monkeypatch.setattr(demo, "read_standard_library", lambda: texts)
    monkeypatch.setattr(demo, "tiny_config", lambda tokenizer: shrink(config(tokenizer)))
    monkeypatch.setattr("pydoc_data.topics.topics", dict(sorted(topics.items())[:30]))
    main = runpy.run_path(str(ROOT / "examples" / f"{example}.py"))["main"]
    run_script(main, ["--output-dir", "out", *arguments])
    assert all(Path("out", name).stat().st_size > 0 for name in written)


def test_quoted_errors_are_those_of_the_code():
    """Headlines of the troubleshooting page quote what this library says today."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    sources = "".join(path.read_text("utf-8") for path in sorted((ROOT / "modeling_grin").rglob("*.py")))
    sources = re.sub(r"\{[^{}]*\}", "...", re.sub(r'"\s*\n\s*f?"', "", sources))
    headlines = re.findall(r"^\*\*(`.*?)\*\*", text, re.MULTILINE | re.DOTALL)
    quoted = [message for headline in headlines for message in re.findall(r"`([^`]+)`", headline)]
    ours = [message for message in quoted if "is_torch_fx_available" not in message]
    assert len(ours) >= 25
    for message in ours:
        assert message in sources, message


MEMORIES = (24, 48, 80, 141)  # GB, the columns of the README's table


def gpus_of(row: str) -> list[str]:
    """Read the cells of a row of the README's table of GPUs."""
    (cells,) = re.findall(rf"^\| {row} \| .*? \| (.*) \|$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    return cells.split(" | ")


@pytest.mark.parametrize(
    ("row", "bytes_per_weight"),  # of experts and attention, from RESULTS.md
    [("chat, bfloat16", 2.0), ("chat, 8 bits", 1.003), ("chat, 4 bits", 0.563)],
)
def test_gpus_to_chat_hold_whole_layers(row, bytes_per_weight):
    config = GrinMoeConfig()
    attention = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    weights = config.hidden_size * (attention + 3 * config.num_local_experts * config.intermediate_size)
    layers = [(memory * GB - Assumptions().reserve) // (weights * bytes_per_weight) for memory in MEMORIES]
    assert gpus_of(row) == [str(ceil(config.num_hidden_layers / number)) for number in layers]


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ("LoRA, 16 ranks", {"lora_r": 16}),
        ("LoRA, 16 ranks, 4 bits", {"lora_r": 16, "load_in_4bit": True}),
        ("train all weights, bfloat16", {"precision": "bfloat16"}),
        ("train all weights, the recipes' float32 and bfloat16", {}),
    ],
)
def test_gpus_to_train_are_the_planners(row, settings):
    """The smallest number of GPUs for which a layout fits."""
    training, written = Training(**settings), []
    for memory in MEMORIES:
        plans = (plan(GrinMoeConfig(), gpus, training, assume([], memory=memory * GB))[0] for gpus in (1, 2, 4, 8, 16))
        fits = [any(estimate.fits and estimate.layout.ep == 1 for estimate in estimates) for estimates in plans]
        written.append(str(2 ** fits.index(True)) if any(fits) else "more than 16")
    assert gpus_of(row) == written


def test_the_version_is_the_same_everywhere():
    for name in ("setup.py", "CITATION.cff"):
        (version,) = re.findall(r"^ *version\W+([\d.]+)", (ROOT / name).read_text("utf-8"), re.MULTILINE)
        assert version == modeling_grin.__version__, name


def test_site_builds_without_a_warning(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr
    page = (tmp_path / "reference" / "routing" / "index.html").read_text(encoding="utf-8")
    assert "SparseMixer" in page and "jitter_eps" in page
