"""LoRA: what it adapts, what the adapters compute, and merges that prove themselves."""

import json

import pytest
import torch
from checkpoints import TINY_SIZES, released_config, released_tensors, write_checkpoint
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import Linear
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from modeling_grin import GrinMoeForCausalLM
from modeling_grin.lora import add_lora, merge_lora

LAYERS, EXPERTS, HIDDEN, FFN, RANK = 2, 6, 32, 24, 3
# Trained numbers: rank x (inputs + outputs) of q and o, k and v (half as many heads); of gate_up_proj and down_proj.
ATTENTION = LAYERS * RANK * (2 * (HIDDEN + HIDDEN) + 2 * (HIDDEN + HIDDEN // 2))
FUSED = LAYERS * EXPERTS * RANK * (HIDDEN + 2 * FFN + FFN + HIDDEN)
IDS = torch.randint(0, 131, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Released layout, float32, wide routing noise."""
    config = released_config(torch_dtype="float32", router_jitter_noise=0.1, eos_token_id=2, pad_token_id=0)
    return write_checkpoint(tmp_path_factory.mktemp("base"), config, released_tensors(config))


def adapted_model(checkpoint, *, scale=0.05, lora=None, **overrides):
    """A model with adapters that do something: peft begins with B = 0."""
    torch.manual_seed(0)
    model = add_lora(
        AutoModelForCausalLM.from_pretrained(checkpoint, **overrides),
        **{"router": True, "r": RANK, "lora_alpha": 5, **(lora or {})},
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=scale)
    return model.eval()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def expert_factors(tensors, layer, inner):
    """A `[E, r, in]` and B `[E, out, r]` of an adapter file: A stacks the experts' ranks, B's ranks come first."""
    prefix = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts."
    prefix += "base_layer." if inner else ""
    a, b = tensors[f"{prefix}lora_A.weight"].double(), tensors[f"{prefix}lora_B.weight"].double()
    return a.unflatten(0, (EXPERTS, RANK)), b.unflatten(1, (RANK, EXPERTS)).movedim(-1, 0)


def merged_by_hand(checkpoint, adapter):
    """The released tensors with `W + (lora_alpha / r) B A` for every matrix, expert by expert, in float64."""
    tensors = {name: tensor.double() for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    adapters = load_file(adapter / "adapter_model.safetensors")
    scale = 5 / RANK
    for layer in range(LAYERS):
        for module in [f"self_attn.{name}_proj" for name in "qkvo"] + ["block_sparse_moe.gate"]:
            name = f"model.layers.{layer}.{module}"
            a, b = (adapters[f"base_model.model.{name}.lora_{factor}.weight"].double() for factor in "AB")
            tensors[f"{name}.weight"] += scale * b @ a
        experts = f"model.layers.{layer}.block_sparse_moe.experts"
        fused = f"base_model.model.{experts}.lora_A.weight" in adapters
        for expert in range(EXPERTS):
            if fused:
                (gate_up_a, gate_up_b), (down_a, down_b) = (expert_factors(adapters, layer, i) for i in (True, False))
                gate_up = gate_up_b[expert] @ gate_up_a[expert]
                deltas = {"w1": gate_up[:FFN], "w3": gate_up[FFN:], "w2": down_b[expert] @ down_a[expert]}
            else:
                names = {part: f"base_model.model.{experts}.{expert}.{part}.lora" for part in ("w1", "w2", "w3")}
                deltas = {part: adapters[f"{name}_B.weight"].double() @ adapters[f"{name}_A.weight"].double()
                          for part, name in names.items()}  # fmt: skip
            for part, delta in deltas.items():
                tensors[f"{experts}.{expert}.{part}.weight"] += scale * delta
    return tensors


# ---- What is adapted ----


@pytest.mark.parametrize(
    ("layout", "groups", "expected"),
    [
        ("grouped_mm", {}, {"self_attn": ATTENTION, "experts": FUSED}),
        (
            "eager",
            {"attention": False, "experts": False, "router": True},
            {"gate": LAYERS * RANK * (HIDDEN + EXPERTS)},
        ),
        ("linear", {"attention": False}, {"experts": LAYERS * EXPERTS * RANK * 3 * (HIDDEN + FFN)}),
    ],
)
def test_only_what_was_asked_for_is_trained(checkpoint, layout, groups, expected):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation=layout)
    trained = dict.fromkeys(expected, 0)
    for name, parameter in add_lora(model, r=RANK, **groups).named_parameters():
        if parameter.requires_grad:
            (part,) = (part for part in expected if part in name)
            trained[part] += parameter.numel()
    assert trained == expected


def test_a_new_task_keeps_its_head_trainable(checkpoint, tmp_path):
    torch.manual_seed(0)
    model = add_lora(AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=3), r=RANK)
    heads = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora" not in name]
    assert heads == ["base_model.model.score.modules_to_save.default.weight"]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn(parameter.shape))
    expected = logits(model.eval())
    torch.testing.assert_close(logits(merge_lora(model)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("loaded", "asked", "message"),
    [
        ({}, {"attention": False, "experts": False}, "nothing to adapt"),
        ({}, {"lora_dropout": 0.1}, r"lora_dropout=0\.1 cannot act on fused experts"),
        ({}, {"layers_to_transform": 0}, 'layers_to_transform=0 .* fused experts.* experts_implementation="linear"'),
        ({}, {"layers_pattern": "layers"}, "layers_pattern=layers .* fused experts"),
        ({}, {"exclude_modules": ["q_proj"]}, "exclude_modules=.* fused experts"),
        ({"freeze_router": True}, {"router": True}, r"router=True .* config\.freeze_router=True freezes"),
    ],
)
def test_requests_that_contradict_are_refused(checkpoint, loaded, asked, message):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **loaded)
    with pytest.raises(ValueError, match=message):
        add_lora(model, **asked)
    assert [name for name, _ in model.named_modules() if "lora" in name] == []


def test_experts_of_another_class_are_refused():
    """peft would adapt attention alone, in silence."""
    with pytest.raises(ValueError, match="no module of PhimoeForCausalLM is named w1; load the model with GrinMoeFor"):
        add_lora(PhimoeForCausalLM(PhimoeConfig(**TINY_SIZES, pad_token_id=None)))


def test_linear_experts_take_what_fused_ones_cannot(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert add_lora(model, experts=False, lora_dropout=0.1).peft_config["default"].lora_dropout == 0.1
    linear = AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="linear")
    adapted = add_lora(linear, lora_dropout=0.1, layers_to_transform=1)
    assert "w1" in adapted.peft_config["default"].target_modules
    assert all(".layers.1." in name for name, parameter in adapted.named_parameters() if parameter.requires_grad)


# ---- What adapters compute ----


@pytest.mark.parametrize("experts_implementation", ["grinmoe", "grouped_mm", "linear"])
def test_adapters_act_as_the_sum_of_weights_and_products(checkpoint, tmp_path, experts_implementation):
    """Against a stock model whose released tensors have had `(alpha / r) B A` added per expert, in float64."""
    model = adapted_model(checkpoint, experts_implementation=experts_implementation)
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((checkpoint / "config.json").read_text()) | {"torch_dtype": "float64"}
    by_hand = write_checkpoint(tmp_path / "by_hand", config, merged_by_hand(checkpoint, tmp_path / "adapter"))
    expected = logits(AutoModelForCausalLM.from_pretrained(by_hand, dtype="float64", experts_implementation="eager"))
    torch.testing.assert_close(logits(model), expected.float(), rtol=1e-4, atol=1e-4)
    base = logits(AutoModelForCausalLM.from_pretrained(checkpoint))
    assert (base - expected).norm() > 0.1 * expected.norm()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base, rtol=1e-4, atol=1e-4)


# ---- Saving, loading, resuming ----


@pytest.mark.parametrize("linear", [False, True])
def test_adapters_are_saved_and_loaded_exactly(checkpoint, tmp_path, linear):
    layout = {"experts_implementation": "linear"} if linear else {}
    model = adapted_model(checkpoint, **layout)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(checkpoint)
    assert saved["task_type"] == "CAUSAL_LM"
    base = AutoModelForCausalLM.from_pretrained(checkpoint, **layout)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", **layout)), expected)
    base = AutoModelForCausalLM.from_pretrained(checkpoint, **layout)
    base.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(base), expected)
    _, *others = load_file(tmp_path / "adapter" / "adapter_model.safetensors").items()
    save_file(dict(others), tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"differ in 1 tensor\(s\): .*lora_A"):
        AutoModelForCausalLM.from_pretrained(checkpoint, **layout).load_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("linear", [False, True], ids=["fused to linear", "linear to fused"])
def test_adapters_of_the_other_kind_of_experts_are_refused(checkpoint, tmp_path, linear):
    """Instead of losing the experts' part with a warning; by peft's way to load, and by transformers' own."""
    kinds = [{"experts_implementation": "linear"}, {}]
    adapted_model(checkpoint, **kinds[0 if linear else 1]).save_pretrained(tmp_path)
    other = kinds[1 if linear else 0]
    with pytest.raises(RuntimeError, match="was trained on other modules than GrinMoe"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint, **other), tmp_path)
    with pytest.raises(ValueError, match="the adapter and GrinMoeForCausalLM differ"):
        AutoModelForCausalLM.from_pretrained(tmp_path, **other)
    AutoModelForCausalLM.from_pretrained(tmp_path, **kinds[0 if linear else 1])


@pytest.mark.parametrize("experts_implementation", ["grouped_mm", "linear"])
def test_checkpointing_leaves_the_adapters_gradients_as_they_are(checkpoint, experts_implementation):
    gradients = []
    for kwargs in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = adapted_model(checkpoint, experts_implementation=experts_implementation, expert_dropout=0.1).train()
        if kwargs:
            model.gradient_checkpointing_enable(kwargs)
            model.enable_input_require_grads()
        torch.manual_seed(5)
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for other in gradients[1:]:
        for name, expected in gradients[0].items():
            assert expected.norm() > 0, name
            assert torch.equal(other[name], expected), name


# ---- Merging ----


@pytest.mark.parametrize("experts_implementation", ["grouped_mm", "linear"])
def test_a_merged_model_is_the_adapted_one_in_the_released_layout(checkpoint, tmp_path, experts_implementation):
    model = adapted_model(checkpoint, experts_implementation=experts_implementation)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    merged = merge_lora(model.train())
    assert type(merged) is GrinMoeForCausalLM
    assert merged.training
    assert not any("lora" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(logits(merged.eval()), expected, rtol=1e-4, atol=1e-5)

    merged.save_pretrained(tmp_path / "merged")
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    by_hand = merged_by_hand(checkpoint, tmp_path / "adapter")
    assert saved.keys() == by_hand.keys()
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor.double(), by_hand[name], rtol=1e-5, atol=1e-6, msg=name)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", experts_implementation=experts_implementation)
    assert torch.equal(logits(reloaded), logits(merged))


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"rank_pattern": {"v_proj": 5, "experts.down_proj": 2}, "alpha_pattern": {"q_proj": 40, "gate_up_proj": 9}},
        {"use_dora": True, "experts": False},
        {"lora_bias": True, "experts": False, "router": False},
    ],
    ids=["rslora", "patterns", "DoRA", "bias"],
)
def test_every_adapter_is_merged_as_peft_computes_with_it(checkpoint, settings):
    """And the sum of all active ones."""
    model = adapted_model(checkpoint, scale=0.1, lora=settings)
    second = LoraConfig(r=2, target_modules=["v_proj", "embed_tokens"], init_lora_weights=False)
    if not settings.get("use_dora"):
        model.add_adapter("second", second)
        model.base_model.set_adapter(["default", "second"])
    expected = logits(model)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(checkpoint))).norm() > 0.01 * expected.norm()
    torch.testing.assert_close(logits(merge_lora(model)), expected, rtol=1e-4, atol=1e-4)


def test_a_wrong_merge_by_peft_is_refused_and_undone(checkpoint, monkeypatch):
    """Of adapters that are no plain product, on a basis; beside others."""
    model = adapted_model(checkpoint, lora={"experts": False, "use_dora": True}).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with monkeypatch.context() as patch:
        right = Linear.get_delta_weight
        patch.setattr(Linear, "get_delta_weight", lambda *args: 0 * right(*args))
        with pytest.raises(ValueError, match=r"the merge is refused: model.layers.0.self_attn.q_proj loses \d"):
            merge_lora(model)
    assert model.training
    assert model.state_dict().keys() == before.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    merge_lora(model)  # as it should be, it passes


def test_a_merge_into_4_bit_weights_is_refused_and_undone(tmp_path):
    pytest.importorskip("bitsandbytes")
    config = released_config(torch_dtype="float32", hidden_size=64, intermediate_size=64)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    checkpoint = write_checkpoint(tmp_path, config, released_tensors(config))
    model = adapted_model(checkpoint, quantization_config=quantization)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert any(tensor.dtype == torch.uint8 for tensor in before.values())
    expected = logits(model)
    with pytest.raises(ValueError, match=r"the merge is refused: model.* is quantised.* without quantization"):
        merge_lora(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(logits(model), expected)


def test_bfloat16_weights_that_cannot_hold_the_adapters_are_refused(checkpoint):
    """Adapters below the resolution of bfloat16 would vanish."""
    lost = r"model.layers.0.self_attn.q_proj.weight loses .* of the adapters' change.* merged. .* in float32"
    with pytest.raises(ValueError, match=lost):
        merge_lora(adapted_model(checkpoint, scale=1e-4, dtype="bfloat16"))
    for scale in (1e-4, 1e-8):  # the second below the resolution of float32, where nothing is lost that matters
        merge_lora(adapted_model(checkpoint, scale=scale, dtype="float32"))


def test_adapters_that_are_not_finite_are_refused_and_nothing_is_merged(checkpoint):
    model = adapted_model(checkpoint)
    *_, last = (parameter for name, parameter in model.named_parameters() if "lora_B" in name)
    last.data[0, 0] = torch.nan
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"the merge is refused: model.layers.1.block_sparse_moe.experts.* loses nan"):
        merge_lora(model)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0, equal_nan=True)


def test_adapters_merged_before_are_refused(checkpoint):
    model = adapted_model(checkpoint)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged already"):
        merge_lora(model)
