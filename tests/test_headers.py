"""Files that anybody may have written: damage ends in one sentence that names the file, in bounded time."""

import json
import os
import random
import re
import struct
import tracemalloc
from contextlib import suppress

import gguf
import numpy as np
import pytest
import torch
from checkpoints import released_config
from safetensors.torch import save, save_file

from conversion import gguf_reader
from conversion.gguf_reader import read_gguf
from conversion.headers import find_tensors, read_adapter_config, read_config, read_json
from conversion.tensors import ConversionError, read_tensors

INDEX_NAME = "model.safetensors.index.json"
SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARDS = {
    SHARD_1: {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3)},
    SHARD_2: {"c": torch.zeros(2, dtype=torch.int64)},
}
WEIGHT_MAP = {name: file for file, tensors in SHARDS.items() for name in tensors}


def refused(message, function, *args):
    """Check that `function` raises an error with all parts of `message`, in this order."""
    with pytest.raises(ConversionError, match=".*".join(map(re.escape, message.split("|")))):
        function(*args)


def write_shards(folder, index, **shards):
    for name, tensors in {**SHARDS, **shards}.items():
        save_file(tensors, folder / name)
    (folder / INDEX_NAME).write_text(index if isinstance(index, str) else json.dumps(index))
    return folder


# ---- safetensors


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def tensor_file(header, data=bytes(8)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


DAMAGED = {
    "cut off": tensor_file({"a": ENTRY}, bytes(7)),
    "hole": tensor_file({"a": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)),
    "deep": tensor_file(b"[" * 100_000),
    "twice": tensor_file(b'{"a":%s,"a":%s}' % ((json.dumps(ENTRY).encode(),) * 2)),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_safetensors_files_are_refused(tmp_path, kind):
    """safetensors finds all but the last."""
    (tmp_path / "x.safetensors").write_bytes(DAMAGED[kind])
    message = "'a' occurs 2 times" if kind == "twice" else ""
    refused(f"{tmp_path}/x.safetensors |{message}", read_tensors, tmp_path / "x.safetensors")


def test_a_file_that_changes_after_it_was_opened(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3)}, path)
    tensor = read_tensors(path)["a"]
    path.write_bytes(save({"a": torch.ones(3)})[:-1])
    refused(f"a in {path} cannot be read any more", tensor.read)


# ---- indexes and folders


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        *(({"a": file}, f"puts 'a' in |{file.strip()}|not a safetensors file in its own folder") for file in (
            "../x.safetensors", "/x.safetensors", "sub/x.safetensors", "c:x.safetensors", "..", "x.bin")),
        ({"a": r"..\x.safetensors"}, "its own folder"),
        ({"a": 1}, "'a' in 1"),
        ({"a": "missing.safetensors"}, "missing.safetensors is missing, or not a file"),
        ({"a": "folder.safetensors"}, "folder.safetensors is missing, or not a file"),
        ({"a": "pipe.safetensors"}, "pipe.safetensors is missing, or not a file"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
        ({**WEIGHT_MAP, "b": SHARD_2}, f"{SHARD_1} holds tensor 'b'|puts it in {SHARD_2}"),
        ({"a.weight": SHARD_1, "c": SHARD_2}, f"{SHARD_1} holds tensor 'b'|does not list it"),
        ({**WEIGHT_MAP, "x": SHARD_2}, f"{SHARD_2} lacks tensor 'x'"),
    ],
)  # fmt: skip
def test_bad_indexes_are_refused(tmp_path, weight_map, message):
    os.mkfifo(tmp_path / "pipe.safetensors")  # opening it would wait for ever
    (tmp_path / "folder.safetensors").mkdir()
    refused(message, find_tensors, write_shards(tmp_path, {"weight_map": weight_map}))


def test_other_faults_of_an_index_are_refused(tmp_path):
    refused("has no weight_map", find_tensors, write_shards(tmp_path, {"weight_map": WEIGHT_MAP, "metadata": None}))
    twice = json.dumps({"weight_map": WEIGHT_MAP}).replace('"b":', '"a.weight":')
    refused(f"{INDEX_NAME}|'a.weight' occurs 2 times", find_tensors, write_shards(tmp_path, twice))


def test_ambiguous_folders_are_refused(tmp_path):
    folder = write_shards(tmp_path, {"weight_map": WEIGHT_MAP})
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    refused("both a model.safetensors and", find_tensors, folder)
    (folder / INDEX_NAME).unlink()
    assert list(find_tensors(folder)) == ["a"]  # not the shards
    (folder / "model.safetensors").unlink()
    refused("2 weight files|no model.safetensors.index.json", find_tensors, folder)
    (folder / SHARD_1).unlink()
    assert list(find_tensors(folder)) == ["c"]
    (folder / SHARD_2).unlink()
    refused("has no weights", find_tensors, folder)
    for name in ("pytorch_model-00001-of-00002.bin", "x.pt", "x.pth", "x.ckpt"):
        (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
        refused("pickle|--weights-only", find_tensors, tmp_path)
        (tmp_path / name).unlink()


# ---- JSON and configs


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "JSON"),
        (b"\xef\xbb\xbf{}", "JSON|BOM"),
        ('{"a": "ß"}'.encode("utf-16"), "JSON|utf-8"),
        (b'{"a":1,"b":{"c":1,"c":1}}', "'c' occurs 2 times"),
        (b'{"a":' * 50_000, "JSON|recursion"),
        (b'{"a":' + b"9" * 5000 + b"}", "digits"),
    ],
)
def test_bad_json_is_refused(tmp_path, data, message):
    (tmp_path / "x.json").write_bytes(data)
    refused(f"x.json|{message}", read_json, tmp_path / "x.json")


def test_files_that_cannot_be_opened_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for function in (read_json, read_tensors, read_gguf):
        for name in ("missing", "pipe", "."):
            refused("is missing, or not a file", function, tmp_path / name)
    for function in (read_config, read_adapter_config):
        refused("config.json is missing, or not a file", function, tmp_path)


def test_how_a_model_was_run_is_not_taken_from_its_config(tmp_path):
    runtime = {"_attn_implementation": "someone/kernel", "experts_implementation": "someone/kernel"}
    (tmp_path / "config.json").write_text(json.dumps(released_config(**runtime, transformers_weights="../x")))
    config = read_config(tmp_path)
    assert config._attn_implementation is None and config._experts_implementation is None
    assert not hasattr(config, "transformers_weights")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "has a quantization_config: dequantize the model"),
        ({"num_labels": 10**6}, "num_labels must be at most 100000; got 1000000"),
        ({"sliding_window": 10**12}, "sliding_window must be at most 1000000000; got 1000000000000"),
        ({"base_model_tp_plan": 3}, "'base_model_tp_plan' is not a field but part of the config's class"),
        ({"torch_dtype": "float33"}, "dtype must be|float33"),
        ({"vocab_size": 10**13, "hidden_size": 128}, "more than 1e+14 parameters"),
        ({"num_experts_per_tok": 99}, "is not a usable config|num_experts_per_tok"),
    ],
)
def test_configs_of_no_model_are_refused(fields, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(released_config(**fields)))
    refused(f"config.json|{message}", read_config, tmp_path)


# ---- GGUF


def text(value):
    value = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(value)) + value


def tensor_info(dimensions=(32,), offset=0):
    sizes = struct.pack(f"<{len(dimensions)}Q", *dimensions)
    return text("a") + struct.pack("<I", len(dimensions)) + sizes + struct.pack("<IQ", 0, offset)


def gguf_bytes(keys=(), tensors=(), data=bytes(128), version=3, counts=None):
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(keys)))) + b"".join([*keys, *tensors])
    return head + bytes(-len(head) % 32) + data


def write_gguf(path):
    writer = gguf.GGUFWriter(path, "phimoe")
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "▁a", "b"])
    writer.add_uint64("x", 2**63)
    quantized = gguf.quants.quantize(np.ones((4, 256), np.float32), gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("token_embd.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


BAD_GGUF = {
    "another file": b"GGML" + bytes(100),
    "big-endian": gguf_bytes(version=3 << 24),
    "tensors without end": gguf_bytes(counts=(2**60, 0)),
    "keys without end": gguf_bytes(counts=(0, 2**60)),
    "a long text": gguf_bytes([text("a") + struct.pack("<IQ", 8, 2**63)]),
    "an array of arrays": gguf_bytes([text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000]),
    "cut off": gguf_bytes([], [tensor_info(dimensions=(33,))]),
    "overflow": gguf_bytes([], [tensor_info(dimensions=(2**32, 2**32))]),
    "a far offset": gguf_bytes([], [tensor_info(offset=2**63)]),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", BAD_GGUF)
def test_damaged_gguf_files_are_refused(tmp_path, kind):
    (tmp_path / "x.gguf").write_bytes(BAD_GGUF[kind])
    refused(f"{tmp_path}/x.gguf ", read_gguf, tmp_path / "x.gguf")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("read", [read_gguf, read_tensors])
def test_any_damage_is_a_sentence_or_no_matter(tmp_path, read):
    """Files cut anywhere, and with other bytes in up to three places."""
    path = tmp_path / "x"
    if read is read_gguf:
        write_gguf(path)
    else:
        path.write_bytes(save({"a": torch.arange(6.0), "b": torch.ones(3, dtype=torch.int8)}))
    data, generator, outcomes = path.read_bytes(), random.Random(0), set()
    for number in range(400):
        changed = bytearray(data)
        if number % 2:
            del changed[generator.randrange(len(data)) :]
        for _ in range(0 if number % 2 else generator.randint(1, 3)):
            changed[generator.randrange(min(len(data), 350))] = generator.choice([0, 1, 34, 125, 255])
        path.write_bytes(changed)
        with suppress(ConversionError):  # and nothing else
            read(path)
            outcomes.add(number)
    assert 0 < len(outcomes) < 300


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("function", "head"),
    [
        (read_gguf, gguf_bytes([text("a") + struct.pack("<IIQ", 9, 4, 2**37)], data=b"")),
        (read_gguf, gguf_bytes([text("a") + struct.pack("<IQ", 8, 2**39)], data=b"")),
        (read_tensors, struct.pack("<Q", 2**39)),
        (read_json, b"{}"),
    ],
)
def test_a_claimed_size_takes_no_memory(tmp_path, monkeypatch, function, head):
    """Files that seem to have a terabyte, so that what they claim would fit into them."""
    monkeypatch.setattr(gguf_reader, "MAX_READS", 10_000)  # 3 million take as long as a vocabulary
    (tmp_path / "x").write_bytes(head)
    os.truncate(tmp_path / "x", 2**40)
    tracemalloc.start()
    try:
        refused(f"{tmp_path}/x ", function, tmp_path / "x")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
