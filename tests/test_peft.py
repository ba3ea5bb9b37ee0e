"""Every method that peft has, beside stock Mixtral; what is adapted, and what is said where no expert is."""

import pytest
import runs
import torch
from peft import LoraConfig, PeftModel, PeftType, PromptTuningConfig, TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import MixtralConfig, MixtralForCausalLM, Trainer
from transformers.utils import logging

from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM
from modeling_grin.training import GrinMoeTrainer, add_lora

SIZES = {
    "vocab_size": 131, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.3,
    "sliding_window": None, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "use_cache": False,
}  # fmt: skip
IDS = torch.randint(3, 131, (2, 12), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}

# What a method needs, or what of its defaults is too large for a tiny model.
SETTINGS = {
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 3, "num_tasks": 2},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 16},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "CARTRIDGE": {"num_virtual_tokens": 3},
    "CPT": {"cpt_token_ids": [5, 6, 7], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 4]},
    "LORA": {"target_modules": ["q_proj", "v_proj"]},  # peft's default for Mixtral raises
    "ADALORA": {"target_modules": ["q_proj", "v_proj"], "total_step": 10},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "VBLORA": {"target_modules": ["q_proj", "v_proj"], "vector_length": 8, "num_vectors": 16},
    "TRAINABLE_TOKENS": {"token_indices": IDS[0, :4].tolist()},
    "XLORA": {"hidden_size": 32},
    "MISS": {"r": 4},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "C3A": {"block_size": 8},
    "WAVEFT": {"n_frequency": 64},
    "FOURIERFT": {"n_frequency": 64},
}  # fmt: skip
NEED_A_TASK = ("MULTITASK_PROMPT_TUNING", "POLY")
# Not on matrices but on norms, on embeddings, beside the layers; and Poly, which is refused there.
NOT_ON_EXPERTS = ("LN_TUNING", "TRAINABLE_TOKENS", "SHADOW", "XLORA", "POLY")


def build(kind):
    """Ours with `kind` experts, or stock Mixtral; the same sizes, and nothing drawn in training."""
    torch.manual_seed(0)
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**SIZES)).eval()
    config = GrinMoeConfig(**SIZES, attention_bias=False, router_sampling=False, input_jitter_noise=0.0)
    return GrinMoeForCausalLM._from_config(config, experts_implementation=kind).eval()


def method_config(method, kind, folder):
    config_class, name = PEFT_TYPE_TO_CONFIG_MAPPING[method], method.value
    settings = {"task_type": TaskType.CAUSAL_LM, **SETTINGS.get(name, {})}
    if kind == "linear" and "target_modules" in config_class.__dataclass_fields__ and name not in NOT_ON_EXPERTS:
        settings["target_modules"] = ["q_proj", "w1", "w2", "w3"]
    if name == "XLORA":
        settings["adapters"] = {}
        for adapter in "01":
            lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
            get_peft_model(build(kind), lora).save_pretrained(folder / adapter)
            settings["adapters"][adapter] = str(folder / adapter)
    return config_class(**settings)


def use(kind, method, folder):
    """What comes of a method on a model, from `get_peft_model` to a merge; saved and loaded, it is the same."""
    model = build(kind)
    more = {"task_ids": torch.zeros(2, dtype=torch.long)} if method.value in NEED_A_TASK else {}

    def logits(adapted):
        with torch.no_grad():
            return adapted.eval()(**BATCH, **more).logits[:, -IDS.shape[1] :]

    base = logits(model) if not more else model(**BATCH).logits.detach()
    try:
        config = method_config(method, kind, folder)
        torch.manual_seed(1)
        adapted = get_peft_model(model, config)
    except ValueError as error:  # peft knows some methods for certain model types alone
        return {"refused": str(error).partition(":")[0]}
    start = logits(adapted)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=10.0)
    adapted.train()(**BATCH, **more, labels=IDS).loss.backward()
    optimizer.step()
    trained = logits(adapted)
    result = {"starts as the base": torch.allclose(start, base, atol=1e-4), "learns": not torch.equal(trained, start)}

    adapted.save_pretrained(folder / "saved")
    loaded = PeftModel.from_pretrained(build(kind), folder / "saved")
    torch.testing.assert_close(logits(loaded), trained, rtol=0, atol=1e-5)
    if hasattr(loaded, "merge_and_unload"):
        try:
            merged = loaded.merge_and_unload()
        except (ValueError, NotImplementedError) as error:
            result["merges"] = str(error)
        else:
            result["merges"] = torch.allclose(logits(merged), trained, rtol=1e-3, atol=1e-3)
    return result


def test_poly_is_refused_on_experts():
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.POLY](task_type="CAUSAL_LM", target_modules=["w1"])
    with pytest.raises(ValueError, match=r"`target_modules` of Poly must match no expert; got .*experts\.0\.w1"):
        get_peft_model(build("linear"), config).train()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", list(PeftType), ids=lambda method: method.value)
def test_every_method_does_what_it_does_for_mixtral(tmp_path, monkeypatch, method):
    """With fused experts on what peft adapts by default, with linear ones on the experts, too."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))  # BOFT's lock, which a killed process leaves for ever
    expected = use("mixtral", method, tmp_path / "mixtral")
    assert "refused" in expected or expected["learns"], f"{expected}: give {method.value} its SETTINGS"
    assert expected.get("merges") is not False or method is PeftType.XLORA  # scaled by its input, merged without
    for kind in ("grouped_mm", "linear"):
        assert use(kind, method, tmp_path / kind) == expected, kind


# ---- What is adapted ----


class Relative(GrinMoeForCausalLM):
    """A subclass with a model type of its own."""

    class config_class(GrinMoeConfig):
        model_type = "grinmoe_relative"


def adapted_modules(model):
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def test_lora_has_a_default():
    """Mixtral's, for subclasses as well."""
    for model in (build("grouped_mm"), Relative(Relative.config_class(**SIZES))):
        assert adapted_modules(get_peft_model(model, LoraConfig(r=2))) == {"q_proj", "v_proj"}


def by_peft(**settings):
    return lambda model, folder: get_peft_model(model, LoraConfig(r=2, **settings))


def by_transformers(model, folder=None):
    try:
        model.add_adapter(LoraConfig(r=2, target_modules="all-linear"))
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(f"transformers asks for a newer peft: {error}")
    return model


def by_loading(model, folder):
    get_peft_model(build("grouped_mm"), LoraConfig(r=2)).save_pretrained(folder)
    return PeftModel.from_pretrained(model, folder, is_trainable=True)


RECIPE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # the one everybody copies
FUSED = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize(
    ("kind", "adapt", "warns"),
    [
        ("grouped_mm", by_peft(), True),
        ("grouped_mm", by_peft(target_modules=RECIPE), True),
        ("linear", by_peft(target_modules=RECIPE), True),
        ("grouped_mm", by_transformers, True),
        ("grouped_mm", by_loading, True),
        ("grouped_mm", by_peft(target_modules=[], target_parameters=FUSED[1:]), False),
        ("linear", by_peft(target_modules="all-linear"), False),
        ("grouped_mm", lambda model, folder: add_lora(model, r=2, experts=False), False),
        ("grouped_mm", lambda model, folder: model, False),
    ],
    ids=["default", "recipe", "recipe, linear experts", "add_adapter", "loaded", "one of the experts' parameters",
         "all-linear, linear experts", "add_lora, without experts", "nothing"],
)  # fmt: skip
def test_adapters_on_no_expert_are_warned_of(tmp_path, caplog, kind, adapt, warns):
    """Once, when training begins, whoever has built them; not where experts were left out by name."""
    logging.warning_once.cache_clear()
    model = adapt(build(kind), tmp_path).eval()
    assert "on no expert" not in caplog.text
    for _ in range(2):
        model.train()
    assert caplog.text.count("adapters are on ") == warns
    if warns:
        names = ", ".join(sorted(adapted_modules(model)))
        assert f"adapters are on {names} and on no expert" in caplog.text
        assert "target_parameters=['experts.gate_up_proj', 'experts.down_proj']" in caplog.text


def test_trainers_pass_the_warning_on(tmp_path, caplog):
    logging.warning_once.cache_clear()
    model = by_transformers(runs.make_model())
    runs.make_trainer(tmp_path, model, trainer_class=Trainer, max_steps=1).train()
    assert "on no expert" in caplog.text


# ---- The load-balance loss and virtual tokens ----

V = 3  # virtual tokens, in SETTINGS


def prompted(method, coefficient):
    model = runs.make_model(router_aux_loss_coef=coefficient)
    torch.manual_seed(0)
    return get_peft_model(model, method_config(method, "grouped_mm", None))


def rows_of_a_step(task):
    dataset = runs.Rows()
    for row in dataset.rows:
        row |= {"task_ids": torch.tensor(0)} if task else {}
    return dataset


def expected_balance_gradients(method):
    """Of n sum_i f_i mean_t softmax(z_t)_i over all tokens that pass through the layers, written out in float64."""
    model = prompted(method, 0.0).double().train()
    model.config._experts_implementation = "eager"
    rows = rows_of_a_step(method.value in NEED_A_TASK).rows[:8]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0] if key != "labels"}
    outputs = model(**batch, output_router_logits=True, output_selected_experts=True)
    counted = batch["attention_mask"].bool()
    if method.value not in ("PREFIX_TUNING", "CARTRIDGE"):  # these are in the cache
        counted = torch.nn.functional.pad(counted, (V, 0), value=True)
    losses = []
    for logits, experts in zip(outputs.router_logits, outputs.selected_experts, strict=True):
        logits, experts = logits[counted.reshape(-1)], experts[counted.reshape(-1)]
        fractions = torch.stack([(experts == expert).double().mean() for expert in range(logits.shape[-1])])
        losses.append(logits.shape[-1] * (fractions * logits.softmax(-1).mean(0)).sum())
    torch.stack(losses).mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("method", "accumulation"),
    [(PeftType.PROMPT_TUNING, 1), (PeftType.P_TUNING, 2), (PeftType.PREFIX_TUNING, 2), (PeftType.CPT, 2)],
    ids=str,
)
def test_virtual_tokens_are_tokens_of_the_step(tmp_path, method, accumulation):
    """In the balance loss they are counted where the step's tokens are."""

    def make(coefficient, callback):
        trainer = runs.make_trainer(
            tmp_path, prompted(method, coefficient), accumulation=accumulation, micro_batch=8 // accumulation,
            callbacks=[callback], exact_balance=accumulation > 1, max_steps=1, remove_unused_columns=False,
        )  # fmt: skip
        trainer.train_dataset.rows = rows_of_a_step(method.value in NEED_A_TASK).rows
        return trainer

    actual = runs.balance_gradients(make)
    expected = expected_balance_gradients(method)
    scale = max(float(tensor.norm()) for tensor in expected.values())
    assert scale > 1e-4
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name].double(), tensor, rtol=1e-3, atol=1e-4 * scale, msg=name)


def test_virtual_tokens_count_towards_the_context(tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(runs.make_model(max_position_embeddings=runs.LENGTH + 2), config)
    with pytest.raises(ValueError, match=f"the length of a sequence.*{runs.LENGTH + 3}"):
        runs.make_trainer(tmp_path, model, trainer_class=GrinMoeTrainer).train()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    "method", ["PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE", "SHADOW", "LORA"]
)
def test_generation_is_greedy_over_full_passes(method, use_cache):
    """Since transformers 5.24 stock models lose the virtual tokens, or see them again with every new token."""
    model = get_peft_model(build("grouped_mm"), method_config(PeftType(method), "grouped_mm", None)).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.5, generator=generator)
    task = {"task_ids": torch.zeros(2, dtype=torch.long)} if method in NEED_A_TASK else {}
    expected = IDS
    with torch.no_grad():
        for _ in range(6):
            logits = model(
                input_ids=expected, attention_mask=torch.ones_like(expected), use_cache=False, **task
            ).logits
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
        actual = model.generate(
            **BATCH, **task, max_new_tokens=6, do_sample=False, eos_token_id=None, use_cache=use_cache
        )
    assert torch.equal(actual, expected)
