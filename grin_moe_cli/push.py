"""`push`: a model to the Hub."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from .terminal import console, escape, on_interrupt, transfer


def push(
    folder: Annotated[Path, typer.Argument(help="checkpoint in the released layout, such as a recipe's output_dir")],
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub; created if it does not exist")],
    private: Annotated[bool, typer.Option("--private", help="create a private repository")] = False,
    revision: Annotated[str | None, typer.Option(help="branch, created if it does not exist; default: main")] = None,
    no_card: Annotated[bool, typer.Option("--no-card", help="leave out README.md and figures/")] = False,
    include: Annotated[
        list[str] | None, typer.Option(help="pattern of other files to send, such as 'results.json'; may be repeated")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list files and problems; contact nobody")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Send a model to the Hub in one commit: weights, code, tokenizer, card. Run it again to resume.

    Example: grin-moe push sft-output me/my-grin --dry-run
    """
    from modeling_grin.publishing import push as pushing

    with on_interrupt("run the same command to resume"), transfer("checking", as_json) as progress:
        report = pushing.push(folder, repo_id, private=private, revision=revision, card=not no_card,
                              include=include or [], dry_run=dry_run, progress=progress)  # fmt: skip
    if as_json:
        print(json.dumps(vars(report), indent=2))
    else:
        table = Table(box=None, show_header=False)
        table.add_column()
        table.add_column(overflow="fold")
        table.add_column(justify="right", no_wrap=True)
        for name, nbytes in report.files.items():
            table.add_row("file", escape(name), decimal(nbytes))
        for name in report.skipped:
            table.add_row("skipped", escape(name))
        for name in report.removed:
            table.add_row("removed", escape(name))
        for note in report.notes:
            table.add_row("note", escape(note))
        for problem in report.problems:
            table.add_row("[red]refused[/red]", escape(problem))
        console.print(table)
        total = f"{len(report.files)} files, {decimal(sum(report.files.values()))}"
        if dry_run:
            console.print(f"{total} for {escape(report.repo_id)}; nothing was sent", highlight=False)
        else:
            outcome = "pushed to" if report.changed else "already in"
            console.print(
                f"{total} {outcome} {escape(report.url)}, commit {report.commit}", highlight=False, soft_wrap=True
            )
    if report.problems:
        raise typer.Exit(1)
