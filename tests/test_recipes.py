"""Recipes: every shipped config is valid, each recipe runs from data to model, and what is wrong is said first."""

import ast
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
from rich.console import Console
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig
from typer.testing import CliRunner

from grin_moe_cli import app
from grin_moe_cli import recipes as recipes_commands
from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM
from modeling_grin.data import load_data
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
        for name in {field.name for field in fields(holder)} & set(given) - {
            "model_config",
            "fsdp_config",
            "report_to",
        }:
            assert getattr(holder, name) == given[name], name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_says_what_launch_override_limits_and_each_source(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    header = header_of(path)
    recipe = recipe_of(path).__name__.removeprefix("recipes.")
    command = (
        rf"accelerate launch (--config_file recipes/accelerate/(\w+)\.yaml )?.*recipes/{recipe}\.py --config (\S+)"
    )
    launch = re.search(command, header["Launch"])
    assert launch[3] == f"recipes/configs/{path.name}"
    assert launch[2] is None or launch[2] in {path.stem for path in LAUNCHES}
    for option in re.findall(r"--(\w+)", header["Override"]):
        assert any(option in {field.name for field in fields(part)} for part in recipe_of(path).parse(
            ["--config", str(path), "--use_cpu", "true"])), option  # fmt: skip
    for line in lines[len(header) :]:
        if not line.endswith("_config:"):
            assert re.search(r"  # (paper|release|ours)\b", line), line


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
    arguments, training = sft.parse([f"--config={path}", "--learning_rate", "1e-5", "--freeze_router", "true",
                                     "--model_config", '{"expert_dropout": 0.2}'])  # fmt: skip
    assert (training.learning_rate, training.max_steps) == (1e-5, 8)
    assert arguments.config_overrides == {"expert_dropout": 0.2, "freeze_router": True}
    arguments, _ = sft.parse([f"--config={path}", "--freeze_router", "false",
                              "--model_config", '{"router_aux_loss_coef": 0.5}'])  # fmt: skip
    assert arguments.config_overrides == {
        "expert_dropout": 0.1, "router_aux_loss_coef": 0.5, "freeze_router": False
    }  # fmt: skip
    arguments, _ = sft.parse([f"--config={path}"])
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


# ---- Data ----


def test_data_is_real_code(tmp_path):
    data.main(tmp_path, max_rows=48, max_characters=400, seed=0)
    pretrain_rows, sft_rows, dpo_rows = (read_rows(tmp_path / f"{name}.jsonl") for name in ("pretrain", "sft", "dpo"))
    sources = [" ".join(row["text"].split()) for row in pretrain_rows]
    assert len(sft_rows) == 48 and len(pretrain_rows) == 48 and 20 < len(dpo_rows) <= 48
    for row in sft_rows:
        question, answer = (message["content"] for message in row["messages"])
        (function,) = ast.parse(answer).body
        assert isinstance(function, ast.FunctionDef) and ast.get_docstring(function) is None
        signature, _, docstring = question.removeprefix("Write the Python function\n").partition("\n\n")
        assert answer.startswith(signature)
        body = " ".join(answer.removeprefix(signature).split())
        assert any(body in source and " ".join(docstring.split()) in source for source in sources)
    for row in dpo_rows:
        chosen, rejected = (row[key][0]["content"] for key in ("chosen", "rejected"))
        assert chosen != rejected and sorted(chosen.split("\n")) == sorted(rejected.split("\n"))
        assert chosen.split("\n")[0] == rejected.split("\n")[0]
        assert {"messages": row["prompt"] + row["chosen"]} in sft_rows


@pytest.mark.parametrize("form", ["rows.jsonl", "rows.json", "rows.parquet", "folder", "folder/*.jsonl", "rows.txt"])
def test_local_files_of_any_form(form, workdir, tmp_path):
    rows = [{"text": f"line {i}\nand its next"} for i in range(3)]
    target = tmp_path / form
    if form == "rows.parquet":
        Dataset.from_list(rows).to_parquet(target)
    elif form == "rows.json":
        target.write_text(json.dumps(rows))
    elif form == "rows.txt":
        target.write_text(rows[0]["text"])
        rows = rows[:1]  # a file is one text
    elif form == "rows.jsonl":
        write_rows(target, rows)
    else:
        (tmp_path / "folder").mkdir()
        for i, row in enumerate(rows):
            write_rows(tmp_path / "folder" / f"{i}.jsonl", [row])
    assert load_data(str(target)).to_list() == rows


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


def test_assistant_only_loss_is_on_what_the_assistant_says(trained_tokenizer, tmp_path):
    trainer, _ = padded_and_packed(trained_tokenizer, tmp_path, assistant_only_loss=True)
    for i, row in enumerate(trainer.train_dataset, start=1):
        learnt = [label for label in row["labels"] if label != -100]
        assert trained_tokenizer.decode(learnt) == "def f(x):\n" + "    x\n" * i + "<|end|>"
        assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))


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
    assert (card.data.library_name, card.data.base_model) == ("transformers", None)
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(pretrained / "tokenizer").get_vocab()
    model = AutoModelForCausalLM.from_pretrained(pretrained)
    assert model.config.vocab_size == len(tokenizer) == 512
    assert model.generation_config.eos_token_id == tokenizer.stop_token_ids


def test_pretrain_goes_on_from_a_checkpoint(pretrained, tmp_path):
    pretrain.main([
        "--model_name_or_path", str(pretrained), "--train_data", "data/pretrain.jsonl", "--block_size", "32",
        "--max_steps", "1", "--learning_rate", "0", "--output_dir", str(tmp_path), "--use_cpu", "true",
        "--model_config", '{"router_aux_loss_coef": 0.5}', "--report_to", "none", "--disable_tqdm", "true",
    ])  # fmt: skip
    before, after = (load_file(folder / "model.safetensors") for folder in (pretrained, tmp_path))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_json(tmp_path / "config.json")["router_aux_loss_coef"] == 0.5
    assert not (tmp_path / "tokenizer").exists()
    card = ModelCard.load(tmp_path / "README.md")
    assert "made from `pretrain_debug` (local) by pre-training" in card.text and "from scratch" not in card.text


def test_pretrain_resumes_from_a_folder_into_a_new_one(pretrained, tmp_path):
    run(pretrain, "pretrain_debug", "--output_dir", tmp_path / "new", "--resume_from_checkpoint",
        pretrained / "checkpoint-4")  # fmt: skip
    tensors = load_file(tmp_path / "new" / "checkpoint-8" / "model.safetensors")
    for name, tensor in load_file(pretrained / "checkpoint-8" / "model.safetensors").items():
        assert torch.equal(tensor, tensors[name]), name
    vocabulary = AutoTokenizer.from_pretrained(pretrained).get_vocab()
    assert AutoTokenizer.from_pretrained(tmp_path / "new" / "tokenizer").get_vocab() == vocabulary


def test_sft_learns_and_resumes_to_the_same_weights(tuned, tmp_path):
    history = read_json(tuned / "trainer_state.json")["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert sorted(path.name for path in tuned.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    card = ModelCard.load(tuned / "README.md")
    assert "made from `pretrain_debug` (local) by SFT" in card.text and "None" not in card.text
    assert f"| loss | {read_json(tuned / 'eval_results.json')['eval_loss']:.4g} |" in card.text
    assert (card.data.library_name, card.data.base_model) == ("transformers", None)
    assert {"grinmoe", "sft", "trl"} <= set(card.data.tags) and "lora" not in card.data.tags
    shutil.copytree(tuned / "checkpoint-4", tmp_path / "checkpoint-4")
    run(sft, "sft_debug", "--output_dir", tmp_path, "--resume_from_checkpoint", "true")
    resumed = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    for name, tensor in load_file(tuned / "checkpoint-8" / "model.safetensors").items():
        assert torch.equal(tensor, resumed[name]), name


def test_sft_with_frozen_routers(pretrained, tuned, tmp_path):
    run(sft, "sft_debug", "--output_dir", tmp_path, "--freeze_router", "true", "--max_steps", 2, "--eval_steps", 2,
        "--save_steps", 2)  # fmt: skip
    before, after, free = (load_file(folder / "model.safetensors") for folder in (pretrained, tmp_path, tuned))
    routers = {name for name in before if name.endswith("gate.weight")}
    assert len(routers) == 2 and all(torch.equal(before[name], after[name]) for name in routers)
    assert not any(torch.equal(before[name], free[name]) for name in routers)
    others = {name for name in before if "block_sparse_moe" not in name}  # an expert may get no token
    assert not any(torch.equal(before[name], after[name]) for name in others)


LORA = ["--lora_r", 2, "--max_steps", 2, "--eval_steps", 2, "--save_steps", 2]


@pytest.mark.parametrize("experts", [None, "linear"])
def test_sft_with_lora_leaves_adapter_and_merged_model(experts, pretrained, tmp_path, capsys):
    run(sft, "sft_debug", "--output_dir", tmp_path, *LORA, "--learning_rate", "1e-2",
        *(["--experts_implementation", experts] if experts else []))  # fmt: skip
    assert "parameters are trained" in capsys.readouterr().out
    for folder, library in ((tmp_path, "peft"), (tmp_path / "merged", "transformers")):
        card = ModelCard.load(folder / "README.md")
        assert card.data.library_name == library and ("lora" in card.data.tags) == (library == "peft")
        assert re.search("(for|made from) `pretrain_debug` .local. by SFT", card.text) and "None" not in card.text
    ids = torch.randint(512, (2, 40), generator=torch.Generator().manual_seed(0))
    base = AutoModelForCausalLM.from_pretrained(pretrained, experts_implementation=experts).eval()
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


def test_merging_into_a_quantised_base_is_refused_before_it_is_loaded(pretrained, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(pretrained, base, ignore=shutil.ignore_patterns("checkpoint-*", "model.safetensors"))
    config = read_json(base / "config.json")
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match=r"merge_adapter cannot merge into the quantised weights of .*base"):
        run(sft, "sft_debug", "--output_dir", tmp_path / "out", "--model_name_or_path", base, *LORA)


def test_a_card_that_is_there_is_left_alone(pretrained, tmp_path):
    """Though peft's save would write into it."""
    (tmp_path / "README.md").write_bytes(b"---\r\nlicense: mit\r\n---\r\nMine.\r\n")
    run(sft, "sft_debug", "--output_dir", tmp_path, *LORA, "--merge_adapter", "false")
    assert (tmp_path / "README.md").read_bytes() == b"---\r\nlicense: mit\r\n---\r\nMine.\r\n"


def test_sft_takes_the_chats_of_a_dataset_with_prompts_too(tuned, tmp_path):
    rows = read_rows("data/sft.jsonl")
    rows = [{"prompt": row["messages"][0]["content"], "prompt_id": str(i), **row} for i, row in enumerate(rows)]
    write_rows(tmp_path / "rows.jsonl", rows)
    run(sft, "sft_debug", "--output_dir", tmp_path, "--train_data", tmp_path / "rows.jsonl", "--seed", 42)
    losses, same = (
        [entry["loss"] for entry in read_json(folder / "trainer_state.json")["log_history"] if "loss" in entry]
        for folder in (tmp_path, tuned)
    )
    assert losses == same


def test_dpo_starts_at_a_margin_of_exactly_zero(tuned, tmp_path):
    """All weights; prompts may stand in the answers, which changes nothing."""
    rows = read_rows("data/dpo.jsonl")
    whole = [{answer: row["prompt"] + row[answer] for answer in ("chosen", "rejected")} for row in rows]
    write_rows(tmp_path / "rows.jsonl", whole)
    histories = []
    for data_file in ("data/dpo.jsonl", tmp_path / "rows.jsonl"):
        run(dpo, "dpo_debug", "--output_dir", tmp_path, "--train_data", data_file, "--max_steps", 3,
            "--logging_steps", 1, "--eval_strategy", "no", "--load_best_model_at_end", "false")  # fmt: skip
        history = read_json(tmp_path / "trainer_state.json")["log_history"]
        histories.append([(entry["loss"], entry["rewards/margins"]) for entry in history if "loss" in entry])
    assert histories[0] == histories[1]
    (loss, margin), *others = histories[0]
    assert margin == 0.0 and loss == pytest.approx(0.693147, abs=1e-5) and all(margin != 0.0 for _, margin in others)
    assert load_file(tmp_path / "model.safetensors").keys() >= RELEASED_NAMES
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers" and "dpo" in card.data.tags
    assert "`sft_debug` (local) by DPO" in card.text and "| loss | " in card.text


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


@pytest.mark.parametrize(
    ("config", "rows", "arguments", "message"),
    [
        ("sft_debug", None, ["--train_data", "data/none.jsonl"], r"data/none\.jsonl: no such file or folder"),
        ("sft_debug", [], [], "rows.jsonl is empty"),
        ("sft_debug", BROKEN, [], "rows.jsonl cannot be read as json"),
        ("sft_debug", [{"chat": 1}] * 9, [], r"must have the columns messages or prompt and .*'chat"),
        ("sft_debug", [CHAT] * 9, ["--max_length", "2048"], "max_length=2048 is longer than.*=1024"),
        ("sft_debug", [CHAT] * 9, ["--max_length", "16"], "all labels are masked"),
        ("sft_debug", [{"messages": CHAT["messages"][:1]}] * 9, [], "row 0: messages must have an assistant turn"),
        ("sft_debug", [CHAT] * 9, ["--eval_fraction", "none"], "eval_strategy=steps needs one of eval_data"),
        ("sft_debug", [CHAT] * 9, ["--eval_fraction", "1.5"], "eval_fraction must be between 0 and 1; got 1.5"),
        ("sft_debug", [CHAT] * 9, ["--eval_data", "x.jsonl"], "eval_fraction and eval_data .* at odds"),
        ("sft_debug", [CHAT] * 9, ["--lora_r", "2", "--lora_router", "true", "--freeze_router", "true"], "at odds"),
        ("sft_debug", [CHAT] * 9, ["--model_config", '{"num_expert": 4}'], "GrinMoeConfig has no field num_expert"),
        ("sft_debug", [CHAT] * 9, ["--model_config", '{"eos_token_id": 7}'], r"eos_token_id is 3 .*endoftext.* and 7"),
        ("sft_debug", [CHAT] * 9, ["--model_config", "{expert"], r"--model_config.*: \{expert is not JSON"),
        ("sft_debug", [CHAT] * 9, ["--model_config", "[1]"], r"--model_config.*: must be a JSON object.*; got \[1\]"),
        ("sft_debug", [CHAT] * 9, ["--model_name_or_path", "output/sft_dbug"], "path=output/sft_dbug: no such folder"),
        ("sft_debug", [CHAT] * 9, ["--tokenizer_name_or_path", "no/to/ken"], "tokenizer_name_or_path=no/to/ken: no"),
        ("pretrain_debug", [{"text": "a b " * 99}] * 20, ["--experts_implementation", "wide"],
         "`experts_implementation=.?wide"),
        ("sft_debug", [CHAT] * 9, ["--train_split", "train_sft"], "train_split=train_sft is for datasets on the Hub"),
        ("sft_debug", [CHAT] * 9, ["--eval_fraction", "none", "--eval_split", "test"], "eval_split=test is for"),
        ("sft_debug", [CHAT] * 9, ["--lora_alpha", "64"], "lora_alpha=64 needs LoRA: set lora_r"),
        ("sft_debug", [CHAT] * 9, ["--resume_from_checkpoint", "data"], "resume_from_checkpoint=data is not a compl"),
        ("sft_debug", [{"messages": [{"from": "a", "value": "b"}]}] * 9, [], "row 0: messages must be a list of"),
        ("sft_debug", [*[CHAT] * 8, {"messages": None}], [], "row 8: messages must be .*; got None"),
        ("sft_debug", [{"messages": "hello"}] * 9, [], "row 0: messages must be .*; got 'hello'"),
        ("sft_debug", [CHAT, {"messages": []}] * 5, [], r"row 1: messages must be .*; got \[\]"),
        ("sft_debug", [{"text": 3}] * 9, ["--assistant_only_loss", "false"],
         r"text must hold text; got Value\('int64'\)"),
        ("sft_debug", [{"prompt": "a", "completion": SAID}] * 9, [], "prompt holds text and completion does not"),
        ("dpo_debug", [{"prompt": "a", "chosen": SAID, "rejected": SAID}] * 9, [], "chosen and rejected does not"),
        ("dpo_debug", [PAIR, {**PAIR, "rejected": None}] * 5, [], "row 1: rejected must be text; got null"),
        ("dpo_debug", [PAIR] * 9, ["--eval_fraction", "none", "--eval_data", "data/sft.jsonl"],
         "eval_data=data/sft.jsonl has no column chosen, rejected"),
        ("dpo_debug", [{"chosen": "a", "rejected": "b"}] * 9, [], "has no column prompt; its columns are"),
        ("dpo_debug", [PAIR] * 9, ["--disable_dropout", "false"], "expert_dropout=0.1 is at odds"),
        ("pretrain_debug", [{"text": 3}] * 20, [], r"text must hold text; got Value\('int64'\)"),
        ("pretrain_debug", [*[{"text": "a"}] * 20, {"text": None}], [], "row 20: text must be text; got null"),
        ("sft_debug", [CHAT] * 9, ["--load_in_4bit", "true"], "load_in_4bit needs LoRA"),
        ("sft_debug", [CHAT] * 9, ["--dtype", "float8"], "dtype must be float32, bfloat16 or float16; got float8"),
        ("sft_debug", [CHAT] * 9, ["--max_step", "3"], "--max_step"),
        ("sft_debug", [CHAT] * 9, ["--max_steps", "many"], "max_steps.*invalid int value: 'many'"),
        ("sft_debug", [CHAT] * 9, ["--resume_from_checkpoint", "true"], "no complete checkpoint to resume from"),
        ("dpo_debug", [PAIR] * 9, ["--model_config", '{"router_sampling": true}'], "router_sampling=True is at odds"),
        ("dpo_debug", [PAIR] * 9, ["--max_length", "16"], "whose prompt alone fills max_length=16, is empty"),
        ("dpo_debug", [{**PAIR, "chosen": "a b " * 900}] * 9, ["--max_length", "none"], "tokens are more than"),
        ("pretrain_debug", [{"body": "a"}] * 9, [], "has no column text"),
        ("pretrain_debug", [{"text": "a"}] * 20, [], "block_size=64 tokens, is empty"),
        ("pretrain_debug", [{"text": "a" * 99}] * 20, ["--block_size", "2048"], "block_size=2048 is longer than"),
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


def test_a_key_the_recipe_does_not_know_is_an_error(tmp_path):
    (tmp_path / "mine.yaml").write_text("train_data: x\nlearning_rat: 1.0e-3\n")
    with pytest.raises(SystemExit, match="learning_rat"):
        sft.main(["--config", str(tmp_path / "mine.yaml"), "--use_cpu", "true"])


def test_a_folder_of_several_formats_is_an_error(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "b.txt").write_text("b")
    with pytest.raises(ValueError, match=r"several formats \(json, text\)"):
        load_data(str(tmp_path))


# ---- Layouts (real launches: tests/distributed/test_launch.py) ----


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("recipe", "environment", "arguments", "message"),
    [
        ("sft", {**FSDP2, "FSDP_VERSION": "1"}, [], "fsdp_version must be 2 .*; got 1"),
        ("sft", {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}, [],
         "must multiply to the 1 processes .*; got .* x tp_size=2"),
        ("sft", {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"}, [],
         "context and sequence parallelism are not supported"),
        ("sft", FSDP2, ["--lora_r", "2", "--load_in_4bit", "true"], "load_in_4bit needs all layers in each process"),
        ("sft", {}, ["--pipeline_parallel_size", "2"], "must be a multiple of pp_size=2 .*; got 1"),
        ("sft", {}, ["--pipeline_parallel_size", "2", "--pipeline_schedule", "2F2B"],
         "pipeline_schedule must be GPipe, 1F1B or Interleaved1F1B; got 2F2B"),
        ("sft", {}, ["--pipeline_schedule", "GPipe"], "pipeline_schedule=GPipe needs a pipeline"),
        ("sft", {}, ["--pipeline_parallel_size", "0"], "pipeline_parallel_size must be at least 1; got 0"),
        ("sft", {**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, ["--pipeline_parallel_size", "2"],
         "a pipeline has neither fsdp_offload_params nor dp_replicate_size"),
        ("sft", {**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, [], "fsdp_activation_checkpointing is not read"),
        ("dpo", FSDP2, [], "DPO of all weights needs whole models in each process"),
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


def test_recipes_ls_names_every_recipe_and_config_with_what_it_does(monkeypatch):
    monkeypatch.setattr(recipes_commands, "console", Console(width=400))
    shown = {}
    for line in cli("ls").stdout.splitlines()[1:]:
        name, what = line.split(None, 1)
        shown[name] = what.strip()
    files = [*(ROOT / "recipes").glob("*.py"), *(ROOT / "recipes").rglob("*.yaml")]
    assert shown.keys() == {path.stem for path in files} and len(shown) == len(files)
    assert shown["dpo"] == dpo.__doc__.splitlines()[0]
    for path in CONFIGS:
        assert shown[path.stem] == path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# What: ")


def test_recipes_cp_copies_and_never_overwrites(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, copied, source in (
        (["sft"], "sft.py", "sft.py"),
        (["sft_debug.yaml", "mine/own.yaml"], "mine/own.yaml", "configs/sft_debug.yaml"),
        (["dpo_grin", "mine"], "mine/dpo_grin.yaml", "configs/dpo_grin.yaml"),
        (["sft_tiny", "new/"], "new/sft_tiny.yaml", "configs/sft_tiny.yaml"),
        (["sft_tiny", "[bold]x"], "[bold]x", "configs/sft_tiny.yaml"),
    ):
        done = cli("cp", *arguments)
        assert done.exit_code == 0 and done.stdout.split() == ["copied", "to", copied]
        assert Path(copied).read_bytes() == (ROOT / "recipes" / source).read_bytes()
    Path("sft.py").write_text("mine")
    again = cli("cp", "sft")
    assert again.exit_code == 1 and "sft.py exists" in str(again.exception)
    assert Path("sft.py").read_text() == "mine"
    assert "no recipe 'stf'" in str(cli("cp", "stf").exception)
