"""GRIN-MoE on transformers' own machinery; what is special, the routing, is in `routing_grinmoe.py`.

Module and parameter names follow the release; `checkpoint_grinmoe.py` says how its experts become ours.
Shapes: T tokens, H hidden_size, F intermediate_size, E num_local_experts, K num_experts_per_tok.
"""

from .compat_grinmoe import CACHE, cache_name, either_cache, require_layouts  # first: it checks the version

# isort: split
import inspect
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding, eager_attention_forward
from transformers.utils import TransformersKwargs, can_return_tuple, find_adapter_config_file, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .balance_grinmoe import BalanceLoss, BalanceWindow, LayerBalanceLoss, counted_tokens, load_balancing_loss
from .checkpoint_grinmoe import (
    EXPERT_WEIGHTS,
    ExpertConverter,
    check_tensors,
    find_damaged_files,
    fuse_expert_weights,
    may_be_new,
    new_heads,
    refuse_left_out,
    refuse_other_adapters,
    register_expert_layout,
    released_names,
)
from .configuration_grinmoe import GrinMoeConfig, VisibleWindowConfig
from .experts_grinmoe import GRIN_EXPERTS, computes_here, matrix_vector_kernels
from .linear_experts_grinmoe import (
    GrinMoeLinearExperts,
    check_quantized,
    keep_trainable,
    leave_router_out,
    warn_of_partial_quantization,
)
from .loss_grinmoe import SkippedLogits, can_chunk, chunked_causal_lm_loss
from .noise_grinmoe import fold, random_key, step_key, token_keys
from .patterns_grinmoe import adaptable_names, check_patterns
from .routing_grinmoe import Mixture, jitter_input, mix_outputs, noise_settings, route
from .saving_grinmoe import replacing_checkpoint
from .tables_grinmoe import list_adapter_targets, list_causal_lm

logger = logging.get_logger(__name__)

LINEAR_EXPERTS = "linear"  # the experts_implementation with one `nn.Linear` per matrix
HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "revision", "subfolder")
FUSED_EXPERTS = {"sonicmoe"}  # implementations that do not call `GrinMoeExperts._apply_gate`

SMALL_HEAD_DIMS = (8, 16)  # with which torch's flex_attention is wrong on CPUs with AVX2 alone

END_OF_TEXT_ID, END_OF_TURN_ID = 32000, 32007  # <|endoftext|> and <|end|> of the released tokenizer


@dataclass
class GrinMoeModelOutput(MoeModelOutputWithPast):
    """transformers' output, and on request each layer's `selected_experts` `[T, K]`."""

    selected_experts: tuple[torch.Tensor, ...] | None = None


@dataclass
class GrinMoeCausalLMOutput(MoeCausalLMOutputWithPast):
    """transformers' output, and on request each layer's `selected_experts` `[T, K]`."""

    selected_experts: tuple[torch.Tensor, ...] | None = None


@dataclass
class GrinMoeSequenceClassifierOutput(SequenceClassifierOutputWithPast):
    """transformers' output, and on request `aux_loss` and each layer's `router_logits` `[T, E]`."""

    aux_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


class GrinMoeAttention(LlamaAttention):
    """Grouped-query attention with RoPE, optional biases and the released sliding window."""

    def forward(self, *args, **kwargs):
        # The masks carry the window for every implementation but FlashAttention's, which takes it as an argument.
        return super().forward(*args, sliding_window=VisibleWindowConfig(self.config).sliding_window, **kwargs)


class GrinMoeRotaryEmbedding(LlamaRotaryEmbedding):
    """RoPE of any type; LongRoPE as the remote code of Phi-3.5-MoE has it.

    LongRoPE has two sets of factors, and a forward pass one of them: the long ones if a row of the batch goes beyond
    `original_max_position_embeddings`, by its positions. transformers' decorator of the base class chooses them; the
    scales that go with them, `short_mscale` and `long_mscale`, are the release's own. Keys in a cache stay as they
    were rotated: a forward pass that crosses the boundary with a cache sees keys of both kinds, and so do those after
    it (`generate` computes them anew there).
    """

    def __init__(self, config: GrinMoeConfig):
        super().__init__(config)
        rope: dict[str, Any] = dict(config.rope_parameters or {})
        self.mscales = None
        if self.rope_type == "longrope" and rope.get("long_mscale") is not None:
            self.mscales = rope["short_mscale"], rope["long_mscale"]
            self.original_length = rope["original_max_position_embeddings"]
            self.attention_scaling = 1.0  # the release's instead

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines `[rows, positions, head_dim]` of `position_ids` `[rows, positions]`, in `x`'s dtype."""
        if self.mscales is None:
            return super().forward(x, position_ids)
        short_mscale, long_mscale = self.mscales
        mscale = torch.where(position_ids.max() >= self.original_length, long_mscale, short_mscale)
        cos, sin = super().forward(mscale, position_ids)  # in float32, as long as they are not scaled
        return (cos * mscale).to(x.dtype), (sin * mscale).to(x.dtype)


@use_experts_implementation
class GrinMoeExperts(nn.Module):
    """All experts of a layer, SwiGLU networks `w2(act(w1 x) * (w3 x))`, as two 3-D parameters."""

    def __init__(self, config: GrinMoeConfig):
        super().__init__()
        self.num_experts = config.num_local_experts
        self.gate_up_proj = nn.Parameter(  # [E, 2F, H]: w1 above w3
            torch.empty(self.num_experts, 2 * config.intermediate_size, config.hidden_size)
        )
        self.down_proj = nn.Parameter(  # [E, H, F]: w2
            torch.empty(self.num_experts, config.hidden_size, config.intermediate_size)
        )
        self.hidden_act = config.hidden_act
        self.act_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.expert_dropout)
        self.register_load_state_dict_pre_hook(fuse_expert_weights)

    @property
    def is_swiglu(self) -> bool:
        """Whether `_apply_gate` is silu(gate) * up, and no more."""
        return self.hidden_act == "silu" and not (self.training and self.dropout.p > 0)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """`[tokens, 2F] -> [tokens, F]`, for every experts implementation that is not one fused kernel."""
        gate, up = gate_up.chunk(2, dim=-1)
        return self.dropout(self.act_fn(gate) * up)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The eager implementation, expert by expert: `[T, H]`, `[T, K]`, `[T, K]` -> `[T, H]`."""
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            token, slot = torch.where(top_k_index == expert)
            gate_up = nn.functional.linear(hidden_states[token], self.gate_up_proj[expert])
            expert_output = nn.functional.linear(self._apply_gate(gate_up), self.down_proj[expert])
            output.index_add_(0, token, expert_output * top_k_weights[token, slot, None])
        return output


class GrinMoeSparseMoeBlock(nn.Module):
    """Router and experts: every token goes to the K experts the router chooses, none is dropped."""

    def __init__(self, config: GrinMoeConfig):
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.freeze_router()
        linear = config._experts_implementation == LINEAR_EXPERTS
        self.experts = GrinMoeLinearExperts(config) if linear else GrinMoeExperts(config)
        self.experts.register_load_state_dict_pre_hook(refuse_other_adapters)
        # omega of SparseMixer (arXiv 2310.00811); GRIN does without it (Appendix A.4).
        self.output_scale = nn.Parameter(torch.ones(config.hidden_size)) if config.moe_output_scale else None

    def freeze_router(self) -> None:
        """Do what `config.freeze_router` says."""
        for parameter in self.gate.parameters():  # published 4-bit files have quantised routers, which cannot learn
            parameter.requires_grad_(parameter.is_floating_point() and not self.config.freeze_router)

    def run_experts(self, tokens: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The experts' sum, `[T, H]`, `[T, K]`, `[T, K]` -> `[T, H]`.

        transformers' implementations compute in the dtype of the weights, which autocast does not know of: float32
        weights would have float32 experts. Their copies are autocast's, as those of any linear layer. Experts with
        adapters (a wrapper's) stay in float32: of a rounded W + BA, most of BA is lost.
        """
        device_type = tokens.device.type
        is_on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
        if not (is_on and isinstance(self.experts, GrinMoeExperts)):
            return self.experts(tokens, experts, weights)
        dtype = torch.get_autocast_dtype(device_type)
        if self.config._experts_implementation == GRIN_EXPERTS and computes_here(self.experts, tokens):
            return self.experts(tokens.to(dtype), experts, weights).to(tokens.dtype)  # casts one expert at a time
        parameters = dict(self.experts.named_parameters())
        local = [p.to_local() if hasattr(p, "to_local") else p for p in parameters.values()]
        if any(p.shape[-1] * dtype.itemsize % 16 for p in local):  # grouped_mm wants rows of 16 bytes
            return self.experts(tokens, experts, weights)
        cast = {name: parameter.to(dtype) for name, parameter in parameters.items()}
        return functional_call(self.experts, cast, (tokens, experts, weights))

    def mix(self, tokens: torch.Tensor, mixture: Mixture) -> torch.Tensor:
        """Each slot's expert by itself, one slot a row, so that any experts implementation does; then their sum."""
        num_slots = mixture.experts.shape[1]
        outputs = self.run_experts(
            tokens.repeat_interleave(num_slots, dim=0),
            mixture.experts.reshape(-1, 1),
            tokens.new_ones(mixture.experts.numel(), 1),
        )
        return mix_outputs(outputs.reshape(-1, num_slots, tokens.shape[-1]), mixture)

    def forward(
        self,
        hidden_states: torch.Tensor,
        token_keys: torch.Tensor | None = None,
        balance: LayerBalanceLoss | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states: `[batch, sequence, H]`.
            token_keys: int64 `[T]`, the layer's own, which training draws its noise with; by default random ones.
            balance: the load-balance loss to attach.

        Returns:
            Output of the input's shape, router logits `[T, E]`, selected experts `[T, K]`.
        """
        config = self.config
        tokens = hidden_states.reshape(-1, config.hidden_size)
        routing_keys = None
        if self.training and noise_settings(config):
            if token_keys is None:
                token_keys = torch.empty(tokens.shape[0], dtype=torch.int64, device=tokens.device).random_()
            token_keys = token_keys.to(tokens.device)
            routing_keys, jitter_keys = fold(token_keys, 0), fold(token_keys, 1)
            if config.input_jitter_noise > 0:
                tokens = jitter_input(tokens, config.input_jitter_noise, jitter_keys)
        router_logits = self.gate(tokens)
        routing = route(
            router_logits,
            config.num_experts_per_tok,
            config.router_jitter_noise,
            estimator=config.router_estimator,
            training=self.training,
            sampling=config.router_sampling,
            keys=routing_keys,
        )
        if routing.mixture is None:
            output = self.run_experts(tokens, routing.experts, routing.weights.to(tokens.dtype))
        else:
            output = self.mix(tokens, routing.mixture)
        if self.output_scale is not None:
            output = output * self.output_scale
        if balance is not None:
            output = balance.attach(output, router_logits)
        return output.reshape(hidden_states.shape), router_logits, routing.experts


class GrinMoeDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and mixture-of-experts, each with a residual connection; the norms are LayerNorms."""

    def __init__(self, config: GrinMoeConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx  # in the whole model, of which a pipeline stage has a part
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = GrinMoeAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.block_sparse_moe = GrinMoeSparseMoeBlock(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        token_keys: torch.Tensor | None = None,
        balance: LayerBalanceLoss | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Arguments and results as those of `GrinMoeSparseMoeBlock`; other arguments are the attention's."""
        with matrix_vector_kernels(hidden_states):
            attention_output, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
            hidden_states = hidden_states + attention_output
            moe_output, router_logits, selected_experts = self.block_sparse_moe(
                self.post_attention_layernorm(hidden_states), token_keys, balance
            )
            return hidden_states + moe_output, router_logits, selected_experts


class OptimizerStep(NamedTuple):
    """What a forward pass in training has to know of the optimizer step it belongs to."""

    key: torch.Tensor
    """Decides the step's routing noise, int64 scalar."""
    window: BalanceWindow


class GrinMoePreTrainedModel(PreTrainedModel):
    """Loading, saving and capabilities that all GRIN-MoE models share."""

    config_class = GrinMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GrinMoeDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # transformers looks in the source of a class's module for these, where a user's own class does not repeat them.
    _can_set_attn_implementation_cached_value = True
    _can_set_experts_implementation_cached_value = True
    _can_record_outputs = {"hidden_states": GrinMoeDecoderLayer, "attentions": GrinMoeAttention}

    def _resolve_parallel_plans(self, distributed_config):
        """As in transformers, for layouts that the model can have.

        Raises:
            ValueError: sizes that tensor parallelism cannot divide, experts that it cannot shard, or that are too few
                for the ranks of FSDP.
        """
        check_parallel_sizes(self.config, tp_size=distributed_config.tp_size, fsdp_size=distributed_config.fsdp_size)
        return super()._resolve_parallel_plans(distributed_config)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # For every class, so that one with a model type of its own reads and writes the released layout, too; and here
        # and not in the package's __init__, because these lines travel to the Hub with a checkpoint's code.
        register_expert_layout(cls.config_class.model_type)
        if issubclass(cls, GenerationMixin):
            list_causal_lm(cls.__name__, cls.config_class.model_type)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """As in transformers, and `"linear"`: experts of `nn.Linear` modules, as quantisers need them.

        Raises:
            ValueError: an implementation that would ignore `expert_dropout`, or a `quantization_config`, or that needs
                the other kind of modules than the model was built with.
        """
        linear = requested_experts == LINEAR_EXPERTS
        if getattr(self.config, "quantization_config", None) is not None:
            if requested_experts is not None and not linear:
                raise ValueError(
                    f"experts_implementation={requested_experts!r} has fused experts, which quantization_config would "
                    f"leave as they are; leave it out or use {LINEAR_EXPERTS!r}"
                )
            linear = True
        for module in self.modules():
            if isinstance(module, GrinMoeLinearExperts if not linear else GrinMoeExperts):
                raise ValueError(
                    f"experts_implementation={requested_experts!r} needs other modules than this model was built "
                    "with; give it to from_pretrained"
                )
        if linear:
            return LINEAR_EXPERTS
        implementation = super().get_correct_experts_implementation(requested_experts or GRIN_EXPERTS)
        if implementation in FUSED_EXPERTS and self.config.expert_dropout > 0:
            raise ValueError(f"experts_implementation={implementation!r} has no dropout; set expert_dropout=0")
        return implementation

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GrinMoeExperts):
            for name in EXPERT_WEIGHTS:
                init.normal_(getattr(module, name), std=self.config.initializer_range)
        elif isinstance(module, GrinMoeSparseMoeBlock) and module.output_scale is not None:
            init.ones_(module.output_scale)

    _left_out: set[str] | None = None
    """After a non-strict `load_state_dict`: what no state dict has brought yet, by the released names."""

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As in torch, in either layout of the experts; but what `strict=False` leaves out is not forgotten.

        Trainer resumes, and loads the best model, with `strict=False` shard by shard, and only warns. Here a tensor
        that none of the shards has brought is an error in the next forward pass.

        Raises:
            ValueError: with `strict=False`, `state_dict` has tensors that the model has no place for (another task's
                head aside).
        """
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        children = dict(self.named_children())
        if foreign := [name for name in result.unexpected_keys if name.split(".")[0] in children]:
            raise ValueError(f"the checkpoint has tensors that {type(self).__name__} lacks: {', '.join(foreign[:5])}")
        missing = released_names(result.missing_keys, self.config.num_local_experts) - set(self.all_tied_weights_keys)
        missing = {name for name in missing if not may_be_new(name)}
        if missing or self._left_out:
            if self._left_out is None:
                self.register_forward_pre_hook(refuse_left_out)
            self._left_out = missing & self._left_out if self._left_out else missing
        return result

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        **kwargs,
    ) -> None:
        """As in transformers; over an older checkpoint, so that the folder never loads as a mixture of both.

        Until the new files are complete, the old ones stay, and need their room on the disk.
        """
        settings = {
            "is_main_process": is_main_process,
            "state_dict": state_dict,
            "push_to_hub": push_to_hub,
            "max_shard_size": max_shard_size,
            "variant": variant,
            **kwargs,
        }
        folder, suffix = Path(save_directory), f".{variant}" if variant else ""
        is_writer = self.should_save_on_this_rank(is_main_process) and not kwargs.get("distributed_checkpoint")
        if is_writer and not folder.is_file():
            if push_to_hub:
                settings.setdefault("repo_id", os.fspath(save_directory).split(os.path.sep)[-1])
            is_adapter = getattr(self, "_hf_peft_config_loaded", False)
            weights = "adapter_model.safetensors" if is_adapter else f"model{suffix}.safetensors"
            index = None if is_adapter else f"model.safetensors.index{suffix}.json"
            with replacing_checkpoint(folder, weights, index) as made:
                super().save_pretrained(made, **settings)
        else:
            super().save_pretrained(save_directory, **settings)
        self.barrier_after_gathered_checkpoint_save(getattr(self.config, "distributed_config", None))

    def load_adapter(self, *args, **kwargs):
        """As in transformers, but an adapter that fits only in part is an error.

        Raises:
            ValueError: the adapter has tensors that the model has no place for, or lacks some; or its config has
                regular expressions that cannot be matched (`patterns_grinmoe.py`).
        """
        source = args[0] if args else kwargs.get("peft_model_id")
        if source is not None and kwargs.get("peft_config") is None:
            hub = {key: value for key, value in (kwargs.get("adapter_kwargs") or {}).items() if key in HUB_ARGUMENTS}
            hub["local_files_only"] = kwargs.get("local_files_only", False)
            if (file := find_adapter_config_file(source, **hub)) is not None:
                with open(file, encoding="utf-8") as config:
                    check_patterns(json.load(config), adaptable_names(self), source)
        info = super().load_adapter(*args, **kwargs)
        if names := sorted({*info.unexpected_keys, *info.missing_keys}):
            raise ValueError(
                f"the adapter and {type(self).__name__} differ in {len(names)} tensor(s): {', '.join(names[:3])}, ... "
                "Adapters of w1, w2 and w3 need a model loaded with experts_implementation='linear'; those of "
                "gate_up_proj and down_proj one without."
            )
        return info

    def begin_step(
        self,
        step: int | None,
        *,
        seed: int = 0,
        num_tokens: int | None = None,
        expert_counts: torch.Tensor | None = None,
        gradient_scale: float = 1.0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Say which optimizer step the forward passes in training that follow belong to; `GrinMoeTrainerMixin` does.

        Routing noise is then a function of seed, step, layer and token (`noise_grinmoe.token_keys`), and the
        load-balance loss is that of the whole step, however it is split into micro-batches and ranks. Without a step,
        each forward pass takes a key from torch's CPU generator and is, for the balance loss, a batch by itself.

        Args:
            step: number of the optimizer step; None: from here on, no step is known.
            seed: of the run.
            num_tokens: the tokens that are not padding in all forward passes of the step, over all ranks of `group`.
                None: each forward pass is a window of its own.
            expert_counts: the step's counts over all ranks, int64 `[layers, experts]`, if they are known beforehand;
                otherwise each backward pass knows those of the forward passes so far.
            gradient_scale: what the loss is multiplied with before its backward pass (float16's loss scale).
            group: the data-parallel ranks, whose gradients are averaged; by default all.
        """
        window = BalanceWindow(num_tokens, expert_counts, gradient_scale, group)
        self.base_model.optimizer_step = None if step is None else OptimizerStep(step_key(seed, step), window)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """`PreTrainedModel.from_pretrained`, safetensors only, that loads every tensor or raises.

        Raises:
            ValueError: the checkpoint lacks a tensor that the model needs (a new head aside), has it in another shape
                (unless `ignore_mismatched_sizes`), or one of its files is damaged. Tensors and files are named.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors=False would load a pickle, which can run any code; convert it first")
        kwargs["use_safetensors"] = True
        if kwargs.get("distributed_config") is not None or kwargs.get("tp_plan") is not None:
            require_layouts()
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = leave_router_out(kwargs["quantization_config"])
        with_loading_info = kwargs.pop("output_loading_info", False)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        except Exception as error:  # damaged files end in many types: SafetensorError, JSONDecodeError, KeyError, ...
            if pretrained_model_name_or_path is not None and (
                damaged := find_damaged_files(pretrained_model_name_or_path, **kwargs)
            ):
                raise ValueError(
                    f"{', '.join(damaged)}: damaged ({type(error).__name__}: {error}). Download or copy it again."
                ) from error
            raise
        if missing := sorted(info["missing_keys"] - new_heads(model, info["missing_keys"])):
            raise ValueError(f"{pretrained_model_name_or_path} lacks tensors of {cls.__name__}: {', '.join(missing)}")
        # Forget which conversions this checkpoint needed: the released layout is written whatever was read.
        model._weight_conversions = None
        if getattr(model, "is_quantized", False):
            check_quantized(model)
            keep_trainable(model)
        for module in model.modules():
            if isinstance(module, GrinMoeSparseMoeBlock):
                module.freeze_router()  # once more: loading has made new parameters
        return (model, info) if with_loading_info else model

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        # Only where a whole model is read: `expected_keys` are those of an adapter.
        whole = expected_keys is None and checkpoint_files and checkpoint_files[0].endswith(".safetensors")
        if whole:
            check_tensors(model, checkpoint_files, load_config)
        if model.config._experts_implementation == LINEAR_EXPERTS:
            mapping = [entry for entry in load_config.weight_mapping or [] if not isinstance(entry, ExpertConverter)]
            load_config = replace(load_config, weight_mapping=mapping)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)


def check_parallel_sizes(config: GrinMoeConfig, *, tp_size: int = 1, pp_size: int = 1, fsdp_size: int = 1) -> None:
    """Raise ValueError, with the field, if `config` cannot be split over so many ranks.

    Tensor parallelism gives each rank whole attention heads and an equal slice of every expert; vocabularies may be
    uneven. Pipeline parallelism gives each stage (or chunk, where a rank has several) a layer at least, FSDP each rank
    an expert: it deals them out whole, the same number to all ranks but the last that gets some.
    """
    for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if (size := getattr(config, field)) % tp_size:
            raise ValueError(f"{field}={size} is not divisible by tp_size={tp_size}: choose a tp_size that divides it")
    if tp_size > 1 and config._experts_implementation == LINEAR_EXPERTS:
        raise ValueError(
            "tensor parallelism shards fused experts: load without quantization_config and experts_implementation"
        )
    if pp_size > config.num_hidden_layers:
        raise ValueError(
            f"num_hidden_layers={config.num_hidden_layers} layers do not make {pp_size} pipeline stages (or chunks, "
            "where a rank has several): use fewer"
        )
    experts_per_rank = -(-config.num_local_experts // fsdp_size)
    if fsdp_size > (ranks := -(-config.num_local_experts // experts_per_rank)):
        raise ValueError(
            f"num_local_experts={config.num_local_experts} gives experts to {ranks} of fsdp_size={fsdp_size} ranks: "
            f"use fsdp_size={ranks}, and dp_replicate_size or tp_size for the other ranks"
        )


def check_flex_attention(config: GrinMoeConfig, cache: Cache | None, device: torch.device) -> None:
    """Raise ValueError where flex_attention would fail, or compute wrong numbers."""
    if getattr(cache, "is_compileable", False):
        # transformers 5.23 fails in `generate`, and without a window reads the cache's length after it has grown.
        raise ValueError("flex_attention cannot use a static cache; use a dynamic one, or attn_implementation='sdpa'")
    # torch 2.13 and 2.14 compile it for blocks of 16 keys, one vector of AVX512 and two of AVX2. Of a last block of 8
    # keys the kernel for small heads writes both, the second one over the scores of the next query.
    has_small_heads = config.head_dim in SMALL_HEAD_DIMS
    if device.type == "cpu" and has_small_heads and torch.backends.cpu.get_cpu_capability() == "AVX2":
        raise ValueError(
            f"flex_attention must not be used with head_dim={config.head_dim} on a CPU with AVX2 and without AVX512, "
            "where torch computes wrong numbers; use attn_implementation='sdpa'"
        )


def warn_of_emulation(hidden_states: torch.Tensor) -> None:
    """Say once that this CPU lacks instructions for the dtype that the forward pass computes in."""
    if hidden_states.device.type != "cpu" or torch.compiler.is_compiling() or not torch.backends.mkldnn.is_available():
        return
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden_states.dtype
    has_instructions = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if dtype in has_instructions and not has_instructions[dtype]():
        name = str(dtype).removeprefix("torch.")
        logger.warning_once(
            f"This CPU has no instructions for {name}, which takes several times as long as float32: load the model "
            "with dtype=torch.float32, and train without bf16 and fp16."
        )


def create_mask(config: GrinMoeConfig, *, cache: Cache | None, **kwargs) -> Any:
    """The causal mask with the released window, in the form the config's attention implementation takes."""
    if config._attn_implementation == "flex_attention":
        check_flex_attention(config, cache, kwargs["inputs_embeds"].device)
    visible = VisibleWindowConfig(config)
    create = create_causal_mask if visible.sliding_window is None else create_sliding_window_causal_mask
    return create(config=visible, **{CACHE: cache}, **kwargs)


# What a forward pass may be given beside the arguments that it names.
KNOWN_KEYWORDS = {
    *TransformersKwargs.__annotations__,
    "shift_labels",  # the loss of a language model
    *("debug_io", "debug_io_dir", "prune_layers"),  # transformers' tracing of a forward pass
    "margin",  # trl's RewardTrainer gives the whole batch to the model
    "logits_to_keep",  # trl's DistillationTrainer gives it to the decoder, which keeps every position
}


def refuse_unknown_keywords(model: PreTrainedModel, keywords: dict[str, Any], cache: Any) -> None:
    """Raise TypeError for keywords that neither transformers nor the attention implementation of `model` knows.

    They would otherwise go from `**kwargs` to `**kwargs` down to the attention, and be lost there. None passes: it
    asks for nothing.
    """
    unknown = {name for name, value in keywords.items() if value is not None} - KNOWN_KEYWORDS
    if not unknown:
        return
    implementation = model.config._attn_implementation
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    unknown -= inspect.signature(attention).parameters.keys()
    if "flash" in implementation:
        unknown -= inspect.signature(_flash_attention_forward).parameters.keys()
    if implementation == "flex_attention":
        unknown.discard("kernel_options")
    if isinstance(cache, PagedAttentionCache):
        unknown -= PagedAttentionArgs.__annotations__.keys()
    if unknown:
        raise TypeError(
            f"{type(model).__name__}.forward got keywords that it does not know: {', '.join(sorted(unknown))}; "
            "correct their spelling or leave them out"
        )


def refuse_empty(inputs: torch.Tensor) -> None:
    """Raise ValueError unless `inputs` `[batch, sequence, ...]` have a row and a token: attention reshapes neither."""
    if 0 in inputs.shape[:2]:
        raise ValueError(
            f"input_ids (or inputs_embeds) must have at least one row and one token; got a batch of {inputs.shape[0]} "
            f"rows and {inputs.shape[1]} tokens; leave empty batches out"
        )


RoutingObserver = Callable[[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], torch.Tensor], None]


class GrinMoeModel(GrinMoePreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: GrinMoeConfig):
        super().__init__(config)
        # No padding_idx: the padding token is <|endoftext|>, a real token that has to be learnt.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GrinMoeDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = GrinMoeRotaryEmbedding(config)
        self.optimizer_step: OptimizerStep | None = None  # set by `begin_step`
        self.routing_observer: RoutingObserver | None = None
        """Called once for each forward pass in training, and not again where a layer is recomputed, with every layer's
        router logits `[T, E]` and selected experts `[T, K]`, and which tokens are not padding, bool `[T]`."""
        self.adapts_experts: bool | None = None
        """Whether the experts have adapters. None: not known yet; False: they are left out on purpose, as `add_lora`
        can."""
        list_adapter_targets(config.model_type)
        self.post_init()

    def train(self, mode: bool = True):
        """As in torch; warns where adapters are about to be trained and no expert has one, whoever has built them.

        Fused experts are parameters, which peft's `target_modules` never match.
        """
        if mode and self.adapts_experts is None:
            matrices = nn.Linear | GrinMoeExperts  # peft adapts norms and embeddings, too
            names = [
                name
                for name, module in self.named_modules()
                if hasattr(module, "get_base_layer") and isinstance(module.get_base_layer(), matrices)
            ]
            self.adapts_experts = any(".experts" in name for name in names) or None
            if names and not self.adapts_experts:
                logger.warning_once(
                    f"adapters are on {', '.join(sorted({name.rpartition('.')[2] for name in names}))} and on no "
                    "expert; 95 % of the released weights are in experts. LoRA adapts fused experts by "
                    f"target_parameters={[f'experts.{name}' for name in EXPERT_WEIGHTS]} or by "
                    "modeling_grin.training.add_lora; every method adapts w1, w2 and w3 of a model that was loaded "
                    f"with experts_implementation={LINEAR_EXPERTS!r}."
                )
        return super().train(mode)

    def begin_balance(self, counted: torch.Tensor, loss_share: torch.Tensor | None) -> BalanceLoss:
        """The load-balance loss of a forward pass; arguments as in `BalanceLoss`.

        Raises:
            ValueError: float16 autocast, where the loss is scaled by a factor that only the trainer knows.
        """
        if self.optimizer_step is not None:
            window = self.optimizer_step.window.of_forward()
        elif torch.is_autocast_enabled(counted.device.type) and (
            torch.get_autocast_dtype(counted.device.type) == torch.float16
        ):
            raise ValueError(
                "float16 training scales its loss, and the load-balance loss has to know by how much: use "
                "GrinMoeTrainerMixin, call begin_step(..., gradient_scale=scaler.get_scale()), or train in bfloat16"
            )
        else:
            window = BalanceWindow()
            if loss_share is None or window.is_distributed:
                logger.warning_once(
                    "The load-balance loss knows this forward pass and not the optimizer step it is part of: with "
                    "gradient accumulation, or average_tokens_across_devices=False, it acts with a multiple of "
                    "router_aux_loss_coef. Use GrinMoeTrainerMixin, or call begin_step with the step's num_tokens."
                )
        config = self.config
        if loss_share is not None:  # window.world_size has the tensor-parallel ranks, too, which share their tokens
            loss_share = loss_share / getattr(getattr(config, "distributed_config", None), "tp_size", 1)
        sizes = config.num_hidden_layers, config.num_local_experts
        return BalanceLoss(config.router_aux_loss_coef, *sizes, window, counted, loss_share)

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
        output_router_logits: bool | None = None,
        output_selected_experts: bool = False,
        loss_share: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        has_loss: bool = False,
        **kwargs,
    ) -> GrinMoeModelOutput:
        """
        Args:
            input_ids: `[batch, sequence]`, or `inputs_embeds` `[batch, sequence, H]` instead.
            attention_mask: `[batch, past + sequence]`, 0 for padding; or a prepared 4-D mask.
            position_ids: `[batch, sequence]`; where neither mask nor cache is given, positions that start again at 0
                mark packed sequences.
            past_key_values: the cache of the tokens before, to which these are added.
            output_router_logits: by default as in the config.
            loss_share: in training without `begin_step`, the share of the optimizer step's loss that this forward
                pass makes, a scalar.
            token_ids: `[batch, sequence]`, which tokens `inputs_embeds` are: in training, what their routing noise is
                a function of. By default `input_ids`, or else the rows' numbers.
            cache: `past_key_values` by its name since transformers 5.24; either will do.
            has_loss: the caller computes the loss of this pass from its labels; a pass in training without one may be
                compared with another, and a warning says once what sampled experts do to that.
            kwargs: `output_hidden_states`, `output_attentions` and what the attention implementation takes.

        Raises:
            TypeError: keywords that nobody here knows.

        Returns:
            `last_hidden_state` `[batch, sequence, H]`; on request, per layer: `router_logits` `[T, E]` and
            `selected_experts` `[T, K]` (`output_selected_experts=True`).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds")
        cache = either_cache(past_key_values, cache)
        refuse_unknown_keywords(self, kwargs, cache)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        refuse_empty(inputs_embeds)
        as_loaded = getattr(self.config, "quantization_config", None) is None
        if as_loaded and len(self.layers) > 0 and not torch.compiler.is_compiling():
            warn_of_partial_quantization(self.layers[0])
        warn_of_emulation(inputs_embeds)
        if position_ids is None:
            past_length = cache.get_seq_length() if cache is not None else 0
            positions = torch.arange(past_length, past_length + inputs_embeds.shape[1], device=inputs_embeds.device)
            position_ids = positions[None]

        mask = create_mask(
            self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            cache=cache if cache_name(cache) == CACHE else None,
            position_ids=position_ids,
        )
        if use_cache and cache is None:
            # Only now: transformers does not look for packed sequences where there is a cache.
            cache = DynamicCache(config=self.config)
        batch_size, sequence_length = inputs_embeds.shape[:2]
        counted = counted_tokens(attention_mask, batch_size, sequence_length, inputs_embeds.device)
        learning = self.training and torch.is_grad_enabled()
        keys = balance = None
        if self.training and (settings := noise_settings(self.config)):  # else torch's generator is left alone
            if self.optimizer_step is None and not (has_loss and learning) and not torch.compiler.is_compiling():
                # trl's own trainers compare passes, and ask nothing of ours when they are built.
                logger.warning_once(
                    "This forward pass in training samples its experts or jitters their inputs, and has no labels. "
                    "Where it is compared with another pass (DPO, KTO, GRPO, RLOO, distillation), ratios and KL carry "
                    f"that noise: set {' and '.join(f'{name}={settings[name]}' for name in settings)} in the config."
                )
            key = random_key() if self.optimizer_step is None else self.optimizer_step.key
            if token_ids is None:
                rows = torch.arange(batch_size, device=counted.device).unsqueeze(-1).expand_as(counted)
                token_ids = rows if input_ids is None else input_ids
            # Packed sequences are told from each other as in the mask: where there is none, by their positions.
            positions = position_ids.expand_as(counted) if attention_mask is None else counted.cumsum(dim=-1) - 1
            keys = token_keys(key, token_ids, counted, positions)
        if learning and self.config.router_aux_loss_coef > 0:
            balance = self.begin_balance(counted.reshape(-1), loss_share)

        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = inputs_embeds
        routings = []
        for index, layer in enumerate(self.layers[: self.config.num_hidden_layers]):  # fewer in `assistant_early_exit`
            hidden_states, *routing = layer(
                hidden_states,
                token_keys=None if keys is None else fold(keys, layer.layer_idx),  # type: ignore[arg-type]
                balance=None if balance is None else LayerBalanceLoss(balance, index),
                position_embeddings=position_embeddings,
                attention_mask=mask,
                position_ids=position_ids,
                use_cache=use_cache,
                **{cache_name(cache): cache},
                **kwargs,
            )
            routings.append(routing)
        router_logits, selected_experts = zip(*routings, strict=True)
        if balance is not None:
            balance.count(selected_experts)
        if learning and self.routing_observer is not None:
            self.routing_observer(tuple(z.detach() for z in router_logits), selected_experts, counted.reshape(-1))

        if balance is not None:  # a trainer's own balance loss on them would come on top of the one that acts inside
            router_logits = tuple(logits.detach() for logits in router_logits)
        return GrinMoeModelOutput(
            last_hidden_state=self.norm(hidden_states),
            **{CACHE: cache if cache_name(cache) == CACHE else None},
            router_logits=router_logits if output_router_logits else None,
            selected_experts=selected_experts if output_selected_experts else None,
        )


class GrinMoeForCausalLM(GrinMoePreTrainedModel, GenerationMixin):
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
        **kwargs,
    ) -> GrinMoeCausalLMOutput:
        """The hidden states of `GrinMoeModel.forward`, whose other arguments it takes, as logits and losses.

        Args:
            labels: `[batch, sequence]`, -100 where no prediction is asked; shifted inside.
            output_router_logits: return `router_logits` and `aux_loss`.
            output_selected_experts: return `selected_experts`, too.
            logits_to_keep: compute the logits of the last so many positions only (0: all), or of these positions.
            skip_logits: return a loss and no logits, which are then never in memory as a whole (`loss_grinmoe.py`).
                By default in training with `labels` and `input_ids`: who embeds tokens himself may have a loss of his
                own, as peft's prompts do. Where the head or the loss is not the plain one
                (`loss_grinmoe.can_chunk`), logits are computed nevertheless.

        Returns:
            `logits` `[batch, sequence, vocab_size]`, None with `skip_logits=True`, or, where they were skipped by
            default, an object whose use raises and names `skip_logits=False`; with labels, `loss`, the cross-entropy.
            The load-balance loss acts by itself in every backward pass (`begin_step`); `aux_loss` reports its value
            for this forward pass (1.0: balanced), without the coefficient and without a gradient.
        """
        config = self.config
        if output_router_logits is None:
            output_router_logits = config.output_router_logits
        loss_share = None
        if self.training and labels is not None and kwargs.get("num_items_in_batch") is not None:
            loss_share = (labels[..., 1:] != -100).sum() / kwargs["num_items_in_batch"]
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            output_selected_experts=output_selected_experts or output_router_logits,
            loss_share=loss_share,
            has_loss=labels is not None,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        logits = loss = aux_loss = None
        may_skip = skip_logits
        if may_skip is None:
            may_skip = self.training and torch.is_grad_enabled() and input_ids is not None
        if labels is not None and may_skip and can_chunk(self):
            loss = chunked_causal_lm_loss(hidden_states, self.lm_head, labels, **kwargs)
            logits = SkippedLogits() if skip_logits is None else None  # who asked for none may test for None
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            hidden_states = hidden_states[:, kept]
            with matrix_vector_kernels(hidden_states):
                logits = self.lm_head(hidden_states)
            if labels is not None:
                loss = self.loss_function(logits, labels, config.vocab_size, **kwargs)
        if output_router_logits:
            with torch.no_grad():
                aux_loss = load_balancing_loss(outputs.router_logits, outputs.selected_experts, attention_mask)
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

    def _prepare_model_inputs(self, *args, **kwargs):
        """As in transformers, which reads the last column of empty inputs before any forward pass."""
        inputs, *others = super()._prepare_model_inputs(*args, **kwargs)
        refuse_empty(inputs)
        return inputs, *others

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        is_first_iteration=False,
        cache=None,
        **kwargs,
    ):
        """As in transformers; as in its Phimoe, all keys are computed anew where LongRoPE changes its factors.

        The positions decide, as in GrinMoeRotaryEmbedding: left padding has columns, but no positions of its own.
        (Keys stay where not all tokens of the cache are known: between the chunks of a prompt, and where `generate`
        goes on from a cache with the new tokens alone.)

        A prompt of `inputs_embeds` is all there is of it, or stands for what `input_ids` has of it.
        """
        cache = either_cache(past_key_values, cache)
        past_length = 0 if cache is None else cache.get_seq_length()
        positions = kwargs.get("position_ids")
        rope: dict[str, Any] = dict(self.config.rope_parameters or {})
        if rope["rope_type"] == "longrope" and past_length and next_sequence_length is not None:
            length, limit = past_length + next_sequence_length, rope["original_max_position_embeddings"]
            reached = torch.arange(length)[None] if positions is None else positions
            is_whole = inputs_embeds is not None or input_ids.shape[1] == length
            if is_whole and reached[:, :past_length].max() < limit <= reached.max():
                cache = next_sequence_length = None
                past_length = 0
        if inputs_embeds is not None and positions is not None:
            new_length = positions.shape[-1] - inputs_embeds.shape[1]
            if new_length > 0 and past_length == 0:  # there is no cache, or it is computed anew
                new_embeds = self.get_input_embeddings()(input_ids[:, -new_length:])
                inputs_embeds, is_first_iteration = torch.cat([inputs_embeds, new_embeds], dim=1), True
            elif new_length <= 0:  # the whole prompt, or a chunk: transformers 5.17 calls that no first iteration
                if positions.shape[-1] == 0:
                    raise ValueError("prefill_chunk_size divides input_ids: give them beside inputs_embeds")
                is_first_iteration = True
                inputs_embeds = inputs_embeds[:, past_length : past_length + positions.shape[-1]]
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{CACHE: cache},
            **kwargs,
        )

    def create_masks_for_generate(
        self, config, inputs_embeds, attention_mask, past_key_values=None, position_ids=None, cache=None, **kwargs
    ):
        """`generate` prepares the masks of compiled caches by itself; they need the released window, too."""
        return create_mask(
            config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            cache=either_cache(past_key_values, cache),
            position_ids=position_ids,
        )

    def init_continuous_batching(self, *args, **kwargs):
        """As in transformers, whose paged cache reads `config.sliding_window` itself and would see one key too few."""
        if self.config.sliding_window is not None:
            raise ValueError(
                "continuous batching does not know the released meaning of sliding_window; use `generate`, or set "
                "config.sliding_window=None if no sequence is longer than the window"
            )
        return super().init_continuous_batching(*args, **kwargs)

    def _prepare_static_cache(self, *args, **kwargs) -> Cache:
        """As in transformers, which offloads no sliding layers by default, and fails where every layer is one."""
        cache = super()._prepare_static_cache(*args, **kwargs)
        cache.only_non_sliding = False
        return cache

    def adjust_generation_fn(self, *args, **kwargs):
        """Read the generation config; where it stops at <|endoftext|> alone, stop at the end of a chat turn, too."""
        super().adjust_generation_fn(*args, **kwargs)
        if self.generation_config.eos_token_id in (END_OF_TEXT_ID, [END_OF_TEXT_ID]):
            self.generation_config.eos_token_id = [END_OF_TEXT_ID, END_OF_TURN_ID]


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
        **kwargs,
    ) -> GrinMoeSequenceClassifierOutput:
        """Classes or numbers of whole sequences; the other arguments are those of `GrinMoeModel.forward`.

        Args:
            attention_mask: `[batch, sequence]`, 0 for padding on either side. Without one, the last token that is not
                `config.pad_token_id` is taken.
            labels: `[batch]`; classes, or numbers with `config.problem_type="regression"`.
            output_router_logits: return `aux_loss` and `router_logits`, too.

        Returns:
            `logits` `[batch, num_labels]`; with labels, `loss`. The load-balance loss as in `GrinMoeForCausalLM`.
        """
        config = self.config
        if output_router_logits is None:
            output_router_logits = config.output_router_logits
        loss_share = None
        if self.training and labels is not None and kwargs.get("num_items_in_batch") is not None:
            loss_share = (labels != -100).sum() / kwargs["num_items_in_batch"]
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            output_selected_experts=output_router_logits,
            loss_share=loss_share,
            has_loss=True,  # or trl's RewardTrainer computes it of this one pass
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        batch_size, length = hidden_states.shape[:2]
        if attention_mask is not None and attention_mask.dim() == 2:
            real = attention_mask[:, -length:] != 0
        elif input_ids is not None and config.pad_token_id is not None:
            real = input_ids != config.pad_token_id
        else:
            real = torch.ones(batch_size, length, dtype=torch.bool, device=hidden_states.device)
        last = (real * torch.arange(length, device=real.device)).argmax(dim=-1).to(hidden_states.device)
        logits = self.score(hidden_states[torch.arange(batch_size, device=last.device), last])

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=config)
            if loss_share is not None:  # the mean over an accumulation window, and not over this micro-batch
                loss = loss * loss_share
        aux_loss = None
        if output_router_logits:
            with torch.no_grad():
                aux_loss = load_balancing_loss(outputs.router_logits, outputs.selected_experts, attention_mask)
        return GrinMoeSequenceClassifierOutput(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            aux_loss=aux_loss,
            router_logits=outputs.router_logits,
        )


__all__ = ["GrinMoeForCausalLM", "GrinMoeForSequenceClassification", "GrinMoeModel", "GrinMoePreTrainedModel"]
