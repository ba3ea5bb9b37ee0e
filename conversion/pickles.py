"""Training shards and pickled weights, read without running anything that they ask for.

torch.distributed.checkpoint (DCP) has an index, `.metadata`, which is a pickle: it is read by an unpickler that knows
nothing but the names torch writes there, and makes records of them without code. All else that is pickled goes through
torch's own restricted unpickler (`weights_only`). DCP also writes its parts to safetensors, which are no pickles.
"""

import functools
import io
import json
import math
import operator
import os
import pickle
import threading
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX

from modeling_grin.files import check_archive

from .headers import MAX_DIMENSIONS, MAX_HEADER_BYTES, _shown, read_safetensors_header
from .tensors import ConversionError, StoredTensor

DCP_INDEX = ".metadata"
FSDP_FOLDERS = "pytorch_model_fsdp_*"  # accelerate's SHARDED_STATE_DICT, in Trainer's checkpoints
SAFETENSORS_SHARDS = "shard-*-model-*-of-*.safetensors"  # torch's HuggingFaceStorageWriter, one for every rank
SHARDING_INFO = "DCP_SHARDING_INFO"  # in the metadata of these
PICKLES = ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model_fsdp.bin")

PICKLE_ENTRY = "data.pkl"  # of the archive that torch.save writes
ZIP_MAGIC = b"PK\x03\x04"  # what torch.save's files begin with

# Parts of the names under which trainers save what an optimizer keeps; no module of the model is called so.
OF_OPTIMIZERS = {"optim", "optimizer", "optimizers", "state", "param_groups"}
TORCH_ADVICE = ("Weights only load failed", "(1)", "(2)")  # of torch.load, before the reason

MAX_INDEX_BYTES = 2**28  # of DCP: some 100 bytes for each part of a tensor that a rank has
MAX_PICKLE_BYTES = MAX_HEADER_BYTES  # of torch.save: some 100 bytes for each tensor
MAX_ITEMS = MAX_DIMENSIONS
MAX_CHUNKS = 2**14  # of a tensor, one for each rank: they are compared with one another

COMPARED_CHUNKS = 256  # with all others at once: an index may have very many
CACHED_TENSORS = 2  # a layer's fused matrices, whose parts are asked for one by one


class Record:
    """Stands for an object in a pickle: its `state` and no code."""

    state: Any = None

    def __init__(self, *args: Any) -> None:
        pass


# All that DCP's index is made of, torch.Size and dtypes aside: (module, name) -> what is made in its place.
DCP_CLASSES = {
    (module, name): type(name, (Record,), {})
    for module, names in {
        "torch.distributed.checkpoint.metadata": (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        ),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch.serialization": ("_get_layout",),
        "pathlib": ("PosixPath", "WindowsPath"),
        "pathlib._local": ("PosixPath", "WindowsPath"),  # Python 3.13
    }.items()
    for name in names
}


# These hash, or allocate, as much as the file asks for. torch never writes them.
REFUSED_OPCODES = (
    pickle.DICT, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.BYTEARRAY8, pickle.NEXT_BUFFER,
    pickle.READONLY_BUFFER, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX,
    pickle.PERSID,
)  # fmt: skip


Unpickler: Any = pickle._Unpickler  # typeshed knows nothing of its methods


class BoundedUnpickler(Unpickler):
    """Makes records without code, in time and memory that are bounded by the length of the pickle.

    It is Python's unpickler in Python: the one in C sets aside whatever memory a number in the file asks for. Tuples
    are no keys: 60 of them, each of the one before twice, take 120 bytes, and 2^60 steps to hash. None of what is
    copied (arguments, sizes, states) has more than `MAX_ITEMS`, for it could be copied as often as the file is long.
    """

    dispatch = {code: load for code, load in Unpickler.dispatch.items() if code not in b"".join(REFUSED_OPCODES)}

    def check(self, condition: bool, what: str) -> None:
        if not condition:
            raise TypeError(what)

    def load_tuple(self) -> None:
        items = self.pop_mark()
        self.check(len(items) <= MAX_ITEMS, f"a tuple of {len(items)}")
        self.append(tuple(items))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def load_setitems(self) -> None:
        self.set_items(self.pop_mark())

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        self.check(isinstance(target, dict), "items of no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.check(isinstance(key, (str, int, Record)), f"a {type(key).__name__} as a key")
            target[key] = value

    def load_reduce(self) -> None:
        args, function = self.stack.pop(), self.stack[-1]
        self.check(isinstance(args, tuple) and isinstance(function, type), "a call of no class")
        sized = [arg for arg in args if isinstance(arg, (list, dict))]
        self.check(all(len(arg) <= MAX_ITEMS for arg in sized), "a call with too much")
        self.check(function is not OrderedDict or not args, "a dictionary made of a list")
        self.stack[-1] = function(*args)

    def load_newobj(self) -> None:
        args, cls = self.stack.pop(), self.stack[-1]
        self.check(isinstance(cls, type) and issubclass(cls, Record), "a new object of another class")
        self.stack[-1] = cls(*args)

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        else:  # what state_dict() returns has `_metadata`
            self.check(isinstance(target, OrderedDict) and isinstance(state, dict), "a state of another object")
            self.check(len(state) <= MAX_ITEMS, "a state with too much")

    dispatch |= {
        code[0]: load
        for code, load in (
            (pickle.TUPLE, load_tuple),
            (pickle.SETITEM, load_setitem),
            (pickle.SETITEMS, load_setitems),
            (pickle.REDUCE, load_reduce),
            (pickle.NEWOBJ, load_newobj),
            (pickle.BUILD, load_build),
        )
    }


class IndexUnpickler(BoundedUnpickler):
    """Of DCP's index."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        known: dict[tuple[str, str], type] = {
            ("torch", "Size"): torch.Size,
            ("collections", "OrderedDict"): OrderedDict,
            **DCP_CLASSES,
        }
        if (module, name) not in known:
            raise ConversionError(
                f"asks for {module}.{name}, which torch does not write there; do not trust this checkpoint"
            )
        return known[module, name]


class TensorsUnpickler(BoundedUnpickler):
    """Of a file that torch.save wrote: whether torch's restricted unpickler will end. That decides what it makes."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module.partition(".")[0] != "torch":  # others that torch allows, such as bytearray, take any size
            raise ConversionError(f"asks for {module}.{name}, which is no tensor's; do not trust this checkpoint")
        return type(name, (Record,), {})

    def persistent_load(self, pid: Any) -> Any:
        return Record()


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor that lies in one place: `offsets` and `sizes`, one number for each dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    load: Callable[[], torch.Tensor]

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(map(operator.add, self.offsets, self.sizes))


@dataclass(frozen=True)
class ShardedTensor:
    """A tensor in chunks."""

    where: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[Chunk]

    def check(self) -> None:
        """Raise ConversionError unless every element lies in exactly one chunk."""
        chunks = [chunk for chunk in self.chunks if 0 not in chunk.sizes]
        is_within = all(
            len(chunk.offsets) == len(chunk.sizes) == len(self.shape)
            and all(
                0 <= offset <= end <= whole
                for offset, end, whole in zip(chunk.offsets, chunk.ends, self.shape, strict=True)
            )
            for chunk in chunks
        )
        stored = sum(math.prod(chunk.sizes) for chunk in chunks)
        if not is_within or stored != math.prod(self.shape) or overlap(chunks):
            raise ConversionError(
                f"{self.where}: its parts do not cover shape {list(self.shape)} exactly once ({stored} elements): "
                "files of some ranks are missing, or of another save; copy the whole folder again"
            )

    def load(self) -> torch.Tensor:
        """The whole tensor, read chunk by chunk."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        for chunk in self.chunks:
            part = chunk.load()
            if part.shape != chunk.sizes or part.dtype != self.dtype:
                raise ConversionError(
                    f"{self.where}: a part is {part.dtype} {list(part.shape)}, the index says {self.dtype} "
                    f"{list(chunk.sizes)}; the files are of different saves, copy the whole folder again"
                )
            tensor[tuple(map(slice, chunk.offsets, chunk.ends))] = part
        return tensor


def overlap(chunks: list[Chunk]) -> bool:
    """Whether any two of the chunks, none of which is empty, have an element in common."""
    starts = torch.tensor([chunk.offsets for chunk in chunks])  # [chunks, dimensions]
    ends = torch.tensor([chunk.ends for chunk in chunks])
    meetings = 0
    for some_starts, some_ends in zip(starts.split(COMPARED_CHUNKS), ends.split(COMPARED_CHUNKS), strict=True):
        meets = (some_starts[:, None] < ends) & (starts < some_ends[:, None])
        meetings += int(meets.all(dim=-1).sum())
    return meetings > len(chunks)  # each meets itself


def find_dcp_folder(path: Path) -> Path | None:
    """The folder of a sharded training checkpoint: `path` itself, or one in a checkpoint that Trainer has written.

    None where there is whole safetensors (what the shards are converted to, sometimes beside them), or no shards.

    Raises:
        ConversionError: there are several.
    """
    if (path / DCP_INDEX).is_file() or any(path.glob(SAFETENSORS_SHARDS)):
        return path
    if any(path.glob("*.safetensors")):
        return None
    folders = sorted(folder for folder in path.glob(FSDP_FOLDERS) if (folder / DCP_INDEX).is_file())
    if len(folders) > 1:
        names = ", ".join(folder.name for folder in folders)
        raise ConversionError(f"{path} holds the shards of {len(folders)} models ({names}): give one of these folders")
    return folders[0] if folders else None


def read_dcp(folder: Path, *, weights_only: bool) -> dict[str, StoredTensor]:
    """The tensors of a sharded training checkpoint by their names in it, without what optimizers keep.

    They are read when they are asked for; the last two stay in memory, because a layer's released matrices are parts
    of two tensors.

    Args:
        weights_only: read DCP's index, a pickle, by the restricted unpickler. safetensors shards do not need it.

    Raises:
        ConversionError: there is a pickle and not `weights_only`; the index asks for anything else than torch writes
            there; files are missing, lie elsewhere, or are too short; parts of a tensor are missing or overlap.
    """
    if (folder / DCP_INDEX).is_file():
        if not weights_only:
            raise ConversionError(
                f"{folder / DCP_INDEX} is a pickle, which can run code: if you trust the checkpoint, --weights-only "
                "reads it through a restricted unpickler that runs nothing"
            )
        sharded = read_dcp_index(folder)
    else:
        sharded = read_safetensors_shards(folder)
    for tensor in sharded.values():
        tensor.check()

    lock = threading.Lock()  # threads that want two parts of a tensor at once read it once
    cached = functools.lru_cache(maxsize=CACHED_TENSORS)(lambda name: sharded[name].load())

    def load(name: str) -> torch.Tensor:
        with lock:
            return cached(name)

    return {
        name: StoredTensor(tensor.shape, tensor.dtype, tensor.where, functools.partial(load, name))
        for name, tensor in sharded.items()
    }


def is_weight(name: str) -> bool:
    return OF_OPTIMIZERS.isdisjoint(name.split("."))


def read_dcp_index(folder: Path) -> dict[str, ShardedTensor]:
    """The tensors that DCP's `.metadata` describes, unread, by name."""
    path = folder / DCP_INDEX
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise ConversionError(f"has {path.stat().st_size} bytes, more than the {MAX_INDEX_BYTES} that it may have")
        return dict(parse_dcp_index(IndexUnpickler(io.BytesIO(path.read_bytes())).load(), folder))
    except ConversionError as error:
        raise ConversionError(f"{path} {error}") from error
    except Exception as error:  # of any type: this is a pickle that anybody may have written
        raise ConversionError(
            f"{path} is not an index as torch writes it ({type(error).__name__}: {str(error)[:200]}): copy it again"
        ) from error


def parse_dcp_index(index: Any, folder: Path) -> Iterator[tuple[str, ShardedTensor]]:
    """Name and chunks of every tensor of an index; any exception means that it is not one."""
    places: dict[tuple[str, Any], Any] = {}  # (tensor, offsets) -> where its bytes are
    counts: Counter[str] = Counter()
    for place, info in index.state["storage_data"].items():
        name, offsets = place.state["fqn"], place.state.get("offset")
        if type(name) is not str or type(offsets) not in (torch.Size, type(None)):
            raise TypeError("a place of no tensor")
        places[name, offsets] = info.state
        counts[name] += 1
    for name, description in index.state["state_dict_metadata"].items():
        if type(description).__name__ != "TensorStorageMetadata" or not is_weight(name):
            continue
        shape, dtype = description.state["size"], description.state["properties"].state[0]
        count = len(description.state["chunks"])
        if count > counts[name]:
            raise ConversionError(f"lacks a part of {name}, which has {count}: copy the whole folder again")
        if count > MAX_CHUNKS:
            raise ConversionError(f"has {count} parts of {name}, more than the {MAX_CHUNKS} that are compared")
        boxes = [(chunk.state["offsets"], chunk.state["sizes"]) for chunk in description.state["chunks"]]
        if not isinstance(dtype, torch.dtype) or {torch.Size} != set(map(type, (shape, *chain(*boxes)))):
            raise TypeError(f"{name} has no dtype, or no shape")
        chunks = []
        for offsets, sizes in boxes:
            if (name, offsets) not in places:
                raise ConversionError(f"lacks a part of {name}, at {list(offsets)}: copy the whole folder again")
            nbytes = math.prod(sizes) * dtype.itemsize
            chunks.append(Chunk(tuple(offsets), tuple(sizes), find_part(places[name, offsets], folder, name, nbytes)))
        yield name, ShardedTensor(f"{name} in {folder}", tuple(shape), dtype, chunks)


class FilePart(io.RawIOBase):
    """Some bytes of an open file, as a file."""

    def __init__(self, file: IO[bytes], offset: int, length: int):
        super().__init__()
        self.file, self.offset, self.length, self.position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        if self.position < 0:
            raise OSError("a position before the beginning")
        return self.position

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.offset + self.position)
        count = self.file.readinto(memoryview(buffer)[: max(0, self.length - self.position)])  # type: ignore[attr-defined]
        self.position += count
        return count


def find_part(info: dict[str, Any], folder: Path, name: str, nbytes: int) -> Callable[[], torch.Tensor]:
    """How to read one part of a tensor, at least `nbytes` long: a file that torch.save wrote, within another file."""
    file_name, offset, length = info["relative_path"], info["offset"], info["length"]
    if not isinstance(file_name, str) or Path(file_name).name != file_name or not file_name.endswith(DEFAULT_SUFFIX):
        raise ConversionError(f"names {_shown(file_name)}, which is not a {DEFAULT_SUFFIX} file beside it")
    if info.get("transform_descriptors"):
        raise ConversionError(
            f"says that {name} is encoded ({_shown(info['transform_descriptors'])}): save without extensions"
        )
    path = folder / file_name
    if not path.is_file():
        raise ConversionError(f"names {file_name}, which is missing: copy the files of all ranks")
    if offset < 0 or length < nbytes or offset + length > path.stat().st_size:
        raise ConversionError(f"puts {name} at byte {offset} of {file_name}, where it does not fit: copy it again")

    def load() -> torch.Tensor:
        try:
            with path.open("rb") as file:
                view = cast(IO[bytes], FilePart(file, offset, length))
                check_tensors_file(view)
                view.seek(0)
                return plain(torch.load(view, map_location="cpu", weights_only=True))
        except Exception as error:  # torch.load's are of many types
            raise ConversionError(f"{name} cannot be read from {path}: {first_line(error)}") from error

    return load


def read_safetensors_shards(folder: Path) -> dict[str, ShardedTensor]:
    """The tensors in the safetensors shards of all ranks, unread, by name."""
    sharded: dict[str, ShardedTensor] = {}
    for path in sorted(folder.glob(SAFETENSORS_SHARDS)):
        tensors = read_safetensors_header(path)
        try:
            with safe_open(path, framework="pt") as file:
                info = json.loads(file.metadata()[SHARDING_INFO])
            places = {name: tuple(map(operator.index, info[name]["saved_offsets"])) for name in tensors}
        except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
            raise ConversionError(f"{path} does not say which parts of tensors it holds: copy it again") from error
        for name, tensor in tensors.items():
            if not is_weight(name):
                continue
            whole = sharded.setdefault(name, ShardedTensor(f"{name} in {folder}", (), tensor.dtype, []))
            whole.chunks.append(Chunk(places[name], tensor.shape, tensor.read))
    # Nothing says how large the whole is: as far as the parts reach. The config's shapes say whether that is all.
    return {
        name: replace(tensor, shape=tuple(map(max, zip(*(chunk.ends for chunk in tensor.chunks), strict=False))))
        for name, tensor in sharded.items()
    }


def find_pickles(path: Path) -> list[Path]:
    """The pickled weights in a folder, of any number of files; none where there is safetensors."""
    if any(path.glob("*.safetensors")):
        return []
    return sorted(file for pattern in PICKLES for file in path.glob(pattern))


def read_pickles(files: list[Path]) -> dict[str, StoredTensor]:
    """The tensors in files that torch.save wrote, by name; mapped into memory, and read when they are asked for.

    Raises:
        ConversionError: a file asks for anything else than tensors, is damaged, of the old format, or holds something
            that is no tensor; or a tensor is there twice.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        for name, tensor in load_pickle(path).items():
            if name in tensors:
                raise ConversionError(f"{name} is in {path} and there is also {tensors[name].where}: keep one of them")
            tensors[name] = StoredTensor(
                tuple(tensor.shape), tensor.dtype, f"{name} in {path}", functools.partial(torch.Tensor.detach, tensor)
            )
    return tensors


def load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file that torch.save wrote."""
    with path.open("rb") as file:
        is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
    if not is_zip:
        raise ConversionError(
            f"{path} is damaged, or has torch's format before 1.6: read it once with torch.load(..., "
            "weights_only=True) and write it again with torch.save"
        )
    try:
        with path.open("rb") as file:
            check_tensors_file(file)
        state_dict = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load's are of many types
        raise ConversionError(f"{path} is not a file of tensors alone: {first_line(error)}") from error
    if not isinstance(state_dict, dict):
        raise ConversionError(f"{path} holds a {type(state_dict).__name__}, not tensors by name")
    for name, value in state_dict.items():
        if not isinstance(name, str):
            raise ConversionError(f"{path} has an entry {name!r:.100}, whose name is no text")
        try:
            plain(value)
        except TypeError as error:
            raise ConversionError(f"{name} in {path} is {error}: save the model's state_dict alone") from error
    return state_dict


def check_tensors_file(file: IO[bytes]) -> None:
    """Raise ValueError or TypeError for a file that takes torch's restricted unpickler more time or memory than its
    length says."""
    entries = check_archive(file)
    for entry in entries:
        if entry.filename.lower().endswith(PICKLE_ENTRY):
            if entry.file_size > MAX_PICKLE_BYTES:
                raise ValueError(f"has a {entry.filename!r} of {entry.file_size} bytes, more than {MAX_PICKLE_BYTES}")
            with zipfile.ZipFile(file) as archive:
                TensorsUnpickler(io.BytesIO(archive.read(entry))).load()


def plain(value: Any) -> torch.Tensor:
    """`value` if it is a dense tensor in memory; else raise TypeError."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"a {type(value).__name__}, no tensor")
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        raise TypeError(f"a tensor of another kind ({value.layout}, {value.dtype}, on {value.device})")
    if value.nbytes > value.untyped_storage().nbytes():
        raise TypeError(f"a tensor of {value.nbytes} bytes that repeats fewer of them, as expand() makes")
    return value


def first_line(error: Exception) -> str:
    """What an error says, without torch's advice on how to have the file run its code."""
    lines = [line.strip().removeprefix("WeightsUnpickler error: ") for line in str(error).splitlines()]
    reasons = [line for line in lines if line and not line.startswith(TORCH_ADVICE)]
    return f"{type(error).__name__}: {reasons[0][:300] if reasons else ''}"
