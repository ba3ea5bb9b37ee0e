"""Every layout of a number of devices: whether the recipes train it, whether it fits, how fast it is."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from ..loading_grinmoe import check_parallel_sizes
from .memory import Memory, memory, stages
from .schedules import SCHEDULES
from .setting import Assumptions, Layout, Training, micro_batches
from .time import Collective, communication, stage_time


@dataclass(frozen=True)
class Estimate:
    """Memory, time and communication of a layout."""

    layout: Layout
    memory: Memory  # of the fullest device
    fits: bool
    seconds: dict[str, float]  # of an optimizer step, by cause; communication that hides behind compute left out
    communication: dict[str, Collective]  # of a device of the slowest stage, in a step
    tokens: int  # of a step

    @property
    def step_time(self) -> float:
        """Seconds of an optimizer step."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Of all devices."""
        return self.tokens / self.step_time

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "layout": {"name": str(self.layout), "devices": self.layout.devices, **asdict(self.layout)},
            "fits": self.fits,
            "memory": {**asdict(self.memory), "total": self.memory.total()},
            "step_time": self.step_time,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_per_device": self.tokens_per_second / self.layout.devices,
            "seconds": self.seconds,
            "balance_loss_share": self.seconds["balance loss"] / self.step_time,
            "communication": {purpose: collective._asdict() for purpose, collective in self.communication.items()},
        }


def check_layout(config: PreTrainedConfig, layout: Layout, training: Training) -> None:
    """Raise ValueError, with the numbers, for an impossible layout."""
    for field, size in asdict(layout).items():
        if size < 1:
            raise ValueError(f"{field} must be at least 1; got {size}")
    # Where embedding and head are stages of their own, the others have a layer each.
    own = (layout.pp, layout.interleave) == (config.num_hidden_layers + 2, 1)
    check_parallel_sizes(
        config,
        tp_size=layout.tp,
        pp_size=1 if own else layout.pp * layout.interleave,
        fsdp_size=layout.fsdp if layout.pp == 1 else 1,  # in a pipeline, ranks may be without an expert
    )
    if config.num_local_experts % layout.ep or layout.fsdp % layout.ep:
        raise ValueError(
            f"ep must divide num_local_experts={config.num_local_experts} and fsdp={layout.fsdp}; got {layout.ep}"
        )
    per_pass = layout.data_parallel * training.micro_batch
    if training.global_batch % per_pass:
        raise ValueError(
            f"global_batch must be a multiple of {per_pass} ({layout.data_parallel} data-parallel ranks x "
            f"micro_batch={training.micro_batch}); got {training.global_batch}"
        )


def check_trainable(config: PreTrainedConfig, layout: Layout, training: Training) -> None:
    """Raise ValueError, as `check_layout`, also for a layout that the recipes do not train."""
    check_layout(config, layout, training)
    if training.load_in_4bit and layout.tp * layout.ep > 1:
        raise ValueError(f"load_in_4bit cannot divide a matrix: use FSDP2 or a pipeline; got {layout}")
    if layout.pp == 1:
        return
    if layout.dp_replicate > 1:
        raise ValueError(f"dp_replicate must be 1 in a pipeline; got {layout.dp_replicate}; use fsdp")
    if config.tie_word_embeddings:
        raise ValueError("tie_word_embeddings must be False in a pipeline: two stages cannot share a parameter")
    check_parallel_sizes(config, pp_size=layout.pp)  # embedding and head are no stages of their own
    number = micro_batches(layout, training)
    if not SCHEDULES["1F1B" if layout.interleave == 1 else "Interleaved1F1B"].admits(number, layout.pp):
        raise ValueError(
            f"global_batch={training.global_batch} makes {number} micro-batches, which the schedule cannot run on "
            f"{layout.pp} stages; use a multiple of {layout.data_parallel * training.micro_batch * layout.pp}"
        )


def estimate(config: PreTrainedConfig, layout: Layout, training: Training, assumptions: Assumptions) -> Estimate:
    """Estimate memory, communication and time of training `config` with `layout`.

    Raises:
        ValueError: as `check_layout`.
    """
    check_layout(config, layout, training)
    all_stages = stages(config, layout, training)
    times = [stage_time(config, layout, training, assumptions, stage) for stage in all_stages]
    slowest = max(range(len(times)), key=lambda number: sum(times[number].values()))
    needed = memory(config, layout, training)
    fits = needed.total() <= assumptions.memory - assumptions.reserve
    sent = communication(config, layout, training, all_stages[slowest])
    return Estimate(layout, needed, fits, times[slowest], sent, training.global_batch * training.sequence)


def divisors(number: int) -> list[int]:
    """From 1 to `number`."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def layouts(num_devices: int, assumptions: Assumptions) -> list[Layout]:
    """Layouts of `num_devices` for any model.

    Tensor parallelism stays within a machine. Data-parallel ranks are DDP, FSDP2 or both (HSDP), in pipelines FSDP2;
    pipelines are 1F1B or interleaved; expert parallelism comes without pipelines and tensor parallelism.
    """
    found = []
    for tp in divisors(min(num_devices, assumptions.devices_per_machine)):
        for pp in divisors(num_devices // tp) if num_devices % tp == 0 else []:
            ranks = num_devices // (tp * pp)
            for fsdp in divisors(ranks) if pp == 1 else [ranks]:
                for interleave in (1, 2) if pp > 1 else (1,):
                    for ep in divisors(fsdp) if tp == pp == 1 else (1,):
                        found.append(Layout(ranks // fsdp, fsdp, tp, pp, ep, interleave))
    return found


class Plan(NamedTuple):
    """The result of `plan`."""

    estimates: list[Estimate]  # layouts that fit, fastest first; then the others, smallest first
    left_out: dict[str, str]  # layouts that the recipes cannot train, and why


def plan(config: PreTrainedConfig, num_devices: int, training: Training, assumptions: Assumptions) -> Plan:
    """Estimate all `layouts` that the recipes can train.

    Raises:
        ValueError: no layout is possible.
    """
    if num_devices < 1:
        raise ValueError(f"devices must be at least 1; got {num_devices}")
    estimates, left_out = [], {}
    for layout in layouts(num_devices, assumptions):
        try:
            check_trainable(config, layout, training)
        except ValueError as error:
            left_out[str(layout)] = str(error)
        else:
            estimates.append(estimate(config, layout, training, assumptions))
    if not estimates:
        name, reason = next(iter(left_out.items()))
        raise ValueError(f"no layout of {num_devices} devices is possible; {name}: {reason}")
    estimates.sort(key=lambda e: (not e.fits, -e.tokens_per_second if e.fits else e.memory.total()))
    return Plan(estimates, left_out)
