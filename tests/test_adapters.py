"""Adapters merged into checkpoints of any form."""

import json
import re

import pytest
import torch
from checkpoints import fused, released_config, released_tensors, write_checkpoint, write_release
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from conversion import ConversionError, convert, open_checkpoint
from conversion.adapters import find_base, merge_adapter
from modeling_grin import GrinMoeForCausalLM, patterns_grinmoe
from modeling_grin.lora import add_lora

LAYERS, EXPERTS, HIDDEN, FFN, RANK, ALPHA = 2, 3, 32, 24, 2, 5
CONFIG = released_config(torch_dtype="float32", num_local_experts=EXPERTS, router_jitter_noise=0.1)
IDS = torch.randint(0, 131, (2, 24), generator=torch.Generator().manual_seed(3))
EXPERT_NAMES = [f"model.layers.{n}.block_sparse_moe.experts.{e}.{w}" for n in range(LAYERS) for e in range(EXPERTS)
                for w in ("w1", "w2", "w3")]  # fmt: skip
OTHER_NAMES = [f"model.layers.{n}.{module}" for n in range(LAYERS)
               for module in ("block_sparse_moe.gate", *(f"self_attn.{p}_proj" for p in "qkvo"))]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("base"), CONFIG, released_tensors(CONFIG))


def train_adapter(base, folder, *, linear=False, dtype="float32", **settings):
    """An adapter that does something, saved by peft; the adapted model."""
    torch.manual_seed(0)
    layout = {"experts_implementation": "linear"} if linear else {}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **layout)
    model = add_lora(model, **{"router": True, "r": RANK, "lora_alpha": ALPHA, **settings})
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(folder)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def edit(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def factors(weights, name):
    """A and B of a matrix, `[r, in]` and `[out, r]`, read from peft's file without the code under test; float64."""
    if f"base_model.model.{name}.lora_A.weight" in weights:
        return tuple(weights[f"base_model.model.{name}.lora_{factor}.weight"].double() for factor in "AB")
    experts, expert, part = re.fullmatch(r"(.*\.experts)\.(\d+)\.(w\d)", name).groups()
    prefix = f"base_model.model.{experts}." + ("" if part == "w2" else "base_layer.")
    a, b = (weights[f"{prefix}lora_{factor}.weight"].double() for factor in "AB")
    rank = len(a) // EXPERTS
    a = a[int(expert) * rank : (int(expert) + 1) * rank]
    b = torch.stack([b[:, r * EXPERTS + int(expert)] for r in range(rank)], dim=1)
    return a, {"w1": b[:FFN], "w3": b[FFN:], "w2": b}[part]


@pytest.mark.parametrize(("form", "linear"), [("hub", False), ("fused", True)])
def test_merged_tensors_are_sums_of_weights_and_products(base, tmp_path, linear, form):
    model = train_adapter(base, tmp_path / "adapter", linear=linear)
    tensors = load_file(base / "model.safetensors")
    source = base
    if form == "fused":
        source = write_checkpoint(tmp_path / "base", CONFIG, fused(tensors, CONFIG))
    checkpoint = merge_adapter(tmp_path / "adapter", open_checkpoint(source), None)
    assert (checkpoint.form, checkpoint.path) == ("adapter", source)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name in EXPERT_NAMES + OTHER_NAMES:
        a, b = factors(weights, name)
        change = ALPHA / RANK * b @ a
        assert change.norm() > 0.01
        tensors[f"{name}.weight"] = (tensors[f"{name}.weight"].double() + change).float()
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in checkpoint.tensors.items():
        torch.testing.assert_close(tensor.read(), tensors[name], rtol=1e-6, atol=1e-6)

    convert(tmp_path / "adapter", tmp_path / "merged", to="hub", base=source)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)


def test_a_merge_that_loses_the_adapter_is_refused(base, tmp_path):
    """B so small that bfloat16 has no place for W + BA."""
    train_adapter(base, tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    weights = {name: 1e-4 * tensor if "lora_B" in name else tensor for name, tensor in weights.items()}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ConversionError, match=rf"{tmp_path}: the merge is refused: .* loses"):
        merge_adapter(tmp_path, open_checkpoint(base), torch.bfloat16)
    merge_adapter(tmp_path, open_checkpoint(base), None)


def test_a_head_that_was_trained_in_full(tmp_path):
    """`modules_to_save` takes the place of the base's."""
    config = released_config(torch_dtype="float32", num_local_experts=EXPERTS, id2label={0: "a", 1: "b", 2: "c"})
    tensors = released_tensors(config)
    tensors = {name: tensor for name, tensor in tensors.items() if "lm_head" not in name}
    base = write_checkpoint(tmp_path / "base", config, {**tensors, "score.weight": torch.randn(3, HIDDEN)})
    model = add_lora(AutoModelForSequenceClassification.from_pretrained(base), experts=False)
    head = torch.randn(3, HIDDEN)
    model.base_model.model.score.modules_to_save["default"].weight.data.copy_(head)
    model.save_pretrained(tmp_path / "adapter")
    merged = merge_adapter(tmp_path / "adapter", open_checkpoint(base), None)
    assert torch.equal(merged.tensors["score.weight"].read(), head)


def drop(part):
    def change(weights):
        del weights[next(name for name in weights if part in name)]

    return change


def cut(weights):
    weights.update({name: tensor[:, :-1] for name, tensor in weights.items() if "v_proj.lora_A" in name})


def add_tensor(weights):
    weights["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"] = torch.ones(RANK, FFN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("q_proj.lora_B"), r"1 tensor\(s\) do not fit .*: base_model\S*q_proj\.lora_B\.weight is missing"),
        (drop("experts.base_layer.lora_A"), r"experts\.base_layer\.lora_A\.weight is missing"),
        (add_tensor, r"mlp\.down_proj\S+ in .* is not part of the model"),
        (cut, r"v_proj\.lora_A\.weight in .* has shape \[2, 31\], the config says \[2, 32\]"),
    ],
)
def test_an_adapter_that_fits_in_part_is_refused(base, tmp_path, change, message):
    train_adapter(base, tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    change(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ConversionError, match=rf"(?s){tmp_path}: .*{message}"):
        merge_adapter(tmp_path, open_checkpoint(base), None)


def test_other_files_of_adapters(base, tmp_path, monkeypatch):
    train_adapter(base, tmp_path / "adapter")
    assert find_base(tmp_path / "adapter", None) == base
    assert find_base(tmp_path / "adapter", tmp_path) == tmp_path
    edit(tmp_path / "adapter", base_model_name_or_path="microsoft/GRIN-MoE")
    with pytest.raises(ConversionError, match="microsoft/GRIN-MoE, is not a folder: give it with --base"):
        find_base(tmp_path / "adapter", None)
    edit(tmp_path / "adapter", target_modules=["nothing"], target_parameters=None)
    with pytest.raises(ConversionError, match=f"{tmp_path}/adapter does not fit {base}: Target modules"):
        merge_adapter(tmp_path / "adapter", open_checkpoint(base), None)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    torch.save(weights, tmp_path / "adapter" / "adapter_model.bin")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"has no adapter_model\.safetensors"):
        merge_adapter(tmp_path / "adapter", open_checkpoint(base), None)


def test_a_config_that_names_code_is_refused(base, tmp_path, monkeypatch):
    (tmp_path / "named_by_adapter.py").write_text(f"open({str(tmp_path / 'it_ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    train_adapter(base, tmp_path / "adapter")
    edit(tmp_path / "adapter", megatron_config={"a": 1}, megatron_core="named_by_adapter")
    with pytest.raises(ConversionError, match=r"(?s)does not fit .*named_by_adapter.* security risk"):
        merge_adapter(tmp_path / "adapter", open_checkpoint(base), None)
    assert not (tmp_path / "it_ran").exists()


ENDLESS = "((.|.)*)*!"  # twice as long with every character


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": ENDLESS},
        {"rank_pattern": {ENDLESS: 2}},
        {"modules_to_save": ["lm_head", ENDLESS]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": [ENDLESS]},
    ],
    ids=lambda change: list(change)[-1],
)
def test_expressions_that_never_end(base, tmp_path, monkeypatch, change):
    """Merging and `load_adapter` refuse them, before anything is loaded, and accept others."""
    folder = tmp_path / "adapter"
    train_adapter(base, folder)
    if "rank_pattern" in change:  # a harmless one in all fields
        edit(folder, target_modules=r".*\.[qkvo]_proj", rank_pattern={r"q_pro.+": 2}, modules_to_save=["lm_hea[d]"])
        model = GrinMoeForCausalLM.from_pretrained(base)
        patterns_grinmoe.check_patterns(
            json.loads((folder / "adapter_config.json").read_text()), patterns_grinmoe.adaptable_names(model), folder
        )
    monkeypatch.setattr(patterns_grinmoe, "SECONDS", 0.5)
    edit(folder, **change)
    message = re.escape(f"{ENDLESS!r} in {list(change)[-1]} was not matched against the model's names in 0.5 seconds")
    with pytest.raises(ConversionError, match=message):
        convert(folder, tmp_path / "merged", to="hub", base=base)
    assert not (tmp_path / "merged").exists()
    model = GrinMoeForCausalLM.from_pretrained(base)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(str(folder))


def test_a_base_of_mixed_dtypes_needs_one(tmp_path):
    """Merging computes in one dtype; which, is the user's to say."""
    base, config, tensors = write_release(tmp_path / "base", torch_dtype="float32")
    add_lora(GrinMoeForCausalLM.from_pretrained(base), r=2).save_pretrained(tmp_path / "lora")
    tensors = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in tensors.items()}
    mixed = write_checkpoint(tmp_path / "mixed", config, tensors)
    with pytest.raises(ConversionError, match=r"torch.bfloat16, torch.float32: choose one with --dtype"):
        convert(tmp_path / "lora", tmp_path / "merged", to="hub", base=mixed)
