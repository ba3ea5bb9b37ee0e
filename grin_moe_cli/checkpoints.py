"""Commands for checkpoints: `convert`, `inspect`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .terminal import console, escape, on_interrupt, transfer

FORM, MODEL_CHANGE, SAFETY = "Result", "Number of experts", "Safety"
"""Panels of `convert`'s options."""


def convert(
    source: Annotated[
        Path, typer.Argument(exists=True, help="folder of a checkpoint, a sharded one, or a LoRA adapter")
    ],
    destination: Annotated[Path, typer.Argument(help="folder to make; for gguf, the file")],
    to: Annotated[str, typer.Option(help="hub, fused, phimoe or gguf", rich_help_panel=FORM)],
    engine: Annotated[
        str | None,
        typer.Option(
            "--for", help="who reads phimoe: transformers, vllm, sglang; refused where it errs", rich_help_panel=FORM
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16; each tensor's own by default. For gguf: f32, f16, bf16, q8_0, q4_0",
            rich_help_panel=FORM,
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="size of one file of weights; 5GB by default", rich_help_panel=FORM)
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="base model of an adapter, instead of the one its config names")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="folder with the config.json of a source that has none (sharded checkpoints)")
    ] = None,
    num_experts: Annotated[
        int | None,
        typer.Option(
            "--experts",
            min=1,
            help="experts per layer: copy a single expert, or keep the most used on --calibration",
            rich_help_panel=MODEL_CHANGE,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, help="experts per token, of copies; 2 by default", rich_help_panel=MODEL_CHANGE),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="text file to measure routing on: expert load; for gguf, near-ties")
    ] = None,
    check: Annotated[
        bool | None,
        typer.Option(
            help="compare the logits of source and result; by default for small models", rich_help_panel=SAFETY
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="continue an interrupted conversion", rich_help_panel=SAFETY)
    ] = False,
    weights_only: Annotated[
        bool,
        typer.Option(
            "--weights-only", help="read pickles (pytorch_model.bin, DCP) without running code", rich_help_panel=SAFETY
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
) -> None:
    """Convert a checkpoint; its form is detected. Streamed, exact, and there only when it is complete.

    Example: grin-moe convert GRIN-MoE GRIN-MoE-phimoe --to phimoe
    """
    options = dict(locals())
    import conversion

    del options["as_json"]
    with on_interrupt("add --resume to the same command to continue"), transfer("converting", as_json) as progress:
        report = conversion.convert(**options, progress=progress)
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
    if report.copied:
        table.add_row("copied", escape(", ".join(report.copied)))
    if report.skipped:
        table.add_row("skipped", escape(", ".join(report.skipped)))
    for note in report.notes:
        table.add_row("note", escape(note))
    console.print(table)


def inspect(
    path: Annotated[Path, typer.Argument(exists=True, help="folder of a checkpoint of any form, or a GGUF file")],
    verify: Annotated[bool, typer.Option("--verify", help="read every tensor; find NaN and infinite values")] = False,
    against: Annotated[Path | None, typer.Option(help="another checkpoint to compare with, bit by bit")] = None,
    config: Annotated[
        Path | None, typer.Option(help="folder with the config.json of a checkpoint that has none")
    ] = None,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="read pickles without running code")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Describe a checkpoint: form, config, parameters, files, checks. Exit code 1 if something is wrong with it.

    Example: grin-moe inspect GRIN-MoE-fused --against GRIN-MoE
    """
    import conversion
    from conversion.summary import summarize

    is_plain = not (verify or against or config or weights_only)
    with transfer("reading", as_json or is_plain) as progress:
        found = (summarize(path) if is_plain else None) or conversion.inspect(
            path, verify=verify, against=against, config=config, weights_only=weights_only, progress=progress
        )
    if as_json:
        print(json.dumps(vars(found), indent=2))
    else:
        table = Table(box=None, show_header=False)
        table.add_row("checkpoint", f"{escape(found.path)} ({found.form}, {escape(found.model)})")
        table.add_row("parameters", f"{found.parameters:,}; a token uses {found.active_parameters:,}")
        table.add_row("dtypes", escape(", ".join(f"{name} {count:,}" for name, count in found.dtypes.items())))
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
