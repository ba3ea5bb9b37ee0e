"""Run scripts on several gloo processes; `launch.py PROCESSES SCRIPT [ARGUMENTS]` runs the `main` of one."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

ROOT = Path(__file__).parents[2]
TIMEOUT = 900.0  # seconds after which a run hangs, however busy the machine is


def run(command: Sequence[str | Path]) -> str:
    """Run `python command` with one thread a process; its output, or a failure with it."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "distributed"))),
    }
    shown = " ".join(Path(part).name for part in map(str, command))
    command = [sys.executable, *map(str, command)]
    with tempfile.TemporaryFile("w+") as file:  # a pipe would be held open by ranks that hang
        process = psutil.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT, text=True)
        try:
            process.wait(TIMEOUT)
        except psutil.TimeoutExpired:
            shown = f"no end after {TIMEOUT} s: {shown}"
            stuck = [*process.children(recursive=True), process]
            for member in stuck:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.send_signal(signal.SIGABRT)  # it says where it is, see PYTHONFAULTHANDLER
            _, alive = psutil.wait_procs(stuck, timeout=5)
            for member in alive:
                member.kill()
            process.wait()
        file.seek(0)
        output = file.read()
    assert process.returncode == 0, f"failed: {shown}\n{output[-50_000:]}"
    return output


def torchrun(script: str | Path, world_size: int, *args: str | Path) -> str:
    """Run `script` under torchrun. Every line of the output begins with its rank, `[default0]:` and so on."""
    options = ["--standalone", f"--nproc-per-node={world_size}", "--tee=3"]
    return run(["-m", "torch.distributed.run", *options, script, *args])


def launch(script: str | Path, world_size: int, *args: str | Path) -> str:
    """Run the `main` of `script` on torchrun's ranks, which are forked: imports, most of the time, are done once."""
    return run([__file__, str(world_size), script, *args])


def accelerate_launch(config: str, world_size: int, recipe: str, *args: str | Path) -> str:
    """Run `recipes/{recipe}.py` under `accelerate launch` with `recipes/accelerate/{config}.yaml`, as on GPUs."""
    recipes = ROOT / "recipes"
    options = ["--config_file", recipes / "accelerate" / f"{config}.yaml", "--num_machines", "1"]
    scripts = [Path(__file__).parent / "on_cpu.py", recipes / f"{recipe}.py"]
    # Options of the launch come before the script, the others after it.
    sizes = [arg for arg in args if str(arg).startswith("--parallelism_config")]
    rest = [arg for arg in args if arg not in sizes]
    command = [
        "-m",
        "accelerate.commands.launch",
        *options,
        "--num_processes",
        str(world_size),
        *sizes,
        *scripts,
        *rest,
    ]
    return run(command)


def main(world_size: str, script: str, *args: str) -> None:
    spec = importlib.util.spec_from_file_location(Path(script).stem, script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if world_size == "1":
        return module.main(*args)
    config = LaunchConfig(
        1, 1, int(world_size), start_method="fork", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
    )
    elastic_launch(config, module.main)(*args)


if __name__ == "__main__":
    main(*sys.argv[1:])
