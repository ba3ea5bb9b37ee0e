"""`grin-moe gradients` and `grin-moe plan`."""

import csv
import json
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .terminal import console, escape


def gradients(
    output_dir: Annotated[Path, typer.Option(help="folder for the table (CSV) and plots")] = Path("gradients"),
    over: Annotated[list[str] | None, typer.Option(help="variable to sweep; may be repeated; default: all")] = None,
    layers: Annotated[int, typer.Option(min=1, help="random layers per point; quartiles are over them")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="tokens per batch for the signal-to-noise ratio (SNR)")] = 1024,
    target: Annotated[
        Literal["own", "deployed"],
        typer.Option(
            help="own: each estimator's objective; deployed: the loss of its inference, over --populations of --tokens"
        ),
    ] = "own",
    populations: Annotated[int, typer.Option(min=1, help="random layers and texts of --target deployed")] = 6,
    tokens: Annotated[int, typer.Option(min=100, help="tokens of a population")] = 16_000,
) -> None:
    """Measure each router-gradient estimator exactly: bias, cosine, length, variance, signal-to-noise ratio (SNR).

    Example: grin-moe gradients --over num_experts --over curvature --layers 5
    """
    if target == "deployed":
        if over:
            raise ValueError("--over is of --target own; --target deployed has settings of its own")
        return against_deployed(output_dir, tokens, populations)
    from modeling_grin.analysis.gradients import FIGURES, SWEEPS, Setting, plot_sweep, sweep
    from modeling_grin.routing_grinmoe import ROUTER_ESTIMATORS

    variables = over or list(SWEEPS)
    points = sweep(variables, layers, batch)
    output_dir.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict]] = {variable: [] for variable in variables}
    num_points = sum(len(SWEEPS.get(variable, ())) for variable in variables)
    for variable, measured in track(points, "measuring", num_points, console=console):
        rows[variable] += measured

    write_rows(
        output_dir / "gradients.csv", [{"sweep": variable, **row} for variable in rows for row in rows[variable]]
    )
    console.print("Gradient of the router logits; each estimator against its own objective, medians:")
    for variable in variables:
        plot_sweep(rows[variable], variable, output_dir / f"gradients_{variable}.png")
        print_rows(
            f"over {variable}, default {getattr(Setting(), variable)}",
            [variable, "estimator", "equation", *FIGURES],
            [
                row
                for row in rows[variable]
                if row["quantity"] == "router_logits"
                and ROUTER_ESTIMATORS[row["estimator"]].equation == row["equation"]
            ],
        )
    console.print("Only tokens with a choice have a router gradient; the column `choice` says how many that are.")
    if left_out := [name for name, e in ROUTER_ESTIMATORS.items() if e.sampled and e.end_probability is None]:
        console.print(f"left out, because their draws cannot be listed: {', '.join(left_out)}")
    path = escape(output_dir / "gradients.csv")
    console.print(f"{path} has all quantities, both equations and the quartiles; plots are beside it")


def against_deployed(output_dir: Path, tokens: int, populations: int) -> None:
    """Compare the estimators with the deployed loss's gradient, and draw how its length depends on r."""
    from modeling_grin.analysis.deployed import FIGURES, compare_with_deployed, plot_share

    output_dir.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    for top_k, jitter_eps in track(((1, 0.1), (2, 0.1), (2, 0.01)), "measuring", console=console):
        rows += compare_with_deployed(top_k, jitter_eps, num_tokens=tokens, populations=populations)
    write_rows(output_dir / "deployed.csv", rows)
    plot_share(output_dir / "gradients_share.png")
    shown = [
        {name: row[name] for name in ("top_k", "jitter_eps", "estimator", "inference")}
        | {name: "{:.2g} ({:.2g} to {:.2g})".format(*(row[f"{name}{end}"] for end in ("", "_low", "_high")))
           for name in FIGURES}
        for row in rows
    ]  # fmt: skip
    title = f"mean gradient against the deployed loss's: median of {populations} populations, smallest to largest"
    print_rows(title, list(shown[0]), shown)
    console.print("ceiling: what a perfect estimate would reach, since the deployed gradient is known so well only")


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write a CSV file with the columns of the first row."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def print_rows(title: str, columns: list[str], rows: list[dict]) -> None:
    """Print some columns of rows, floats with two digits."""
    table = Table(title=title, title_justify="left", box=None)
    for column in columns:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{row[column]:.2g}" if isinstance(row[column], float) else str(row[column])
                        for column in columns))  # fmt: skip
    Console(width=max(console.width, 150)).print(table)  # no column is cut off


model_option, devices_option, step_option, output_option = (
    partial(typer.Option, rich_help_panel=panel) for panel in ("Model", "Devices", "Training step", "Output")
)


def plan(
    config: Annotated[Path | None, model_option(help="folder or config.json; default: the released sizes")] = None,
    num_local_experts: Annotated[int | None, model_option(help="overrides the config, like the sizes below")] = None,
    num_experts_per_tok: Annotated[int | None, model_option()] = None,
    hidden_size: Annotated[int | None, model_option()] = None,
    intermediate_size: Annotated[int | None, model_option()] = None,
    num_hidden_layers: Annotated[int | None, model_option()] = None,
    num_attention_heads: Annotated[int | None, model_option()] = None,
    num_key_value_heads: Annotated[int | None, model_option()] = None,
    devices: Annotated[int, devices_option(help="number of devices")] = 64,
    devices_per_machine: Annotated[int, devices_option(help="devices per node")] = 8,
    memory: Annotated[float, devices_option(help="memory per device in GB")] = 80,
    assume: Annotated[
        list[str] | None, devices_option(help="NAME=NUMBER, another assumption; may be repeated")
    ] = None,
    micro_batch: Annotated[int, step_option(help="sequences per forward pass")] = 1,
    global_batch: Annotated[int, step_option(help="sequences per optimizer step, over all devices")] = 1024,
    sequence: Annotated[int, step_option(help="tokens per sequence")] = 4096,
    precision: Annotated[
        str,
        step_option(help="mixed (float32 weights, bfloat16 compute: the recipes' `bf16: true`), float32 or bfloat16"),
    ] = "mixed",
    optimizer: Annotated[str, step_option(help="adamw, sgd_momentum or sgd")] = "adamw",
    checkpointing: Annotated[bool, step_option(help="recompute layers in the backward pass")] = True,
    lora_r: Annotated[int, step_option(help="ranks of LoRA on attention and experts; 0: all weights are trained")] = 0,
    load_in_4bit: Annotated[bool, step_option("--load-in-4bit", help="hold LoRA's frozen weights in 4 bits")] = False,
    balance_loss: Annotated[
        bool | None,
        step_option(help="train with the load-balance loss; default: if the config's router_aux_loss_coef is above 0"),
    ] = None,
    rows: Annotated[int, output_option(min=1, help="layouts in the table")] = 12,
    as_json: Annotated[bool, output_option("--json", help="print JSON: every layout with all figures")] = False,
) -> None:
    """Estimate memory, communication and speed of every layout of many devices. Nothing is run.

    Example: grin-moe plan --devices 64 --num-local-experts 32 --assume peak_flops=312e12
    """
    from modeling_grin.configuration_grinmoe import GrinMoeConfig
    from modeling_grin.planning.plan import plan as make_plan
    from modeling_grin.planning.setting import GB, Training
    from modeling_grin.planning.setting import assume as make_assumptions

    fields = ("num_local_experts", "num_experts_per_tok", "hidden_size", "intermediate_size", "num_hidden_layers",
              "num_attention_heads", "num_key_value_heads")  # fmt: skip
    given = locals()
    sizes = {field: given[field] for field in fields if given[field] is not None}
    if config is None:
        model = GrinMoeConfig(**sizes)
    else:
        path = config / "config.json" if config.is_dir() else config
        if not path.is_file():
            raise ValueError(f"config must be a config.json, or a folder with one; {path} does not exist")
        model = GrinMoeConfig.from_pretrained(path, **sizes)
    if balance_loss is not None:  # its cost does not depend on the coefficient
        model.router_aux_loss_coef = (model.router_aux_loss_coef or 1.0) if balance_loss else 0.0
    step = micro_batch, global_batch, sequence, precision, optimizer, checkpointing
    training = Training(*step, lora_r, load_in_4bit)
    assumptions = make_assumptions(assume or [], memory=memory * GB, devices_per_machine=devices_per_machine)
    estimates, left_out = make_plan(model, devices, training, assumptions)
    if as_json:
        stated = {"training": vars(training), "assumptions": vars(assumptions)}
        layouts = [estimate.to_dict() for estimate in estimates]
        print(
            json.dumps({"config": model.to_diff_dict(), **stated, "layouts": layouts, "left_out": left_out}, indent=2)
        )
        return

    title = f"{devices} devices, GB per device and seconds per step"
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("layout", no_wrap=True)
    for column in ("weights", "grads", "optim.", "activ.", "comm.", "total", "step", "bubble", "wait", "tokens/s",
                   "/device", "balance"):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    available = (assumptions.memory - assumptions.reserve) / GB
    for estimate in estimates[:rows]:
        needs = estimate.memory
        parts = needs.weights, needs.gradients, needs.optimizer, needs.activations, needs.communication, needs.total()
        cells = [f"{part / GB:.1f}" for part in parts]
        if estimate.fits:
            seconds, total = estimate.seconds, estimate.step_time
            waiting = total - sum(seconds[cause] for cause in ("compute", "bubble", "optimizer"))
            cells += [f"{total:.2f}", f"{seconds['bubble']:.2f}", f"{waiting:.2f}"]
            cells += [f"{estimate.tokens_per_second:,.0f}", f"{estimate.tokens_per_second / devices:,.0f}"]
            cells.append(f"{seconds['balance loss'] / total:.2%}")
        else:
            cells += [f"over {available:.1f} GB"]
        table.add_row(str(estimate.layout), *cells)
    wide = Console(width=max(console.width, 124))  # no column is cut off
    wide.print(table)
    fitting = sum(estimate.fits for estimate in estimates)
    console.print(f"{fitting} of {len(estimates)} layouts fit. EP is for comparison: GRIN-MoE is trained without it.")
    if left_out:
        name, reason = next(iter(left_out.items()))
        console.print(
            f"{len(left_out)} others cannot be trained (--json lists all), such as {escape(f'{name}: {reason}')}"
        )
    balance = {"router_aux_loss_coef": model.router_aux_loss_coef}  # 0: no load-balance loss
    for name, values in (("training", vars(training) | balance), ("assumptions", vars(assumptions))):
        console.print(
            escape(f"{name}: " + ", ".join(f"{key}={value}" for key, value in values.items())), highlight=False
        )
