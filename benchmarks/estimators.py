"""Compare the models that each router-gradient estimator trains.

A small GRIN-MoE (2.3M parameters, 8 experts) learns the source code of Python's standard library from scratch, once
per estimator and seed: equal weights, equal tokens in equal order. Each run is recorded when it ends, so an
interrupted command continues. `routing_cost.py` measures the cost.

    python benchmarks/estimators.py train --output-dir runs    # about 35 minutes on 2 cores
    python benchmarks/estimators.py report --output-dir runs   # table, CSV and plot of the recorded runs
"""

import json
import math
import multiprocessing
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean
from typing import Annotated

import pandas as pd
import torch
import typer
from matplotlib.figure import Figure
from transformers.utils import logging

from benchmarks.measure import console, show
from benchmarks.routing_cost import VARIANTS
from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM, GrinMoeTokenizer
from modeling_grin.analysis import expert_load
from modeling_grin.routing_grinmoe import keep_set
from recipes.demo import pack, read_standard_library, tiny_config

app = typer.Typer(help=__doc__, no_args_is_help=True, rich_markup_mode="markdown")

SIZES = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "max_position_embeddings": 128}
VOCAB_SIZE, BATCH, LEARNING_RATE, EVALUATIONS = 2048, 8, 3e-3, 8
# The keep set compares ratios of logits, so their scale, early or late, does not matter. With 8 random logits the
# released 0.01 leaves 3 % of tokens a choice, too few to learn a router from in some hundred steps; 0.1 leaves 29 %.
JITTER = 0.1

PANELS = {
    "Estimators, top-2": list(VARIANTS)[:5],
    "Ways to train the router, and top-1": ["gshard", "sparsemixer_v2", *list(VARIANTS)[5:]],
}
COLORS = dict(zip(VARIANTS, ["black", "C0", "C1", "C2", "C3", "C4", "C5", "dimgray", "C6"], strict=True))

OutputDir = Annotated[Path, typer.Option(help="folder of the results")]
Data = tuple[GrinMoeTokenizer, torch.Tensor, torch.Tensor]


def prepare() -> Data:
    """Return tokenizer, training rows and validation rows; every 20th module is held out."""
    texts = read_standard_library()
    tokenizer = GrinMoeTokenizer.train_from_iterator(texts, VOCAB_SIZE)
    training = pack([text for i, text in enumerate(texts) if i % 20], tokenizer)[:]["input_ids"]
    return tokenizer, training, pack(texts[::20], tokenizer)[::4]["input_ids"]


@torch.no_grad()
def evaluate(model: GrinMoeForCausalLM, rows: torch.Tensor) -> dict[str, float]:
    """Return loss, evenness of the expert load and share of near-ties on validation text, in inference routing."""
    model.eval()
    batches = [{"input_ids": batch} for batch in rows.split(32)]
    losses, ties = [], []
    for batch in batches:
        outputs = model(**batch, labels=batch["input_ids"], use_cache=False, output_router_logits=True)
        losses.append(outputs.loss.item())
        for logits in outputs.router_logits:
            kept = keep_set(logits, torch.ones_like(logits, dtype=torch.bool), JITTER)
            ties.append((kept.sum(dim=-1) > 1).float().mean().item())
    entropy = torch.special.entr(expert_load(model, batches[:2])).sum(dim=-1).mean().item()
    model.train()
    evenness = entropy / math.log(model.config.num_local_experts)
    return {"loss": mean(losses), "entropy": evenness, "near_ties": mean(ties)}


def run(variant: str, seed: int, steps: int, data: Data) -> dict:
    """Train one model; its first weights and its order of data depend on the seed alone."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    tokenizer, training, validation = data
    config = {**tiny_config(tokenizer).to_dict(), **SIZES, "head_dim": None, "router_jitter_noise": JITTER}
    torch.manual_seed(seed)
    model = GrinMoeForCausalLM(GrinMoeConfig(**{**config, **VARIANTS[variant]})).train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, (0.9, 0.95), weight_decay=0.1, fused=True)
    warmup = steps // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (warmup + 1), 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps * BATCH / len(training))
    order = torch.cat([torch.randperm(len(training), generator=generator) for _ in range(epochs)])
    curve = [{"tokens": 0, **evaluate(model, validation)}]
    marks = {round(steps * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)}
    for step, chosen in enumerate(order[: steps * BATCH].split(BATCH), start=1):
        rows = training[chosen]
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step in marks:
            curve.append({"tokens": step * rows.numel(), **evaluate(model, validation)})
    return {"variant": variant, "seed": seed, "steps": steps, "curve": curve}


def read_runs(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@app.command()
def train(
    output_dir: OutputDir = Path("runs"),
    seeds: Annotated[int, typer.Option(min=1, help="runs per estimator")] = 3,
    steps: Annotated[int, typer.Option(min=EVALUATIONS, help=f"optimizer steps of {BATCH} rows")] = 800,
    workers: Annotated[int, typer.Option(min=1, help="parallel runs, one thread each")] = 2,
) -> None:
    """Train every estimator with every seed; finished runs in OUTPUT_DIR/runs.jsonl are not repeated.

    Example: python benchmarks/estimators.py train --seeds 1 --steps 100 --output-dir runs
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / "runs.jsonl"
    done = {(entry["variant"], entry["seed"]) for entry in read_runs(path) if entry["steps"] == steps}
    todo = [(variant, seed) for seed in range(seeds) for variant in VARIANTS if (variant, seed) not in done]
    data = prepare()
    console.print(f"{len(todo)} runs of {steps * BATCH * data[1].shape[1] / 1e6:.2f}M tokens, {len(done)} done before")
    start = time.monotonic()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn) as pool, path.open("a") as file:
        futures = [pool.submit(run, variant, seed, steps, data) for variant, seed in todo]
        for count, future in enumerate(as_completed(futures), start=1):
            result = future.result()
            print(json.dumps(result), file=file, flush=True)
            left = (time.monotonic() - start) / count * (len(todo) - count) / 60
            name, loss = f"{result['variant']}, seed {result['seed']}", result["curve"][-1]["loss"]
            console.print(f"{count}/{len(todo)}  {name}: validation loss {loss:.4f}; {left:.0f} min left")


def minus_control(values: pd.DataFrame, variant: str) -> pd.DataFrame:
    """Return, by seed and tokens, the difference to gshard with the same top-k."""
    return values.loc[variant] - values.loc["gshard top-1" if "top-1" in variant else "gshard"]


def plot(loss: pd.DataFrame, path: Path) -> None:
    """Draw validation loss and its difference to the control: mean line, min-max band; `[variant + seed, tokens]`."""
    figure = Figure(figsize=(12, 8.5), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    million = loss.columns / 1e6
    for column, (title, names) in enumerate(PANELS.items()):
        for name in names:
            style = {"color": COLORS[name], "linestyle": "--" if "top-1" in name else "-"}
            for row, values in enumerate((loss.loc[name], minus_control(loss, name))):
                axes[row, column].plot(million, values.mean(), marker="o", markersize=3, label=name, **style)
                axes[row, column].fill_between(million, values.min(), values.max(), color=COLORS[name], alpha=0.15)
        axes[0, column].set(title=title, ylabel="validation loss (nats per token)")
        axes[1, column].set(xlabel="million tokens", ylabel="minus gshard's, same top-k and seed")
        axes[0, column].legend()
    for panel in axes.flat:
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


@app.command()
def report(
    output_dir: OutputDir = Path("runs"),
    record: Annotated[bool, typer.Option(help="append the table to benchmarks/RESULTS.md")] = False,
) -> None:
    """Write table, OUTPUT_DIR/estimators.csv and .png of the seeds that every estimator has finished.

    Example: python benchmarks/estimators.py report --output-dir runs
    """
    runs = read_runs(output_dir / "runs.jsonl")
    seeds = [seed for seed, count in Counter(entry["seed"] for entry in runs).items() if count == len(VARIANTS)]
    if not seeds or len({entry["steps"] for entry in runs}) > 1:
        raise typer.BadParameter(f"{output_dir} has no finished seed, or runs of several lengths; `train` goes on")
    points = pd.json_normalize([entry for entry in runs if entry["seed"] in seeds], "curve", ["variant", "seed"])
    points.to_csv(output_dir / "estimators.csv", index=False)
    table = points.pivot(index=["variant", "seed"], columns="tokens")
    loss, entropy, ties = (table[key] for key in ("loss", "entropy", "near_ties"))
    plot(loss.iloc[:, 1:], output_dir / "estimators.png")
    end, rows = loss.columns[-1], []
    for name in VARIANTS:
        early = [f"{loss.loc[name].iloc[:, EVALUATIONS // part].mean():.3f}" for part in (4, 2)]
        own, gap = loss.loc[name][end], minus_control(loss, name)[end]
        last = f"{own.mean():.3f} ({own.min():.3f} to {own.max():.3f})"
        difference = f"{gap.mean():+.3f} ({gap.min():+.3f} to {gap.max():+.3f})"
        rows.append([name, *early, last, difference, *(f"{x.loc[name][end].mean():.3f}" for x in (entropy, ties))])
    columns = ["estimator", "at 25 %", "at 50 %", "at the end", "minus gshard", "load entropy", "near-ties"]
    title = f"Estimators: validation loss, {len(seeds)} seeds of {end / 1e6:.2f}M tokens"
    notes = (
        f"After `train --steps {runs[0]['steps']}`. Means over the seeds, with the range at the end; differences are "
        "to gshard with the same top-k and seed. Load entropy is relative to log E; near-ties: the share of tokens "
        "with more than one expert in the keep set."
    )
    show(title, columns, rows, record, notes)


if __name__ == "__main__":
    app()
