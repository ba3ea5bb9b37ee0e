"""`grin-moe routing`: study where the tokens of texts go."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from .terminal import console, errors, escape

if TYPE_CHECKING:
    import torch

    from modeling_grin.modeling_grinmoe import GrinMoeForCausalLM

models_option, counting_option, report_option = (
    partial(typer.Option, rich_help_panel=panel) for panel in ("Models", "Counting", "Report")
)
VIEWED_TOKENS = 200  # of each set, in the report's token-level view
SEQUENCE = 1024  # where the model has positions for it
COLUMNS = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
           TextColumn("{task.completed:,.0f} tokens"), TimeRemainingColumn())  # fmt: skip

Batches = Iterator[Mapping[str, "torch.Tensor"]]


def tracked(batches: Batches, progress: Progress, name: str, max_tokens: int) -> Batches:
    """Yield the batches and move a progress bar."""
    task = progress.add_task(escape(name), total=max_tokens)
    for batch in batches:
        yield batch
        progress.advance(task, batch["attention_mask"].sum().item())
    progress.update(task, total=progress.tasks[task].completed)


@contextmanager
def prefix_errors(name: str) -> Iterator[None]:
    """Name the checkpoint in errors of loading it, in one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{name} cannot be loaded: {' '.join(str(error).split())}") from error


def load_model(name: str, dtype: str) -> "GrinMoeForCausalLM":
    """Load the checkpoint's model on the available devices."""
    from modeling_grin.modeling_grinmoe import GrinMoeForCausalLM

    with prefix_errors(name):
        return GrinMoeForCausalLM.from_pretrained(name, dtype=dtype, device_map="auto")


def parse_data(data: list[str]) -> dict[str, str]:
    """Parse NAME=PATH arguments to {name: path}. "all sets" is taken: the tables call their sum so."""
    from modeling_grin.analysis.report import ALL_SETS

    sets: dict[str, str] = {}
    for given in data:
        name, equals, path = given.partition("=")
        if not (name and equals and path):
            raise ValueError(f"--data must be NAME=PATH, as in --data 'english=docs/*.md'; got {given}")
        if name in sets or name == ALL_SETS:
            raise ValueError(f"--data must have names that differ from each other and from {ALL_SETS!r}; got {given}")
        sets[name] = path
    return sets


def display_name(name: str) -> str:
    """The name of a model or of texts in the report: an absolute path loses its folders."""
    return Path(name).name if Path(name).is_absolute() else name


def routing(
    model: Annotated[str, typer.Argument(help="folder or Hub name of a GRIN-MoE or Phimoe checkpoint")],
    data: Annotated[
        list[str],
        counting_option(
            help="NAME=PATH, a set of texts; may be repeated. PATH is a file, folder or glob (text, or jsonl, json or "
            "parquet with `text` or `messages`), or a Hub dataset: DATASET or DATASET:CONFIG:SPLIT"
        ),
    ],
    against: Annotated[
        str | None, models_option(help="another checkpoint to compare with, such as a fine-tuned one")
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], models_option(help="auto: the checkpoint's own")
    ] = "auto",
    max_tokens: Annotated[int, counting_option(min=1, help="tokens to count per set")] = 100_000,
    sequence: Annotated[
        int | None,
        counting_option(min=1, help=f"most tokens in a row; default: {SEQUENCE}, or the model's context if shorter"),
    ] = None,
    batch_size: Annotated[int, counting_option(min=1, help="rows per forward pass")] = 8,
    regret: Annotated[
        int,
        counting_option(
            min=0,
            help="tokens of each set and layer for which to try other experts: how much loss would these have saved?",
        ),
    ] = 0,
    alternatives: Annotated[int, counting_option(min=1, help="experts that --regret tries for a token's last")] = 3,
    output_dir: Annotated[Path, report_option(help="folder for report.html, tables and pictures")] = Path("routing"),
    order: Annotated[
        Literal["clustered", "given"], report_option(help="order of sets in the similarity figure")
    ] = "clustered",
    as_json: Annotated[bool, report_option("--json", help="print JSON")] = False,
) -> None:
    """Study routing: expert load, similarity of texts, specialised experts, and each token's experts.

    Example: grin-moe routing GRIN-MoE --data code=src --data prose='docs/*.md' --against my-finetune
    """
    from transformers import AutoTokenizer

    from modeling_grin.analysis.regret import routing_regret
    from modeling_grin.analysis.report import REGRET_COLUMNS, RoutingStudy, describe_regret, view_tokens, write_report
    from modeling_grin.analysis.routing import collect_routing, compare_routing
    from modeling_grin.data import batched, token_rows

    sets = parse_data(data)
    names = [model] if against is None else [model, against]
    with prefix_errors(model):
        tokenizer = AutoTokenizer.from_pretrained(model)
    models = [load_model(name, dtype) for name in names]
    context = min(loaded.config.max_position_embeddings for loaded in models)
    if sequence is not None and sequence > context:
        raise ValueError(f"--sequence must be at most {context}, the model's context; got {sequence}")
    length = sequence or min(SEQUENCE, context)

    sources = {name: display_name(path) for name, path in sets.items()}
    titles = [display_name(name) for name in names]
    if len({*titles}) < len(names):
        titles = names  # they differ only in their folders
    study = RoutingStudy(titles[0], {}, sources=sources, against=None if against is None else titles[1], order=order)
    with Progress(*COLUMNS, console=errors, disable=as_json) as progress:
        for name, path in sets.items():
            rows = token_rows(path, tokenizer, length, max_tokens)
            batches = tracked(batched(rows, batch_size), progress, name, max_tokens)
            if against is None:
                study.sets[name] = collect_routing(models[0], batches)
            else:
                study.comparisons[name] = compare_routing(models[0], models[1], batches)
                study.sets[name] = study.comparisons[name].before
            if regret:
                batches = batched(token_rows(path, tokenizer, length, max_tokens), batch_size)
                study.regrets[name] = routing_regret(models[0], batches, regret, alternatives)
            viewed = [ids for ids, _ in token_rows(path, tokenizer, length, VIEWED_TOKENS)]
            for loaded, which in zip(models, titles, strict=True):
                title = name if against is None else f"{name}, {which}"
                study.views.append(view_tokens(title, loaded, tokenizer, viewed))
    with errors.status("shuffling texts and drawing"):
        summary = write_report(study, output_dir)
    if as_json:
        print(json.dumps(summary, indent=2))
        return

    table = Table(title=f"Routing of {escape(model)}", title_justify="left", box=None)
    table.add_column("set", overflow="fold")
    for column in ("tokens", "near-ties", "router entropy", "balance loss", "busiest expert"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in summary["sets"].items():
        figures = (f"{row['tokens']:,}", f"{row['near_tie_rate']:.2%}", f"{row['router_entropy']:.3f}",
                   f"{row['balance_loss']:.3f}", f"{row['load_max_worst']:.2f} x")  # fmt: skip
        table.add_row(escape(name), *figures)
    console.print(table)
    if study.regrets:
        title = "Regret, in 0.001 nats a token of a layer: another expert in place of the last"
        table = Table("set", title=title, title_justify="left", box=None)
        for column in REGRET_COLUMNS:
            table.add_column(column, justify="right", no_wrap=True)
        for name, measured in study.regrets.items():
            table.add_row(escape(name), *describe_regret(measured))
        console.print(table)
    console.print(f"wrote {escape(output_dir / 'report.html')}, with pictures and tables beside it", highlight=False)
