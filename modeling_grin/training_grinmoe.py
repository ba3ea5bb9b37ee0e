"""Forward passes in training: the optimizer step they belong to, and what each pass shares with its layers.

Shapes: T tokens of a forward pass, H hidden_size, E experts, K top-k.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import logging

from .balance_grinmoe import AttachBalanceLoss, BalanceLoss, BalanceWindow, counted_tokens, load_balancing_loss
from .checks_grinmoe import find_expert_adapters
from .noise_grinmoe import layer_keys, put_key, random_key, step_key, token_keys
from .routing_grinmoe import noise_settings

logger = logging.get_logger(__name__)

IGNORED_LABEL = -100

RoutingObserver = Callable[[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], torch.Tensor], None]


class OptimizerStep(NamedTuple):
    """The optimizer step that a forward pass in training belongs to."""

    key: torch.Tensor
    """Decides the step's routing noise, int64 scalar."""
    window: BalanceWindow


class TrainingPass:
    """State that a forward pass in training shares with its layers."""

    def __init__(
        self,
        counted: torch.Tensor,
        keys: torch.Tensor | None,
        balance: BalanceLoss | None,
        observer: RoutingObserver | None,
        gradients: torch.Tensor | None = None,
    ):
        """
        Args:
            counted: bool `[T]`, False for padding.
            keys: int64 `[L, 2, T]`, seeds of the tokens' noise (`layer_keys`); None if the model draws none.
            balance: the load-balance loss of the pass.
            observer: called by `finish`.
            gradients: `OptimizerStepMixin.router_gradients`.
        """
        self.gradients = gradients
        self.counted, self.keys, self.balance, self.observer = counted, keys, balance, observer
        self.layers: list[LayerPass] = []

    def for_next_layer(self) -> "LayerPass":
        """The pass as the next layer sees it."""
        number = len(self.layers)
        keys = None if self.keys is None else self.keys[number]
        fractions = None if self.balance is None else self.balance.fractions[number]
        self.layers.append(LayerPass(self, keys, fractions))
        return self.layers[-1]

    def finish(self) -> None:
        """Count the experts of all layers for the balance loss, and show the routing to the observer."""
        selected_experts = tuple(layer.selected_experts for layer in self.layers)
        if self.balance is not None:
            self.balance.count(selected_experts)
        if self.observer is not None:
            self.observer(tuple(layer.router_logits for layer in self.layers), selected_experts, self.counted)
        for layer in self.layers:  # the backward pass needs them, and not their routing
            layer.router_logits = layer.selected_experts = None
        self.layers = []  # no cycle of references: memory is freed with the backward pass


class LayerPass:
    """`TrainingPass` of one layer. Compiled layers share their code, so it does not have the layer's number."""

    def __init__(
        self, training_pass: TrainingPass, keys: torch.Tensor | None = None, fractions: torch.Tensor | None = None
    ):
        """
        Args:
            keys: int64 `[2, T]`, of routing and of input jitter.
            fractions: `[E]`, of the balance loss, which has them by the time of the backward pass; None without one.
        """
        self.keys, self.fractions = keys, fractions
        self.balance = None if fractions is None else training_pass.balance
        number = len(training_pass.layers)
        self.gradients = None if training_pass.gradients is None else training_pass.gradients[number]
        self.is_recorded = fractions is not None or training_pass.observer is not None
        self.router_logits: Any = None
        self.selected_experts: Any = None

    def attach_balance(self, router_logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """`router_logits` `[T, E]` of `tokens` `[T, H]`, to which a backward pass adds the balance loss's gradient."""
        assert self.fractions is not None and self.balance is not None
        weights = self.balance.token_weight, self.fractions, self.balance.z_weight
        return AttachBalanceLoss.apply(router_logits, *weights, tokens, self.gradients)

    def record(self, router_logits: torch.Tensor, experts: torch.Tensor) -> None:
        """Record the layer's routing, logits `[T, E]` and experts `[T, K]`, for the balance loss and the observer."""
        if self.is_recorded:
            self.router_logits, self.selected_experts = router_logits.detach(), experts


class OptimizerStepMixin(PreTrainedModel):
    """Models that know which optimizer step a forward pass in training belongs to."""

    optimizer_step: OptimizerStep | None = None
    """Set on the decoder by `begin_step`."""
    routing_observer: RoutingObserver | None = None
    """Called once per forward pass in training, and not when a layer is recomputed, with every layer's router logits
    `[T, E]` and selected experts `[T, K]`, and which tokens are not padding, bool `[T]`. Set it on the decoder."""
    router_gradients: torch.Tensor | None = None
    """Backward passes with a balance loss add the gradients of the routers' weights by the task and by the balance
    loss, `[L, 2, E, H]`, over this process's tokens. Set it on the decoder."""
    adapts_experts: bool | None = None
    """Whether the decoder's experts have adapters. None: unknown; False: they have none on purpose (`add_lora`)."""

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
        """Say which optimizer step the next forward passes in training belong to; `GrinMoeTrainerMixin` does.

        Routing noise is then a function of seed, step, layer and token (`noise_grinmoe.token_keys`), and the
        load-balance loss covers the whole step, however it is split into micro-batches and ranks. Without a step,
        each forward pass draws a key from torch's CPU generator and is its own batch for the balance loss.

        Args:
            step: number of the optimizer step; None: no step is known from here on.
            seed: of the run.
            num_tokens: tokens that are not padding in all forward passes of the step, over all ranks of `group`.
                None: each forward pass is its own window.
            expert_counts: the step's counts over all ranks, int64 `[layers, experts]`, if known beforehand;
                otherwise each backward pass uses the counts of the forward passes so far.
            gradient_scale: factor of the loss in its backward pass (float16's loss scale).
            group: the data-parallel ranks, whose gradients are averaged; by default all.
        """
        window = BalanceWindow(num_tokens, expert_counts, gradient_scale, group)
        decoder: OptimizerStepMixin = self.base_model
        decoder.optimizer_step = None
        if step is not None:
            decoder.optimizer_step = OptimizerStep(put_key(step_key(seed, step), decoder.device), window)

    @torch.no_grad()
    def end_step(self) -> None:
        """Move the selection biases by the load of the forward passes since `begin_step`, over all their ranks.

        Loss-free balancing (arXiv 2408.15664, Algorithm 1): `b_i += u sign(mean load - load_i)`, u the config's
        `router_bias_update_rate`. Call it after the step's last backward pass, which may recompute the routing;
        `GrinMoeTrainerMixin` does. Models without biases and frozen routers stay as they are.

        Raises:
            ValueError: no step with a known number of tokens has begun, so that nobody counted its experts.
        """
        rate, decoder = self.config.router_bias_update_rate, self.base_model
        if rate == 0 or self.config.freeze_router:
            return
        counts = None if decoder.optimizer_step is None else decoder.optimizer_step.window.counts
        if counts is None:
            raise ValueError(
                f"router_bias_update_rate={rate} needs the step's load: call begin_step(..., num_tokens=...) before "
                "its forward passes, or set freeze_router=True to leave the biases as they are"
            )
        for layer, load in zip(decoder.layers, counts.float(), strict=True):
            bias = layer.block_sparse_moe.e_score_correction_bias
            bias += rate * (load.mean() - load).sign().to(bias.device)

    def train(self, mode: bool = True):
        """As in torch; warns once if adapters are about to be trained and no expert has one."""
        if mode and self.adapts_experts is None and self.base_model is self:
            self.adapts_experts = find_expert_adapters(self)
        return super().train(mode)

    def begin_pass(
        self,
        inputs_embeds: torch.Tensor,
        token_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        loss_share: torch.Tensor | None,
        has_loss: bool,
    ) -> TrainingPass | None:
        """Begin a forward pass of the decoder; None outside training.

        Args:
            token_ids: `[batch, sequence]`, which the noise is a function of; by default the rows' numbers.
            loss_share: without `begin_step`, this pass's share of the optimizer step's loss, a scalar.
            has_loss: whether the caller computes a loss from this pass alone; otherwise a warning says once how noise
                affects comparing passes.
        """
        if not self.training:
            return None
        batch_size, sequence_length = inputs_embeds.shape[:2]
        counted = counted_tokens(attention_mask, batch_size, sequence_length, inputs_embeds.device)
        is_learning = torch.is_grad_enabled()
        keys = balance = None
        if settings := noise_settings(self.config):  # otherwise torch's generator is left alone
            if self.optimizer_step is None and not (has_loss and is_learning) and not torch.compiler.is_compiling():
                # trl's own trainers compare passes, and do not ask us when they are built.
                logger.warning_once(
                    "This forward pass in training samples its experts or jitters their inputs, and has no labels. "
                    "Where it is compared with another pass (DPO, KTO, GRPO, RLOO, distillation), ratios and KL carry "
                    f"that noise: set {' and '.join(f'{name}={settings[name]}' for name in settings)} in the config."
                )
            key = random_key() if self.optimizer_step is None else self.optimizer_step.key
            if token_ids is None:
                token_ids = torch.arange(batch_size, device=counted.device).unsqueeze(-1).expand_as(counted)
            # Packed sequences are told from each other as in the mask: without one, by their positions.
            positions = position_ids.expand_as(counted) if attention_mask is None else counted.cumsum(dim=-1) - 1
            layers = range(self.first_layer, self.first_layer + len(self.layers))
            keys = layer_keys(token_keys(key, token_ids, counted, positions), layers)
        config = self.config
        if is_learning and max(config.router_aux_loss_coef, config.router_z_loss_coef, config.router_bias_update_rate):
            balance = self.begin_balance(counted.reshape(-1), loss_share)
        observer = self.routing_observer if is_learning else None
        return TrainingPass(counted.reshape(-1), keys, balance, observer, self.router_gradients)

    def begin_balance(self, counted: torch.Tensor, loss_share: torch.Tensor | None) -> BalanceLoss:
        """The load-balance loss of a forward pass; arguments as in `BalanceLoss`.

        Raises:
            ValueError: float16 autocast, whose loss scale only the trainer knows.
        """
        if self.optimizer_step is not None:
            window = self.optimizer_step.window.window_for_pass()
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
        if loss_share is not None:  # window.world_size includes the tensor-parallel ranks, which share their tokens
            loss_share = loss_share / getattr(getattr(config, "distributed_config", None), "tp_size", 1)
        sizes = config.num_hidden_layers, config.num_local_experts
        coefficients = config.router_aux_loss_coef, config.router_z_loss_coef
        return BalanceLoss(coefficients[0], *sizes, window, counted, loss_share, coefficients[1])

    def run_decoder(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
        inputs_embeds: torch.Tensor | None,
        use_cache: bool | None,
        *,
        targets: torch.Tensor | None,
        output_router_logits: bool | None,
        output_selected_experts: bool = False,
        **kwargs,
    ) -> tuple[Any, torch.Tensor | None, torch.Tensor | None]:
        """Run the decoder under a head.

        Args:
            targets: the labels whose losses are summed, -100 where a token has none; None without labels.
            output_router_logits: by default as in the config.

        Returns:
            The decoder's outputs; `aux_loss` if router logits were asked for; and, if the trainer says how many
            labels an optimizer step has (`num_items_in_batch`), this pass's share of them.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        loss_share = aux_loss = None
        if self.training and targets is not None and kwargs.get("num_items_in_batch") is not None:
            loss_share = (targets != IGNORED_LABEL).sum() / kwargs["num_items_in_batch"]
        outputs = self.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            output_selected_experts=output_selected_experts or output_router_logits,
            loss_share=loss_share,
            **kwargs,
        )
        if output_router_logits:
            with torch.no_grad():
                aux_loss = load_balancing_loss(outputs.router_logits, outputs.selected_experts, attention_mask)
        return outputs, aux_loss, loss_share
