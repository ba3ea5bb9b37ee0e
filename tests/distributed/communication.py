"""Measure what a training step sends and holds: `communication.py FOLDER CASES.json` runs cases on gloo processes.

A case is a dict of `name`, `ranks` and the arguments of `run_case`. The checkpoint is `FOLDER/model`; what a rank
counted and measured goes to `FOLDER/{name}-{rank}.json`. Processes are forked, so that the imports, most of the time,
happen once.
"""

import contextlib
import json
import logging
import os
import socket
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from peak_memory import PeakMemory
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.multiprocessing import start_processes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.distributed import DistributedConfig

from modeling_grin import GrinMoeForCausalLM
from modeling_grin.training.pipeline import pipeline_model

BATCH, LENGTH, VOCABULARY = 2, 8, 132
# By the ops that DDP, FSDP2 and the pipeline call (c10d), and DTensor's; waits are not counted.
OPERATIONS = {
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "_allgather_base_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "broadcast_": "broadcast",
    "send": "send",
}
NOT_COUNTED = {"wait_tensor", "_wrap_tensor_autograd", "recv_"}


class CountCommunication(TorchDispatchMode):
    """Count calls and bytes by operation: of reduced or sent tensors, and of all gathered or scattered parts.
    All-reduces of integers are `counts`, of the load-balance loss."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.most_buffers = 0
        """That a pipeline's stages had memory for at once, whenever they received into one."""
        self.totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name == "recv_":
            self.most_buffers = max(self.most_buffers, count_buffers(self.model))
        if func.namespace in ("c10d", "_c10d_functional") and name not in NOT_COUNTED:
            # A functional gather has the whole tensor in its result only.
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            counts = any(tensor.dtype == torch.int64 for tensor in tensors)
            total = self.totals["counts" if counts else OPERATIONS[name]]
            total[0] += 1
            total[1] += max(tensor.nbytes for tensor in tensors)
        return result


def make_model(
    folder: Path, kind: str, sizes: dict[str, int], checkpointing: bool, mixed: bool
) -> tuple[nn.Module, Any]:
    """The model, and its `begin_step`. Mixed precision as in the recipes."""
    path = folder / "model"
    if kind == "pipeline":
        model = pipeline_model(path, dtype=torch.float32, experts_implementation="grouped_mm", **sizes)
        begin_step = model.begin_step
    else:
        layout = DistributedConfig(**sizes, fsdp_mixed_precision=mixed)
        native = {"distributed_config": layout} if kind == "native" else {}
        model = GrinMoeForCausalLM.from_pretrained(path, experts_implementation="grouped_mm", **native)
        begin_step = model.begin_step
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return (nn.parallel.DistributedDataParallel(model) if kind == "ddp" else model), begin_step


def train_step(model: nn.Module, batches: list[torch.Tensor], optimizer: torch.optim.Optimizer, mixed: bool) -> None:
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=mixed)
    if hasattr(model, "pipeline"):
        inputs = [{"input_ids": ids, "labels": ids} for ids in batches]
        model.pipeline.run(inputs, partial(loss_of, model), autocast, training=True)
    else:
        for number, ids in enumerate(batches, 1):
            is_last = number == len(batches)
            if isinstance(model, FSDPModule):  # replicas, if there are, sum gradients once, as in Trainer
                model.set_requires_all_reduce(is_last)
            accumulates = isinstance(model, nn.parallel.DistributedDataParallel) and not is_last
            with model.no_sync() if accumulates else contextlib.nullcontext():
                with autocast():
                    loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
    optimizer.step()
    # Trackers do not see which of a step's tensors become gradients, so these stay; but HSDP's, that holds sums of its
    # own in their place until the last micro-batch.
    replicated = isinstance(model, FSDPModule) and model.config.distributed_config.dp_replicate_size > 1
    optimizer.zero_grad(set_to_none=replicated)


def loss_of(model, hidden_states, inputs):
    return model.loss_without_logits(hidden_states, inputs["labels"])[0]


def count_buffers(model: nn.Module) -> int:
    """Hidden states and gradients from other stages that have memory."""
    schedule = model.pipeline._prepared[0]
    stages = schedule._stages if hasattr(schedule, "_stages") else [schedule._stage]
    infos = [info for stage in stages for received in (stage.args_recv_info, stage.grad_recv_info)
             for of_micro_batch in received.values() for info in of_micro_batch]  # fmt: skip
    return sum(info.buffer is not None and not info.buffer.is_meta for info in infos)


def run_case(
    folder: Path, kind: str, sizes: dict[str, int], checkpointing: bool, micro_batches: int, mixed: bool
) -> dict:
    """Count what a rank sends in the third step, when DDP has settled its buckets, and its peak bytes in the fourth or
    fifth, the smaller: gloo's threads may let go of what was sent a moment later than usual."""
    torch.manual_seed(0)
    model, begin_step = make_model(folder, kind, sizes, checkpointing, mixed)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    batches = list(torch.randint(5, VOCABULARY, (micro_batches, BATCH, LENGTH)))
    tokens = micro_batches * BATCH * LENGTH * dist.get_world_size()
    counts = CountCommunication(model)
    for step in range(3):
        begin_step(step, num_tokens=tokens)
        with counts if step == 2 else contextlib.nullcontext():
            train_step(model, batches, optimizer, mixed)
    peaks = []
    for step in (3, 4):
        memory = PeakMemory()
        memory.track_external(model, optimizer)
        begin_step(step, num_tokens=tokens)
        with memory:
            train_step(model, batches, optimizer, mixed)
        peaks.append(memory.peak())
    peak = min(peaks, key=lambda peak: peak["Total"])
    return {"communication": counts.totals, "peak": peak, "buffers": counts.most_buffers}


def run_rank(rank: int, ranks: int, port: int, folder: Path, cases: list[dict]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": str(port),
                   "MASTER_ADDR": "localhost", "TORCHELASTIC_USE_AGENT_STORE": "False"}  # fmt: skip
    PartialState(cpu=True)  # starts the process group, as Trainer does
    for case in cases:
        name = case.pop("name")
        (folder / f"{name}-{rank}.json").write_text(json.dumps(run_case(folder, **case)))
    dist.destroy_process_group()


def main(folder: str, cases_file: str) -> None:
    logging.disable(logging.WARNING)
    by_ranks: dict[int, list[dict]] = defaultdict(list)
    for case in json.loads(Path(cases_file).read_text()):
        by_ranks[case.pop("ranks")].append(case)
    for ranks, cases in by_ranks.items():
        with socket.create_server(("localhost", 0)) as server:
            port = server.getsockname()[1]
        start_processes(run_rank, (ranks, port, Path(folder), cases), ranks, start_method="fork")
