"""`push`: a model to the Hub."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from .terminal import console, errors, escape, transfer


def push(
    folder: Annotated[Path, typer.Argument(help="of a checkpoint in the released layout, such as a recipe's output")],
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub; made if it is not there")],
    private: Annotated[bool, typer.Option("--private", help="make the repository private")] = False,
    revision: Annotated[
        str | None, typer.Option(help="branch, made if it is not there; by default the main one")
    ] = None,
    no_card: Annotated[bool, typer.Option("--no-card", help="without README.md, and what it shows")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="list files, sizes and what would be refused; contact nobody")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON")] = False,
) -> None:
    """Send a model to the Hub: weights, code, tokenizer, card, in one commit. The same command resumes.

    Example: grin-moe push sft-output me/my-grin --dry-run
    """
    from modeling_grin.publishing import push as pushing

    with ExitStack() as checking:
        advance, done = checking.enter_context(transfer("checking", as_json)), 0

        def progress(nbytes: int, total: int) -> None:
            nonlocal done
            done += nbytes
            advance(nbytes, total)
            if done == total:
                checking.close()  # the Hub's client draws the bars of the upload

        try:
            report = pushing.push(
                folder,
                repo_id,
                private=private,
                revision=revision,
                card=not no_card,
                dry_run=dry_run,
                progress=progress,
            )
        except KeyboardInterrupt:
            errors.print("interrupted: the same command goes on; what has arrived is not sent again")
            raise
    if as_json:
        print(json.dumps(vars(report), indent=2))
    else:
        table = Table(box=None, show_header=False)
        table.add_column()
        table.add_column(overflow="fold")
        table.add_column(justify="right", no_wrap=True)
        for name, nbytes in report.files.items():
            table.add_row("file", escape(name), decimal(nbytes))
        for name, reason in report.left.items():
            table.add_row("left", escape(f"{name}: {reason}"))
        for name in report.removed:
            table.add_row("removed", escape(name))
        for note in report.notes:
            table.add_row("note", escape(note))
        for problem in report.problems:
            table.add_row("[red]refused[/red]", escape(problem))
        console.print(table)
        total = f"{len(report.files)} files, {decimal(sum(report.files.values()))}"
        if dry_run:
            console.print(f"{total} for {escape(report.repo_id)}; nothing has been sent", highlight=False)
        else:
            outcome = "pushed to" if report.changed else "already in"
            console.print(
                f"{total} {outcome} {escape(report.url)}, commit {report.commit}", highlight=False, soft_wrap=True
            )
    if report.problems:
        raise typer.Exit(1)
