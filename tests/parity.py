"""The parity table: how far our float32 logits are from independent implementations, case by case.

`python tests/parity.py` measures every case and rewrites the table in docs/parity.md; test_parity.py measures the
same cases and holds them to the limit.
"""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from checkpoints import FLEX_SIZES, released_config, released_tensors, write_checkpoint
from reference import reference_logits
from transformers import DynamicCache, PhimoeConfig, PhimoeForCausalLM, StaticCache

from modeling_grin import GrinMoeForCausalLM

DOCUMENT = Path(__file__).parent.parent / "docs" / "parity.md"
LIMIT = 1e-5
LENGTH = 24


@dataclass
class Case:
    """What is compared: a config, an implementation, a way to run the model, and the reference."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"
    experts: str = "grouped_mm"
    run: Callable | None = None
    length: int = LENGTH
    against_stock: bool = False


def run_full(model, ids):
    return model(ids).logits[0]


def run_left_padded(model, ids):
    padding = torch.full((1, 5), 7)
    mask = torch.cat([torch.zeros_like(padding), torch.ones_like(ids)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(torch.cat([padding, ids], dim=1), attention_mask=mask, position_ids=positions).logits[0, 5:]


def run_right_padded(model, ids):
    padding = torch.full((1, 5), 7)
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(padding)], dim=1)
    return model(torch.cat([ids, padding], dim=1), attention_mask=mask).logits[0, : ids.shape[1]]


def run_packed(model, ids):
    """Second of two packed sequences; the first one must not be seen."""
    other = torch.randint(0, model.config.vocab_size, (1, 13), generator=torch.Generator().manual_seed(5))
    positions = torch.cat([torch.arange(13), torch.arange(ids.shape[1])])[None]
    return model(torch.cat([other, ids], dim=1), position_ids=positions, use_cache=False).logits[0, 13:]


def run_cached(make_cache):
    def run(model, ids):
        """Five tokens at once, then one by one."""
        cache = make_cache(model.config)
        pieces = [ids[:, :5], *ids[:, 5:].split(1, dim=1)]
        return torch.cat([model(piece, past_key_values=cache, use_cache=True).logits[0] for piece in pieces])

    return run


SMALL_WINDOW = {"sliding_window": 7}
LONGROPE_SCALING = {  # as in Phi-3.5-MoE, whose two scales are equal
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 2.7],
    "long_factor": [1.5, 2.0, 7.0, 40.0],
    "short_mscale": 1.243163121016122,
    "long_mscale": 1.4,
    "original_max_position_embeddings": 16,
}
LONGROPE = {"rope_scaling": LONGROPE_SCALING, "max_position_embeddings": 512, "sliding_window": 512}
PHI_MINI = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 16}
PHI_TINY = {**PHI_MINI, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 8}
CASES = [
    Case("the released config at small sizes"),
    Case("eager attention", SMALL_WINDOW, attention="eager"),
    Case("flex_attention attention", {**SMALL_WINDOW, **FLEX_SIZES}, attention="flex_attention"),
    *(Case(f"{experts} experts", experts=experts) for experts in ("eager", "grouped_mm", "batched_mm")),
    Case("head_dim x heads != hidden_size", {"head_dim": 10}),
    Case("tied head", {"tie_word_embeddings": True}),
    Case("no attention biases", {"attention_bias": False}),
    Case("no head bias", {"lm_head_bias": False}),
    *(Case(f"{n} experts, top-{k}", {"num_local_experts": n, "num_experts_per_tok": k})
      for n, k in ((4, 1), (4, 4), (16, 2), (64, 3))),
    Case("many near-ties (router_jitter_noise 0.3)", {"router_jitter_noise": 0.3}),
    Case("no sliding window", {"sliding_window": None}),
    Case("beyond the window", SMALL_WINDOW),
    Case("left padding", SMALL_WINDOW, run=run_left_padded),
    Case("right padding", SMALL_WINDOW, run=run_right_padded),
    Case("packed sequences", SMALL_WINDOW, run=run_packed),
    Case("dynamic cache, token by token", SMALL_WINDOW, run=run_cached(lambda c: DynamicCache(config=c))),
    Case("static cache, token by token", SMALL_WINDOW, run=run_cached(lambda c: StaticCache(c, max_cache_len=LENGTH))),
    Case("LongRoPE, its original length", LONGROPE, length=16),
    Case("LongRoPE, beyond its original length", LONGROPE),
    Case("stock Phimoe", {"router_jitter_noise": 0.3}, against_stock=True),
    Case("stock Phimoe, beyond the window", SMALL_WINDOW, length=200, against_stock=True),
    Case("stock Phimoe, released window (2047)", {"num_hidden_layers": 1}, length=2100, against_stock=True),
    Case("stock Phimoe, Phi-3.5-MoE (LongRoPE), its original length", LONGROPE, length=16, against_stock=True),
    *(Case(f"stock Phimoe, {name}, beyond the window", {**sizes, **SMALL_WINDOW}, length=200, against_stock=True)
      for name, sizes in (("Phi-mini-MoE", PHI_MINI), ("Phi-tiny-MoE", PHI_TINY))),
]  # fmt: skip


def longrope_logits(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], input_ids: list[int], is_long: bool | None = None
) -> torch.Tensor:
    """`reference_logits` with LongRoPE in closed form: angle_i = position / (factor_i theta^(2i/d)), cosine and sine
    scaled; by default with the long factors for more tokens than `original_max_position_embeddings`."""
    rope = config["rope_scaling"]
    if is_long is None:
        is_long = len(input_ids) > rope["original_max_position_embeddings"]
    kind = "long" if is_long else "short"
    factors, mscale = rope[f"{kind}_factor"], rope[f"{kind}_mscale"]

    def rotate(x, position, theta):
        half = len(x) // 2
        out = torch.empty_like(x)
        for i in range(half):
            angle = position / (factors[i] * theta ** (2 * i / len(x)))
            cos, sin = mscale * math.cos(angle), mscale * math.sin(angle)
            out[i] = x[i] * cos - x[i + half] * sin
            out[i + half] = x[i + half] * cos + x[i] * sin
        return out

    with mock.patch("reference.rotate", rotate):
        return reference_logits(config, tensors, input_ids)


def stock_logits(config: dict[str, Any], tensors: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """transformers' Phimoe, given the window it takes to see the same keys."""
    window = config["sliding_window"]
    with tempfile.TemporaryDirectory() as folder:
        stock_config = {**config, "model_type": "phimoe", "sliding_window": None if window is None else window + 1}
        stock_config.pop("auto_map")
        write_checkpoint(Path(folder), stock_config, tensors)
        model = PhimoeForCausalLM.from_pretrained(folder, config=PhimoeConfig.from_pretrained(folder)).eval()
        return model(ids).logits[0]


@torch.no_grad()
def relative_error(case: Case, seed: int = 0) -> float:
    """max |ours - reference| / max |reference| over all logits of one random sequence and random weights."""
    config = released_config(torch_dtype="float32", **case.config)
    tensors = released_tensors(config, seed)
    ids = torch.randint(0, config["vocab_size"], (1, case.length), generator=torch.Generator().manual_seed(seed))
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), config, tensors, num_shards=3)
        model = GrinMoeForCausalLM.from_pretrained(
            folder, attn_implementation=case.attention, experts_implementation=case.experts
        ).eval()
        ours = (case.run or run_full)(model, ids)
    if case.against_stock:
        expected = stock_logits(config, tensors, ids)
    else:
        reference = longrope_logits if config.get("rope_scaling") else reference_logits
        expected = reference(config, tensors, ids[0].tolist())
    return ((ours - expected).abs().max() / expected.abs().max()).item()


def table(errors: dict[str, float]) -> str:
    rows = [f"| {name} | {error:.1e} |" for name, error in errors.items()]
    return "\n".join(["| case | relative error |", "| --- | --- |", *rows])


def documented_cases() -> dict[str, float]:
    """The rows of the table in docs/parity.md."""
    lines = [line.strip("| ").split(" | ") for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    return {name: float(error) for name, error in lines if error.startswith(tuple("0123456789"))}


if __name__ == "__main__":
    text = DOCUMENT.read_text()
    start, end = text.index("| case |"), text.index("\n\n", text.index("| case |"))
    measured = table({case.name: relative_error(case) for case in CASES})
    DOCUMENT.write_text(text[:start] + measured + text[end:])
    print(measured)
