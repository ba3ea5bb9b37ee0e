"""Measure quantised experts: bytes per parameter, and memory while a bfloat16 release loads into them.

A checkpoint of random weights in the released layout is loaded in a fresh process per kind of storage. Memory is
counted over the process's memory after its imports. All resident pages (VmHWM) include mapped files, which the system
takes back when it needs them; own pages (RssAnon) are read every 2 ms. Linux only.

    python benchmarks/quantized_memory.py
"""

import importlib
import json
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from safetensors import safe_open
from transformers import BitsAndBytesConfig
from transformers.utils import logging

from benchmarks.measure import show
from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM

MODES: dict[str, dict[str, Any]] = {
    "bfloat16, fused": {},
    "bfloat16, linear": {"experts_implementation": "linear"},
    "8 bits": {"load_in_8bit": True},
    "4 bits (nf4)": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "4 bits, double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}
COLUMNS = ["held as", "bytes per parameter", "experts alone", "peak, own pages", "x file", "peak, all pages", "x file"]


def memory(field: str) -> int:
    """Return the bytes of a field of /proc/self/status."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return 1024 * int(line.split()[1])


class OwnPagesPeak(threading.Thread):
    """The most anonymous memory that the process had between `start()` and `stop()`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done = threading.Event()
        self.peak = 0

    def run(self) -> None:
        while not self.done.wait(0.002):
            self.peak = max(self.peak, memory("RssAnon"))

    def stop(self) -> int:
        self.done.set()
        self.join()
        return max(self.peak, memory("RssAnon"))


def write_checkpoint(folder: str, sizes: dict[str, int]) -> None:
    """Write random bfloat16 weights in the released layout and its shards (a sixteenth each)."""
    logging.disable_progress_bar()
    config = GrinMoeConfig(**sizes, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model = GrinMoeForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=sum(parameter.nbytes for parameter in model.parameters()) // 16)


def load(folder: str, settings: dict[str, Any]) -> dict[str, int]:
    """Load once; return the peaks over the memory before, and the bytes of all tensors and of the experts'."""
    logging.disable_progress_bar()
    for name in ("accelerate", "bitsandbytes"):  # what loading imports is not what it holds
        importlib.import_module(name)
    kwargs = {"quantization_config": BitsAndBytesConfig(**settings)} if "load_in" in str(settings) else settings
    all_before, own_before = memory("VmRSS"), memory("RssAnon")
    own_pages = OwnPagesPeak()
    own_pages.start()
    model = GrinMoeForCausalLM.from_pretrained(folder, **kwargs)
    own, everything = own_pages.stop() - own_before, memory("VmHWM") - all_before
    tensors = model.state_dict()  # with scales and other state of quantised matrices
    return {
        "own": own,
        "everything": everything,
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "expert_bytes": sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." in name),
    }


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """glibc keeps freed blocks of less than its threshold, which grows, and by chance that is up to three times the
    model; a fixed threshold gives all larger blocks back at once."""
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**18))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def count_parameters(folder: Path) -> tuple[int, int]:
    """Return the parameters of the checkpoint, and of its experts alone."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    counts = {}
    for file in set(index["weight_map"].values()):
        with safe_open(folder / file, framework="pt") as tensors:
            counts.update({name: tensors.get_tensor(name).numel() for name in tensors.keys()})  # noqa: SIM118
    return sum(counts.values()), sum(count for name, count in counts.items() if ".experts." in name)


def measure(sizes: dict[str, int]) -> tuple[int, list[list[str]]]:
    """Return the bytes of the checkpoint, and a row of the table for each mode."""
    rows = []
    with TemporaryDirectory() as folder:
        in_fresh_process(write_checkpoint, folder, sizes)
        file_bytes = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        parameters, expert_parameters = count_parameters(Path(folder))
        for name, settings in track(MODES.items(), "loading", transient=True):
            found = in_fresh_process(load, folder, settings)
            row = [name, f"{found['bytes'] / parameters:.3f}", f"{found['expert_bytes'] / expert_parameters:.3f}"]
            for peak in (found["own"], found["everything"]):
                row += [f"{peak / 2**20:.0f} MiB", f"{peak / file_bytes:.2f}"]
            rows.append(row)
    return file_bytes, rows


def main(
    hidden_size: Annotated[int, typer.Option(min=64)] = 1024,
    intermediate_size: Annotated[int, typer.Option(min=1, help="FFN size of one expert")] = 1600,
    experts: Annotated[int, typer.Option(min=2)] = 16,
    layers: Annotated[int, typer.Option(min=1)] = 4,
    record: Annotated[bool, typer.Option(help="append the table to benchmarks/RESULTS.md")] = False,
) -> None:
    """Measure bytes per parameter, and peak memory while loading, with experts in 16, 8 and 4 bits.

    Example: python benchmarks/quantized_memory.py --layers 2 --hidden-size 512
    """
    sizes = {
        "vocab_size": 4096,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden_size // 64,
        "num_key_value_heads": max(1, hidden_size // 256),
        "num_local_experts": experts,
    }
    file_bytes, rows = measure(sizes)
    title = f"Quantised loading: hidden {hidden_size}, FFN {intermediate_size} x {experts}, {layers} layers, "
    notes = (
        "Bytes include scales and other quantisation state; embedding, head, norms and routers stay in bfloat16. "
        "Peaks are over the process's memory before loading; x file: relative to the bfloat16 checkpoint. All pages "
        "include mapped files, which the system takes back when it needs them. MALLOC_MMAP_THRESHOLD_=262144 holds "
        "glibc's allocator; otherwise it kept up to 2.5 x the file in freed blocks, by chance."
    )
    show(f"{title}{file_bytes / 2**20:.0f} MiB in bfloat16", COLUMNS, rows, record, notes)


if __name__ == "__main__":
    typer.run(main)
