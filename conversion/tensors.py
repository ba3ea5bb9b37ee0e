"""Lazy tensors: shape and dtype are known, data is read on demand.

Everything in this package speaks of *released* tensors, named as in the release: one matrix per expert (`w1`, `w2`,
`w3`). A source of any form offers them under these names, and a target of any form is made of them.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from modeling_grin.safetensors_header import read_header

# Of weights that are not quantised: safetensors' names.
DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
CHUNK_BYTES = 2**21  # read, checked and written at a time: fits a processor's caches


class ConversionError(ValueError):
    """A checkpoint is damaged or cannot become what was asked for; names the file, tensor, field or option."""


def is_finite(chunk: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; at the speed of memory, unlike `torch.isfinite(chunk).all()`."""
    return all(map(torch.isfinite, torch.aminmax(chunk)))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that can be read.

    Args:
        where: the tensor and its file, for messages.
        read: returns the whole tensor, perhaps a view of a mapped file; it must not be changed.
        path: the safetensors file that holds it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    where: str
    read: Callable[[], torch.Tensor]
    path: Path | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def chunks(self) -> Iterator[torch.Tensor]:
        """Yield the elements in row-major order, as 1-D tensors of at most `CHUNK_BYTES`."""
        yield from self.read().reshape(-1).split(CHUNK_BYTES // self.dtype.itemsize)

    def part(self, start: int, shape: tuple[int, ...], where: str) -> "StoredTensor":
        """Return the elements from `start` on, in row-major order, as a tensor of its own."""

        def read() -> torch.Tensor:
            return self.read().reshape(-1)[start : start + math.prod(shape)].view(shape)

        return replace(self, shape=shape, where=where, read=read)


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name, unread.

    Each `read` maps the file anew, so that what has been read does not stay in memory.
    """
    try:
        read_header(path)
        with safe_open(path, framework="pt") as file:
            views = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ConversionError(f"{path} has a tensor that cannot be read: {error}") from error
    except ValueError as error:
        raise ConversionError(str(error)) from error
    return {
        name: StoredTensor(tuple(view.shape), view.dtype, f"{name} in {path}", partial(load_tensor, path, name), path)
        for name, view in views.items()
    }


def load_tensor(path: Path, name: str) -> torch.Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{name} in {path} cannot be read any more ({error}): fetch it again") from error
