"""Training shards and pickled weights, read without running anything that they ask for.

`torch.load(weights_only=True)` runs no code, but a short file can keep it busy for ever: by tuples nested in keys, by
compressed entries. torch.distributed.checkpoint (DCP) loads its index, `.metadata`, with Python's own unpickler, and
leaves memory as it is where parts of a tensor are missing. So `unpickle` goes through every pickle first, and here the
index is read.
"""

import functools
import io
import json
import math
import operator
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX

from modeling_grin.files import check_archive
from modeling_grin.safetensors_header import read_header

from .tensors import ConversionError, StoredTensor, read_tensors

DCP_INDEX = ".metadata"
FSDP_FOLDERS = "pytorch_model_fsdp_*"  # accelerate's SHARDED_STATE_DICT, in Trainer's checkpoints
SAFETENSORS_SHARDS = "shard-*-model-*-of-*.safetensors"  # torch's HuggingFaceStorageWriter, one for every rank
SHARDING_INFO = "DCP_SHARDING_INFO"  # in the metadata of these
PICKLES = ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model_fsdp.bin")

# Parts of the names under which trainers save the state of an optimizer. No module of the model is called so.
OPTIMIZER_KEYS = {"optim", "optimizer", "optimizers", "state", "param_groups"}

MAX_INDEX_BYTES = 2**28  # of DCP: some 100 bytes for each part of a tensor that a rank has
MAX_PICKLE_BYTES = 20_000_000  # in torch.save's archive: some 100 bytes for each tensor
MAX_DIMENSIONS = 64
MAX_DEPTH = 50  # of tuples in tuples; Python ends where it hashes some 100,000
MAX_SHARDS = 2**12  # of a tensor, one for each rank: they are compared with one another
CACHED_TENSORS = 2  # a layer's released matrices, which are asked for one by one, are parts of two

# The opcodes that torch and DCP write, except `GETS` and `PUTS`.
REUSABLE = {"BINUNICODE", "SHORT_BINUNICODE", "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ"}
PUTS, GETS = {"MEMOIZE", "BINPUT", "LONG_BINPUT"}, {"BINGET", "LONG_BINGET"}
TUPLES = {"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
OPCODES = REUSABLE | TUPLES | {
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1",
    "BINFLOAT", "SHORT_BINBYTES", "BINBYTES", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS",
    "BUILD", "BINPERSID",
}  # fmt: skip


class Record:
    """Stands for an object in a pickle: its `state` and no code."""

    state: Any = None

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Size(Record, tuple):
    """Stands for a torch.Size."""

    def __new__(cls, numbers: tuple[int, ...]) -> "Size":
        if len(numbers) > MAX_DIMENSIONS:
            raise ValueError(f"a shape of {len(numbers)} dimensions")
        return super().__new__(cls, map(operator.index, numbers))


class Unpickler(pickle.Unpickler):
    """Makes records without code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch", "Size"):
            return Size
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        if module.partition(".")[0] not in ("torch", "pathlib"):
            raise ConversionError(f"asks for {module}.{name}, which torch never writes; do not trust it")
        return Record

    def persistent_load(self, pid: Any) -> Any:
        return Record()


def unpickle(data: bytes) -> Any:
    """Make records of a pickle, in time and memory that are bounded by its length; raise, of any type, for others.

    Strings, classes and records may be used again by a pickle, and nothing else: a tuple that holds the one before
    twice, 60 times over, takes 120 bytes, and 2^60 steps to hash.
    """
    memo: dict[Any, bool] = {}  # entry -> whether it may be used again
    depths: list[int] = []  # of each object on the stack; a mark has -1
    before = ""
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in PUTS:
            number: Any = len(memo) if name == "MEMOIZE" else argument
            if number > len(data):  # the unpickler in C makes room for as many entries
                raise ValueError(f"entry {number} of the memo of {len(data)} bytes")
            memo[number] = before in REUSABLE
        elif name in GETS and not memo.get(argument):
            raise ValueError("an object that is there twice and is no string, class or record")
        elif name not in OPCODES | GETS:
            raise ValueError(f"the opcode {name}")
        depth = 0
        for item in reversed(opcode.stack_before):
            while item is pickletools.stackslice and depths[-1] >= 0:
                depth = max(depth, depths.pop())
            if item is not pickletools.stackslice:
                depth = max(depth, depths.pop())
        depth += name in TUPLES
        if depth > MAX_DEPTH:
            raise ValueError(f"tuples nested more than {MAX_DEPTH} times")
        if opcode.stack_after:
            depths.append(-1 if name == "MARK" else depth)
        before = name
    return Unpickler(io.BytesIO(data)).load()


# ---- Files that torch.save wrote


def load_tensors(file: IO[bytes] | Path) -> Any:
    """Load with torch's restricted unpickler; raise, of any type, for files that it cannot read in bounded time."""
    for entry in check_archive(file):
        if entry.filename.lower().endswith("data.pkl"):
            if entry.file_size > MAX_PICKLE_BYTES:
                raise ValueError(f"has a {entry.filename!r} of {entry.file_size} bytes, more than {MAX_PICKLE_BYTES}")
            with zipfile.ZipFile(file) as archive:
                unpickle(archive.read(entry))
    if not isinstance(file, Path):
        file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True, mmap=isinstance(file, Path))


def require_plain(value: Any) -> torch.Tensor:
    """Return `value` if it is a dense tensor in memory, or raise TypeError."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"a {type(value).__name__}, not a tensor")
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        raise TypeError(f"a tensor of another kind ({value.layout}, {value.dtype}, on {value.device})")
    if value.nbytes > value.untyped_storage().nbytes():
        raise TypeError(f"a tensor of {value.nbytes} bytes that repeats fewer of them, as expand() makes")
    return value


def first_line(error: Exception) -> str:
    """Return what an error says, without torch's advice on how to have the file run its code."""
    reason = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    return f"{type(error).__name__}: {reason.partition(chr(10))[0][:300]}"


def find_pickles(path: Path) -> list[Path]:
    """Return the files of pickled weights in a folder; none if it has safetensors."""
    if any(path.glob("*.safetensors")):
        return []
    return sorted(file for pattern in PICKLES for file in path.glob(pattern))


def read_pickles(files: list[Path]) -> dict[str, StoredTensor]:
    """Return the tensors in files that torch.save wrote, by name, mapped into memory."""
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        try:
            state_dict = load_tensors(path)
        except Exception as error:  # torch.load's are of many types
            raise ConversionError(
                f"{path} is damaged, from before torch 1.6, or has more than tensors in it ({first_line(error)}): "
                "load it where you trust it, and save the model's state_dict again"
            ) from error
        if not isinstance(state_dict, dict) or not all(isinstance(name, str) for name in state_dict):
            raise ConversionError(f"{path} must hold tensors by name; got a {type(state_dict).__name__}")
        for name, value in state_dict.items():
            if name in tensors:
                raise ConversionError(f"{name} is in {path} and there is also {tensors[name].where}: keep one of them")
            try:
                tensor = require_plain(value).detach()
            except TypeError as error:
                raise ConversionError(f"{name} in {path} is {error}: save the model's state_dict alone") from error
            tensors[name] = StoredTensor(
                tuple(tensor.shape), tensor.dtype, f"{name} in {path}", functools.partial(torch.Tensor.detach, tensor)
            )
    return tensors


# ---- Training shards


class Shard(NamedTuple):
    """A box of a tensor in one place: `offsets` and `sizes` have a number for each dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    load: Callable[[], torch.Tensor]

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(map(operator.add, self.offsets, self.sizes))


class ShardedTensor(NamedTuple):
    where: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    shards: list[Shard]

    def check(self) -> None:
        """Raise ConversionError unless every element lies in exactly one shard."""
        shards = [shard for shard in self.shards if 0 not in shard.sizes]
        is_within = all(
            len(shard.offsets) == len(shard.sizes) == len(self.shape)
            and all(0 <= a <= b <= size for a, b, size in zip(shard.offsets, shard.ends, self.shape, strict=True))
            for shard in shards
        )
        stored = sum(math.prod(shard.sizes) for shard in shards)
        if is_within and stored == math.prod(self.shape):
            starts = torch.tensor([shard.offsets for shard in shards])  # [shards, dimensions]
            ends = torch.tensor([shard.ends for shard in shards])
            meets = ((starts[:, None] < ends) & (starts < ends[:, None])).all(dim=-1)
            if meets.sum() == len(shards):  # each meets itself
                return
        covered = f"do not cover shape {list(self.shape)} exactly once ({stored} elements)"
        raise ConversionError(f"{self.where}: its parts {covered}: copy the files of all ranks, of one save")

    def load(self) -> torch.Tensor:
        """Read the whole tensor, shard by shard."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        for shard in self.shards:
            part = shard.load()
            if part.shape != shard.sizes or part.dtype != self.dtype:
                raise ConversionError(f"{self.where}: the index describes another part: copy the whole folder again")
            tensor[tuple(map(slice, shard.offsets, shard.ends))] = part
        return tensor


def find_dcp_folder(path: Path) -> Path | None:
    """Return the folder of a sharded training checkpoint: `path`, or one in a checkpoint that Trainer has written.

    None where there is whole safetensors (which shards are converted to, sometimes beside them), or no shards.
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
    """Return the tensors of a sharded training checkpoint by their names in it, without the optimizer's."""
    path = folder / DCP_INDEX
    if not path.is_file():
        sharded = read_safetensors_shards(folder)
    elif not weights_only:
        raise ConversionError(f"{path} is a pickle, which can run code: give --weights-only to read it without")
    else:
        try:
            if path.stat().st_size > MAX_INDEX_BYTES:
                raise ConversionError(f"must have at most {MAX_INDEX_BYTES} bytes; got {path.stat().st_size}")
            sharded = dict(parse_index(unpickle(path.read_bytes()), folder))
        except ConversionError as error:
            raise ConversionError(f"{path} {error}") from error
        except Exception as error:  # of any type: anybody may have written this pickle
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            raise ConversionError(f"{path} is not an index as torch writes it ({reason}): copy it again") from error
    for tensor in sharded.values():
        tensor.check()

    load = functools.lru_cache(maxsize=CACHED_TENSORS)(lambda name: sharded[name].load())
    return {
        name: StoredTensor(tensor.shape, tensor.dtype, tensor.where, functools.partial(load, name))
        for name, tensor in sharded.items()
    }


def is_weight(name: str) -> bool:
    return OPTIMIZER_KEYS.isdisjoint(name.split("."))


def parse_index(index: Record, folder: Path) -> Iterator[tuple[str, ShardedTensor]]:
    """Yield name and shards of every tensor of an unpickled index; any exception means that it is not one."""
    places: dict[tuple[str, Any], dict[str, Any]] = {}  # (tensor, offsets) -> file, offset and length of its bytes
    for place, info in index.state["storage_data"].items():
        name, offsets = place.state["fqn"], place.state.get("offset")
        if type(name) is not str or type(offsets) not in (Size, type(None)):
            raise TypeError("a part without a tensor")
        places[name, offsets] = info.state
    for name, described in index.state["state_dict_metadata"].items():
        if described.state is None or not is_weight(name):  # objects in bytes have no state
            continue
        shape, dtype, shards = described.state["size"], described.state["properties"].state[0], []
        for box in described.state["chunks"][:MAX_SHARDS]:
            offsets, sizes = box.state["offsets"], box.state["sizes"]
            if not isinstance(dtype, torch.dtype) or not type(shape) is type(offsets) is type(sizes) is Size:
                raise TypeError(f"{name} has no dtype, or no shape")
            if (name, offsets) not in places:
                raise ConversionError(f"lacks a part of {name}, at {list(offsets)}: copy the whole folder again")
            load = find_part(places[name, offsets], folder, name, math.prod(sizes) * dtype.itemsize)
            shards.append(Shard(tuple(offsets), tuple(sizes), load))
        yield name, ShardedTensor(f"{name} in {folder}", tuple(shape), dtype, shards)


def find_part(info: dict[str, Any], folder: Path, name: str, nbytes: int) -> Callable[[], torch.Tensor]:
    """Return how to read one part of a tensor, `nbytes` long: a file that torch.save wrote, within another file."""
    file_name, offset, length = info["relative_path"], info["offset"], info["length"]
    if not isinstance(file_name, str) or Path(file_name).name != file_name or not file_name.endswith(DEFAULT_SUFFIX):
        raise ConversionError(f"names {file_name!r:.120}, which is not a {DEFAULT_SUFFIX} file beside it")
    path = folder / file_name
    if not path.is_file():
        raise ConversionError(f"names {file_name}, which is missing: copy the files of all ranks")
    if offset < 0 or not nbytes <= length <= 2 * nbytes + 2**20 or offset + length > path.stat().st_size:
        raise ConversionError(f"puts {name} at byte {offset} of {file_name}, where it does not fit: copy it again")

    def load() -> torch.Tensor:
        try:
            with path.open("rb") as file:
                file.seek(offset)
                return require_plain(load_tensors(io.BytesIO(file.read(length))))
        except Exception as error:  # torch.load's are of many types
            raise ConversionError(f"{name} cannot be read from {path}: {first_line(error)}") from error

    return load


def read_safetensors_shards(folder: Path) -> dict[str, ShardedTensor]:
    """Return the tensors in the safetensors shards of all ranks, unread, by name."""
    sharded: dict[str, ShardedTensor] = {}
    for path in sorted(folder.glob(SAFETENSORS_SHARDS)):
        tensors = read_tensors(path)
        try:
            info = json.loads(read_header(path)["__metadata__"][SHARDING_INFO])
            places = {name: tuple(map(operator.index, info[name]["saved_offsets"])) for name in tensors}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConversionError(f"{path} does not say which parts of tensors it holds: copy it again") from error
        for name, tensor in tensors.items():
            if is_weight(name):
                whole = sharded.setdefault(name, ShardedTensor(f"{name} in {folder}", (), tensor.dtype, []))
                whole.shards.append(Shard(places[name], tensor.shape, tensor.read))
    # Nothing says how large the whole is: as far as the parts reach. The config's shapes say whether that is all.
    return {
        name: tensor._replace(shape=tuple(map(max, zip(*(shard.ends for shard in tensor.shards), strict=False))))
        for name, tensor in sharded.items()
    }
