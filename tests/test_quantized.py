"""Experts as `nn.Linear` modules, and quantised fine-tuning: what is held, computed, trained, saved, refused."""

import json
import re

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from checkpoints import changed, fused, released_config, released_tensors, write_checkpoint
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from reference import reference_logits
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

from modeling_grin.linear_experts_grinmoe import GrinMoeLinearExperts, check_quantized
from modeling_grin.packed_grinmoe import pack_layers

# An expert's width that is no multiple of the 64 numbers of a 4-bit block. Greedy routing and no jitter make training
# mode a function of the weights, and a narrow keep set keeps rounding from moving a token to another expert.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "eos_token_id": 2, "pad_token_id": 0}
GREEDY = {"router_sampling": False, "input_jitter_noise": 0.0}
QUANTIZED = re.compile(r"self_attn\.[qkvo]_proj\.weight|experts\.\d+\.w[123]\.weight")
IDS = torch.randint(3, 131, (3, 17), generator=torch.Generator().manual_seed(1))
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"load_in_8bit": True}


@pytest.fixture(scope="module")
def config():
    return released_config(**SIZES, **GREEDY, torch_dtype="float32")


@pytest.fixture(scope="module")
def tensors(config):
    """What a bfloat16 release holds."""
    return released_tensors({**config, "torch_dtype": "bfloat16"})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, config, tensors):
    return write_checkpoint(tmp_path_factory.mktemp("released"), config, tensors, num_shards=3)


def load(folder, *, auto_class=AutoModelForCausalLM, **settings):
    """In float32 but for what is quantised, so that the comparisons can be tight."""
    return auto_class.from_pretrained(folder, dtype=torch.float32, **settings)


def load_quantized(folder, settings, **kwargs):
    return load(folder, quantization_config=BitsAndBytesConfig(**settings), **kwargs)


def quantize(weight, settings):
    """bitsandbytes' own functions: the tensors that it stores for a matrix, by suffix, and what they stand for."""
    if "load_in_8bit" in settings:
        values, scale, _ = functional.int8_vectorwise_quant(weight.half())
        return {"weight": values, "SCB": scale}, values.float() * scale[:, None] / 127
    packed, state = functional.quantize_4bit(
        weight.float(),
        quant_type=settings["bnb_4bit_quant_type"],
        compress_statistics=settings.get("bnb_4bit_use_double_quant", False),
    )
    stored = {"weight": packed, **{f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}}
    return stored, functional.dequantize_4bit(packed, state).float()


def quantize_all(tensors, settings, names=QUANTIZED):
    """The tensors of a quantised checkpoint, and the released ones that it stands for."""
    stored, meant = {}, {}
    for name, tensor in tensors.items():
        if names.search(name):
            parts, meant[name] = quantize(tensor, settings)
            stored.update({f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()})
        else:
            stored[name] = meant[name] = tensor.float()
    return stored, meant


def greedy_logits(model, ids=IDS):
    """In training mode, in which 8-bit layers round weights only; in `eval()` bitsandbytes rounds activations, too."""
    return model.train()(input_ids=ids).logits


def expert_linears(model):
    return [
        getattr(expert, part)
        for module in model.modules()
        if isinstance(module, GrinMoeLinearExperts)
        for expert in module
        for part in ("w1", "w2", "w3")
    ]


# The layout by itself


def test_linear_experts_give_the_reference_logits(config, tensors, checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="linear", dtype=torch.float64)
    assert len(expert_linears(model)) == 2 * 6 * 3
    expected = reference_logits(config, tensors, IDS[0].tolist())
    torch.testing.assert_close(model(input_ids=IDS[:1]).logits[0], expected, rtol=1e-5, atol=1e-5)  # RoPE is float32


@pytest.mark.parametrize("estimator", ["sparsemixer_v2", "sparsemixer_v2_star", "gshard", "dense"])
def test_linear_experts_give_the_gradients_of_fused_ones(checkpoint, config, estimator):
    gradients = {}
    for implementation in ("eager", "linear"):
        settings = {"router_estimator": estimator, "router_sampling": True, "dtype": torch.float64}
        model = AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation=implementation, **settings)
        model.train()
        torch.manual_seed(0)
        model(input_ids=IDS[:1, :2], labels=IDS[:1, :2]).loss.backward()  # so few tokens that some experts have none
        gradients[implementation] = {name: parameter.grad for name, parameter in model.named_parameters()}
    linear = gradients["linear"]
    torch.testing.assert_close(fused(linear, config), gradients["eager"], rtol=1e-9, atol=1e-12)
    assert estimator == "dense" or any(not g.any() for name, g in linear.items() if ".experts." in name)


def test_linear_experts_are_saved_as_released(checkpoint, tensors, tmp_path):
    load(checkpoint, experts_implementation="linear").save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensor.float()) for name, tensor in tensors.items())
    assert "linear" not in (tmp_path / "config.json").read_text()
    assert not expert_linears(load(tmp_path)), "the layout is chosen anew at each load"


# What a quantised model holds and computes


@pytest.mark.parametrize(
    "settings",
    [NF4, {**NF4, "bnb_4bit_quant_storage": torch.bfloat16}, INT8],
    ids=["nf4", "nf4-stored-as-bfloat16", "int8"],
)
def test_quantized_while_loading(checkpoint, config, tensors, settings, tmp_path):
    model = load_quantized(checkpoint, settings)
    bits = 8 if "load_in_8bit" in settings else 4
    for linear in expert_linears(model):
        assert linear.weight.nbytes * 8 == bits * 64 * 96 and not linear.weight.requires_grad
    for layer in model.model.layers:
        assert type(layer.block_sparse_moe.gate) is nn.Linear
    assert type(model.lm_head) is nn.Linear

    _, meant = quantize_all(tensors, settings)
    expected = load(write_checkpoint(tmp_path / "meant", config, meant))
    logits = greedy_logits(model)
    torch.testing.assert_close(logits, greedy_logits(expected), rtol=1e-4, atol=1e-4)
    assert (logits - greedy_logits(load(checkpoint))).abs().max() > 0.1, "4 or 8 bits do make a difference"

    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(greedy_logits(again), logits)
    again.save_pretrained(tmp_path / "again")
    saved, twice = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("saved", "again"))
    assert saved == twice


def write_published(folder, config, tensors, settings, skipped):
    """A 4-bit checkpoint as published ones are, written without the model; returns the tensors that it stands for."""
    gate_too = re.compile(rf"{QUANTIZED.pattern}|gate\.weight")
    stored, meant = quantize_all(tensors, settings, QUANTIZED if skipped else gate_too)
    quantization = {
        **settings, "quant_method": "bitsandbytes", "load_in_8bit": False, "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": skipped, "llm_int8_threshold": 6.0,
    }  # fmt: skip
    published = {**config, "architectures": ["GRINMoEForCausalLM"], "quantization_config": quantization}
    write_checkpoint(folder, published, {name: tensor.contiguous() for name, tensor in stored.items()}, num_shards=2)
    return meant


@pytest.mark.parametrize(
    ("quant_type", "double", "skipped"),
    [("nf4", True, ["gate", "lm_head"]), ("fp4", False, None)],
)
def test_published_4_bit_layout(config, tensors, tmp_path, quant_type, double, skipped):
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": double}
    meant = write_published(tmp_path / "published", config, tensors, settings, skipped)
    names = {name for file in (tmp_path / "published").glob("*.safetensors") for name in load_file(file)}
    assert f"model.layers.0.block_sparse_moe.experts.0.w1.weight.quant_state.bitsandbytes__{quant_type}" in names

    model = load(tmp_path / "published")
    assert all(isinstance(linear, bnb.nn.Linear4bit) for linear in expert_linears(model))
    gates = [layer.block_sparse_moe.gate for layer in model.model.layers]
    assert all(isinstance(gate, bnb.nn.Linear4bit) == (skipped is None) for gate in gates)
    expected = load(write_checkpoint(tmp_path / "meant", config, meant))
    logits = greedy_logits(model)
    torch.testing.assert_close(logits, greedy_logits(expected), rtol=1e-4, atol=1e-4)

    model.save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved/model.safetensors").keys() == names
    assert torch.equal(greedy_logits(load(tmp_path / "saved")), logits)


def test_a_list_of_modules_of_ones_own_is_kept_and_the_router_added(checkpoint):
    settings = BitsAndBytesConfig(**NF4, llm_int8_skip_modules=["w2", "lm_head"])
    model = load(checkpoint, quantization_config=settings)
    assert settings.llm_int8_skip_modules == ["w2", "lm_head"], "the caller's config is not changed"
    assert model.config.quantization_config.llm_int8_skip_modules == ["w2", "lm_head", "gate"]
    expert = model.model.layers[1].block_sparse_moe.experts[3]
    assert type(expert.w2) is nn.Linear and type(expert.w1) is bnb.nn.Linear4bit
    as_dict = load(checkpoint, quantization_config={**NF4, "quant_method": "bitsandbytes"})
    assert as_dict.config.quantization_config.llm_int8_skip_modules == ["lm_head", "score", "gate"]


def test_dequantized_model_is_saved_as_released(checkpoint, tensors, tmp_path):
    _, meant = quantize_all(tensors, NF4)
    load_quantized(checkpoint, NF4).dequantize(dtype=torch.float32).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == meant.keys()
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, meant[name], rtol=1e-6, atol=1e-6)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


# Training


LORA = LoraConfig(
    r=4, target_modules=["q_proj", "v_proj", "w1", "w2", "w3"], init_lora_weights=True, task_type="CAUSAL_LM"
)


@pytest.mark.parametrize("settings", [{**NF4, "bnb_4bit_use_double_quant": True}, INT8], ids=["nf4", "int8"])
def test_lora_trains_on_quantized_experts(checkpoint, settings, tmp_path):
    base = load_quantized(
        checkpoint, settings, router_sampling=True, input_jitter_noise=0.01, expert_dropout=0.1, device_map="cpu"
    )
    model = get_peft_model(prepare_model_for_kbit_training(base), LORA)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    begin = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(".experts." in name for name in begin) == 2 * 6 * 3 * 2
    arguments = TrainingArguments(
        output_dir=tmp_path / "run", max_steps=20, per_device_train_batch_size=3, learning_rate=1e-2,
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, eval_strategy="steps",
        eval_steps=10, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0], losses
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items()), "what is quantised does not move"
    still = [name for name, value in begin.items() if torch.equal(after[name], value)]
    assert not still, f"have not learnt: {still[:5]}"

    model.save_pretrained(tmp_path / "adapter")
    base = prepare_model_for_kbit_training(load_quantized(checkpoint, settings))
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits_of(again), logits_of(model))
    assert (logits_of(again) - logits_of(load_quantized(checkpoint, settings))).abs().max() > 0.1


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("settings", [NF4, INT8], ids=["nf4", "int8"])
def test_input_gradients_are_those_of_the_weights_that_are_meant(checkpoint, config, tensors, settings, tmp_path):
    """And an evaluation before changes nothing: bitsandbytes repacks 4-bit weights in it on some CPUs."""
    _, meant = quantize_all(tensors, settings)
    expected = load(write_checkpoint(tmp_path, config, meant))
    model = load_quantized(checkpoint, settings)
    logits_of(model)
    embeds = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(2))
    gradients = []
    for each in (model, expected):
        inputs = embeds.clone().requires_grad_()
        each.train()(inputs_embeds=inputs).logits.square().mean().backward()
        gradients.append(inputs.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4 * gradients[1].abs().max())


# What is refused


@pytest.fixture(scope="module")
def quantized_checkpoint(tmp_path_factory, checkpoint):
    folder = tmp_path_factory.mktemp("quantized")
    load_quantized(checkpoint, NF4).save_pretrained(folder)
    return folder


EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2"


def test_checkpoints_that_do_not_fit_are_errors(config, tensors, quantized_checkpoint, tmp_path):
    quantized = json.loads((quantized_checkpoint / "config.json").read_text())
    unlisted = {**quantized["quantization_config"], "llm_int8_skip_modules": ["lm_head"]}
    lacking = write_checkpoint(tmp_path / "lacking", config, changed(tensors, {EXPERT: None}))
    with pytest.raises(ValueError, match=rf"{re.escape(EXPERT)}\.weight is missing"):
        load_quantized(lacking, NF4)
    stored = load_file(quantized_checkpoint / "model.safetensors")
    for name, given, changes, message in (
        ("lacking-4-bit", changed(stored, {EXPERT: None}), {}, rf"{re.escape(EXPERT)}\.weight is missing"),
        ("surplus", stored, {"num_hidden_layers": 1}, r"layers\.1\..* is not part of the model"),
        ("wider", stored, {"intermediate_size": 128}, r"from shape \[96, 64\], the config says \[128, 64\]|quantised"),
        ("unlisted", stored, {"quantization_config": unlisted}, r"not quantised: list 'gate'"),
    ):
        with pytest.raises(ValueError, match=message):
            load(write_checkpoint(tmp_path / name, {**quantized, **changes}, given))
    for part in ("weight.absmax", "weight.quant_state.bitsandbytes__nf4"):
        kept = changed(stored, {f"{EXPERT}.{part}": None})
        folder = write_checkpoint(tmp_path / f"without-{part}", quantized, kept)
        with pytest.raises((ValueError, RuntimeError)):
            load(folder)


def test_experts_are_never_left_unquantized_in_silence(checkpoint, config, tensors, tmp_path):
    with pytest.raises(ValueError, match="experts_implementation='grouped_mm' has fused experts"):
        load_quantized(checkpoint, NF4, experts_implementation="grouped_mm")
    folder = write_checkpoint(tmp_path / "fused", config, fused(tensors, config))
    with pytest.raises(ValueError, match="Its experts are fused: load it without"):
        load_quantized(folder, NF4)
    model = load_quantized(checkpoint, NF4)
    block = model.model.layers[1].block_sparse_moe
    block.experts[4].w3, replaced = nn.Linear(64, 96, bias=False), block.experts[4].w3
    with pytest.raises(ValueError, match=r"has left model\.layers\.1\.block_sparse_moe\.experts\.4\.w3 as it was"):
        check_quantized(model)
    block.experts[4].w3, block.gate = replaced, bnb.nn.Linear4bit(64, 6, bias=False)
    with pytest.raises(ValueError, match=r"has quantised the router model\.layers\.1\.block_sparse_moe\.gate"):
        check_quantized(model)


def test_8_bits_cannot_be_spread_over_ranks():
    with pytest.raises(ValueError, match="must not have 8 bits: use load_in_4bit, or DDP"):
        pack_layers(nn.ModuleList([bnb.nn.Linear8bitLt(4, 4)]))


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForSequenceClassification])
def test_other_heads(checkpoint, tmp_path, auto_class):
    causal = load_quantized(checkpoint, NF4)
    causal.save_pretrained(tmp_path)
    for folder, settings in ((checkpoint, {"quantization_config": BitsAndBytesConfig(**NF4)}), (tmp_path, {})):
        model = load(folder, auto_class=auto_class, **settings)
        assert all(isinstance(linear, bnb.nn.Linear4bit) for linear in expert_linears(model))
        decoder = model if auto_class is AutoModel else model.model
        assert torch.equal(decoder(IDS).last_hidden_state, causal.model(IDS).last_hidden_state)
        assert auto_class is AutoModel or type(model.score) is nn.Linear


def test_the_kind_of_modules_cannot_be_changed_later(checkpoint):
    for built, asked in (("linear", "eager"), ("eager", "linear")):
        model = load(checkpoint, experts_implementation=built)
        with pytest.raises(ValueError, match="give it to from_pretrained"):
            model.set_experts_implementation(asked)
        model.set_experts_implementation(built)


def test_torchao_int8(checkpoint, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = load(checkpoint, quantization_config=config)
    for linear in expert_linears(model):
        assert type(linear.weight).__name__ == "Int8Tensor"
    assert all(type(layer.block_sparse_moe.gate.weight) is nn.Parameter for layer in model.model.layers)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load(tmp_path)), logits_of(model))
    adapted = get_peft_model(model, LORA).train()
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    gradients = {name: p.grad for name, p in adapted.named_parameters() if "lora_B" in name}
    assert all(gradient.any() for gradient in gradients.values())
