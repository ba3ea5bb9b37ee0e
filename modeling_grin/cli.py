"""The `grin-moe` command."""

import ast
import csv
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

app = typer.Typer(
    help="Tools for gradient-informed mixture-of-experts models.", no_args_is_help=True, add_completion=False
)
console, errors = Console(), Console(stderr=True)

recipes = typer.Typer(help="Training scripts and their configs, to copy and edit.", no_args_is_help=True)
app.add_typer(recipes, name="recipes")
RECIPES = Path(__file__).resolve().parents[1] / "recipes"  # beside the package, in the checkout as in the wheel
WHAT = "# What:"  # the line of a config's header that `recipes ls` shows


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="show the whole traceback of an error")] = False,
) -> None:
    """Tools for gradient-informed mixture-of-experts models."""


@app.command()
def gradients(
    output_dir: Annotated[Path, typer.Option(help="where gradients.csv and the plots go")] = Path("gradients"),
    over: Annotated[list[str] | None, typer.Option(help="what to sweep over; may be repeated; all by default")] = None,
    layers: Annotated[int, typer.Option(min=1, help="random layers per point, of which the median is taken")] = 20,
    batch: Annotated[int, typer.Option(min=1, help="tokens averaged in the signal-to-noise ratio (SNR)")] = 1024,
) -> None:
    """Measure the router-gradient estimators: exact bias, cosine, variance and signal to noise, by enumeration.

    Example: grin-moe gradients --over num_experts --over curvature --layers 5
    """
    from .analysis.gradients import SWEEPS, Setting, objective, plot_sweep, sweep

    variables = over or list(SWEEPS)
    points = sweep(variables, layers, batch)
    output_dir.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict]] = {variable: [] for variable in variables}
    with Progress(console=console) as progress:
        task = progress.add_task("measuring", total=sum(len(SWEEPS.get(variable, ())) for variable in variables))
        for variable, measured in points:
            rows[variable] += measured
            progress.advance(task)

    everything = [{"sweep": variable, **row} for variable in variables for row in rows[variable]]
    with (output_dir / "gradients.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(everything[0]))
        writer.writeheader()
        writer.writerows(everything)
    for variable in variables:
        plot_sweep(rows[variable], variable, output_dir / f"gradients_{variable}.png")

    console.print("Router logits, each estimator against the objective it is made for:")
    for variable in variables:
        table = Table(title=f"over {variable}, default {getattr(Setting(), variable)}", title_justify="left")
        for column in (variable, "estimator", "Eq.", "bias", "cosine", "variance", "SNR"):
            table.add_column(column, justify="left" if column == "estimator" else "right", no_wrap=True)
        for row in rows[variable]:
            if row["quantity"] == "router_logits" and objective(row["estimator"]) == row["equation"]:
                figures = (row[key] for key in ("bias", "cosine", "variance", "snr"))
                table.add_row(
                    f"{row[variable]:g}", row["estimator"], str(row["equation"]), *(f"{x:.2g}" for x in figures)
                )
        console.print(table)
    console.print(f"{output_dir / 'gradients.csv'} has every quantity and both equations; plots are beside it")


MODEL, DEVICES, STEP, OUTPUT = "The model", "The devices", "A training step", "What is printed"
"""Panels of `plan`'s options."""


@app.command()
def plan(
    config: Annotated[
        Path | None, typer.Option(help="folder or config.json; the released sizes by default", rich_help_panel=MODEL)
    ] = None,
    num_local_experts: Annotated[
        int | None, typer.Option(help="instead of the config's, as the other sizes", rich_help_panel=MODEL)
    ] = None,
    num_experts_per_tok: Annotated[int | None, typer.Option(rich_help_panel=MODEL)] = None,
    hidden_size: Annotated[int | None, typer.Option(rich_help_panel=MODEL)] = None,
    intermediate_size: Annotated[int | None, typer.Option(rich_help_panel=MODEL)] = None,
    num_hidden_layers: Annotated[int | None, typer.Option(rich_help_panel=MODEL)] = None,
    num_attention_heads: Annotated[int | None, typer.Option(rich_help_panel=MODEL)] = None,
    num_key_value_heads: Annotated[int | None, typer.Option(rich_help_panel=MODEL)] = None,
    devices: Annotated[int, typer.Option(help="how many", rich_help_panel=DEVICES)] = 64,
    devices_per_machine: Annotated[int, typer.Option(help="that are connected fast", rich_help_panel=DEVICES)] = 8,
    memory: Annotated[float, typer.Option(help="of a device, GB", rich_help_panel=DEVICES)] = 80,
    assume: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE, another assumption; may be repeated", rich_help_panel=DEVICES),
    ] = None,
    micro_batch: Annotated[int, typer.Option(help="sequences of a forward pass", rich_help_panel=STEP)] = 1,
    global_batch: Annotated[
        int, typer.Option(help="sequences of an optimizer step, over all devices", rich_help_panel=STEP)
    ] = 1024,
    sequence: Annotated[int, typer.Option(help="tokens of a sequence", rich_help_panel=STEP)] = 4096,
    precision: Annotated[
        str,
        typer.Option(
            help="mixed (the recipes' bf16: float32 weights, computed in bfloat16), float32, bfloat16, megatron or "
            "deepspeed",
            rich_help_panel=STEP,
        ),
    ] = "mixed",
    optimizer: Annotated[str, typer.Option(help="adamw, sgd_momentum or sgd", rich_help_panel=STEP)] = "adamw",
    checkpointing: Annotated[
        bool, typer.Option(help="compute layers again in the backward pass", rich_help_panel=STEP)
    ] = True,
    shard_optimizer: Annotated[
        bool, typer.Option(help="optimizer state of replicas sharded, ZeRO-1", rich_help_panel=STEP)
    ] = False,
    balance_loss: Annotated[
        bool | None,
        typer.Option(
            help="train with the load-balance loss; by default where the config's router_aux_loss_coef is above 0",
            rich_help_panel=STEP,
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="layouts to show", rich_help_panel=OUTPUT)] = 12,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON: every layout with all its figures", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Which layouts of many devices fit, what they hold and send, and how fast they should be. Nothing is run.

    Example: grin-moe plan --devices 64 --num-local-experts 32 --assume peak_flops=312e12
    """
    from .analysis import planner
    from .configuration_grinmoe import GrinMoeConfig

    fields = ("num_local_experts", "num_experts_per_tok", "hidden_size", "intermediate_size", "num_hidden_layers",
              "num_attention_heads", "num_key_value_heads")  # fmt: skip
    given = locals()
    sizes = {field: given[field] for field in fields if given[field] is not None}
    if config is None:
        model = GrinMoeConfig(**sizes)
    else:
        path = config / "config.json" if config.is_dir() else config
        if not path.is_file():
            raise ValueError(f"config={path} does not exist: give a folder with a config.json, or the file")
        model = GrinMoeConfig.from_pretrained(path, **sizes)
    if balance_loss is not None:  # what it costs does not depend on the coefficient
        model.router_aux_loss_coef = (model.router_aux_loss_coef or 1.0) if balance_loss else 0.0
    training = planner.Training(
        micro_batch, global_batch, sequence, precision, optimizer, checkpointing, shard_optimizer
    )
    hardware = {"memory": memory * planner.GB, "devices_per_machine": devices_per_machine}
    assumptions = planner.assume(assume or [], **hardware)
    estimates, left_out = planner.plan(model, devices, training, assumptions)
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
    available = (assumptions.memory - assumptions.reserve) / planner.GB
    for estimate in estimates[:rows]:
        needs = estimate.memory
        parts = needs.weights, needs.gradients, needs.optimizer, needs.activations, needs.communication, needs.total()
        cells = [f"{part / planner.GB:.1f}" for part in parts]
        if estimate.fits:
            seconds, total = estimate.seconds, estimate.step_time
            waiting = total - sum(seconds[cause] for cause in ("compute", "bubble", "optimizer"))
            cells += [f"{total:.2f}", f"{seconds['bubble']:.2f}", f"{waiting:.2f}"]
            cells += [f"{estimate.tokens_per_second:,.0f}", f"{estimate.tokens_per_second / devices:,.0f}"]
            cells.append(f"{seconds['balance loss'] / total:.2%}")
        else:
            cells += [f"over {available:.1f} GB"]
        table.add_row(str(estimate.layout), *cells)
    wide = Console(width=max(console.width, 124))  # the columns are of no use cut off
    wide.print(table)
    fitting = sum(estimate.fits for estimate in estimates)
    console.print(f"{fitting} of {len(estimates)} layouts fit. EP is for comparison: GRIN-MoE is trained without.")
    if left_out:
        name, reason = next(iter(left_out.items()))
        console.print(f"{len(left_out)} others cannot be trained (all in --json), such as {name}: {reason}")
    balance = {"router_aux_loss_coef": model.router_aux_loss_coef}  # 0: no load-balance loss
    for name, values in (("training", vars(training) | balance), ("assumptions", vars(assumptions))):
        console.print(f"{name}: " + ", ".join(f"{key}={value}" for key, value in values.items()), highlight=False)


FORM, MODEL_CHANGE, SAFETY = "The result", "Another number of experts", "Safety"
"""Panels of `convert`'s options."""


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="folder of a checkpoint, of a sharded one, or of a LoRA adapter")],
    destination: Annotated[Path, typer.Argument(help="folder to make; for gguf, the file")],
    to: Annotated[str, typer.Option(help="hub, fused, phimoe, gguf, or adapter", rich_help_panel=FORM)],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16; each tensor's own by default. For gguf: f32, f16, bf16, q8_0, q4_0",
            rich_help_panel=FORM,
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="of one file of weights; 5GB by default", rich_help_panel=FORM)
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="of an adapter: the base model's folder, instead of what its config names")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="folder with the config.json of a source that has none: sharded checkpoints")
    ] = None,
    experts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="so many per layer: copies of a model's one expert, or the most loaded ones on --calibration",
            rich_help_panel=MODEL_CHANGE,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, help="of copies: experts per token, by default 2", rich_help_panel=MODEL_CHANGE),
    ] = None,
    noise: Annotated[
        float | None,
        typer.Option(
            min=0, help="on copies, relative to a matrix's standard deviation; 0", rich_help_panel=MODEL_CHANGE
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="of the noise and the new routers; 0", rich_help_panel=MODEL_CHANGE)
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="text file to measure routing on: expert load; for gguf, near-ties")
    ] = None,
    check: Annotated[
        bool | None,
        typer.Option(help="compare the logits of source and result; small models by default", rich_help_panel=SAFETY),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with an interrupted conversion", rich_help_panel=SAFETY)
    ] = False,
    weights_only: Annotated[
        bool,
        typer.Option(
            "--weights-only",
            help="read pickles (pytorch_model.bin, DCP) through torch's restricted unpickler",
            rich_help_panel=SAFETY,
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="the report as JSON")] = False,
) -> None:
    """Convert a checkpoint; its form is found out. Streamed, exact, and there only when it is complete.

    Example: grin-moe convert GRIN-MoE GRIN-MoE-phimoe --to phimoe
    """
    import conversion

    with hint_of_resuming(), transfer("converting", as_json) as progress:
        report = conversion.convert(
            source,
            destination,
            to=to,
            dtype=dtype,
            max_shard_size=max_shard_size,
            base=base,
            config=config,
            weights_only=weights_only,
            num_experts=experts,
            top_k=top_k,
            noise=noise,
            seed=seed,
            calibration=calibration,
            check=check,
            resume=resume,
            progress=progress,
        )
    if as_json:
        print(json.dumps(vars(report), indent=2))
        return
    table = Table(box=None, show_header=False)
    table.add_row("from", f"{escape(report.source)} ({report.form})")
    table.add_row("to", f"{escape(report.destination)} ({report.target})")
    if report.parameters:
        speed = report.nbytes / report.seconds / 1e9
        written = f"{report.parameters:,} parameters, {report.nbytes / 1e9:.3f} GB"
        table.add_row("written", f"{written} in {report.seconds:.1f} s ({speed:.2f} GB/s)")
        unchecked = "not compared (--check does)"
        same = unchecked if report.difference is None else f"differ by {report.difference:.2g} of the largest"
        table.add_row("logits", same)
    if report.carried:
        table.add_row("carried", escape(", ".join(report.carried)))
    if report.left:
        table.add_row("left", escape(", ".join(report.left)))
    for note in report.notes:
        table.add_row("note", escape(note))
    console.print(table)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="folder of a checkpoint in any form, or a GGUF file")],
    verify: Annotated[bool, typer.Option("--verify", help="read every tensor; find NaN and infinite values")] = False,
    against: Annotated[Path | None, typer.Option(help="another checkpoint, to compare with bit by bit")] = None,
    config: Annotated[
        Path | None, typer.Option(help="folder with the config.json of a checkpoint that has none")
    ] = None,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="read pickles through torch's restricted unpickler")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON")] = False,
) -> None:
    """Say what a checkpoint is: form, config, parameters, files, checks. Exit code 1 if something is wrong with it.

    Example: grin-moe inspect GRIN-MoE-fused --against GRIN-MoE
    """
    import conversion

    with transfer("reading", as_json or not (verify or against)) as progress:
        found = conversion.inspect(
            path, verify=verify, against=against, config=config, weights_only=weights_only, progress=progress
        )
    if as_json:
        print(json.dumps(vars(found), indent=2))
    else:
        table = Table(box=None, show_header=False)
        table.add_row("checkpoint", f"{escape(found.path)} ({found.form}, {escape(found.model)})")
        table.add_row("parameters", f"{found.parameters:,}; a token uses {found.active_parameters:,}")
        table.add_row("dtypes", ", ".join(f"{name} {count:,}" for name, count in found.dtypes.items()))
        size = f"{len(found.files)}, {sum(found.files.values()) / 1e9:.3f} GB"
        table.add_row("files", escape(f"{size}: {', '.join(list(found.files)[:3])}{' ...' * (len(found.files) > 3)}"))
        shown = {key: value for key, value in found.config.items() if len(str(value)) < 200}  # no LongRoPE's factors
        table.add_row("config", escape(", ".join(f"{key}={value}" for key, value in shown.items())))
        for check in found.checks:
            table.add_row("[green]right[/green]", escape(check))
        for problem in found.problems:
            table.add_row("[red]wrong[/red]", escape(problem))
        for name, difference in list((found.difference or {}).items())[:10]:
            how = "missing, or of another shape" if difference is None else f"by up to {difference:g}"
            table.add_row("differs", escape(f"{name}: {how}"))
        console.print(table)
    if found.problems:
        raise typer.Exit(1)


@contextmanager
def hint_of_resuming() -> Iterator[None]:
    """Say at Ctrl-C how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        errors.print("interrupted: the same command with --resume goes on")
        raise


@contextmanager
def transfer(title: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar of bytes, with speed and time left; what is yielded takes the bytes done and those in all."""
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=errors, disable=quiet)
    task = bar.add_task(title, total=None)

    def advance(done: int, total: int) -> None:
        bar.start()  # with the first bytes: what is refused before needs no bar
        bar.update(task, advance=done, total=total)

    try:
        yield advance
    finally:
        bar.stop()


def find_recipes() -> dict[str, Path]:
    """Scripts and configs by name, the file's without its suffix; scripts first."""
    files = [*sorted(RECIPES.glob("*.py")), *sorted(RECIPES.rglob("*.yaml"))]
    return {path.stem: path for path in files}


def describe(path: Path) -> str:
    """What a recipe does: the first sentence of a script's docstring, or the `# What:` line of a config."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return next((line[len(WHAT) :].strip() for line in text.splitlines() if line.startswith(WHAT)), "")


@recipes.command("ls")
def list_recipes() -> None:
    """List the training scripts and their configs.

    Example: grin-moe recipes ls
    """
    table = Table("name", "what it does", box=None)
    for name, path in find_recipes().items():
        table.add_row(name, escape(describe(path)))
    console.print(table)


@recipes.command("cp")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="a name that `grin-moe recipes ls` lists")],
    destination: Annotated[str, typer.Argument(help="file or folder; a new folder's name ends with /")] = ".",
) -> None:
    """Copy a training script or a config, to edit it. Nothing is overwritten.

    Example: grin-moe recipes cp sft_tiny my_sft.yaml
    """
    files = find_recipes()
    source = files.get(name) or next((path for path in files.values() if path.name == name), None)
    if source is None:
        raise ValueError(f"There is no recipe {name!r}; `grin-moe recipes ls` lists them")
    target = Path(destination)
    if target.is_dir() or destination.endswith(("/", os.sep)):
        target = target / source.name
    if target.exists():
        raise ValueError(f"{target} exists: give another name, or move it away")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    console.print(f"copied to {escape(str(target))}")


def main() -> None:
    """Run the command; an error is one sentence and exit code 1, unless `--debug` asks for the traceback."""
    try:
        app()
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        errors.print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        sys.exit(1)
