"""Compare the language models that router-gradient estimators train, each at a learning rate of its own.

A small GRIN-MoE learns the source code of Python's standard library from scratch. The rate of each arm is chosen on a
seed that is not reported; arms of one seed have equal first weights and equal tokens in equal order. Each run is
recorded when it ends, so an interrupted command continues. `routing_cost.py` measures the cost, and
`planted_router.py` compares all estimators where routers decide the error.

    python -m benchmarks.estimators train --output-dir text     # 20 core-minutes
    python -m benchmarks.estimators report --output-dir text    # table, CSV and plot

`--scale large` is for one GPU: 118M parameters, 30M tokens of the installed packages' Python code, 25 minutes on an
H200 by estimate. It has not run whole; with 4 steps a run it went from end to end on a CPU. Its stopping rule, written
before: report the interval at the end and where the curves cross, whatever they are.
"""

import json
import math
import multiprocessing
import sysconfig
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, NamedTuple

import pandas as pd
import torch
import typer
from matplotlib.figure import Figure
from transformers.utils import logging

from benchmarks.intervals import interval, paired
from benchmarks.measure import console, show
from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM, GrinMoeTokenizer
from modeling_grin.analysis import expert_load
from modeling_grin.routing_grinmoe import keep_set
from recipes.demo import read_standard_library, tiny_config

app = typer.Typer(help=__doc__, no_args_is_help=True, rich_markup_mode="markdown")

EVALUATIONS, ALPHA = 6, 0.01
# The keep set compares ratios of logits, so their scale, early or late, does not matter. With 8 random logits the
# released 0.01 leaves 3 % of tokens a choice, too few to learn a router from in some hundred steps; 0.1 leaves 29 %.
JITTER = 0.1
ARMS: dict[str, dict[str, Any]] = {
    "gshard": {"router_estimator": "gshard"},
    "sparsemixer_v2": {"router_estimator": "sparsemixer_v2"},
    "sparsemixer_v2 greedy": {"router_sampling": False},
    "sparsemixer_v2 frozen": {"freeze_router": True},
}
# Greedy and frozen routers share v2's forward pass; v2 and gshard do not share theirs.
CONTROLS = {arm: "gshard" if arm in ("gshard", "sparsemixer_v2") else "sparsemixer_v2" for arm in ARMS}
CHOOSING_SEED, VALIDATION_ROWS = 100, 128
CHARACTERS = {"small": 0, "large": 120_000_000}  # of Python code beyond the standard library, up to so many in all


@dataclass(frozen=True)
class Scale:
    """A size of the experiment."""

    sizes: dict[str, int]
    batch: int
    """Rows of a step."""
    tokens: int
    choosing_tokens: int
    rates: tuple[float, ...]
    seeds: int
    arms: tuple[str, ...] = tuple(ARMS)

    @property
    def row(self) -> int:
        return self.sizes["max_position_embeddings"]


SCALES = {
    "small": Scale(
        {"vocab_size": 1024, "hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 3,
         "num_attention_heads": 3, "num_key_value_heads": 1, "num_local_experts": 8, "max_position_embeddings": 128},
        batch=16, tokens=300_000, choosing_tokens=300_000, rates=(7.5e-4, 1.5e-3, 3e-3, 6e-3), seeds=6,
    ),
    "large": Scale(
        {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 8,
         "num_attention_heads": 8, "num_key_value_heads": 2, "num_local_experts": 16, "max_position_embeddings": 512},
        batch=64, tokens=30_000_000, choosing_tokens=10_000_000, rates=(5e-4, 1e-3, 2e-3), seeds=4,
        arms=("gshard", "sparsemixer_v2", "sparsemixer_v2 greedy"),
    ),
}  # fmt: skip

OutputDir = Annotated[Path, typer.Option(help="folder of the results")]


class Data(NamedTuple):
    """Tokens, and what a config has to know about their tokenizer."""

    config: GrinMoeConfig
    training: torch.Tensor
    """`[rows, positions]`."""
    validation: torch.Tensor


def pack(texts: list[str], tokenizer: GrinMoeTokenizer, row: int) -> torch.Tensor:
    """Cut one long stream of tokens, <|endoftext|> after each text, into rows."""
    ids = tokenizer(texts, verbose=False)["input_ids"]
    stream = torch.tensor(
        list(chain.from_iterable([*text, tokenizer.eos_token_id] for text in ids)), dtype=torch.int32
    )
    return stream[: len(stream) // row * row].reshape(-1, row)


def read_texts(name: str) -> list[str]:
    """Python modules: the standard library's; for the large scale the installed packages' as well."""
    texts, enough = read_standard_library(), CHARACTERS[name]
    if name == "large":
        folder = Path(sysconfig.get_paths()["purelib"])
        for path in sorted(folder.rglob("*.py")):
            if sum(map(len, texts)) > enough:
                break
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
    return texts


def prepare(name: str) -> Data:
    """Read and tokenize the texts of a scale; every 20th module is held out."""
    scale, texts = SCALES[name], read_texts(name)
    tokenizer = GrinMoeTokenizer.train_from_iterator(texts[:200], scale.sizes["vocab_size"])
    training = pack([text for i, text in enumerate(texts) if i % 20], tokenizer, scale.row)
    validation = pack(texts[::20], tokenizer, scale.row)
    return Data(tiny_config(tokenizer), training, validation[:: max(1, len(validation) // VALIDATION_ROWS)])


@torch.no_grad()
def evaluate(model: GrinMoeForCausalLM, rows: torch.Tensor) -> dict[str, float]:
    """Return loss, evenness of the expert load and share of near-ties on validation text, in inference routing."""
    model.eval()
    batches = [{"input_ids": batch} for batch in rows.to(model.device).long().split(32)]
    losses, ties = [], []
    for batch in batches:
        outputs = model(**batch, labels=batch["input_ids"], use_cache=False, output_router_logits=True)
        losses.append(outputs.loss.item())
        for logits in outputs.router_logits:
            kept = keep_set(logits.float(), torch.ones_like(logits, dtype=torch.bool), JITTER)
            ties.append((kept.sum(dim=-1) > 1).float().mean().item())
    entropy = torch.special.entr(expert_load(model, batches[:2])).sum(dim=-1).mean().item()
    model.train()
    evenness = entropy / math.log(model.config.num_local_experts)
    return {"loss": mean(losses), "entropy": evenness, "near_ties": mean(ties)}


class Run(NamedTuple):
    """One training."""

    arm: str
    rate: float
    seed: int
    tokens: int


def build(data: Data, sizes: dict[str, int], changes: dict[str, Any], seed: int, device: str) -> GrinMoeForCausalLM:
    """A model whose first weights depend on the seed alone."""
    config = {**data.config.to_dict(), "head_dim": None, "router_jitter_noise": JITTER, **sizes, **changes}
    torch.manual_seed(seed)
    return GrinMoeForCausalLM(GrinMoeConfig(**{**config, "router_aux_loss_coef": ALPHA})).to(device).train()


def cosine(step: int, steps: int) -> float:
    """The learning rate's factor: warm-up over a twentieth, then half a cosine."""
    return min((step + 1) / (steps // 20 + 1), 0.5 + 0.5 * math.cos(math.pi * step / steps))


def run(scale: Scale, plan: Run, data: Data, device: str) -> dict[str, Any]:
    """Train one model; its order of data depends on the seed alone."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    start = time.process_time()
    model = build(data, scale.sizes, ARMS[plan.arm], plan.seed, device)
    optimizer = torch.optim.AdamW(model.parameters(), plan.rate, (0.9, 0.95), weight_decay=0.1, fused=True)
    steps = plan.tokens // (scale.batch * scale.row)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, steps))
    generator = torch.Generator().manual_seed(plan.seed)
    epochs = math.ceil(steps * scale.batch / len(data.training))
    order = torch.cat([torch.randperm(len(data.training), generator=generator) for _ in range(epochs)])
    curve = [{"tokens": 0, **evaluate(model, data.validation)}]
    marks = {round(steps * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)}
    for step, chosen in enumerate(order[: steps * scale.batch].split(scale.batch), start=1):
        rows = data.training[chosen].to(device).long()
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step in marks:
            curve.append({"tokens": step * rows.numel(), **evaluate(model, data.validation)})
    return {**plan._asdict(), "seconds": time.process_time() - start, "curve": curve}


def read_runs(path: Path) -> dict[Run, dict[str, Any]]:
    """The finished runs of a file."""
    entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {Run(*(entry[field] for field in Run._fields)): entry for entry in entries}


def final(entry: dict[str, Any]) -> float:
    return entry["curve"][-1]["loss"]


def chosen_rates(scale: Scale, runs: dict[Run, dict[str, Any]]) -> dict[str, float]:
    """The best rate of each arm on the seed that is not reported."""
    losses = {
        arm: {rate: final(runs[Run(arm, rate, CHOOSING_SEED, scale.choosing_tokens)]) for rate in scale.rates}
        for arm in scale.arms
    }
    return {arm: min(by_rate, key=lambda rate: by_rate[rate]) for arm, by_rate in losses.items()}


@app.command()
def train(
    output_dir: OutputDir = Path("text"),
    scale: Annotated[str, typer.Option(help=f"one of {', '.join(SCALES)}")] = "small",
    workers: Annotated[int, typer.Option(min=1, help="parallel runs, one thread each")] = 2,
    device: Annotated[str, typer.Option(help="cpu, or cuda with bfloat16")] = "cpu",
) -> None:
    """Choose a rate for each arm and train every arm with every seed; finished runs are not repeated.

    Example: python -m benchmarks.estimators train --workers 1 --output-dir text
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    path, size = output_dir / f"{scale}.jsonl", SCALES[scale]
    data = prepare(scale)
    choosing = [Run(arm, rate, CHOOSING_SEED, size.choosing_tokens) for arm in size.arms for rate in size.rates]
    train_all(size, choosing, data, path, workers, device)
    rates = chosen_rates(size, read_runs(path))
    console.print(f"rates: {rates}")
    reported = [Run(arm, rates[arm], seed, size.tokens) for seed in range(size.seeds) for arm in size.arms]
    train_all(size, reported, data, path, workers, device)


def train_all(scale: Scale, plans: list[Run], data: Data, path: Path, workers: int, device: str) -> None:
    """Train what is missing in the file, and append it."""
    done = read_runs(path)
    todo = [plan for plan in plans if plan not in done]
    console.print(f"{len(todo)} runs, {len(plans) - len(todo)} done before")
    start, spawn = time.monotonic(), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn) as pool, path.open("a") as file:
        futures = [pool.submit(run, scale, plan, data, device) for plan in todo]
        for count, future in enumerate(as_completed(futures), start=1):
            result = future.result()
            print(json.dumps(result), file=file, flush=True)
            left = (time.monotonic() - start) / count * (len(todo) - count) / 60
            name = f"{result['arm']}, rate {result['rate']:g}, seed {result['seed']}"
            console.print(f"{count}/{len(todo)}  {name}: validation loss {final(result):.4f}; {left:.0f} min left")


def minus_control(loss: pd.DataFrame, arm: str) -> pd.DataFrame:
    """Return, by seed and tokens, the difference to the arm's control."""
    return loss.loc[arm] - loss.loc[CONTROLS[arm]]


def plot(loss: pd.DataFrame, path: Path) -> None:
    """Draw validation loss and the paired differences with their 95 % intervals; `loss` `[arm + seed, tokens]`."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curves, differences = figure.subplots(1, 2)
    million = loss.columns / 1e6
    for arm in loss.index.unique("arm"):
        curves.plot(million, loss.loc[arm].mean(), marker="o", markersize=3, label=arm)
        if arm == CONTROLS[arm]:
            continue
        bands = [interval(list(values)) for _, values in minus_control(loss, arm).items()]
        (line,) = differences.plot(million, [band.mean for band in bands], label=f"{arm} minus {CONTROLS[arm]}")
        low, high = [band.low for band in bands], [band.high for band in bands]
        differences.fill_between(million, low, high, color=line.get_color(), alpha=0.2)
    differences.axhline(0, color="black", linewidth=0.8)
    curves.set(xlabel="million tokens", title="validation loss (nats per token)")
    differences.set(xlabel="million tokens", title="paired difference, 95 % interval")
    for axes in (curves, differences):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


@app.command()
def report(
    output_dir: OutputDir = Path("text"),
    scale: Annotated[str, typer.Option(help=f"one of {', '.join(SCALES)}")] = "small",
    record: Annotated[bool, typer.Option(help="append the table to benchmarks/RESULTS.md")] = False,
) -> None:
    """Write table, OUTPUT_DIR/estimators.csv and .png of the seeds that every arm has finished.

    Example: python -m benchmarks.estimators report --output-dir text
    """
    size, runs = SCALES[scale], read_runs(output_dir / f"{scale}.jsonl")
    reported = [entry for plan, entry in runs.items() if plan.seed != CHOOSING_SEED and plan.tokens == size.tokens]
    counts = Counter(entry["seed"] for entry in reported)
    seeds = [seed for seed, count in counts.items() if count == len(size.arms)]
    if len(seeds) < 2:
        raise typer.BadParameter(f"{output_dir} has fewer than two finished seeds; `train` goes on")
    points = pd.json_normalize([entry for entry in reported if entry["seed"] in seeds], "curve", ["arm", "seed"])
    points.to_csv(output_dir / "estimators.csv", index=False)
    table = points.pivot(index=["arm", "seed"], columns="tokens")
    loss, entropy, ties = (table[key] for key in ("loss", "entropy", "near_ties"))
    plot(loss.iloc[:, 1:], output_dir / "estimators.png")
    rates, end, rows = chosen_rates(size, runs), loss.columns[-1], []
    for arm in size.arms:
        early, last = f"{loss.loc[arm].iloc[:, EVALUATIONS // 3].mean():.3f}", interval(list(loss.loc[arm][end]))
        cells = [arm, f"{rates[arm]:g}", early, last.unsigned()]
        if arm == CONTROLS[arm]:
            cells += ["", "", "", ""]
        else:
            gap = paired(list(loss.loc[arm][end]), list(loss.loc[CONTROLS[arm]][end]))
            cells += [CONTROLS[arm], str(gap), f"{gap.p:.2g}", f"{gap.detectable:.3f}"]
        rows.append([*cells, *(f"{x.loc[arm][end].mean():.3f}" for x in (entropy, ties))])
    columns = ["arm", "rate", "at a third", "at the end", "control", "minus control", "p", "detectable",
               "load entropy", "near-ties"]  # fmt: skip
    title = f"Estimators on text: validation loss, {len(seeds)} paired seeds of {end / 1e6:.2f}M tokens"
    minutes = sum(entry["seconds"] for entry in runs.values()) / 60
    notes = (
        f"Scale {scale}; {minutes:.0f} core-minutes for {len(runs)} runs, those that chose the rates among "
        f"{', '.join(f'{rate:g}' for rate in size.rates)} included. Mean and 95 % interval over the seeds, paired "
        "differences by Student's t. Detectable: the smallest true difference found with 80 % power at the level of "
        "5 %. v2 and gshard have different forward passes; greedy and frozen routers share v2's. Load entropy is "
        "relative to log E; near-ties: the share of tokens with more than one expert in the keep set, r = 0.1."
    )
    show(title, columns, rows, record, notes)


def first_gradients(model: GrinMoeForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """The gradients of the routers' weights by the task and by the balance loss, `[2, L E H]`."""
    layers, gate = model.model.layers, model.model.layers[0].block_sparse_moe.gate.weight
    model.model.router_gradients = torch.zeros(len(layers), 2, *gate.shape)
    model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
    return model.model.router_gradients.transpose(0, 1).flatten(1)


@app.command()
def ratio(
    rows: Annotated[int, typer.Option(min=2, help="rows of each of two batches")] = 64,
    record: Annotated[bool, typer.Option(help="append the table to benchmarks/RESULTS.md")] = False,
) -> None:
    """Measure the routers' first gradients by the task and by the balance loss, for several r.

    Example: python -m benchmarks.estimators ratio
    """
    logging.set_verbosity_error()
    data, sizes, table = prepare("small"), SCALES["small"].sizes, []
    batches = data.training[: 2 * rows].long().split(rows)
    for estimator, jitter in (("gshard", JITTER), *(("sparsemixer_v2", r) for r in (0.01, 0.1, 0.5))):
        model = build(data, sizes, {"router_estimator": estimator, "router_jitter_noise": jitter}, 0, "cpu")
        (task, balance), (other, later) = (first_gradients(model, batch) for batch in batches)
        cosines = (torch.cosine_similarity(*pair, dim=0).item() for pair in ((task, other), (balance, later)))
        label = estimator if estimator == "gshard" else f"{estimator}, r = {jitter:g}"
        table.append([label, f"{balance.norm() / task.norm():.2f}", *(f"{cosine:.2f}" for cosine in cosines)])
    columns = ["", "balance / task", "cosine of the task's, two batches", "of the balance loss's"]
    notes = f"Small scale, first weights, alpha {ALPHA}, {batches[0].numel()} tokens a batch."
    show("Gradients of untrained routers", columns, table, record, notes)


if __name__ == "__main__":
    app()
