"""What the commands print on, and their progress bars."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

console, errors = Console(), Console(stderr=True)


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
