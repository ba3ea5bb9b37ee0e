"""Measure the cost of watching the router and of the balance loss, as shares of a training step.

One GRIN-MoE takes turns at plain steps (forward and backward, no optimizer), steps that a `RoutingCallback` watches,
and steps with the load-balance loss, one each per round, because a machine's speed drifts; medians over the rounds,
and ratios to the plain step of the same round. Their additions are also timed alone, on the routing of a real step:
they are too small to be seen well in whole steps. Seconds are the process's CPU time, which other work on the machine
changes little.

    python benchmarks/callback_cost.py --dtype bfloat16
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any, Literal

import torch
import typer
from transformers import PrinterCallback, Trainer, TrainingArguments

from benchmarks.measure import grin_config, interleave, random_rows, show
from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM
from modeling_grin.balance_grinmoe import BalanceLoss, BalanceWindow, balance_gradient
from modeling_grin.training.callback import RoutingCallback

COEFFICIENT = 0.01


class Training:
    """Calls callbacks as a trainer does."""

    def __init__(self, model: GrinMoeForCausalLM, rows: torch.Tensor, folder: Path):
        self.model, self.rows = model, rows
        trainer = Trainer(model, TrainingArguments(folder, use_cpu=True, report_to="none", disable_tqdm=True))
        trainer.remove_callback(PrinterCallback)
        self.callback = RoutingCallback(trainer)
        trainer.add_callback(self.callback)
        self.handler = trainer.callback_handler
        self.events = trainer.args, trainer.state, trainer.control
        self.handler.on_train_begin(*self.events)
        self.observer = model.get_decoder().routing_observer

    def step(self, watched: bool = False, coefficient: float = 0.0) -> None:
        self.model.config.router_aux_loss_coef = coefficient
        self.model.get_decoder().routing_observer = self.observer if watched else None
        if watched:
            self.handler.on_step_begin(*self.events)
        self.model(input_ids=self.rows, labels=self.rows, use_cache=False).loss.backward()
        self.model.zero_grad()
        if watched:
            self.handler.on_step_end(*self.events)

    def log(self) -> None:
        self.handler.on_step_end(*self.events)
        logs = {"loss": 1.0}
        self.events[1].log_history.append(dict(logs))
        self.handler.on_log(*self.events, logs)

    def routing_of_a_step(self) -> list[Any]:
        """What the decoder tells an observer."""
        seen: list[Any] = []
        self.model.get_decoder().routing_observer = lambda *routing: seen.extend(routing)
        self.model(input_ids=self.rows, use_cache=False)
        return seen


def cpu_seconds(tasks: Mapping[str, Callable[[], None]], rounds: int, what: str) -> dict[str, list[float]]:
    """Do as `interleave`, in CPU time."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}

    def run(name: str) -> None:
        start = time.process_time()
        tasks[name]()
        seconds[name].append(time.process_time() - start)

    interleave({name: partial(run, name) for name in tasks}, rounds, what)
    return {name: values[1:] for name, values in seconds.items()}  # without the round to warm up


def balance_alone(config: GrinMoeConfig, logits: Any, experts: Any, counted: torch.Tensor) -> None:
    """Do what a forward and a backward pass do for the balance loss."""
    layers = config.num_hidden_layers
    loss = BalanceLoss(COEFFICIENT, layers, config.num_local_experts, BalanceWindow(), counted, None)
    loss.count(experts)
    for layer in range(layers):
        balance_gradient(logits[layer], loss.token_weight, loss.fractions[layer], loss.z_weight)


def measure(training: Training, rounds: int) -> list[list[str]]:
    """Return the rows of the table."""
    model, callback = training.model, training.callback
    steps: dict[str, Callable[[], None]] = {
        "plain": training.step,
        "watched": lambda: training.step(watched=True),
        "balance": lambda: training.step(coefficient=COEFFICIENT),
    }
    whole = cpu_seconds(steps, rounds, "steps")
    routing = training.routing_of_a_step()
    training.log()  # closes the steps' window
    parts: dict[str, Callable[[], None]] = {
        "forward": lambda: callback._observe(*routing),
        "log": training.log,
        "balance": lambda: balance_alone(model.config, *routing),
    }
    alone = cpu_seconds(parts, 20 * rounds, "parts")
    plain = median(whole["plain"])

    def row(name: str, part: str, step: str | None = None) -> list[str]:
        cells = [name, f"{1e3 * median(alone[part]):.2f} ms", f"{100 * median(alone[part]) / plain:.2f} %"]
        if step is None:
            return [*cells, "", ""]
        ratios = [own / other for own, other in zip(whole[step], whole["plain"], strict=True)]
        low, middle, high = quantiles(ratios, n=4, method="inclusive")
        return [*cells, f"{1e3 * median(whole[step]):.0f} ms", f"{middle:.3f} ({low:.2f} to {high:.2f})"]

    return [
        ["plain step", "", "", f"{1e3 * plain:.0f} ms", "1.000"],
        row("callback, each step", "forward", "watched"),
        row("callback, each log", "log"),
        row("balance loss, each step", "balance", "balance"),
    ]


COLUMNS = ["what", "by itself", "of a step", "whole step", "x plain"]


def main(
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="dtype of the model")] = "bfloat16",
    tokens: Annotated[int, typer.Option(min=64, help="tokens per step, in rows of at most 512")] = 2048,
    hidden_size: Annotated[int, typer.Option(min=64)] = 1024,
    intermediate_size: Annotated[int, typer.Option(min=1, help="FFN size of one expert")] = 1600,
    experts: Annotated[int, typer.Option(min=2)] = 16,
    layers: Annotated[int, typer.Option(min=1)] = 2,
    rounds: Annotated[int, typer.Option(min=2, help="steps of each kind; 20 times as many parts")] = 11,
    record: Annotated[bool, typer.Option(help="append the table to benchmarks/RESULTS.md")] = False,
) -> None:
    """Time a training step: plain, watched by RoutingCallback, and with the load-balance loss.

    Example: python benchmarks/callback_cost.py --dtype float32 --rounds 5
    """
    torch.manual_seed(0)
    sizes = hidden_size, intermediate_size, experts, layers
    config = grin_config(*sizes, router_aux_loss_coef=0.0)
    model = GrinMoeForCausalLM(config).to(getattr(torch, dtype)).train()
    rows = random_rows(config, tokens)
    with tempfile.TemporaryDirectory() as folder:
        table = measure(Training(model, rows, Path(folder)), rounds)
    title = f"Cost of watching and balancing: hidden {hidden_size}, FFN {intermediate_size} x {experts}, "
    notes = (
        f"{layers} layers; CPU time. Whole step: forward and backward, no optimizer. x plain: relative to the plain "
        "step of the same round, median and quartiles. By itself: each part alone. An observation sees a forward "
        "pass's routing. A log line includes its file, without an all-reduce. A heatmap is drawn at the first log, "
        f"at the end, and in between for at most half a percent of the time. The balance loss ({COEFFICIENT}) counts "
        "experts and makes a gradient in all layers."
    )
    show(f"{title}{tokens} tokens, {dtype}", COLUMNS, table, record, notes)


if __name__ == "__main__":
    typer.run(main)
