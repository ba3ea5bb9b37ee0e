"""The benchmarks in small: each runs from end to end, and reports what it measured."""

import json
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
import torch
import typer
from transformers.utils import logging
from typer.testing import CliRunner

from benchmarks import accumulation, callback_cost, conversion, estimators, lora_cost, quantized_memory, routing_cost
from modeling_grin.tokenization_grinmoe import GrinMoeTokenizer


@pytest.fixture
def results(tmp_path, monkeypatch):
    """RESULTS.md in a temporary folder."""
    monkeypatch.setattr(routing_cost, "RESULTS", tmp_path / "RESULTS.md")
    return tmp_path / "RESULTS.md"


@pytest.fixture
def in_small(monkeypatch, trained_tokenizer: GrinMoeTokenizer):
    """`estimators.py` in small and in this process: a tiny model, few and short rows."""
    ids = torch.randint(32, (24, 16), generator=torch.Generator().manual_seed(0))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    monkeypatch.setattr(estimators, "SIZES", sizes)
    monkeypatch.setattr(estimators, "prepare", lambda: (trained_tokenizer, ids[:16], ids[16:]))
    monkeypatch.setattr(estimators, "ProcessPoolExecutor", lambda workers, _: ThreadPoolExecutor(workers))
    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    yield
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)


def invoke(app: typer.Typer, *arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_estimators_trains_every_variant_resumes_and_reports(in_small, results, tmp_path):
    train = ["train", "--seeds", 2, "--steps", 8, "--workers", 1, "--output-dir", tmp_path]
    assert "18 runs of 0.00M tokens, 0 done before" in invoke(estimators.app, *train)
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert len({json.dumps(run["curve"]) for run in runs}) == len(runs), "no two variants or seeds are alike"

    (tmp_path / "runs.jsonl").write_text("\n".join(json.dumps(run) for run in runs[:-1]) + "\n")
    assert "1 runs of 0.00M tokens, 17 done before" in invoke(estimators.app, *train)
    again = json.loads((tmp_path / "runs.jsonl").read_text().splitlines()[-1])
    assert again["curve"] == runs[-1]["curve"], "weights, data and routing depend on the seed alone"

    invoke(estimators.app, "report", "--output-dir", tmp_path, "--record")
    assert (tmp_path / "estimators.png").read_bytes().startswith(b"\x89PNG")
    points = pd.read_csv(tmp_path / "estimators.csv")
    assert len(points) == 18 * 9 and points.entropy.between(0, 1).all() and points.near_ties.between(0, 1).all()
    text = results.read_text()
    assert "2 seeds" in text and str(tmp_path) not in text
    assert all(f"| {name} |" in text for name in routing_cost.VARIANTS)


def test_report_counts_finished_seeds_and_subtracts_the_control_of_the_same_seed(results, tmp_path):
    def curve(loss: float) -> list[dict]:
        return [{"tokens": 100 * i, "loss": loss, "entropy": 1.0, "near_ties": 0.0} for i in range(9)]

    losses = dict.fromkeys(routing_cost.VARIANTS, (4.0, 5.0)) | {"dense": (4.5, 5.1)}
    runs = [
        {"variant": name, "seed": seed, "steps": 8, "curve": curve(loss)}
        for name, by_seed in losses.items()
        for seed, loss in enumerate(by_seed)
    ]
    unfinished = {**runs[0], "seed": 2}
    (tmp_path / "runs.jsonl").write_text("\n".join(map(json.dumps, [*runs, unfinished])) + "\n")
    invoke(estimators.app, "report", "--output-dir", tmp_path, "--record")
    assert "| dense | 4.800 | 4.800 | 4.800 (4.500 to 5.100) | +0.300 (+0.100 to +0.500) |" in results.read_text()
    assert "2 seeds" in results.read_text()


def test_routing_cost_measures_time_and_memory(results):
    app = typer.Typer()
    app.command()(routing_cost.main)
    sizes = ["--hidden-size", 64, "--intermediate-size", 16, "--experts", 4, "--layers", 1, "--tokens", 64]
    output = invoke(app, *sizes, "--rounds", 2, "--dtype", "float32", "--skip", "dense", "--record")
    assert "gshard top-1" in output
    rows = [line for line in results.read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(routing_cost.VARIANTS) - 1 and "dense" not in results.read_text()


def test_callback_cost_compares_steps_and_times_their_parts(results):
    app = typer.Typer()
    app.command()(callback_cost.main)
    sizes = ["--hidden-size", 64, "--intermediate-size", 16, "--experts", 4, "--layers", 1, "--tokens", 64]
    output = invoke(app, *sizes, "--rounds", 2, "--dtype", "float32", "--record")
    assert "callback, each picture" in output
    rows = [line.split(" | ") for line in results.read_text().splitlines() if line.startswith("| ")]
    times = [float(row[1].removesuffix(" ms")) for row in rows[3:]]
    assert len(times) == 4 and min(times) > 0


@pytest.mark.slow
def test_quantized_memory_counts_bytes_and_loads(results, monkeypatch):
    names = ("bfloat16, fused", "4 bits (nf4)")
    monkeypatch.setattr(quantized_memory, "MODES", {name: quantized_memory.MODES[name] for name in names})
    app = typer.Typer()
    app.command()(quantized_memory.main)
    sizes = ["--hidden-size", 64, "--intermediate-size", 64, "--experts", 4, "--layers", 1]
    invoke(app, *sizes, "--record")
    rows = [line.split(" | ") for line in results.read_text().splitlines() if line.startswith("| ")][2:]
    # Per 64 numbers: 32 bytes and a float32 scale; per matrix: 16 float32 values of the code, 78 bytes of metadata.
    assert [row[2] for row in rows] == ["2.000", f"{(64 / 2 + 4) / 64 + (64 + 78) / 64**2:.3f}"]
    assert rows[0][1] == "2.000" and float(rows[1][1]) < 2


def test_peak_memory_counts_what_is_held_at_a_time():
    def task():
        first = torch.zeros(2**18)  # 1 MiB
        second = torch.zeros(2**19)  # 2 MiB
        del first
        return torch.zeros(2**17), second  # 0.5 MiB

    assert routing_cost.peak_memory(task) == 3 * 2**20


def test_accumulation_is_exact_with_the_whole_steps_counts(results):
    app = typer.Typer()
    app.command()(accumulation.main)
    invoke(app, "--experts", 4, "--repeats", 1, "--record")
    rows = [line.strip("| ").split(" | ") for line in results.read_text().splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 9
    for row in rows:
        by_itself, so_far, whole = (float(row[column]) for column in (3, 5, 7))
        assert whole == 0 and min(by_itself, so_far) > 0


def test_lora_cost_compares_what_is_trained(results):
    app = typer.Typer()
    app.command()(lora_cost.main)
    sizes = ["--hidden-size", 64, "--intermediate-size", 16, "--experts", 4, "--layers", 1, "--tokens", 64]
    invoke(app, *sizes, "--rounds", 2, "--record")
    rows = [line.strip("| ").split(" | ") for line in results.read_text().splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == list(lora_cost.VARIANTS)
    assert rows[0][2] == "1.00 (1.00 to 1.00)" and all(float(row[2].split()[0]) > 0 for row in rows)


def test_conversion_measures_every_form_beside_cp(results, monkeypatch):
    monkeypatch.setattr(conversion, "in_fresh_process", lambda function, *arguments: function(*arguments))
    app = typer.Typer()
    app.command()(conversion.main)
    sizes = ["--layers", 1, "--gguf-layers", 1, "--vocab-size", 300, "--hidden-size", 512]
    invoke(app, *sizes, "--repeats", 1, "--record")
    rows = [line for line in results.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]
    assert [row[0] for row in cells] == [*conversion.CONVERSIONS, *conversion.GGUF]
    assert all(float(cell) >= 0 for row in cells for cell in row[1:])
