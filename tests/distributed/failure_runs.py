"""Runs that end badly: `main` on torchrun's ranks, or `save_and_go_on` in ranks that can be killed together."""

import os
import sys
import time
from pathlib import Path

import runs
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.distributed import DistributedConfig

from modeling_grin import GrinMoeForCausalLM

WORLD_SIZE = 2


def make_trainer(folder: Path, output_dir: Path, **arguments):
    """Two ranks of FSDP2 that save after every step, or, without ranks, one process that could do the same."""
    TrainingArguments(output_dir=output_dir, use_cpu=True)  # starts the process group
    layout = DistributedConfig(fsdp_size=WORLD_SIZE) if dist.is_initialized() else None
    model = GrinMoeForCausalLM.from_pretrained(folder / "start", distributed_config=layout)
    set_seed(3)
    settings = {**runs.RESUME_ARGUMENTS, "save_steps": 1, "micro_batch": 1, "distributed_checkpoint": True}
    return runs.make_trainer(output_dir, model, **{**settings, **arguments})


def save_and_go_on(rank: int, folder: Path, output_dir: Path, store: Path, resume: bool, moment: str | None) -> None:
    """One rank of a run, from the start or from its newest complete checkpoint; the first may die at a moment."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE),
                   "LOCAL_WORLD_SIZE": str(WORLD_SIZE), "MASTER_ADDR": "localhost"}  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD_SIZE)
    callbacks = [runs.KillInSave(moment)] if moment is not None and rank == 0 else []
    trainer = make_trainer(folder, output_dir, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume or None)
    if resume:
        trainer.save_model(str(output_dir / "end"))
    dist.destroy_process_group()


class Fail(TrainerCallback):
    """At the third step, on the last rank."""

    def __init__(self, note: Path):
        self.note = note

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and dist.get_rank() == WORLD_SIZE - 1:
            self.note.write_text(str(time.time()))
            raise ArithmeticError("the weights have left the room")


def main(folder: str) -> None:
    make_trainer(Path(folder), Path(folder, "failed"), callbacks=[Fail(Path(folder, "failed-at"))]).train()


if __name__ == "__main__":
    record(main)(*sys.argv[1:])
