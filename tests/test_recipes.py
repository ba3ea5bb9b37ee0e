"""Recipes: every shipped config is valid, each recipe runs from data to model, and what is wrong is said first."""

import json
import math
import re
import shutil
from dataclasses import fields
from itertools import chain
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import released_config, released_tensors, write_checkpoint
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig
from typer.testing import CliRunner

from grin_moe_cli import app
from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM
from modeling_grin.training import data_checks
from modeling_grin.training.trl_trainers import GrinMoeSFTTrainer
from recipes import data, dpo, grpo, pretrain, sft

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = [  # those of evaluate.py: test_evaluate.py
    path for path in sorted((ROOT / "recipes" / "configs").glob("*.yaml")) if not path.stem.startswith("evaluate_")
]
LAUNCHES = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
RECIPES = {"pretrain": pretrain, "sft": sft, "dpo": dpo, "grpo": grpo}
RELEASED_NAMES = {  # a few of the released layout
    "model.layers.1.block_sparse_moe.experts.3.w2.weight",
    "model.layers.0.block_sparse_moe.gate.weight",
    "lm_head.bias",
}


def recipe_of(config):
    return RECIPES[config.stem.partition("_")[0]]


def run(recipe, config, *arguments):
    """Run a recipe in this process, quietly, with a shipped config."""
    path = ROOT / "recipes" / "configs" / f"{config}.yaml"
    recipe.main(["--config", str(path), "--disable_tqdm", "true", *map(str, arguments)])


def header_of(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    header = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    assert list(header) == ["What", "Launch", "Override", "Limits"]
    return header


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module", autouse=True)
def quiet():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "1")  # TRL counts its runs elsewhere, but not these
        yield


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A folder with data/, and the current one: where the debug configs expect their files."""
    folder = tmp_path_factory.mktemp("recipes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        data.main(Path("data"), max_rows=48, max_characters=400, seed=0)
        whole = read_rows("data/pretrain.jsonl")  # modules, whose evaluation would take most of a run
        write_rows(Path("data/pretrain.jsonl"), [{"text": row["text"][:1500]} for row in whole])
        yield folder


@pytest.fixture(scope="module")
def pretrained(workdir):
    """What pretrain_debug leaves."""
    run(pretrain, "pretrain_debug")
    return workdir / "output" / "pretrain_debug"


@pytest.fixture(scope="module")
def tuned(pretrained):
    """What sft_debug makes of it."""
    run(sft, "sft_debug")
    return pretrained.parent / "sft_debug"


# ---- Configs ----


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_is_valid(path):
    arguments, training = recipe_of(path).parse(["--config", str(path), "--use_cpu", "true"])
    config = GrinMoeConfig(**arguments.config_overrides)
    lengths = {pretrain: lambda: arguments.block_size, grpo: lambda: training.max_completion_length}
    length = lengths.get(recipe_of(path), lambda: training.max_length)()
    assert length <= config.max_position_embeddings
    assert arguments.eval_fraction and training.eval_strategy != "no"
    if recipe_of(path) in (dpo, grpo):
        data_checks.check_preference_routing(config)
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    for holder in (arguments, training):
        others = {"model_config", "fsdp_config", "report_to"}
        for name in {field.name for field in fields(holder)} & set(given) - others:
            assert getattr(holder, name) == given[name], name


def test_pretrain_grin_has_the_released_sizes():
    given = yaml.safe_load((CONFIGS[0].parent / "pretrain_grin.yaml").read_text(encoding="utf-8"))
    released, config = GrinMoeConfig(), GrinMoeConfig(**given["model_config"])
    differing = {name for name in given["model_config"] if getattr(config, name) != getattr(released, name)}
    assert differing == {"router_aux_loss_coef"}
    ranks = 64 // given["pipeline_parallel_size"]
    tokens = ranks * given["per_device_train_batch_size"] * given["gradient_accumulation_steps"] * given["block_size"]
    assert given["max_steps"] * tokens == pytest.approx(4e12, rel=1e-6)


def test_the_command_line_overrides_the_file():
    path = CONFIGS[0].parent / "sft_debug.yaml"
    arguments, training = sft.parse(["--config", str(path), "--learning_rate", "1e-5", "--freeze_router", "true",
                                     "--model_config", '{"expert_dropout": 0.2}'])  # fmt: skip
    assert (training.learning_rate, training.max_steps) == (1e-5, 8)
    assert arguments.config_overrides == {"expert_dropout": 0.2, "freeze_router": True}
    arguments, _ = sft.parse(["--config", str(path), "--freeze_router", "false",
                              "--model_config", '{"router_aux_loss_coef": 0.5}'])  # fmt: skip
    assert arguments.config_overrides == {
        "expert_dropout": 0.1, "router_aux_loss_coef": 0.5, "freeze_router": False
    }  # fmt: skip
    arguments, _ = sft.parse(["--config", str(path)])
    assert arguments.config_overrides == {"expert_dropout": 0.1}


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_shipped_layout_names_itself_and_leaves_recomputation_to_the_trainer(path):
    """FSDP's own activation checkpointing would draw other dropout when it recomputes."""
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe, config = re.search(
        r"recipes/(\w+)\.py --config recipes/configs/(\w+)\.yaml", header_of(path)["Launch"]
    ).groups()
    assert f"--config_file recipes/accelerate/{path.name}" in header_of(path)["Launch"]
    assert config in {path.stem for path in CONFIGS} and config.startswith(recipe)
    assert "fsdp_activation_checkpointing" not in given.get("fsdp_config", {})
    assert given.get("fsdp_config", {"fsdp_version": 2})["fsdp_version"] == 2
    sizes = given.get("parallelism_config", {}).values()
    assert given["num_processes"] % math.prod(sizes) == 0


@pytest.mark.parametrize("path", [*LAUNCHES, *CONFIGS], ids=lambda path: path.stem)
def test_estimates_in_headers_are_the_planners(path):
    text = header_of(path)["Limits"]
    is_lora = path.stem.startswith("lora_") or path.stem in ("sft_grin_lora", "sft_grin_qlora")
    found = re.match(r"(.+): ([\d.]+) GB a GPU and ([\d.]+) s per 1M tokens .*\(`grin-moe (plan .+?)`\)", text)
    assert bool(found) == is_lora
    if not is_lora:
        return
    assert "not run by us at this size" in text
    name, gigabytes, seconds, command = found.groups()
    plans = json.loads(CliRunner().invoke(app, [*command.split(), "--json"]).stdout)["layouts"]
    (estimate,) = [plan for plan in plans if plan["layout"]["name"] == name]
    assert estimate["fits"] and float(gigabytes) == round(estimate["memory"]["total"] / 1e9, 1)
    assert float(seconds) == pytest.approx(1e6 / estimate["tokens_per_second"], rel=5e-3)
    if path in LAUNCHES:
        given, layout = yaml.safe_load(path.read_text(encoding="utf-8")), estimate["layout"]
        sizes = given.get("parallelism_config", {}).values()
        assert given["num_processes"] == layout["devices"]
        assert list(sizes) == ([layout["dp_replicate"], layout["fsdp"]] if sizes else [])


# ---- Data ----


def test_blocks_are_the_stream_of_texts(trained_tokenizer):
    texts = ["def f():\n    return 1\n", "", "x = 2\n" * 9]
    packed = pretrain.pack(Dataset.from_dict({"body": texts}), "body", trained_tokenizer, 8)
    stream = []
    for text in texts:
        stream += [*trained_tokenizer.encode(text), trained_tokenizer.eos_token_id]
    assert packed.column_names == ["input_ids", "labels"]
    assert list(chain.from_iterable(packed["input_ids"])) == stream[: len(stream) // 8 * 8]
    assert all(row["labels"] == row["input_ids"] and len(row["labels"]) == 8 for row in packed)


def padded_and_packed(tokenizer, tmp_path, **settings):
    """SFT trainers on the same chats, packed and not, with the same model of random weights and greedy routing."""
    config = released_config(
        vocab_size=len(tokenizer), torch_dtype="float32", bos_token_id=1, eos_token_id=3, pad_token_id=3
    )
    folder = write_checkpoint(tmp_path / "model", config, released_tensors(config))
    chats = [
        [{"role": "user", "content": f"what is {i}?"}, {"role": "assistant", "content": "def f(x):\n" + "    x\n" * i}]
        for i in range(1, 6)
    ]
    rows = Dataset.from_dict({"messages": chats})
    for packing in (False, True):
        model = GrinMoeForCausalLM.from_pretrained(
            folder, attn_implementation="sdpa", router_sampling=False, input_jitter_noise=0.0
        )
        arguments = SFTConfig(
            output_dir=tmp_path / "out", packing=packing, max_length=128, per_device_eval_batch_size=8, bf16=False,
            use_cpu=True, report_to="none", disable_tqdm=True, activation_checkpointing=False, **settings,
        )  # fmt: skip
        yield GrinMoeSFTTrainer(model, arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)


@pytest.mark.parametrize("assistant_only_loss", [False, True])
def test_packed_loss_and_gradient_equal_those_row_by_row(assistant_only_loss, trained_tokenizer, tmp_path):
    padded, packed = padded_and_packed(trained_tokenizer, tmp_path, assistant_only_loss=assistant_only_loss)
    assert len(packed.eval_dataset) < len(padded.eval_dataset) == 5
    model = padded.model.eval()
    loss, count = 0, 0
    for row in padded.eval_dataset:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        loss = loss + cross_entropy(logits.double(), labels, reduction="sum")
        count += int((labels != -100).sum())
    loss = loss / count
    loss.backward()
    gradient = model.model.layers[0].self_attn.v_proj.weight.grad
    assert packed.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert padded.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)

    inputs = packed.data_collator(list(packed.train_dataset))
    assert "attention_mask" not in inputs and int((inputs["position_ids"] == 0).sum()) == 5
    packed.model.train()
    packed.compute_loss(packed.model, inputs).backward()
    packed_gradient = packed.model.model.layers[0].self_attn.v_proj.weight.grad
    torch.testing.assert_close(packed_gradient, gradient, rtol=1e-4, atol=1e-6)


# ---- Runs ----


def test_pretrain_leaves_the_best_model_in_the_released_layout(pretrained):
    tensors = load_file(pretrained / "model.safetensors")
    assert tensors.keys() >= RELEASED_NAMES
    state = read_json(pretrained / "trainer_state.json")
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = pretrained / f"checkpoint-{min(losses, key=losses.get)}"
    for name, tensor in load_file(best / "model.safetensors").items():
        assert torch.equal(tensor, tensors[name]), name
    assert read_json(pretrained / "eval_results.json")["eval_loss"] == pytest.approx(min(losses.values()), rel=1e-5)
    assert min(losses.values()) < 6.1 < torch.tensor(512.0).log(), "less than without training"
    card = ModelCard.load(pretrained / "README.md")
    assert "trained from scratch by pre-training" in card.text
    assert f"| loss | {min(losses.values()):.4g} |" in card.text
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(pretrained / "tokenizer").get_vocab()
    model = AutoModelForCausalLM.from_pretrained(pretrained)
    assert model.config.vocab_size == len(tokenizer) == 512
    assert model.generation_config.eos_token_id == tokenizer.stop_token_ids


def test_sft_learns_and_resumes_to_the_same_weights(tuned, tmp_path):
    history = read_json(tuned / "trainer_state.json")["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert sorted(path.name for path in tuned.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    assert "made from `pretrain_debug` (local) by SFT" in ModelCard.load(tuned / "README.md").text
    shutil.copytree(tuned / "checkpoint-4", tmp_path / "checkpoint-4")
    run(sft, "sft_debug", "--output_dir", tmp_path, "--resume_from_checkpoint", "true")
    resumed = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    for name, tensor in load_file(tuned / "checkpoint-8" / "model.safetensors").items():
        assert torch.equal(tensor, resumed[name]), name


LORA = ["--lora_r", 2, "--max_steps", 2, "--eval_steps", 2, "--save_steps", 2]


def test_sft_with_lora_leaves_adapter_and_merged_model(pretrained, tmp_path, capsys):
    run(sft, "sft_debug", "--output_dir", tmp_path, *LORA, "--learning_rate", "1e-2")
    assert "trainable params" in capsys.readouterr().out
    for folder, library in ((tmp_path, "peft"), (tmp_path / "merged", "transformers")):
        card = ModelCard.load(folder / "README.md")
        assert card.data.library_name == library and ("lora" in card.data.tags) == (library == "peft")
        assert re.search("(for|made from) `pretrain_debug` .local. by SFT", card.text) and "None" not in card.text
    ids = torch.randint(512, (2, 40), generator=torch.Generator().manual_seed(0))
    base = AutoModelForCausalLM.from_pretrained(pretrained).eval()
    with torch.no_grad():
        untuned = base(ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path).eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(ids).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)
    assert (adapted - untuned).abs().max() > 1e-3
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() >= RELEASED_NAMES
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template


def test_a_refused_merge_is_one_sentence_after_all_else_is_written(pretrained, tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*the merge is refused") as raised:
        run(sft, "sft_debug", "--output_dir", tmp_path, *LORA, "--learning_rate", "1e-6", "--dtype", "bfloat16",
            "--experts_implementation", "linear")  # fmt: skip
    assert "\n" not in str(raised.value)
    assert (tmp_path / "adapter_model.safetensors").is_file() and not (tmp_path / "merged").exists()
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "peft"


def test_dpo_starts_at_a_margin_of_exactly_zero(tuned, tmp_path):
    """All weights; prompts stand in the answers."""
    rows = read_rows("data/dpo.jsonl")
    whole = [{answer: row["prompt"] + row[answer] for answer in ("chosen", "rejected")} for row in rows]
    write_rows(tmp_path / "rows.jsonl", whole)
    run(dpo, "dpo_debug", "--output_dir", tmp_path, "--train_data", tmp_path / "rows.jsonl", "--max_steps", 2,
        "--logging_steps", 1, "--eval_strategy", "no", "--load_best_model_at_end", "false")  # fmt: skip
    history = read_json(tmp_path / "trainer_state.json")["log_history"]
    (loss, margin), *others = [(entry["loss"], entry["rewards/margins"]) for entry in history if "loss" in entry]
    assert margin == 0.0 and loss == pytest.approx(0.693147, abs=1e-5) and all(margin != 0.0 for _, margin in others)
    assert load_file(tmp_path / "model.safetensors").keys() >= RELEASED_NAMES
    assert "`sft_debug` (local) by DPO" in ModelCard.load(tmp_path / "README.md").text


def test_dpo_with_lora_compares_with_the_model_without_it(tuned, tmp_path):
    run(dpo, "dpo_debug", "--output_dir", tmp_path, *LORA, "--logging_steps", 1)
    history = [entry for entry in read_json(tmp_path / "trainer_state.json")["log_history"] if "loss" in entry]
    assert history[0]["rewards/margins"] == 0.0 != history[1]["rewards/margins"]
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() >= RELEASED_NAMES
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "peft"


def test_grpo_rewards_completions_like_the_answer(tuned, tmp_path):
    run(grpo, "grpo_debug", "--output_dir", tmp_path, *LORA, "--learning_rate", 0)
    history = [entry for entry in read_json(tmp_path / "trainer_state.json")["log_history"] if "loss" in entry]
    for entry in history:
        assert 0 < entry["rewards/similarity/mean"] < 1 and entry["kl"] == 0
        assert entry["clip_ratio/region_mean"] == 0
    assert grpo.similarity(["abcd", [{"content": "xbyd"}], "z"], ["abcd", "abcd", "abcd"]) == [1, 0.5, 0]
    assert load_file(tmp_path / "adapter_model.safetensors")


def test_sft_trains_adapters_on_4_bits(pretrained, tmp_path):
    run(sft, "sft_debug", "--output_dir", tmp_path, "--load_in_4bit", "true", "--lora_r", 2, "--max_steps", 2,
        "--eval_steps", 2, "--save_steps", 2)  # fmt: skip
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert sum(".experts.0.w1.lora_A" in name for name in names) == 2, "one for each layer"
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() >= RELEASED_NAMES  # of the unquantised files


# ---- What is wrong is said in one sentence ----

CHAT = {"messages": [{"role": "user", "content": "hello " * 20}, {"role": "assistant", "content": "hi"}]}
BROKEN = ["{broken"]
PAIR = {"prompt": "hello " * 20, "chosen": "yes", "rejected": "no"}
SAID = CHAT["messages"]
LONG = {"messages": [SAID[0], {"role": "assistant", "content": "a b " * 900}]}


@pytest.mark.parametrize(
    ("config", "rows", "arguments", "message"),
    [
        ("sft_debug", None, ["--train_data", "data/none.jsonl"], r"data/none\.jsonl: no such file or folder"),
        ("sft_debug", [], [], "rows.jsonl is empty"),
        ("sft_debug", BROKEN, [], "rows.jsonl cannot be read as json"),
        ("sft_debug", [{"chat": 1}] * 9, [], r"must have the columns messages or prompt and .*'chat"),
        ("sft_debug", [CHAT] * 9, ["--max_length", "2048"], "max_length=2048 is longer than.*=1024"),
        ("sft_debug", [CHAT] * 9, ["--eval_fraction", "none"], "eval_strategy"),

        ("sft_debug", [CHAT] * 9, ["--lora_r", "2", "--lora_router", "true", "--freeze_router", "true"], "freezes"),
        ("sft_debug", [CHAT] * 9, ["--model_config", '{"num_expert": 4}'], "GrinMoeConfig has no field num_expert"),
        ("sft_debug", [CHAT] * 9, ["--model_config", '{"eos_token_id": 7}'], r"eos_token_id is 3 .*endoftext.* and 7"),
        ("sft_debug", [CHAT] * 9, ["--model_config", "[1]"], r"--model_config.*: invalid json_object value: '\[1\]'"),
        ("sft_debug", [CHAT] * 9, ["--model_name_or_path", "output/sft_dbug"], "error: output/sft_dbug, as a folder"),
        ("sft_debug", [CHAT] * 9, ["--train_split", "train_sft"], "splits and configurations are of datas"),

        ("sft_debug", [CHAT] * 9, ["--lora_alpha", "64"], "lora_alpha=64 needs LoRA: set lora_r"),
        ("sft_debug", [CHAT] * 9, ["--resume_from_checkpoint", "data"], "data is not a complete checkpoint: "),
        ("sft_debug", [CHAT] * 9, ["--resume_from_checkpoint", "true"], "no complete checkpoint to resume from"),
        ("sft_debug", [CHAT, {"messages": SAID[:1]}] * 5, [], "row 1: messages must have an assistant turn"),
        ("sft_debug", [{"messages": [{"from": "a", "value": "b"}]}] * 9, [], "row 0: messages must be a list of"),
        ("sft_debug", [CHAT, {"messages": []}] * 5, [], r"row 1: messages must be .*; got \[\]"),
        ("dpo_debug", [{"prompt": "a", "chosen": SAID, "rejected": SAID}] * 9, [], "got text in prompt, messages in"),
        ("dpo_debug", [PAIR, {**PAIR, "rejected": None}] * 5, [], "row 1: rejected must be text; got None"),
        ("dpo_debug", [{"chosen": "a", "rejected": "b"}] * 9, [], "has no column prompt; its columns are"),
        ("dpo_debug", [PAIR] * 9, ["--disable_dropout", "false"], "expert_dropout=0.1 is at odds"),
        ("pretrain_debug", [{"text": 3}] * 20, [], r"must hold text in text; got Value\('int64'\)"),
        ("sft_debug", [CHAT] * 9, ["--load_in_4bit", "true"], "load_in_4bit=True needs LoRA"),
        ("sft_debug", [CHAT] * 9, ["--max_step", "3"], "--max_step"),
        ("dpo_debug", [PAIR] * 9, ["--model_config", '{"router_sampling": true}'], "router_sampling=True is at odds"),
        ("dpo_debug", [PAIR] * 9, ["--max_length", "16"], "whose prompt alone fills max_length=16, is empty"),
        ("dpo_debug", [{**PAIR, "chosen": "a b " * 900}] * 9, ["--max_length", "none"], "tokens are more than"),
        ("sft_debug", [CHAT, LONG] * 9, ["--max_length", "none", "--packing", "0"], "tokens are more than the mod"),
        ("pretrain_debug", [{"text": "a"}] * 20, [], "block_size=64 tokens, is empty"),
        ("pretrain_debug", [{"text": "a b c d e f g"}] * 40, ["--eval_fraction", "0.01"], "evaluation data, cut into"),
        ("pretrain_debug", [{"text": "a"}] * 20, ["--dtype", "float33"], "dtype must be float32, .*; got float33"),
        ("pretrain_debug", [{"text": "a"}], ["--tokenizer_name_or_path", "x"], "one of tokenizer_vocab_size and"),
        ("pretrain_debug", [{"text": "a"}] * 20, ["--model_config", '{"vocab_size": 99}'], "vocab_size is 99"),
    ],
)  # fmt: skip
def test_an_error_comes_first_and_is_one_sentence(config, rows, arguments, message, tuned, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    given = list(arguments)
    if rows is not None:
        path = write_rows(tmp_path / "rows.jsonl", [] if rows == BROKEN else rows)
        if rows == BROKEN:
            path.write_text(BROKEN[0])
        given += ["--train_data", str(path)]
    with pytest.raises(SystemExit, match=message) as raised:
        run(RECIPES[config.partition("_")[0]], config, "--output_dir", tmp_path / "out", *given)
    assert str(raised.value).startswith("error: ") and "\n" not in str(raised.value)
    assert not list(tmp_path.glob("out/checkpoint-*"))


# ---- Layouts (real launches: tests/distributed/test_launch.py) ----


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("recipe", "environment", "arguments", "message"),
    [
        ("sft", {**FSDP2, "FSDP_VERSION": "1"}, [], "fsdp_version=1 instead of 2"),
        ("sft", {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}, [],
         "must multiply to the 1 processes .*; got .* x tp_size=2"),
        ("sft", {}, ["--pipeline_parallel_size", "2"], "must be a multiple of pp_size=2 .*; got 1"),
        ("sft", {}, ["--pipeline_parallel_size", "2", "--pipeline_schedule", "2F2B"],
         "pipeline_schedule must be one of GPipe, 1F1B, Interleaved1F1B; got '2F2B'"),
        ("sft", {**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, ["--pipeline_parallel_size", "2"],
         "in a pipeline fsdp_offload_params or dp_replicate_size"),
        ("sft", {**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, [], "must not set fsdp_activation_checkpointing"),
        ("grpo", FSDP2, [], "GRPO generates and compares on each rank"),
        ("dpo", {}, ["--pipeline_parallel_size", "2"], "DPO of all weights needs whole models in each process"),
    ],
)  # fmt: skip
def test_a_layout_that_cannot_be_is_an_error(recipe, environment, arguments, message, tuned, tmp_path, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=message) as raised:
        run(RECIPES[recipe], f"{recipe}_debug", "--output_dir", tmp_path / "out", *arguments)
    assert "\n" not in str(raised.value)


# ---- grin-moe recipes ----


def cli(*arguments):
    return CliRunner().invoke(app, ["recipes", *map(str, arguments)])


def test_recipes_cp_copies_and_never_overwrites(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, copied, source in (
        (["sft"], "sft.py", "sft.py"),
        (["sft_debug.yaml", "mine/own.yaml"], "mine/own.yaml", "configs/sft_debug.yaml"),
        (["sft_tiny", "new/"], "new/sft_tiny.yaml", "configs/sft_tiny.yaml"),
    ):
        done = cli("cp", *arguments)
        assert done.exit_code == 0 and done.stdout.split() == ["copied", "to", copied]
        assert Path(copied).read_bytes() == (ROOT / "recipes" / source).read_bytes()
    Path("sft.py").write_text("mine")
    again = cli("cp", "sft")
    assert again.exit_code == 1 and "sft.py exists" in str(again.exception)
    assert Path("sft.py").read_text() == "mine"
    assert "no recipe 'stf'" in str(cli("cp", "stf").exception)
