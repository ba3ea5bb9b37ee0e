"""The header of a safetensors file: the one place that reads or writes it.

`safetensors.safe_open` refuses damaged files: wrong sizes, holes, overlaps, unknown types. It accepts one fault: a
name that occurs twice, of which readers may take either.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON, for `json.loads(object_pairs_hook=...)`; raise ValueError if a key occurs twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        [(name, count)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name!r:.120} occurs {count} times in one object")
    return values


def read_header(path: Path) -> dict[str, Any]:
    """Return a file's header as its JSON has it: name -> dtype, shape and data_offsets, and `__metadata__`.

    Raises:
        ValueError: the file is missing, not a regular file, or damaged; the message begins with its path.
    """
    if not path.is_file():  # opening a pipe would wait for ever
        raise ValueError(f"{path} is missing, or not a file")
    try:
        with safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            return json.loads(file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=unique_keys)
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}): fetch it again") from error


def encode_header(header: Mapping[str, Any]) -> bytes:
    """Return the bytes before the tensors of a file. transformers before 4.48.2 demands the metadata."""
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8 bytes
    return len(text).to_bytes(8, "little") + text
