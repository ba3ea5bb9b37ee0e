"""The setting of a plan: a training step, the layout of its devices, and the hardware."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from math import isfinite
from typing import Any

GB = 1e9
FLOAT32, INT64 = 4, 8  # bytes


@dataclass(frozen=True)
class Precision:
    """Bytes per number."""

    weights: int  # weights that FSDP2 shards, and the optimizer's moments
    compute: int  # matmuls and activations
    gradients: int  # gradients that are kept
    reduced: int  # gradients while data-parallel ranks sum them
    autocast: bool = False
    """Each forward pass copies the weights of its matmuls to `compute`; hidden states between layers are float32."""

    @property
    def gathered(self) -> int:
        """Weights that FSDP2 gathers."""
        return self.weights if self.autocast else self.compute

    @property
    def residual(self) -> int:
        """Hidden states between layers."""
        return FLOAT32 if self.autocast else self.compute


PRECISIONS = {
    "float32": Precision(4, 4, 4, 4),
    "bfloat16": Precision(2, 2, 2, 2),
    "mixed": Precision(4, 2, 4, 4),  # `bf16: true` in the recipes, under FSDP2; otherwise AUTOCAST
}
AUTOCAST = Precision(4, 2, 4, 4, autocast=True)
MIXED_LORA = Precision(2, 2, 4, 4)  # autocast over frozen bfloat16 weights, which it does not copy
PACKED, SCALES = 0.5, 0.016  # bytes of a number in nf4 with double quantisation; every rank has the scales whole
OPTIMIZERS = {"adamw": 2, "sgd_momentum": 1, "sgd": 0}  # moments per weight, in the weights' precision


@dataclass(frozen=True)
class Training:
    """One optimizer step."""

    micro_batch: int = 1  # sequences in a forward pass of one data-parallel rank
    global_batch: int = 1024  # sequences in an optimizer step, over all ranks
    sequence: int = 4096  # tokens in a sequence
    precision: str = "mixed"
    optimizer: str = "adamw"
    checkpointing: bool = True
    """Activation checkpointing: a layer keeps its input and is computed again in the backward pass."""
    lora_r: int = 0
    """Ranks of LoRA on attention and experts, in float32, whole on every rank; 0: all weights are trained. Frozen
    weights are bfloat16 in mixed precision."""
    load_in_4bit: bool = False  # the frozen matrices of attention and experts, nf4 with double quantisation

    def __post_init__(self) -> None:
        if self.lora_r < 0 or (self.load_in_4bit and not self.lora_r):
            raise ValueError(f"lora_r must be at least {int(self.load_in_4bit)}; got {self.lora_r}")
        for field in ("micro_batch", "global_batch", "sequence"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1; got {getattr(self, field)}")
        for field, known in (("precision", PRECISIONS), ("optimizer", OPTIMIZERS)):
            if getattr(self, field) not in known:
                raise ValueError(f"{field} must be one of {', '.join(known)}; got {getattr(self, field)!r}")

    @property
    def tokens(self) -> int:
        """T, the tokens of a micro-batch."""
        return self.micro_batch * self.sequence


@dataclass(frozen=True)
class Layout:
    """How many ways each kind of parallelism splits the devices.

    Ranks of `tp` are neighbours, then `pp`, then `fsdp`, then `dp_replicate`.
    """

    dp_replicate: int = 1  # replicas of the weights: DDP, or HSDP together with `fsdp`
    fsdp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    """Expert parallelism, for comparison only: GRIN-MoE is trained without it. So many of the `fsdp` ranks divide the
    experts between them; each share is sharded over `fsdp / ep` ranks (transformers' `DistributedConfig`)."""
    interleave: int = 1  # pipeline stages per device: 1 is the 1F1B schedule, more are the interleaved one

    @property
    def devices(self) -> int:
        """Devices in all."""
        return self.dp_replicate * self.fsdp * self.tp * self.pp

    @property
    def data_parallel(self) -> int:
        """Ranks that read different rows."""
        return self.dp_replicate * self.fsdp

    def __str__(self) -> str:
        names = {"DDP": self.dp_replicate, "FSDP2": self.fsdp, "TP": self.tp, "PP": self.pp, "EP": self.ep}
        parts = [f"{name}={size}" for name, size in names.items() if size > 1]
        return " ".join(parts + [f"x{self.interleave}"] * (self.interleave > 1)) or "one device"


def precision_of(layout: Layout, training: Training) -> Precision:
    """The recipes' mixed precision is FSDP2's, autocast in pipelines and where FSDP2 is not used, and LoRA's own."""
    if training.precision == "mixed" and training.lora_r:
        return MIXED_LORA
    autocast = training.precision == "mixed" and (layout.fsdp == 1 or layout.pp > 1)
    return AUTOCAST if autocast else PRECISIONS[training.precision]


def micro_batches(layout: Layout, training: Training) -> int:
    """Forward passes of a data-parallel rank in an optimizer step."""
    return training.global_batch // (layout.data_parallel * training.micro_batch)


@dataclass(frozen=True)
class Assumptions:
    """The hardware, and how much of it is used.

    The defaults describe an NVIDIA H100 SXM in the machines of the paper's Appendix B: 8 GPUs, 8 x 400 Gbit/s
    InfiniBand.
    """

    memory: float = 80 * GB  # bytes of a device
    reserve: float = 7 * GB
    """Bytes that tensors cannot use: context of the device, communication buffers, fragmentation."""
    devices_per_machine: int = 8
    peak_flops: float = 989e12  # dense bfloat16 FLOP/s
    peak_flops_float32: float = 495e12  # dense float32 (TF32) FLOP/s
    matmul_efficiency: float = 0.6  # share of the peak that large matmuls reach
    grouped_efficiency: float = 0.92  # speed of the experts' grouped matmuls, as a share of large matmuls'
    memory_bandwidth: float = 3.35e12  # bytes/s of a device's memory
    intra_bandwidth: float = 450e9  # bytes/s that a device sends within its machine
    inter_bandwidth: float = 50e9  # bytes/s that a device sends to other machines
    bandwidth_efficiency: float = 0.8  # share of the three bandwidths that is reached
    latency: float = 10e-6  # seconds that a collective takes at least, for each doubling of its ranks
    overlap: float = 0.8  # share of the compute behind which FSDP2's and DDP's collectives hide. Others do not hide

    def __post_init__(self) -> None:
        for field, value in asdict(self).items():
            is_share = field == "overlap" or field.endswith("efficiency")
            can_be_zero = field in ("reserve", "latency", "overlap")
            low = "at least 0" if can_be_zero else "above 0"
            if not isfinite(value) or value < 0 or (value == 0 and not can_be_zero) or (value > 1 and is_share):
                allowed = f"a number {low}{' and at most 1' * is_share}"
                raise ValueError(f"{field} must be {allowed}; got {value}")
        if self.memory <= self.reserve:
            raise ValueError(f"memory must be above the reserve of {self.reserve / GB:g} GB; got {self.memory / GB:g}")


def assume(changes: Iterable[str], **values: Any) -> Assumptions:
    """Make `Assumptions` with `values`, and with changes `NAME=VALUE` to other fields.

    Raises:
        ValueError: a change has another form, or names an unknown field or one of `values`; a value is impossible.
    """
    others = {field.name for field in fields(Assumptions)} - values.keys()
    changed: dict[str, Any] = {}
    for change in changes:
        name, _, value = change.partition("=")
        if name in values:
            raise ValueError(f"{name} has its own option; use --{name.replace('_', '-')} instead of --assume {change}")
        try:
            changed[name] = float(value)
        except ValueError:
            name = ""
        if name not in others:
            raise ValueError(f"assume must be NAME=NUMBER with one of {', '.join(sorted(others))}; got {change!r}")
    return replace(Assumptions(), **values, **changed)
