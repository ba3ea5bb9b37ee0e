"""The load-balance loss (section 3.3 of the paper, after Switch Transformer): alpha n sum_i f_i E[softmax(z)_i]."""

import torch


def load_balancing_loss(
    router_logits: tuple[torch.Tensor, ...],
    selected_experts: tuple[torch.Tensor, ...],
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """How unevenly the experts are used: 1.0 when balanced, E / K when K of E experts get everything.

    Computed per layer, then averaged over the layers, so that two layers that collapsed onto different experts do not
    look balanced. f counts the experts that tokens were really dispatched to (sampled ones in training); the gradient
    flows through the softmax alone.

    Args:
        router_logits: per layer `[tokens, num_experts]`, tokens = batch x sequence.
        selected_experts: per layer `[tokens, top_k]`, the `experts` of each layer's `Routing`.
        attention_mask: `[batch, past + sequence]`, 0 for padding, which is not counted. A mask of any other rank says
            nothing about padding: every token counts.

    Returns:
        Scalar, float32, without the coefficient alpha (`router_aux_loss_coef`).
    """
    num_tokens, num_experts = router_logits[0].shape
    counted = torch.ones(num_tokens, device=router_logits[0].device)
    if attention_mask is not None and attention_mask.dim() == 2:
        sequence_length = num_tokens // attention_mask.shape[0]
        counted = attention_mask[:, -sequence_length:].reshape(-1).to(counted)

    losses = []
    with torch.autocast(router_logits[0].device.type, enabled=False):  # in float32, whatever the model runs in
        for logits, experts in zip(router_logits, selected_experts, strict=True):
            weight = counted.to(logits.device)
            weight = weight / weight.sum().clamp(min=1)
            probability = weight @ logits.float().softmax(dim=-1)  # E[softmax(z)_i], [num_experts]
            fraction = torch.zeros_like(probability)  # f_i, [num_experts]
            fraction.scatter_add_(0, experts.reshape(-1), weight.repeat_interleave(experts.shape[-1]))
            losses.append(num_experts * (fraction / experts.shape[-1]) @ probability)
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()
