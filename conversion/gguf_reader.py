"""Read a GGUF file that anybody may have written, by the `gguf` package."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from .tensors import ConversionError
from .writing import Progress

MAX_HEADER_BYTES = 20_000_000  # a vocabulary of 256,000 tokens takes half of it
MAX_READS = 3_000_000  # of a header: gguf makes an array of each number in it
CHUNK_BYTES = 2**22


class BoundedReader(gguf.GGUFReader):
    """gguf's reader, which would go on past the end of a file for as many values as a number in it claims."""

    reads = 0

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        is_header = not hasattr(self, "data_offset")  # it is set before the tensors are made
        self.reads += is_header
        end = int(offset) + int(count) * np.dtype(dtype).itemsize
        if end > len(self.data):
            raise ValueError("it ends too early")
        if is_header and (end > MAX_HEADER_BYTES or self.reads > MAX_READS):
            raise ValueError(f"it has a header of more than {MAX_HEADER_BYTES} bytes or {MAX_READS} values")
        return super()._get(offset, dtype, count, override_order)


def read_gguf(path: Path) -> tuple[dict[str, Any], list[gguf.ReaderTensor]]:
    """Return a file's metadata, arrays as lists, and its tensors, whose data is mapped."""
    if not path.is_file():  # opening a pipe would wait for ever
        raise ConversionError(f"{path} is missing, or not a file")
    try:
        reader = BoundedReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    except Exception as error:  # of any type: gguf meets numbers that it never expects
        raise ConversionError(f"{path} is damaged or not a GGUF file ({error}): fetch it again") from error
    if reader.endianess != gguf.GGUFEndian.LITTLE:
        raise ConversionError(f"{path} is big-endian: only little-endian GGUF can be read")
    return metadata, reader.tensors


def find_damage(tensors: Sequence[gguf.ReaderTensor], progress: Progress) -> Iterator[str]:
    """Yield the names of tensors with NaN or infinite values, dequantised a few blocks at a time."""
    total = sum(tensor.n_bytes for tensor in tensors)
    for tensor in tensors:
        _, block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        data = tensor.data.reshape(-1).view(np.uint8)
        step = CHUNK_BYTES // block_bytes * block_bytes
        for start in range(0, len(data), step):
            chunk = data[start : start + step]
            try:
                is_sound = np.isfinite(gguf.dequantize(chunk, tensor.tensor_type)).all()
            except NotImplementedError as error:
                kind = tensor.tensor_type.name
                raise ConversionError(f"{tensor.name} is of type {kind}, which cannot be read") from error
            if not is_sound:
                yield tensor.name
                break
            progress(len(chunk), total)
