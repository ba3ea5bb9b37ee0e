"""Each benchmark, but `compiled_step`, runs at debug size and records a table of numbers."""

import importlib
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import decoding, estimators, expert_scaling, measure, peers, quantized_memory

SMALL = "--hidden-size 64 --intermediate-size 16 --experts 4 --layers 1"
STEP = f"{SMALL} --vocab-size 96 --tokens 64"
CASES = {  # arguments, and rows of the table
    "accumulation": ("--experts 4 --repeats 1", 9),
    "callback_cost": (f"{SMALL} --tokens 64 --rounds 2 --dtype float32", 4),
    "conversion": ("--layers 1 --gguf-layers 1 --vocab-size 300 --hidden-size 512 --repeats 1", None),
    "decoding": ("--layers 1 --vocab-size 300 --hidden-size 512 --prompt-length 8 --repeats 2", 3),
    "expert_scaling": (
        "--hidden-size 64 --intermediate-size 16 --layers 1 --dtype float32 --repeats 2 --experts 2 --experts 4 "
        "--tokens 64 --tokens 128 --fixed-experts 4 --fixed-tokens 128 --allocator default --image plot.png", 3,
    ),
    "loading": ("--layers 2 --vocab-size 300 --hidden-size 512 --repeats 2", 3),
    "lora_cost": (f"{SMALL} --tokens 64 --rounds 2", None),
    "quantized_memory": (f"{SMALL.replace('16', '64')}", 2),
    "routing_cost": (f"{SMALL} --tokens 64 --rounds 2 --dtype float32 --skip dense", None),
    "step_profile": (f"{STEP} --dtype float32 --repeats 1 --operators 100", None),
    "step_shares": (f"{STEP} --repeats 2", None),
    "training_step": (f"{STEP} --repeats 2", 2),
    "training_step memory": (f"{STEP} --dtype float32 --memory", 1),
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_small(monkeypatch, tmp_path):
    """Results go to a temporary folder; everything runs in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(decoding, "READ_BYTES", 2**20)
    monkeypatch.setattr(expert_scaling, "PRODUCT_ROWS", 64)
    monkeypatch.setattr(expert_scaling, "BUFFER_BYTES", 2**20)
    modes = {name: quantized_memory.MODES[name] for name in ("bfloat16, fused", "4 bits (nf4)")}
    monkeypatch.setattr(quantized_memory, "MODES", modes)


@pytest.mark.parametrize("name", CASES)
def test_it_runs_and_records_numbers(name, monkeypatch, tmp_path):
    module = importlib.import_module(f"benchmarks.{name.split()[0]}")
    if hasattr(module, "run_with"):
        monkeypatch.setattr(module, "run_with", lambda environment, function, *arguments: function(*arguments))
    if hasattr(module, "in_fresh_process"):
        monkeypatch.setattr(module, "in_fresh_process", lambda function, *arguments: function(*arguments))
    app, (arguments, count) = typer.Typer(), CASES[name]
    app.command()(module.main)
    result = CliRunner().invoke(app, [*arguments.split(), "--record"])
    assert result.exit_code == 0, (result.output, result.exception)
    rows = [line for line in (tmp_path / "RESULTS.md").read_text().splitlines() if line.startswith("| ")][2:]
    assert len(rows) == count if count else rows
    assert all(re.search(r"\d", row.split(" | ", 1)[1]) and "nan" not in row for row in rows)


def test_estimators_trains_every_variant_resumes_and_reports(monkeypatch, trained_tokenizer, tmp_path):
    ids = torch.randint(32, (24, 16), generator=torch.Generator().manual_seed(0))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    monkeypatch.setattr(estimators, "SIZES", sizes)
    monkeypatch.setattr(estimators, "prepare", lambda: (trained_tokenizer, ids[:16], ids[16:]))
    monkeypatch.setattr(estimators, "ProcessPoolExecutor", lambda workers, _: ThreadPoolExecutor(workers))
    threads = torch.get_num_threads()
    train = ["train", "--seeds", "1", "--steps", "8", "--workers", "1", "--output-dir", str(tmp_path)]
    assert "9 runs of 0.00M tokens, 0 done before" in CliRunner().invoke(estimators.app, train).output
    assert "9 done before" in CliRunner().invoke(estimators.app, train).output
    torch.set_num_threads(threads)
    report = CliRunner().invoke(estimators.app, ["report", "--output-dir", str(tmp_path), "--record"])
    assert report.exit_code == 0 and (tmp_path / "estimators.png").is_file()


def test_peers_compute_the_same_function():
    """Ours and stock Phimoe, with the same weights: else their times could not be compared."""
    torch.manual_seed(0)
    config = measure.grin_config(64, 16, experts=4, layers=2, vocab_size=96)
    ours, rows = peers.build_ours(config, torch.float32).eval(), measure.random_rows(config, 1024)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    stock = peers.build_stock(ours).eval()
    with torch.no_grad():
        expected, actual = ours(rows, use_cache=False).logits, stock(rows, use_cache=False).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
