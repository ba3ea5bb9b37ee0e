"""The Phimoe family (Phi-3.5-MoE, Phi-mini-MoE, Phi-tiny-MoE): their configs, LongRoPE, and transformers' Phimoe."""

import json
import math
from dataclasses import fields

import pytest
import torch
from checkpoints import released_config, released_tensors, write_checkpoint
from models import relative_error
from parity import LIMIT, LONGROPE, LONGROPE_SCALING, PHI_MINI, PHI_TINY, longrope_logits
from safetensors import safe_open
from transformers import AutoModelForCausalLM, DynamicCache, PhimoeConfig, PhimoeForCausalLM
from transformers import PhimoeForSequenceClassification as StockClassifier

from conversion.phimoe_config import phimoe_config
from conversion.tensors import ConversionError
from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM, GrinMoeForSequenceClassification

pytestmark = pytest.mark.usefixtures("far_from_ties")
WINDOW = 7
ORIGINAL_LENGTH = LONGROPE_SCALING["original_max_position_embeddings"]

# The siblings' config.json at small sizes, with many near-ties (router_jitter_noise is 0.01 in the releases).
FAMILY = released_config(
    model_type="phimoe", architectures=["PhiMoEForCausalLM"], torch_dtype="float32", router_jitter_noise=0.3
)
del FAMILY["auto_map"]


def phi_35(**overrides):
    """Phi-3.5-MoE-instruct: LongRoPE, and a window as wide as the context."""
    rope = {"rope_scaling": dict(LONGROPE_SCALING), "original_max_position_embeddings": ORIGINAL_LENGTH}
    return {**FAMILY, **LONGROPE, **rope, **overrides}


def phi_tiny(**overrides):
    """Phi-tiny-MoE-instruct: more heads x head_dim than its hidden size, and small experts."""
    return {**FAMILY, **PHI_TINY, "sliding_window": WINDOW, "rope_scaling": None, **overrides}


def phi_mini(**overrides):
    return phi_tiny(**PHI_MINI, **overrides)


def random_ids(config, length, rows=1, seed=3):
    return torch.randint(0, config["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model.eval()(ids, **kwargs).logits


def stock_model(folder):
    config = PhimoeConfig.from_pretrained(folder)
    return PhimoeForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)


@pytest.mark.parametrize("make_config", [phi_35, phi_tiny, phi_mini])
def test_what_stock_saves(make_config, tmp_path):
    """Its class's name in the file says that its window counts the query's own key."""
    config = make_config(sliding_window=WINDOW)
    folder = write_checkpoint(tmp_path / "release", config, released_tensors(config), num_shards=2)
    stock = stock_model(folder)
    stock.save_pretrained(tmp_path / "stock")
    with safe_open(tmp_path / "stock" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == released_tensors(config).keys()
    ids = random_ids(config, ORIGINAL_LENGTH)
    model = GrinMoeForCausalLM.from_pretrained(tmp_path / "stock")
    assert model.config.sliding_window == WINDOW - 1
    assert relative_error(logits(model, ids), logits(stock, ids)) < LIMIT
    release = GrinMoeForCausalLM.from_pretrained(folder)
    assert relative_error(logits(release, ids), logits(stock, ids)) > 1e-2


def test_a_classifier_that_stock_saves(tmp_path):
    config = phi_mini(pad_token_id=0, num_labels=3)
    config.pop("architectures")
    torch.manual_seed(0)
    stock = StockClassifier(PhimoeConfig.from_dict({**config, "initializer_range": 0.3})).eval()
    stock.save_pretrained(tmp_path)
    model = GrinMoeForSequenceClassification.from_pretrained(tmp_path)
    ids = random_ids(config, 5 * WINDOW, rows=3).clamp(min=1)
    assert relative_error(logits(model, ids), logits(stock, ids)) < LIMIT


# To transformers' Phimoe


def without(config, *names):
    return {name: value for name, value in config.items() if name not in names}


GRIN = phi_mini(model_type="grinmoe", architectures=["GRIN-MoE"])
UNUSUAL = {
    "as released": {},
    "three experts, no biases": {"num_local_experts": 3, "attention_bias": False, "lm_head_bias": False},
    "tied head": {"tie_word_embeddings": True},
    "other heads": {"head_dim": 6, "hidden_size": 28, "num_attention_heads": 3, "num_key_value_heads": 1},
    "no window": {"sliding_window": None},
    "window of two keys": {"sliding_window": 1},
    "another theta": {"rope_theta": 77.0},
    "no jitter, as integers": {"router_jitter_noise": 0, "input_jitter_noise": 0, "router_aux_loss_coef": 0},
    "another activation": {"hidden_act": "gelu"},
    "padding and stop tokens": {"pad_token_id": 5, "eos_token_id": [2, 7]},
    "training settings": {
        **{"expert_dropout": 0.1, "attention_dropout": 0.2, "router_estimator": "sparsemixer_v2_paper"},
        **{"router_sampling": False, "freeze_router": True, "router_aux_loss_coef": 0.03, "input_jitter_noise": 0.2},
    },
    "longrope": {"rope_scaling": phi_35()["rope_scaling"]},
    "longrope with a length of its own": {
        "rope_scaling": without(phi_35()["rope_scaling"], "original_max_position_embeddings"),
        "original_max_position_embeddings": ORIGINAL_LENGTH,
    },
}


@pytest.mark.parametrize("changes", UNUSUAL.values(), ids=UNUSUAL)
def test_stock_computes_what_the_config_says(changes, tmp_path):
    values = json.loads(json.dumps({**GRIN, "pad_token_id": 0, **changes}))
    tensors = released_tensors(values)
    config = GrinMoeConfig.from_pretrained(write_checkpoint(tmp_path / "grin", values, tensors))
    before = config.to_dict()
    translated = json.loads(json.dumps(phimoe_config(config)))
    assert config.to_dict() == before
    stock = stock_model(write_checkpoint(tmp_path / "phimoe", translated, tensors))
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "phimoe")) is PhimoeForCausalLM
    ids = random_ids(values, ORIGINAL_LENGTH, rows=2)
    ours = GrinMoeForCausalLM.from_pretrained(tmp_path / "grin")
    assert relative_error(logits(stock, ids), logits(ours, ids)) < LIMIT

    back = GrinMoeConfig.from_pretrained(tmp_path / "phimoe").to_dict()
    assert back.pop("architectures") == ["PhimoeForCausalLM", "PhiMoEForCausalLM"]
    before.pop("architectures")
    before["rope_parameters"].pop("type", None)  # the old name of rope_type
    assert back == before


def test_the_translation_is_explicit():
    """vLLM's default of the one and transformers' of the others are not ours; transformers 4 knows this RoPE alone."""
    translated = phimoe_config(GrinMoeConfig(num_hidden_layers=1))
    expected = {
        "model_type": "phimoe", "architectures": ["PhimoeForCausalLM", "PhiMoEForCausalLM"], "head_dim": 128,
        "router_jitter_noise": 0.01, "input_jitter_noise": 0.01, "sliding_window": 2048, "rope_theta": 10000.0,
        "rope_scaling": None, "attention_bias": True, "lm_head_bias": True, "router_aux_loss_coef": 0.0,
        "eos_token_id": 32000, "pad_token_id": 32000,
    }  # fmt: skip
    assert {name: translated[name] for name in expected} == expected
    assert "rope_parameters" not in translated
    missing = {field.name for field in fields(PhimoeConfig)} - translated.keys() - {"rope_parameters"}
    assert missing <= {"transformers_version"}
    config = GrinMoeConfig.from_dict(phi_35())
    config.auto_map = {"AutoConfig": "configuration_grinmoe.GrinMoeConfig"}  # as that of a model saved with its code
    assert "auto_map" not in phimoe_config(config)
    rope = phimoe_config(config)["rope_scaling"]
    assert rope == {"rope_type": "longrope", **without(phi_35()["rope_scaling"], "type")}


def test_longrope_without_the_releases_scales(tmp_path):
    """transformers' attention factor, sqrt(1 + ln(s) / ln(L)), is written out: stock demands the release's fields."""
    rope = without(phi_35()["rope_scaling"], "short_mscale", "long_mscale")
    values = phi_35(rope_scaling=rope, sliding_window=None, pad_token_id=0)
    tensors = released_tensors(values)
    ours = GrinMoeForCausalLM.from_pretrained(write_checkpoint(tmp_path / "ours", values, tensors))
    translated = phimoe_config(ours.config)
    factor = math.sqrt(1 + math.log(32) / math.log(ORIGINAL_LENGTH))
    assert translated["rope_scaling"]["short_mscale"] == translated["rope_scaling"]["long_mscale"]
    assert translated["rope_scaling"]["long_mscale"] == pytest.approx(factor)
    stock = stock_model(write_checkpoint(tmp_path / "stock", translated, tensors))
    ids = random_ids(values, ORIGINAL_LENGTH)
    assert relative_error(logits(ours, ids), logits(stock, ids)) < LIMIT
    # Beyond, where stock is wrong.
    ids = random_ids(values, ORIGINAL_LENGTH + 8)
    expected = longrope_logits(
        phi_35(rope_scaling={**rope, "long_mscale": factor}, sliding_window=None), tensors, ids[0].tolist()
    )
    assert relative_error(logits(ours, ids)[0], expected) < LIMIT


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts_per_tok": 1}, "num_experts_per_tok=1"),
        ({"num_experts_per_tok": 3}, "num_experts_per_tok=3"),
        ({"router_estimator": "gshard"}, "router_estimator='gshard'"),
        ({"router_estimator": "sparsemixer", "num_experts_per_tok": 1}, "num_experts_per_tok=1"),
        ({"moe_output_scale": True}, "moe_output_scale=True"),
        ({"router_bias_update_rate": 0.1}, "router_bias_update_rate=0.1"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_type='linear'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
    ],
    ids=str,
)
def test_what_stock_cannot_represent(fields, message):
    with pytest.raises(ConversionError, match=message):
        phimoe_config(GrinMoeConfig(**fields))


# LongRoPE


LONG_LENGTH = ORIGINAL_LENGTH + 8


@pytest.fixture(scope="module")
def longrope(tmp_path_factory):
    """A Phi-3.5-MoE with a window that shuts before the end; its folder and tensors."""
    config = phi_35(sliding_window=WINDOW + 3)
    tensors = released_tensors(config, seed=2)
    return write_checkpoint(tmp_path_factory.mktemp("longrope"), config, tensors, num_shards=2), config, tensors


def test_longrope_equals_the_closed_form(longrope):
    folder, config, tensors = longrope
    model = GrinMoeForCausalLM.from_pretrained(folder)
    ids = random_ids(config, LONG_LENGTH)
    short, just_short, just_long = ids[:, :5], ids[:, :ORIGINAL_LENGTH], ids[:, : ORIGINAL_LENGTH + 1]
    # Back and forth: a long forward pass leaves nothing behind.
    for part, is_long in ((short, False), (ids, True), (just_short, False), (just_long, True), (short, False)):
        expected = longrope_logits(config, tensors, part[0].tolist(), is_long)
        assert relative_error(logits(model, part)[0], expected) < LIMIT
        assert relative_error(longrope_logits(config, tensors, part[0].tolist(), not is_long), expected) > 1e-2


GENERATION = [{}, {"cache_implementation": "static"}, {"num_beams": 2}]
REAL_LENGTH = ORIGINAL_LENGTH - 2  # of the longest prompt in a batch


def left_padded(config, padding):
    """Prompts, the longest one of REAL_LENGTH tokens, after so many columns of padding per row; and their mask."""
    prompt = random_ids(config, REAL_LENGTH + min(padding), rows=len(padding), seed=4)
    return prompt, (torch.arange(prompt.shape[1]) >= torch.tensor(padding)[:, None]).long()


def with_positions(mask, length):
    """The mask of `length` columns, those after the prompt are tokens, and its positions, as `generate` makes them."""
    mask = torch.nn.functional.pad(mask, (0, length - mask.shape[1]), value=1)
    return {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@pytest.mark.parametrize("given", ["ids", "embeddings", "ids and embeddings"])
@pytest.mark.parametrize(("padding", "window"), [((0, 0), WINDOW + 3), ((3, 1), None), ((6, 11), WINDOW + 3)], ids=str)
@pytest.mark.parametrize("settings", GENERATION, ids=str)
def test_generation_across_the_boundary(settings, padding, window, given, longrope):
    """`generate` computes the cache anew at the boundary, as the releases do: as without a cache. By the positions of
    the longest row: padding moves the boundary to a later column, even from within the prompt (6, 11)."""
    folder, config, _ = longrope
    model = GrinMoeForCausalLM.from_pretrained(folder, sliding_window=window)
    prompt, mask = left_padded(config, padding)
    common = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    common.update(return_dict_in_generate=True, output_logits=True)
    expected = model.generate(prompt, **common, use_cache=False, num_beams=settings.get("num_beams", 1))
    inputs = {"input_ids": prompt}
    if given != "ids":  # the embeddings count, and not what ids there are
        with torch.no_grad():
            inputs["inputs_embeds"] = model.get_input_embeddings()(prompt)
        inputs["input_ids"] = prompt.flip(1) if "ids" in given else None
    lengths = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    outputs = model.generate(**inputs, **common, **settings)
    hook.remove()
    width = prompt.shape[1]
    assert lengths == [width, 1, 1, width + 3, 1, 1, 1, 1], "anew once, for the first position beyond"
    new = expected.sequences[:, width:]
    assert len(new.unique()) > 5 and torch.equal(outputs.sequences[:, -8:], new)
    assert relative_error(torch.stack(outputs.logits), torch.stack(expected.logits)) < LIMIT


@pytest.mark.parametrize("helper", ["assistant", "prompt lookup"])
@pytest.mark.parametrize("padding", [0, 5])
def test_speculative_generation_across_the_boundary(padding, helper, longrope):
    """Beyond the boundary every token is the greedy one; just before it, drafts can bring in the long factors."""
    folder, config, _ = longrope
    model = GrinMoeForCausalLM.from_pretrained(folder, sliding_window=None)
    helpers = {"assistant": {"assistant_model": model}, "prompt lookup": {"prompt_lookup_num_tokens": 3}}
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **helpers[helper]}
    for seed in range(4):
        real = random_ids(config, 4, seed=seed).repeat(1, 3)
        prompt = torch.nn.functional.pad(real, (padding, 0))
        mask = (torch.arange(prompt.shape[1]) >= padding).long()[None]
        sequences = model.generate(prompt, attention_mask=mask, **settings)
        for length in range(padding + ORIGINAL_LENGTH + 1, sequences.shape[1]):
            expected = logits(model, sequences[:, :length], **with_positions(mask, length), use_cache=False)
            assert sequences[0, length] == expected[0, -1].argmax(), f"token {length}, seed {seed}"


@pytest.mark.parametrize("restart", ["all tokens", "new tokens"])
def test_crossing_the_boundary_within_a_prompt(restart, longrope):
    """A prompt after a cache: its keys are computed anew if the tokens are all there, and otherwise kept, not lost."""
    folder, config, _ = longrope
    model = GrinMoeForCausalLM.from_pretrained(folder, sliding_window=None).eval()
    new = 2 * ORIGINAL_LENGTH  # more columns than the boundary by themselves
    prompt, mask = left_padded(config, (2, 6))
    width = prompt.shape[1]
    ids = torch.cat([prompt, random_ids(config, new, rows=2, seed=5)], dim=1)
    whole = with_positions(mask, width + new)

    def pieces(sizes):
        cache, end = DynamicCache(config=model.config), 0
        for size in sizes:
            start, end = end, end + size
            positions = {"attention_mask": whole["attention_mask"][:, :end]}
            positions["position_ids"] = whole["position_ids"][:, start:end]
            outputs = logits(model, ids[:, start:end], **positions, past_key_values=cache)
        return outputs[:, -1], cache

    settings = {"attention_mask": whole["attention_mask"], "max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    settings.update(eos_token_id=None, return_dict_in_generate=True, output_logits=True)
    settings["past_key_values"] = pieces([width])[1]
    expected, _ = pieces([width + new] if restart == "all tokens" else [width, new])
    outputs = model.generate(ids[:, width:] if restart == "new tokens" else ids, **settings)
    assert relative_error(outputs.logits[0], expected) < LIMIT
    anew = logits(model, ids, **whole)[:, -1]
    assert (relative_error(expected, anew) < LIMIT) == (restart == "all tokens")


def test_longrope_of_a_batch_and_of_packed_rows(longrope):
    """The longest row decides for all, by its positions: padding and other packed sequences do not count."""
    folder, config, tensors = longrope
    model = GrinMoeForCausalLM.from_pretrained(folder)
    ids = random_ids(config, ORIGINAL_LENGTH)
    padding = torch.full((1, 5), 7)
    mask = torch.cat([torch.zeros_like(padding), torch.ones_like(ids)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    short = longrope_logits(config, tensors, ids[0].tolist(), is_long=False)
    padded = logits(model, torch.cat([padding, ids], dim=1), attention_mask=mask, position_ids=positions)
    assert relative_error(padded[0, 5:], short) < LIMIT
    positions = torch.cat([torch.arange(5), torch.arange(ORIGINAL_LENGTH)])[None]
    packed = logits(model, torch.cat([padding, ids], dim=1), position_ids=positions, use_cache=False)
    assert relative_error(packed[0, 5:], short) < LIMIT


@pytest.mark.parametrize("settings", [{"device_map": {"": "disk"}}, {"dtype": torch.bfloat16}], ids=str)
def test_longrope_however_it_is_loaded(settings, longrope, tmp_path):
    """The frequencies are in no checkpoint: a model from the meta device has to compute them."""
    model = GrinMoeForCausalLM.from_pretrained(longrope[0], offload_folder=tmp_path, **settings)
    plain = GrinMoeForCausalLM(GrinMoeConfig.from_pretrained(longrope[0])).model.rotary_emb
    x = torch.zeros(1, dtype=settings.get("dtype", torch.float32))
    for length in (ORIGINAL_LENGTH, LONG_LENGTH):
        positions = torch.arange(length)[None]
        for ours, expected in zip(model.model.rotary_emb(x, positions), plain(x.float(), positions), strict=True):
            assert expected.dtype == torch.float32
            assert torch.equal(ours, expected.to(x.dtype)), "rounded once"
