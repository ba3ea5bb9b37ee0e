"""What files say of themselves: headers, indexes and configs of checkpoints that anybody may have written.

Every function reads one kind of file, checks all that it says against the file itself, and raises `ConversionError`
for anything else, whatever the bytes are. Nothing is unpickled, no name leads out of its folder, nothing is fetched,
and no number in a file makes memory be set aside: what is kept is bounded by the header's own size.
"""

import dataclasses
import json
import math
import re
import reprlib
import stat
import struct
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from transformers import GenerationConfig

from modeling_grin import GrinMoeConfig

from .tensors import ConversionError, FileTensor

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

CONFIG_FILE, ADAPTER_CONFIG_FILE = "config.json", "adapter_config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}

# Parsed JSON takes up to 30 times the memory of its text. A config has some kB, a tokenizer's with many added tokens
# 1 MB; a header of all the release's tensors has 0.3 MB, one of a GGUF file with 256,000 tokens 10 MB.
MAX_CONFIG_BYTES = 2_000_000
MAX_HEADER_BYTES = 20_000_000
MAX_JSON_DEPTH = 100  # deeper objects could be read, but not copied or written again
MAX_FIELDS = 100  # of a config, among which the wrong one is looked for
MAX_DIMENSIONS = 64  # of a tensor, as in Python's buffers; bounds the product of the sizes

MAX_PARAMETERS = 10**14
MAX_COUNTS = {
    "num_hidden_layers": 10**5,
    "num_local_experts": 10**5,
    "num_experts": 10**5,
    "num_labels": 10**5,  # transformers names each
    "max_position_embeddings": 10**9,
    "sliding_window": 10**9,
}
# How to run a model on some machine is not what the model is, and transformers takes the name of a Hub repository
# here, whose code it would run.
RUNTIME_FIELDS = {"attn_implementation", "experts_implementation", "transformers_weights"}
# Settable attributes of every transformers config that are not dataclass fields.
CONFIG_PROPERTIES = {"model_type", "name_or_path", "num_labels", "output_attentions", "rope_scaling", "torch_dtype"}

# safetensors.torch's table, and E8M0.
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}

# GGUF, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; what llama.cpp refuses is refused here.
GGUF_VERSIONS = (2, 3)
GGUF_DEFAULT_ALIGNMENT = 32
GGUF_MAX_DIMENSIONS = 4
GGUF_MAX_NAME_BYTES = 63
GGUF_UINT32, GGUF_BOOL, GGUF_STRING, GGUF_ARRAY = 4, 7, 8, 9
GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 120


def _shown(value: Any) -> str:
    """An untrusted value for a message: escaped, and cut if it is long."""
    return _short.repr(value)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The file and its size in bytes; pipes and devices, which might never end, are refused unopened."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ConversionError(f"{path} is not a file")
        with path.open("rb") as file:
            yield file, status.st_size
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror}") from error


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """A finite one that a float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _parse_object(data: bytes, path: Path) -> dict[str, Any]:
    """A JSON object, in which no key occurs twice: readers differ in which of the two they take."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            [(name, count)] = Counter(name for name, _ in pairs).most_common(1)
            raise ConversionError(f"{path} gives {_shown(name)} {count} times in one object: only one can be meant")
        return values

    try:
        parsed = json.loads(data.decode(), object_pairs_hook=unique)
        if b"\\ud" in data.lower():  # half of a pair is no text, and could not be written again
            json.dumps(parsed, ensure_ascii=False).encode()
    except ConversionError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} does not hold JSON that can be read ({error}): fetch it again") from error
    if not isinstance(parsed, dict):
        raise ConversionError(f"{path} holds a JSON {type(parsed).__name__}, not an object: it is some other file")
    level: list[Any] = [parsed]
    for _ in range(MAX_JSON_DEPTH):
        parents = [value for value in level if isinstance(value, (dict, list))]
        level = [child for value in parents for child in (value.values() if isinstance(value, dict) else value)]
        if not level:
            return parsed
    raise ConversionError(f"{path} is nested more than {MAX_JSON_DEPTH} levels deep: no checkpoint's file is")


def read_json(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The object in a JSON file (UTF-8) of at most `max_bytes`.

    Raises:
        ConversionError: the file is missing, unreadable, too large, not JSON, not an object, nested more than
            `MAX_JSON_DEPTH` levels deep, or has a key twice.
    """
    with _opened(path) as (file, size):
        if size > max_bytes:
            raise ConversionError(f"{path} has {size} bytes, more than the {max_bytes} that such a file may have")
        return _parse_object(file.read(max_bytes), path)


def _check_tensor_name(name: str, path: Path) -> None:
    if not name or not name.isprintable():
        raise ConversionError(f"{path} has a tensor named {_shown(name)}: names must be printable and not empty")


def _parse_entry(entry: Any, name: str, path: Path) -> tuple[int, int, tuple[int, ...], torch.dtype]:
    """Begin, end, shape and dtype of a tensor as a safetensors header describes it."""

    def refuse(reason: str) -> ConversionError:
        return ConversionError(f"{path}: tensor {_shown(name)} {reason}")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse(f"is described by {_shown(entry)}, which needs dtype, shape, data_offsets and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SAFETENSORS_DTYPES:
        raise refuse(f"has dtype {_shown(dtype)}; known are {', '.join(SAFETENSORS_DTYPES)}")
    for field, value in ("shape", shape), ("data_offsets", offsets):
        if not isinstance(value, list) or not all(_is_int(part) and 0 <= part < 2**63 for part in value):
            raise refuse(f"has {field} {_shown(value)}, which is not a list of sizes")
    if len(shape) > MAX_DIMENSIONS:
        raise refuse(f"has {len(shape)} dimensions, more than {MAX_DIMENSIONS}")
    if len(offsets) != 2:
        raise refuse(f"has {len(offsets)} data_offsets, not a begin and an end")
    begin, end = offsets
    nbytes = math.prod(shape) * SAFETENSORS_DTYPES[dtype].itemsize
    if end - begin != nbytes:
        raise refuse(f"({dtype} {_shown(shape)}) needs {nbytes} bytes, but data_offsets give it {end - begin}")
    return begin, end, tuple(shape), SAFETENSORS_DTYPES[dtype]


def read_safetensors_header(path: Path) -> dict[str, FileTensor]:
    """The tensors of a safetensors file by name, unread; they cover the file's data without holes or overlaps.

    Raises:
        ConversionError: the file is missing, cut off or not safetensors, or its header contradicts itself or the file.
    """
    with _opened(path) as (file, size):
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > MAX_HEADER_BYTES:
            raise ConversionError(f"{path} does not begin with the length of a header: it is not a safetensors file")
        start = 8 + length
        if start > size:
            raise ConversionError(f"{path} ends within its header: it was cut off, fetch it again")
        header = _parse_object(file.read(length), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ConversionError(f"{path} has __metadata__ {_shown(metadata)}, which does not map strings to strings")
    tensors, spans = {}, []
    for name, entry in header.items():
        _check_tensor_name(name, path)
        begin, end, shape, dtype = _parse_entry(entry, name, path)
        tensors[name] = FileTensor.at(path, start + begin, shape, dtype, name)
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            what = "overlaps with the one before" if begin < position else f"leaves a hole of {begin - position} bytes"
            raise ConversionError(f"{path}: tensor {_shown(name)} {what}: the file is damaged, fetch it again")
        position = end
    if position != size - start:
        what = "was cut off" if position > size - start else "has bytes that belong to no tensor"
        raise ConversionError(f"{path} {what}: its tensors take {position} bytes, the file has {size - start}")
    return tensors


def read_index(path: Path) -> dict[str, Path]:
    """Tensor -> the file beside `path` that holds it, by a `model.safetensors.index.json`.

    Files may be symbolic links to anywhere (the Hub's cache consists of them); their names may not.

    Raises:
        ConversionError: not an index, a name that is not that of a safetensors file beside it, or no such file.
    """
    index = read_json(path, MAX_HEADER_BYTES)
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{path} has no weight_map from tensors to files: it is not a checkpoint's index")
    total = metadata.get("total_size", 0) if isinstance(metadata, dict) else metadata
    if not _is_number(total) or total < 0:  # some writers gave a float
        raise ConversionError(f"{path} has metadata {_shown(metadata)}, which needs a total_size in bytes")
    files = {}
    for name, file_name in weight_map.items():
        _check_tensor_name(name, path)
        if not isinstance(file_name, str):
            raise ConversionError(f"{path} puts tensor {_shown(name)} in {_shown(file_name)}, which is no file name")
        if file_name not in files:
            if not re.fullmatch(r"[^/\\:]+\.safetensors", file_name) or not file_name.isprintable():
                raise ConversionError(f"{path} names {_shown(file_name)}, not a safetensors file in its own folder")
            file = path.parent / file_name
            with _opened(file):
                files[file_name] = file
    return {name: files[file_name] for name, file_name in weight_map.items()}


def find_tensors(path: Path) -> dict[str, FileTensor]:
    """The tensors of a safetensors file or of a folder's: those its index names, or its only file's; unread.

    Raises:
        ConversionError: as `read_index` and `read_safetensors_header` do; if the index and the files disagree about a
            tensor; if it is not clear which files are meant; if there are only pickle files, which can run code.
    """
    try:
        files = [path] if path.is_file() else sorted(path.iterdir())
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror}") from error
    safetensors = [file for file in files if file.suffix == ".safetensors"]
    names = ", ".join(file.name for file in safetensors[:5])
    index = path / INDEX_FILE
    if index not in files:
        chosen = [file for file in safetensors if file.name == WEIGHTS_FILE] or safetensors
        if len(chosen) == 1:
            return read_safetensors_header(chosen[0])
        if chosen:
            raise ConversionError(f"{path} has {len(chosen)} weight files ({names}) and no {INDEX_FILE}: fetch that")
        if any(file.suffix in PICKLE_SUFFIXES for file in files):
            raise ConversionError(f"{path} has its weights in pickle files, which can run code: trust their writer "
                                  "or not, and give --weights-only to have nothing but tensors read")  # fmt: skip
        raise ConversionError(f"{path} has no weights: no {INDEX_FILE}, {WEIGHTS_FILE} or other safetensors file")

    places = read_index(index)
    if path / WEIGHTS_FILE in set(safetensors) - set(places.values()):
        raise ConversionError(f"{path} has both a {WEIGHTS_FILE} and an {INDEX_FILE} of other files: remove one")
    tensors: dict[str, FileTensor] = {}
    for file in dict.fromkeys(places.values()):
        for name, tensor in read_safetensors_header(file).items():
            if name in tensors:
                raise ConversionError(f"tensor {_shown(name)} lies in both {tensors[name].path} and {file.name}")
            if places.get(name) != file:
                elsewhere = f"puts it in {places[name].name}" if name in places else "does not list it"
                raise ConversionError(f"{file} holds tensor {_shown(name)}, but {INDEX_FILE} {elsewhere}")
            tensors[name] = tensor
    for name, file in places.items():
        if name not in tensors:
            raise ConversionError(f"{file} lacks tensor {_shown(name)}, which {INDEX_FILE} puts there")
    return tensors


def _count_parameters(config: GrinMoeConfig) -> int:
    """Those of the matrices, biases and norms aside."""
    head_dim, key_value_heads = config.head_dim or 0, config.num_key_value_heads or 0  # set by the config if absent
    attention = 2 * (config.num_attention_heads + key_value_heads) * head_dim * config.hidden_size
    experts = config.num_local_experts * (3 * config.intermediate_size + 1) * config.hidden_size
    return config.num_hidden_layers * (attention + experts) + 2 * config.vocab_size * config.hidden_size


def _explain(error: Exception, values: dict[str, Any], config_class: Any) -> str:
    """Return the message of an error that `config_class.from_dict(values)` raised, after the name of its field.

    That field is the first without which the call succeeds.
    """
    reason = "".join(filter(str.isprintable, textwrap.shorten(str(error), 500)))
    for name in list(values)[:MAX_FIELDS]:
        with suppress(Exception):
            config_class.from_dict({other: value for other, value in values.items() if other != name})
            return f"{_shown(name)}: {_shown(values[name])}: {reason}"
    return reason


def read_generation_config(path: Path) -> dict[str, Any]:
    """A generation_config.json that transformers loads; `from_pretrained` reads it after all else.

    Raises:
        ConversionError: unreadable, or with values that transformers does not take.
    """
    values = read_json(path)
    try:
        GenerationConfig.from_dict(values)
    except Exception as error:  # of any type, as above
        raise ConversionError(f"{path} is not usable: {_explain(error, values, GenerationConfig)}") from error
    return values


def read_config(folder: Path) -> GrinMoeConfig:
    """The model's config, by the folder's config.json (`grinmoe` or `phimoe`).

    How it was run (attention and expert implementations) is left out.

    Raises:
        ConversionError: unreadable, of another model type, quantised, absurdly large, or with values that no model
            can be built from.
    """
    path = folder / CONFIG_FILE
    values = read_json(path)
    values = {name: value for name, value in values.items() if name.removeprefix("_") not in RUNTIME_FIELDS}
    if values.get("quantization_config") is not None:
        raise ConversionError(f"{path} has a quantization_config: dequantize the model first, with the library that "
                              "made it, and convert what that saves")  # fmt: skip
    for name, most in MAX_COUNTS.items():
        if isinstance(values.get(name), (int, float)) and values[name] > most:
            raise ConversionError(f"{path}: {name}={_shown(values[name])} is more than the {most} there can be")
    for name in "dtype", "torch_dtype":
        value = values.get(name)
        if value is not None and f"torch.{value}" not in map(str, SAFETENSORS_DTYPES.values()):
            raise ConversionError(f"{path}: {name}={_shown(value)} is not a dtype of torch, such as 'bfloat16'")
    # transformers sets whatever it does not know as an attribute, in place of its own methods if the name is theirs.
    known = {field.name for field in dataclasses.fields(GrinMoeConfig)} | CONFIG_PROPERTIES
    for name in values.keys() - known:
        if hasattr(GrinMoeConfig, name):
            raise ConversionError(f"{path}: {_shown(name)} is not a field but part of the config's class: remove it")
    try:
        json.dumps(values, allow_nan=False)
        config = GrinMoeConfig.from_dict(values)
    except Exception as error:  # of any type: transformers' code meets values that it never expects
        raise ConversionError(f"{path} is not a usable config: {_explain(error, values, GrinMoeConfig)}") from error
    if _count_parameters(config) > MAX_PARAMETERS:
        raise ConversionError(f"{path} has sizes that make more than {MAX_PARAMETERS:.0e} parameters: no model has")
    return config


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(map(_is_text, value)))


def _is_rank(value: Any) -> bool:
    return _is_int(value) and 1 <= value <= 2**20


# Field -> what it must be (all that a merge needs; the rest is peft's), and the same in words.
ADAPTER_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (lambda value: value == "LORA", "must be 'LORA': other adapters cannot be merged"),
    "base_model_name_or_path": (lambda value: value is None or _is_text(value), "must be a name or null"),
    "r": (_is_rank, "must be a rank from 1 to 2^20"),
    "lora_alpha": (_is_number, "must be a number"),
    "lora_dropout": (lambda value: _is_number(value) and 0 <= value < 1, "must be in [0, 1)"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "must be 'none', 'all' or 'lora_only'"),
    "use_rslora": (_is_flag, "must be true or false"),
    "use_dora": (_is_flag, "must be true or false"),
    "lora_bias": (_is_flag, "must be true or false"),
    "fan_in_fan_out": (_is_flag, "must be true or false"),
    "target_modules": (lambda value: _is_text(value) or _is_names(value), "must be a name, a list of them, or null"),
    "exclude_modules": (lambda value: _is_text(value) or _is_names(value), "must be a name, a list of them, or null"),
    "target_parameters": (_is_names, "must be a list of names or null"),
    "modules_to_save": (_is_names, "must be a list of names or null"),
    "rank_pattern": (
        lambda value: value is None or (isinstance(value, dict) and all(map(_is_rank, value.values()))),
        "must map names to ranks from 1 to 2^20",
    ),
    "alpha_pattern": (
        lambda value: value is None or (isinstance(value, dict) and all(map(_is_number, value.values()))),
        "must map names to numbers",
    ),
}
ADAPTER_REQUIRED = ("peft_type", "base_model_name_or_path", "r", "lora_alpha")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The folder's adapter_config.json, a LoRA's as peft writes it, with the fields of `ADAPTER_FIELDS` checked.

    The base model's name is not looked up, and no pattern is matched, here.

    Raises:
        ConversionError: unreadable, not of a LoRA, or a field that is missing or is not what it must be.
    """
    path = folder / ADAPTER_CONFIG_FILE
    values = read_json(path)
    for name in ADAPTER_REQUIRED:
        if name not in values:
            raise ConversionError(f"{path} has no {name}: it is not the config of a LoRA adapter")
    for name, (is_valid, meaning) in ADAPTER_FIELDS.items():
        if name in values and not is_valid(values[name]):
            raise ConversionError(f"{path}: {name}={_shown(values[name])} {meaning}")
    return values


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in a GGUF file: `shape` in torch's order (GGUF has the dimensions reversed), `offset` in the file."""

    name: str
    shape: tuple[int, ...]
    type: "GGMLQuantizationType"
    offset: int
    nbytes: int


@dataclass
class _GgufCursor:
    """Reads a GGUF header from where it is, never beyond the file's end or `MAX_HEADER_BYTES`."""

    path: Path
    file: BinaryIO
    size: int
    position: int = 0

    def take(self, count: int) -> bytes:
        if count > self.size - self.position:
            raise ConversionError(f"{self.path} ends within its header: it was cut off, fetch it again")
        if count > MAX_HEADER_BYTES - self.position:
            raise ConversionError(f"{self.path} has a header of more than {MAX_HEADER_BYTES} bytes: no GGUF file has")
        self.position += count
        return self.file.read(count)

    def numbers(self, code: str, count: int) -> list[Any]:
        """As many of them, little-endian, by their code in `struct`."""
        data = self.take(count * struct.calcsize(f"<{code}"))
        return list(struct.unpack(f"<{count}{code}", data))

    def number(self, code: str) -> int:
        return self.numbers(code, 1)[0]

    def text(self) -> str:
        data = self.take(self.number("Q"))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise ConversionError(f"{self.path} has {_shown(data)} where text in UTF-8 is due") from error

    def values(self, value_type: int, count: int, key: str) -> list[Any]:
        """As many metadata values of one type."""
        if value_type == GGUF_STRING:
            return [self.text() for _ in range(count)]
        if value_type not in GGUF_SCALARS:
            raise ConversionError(f"{self.path}: {_shown(key)} has values of type {value_type}, which are not known")
        values = self.numbers(GGUF_SCALARS[value_type], count)
        if value_type == GGUF_BOOL:
            if not set(values) <= {0, 1}:
                raise ConversionError(f"{self.path}: {_shown(key)} has a boolean that is neither 0 nor 1")
            values = list(map(bool, values))
        return values


def read_gguf_header(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """A GGUF file's metadata (arrays as lists) and its tensors by name; version 2 or 3, little-endian.

    Raises:
        ConversionError: the file is missing, cut off or not GGUF, or its header contradicts itself or the file; or
            the `gguf` package, whose table of tensor types is used, is not installed.
    """
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise ConversionError(f"{path} needs the gguf package: pip install 'grin-moe[gguf]'") from error

    with _opened(path) as (file, size):
        cursor = _GgufCursor(path, file, size)
        if cursor.take(min(4, size)) != b"GGUF":
            raise ConversionError(f"{path} does not begin with 'GGUF': it is some other file")
        version = cursor.number("I")
        if version not in GGUF_VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = "is big-endian" if swapped in GGUF_VERSIONS else f"has version {version}"
            raise ConversionError(f"{path} {what}; little-endian GGUF of versions 2 and 3 can be read")
        tensor_count, key_count = cursor.numbers("Q", 2)

        metadata: dict[str, Any] = {}
        alignment = GGUF_DEFAULT_ALIGNMENT
        for _ in range(key_count):
            key = cursor.text()
            if not key or not key.isprintable() or key in metadata:
                raise ConversionError(f"{path} has a key {_shown(key)} that is empty, unprintable or there twice")
            value_type = cursor.number("I")
            if value_type == GGUF_ARRAY:
                value_type, count = cursor.number("I"), cursor.number("Q")
                metadata[key] = cursor.values(value_type, count, key)
            else:
                [metadata[key]] = cursor.values(value_type, 1, key)
            if key == "general.alignment":
                alignment = metadata[key]
                if value_type != GGUF_UINT32 or not isinstance(alignment, int) or alignment.bit_count() != 1:
                    raise ConversionError(f"{path}: general.alignment={_shown(alignment)} is not a power of two")

        tensors: dict[str, GgufTensor] = {}
        expected = 0  # offset of the next tensor: they lie one behind the other, each aligned
        for _ in range(tensor_count):
            name = cursor.text()
            _check_tensor_name(name, path)
            if name in tensors or len(name.encode()) > GGUF_MAX_NAME_BYTES:
                reason = "is there twice" if name in tensors else f"is longer than {GGUF_MAX_NAME_BYTES} bytes"
                raise ConversionError(f"{path}: tensor {_shown(name)} {reason}")
            dimensions = cursor.number("I")
            if not 1 <= dimensions <= GGUF_MAX_DIMENSIONS:
                raise ConversionError(f"{path}: tensor {_shown(name)} has {dimensions} dimensions, not 1 to 4")
            shape = tuple(reversed(cursor.numbers("Q", dimensions)))
            type_number, offset = cursor.number("I"), cursor.number("Q")
            if type_number not in GGML_QUANT_SIZES:
                raise ConversionError(f"{path}: tensor {_shown(name)} has type {type_number}, which is not known")
            tensor_type = GGMLQuantizationType(type_number)
            block, block_bytes = GGML_QUANT_SIZES[tensor_type]
            if shape[-1] % block:
                reason = f"has rows of {shape[-1]}, not a multiple of {tensor_type.name}'s blocks of {block}"
                raise ConversionError(f"{path}: tensor {_shown(name)} {reason}")
            if offset != expected:
                reason = f"is at offset {offset}, not {expected}, where the one before ends"
                raise ConversionError(f"{path}: tensor {_shown(name)} {reason}")
            nbytes = math.prod(shape) // block * block_bytes
            tensors[name] = GgufTensor(name, shape, tensor_type, offset, nbytes)
            expected += _aligned(nbytes, alignment)
        start = _aligned(cursor.position, alignment)
    for tensor in tensors.values():
        if start + tensor.offset + tensor.nbytes > size:
            raise ConversionError(f"{path} ends within tensor {_shown(tensor.name)}: it was cut off, fetch it again")
    return metadata, {
        name: dataclasses.replace(tensor, offset=start + tensor.offset) for name, tensor in tensors.items()
    }


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
