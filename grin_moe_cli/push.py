"""`push`: a model to the Hub."""

from pathlib import Path
from typing import Annotated

from rich.filesize import decimal
from typer import Argument, Exit, Option

from .terminal import Json, console, escape, print_json, show, transfer


def push(
    folder: Annotated[
        Path, Argument(exists=True, help="checkpoint in the released layout, such as a recipe's output_dir")
    ],
    repo_id: Annotated[str, Argument(help="OWNER/NAME on the Hub; created if it does not exist")],
    private: Annotated[bool, Option("--private", help="create a private repository")] = False,
    revision: Annotated[str | None, Option(help="branch, created if it does not exist; default: main")] = None,
    no_card: Annotated[bool, Option("--no-card", help="leave out README.md and figures/")] = False,
    include: Annotated[
        list[str] | None, Option(help="other files to send, such as 'results.*'; may be repeated")
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="list files and problems; contact nobody")] = False,
    as_json: Json = False,
) -> None:
    """Send a model to the Hub in one commit: weights, code, tokenizer, card. Run it again to resume.

    Example: grin-moe push sft-output me/my-grin --dry-run
    """
    from modeling_grin.publishing import push as pushing

    with transfer("checking", as_json, "run the same command to resume") as progress:
        report = pushing.push(folder, repo_id, private=private, revision=revision, card=not no_card,
                              include=include or [], dry_run=dry_run, progress=progress)  # fmt: skip
    if as_json:
        print_json(report)
    else:
        show(
            [
                *(("file", f"{name}, {decimal(nbytes)}") for name, nbytes in sorted(report.files.items())),
                *(("skipped", name) for name in report.skipped),
                *(("removed", name) for name in report.removed),
                *(("note", note) for note in report.notes),
                *(("[red]refused[/red]", problem) for problem in report.problems),
            ]
        )
        total = f"{len(report.files)} files, {decimal(sum(report.files.values()))}"
        outcome = "for" if dry_run else "pushed to" if report.changed else "already in"
        end = "; nothing was sent" if dry_run else f", commit {report.commit}"
        console.print(f"{total} {outcome} {escape(report.url or repo_id)}{end}", highlight=False, soft_wrap=True)
    if report.problems:
        raise Exit(1)
