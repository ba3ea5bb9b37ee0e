"""Training shards and pickled weights: to the released tensors, bit for bit, and nothing that they ask for is run."""

import json
import os
import pickle
import re
import shutil
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, save_fsdp_model
from checkpoints import assert_same, fused, released_config, released_tensors, write_checkpoint
from distributed.launch import launch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from transformers import AutoModelForCausalLM

from conversion import ConversionError, open_checkpoint
from conversion.pickles import ShardedTensor, find_dcp_folder, find_pickles, read_dcp, read_pickles

# 5 experts and 131 words on 2 ranks: their parts differ in size.
CONFIG = released_config(torch_dtype="float32", num_local_experts=5)
SHARDS = {"fsdp2": True, "checkpoint-3": True, "fsdp1": True, "safetensors": False}  # folder -> has it a pickle
EMBEDDINGS = "model.model.embed_tokens.weight"


def main(folder: str) -> None:
    """Save models as trainers do, sharded, with all that belongs to a training; run by each rank."""
    warnings.simplefilter("ignore")
    state = PartialState(cpu=True)  # starts gloo
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    root = Path(folder)
    model = AutoModelForCausalLM.from_pretrained(root / "whole")
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # The optimizer has its moments, and the weights stay what they are.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    others = {"optim": moments, "step": 3, "scheduler": {"lrs": [0.5]}, "state": {"ema": torch.ones(4)}}
    dcp.save({"model": weights, **others}, checkpoint_id=root / "fsdp2")
    dcp.save(weights, storage_writer=HuggingFaceStorageWriter(str(root / "safetensors"), save_distributed=True))
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    save_fsdp_model(plugin, state, model, root / "checkpoint-3")

    model = FullyShardedDataParallel(
        AutoModelForCausalLM.from_pretrained(root / "whole"), device_id=torch.device("cpu"), use_orig_params=True
    )
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
        dcp.save({"app": {"model": model.state_dict()}}, checkpoint_id=root / "fsdp1")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folders of `SHARDS`, and `whole`, the model that they are of."""
    root = tmp_path_factory.mktemp("saved")
    write_checkpoint(root / "whole", CONFIG, released_tensors(CONFIG))
    launch(__file__, 2, root)
    return root


@pytest.fixture
def copy(saved, tmp_path):
    """A copy, to damage, of what FSDP2 has saved."""
    return shutil.copytree(saved / "fsdp2", tmp_path / "fsdp2")


def assert_released(checkpoint, expected: dict[str, torch.Tensor]) -> None:
    found = {name: tensor.read() for name, tensor in checkpoint.tensors.items()}
    assert all((t.shape, t.dtype) == (found[name].shape, found[name].dtype) for name, t in checkpoint.tensors.items())
    assert_same(found, expected)


@pytest.mark.parametrize("name", SHARDS)
def test_shards_are_the_released_tensors(saved, name, monkeypatch):
    """Each is read once, when it is asked for, though a layer's released matrices are parts of two of them."""
    reads, load = [], ShardedTensor.load
    monkeypatch.setattr(ShardedTensor, "load", lambda tensor: reads.append(tensor.where) or load(tensor))
    checkpoint = open_checkpoint(saved / name, config=saved / "whole", weights_only=SHARDS[name])
    assert checkpoint.form == "dcp" and not reads
    assert list(checkpoint.tensors) == list(open_checkpoint(saved / "whole").tensors)
    assert_released(checkpoint, load_file(saved / "whole" / "model.safetensors"))
    stored = read_dcp(find_dcp_folder(saved / name), weights_only=True)
    assert len(reads) == len(set(reads)) == len(stored) < len(checkpoint.tensors)
    if SHARDS[name]:
        with pytest.raises(ConversionError, match=r"\.metadata is a pickle.* --weights-only"):
            open_checkpoint(saved / name, config=saved / "whole")


# ---- Damaged shards


def read_index(folder: Path):
    with (folder / ".metadata").open("rb") as file:
        return pickle.load(file)


def write_index(folder: Path, index) -> None:
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(index, file)


def place_of(index, name=EMBEDDINGS):
    """The key of some part of a tensor."""
    return next(key for key in index.storage_data if key.fqn == name)


def test_damaged_files_of_ranks(copy):
    index = read_index(copy)
    place = index.storage_data[place_of(index)]
    with (copy / place.relative_path).open("r+b") as file:
        file.seek(place.offset)
        file.write(b"\0" * place.length)
    tensors = read_dcp(copy, weights_only=True)
    with pytest.raises(ConversionError, match=rf"{EMBEDDINGS} cannot be read from .*__\d_0\.distcp"):
        tensors[EMBEDDINGS].read()
    os.truncate(copy / "__1_0.distcp", 1000)
    with pytest.raises(ConversionError, match=r"of __1_0\.distcp, where it does not fit"):
        read_dcp(copy, weights_only=True)
    (copy / "__1_0.distcp").unlink()
    with pytest.raises(ConversionError, match=r"\.metadata names __1_0\.distcp, which is missing"):
        read_dcp(copy, weights_only=True)


def hole(index):
    del index.state_dict_metadata[EMBEDDINGS].chunks[0]


def overlapping(index):
    chunks = index.state_dict_metadata[EMBEDDINGS].chunks
    assert [tuple(chunk.sizes) for chunk in chunks] == [(66, 32), (65, 32)]
    chunks[1] = ChunkStorageMetadata(torch.Size([1, 0]), chunks[1].sizes)
    index.storage_data[type(place_of(index))(EMBEDDINGS, [1, 0])] = index.storage_data[place_of(index)]


def absurd_size(index):
    stored = index.state_dict_metadata[EMBEDDINGS]
    stored.size = torch.Size([2**40, 32])
    stored.chunks = [ChunkStorageMetadata(torch.Size([0, 0]), stored.size)]


def in_file(file_name):
    def change(index):
        index.storage_data[place_of(index)].relative_path = file_name

    return change


NO_INDEX = r"\.metadata is not an index as torch writes it"


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (hole, rf"{EMBEDDINGS} in .*: its parts do not cover shape \[131, 32\] exactly once \(2080 elements\)"),
        (overlapping, r"do not cover shape \[131, 32\] exactly once \(4192 elements\)"),
        (absurd_size, rf"puts {EMBEDDINGS} at byte \d+ of __0_0\.distcp, where it does not fit"),
        (in_file("../secret.distcp"), r"names '\.\./secret\.distcp', which is not a \.distcp file beside it"),
        (in_file("elsewhere.distcp"), r"names elsewhere\.distcp, which is missing"),
    ],
)
def test_an_index_that_is_wrong(copy, change, message):
    (copy.parent / "secret.distcp").write_bytes((copy / "__0_0.distcp").read_bytes())
    index = read_index(copy)
    change(index)
    write_index(copy, index)
    with pytest.raises(ConversionError, match=message) as error:
        read_dcp(copy, weights_only=True)
    assert str(error.value).startswith(str(copy / ".metadata")) or EMBEDDINGS in str(error.value)


def test_safetensors_shards_that_are_wrong(saved, tmp_path):
    whole = saved / "whole"
    first, second = sorted((saved / "safetensors").glob("*.safetensors"))
    for name, files, message in (
        ("0", {first.name: first}, "do not cover shape|the config says"),
        ("1", {second.name: second}, "do not cover shape|the config says"),
        ("twice", {first.name: first, first.name.replace("00001-model", "00003-model"): first, second.name: second},
         r"do not cover shape .* exactly once"),
        ("plain", {first.name: whole / "model.safetensors"}, f"{re.escape(first.name)} does not say which parts"),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        for file_name, file in files.items():
            shutil.copy(file, tmp_path / name / file_name)
        with pytest.raises(ConversionError, match=message):
            open_checkpoint(tmp_path / name, config=whole)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        *((offsets, "does not say which parts") for offsets in ("[1e999]", "3")),
        *((offsets, "do not cover shape") for offsets in ("[-1]", "[1]", f"[{2**80}]")),
    ],
)
def test_offsets_that_are_wrong(tmp_path, offsets, message):
    path = tmp_path / "shard-00001-model-00001-of-00001.safetensors"
    save_file({"a": torch.ones(3)}, path, {"DCP_SHARDING_INFO": f'{{"a": {{"saved_offsets": {offsets}}}}}'})
    with pytest.raises(ConversionError, match=message):
        read_dcp(tmp_path, weights_only=False)


def test_which_shards(saved, tmp_path):
    trainer = shutil.copytree(saved / "checkpoint-3", tmp_path / "checkpoint-3")
    shards = trainer / "pytorch_model_fsdp_0"
    assert find_dcp_folder(trainer) == find_dcp_folder(shards) == shards
    assert find_dcp_folder(saved / "whole") is None and find_dcp_folder(tmp_path) is None
    shutil.copytree(shards, trainer / "pytorch_model_fsdp_1")
    with pytest.raises(ConversionError, match=r"2 models \(pytorch_model_fsdp_0, pytorch_model_fsdp_1\)"):
        find_dcp_folder(trainer)
    (trainer / "model.safetensors").write_bytes(b"")
    assert find_dcp_folder(trainer) is None  # merged already, and no pickle


# ---- Pickles that ask for more than tensors


class Malicious:
    """Unpickled by Python, it calls `function`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("function", [os.system, torch.hub.load])
def test_an_index_that_runs_code_runs_none(copy, tmp_path, function):
    marker = tmp_path / "it_ran"
    index = read_index(copy)
    index.planner_data = Malicious(function, f"touch {marker}")
    write_index(copy, index)
    if function is torch.hub.load:  # a record without code takes its place, as of all names of torch's
        read_dcp(copy, weights_only=True)
    else:
        with pytest.raises(ConversionError, match=rf"\.metadata asks for \w+\.{function.__name__}, which torch "):
            read_dcp(copy, weights_only=True)
    assert not marker.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04}.",
        b"\x80\x04Nr\xff\xff\xff\x7f.",  # a memo of 2^31 entries, 32 GB in C
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # 2^63 bytes
        b"\x80\x04\x8c\x05torch\x8c\x04Size\x93)R.",
        b"\x80\x04\x8c\x05torch\x8c\x04Size\x93N}\x8c\x01ak\x01s\x86b.",  # sets an attribute of the class
    ],
)
def test_files_that_are_no_index(tmp_path, data):
    (tmp_path / ".metadata").write_bytes(data)
    with pytest.raises(ConversionError, match=NO_INDEX):
        read_dcp(tmp_path, weights_only=True)


NESTED = b"K\x01" + b"2\x86" * 60  # each tuple holds the one before twice: 2^60 steps to hash, compare or print
BOMBS = {
    "a key": b"\x80\x04}" + NESTED + b"K\x01s.",
    "a deep key": b"\x80\x04}K\x01" + b"\x85" * 10**6 + b"K\x01s.",
    "a frozen set": b"\x80\x04(" + NESTED + b"\x91.",
    "an ordered one": b"\x80\x04\x8c\x0bcollections\x8c\x0bOrderedDict\x93]" + NESTED + b"K\x01\x86a\x85R.",
    # The string of entry 0 is replaced by a tuple: MEMOIZE goes by the entries that are there.
    "a replaced entry": b"\x80\x04\x8c\x01aq\x01\x8c\x01a\x94\x8c\x01a\x94K\x01\x85\x94h\x01h\x01\x86.",
    "bytes": b"\x80\x05\x96" + (2**36).to_bytes(8, "little") + b".",
    "a long size as a key, often": b"\x80\x04}(\x8c\x05torch\x8c\x04Size\x93(%bt\x85R\x94N%bu."
    % (b"K\x01" * 50_000, b"h\x00N" * 50_000),
    "one size, often": (
        b"\x80\x04(%bt\x94\x8c\x05torch\x8c\x04Size\x93\x94%b." % (b"K\x01" * 50_000, b"h\x01h\x00\x85R" * 50_000)
    ),
}  # fmt: skip


def write_archive(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", BOMBS)
def test_pickles_that_would_never_end(tmp_path, name):
    """Neither as DCP's index nor within torch.save's archive; some would take hours, some all memory."""
    (tmp_path / ".metadata").write_bytes(BOMBS[name])
    with pytest.raises(ConversionError, match=rf"{NO_INDEX} \("):
        read_dcp(tmp_path, weights_only=True)
    write_archive(tmp_path / "pytorch_model.bin", {"archive/data.pkl": BOMBS[name]})
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin is damaged.* more than tensors in it \(ValueE"):
        read_pickles(find_pickles(tmp_path))


def test_archives_that_would_inflate(tmp_path):
    """Refused by their directories: torch.save never compresses, and no two entries share bytes."""
    path, bomb = tmp_path / "pytorch_model.bin", BOMBS["a key"][:-1] + b"0" * 2**26
    write_archive(path, {"archive/data.pkl": bomb}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**17
    with pytest.raises(ConversionError, match=r"in it \(ValueError: has 'archive/data.pkl' compressed, which torch"):
        read_pickles([path])
    write_archive(path, {"archive/data.pkl": b".", "archive/DATA.pkl": b"."})  # torch looks for either
    with pytest.raises(ConversionError, match=r"has two entries of one name"):
        read_pickles([path])
    write_archive(path, {"archive/data.pkl": b"N." * 2**16, "b": b""})
    data = path.read_bytes()
    directory, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    first = data[directory : data.index(b"PK\1\2", directory + 1)]
    end_of_directory = data[end : end + 8] + b"\2\0\2\0" + (2 * len(first)).to_bytes(4, "little") + data[end + 16 :]
    path.write_bytes(data[:directory] + first + first.replace(b"pkl", b"two") + end_of_directory)
    with pytest.raises(ConversionError, match=r"has entries that overlap"):
        read_pickles([path])
    torch.save({"a": torch.zeros(1).expand(2**40)}, path)
    with pytest.raises(ConversionError, match=r"a in .* is a tensor of 4398046511104 bytes that repeats fewer"):
        read_pickles([path])
    torch.save({"a": bytearray(3)}, path)
    with pytest.raises(ConversionError, match=r"asks for \S+\.bytearray, which torch never writes"):
        read_pickles([path])


def write_pickled(folder: Path, tensors: dict, num_files: int = 1, **kwargs) -> Path:
    folder.mkdir()
    for number in range(num_files):
        name = f"pytorch_model-{number + 1:05}-of-{num_files:05}.bin" if num_files > 1 else "pytorch_model.bin"
        torch.save({key: tensors[key] for key in list(tensors)[number::num_files]}, folder / name, **kwargs)
    (folder / "optimizer.bin").write_bytes(b"not ours to read")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.mark.parametrize("kind", ["one file", "three files", "fsdp", "wrapped"])
def test_pickled_weights(saved, tmp_path, kind):
    expected = load_file(saved / "whole" / "model.safetensors")
    stored = fused(expected, CONFIG) if kind == "fsdp" else expected
    if kind == "wrapped":
        stored = {f"module.{name}": torch.nn.Parameter(tensor) for name, tensor in stored.items()}
    folder = write_pickled(tmp_path / "pickled", stored, 3 if kind == "three files" else 1)
    if kind == "fsdp":
        (folder / "pytorch_model.bin").rename(folder / "pytorch_model_fsdp.bin")
    with pytest.raises(ConversionError, match="--weights-only"):
        open_checkpoint(folder)
    checkpoint = open_checkpoint(folder, weights_only=True)
    assert checkpoint.form == "pickle"
    assert_released(checkpoint, expected)
    assert not any(tensor.read().requires_grad for tensor in checkpoint.tensors.values())
    shutil.copy(saved / "whole" / "model.safetensors", folder)  # is preferred
    assert find_pickles(folder) == [] and open_checkpoint(folder, weights_only=True).form == "hub"


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused(tmp_path, zipped):
    marker, path = tmp_path / "it_ran", tmp_path / "pytorch_model.bin"
    state_dict = {"model.norm.weight": torch.ones(3), "x": Malicious(os.system, f"touch {marker}")}
    torch.save(state_dict, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin .*" + ("posix.system" if zipped else "torch 1.6")):
        read_pickles([path])
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # it would have run


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"epoch": 3}, r"epoch in .*pytorch_model\.bin is a int, not a tensor"),
        ({"state_dict": {"a": torch.ones(1)}}, "state_dict in .* is a dict, not a tensor"),
        ({3: torch.ones(1)}, "must hold tensors by name; got a dict"),
        ([torch.ones(1)], "must hold tensors by name; got a list"),
        ({"a": torch.eye(3).to_sparse()}, "a in .* is a tensor of another kind .*sparse_coo"),
        ({"a": torch.ones(3, device="meta")}, "a in .* is a tensor of another kind .*meta"),
    ],
)
def test_pickles_of_something_else(tmp_path, value, message):
    torch.save(value, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=message):
        read_pickles(find_pickles(tmp_path))


def test_pickles_that_are_damaged_or_double(tmp_path):
    torch.save({"a": torch.randn(100)}, tmp_path / "pytorch_model.bin")
    torch.save({"a": torch.randn(100)}, tmp_path / "pytorch_model-00001-of-00001.bin")
    with pytest.raises(ConversionError, match=r"a is in .*pytorch_model\.bin and .*pytorch_model-00001-of-00001\.bin"):
        read_pickles(find_pickles(tmp_path))
    data = (tmp_path / "pytorch_model.bin").read_bytes()
    for damaged in (data[: len(data) // 2], data.replace(b"FloatStorage", b"FlootStorage"), b""):
        (tmp_path / "pytorch_model.bin").write_bytes(damaged)
        with pytest.raises(ConversionError, match=r"pytorch_model\.bin is damaged"):
            read_pickles([tmp_path / "pytorch_model.bin"])
