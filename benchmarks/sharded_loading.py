"""Measure the memory and reads of a rank while a spread model is loaded, saved and loaded again.

A checkpoint of random weights in the released layout is loaded by `from_pretrained(distributed_config=...)` on gloo
ranks of one machine, saved (`save_weights`) and read again (`load_weights`). Memory is a rank's own pages (RssAnon,
read every 2 ms) over its memory after the imports. It excludes mapped files, which ranks share and the system takes
back when it needs them, and parameters that safetensors leaves there until they are written to. Bytes read count the
slices that a rank takes out of files. Linux only.

    python benchmarks/sharded_loading.py
"""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import safetensors
import torch
import torch.distributed as dist
import typer
from rich.progress import track
from transformers import BitsAndBytesConfig, modeling_utils
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from benchmarks.measure import show
from benchmarks.quantized_memory import OwnPagesPeak, in_fresh_process, memory, write_checkpoint
from modeling_grin import GrinMoeForCausalLM, packed_grinmoe
from modeling_grin.training import sharded

LAYOUTS: dict[str, dict[str, int]] = {
    "one process": {},
    "FSDP2, 2 ranks": {"fsdp_size": 2},
    "TP, 2 ranks": {"tp_size": 2},
    "FSDP2, 4 ranks": {"fsdp_size": 4},
    "TP, 4 ranks": {"tp_size": 4},
    "FSDP2 x TP, 4 ranks": {"fsdp_size": 2, "tp_size": 2},
    "FSDP2 in 4 bits, 2 ranks": {"fsdp_size": 2, "load_in_4bit": True},
    "FSDP2 in 4 bits, 4 ranks": {"fsdp_size": 4, "load_in_4bit": True},
}
READ = ["read", "by all ranks"]
COLUMNS = ["layout", "part", "load: peak", "of all ranks", *READ, "save: peak", "load again: peak", *READ]
TINY = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 4, "num_local_experts": 4}  # fmt: skip

Figures = list[dict[str, float]]
"""By rank, what `run_rank` returns."""

bytes_read = 0
"""Taken out of safetensors files so far."""


class CountedSlice:
    """A slice of safetensors."""

    def __init__(self, whole: Any):
        self.whole = whole

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        global bytes_read
        tensor = self.whole[index]
        bytes_read += tensor.nbytes
        return tensor


class CountedFile:
    """An open file of safetensors."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.file = open_file(*args, **kwargs)

    def __enter__(self) -> "CountedFile":
        self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def get_slice(self, name: str) -> CountedSlice:
        return CountedSlice(self.file.get_slice(name))


open_file = safetensors.safe_open


def measure_call(function: Callable[[], Any]) -> tuple[Any, int, int]:
    """Return a call's result, the peak memory while it ran, and the bytes it read."""
    read_before = bytes_read
    pages = OwnPagesPeak()
    pages.start()
    result = function()
    return result, pages.stop(), bytes_read - read_before


def run_rank(rank: int, folder: str, tiny: str, layout: dict[str, int], file_bytes: int) -> dict[str, float]:
    """Return one rank's figures, relative to the bytes of the checkpoint."""
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    safetensors.safe_open = modeling_utils.safe_open = packed_grinmoe.safe_open = CountedFile
    layout = dict(layout)
    four_bits = layout.pop("load_in_4bit", False)
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    quantization = BitsAndBytesConfig(load_in_4bit=True, **settings) if four_bits else None
    config = DistributedConfig(**layout)
    num_ranks = config.dp_size * config.tp_size
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{tiny}/ranks", rank=rank, world_size=num_ranks)
    # As many files as the release has; and copies as small, to it, as ranks write of it.
    sharded.MAX_SHARD_SIZE, sharded.MAX_PART_BYTES = file_bytes // 16, file_bytes // 64

    def load(path: str) -> GrinMoeForCausalLM:
        return GrinMoeForCausalLM.from_pretrained(path, distributed_config=config, quantization_config=quantization)

    model = load(tiny)  # imports and first uses
    if not four_bits:
        sharded.save_weights(model, f"{tiny}/saved")
    dist.barrier()
    before = memory("RssAnon")
    model, load_peak, load_read = measure_call(lambda: load(folder))
    part = sum(getattr(parameter, "to_local", lambda p=parameter: p)().nbytes for parameter in model.parameters())
    peaks, figures = {"load": load_peak}, {"part": part, "load read": load_read}
    if not four_bits:
        _, peaks["save"], _ = measure_call(lambda: sharded.save_weights(model, f"{tiny}/saved"))
        _, peaks["load again"], figures["load again read"] = measure_call(
            lambda: sharded.load_weights(model, f"{tiny}/saved")
        )
    dist.destroy_process_group()
    figures |= {f"{name} peak": peak - before for name, peak in peaks.items()}
    return {name: figure / file_bytes for name, figure in figures.items()}


def measure(sizes: dict[str, int], layouts: dict[str, dict[str, int]]) -> tuple[int, dict[str, Figures]]:
    """Return the bytes of the checkpoint, and the figures of each layout."""
    found: dict[str, Figures] = {}
    with TemporaryDirectory() as folder:
        in_fresh_process(write_checkpoint, folder, sizes)
        file_bytes = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        for name, layout in track(layouts.items(), "layouts", transient=True):
            num_ranks = layout.get("fsdp_size", 1) * layout.get("tp_size", 1)
            context = multiprocessing.get_context("spawn")
            with TemporaryDirectory() as tiny, ProcessPoolExecutor(num_ranks, context) as executor:
                in_fresh_process(write_checkpoint, tiny, TINY)
                arguments = folder, tiny, layout, file_bytes
                ranks = [executor.submit(run_rank, rank, *arguments) for rank in range(num_ranks)]
                found[name] = [rank.result() for rank in ranks]
    return file_bytes, found


def main(
    hidden_size: Annotated[int, typer.Option(min=64)] = 512,
    intermediate_size: Annotated[int, typer.Option(min=8, help="FFN size of one expert")] = 1024,
    experts: Annotated[int, typer.Option(min=2)] = 16,
    layers: Annotated[int, typer.Option(min=1)] = 4,
    record: Annotated[bool, typer.Option(help="append the table to benchmarks/RESULTS.md")] = False,
) -> None:
    """Measure memory and bytes read per rank of a model that is spread over ranks.

    Example: python benchmarks/sharded_loading.py --layers 2
    """
    sizes = {
        "vocab_size": 4096,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden_size // 64,
        "num_key_value_heads": max(4, hidden_size // 256),
        "num_local_experts": experts,
    }
    file_bytes, found = measure(sizes, LAYOUTS)
    rows = []
    for name, ranks in found.items():

        def most(figure: str, ranks: Figures = ranks) -> str:
            return f"{max(rank[figure] for rank in ranks):.3f}" if figure in ranks[0] else "-"

        def total(figure: str, ranks: Figures = ranks) -> str:
            return f"{sum(rank[figure] for rank in ranks):.3f}" if figure in ranks[0] else "-"

        row = [name, most("part"), most("load peak"), total("load peak"), most("load read"), total("load read")]
        rows.append(
            [*row, most("save peak"), most("load again peak"), most("load again read"), total("load again read")]
        )
    title = f"Models spread over ranks: hidden {hidden_size}, FFN {intermediate_size} x {experts}, {layers} layers, "
    notes = (
        "All relative to the checkpoint's bytes; the largest figure of the ranks. Part: the parameters of a rank. "
        "Peaks are over a rank's memory after its imports, and include the part. Load: from_pretrained; save: "
        "save_weights; load again: load_weights. Files that ranks write hold a 64th of the model, the checkpoint's "
        "files a 16th. Each rank reads the tensors that all have (norms, routers, some biases). Parameters that are "
        "used as they lie in a file stay in its pages until written to, and are in no peak. In 4 bits each rank reads "
        "and packs whole matrices; the part is without scales, and no base is saved."
    )
    show(f"{title}{file_bytes / 2**20:.0f} MiB in bfloat16", COLUMNS, rows, record, notes)


if __name__ == "__main__":
    typer.run(main)
