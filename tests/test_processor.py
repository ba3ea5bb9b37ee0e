"""A CPU with AVX2 and without AVX512, which environment variables make of any x86-64: right numbers, or a refusal.

Run as a script, with these variables, this file prints what it measures.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import FLEX_SIZES
from models import tiny_model

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
# All experts of every token, so that no choice is within rounding of another one.
ALL_EXPERTS = {"router_estimator": "gshard", "num_experts_per_tok": 6, "input_jitter_noise": 0.0}
# Relative; measured 9e-7 and 0.022. Wrong kernels were off by 0.06 and more, of logits alone.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05}
IMPLEMENTATIONS = [
    ("eager", "grinmoe"),
    *(("sdpa", name) for name in ("grinmoe", "eager", "grouped_mm", "batched_mm")),
]


def step(model, ids):
    """Logits and the gradients of a training step, float64."""
    outputs = model.train()(ids, labels=ids, skip_logits=False)
    outputs.loss.backward()
    gradients = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
    return {"logits": outputs.logits.detach().double(), **gradients}


def measure(dtype: str) -> dict[str, float]:
    """Each implementation's largest relative error in `dtype`; the reference is eager in float64, of equal weights.

    Gradients below a thirtieth of the whole one's norm are compared with that: that of a key's bias all but cancels.
    """
    ids = torch.randint(131, (2, 40), generator=torch.Generator().manual_seed(1))
    errors = {}
    for attention, experts in IMPLEMENTATIONS:
        model = tiny_model(attention, experts, sliding_window=7, **ALL_EXPERTS)
        model = model.to(getattr(torch, dtype))
        exact = copy.deepcopy(model).double()
        exact.set_attn_implementation("eager")
        exact.set_experts_implementation("eager")
        expected, actual = step(exact, ids), step(model, ids)
        whole = torch.stack([tensor.norm() for name, tensor in expected.items() if name != "logits"]).norm()
        errors[f"{attention}, {experts}"] = max(
            float((actual[name] - tensor).norm() / max(tensor.norm(), whole / 30)) for name, tensor in expected.items()
        )
    return errors


def flex_error(head_dim: int) -> str | None:
    model = tiny_model("flex_attention", head_dim=head_dim)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model(torch.arange(24)[None])
    except ValueError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def with_avx2():
    """What the script prints, and its warnings."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("no x86-64 with AVX2")
    script = Path(__file__)
    path = os.pathsep.join(map(str, (script.parents[1], script.parent)))
    environment = os.environ | AVX2 | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_the_variables_take_avx512_away(with_avx2):
    assert with_avx2[0]["capability"] == "AVX2"


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_implementation_is_right(with_avx2, dtype):
    errors = with_avx2[0][dtype]
    assert len(errors) == len(IMPLEMENTATIONS) and max(errors.values()) < TOLERANCE[dtype], errors


def test_flex_attention_is_refused_where_torch_computes_it_wrongly(with_avx2):
    """With heads of 8 and 16; those of 24 and more are right, as on CPUs with AVX512."""
    errors = with_avx2[0]["flex_attention"]
    assert "head_dim=8 on a CPU with AVX2 and without AVX512" in errors["8"]
    assert "use attn_implementation='sdpa'" in errors["16"]
    assert errors[str(FLEX_SIZES["head_dim"])] is None
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert flex_error(8) is None


def test_the_slow_dtype_is_told_once(with_avx2):
    said = [line for line in with_avx2[1].splitlines() if "This CPU has no instructions for" in line]
    assert len(said) == 1 and "no instructions for bfloat16" in said[0] and "dtype=torch.float32" in said[0]


if __name__ == "__main__":
    found = {"capability": torch.backends.cpu.get_cpu_capability()} | {dtype: measure(dtype) for dtype in TOLERANCE}
    found["flex_attention"] = {size: flex_error(size) for size in (8, 16, FLEX_SIZES["head_dim"])}
    print(json.dumps(found))
