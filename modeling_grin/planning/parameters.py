"""Count a model's parameters from its config, tensor by tensor."""

from collections.abc import Iterable
from typing import NamedTuple

from transformers import PreTrainedConfig

from .setting import Layout, Training


class Parameters(NamedTuple):
    """Element counts of one tensor or several, by how tensor and expert parallelism treat them."""

    sharded: int = 0
    replicated: int = 0
    experts: int = 0

    def local(self, layout: Layout) -> float:
        """Count on one device while it computes, when FSDP2 has gathered the weights."""
        return self.sharded / layout.tp + self.replicated + self.experts / (layout.tp * layout.ep)


def sum_counts(tensors: Iterable[Parameters]) -> Parameters:
    """Sum each kind."""
    return Parameters(*map(sum, zip(Parameters(), *tensors, strict=True)))


def embedding_tensors(config: PreTrainedConfig) -> list[Parameters]:
    """Tensors before the first layer."""
    return [Parameters(sharded=config.vocab_size * config.hidden_size)]


def layer_tensors(config: PreTrainedConfig) -> list[Parameters]:
    """Tensors of a layer, in the model's order. The bias of o is added after the sum over ranks: it is replicated."""
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
    """Tensors after the last layer: the norm and the head. A tied head has no weight of its own."""
    weight = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    norm = [Parameters(replicated=config.hidden_size)] * 2
    return [*norm, Parameters(sharded=weight), Parameters(sharded=config.vocab_size * config.lm_head_bias)]


def adapters_of_layer(config: PreTrainedConfig, training: Training) -> int:
    """The numbers in a layer's LoRA on attention and on each expert's fused matrices, in 4 bits on all three."""
    hidden, query = config.hidden_size, config.num_attention_heads * config.head_dim
    attention = 2 * (hidden + query) + 2 * (hidden + config.num_key_value_heads * config.head_dim)
    experts = (2 + training.load_in_4bit) * hidden + 3 * config.intermediate_size
    return training.lora_r * (attention + config.num_local_experts * experts)


def matrices_of_layer(config: PreTrainedConfig) -> int:
    """The numbers in a layer's matrices of attention and experts, which quantisers take."""
    query, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return config.hidden_size * (2 * (query + keys) + 3 * config.num_local_experts * config.intermediate_size)


def count_parameters(config: PreTrainedConfig) -> tuple[int, int]:
    """Total parameters of a language model, and those that a token uses: without the experts it is not routed to."""
    layer = sum_counts(layer_tensors(config))
    ends = sum_counts([*embedding_tensors(config), *head_tensors(config)])
    total, experts = sum(ends) + config.num_hidden_layers * sum(layer), config.num_hidden_layers * layer.experts
    unused = config.num_local_experts - config.num_experts_per_tok
    return total, total - experts * unused // config.num_local_experts
