"""mlx-lm's Phimoe on our `--to phimoe` (`make test-mlx`): against forward passes in float64."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import released_config, released_tensors, write_checkpoint
from endpoints import served

from conversion import convert
from modeling_grin import GrinMoeForCausalLM

PYTHON = Path(os.environ.get("MLX_PYTHON", ".venv-mlx/bin/python")).absolute()
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="mlx-lm has an environment of its own: make test-mlx")
WINDOW, LENGTH = 99, 90
# float32 agrees to rounding. Of 4 bits, random weights lose half: they are Gaussian, and routers choose other experts.
# Measured: 7.9e-7, 0.51. MLX has no bfloat16 experts on CPUs.
LIMITS = {"float32": 1e-5, "4 bits": 0.7}
LOGITS = """
import sys, numpy as np, mlx.core as mx
from pathlib import Path
from mlx_lm.utils import load_model
model, _ = load_model(Path(sys.argv[1]))
ids = mx.array(np.load(sys.argv[2]))
np.save(sys.argv[3], np.array(model(ids).astype(mx.float32)))
"""


def run(*arguments):
    result = subprocess.run([PYTHON, *map(str, arguments)], capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def folders(trained_tokenizer, tmp_path_factory):
    """The release at small sizes, and what mlx-lm is given: by `--to phimoe`, then by `mlx_lm.convert -q`."""
    root = tmp_path_factory.mktemp("mlx")
    sizes = {"hidden_size": 128, "intermediate_size": 64, "sliding_window": WINDOW, "torch_dtype": "float32"}
    config = released_config(vocab_size=len(trained_tokenizer), **sizes)
    tensors = {
        name: 0.5 * tensor if tensor.dim() == 2 else tensor for name, tensor in released_tensors(config).items()
    }
    source = write_checkpoint(root / "release", config, tensors)
    trained_tokenizer.save_pretrained(source)
    convert(source, root / "float32", to="phimoe")
    run("-m", "mlx_lm", "convert", "--hf-path", root / "float32", "--mlx-path", root / "4 bits", "-q")
    return root


@torch.no_grad()
def errors(root, kind, length):
    """The error of each position's logits, relative to the logits."""
    ids = torch.randint(0, 1000, (1, length), generator=torch.Generator().manual_seed(3))
    np.save(root / "ids.npy", ids.numpy())
    run("-c", LOGITS, root / kind, root / "ids.npy", root / "logits.npy")
    expected = GrinMoeForCausalLM.from_pretrained(root / "release", dtype=torch.float64).eval()(ids).logits[0]
    difference = torch.from_numpy(np.load(root / "logits.npy"))[0].double() - expected
    return difference.norm(dim=-1) / expected.norm(dim=-1).mean()


@pytest.mark.parametrize("kind", LIMITS)
def test_logits_within_the_window(folders, kind):
    error = errors(folders, kind, LENGTH).mean()
    print(f"{kind}: {error:.1e}")
    assert error < LIMITS[kind]


def test_its_server_gives_the_text_of_generate(folders, trained_tokenizer):
    messages = [{"role": "user", "content": "import <|end|> sys"}]
    inputs = trained_tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    model = GrinMoeForCausalLM.from_pretrained(folders / "release", dtype=torch.float32).eval()
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    text = trained_tokenizer.decode(tokens, skip_special_tokens=True)
    with served([PYTHON, "-m", "mlx_lm", "server", "--model", folders / "float32"], folders) as complete:
        answer = json.loads(complete(messages=messages, temperature=0, max_tokens=12))
        assert answer["choices"][0]["message"]["content"] == text != ""


def test_beyond_the_window_mlx_sees_all_keys(folders):
    error = errors(folders, "float32", 200)
    assert error[: WINDOW + 1].max() < LIMITS["float32"] and error[WINDOW + 1 :].max() > 1e-2
