"""Commands for checkpoints: `convert`, `inspect`."""

from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option

from .terminal import Json, print_json, show, transfer

# Panels of `convert`'s options.
Result = partial(Option, rich_help_panel="Result")
Experts = partial(Option, rich_help_panel="Number of experts")
Safety = partial(Option, rich_help_panel="Safety")

PICKLES = "read pickles (pytorch_model.bin, DCP) without running code"


def convert(
    source: Annotated[Path, Argument(exists=True, help="folder of a checkpoint, a sharded one, or a LoRA adapter")],
    destination: Annotated[Path, Argument(help="folder to make; for gguf, the file")],
    to: Annotated[str, Result(help="hub, fused, phimoe or gguf")],
    engine: Annotated[
        str | None, Result("--for", help="who reads phimoe: transformers, vllm, sglang; refused where it errs")
    ] = None,
    dtype: Annotated[
        str | None,
        Result(help="float32, bfloat16 or float16; default: each tensor's own. For gguf: f32, f16, bf16, q8_0, q4_0"),
    ] = None,
    max_shard_size: Annotated[str | None, Result(help="size of one file of weights; 5GB by default")] = None,
    base: Annotated[Path | None, Option(help="base model of an adapter, instead of the one its config names")] = None,
    config: Annotated[
        Path | None, Option(help="folder with the config.json of a source that has none (sharded checkpoints)")
    ] = None,
    num_experts: Annotated[
        int | None,
        Experts(
            "--experts", min=1, help="experts per layer: copies of a single one, or the most used on --calibration"
        ),
    ] = None,
    top_k: Annotated[int | None, Experts(min=1, help="experts per token, of copies; 2 by default")] = None,
    calibration: Annotated[
        Path | None, Option(help="text file to measure routing on: expert load; for gguf, near-ties")
    ] = None,
    check: Annotated[
        bool | None, Safety(help="compare the logits of source and result; by default for small models")
    ] = None,
    resume: Annotated[bool, Safety("--resume", help="continue an interrupted conversion")] = False,
    weights_only: Annotated[bool, Safety("--weights-only", help=PICKLES)] = False,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint; its form is detected. Streamed, exact, and there only when it is complete.

    Example: grin-moe convert GRIN-MoE GRIN-MoE-phimoe --to phimoe
    """
    options = dict(locals())
    import conversion

    del options["as_json"]
    with transfer("converting", as_json, "add --resume to the same command to continue") as progress:
        report = conversion.convert(**options, progress=progress)
    if as_json:
        return print_json(report)
    rows = [("from", f"{report.source} ({report.form})"), ("to", f"{report.destination} ({report.target})")]
    if report.parameters:
        size = f"{report.parameters:,} parameters, {report.nbytes / 1e9:.3f} GB"
        rows.append(("written", f"{size} in {report.seconds:.1f} s ({report.nbytes / report.seconds / 1e9:.2f} GB/s)"))
        unchecked = "not compared (--check does)"
        same = unchecked if report.difference is None else f"differ by {report.difference:.2g} of the largest"
        rows.append(("logits", same))
    rows += [("copied", ", ".join(report.copied)), ("skipped", ", ".join(report.skipped))]
    show([*rows, *(("note", note) for note in report.notes)])


def inspect(
    path: Annotated[Path, Argument(exists=True, help="folder of a checkpoint of any form, or a GGUF file")],
    verify: Annotated[bool, Option("--verify", help="read every tensor; find NaN and infinite values")] = False,
    against: Annotated[Path | None, Option(help="another checkpoint to compare with, bit by bit")] = None,
    config: Annotated[Path | None, Option(help="folder with the config.json of a checkpoint that has none")] = None,
    weights_only: Annotated[bool, Option("--weights-only", help=PICKLES)] = False,
    as_json: Json = False,
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
        print_json(found)
    else:
        shown = {key: value for key, value in found.config.items() if len(str(value)) < 200}  # no LongRoPE's factors
        size = f"{len(found.files)}, {sum(found.files.values()) / 1e9:.3f} GB"
        rows = [
            ("checkpoint", f"{found.path} ({found.form}, {found.model})"),
            ("parameters", f"{found.parameters:,}; a token uses {found.active_parameters:,}"),
            ("dtypes", ", ".join(f"{name} {count:,}" for name, count in found.dtypes.items())),
            ("files", f"{size}: {', '.join(list(found.files)[:3])}{' ...' * (len(found.files) > 3)}"),
            ("config", ", ".join(f"{key}={value}" for key, value in shown.items())),
            *(("[green]right[/green]", check) for check in found.checks),
            *(("[red]wrong[/red]", problem) for problem in found.problems),
        ]
        for name, difference in list((found.difference or {}).items())[:10]:
            how = "missing, or of another shape" if difference is None else f"by up to {difference:g}"
            rows.append(("differs", f"{name}: {how}"))
        show(rows)
    if found.problems:
        raise Exit(1)
