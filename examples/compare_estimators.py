"""Train the same small GRIN-MoE with one router-gradient estimator after another, and draw the learning curves.

The text is the source code of Python's standard library; weights, data and their order are the same for all.
docs/router_gradients.md has experiments with more seeds, and conclusions.

    python examples/compare_estimators.py --output-dir estimators     # four minutes on two cores
"""

import csv
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from transformers import DefaultDataCollator, TrainingArguments, set_seed

from modeling_grin import GrinMoeForCausalLM, GrinMoeTokenizer
from modeling_grin.analysis import expert_load
from modeling_grin.training import GrinMoeTrainer
from recipes.demo import VOCAB_SIZE, pack, read_standard_library, tiny_config

console = Console()
DEFAULT = ["sparsemixer_v2", "sparsemixer_v2_paper", "sparsemixer_v2_star", "gshard"]


def main(
    output_dir: Annotated[Path, typer.Option(help="folder for the picture and the table")] = Path("estimators"),
    estimator: Annotated[
        list[str] | None, typer.Option(help="estimator to train with; repeatable; four by default")
    ] = None,
    max_steps: Annotated[int, typer.Option(min=10, help="optimizer steps of each run")] = 300,
    seed: Annotated[int, typer.Option(help="seed of weights, data order and routing")] = 0,
) -> None:
    """Compare router-gradient estimators by the loss they reach.

    Example: python examples/compare_estimators.py --estimator sparsemixer_v2 --estimator dense --max-steps 50
    """
    texts = read_standard_library()
    tokenizer = GrinMoeTokenizer.train_from_iterator(texts, VOCAB_SIZE)
    validation = pack(texts[::20], tokenizer).select(range(64))
    training = pack([text for i, text in enumerate(texts) if i % 20], tokenizer)

    curves: dict[str, list[tuple[int, float]]] = {}
    table = Table("estimator", "validation loss", "busiest expert, % (12.5: balanced)", box=None)
    for name in estimator or DEFAULT:
        set_seed(seed)
        config = tiny_config(tokenizer)
        # With few random logits the released 0.01 leaves hardly a token a choice: too few to learn from in this time.
        config.router_estimator, config.router_jitter_noise = name, 0.1
        arguments = TrainingArguments(
            output_dir=output_dir / name,
            max_steps=max_steps,
            per_device_train_batch_size=8,
            learning_rate=1.5e-3,
            warmup_steps=max_steps // 20,
            lr_scheduler_type="cosine",
            eval_strategy="steps",
            eval_steps=max_steps // 10,
            save_strategy="no",
            report_to="none",
            seed=seed,
        )
        model = GrinMoeForCausalLM(config)
        trainer = GrinMoeTrainer(model, arguments, DefaultDataCollator(), training, validation)
        trainer.train()
        curves[name] = [
            (entry["step"], entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry
        ]
        busiest = expert_load(model, validation.iter(batch_size=16)).amax(dim=1).mean()
        table.add_row(name, f"{curves[name][-1][1]:.3f}", f"{100 * busiest:.1f}")

    with (output_dir / "losses.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["estimator", "step", "validation_loss"])
        writer.writerows([name, *point] for name, curve in curves.items() for point in curve)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), "o-", markersize=3, label=name)
    axes.set(title="Validation loss by router-gradient estimator", xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output_dir / "losses.png", dpi=150)
    console.print(table)
    console.print(f"picture {output_dir / 'losses.png'}; one seed cannot tell differences below 0.2")


if __name__ == "__main__":
    typer.run(main)
