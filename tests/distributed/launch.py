"""Run a script on several gloo processes."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def launch(script: Path, world_size: int, *args: str | Path, timeout: float = 120) -> str:
    """Run `script` under torchrun on `world_size` processes of one thread each; its output, or a failure with it.

    Every line of the output begins with its rank, `[default0]:` and so on.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}",
               "--tee=3", str(script), *map(str, args)]  # fmt: skip
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode() + (error.stderr or b"").decode()
        raise AssertionError(
            f"{script.name} on {world_size} ranks: no end after {timeout} s\n{output[-5000:]}"
        ) from error
    output = result.stdout + result.stderr
    assert result.returncode == 0, f"{script.name} on {world_size} ranks failed\n{output[-5000:]}"
    return output
