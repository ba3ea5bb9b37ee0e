"""Fine-tune a tiny GRIN-MoE on code and on prose at once, and watch its experts divide the work.

Code is Python's standard library, prose its reference manual; both are on every machine. While the model learns, each
expert's specialisation (how much its tokens tell about the kind of text, beyond shuffled texts: 0 nothing, 1 all) is
measured on texts that are held out.

    python examples/watch_experts_specialise.py --output-dir specialise     # three minutes on two cores
"""

from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated

import torch
import typer
from datasets import concatenate_datasets
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from transformers import DefaultDataCollator, TrainerCallback, TrainingArguments, set_seed

from modeling_grin import GrinMoeForCausalLM, GrinMoeTokenizer
from modeling_grin.analysis import batched, collect_routing, routing_similarity, specialization
from modeling_grin.training import GrinMoeTrainer
from recipes.demo import SEQUENCE_LENGTH, VOCAB_SIZE, pack, read_standard_library, tiny_config

console = Console()
MAX_ROWS = 10  # of a text, in a measurement


class Watch(TrainerCallback):
    """Measure the routing of each kind of text at the beginning and `times` times during a run."""

    def __init__(self, held_out, times: int):
        self.held_out, self.times = held_out, times
        self.history = []

    def measure(self, step: int, model) -> None:
        sets = {name: collect_routing(model, batched(rows, 16)) for name, rows in self.held_out.items()}
        self.history.append((step, specialization(sets, shuffles=99), routing_similarity(sets)[0, 1].item()))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.measure(0, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % (args.max_steps // self.times) == 0:
            self.measure(state.global_step, model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.history[-1][0] < state.global_step:
            self.measure(state.global_step, model)


def rows_of(texts: list[str], tokenizer: GrinMoeTokenizer) -> list[tuple[list[int], bool]]:
    """Return rows of ids, each with whether it starts a text: specialisation shuffles whole texts."""
    rows = []
    for text in texts:
        ids = tokenizer(text, verbose=False)["input_ids"][: MAX_ROWS * SEQUENCE_LENGTH]
        rows += [(ids[start : start + SEQUENCE_LENGTH], start == 0) for start in range(0, len(ids), SEQUENCE_LENGTH)]
    return rows


def draw(history, path: Path) -> None:
    """Draw every expert's score as it grows (left), and the last scores by layer and expert (right)."""
    steps = [step for step, _, _ in history]
    scores = torch.stack([found.score for _, found, _ in history])  # [times, L, E]
    figure = Figure(figsize=(11, 4), layout="constrained")
    curves, heatmap = figure.subplots(1, 2, width_ratios=[3, 2])
    curves.plot(steps, scores.flatten(1).numpy(), color="C0", alpha=0.25, linewidth=1)
    curves.plot(steps, scores.mean(dim=(1, 2)).numpy(), color="black", label="mean of all experts")
    curves.set(
        title="What an expert's tokens tell: code or prose?", xlabel="step", ylabel="score (0: used alike, 1: by one)"
    )
    curves.grid(alpha=0.3)
    curves.legend()
    image = heatmap.imshow(scores[-1].numpy(), cmap="magma_r", vmin=0, aspect="auto")
    num_layers, num_experts = scores.shape[1:]
    heatmap.set(
        title="At the end", xlabel="expert", ylabel="layer", xticks=range(num_experts), yticks=range(num_layers)
    )
    figure.colorbar(image, label="score")
    figure.savefig(path, dpi=150)


def main(
    output_dir: Annotated[Path, typer.Option(help="folder for the picture and the model")] = Path("specialise"),
    max_steps: Annotated[int, typer.Option(min=10, help="optimizer steps")] = 400,
    seed: Annotated[int, typer.Option(help="seed of weights, data order and routing")] = 0,
) -> None:
    """Train on two kinds of text and measure which experts each takes.

    Example: python examples/watch_experts_specialise.py --max-steps 50
    """
    set_seed(seed)
    texts = {"code": read_standard_library()[:80], "prose": [topics[name] for name in sorted(topics)]}
    tokenizer = GrinMoeTokenizer.train_from_iterator(texts["code"] + texts["prose"], VOCAB_SIZE)
    held_out = {name: rows_of(some[::8], tokenizer) for name, some in texts.items()}
    training = [pack([text for i, text in enumerate(some) if i % 8], tokenizer) for some in texts.values()]
    rows = min(map(len, training))  # as much of one as of the other

    model = GrinMoeForCausalLM(tiny_config(tokenizer))
    watch = Watch(held_out, times=10)
    trainer = GrinMoeTrainer(
        model,
        TrainingArguments(
            output_dir=output_dir,
            max_steps=max_steps,
            per_device_train_batch_size=8,
            learning_rate=1.5e-3,
            warmup_steps=max_steps // 20,
            lr_scheduler_type="cosine",
            logging_steps=max(1, max_steps // 20),
            save_strategy="no",
            report_to="none",
            seed=seed,
        ),
        DefaultDataCollator(),
        concatenate_datasets([dataset.select(range(rows)) for dataset in training]),
        callbacks=[watch],
    )
    trainer.train()
    trainer.save_model(output_dir)
    tokenizer.save_pretrained(output_dir)
    draw(watch.history, output_dir / "specialisation.png")

    _, last, similarity = watch.history[-1]
    table = Table("layer", "expert", "score", "p", "times its mean use in code", box=None)
    for index in last.score.flatten().argsort(descending=True)[:6].tolist():
        layer, expert = divmod(index, last.score.shape[1])
        values = (last.score, last.p_value, last.preference[0])
        table.add_row(str(layer), str(expert), *(f"{value[layer, expert]:.2f}" for value in values))
    console.print(table)
    console.print(
        f"cosine of the two routing vectors: {watch.history[0][2]:.3f} at first, {similarity:.3f} at the end"
    )
    console.print(f"picture {output_dir / 'specialisation.png'}; more: grin-moe routing {output_dir} --data ...")


if __name__ == "__main__":
    typer.run(main)
