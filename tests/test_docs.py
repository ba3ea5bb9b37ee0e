"""The documentation: its site builds, and the commands on its pages run, on tiny files."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from math import ceil
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import typer
from snippets import bash_lines
from typer.testing import CliRunner

import modeling_grin
from grin_moe_cli import app
from modeling_grin import GrinMoeConfig
from modeling_grin.planning.plan import plan
from modeling_grin.planning.setting import GB, Assumptions, Training, assume
from recipes import data, demo, dpo, pretrain, sft

ROOT = Path(__file__).parent.parent
RECIPES = {"pretrain": pretrain, "sft": sft, "dpo": dpo}
# Pages whose commands other modules run: test_readme, test_with, test_vllm, test_mlx, test_routing_analysis,
# test_evaluate, test_card, test_push; and the benchmarks', which take long.
ELSEWHERE = {"conversion", "serve", "study_routing", "evaluate", "model_cards", "publish", "performance"}
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
    """A folder with what the pages name: a downloaded model, `chats.jsonl`, a text file, the checkout's folders."""
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
    return tmp_path


def run(command: str, release: Path) -> None:
    """Run a command as the page has it, in this process."""
    words = shlex.split(command)
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
        typer.main.get_command(_typer(data.main)).main([*words[2:], *QUICK["data"]], standalone_mode=False)
    elif words[:2] == ["accelerate", "launch"] and {
        "--config_file",
        "--num_processes",
        "--pipeline_parallel_size",
    } & set(words):
        files = [word for word in words if word.endswith((".py", ".yaml"))]  # test_launch launches with every file
        assert all(Path(file).is_file() for file in files), command
        script = next(file for file in files if file.endswith(".py"))
        RECIPES[Path(script).stem].parse([*words[words.index(script) + 1 :], "--use_cpu", "true"])
    elif words[:2] == ["accelerate", "launch"]:
        script = next(index for index, word in enumerate(words) if word.endswith(".py"))
        recipe = Path(words[script]).stem
        if recipe in START:
            start = Path("output", START[recipe])
            start.parent.mkdir(exist_ok=True)
            if not start.exists():
                start.symlink_to(release)
            words += ["--max_length", "64"]
        RECIPES[recipe].main([*words[script + 1 :], *QUICK["train"]])
    else:
        assert words[:2] == ["python", "-c"], f"no test runs {command}"
        exec(words[2], {})


def _typer(function) -> typer.Typer:
    application = typer.Typer()
    application.command()(function)
    return application


@pytest.mark.parametrize("page", [page for page in TASKS if page not in ELSEWHERE])
def test_commands_of_a_task_page_run(page, folder, tiny_release):
    for command in bash_lines(ROOT / "docs" / f"{page}.md"):
        run(command, tiny_release)


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
    typer.main.get_command(_typer(main)).main(["--output-dir", "out", *arguments], standalone_mode=False)
    assert all(Path("out", name).stat().st_size > 0 for name in written)


def test_quoted_errors_are_those_of_the_code():
    """Headlines of the troubleshooting page quote what this library says today."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    sources = "".join(path.read_text("utf-8") for path in sorted((ROOT / "modeling_grin").rglob("*.py")))
    sources = re.sub(r"\{[^{}]*\}", "...", re.sub(r'"\s*\n\s*f?"', "", sources))
    headlines = re.findall(r"^\*\*(`.*?)\*\*", text, re.MULTILINE | re.DOTALL)
    quoted = [message for headline in headlines for message in re.findall(r"`([^`]+)`", headline)]
    ours = [message for message in quoted if "is_torch_fx_available" not in message]
    assert len(ours) >= 30
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
