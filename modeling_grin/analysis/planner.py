"""What a layout of many devices costs: bytes per device, bytes sent, time per step. Formulas, nothing is run.

Memory and communication follow this package's model in transformers' engines, tensor by tensor, and tests hold them
against real runs; time is a roofline with the constants of `Assumptions`. `docs/scaling.md` says what was compared.

Shapes: T tokens of a micro-batch, H hidden_size, F intermediate_size, E experts, K experts per token, V vocabulary.
"""

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from math import ceil, isfinite, log2
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from ..loss_grinmoe import CHUNK_TOKENS
from ..modeling_grinmoe import check_parallel_sizes

GB = 1e9
FLOAT32, INT64 = 4, 8  # bytes
BUFFERS = 2  # of RoPE, float32 [head_dim / 2] each
MULTIPLY_ADD = 2  # FLOPs of a matmul, per parameter and token
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # bytes of gradients that DDP reduces together: the first ones, later ones


@dataclass(frozen=True)
class Precision:
    """Bytes of one number."""

    weights: int
    """What FSDP2 shards, and what the optimizer's moments are kept in."""
    compute: int
    """Matmuls and activations."""
    gradients: int
    """What is kept of gradients."""
    reduced: int
    """A gradient as it is summed over data-parallel ranks."""
    master: int = 0
    """Of weights that the optimizer keeps besides (then `weights` are a low-precision copy)."""
    autocast: bool = False
    """Each forward pass copies the weights of its matmuls to `compute`; hidden states between layers are float32."""

    @property
    def gathered(self) -> int:
        """What FSDP2 gathers."""
        return self.weights if self.autocast else self.compute

    @property
    def residual(self) -> int:
        """Hidden states between layers."""
        return FLOAT32 if self.autocast else self.compute


PRECISIONS = {
    "float32": Precision(4, 4, 4, 4),
    "bfloat16": Precision(2, 2, 2, 2),
    "mixed": Precision(4, 2, 4, 4),  # the recipes', as FSDP2's policy has it; `precision_of` knows the other layouts'
    "megatron": Precision(2, 2, 4, 4, master=4),  # gradients accumulated in float32
    "deepspeed": Precision(2, 2, 6, 4, master=4),  # the same, beside those in bfloat16
}
AUTOCAST = Precision(4, 2, 4, 4, autocast=True)  # "mixed" in layouts without FSDP2, and in pipelines
OPTIMIZERS = {"adamw": 2, "sgd_momentum": 1, "sgd": 0}  # moments per weight, in the weights' precision


@dataclass(frozen=True)
class Training:
    """One optimizer step."""

    micro_batch: int = 1
    """Sequences of a forward pass of one data-parallel rank."""
    global_batch: int = 1024
    """Sequences of an optimizer step, over all ranks."""
    sequence: int = 4096
    """Tokens of a sequence."""
    precision: str = "mixed"
    optimizer: str = "adamw"
    checkpointing: bool = True
    """Activation checkpointing: a layer keeps its input, and is computed again in the backward pass."""
    shard_optimizer: bool = False
    """Optimizer state sharded over the ranks of DDP (ZeRO-1; Megatron's distributed optimizer)."""

    def __post_init__(self) -> None:
        for field in ("micro_batch", "global_batch", "sequence"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1")
        for field, known in (("precision", PRECISIONS), ("optimizer", OPTIMIZERS)):
            if getattr(self, field) not in known:
                raise ValueError(f"{field}={getattr(self, field)!r} is unknown; use one of {', '.join(known)}")

    @property
    def tokens(self) -> int:
        """T."""
        return self.micro_batch * self.sequence

    def moments(self) -> int:
        """Bytes of optimizer state per weight, master weights included."""
        precision = PRECISIONS[self.precision]
        return precision.master + OPTIMIZERS[self.optimizer] * (precision.master or precision.weights)


@dataclass(frozen=True)
class Layout:
    """How many ways each kind of parallelism splits the devices; ranks of `tp` are neighbours, then `pp`, then `fsdp`,
    then `dp_replicate`."""

    dp_replicate: int = 1
    """Replicas of the weights: DDP, or HSDP together with `fsdp`."""
    fsdp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    """Of the `fsdp` ranks, those that share out the experts, which are then sharded over `fsdp / ep` (transformers'
    `DistributedConfig`). For comparison only: GRIN-MoE is trained without."""
    interleave: int = 1
    """Stages per device; above 1 the interleaved schedule, otherwise 1F1B."""

    @property
    def devices(self) -> int:
        return self.dp_replicate * self.fsdp * self.tp * self.pp

    @property
    def data_parallel(self) -> int:
        return self.dp_replicate * self.fsdp

    def __str__(self) -> str:
        names = {"DDP": self.dp_replicate, "FSDP2": self.fsdp, "TP": self.tp, "PP": self.pp, "EP": self.ep}
        parts = [f"{name}={size}" for name, size in names.items() if size > 1]
        return " ".join(parts + [f"x{self.interleave}"] * (self.interleave > 1)) or "one device"


@dataclass(frozen=True)
class Assumptions:
    """The hardware, and how well it is used. The defaults are an NVIDIA H100 SXM in the machines of the paper's
    Appendix B (8 GPUs, 8 x 400 Gbit/s InfiniBand)."""

    memory: float = 80 * GB
    """Bytes of a device."""
    reserve: float = 7 * GB
    """Bytes that no tensor can have: context of the device, communication buffers, fragmentation."""
    devices_per_machine: int = 8
    peak_flops: float = 989e12
    """Dense bfloat16 FLOP/s."""
    peak_flops_float32: float = 495e12
    """The same in float32 (TF32)."""
    matmul_efficiency: float = 0.6
    """Part of the peak that large matmuls reach."""
    grouped_efficiency: float = 0.92
    """Part of that, that the experts' grouped matmuls reach."""
    memory_bandwidth: float = 3.35e12
    """Bytes/s of a device's memory."""
    intra_bandwidth: float = 450e9
    """Bytes/s that a device sends within its machine."""
    inter_bandwidth: float = 50e9
    """Bytes/s that a device sends to other machines."""
    bandwidth_efficiency: float = 0.8
    """Part of the three bandwidths that is reached."""
    latency: float = 10e-6
    """Seconds a collective takes at least, for each doubling of its ranks."""
    overlap: float = 0.8
    """Part of the compute behind which FSDP's and DDP's collectives can hide. Others do not hide at all."""

    def __post_init__(self) -> None:
        for field, value in asdict(self).items():
            if not isfinite(value):
                raise ValueError(f"{field}={value} must be a finite number")
            if field in ("reserve", "latency", "overlap"):
                if value < 0:
                    raise ValueError(f"{field}={value} must be at least 0")
            elif value <= 0 and field != "memory":
                raise ValueError(f"{field}={value} must be above 0")
            if value > 1 and (field == "overlap" or field.endswith("efficiency")):
                raise ValueError(f"{field}={value} must be at most 1: it is a part of a whole")
        if self.memory <= self.reserve:
            raise ValueError(f"memory={self.memory / GB:g} GB must be above reserve={self.reserve / GB:g} GB")


def assume(changes: Iterable[str], **values: Any) -> Assumptions:
    """`Assumptions` with `values`, and with changes of the form `name=value` to others.

    Raises:
        ValueError: a change of another form, of an unknown name or of one of `values`; a value that cannot be.
    """
    others = {field.name for field in fields(Assumptions)} - values.keys()
    changed: dict[str, Any] = {}
    for change in changes:
        name, _, value = change.partition("=")
        if name in values:
            raise ValueError(f"assumption {change!r} has an option of its own: use --{name.replace('_', '-')}")
        try:
            changed[name] = float(value)
        except ValueError:
            name = ""
        if name not in others:
            raise ValueError(f"assumption {change!r} is not NAME=NUMBER with one of {', '.join(sorted(others))}")
    return replace(Assumptions(), **values, **changed)


def precision_of(layout: Layout, training: Training) -> Precision:
    """As in the recipes: FSDP2 gathers copies in low precision; in pipelines, and without it, autocast makes them."""
    autocast = training.precision == "mixed" and (layout.fsdp == 1 or layout.pp > 1)
    return AUTOCAST if autocast else PRECISIONS[training.precision]


class Collective(NamedTuple):
    """One kind of communication of a device in an optimizer step."""

    operation: str
    """`all_reduce`, `all_gather`, `reduce_scatter`, `all_to_all`, `broadcast` or `send`."""
    calls: int
    bytes: int
    """Of the whole tensors: what is reduced, or all parts together of what is gathered or scattered."""
    ranks: int
    stride: int
    """Distance of two neighbours among all ranks: tells whether the group is within one machine."""


class Parameters(NamedTuple):
    """Numbers of one tensor, or of many together, by what tensor and expert parallelism do with them."""

    sharded: int = 0
    replicated: int = 0
    experts: int = 0

    def local(self, layout: Layout) -> float:
        """On one device while it computes, so not sharded by `fsdp`."""
        return self.sharded / layout.tp + self.replicated + self.experts / (layout.tp * layout.ep)


def add(tensors: Iterable[Parameters]) -> Parameters:
    return Parameters(*map(sum, zip(Parameters(), *tensors, strict=True)))


def embedding_tensors(config: PreTrainedConfig) -> list[Parameters]:
    return [Parameters(sharded=config.vocab_size * config.hidden_size)]


def layer_tensors(config: PreTrainedConfig) -> list[Parameters]:
    """In the model's order. A bias of o is added after the sum over ranks, so it is replicated."""
    hidden, experts = config.hidden_size, config.num_local_experts
    query = config.num_attention_heads * config.head_dim
    norm = [Parameters(replicated=hidden)] * 2  # weight and bias
    attention = []
    for size in (query, *[config.num_key_value_heads * config.head_dim] * 2):
        attention += [Parameters(sharded=size * hidden), Parameters(sharded=size * config.attention_bias)]
    attention += [Parameters(sharded=query * hidden), Parameters(replicated=hidden * config.attention_bias)]
    router = [Parameters(replicated=hidden * config.moe_output_scale), Parameters(replicated=experts * hidden)]
    gate_up = Parameters(experts=2 * experts * config.intermediate_size * hidden)
    down = Parameters(experts=experts * config.intermediate_size * hidden)
    return [*norm, *attention, *norm, *router, gate_up, down]


def head_tensors(config: PreTrainedConfig) -> list[Parameters]:
    """The last norm, and the head, which has no weight of its own where it is tied to the embedding."""
    weight = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    norm = [Parameters(replicated=config.hidden_size)] * 2
    return [*norm, Parameters(sharded=weight), Parameters(sharded=config.vocab_size * config.lm_head_bias)]


class Stage(NamedTuple):
    """What one device holds of a pipeline; without one, the whole model."""

    layers: int
    embedding: bool
    head: bool
    in_flight: float
    """Micro-batches whose activations are held at once, at most."""

    def groups(self, config: PreTrainedConfig) -> list[list[Parameters]]:
        """The tensors that FSDP2 gathers together: the embedding, each layer, last norm and head."""
        groups = [embedding_tensors(config)] * self.embedding + [layer_tensors(config)] * self.layers
        return groups + [head_tensors(config)] * self.head

    def parameters(self, config: PreTrainedConfig) -> Parameters:
        return add(add(group) for group in self.groups(config))


def padded(config: PreTrainedConfig, layout: Layout) -> PreTrainedConfig:
    """With the sizes that FSDP2 fills tensors up to.

    It deals out rows, here experts or tokens of the vocabulary, and gives every rank memory for as many as the first
    has: 6 experts on 4 ranks are 8. Other sizes are multiples of any number of ranks.
    """
    if layout.fsdp == 1:
        return config
    filled = copy.copy(config)
    filled.num_local_experts = ceil(config.num_local_experts / layout.fsdp) * layout.fsdp
    rows = layout.tp * layout.fsdp
    filled.vocab_size = ceil(config.vocab_size / rows) * rows
    return filled


def micro_batches(layout: Layout, training: Training) -> int:
    """Forward passes of a data-parallel rank in an optimizer step."""
    return training.global_batch // (layout.data_parallel * training.micro_batch)


def stages(config: PreTrainedConfig, layout: Layout, training: Training) -> list[Stage]:
    """The stages that differ: first, second and last of the pipeline's devices.

    Of p devices, number i (from 0) holds min(m, p - i) micro-batches of m with 1F1B. With v stages each, interleaved,
    it holds (v - 1) p + 2 (p - i - 1) + 1 of the v parts of a micro-batch (Narayanan et al., 2021). More devices than
    layers: embedding and head are stages of their own.
    """
    size, own, m = layout.pp, layout.pp > config.num_hidden_layers, micro_batches(layout, training)
    if size == 1:
        return [Stage(config.num_hidden_layers, True, True, 1)]
    layers = ceil(config.num_hidden_layers / (size - 2 if own else size))

    def in_flight(device: int) -> float:
        if layout.interleave == 1:
            return min(m, size - device)
        parts = (layout.interleave - 1) * size + 2 * (size - device - 1) + 1
        return min(m, parts / layout.interleave)

    first = Stage(0 if own else layers, True, False, in_flight(0))
    last = Stage(0 if own else layers, False, True, in_flight(size - 1))
    second = [Stage(layers, False, False, in_flight(1))] if size > 2 else []
    return [first, *second, last]


def copied_by_autocast(config: PreTrainedConfig, layout: Layout, training: Training) -> tuple[float, float]:
    """Bytes of the copies that a layer's matmuls save: of attention and router; of the experts."""
    precision = precision_of(layout, training)
    if not precision.autocast:
        return 0, 0
    *others, gate_up, down = layer_tensors(config)
    vectors = Parameters(0, 4 * config.hidden_size)  # of the norms, which autocast leaves
    dense = add(others).local(layout) - vectors.local(layout)
    return dense * precision.compute, add((gate_up, down)).local(layout) * precision.compute


def saved_by_layer(config: PreTrainedConfig, layout: Layout, training: Training) -> float:
    """Bytes of activations a layer saves for its backward pass, one micro-batch.

    Per token, in compute precision: what q, k, v read (under autocast each its own copy), the jittered tokens (H
    each), the K copies sorted by expert and the K outputs to weigh (K H each); q and the attention's output, k and v;
    gate and up, act(gate), and its product with up (K 4F): transformers' `grouped_mm`, which accelerators run. As
    hidden states are: the inputs of both norms (H each). In float32: the softmax's sum (a head), and per draw of the
    router the probabilities (E). Masks, indices, keys of the noise and statistics of the norms are the rest.
    """
    precision, top_k, experts = precision_of(layout, training), config.num_experts_per_tok, config.num_local_experts
    size, read_by_qkv = precision.compute, 3 if precision.autocast else 1
    per_channel = (read_by_qkv + 1 + 2 * top_k) * size + 2 * precision.residual
    noise = config.hidden_size * FLOAT32 if precision.master else INT64  # other engines keep it, this model its keys
    hidden = config.hidden_size * per_channel + (noise if config.input_jitter_noise > 0 else 0)
    routing = top_k * (experts * (FLOAT32 + 1) + 1 + 4 * INT64 + precision.residual)
    routing += experts * size + 4 * precision.residual
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim * size
    sharded = heads + FLOAT32 * config.num_attention_heads + 4 * top_k * config.intermediate_size * size
    return training.tokens * (hidden + routing + sharded / layout.tp)


def saved_by_checkpoint(config: PreTrainedConfig, layout: Layout, training: Training) -> float:
    """Bytes a layer keeps where it is computed again: its input, the keys of its noise, its choice of experts."""
    residual = precision_of(layout, training).residual
    return training.tokens * (config.hidden_size * residual + INT64 + INT64 * config.num_experts_per_tok)


def activations(config: PreTrainedConfig, layout: Layout, training: Training, stage: Stage) -> float:
    """Bytes of activations at the worst moment.

    - In the head, forward, a chunk of tokens at a time: logits, in float32, too, and the gradients of weight and
      input. With tensor parallelism and pipelines logits are whole; the worst is then their backward pass: inputs of
      norm and head, log-softmax and two gradients of it in float32 (T V each, the head's output is gathered on every
      tensor-parallel rank), of which one makes way for the weight's gradient.
    - In a layer, backward: gradients of the experts' down projection, its input and its output (T K F, T K H); or that
      of gate and up, twice as large, when what they made of the tokens (T K F twice) is gone. They come beside those
      of other micro-batches, and are added to them later.
    - Under autocast, in the head, forward: logits in both precisions and their log-softmax, beside the copies of all
      layers' weights but the experts', which autocast keeps to the end of the forward pass. In a layer: weighing
      experts' outputs, in float32, when it is computed again; or the gradients of all experts in low precision and
      that of gate and up in float32, when the experts' activations and copies are gone.
    """
    precision, tokens = precision_of(layout, training), training.tokens
    dense_copies, expert_copies = copied_by_autocast(config, layout, training)
    layer = saved_by_layer(config, layout, training) + dense_copies + expert_copies
    kept = saved_by_checkpoint(config, layout, training) if training.checkpointing else layer
    hidden, slots = tokens * config.hidden_size, tokens * config.num_experts_per_tok
    weight = head_tensors(config)[2].local(layout) * precision.compute
    head = hidden * (precision.residual + precision.compute) + 2 * tokens * INT64 + weight * precision.autocast
    logits = tokens * config.vocab_size * FLOAT32
    if layout.tp == layout.pp == 1:
        chunk, copies = min(tokens, CHUNK_TOKENS), precision.compute * (precision.compute != FLOAT32)
        forward = chunk * (config.vocab_size * (FLOAT32 + copies) + 2 * config.hidden_size * precision.compute)
        forward += hidden * precision.compute + weight
        backward = 0
    else:
        forward = (2 * logits + logits / 2 + hidden * FLOAT32) * precision.autocast
        backward = max(2 * logits + max(logits, weight), (logits / 2 + 2 * weight) * precision.autocast)
    gate_up, down = (tensor.local(layout) * precision.compute for tensor in layer_tensors(config)[-2:])
    inside, outputs = slots * config.intermediate_size * precision.compute / layout.tp, slots * config.hidden_size
    of_layer = max(down + inside + outputs * precision.compute, gate_up - 2 * inside)
    if precision.autocast:
        if layout.pp == 1:
            forward += dense_copies * stage.layers * training.checkpointing
        weighing = 2 * FLOAT32 * (outputs + hidden)
        cast = 2 * gate_up - down - 4 * inside - 2 * outputs * precision.compute
        of_layer = max(of_layer, weighing * training.checkpointing, cast)
    of_layer += layer * training.checkpointing
    moments = (max(forward, backward) * stage.head, of_layer * (stage.layers > 0))
    return stage.in_flight * stage.layers * kept + head * stage.head + max(moments)


def gathered(config: PreTrainedConfig, layout: Layout, training: Training, stage: Stage) -> float:
    """Bytes of what FSDP2 puts together: two layers' weights (one is prefetched) and a layer's gradients, before and
    after they are scattered; in a pipeline the whole stage's, from the first micro-batch to the last."""
    if layout.fsdp == 1:
        return 0
    precision, config = precision_of(layout, training), padded(config, layout)
    if layout.pp > 1:
        return stage.parameters(config).local(layout) * (precision.gathered + precision.reduced)
    layer = add(layer_tensors(config)).local(layout) if stage.layers else 0
    tail = add(head_tensors(config)).local(layout) if stage.head else 0  # stays gathered from forward to backward
    return (2 * layer + tail) * precision.gathered + (layer + layer / layout.fsdp) * precision.reduced


def handed_on(config: PreTrainedConfig, layout: Layout, training: Training, stage: Stage) -> float:
    """Bytes of a stage's outputs, which torch keeps until their backward pass, and of the gradient that is
    received for one; what a stage is handed is its first layer's input, an activation.

    Not of engines with master weights: Megatron frees what it has sent, and of DeepSpeed the micro-batch that is
    fitted to the paper's Figure 3 (`docs/scaling.md`) stands for whatever it keeps.
    """
    precision = precision_of(layout, training)
    if layout.pp == 1 or precision.master:
        return 0
    number = (stage.in_flight + 1) * (layout.interleave - stage.head)
    return number * training.tokens * config.hidden_size * precision.residual


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, the fullest one, at its worst moment."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    communication: float
    buffers: float

    def total(self) -> float:
        return sum(asdict(self).values())


def stage_memory(config: PreTrainedConfig, layout: Layout, training: Training, stage: Stage) -> Memory:
    precision = precision_of(layout, training)
    parameters = stage.parameters(padded(config, layout))
    # Experts are sharded over ep and fsdp / ep: over fsdp in all, as everything else.
    count = parameters.local(replace(layout, ep=1)) / layout.fsdp
    visible = training.sequence if config.sliding_window is None else config.sliding_window + 1
    # DDP has a second copy of the gradients, its buckets (gradient_as_bucket_view=False); Megatron's has not.
    shards_optimizer = training.shard_optimizer and layout.fsdp == 1
    buckets = layout.dp_replicate > 1 and layout.fsdp == 1 and not shards_optimizer
    return Memory(
        weights=count * precision.weights,
        gradients=count * precision.gradients,
        optimizer=count * training.moments() / (layout.dp_replicate if shards_optimizer else 1),
        activations=activations(config, layout, training, stage),
        communication=gathered(config, layout, training, stage)
        + handed_on(config, layout, training, stage)
        + buckets * count * precision.reduced,
        buffers=BUFFERS * config.head_dim * FLOAT32 // 2 + (training.sequence > visible) * training.sequence**2,
    )


def memory(config: PreTrainedConfig, layout: Layout, training: Training) -> Memory:
    """That of the fullest stage."""
    return max(
        (stage_memory(config, layout, training, stage) for stage in stages(config, layout, training)),
        key=Memory.total,
    )


def send_time(collective: Collective, assumptions: Assumptions) -> float:
    """Seconds, by a ring: 2 (n - 1) / n of the bytes leave each of n devices for an all-reduce, (n - 1) / n for what
    gathers, scatters or exchanges parts, all of them for a send."""
    n = collective.ranks
    factor = {"all_reduce": 2 * (n - 1) / n, "send": 1, "broadcast": 1}.get(collective.operation, (n - 1) / n)
    inside = n * collective.stride <= assumptions.devices_per_machine
    bandwidth = assumptions.intra_bandwidth if inside else assumptions.inter_bandwidth
    transfer = factor * collective.bytes / (bandwidth * assumptions.bandwidth_efficiency)
    return collective.calls * assumptions.latency * log2(n) + transfer


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
    """What a device sends in an optimizer step, by purpose; of pipelines, a device of `stage`, by default the first.

    - Tensor parallelism, per micro-batch: [T, H] is summed once for the embedding, and for a layer twice forward (o,
      experts), four times backward (q, k, v and experts, each by itself), twice again where it is computed again; and
      the experts' weights' gradient [T, K]. The head gathers [T, V] and sums one [T, H].
    - FSDP2, per micro-batch: each group of weights is gathered forward and backward, last norm and head once; their
      gradients are reduced and scattered. With replicas (HSDP) the shards are summed over those once a step. In a
      pipeline everything once a step.
    - DDP, once a step: gradients, in buckets, and the buffers of rank 0. With a sharded optimizer gradients are
      scattered, and weights gathered.
    - Expert parallelism, per micro-batch and layer: [K T, H] there and back, forward, backward and again.
    - Pipeline, per micro-batch: [T, H] to the next stage, its gradient to the one before. The last one's loss, once.
    - The load-balance loss, per micro-batch: counts, int64 [layers, E], over all ranks; in a pipeline those of each
      stage's layers, over its data-parallel ranks.
    """
    stage = stage or stages(config, layout, training)[0]
    precision, tokens, m = precision_of(layout, training), training.tokens, micro_batches(layout, training)
    hidden = tokens * config.hidden_size
    again = int(training.checkpointing)
    groups = [add(group) for group in stage.groups(padded(config, layout))]
    result = {}

    def put(purpose: str, operation: str, calls: int, size: float, ranks: int, stride: int) -> None:
        if calls and size and ranks > 1:
            result[purpose] = Collective(operation, calls, round(size), ranks, stride)

    of_attention, others = (1 + again) * stage.layers, stage.embedding + (5 + again) * stage.layers + stage.head
    size = hidden * (of_attention * precision.compute + others * precision.residual)
    put("TP activations", "all_reduce", m * (of_attention + others), m * size, layout.tp, 1)
    weights = tokens * config.num_experts_per_tok * precision.residual
    put("TP routing weights", "all_reduce", m * stage.layers, m * stage.layers * weights, layout.tp, 1)
    vocabulary = ceil(config.vocab_size / layout.tp) * layout.tp * stage.head
    put("TP logits", "all_gather", m, m * tokens * vocabulary * precision.compute, layout.tp, 1)

    dense = [group._replace(experts=0).local(layout) for group in groups]
    experts = [group.experts / (layout.tp * layout.ep) for group in groups]
    if layout.ep == 1:
        dense, experts = [sum(pair) for pair in zip(dense, experts, strict=True)], []
    repeats, sides = (m, 2) if layout.pp == 1 else (1, 1)
    kept = sides - 1 if stage.head else 0  # last norm and head stay gathered from forward to backward
    count, width = repeats * len(dense), layout.tp * layout.pp
    gathers, size = repeats * (sides * len(dense) - kept), repeats * (sides * sum(dense) - kept * dense[-1])
    put("FSDP weights", "all_gather", gathers, size * precision.gathered, layout.fsdp, width)
    put("FSDP gradients", "reduce_scatter", count, repeats * sum(dense) * precision.reduced, layout.fsdp, width)
    shards, layers, size = layout.fsdp // layout.ep, repeats * stage.layers, repeats * sum(experts)
    put("FSDP experts", "all_gather", sides * layers, sides * size * precision.gathered, shards, width * layout.ep)
    put("FSDP expert gradients", "reduce_scatter", layers, size * precision.reduced, shards, width * layout.ep)
    exchanges = (4 + 2 * again) * m * stage.layers
    size = exchanges * hidden * config.num_experts_per_tok * precision.compute
    put("EP tokens", "all_to_all", exchanges, size, layout.ep, width)

    stride = width * layout.fsdp
    if layout.fsdp > 1:
        shard = (sum(dense) + sum(experts) * layout.ep) / layout.fsdp
        calls = len(dense) + stage.layers * (layout.ep > 1)
        put("HSDP gradients", "all_reduce", calls, shard * precision.reduced, layout.dp_replicate, stride)
    elif training.shard_optimizer:
        put("DDP gradients", "reduce_scatter", 1, sum(dense) * precision.reduced, layout.dp_replicate, stride)
        put("DDP weights", "all_gather", 1, sum(dense) * precision.weights, layout.dp_replicate, stride)
    else:
        tensors = [tensor.local(layout) * precision.reduced for group in stage.groups(config) for tensor in group]
        buckets = count_buckets(reversed(tensors))
        put("DDP gradients", "all_reduce", buckets, sum(tensors), layout.dp_replicate, stride)
        put("DDP buffers", "broadcast", 1, BUFFERS * config.head_dim * FLOAT32 // 2, layout.dp_replicate, stride)

    parts = m * layout.interleave
    sends = 2 * parts - m * (stage.embedding + stage.head)
    put("PP activations", "send", sends, sends * hidden * precision.weights, layout.pp, layout.tp)
    put("PP loss", "broadcast", 1, FLOAT32, layout.pp, layout.tp)
    if config.router_aux_loss_coef > 0 and stage.layers:
        counts = m * stage.layers * config.num_local_experts * INT64
        ranks, stride = (layout.devices, 1) if layout.pp == 1 else (layout.data_parallel, width)
        put("balance loss", "all_reduce", parts, counts, ranks, stride)
    return result


def layer_flops(config: PreTrainedConfig, layout: Layout, training: Training) -> tuple[float, float]:
    """FLOPs of a layer's forward pass of a micro-batch: attention and router; experts.

    A query sees the keys before it inside the window: half of the sequence on average, or less.
    """
    sequence, tokens = training.sequence, training.tokens
    window = sequence if config.sliding_window is None else min(sequence, config.sliding_window + 1)
    visible = window - window**2 / (2 * sequence)
    layer = add(layer_tensors(config))
    scores = 2 * visible * config.num_attention_heads * config.head_dim
    dense = MULTIPLY_ADD * tokens * ((layer.sharded + scores) / layout.tp + layer.replicated)
    active = layer.experts * config.num_experts_per_tok / config.num_local_experts
    return dense, MULTIPLY_ADD * tokens * active / layout.tp


def layer_time(config: PreTrainedConfig, layout: Layout, training: Training, assumptions: Assumptions) -> float:
    """Seconds of a layer, forward and backward, one micro-batch, without communication.

    Matmuls: forward once, backward twice, and forward again with checkpointing; the experts' are at least as long as
    their weights take to be read. Everything else is memory traffic: what is saved is written and read forward,
    and read backward, where its gradient is written and read. Autocast copies weights before each forward pass, and
    their gradients back.
    """
    precision = precision_of(layout, training)
    peak = assumptions.peak_flops if precision.compute < FLOAT32 else assumptions.peak_flops_float32
    peak *= assumptions.matmul_efficiency
    bandwidth = assumptions.memory_bandwidth * assumptions.bandwidth_efficiency
    again = int(training.checkpointing)
    dense, experts = layer_flops(config, layout, training)
    read = layer_tensors(config)[-2:]
    weights = sum(tensor.local(layout) for tensor in read) * precision.compute
    grouped = 1 if config.num_local_experts == 1 else assumptions.grouped_efficiency
    matmuls = dense / peak + max(experts / (peak * grouped), weights / bandwidth)
    saved = saved_by_layer(config, layout, training)
    if config.num_local_experts == 1:  # a dense layer neither sorts its tokens nor weighs its outputs
        saved -= 2 * training.tokens * config.hidden_size * precision.compute
    copies = sum(copied_by_autocast(config, layout, training)) * (1 + precision.weights / precision.compute)
    return (3 + again) * matmuls + ((5 + 2 * again) * saved + (2 + again) * copies) / bandwidth


def head_time(config: PreTrainedConfig, layout: Layout, training: Training, assumptions: Assumptions) -> float:
    """Seconds of the head, forward and backward, and of the loss, which reads and writes float32 logits six times."""
    precision = precision_of(layout, training)
    peak = assumptions.peak_flops if precision.compute < FLOAT32 else assumptions.peak_flops_float32
    size = training.tokens * config.vocab_size
    flops = 3 * MULTIPLY_ADD * size * config.hidden_size / layout.tp
    bandwidth = assumptions.memory_bandwidth * assumptions.bandwidth_efficiency
    return flops / (peak * assumptions.matmul_efficiency) + 6 * size * FLOAT32 / bandwidth


def stage_time(
    config: PreTrainedConfig, layout: Layout, training: Training, assumptions: Assumptions, stage: Stage
) -> dict[str, float]:
    """Seconds of an optimizer step by cause, if this stage were the slowest.

    What hides behind compute: FSDP2's collectives behind a micro-batch's, those of gradients that are reduced once a
    step behind the last micro-batch's. A pipeline of p devices with v stages each idles for (p - 1) / v
    micro-batches.
    """
    m = micro_batches(layout, training)
    compute = stage.layers * layer_time(config, layout, training, assumptions)
    compute += stage.head * head_time(config, layout, training, assumptions)
    spent = {
        purpose: send_time(collective, assumptions)
        for purpose, collective in communication(config, layout, training, stage).items()
    }
    times = {"compute": m * compute}
    for name, hides_behind in {
        "TP": 0,
        "EP": 0,
        "PP": 0,
        "FSDP": m if layout.pp == 1 else 1,
        "HSDP": 1,
        "DDP": 1,
    }.items():
        total = sum(seconds for purpose, seconds in spent.items() if purpose.startswith(name))
        times[name] = max(0.0, total - hides_behind * assumptions.overlap * compute)
    times["balance loss"] = spent.get("balance loss", 0.0)
    busy = compute + (times["TP"] + times["EP"] + times["PP"]) / m
    times["bubble"] = (layout.pp - 1) / layout.interleave * busy
    # The optimizer reads gradients, and reads and writes weights and moments.
    state = stage_memory(config, layout, training, stage)
    traffic = state.gradients + 2 * (state.weights + state.optimizer)
    times["optimizer"] = traffic / (assumptions.memory_bandwidth * assumptions.bandwidth_efficiency)
    return times


@dataclass(frozen=True)
class Estimate:
    """What a layout costs."""

    layout: Layout
    memory: Memory
    """Of the fullest device."""
    fits: bool
    seconds: dict[str, float]
    """Of an optimizer step, by cause; communication only as far as it does not hide behind compute."""
    communication: dict[str, Collective]
    """Of a device of the slowest stage, in a step."""
    tokens: int
    """Of a step."""

    @property
    def step_time(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_time

    def to_dict(self) -> dict:
        """For JSON."""
        return {
            "layout": {"name": str(self.layout), "devices": self.layout.devices, **asdict(self.layout)},
            "fits": self.fits,
            "memory": {**asdict(self.memory), "total": self.memory.total()},
            "step_time": self.step_time,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_per_device": self.tokens_per_second / self.layout.devices,
            "seconds": self.seconds,
            "balance_loss_share": self.seconds["balance loss"] / self.step_time,
            "communication": {purpose: collective._asdict() for purpose, collective in self.communication.items()},
        }


def check_layout(config: PreTrainedConfig, layout: Layout, training: Training) -> None:
    """Raise ValueError, with the numbers, for a layout that cannot be."""
    for field, size in asdict(layout).items():
        if size < 1:
            raise ValueError(f"{field}={size} must be at least 1")
    # Where embedding and head are stages of their own, the others have a layer each.
    own = (layout.pp, layout.interleave) == (config.num_hidden_layers + 2, 1)
    check_parallel_sizes(
        config,
        tp_size=layout.tp,
        pp_size=1 if own else layout.pp * layout.interleave,
        fsdp_size=layout.fsdp if layout.pp == 1 else 1,  # in a pipeline, ranks may be without an expert
    )
    if config.num_local_experts % layout.ep or layout.fsdp % layout.ep:
        raise ValueError(
            f"ep={layout.ep} must divide num_local_experts={config.num_local_experts} and fsdp={layout.fsdp}"
        )
    per_pass = layout.data_parallel * training.micro_batch
    if training.global_batch % per_pass:
        raise ValueError(
            f"global_batch={training.global_batch} is not a multiple of {layout.data_parallel} data-parallel ranks x "
            f"micro_batch={training.micro_batch}: choose a multiple of {per_pass}"
        )


def estimate(config: PreTrainedConfig, layout: Layout, training: Training, assumptions: Assumptions) -> Estimate:
    """Memory, communication and time of training `config` with `layout`.

    Raises:
        ValueError: as `check_layout`.
    """
    check_layout(config, layout, training)
    all_stages = stages(config, layout, training)
    times = [stage_time(config, layout, training, assumptions, stage) for stage in all_stages]
    slowest = max(range(len(times)), key=lambda number: sum(times[number].values()))
    needed = memory(config, layout, training)
    return Estimate(
        layout,
        needed,
        needed.total() <= assumptions.memory - assumptions.reserve,
        times[slowest],
        communication(config, layout, training, all_stages[slowest]),
        training.global_batch * training.sequence,
    )


def divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def admits(layout: Layout, number: int) -> bool:
    """Whether the pipeline's schedule can do so many micro-batches: `SCHEDULES` of `training.pipeline`, whose import
    takes longer than a plan."""
    return number >= layout.pp if layout.interleave == 1 else number % max(1, number // layout.pp) == 0


def check_trainable(config: PreTrainedConfig, layout: Layout, training: Training) -> None:
    """Raise ValueError, as `check_layout`, for a layout that the recipes do not train either."""
    check_layout(config, layout, training)
    if layout.pp == 1:
        return
    if layout.dp_replicate > 1:
        raise ValueError(f"dp_replicate={layout.dp_replicate}: data parallelism of a pipeline is FSDP2, use fsdp")
    if config.tie_word_embeddings:
        raise ValueError("tie_word_embeddings=True: the first stage and the last cannot share a parameter")
    check_parallel_sizes(config, pp_size=layout.pp)  # embedding and head are no stages of their own
    number = micro_batches(layout, training)
    if not admits(layout, number):
        raise ValueError(
            f"global_batch={training.global_batch} makes {number} micro-batches, which the schedule cannot do on "
            f"{layout.pp} stages: choose a multiple of {layout.data_parallel * training.micro_batch * layout.pp}"
        )


def layouts(num_devices: int, assumptions: Assumptions) -> list[Layout]:
    """Those of `num_devices`, for any model: tensor parallelism within a machine; the data-parallel ranks as DDP,
    FSDP2 or both (HSDP), in pipelines as FSDP2; pipelines as 1F1B and interleaved; and, without these and tensor
    parallelism, expert parallelism."""
    found = []
    for tp in divisors(min(num_devices, assumptions.devices_per_machine)):
        for pp in divisors(num_devices // tp) if num_devices % tp == 0 else []:
            ranks = num_devices // (tp * pp)
            for fsdp in divisors(ranks) if pp == 1 else [ranks]:
                for interleave in (1, 2) if pp > 1 else (1,):
                    for ep in divisors(fsdp) if tp == pp == 1 else (1,):
                        found.append(Layout(ranks // fsdp, fsdp, tp, pp, ep, interleave))
    return found


class Plan(NamedTuple):
    """What `plan` found."""

    estimates: list[Estimate]
    """Those that fit, fastest first, then the others, by what they need."""
    left_out: dict[str, str]
    """Layouts that the recipes cannot train, and why."""


def plan(config: PreTrainedConfig, num_devices: int, training: Training, assumptions: Assumptions) -> Plan:
    """Estimates of all `layouts` that can be.

    Raises:
        ValueError: no layout is possible.
    """
    if num_devices < 1:
        raise ValueError(f"devices={num_devices} must be at least 1")
    estimates, left_out = [], {}
    for layout in layouts(num_devices, assumptions):
        try:
            check_trainable(config, layout, training)
        except ValueError as error:
            left_out[str(layout)] = str(error)
        else:
            estimates.append(estimate(config, layout, training, assumptions))
    if not estimates:
        name, reason = next(iter(left_out.items()))
        raise ValueError(f"no layout of {num_devices} devices is possible; {name}: {reason}")
    estimates.sort(key=lambda e: (not e.fits, -e.tokens_per_second if e.fits else e.memory.total()))
    return Plan(estimates, left_out)
