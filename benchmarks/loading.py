"""Measure speed and memory of loading a checkpoint, beside stock Phimoe and plain reading.

A checkpoint of random weights in the released layout (by default the sizes of Phi-tiny-MoE, 7.5 GB in 17 files) is
loaded by `from_pretrained` of ours and of transformers' Phimoe, and its files are read into a buffer, in turns of
changing order, each in a fresh process; imports are not counted. Files are in the page cache: all are read once more
before each turn.

Memory is counted over the process's memory before. All resident pages (VmHWM) include mapped files, which the system
takes back when it needs them; own pages (RssAnon) are read every 2 ms. The loaded weights are compared with the files.
Linux only; needs the checkpoint's size in free disk, and twice in memory.

    python -m benchmarks.loading
"""

import json
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated

import accelerate  # noqa: F401 (from_pretrained would import it)
import torch
import typer
from rich.progress import track
from safetensors import safe_open
from transformers import PhimoeForCausalLM, PreTrainedModel
from transformers.utils import logging

from benchmarks.conversion import PHI_TINY, write_checkpoint
from benchmarks.measure import run_with, show, spread
from benchmarks.quantized_memory import OwnPagesPeak, memory
from conversion.phimoe_config import phimoe_config
from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM

MODELS: dict[str, type[PreTrainedModel]] = {"ours": GrinMoeForCausalLM, "stock Phimoe": PhimoeForCausalLM}
READING = "reading the bytes"
BUFFER_BYTES = 2**24
COLUMNS = ["", "seconds", "x reading", "speed / stock's", "peak, own pages", "/ weights",
           "peak, all pages", "/ weights"]  # fmt: skip


def read_files(folder: str) -> None:
    buffer = bytearray(BUFFER_BYTES)
    for path in Path(folder).glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def assert_holds(model: PreTrainedModel, folder: str) -> None:
    """Compare the query projection and a random expert of each layer with the files.

    Raises:
        ValueError: they differ.
    """
    weight_map = json.loads(Path(folder, "model.safetensors.index.json").read_text())["weight_map"]

    def stored(name: str) -> torch.Tensor:
        with safe_open(Path(folder, weight_map[name]), framework="pt") as file:
            return file.get_tensor(name)

    for i, layer in enumerate(model.model.layers):
        experts = next(module for module in layer.modules() if hasattr(module, "gate_up_proj"))
        expert = int(torch.randint(len(experts.gate_up_proj), ()))
        w1, w2, w3 = (stored(f"model.layers.{i}.block_sparse_moe.experts.{expert}.w{n}.weight") for n in (1, 2, 3))
        pairs = {
            "q_proj": (layer.self_attn.q_proj.weight, stored(f"model.layers.{i}.self_attn.q_proj.weight")),
            "gate_up_proj": (experts.gate_up_proj[expert], torch.cat([w1, w3])),
            "down_proj": (experts.down_proj[expert], w2),
        }
        if differ := [name for name, (loaded, expected) in pairs.items() if not torch.equal(loaded, expected)]:
            raise ValueError(f"{type(model).__name__}, layer {i}, expert {expert}: {differ} differ from the files")


def run(name: str, folder: str) -> dict[str, float]:
    """Load, or read, once; return seconds, and bytes of memory over the process's memory before."""
    logging.disable_progress_bar()
    all_before, own_before = memory("VmRSS"), memory("RssAnon")
    own_pages = OwnPagesPeak()
    own_pages.start()
    started = time.perf_counter()
    model = MODELS[name].from_pretrained(folder) if name in MODELS else read_files(folder)
    seconds = time.perf_counter() - started
    figures = {"seconds": seconds, "own": own_pages.stop() - own_before, "all": memory("VmHWM") - all_before}
    if model is not None:
        assert_holds(model, folder)
    return figures


def measure(sizes: dict[str, int], repeats: int) -> tuple[int, dict[str, list[dict[str, float]]]]:
    """Return the bytes of the weights, and by name the results of `run` in each round."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (*MODELS, READING)}
    names = list(found)
    with TemporaryDirectory() as folder:
        ours, stock = Path(folder, "grinmoe"), Path(folder, "phimoe")
        run_with({}, write_checkpoint, str(ours), sizes)
        stock.mkdir()
        for file in ours.glob("*.safetensors*"):
            (stock / file.name).symlink_to(file)
        (stock / "config.json").write_text(json.dumps(phimoe_config(GrinMoeConfig.from_pretrained(ours))))
        weight_bytes = json.loads((ours / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
        for turn in track(range(repeats), "loading", transient=True):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                read_files(str(ours))
                found[name].append(run_with({}, run, name, str(stock if name == "stock Phimoe" else ours)))
    return weight_bytes, found


def main(
    layers: Annotated[int, typer.Option(min=1)] = 32,
    repeats: Annotated[int, typer.Option(min=2)] = 5,
    vocab_size: Annotated[int, typer.Option(min=8)] = 32064,
    hidden_size: Annotated[int, typer.Option(min=64)] = 4096,
    record: Annotated[bool, typer.Option(help="append the table to benchmarks/RESULTS.md")] = False,
) -> None:
    """Measure the speed of loading beside stock Phimoe and plain reading, and peak memory.

    Example: python -m benchmarks.loading --layers 4 --repeats 3
    """
    sizes = PHI_TINY | {"num_hidden_layers": layers, "vocab_size": vocab_size, "hidden_size": hidden_size}
    weight_bytes, found = measure(sizes, repeats)
    seconds = {name: [figures["seconds"] for figures in rounds] for name, rounds in found.items()}
    rows = []
    for name, rounds in found.items():
        row = [name, f"{median(seconds[name]):.2f}", spread(seconds[name], seconds[READING])]
        row.append(spread(seconds["stock Phimoe"], seconds[name]))
        for pages in ("own", "all"):
            peak = median(figures[pages] for figures in rounds)
            row += [f"{peak / 1e6:.0f} MB", f"{peak / weight_bytes:.2f}"]
        rows.append(row)
    notes = (
        f"Medians of {repeats}; ratios are of the same round, with quartiles. Peaks are over the process's memory "
        "before. All pages include mapped files, which the system takes back when it needs them. Weights that are "
        "used as they lie in a file stay there until written to, and count as no own page."
    )
    title = f"Loading of Phi-tiny-MoE's sizes, {layers} layers, {weight_bytes / 1e9:.2f} GB in bfloat16"
    show(title, COLUMNS, rows, record, notes)


if __name__ == "__main__":
    typer.run(main)
