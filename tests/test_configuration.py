"""The configuration: the release's values, what is refused, and the window as transformers' caches read it."""

import copy
import json
from dataclasses import fields as dataclass_fields

import pytest
from checkpoints import RELEASED_CONFIG
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, PhimoeConfig

from modeling_grin import GrinMoeConfig

RELEASED_SIZES = {
    "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 6400, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 16,
}  # fmt: skip
# Fields of the released file that say something about the file, not about the model.
ABOUT_THE_FILE = {"_name_or_path", "architectures", "auto_map", "torch_dtype", "transformers_version"}
# What another model needs, so that no value below is a default.
UNUSUAL = {
    "vocab_size": 77, "hidden_size": 24, "intermediate_size": 10, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 10, "hidden_act": "gelu", "max_position_embeddings": 99,
    "initializer_range": 0.03, "rms_norm_eps": 1e-4, "use_cache": False, "bos_token_id": 3, "eos_token_id": [4, 5],
    "pad_token_id": None, "tie_word_embeddings": True, "sliding_window": None, "attention_bias": False,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}, "lm_head_bias": False,
    "attention_dropout": 0.1, "expert_dropout": 0.2, "num_local_experts": 5, "num_experts_per_tok": 3,
    "router_jitter_noise": 0.3, "input_jitter_noise": 0.0, "router_aux_loss_coef": 0.5, "output_router_logits": True,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 64, "long_factor": [2.0] * 64,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


def write_config(folder, config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_defaults_are_the_release():
    defaults = GrinMoeConfig().to_dict()
    expected = {**RELEASED_CONFIG, **RELEASED_SIZES}
    theta = expected.pop("rope_theta")
    assert defaults["rope_parameters"] == {"rope_type": "default", "rope_theta": theta}
    assert {name: defaults[name] for name in expected.keys() - ABOUT_THE_FILE} == {
        name: value for name, value in expected.items() if name not in ABOUT_THE_FILE
    }
    new = {"head_dim": 128, "pad_token_id": 32000, "router_estimator": "sparsemixer_v2", "expert_dropout": 0.0}
    assert {name: defaults[name] for name in new} == new


def test_round_trip(tmp_path):
    defaults = GrinMoeConfig()
    same = [name for name, value in UNUSUAL.items() if getattr(defaults, name) == value]
    assert not same, "values that a lost field would have anyway"
    config = GrinMoeConfig(**UNUSUAL)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is GrinMoeConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert {name: getattr(loaded, name) for name in UNUSUAL} == UNUSUAL


IMPOSSIBLE = [
    ({"hidden_size": 4095}, "hidden_size=4095"),
    ({"hidden_size": 96, "num_attention_heads": 32}, "hidden_size=96"),  # 3 dimensions per head: odd
    ({"num_attention_heads": 31, "head_dim": 128}, "num_attention_heads=31"),
    ({"num_key_value_heads": 5}, "num_attention_heads=32"),
    ({"head_dim": 7}, "head_dim=7"),
    ({"head_dim": 0}, "head_dim=0"),
    ({"num_experts_per_tok": 17}, "num_experts_per_tok=17"),
    ({"num_experts": 1}, "num_experts_per_tok=2"),
    *(
        ({field: 0}, f"{field}=0")
        for field in (*RELEASED_SIZES, "num_experts_per_tok", "max_position_embeddings", "sliding_window")
    ),
    ({"hidden_act": "sillu"}, "hidden_act='sillu'"),
    ({"router_jitter_noise": -0.01}, "router_jitter_noise=-0.01"),
    ({"router_jitter_noise": float("nan")}, "router_jitter_noise=nan"),
    ({"router_aux_loss_coef": -1}, "router_aux_loss_coef=-1"),
    ({"input_jitter_noise": 1.0}, "input_jitter_noise=1.0"),
    ({"attention_dropout": 1.0}, "attention_dropout=1.0"),
    ({"expert_dropout": -0.5}, "expert_dropout=-0.5"),
    ({"hidden_dropout": 0.1}, "hidden_dropout=0.1"),
    ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0"),
    ({"initializer_range": -0.02}, "initializer_range=-0.02"),
    *(
        ({"rope_theta": theta}, f"rope_theta={theta!r} must be a number above 0")
        for theta in (0, float("inf"), "10000")
    ),
    ({"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}}, "rope_type='nope' is unknown; .*longrope"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "rope_parameters: Missing .*'linear': {'factor"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}}, "division by zero"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor must be"),
    *(
        ({"rope_parameters": {**LONGROPE, **changes}}, message)
        for changes, message in (
            ({"short_factor": None}, "longrope's short_factor must be a list of numbers above 0"),
            ({"long_factor": [2.0] * 63 + ["2"]}, "longrope's long_factor must be a list"),
            ({"short_factor": [1.0] * 63}, "longrope's short_factor has 63 numbers and must have 64"),
            ({"original_max_position_embeddings": 1}, "original_max_position_embeddings=1 must be at least 2"),
            ({"short_mscale": 1.2}, "only one of short_mscale and long_mscale"),
            ({"short_mscale": 1.2, "long_mscale": -1}, "longrope's long_mscale=-1 must be a number above 0"),
            ({"attention_factor": 0}, "longrope's attention_factor=0"),
        )
    ),
]


@pytest.mark.parametrize(("fields", "message"), IMPOSSIBLE, ids=lambda value: str(value)[:40])
def test_impossible_values_are_refused(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        GrinMoeConfig(**copy.deepcopy(fields))  # transformers fills in what it is given
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(write_config(tmp_path, {"model_type": "grinmoe", **fields}))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"num_experts_per_tok": 17}, "num_experts_per_tok=17"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope's short_factor must be a list"),
    ],
)
@pytest.mark.parametrize("unused", [False, True])
def test_overrides_are_checked_too(override, message, unused, tmp_path):
    folder = write_config(tmp_path, {"model_type": "grinmoe"})
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(folder, return_unused_kwargs=unused, **override)
    config, unused = AutoConfig.from_pretrained(folder, num_experts=8, nonsense=1, return_unused_kwargs=True)
    assert (config.num_local_experts, unused) == (8, {"nonsense": 1})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "4096"),
        ("num_local_experts", True),
        ("sliding_window", 2047.5),
        ("router_jitter_noise", "0.01"),
        ("num_hidden_layers", None),
    ],
)
def test_wrong_types_are_refused(field, value, tmp_path):
    with pytest.raises(StrictDataclassFieldValidationError, match=rf"'{field}'(?s:.)*{value}"):
        GrinMoeConfig(**{field: value})
    with pytest.raises(StrictDataclassFieldValidationError, match=rf"'{field}'(?s:.)*{value}"):
        AutoConfig.from_pretrained(write_config(tmp_path, {"model_type": "grinmoe", field: value}))


def test_longrope_is_read_in_either_spelling(tmp_path):
    scaling = {**LONGROPE, "type": "longrope", "short_mscale": 1.2, "long_mscale": 1.3}
    theta = scaling.pop("rope_theta")
    length = scaling.pop("original_max_position_embeddings")
    del scaling["rope_type"]
    files = {
        "old": {"rope_theta": theta, "rope_scaling": {**scaling, "original_max_position_embeddings": length}},
        "beside": {"rope_theta": theta, "rope_scaling": scaling, "original_max_position_embeddings": length},
        "new": {"rope_parameters": {**LONGROPE, "type": "longrope", "short_mscale": 1.2, "long_mscale": 1.3}},
    }
    read = [
        GrinMoeConfig.from_pretrained(write_config(tmp_path / name, {"model_type": "phimoe", **copy.deepcopy(fields)}))
        for name, fields in files.items()
    ]
    for config in read:
        assert config.rope_parameters == files["new"]["rope_parameters"]
        config.save_pretrained(tmp_path / "saved")
        saved = GrinMoeConfig.from_pretrained(tmp_path / "saved")
        assert (saved.rope_parameters, saved.to_dict()) == (config.rope_parameters, config.to_dict())


def test_phimoe_fields_default_to_phimoes(tmp_path):
    ours = {field.name for field in dataclass_fields(GrinMoeConfig)} & {f.name for f in dataclass_fields(PhimoeConfig)}
    stock, defaults = PhimoeConfig(), GrinMoeConfig()
    config = GrinMoeConfig.from_pretrained(write_config(tmp_path, {"model_type": "phimoe"}))
    assert {name: getattr(config, name) for name in ours} == {name: getattr(stock, name) for name in ours}
    different = {name for name in ours if getattr(stock, name) != getattr(defaults, name)}
    assert different >= {
        *("rope_parameters", "attention_bias", "lm_head_bias", "input_jitter_noise", "sliding_window"),
        *("max_position_embeddings", "eos_token_id", "pad_token_id"),
    }
    assert (config.model_type, config.head_dim, config.expert_dropout) == ("grinmoe", 128, 0.0)
    config = GrinMoeConfig.from_dict(
        {"model_type": "phimoe", "rope_theta": 5.0, "num_experts": 4, "attention_bias": True}
    )
    assert (config.rope_parameters["rope_theta"], config.num_local_experts, config.attention_bias) == (5.0, 4, True)


@pytest.mark.parametrize(
    ("model_type", "architectures", "window", "expected"),
    [
        ("phimoe", ["PhiMoEForCausalLM"], 2047, 2047),  # remote code: keys before the query
        ("phimoe", ["PhimoeForCausalLM"], 2047, 2046),  # transformers: keys, the query's own included
        ("phimoe", ["PhimoeForSequenceClassification"], 2, 1),
        ("phimoe", ["PhimoeModel"], 2047, 2046),
        ("phimoe", ["PhimoeForCausalLM"], None, None),
        ("phimoe", None, 2047, 2047),
        ("phimoe", [], 1, 1),
        ("grinmoe", ["PhimoeForCausalLM"], 2047, 2047),
        ("grinmoe", ["GRIN-MoE"], 2047, 2047),
    ],
)
def test_a_phimoe_window_means_what_its_code_makes_of_it(model_type, architectures, window, expected, tmp_path):
    values = {"model_type": model_type, "architectures": architectures, "sliding_window": window}
    config = GrinMoeConfig.from_pretrained(write_config(tmp_path, values))
    assert config.sliding_window == expected
    assert GrinMoeConfig.from_pretrained(tmp_path, sliding_window=9).sliding_window == 9, "ours"
    config.save_pretrained(tmp_path)
    assert GrinMoeConfig.from_pretrained(tmp_path).sliding_window == expected, "once"
    refused = {"model_type": "phimoe", "architectures": ["PhimoeForCausalLM"], "sliding_window": 1}
    with pytest.raises(ValueError, match=r"sliding_window=1 of .*PhimoeForCausalLM.* at least 2"):
        GrinMoeConfig.from_dict(refused)
