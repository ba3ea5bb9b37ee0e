"""The commands' console and progress bars, and `escape`, which every text from a file passes before it is printed."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated

from rich.console import Console
from rich.markup import escape as escape_markup
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from typer import Option

Json = Annotated[bool, Option("--json", help="print JSON")]
console, errors = Console(emoji=False), Console(stderr=True, emoji=False)


def is_plain(character: str) -> bool:
    """Whether a terminal shows the character and does nothing else."""
    return character.isprintable() or character in "\n\t"


def escape(value: object) -> str:
    r"""`value` as the console shows it: without rich's markup, and control characters as `\x1b` is written here.

    Names of files and tensors, metadata and configs are somebody else's, and so is an error that quotes them: what a
    terminal obeys (ESC, OSC, C1), what hides or turns text around, and half of a pair would reach it.
    """
    text = str(value)
    return escape_markup("".join(character if is_plain(character) else repr(character)[1:-1] for character in text))


def show(rows: Iterable[tuple[str, object]]) -> None:
    """Print a label and a text from anywhere on each line; lines without a text are left out."""
    table = Table(box=None, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for label, text in rows:
        if text:
            table.add_row(label, escape(text))
    console.print(table)


def print_json(report: object) -> None:
    """Print the fields of a report."""
    print(json.dumps(vars(report), indent=2))


@contextmanager
def transfer(title: str, quiet: bool, hint: str = "nothing was changed") -> Iterator[Callable[[int, int], None]]:
    """A progress bar of bytes; what is yielded takes the bytes done and those in all. Ctrl-C prints the hint."""
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=errors, disable=quiet)
    task = bar.add_task(title, total=None)

    def advance(done: int, total: int) -> None:
        bar.start()  # with the first bytes: what is refused before needs no bar
        bar.update(task, advance=done, total=total)
        if bar.finished:
            bar.stop()  # others may draw theirs

    try:
        yield advance
    except KeyboardInterrupt:
        errors.print(f"interrupted: {hint}")
        raise
    finally:
        bar.stop()
