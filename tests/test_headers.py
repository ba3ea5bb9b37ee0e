"""Files that anybody may have written: what is read is what they say, or an error that names what is wrong."""

import json
import os
import re
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
import torch
from checkpoints import released_config, released_tensors, write_checkpoint
from fuzz_headers import ADAPTER, INDEX, LONGROPE, SHARDS, TARGETS, fuzz, gguf_file
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import save, save_file

from conversion.headers import (
    MAX_HEADER_BYTES,
    SAFETENSORS_DTYPES,
    find_tensors,
    read_adapter_config,
    read_config,
    read_gguf_header,
    read_index,
    read_json,
    read_safetensors_header,
)
from conversion.tensors import ConversionError
from modeling_grin import GrinMoeConfig

SHARD_1, SHARD_2 = SHARDS
INDEX_NAME = "model.safetensors.index.json"


def refused(message, function, *args):
    """That `function` refuses its file with an error that matches all of `message`'s words, in this order."""
    pattern = ".*".join(map(re.escape, message.split("|")))
    with pytest.raises(ConversionError, match=pattern):
        function(*args)


def write_shards(folder, index=INDEX, **shards):
    for name, tensors in {**SHARDS, **shards}.items():
        save_file(tensors, folder / name)
    (folder / INDEX_NAME).write_text(json.dumps(index))
    return folder


def sparse(path, head, size):
    """A file that begins with `head`, and seems to be `size` bytes long."""
    path.write_bytes(head)
    os.truncate(path, size)


# ---- valid files


@pytest.mark.parametrize("name", TARGETS)
def test_valid_files_are_accepted(name, tmp_path):
    target = TARGETS[name]
    file = target.prepare(tmp_path)
    for seed in target.seeds:
        assert target.run(file, seed) is None


@pytest.mark.parametrize("num_shards", [1, 3])
def test_tensors_are_read_where_the_header_puts_them(tmp_path, num_shards):
    config = released_config()
    tensors = released_tensors(config)
    folder = write_checkpoint(tmp_path / "checkpoint", config, tensors, num_shards)
    found = find_tensors(folder)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].read(), tensor), name
        assert name in found[name].where and ".safetensors" in found[name].where


@pytest.mark.parametrize("dtype", SAFETENSORS_DTYPES.values(), ids=str)
def test_every_dtype_and_shape_is_read(tmp_path, dtype):
    data = torch.randint(0, 2, (96,), dtype=torch.uint8)
    tensors = {"scalar": data[: dtype.itemsize].view(dtype)[0], "empty": torch.zeros(3, 0).to(dtype)}
    tensors["matrix"] = data[: 6 * dtype.itemsize].view(dtype).reshape(2, 3).clone()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
    found = find_tensors(tmp_path / "x.safetensors")  # a file by its own name
    for name, tensor in tensors.items():
        read = found[name].read()
        assert read.dtype == dtype and read.shape == tensor.shape
        assert torch.equal(read.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_the_hub_cache_of_symbolic_links_is_read(tmp_path):
    folder = write_shards(tmp_path)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "x"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, name in enumerate([*SHARDS, INDEX_NAME]):
        (folder / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    found = find_tensors(snapshot)
    assert torch.equal(found["a.weight"].read(), SHARDS[SHARD_1]["a.weight"])


@pytest.mark.parametrize("config", [released_config(), LONGROPE], ids=["grinmoe", "longrope"])
def test_configs_are_read_as_transformers_reads_them(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path).to_dict() == GrinMoeConfig.from_dict(config).to_dict()


def test_how_a_model_was_run_is_not_taken_from_its_config(tmp_path):
    runtime = {"_attn_implementation": "someone/kernel", "experts_implementation": "someone/kernel"}
    (tmp_path / "config.json").write_text(json.dumps(released_config(**runtime, transformers_weights="../x")))
    config = read_config(tmp_path)
    assert config._attn_implementation is None and config._experts_implementation is None
    assert not hasattr(config, "transformers_weights")


def test_adapter_configs_of_peft_are_read(tmp_path):
    LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path="microsoft/GRIN-MoE",
        r=7,
        lora_alpha=3,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj"],
        rank_pattern={"q_proj": 3},
    ).save_pretrained(tmp_path)
    config = read_adapter_config(tmp_path)
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (7, 3, {"q_proj": 3})
    assert config["target_modules"] == ["q_proj"] and config["target_parameters"] == ["experts.gate_up_proj"]


def test_gguf_of_a_real_vocabulary(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "phimoe")
    tokens, scores = [f"▁{number}" for number in range(32064)], [-float(number) for number in range(32064)]
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    weight = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
    quantized = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("token_embd.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata, tensors = read_gguf_header(tmp_path / "x.gguf")
    assert metadata == {
        "general.architecture": "phimoe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
    }
    tensor = tensors["token_embd.weight"]
    assert (tensor.shape, tensor.type, tensor.nbytes) == ((4, 256), gguf.GGMLQuantizationType.Q4_0, quantized.nbytes)
    data = (tmp_path / "x.gguf").read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
    assert data == quantized.tobytes()


# ---- safetensors

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def tensor_file(header, data=bytes(8), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a safetensors file"),
        (b"\x01\x02\x03", "not a safetensors file"),
        (tensor_file({}, length=2**63), "not a safetensors file"),
        (tensor_file({}, length=MAX_HEADER_BYTES + 1), "not a safetensors file"),
        (tensor_file({}, b"", length=3), "ends within its header|fetch it again"),
        (tensor_file(b""), "JSON"),
        (tensor_file(b"{" * 100), "JSON"),
        (tensor_file(b"[" * 100_000), "JSON|recursion"),
        (tensor_file(b'{"a":\xff}'), "JSON|utf-8"),
        (tensor_file(b"[1]"), "JSON list"),
        (tensor_file(b'{"a":' + b"[" * 150 + b"]" * 150 + b"}"), "100 levels"),
        (tensor_file(b'{"a":1' + b"0" * 5000 + b"}"), "JSON|digits"),
        (tensor_file(b'{"a":%s,"a":%s}' % ((json.dumps(ENTRY).encode(),) * 2)), "'a' 2 times"),
        (tensor_file(b'{"a":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}'), "'shape' 2 times"),
        (tensor_file({"": ENTRY}), "tensor named ''"),
        (tensor_file({"a\x1b[2J": ENTRY}), r"tensor named 'a\x1b[2J'"),
        (tensor_file(b'{"\\ud800":1}'), "surrogates"),
        (tensor_file({"a": [1]}), "'a' is described by [1]"),
        (tensor_file({"a": {"dtype": "F32", "shape": [2]}}), "'a'|needs dtype, shape, data_offsets"),
        (tensor_file({"a": {**ENTRY, "x": 1}}), "'a'|nothing else"),
        (tensor_file({"a": {**ENTRY, "dtype": "F4"}}), "'a' has dtype 'F4'|known are F64, F32"),
        (tensor_file({"a": {**ENTRY, "dtype": ["F32"]}}), "'a' has dtype ['F32']"),
        (tensor_file({"a": {**ENTRY, "shape": 2}}), "'a' has shape 2"),
        (tensor_file({"a": {**ENTRY, "shape": [True, 2]}}), "'a' has shape [True, 2]"),
        (tensor_file({"a": {**ENTRY, "shape": [2.0]}}), "'a' has shape [2.0]"),
        (tensor_file({"a": {**ENTRY, "shape": [-2]}}), "'a' has shape [-2]"),
        (tensor_file({"a": {**ENTRY, "shape": [2**63]}}), "'a' has shape [9223372036854775808]"),
        (tensor_file({"a": {**ENTRY, "shape": [1] * 65}}), "'a' has 65 dimensions"),
        (tensor_file({"a": {**ENTRY, "shape": [2**62] * 64}}), "'a'|needs"),
        (tensor_file({"a": {**ENTRY, "shape": [3]}}), "'a'|needs 12 bytes|8"),
        (tensor_file({"a": {**ENTRY, "shape": [1]}}), "'a'|needs 4 bytes|8"),
        (tensor_file({"a": {**ENTRY, "data_offsets": [8, 0]}}), "'a'|needs 8 bytes|-8"),
        (tensor_file({"a": {**ENTRY, "data_offsets": [0, 4, 8]}}), "'a' has 3 data_offsets"),
        (tensor_file({"a": {**ENTRY, "data_offsets": [False, 8]}}), "'a' has data_offsets [False, 8]"),
        (tensor_file({"a": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)), "'a' leaves a hole of 4 bytes"),
        (tensor_file({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)), "'b' overlaps"),
        (tensor_file({"a": ENTRY}, bytes(7)), "was cut off|8 bytes, the file has 7"),
        (tensor_file({"a": ENTRY}, bytes(9)), "belong to no tensor|8 bytes, the file has 9"),
        (tensor_file({"a": {**ENTRY, "shape": [2**60], "data_offsets": [0, 2**62]}}), "was cut off"),
        (tensor_file({"__metadata__": {"format": 1}, "a": ENTRY}), "__metadata__ {'format': 1}"),
        (tensor_file({"__metadata__": ["pt"], "a": ENTRY}), "__metadata__ ['pt']"),
    ],
)  # fmt: skip
def test_bad_safetensors_files_are_refused(tmp_path, data, message):
    (tmp_path / "x.safetensors").write_bytes(data)
    refused(f"x.safetensors|{message}", read_safetensors_header, tmp_path / "x.safetensors")


def test_a_cut_file_is_refused_wherever_it_is_cut(tmp_path):
    data = save({"a": torch.arange(6.0), "b": torch.ones(3, dtype=torch.int8)})
    for length in range(len(data)):
        (tmp_path / "x.safetensors").write_bytes(data[:length])
        refused("x.safetensors", read_safetensors_header, tmp_path / "x.safetensors")


# ---- indexes and folders


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../x.safetensors"}, "'../x.safetensors'|its own folder"),
        ({"a": "/x.safetensors"}, "'/x.safetensors'|its own folder"),
        ({"a": "sub/x.safetensors"}, "'sub/x.safetensors'|its own folder"),
        ({"a": r"..\x.safetensors"}, "x.safetensors'|its own folder"),
        ({"a": "c:x.safetensors"}, "'c:x.safetensors'|its own folder"),
        ({"a": ".."}, "'..'|its own folder"),
        ({"a": ".safetensors"}, "'.safetensors'|its own folder"),
        ({"a": "x.bin"}, "'x.bin'|its own folder"),
        ({"a": "x\0.safetensors"}, r"'x\x00.safetensors'|its own folder"),
        ({"a": "x\n.safetensors"}, "its own folder"),
        ({"a": "a" * 300 + ".safetensors"}, "cannot be read: File name too long"),
        ({"a": "missing.safetensors"}, "missing.safetensors cannot be read: No such file"),
        ({"a": "folder.safetensors"}, "folder.safetensors is not a file"),
        ({"a": "pipe.safetensors"}, "pipe.safetensors is not a file"),
        ({"a": 1}, "'a' in 1"),
        ({"a": None}, "'a' in None"),
        ({"": SHARD_1}, "tensor named ''"),
        ({"a\n": SHARD_1}, r"tensor named 'a\n'"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
        (None, "no weight_map"),
    ],
)
def test_bad_indexes_are_refused(tmp_path, weight_map, message):
    os.mkfifo(tmp_path / "pipe.safetensors")  # opening it would wait for ever
    (tmp_path / "folder.safetensors").mkdir()
    folder = write_shards(tmp_path, {"weight_map": weight_map})
    refused(message, read_index, folder / INDEX_NAME)
    refused(message, find_tensors, folder)


@pytest.mark.parametrize("metadata", [[], None, {"total_size": "1"}, {"total_size": -1}, {"total_size": True}])
def test_bad_metadata_of_an_index_is_refused(tmp_path, metadata):
    refused("has metadata|total_size", find_tensors, write_shards(tmp_path, {**INDEX, "metadata": metadata}))


def test_a_tensor_twice_in_an_index_is_refused(tmp_path):
    folder = write_shards(tmp_path)
    text = json.dumps(INDEX).replace('"b":', '"a.weight":')
    (folder / INDEX_NAME).write_text(text)
    refused(f"{INDEX_NAME}|'a.weight' 2 times", find_tensors, folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": SHARD_2}, f"{SHARD_1} holds tensor 'b'|puts it in {SHARD_2}"),
        ({"b": None}, f"{SHARD_1} holds tensor 'b'|does not list it"),
        ({"x": SHARD_2}, f"{SHARD_2} lacks tensor 'x'"),
    ],
)
def test_an_index_that_disagrees_with_the_files_is_refused(tmp_path, change, message):
    weight_map = {name: file for name, file in (INDEX["weight_map"] | change).items() if file}
    refused(message, find_tensors, write_shards(tmp_path, {"weight_map": weight_map}))


def test_a_tensor_in_two_files_is_refused(tmp_path):
    both = {SHARD_2: {**SHARDS[SHARD_2], "b": torch.ones(1)}}
    refused(f"'b' lies in both|{SHARD_1} and {SHARD_2}", find_tensors, write_shards(tmp_path, **both))


def test_folders_of_which_it_is_not_clear_what_is_meant_are_refused(tmp_path):
    folder = write_shards(tmp_path)
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
    refused("cannot be read: No such file", find_tensors, folder / "missing")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "x.pt", "x.pth", "x.ckpt"])
def test_pickle_files_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refused("pickle|--weights-only", find_tensors, tmp_path)
    refused("pickle|--weights-only", find_tensors, tmp_path / name)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(find_tensors(tmp_path)) == ["a"]


# ---- JSON and configs


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"\xef\xbb\xbf{}", "JSON|BOM"),
        ('{"a": "ß"}'.encode("utf-16"), "JSON|utf-8"),
        (b"[]", "JSON list"),
        (b"1", "JSON int"),
        (b'{"a":1,"b":{"c":1,"c":1}}', "'c' 2 times"),
        (b'{"a":' * 50_000, "JSON|recursion"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, "100 levels"),
        (b'{"a":"\\uDC00"}', "surrogates"),
        (b'{"a":' + b"9" * 5000 + b"}", "digits"),
    ],
)
def test_bad_json_is_refused(tmp_path, data, message):
    (tmp_path / "x.json").write_bytes(data)
    refused(f"x.json|{message}", read_json, tmp_path / "x.json")


def test_json_files_have_a_limit(tmp_path):
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"a": "\U0001f600" * 10}))  # escaped as a pair of surrogates
    assert read_json(file, max_bytes=file.stat().st_size) == {"a": "\U0001f600" * 10}
    refused("x.json has|bytes", read_json, file, file.stat().st_size - 1)


def test_files_that_cannot_be_opened_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for function in (read_json, read_safetensors_header, read_gguf_header):
        refused("missing cannot be read: No such file", function, tmp_path / "missing")
        refused("is not a file", function, tmp_path / "pipe")
        refused("is not a file", function, tmp_path)
    for function in (read_config, read_adapter_config):
        refused("config.json cannot be read: No such file", function, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"model_type": ["grinmoe"]}, "model_type=['grinmoe']"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config|dequantize"),
        ({"num_hidden_layers": 10**18}, "num_hidden_layers=1000000000000000000 is more than"),
        ({"num_local_experts": 10**6}, "num_local_experts=1000000 is more than"),
        ({"num_experts": 10**6}, "num_experts=1000000 is more than"),
        ({"num_labels": 10**9}, "num_labels=1000000000 is more than"),
        ({"max_position_embeddings": 10**18}, "max_position_embeddings|more than"),
        ({"hidden_size": 4 * 10**18}, "1e+14 parameters"),
        ({"vocab_size": 10**18}, "1e+14 parameters"),
        ({"intermediate_size": 10**18}, "1e+14 parameters"),
        ({"num_attention_heads": 2 * 10**18, "head_dim": 8}, "1e+14 parameters"),
        ({"head_dim": 10**18}, "1e+14 parameters"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 32.0}, "hidden_size"),
        ({"num_attention_heads": 5}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"rms_norm_eps": float("nan")}, "JSON compliant"),
        ({"router_jitter_noise": float("inf")}, "JSON compliant"),
        ({"rope_theta": "x"}, "rope_theta"),
        ({"rope_scaling": 5}, "rope_parameters"),
        ({"id2label": {"x": 1}}, "not a usable config|'x'"),
        ({"auto_map": [1]}, "not a usable config|list"),
        ({"torch_dtype": "load"}, "torch_dtype='load' is not a dtype"),
        ({"torch_dtype": 5}, "torch_dtype=5 is not a dtype"),
        ({"dtype": ["bfloat16"]}, "dtype=['bfloat16'] is not a dtype"),
        ({"to_dict": 1}, "'to_dict' is not a field"),
        ({"__dict__": {}}, "'__dict__' is not a field"),
        ({"_check_values": 1}, "'_check_values' is not a field"),
        ({"self": 1}, "not a usable config|'self'"),
    ],
)
def test_bad_configs_are_refused(tmp_path, changes, message):
    (tmp_path / "config.json").write_text(json.dumps(released_config(**changes)))
    refused(f"config.json|{message}", read_config, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
        ({"peft_type": ["LORA"]}, "peft_type=['LORA']"),
        ({"base_model_name_or_path": 7}, "base_model_name_or_path=7"),
        ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path=['x']"),
        ({"r": 0}, "r=0"),
        ({"r": 8.0}, "r=8.0"),
        ({"r": True}, "r=True"),
        ({"r": 2**60}, "r=1152921504606846976"),
        ({"lora_alpha": "16"}, "lora_alpha='16'"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha=inf"),
        ({"lora_alpha": 10**400}, "lora_alpha=1000"),
        ({"lora_dropout": 1}, "lora_dropout=1"),
        ({"bias": "some"}, "bias='some'"),
        ({"use_rslora": "yes"}, "use_rslora='yes'"),
        ({"use_dora": 1}, "use_dora=1"),
        ({"target_modules": 5}, "target_modules=5"),
        ({"target_modules": [1]}, "target_modules=[1]"),
        ({"target_parameters": "x"}, "target_parameters='x'"),
        ({"modules_to_save": [""]}, "modules_to_save=['']"),
        ({"rank_pattern": [1]}, "rank_pattern=[1]"),
        ({"rank_pattern": {"x": 0}}, "rank_pattern={'x': 0}"),
        ({"alpha_pattern": {"x": "1"}}, "alpha_pattern={'x': '1'}"),
    ],
)
def test_bad_adapter_configs_are_refused(tmp_path, changes, message):
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER | changes))
    refused(f"adapter_config.json|{message}", read_adapter_config, tmp_path)


@pytest.mark.parametrize("field", ["peft_type", "base_model_name_or_path", "r", "lora_alpha"])
def test_adapter_configs_without_a_needed_field_are_refused(tmp_path, field):
    values = {name: value for name, value in ADAPTER.items() if name != field}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    refused(f"has no {field}", read_adapter_config, tmp_path)


# ---- GGUF


def text(value):
    value = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(value)) + value


def tensor_info(name="a", dimensions=(32,), tensor_type=0, offset=0):
    sizes = struct.pack(f"<{len(dimensions)}Q", *dimensions)
    return text(name) + struct.pack("<I", len(dimensions)) + sizes + struct.pack("<IQ", tensor_type, offset)


def gguf_bytes(keys=(), tensors=(), data=bytes(128), version=3, counts=None):
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(keys)))) + b"".join([*keys, *tensors])
    return head + bytes(-len(head) % 32) + data


ALIGNMENT = text("general.alignment")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "some other file"),
        (b"GG", "some other file"),
        (b"GGML" + bytes(100), "some other file"),
        (gguf_bytes(version=1), "has version 1"),
        (gguf_bytes(version=4), "has version 4"),
        (gguf_bytes(version=3 << 24), "is big-endian"),
        (gguf_bytes(counts=(2**60, 0)), "tensor named ''"),
        (gguf_bytes(counts=(0, 2**60)), "key ''"),
        (gguf_bytes([struct.pack("<Q", 2**60)], data=b""), "ends within its header"),
        (gguf_bytes([text("a") + struct.pack("<IQ", 8, 2**63)]), "ends within its header"),
        (gguf_bytes([text("a") + struct.pack("<IIQ", 9, 4, 2**60)]), "ends within its header"),
        (gguf_bytes([text("a") + struct.pack("<IIQ", 9, 8, 2**60)]), "ends within its header"),
        (gguf_bytes([text("a") + struct.pack("<IIQ", 9, 9, 1)]), "'a' has values of type 9"),
        (gguf_bytes([text("a") + struct.pack("<I", 13)]), "'a' has values of type 13"),
        (gguf_bytes([text("a") + struct.pack("<IB", 7, 2)]), "'a' has a boolean"),
        (gguf_bytes([text("a") + struct.pack("<I", 8) + text(b"\xff")]), "UTF-8"),
        (gguf_bytes([text(b"\xff") + struct.pack("<IB", 7, 1)]), "UTF-8"),
        (gguf_bytes([text("a") + struct.pack("<IB", 7, 1)] * 2), "key 'a'|twice"),
        (gguf_bytes([text("") + struct.pack("<IB", 7, 1)]), "key ''"),
        (gguf_bytes([text("a\n") + struct.pack("<IB", 7, 1)]), r"key 'a\n'"),
        (gguf_bytes([ALIGNMENT + struct.pack("<II", 4, 0)]), "general.alignment=0"),
        (gguf_bytes([ALIGNMENT + struct.pack("<II", 4, 48)]), "general.alignment=48"),
        (gguf_bytes([ALIGNMENT + struct.pack("<IQ", 10, 32)]), "general.alignment=32"),
        (gguf_bytes([ALIGNMENT + struct.pack("<IIQI", 9, 4, 1, 32)]), "general.alignment=[32]"),
        (gguf_bytes([ALIGNMENT + struct.pack("<I", 8) + text("32")]), "general.alignment='32'"),
        (gguf_bytes([], [tensor_info()] * 2), "'a' is there twice"),
        (gguf_bytes([], [tensor_info("")]), "tensor named ''"),
        (gguf_bytes([], [tensor_info("a" * 64)]), "longer than 63 bytes"),
        (gguf_bytes([], [tensor_info(dimensions=())]), "'a' has 0 dimensions"),
        (gguf_bytes([], [tensor_info(dimensions=(1,) * 5)]), "'a' has 5 dimensions"),
        (gguf_bytes([], [tensor_info(tensor_type=4)]), "'a' has type 4"),
        (gguf_bytes([], [tensor_info(dimensions=(48,), tensor_type=8)]), "'a' has rows of 48|Q8_0's blocks of 32"),
        (gguf_bytes([], [tensor_info(offset=16)]), "'a' is at offset 16, not 0"),
        (gguf_bytes([], [tensor_info(), tensor_info("b", offset=64)]), "'b' is at offset 64, not 128"),
        (gguf_bytes([], [tensor_info(dimensions=(33,))]), "ends within tensor 'a'"),
        (gguf_bytes([], [tensor_info(dimensions=(2**63, 2**63))]), "ends within tensor 'a'"),
        (gguf_bytes([], [tensor_info(dimensions=(2**32, 2**32))]), "ends within tensor 'a'"),
    ],
)  # fmt: skip
def test_bad_gguf_files_are_refused(tmp_path, data, message):
    (tmp_path / "x.gguf").write_bytes(data)
    refused(f"x.gguf|{message}", read_gguf_header, tmp_path / "x.gguf")


def test_gguf_cut_anywhere_is_refused(tmp_path):
    data = gguf_file()
    _, tensors = TARGETS["gguf"].read(tmp_path) if (tmp_path / "x.gguf").write_bytes(data) else (None, {})
    end = max(tensor.offset + tensor.nbytes for tensor in tensors.values())
    for length in range(end):  # (behind it is padding)
        (tmp_path / "x.gguf").write_bytes(data[:length])
        refused("x.gguf", read_gguf_header, tmp_path / "x.gguf")


# ---- sizes that files claim


@pytest.mark.parametrize(
    ("function", "head"),
    [
        (read_gguf_header, gguf_bytes([text("a") + struct.pack("<IIQ", 9, 4, 2**37)], data=b"")),
        (read_gguf_header, gguf_bytes([text("a") + struct.pack("<IQ", 8, 2**39)], data=b"")),
        (read_safetensors_header, struct.pack("<Q", 2**39)),
        (read_json, b"{}"),
    ],
)
def test_a_claimed_size_takes_no_memory(tmp_path, function, head):
    """Files of a terabyte, so that what they claim would fit into them."""
    sparse(tmp_path / "x", head, 2**40)
    tracemalloc.start()
    try:
        refused("bytes" if function is not read_safetensors_header else "header", function, tmp_path / "x")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


# ---- any content

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["F32", "a"]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=4), values, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("headers")


@pytest.mark.parametrize("name", ["config", "adapter"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_fields_of_any_value_are_accepted_or_refused(folder, name, data):
    target = TARGETS[name]
    values = json.loads(data.draw(st.sampled_from(target.seeds)))
    for field in data.draw(st.lists(st.sampled_from(sorted(values)) | st.text(max_size=8), min_size=1, max_size=3)):
        values[field] = data.draw(JSON_VALUES)
    target.run(target.prepare(folder), json.dumps(values).encode())


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=3),
        st.fixed_dictionaries({"dtype": st.sampled_from(["F32", "U8", "BF16"]) | JSON_VALUES,
                               "shape": st.lists(st.integers(-1, 3), max_size=3) | JSON_VALUES,
                               "data_offsets": st.lists(st.integers(0, 30), min_size=2, max_size=2) | JSON_VALUES}),
        max_size=3,
    ),
    st.binary(max_size=30),
)  # fmt: skip
def test_headers_of_any_content_are_accepted_or_refused(folder, header, data):
    target = TARGETS["safetensors"]
    target.run(target.prepare(folder), tensor_file(header, data))


DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn])
NAMES = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(NAMES, st.tuples(DTYPES, st.lists(st.integers(0, 4), max_size=4)), max_size=6))
def test_what_safetensors_writes_is_accepted(folder, specifications):
    data = save({name: torch.zeros(shape).to(dtype) for name, (dtype, shape) in specifications.items()})
    target = TARGETS["safetensors"]
    assert target.run(target.prepare(folder), data) is None


GGUF_VALUES = {
    "add_string": st.text(st.characters(codec="utf-8"), max_size=9),
    "add_uint32": st.integers(0, 2**32 - 1),
    "add_int64": st.integers(-(2**63), 2**63 - 1),
    "add_float64": st.floats(),
    "add_bool": st.booleans(),
    "add_array": st.lists(st.text(st.characters(codec="utf-8"), max_size=9), min_size=1, max_size=4)
    | st.lists(st.floats(width=32), min_size=1, max_size=4),
}


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(NAMES, st.sampled_from(sorted(GGUF_VALUES)).flatmap(
        lambda add: st.tuples(st.just(add), GGUF_VALUES[add])), max_size=5),
    st.dictionaries(NAMES, st.lists(st.integers(1, 4), min_size=1, max_size=4), max_size=4),
)  # fmt: skip
def test_what_gguf_writes_is_accepted(folder, values, shapes):
    target = TARGETS["gguf"]
    file = target.prepare(folder)
    writer = gguf.GGUFWriter(file, "phimoe")
    for key, (add, value) in values.items():
        getattr(writer, add)(key, value)
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert target.run(file, file.read_bytes()) is None


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_accepted_or_refused(name, tmp_path):
    outcomes = fuzz(name, 700, 0, tmp_path)
    assert outcomes[None] > 5 and len(outcomes) > 10  # of both, and not always for the same reason


@pytest.mark.slow
def test_more_damaged_files_are_accepted_or_refused(tmp_path):
    assert sum(fuzz(name, 15_000, 1, tmp_path).total() for name in TARGETS) >= 100_000
