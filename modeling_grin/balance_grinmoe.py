"""The load-balance loss (section 3.3 of the paper, after Switch Transformer): alpha n sum_i f_i E[softmax(z)_i].

f is counted globally, over all data-parallel ranks (the paper's adaptation) and over the micro-batches of an optimizer
step. The loss is linear in softmax(z) and f has no gradient, so that any split of a batch adds up to the same: per
layer and token, alpha n / N sum_i f_i softmax(z)_i, N the step's tokens. This is what `AttachBalanceLoss` adds in
each layer by autograd, where no trainer's way of building, scaling or replacing the loss can change it.

Shapes: T tokens of a forward pass, L layers, E experts, K top-k.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


def counted_tokens(
    attention_mask: torch.Tensor | None, batch_size: int, sequence_length: int, device: torch.device
) -> torch.Tensor:
    """Which tokens are not padding, bool `[batch, sequence]` on `device`.

    Args:
        attention_mask: `[batch, past + sequence]`, 0 for padding (other values may number packed sequences). Where
            there is none, or one of any other rank, nothing is said about padding: every token counts.
    """
    if attention_mask is None or attention_mask.dim() != 2:
        return torch.ones(batch_size, sequence_length, dtype=torch.bool, device=device)
    return attention_mask[:, -sequence_length:].to(device) != 0


def count_experts(selected_experts: torch.Tensor, counted: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How many counted tokens (bool `[T]`) each expert got, `[T, K]` -> int64 `[E]`; or `[L, T, K]` -> `[L, E]`."""
    *layers, _, _ = selected_experts.shape
    counts = torch.zeros(*layers, num_experts, dtype=torch.int64, device=selected_experts.device)
    ones = counted.long().unsqueeze(-1).expand_as(selected_experts)
    return counts.scatter_add_(-1, selected_experts.flatten(-2), ones.flatten(-2))


def load_balancing_loss(
    router_logits: tuple[torch.Tensor, ...],
    selected_experts: tuple[torch.Tensor, ...],
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """How unevenly the experts are used in one forward pass: 1.0 when balanced, E / K when K experts get everything.

    Computed per layer, then averaged over the layers, so that two layers that collapsed onto different experts do not
    look balanced. f counts the experts that tokens were really dispatched to (sampled ones in training); the gradient
    flows through the softmax alone.

    Args:
        router_logits: per layer `[T, E]`, T = batch x sequence.
        selected_experts: per layer `[T, K]`, the `experts` of each layer's `Routing`.
        attention_mask: as in `counted_tokens`.

    Returns:
        Scalar, float32, without the coefficient alpha (`router_aux_loss_coef`).
    """
    num_tokens, num_experts = router_logits[0].shape
    device = router_logits[0].device
    batch_size = 1 if attention_mask is None else max(attention_mask.shape[0], 1)
    counted = counted_tokens(attention_mask, batch_size, num_tokens // batch_size, device).reshape(-1)

    losses = []
    with torch.autocast(device.type, enabled=False):  # in float32, whatever the model runs in
        for logits, experts in zip(router_logits, selected_experts, strict=True):
            here = counted.to(logits.device)
            total = here.sum().clamp(min=1)
            probability = here.float() @ logits.float().softmax(dim=-1) / total  # E[softmax(z)_i], [E]
            fraction = count_experts(experts, here, num_experts) / (total * experts.shape[-1])  # f_i, [E]
            losses.append(num_experts * fraction @ probability)
    return torch.stack([loss.to(device) for loss in losses]).mean()


class BalanceWindow:
    """State that the forward passes of an optimizer step share: the step's size, and the experts' counts so far.

    Each backward pass uses the counts accumulated up to its own forward pass, so pipelines and single processes agree.
    Later micro-batches are missing from them, unless all counts were known beforehand; `docs/training.md` bounds the
    difference.
    """

    def __init__(
        self,
        num_tokens: int | None = None,
        expert_counts: torch.Tensor | None = None,
        gradient_scale: float = 1.0,
        group: dist.ProcessGroup | None = None,
    ):
        """Arguments as in `OptimizerStepMixin.begin_step`."""
        self.num_tokens = num_tokens
        self.gradient_scale = gradient_scale
        self.group = group
        self.is_distributed = dist.is_available() and dist.is_initialized()
        self.world_size = dist.get_world_size(group) if self.is_distributed else 1
        self._whole_step = expert_counts
        self.latest_counts: torch.Tensor | None = None
        """Times each expert was chosen up to the latest forward pass, over all data-parallel ranks, `[L, E]`."""

    @property
    def counts(self) -> torch.Tensor | None:
        """The step's counts, as far as they are known, int64 `[L, E]`."""
        return self.latest_counts if self._whole_step is None else self._whole_step

    def window_for_pass(self) -> "BalanceWindow":
        """Return this window, or a new one for a single forward pass where the step's size is unknown."""
        if self.num_tokens is not None:
            return self
        return BalanceWindow(gradient_scale=self.gradient_scale, group=self.group)

    def add_counts(self, counts: torch.Tensor) -> torch.Tensor:
        """Add a forward pass's counts, int64 `[L, E]`; return the counts that its backward pass will use."""
        if self._whole_step is not None:
            return self._whole_step
        if self.is_distributed:
            self._sum_over_ranks(counts)
        self.latest_counts = counts if self.latest_counts is None else self.latest_counts + counts
        return self.latest_counts

    @torch.compiler.disable
    def _sum_over_ranks(self, counts: torch.Tensor) -> None:
        dist.all_reduce(counts, group=self.group)


class BalanceLoss:
    """The balance loss of one forward pass: what `AttachBalanceLoss` needs to know."""

    def __init__(
        self,
        coefficient: float,
        num_layers: int,
        num_experts: int,
        window: BalanceWindow,
        counted: torch.Tensor,
        loss_share: torch.Tensor | float | None,
        z_coefficient: float = 0.0,
    ):
        """
        Args:
            coefficient: alpha, `router_aux_loss_coef`.
            counted: bool `[T]`, False for padding.
            loss_share: this forward pass's share of an optimizer step whose number of tokens is unknown; None if it is
                the whole step.
            z_coefficient: `router_z_loss_coef`.
        """
        self.num_experts = num_experts
        self.window = window
        self.counted = counted
        # f, `[L, E]`, which `count` fills in after the layers have run and before their backward passes.
        self.fractions = torch.zeros(num_layers, num_experts, device=counted.device)
        # Data parallelism averages the ranks' gradients, so each rank contributes world_size times its part of a sum.
        if window.num_tokens is not None:
            per_token: torch.Tensor | float = window.world_size / window.num_tokens
        else:
            part = 1 if loss_share is None else window.world_size * loss_share
            per_token = part / counted.sum().clamp(min=1)
        share = counted * (window.gradient_scale / num_layers * per_token)  # of a mean over tokens and layers
        self.token_weight = coefficient * num_experts * share
        self.z_weight = z_coefficient * share

    def count(self, selected_experts: Sequence[torch.Tensor]) -> None:
        """Add the forward pass's experts, per layer `[T, K]`, to the window."""
        experts = torch.stack([experts.to(self.counted.device) for experts in selected_experts])
        counts = self.window.add_counts(count_experts(experts, self.counted, self.num_experts))
        fractions = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)
        self.fractions.data[: len(fractions)] = fractions  # as data: autograd has kept rows of it for the layers


def balance_gradient(
    router_logits: torch.Tensor, token_weight: torch.Tensor, fractions: torch.Tensor, z_weight: torch.Tensor
) -> torch.Tensor:
    """d/dz of `sum_t token_weight_t sum_i f_i softmax(z_t)_i + z_weight_t logsumexp(z_t)^2`, `[T, E]`.

    The second term is the router z-loss (ST-MoE, arXiv 2202.08906).

    Args:
        router_logits: z.
        token_weight, z_weight: `[T]`.
        fractions: f, `[E]`.
    """
    logits = router_logits.float()
    size = logits.logsumexp(dim=-1, keepdim=True)
    probs = (logits - size).exp()
    slope = probs * (fractions - (probs * fractions).sum(dim=-1, keepdim=True))
    shrink = 2 * z_weight.unsqueeze(-1) * size * probs
    return (token_weight.unsqueeze(-1) * slope + shrink).to(router_logits.dtype)


class AttachBalanceLoss(torch.autograd.Function):
    """`router_logits` `[T, E]`, whose backward pass adds `balance_gradient`, with `fractions` as they then are.

    Into `gradients` `[2, E, H]`, if given, it adds the gradients of a router's weights by the task and by this loss,
    from the router's inputs `tokens` `[T, H]`.
    """

    @staticmethod
    def forward(ctx, router_logits, token_weight, fractions, z_weight, tokens=None, gradients=None):
        ctx.save_for_backward(router_logits, token_weight, fractions, z_weight)
        ctx.tokens, ctx.gradients = (None if gradients is None else tokens.detach()), gradients
        return router_logits.view_as(router_logits)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logits):
        router_logits, *constants = ctx.saved_tensors
        # Only now to the layer's device: a copy made in the forward pass would not see `fractions` filled in.
        constants = (constant.to(router_logits.device) for constant in constants)
        own = balance_gradient(router_logits, *constants)
        if ctx.gradients is not None:
            inputs = ctx.tokens.float()
            ctx.gradients += torch.stack([grad.float().T @ inputs for grad in (grad_logits, own)]).to(ctx.gradients)
        return grad_logits + own, None, None, None, None, None
