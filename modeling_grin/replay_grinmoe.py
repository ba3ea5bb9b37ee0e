"""Routing replay (R3, arXiv 2510.11370): a forward pass takes the experts that an earlier one chose, maybe elsewhere.

Only the choice is replayed. Weights and the router's gradient come from today's logits by the estimator's rule, where
a replayed expert counts as kept (`routing_grinmoe.choose`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel


class RoutingReplayMixin(PreTrainedModel):
    """Models whose routing can be given."""

    replayed_experts: torch.Tensor | None = None
    """Set on the decoder: int64 `[L, T, K]`."""

    @contextmanager
    def replay_routing(self, selected_experts: torch.Tensor | Sequence[torch.Tensor]) -> Iterator[None]:
        """Route forward passes as an earlier one was; its backward pass may come later.

        Args:
            selected_experts: integers, laid out as `input_ids`, padding included: what `output_selected_experts=True`
                returned, for each layer `[T, K]`; or `[batch, sequence, layers, K]`, as vLLM's `routed_experts` is for
                one row. A token of -1s is routed as ever.

        Raises:
            ValueError: another number of layers or of experts per token, experts that do not exist, or one twice; in
                the forward pass, another number of tokens.
        """
        if isinstance(selected_experts, torch.Tensor):
            if selected_experts.dim() != 4:
                raise ValueError(
                    "selected_experts must be a tensor of shape [batch, sequence, layers, experts per token] or a "
                    f"tensor [tokens, experts per token] for each layer; got a tensor {list(selected_experts.shape)}"
                )
            experts = selected_experts.flatten(0, 1).movedim(1, 0)
        else:
            experts = torch.stack([layer.to(selected_experts[0].device) for layer in selected_experts])
        config, experts = self.config, experts.long()
        sizes = config.num_hidden_layers, config.num_experts_per_tok
        if (experts.shape[0], experts.shape[2]) != sizes:
            raise ValueError(
                f"selected_experts must have {sizes[0]} layers and {sizes[1]} experts per token; got "
                f"{experts.shape[0]} and {experts.shape[2]}"
            )
        in_order = experts.sort(dim=-1).values
        is_left_out = (experts == -1).all(dim=-1)
        is_right = (in_order[..., 0] >= 0) & (in_order[..., -1] < config.num_local_experts)
        is_right &= (in_order.diff(dim=-1) > 0).all(dim=-1)
        if not (is_right | is_left_out).all():
            raise ValueError(
                f"selected_experts must be different numbers from 0 to {config.num_local_experts - 1} for each token, "
                f"or all -1; got {experts[~(is_right | is_left_out)][0].tolist()}"
            )
        decoder: RoutingReplayMixin = self.base_model
        before, decoder.replayed_experts = decoder.replayed_experts, experts
        try:
            yield
        finally:
            decoder.replayed_experts = before

    def replayed_in(self, layer: int, inputs_embeds: torch.Tensor) -> torch.Tensor | None:
        """The experts `[T, K]` to take in `layer` for tokens `inputs_embeds` `[batch, sequence, H]`; None: its own."""
        if self.replayed_experts is None:
            return None
        num_tokens = inputs_embeds.shape[0] * inputs_embeds.shape[1]
        if self.replayed_experts.shape[1] != num_tokens:
            raise ValueError(
                f"selected_experts have {self.replayed_experts.shape[1]} tokens, padding included, and the forward "
                f"pass has {num_tokens}: open replay_routing for each batch"
            )
        return self.replayed_experts[layer]
