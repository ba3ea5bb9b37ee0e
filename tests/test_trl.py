"""Every trainer of trl: stock Phimoe, ours and ours with the mixin in front train alike, or the mixin refuses."""

import importlib
import random

import pytest
import runs
import torch
from checkpoints import released_config, released_tensors, write_checkpoint
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging
from trl.trainer.base_trainer import _TELEMETRY_TRAINERS

from modeling_grin import GrinMoeConfig
from modeling_grin.training import GrinMoeTrainerMixin
from modeling_grin.training.trl_rules import COUNTED, ONE_PASS, check_trl_trainer

ROWS = 8
WORDS = ["def", "return", "import", "class", "self", "value", "index", "range", "list", "yield"]


def texts(length, seed=0):
    generator = random.Random(seed)
    return [" ".join(generator.choice(WORDS) for _ in range(length)) for _ in range(ROWS)]


def turns(length, role="user"):
    return [[{"role": role, "content": text}] for text in texts(length)]


def reward(completions, **kwargs):
    return [float(len(str(completion)) % 7) for completion in completions]


PAIRS = {"prompt": texts(3), "chosen": texts(4, seed=1), "rejected": texts(7)}
CHATS = {"messages": [user + answer for user, answer in zip(turns(3), turns(5, "assistant"), strict=True)]}
SAMPLED = {"max_completion_length": 4, "num_generations": 2}
REWARD = {"reward_funcs": reward}
TEACHER = {"teacher_model": None}  # the model's own checkpoint

# Trainer: columns, arguments of its config, its own arguments, and what is 0 where both passes route alike.
CASES = {
    "SFT": ({"text": texts(9)}, {}, {}, []),
    "Reward": (PAIRS, {"pad_token": "<unk>"}, {}, []),  # Phimoe takes an end that is the padding token for padding
    "CPO": (PAIRS, {}, {}, []),
    "ORPO": (PAIRS, {}, {}, []),
    "TPO": (PAIRS | {"reference": texts(6)}, {}, {}, []),
    "DPO": (PAIRS, {}, {}, ["rewards/margins", "rewards/chosen"]),
    "KTO": ({"prompt": texts(3), "completion": texts(5), "label": [True, False] * (ROWS // 2)}, {}, {},
            ["kl", "rewards/chosen"]),
    "GRPO": ({"prompt": texts(3)}, {"beta": 0.1, "steps_per_generation": 4, **SAMPLED}, REWARD, ["kl"]),
    "RLOO": ({"prompt": texts(3)}, {"beta": 0.1, "steps_per_generation": 4, **SAMPLED}, REWARD, ["kl"]),
    "GMPO": ({"prompt": texts(3)}, {"beta": 0.1, **SAMPLED}, REWARD, ["kl"]),
    "OnlineDPO": ({"prompt": texts(3)}, {"max_new_tokens": 4}, REWARD, ["objective/kl", "rewards/margins"]),
    "A2PO": ({"prompt": texts(3)}, {"max_completion_length": 4}, REWARD, ["implicit_reward"]),
    "Distillation": ({"prompt": turns(3)}, {"max_completion_length": 4}, TEACHER, ["loss"]),
    "GKD": (CHATS, {"lmbda": 0.5, "max_new_tokens": 4}, TEACHER, ["loss"]),
    "GOLD": (CHATS, {"lmbda": 0.5, "max_completion_length": 4, "use_uld_loss": False}, TEACHER, ["loss"]),
    "IWOPD": (CHATS, {"lmbda": 1.0, "max_completion_length": 4}, TEACHER, ["loss"]),
    "SDFT": ({"prompt": turns(3), "privileged_context": texts(5)}, {"max_completion_length": 4}, {}, []),
    "SDPO": ({"prompt": turns(3)}, SAMPLED, REWARD, []),
}  # fmt: skip
FOLDERS = {"OnlineDPO": "online_dpo", "IWOPD": "iw_opd"}
NEED_A_SERVER = {"AsyncGRPO", "AsyncDistillation", "ServerDistillation"}  # vLLM's, which is not here
ONLINE = sorted(name for name in CASES if f"{name}Trainer" not in COUNTED)
COMPARING = sorted(name for name in CASES if f"{name}Trainer" not in ONE_PASS)


def test_every_trainer_is_here():
    assert {f"{name}Trainer" for name in {*CASES, *NEED_A_SERVER}} == _TELEMETRY_TRAINERS


def class_of(name, with_mixin):
    """The trainer's class and that of its arguments."""
    module = importlib.import_module("trl")
    if not hasattr(module, f"{name}Trainer"):
        module = importlib.import_module(f"trl.experimental.{FOLDERS.get(name, name.lower())}")
    stock = getattr(module, f"{name}Trainer")
    return type(name, (GrinMoeTrainerMixin, stock), {}) if with_mixin else stock, getattr(module, f"{name}Config")


@pytest.fixture(scope="module")
def folder(trained_tokenizer, tmp_path_factory):
    """The same weights as GRIN-MoE and as Phimoe. Without a keep set Phimoe's training has nothing to sample."""
    folder = tmp_path_factory.mktemp("trl")
    special = {f"{kind}_token_id": getattr(trained_tokenizer, f"{kind}_token_id") for kind in ("bos", "eos")}
    special["pad_token_id"] = None  # the end's, for whose embedding Phimoe would have no gradient
    config = released_config(**runs.ROUTED_ALIKE, vocab_size=len(trained_tokenizer), **special)
    tensors = released_tensors(config)
    kept = {"router_sampling": False, "router_jitter_noise": 0.3}
    gshard = {"router_estimator": "gshard"}
    forms = {"grinmoe": {"router_sampling": False}, "phimoe": runs.PHIMOE, "keep set": kept, "gshard": gshard}
    for name, fields in forms.items():
        trained_tokenizer.save_pretrained(write_checkpoint(folder / name, config | fields, tensors))
    return folder


def make_trainer(name, folder, tokenizer, output_dir, model_type="grinmoe", with_mixin=True, config=None, **settings):
    columns, arguments, others, _ = CASES[name]
    trainer_class, config_class = class_of(name, with_mixin)
    arguments = {
        "output_dir": output_dir, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1,
        "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant", "use_cpu": True, "bf16": False,
        "save_strategy": "no", "logging_steps": 1, "report_to": "none", "disable_tqdm": True,
        "gradient_checkpointing": False, **arguments, **settings,
    }  # fmt: skip
    own = {key: others[key] for key in others if key not in TEACHER}
    if "teacher_model" in others:
        own["teacher_model"] = AutoModelForCausalLM.from_pretrained(folder / model_type)
    auto_class = AutoModelForSequenceClassification if name == "Reward" else AutoModelForCausalLM
    head = {"num_labels": 1} if name == "Reward" else {}
    model = auto_class.from_pretrained(folder / model_type, **head, **(config or {}))
    if head:
        model.score.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    return trainer_class(
        model=model, args=config_class(**arguments), train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer, **own,
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_stock_ours_and_the_mixin_train_alike(folder, trained_tokenizer, tmp_path, name):
    """A step on two micro-batches: every logged number and every weight; 0 where passes are compared.

    Phimoe's routing advances torch's generator, so that rollouts of its are others. The mixin counts the tokens that
    are passed with a gradient.
    """
    forms = [("phimoe", False)] * (name not in ONLINE) + [("grinmoe", False), ("grinmoe", True)]
    trainers = [make_trainer(name, folder, trained_tokenizer, tmp_path, *form) for form in forms]
    passed = []

    def count(module, args, kwargs):
        if torch.is_grad_enabled():
            passed.append(int((kwargs["attention_mask"] if "attention_mask" in kwargs else args[1]).sum()))

    if name not in ONLINE:
        trainers[-1].model.model.register_forward_pre_hook(count, with_kwargs=True)
    expected, *others = map(runs.train_stock, trainers)
    assert len(passed) == (0 if name in ONLINE else 2)
    assert trainers[-1]._announced["num_tokens"] == (None if name in ONLINE else sum(passed))
    assert len(expected[0]) == 2 and "loss" in expected[0][0]
    for actual in others:
        runs.assert_trained_alike(actual, expected)
    for key in CASES[name][3]:
        assert others[-1][0][0][key] == pytest.approx(0, abs=1e-6 if key == "loss" else 0), key


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_ratios_are_one_where_nothing_is_learnt(folder, trained_tokenizer, tmp_path, name):
    """epsilon clips all others. (Rows have others beside them: the ratios of Phimoe, too, are off by ulps.)"""
    trainer = make_trainer(
        name, folder, trained_tokenizer, tmp_path, "keep set", learning_rate=0.0, epsilon=1e-5, max_steps=4
    )  # fmt: skip
    logs, _ = runs.train_stock(trainer)
    assert len(logs) == 5
    for log in logs[:4]:
        assert log["clip_ratio/region_mean"] == 0 and log.get("kl", 0) == 0
    assert any(log["grad_norm"] > 0 for log in logs[:4])


@pytest.mark.parametrize("name", ["DPO", "GRPO"])
def test_passes_that_route_differently_are_refused(folder, trained_tokenizer, tmp_path, name):
    """Before any data is prepared."""
    released = {"router_sampling": True, "input_jitter_noise": 0.01}
    message = (
        r"router_sampling=True, input_jitter_noise=0.01 is at odds .*: set router_sampling=False, input_jitter_noise=0"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(name, folder, trained_tokenizer, tmp_path, config=released)


class Model:
    """All that the rules read of a model."""

    def __init__(self, **config):
        self.config = GrinMoeConfig(**{"router_sampling": False, "input_jitter_noise": 0.0, **config})


@pytest.mark.parametrize("name", CASES)
def test_rules_of_every_trainer(name):
    check_trl_trainer(f"{name}Trainer", Model(), None, False)
    for config, refused, message in (
        ({"router_sampling": True}, name in COMPARING, "router_sampling=True is at odds"),
        ({"router_aux_loss_coef": 0.1}, name in ONLINE, rf"coef=0.1 .* {name}Trainer .*: set router_aux_loss_coef=0"),
    ):
        if refused:
            with pytest.raises(ValueError, match=message):
                check_trl_trainer(f"{name}Trainer", Model(**config), None, False)
        else:
            check_trl_trainer(f"{name}Trainer", Model(**config), None, False)


def test_estimators_without_noise_are_not_refused(folder, trained_tokenizer, tmp_path):
    """trl loads the reference from the model's folder: what was set while loading the model is not in there."""
    logs, _ = runs.train_stock(make_trainer("DPO", folder, trained_tokenizer, tmp_path, "gshard"))
    assert logs[0]["rewards/margins"] == 0
    with pytest.raises(ValueError, match=r"reference model has router_estimator=sparsemixer_v2 and the .*=gshard"):
        make_trainer("DPO", folder, trained_tokenizer, tmp_path, config={"router_estimator": "gshard"})


def test_plain_trl_is_told_once(folder, trained_tokenizer, tmp_path, caplog):
    """A policy without labels inside, and rollouts in training mode."""
    released = {"router_sampling": True, "input_jitter_noise": 0.01, "router_jitter_noise": 0.3}
    for name in ("DPO", "GRPO"):
        logging.warning_once.cache_clear()
        trainer = make_trainer(name, folder, trained_tokenizer, tmp_path, with_mixin=False, config=released)
        caplog.clear()
        with caplog.at_level("WARNING", logger="transformers"):
            runs.train_stock(trainer)
        told = [
            record.getMessage() for record in caplog.records if "compared with another pass" in record.getMessage()
        ]
        assert len(told) == 1 and "set router_sampling=False and input_jitter_noise=0" in told[0], name
