"""Training shards and pickled weights: to the released tensors, bit for bit, and nothing that they ask for is run."""

import json
import os
import pickle
import re
import shutil
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, save_fsdp_model
from checkpoints import fused, released_config, released_tensors, write_checkpoint
from distributed.launch import launch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from transformers import AutoModelForCausalLM, PhimoeForCausalLM

from conversion import ConversionError, convert, open_checkpoint
from conversion.pickles import ShardedTensor, find_dcp_folder, find_pickles, read_dcp, read_pickles

# 5 experts and 131 words on 2 ranks: their parts differ in size.
OURS = released_config(torch_dtype="float32", num_local_experts=5)
STOCK = released_config(num_local_experts=3, sliding_window=7)
STOCK_FILE = {**STOCK, "model_type": "phimoe", "architectures": ["PhimoeForCausalLM"], "auto_map": None}
SHARDS = {  # folder -> its config, and whether it has a pickle
    "fsdp2": (OURS, True),
    "checkpoint-3": (STOCK, True),
    "fsdp1": (OURS, True),
    "safetensors": (OURS, False),
    "one_process": (OURS, True),
}


def main(folder: str) -> None:
    """A rank: save models as trainers do, whole and sharded with all that belongs to a training."""
    warnings.simplefilter("ignore")
    state = PartialState(cpu=True)  # starts gloo
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    root = Path(folder)

    def shard(model):
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    model = shard(AutoModelForCausalLM.from_pretrained(root / "ours"))
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
    stock = shard(PhimoeForCausalLM.from_pretrained(root / "stock"))
    save_fsdp_model(plugin, state, stock, root / "checkpoint-3")

    model = FullyShardedDataParallel(
        AutoModelForCausalLM.from_pretrained(root / "ours"), device_id=torch.device("cpu"), use_orig_params=True
    )
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
        dcp.save({"app": {"model": model.state_dict()}}, checkpoint_id=root / "fsdp1")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folders of `SHARDS`, and those of the whole models, `ours` and `stock`."""
    root = tmp_path_factory.mktemp("saved")
    ours = write_checkpoint(root / "ours", OURS, released_tensors(OURS))
    write_checkpoint(root / "stock", STOCK_FILE, released_tensors(STOCK, seed=1))
    launch(__file__, 2, root)
    state_dict = AutoModelForCausalLM.from_pretrained(ours).state_dict()
    dcp.save(
        {"model": state_dict, "optimizer": {"x": torch.ones(3)}}, checkpoint_id=root / "one_process", no_dist=True
    )
    return root


@pytest.fixture
def copy(saved, tmp_path):
    """A copy to damage of what FSDP2 has saved."""
    return shutil.copytree(saved / "fsdp2", tmp_path / "fsdp2")


def expected_tensors(saved: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(saved / ("stock" if name == "checkpoint-3" else "ours") / "model.safetensors")


def assert_released(checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in checkpoint.tensors.items():
        found = tensor.read()
        assert (
            (tensor.shape, tensor.dtype) == (found.shape, found.dtype) == (expected[name].shape, expected[name].dtype)
        )
        assert torch.equal(found.view(torch.uint8), expected[name].view(torch.uint8)), name


@pytest.mark.parametrize("name", SHARDS)
def test_shards_are_the_released_tensors(saved, name):
    """FSDP2, FSDP1, accelerate's folder in a Trainer checkpoint (stock Phimoe), safetensors, one process."""
    config, has_pickle = SHARDS[name]
    whole = saved / ("stock" if config is STOCK else "ours")
    checkpoint = open_checkpoint(saved / name, config=whole, weights_only=has_pickle)
    assert checkpoint.form == "dcp"
    expected = expected_tensors(saved, name)
    assert_released(checkpoint, expected)
    assert list(checkpoint.tensors) == list(open_checkpoint(whole).tensors)


@pytest.mark.parametrize("name", SHARDS)
def test_a_pickled_index_is_refused_unless_asked_for(saved, name):
    _, has_pickle = SHARDS[name]
    if has_pickle:
        with pytest.raises(ConversionError, match=r"\.metadata is a pickle.* --weights-only"):
            open_checkpoint(saved / name, config=saved / "ours")
    else:
        open_checkpoint(saved / name, config=saved / "ours")


def test_shards_are_converted(saved, tmp_path):
    convert(saved / "checkpoint-3", tmp_path / "hub", to="hub", config=saved / "stock", weights_only=True)
    converted = load_file(tmp_path / "hub" / "model.safetensors")
    expected = expected_tensors(saved, "checkpoint-3")
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", SHARDS)
def test_every_tensor_is_read_once_and_not_before_it_is_asked_for(saved, name, monkeypatch):
    """Though a layer's released matrices are parts of two stored tensors."""
    config, has_pickle = SHARDS[name]
    reads, load = [], ShardedTensor.load

    def read_slowly(tensor):
        reads.append(tensor.where)
        time.sleep(0.002)
        return load(tensor)

    monkeypatch.setattr(ShardedTensor, "load", read_slowly)
    whole = saved / ("stock" if config is STOCK else "ours")
    checkpoint = open_checkpoint(saved / name, config=whole, weights_only=has_pickle)
    assert not reads

    def copy(tensor):
        tensor.read()
        time.sleep(0.002)  # to write it

    with ThreadPoolExecutor(2) as threads:  # as checkpoints are converted
        list(threads.map(copy, checkpoint.tensors.values()))
    stored = read_dcp(find_dcp_folder(saved / name), weights_only=has_pickle)
    assert len(reads) == len(set(reads)) == len(stored) < len(checkpoint.tensors)


# ---- What is wrong with shards ----


def read_index(folder: Path):
    with (folder / ".metadata").open("rb") as file:
        return pickle.load(file)


def write_index(folder: Path, index) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def place_of(index, name):
    """The key of some part of a tensor."""
    return next(key for key in index.storage_data if key.fqn == name)


EMBEDDINGS = "model.model.embed_tokens.weight"


def test_a_missing_ranks_file(copy):
    (copy / "__1_0.distcp").unlink()
    with pytest.raises(ConversionError, match=r"\.metadata names __1_0\.distcp, which is missing"):
        read_dcp(copy, weights_only=True)


def test_a_file_that_was_cut_off(copy):
    os.truncate(copy / "__1_0.distcp", 1000)
    with pytest.raises(ConversionError, match=r"of __1_0\.distcp, where it does not fit"):
        read_dcp(copy, weights_only=True)


def test_damaged_bytes_are_found_when_they_are_read(copy):
    index = read_index(copy)
    place = index.storage_data[place_of(index, EMBEDDINGS)]
    with (copy / place.relative_path).open("r+b") as file:
        file.seek(place.offset)
        file.write(b"\0" * place.length)
    tensors = read_dcp(copy, weights_only=True)
    with pytest.raises(ConversionError, match=rf"{EMBEDDINGS} cannot be read from .*__\d_0\.distcp"):
        tensors[EMBEDDINGS].read()


def hole(index):
    del index.state_dict_metadata[EMBEDDINGS].chunks[0]


def overlapping(index):
    chunks = index.state_dict_metadata[EMBEDDINGS].chunks
    assert [tuple(chunk.sizes) for chunk in chunks] == [(66, 32), (65, 32)]
    chunks[1] = ChunkStorageMetadata(torch.Size([1, 0]), chunks[1].sizes)
    index.storage_data[type(place_of(index, EMBEDDINGS))(EMBEDDINGS, [1, 0])] = index.storage_data[
        place_of(index, EMBEDDINGS)
    ]


def shifted(index):
    """Neither overlap nor too few elements."""
    key = type(place_of(index, EMBEDDINGS))
    index.state_dict_metadata[EMBEDDINGS].chunks[1].offsets = torch.Size([67, 0])
    index.storage_data[key(EMBEDDINGS, [67, 0])] = index.storage_data[key(EMBEDDINGS, [66, 0])]


def beyond(index):
    index.state_dict_metadata[EMBEDDINGS].size = torch.Size([130, 32])


def absurd_size(index):
    stored = index.state_dict_metadata[EMBEDDINGS]
    stored.size = torch.Size([2**40, 32])
    stored.chunks = [ChunkStorageMetadata(torch.Size([0, 0]), stored.size)]


def other_shape(index):
    """That of the file's part, turned around: the numbers are as many."""
    stored = index.state_dict_metadata[EMBEDDINGS]
    stored.size = torch.Size(reversed(stored.size))
    for chunk in stored.chunks:
        key = type(place_of(index, EMBEDDINGS))
        place = index.storage_data.pop(key(EMBEDDINGS, chunk.offsets))
        chunk.offsets, chunk.sizes = torch.Size(reversed(chunk.offsets)), torch.Size(reversed(chunk.sizes))
        index.storage_data[key(EMBEDDINGS, chunk.offsets)] = place


def unplaced(index):
    del index.storage_data[place_of(index, EMBEDDINGS)]


def misplaced(index):
    place = place_of(index, EMBEDDINGS)
    index.storage_data[type(place)(EMBEDDINGS, torch.Size([1, 1]))] = index.storage_data.pop(place)


def renamed(file_name):
    def change(index):
        index.storage_data[place_of(index, EMBEDDINGS)].relative_path = file_name

    return change


def compressed(index):
    index.storage_data[place_of(index, EMBEDDINGS)].transform_descriptors = ["stream.zstd"]


def wrong_type(index):
    index.state_dict_metadata[EMBEDDINGS].properties.dtype = "float32"


def no_numbers(index):
    stored, key = index.state_dict_metadata[EMBEDDINGS], place_of(index, EMBEDDINGS)
    place = type(key)(EMBEDDINGS)
    object.__setattr__(place, "offset", ("a", "b"))
    index.storage_data[place] = index.storage_data[key]
    stored.chunks[0].offsets = ("a", "b")


def no_shape(index):
    index.state_dict_metadata[EMBEDDINGS].size = ("a", "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_numbers, "is not an index as torch writes it"),
        (no_shape, "is not an index as torch writes it"),
        (hole, rf"{EMBEDDINGS} in .*: its parts do not cover shape \[131, 32\] exactly once \(2080 elements\)"),
        (overlapping, r"do not cover shape \[131, 32\] exactly once \(4192 elements\)"),
        (shifted, r"do not cover shape \[131, 32\] exactly once \(4192 elements\)"),
        (beyond, r"do not cover shape \[130, 32\]"),
        (absurd_size, rf"puts {EMBEDDINGS} at byte \d+ of __0_0\.distcp, where it does not fit"),
        (unplaced, rf"lacks a part of {EMBEDDINGS}, which has 2"),
        (misplaced, rf"lacks a part of {EMBEDDINGS}, at \[0, 0\]"),
        (renamed("../secret.distcp"), r"names '\.\./secret\.distcp', which is not a \.distcp file beside it"),
        (renamed("/etc/passwd"), "names '/etc/passwd', which is not"),
        (renamed(".metadata"), r"names '\.metadata', which is not a \.distcp file"),
        (renamed("elsewhere.distcp"), r"names elsewhere\.distcp, which is missing"),
        (compressed, rf"says that {EMBEDDINGS} is encoded"),
        (wrong_type, "is not an index as torch writes it"),
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


def test_files_of_another_save(copy):
    index = read_index(copy)
    other_shape(index)
    write_index(copy, index)
    tensors = read_dcp(copy, weights_only=True)
    with pytest.raises(ConversionError, match=r"a part is torch.float32 \[66, 32\], the index says .* \[32, 66\]"):
        tensors[EMBEDDINGS].read()


def test_safetensors_shards_that_are_wrong(saved, tmp_path):
    whole = saved / "ours"
    first, second = sorted((saved / "safetensors").glob("*.safetensors"))
    for number, kept in enumerate((first, second)):
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copy(kept, folder)
        with pytest.raises(ConversionError, match=r"do not cover shape|the config says"):
            open_checkpoint(folder, config=whole)
    shutil.copytree(saved / "safetensors", tmp_path / "twice")
    shutil.copy(first, tmp_path / "twice" / first.name.replace("00001-model", "00003-model"))
    with pytest.raises(ConversionError, match=r"do not cover shape .* exactly once"):
        open_checkpoint(tmp_path / "twice", config=whole)
    (tmp_path / "plain").mkdir()
    shutil.copy(whole / "model.safetensors", tmp_path / "plain" / first.name)
    with pytest.raises(
        ConversionError, match=rf"{re.escape(first.name)} does not say which parts of tensors it holds"
    ):
        open_checkpoint(tmp_path / "plain", config=whole)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ("[1e999]", "does not say which parts"),
        ("[0.5]", "does not say which parts"),
        ("3", "does not say which parts"),
        ("[-1]", "do not cover shape"),
        ("[1]", "do not cover shape"),
        ("[0, 0]", "do not cover shape"),
        ("[]", "do not cover shape"),
        (str(2**80), "does not say which parts"),
        (f"[{2**80}]", "do not cover shape"),
    ],
)
def test_offsets_that_are_wrong(tmp_path, offsets, message):
    path = tmp_path / "shard-00001-model-00001-of-00001.safetensors"
    save_file({"a": torch.ones(3)}, path, {"DCP_SHARDING_INFO": f'{{"a": {{"saved_offsets": {offsets}}}}}'})
    with pytest.raises(ConversionError, match=message):
        read_dcp(tmp_path, weights_only=False)


def test_which_shards(saved, tmp_path):
    trainer = shutil.copytree(saved / "checkpoint-3", tmp_path / "checkpoint-3")
    assert find_dcp_folder(trainer) == trainer / "pytorch_model_fsdp_0"
    assert find_dcp_folder(trainer / "pytorch_model_fsdp_0") == trainer / "pytorch_model_fsdp_0"
    assert find_dcp_folder(saved / "ours") is None and find_dcp_folder(tmp_path) is None
    (trainer / "model.safetensors").write_bytes((saved / "stock" / "model.safetensors").read_bytes())
    assert find_dcp_folder(trainer) is None  # merged already, and no pickle
    (trainer / "model.safetensors").unlink()
    shutil.copytree(trainer / "pytorch_model_fsdp_0", trainer / "pytorch_model_fsdp_1")
    with pytest.raises(ConversionError, match=r"2 models \(pytorch_model_fsdp_0, pytorch_model_fsdp_1\)"):
        find_dcp_folder(trainer)


# ---- Pickles that ask for more than tensors ----


class Malicious:
    """Unpickled by Python, it calls `function`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("function", [os.system, eval, torch.load, torch.hub.load, getattr, torch.nn.Linear])
def test_an_index_that_runs_code_is_refused_by_name(copy, tmp_path, function):
    marker = tmp_path / "it_ran"
    index = read_index(copy)
    argument = f"__import__('pathlib').Path({str(marker)!r}).touch()" if function is eval else f"touch {marker}"
    index.planner_data = Malicious(function, argument)
    write_index(copy, index)
    name = f"{'posix' if function is os.system else function.__module__}.{function.__name__}"
    with pytest.raises(ConversionError, match=rf"\.metadata asks for {name}, which torch does not write there"):
        read_dcp(copy, weights_only=True)
    assert not marker.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"\x80\x04N.",
        b"\x80\x04}.",
        b"garbage",
        b"\x80\x04Nr\xff\xff\xff\x7f.",  # a memo of 2^31 entries, 32 GB in C
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # 2^63 bytes
        b"\x80\x04\x8c\x05torch\x8c\x04Size\x93)R.",
        b"\x80\x04\x8c\x05torch\x8c\x04Size\x93N}\x8c\x01ak\x01s\x86b.",  # sets an attribute of the class
        b"\x80\x04\x82\x01.",
        b"\x80\x02Q.",
    ],
)
def test_an_index_that_is_none(tmp_path, data):
    (tmp_path / ".metadata").write_bytes(data)
    with pytest.raises(ConversionError, match=r"\.metadata is not an index as torch writes it"):
        read_dcp(tmp_path, weights_only=True)


NESTED = b"K\x01" + b"2\x86" * 60  # each tuple holds the one before twice: 2^60 steps to hash, compare or print
BOMBS = {
    "a key": b"\x80\x04}" + NESTED + b"K\x01s.",
    "keys": b"\x80\x04}(" + NESTED + b"K\x01u.",
    "a set": b"\x80\x04\x8f(" + NESTED + b"\x90.",
    "a frozen set": b"\x80\x04(" + NESTED + b"\x91.",
    "a dictionary": b"\x80\x04(" + NESTED + b"K\x01d.",
    "an ordered one": b"\x80\x04\x8c\x0bcollections\x8c\x0bOrderedDict\x93]" + NESTED + b"K\x01\x86a\x85R.",
    "bytes": b"\x80\x05\x96" + (2**36).to_bytes(8, "little") + b".",
    "one size, often": (
        b"\x80\x04(%bt\x94\x8c\x05torch\x8c\x04Size\x93\x94%b." % (b"K\x01" * 50_000, b"h\x01h\x00\x85R" * 50_000)
    ),
}  # fmt: skip


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", BOMBS)
def test_pickles_that_would_never_end(tmp_path, name):
    """Neither as DCP's index nor within torch.save's archive; some would take hours, some all memory."""
    (tmp_path / ".metadata").write_bytes(BOMBS[name])
    with pytest.raises(ConversionError, match=r"\.metadata is not an index as torch writes it \("):
        read_dcp(tmp_path, weights_only=True)
    write_archive(tmp_path / "pytorch_model.bin", {"archive/data.pkl": BOMBS[name]})
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin is not a file of tensors alone: (Type|Key)Error"):
        read_pickles(find_pickles(tmp_path))


def write_archive(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def nested_tuple() -> tuple:
    value: tuple = (1,)
    for _ in range(60):
        value = (value, value)
    return value


def nested_place(index):
    index.storage_data[place_of(index, EMBEDDINGS)].relative_path = nested_tuple()


def nested_encoding(index):
    index.storage_data[place_of(index, EMBEDDINGS)].transform_descriptors = nested_tuple()


def nested_name(index):
    object.__setattr__(place_of(index, EMBEDDINGS), "fqn", nested_tuple())


def nested_offsets(index):
    object.__setattr__(place_of(index, EMBEDDINGS), "offset", nested_tuple())


def many_parts(index):
    """One list of parts for all tensors, each compared with every other."""
    parts = index.state_dict_metadata[EMBEDDINGS].chunks * 50_000
    for stored in index.state_dict_metadata.values():
        stored.chunks = parts


@pytest.mark.timeout(120)
@pytest.mark.parametrize("change", [nested_place, nested_encoding, nested_name, nested_offsets, many_parts])
def test_indexes_whose_parts_would_never_end(copy, change):
    index = read_index(copy)
    change(index)
    with (copy / ".metadata").open("wb") as file:
        pickler = pickle._Pickler(file)  # the one in C knows no way to pickle a tuple 60 deep but recursion
        pickler.dump(index)
    with pytest.raises(ConversionError, match=r"\.metadata (names|says that|is not an index|lacks a part)"):
        read_dcp(copy, weights_only=True)


def test_archives_that_would_inflate(saved, tmp_path):
    """Refused by their directories: what torch.save writes is never compressed, and no two entries share bytes."""
    path, bomb = tmp_path / "pytorch_model.bin", BOMBS["a key"][:-1] + b"0" * 2**26
    write_archive(path, {"archive/data.pkl": bomb}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**17
    with pytest.raises(ConversionError, match=r"alone: ValueError: has 'archive/data.pkl' compressed, which torch"):
        read_pickles([path])

    torch.save({"a": torch.zeros(2**18)}, path)  # as torch does it, and inflated in another way each
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    inflated = tmp_path / "pytorch_model-00001-of-00001.bin"
    write_archive(inflated, entries, zipfile.ZIP_DEFLATED)
    with pytest.raises(ConversionError, match=r"has 'pytorch_model/data.pkl' compressed"):
        read_pickles([inflated])
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
    with pytest.raises(ConversionError, match=r"asks for \S+\.bytearray, which is no tensor's"):
        read_pickles([path])


def write_pickled(folder: Path, tensors: dict, num_files: int = 1, **kwargs) -> Path:
    folder.mkdir()
    for number in range(num_files):
        name = f"pytorch_model-{number + 1:05}-of-{num_files:05}.bin" if num_files > 1 else "pytorch_model.bin"
        torch.save({key: tensors[key] for key in list(tensors)[number::num_files]}, folder / name, **kwargs)
    (folder / "optimizer.bin").write_bytes(b"not ours to read")
    (folder / "config.json").write_text(json.dumps(OURS))
    return folder


@pytest.mark.parametrize("kind", ["one file", "three files", "fused", "fsdp", "wrapped"])
def test_pickled_weights(saved, tmp_path, kind):
    expected = expected_tensors(saved, "fsdp2")
    stored = fused(expected, OURS) if kind in ("fused", "fsdp") else expected
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


def test_safetensors_are_preferred_to_pickles(saved, tmp_path):
    folder = write_pickled(tmp_path / "both", {"wrong": torch.ones(1)})
    assert find_pickles(folder) == [folder / "pytorch_model.bin"]
    shutil.copy(saved / "ours" / "model.safetensors", folder)
    assert find_pickles(folder) == []
    assert open_checkpoint(folder, weights_only=True).form == "hub"


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused(tmp_path, zipped):
    marker = tmp_path / "it_ran"
    folder = write_pickled(tmp_path / "bad", {})
    state_dict = {"model.norm.weight": torch.ones(3), "x": Malicious(os.system, f"touch {marker}")}
    torch.save(state_dict, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    message = "posix.system" if zipped else "torch's format before 1.6"
    with pytest.raises(ConversionError, match=rf"pytorch_model\.bin .*{re.escape(message)}"):
        read_pickles(find_pickles(folder))
    assert not marker.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert marker.exists()  # it would have run


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"epoch": 3}, r"epoch in .*pytorch_model\.bin is a int, no tensor"),
        ({"state_dict": {"a": torch.ones(1)}}, "state_dict in .* is a dict, no tensor"),
        ({3: torch.ones(1)}, "an entry 3, whose name is no text"),
        ([torch.ones(1)], "holds a list"),
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
        with pytest.raises(ConversionError, match=r"pytorch_model\.bin is (damaged|not a file of tensors alone)"):
            read_pickles([tmp_path / "pytorch_model.bin"])
