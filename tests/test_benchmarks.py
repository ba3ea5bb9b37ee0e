"""Each benchmark, but `compiled_step`, runs at debug size and records a table of numbers."""

import importlib
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import (
    decoding,
    estimators,
    expert_scaling,
    global_balance,
    intervals,
    measure,
    peers,
    planted_router,
    quantized_memory,
)

SMALL = "--hidden-size 64 --intermediate-size 16 --experts 4 --layers 1"
TINY = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1,
        "num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 16}  # fmt: skip
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


@pytest.fixture
def one_process(monkeypatch):
    """Workers are threads, so that what a test has replaced counts there; torch's number of threads is restored."""
    threads = torch.get_num_threads()
    for module in (estimators, global_balance, planted_router):
        monkeypatch.setattr(module, "ProcessPoolExecutor", lambda workers, _: ThreadPoolExecutor(workers))
    yield
    torch.set_num_threads(threads)


def test_estimators_chooses_rates_resumes_and_reports(monkeypatch, trained_tokenizer, tmp_path, one_process):
    ids = torch.randint(32, (24, 16), generator=torch.Generator().manual_seed(0))
    small = estimators.Scale(TINY, batch=2, tokens=32 * 7, choosing_tokens=32 * 6, rates=(1e-3, 1e-2), seeds=2)
    monkeypatch.setattr(estimators, "SCALES", {"small": small})
    config = estimators.tiny_config(trained_tokenizer)
    monkeypatch.setattr(estimators, "prepare", lambda name: estimators.Data(config, ids[:16], ids[16:]))
    train = ["train", "--workers", "1", "--output-dir", str(tmp_path)]
    first = CliRunner().invoke(estimators.app, train)
    assert first.exit_code == 0, (first.output, first.exception)
    assert "8 runs, 0 done before" in first.output
    assert "0 runs, 8 done before" in CliRunner().invoke(estimators.app, train).output
    runs = estimators.read_runs(tmp_path / "small.jsonl")
    assert len(runs) == 4 * 2 + 4 * 2
    rates = estimators.chosen_rates(small, runs)
    for plan in runs:
        if plan.seed != estimators.CHOOSING_SEED:
            assert plan.rate == rates[plan.arm]
    weights = [estimators.build(estimators.Data(config, ids, ids), TINY, estimators.ARMS[arm], 5, "cpu") for arm in
               ("gshard", "sparsemixer_v2")]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(weights[0].parameters(), weights[1].parameters(), strict=True))
    report = CliRunner().invoke(estimators.app, ["report", "--output-dir", str(tmp_path), "--record"])
    assert report.exit_code == 0 and (tmp_path / "estimators.png").is_file()


@pytest.mark.parametrize("forward", [False, True])
def test_default_moe_is_the_dense_mixture_where_experts_are_constant(forward):
    """If each expert's output is its running mean, the router's gradient is the dense one."""
    generator = torch.Generator().manual_seed(0)
    logits, means = (
        torch.randn(6, 5, generator=generator),
        torch.randn(1, 5, planted_router.HIDDEN, generator=generator),
    )
    logits.requires_grad_()
    outputs = means.expand(6, -1, -1).clone()
    defaults = planted_router.Defaults(1, 5, forward)
    defaults.means = means
    routing = planted_router.ROUTER_ESTIMATORS["gshard"](logits, 2, 0.1, None)
    mixed = defaults.mix(logits, outputs, routing)
    slope = torch.randn(mixed.shape, generator=generator)
    (gradient,) = torch.autograd.grad((mixed * slope).sum(), logits)

    probs = logits.softmax(-1)
    dense = probs @ means[0]
    total = probs.detach().topk(2).values.sum(-1, keepdim=True)
    value = dense if forward else torch.stack([w @ means[0, e] for w, e in zip(*routing[:2], strict=True)])
    (expected,) = torch.autograd.grad(((dense if forward else dense / total) * slope).sum(), logits)
    torch.testing.assert_close(mixed, value)
    torch.testing.assert_close(gradient, expected)


def test_default_moe_moves_the_means_of_chosen_experts():
    defaults = planted_router.Defaults(2, 3, True)
    outputs = torch.arange(4 * 3 * planted_router.HIDDEN).float().reshape(4, 3, -1)
    experts = torch.tensor([[0], [0], [1], [0]])
    defaults.update(outputs, planted_router.Routing(torch.ones(4, 1), experts))
    step = 1 - planted_router.DEFAULT_DECAY
    torch.testing.assert_close(defaults.means[0, 0], step * (outputs[0, 0] + outputs[1, 0]) / 2)
    torch.testing.assert_close(defaults.means[1, 0], step * outputs[3, 0])
    torch.testing.assert_close(defaults.means[1, 1], step * outputs[2, 1])
    assert not defaults.means[0, 1:].any() and not defaults.means[1, 2].any()


def test_planted_router_trains_resumes_and_reports(monkeypatch, tmp_path, one_process):
    """Students of one seed start alike and see the same; a student that is the teacher has no error."""
    monkeypatch.setattr(planted_router, "STEPS", 20)
    monkeypatch.setattr(planted_router, "TEST_TOKENS", 64)
    monkeypatch.setattr(planted_router, "REPORTED_SEEDS", range(2))
    cases = [planted_router.Case(arm, teacher) for arm, teacher in
             (("gshard", "shares"), ("sparsemixer_v2", "ones"), ("sparsemixer_v2 no exception", "ones"))]  # fmt: skip
    monkeypatch.setattr(planted_router, "CASES", cases)
    monkeypatch.setattr(planted_router, "report", lambda *args: None)
    planted_router.main(tmp_path, workers=1)
    runs = planted_router.read_runs(tmp_path / "runs.jsonl")
    assert set(runs) == set(cases)
    size = (tmp_path / "runs.jsonl").stat().st_size
    planted_router.main(tmp_path, workers=1)
    assert (tmp_path / "runs.jsonl").stat().st_size == size
    ones, other = (runs[case]["students"] for case in cases[1:])
    assert all(a["error"][0] == b["error"][0] and a["error"][-1] != b["error"][-1]
               for a, b in zip(ones, other, strict=True))  # fmt: skip

    def normal(seeds, number, *shape):  # the student's numbers 3 and 4 are the teacher's 1 and 2
        scale = {3: 1 / planted_router.ROUTER_STD * 4, 4: 2.0}.get(number, 1.0)
        return scale * original(seeds, number - 2 if number > 2 else number, *shape)

    original = planted_router.normal
    monkeypatch.setattr(planted_router, "normal", normal)
    for arm, teacher in (("gshard", "shares"), ("sparsemixer_v2", "ones")):
        case = planted_router.Case(arm, teacher, jitter=0.0)
        (student,) = planted_router.train(case, [3], [1e-3])
        assert student["error"][0] < 1e-6 and student["nmi"][0] == pytest.approx(1)


def test_global_balance_trains_resumes_and_reports(monkeypatch, trained_tokenizer, tmp_path, one_process):
    generator = torch.Generator().manual_seed(0)
    rows = {name: (torch.randint(32, (12, 16), generator=generator), torch.randint(32, (8, 16), generator=generator))
            for name in ("python", "prose")}  # fmt: skip
    monkeypatch.setattr(global_balance, "SIZES", TINY)
    monkeypatch.setattr(global_balance, "ROW", 16)
    data = estimators.Data(estimators.tiny_config(trained_tokenizer), None, None)
    monkeypatch.setattr(global_balance, "prepare", lambda: (data, rows))
    app = typer.Typer()
    app.command()(global_balance.main)
    arguments = ["--tokens", "512", "--seeds", "2", "--workers", "1", "--output-dir", str(tmp_path)]
    first = CliRunner().invoke(app, [*arguments, "--record"])
    assert first.exit_code == 0, (first.output, first.exception)
    assert "6 runs, 0 done before" in first.output
    assert "0 runs, 6 done before" in CliRunner().invoke(app, arguments).output
    runs = global_balance.read_runs(tmp_path / "runs.jsonl")
    losses = {plan.arm: entry["losses"]["python"] for plan, entry in runs.items() if plan.seed == 0}
    assert len(set(losses.values())) == 3, "f makes a difference, and so does the balance loss"


def test_intervals_are_those_of_student():
    """Against a table: four values 1, 2, 3, 4 have t = 3.182, the 80 % quantile of 3 degrees of freedom is 0.978."""
    found = intervals.interval([1.0, 2.0, 3.0, 4.0])
    error = (5 / 3) ** 0.5 / 2
    assert found.mean == 2.5 and found.high - found.low == pytest.approx(2 * 3.182 * error, rel=1e-3)
    assert found.detectable == pytest.approx((3.182 + 0.978) * error, rel=1e-3)
    assert found.p == pytest.approx(0.0305, abs=2e-4)
    assert intervals.paired([2.0, 4.0, 9.0], [1.0, 2.0, 6.0]).mean == 2


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
