"""The recipes under `accelerate launch` with each file of recipes/accelerate: real processes, the same training."""

import json

import pytest
from launch import ROOT, accelerate_launch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from recipes import data, pretrain, sft

STEPS = 4
COMMON = ["--max_steps", str(STEPS), "--save_steps", "2", "--logging_steps", "1", "--eval_strategy", "no",
          "--eval_fraction", "0.02", "--load_best_model_at_end", "false", "--activation_checkpointing", "true",
          "--disable_tqdm", "true", "--learning_rate", "1e-2"]  # fmt: skip

# recipe, accelerate's file, processes, rows of a micro-batch, micro-batches, arguments; 8 rows a step in all of them
LAUNCHES = {
    "single": ("pretrain", "single", 1, 2, 4, []),
    "fsdp2": ("sft", "fsdp2", 2, 2, 2, []),
    "fsdp2_offload": ("pretrain", "fsdp2_offload", 2, 2, 2, []),
    "fsdp2_tp": ("pretrain", "fsdp2_tp", 4, 2, 2, ["--parallelism_config_dp_shard_size=2"]),
    "hsdp": (
        "sft", "hsdp", 4, 1, 2, ["--parallelism_config_dp_replicate_size=2", "--parallelism_config_dp_shard_size=2"]
    ),
    "pipeline": ("sft", "pipeline", 2, 2, 4, ["--pipeline_parallel_size", "2"]),
    "pipeline_interleaved": (
        "pretrain", "pipeline", 2, 2, 4, ["--pipeline_parallel_size", "2", "--pipeline_schedule", "Interleaved1F1B"]
    ),
    "pipeline_tp": ("pretrain", "pipeline_tp", 8, 1, 4, ["--pipeline_parallel_size", "2"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A folder with data, a model to fine-tune, and each recipe's run in this process."""
    folder = tmp_path_factory.mktemp("launch")
    data.main(folder / "data", max_rows=200, max_characters=400, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        for recipe, module in (("pretrain", pretrain), ("sft", sft)):
            module.main([*arguments(recipe, folder, 2, 4), "--bf16", "true", "--output_dir", str(folder / recipe)])
        yield folder


def arguments(recipe, folder, micro_batch, accumulation):
    given = [
        "--config",
        str(ROOT / "recipes" / "configs" / f"{recipe}_debug.yaml"),
        *COMMON,
        "--train_data",
        str(folder / "data" / f"{recipe}.jsonl"),
        "--per_device_train_batch_size",
        str(micro_batch),
        "--gradient_accumulation_steps",
        str(accumulation),
    ]
    if recipe == "pretrain":  # layers for two stages of two chunks each
        return [*given, "--model_config", '{"num_hidden_layers": 4}']
    return [*given, "--model_name_or_path", str(folder / "pretrain"), "--neftune_noise_alpha", "0",
            "--model_config", '{"expert_dropout": 0.0, "router_aux_loss_coef": 0.01}']  # fmt: skip


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHES)
def test_recipe_trains_alike_in_every_layout(name, workdir, tmp_path):
    """In bfloat16 autocast, with activation checkpointing, gradient accumulation and the load-balance loss."""
    recipe, config, processes, micro_batch, accumulation, more = LAUNCHES[name]
    given = [*arguments(recipe, workdir, micro_batch, accumulation), "--output_dir", str(tmp_path / "out"), *more]
    accelerate_launch(config, processes, recipe, *given)
    out = tmp_path / "out"
    assert losses(out) == pytest.approx(losses(workdir / recipe), rel=2e-3)
    assert (out / f"checkpoint-{STEPS}" / "scheduler.pt").is_file()
    tensors, expected = {}, {}
    for found, folder in ((tensors, out), (expected, workdir / recipe)):
        for file in folder.glob("*.safetensors"):
            found.update(load_file(file))
    assert {key: value.shape for key, value in tensors.items()} == {
        key: value.shape for key, value in expected.items()
    }
    AutoModelForCausalLM.from_pretrained(out)
