"""Routing: which experts a token goes to, with what weight, and what gradient the router gets.

Read beside Appendix A of "GRIN: GRadient-INformed MoE" (arXiv 2409.12136). Shapes: T tokens, E experts, K = top_k.

| here            | paper                                              |
| --------------- | -------------------------------------------------- |
| `router_logits` | z, `[T, E]`                                        |
| `jitter_eps`    | r of Equation 2, `router_jitter_noise` in configs  |
| `probs`         | p = MaskedSoftmax(z), Equation 2                   |
| `sampled`       | D, the expert drawn from p                         |
| `is_argmax`     | delta_D                                            |
| `scale`         | max(delta_D, (1 + 2 B) / 3) of Algorithm 1, line 6 |
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

# Heun's third-order rule evaluates f' at the end of the ray with weight 1/4 and at its first third with weight 3/4
# (below Equation 5): B ~ Bernoulli(1/4) chooses between the two points.
HEUN_END_PROBABILITY = 1 / 4
# The authors' code rounds the third to four digits; checkpoints were trained with it.
HEUN_THIRD = 0.3333


class RoutingNoise(NamedTuple):
    """The random draws of one routing decision, float32, so that low-precision logits are not sampled with bias."""

    gumbel: torch.Tensor
    """Standard Gumbel noise `[K, T, E]`: argmax(z + gumbel) is a draw from softmax(z)."""
    uniform: torch.Tensor
    """Uniform noise in [0, 1) `[K, T]`: B = [uniform < HEUN_END_PROBABILITY]."""


class Routing(NamedTuple):
    """One layer's routing decision; experts, statistics and losses all read this object."""

    weights: torch.Tensor
    """What each chosen expert's output is multiplied with, `[T, K]`, float32 (float64 for float64 logits)."""
    experts: torch.Tensor
    """The chosen experts, `[T, K]`, int64."""


def draw_noise(router_logits: torch.Tensor, top_k: int, generator: torch.Generator | None = None) -> RoutingNoise:
    """Draw the noise that routing `router_logits` `[T, E]` to `top_k` experts needs, on the logits' device."""
    num_tokens, num_experts = router_logits.shape
    device = router_logits.device
    exponential = torch.empty(top_k, num_tokens, num_experts, device=device, dtype=torch.float32)
    gumbel = -exponential.exponential_(generator=generator).log_()
    uniform = torch.rand(top_k, num_tokens, device=device, dtype=torch.float32, generator=generator)
    return RoutingNoise(gumbel, uniform)


@torch.no_grad()
def keep_set(router_logits: torch.Tensor, available: torch.Tensor, jitter_eps: float) -> torch.Tensor:
    """The experts that MaskedSoftmax keeps: those almost as good as the best one that is still available.

    Expert i is kept iff (z* - z_i) / max(|z_i|, z*) <= 2 r, with z* the largest available logit. This is the form of
    the authors' code, which checkpoints were trained with; Equation 2 writes (z* - z_i) <= r (|z_i| + |z*|). The
    comparison is turned around so that 0 / 0, two logits that are both zero, keeps the expert.

    Args:
        router_logits: z, `[T, E]`.
        available: the experts not yet taken by an earlier choice, bool `[T, E]`.
        jitter_eps: r.

    Returns:
        Bool `[T, E]`, at least one True per row.
    """
    best = router_logits.masked_fill(~available, -torch.inf).amax(dim=-1, keepdim=True)
    distance = (best - router_logits) / torch.maximum(router_logits.abs(), best)
    return available & ~(distance > 2 * jitter_eps)


def with_value(gradient: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value` in the forward pass, the gradient of `gradient` in the backward pass."""
    return gradient + (value - gradient).detach()


def sparsemixer_v2(
    router_logits: torch.Tensor, top_k: int, jitter_eps: float, noise: RoutingNoise | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """SparseMixer-v2 as the authors' code has it (Algorithms 1 and 3, Equation 8).

    In training each of the K choices samples an expert D from MaskedSoftmax(z) without replacement, and its weight
    is `scale * p_D` with the gradient of p_D alone: for a loss gradient g with respect to the weight, the router gets
    dz = g p_D (onehot(D) - p), and nothing through the keep set, the scale or the sampling. Algorithm 1 hands the
    expert an unscaled gradient; the authors' code, and so this function, multiplies the expert's output by the scaled
    weight, so that the expert's gradient is scaled too.

    In inference (no noise) each choice is the best expert that is left, and the weights are not renormalised: they
    are both 1 but for near-ties.
    """
    available = torch.ones_like(router_logits, dtype=torch.bool)
    weights, experts = [], []
    for k in range(top_k):
        kept = keep_set(router_logits, available, jitter_eps)
        masked_logits = router_logits.masked_fill(~kept, -torch.inf)
        probs = masked_logits.softmax(dim=-1)
        best = probs.argmax(dim=-1, keepdim=True)
        if noise is None:
            chosen = best
            weight = probs.gather(-1, chosen)
        else:
            chosen = (masked_logits.detach() + noise.gumbel[k]).argmax(dim=-1, keepdim=True)
            is_argmax = chosen == best
            at_end = is_argmax | (noise.uniform[k].unsqueeze(-1) < HEUN_END_PROBABILITY)
            prob = probs.gather(-1, chosen)
            weight = with_value(prob, torch.where(at_end, prob, HEUN_THIRD * prob))
        available = available.scatter(-1, chosen, False)
        weights.append(weight)
        experts.append(chosen)
    return torch.cat(weights, dim=-1), torch.cat(experts, dim=-1)


RouterEstimator = Callable[[torch.Tensor, int, float, RoutingNoise | None], tuple[torch.Tensor, torch.Tensor]]

ROUTER_ESTIMATORS: dict[str, RouterEstimator] = {
    "sparsemixer_v2": sparsemixer_v2,
}
"""`config.router_estimator` -> `(router_logits, top_k, jitter_eps, noise) -> (weights, experts)`; no noise means
inference."""


def route(
    router_logits: torch.Tensor,
    top_k: int,
    jitter_eps: float,
    *,
    estimator: str = "sparsemixer_v2",
    training: bool,
    noise: RoutingNoise | None = None,
) -> Routing:
    """Choose `top_k` experts per token, in float32 (float64 for float64 logits) whatever the model's precision.

    Args:
        router_logits: z, `[T, E]`.
        top_k: experts per token, K <= E.
        jitter_eps: r, the width of the keep set; 0 keeps exact ties only, so that training routes greedily.
        estimator: a key of `ROUTER_ESTIMATORS`.
        training: sample the experts and estimate the router's gradient; otherwise take the best ones.
        noise: the draws to sample with in training; by default fresh ones from torch's generator.

    Returns:
        `Routing` with `weights` and `experts`, both `[T, K]`.

    Raises:
        KeyError: `estimator` is not registered.
    """
    logits = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    if training and noise is None:
        noise = draw_noise(logits, top_k)
    return Routing(*ROUTER_ESTIMATORS[estimator](logits, top_k, jitter_eps, noise if training else None))


def jitter_input(hidden_states: torch.Tensor, input_jitter_noise: float) -> torch.Tensor:
    """`hidden_states` times U(1 - e, 1 + e), e = `input_jitter_noise`, drawn in float32; the input is left alone."""
    noise = torch.empty_like(hidden_states, dtype=torch.float32)
    noise.uniform_(1 - input_jitter_noise, 1 + input_jitter_noise)
    return (hidden_states * noise).to(hidden_states.dtype)
