"""Run scripts and recipes on several gloo processes."""

import gc
import importlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from processes import ROOT, call
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel


def launch(script: str | Path, world_size: int, *args: str | Path) -> str:
    """Run the `main` of a script of this folder, or of tests, on gloo's ranks."""
    return call(run_ranks, Path(script).stem, world_size, *map(str, args))


def run_ranks(module: str, world_size: int, *args: str) -> None:
    torch.set_num_threads(1)
    # transformers reads tensors in threads, whose pool torch sometimes finds invalid in a forked process.
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    main = importlib.import_module(module).main
    if world_size == 1:
        main(*args)
    else:
        with socket.create_server(("localhost", 0)) as server:
            port = server.getsockname()[1]
        # torchrun's agent has threads, from which a fork now and then takes a lock along, and a rank hangs.
        start_processes(run_rank, (main, world_size, port, args), world_size, start_method="fork")


def run_rank(rank: int, main: Callable, world_size: int, port: int, args: tuple[str, ...]) -> None:
    """One rank, in torchrun's environment."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in (ranks | {"MASTER_PORT": port}).items()})
    os.environ["MASTER_ADDR"] = "localhost"
    main(*args)


def launch_recipe(config: str, world_size: int, recipe: str, *args: str) -> str:
    """Run `recipes/{recipe}.py` as `accelerate launch` does with `recipes/accelerate/{config}.yaml`.

    accelerate itself reads the file and makes the environment; ranks are forked where everything is imported.
    """
    return call(run_recipe, config, world_size, recipe, *args)


def run_recipe(config: str, world_size: int, recipe: str, *args: str) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    given, _, _ = _validate_launch_command(
        launch_command_parser().parse_args([*options(config, world_size, args), "recipe.py"])
    )
    os.environ.update(prepare_multi_gpu_env(given))
    rest = [arg for arg in args if not arg.startswith("--parallelism_config")]
    run_ranks("launch", world_size, config, recipe, *rest)


def main(config: str, recipe: str, *args: str) -> None:
    """One rank of a recipe."""
    if config != "ddp":  # whose reducer would look for GPUs
        importlib.import_module("on_cpu").as_on_gpus()
    destroy = dist.destroy_process_group

    def destroy_without_ddp(*group) -> None:
        """DDP's wrapper, freed after the process group, sometimes hangs."""
        assert not any(isinstance(item, DistributedDataParallel) for item in gc.get_objects())
        destroy(*group)
        print("the group is left", flush=True)

    dist.destroy_process_group = destroy_without_ddp
    importlib.import_module(f"recipes.{recipe}").main(list(args))


def options(config: str, world_size: int, args: tuple[str, ...]) -> list[str]:
    """Options of `accelerate launch`."""
    sizes = [arg for arg in args if arg.startswith("--parallelism_config")]
    file = ROOT / "recipes" / "accelerate" / f"{config}.yaml"
    return ["--config_file", str(file), "--num_machines", "1", "--num_processes", str(world_size), *sizes]
