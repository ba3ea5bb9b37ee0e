"""Files that are there as a whole, or as they were."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PART = ".part-"  # how the name of a file begins that is being written


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; at the end, if nothing was raised, that file takes the place of `path`."""
    part = path.with_name(PART + path.name)
    yield part
    part.replace(path)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file at once, text in UTF-8."""
    with replacing(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
