"""The bridge to other trainers (`make test-bridge`): `--to phimoe`, trl on transformers 4, `--to hub` back."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from checkpoints import released_config, released_tensors, write_checkpoint
from safetensors.torch import load_file

from conversion import convert
from modeling_grin import GrinMoeForCausalLM

PYTHON = Path(os.environ.get("BRIDGE_PYTHON", ".venv-bridge/bin/python")).absolute()
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="transformers 4 has its own environment: make test-bridge")
TRAIN = """
import sys, torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
source, result, steps = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
print("STOCK", type(model).__name__)
if int(steps):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("self_attn" in name)
    data = Dataset.from_dict({"text": ["import sys", "import os"] * 4})
    config = SFTConfig(output_dir=result + "-run", max_steps=int(steps), report_to=[], use_cpu=True, bf16=False,
                       gradient_checkpointing=False, learning_rate=1e-2, save_strategy="no")
    tokenizer = AutoTokenizer.from_pretrained(source)
    trainer = SFTTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
model.save_pretrained(result)
"""


@pytest.fixture(scope="module")
def source(trained_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bridge")
    special = {f"{kind}_token_id": getattr(trained_tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    config = released_config(vocab_size=len(trained_tokenizer), sliding_window=7, **special)
    write_checkpoint(folder / "release", config, released_tensors(config), num_shards=2)
    trained_tokenizer.save_pretrained(folder / "release")
    convert(folder / "release", folder / "phimoe", to="phimoe")
    return folder


def there_and_back(source, tmp_path, steps):
    """The tensors of the release, and those that come back; the model that they are loaded into."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": ""}
    command = [PYTHON, "-c", TRAIN, source / "phimoe", tmp_path / "trained", str(steps)]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0 and "STOCK PhimoeForCausalLM" in result.stdout, result.stderr[-4000:]
    convert(tmp_path / "trained", tmp_path / "back", to="hub", dtype="bfloat16")
    before = {
        name: tensor for path in (source / "release").glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    return (
        before,
        load_file(tmp_path / "back" / "model.safetensors"),
        GrinMoeForCausalLM.from_pretrained(tmp_path / "back"),
    )


def test_without_training_every_bit_comes_back(source, tmp_path):
    before, after, model = there_and_back(source, tmp_path, steps=0)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert (model.config.sliding_window, model.config.router_jitter_noise) == (7, 0.01)


@pytest.mark.slow
def test_only_what_was_trained_has_changed(source, tmp_path):
    before, after, _ = there_and_back(source, tmp_path, steps=2)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("self_attn" in name for name in changed)
