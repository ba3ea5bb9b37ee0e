"""Routing: the experts of each token, their weights, and the gradient of the router.

Read beside Appendix A of "GRIN: GRadient-INformed MoE" (arXiv 2409.12136). Shapes: T tokens, E experts, K = top_k.

| here                        | paper                                                                     |
| --------------------------- | ------------------------------------------------------------------------- |
| `router_logits`             | z, `[T, E]`; `top_k` is K, `best` in `keep_set` is z*                     |
| `jitter_eps`                | r of Equation 2, `router_jitter_noise` in configs                         |
| `kept`                      | delta_i of Equation 2: expert i is in the keep set                        |
| `probs`                     | p = MaskedSoftmax(z), Equation 2                                          |
| `expert`                    | D, the expert drawn from p                                                |
| `expert == best`            | delta_D of Algorithms 1 and 2: D is the argmax                            |
| `uniform < end_probability` | B, a Bernoulli draw                                                       |
| `at_end`                    | max(delta_D, B): f' is taken at the end of the ray                        |
| c in docstrings             | the scale of the forward pass, (1 + 2 max(delta_D, B)) / 3 in Algorithm 1 |
| `Routing.weights`           | c p_D. The paper's h = p_D Expert_D(x) and y = c h are made by the layer  |
| f, w                        | loss as a function of the layer's output; an expert's weights             |
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .gpu_kernels_grinmoe import choose as choose_in_kernel
from .gpu_kernels_grinmoe import jitter as jitter_in_kernel
from .gpu_kernels_grinmoe import use_kernels
from .noise_grinmoe import random_keys, uniform

# Heun's third-order rule evaluates f' at the end of the ray with weight 1/4 and at its first third with weight 3/4
# (below Equation 5): B ~ Bernoulli(1/4) chooses between the two points.
HEUN_END_PROBABILITY = 1 / 4
HEUN_POINT = 1 / 3
# The authors' code rounds the third to four digits; checkpoints were trained with it.
HEUN_POINT_IN_CODE = 0.3333
# Equation 4's own term adds f' at the end of the ray once more: weights 5/4 and 3/4, so B ~ Bernoulli(5/8) and a
# factor of 2 (Equation 6).
HEUN_STAR_END_PROBABILITY = 5 / 8
# The mid-point rule of SparseMixer (arXiv 2310.00811), likewise with the term of Equation 4: B ~ Bernoulli(1/2).
MID_POINT = 1 / 2
MID_POINT_END_PROBABILITY = 1 / 2


class RoutingNoise(NamedTuple):
    """The random draws of one routing decision, float32, so that low-precision logits are not sampled with bias."""

    gumbel: torch.Tensor
    """Standard Gumbel noise `[K, T, E]`: argmax(z + gumbel) is a draw from softmax(z)."""
    uniform: torch.Tensor
    """Uniform noise in [0, 1) `[K, T]`: B = [uniform < P(B = 1)]."""


class TokenKeys(NamedTuple):
    """Noise that is still to be drawn; GPU kernels never hold it in memory."""

    keys: torch.Tensor | None
    """int64 `[T]`; None: none is drawn, although this is training, so that every choice is the best expert."""


Noise = RoutingNoise | TokenKeys | None


class Mixture(NamedTuple):
    """The sum over experts of a layer whose gradients differ from the plain `sum_k weights_k Expert_k(x)`.

    Its value is `sum_s weights_s Expert_s(x)` over S slots. The router gets the gradient of `weights`; the experts get
    the gradient that `sum_s expert_weights_s Expert_s(x)` over the first L slots would give them. The experts of other
    slots have no backward pass.
    """

    weights: torch.Tensor
    """`[T, S]`."""
    experts: torch.Tensor
    """`[T, S]`, int64."""
    expert_weights: torch.Tensor
    """`[T, L]`, no gradient; L from 1 to S."""


class Routing(NamedTuple):
    """One layer's routing decision; experts, statistics and losses all read this object."""

    weights: torch.Tensor
    """Factors of the chosen experts' outputs, `[T, K]`, float32 (float64 for float64 logits)."""
    experts: torch.Tensor
    """The chosen experts, `[T, K]`, int64."""
    mixture: Mixture | None = None
    """In training, what to compute for the estimators whose gradients the weighted sum of K experts lacks."""


@dataclass(frozen=True)
class RouterEstimator:
    """An estimator of the router's gradient, and what others have to know about it."""

    function: Callable[..., Routing]
    """`(router_logits [T, E], top_k, jitter_eps, noise) -> Routing`; no noise means inference."""
    sampled: bool = True
    """Whether training draws experts; otherwise no noise is made."""
    temperature: float = 1.0
    """Of the MaskedSoftmax that experts are drawn from."""
    end_probability: float | None = None
    """P(B = 1), 1.0 without a B. None: its draws cannot be listed, so that the laboratory refuses it."""
    equation: int = 4
    """The objective whose gradient it estimates."""
    max_top_k: int | None = None
    """Most choices that it is defined for."""
    infers_as: str | None = None
    """The estimator whose rule inference follows, if it is another's."""
    in_kernel: bool = False
    """Whether it uses the logits in `choose` alone, which takes any precision where a GPU kernel chooses."""
    travels: bool = False
    """Whether `save_pretrained` copies the function's file to the checkpoint."""

    def __call__(self, *args: Any, **kwargs: Any) -> Routing:
        return self.function(*args, **kwargs)


ROUTER_ESTIMATORS: dict[str, RouterEstimator] = {}
"""`config.router_estimator` -> the estimator."""


def router_estimator(name: str, **facts: Any) -> Callable[[Callable[..., Routing]], Callable[..., Routing]]:
    """Register a function under `name` for configs; `facts` are the fields of `RouterEstimator`."""

    def register(function: Callable[..., Routing]) -> Callable[..., Routing]:
        ROUTER_ESTIMATORS[name] = RouterEstimator(function, **facts)
        return function

    return register


def find_estimator(name: str) -> RouterEstimator:
    """The estimator of that name.

    Raises:
        ValueError: nobody registered it.
    """
    if name not in ROUTER_ESTIMATORS:
        raise ValueError(
            f"router estimator {name!r} is unknown; use one of {sorted(ROUTER_ESTIMATORS)}, as in "
            "from_pretrained(..., router_estimator='gshard'), or run the code that registers it first. A checkpoint "
            "that carries this code, as router_estimator.py, runs it with trust_remote_code=True"
        )
    return ROUTER_ESTIMATORS[name]


def inference_rule(config: Any) -> str:
    """The estimator by whose rule a model infers, for those who compute it elsewhere."""
    return find_estimator(config.router_estimator).infers_as or config.router_estimator


def draw_noise(
    router_logits: torch.Tensor,
    top_k: int,
    generator: torch.Generator | None = None,
    *,
    keys: torch.Tensor | None = None,
) -> RoutingNoise:
    """Draw the noise that routing `router_logits` `[T, E]` to `top_k` experts needs, on the logits' device.

    Args:
        generator: where the tokens' keys come from; by default torch's own of that device.
        keys: int64 `[T]`: the noise is a function of them alone (`noise_grinmoe.py`).
    """
    num_tokens, num_experts = router_logits.shape
    if keys is None:
        keys = random_keys(num_tokens, router_logits.device, generator)
    draws = uniform(keys, top_k * (num_experts + 1)).reshape(num_tokens, top_k, num_experts + 1).transpose(0, 1)
    return RoutingNoise(gumbel=-draws[..., :-1].log().neg_().log_(), uniform=draws[..., -1])


def replay(router_logits: torch.Tensor, top_k: int, noise: Noise, experts: torch.Tensor) -> RoutingNoise:
    """The noise that makes choice k of each token fall on `experts` `[T, K]`; where they are -1, `noise` itself."""
    if isinstance(noise, TokenKeys) and noise.keys is not None:
        noise = draw_noise(router_logits, top_k, keys=noise.keys)
    if not isinstance(noise, RoutingNoise):  # greedy; in inference f' is always taken at the end of the ray, B = 1
        zero = router_logits.new_zeros((), dtype=torch.float32)
        draws = zero - 1 if noise is None else zero
        noise = RoutingNoise(zero.expand(top_k, *router_logits.shape), draws.expand(top_k, len(router_logits)))
    everyone = torch.arange(router_logits.shape[-1], device=router_logits.device)
    is_replayed = everyone == experts.to(everyone.device).t().unsqueeze(-1)  # [K, T, E]
    return RoutingNoise(noise.gumbel.masked_fill(is_replayed, torch.inf), noise.uniform)


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


class Choices(NamedTuple):
    """The K choices of the SparseMixer family."""

    experts: torch.Tensor
    """D, `[T, K]`."""
    probs: torch.Tensor
    """p_D, `[T, K]`, with the gradient of MaskedSoftmax."""
    at_end: torch.Tensor
    """max(delta_D, B), bool `[T, K]`: f' is taken at the end of the ray, and not at the rule's other point. If D is
    the argmax it always is, which makes the rule Euler's (above Equation 6)."""


def runs_in_kernel(router_logits: torch.Tensor, noise: Noise) -> bool:
    """Whether a GPU kernel chooses; it takes logits of any precision up to float32, and -inf among them."""
    return not isinstance(noise, RoutingNoise) and use_kernels(router_logits)


def choose(
    router_logits: torch.Tensor,
    top_k: int,
    jitter_eps: float,
    noise: Noise,
    end_probability: float,
    argmax_exception: bool,
) -> Choices:
    """Algorithm 3: K times, draw D from MaskedSoftmax over the experts that are left; take the best without noise.

    Args:
        end_probability: P(B = 1).
        argmax_exception: whether delta_D counts, as in all of the paper's algorithms, or only B does.
    """
    if runs_in_kernel(router_logits, noise):
        settings = top_k, jitter_eps, end_probability, argmax_exception
        return Choices(*choose_in_kernel(router_logits, getattr(noise, "keys", None), *settings))
    if isinstance(noise, TokenKeys):
        noise = None if noise.keys is None else draw_noise(router_logits, top_k, keys=noise.keys)
    available = torch.ones_like(router_logits, dtype=torch.bool)
    choices = []
    for k in range(top_k):
        kept = keep_set(router_logits, available, jitter_eps)
        if noise is not None:
            kept = kept | (noise.gumbel[k] == torch.inf)  # replayed
        masked_logits = router_logits.masked_fill(~kept, -torch.inf)
        probs = masked_logits.softmax(dim=-1)
        best = expert = masked_logits.argmax(dim=-1, keepdim=True)
        at_end = torch.ones_like(best, dtype=torch.bool)
        if noise is not None:
            expert = (masked_logits.detach() + noise.gumbel[k]).argmax(dim=-1, keepdim=True)
            at_end = noise.uniform[k].unsqueeze(-1) < end_probability
            if argmax_exception:
                at_end = at_end | (expert == best)
        available = available.scatter(-1, expert, False)
        choices.append((expert, probs.gather(-1, expert), at_end))
    return Choices(*(torch.cat(column, dim=-1) for column in zip(*choices, strict=True)))


@router_estimator("sparsemixer_v2", end_probability=HEUN_END_PROBABILITY, equation=7, in_kernel=True)
def sparsemixer_v2(
    router_logits: torch.Tensor,
    top_k: int,
    jitter_eps: float,
    noise: Noise,
    *,
    argmax_exception: bool = True,
) -> Routing:
    """SparseMixer-v2 as the authors' code has it (Algorithms 1 and 3, Equation 8).

    In training each of the K choices samples an expert D from MaskedSoftmax(z) without replacement, and its weight
    is `c p_D` (c = 1 at the end of the ray, 1/3 else) with the gradient of p_D alone: for a loss gradient g with
    respect to the weight, the router gets dz = g p_D (onehot(D) - p), and nothing through the keep set, c or the
    sampling. The expert's output is multiplied by the same weight, so c also scales its gradient.

    In inference (no noise) each choice is the best expert that is left, and the weights are not renormalised: they
    are both 1 except in near-ties.
    """
    experts, probs, at_end = choose(router_logits, top_k, jitter_eps, noise, HEUN_END_PROBABILITY, argmax_exception)
    if noise is None:
        return Routing(probs, experts)
    return Routing(with_value(probs, torch.where(at_end, probs, HEUN_POINT_IN_CODE * probs)), experts)


@router_estimator(
    "sparsemixer_v2_paper",
    end_probability=HEUN_END_PROBABILITY,
    equation=7,
    infers_as="sparsemixer_v2",
    in_kernel=True,
)
def sparsemixer_v2_paper(
    router_logits: torch.Tensor,
    top_k: int,
    jitter_eps: float,
    noise: Noise,
    *,
    argmax_exception: bool = True,
) -> Routing:
    """SparseMixer-v2 as Algorithm 1 has it, `y = h + detach(c h - h)`: the expert gets the gradient of h, unscaled."""
    experts, probs, at_end = choose(router_logits, top_k, jitter_eps, noise, HEUN_END_PROBABILITY, argmax_exception)
    if noise is None:
        return Routing(probs, experts)
    weights = with_value(probs, torch.where(at_end, probs, HEUN_POINT * probs))
    return Routing(weights, experts, Mixture(weights, experts, probs.detach()))


@router_estimator("sparsemixer_v2_star", temperature=2.0, end_probability=HEUN_STAR_END_PROBABILITY, in_kernel=True)
def sparsemixer_v2_star(
    router_logits: torch.Tensor,
    top_k: int,
    jitter_eps: float,
    noise: Noise,
    *,
    argmax_exception: bool = True,
) -> Routing:
    """SparseMixer-v2* (Algorithm 2, Equation 6), the estimator of Equation 4: `y = 2 h + detach(c h - 2 h)`.

    The temperature of 2 in Algorithm 2, line 1 is kept in inference, where the paper's text has Equation 3: the model
    that was trained is the one that runs. The keep set compares ratios of logits and does not notice it.
    """
    experts, probs, at_end = choose(
        router_logits / 2, top_k, jitter_eps, noise, HEUN_STAR_END_PROBABILITY, argmax_exception
    )
    if noise is None:
        return Routing(probs, experts)
    weights = with_value(2 * probs, torch.where(at_end, probs, HEUN_POINT * probs))
    return Routing(weights, experts, Mixture(weights, experts, 2 * probs.detach()))


@router_estimator(
    "sparsemixer",
    end_probability=MID_POINT_END_PROBABILITY,
    max_top_k=1,
    infers_as="sparsemixer_v2",
    in_kernel=True,
)
def sparsemixer(
    router_logits: torch.Tensor,
    top_k: int,
    jitter_eps: float,
    noise: Noise,
    *,
    argmax_exception: bool = True,
) -> Routing:
    """SparseMixer (arXiv 2310.00811), top-1: the mid-point rule for Equation 4, scale 1 or 1/2, gradient doubled."""
    choices = choose(router_logits, top_k, jitter_eps, noise, MID_POINT_END_PROBABILITY, argmax_exception)
    probs = choices.probs
    if noise is None:
        return Routing(probs, choices.experts)
    value = torch.where(choices.at_end, probs, MID_POINT * probs)
    return Routing(with_value(2 * probs, value), choices.experts)


def best_experts(probs: torch.Tensor, top_k: int, noise: Noise) -> torch.Tensor:
    """The experts `[T, K]` of the largest `probs` `[T, E]`, or those that `noise` replays."""
    experts = probs.topk(top_k, dim=-1).indices
    if not isinstance(noise, RoutingNoise):
        return experts
    is_replayed = noise.gumbel == torch.inf  # [K, T, E]
    return torch.where(is_replayed.any(dim=-1), is_replayed.int().argmax(dim=-1), experts.t()).t()


@router_estimator("gshard", sampled=False)
def gshard(router_logits: torch.Tensor, top_k: int, jitter_eps: float, noise: Noise) -> Routing:
    """The control recipe of the paper's Figure 2: top-k of softmax(z), gradient through the gate weights alone.

    One expert is weighted with softmax(z)_i (Switch), several with their shares of the sum (GShard). Training and
    inference are alike; the keep set and the noise have no part in it.
    """
    probs = router_logits.softmax(dim=-1)
    experts = best_experts(probs, top_k, noise)
    return Routing(shares(probs.gather(-1, experts)), experts)


def shares(weights: torch.Tensor) -> torch.Tensor:
    """GShard's weights `[T, K]`: shares of their sum, unless there is one alone."""
    return weights if weights.shape[-1] == 1 else weights / weights.sum(dim=-1, keepdim=True)


def noise_settings(config: Any) -> dict[str, Any]:
    """Fields of a config that make equal passes in training differ, and values that make them alike."""
    settings: dict[str, Any] = {}
    if config.router_sampling and find_estimator(config.router_estimator).sampled:
        settings["router_sampling"] = False
    if config.input_jitter_noise > 0:
        settings["input_jitter_noise"] = 0
    return settings


def apply_bias(
    router_logits: torch.Tensor, bias: torch.Tensor | None, config: Any, replayed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Let the selection bias of loss-free balancing (arXiv 2408.15664) take part in the choice of experts.

    An estimator that draws experts draws them from z + b, so that p stays the distribution that it takes derivatives
    of. Others take the top-k of softmax(z) + b (Equation 3 there), weighted by softmax(z) alone.

    Args:
        router_logits: z, `[T, E]`.
        bias: b, float32 `[E]`; None: nothing changes.
        replayed: as in `route`.

    Returns:
        The logits to route with, and the experts to take, if they are known.
    """
    if bias is None:
        return router_logits, replayed
    if find_estimator(config.router_estimator).sampled:
        return router_logits + bias, replayed
    scores = router_logits.detach().softmax(dim=-1, dtype=torch.float32) + bias
    chosen = scores.topk(config.num_experts_per_tok, dim=-1).indices
    return router_logits, chosen if replayed is None else torch.where(replayed < 0, chosen, replayed)


def route(
    router_logits: torch.Tensor,
    top_k: int,
    jitter_eps: float,
    *,
    estimator: str = "sparsemixer_v2",
    training: bool,
    sampling: bool = True,
    noise: RoutingNoise | None = None,
    keys: torch.Tensor | None = None,
    replayed: torch.Tensor | None = None,
) -> Routing:
    """Choose `top_k` experts per token, in float32 (float64 for float64 logits) whatever the model's precision.

    Args:
        router_logits: z, `[T, E]`.
        top_k: experts per token, K <= E.
        jitter_eps: r, the width of the keep set; at 0 only exact ties are kept, and sampling has no choice.
        estimator: a key of `ROUTER_ESTIMATORS`.
        training: sample the experts and estimate the router's gradient; otherwise take the best ones.
        sampling: whether training samples, or takes the best experts with the estimator's gradient at them.
        noise: the draws to sample with in training; by default made from `keys`.
        keys: int64 `[T]`, the tokens' keys (`noise_grinmoe.py`); by default random ones from torch's generator.
        replayed: int64 `[T, K]`, the experts to choose, whatever the logits say; -1: choose. Weights and gradients
            follow from the logits, as if the replayed experts were in the keep set.

    Returns:
        `Routing` with `weights` and `experts`, both `[T, K]`. A token's experts are distinct. A logit of -inf rules an
        expert out: it is chosen only where fewer than K others are left, with weight 0 and without a gradient.

    Raises:
        ValueError: `estimator` is not registered, or not defined for `top_k` of that many experts.
    """
    num_experts, record = router_logits.shape[-1], find_estimator(estimator)
    if not 1 <= top_k <= min(record.max_top_k or num_experts, num_experts):
        raise ValueError(f"router estimator {estimator!r} is not defined for top_k={top_k} of {num_experts} experts")
    drawn: Noise = noise
    if not training:
        drawn = None
    elif not sampling or not record.sampled:
        drawn = TokenKeys(None)
    elif noise is None:
        drawn = TokenKeys(random_keys(len(router_logits), router_logits.device) if keys is None else keys)
    if replayed is not None:
        drawn = replay(router_logits, top_k, drawn, replayed)
    if record.in_kernel and runs_in_kernel(router_logits, drawn):
        return record(router_logits, top_k, jitter_eps, drawn)
    logits = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    # If all logits are -inf, a softmax is NaN, and an argmax is the first expert even if it is already taken.
    finite_logits = logits.clamp(min=torch.finfo(logits.dtype).min)
    routing = record(finite_logits, top_k, jitter_eps, drawn)
    return drop_impossible(routing, logits == -torch.inf)


def drop_impossible(routing: Routing, impossible: torch.Tensor) -> Routing:
    """`routing` with weight 0 for the experts that `impossible`, bool `[T, E]`, marks."""

    def drop(weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        return weights.masked_fill(impossible.gather(-1, experts), 0.0)

    weights, experts, mixture = routing
    if mixture is not None:
        learning = mixture.experts[:, : mixture.expert_weights.shape[1]]
        mixture = Mixture(
            drop(mixture.weights, mixture.experts), mixture.experts, drop(mixture.expert_weights, learning)
        )
    return Routing(drop(weights, experts), experts, mixture)


def mix_outputs(outputs: torch.Tensor, mixture: Mixture) -> torch.Tensor:
    """Sum the outputs of the slots' experts, `[T, S, H]` -> `[T, H]`, with the gradients that `Mixture` promises."""
    value = (mixture.weights.to(outputs.dtype).unsqueeze(-1) * outputs.detach()).sum(dim=1)
    num_learning = mixture.expert_weights.shape[1]
    learnt = (mixture.expert_weights.to(outputs.dtype).unsqueeze(-1) * outputs[:, :num_learning]).sum(dim=1)
    return value + (learnt - learnt.detach())


def jitter_input(hidden_states: torch.Tensor, input_jitter_noise: float, keys: torch.Tensor) -> torch.Tensor:
    """`hidden_states` `[T, H]` times U(1 - e, 1 + e), e = `input_jitter_noise`, in float32; the input is left alone.

    Args:
        keys: int64 `[T]`, which decide the numbers.
    """
    if use_kernels(hidden_states):
        return jitter_in_kernel(hidden_states, input_jitter_noise, keys)
    return _JitterInput.apply(hidden_states, input_jitter_noise, keys)


JITTER_CHUNK_TOKENS = 256  # their noise fits in a CPU's cache


class _JitterInput(torch.autograd.Function):
    """Keeps the keys for the backward pass instead of the noise, which is as large as the input or twice as large."""

    @staticmethod
    def forward(ctx, hidden_states, input_jitter_noise, keys):
        ctx.save_for_backward(keys)
        ctx.input_jitter_noise = input_jitter_noise
        output = torch.empty_like(hidden_states)
        chunks = (tensor.split(JITTER_CHUNK_TOKENS) for tensor in (hidden_states, keys, output))
        for inputs, own_keys, out in zip(*chunks, strict=True):
            noise = uniform(own_keys, inputs.shape[-1]).mul_(2 * input_jitter_noise).add_(1 - input_jitter_noise)
            out.copy_(inputs * noise)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        return _JitterInput.apply(grad_output, ctx.input_jitter_noise, *ctx.saved_tensors), None, None
