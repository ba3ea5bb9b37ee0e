"""Bytes that a layout's devices hold. Shapes: [T, H] and so on, with T tokens of a micro-batch, H hidden_size,
F intermediate_size, E experts, K experts per token, V vocabulary."""

import copy
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import NamedTuple

from transformers import PreTrainedConfig

from ..kernels.chunked_loss import CHUNK_TOKENS
from ..masks_grinmoe import fits_flash
from .parameters import (
    Parameters,
    adapters_of_layer,
    embedding_tensors,
    head_tensors,
    layer_tensors,
    matrices_of_layer,
    sum_counts,
)
from .setting import FLOAT32, INT64, OPTIMIZERS, PACKED, SCALES, Layout, Training, micro_batches, precision_of

BUFFERS = 2  # of RoPE, float32 [head_dim / 2] each


class Stage(NamedTuple):
    """A device's part of a pipeline; without pipelines, the whole model."""

    layers: int
    embedding: bool
    head: bool
    in_flight: float  # the most micro-batches whose activations are held at once

    def groups(self, config: PreTrainedConfig) -> list[list[Parameters]]:
        """The tensors that FSDP2 gathers together: the embedding, each layer, last norm and head."""
        groups = [embedding_tensors(config)] * self.embedding + [layer_tensors(config)] * self.layers
        return groups + [head_tensors(config)] * self.head

    def parameters(self, config: PreTrainedConfig) -> Parameters:
        """Their sum."""
        return sum_counts(sum_counts(group) for group in self.groups(config))


def stages(config: PreTrainedConfig, layout: Layout, training: Training) -> list[Stage]:
    """The stages that differ: first, second and last of the pipeline's devices.

    With 1F1B, device i of p (from 0) holds min(m, p - i) of m micro-batches. With v stages each, interleaved, it holds
    (v - 1) p + 2 (p - i - 1) + 1 of the v parts of a micro-batch (Narayanan et al., 2021). If there are more devices
    than layers, embedding and head are stages of their own.
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


def pad_sizes(config: PreTrainedConfig, layout: Layout) -> PreTrainedConfig:
    """The config with the sizes that FSDP2 pads tensors to.

    FSDP2 deals out rows, here experts or tokens of the vocabulary, and gives every rank memory for as many as the
    first one has: 6 experts on 4 ranks need memory for 8. Other sizes are multiples of any number of ranks.
    """
    if layout.fsdp == 1:
        return config
    filled, rows = copy.copy(config), layout.tp * layout.fsdp
    filled.num_local_experts = ceil(config.num_local_experts / layout.fsdp) * layout.fsdp
    filled.vocab_size = ceil(config.vocab_size / rows) * rows
    return filled


def copied_by_autocast(config: PreTrainedConfig, layout: Layout, training: Training) -> tuple[float, float]:
    """Bytes of the copies that a layer's matmuls save: of attention and router; of the experts."""
    precision = precision_of(layout, training)
    if not precision.autocast:
        return 0, 0
    *others, gate_up, down = layer_tensors(config)
    vectors = Parameters(0, 4 * config.hidden_size)  # of the norms, which autocast does not copy
    dense = sum_counts(others).local(layout) - vectors.local(layout)
    return dense * precision.compute, sum_counts((gate_up, down)).local(layout) * precision.compute


def saved_by_layer(config: PreTrainedConfig, layout: Layout, training: Training) -> float:
    """Bytes of activations that a layer saves for its backward pass, per micro-batch.

    Per token, in compute precision: the input of q, k and v (under autocast one copy for each) and the jittered
    tokens (H each); the K copies sorted by expert and the K outputs to weigh (K H each); q, k, v and attention's
    output; gate and up, act(gate) and its product with up (4 K F), as in transformers' `grouped_mm` on
    accelerators. In the precision of hidden states: the inputs of both norms (H each). In float32: the softmax's
    sum per head, and E probabilities per draw of the router. The rest are masks, indices, noise keys and the
    norms' statistics.
    """
    precision, top_k, experts = precision_of(layout, training), config.num_experts_per_tok, config.num_local_experts
    size, read_by_qkv = precision.compute, 3 if precision.autocast else 1
    per_channel = (read_by_qkv + 1 + 2 * top_k) * size + 2 * precision.residual
    hidden = config.hidden_size * per_channel + INT64 * (config.input_jitter_noise > 0)
    routing = top_k * (experts * (FLOAT32 + 1) + 1 + 4 * INT64 + precision.residual)
    routing += experts * size + 4 * precision.residual
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim * size
    sharded = heads + FLOAT32 * config.num_attention_heads + 4 * top_k * config.intermediate_size * size
    saved = training.tokens * (hidden + routing + sharded / layout.tp)
    if r := training.lora_r:
        query, is_low = config.num_attention_heads * config.head_dim, size < FLOAT32
        products = 4 * r * FLOAT32 + 2 * top_k * r * size
        copies = (3 * config.hidden_size + query) * FLOAT32 * (training.precision == "bfloat16")
        if training.load_in_4bit:
            factors = adapters_of_layer(config, training) * size
        else:
            fused = experts * r * (2 * config.hidden_size + 3 * config.intermediate_size)
            factors = fused * (FLOAT32 + is_low * size)
        linear = 2 * top_k * config.hidden_size * size * training.load_in_4bit  # rows and outputs of single experts
        saved += training.tokens * (products + copies + linear) + factors
    return saved


def activations(config: PreTrainedConfig, layout: Layout, training: Training, stage: Stage) -> float:
    """Bytes of activations at the worst moment, the largest of:

    - The head, forward. It works on a chunk of tokens at a time: its logits, also in float32, and the gradients of
      weight and input. Under autocast the copies of all layers' weights but the experts' are still there.
    - A layer, backward: the gradients of down, its input and its output ([T K, F], [T K, H]); or the gradient of gate
      and up, twice as large, after two [T K, F] are freed. Earlier micro-batches' gradients are held beside them.
      Under autocast also: the experts' outputs in float32 while they are weighed again; or the gradients of all
      experts in low precision and of gate and up in float32, after the experts' activations and copies are freed.

    Frozen weights have no gradients.
    """
    precision, tokens = precision_of(layout, training), training.tokens
    dense_copies, expert_copies = copied_by_autocast(config, layout, training)
    layer = saved_by_layer(config, layout, training) + dense_copies + expert_copies
    hidden, slots = tokens * config.hidden_size, tokens * config.num_experts_per_tok
    # A layer that is computed again keeps its input, its noise keys and its choice of experts.
    kept = hidden * precision.residual + INT64 * (tokens + slots) if training.checkpointing else layer
    is_trained = not training.lora_r
    weight = head_tensors(config)[2].local(layout) * precision.compute * is_trained
    head = hidden * (precision.residual + precision.compute) + 2 * tokens * INT64 + weight * precision.autocast
    chunk, copies = min(tokens, CHUNK_TOKENS), precision.compute * (precision.compute != FLOAT32)
    forward = chunk * (config.vocab_size / layout.tp * (FLOAT32 + copies) + 2 * config.hidden_size * precision.compute)
    forward += hidden * precision.compute + weight
    gate_up, down = (tensor.local(layout) * precision.compute for tensor in layer_tensors(config)[-2:])
    inside, outputs = slots * config.intermediate_size * precision.compute / layout.tp, slots * config.hidden_size
    in_layer = max(down + inside + outputs * precision.compute, gate_up - 2 * inside)
    if not is_trained:
        in_layer = max(inside + outputs * precision.compute, 2 * inside)
    if precision.autocast:
        if layout.pp == 1:
            forward += dense_copies * stage.layers * training.checkpointing
        weighing = 2 * FLOAT32 * (outputs + hidden)
        cast = 2 * gate_up - down - 4 * inside - 2 * outputs * precision.compute
        in_layer = max(in_layer, weighing * training.checkpointing, cast)
    in_layer += layer * training.checkpointing
    moments = (forward * stage.head, in_layer * (stage.layers > 0))
    return stage.in_flight * stage.layers * kept + head * stage.head + max(moments)


def saved_by_packing(config: PreTrainedConfig, training: Training, layers: int, size: int) -> float:
    """Bytes that 4 bits save of the matrices of `layers`, `size` bytes a number; scales are not counted."""
    return training.load_in_4bit * layers * matrices_of_layer(config) * (size - PACKED)


def gathered_bytes(config: PreTrainedConfig, layout: Layout, training: Training, stage: Stage) -> float:
    """Bytes that FSDP2 gathers: two layers' weights (one is prefetched) and a layer's gradients before and after they
    are scattered, if it is trained. In a pipeline, the whole stage's, from the first micro-batch to the last."""
    if layout.fsdp == 1:
        return 0
    precision, config = precision_of(layout, training), pad_sizes(config, layout)
    reduced = precision.reduced * (not training.lora_r)
    if layout.pp > 1:
        packed = saved_by_packing(config, training, stage.layers, precision.gathered)
        return stage.parameters(config).local(layout) * (precision.gathered + reduced) - packed
    layer = sum_counts(layer_tensors(config)).local(layout) if stage.layers else 0
    # The tail stays gathered from forward to backward.
    tail = sum_counts(head_tensors(config)).local(layout) if stage.head else 0
    gathered = (2 * layer + tail) * precision.gathered - saved_by_packing(config, training, 2, precision.gathered)
    return gathered + (layer + layer / layout.fsdp) * reduced


def output_bytes(config: PreTrainedConfig, layout: Layout, training: Training, stage: Stage) -> float:
    """Bytes of a stage's outputs, which torch keeps until their backward pass, and of one received gradient.

    A stage's input is an activation of its first layer.
    """
    if layout.pp == 1:
        return 0
    number = (stage.in_flight + 1) * (layout.interleave - stage.head)
    return number * training.tokens * config.hidden_size * precision_of(layout, training).residual


@dataclass(frozen=True)
class Memory:
    """Bytes of a device at its worst moment."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    communication: float
    buffers: float

    def total(self) -> float:
        """The sum of all parts."""
        return sum(asdict(self).values())


def stage_memory(config: PreTrainedConfig, layout: Layout, training: Training, stage: Stage) -> Memory:
    """Memory of a stage's devices. Beyond the window, float32 needs a mask `[S, S]` of one byte a number."""
    precision = precision_of(layout, training)
    # FSDP2 shards experts over ep x (fsdp / ep) ranks: over fsdp ranks, like everything else.
    count = stage.parameters(pad_sizes(config, layout)).local(replace(layout, ep=1)) / layout.fsdp
    visible = training.sequence if config.sliding_window is None else config.sliding_window + 1
    has_mask = training.sequence > visible and not (precision.compute < FLOAT32 and fits_flash(config.head_dim))
    buckets = layout.dp_replicate > 1 and layout.fsdp == 1  # DDP copies gradients (gradient_as_bucket_view=False)
    frozen, learnt = 0.0, count * precision.weights
    gradients, reduced = count * precision.gradients, count * precision.reduced
    if training.lora_r:
        frozen, learnt = learnt, stage.layers * adapters_of_layer(config, training) * FLOAT32
        gradients = reduced = learnt
        packed = saved_by_packing(pad_sizes(config, layout), training, stage.layers, precision.weights)
        frozen += training.load_in_4bit * stage.layers * matrices_of_layer(config) * SCALES - packed / layout.fsdp
    return Memory(
        weights=frozen + learnt,
        gradients=gradients,
        optimizer=learnt * OPTIMIZERS[training.optimizer],
        activations=activations(config, layout, training, stage),
        communication=gathered_bytes(config, layout, training, stage)
        + output_bytes(config, layout, training, stage)
        + buckets * reduced,
        buffers=BUFFERS * config.head_dim * FLOAT32 // 2 + has_mask * training.sequence**2,
    )


def memory(config: PreTrainedConfig, layout: Layout, training: Training) -> Memory:
    """Memory of the fullest stage."""
    found = (stage_memory(config, layout, training, stage) for stage in stages(config, layout, training))
    return max(found, key=Memory.total)
