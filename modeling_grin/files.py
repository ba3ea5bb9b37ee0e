"""Files that are there as a whole, or as they were; links that lead out of a folder; archives that would inflate."""

import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

PART = ".part-"  # how the name of a file begins that is being written


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; at the end, if nothing was raised, that file takes the place of `path`."""
    part = path.with_name(PART + path.name)
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file at once, text in UTF-8."""
    with replacing(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


# Where files of a checkpoint lie that are read or copied: beside the weights, or in what transformers and accelerate
# give a folder of its own.
CHECKPOINT_FILES = ("*", "additional_chat_templates/*", "pytorch_model_fsdp_*/*")


def is_within(path: Path, folder: Path) -> bool:
    """Whether a file of `folder`, links resolved, lies in `folder` or among the blobs of its Hub cache."""
    root = folder.resolve()
    # Not resolved: where `blobs` is itself a link, that is followed out of the cache.
    roots = [root, *(parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots")]
    return any(path.resolve().is_relative_to(root) for root in roots)


def describe_links(folder: Path, deeper: Iterable[Path] = ()) -> str | None:
    """A sentence on the files of a checkpoint, and `deeper` ones, that are links out of its folder; None without such.

    A checkpoint from somebody else may hold `LICENSE -> /home/me/.ssh/id_rsa`.
    """
    files = {path for pattern in CHECKPOINT_FILES for path in folder.glob(pattern) if path.is_file()} | {*deeper}
    outside = sorted(path for path in files if not is_within(path, folder))
    if not outside:
        return None
    shown = ", ".join(f"{path.relative_to(folder)} (to {path.resolve()})" for path in outside[:5])
    return (
        f"{folder} has {len(outside)} file(s) that are links out of it: {shown}{', ...' * (len(outside) > 5)}; if "
        "they belong to the checkpoint, copy them there (`cp -rL` copies a folder so), else delete the links"
    )


def check_archive(file: str | Path | IO[bytes]) -> list[zipfile.ZipInfo]:
    """The entries of a zip archive that torch.save wrote, as its directory lists them; nothing else is read.

    Raises:
        ValueError: it is no archive, or has entries that are compressed, overlap or share a name, which torch.save
            writes never, and which would take more memory than the file. The message goes on after the file's name.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries, end = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError("is cut off or damaged") from error
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ValueError(f"has {entry.filename!r} compressed, which torch.save never does")
    if len({entry.filename.lower() for entry in entries}) < len(entries):
        raise ValueError("has two entries of one name")
    if sum(entry.file_size for entry in entries) > end:
        raise ValueError("has entries that overlap")
    return entries
