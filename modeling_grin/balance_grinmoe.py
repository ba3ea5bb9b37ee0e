"""The load-balance loss (section 3.3 of the paper, after Switch Transformer): alpha n sum_i f_i E[softmax(z)_i].

f is counted globally, over all data-parallel ranks (the paper's adaptation) and over the micro-batches of an optimizer
step. The loss is linear in softmax(z) and f has no gradient, so that any split of a batch adds up to the same: per
layer and token, alpha n / N sum_i f_i softmax(z)_i, N the step's tokens. This is what `BalanceLoss` attaches to each
layer by autograd, where no trainer's way of building, scaling or replacing the loss can change it.

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
    """How many counted tokens (bool `[T]`) each expert got, `[T, K]` -> int64 `[E]`."""
    counts = torch.zeros(num_experts, dtype=torch.int64, device=selected_experts.device)
    return counts.scatter_add_(
        0, selected_experts.flatten(), counted.long().repeat_interleave(selected_experts.shape[1])
    )


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


class ExpertCounts:
    """Times each expert was chosen up to a forward pass, over all data-parallel ranks; maybe still being summed."""

    def __init__(self, before: "ExpertCounts | None", counts: torch.Tensor, work: dist.Work | None = None):
        """
        Args:
            before: the counts up to the previous forward pass.
            counts: of this forward pass, int64 `[L, E]`; summed over the ranks once `work` is done.
        """
        self._before, self._counts, self._work = before, counts, work

    def total(self) -> torch.Tensor:
        """The counts, int64 `[L, E]`."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        if self._before is not None:
            self._counts = self._counts + self._before.total()
            self._before = None
        return self._counts

    def fractions(self, layer: int) -> torch.Tensor:
        """f of one layer, float32 `[E]`."""
        counts = self.total()[layer]
        return counts / counts.sum().clamp(min=1)


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
        self._whole_step = None if expert_counts is None else ExpertCounts(None, expert_counts)
        self.latest_counts: ExpertCounts | None = None

    def window_for_pass(self) -> "BalanceWindow":
        """Return this window, or a new one for a single forward pass where the step's size is unknown."""
        if self.num_tokens is not None:
            return self
        return BalanceWindow(gradient_scale=self.gradient_scale, group=self.group)

    def add_counts(self, counts: torch.Tensor) -> ExpertCounts:
        """Add a forward pass's counts, int64 `[L, E]`; return the counts that its backward pass will use.

        The sum over the ranks is only started here.
        """
        if self._whole_step is not None:
            return self._whole_step
        work = dist.all_reduce(counts, group=self.group, async_op=True) if self.is_distributed else None
        self.latest_counts = ExpertCounts(self.latest_counts, counts, work)
        return self.latest_counts


class BalanceLoss:
    """The balance loss of one forward pass, which adds its gradient to each layer's router logits."""

    def __init__(
        self,
        coefficient: float,
        num_layers: int,
        num_experts: int,
        window: BalanceWindow,
        counted: torch.Tensor,
        loss_share: torch.Tensor | float | None,
    ):
        """
        Args:
            coefficient: alpha, `router_aux_loss_coef`.
            counted: bool `[T]`, False for padding.
            loss_share: this forward pass's share of an optimizer step whose number of tokens is unknown; None if it is
                the whole step.
        """
        self.num_experts = num_experts
        self.window = window
        self.counted = counted
        self.expert_counts: ExpertCounts | None = None
        # Data parallelism averages the ranks' gradients, so each rank contributes world_size times its part of a sum.
        if window.num_tokens is not None:
            per_token: torch.Tensor | float = window.world_size / window.num_tokens
        else:
            part = 1 if loss_share is None else window.world_size * loss_share
            per_token = part / counted.sum().clamp(min=1)
        self.token_weight = counted * (coefficient * num_experts / num_layers * window.gradient_scale * per_token)

    @torch.compiler.disable
    def count(self, selected_experts: Sequence[torch.Tensor]) -> None:
        """Add the forward pass's experts, per layer `[T, K]`, to the window."""
        counts = [
            count_experts(experts, self.counted.to(experts.device), self.num_experts).to(self.counted.device)
            for experts in selected_experts
        ]
        self.expert_counts = self.window.add_counts(torch.stack(counts))

    def gradient(self, router_logits: torch.Tensor, layer: int) -> torch.Tensor:
        """d/dz of `sum_t token_weight_t sum_i f_i softmax(z_t)_i`, `[T, E]`."""
        assert self.expert_counts is not None, "a backward pass comes after its forward pass"
        fractions = self.expert_counts.fractions(layer).to(router_logits.device)
        probs = router_logits.float().softmax(dim=-1)
        slope = probs * (fractions - (probs * fractions).sum(dim=-1, keepdim=True))
        return (self.token_weight.to(slope.device).unsqueeze(-1) * slope).to(router_logits.dtype)

    @torch.compiler.disable
    def attach(self, output: torch.Tensor, router_logits: torch.Tensor, layer: int) -> torch.Tensor:
        """Return `output`, whose backward pass also adds the balance gradient to `router_logits` `[T, E]`."""
        return _AttachBalanceLoss.apply(output, router_logits, self, layer)


class _AttachBalanceLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, router_logits, balance: BalanceLoss, layer: int):
        ctx.save_for_backward(router_logits)
        ctx.balance, ctx.layer = balance, layer
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (router_logits,) = ctx.saved_tensors
        return grad_output, ctx.balance.gradient(router_logits, ctx.layer), None, None
