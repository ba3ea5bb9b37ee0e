"""Tensors that lie in files: what they are is known, what they hold is read when it is asked for, a piece at a time.

All of conversion speaks of *released* tensors, those of the release's layout: one matrix per expert (`w1`, `w2`,
`w3`). A source of any form offers them under their released names, and a target of any form is made of them.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

CHUNK_BYTES = 2**21  # of one read: what is in flight stays in the processor's caches


class ConversionError(ValueError):
    """A checkpoint that is not what it should be, or cannot become what was asked for; says which, where and why."""


def is_finite(chunk: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; at the speed of memory, which `torch.isfinite` is far from."""
    return all(map(torch.isfinite, torch.aminmax(chunk)))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that can be read: `shape`, `dtype`, and `where` it is, in words for messages.

    Args:
        load: returns the whole tensor; it may be a view of something larger and is not to be changed.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    where: str
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """The whole tensor."""
        return self.load()

    def chunks(self) -> Iterator[torch.Tensor]:
        """Its elements in row-major order, as 1-D tensors of at most `CHUNK_BYTES`, each valid until the next."""
        yield from self.read().reshape(-1).split(CHUNK_BYTES // self.dtype.itemsize)

    def part(self, start: int, shape: tuple[int, ...], where: str) -> "StoredTensor":
        """The elements from the `start`-th on, in row-major order, as a tensor of its own."""

        def load() -> torch.Tensor:
            return self.read().reshape(-1)[start : start + math.prod(shape)].view(shape)

        return StoredTensor(shape, self.dtype, where, load)


@dataclass(frozen=True)
class FileTensor(StoredTensor):
    """Consecutive bytes of a file: a tensor in a safetensors file, or a part of one."""

    path: Path
    offset: int

    @classmethod
    def at(cls, path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> "FileTensor":
        """`name` is what the file calls it."""

        def load() -> torch.Tensor:
            tensor = torch.empty(shape, dtype=dtype)
            flat, position = tensor.view(-1), 0
            for chunk in stored.chunks():
                flat[position : position + len(chunk)] = chunk
                position += len(chunk)
            return tensor

        stored = cls(shape, dtype, f"{name} in {path}", load, path, offset)
        return stored

    def part(self, start: int, shape: tuple[int, ...], where: str) -> "FileTensor":
        return self.at(self.path, self.offset + start * self.dtype.itemsize, shape, self.dtype, where)

    def chunks(self) -> Iterator[torch.Tensor]:
        buffer = torch.empty(min(CHUNK_BYTES, self.nbytes), dtype=torch.uint8)
        position, end = self.offset, self.offset + self.nbytes
        with self.path.open("rb", buffering=0) as file:
            while position < end:
                part = buffer[: end - position]
                if os.preadv(file.fileno(), [part.numpy().data], position) != len(part):
                    raise ConversionError(f"{self.where}: the file ends too early, it was cut off; fetch it again")
                position += len(part)
                yield part.view(self.dtype)
