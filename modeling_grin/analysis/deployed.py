"""Compare an estimator's gradient with the gradient of the deployed model's loss.

Inference takes the best experts, so that the deployed loss jumps where two logits cross, and its gradient sits on
these boundaries. Over a population of tokens that loss has a gradient all the same, which finite differences find.
Each estimator is held to the loss of its own inference rule. Shapes: T tokens, E experts, K top-k, H hidden size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

from ..routing_grinmoe import (
    ROUTER_ESTIMATORS,
    Mixture,
    Noise,
    RouterEstimator,
    Routing,
    RoutingNoise,
    TokenKeys,
    mix_outputs,
)

HIDDEN, STEP = 8, 0.1  # of the differences, relative to the router's weights; shorter ones are noisier
WIDTHS = (0.01, 0.03, 0.1, 0.3)
LOGITS = (1.0, 3.0, 10.0)


def deployed_share(jitter_eps: float, logit: float) -> float:
    """The length of Equation 7's gradient relative to the deployed loss's, for two logits of mean `logit` near a tie.

    With a linear loss and the difference d of the logits spread evenly around 0, the deployed gradient is the density
    at d = 0. The estimator spreads it over the keep set, |d| <= D = 2 r z / (1 - r): the integral of p (1 - p) is
    tanh(D / 2), and Equation 7, which misses f's own dependence on p, halves it.
    """
    return math.tanh(jitter_eps * logit / (1 - jitter_eps)) / 2


def measured_share(estimator: RouterEstimator, jitter_eps: float, logit: float, points: int = 20_001) -> float:
    """The same by summing an estimator's expected gradient over a grid of d, with outputs 1 and 0 and f(y) = y."""
    width = 4 * jitter_eps * logit / (1 - jitter_eps)  # twice D
    d = torch.linspace(-width, width, points, dtype=torch.float64)
    z = torch.stack([logit + d / 2, logit - d / 2], dim=-1).requires_grad_()
    forced = torch.tensor([1e6, 0.0], dtype=torch.float64).expand(1, points, 2)  # expert 0, whose output is 1
    routing = estimator(z, 1, jitter_eps, RoutingNoise(forced, torch.zeros(1, points, dtype=torch.float64)))
    is_drawn = routing.experts[:, 0] == 0  # or the keep set has the other alone
    (dz,) = torch.autograd.grad(routing.weights.sum(), z)
    chance = is_drawn * routing.weights[:, 0].detach()  # p, at the end of the ray
    return (chance * (dz[:, 0] - dz[:, 1]) / 2).sum().item() * (d[1] - d[0]).item()


@dataclass(frozen=True)
class World:
    """A population of tokens, random experts, a router, and targets that another router makes of the same experts."""

    tokens: torch.Tensor
    """`[T, H]`."""
    outputs: torch.Tensor
    """Of all experts, `[T, E, H]`."""
    targets: torch.Tensor
    """`[T, H]`."""
    router: torch.Tensor
    """`[E, H]`."""

    def losses(self, router: torch.Tensor, estimator: RouterEstimator, top_k: int, eps: float, noise: Noise):
        """Half the squared distance to the targets, `[T]`."""
        routing: Routing = estimator(self.tokens @ router.T, top_k, eps, noise)
        mixture = routing.mixture or Mixture(routing.weights, routing.experts, routing.weights.detach())
        slots = mixture.experts.unsqueeze(-1).expand(-1, -1, HIDDEN)
        return (mix_outputs(self.outputs.gather(1, slots), mixture) - self.targets).square().sum(-1) / 2


def make_world(num_experts: int, top_k: int, num_tokens: int, seed: int) -> World:
    """Draw a world; experts are tanh layers."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    tokens, experts = normal(num_tokens, HIDDEN), normal(HIDDEN, num_experts * HIDDEN) / math.sqrt(HIDDEN)
    outputs = torch.tanh(tokens @ experts).reshape(num_tokens, num_experts, HIDDEN)
    chosen = (tokens @ normal(num_experts, HIDDEN).T).topk(top_k).indices
    targets = outputs.gather(1, chosen.unsqueeze(-1).expand(-1, -1, HIDDEN)).sum(dim=1)
    return World(tokens, outputs, targets, normal(num_experts, HIDDEN) / math.sqrt(HIDDEN))


@torch.no_grad()
def deployed_gradient(world: World, estimator: RouterEstimator, top_k: int, eps: float) -> torch.Tensor:
    """Central differences of the deployed loss by the router's weights, for two halves of the tokens, `[2, E, H]`."""
    gradient = torch.zeros(2, *world.router.shape, dtype=torch.float64)
    step = STEP * world.router.std().item()
    for index in range(world.router.numel()):
        change = torch.zeros_like(world.router)
        change.view(-1)[index] = step
        up, down = (world.losses(world.router + sign * change, estimator, top_k, eps, None) for sign in (1, -1))
        gradient.view(2, -1)[:, index] = ((up - down) / (2 * step)).reshape(2, -1).mean(dim=1)
    return gradient


def mean_estimate(world: World, estimator: RouterEstimator, top_k: int, eps: float, draws: int = 4) -> torch.Tensor:
    """The estimator's gradient by the router's weights, mean over the tokens and several draws, `[E, H]`."""
    router, generator = world.router.clone().requires_grad_(), torch.Generator().manual_seed(0)
    total = torch.zeros((), dtype=torch.float64)
    for _ in range(draws if estimator.sampled else 1):
        keys = torch.randint(-(2**62), 2**62, (len(world.tokens),), generator=generator) if estimator.sampled else None
        total = total + world.losses(router, estimator, top_k, eps, TokenKeys(keys)).mean()
    (gradient,) = torch.autograd.grad(total / (draws if estimator.sampled else 1), router)
    return gradient


def compare_with_deployed(
    top_k: int, jitter_eps: float, *, num_experts: int = 8, num_tokens: int = 40_000, seeds: int = 3
) -> Iterator[dict]:
    """Every estimator against the loss of its own inference: a row for each, medians over `seeds` worlds.

    Yields:
        `cosine` and `length` of the mean estimate relative to the deployed gradient, and `ceiling`, the cosine between
        the two halves of the tokens, which says how well the deployed gradient is known.
    """
    worlds = [make_world(num_experts, top_k, num_tokens, seed) for seed in range(seeds)]
    known: dict[tuple[str, int], torch.Tensor] = {}
    for name, estimator in ROUTER_ESTIMATORS.items():
        if top_k > (estimator.max_top_k or top_k):
            continue
        rule, figures = estimator.infers_as or name, []
        for number, world in enumerate(worlds):
            if (rule, number) not in known:
                known[rule, number] = deployed_gradient(world, ROUTER_ESTIMATORS[rule], top_k, jitter_eps).flatten(1)
            halves, estimate = known[rule, number], mean_estimate(world, estimator, top_k, jitter_eps).flatten()
            whole = halves.mean(dim=0)
            cosine = torch.cosine_similarity(estimate, whole, dim=0)
            figures.append(
                (cosine, estimate.norm() / whole.norm(), torch.cosine_similarity(halves[0], halves[1], dim=0))
            )
        medians = torch.tensor(figures).median(dim=0).values.tolist()
        yield {
            "top_k": top_k,
            "jitter_eps": jitter_eps,
            "estimator": name,
            "inference": rule,
            **dict(zip(("cosine", "length", "ceiling"), medians, strict=True)),
        }


def plot_share(path: str | Path) -> None:
    """The closed form against r, and the enumeration of `sparsemixer_v2` on it."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    grid = torch.logspace(-3, -0.2, 100).tolist()
    for logit in LOGITS:
        (line,) = axes.plot(grid, [deployed_share(r, logit) for r in grid], label=f"z = {logit:g}")
        points = [measured_share(ROUTER_ESTIMATORS["sparsemixer_v2"], r, logit) for r in WIDTHS]
        axes.plot(WIDTHS, points, "o", color=line.get_color())
    axes.axhline(0.5, color="gray", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="r, width of the keep set", ylabel="share of the deployed gradient")
    axes.set_title("v2's gradient: tanh(r z / (1 - r)) / 2, and points by enumeration", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
