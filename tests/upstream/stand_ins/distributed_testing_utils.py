"""Ranks on the CPU, talking by gloo, for transformers' FSDP2 and parallel tests."""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _get_distributed_device_type():
    return "cpu"


def _get_distributed_backend():
    return "gloo"


def _get_rank_device(rank):
    return torch.device("cpu")


def _set_rank_device(rank):
    torch.set_num_threads(1)


def _start_rank_processes(function, args, nprocs):
    mp.start_processes(function, args=args, nprocs=nprocs, start_method="spawn")


def _run_rank(rank, world_size, store, function, args, kwargs):
    _set_rank_device(rank)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    function(rank, *args, **kwargs)
    dist.barrier()
    dist.destroy_process_group()


def run_distributed(world_size):
    def decorate(function):
        def run(*args, **kwargs):
            with tempfile.TemporaryDirectory() as folder:
                arguments = (world_size, f"{folder}/store", function, args, kwargs)
                _start_rank_processes(_run_rank, arguments, world_size)

        return run

    return decorate
