"""The pipeline schedules of torch.distributed.pipelining, and what each can do."""

from collections.abc import Callable
from typing import NamedTuple


class Schedule(NamedTuple):
    """A schedule, by its names in torch."""

    name: str
    chunks_per_rank: int
    """By default."""
    fallback: str
    """For a number of micro-batches that the schedule cannot do, at the end of an epoch and in evaluation."""
    admits: Callable[[int, int], bool]
    """Whether it can do `(micro-batches, ranks)`."""


SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        Schedule("GPipe", 1, "GPipe", lambda num_micro_batches, pp_size: True),
        Schedule("1F1B", 1, "GPipe", lambda num_micro_batches, pp_size: num_micro_batches >= pp_size),
        Schedule(
            "Interleaved1F1B",
            2,
            "LoopedBFS",
            lambda num_micro_batches, pp_size: num_micro_batches % max(1, num_micro_batches // pp_size) == 0,
        ),
    )
}
