"""GRIN-MoE: Mixtral with LayerNorms, biases, a sliding window of W + 1 keys, and gradient-informed routing.

The routing is in `routing_grinmoe.py`. Module and parameter names follow the release; `layout_grinmoe.py` says how its
experts become ours. Shapes: T tokens, H hidden_size, F intermediate_size, E num_local_experts, K num_experts_per_tok.
"""

from .compat_grinmoe import CACHE, cache_name, either_cache  # first: it checks the version

# isort: split
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .balance_grinmoe import counted_tokens
from .checks_grinmoe import check_forward
from .configuration_grinmoe import GrinMoeConfig
from .experts_grinmoe import mix_experts
from .generation_grinmoe import GrinMoeGenerationMixin
from .layout_grinmoe import EXPERT_WEIGHTS, read_either_layout
from .linear_experts_grinmoe import LINEAR_EXPERTS, GrinMoeLinearExperts
from .loading_grinmoe import GrinMoeLoadingMixin, list_adapter_targets
from .lora_experts_grinmoe import Lora, lora_experts_forward
from .masks_grinmoe import AttentionConfig, create_mask
from .noise_grinmoe import random_keys, split_keys
from .replay_grinmoe import RoutingReplayMixin
from .rope_grinmoe import GrinMoeRotaryEmbedding
from .routing_grinmoe import apply_bias, jitter_input, noise_settings, route
from .saving_grinmoe import AtomicSavingMixin
from .training_grinmoe import LayerPass, OptimizerStepMixin


@dataclass
class GrinMoeCausalLMOutput(MoeCausalLMOutputWithPast):
    """transformers' output, and on request each layer's `selected_experts` `[T, K]`."""

    selected_experts: tuple[torch.Tensor, ...] | None = None


class GrinMoeAttention(LlamaAttention):
    """Grouped-query attention with RoPE, optional biases and the released sliding window."""

    def __init__(self, config: GrinMoeConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.config: Any = AttentionConfig(config)

    def forward(self, *args, **kwargs):
        # Masks carry the window for every implementation except FlashAttention, which takes it as an argument.
        return super().forward(*args, sliding_window=self.config.sliding_window, **kwargs)


class GrinMoeExperts(MixtralExperts):
    """A layer's experts, `w2(act(w1 x) * (w3 x))`: `gate_up_proj` `[E, 2F, H]` is w1 above w3, `down_proj` w2."""

    def __init__(self, config: GrinMoeConfig):
        super().__init__(config)
        self.dropout = nn.Dropout(config.expert_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        lora: Lora | None = None,
    ) -> torch.Tensor:
        """`[T, H]`, chosen experts `[T, K]` and their weights `[T, K]` -> `[T, H]`, by the `experts_implementation`;
        with `lora` (`find_lora`), by `forward_with_lora`."""
        if lora:
            return self.forward_with_lora(hidden_states, top_k_index, top_k_weights, lora)
        return super().forward(hidden_states, top_k_index, top_k_weights)

    forward_with_lora = lora_experts_forward  # the package sets its own

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """`[tokens, 2F] -> [tokens, F]`, in the experts implementations that are not one fused kernel."""
        gate, up = gate_up.chunk(2, dim=-1)
        return self.dropout(self.act_fn(gate) * up)


class GrinMoeSparseMoeBlock(nn.Module):
    """Router and experts: every token goes to the K experts that the router chooses; none is dropped."""

    def __init__(self, config: GrinMoeConfig):
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.freeze_router()
        is_linear = config._experts_implementation == LINEAR_EXPERTS
        self.experts = GrinMoeLinearExperts(config) if is_linear else GrinMoeExperts(config)
        self.experts.register_load_state_dict_pre_hook(read_either_layout)
        # omega of SparseMixer (arXiv 2310.00811); GRIN does without it (Appendix A.4).
        self.output_scale = nn.Parameter(torch.ones(config.hidden_size)) if config.moe_output_scale else None
        bias = torch.zeros(config.num_local_experts) if config.router_bias_update_rate > 0 else None
        self.e_score_correction_bias: torch.Tensor | None
        self.register_buffer("e_score_correction_bias", bias)  # `OptimizerStepMixin.end_step` moves it

    def freeze_router(self) -> None:
        """Apply `config.freeze_router`."""
        for parameter in self.gate.parameters():  # published 4-bit files have quantised routers, which cannot learn
            parameter.requires_grad_(parameter.is_floating_point() and not self.config.freeze_router)

    def forward(
        self, hidden_states: torch.Tensor, layer_pass: LayerPass | None = None, replayed: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`[batch, sequence, H]` -> output of this shape, router logits `[T, E]`, selected experts `[T, K]`.

        In training, `layer_pass` has the keys of the tokens' noise (by default random ones) and the balance loss.
        `replayed`: the experts to take, `[T, K]`.
        """
        config = self.config
        tokens = hidden_states.reshape(-1, config.hidden_size)
        routing_keys = None
        if self.training and noise_settings(config):
            keys = None if layer_pass is None else layer_pass.keys
            if keys is None:
                keys = split_keys(random_keys(len(tokens), tokens.device))
            routing_keys, jitter_keys = keys.to(tokens.device)
            if config.input_jitter_noise > 0:
                tokens = jitter_input(tokens, config.input_jitter_noise, jitter_keys)
        router_logits, replayed = apply_bias(self.gate(tokens), self.e_score_correction_bias, config, replayed)
        learning_logits = router_logits
        if layer_pass is not None and layer_pass.fractions is not None:
            learning_logits = layer_pass.attach_balance(router_logits, tokens)
            router_logits = router_logits.detach()  # a trainer's own balance loss on them would come on top
        routing = route(
            learning_logits,
            config.num_experts_per_tok,
            config.router_jitter_noise,
            estimator=config.router_estimator,
            training=self.training,
            sampling=config.router_sampling,
            keys=routing_keys,
            replayed=replayed,
        )
        output = mix_experts(self.experts, tokens, routing)
        if self.output_scale is not None:
            output = output * self.output_scale
        if layer_pass is not None:
            layer_pass.record(router_logits, routing.experts)
        return output.reshape(hidden_states.shape), router_logits, routing.experts


class GrinMoeDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and mixture of experts, each with a residual connection; the norms are LayerNorms."""

    def __init__(self, config: GrinMoeConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = GrinMoeAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.block_sparse_moe = GrinMoeSparseMoeBlock(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        layer_pass: LayerPass | None = None,
        replayed: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """`[batch, sequence, H]` -> the same; `kwargs` are the attention's."""
        attention_output, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attention_output
        moe_output, _, _ = self.block_sparse_moe(self.post_attention_layernorm(hidden_states), layer_pass, replayed)
        return hidden_states + moe_output


class GrinMoePreTrainedModel(
    GrinMoeLoadingMixin, AtomicSavingMixin, OptimizerStepMixin, RoutingReplayMixin, PreTrainedModel
):
    """Base class of all GRIN-MoE models."""

    config_class = GrinMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GrinMoeDecoderLayer"]
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # transformers looks for these in the source of a class's module, which a user's own class does not repeat.
    _can_set_attn_implementation_cached_value = True
    _can_set_experts_implementation_cached_value = True
    _can_record_outputs = {
        "hidden_states": GrinMoeDecoderLayer,
        "attentions": GrinMoeAttention,
        "router_logits": OutputRecorder(GrinMoeSparseMoeBlock, index=1),
        "selected_experts": OutputRecorder(GrinMoeSparseMoeBlock, index=2),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GrinMoeExperts):
            for name in EXPERT_WEIGHTS:
                init.normal_(getattr(module, name), std=self.config.initializer_range)
        for name, value in (("output_scale", 1.0), ("e_score_correction_bias", 0.0)):
            if getattr(module, name, None) is not None:
                init.constant_(getattr(module, name), value)


class GrinMoeModel(GrinMoePreTrainedModel):
    """The decoder without a head."""

    first_layer = 0
    """Number of `layers[0]` in the whole model, of which a pipeline stage has a part."""

    def __init__(self, config: GrinMoeConfig):
        super().__init__(config)
        # No padding_idx: the padding token is <|endoftext|>, a real token that has to be learnt.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GrinMoeDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = GrinMoeRotaryEmbedding(config)
        list_adapter_targets(config.model_type)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        loss_share: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        has_loss: bool = False,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> MoeModelOutputWithPast:
        """Run the layers.

        Args:
            input_ids: `[batch, sequence]`, or `inputs_embeds` `[batch, sequence, H]` instead.
            attention_mask: `[batch, past + sequence]`, 0 for padding; or a prepared 4-D mask.
            position_ids: `[batch, sequence]`; without mask and cache, positions restarting at 0 mark packed sequences.
            past_key_values: the cache of the previous tokens, or `cache`, its name since transformers 5.24.
            loss_share, has_loss, token_ids: see `begin_pass`.
            kwargs: `output_hidden_states`, `output_attentions`, `output_router_logits`, `output_selected_experts`, and
                the attention implementation's own. Unknown keywords raise TypeError.

        Returns:
            `last_hidden_state` `[batch, sequence, H]`; on request, per layer: `router_logits` `[T, E]` and
            `selected_experts` `[T, K]`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds")
        cache = either_cache(past_key_values, cache)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        check_forward(self, inputs_embeds, kwargs, cache)
        if position_ids is None:
            start = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(start, start + inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        mask = create_mask(self.config, inputs_embeds, attention_mask, cache, position_ids)
        if use_cache and cache is None:
            # Only now: transformers does not look for packed sequences if there is a cache.
            cache = DynamicCache(config=self.config)
        token_ids = input_ids if token_ids is None else token_ids
        training_pass = self.begin_pass(inputs_embeds, token_ids, attention_mask, position_ids, loss_share, has_loss)

        hidden_states, position_embeddings = inputs_embeds, self.rotary_emb(inputs_embeds, position_ids)
        layers = self.layers[: self.config.num_hidden_layers]  # `assistant_early_exit` has fewer
        for number, layer in enumerate(layers, start=self.first_layer):
            hidden_states = layer(
                hidden_states,
                layer_pass=training_pass and training_pass.for_next_layer(),
                replayed=self.replayed_in(number, inputs_embeds),
                position_embeddings=position_embeddings,
                attention_mask=mask,
                position_ids=position_ids,
                use_cache=use_cache,
                **{cache_name(cache): cache},
                **kwargs,
            )
        if training_pass is not None:
            training_pass.finish()
        returned = {CACHE: cache if use_cache and cache_name(cache) == CACHE else None}
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **returned)


class GrinMoeForCausalLM(GrinMoePreTrainedModel, GrinMoeGenerationMixin):
    """GRIN-MoE as a language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: GrinMoeConfig):
        super().__init__(config)
        self.model = GrinMoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.loss_type: str = self.loss_type or "ForCausalLM"  # transformers looks for it in the class's name
        self.post_init()

    def loss_without_logits(self, hidden_states: torch.Tensor, labels: torch.Tensor, **kwargs) -> Any:
        """A loss and a placeholder for its logits, or None if logits are needed. The package sets its own."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_selected_experts: bool = False,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> GrinMoeCausalLMOutput:
        """Logits and losses; `GrinMoeModel.forward` describes the other arguments.

        Args:
            labels: `[batch, sequence]`, -100 where no prediction is asked; shifted inside.
            output_router_logits, output_selected_experts: return `router_logits` and `aux_loss`; `selected_experts`.
            logits_to_keep: compute the logits of this many last positions (0: all), or of these positions.
            skip_logits: return a loss without logits, which are then never whole in memory (`kernels/chunked_loss.py`)
                unless head or loss are special. Default: in training with `labels` and `input_ids`; callers that embed
                tokens themselves, like peft's prompts, may have their own loss.

        Returns:
            `logits` `[batch, sequence, vocab_size]`; None with `skip_logits=True`, and an object whose use raises if
            they were skipped by default. With labels, `loss`, the cross-entropy. The load-balance loss acts by itself
            in every backward pass (`begin_step`); `aux_loss` reports its value, 1.0 when balanced.
        """
        outputs, aux_loss, _ = self.run_decoder(
            *(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache),
            targets=None if labels is None else labels[..., 1:],
            output_router_logits=output_router_logits,
            output_selected_experts=output_selected_experts,
            has_loss=labels is not None,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        may_skip, computed, loss = skip_logits, None, None
        if may_skip is None:
            may_skip = self.training and torch.is_grad_enabled() and input_ids is not None
        if labels is not None and may_skip:
            computed = self.loss_without_logits(hidden_states, labels, **kwargs)
        if computed is not None:
            loss, placeholder = computed
            logits = placeholder if skip_logits is None else None  # who asked for none may test for None
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept])
            if labels is not None:
                loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return GrinMoeCausalLMOutput(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            selected_experts=outputs.selected_experts if output_selected_experts else None,
        )


class GrinMoeForSequenceClassification(GrinMoePreTrainedModel):
    """GRIN-MoE with a linear classifier on the last token of each sequence."""

    def __init__(self, config: GrinMoeConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = GrinMoeModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.loss_type: str = self.loss_type or "ForSequenceClassification"
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> MoeCausalLMOutputWithPast:
        """Classes or numbers of whole sequences; `GrinMoeModel.forward` describes the other arguments.

        Args:
            attention_mask: `[batch, sequence]`, 0 for padding on either side. Without one, the last token that is not
                `config.pad_token_id` is taken.
            labels: `[batch]`; classes, or numbers with `config.problem_type="regression"`.
            output_router_logits: return `aux_loss` and `router_logits`; by default as in the config.

        Returns:
            `logits` `[batch, num_labels]`; with labels, `loss`. The load-balance loss as in `GrinMoeForCausalLM`.
        """
        outputs, aux_loss, loss_share = self.run_decoder(
            *(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache),
            targets=labels,
            output_router_logits=output_router_logits,
            has_loss=True,  # or trl's RewardTrainer computes it from this one pass
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        batch_size, length = hidden_states.shape[:2]
        # transformers' generic head goes by the padding token alone, which is a real token here.
        is_real = counted_tokens(attention_mask, batch_size, length, hidden_states.device)
        has_mask = attention_mask is not None and attention_mask.dim() == 2
        if not has_mask and input_ids is not None and self.config.pad_token_id is not None:
            is_real = input_ids != self.config.pad_token_id
        last = (is_real * torch.arange(length, device=is_real.device)).argmax(dim=-1).to(hidden_states.device)
        logits = self.score(hidden_states[torch.arange(batch_size, device=last.device), last])

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
            if loss_share is not None:
                loss = loss * loss_share  # the mean over an accumulation window
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            aux_loss=aux_loss,
            router_logits=outputs.router_logits,
        )


__all__ = ["GrinMoeForCausalLM", "GrinMoeForSequenceClassification", "GrinMoeModel", "GrinMoePreTrainedModel"]
