"""Damage to the files that `conversion.headers` reads: whatever the bytes, it returns or raises `ConversionError`.

What is accepted is asked of an independent reader, too: safetensors, gguf.GGUFReader, json. To look longer than the
tests do, one parser at a time, without and with guidance by coverage (`pip install atheris`, options are libFuzzer's):

    python tests/fuzz_headers.py gguf 1000000
    python tests/fuzz_headers.py gguf atheris -max_total_time=300
"""

import inspect
import json
import random
import re
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import safetensors
import torch
from checkpoints import released_config
from safetensors.torch import save

from conversion import headers
from conversion.headers import (
    SAFETENSORS_DTYPES,
    find_tensors,
    read_adapter_config,
    read_config,
    read_gguf_header,
    read_json,
    read_safetensors_header,
)
from conversion.tensors import ConversionError
from modeling_grin import GrinMoeConfig

ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": "microsoft/GRIN-MoE",
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "bias": "none",
    "use_rslora": False,
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": ["block_sparse_moe.experts.gate_up_proj"],
    "modules_to_save": None,
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"q_proj": 2.5},
}
LONGROPE = {
    **released_config(model_type="phimoe", sliding_window=None, architectures=["PhiMoEForCausalLM"]),
    "original_max_position_embeddings": 64,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [1.0, 2.5, 4.0, 6.5],
        "short_mscale": 1.2,
        "long_mscale": 1.3,
    },
}
SHARDS = {
    "model-00001-of-00002.safetensors": {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3)},
    "model-00002-of-00002.safetensors": {"c": torch.zeros(2, dtype=torch.int64)},
}
INDEX = {
    "metadata": {"total_size": 52},
    "weight_map": {name: file for file, tensors in SHARDS.items() for name in tensors},
}
# What takes the place of a token of JSON.
HOSTILE_TOKENS = [
    *(b"null", b"true", b"false", b"NaN", b"-Infinity", b"1e999", b"0", b"-1", b"0.5", b"1.0", b"[]", b"{}", b'""'),
    *(str(sign * 2**power + 1).encode() for power in (7, 31, 32, 60, 63, 64, 200) for sign in (-1, 1)),
    *(b"1" + b"0" * 5000, b"[" * 2000, b'{"a":' * 2000, b"]", b"}", b",", b":", b"[" * 150 + b"]" * 150, b"//", b"'"),
    *(rb'"\ud800"', rb'"\u0000"', b'"\xff"', '"ß\u202e"'.encode(), b'"../../x.safetensors"', b'"/etc/passwd"'),
    *(b'"__class__"', b'"to_dict"', b'"num_labels"', b'"shape"', b'"dtype"', b'"F4"', b'"BF16"', b'"__metadata__"'),
    *(b'"phimoe"', b'"llama"', b'"longrope"', b'"type"', b'"rope_type"', b'"yarn"', b'"a"', b'"' + b"a" * 3000 + b'"'),
]
JSON_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[-+.\w]+|[\[\]{},:]')


def gguf_file(alignment: int | None = None) -> bytes:
    """Metadata of every type, and tensors of several."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        writer = gguf.GGUFWriter(path, "phimoe")
        if alignment:
            writer.add_custom_alignment(alignment)
        writer.add_context_length(4096)
        for value_type, value in (
            *(("uint8", 255), ("int8", -1), ("uint16", 2**16 - 1), ("int16", -2), ("uint64", 2**63), ("int64", -3)),
            *(("float32", 1.5), ("float64", 0.1), ("bool", True), ("string", "ß")),
        ):
            getattr(writer, f"add_{value_type}")(f"x.{value_type}", value)
        writer.add_array("tokenizer.ggml.tokens", ["<s>", "▁a", "b"])
        writer.add_array("tokenizer.ggml.scores", [0.0, -1.5])
        writer.add_array("x.flags", [True, False])
        writer.add_tensor("a.weight", torch.arange(6.0).reshape(2, 3).numpy())
        quantized = gguf.quants.quantize(torch.randn(3, 64).numpy(), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor("b.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor("c.bias", torch.ones(5, dtype=torch.float16).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def assert_safetensors_agrees(file: Path, tensors: dict[str, Any]) -> None:
    expected = {name: (info["shape"], info["dtype"], info["data"]) for name, info in
                safetensors.deserialize(file.read_bytes())}  # fmt: skip
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        shape, dtype, data = expected[name]
        assert (list(tensor.shape), tensor.dtype) == (shape, SAFETENSORS_DTYPES[dtype])
        assert file.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes] == bytes(data)


def assert_index_agrees(file: Path, tensors: dict[str, Any]) -> None:
    assert {name: tensor.path.name for name, tensor in tensors.items()} == json.loads(file.read_bytes())["weight_map"]


def assert_shard_agrees(file: Path, tensors: dict[str, Any]) -> None:
    assert_safetensors_agrees(file, {name: tensor for name, tensor in tensors.items() if tensor.path == file})


def assert_json_agrees(file: Path, values: dict[str, Any]) -> None:
    assert repr(values) == repr(json.loads(file.read_bytes()))  # `repr`, for NaN is not equal to itself


def assert_config_agrees(file: Path, config: Any) -> None:
    values = json.loads(file.read_bytes())
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert type(getattr(config, name)) is int and getattr(config, name) == values.get(name, getattr(config, name))
    json.loads(config.to_json_string())


def assert_gguf_agrees(file: Path, header: tuple[dict[str, Any], dict[str, Any]]) -> None:
    metadata, tensors = header
    reader = gguf.GGUFReader(file)
    # (The reader adds three fields of its own. Those of arrays without elements have no `contents`.)
    expected = {
        name: field.contents() if len(field.types) != 1 or field.types[0] != gguf.GGUFValueType.ARRAY else []
        for name, field in list(reader.fields.items())[3:]
    }
    assert repr(metadata) == repr(expected)
    assert [(t.name, t.shape[::-1], t.type, t.offset, t.nbytes) for t in tensors.values()] == [
        (t.name, tuple(map(int, t.shape)), t.tensor_type, int(t.data_offset), int(t.n_bytes)) for t in reader.tensors
    ]


@dataclass(frozen=True)
class Target:
    """A parser: the file of a folder that it reads, valid contents of it, and how its results are confirmed."""

    file_name: str
    seeds: list[bytes]
    read: Callable[[Path], Any]
    confirm: Callable[[Path, Any], None]

    def prepare(self, folder: Path) -> Path:
        """Write what lies beside the file; return the file's path."""
        for name, tensors in SHARDS.items():
            (folder / name).write_bytes(save(tensors))
        if self.read is find_tensors:
            (folder / "model.safetensors.index.json").write_text(json.dumps(INDEX))
        return folder / self.file_name

    def run(self, file: Path, data: bytes) -> str | None:
        """Read `data`: None if it was accepted, or the message of the error."""
        file.unlink(missing_ok=True)  # truncating a file instead makes ext4 write it to the disk
        file.write_bytes(data)
        try:
            result = self.read(file.parent)
        except ConversionError as error:
            message = str(error)
            assert message.isprintable() and len(message) < 2500, message[:2500]
            return message
        self.confirm(file, result)
        return None


SHARD = next(iter(SHARDS))
TARGETS = {
    "safetensors": Target(
        "x.safetensors",
        [
            save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bool), "d": torch.ones(0, 4)}),
            save({f"t{i}": torch.ones(2, dtype=dtype) for i, dtype in enumerate(SAFETENSORS_DTYPES.values())}),
            save({"x": torch.tensor(1.5)}, metadata={"format": "pt"}),
        ],
        lambda folder: read_safetensors_header(folder / "x.safetensors"),
        assert_safetensors_agrees,
    ),
    "shard": Target(SHARD, [save(SHARDS[SHARD])], find_tensors, assert_shard_agrees),
    "index": Target(
        "model.safetensors.index.json",
        [json.dumps(INDEX).encode(), json.dumps({"weight_map": INDEX["weight_map"]}).encode()],
        find_tensors,
        assert_index_agrees,
    ),
    "json": Target(
        "x.json",
        [json.dumps({"a": [1, 2.5, "b", None, {"c": [[True]]}], "ß": {"x": {}}}).encode()],
        lambda folder: read_json(folder / "x.json"),
        assert_json_agrees,
    ),
    "config": Target(
        "config.json",
        [json.dumps(released_config()).encode(), json.dumps(LONGROPE).encode()],
        read_config,
        assert_config_agrees,
    ),
    "adapter": Target("adapter_config.json", [json.dumps(ADAPTER).encode()], read_adapter_config, assert_json_agrees),
    "gguf": Target(
        "x.gguf",
        [gguf_file(), gguf_file(alignment=256)],
        lambda folder: read_gguf_header(folder / "x.gguf"),
        assert_gguf_agrees,
    ),
}


def damage_bytes(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """One change somewhere: bits, integers, pieces."""
    start = rng.randrange(len(data) + 1)
    stop = min(len(data), start + rng.choice((1, 4, 8, 20)))
    match rng.randrange(7):
        case 0:
            piece = bytes(byte ^ (1 << rng.randrange(8)) for byte in data[start : start + 1])
            return data[:start] + piece + data[start + 1 :]
        case 1:  # an integer of 4 or 8 bytes
            code = rng.choice("IQ")
            size = struct.calcsize(code)
            extreme = rng.choice((0, 1, 2, 3, 2**31 - 1, 2**31, 2**60, 2**63, 2**64 - 1, len(data), rng.randrange(9)))
            return data[:start] + struct.pack(f"<{code}", extreme % 2 ** (8 * size)) + data[start + size :]
        case 2:
            return data[:start]
        case 3:
            return data[:start] + data[stop:]
        case 4:
            return data[:stop] + data[start:]
        case 5:
            return data[:start] + rng.randbytes(stop - start) + data[stop:]
        case _:
            begin = rng.randrange(len(other) + 1)
            return data[:start] + other[begin : begin + rng.randrange(40)] + data[start:]


def damage_json(text: bytes, rng: random.Random) -> bytes:
    """One token replaced, removed, repeated or swapped."""
    tokens = list(JSON_TOKEN.finditer(text))
    if not tokens:
        return rng.choice(HOSTILE_TOKENS)
    token, other = rng.choice(tokens), rng.choice(tokens)
    new = rng.choice((rng.choice(HOSTILE_TOKENS), other.group(), b"", token.group() + b"," + token.group()))
    return text[: token.start()] + new + text[token.end() :]


def damage(target: Target, rng: random.Random, data: bytes | None = None) -> bytes:
    """One of the target's valid files (or `data`) with one to four changes."""
    data = rng.choice(target.seeds) if data is None else data
    for _ in range(rng.choice((1, 1, 2, 4))):
        if target.file_name == "x.gguf" or rng.random() < 0.3:
            data = damage_bytes(data, rng.choice(target.seeds), rng)
        elif target.file_name.endswith(".json"):
            data = damage_json(data, rng)
        else:  # safetensors: the length is kept right, or only the length would ever be tested
            start = 8 + int.from_bytes(data[:8], "little")
            header = damage_json(data[8:start], rng)
            data = len(header).to_bytes(8, "little") + header + data[start:]
    return data


def fuzz(name: str, runs: int, seed: int, folder: Path) -> Counter[str | None]:
    """Give a parser `runs` damaged files; return how often each message (without its values) came, None: accepted."""
    target, rng = TARGETS[name], random.Random(f"{name} {seed}")
    file = target.prepare(folder)
    outcomes: Counter[str | None] = Counter()
    for _ in range(runs):
        data = damage(target, rng)
        try:
            message = target.run(file, data)
        except Exception as error:
            raise AssertionError(f"{name} (seed {seed}) did not survive {data!r}") from error
        outcomes[message and re.sub(r"'.*'|\".*\"|0x\w+|\d+", "_", message.replace(str(folder), ""))] += 1
    return outcomes


def main() -> None:
    name, how, *arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        if how != "atheris":
            for message, count in fuzz(name, int(how), random.randrange(2**32), Path(folder)).most_common():
                print(count, message)
            return
        import atheris

        target = TARGETS[name]
        file = target.prepare(Path(folder))

        def mutate(data: bytes, max_size: int, seed: int) -> bytes:
            rng = random.Random(seed)
            if rng.random() < 0.3:
                return atheris.Mutate(data, max_size)
            return damage(target, rng, data if rng.random() < 0.8 else None)[:max_size]

        for owner in (headers, headers._GgufCursor, GrinMoeConfig):
            for function in filter(inspect.isfunction, vars(owner).values()):
                atheris.instrument_func(function)
        atheris.Setup([sys.argv[0], *arguments], lambda data: target.run(file, data), custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
