"""Communication and time of an optimizer step. Symbols as in `memory`."""

from collections.abc import Iterable
from math import ceil, log2
from typing import NamedTuple

from transformers import PreTrainedConfig

from ..kernels.chunked_loss import CHUNK_TOKENS
from .memory import (
    BUFFERS,
    Stage,
    copied_by_autocast,
    pad_sizes,
    saved_by_layer,
    saved_by_packing,
    stage_memory,
    stages,
)
from .parameters import adapters_of_layer, layer_tensors, matrices_of_layer, sum_counts
from .setting import FLOAT32, INT64, PACKED, SCALES, Assumptions, Layout, Training, micro_batches, precision_of

MULTIPLY_ADD = 2  # FLOPs of a matmul, per parameter and token
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # bytes of gradients that DDP reduces together: the first ones, later ones


class Collective(NamedTuple):
    """One kind of communication of a device in an optimizer step."""

    operation: str  # all_reduce, all_gather, reduce_scatter, all_to_all, broadcast or send
    calls: int
    bytes: int  # of whole tensors: the one reduced, or all gathered or scattered parts together
    ranks: int
    stride: int  # between neighbours of the group, in ranks: tells whether the group is within one machine


def count_buckets(sizes: Iterable[float]) -> int:
    """All-reduces of DDP, which fills buckets with gradients (bytes) in the order in which they are ready."""
    calls, filled = 0, 0.0
    for size in sizes:
        filled += size
        if filled >= (BUCKET if calls else FIRST_BUCKET):
            calls, filled = calls + 1, 0.0
    return calls + (filled > 0)


def communication(
    config: PreTrainedConfig, layout: Layout, training: Training, stage: Stage | None = None
) -> dict[str, Collective]:
    """Return what a device of `stage`, by default the first, sends in an optimizer step, by purpose.

    - Tensor parallelism, per micro-batch: [T, H] is summed once for the embedding. A layer sums it twice forward (o,
      experts), four times backward (q, k, v and experts, each by itself) and once more (o) if recomputed; it also sums
      the gradient of the experts' weights [T, K]. The head sums a loss and one [T, H], and gathers [T].
    - FSDP2, per micro-batch: each group of weights is gathered forward and backward, last norm and head once; their
      gradients are reduced and scattered. In a pipeline all of this happens once per step. With replicas (HSDP), the
      shards are then summed once per step.
    - DDP, once per step: gradients, in buckets, and the buffers of rank 0. LoRA's gradients, in every layout.
    - Expert parallelism, per micro-batch and layer: [K T, H] there and back, forward, backward and again.
    - Pipeline, per micro-batch: [T, H] to the next stage, its gradient to the previous one. Once: the loss.
    - Load-balance loss, per micro-batch: counts, int64 [layers, E], over all ranks; in a pipeline over the
      data-parallel ranks of each stage.
    """
    stage = stage or stages(config, layout, training)[0]
    precision, tokens, m = precision_of(layout, training), training.tokens, micro_batches(layout, training)
    hidden, again, width = tokens * config.hidden_size, int(training.checkpointing), layout.tp * layout.pp
    groups = [sum_counts(group) for group in stage.groups(pad_sizes(config, layout))]
    result = {}

    def send(purpose: str, operation: str, calls: int, size: float, ranks: int, stride: int) -> None:
        if calls and size and ranks > 1:
            result[purpose] = Collective(operation, calls, round(size), ranks, stride)

    # Recomputation ends before a layer's last sum, of the experts' outputs: no gradient needs what is behind it.
    attention, others = (1 + again) * stage.layers, stage.embedding + 5 * stage.layers
    size = hidden * ((attention + stage.head) * precision.compute + others * precision.residual) + FLOAT32 * stage.head
    send("TP activations", "all_reduce", m * (attention + others + 2 * stage.head), m * size, layout.tp, 1)
    weights = tokens * config.num_experts_per_tok * precision.residual
    send("TP routing weights", "all_reduce", m * stage.layers, m * stage.layers * weights, layout.tp, 1)
    labels = training.micro_batch * (training.sequence - 1) * stage.head
    chunks = ceil(labels / CHUNK_TOKENS)
    send("TP softmax", "all_gather", m * chunks, m * labels * layout.tp * FLOAT32, layout.tp, 1)

    dense = [group._replace(experts=0).local(layout) for group in groups]
    experts = [group.experts / (layout.tp * layout.ep) for group in groups]
    if layout.ep == 1:
        dense, experts = [sum(pair) for pair in zip(dense, experts, strict=True)], []
    repeats, sides = (m, 2) if layout.pp == 1 else (1, 1)
    kept = sides - 1 if stage.head else 0  # last norm and head stay gathered from forward to backward
    gathers, size = repeats * (sides * len(dense) - kept), repeats * (sides * sum(dense) - kept * dense[-1])
    packed = saved_by_packing(config, training, repeats * sides * stage.layers, precision.gathered)
    send("FSDP weights", "all_gather", gathers, size * precision.gathered - packed, layout.fsdp, width)
    reduced = precision.reduced * (not training.lora_r)
    count, size = repeats * len(dense), repeats * sum(dense) * reduced
    send("FSDP gradients", "reduce_scatter", count, size, layout.fsdp, width)
    shards, layers, size = layout.fsdp // layout.ep, repeats * stage.layers, repeats * sum(experts)
    send("FSDP experts", "all_gather", sides * layers, sides * size * precision.gathered, shards, width * layout.ep)
    send("FSDP expert gradients", "reduce_scatter", layers, size * reduced, shards, width * layout.ep)
    exchanges = (4 + 2 * again) * m * stage.layers
    size = exchanges * hidden * config.num_experts_per_tok * precision.compute
    send("EP tokens", "all_to_all", exchanges, size, layout.ep, width)

    stride = width * layout.fsdp
    if layout.fsdp > 1:
        shard = (sum(dense) + sum(experts) * layout.ep) / layout.fsdp
        calls = len(dense) + stage.layers * (layout.ep > 1)
        send("HSDP gradients", "all_reduce", calls, shard * reduced, layout.dp_replicate, stride)
    else:
        tensors = [tensor.local(layout) * reduced for group in stage.groups(config) for tensor in group]
        buckets = count_buckets(reversed(tensors))
        send("DDP gradients", "all_reduce", buckets, sum(tensors), layout.dp_replicate, stride)
        send("DDP buffers", "broadcast", 1, BUFFERS * config.head_dim * FLOAT32 // 2, layout.dp_replicate, stride)

    adapters = stage.layers * adapters_of_layer(config, training)  # two for each of four projections, and two
    send("DDP adapters", "all_reduce", 12 * stage.layers, adapters * FLOAT32, layout.data_parallel, width)

    parts = m * layout.interleave
    sends = 2 * parts - m * (stage.embedding + stage.head)
    send("PP activations", "send", sends, sends * hidden * precision.weights, layout.pp, layout.tp)
    send("PP loss", "broadcast", 1, FLOAT32, layout.pp, layout.tp)
    if config.router_aux_loss_coef > 0 and stage.layers:
        counts = m * stage.layers * config.num_local_experts * INT64
        ranks, stride = (layout.devices, 1) if layout.pp == 1 else (layout.data_parallel, width)
        send("balance loss", "all_reduce", parts, counts, ranks, stride)
    return result


def send_time(collective: Collective, assumptions: Assumptions) -> float:
    """Seconds of a collective on a ring of n devices.

    A device sends 2 (n - 1) / n of the bytes of an all-reduce, (n - 1) / n of those gathered, scattered or exchanged,
    and all bytes of a send or broadcast.
    """
    n = collective.ranks
    factor = {"all_reduce": 2 * (n - 1) / n, "send": 1, "broadcast": 1}.get(collective.operation, (n - 1) / n)
    inside = n * collective.stride <= assumptions.devices_per_machine
    bandwidth = assumptions.intra_bandwidth if inside else assumptions.inter_bandwidth
    transfer = factor * collective.bytes / (bandwidth * assumptions.bandwidth_efficiency)
    return collective.calls * assumptions.latency * log2(n) + transfer


def layer_flops(config: PreTrainedConfig, layout: Layout, training: Training) -> tuple[float, float]:
    """FLOPs of a layer's forward pass of a micro-batch: attention and router; experts.

    A query sees the keys before it inside the window: half of the sequence on average, or less.
    """
    sequence, tokens = training.sequence, training.tokens
    window = sequence if config.sliding_window is None else min(sequence, config.sliding_window + 1)
    visible = window - window**2 / (2 * sequence)
    layer = sum_counts(layer_tensors(config))
    scores = 2 * visible * config.num_attention_heads * config.head_dim
    dense = MULTIPLY_ADD * tokens * ((layer.sharded + scores) / layout.tp + layer.replicated)
    active = layer.experts * config.num_experts_per_tok / config.num_local_experts
    return dense, MULTIPLY_ADD * tokens * active / layout.tp


def speeds(layout: Layout, training: Training, assumptions: Assumptions) -> tuple[float, float]:
    """FLOP/s of large matmuls, and bytes/s of a device's memory."""
    low = precision_of(layout, training).compute < FLOAT32
    peak = assumptions.peak_flops if low else assumptions.peak_flops_float32
    return peak * assumptions.matmul_efficiency, assumptions.memory_bandwidth * assumptions.bandwidth_efficiency


def layer_time(config: PreTrainedConfig, layout: Layout, training: Training, assumptions: Assumptions) -> float:
    """Seconds of a layer, forward and backward, one micro-batch, without communication.

    Matmuls run once forward, twice backward (once, if weights are frozen), and once more with checkpointing; the
    experts' take at least as long as reading their weights. Everything else is memory traffic: saved activations are
    written and read forward, read backward, and their gradients written and read. Autocast copies weights before each
    forward pass and casts their gradients back.
    """
    precision, again = precision_of(layout, training), int(training.checkpointing)
    peak, bandwidth = speeds(layout, training, assumptions)
    dense, experts = layer_flops(config, layout, training)
    weights = sum(tensor.local(layout) for tensor in layer_tensors(config)[-2:]) * precision.compute
    grouped = 1 if config.num_local_experts == 1 else assumptions.grouped_efficiency
    matmuls = dense / peak + max(experts / (peak * grouped), weights / bandwidth)
    saved = saved_by_layer(config, layout, training)
    if config.num_local_experts == 1:  # a dense layer neither sorts its tokens nor weighs its outputs
        saved -= 2 * training.tokens * config.hidden_size * precision.compute
    copies = sum(copied_by_autocast(config, layout, training)) * (1 + precision.weights / precision.compute)
    if training.load_in_4bit:  # each pass unpacks the matrices, and reads them
        copies = matrices_of_layer(config) * (PACKED + SCALES + 2 * precision.compute)
    return (2 + (not training.lora_r) + again) * matmuls + ((5 + 2 * again) * saved + (2 + again) * copies) / bandwidth


def head_time(config: PreTrainedConfig, layout: Layout, training: Training, assumptions: Assumptions) -> float:
    """Seconds of head and loss, forward and backward; float32 logits are read or written six times."""
    peak, bandwidth = speeds(layout, training, assumptions)
    size = training.tokens * config.vocab_size / layout.tp
    flops = (2 + (not training.lora_r)) * MULTIPLY_ADD * size * config.hidden_size
    return flops / peak + 6 * size * FLOAT32 / bandwidth


def stage_time(
    config: PreTrainedConfig, layout: Layout, training: Training, assumptions: Assumptions, stage: Stage
) -> dict[str, float]:
    """Seconds of an optimizer step by cause, if this stage were the slowest.

    FSDP2's collectives hide behind every micro-batch's compute, collectives that happen once per step behind the last
    micro-batch's. A pipeline of p devices with v stages each idles for (p - 1) / v micro-batches.
    """
    m = micro_batches(layout, training)
    compute = stage.layers * layer_time(config, layout, training, assumptions)
    compute += stage.head * head_time(config, layout, training, assumptions)
    sent = communication(config, layout, training, stage)
    spent = {purpose: send_time(collective, assumptions) for purpose, collective in sent.items()}
    times = {"compute": m * compute}
    passes_to_hide_behind = {"TP": 0, "EP": 0, "PP": 0, "FSDP": m if layout.pp == 1 else 1, "HSDP": 1, "DDP": 1}
    for name, passes in passes_to_hide_behind.items():
        total = sum(seconds for purpose, seconds in spent.items() if purpose.startswith(name))
        times[name] = max(0.0, total - passes * assumptions.overlap * compute)
    times["balance loss"] = spent.get("balance loss", 0.0)
    busy = compute + (times["TP"] + times["EP"] + times["PP"]) / m
    times["bubble"] = (layout.pp - 1) / layout.interleave * busy
    # The optimizer reads gradients, and reads and writes weights and moments.
    state = stage_memory(config, layout, training, stage)
    traffic = state.gradients + 2 * (state.weights + state.optimizer)
    times["optimizer"] = traffic / (assumptions.memory_bandwidth * assumptions.bandwidth_efficiency)
    return times
