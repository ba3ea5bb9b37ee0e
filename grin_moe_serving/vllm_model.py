"""GRIN-MoE for vLLM, read from the released layout: vLLM's PhiMoE, with what that one drops.

vLLM's class has the right attention, experts, parallelism, quantisation and LoRA. It adds no `lm_head.bias`, takes
0.01 for `router_jitter_noise`, knows top-2 only, and wants all biases and an untied head. vLLM's window counts a
query's own key.
"""

from collections.abc import Iterable
from functools import partial

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.phimoe import PhiMoEForCausalLM

from modeling_grin import GrinMoeConfig, route


def choose(
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool,
    *,
    jitter_eps: float,
    estimator: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits `[T, E]` -> weights `[T, K]`, float32, and experts `[T, K]`, as in transformers."""
    routing = route(gating_output, topk, jitter_eps, estimator=estimator, training=False)
    return routing.weights, routing.experts


class GrinMoeForCausalLM(PhiMoEForCausalLM):
    """GRIN-MoE as a language model: `sparsemixer_v2` and all other rules of inference, any top-k, any noise."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        config: GrinMoeConfig = vllm_config.model_config.hf_config
        if config.moe_output_scale:
            raise ValueError("moe_output_scale must be false for vLLM; got true; run this model with transformers")
        if (rate := config.router_bias_update_rate) > 0:
            raise ValueError(f"router_bias_update_rate must be 0 for vLLM; got {rate}; use transformers instead")
        if config.sliding_window is not None:  # the released number leaves out the query's own key
            vllm_config.cache_config.sliding_window = config.sliding_window + 1
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        routing = partial(choose, jitter_eps=config.router_jitter_noise, estimator=config.router_estimator)
        for layer in self.model.layers[self.model.start_layer : self.model.end_layer]:
            layer.block_sparse_moe.experts.router.custom_routing_function = routing

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """`[T, H]` -> `[T, vocab_size]` with the head's bias; None on the ranks that do not gather them."""
        return self.logits_processor(self.lm_head, hidden_states, self.lm_head.bias)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the released tensors; biases that the config does without are zeros, and a tied head is a copy."""
        return super().load_weights(self.complete(weights))

    def complete(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, torch.Tensor]]:
        """Yield the tensors of a checkpoint, then those that vLLM's class has besides."""
        config = self.config
        for name, tensor in weights:
            yield name, tensor
            if config.tie_word_embeddings and name == "model.embed_tokens.weight":
                yield "lm_head.weight", tensor
        if not config.lm_head_bias:
            yield "lm_head.bias", torch.zeros(config.vocab_size)
        if not config.attention_bias:
            query, key = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
            for layer in range(config.num_hidden_layers):
                for name, size in (("q", query), ("k", key), ("v", key), ("o", config.hidden_size)):
                    yield f"model.layers.{layer}.self_attn.{name}_proj.bias", torch.zeros(size)
