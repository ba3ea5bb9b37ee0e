"""The recipes as `accelerate launch` starts them with each file of recipes/accelerate: the same training."""

import json

import pytest
import torch
from launch import launch_recipe
from peft import PeftModel
from processes import ROOT
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from recipes import data, pretrain, sft

STEPS = 4
# Adam without what it makes of gradients that are all but 0.
COMMON = ["--max_steps", str(STEPS), "--save_steps", str(STEPS), "--adam_epsilon", "1e-3",
          "--logging_steps", "1", "--eval_strategy", "no",
          "--eval_fraction", "0.02", "--load_best_model_at_end", "false", "--activation_checkpointing", "true",
          "--disable_tqdm", "true", "--learning_rate", "1e-2"]  # fmt: skip
COEFFICIENT = 1.0  # of the load-balance loss: large, so that its part of the update can be told from rounding
# Of bfloat16's rounding, relative. Measured: at most 7e-5 and 0.017.
LOSS_TOLERANCE, UPDATE_TOLERANCE = 1.5e-3, 0.1  # bfloat16; 1.1e-3 on a CPU with AVX2 alone

# hsdp's micro-batches have 4 rows over all ranks, and so have those of the run that it is compared with.
HSDP_BATCHES = ("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2")
# accelerate's file: recipe, processes, rows of a micro-batch, micro-batches, arguments; 8 rows a step in all of them,
# and 2 (hsdp: 4) in a micro-batch of all ranks, which the load-balance loss is a function of
LAUNCHES = {
    "ddp": ("pretrain", 2, 1, 4, []),
    "fsdp2": ("sft", 2, 1, 4, []),
    "fsdp2_offload": ("pretrain", 2, 1, 4, []),
    "fsdp2_tp": ("pretrain", 4, 1, 4, ["--parallelism_config_dp_shard_size=2"]),
    "hsdp": (
        "pretrain", 4, 1, 2,
        ["--parallelism_config_dp_replicate_size=2", "--parallelism_config_dp_shard_size=2"]
    ),
    "pipeline": ("sft", 2, 2, 4, ["--pipeline_parallel_size", "2"]),
    "pipeline_tp": ("pretrain", 4, 2, 4, ["--pipeline_parallel_size", "2"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A folder with data, and runs in this process: each recipe's; `hsdp`, pre-training in its micro-batches; `start`,
    where pre-training begins, and `no_balance`, pre-training without the load-balance loss."""
    folder = tmp_path_factory.mktemp("launch")
    data.main(folder / "data", max_rows=60, max_characters=400, seed=0)
    modules = folder / "data" / "pretrain.jsonl"
    texts = [json.loads(line)["text"][:1500] for line in modules.read_text(encoding="utf-8").splitlines()]
    modules.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        for name, recipe, module, more in (
            ("pretrain", "pretrain", pretrain, []),
            ("hsdp", "pretrain", pretrain, [*HSDP_BATCHES]),
            ("start", "pretrain", pretrain, ["--max_steps", "1", "--learning_rate", "0"]),
            ("no_balance", "pretrain", pretrain, model_config(0.0, num_hidden_layers=4)),
            ("sft", "sft", sft, []),
        ):
            given = [*arguments(recipe, folder, 2, 4), *more, "--bf16", "true", "--output_dir", str(folder / name)]
            module.main(given)
        yield folder


def model_config(coefficient, **fields):
    return ["--model_config", json.dumps({"router_aux_loss_coef": coefficient, **fields})]


def arguments(recipe, folder, micro_batch, accumulation):
    given = ["--config", str(ROOT / "recipes" / "configs" / f"{recipe}_debug.yaml"), *COMMON,
             "--train_data", str(folder / "data" / f"{recipe}.jsonl"), "--per_device_train_batch_size",
             str(micro_batch), "--gradient_accumulation_steps", str(accumulation)]  # fmt: skip
    if recipe == "pretrain":  # layers for two stages of two chunks each
        return [*given, *model_config(COEFFICIENT, num_hidden_layers=4)]
    noise = [] if recipe == "grpo" else ["--neftune_noise_alpha", "0"]
    return [*given, "--model_name_or_path", str(folder / "pretrain"), *noise,
            *model_config(COEFFICIENT, expert_dropout=0.0)]  # fmt: skip


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def weights(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def update_difference(actual, expected, start):
    """Norm of the difference of two updates, relative to the second's."""
    actual, expected, start = weights(actual), weights(expected), weights(start)
    shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (actual, expected, start)]
    assert shapes[0] == shapes[1] == shapes[2]
    norm = torch.stack([(expected[name] - start[name]).norm() for name in start]).norm()
    assert norm > 0.5  # the run has learnt something
    return float(torch.stack([(actual[name] - expected[name]).norm() for name in start]).norm() / norm)


def loss_difference(actual, expected):
    pairs = zip(losses(actual), losses(expected), strict=True)
    return max(abs(a / e - 1) for a, e in pairs)


def test_the_balance_loss_is_seen(workdir):
    """Its absence is more than the tolerances of the launches. Measured: losses 0.0043, updates 0.31."""
    without, expected = workdir / "no_balance", workdir / "pretrain"
    assert loss_difference(without, expected) > 2 * LOSS_TOLERANCE
    assert update_difference(without, expected, workdir / "start") > 2 * UPDATE_TOLERANCE


@pytest.mark.parametrize("name", LAUNCHES)
def test_recipe_trains_alike_in_every_layout(name, workdir, tmp_path):
    """In bfloat16 autocast, with activation checkpointing, gradient accumulation and the load-balance loss."""
    recipe, processes, micro_batch, accumulation, more = LAUNCHES[name]
    given = [*arguments(recipe, workdir, micro_batch, accumulation), "--output_dir", str(tmp_path / "out"), *more]
    assert launch_recipe(name, processes, recipe, *given).count("the group is left") == processes
    out, expected = tmp_path / "out", workdir / ("hsdp" if name == "hsdp" else recipe)
    start = workdir / {"pretrain": "start", "sft": "pretrain"}[recipe]
    assert loss_difference(out, expected) < LOSS_TOLERANCE
    assert update_difference(out, expected, start) < UPDATE_TOLERANCE
    assert (out / f"checkpoint-{STEPS}" / "scheduler.pt").is_file()
    AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize(
    ("name", "processes", "recipe", "more"),
    [
        ("fsdp2_tp", 4, "sft", ["--parallelism_config_dp_shard_size=2"]),
        ("pipeline", 2, "sft", ["--pipeline_parallel_size", "2", "--load_in_4bit", "true"]),
        ("fsdp2", 2, "dpo", []),
        ("fsdp2", 2, "grpo", ["--max_completion_length", "4", "--max_steps", "2", *model_config(0.0)]),
    ],
)
def test_lora_leaves_an_adapter_and_the_merged_model(name, processes, recipe, more, workdir, tmp_path):
    out = tmp_path / "out"
    more = ["--lora_r", "4", *more, "--output_dir", str(out)]
    launch_recipe(name, processes, recipe, *arguments(recipe, workdir, 1, 4), *more)
    experts = {"experts_implementation": "linear"} if "--load_in_4bit" in more else {}
    base, before = AutoModelForCausalLM.from_pretrained(workdir / "pretrain", **experts), weights(workdir / "pretrain")
    ids = torch.randint(5, 100, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base, out).eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(out / "merged").eval()(ids).logits
    torch.testing.assert_close(merged, expected, rtol=1e-3, atol=1e-4)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(out / "merged").items())
    assert weights(out / "merged").keys() == before.keys()
