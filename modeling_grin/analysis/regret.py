"""Routing regret: the loss that another route of equal cost would have saved (after arXiv 2605.07260).

The model is held. One token of a row loses its last expert in one layer, and maybe the next ones of its ranking: the
router then takes the best one left, with the weight that its own rule gives it. The change of the row's loss is the
whole effect, on later tokens as well. L layers, N tokens, A alternatives, E experts, K top-k.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ..routing_grinmoe import keep_set
from .routing import inference, model_inputs


class RoutingRegret(NamedTuple):
    """The loss that other routes would have saved, by layer and token."""

    saved: torch.Tensor
    """The row's loss minus its loss with alternative a, in nats, `[L, N, A]`, float64. The first alternative takes
    expert K + 1 of the token's ranking in place of expert K, the second one expert K + 2, and so on."""
    near_ties: torch.Tensor
    """Whether the last choice had a second expert in its keep set, bool `[L, N]`."""

    def runner_up(self) -> torch.Tensor:
        """What the last choice is worth: the loss that its runner-up would have added, mean over tokens, `[L]`."""
        return -self.saved[..., 0].mean(dim=1)

    def regret(self) -> torch.Tensor:
        """The loss that the best of the routes would have saved, 0 if the router took it, mean over tokens, `[L]`."""
        return self.by_token().mean(dim=1)

    def better(self) -> torch.Tensor:
        """The share of tokens for which some alternative was better, `[L]`."""
        return (self.by_token() > 0).double().mean(dim=1)

    def regret_of_near_ties(self) -> torch.Tensor:
        """`regret` of tokens whose last choice was a near-tie, `[L]`; NaN without any."""
        return (self.by_token() * self.near_ties).sum(dim=1) / self.near_ties.sum(dim=1)

    def near_tie_rate(self) -> torch.Tensor:
        """The share of near-ties at the last choice, `[L]`."""
        return self.near_ties.double().mean(dim=1)

    def by_token(self) -> torch.Tensor:
        """`[L, N]`."""
        return self.saved.amax(dim=-1).clamp(min=0)


@contextmanager
def without_experts(gate: nn.Module, tokens: torch.Tensor, top_k: int, number: int) -> Iterator[None]:
    """Rule out `number` experts of `tokens`' rankings, from the K-th on, in the output of a router."""

    def rule_out(module: nn.Module, inputs: tuple, logits: torch.Tensor) -> torch.Tensor:
        dropped = logits[tokens].argsort(dim=-1, descending=True)[:, top_k - 1 : top_k - 1 + number]
        return logits.index_put((tokens.unsqueeze(-1), dropped), logits.new_tensor(-torch.inf))

    handle = gate.register_forward_hook(rule_out)
    try:
        yield
    finally:
        handle.remove()


def row_losses(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], counted: torch.Tensor) -> torch.Tensor:
    """The summed next-token loss of each row, `[batch]`, float64."""
    logits, ids = model(**inputs, use_cache=False).logits[:, :-1], inputs["input_ids"]
    log_probs = logits.double().log_softmax(dim=-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return -(log_probs * counted[:, 1:]).sum(dim=-1)


def routing_regret(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    num_tokens: int,
    alternatives: int = 3,
    seed: int = 0,
) -> RoutingRegret:
    """Try other routes for random tokens, one of each row at a time; L x A + 1 forward passes a batch.

    Args:
        model: a GRIN-MoE language model; its mode is restored.
        batches: `input_ids` and maybe `attention_mask`, `[batch, sequence]`, read until there are enough tokens.
        num_tokens: tokens to study in each layer.
        alternatives: routes to try for each token.

    Raises:
        ValueError: there are not so many other experts, or no row of two tokens.
    """
    config, layers = model.config, model.get_decoder().layers
    top_k = config.num_experts_per_tok
    if not 1 <= alternatives <= config.num_local_experts - top_k:
        raise ValueError(
            f"alternatives must be from 1 to {config.num_local_experts - top_k}, the experts that a token does not "
            f"take; got {alternatives}"
        )
    generator = torch.Generator().manual_seed(seed)
    saved, near_ties, found = [], [], 0
    with inference(model):
        for batch in batches:
            if found >= num_tokens:
                break
            inputs, counted = model_inputs(model, batch)
            # Of tokens with a next one to predict; rows of fewer are left out.
            chances = (counted[:, :-1] & counted[:, 1:]).float().cpu()
            rows = chances.any(dim=-1).nonzero().flatten()[: num_tokens - found]
            if not len(rows):
                continue
            before = row_losses(model, inputs, counted)
            by_layer, places = [], []
            for layer in layers:
                gate = layer.block_sparse_moe.gate
                chosen = torch.multinomial(chances[rows], 1, generator=generator).flatten()
                tokens = (rows * counted.shape[1] + chosen).to(model.device)
                changed = []
                for number in range(1, alternatives + 1):
                    with without_experts(gate, tokens, top_k, number):
                        changed.append(row_losses(model, inputs, counted))
                by_layer.append((before.unsqueeze(-1) - torch.stack(changed, dim=-1))[rows].cpu())
                places.append(tokens)
            near_ties.append(last_choice_ties(model, inputs, places))
            saved.append(torch.stack(by_layer))
            found += len(rows)
    if not found:
        raise ValueError("`batches` must hold rows of at least two tokens")
    return RoutingRegret(torch.cat(saved, dim=1), torch.cat(near_ties, dim=1))


def last_choice_ties(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], places: list[torch.Tensor]
) -> torch.Tensor:
    """Whether the last choice of each layer's tokens had a second expert in its keep set, bool `[L, N]`."""
    outputs = model.get_decoder()(**inputs, use_cache=False, output_router_logits=True)
    ties = []
    for logits, tokens in zip(outputs.router_logits, places, strict=True):
        z = logits[tokens.to(logits.device)].float()
        earlier = z.topk(model.config.num_experts_per_tok - 1, dim=-1).indices
        available = torch.ones_like(z, dtype=torch.bool).scatter(-1, earlier, False)
        ties.append((keep_set(z, available, model.config.router_jitter_noise).sum(dim=-1) > 1).cpu())
    return torch.stack(ties)
