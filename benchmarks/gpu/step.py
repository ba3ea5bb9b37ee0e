"""Training steps of real layers: ours, stock Phimoe and a dense model of equal active size, taking turns.

A layer's time is the difference between models of four layers and of two. The work of a step is the matrix products',
the attention's within the window included; MFU is its share of 989 TFLOP/s, an H100's or H200's.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.device import DEVICE, ROUNDS, WARM_UPS, Row, Sizes, build, peak_gigabytes, random_ids, synchronize
from benchmarks.peers import build_dense, build_stock
from modeling_grin.planning.memory import memory
from modeling_grin.planning.setting import Layout, Training

LAYERS = (2, 4)
PEAK_FLOPS = 989e12
PREDICTED_LAYER = {"ours": 19.8, "phimoe": 25.0, "dense": 18.4}  # ms, 4 rows of 2048 tokens in bfloat16
GOALS = {"dense": 0.95, "phimoe": 1.25}  # of our speed over theirs, at 8192 tokens


def build_all(sizes: Sizes, num_layers: int) -> dict[str, Any]:
    config = sizes.config(num_layers)
    ours = build(config)
    with DEVICE:
        dense = build_dense(config, torch.bfloat16)
        stock = build_stock(ours)
    return {"ours": ours, "phimoe": stock, "dense": dense}


def train(model: Any, ids: torch.Tensor, autocast: bool = False) -> None:
    """Run a forward and a backward pass, as a trainer does."""
    if hasattr(model, "begin_step"):
        model.begin_step(0, num_tokens=ids.numel())
    with torch.autocast(DEVICE.type, torch.bfloat16) if autocast else nullcontext():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    model.zero_grad(set_to_none=True)


def take_turns(tasks: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Return each task's median in ms; all run in every round."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(WARM_UPS + ROUNDS):
        for name, task in tasks.items():
            synchronize()
            start = time.perf_counter()
            task()
            synchronize()
            if turn >= WARM_UPS:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(values) for name, values in times.items()}


def layer_flops(sizes: Sizes, num_tokens: int, length: int) -> float:
    """Return the FLOPs of a layer's products, forward and backward."""
    head_dim = sizes.hidden_size // sizes.num_attention_heads
    projections = sizes.hidden_size * head_dim * 2 * (sizes.num_attention_heads + sizes.num_key_value_heads)
    experts = 2 * 3 * sizes.hidden_size * sizes.intermediate_size
    window = min(length, sizes.sliding_window + 1)
    seen = (window * (window + 1) / 2 + (length - window) * window) / length  # keys of a query, on average
    attention = 2 * sizes.hidden_size * seen
    return 6 * num_tokens * (projections + experts + attention)


def compare(sizes: Sizes) -> list[Row]:
    """Layers of the three models at every number of tokens and length of rows, in bfloat16."""
    rows: list[Row] = []
    found: dict[tuple[int, int, int], dict[str, float]] = {}
    for num_layers in LAYERS:
        models = build_all(sizes, num_layers)
        for num_tokens in sizes.tokens:
            for length in (length for length in sizes.lengths if length <= num_tokens):
                ids = random_ids(sizes.vocab_size, num_tokens // length, length)
                tasks = {name: partial(train, model, ids) for name, model in models.items()}
                found[num_layers, num_tokens, length] = take_turns(tasks)
        del models, tasks
    for num_layers, num_tokens, length in found:
        if num_layers != LAYERS[0]:
            continue
        few, many = (found[number, num_tokens, length] for number in LAYERS)
        where, is_predicted = f"{num_tokens} tokens, rows of {length}", (num_tokens, length) == (8192, 2048)
        layer = {name: (many[name] - few[name]) / (LAYERS[1] - LAYERS[0]) for name in few}
        for name, value in layer.items():
            rows.append(Row(f"layer, {name}, {where}", value, "ms", PREDICTED_LAYER[name] if is_predicted else None))
        for name, goal in GOALS.items():
            rows.append(Row(f"step's speed over {name}, {where}", many[name] / many["ours"], "", goal))
        mfu = 1e5 * layer_flops(sizes, num_tokens, length) / PEAK_FLOPS / layer["ours"]
        rows.append(Row(f"MFU of a layer, {where}", mfu, "%", 50))
    return rows


def variants(sizes: Sizes) -> Iterator[Row]:
    """Our step with two layers in other ways, with checkpointing, under autocast, compiled; and its memory."""
    num_layers = LAYERS[0]
    num_tokens, length = max(sizes.tokens), min(sizes.lengths)
    ids = random_ids(sizes.vocab_size, num_tokens // length, length)
    for precision, dtype in (("bfloat16", torch.bfloat16), ("mixed", torch.float32)):
        model = build(sizes.config(num_layers), dtype)
        step = partial(train, model, ids, autocast=precision == "mixed")
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable()
            name = f"{precision}{', checkpointing' * checkpointing}"
            (value,) = take_turns({name: step}).values()
            training = Training(len(ids), len(ids), length, precision, checkpointing=checkpointing)
            planned = memory(model.config, Layout(), training)
            without_optimizer = (planned.total() - planned.optimizer) / 1e9
            yield Row(f"step, {num_layers} layers, {name}", value, "ms")
            yield Row(f"memory, {num_layers} layers, {name}", peak_gigabytes(step), "GB", without_optimizer)
        model.gradient_checkpointing_disable()
        if precision == "bfloat16":
            for layer in model.model.layers:
                layer.compile()
            (value,) = take_turns({"compiled": step}).values()
            yield Row(f"step, {num_layers} layers, bfloat16, compiled by layer", value, "ms")
        del model, step


def count_syncs(sizes: Sizes) -> list[Row]:
    """Host synchronisations that torch warns of in a step, without its head's."""
    if DEVICE.type != "cuda":
        return []
    import warnings

    model = build(sizes.config(LAYERS[0]))
    ids = random_ids(sizes.vocab_size, 1, min(sizes.lengths))
    train(model, ids)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, ids)
    torch.cuda.set_sync_debug_mode("default")
    syncs = sum("synchronizing" in str(warning.message) for warning in caught)
    return [Row(f"host waits, step of {LAYERS[0]} layers", syncs, "", 2)]


def measure(sizes: Sizes) -> Iterator[Row]:
    for part in (compare, count_syncs, variants):
        yield from part(sizes)
