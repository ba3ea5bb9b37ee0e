"""Measure the speed of conversion beside `cp`, and its memory.

A checkpoint of random weights in the released layout (by default the sizes of Phi-tiny-MoE, 7.5 GB in 17 files) is
converted to every form, and each time also copied by `cp -r`, in changing order, in fresh processes. Source files are
in the page cache. A run ends when the call returns, and again when its files are on the disk (`sync`); imports are not
counted. Memory is the process's own pages (RssAnon, every 2 ms) over what it had before `convert` was called. Linux
only; needs twice the checkpoint's size in free disk, four times for F32.

    python -m benchmarks.conversion
"""

import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

from benchmarks.measure import show
from benchmarks.quantized_memory import OwnPagesPeak, memory
from conversion import Checkpoint, convert
from conversion.conversion import Report, Request, write_folder
from conversion.forms import list_groups
from conversion.tensors import StoredTensor
from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM

# microsoft/Phi-tiny-MoE-instruct; llama.cpp has no place for its 16 heads of 128 in a hidden size of 4096.
PHI_TINY = {"hidden_size": 4096, "intermediate_size": 448, "num_attention_heads": 16, "num_key_value_heads": 4,
            "head_dim": 128, "num_local_experts": 16}  # fmt: skip
NUM_SHARDS = 17
CONVERSIONS: dict[str, dict[str, Any]] = {
    "hub to hub": {"to": "hub"},
    "hub to fused": {"to": "fused"},
    "fused to hub": {"to": "hub", "source": "hub to fused"},
    "hub to phimoe": {"to": "phimoe"},
    "hub to fused, float16": {"to": "fused", "dtype": "float16"},
}
GGUF: dict[str, dict[str, Any]] = {f"hub to gguf, {dtype}": {"to": "gguf", "dtype": dtype}
                                   for dtype in ("f32", "f16", "q8_0", "q4_0")}  # fmt: skip
COLUMNS = ["conversion", "GB read", "GB written", "seconds", "and sync", "cp: seconds", "and sync", "speed / cp",
           "and sync", "peak memory, MB", "/ a file"]  # fmt: skip


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def random_tensor(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def write_checkpoint(folder: str, sizes: dict[str, int]) -> None:
    """Write random weights in the released layout, a tensor at a time."""
    config = GrinMoeConfig(**sizes)
    tensors = {
        name: StoredTensor(shape, torch.bfloat16, name, partial(random_tensor, shape, seed))
        for seed, (name, (shape, _)) in enumerate(list_groups("hub", config, GrinMoeForCausalLM).items())
    }
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    nothing = Path(folder, "none")
    nothing.mkdir(parents=True)
    request = Request(nothing, Path(folder), "hub", max_shard_size=math.ceil(nbytes / (NUM_SHARDS - 1)))
    checkpoint = Checkpoint(nothing, "hub", config, tensors)
    write_folder(checkpoint, request, Path(folder), Report("", "", "", ""))
    nothing.rmdir()


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """Return seconds until a call returned, and until its files were on the disk."""
    os.sync()
    started = time.perf_counter()
    function()
    returned = time.perf_counter() - started
    os.sync()
    return returned, time.perf_counter() - started


def run_conversion(source: str, destination: str, options: dict[str, Any]) -> tuple[float, float, int]:
    """Return the results of `timed`, and the peak memory over the process's memory before."""
    before, pages = memory("RssAnon"), OwnPagesPeak()
    pages.start()
    shards = {} if options["to"] == "gguf" else {"max_shard_size": "500MB"}
    seconds = timed(lambda: convert(source, destination, **options, **shards, check=False))
    return *seconds, pages.stop() - before


def run_copy(source: Path, destination: Path) -> tuple[float, float]:
    return timed(lambda: subprocess.run(["cp", "-r", source, destination], check=True))


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.glob("*.safetensors")))


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    os.sync()


def measure(
    folder: Path, sizes: dict[str, int], conversions: dict[str, dict[str, Any]], repeats: int
) -> list[list[str]]:
    """Return the rows of the table, in the conversions' order."""
    source = folder / "source"
    in_fresh_process(write_checkpoint, str(source), sizes)
    file_bytes = max(file.stat().st_size for file in source.glob("*.safetensors"))
    rows = []
    for name, options in conversions.items():
        options = dict(options)
        begin = source
        if (other := options.pop("source", None)) is not None:
            begin = folder / "other"
            in_fresh_process(run_conversion, str(source), str(begin), conversions[other])
        destination = folder / ("result.gguf" if options["to"] == "gguf" else "result")
        ours: list[tuple[float, float, int]] = []
        copies: list[tuple[float, float]] = []
        for repeat in track(range(repeats), name, transient=True):
            for turn in (repeat, repeat + 1):
                if turn % 2 == 0:
                    arguments = str(begin), str(destination), options
                    ours.append(in_fresh_process(run_conversion, *arguments))
                    written = size(destination)
                    remove(destination)
                else:
                    copies.append(run_copy(begin, folder / "copy"))
                    remove(folder / "copy")
        read = size(begin)
        remove(folder / "other")
        call, disk, peak = (statistics.median(column) for column in zip(*ours, strict=True))
        cp_call, cp_disk = (statistics.median(column) for column in zip(*copies, strict=True))
        rows.append([name, f"{read / 1e9:.2f}", f"{written / 1e9:.2f}", f"{call:.1f}", f"{disk:.1f}", f"{cp_call:.1f}",
                     f"{cp_disk:.1f}", f"{cp_call / call:.2f}", f"{cp_disk / disk:.2f}", f"{peak / 1e6:.0f}",
                     f"{peak / file_bytes:.2f}"])  # fmt: skip
    remove(source)
    return rows


def main(
    layers: Annotated[int, typer.Option(min=1)] = 32,
    gguf_layers: Annotated[int, typer.Option(min=1, help="layers of the checkpoint that becomes GGUF")] = 2,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    vocab_size: Annotated[int, typer.Option(min=8)] = 32064,
    hidden_size: Annotated[int, typer.Option(min=64)] = 4096,
    record: Annotated[bool, typer.Option(help="append the table to benchmarks/RESULTS.md")] = False,
) -> None:
    """Measure the speed of conversion beside `cp`, and peak memory.

    Example: python -m benchmarks.conversion --layers 2 --repeats 3
    """
    sizes = PHI_TINY | {"num_hidden_layers": layers, "vocab_size": vocab_size, "hidden_size": hidden_size}
    heads = {"num_attention_heads": hidden_size // PHI_TINY["head_dim"], "num_hidden_layers": gguf_layers}
    with TemporaryDirectory() as folder:
        rows = measure(Path(folder), sizes, CONVERSIONS, repeats)
        rows += measure(Path(folder), sizes | heads, GGUF, repeats)
    notes = (
        f"Medians of {repeats}. `cp -r` copies the source; speeds are cp's time over ours. Peak memory: own pages "
        f"over the ones before, also relative to the largest file of the source. The GGUF source has {gguf_layers} "
        f"layers and {heads['num_attention_heads']} heads. Its folds are computed in float64, and the file is read "
        "back for the report's error."
    )
    show(f"Conversion of Phi-tiny-MoE's sizes, {layers} layers, bfloat16", COLUMNS, rows, record, notes)


if __name__ == "__main__":
    typer.run(main)
