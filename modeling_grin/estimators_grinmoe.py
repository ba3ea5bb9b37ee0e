"""Estimators beside those of the paper: controls, references and peers, each a function and a record.

Those that draw experts share the forward pass of `sparsemixer_v2_paper`, weights c p_D of MaskedSoftmax, so that they
differ from it in their gradients alone; `gshard_sampled` has GShard's weights. p is MaskedSoftmax(z) over the experts
that are left to a choice. Shapes: T tokens, E experts, K = top_k.
"""

import torch

from .routing_grinmoe import (
    HEUN_POINT,
    HEUN_STAR_END_PROBABILITY,
    MID_POINT,
    ROUTER_ESTIMATORS,
    Choices,
    Mixture,
    Noise,
    Routing,
    TokenKeys,
    best_experts,
    choose,
    draw_noise,
    keep_set,
    router_estimator,
    shares,
    with_value,
)

REPLAYED = 1e4  # in place of the infinite noise of a replayed choice: a softmax of it is one-hot, and no NaN


def straight_through(gradient: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, noise: Noise) -> Routing:
    """Mix `experts` by `weights`, both `[T, K]`, while the router gets the gradient of `gradient` `[T, E]` for all."""
    if noise is None:
        return Routing(weights, experts)
    top_k, learnt = experts.shape[-1], weights.detach()
    is_chosen = torch.zeros_like(gradient, dtype=torch.bool).scatter(-1, experts, True)
    others = is_chosen.sort(dim=-1, stable=True).indices[:, : gradient.shape[-1] - top_k]
    slots = torch.cat([experts, others], dim=-1)
    values = torch.cat([learnt, torch.zeros_like(others, dtype=learnt.dtype)], dim=-1)
    return Routing(weights, experts, Mixture(with_value(gradient.gather(-1, slots), values), slots, learnt))


@router_estimator("dense", sampled=False)
def dense(router_logits: torch.Tensor, top_k: int, jitter_eps: float, noise: Noise) -> Routing:
    """Straight-through over all experts, as in DenseMixer: the router gets the soft mixture's gradient.

    Forward, the top-k of softmax(z), not renormalised; backward, the router learns as if every expert had been mixed
    in with softmax(z)_i, for which training computes them all. The experts learn from the tokens that chose them.
    """
    probs = router_logits.softmax(dim=-1)
    experts = best_experts(probs, top_k, noise)
    return straight_through(probs, experts, probs.gather(-1, experts), noise)


@router_estimator("dense_shares", sampled=False, infers_as="gshard")
def dense_shares(router_logits: torch.Tensor, top_k: int, jitter_eps: float, noise: Noise) -> Routing:
    """DenseMixer with `norm_topk_prob`: `dense` over the sum of the chosen, so that the forward pass is `gshard`'s."""
    probs = router_logits.softmax(dim=-1)
    experts = best_experts(probs, top_k, noise)
    chosen = probs.gather(-1, experts)
    total = chosen.detach().sum(dim=-1, keepdim=True) if top_k > 1 else 1.0
    return straight_through(probs / total, experts, shares(chosen), noise)


@router_estimator("gshard_sampled", end_probability=1.0, infers_as="gshard")
def gshard_sampled(router_logits: torch.Tensor, top_k: int, jitter_eps: float, noise: Noise) -> Routing:
    """The control of A.4: experts drawn by MaskedSoftmax, with the weights and the gradient of `gshard`."""
    experts = choose(router_logits, top_k, jitter_eps, noise, 1.0, argmax_exception=False).experts
    return Routing(shares(router_logits.softmax(dim=-1).gather(-1, experts)), experts)


@router_estimator("euler", end_probability=1.0, equation=7, infers_as="sparsemixer_v2", in_kernel=True)
def euler(router_logits: torch.Tensor, top_k: int, jitter_eps: float, noise: Noise) -> Routing:
    """Equation 7 by Euler's rule: f' at the end of the ray, whatever is drawn, so that c = 1."""
    choices = choose(router_logits, top_k, jitter_eps, noise, 1.0, argmax_exception=False)
    return Routing(choices.probs, choices.experts)


@router_estimator("midpoint", end_probability=0.0, equation=7, infers_as="sparsemixer_v2", in_kernel=True)
def midpoint(
    router_logits: torch.Tensor, top_k: int, jitter_eps: float, noise: Noise, *, argmax_exception: bool = True
) -> Routing:
    """Equation 7 by the mid-point rule: f' in the middle of the ray, unless D is the argmax."""
    experts, probs, at_end = choose(router_logits, top_k, jitter_eps, noise, 0.0, argmax_exception)
    if noise is None:
        return Routing(probs, experts)
    weights = with_value(probs, torch.where(at_end, probs, MID_POINT * probs))
    return Routing(weights, experts, Mixture(weights, experts, probs.detach()))


@router_estimator("joint_ray", end_probability=HEUN_STAR_END_PROBABILITY, infers_as="sparsemixer_v2", in_kernel=True)
def joint_ray(router_logits: torch.Tensor, top_k: int, jitter_eps: float, noise: Noise) -> Routing:
    """Equation 4 for all K choices at once; the reference without bias for f of degree 3, and without an exception.

    With y = sum_k p_k Expert_k(x) and S = sum_k log p_k, the log-probability of the ordered choice,

        grad E f(y) = E[f'(y) . sum_k Expert_k dp_k] + E[(f(y) - f(0)) dS],

    and Heun's rule takes the difference along the ray to y. One B moves all outputs together: at the end (5/8) a
    weight gets 8/5 dp_k + 2/5 p_k dS, at the first third 2 p_k dS. Algorithm 3, which adds up K rays, lacks what the
    earlier choices do to the later ones. An expert learns at the end of the ray alone, 8/5 p_k, which has no bias.
    """
    choices = choose(router_logits, top_k, jitter_eps, noise, HEUN_STAR_END_PROBABILITY, argmax_exception=False)
    probs, experts = choices.probs, choices.experts
    if noise is None:
        return Routing(probs, experts)
    at_end = choices.at_end[:, :1]  # one B for all choices
    own, smallest = 1 / HEUN_STAR_END_PROBABILITY, torch.finfo(probs.dtype).tiny  # a replayed expert may have p = 0
    log_prob = probs.clamp(min=smallest).log().sum(dim=-1, keepdim=True)
    constants = probs.detach()
    gradient = torch.where(at_end, own * probs + (2 - own) * constants * log_prob, 2 * constants * log_prob)
    weights = with_value(gradient, torch.where(at_end, probs, HEUN_POINT * probs))
    return Routing(weights, experts, Mixture(weights, experts, torch.where(at_end, own * constants, 0.0)))


def masked_logits(router_logits: torch.Tensor, experts: torch.Tensor, k: int, jitter_eps: float) -> torch.Tensor:
    """The logits that choice k of `experts` `[T, K]` was drawn from, -inf where an expert was not kept, `[T, E]`."""
    available = torch.ones_like(router_logits, dtype=torch.bool).scatter(-1, experts[:, :k], False)
    kept = keep_set(router_logits, available, jitter_eps).scatter(
        -1, experts[:, k : k + 1], True
    )  # it may be replayed
    return router_logits.masked_fill(~kept, -torch.inf)


def one_hot(choices: Choices, k: int, like: torch.Tensor) -> torch.Tensor:
    """Choice k as rows of `[T, E]`."""
    return torch.zeros_like(like).scatter(-1, choices.experts[:, k : k + 1], 1.0)


@router_estimator("reinmax", end_probability=1.0, equation=7, infers_as="sparsemixer_v2")
def reinmax(router_logits: torch.Tensor, top_k: int, jitter_eps: float, noise: Noise) -> Routing:
    """ReinMax (arXiv 2304.08612) for Equation 7, exact for f of degree 2; computes every expert.

    The differences f(D) - f(i) between the drawn expert and another are Heun's second-order rule, the mean of f' at
    both. Its `2 p_1 - p / 2` is the gradient, p_1 a softmax with the value (onehot(D) + p) / 2; outputs are p Expert.
    """
    choices = choose(router_logits, top_k, jitter_eps, noise, 1.0, argmax_exception=False)
    gradient = torch.zeros_like(router_logits)
    for k in range(top_k):
        logits = masked_logits(router_logits, choices.experts, k, jitter_eps)
        probs = logits.softmax(dim=-1)
        middle = (one_hot(choices, k, probs) + probs.detach()) / 2
        change = router_logits - router_logits.detach()  # zero, with z's gradient
        between = (middle.log() + change).softmax(dim=-1)
        gradient = gradient + probs.detach() * (2 * between - probs / 2)
    return straight_through(gradient, choices.experts, choices.probs, noise)


@router_estimator("gumbel_straight_through", infers_as="sparsemixer_v2")
def gumbel_straight_through(router_logits: torch.Tensor, top_k: int, jitter_eps: float, noise: Noise) -> Routing:
    """Straight-through Gumbel-softmax (arXiv 1611.01144), temperature 1: the gradient of softmax(z + gumbel).

    That gradient depends on the noise beyond the drawn expert, so that the laboratory cannot list it. Computes every
    expert; a replayed choice, whose noise is unknown, leaves no gradient.
    """
    drawn = noise
    if isinstance(drawn, TokenKeys):
        drawn = None if drawn.keys is None else draw_noise(router_logits, top_k, keys=drawn.keys)
    choices = choose(router_logits, top_k, jitter_eps, drawn, 1.0, argmax_exception=False)
    gradient = torch.zeros_like(router_logits)
    for k in range(top_k):
        logits = masked_logits(router_logits, choices.experts, k, jitter_eps)
        perturbed = logits if drawn is None else logits + drawn.gumbel[k].clamp(max=REPLAYED)
        gradient = gradient + logits.detach().softmax(dim=-1) * perturbed.softmax(dim=-1)
    return straight_through(gradient, choices.experts, choices.probs, noise)


__all__ = ["ROUTER_ESTIMATORS"]
