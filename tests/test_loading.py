"""Checkpoints in and out: every tensor, bit for bit, or an error that names what is wrong."""

import pickle
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from checkpoints import changed, fused, released_config, released_tensors, write_checkpoint
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.core_model_loading import revert_weight_conversion
from transformers.trainer_utils import load_sharded_checkpoint

from benchmarks.measure import allocations
from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM

CONFIG = released_config()
TENSORS = released_tensors(CONFIG)
EXPERT = "model.layers.1.block_sparse_moe.experts.3"
EXPERTS = EXPERT.rpartition(".")[0]
IDS = torch.arange(2, 26).reshape(2, 12)
FUSED = fused(TENSORS, CONFIG)
DOWN = f"{EXPERTS}.down_proj"


def read_files(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def assert_holds(model, tensors, config=CONFIG):
    """The model's parameters are the file's tensors; it has no others."""
    assert_same_tensors(dict(model.state_dict()), fused(tensors, config))


def logits(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A checkpoint as the release has it: five shards with an index, each layer's experts in every shard."""
    return write_checkpoint(tmp_path_factory.mktemp("released"), CONFIG, TENSORS, num_shards=5)


@pytest.fixture(scope="module")
def in_memory():
    """The same model, filled without any checkpoint code."""
    model = AutoModelForCausalLM.from_config(GrinMoeConfig.from_dict(dict(CONFIG)), dtype=torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(FUSED[name])
    return model


# Loading


def test_released_checkpoint(released, in_memory):
    model, info = AutoModelForCausalLM.from_pretrained(released, output_loading_info=True)
    assert type(model) is GrinMoeForCausalLM and not model.training
    assert type(model.config) is GrinMoeConfig and model.config.dtype == torch.bfloat16
    assert not any(info.values()), info
    assert_holds(model, TENSORS)
    assert torch.equal(logits(model), logits(in_memory))


@pytest.mark.parametrize("layout", ["released", "fused"])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("architecture", ["GRIN-MoE", "GRINMoEForCausalLM"])
def test_layouts(layout, num_shards, architecture, tmp_path):
    tensors = TENSORS if layout == "released" else fused(TENSORS, CONFIG)
    config = {**CONFIG, "architectures": [architecture]}
    folder = write_checkpoint(tmp_path, config, tensors, num_shards)
    assert_holds(AutoModelForCausalLM.from_pretrained(folder), TENSORS)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"lm_head_bias": False, "attention_bias": False, "head_dim": 6},
        {"num_local_experts": 11},  # "10" sorts before "2"
    ],
    ids=str,
)
def test_variants(changes, tmp_path):
    config = released_config(**changes)
    tensors = released_tensors(config)
    model = AutoModelForCausalLM.from_pretrained(write_checkpoint(tmp_path / "from", config, tensors, num_shards=2))
    expected = dict(tensors)
    if config["tie_word_embeddings"]:
        assert model.lm_head.weight is model.model.embed_tokens.weight
        expected["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    assert_holds(model, expected, config)
    model.save_pretrained(tmp_path / "to")
    assert_same_tensors(read_files(tmp_path / "to"), tensors)


PARTS = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")


@pytest.mark.parametrize("layout", ["released", "fused"])
@pytest.mark.parametrize(
    ("device_map", "max_memory", "on_disk"),
    [
        ({"": "cpu"}, None, set()),
        ("auto", None, set()),
        ("auto", {"cpu": "40KB"}, {""}),
        ({**dict.fromkeys(PARTS, "cpu"), "model.layers.1": "disk"}, None, {"model.layers.1"}),
        ({"": "disk"}, None, {""}),
    ],
    ids=["cpu", "auto", "auto-small-memory", "cpu-and-disk", "disk"],
)
def test_device_maps(layout, device_map, max_memory, on_disk, in_memory, tmp_path):
    tensors = TENSORS if layout == "released" else fused(TENSORS, CONFIG)
    folder = write_checkpoint(tmp_path / "from", CONFIG, tensors, num_shards=3)
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map=device_map, max_memory=max_memory, offload_folder=tmp_path / "offload"
    )
    placed = getattr(model, "hf_device_map", {})  # transformers sets none where all is on one device
    assert {name for name, device in placed.items() if device == "disk"} == on_disk
    assert torch.equal(logits(model), logits(in_memory))
    # And out again, whole and in shards; the offloaded tensors are read back.
    for max_shard_size in ("1GB", "20KB"):
        model.save_pretrained(tmp_path / max_shard_size, max_shard_size=max_shard_size)
        assert_same_tensors(read_files(tmp_path / max_shard_size), TENSORS)


def test_experts_are_copied_once(tmp_path):
    """Out of the mapped files into the fused parameters; a stack of `w1` on the way is as large as `down_proj`."""
    folder = write_checkpoint(tmp_path, CONFIG, TENSORS, num_shards=3)
    sizes = allocations(lambda: AutoModelForCausalLM.from_pretrained(folder)).tolist()
    matrix = 24 * 32 * 2  # bytes
    assert [sizes.count(matrices * matrix) for matrices in (1, 6, 12)] == [0, 2, 2]


# Saving


def test_experts_are_saved_without_a_copy(in_memory):
    fused_experts = {
        tensor.untyped_storage().data_ptr() for name, tensor in in_memory.state_dict().items() if ".experts." in name
    }
    saved = revert_weight_conversion(in_memory, in_memory.state_dict())
    assert_same_tensors(saved, TENSORS)
    experts = [tensor for name, tensor in saved.items() if ".experts." in name]
    assert {tensor.untyped_storage().data_ptr() for tensor in experts} == fused_experts
    assert all(tensor.is_contiguous() for tensor in experts), "which writing would copy"


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_save_writes_the_released_layout(max_shard_size, dtype, tmp_path):
    """Of a model that was made from a config, and of what was saved and loaded."""
    config = released_config(torch_dtype=dtype)
    tensors = released_tensors(config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert not hasattr(model, "_weight_conversions"), "made without from_pretrained"
    model.load_state_dict(fused(tensors, config))
    for folder in (tmp_path / "first", tmp_path / "second"):
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        assert len(list(folder.glob("*.safetensors"))) > 1 or max_shard_size == "1GB"
        assert_same_tensors(read_files(folder), tensors)
        model = AutoModelForCausalLM.from_pretrained(folder)
    first, second = ((tmp_path / trip / "config.json").read_text() for trip in ("first", "second"))
    assert first == second


# State dicts


@pytest.fixture
def fresh():
    return GrinMoeForCausalLM(GrinMoeConfig.from_dict(dict(CONFIG))).to(torch.bfloat16)


@pytest.mark.parametrize("layout", ["released", "fused"])
@pytest.mark.parametrize(("device", "assign"), [("cpu", False), ("cpu", True), ("meta", True)])
def test_load_state_dict(layout, device, assign):
    """`assign=True` keeps the checkpoint's dtype, and fills models made on the meta device."""
    with torch.device(device):
        model = GrinMoeForCausalLM(GrinMoeConfig.from_dict(dict(CONFIG)))  # float32
    given = dict(TENSORS) if layout == "released" else fused(TENSORS, CONFIG)
    names = list(given)
    model.load_state_dict(given, strict=True, assign=assign)
    assert_holds(model if assign else model.to(torch.bfloat16), TENSORS)
    assert list(given) == names, "the caller's dict has changed"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{EXPERT}.w1.weight": None}, rf'Missing key.*"{EXPERT}.w1.weight"'),
        ({f"{EXPERT}.w3.weight": torch.ones(24, 31)}, rf"size mismatch for {EXPERT}.w3.weight: \(24, 31\)"),
        ({f"{EXPERT[:-1]}6.w1.weight": torch.ones(24, 32)}, rf'Unexpected key.*"{EXPERT[:-1]}6.w1.weight"'),
        ({f"{EXPERT}.w4.weight": torch.ones(24, 32)}, rf'Unexpected key.*"{EXPERT}.w4.weight"'),
        ({"model.norm.bias": None}, r'Missing key.*"model.norm.bias"'),
        ({EXPERTS: None}, rf'Missing key.*"{EXPERTS}.gate_up_proj"'),
    ],
)
def test_load_state_dict_names_what_is_wrong(change, message, fresh):
    with pytest.raises(RuntimeError, match=message):
        fresh.load_state_dict(changed(TENSORS, change))


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize(
    "lost", [f"{EXPERT}.w1.weight", "model.layers.0.block_sparse_moe.gate.weight", "lm_head.bias"]
)
def test_what_a_non_strict_load_leaves_out_is_an_error_when_the_model_is_used(fresh, lost, num_parts):
    """Trainer only warns of it when it resumes, from one file or shard by shard."""
    names = [name for name in TENSORS if name != lost]
    for part in range(num_parts):
        fresh.load_state_dict({name: TENSORS[name] for name in names[part::num_parts]}, False)
    with pytest.raises(ValueError, match=rf"1 tensor\(s\) of GrinMoeForCausalLM .*: {lost}\. "):
        logits(fresh)
    fresh.load_state_dict({lost: TENSORS[lost]}, strict=False)
    assert_holds(fresh, TENSORS)
    logits(fresh)


def test_load_sharded_checkpoint(released, fresh):
    """What Trainer resumes with: shard by shard, not strict. A partial load has to be said to be wanted."""
    load_sharded_checkpoint(fresh, released, strict=False)
    assert_holds(fresh, TENSORS)
    other = GrinMoeForCausalLM(fresh.config)
    other.load_state_dict({f"{EXPERT}.w1.weight": TENSORS[f"{EXPERT}.w1.weight"]}, strict=False)
    with pytest.raises(ValueError, match="kept their old values"):
        logits(other)
    other.load_state_dict(other.state_dict())
    logits(other)


def test_a_non_strict_load_refuses_what_the_model_has_no_place_for(fresh):
    given = {**TENSORS, f"{EXPERT}.gate_proj.weight": torch.ones(24, 32)}
    with pytest.raises(ValueError, match=rf"GrinMoeForCausalLM lacks: {EXPERT}.gate_proj.weight"):
        fresh.load_state_dict(given, strict=False)
    fresh.load_state_dict({**TENSORS, "score.weight": torch.ones(2, 32)}, strict=False)  # another task's head
    logits(fresh)


def test_classification_with_eos_as_padding(tmp_path):
    """The mask decides: a text that ends with the padding token is classified on it, masked tokens never are."""
    config = released_config(torch_dtype="float32", num_labels=3, pad_token_id=0, eos_token_id=1)
    tensors = {**released_tensors(config), "score.weight": torch.randn(3, 32)}
    model = AutoModelForSequenceClassification.from_pretrained(write_checkpoint(tmp_path, config, tensors))
    text = torch.tensor([[5, 6, 7, 0]])
    for mask, last in (([1, 1, 1, 1], 3), ([1, 1, 1, 0], 2), ([0, 0, 1, 1], 3), ([0, 1, 1, 0], 2), (None, 2)):
        given = {"attention_mask": mask and torch.tensor([mask])}
        with torch.no_grad():
            expected = model.score(model.model(text, **given).last_hidden_state)[:, last]
        torch.testing.assert_close(logits(model, text, **given), expected)


def test_parameter_counts_are_the_papers():
    with torch.device("meta"):
        model = GrinMoeForCausalLM(GrinMoeConfig())
    attention = 2 * (4096 * 4096 + 4096) + 2 * (1024 * 4096 + 1024)  # q, o; k, v
    expert = 3 * 4096 * 6400
    layer = attention + 2 * 2 * 4096 + 16 * 4096 + 16 * expert  # with two norms and the router
    ends = 2 * 32064 * 4096 + 32064 + 2 * 4096  # embedding, head with bias, last norm
    assert model.num_parameters() == 32 * layer + ends == 41_873_153_344
    assert 32 * (layer - 14 * expert) + ends == 6_640_999_744
    assert model.state_dict().keys() == dict(model.named_parameters()).keys(), "no buffer is saved"


def test_key_mapping_is_applied_before_names_are_checked(tmp_path):
    foreign = {name.replace("model.", "transformer.", 1): tensor for name, tensor in TENSORS.items()}
    folder = write_checkpoint(tmp_path, CONFIG, foreign, num_shards=2)
    model = GrinMoeForCausalLM.from_pretrained(folder, key_mapping={"^transformer.": "model."})
    assert_same_tensors(dict(model.state_dict()), fused(TENSORS, CONFIG))
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight is missing"):
        GrinMoeForCausalLM.from_pretrained(folder)


# Errors


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        ({"model.layers.1.block_sparse_moe.gate": None}, {}, r"block_sparse_moe\.gate\.weight is missing"),
        ({f"{EXPERT}.w1": None}, {}, rf"{EXPERTS}\.gate_up_proj: an expert lacks a matrix: there are 5 .*w1.* and 6 "),
        ({EXPERT: None}, {}, rf"2 tensor.*{EXPERTS}\.gate_up_proj has shape \[5, 48, 32\], the config says \[6"),
        ({EXPERTS: None}, {}, r"2 tensor.*layers\.1.*experts\.gate_up_proj is missing"),
        ({"lm_head.weight": None}, {}, r"lm_head\.weight is missing"),
        ({"model.embed_tokens": None}, {"tie_word_embeddings": True}, r"model\.embed_tokens\.weight is missing"),
        ({"model.norm.weight": torch.ones(5)}, {}, r"norm\.weight has shape \[5\], the config says \[32\]"),
        ({f"{EXPERT}.w1.weight": torch.ones(32, 24)}, {}, rf"{EXPERTS}\.gate_up_proj: .*different sizes.*\(32, 24\)"),
        ({f"{EXPERT[:-1]}6.w1.weight": torch.ones(24, 32)}, {}, rf"{EXPERTS}\.gate_up_proj: an expert lacks a matrix"),
        ({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, {}, r"self_attn\.q_norm\.weight is not part"),
        ({}, {"attention_bias": False}, r"8 tensor.*self_attn\.\w_proj\.bias is not part of the model"),
        ({}, {"num_hidden_layers": 3}, r"model\.layers\.2\.input_layernorm\.weight is missing"),
        ({}, {"num_local_experts": 7}, r"experts\.down_proj has shape \[6, 32, 24\], the config says \[7, 32, 24\]"),
        ({}, {"vocab_size": 132}, r"embed_tokens\.weight has shape \[131, 32\], the config says \[132, 32\]"),
        ({DOWN: FUSED[DOWN].mT.contiguous()}, {}, rf"{DOWN} has shape \[6, 24, 32\], the config says \[6, 32, 24\]"),
        ({DOWN: None}, {}, rf"{DOWN} is missing"),
    ],
    ids=lambda value: value.replace("\\", "") if isinstance(value, str) else "",
)
def test_tensors_that_do_not_fit(tensors, changes, message, tmp_path):
    given = changed(FUSED if DOWN in tensors else TENSORS, tensors)
    folder = write_checkpoint(tmp_path, {**CONFIG, **changes}, given, num_shards=3)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)
    # The option to initialise mis-shaped tensors again is for these alone.
    wants = pytest.raises(ValueError, match=r"missing|not part|lacks a matrix|different sizes")
    with nullcontext() if "has shape" in message else wants:
        AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)


SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", lambda content: content[:-1]),
        (SHARD, lambda content: content[:100]),
        (SHARD, lambda content: b""),
        (SHARD, lambda content: bytes(range(256)) * 20),
        (INDEX, lambda content: content[:-9]),
        (INDEX, lambda content: b"\xff\xfe\x80"),
        (INDEX, lambda content: b"[]"),
        (INDEX, lambda content: b'{"metadata": {}}'),
        (INDEX, lambda content: b'{"metadata": {}, "weight_map": {}}'),
        (INDEX, lambda content: b'{"metadata": {}, "weight_map": ["a"]}'),
        (INDEX, lambda content: b'{"weight_map": {"model.norm.weight": "a.safetensors"}}'),
    ],
)
def test_damaged_files(name, damage, tmp_path):
    folder = write_checkpoint(tmp_path, CONFIG, TENSORS, num_shards=1 if name == "model.safetensors" else 3)
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(ValueError, match=rf"{tmp_path}/{name}: damaged \(\w+: .*\)") as error:
        AutoModelForCausalLM.from_pretrained(folder)
    others = {SHARD, SHARD.replace("2", "1", 1), SHARD.replace("-00002", "-00003"), INDEX} - {name}
    assert not [other for other in others if other in str(error.value)], "files that are whole"


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("use_safetensors", [None, False])
def test_pickles_are_never_read(use_safetensors, tmp_path):
    marker = tmp_path / "marker"
    folder = write_checkpoint(tmp_path / "model", CONFIG, TENSORS)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(marker)))
    options = {} if use_safetensors is None else {"use_safetensors": use_safetensors}
    refused = use_safetensors is False
    message = "use_safetensors=False would load a pickle" if refused else r"no file named model\.safetensors"
    with pytest.raises(ValueError if refused else OSError, match=message):
        AutoModelForCausalLM.from_pretrained(folder, weights_only=False, **options)
    assert not marker.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert marker.exists(), "the bomb works"


@pytest.mark.parametrize("model_type", ["mixtral", "llama", "nonsense"])
def test_another_model_type(model_type, tmp_path):
    folder = write_checkpoint(tmp_path, {**CONFIG, "model_type": model_type}, TENSORS)
    with pytest.raises(ValueError, match=f"model_type='{model_type}'"):
        GrinMoeForCausalLM.from_pretrained(folder)


def test_importing_changes_no_other_model_type():
    """Tables and classes only gain what is named after us."""
    script = """
import importlib
from transformers import conversion_mapping, modeling_utils
from transformers.integrations import moe
from transformers.models.auto import configuration_auto, modeling_auto, tokenization_auto
from transformers.models.llama import modeling_llama
from transformers.models.phimoe import modeling_phimoe

conversion_mapping.get_checkpoint_conversion_mapping("phimoe")  # build it
TABLES = {
    "conversions": conversion_mapping._checkpoint_conversion_mapping_cache,
    "registered conversions": conversion_mapping.USER_REGISTERED_MAPPINGS,
    "attention": modeling_utils.ALL_ATTENTION_FUNCTIONS,
    "experts": moe.ALL_EXPERTS_FUNCTIONS,
}
for module in (configuration_auto, modeling_auto, tokenization_auto):
    for name, value in vars(module).items():
        if "_extra_content" in getattr(value, "__dict__", {}):  # a lazy mapping, and its parts
            TABLES |= {(name, part): table for part, table in vars(value).items() if isinstance(table, dict)}
        elif name.isupper() and isinstance(value, dict | set):
            TABLES[name] = value
for module in (modeling_llama, modeling_phimoe):
    TABLES |= {value: vars(value) for value in vars(module).values() if isinstance(value, type)}


def snapshot():
    return {name: {str(key): table[key] if hasattr(table, "keys") else key for key in table}
            for name, table in TABLES.items()}


before = snapshot()
import modeling_grin
importlib.reload(modeling_grin)
after, changed = snapshot(), set()
for name, table in before.items():
    assert table.items() <= after[name].items(), (name, "something is gone or changed")
    added = after[name].keys() - table.keys()
    assert all("grinmoe" in key.lower() for key in added), (name, added)
    changed |= {name} if added else set()
# The snapshot sees what is meant to be added.
expected = {"conversions", "registered conversions", ("CONFIG_MAPPING", "_extra_content")}
expected |= {(f"MODEL{task}_MAPPING", "_extra_content") for task in ("", "_FOR_CAUSAL_LM")}
assert expected <= changed, changed
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
