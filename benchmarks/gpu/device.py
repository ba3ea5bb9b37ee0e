"""Shared by the parts of `benchmarks.gpu.run`: the device, sizes, random models, times, rows of the table."""

import copy
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from modeling_grin import GrinMoeConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS, WARM_UPS = (10, 3) if DEVICE.type == "cuda" else (2, 1)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measured model; the defaults are the release's."""

    hidden_size: int = 4096
    intermediate_size: int = 6400
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    num_local_experts: int = 16
    vocab_size: int = 32064
    sliding_window: int = 2047
    num_hidden_layers: int = 32  # of the whole model
    lengths: tuple[int, ...] = (2048, 4096)  # of rows
    tokens: tuple[int, ...] = (2048, 8192)  # of a step
    experts_rows: tuple[int, ...] = (256, 1024, 2048)  # of one expert
    product: int = 8192  # rows and columns of a large product
    copied: int = 2**32  # bytes
    new_tokens: int = 64

    def config(self, num_hidden_layers: int, **settings: Any) -> GrinMoeConfig:
        """The release's config with so many layers; the load-balance loss as in the recipes."""
        names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_local_experts")
        sizes = {name: getattr(self, name) for name in (*names, "vocab_size", "sliding_window")}
        special: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        settings = {"router_aux_loss_coef": 0.01, **sizes, **special, **settings}
        return GrinMoeConfig(num_hidden_layers=num_hidden_layers, **settings)


DEBUG = Sizes(
    hidden_size=64, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4,
    vocab_size=96, sliding_window=15, num_hidden_layers=2, lengths=(16, 24), tokens=(48,), experts_rows=(16,),
    product=64, copied=2**20, new_tokens=3,
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    value: float
    unit: str
    predicted: float | None = None
    """By count and estimate, before anything ran; None: no prediction."""


def build(config: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Build a causal language model of random weights on the device, ready to train."""
    with DEVICE:
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    return model.train()


def random_ids(vocab_size: int, rows: int, length: int) -> torch.Tensor:
    """Return int64 `[rows, length]`."""
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(task: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Return the median time of `task`."""
    for _ in range(WARM_UPS):
        task()
    times = []
    for _ in range(rounds):
        synchronize()
        start = time.perf_counter()
        task()
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def peak_gigabytes(task: Callable[[], Any]) -> float:
    """Return the most memory that tensors take while `task` runs, those before it included; 0 on a CPU."""
    if DEVICE.type != "cuda":
        task()
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    task()
    return torch.cuda.max_memory_allocated() / 1e9


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference over the largest expected number."""
    difference = (actual.double().cpu() - expected.double().cpu()).abs().max()
    return float(difference / expected.double().abs().max().cpu())


def write_rows(rows: Iterable[Row], path: Path) -> None:
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1))
