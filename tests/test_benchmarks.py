"""The benchmarks in small: each runs from end to end, and reports what it measured."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pandas as pd
import pytest
import torch
import typer
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import logging
from typer.testing import CliRunner

from benchmarks import (
    accumulation,
    callback_cost,
    compiled_step,
    conversion,
    decoding,
    estimators,
    expert_scaling,
    loading,
    lora_cost,
    measure,
    peers,
    quantized_memory,
    routing_cost,
    step_profile,
    step_shares,
    training_step,
)
from modeling_grin import GrinMoeForCausalLM
from modeling_grin.tokenization_grinmoe import GrinMoeTokenizer


@pytest.fixture
def results(tmp_path, monkeypatch):
    """RESULTS.md in a temporary folder."""
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "RESULTS.md")
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

    assert measure.peak_memory(task) == 3 * 2**20
    assert measure.allocations(task).clamp(min=0).sum() == 3.5 * 2**20


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


SMALL = ["--hidden-size", 64, "--intermediate-size", 16, "--experts", 4]


@pytest.fixture
def in_this_process(monkeypatch):
    for benchmark in (training_step, expert_scaling, step_shares):
        monkeypatch.setattr(benchmark, "run_with", lambda environment, function, *arguments: function(*arguments))


def a_second_each(tasks, rounds, what):
    """`measure.interleave` with a clock of its own."""
    return {name: [1.0] for name in tasks}


def test_a_fresh_process_has_its_own_environment():
    assert measure.run_with({"MALLOC_TOP_PAD_": "1"}, os.getenv, "MALLOC_TOP_PAD_") == "1"
    assert "MALLOC_TOP_PAD_" not in os.environ


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_peers_have_equal_active_parameters(top_k):
    config = measure.grin_config(64, 16, experts=5, layers=2, vocab_size=96, top_k=top_k)
    ours, dense = peers.build_ours(config, torch.float32), peers.build_dense(config, torch.bfloat16)
    active = 0.0
    for name, parameter in ours.named_parameters():
        if ".gate." not in name:  # the router, which a dense model has no use for
            active += parameter.numel() * (top_k / 5 if ".experts." in name else 1)
    assert sum(parameter.numel() for parameter in dense.parameters()) == round(active)
    assert {parameter.dtype for parameter in dense.parameters()} == {torch.bfloat16}
    experts, mlp = ours.model.layers[1].block_sparse_moe.experts, dense.model.layers[1].mlp
    assert mlp.gate_proj.weight.shape == (top_k * experts.down_proj.shape[2], 64)


def test_peers_compute_the_same_function():
    """Ours and stock Phimoe, with the same weights."""
    torch.manual_seed(0)
    config = measure.grin_config(64, 16, experts=4, layers=2, vocab_size=96)
    ours, rows = peers.build_ours(config, torch.float32).eval(), measure.random_rows(config, 1024)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    stock = peers.build_stock(ours).eval()
    assert {id(parameter) for parameter in stock.parameters()} == {id(parameter) for parameter in ours.parameters()}
    assert stock.config._experts_implementation == "grouped_mm"
    assert stock.config.input_jitter_noise == ours.config.input_jitter_noise == 0.01
    assert {model.config._attn_implementation for model in (ours, stock)} == {"sdpa"}
    with torch.no_grad():
        expected, actual = ours(rows, use_cache=False).logits, stock(rows, use_cache=False).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_the_dense_peer_is_ours_with_one_expert():
    torch.manual_seed(0)
    config = measure.grin_config(64, 32, experts=1, layers=2, vocab_size=96, top_k=1)
    ours, dense = peers.build_ours(config, torch.float32).eval(), peers.build_dense(config, torch.float32).eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    weights = {name: tensor for name, tensor in ours.state_dict().items() if ".block_sparse_moe." not in name}
    for index, layer in enumerate(ours.model.layers):
        gate_up, down = layer.block_sparse_moe.experts.gate_up_proj, layer.block_sparse_moe.experts.down_proj
        names = (f"model.layers.{index}.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
        weights |= zip(names, (*gate_up[0].chunk(2), down[0]), strict=True)
    dense.load_state_dict(weights)
    rows = measure.random_rows(config, 1024)
    with torch.no_grad():
        expected = ours(rows, labels=rows, use_cache=False)
        actual = dense(rows, labels=rows, use_cache=False)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual.loss, expected.loss)


def test_training_step_times_three_models(results, in_this_process):
    app = typer.Typer()
    app.command()(training_step.main)
    sizes = [*SMALL, "--layers", 1, "--layers", 2, "--vocab-size", 96, "--tokens", 64]
    invoke(app, *sizes, "--repeats", 2, "--record")
    rows = [line.strip("| ").split(" | ") for line in results.read_text().splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == [
        f"{layers}, 96, 64, {dtype}" for layers in (1, 2) for dtype in ("float32", "bfloat16")
    ]
    assert all(float(cell.split()[0]) > 0 for row in rows for cell in row[4:6] + row[7:])


def test_training_step_reports_speeds_relative_to_the_others():
    seconds = {"ours": [2.0, 2.0], "dense": [1.0, 1.0], "stock": [5.0, 5.0]}
    seconds |= {"ours, AdamW": [4.0, 4.0], "dense, AdamW": [2.0, 2.0], "stock, AdamW": [8.0, 8.0]}
    cells = training_step.time_row(seconds)
    assert cells[:3] == ["2000 ms", "1000 ms", "5000 ms"] and cells[5] == "4000 ms"
    assert [float(cells[index].split()[0]) for index in (3, 4, 6, 7)] == [0.5, 2.5, 0.5, 2.0]


def test_training_step_adds_the_optimizers_time(monkeypatch):
    monkeypatch.setattr(training_step, "interleave", a_second_each)
    values = {"hidden_size": 64, "intermediate_size": 16, "experts": 4, "layers": 1, "vocab_size": 96}
    found = training_step.time_steps(values, 64, peers.Dtype.float32, "grouped_mm", 1)
    assert found == {"ours": [1.0], "dense": [1.0], "stock": [1.0]} | {
        f"{name}, AdamW": [2.0] for name in ("ours", "dense", "stock")
    }
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.sum().backward()
    training_step.update(torch.optim.AdamW([parameter]))
    assert (parameter < 1).all() and parameter.grad is None


def test_training_step_counts_memory(results, in_this_process):
    app = typer.Typer()
    app.command()(training_step.main)
    sizes = [*SMALL, "--layers", 3, "--vocab-size", 96, "--tokens", 512, "--dtype", "float32"]
    invoke(app, *sizes, "--memory", "--record")
    (row,) = [line.strip("| ").split(" | ") for line in results.read_text().splitlines() if line.startswith("| ")][2:]
    values = {"hidden_size": 64, "intermediate_size": 16, "experts": 4, "layers": 3, "vocab_size": 96}
    found = training_step.count_memory(values, 512, peers.Dtype.float32, "grouped_mm")
    stock, ckpt = found["stock"], found["ours, checkpointed"]
    assert ckpt < 0.8 * found["ours"] and found["stock, checkpointed"] < 0.8 * stock
    assert ckpt > found["weights"], "all gradients are held at the end"
    ratios = [found["ours"] / stock, ckpt / stock, ckpt / found["stock, checkpointed"]]
    assert [float(row[index]) for index in (4, 7, 8)] == pytest.approx(ratios, abs=0.011)


def test_expert_scaling_counts_operations():
    """As torch does while stock's step runs; the attention's, which torch does not count here, by hand."""
    config = measure.grin_config(64, 16, experts=4, layers=2, vocab_size=96)
    model, rows = peers.build_ours(config, torch.float32), measure.random_rows(config, 1024)
    with FlopCounterMode(display=False) as counter:
        peers.step(peers.build_stock(model, "eager"), rows)
    counts = counter.get_flop_counts()["Global"]
    counted = sum(number for operator, number in counts.items() if "attention" not in str(operator))
    pairs = 1024 * 512 / 2  # of positions, of which one sees the other
    assert expert_scaling.operations(model, rows) == counted + 2 * 7 * 2 * pairs * 64


@pytest.mark.parametrize(("allocator", "fresh"), [("keep", False), ("default", True)])
def test_expert_scaling_predicts_from_rates(allocator, fresh, monkeypatch):
    """Where three products of 64 rows, and each pass over 4096 bytes, take a second."""
    tasks: dict = {}
    monkeypatch.setattr(expert_scaling, "PRODUCT_ROWS", 64)
    monkeypatch.setattr(expert_scaling, "BUFFER_BYTES", 4096)
    monkeypatch.setattr(expert_scaling, "interleave", lambda *given: tasks.update(given[0]) or a_second_each(*given))
    values = {"hidden_size": 64, "intermediate_size": 16, "experts": 4, "layers": 1, "vocab_size": 96}
    point = expert_scaling.measure(values, 128, peers.Dtype.bfloat16, allocator, 1)
    model = peers.build_ours(measure.grin_config(**values), torch.bfloat16)
    rows = measure.random_rows(model.config, 128)
    weight = model.model.layers[0].block_sparse_moe.experts.gate_up_proj[0]
    assert point.products == pytest.approx(expert_scaling.operations(model, rows) / (3 * 2 * 64 * weight.numel()))
    assert point.weights == pytest.approx(3 * 2 * sum(parameter.numel() for parameter in model.parameters()) / 4096)
    tensors = measure.allocations(tasks["step"]).clamp(min=0).sum().item()
    gradients = sum(parameter.nbytes for parameter in model.parameters())
    assert point.activations == pytest.approx(2 * (tensors - gradients) / 4096, rel=0.01)
    assert (tasks["write"] is expert_scaling.write_fresh) == fresh
    for task in tasks.values():
        task()


def test_expert_scaling_measures_predicts_and_draws(results, in_this_process, tmp_path, monkeypatch):
    monkeypatch.setattr(expert_scaling, "PRODUCT_ROWS", 64)
    monkeypatch.setattr(expert_scaling, "BUFFER_BYTES", 2**20)
    app = typer.Typer()
    app.command()(expert_scaling.main)
    sizes = ["--hidden-size", 64, "--intermediate-size", 16, "--layers", 1, "--dtype", "float32", "--repeats", 2]
    sweeps = ["--experts", 2, "--experts", 4, "--tokens", 64, "--tokens", 128]
    fixed = ["--fixed-experts", 4, "--fixed-tokens", 128, "--allocator", "default"]
    invoke(app, *sizes, *sweeps, *fixed, "--image", tmp_path / "plot.png", "--record")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    rows = [line.strip("| ").split(" | ") for line in results.read_text().splitlines() if line.startswith("| ")][2:]
    assert [row[:2] for row in rows] == [
        ["float32, 2, 128", "128"],
        ["float32, 4, 128", "64"],
        ["float32, 4, 64", "32"],
    ]
    assert all(float(cell) >= 0 for row in rows for cell in row[3:])


def test_expert_scaling_reports_microseconds_per_token():
    point = expert_scaling.Point(
        peers.Dtype.float32, 8, 1000, measured=0.9, products=0.4, weights=0.15, activations=0.05
    )
    cells = ["float32, 8, 1000", "250", "900 ms", "900.0", "600.0", "400.0", "150.0", "50.0", "1.50"]
    assert expert_scaling.row(point) == cells


def test_step_shares_time_every_part(results, in_this_process):
    app = typer.Typer()
    app.command()(step_shares.main)
    sizes = [*SMALL, "--layers", 2, "--vocab-size", 96, "--tokens", 64, "--tokens", 512]
    invoke(app, *sizes, "--repeats", 2, "--record")
    rows = [line.strip("| ").split(" | ") for line in results.read_text().splitlines() if line.startswith("| ")][2:]
    for column in (1, 3):
        times = {row[0]: float(row[column].removesuffix(" ms")) for row in rows}
        assert list(times) == list(step_shares.PARTS)
        assert min(times[name] for name in (*step_shares.IN_DECODER, step_shares.OF_CALLBACK)) > 0
        assert times[step_shares.OF_BALANCE] < times["balance loss"]


def test_step_shares_count_a_layers_parts_once_per_layer(monkeypatch):
    monkeypatch.setattr(step_shares, "interleave", a_second_each)
    values = {"hidden_size": 64, "intermediate_size": 16, "experts": 4, "layers": 3, "vocab_size": 96}
    found = step_shares.time_parts(values, 64, peers.Dtype.float32, 1)
    of_step = {"whole", "noise keys", "balance loss", step_shares.OF_CALLBACK}
    differences = {"head and loss": 0, "norms, residuals, embedding": 1 - 5 * 3 - 2}
    assert found == {name: 1 if name in of_step else 3 for name in step_shares.PARTS} | differences


def test_loading_compares_with_stock_and_with_the_files(results, monkeypatch):
    monkeypatch.setattr(loading, "run_with", lambda environment, function, *arguments: function(*arguments))
    app = typer.Typer()
    app.command()(loading.main)
    arguments = ["--layers", 2, "--vocab-size", 300, "--hidden-size", 512, "--repeats", 2]
    invoke(app, *arguments, "--record")
    rows = [line.strip("| ").split(" | ") for line in results.read_text().splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == [*loading.MODELS, loading.READING]
    assert rows[1][3] == rows[2][2] == "1.00 (1.00 to 1.00)"
    # In this process, which may hold freed pages: a model then needs few new ones.
    assert all(float(row[1]) > 0 and float(row[5]) <= float(row[7]) and float(row[7]) > 0 for row in rows[:2])

    class Wrong:
        @staticmethod
        def from_pretrained(folder):
            model = GrinMoeForCausalLM.from_pretrained(folder)
            with torch.no_grad():
                model.model.layers[1].block_sparse_moe.experts.down_proj.neg_()
            return model

    monkeypatch.setitem(loading.MODELS, "ours", Wrong)
    with pytest.raises(ValueError, match=r"layer 1, expert \d+: \['down_proj'\] differ"):
        CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_decoding_compares_tokens_per_second_with_what_a_step_reads(results, monkeypatch):
    monkeypatch.setattr(decoding, "run_with", lambda environment, function, *arguments: function(*arguments))
    monkeypatch.setattr(decoding, "READ_BYTES", 2**20)
    app = typer.Typer()
    app.command()(decoding.main)
    sizes = ["--layers", 1, "--vocab-size", 300, "--hidden-size", 512, "--prompt-length", 8]
    invoke(app, *sizes, "--repeats", 2, "--record")
    rows = [line.strip("| ").split(" | ") for line in results.read_text().splitlines() if line.startswith("| ")][2:]
    assert [row[0].split(":")[0] for row in rows] == ["decoding, batch 1", "decoding, batch 8", "prefill, 8 tokens"]
    assert all(float(cell) > 0 for row in rows for cell in row[1:4])


@torch.inference_mode()
def test_a_decoding_step_reads_the_experts_that_were_chosen():
    config = measure.grin_config(hidden_size=64, intermediate_size=16, experts=4, layers=2, vocab_size=96)
    model = peers.build_ours(config, torch.bfloat16).eval()
    decoder = decoding.Decoder(model, torch.randint(96, (1, 8)))
    shared = sum(p.nbytes for name, p in model.named_parameters() if ".experts." not in name and "embed" not in name)
    of_experts = 2 * (2 * 3 * 64 * 16 * 2)  # 2 layers of 2 experts, 3 matrices in 2 bytes
    cache = 2 * 2 * 8 * config.num_key_value_heads * config.head_dim * 2
    assert decoder.bytes_per_step() == shared + of_experts + cache
    before = decoder.next_token.clone()
    decoder.decode()
    assert decoder.cache.get_seq_length() == 8 and torch.equal(decoder.next_token, before)


def test_compiled_step_compares_with_eager(results, monkeypatch):
    monkeypatch.setattr(compiled_step, "run_with", lambda environment, function, *arguments: function(*arguments))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    app = typer.Typer()
    app.command()(compiled_step.main)
    sizes = [*SMALL, "--layers", 1, "--vocab-size", 96, "--tokens", 64, "--dtype", "float32"]
    invoke(app, *sizes, "--repeats", 2, "--record")
    rows = [line.strip("| ").split(" | ") for line in results.read_text().splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == ["float32, 64"]
    assert all(float(cell.split()[0]) > 0 for cell in rows[0][1:-1])


def test_step_profile_compares_operators(results, monkeypatch):
    monkeypatch.setattr(step_profile, "run_with", lambda environment, function, *arguments: function(*arguments))
    app = typer.Typer()
    app.command()(step_profile.main)
    sizes = [*SMALL, "--layers", 1, "--vocab-size", 96, "--tokens", 64, "--dtype", "float32"]
    invoke(app, *sizes, "--repeats", 1, "--operators", 100, "--record")
    rows = [line.strip("| ").split(" | ") for line in results.read_text().splitlines() if line.startswith("| ")][2:]
    calls = {row[0]: (int(row[2]), int(row[4])) for row in rows}
    assert rows[0][0] == "the whole step"
    assert calls["_grouped_mm"][0] > 0 == calls["_grouped_mm"][1]
    assert calls["ExpertsFunction"] == (0, 1)
