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

from ..routing_grinmoe import ROUTER_ESTIMATORS, Noise, RouterEstimator, RoutingNoise, TokenKeys, mix_outputs
from .gradients import mixture_of, normal_draws

HIDDEN = (4, 8, 16)  # widths of the populations
STEP = 0.1  # of the differences, relative to the router's weights; shorter ones are noisier
DRAWS = 4  # of the sampled estimators, for each token
WIDTHS = (0.01, 0.03, 0.1, 0.3)
LOGITS = (1.0, 3.0, 10.0)
FIGURES = ("cosine", "length", "ceiling")


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
class Population:
    """Tokens, random experts, a router, and targets that another router makes of the same experts."""

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
        mixture = mixture_of(estimator(self.tokens @ router.T, top_k, eps, noise))
        slots = mixture.experts.unsqueeze(-1).expand(-1, -1, self.outputs.shape[-1])
        return (mix_outputs(self.outputs.gather(1, slots), mixture) - self.targets).square().sum(-1) / 2


def make_population(num_experts: int, top_k: int, num_tokens: int, hidden: int, seed: int) -> Population:
    """Draw a population; experts are tanh layers."""
    normal = normal_draws(seed)
    tokens, experts = normal(num_tokens, hidden), normal(hidden, num_experts * hidden) / math.sqrt(hidden)
    outputs = torch.tanh(tokens @ experts).reshape(num_tokens, num_experts, hidden)
    chosen = (tokens @ normal(num_experts, hidden).T).topk(top_k).indices
    targets = outputs.gather(1, chosen.unsqueeze(-1).expand(-1, -1, hidden)).sum(dim=1)
    return Population(tokens, outputs, targets, normal(num_experts, hidden) / math.sqrt(hidden))


@torch.no_grad()
def deployed_gradient(population: Population, estimator: RouterEstimator, top_k: int, eps: float) -> torch.Tensor:
    """Central differences of the deployed loss by the router's weights, for two halves of the tokens, `[2, E, H]`."""
    router = population.router
    gradient, step = torch.zeros(2, *router.shape, dtype=torch.float64), STEP * router.std().item()
    for index in range(router.numel()):
        change = torch.zeros_like(router)
        change.view(-1)[index] = step
        up, down = (population.losses(router + sign * change, estimator, top_k, eps, None) for sign in (1, -1))
        gradient.view(2, -1)[:, index] = ((up - down) / (2 * step)).reshape(2, -1).mean(dim=1)
    return gradient


def mean_estimate(population: Population, estimator: RouterEstimator, top_k: int, eps: float) -> torch.Tensor:
    """The estimator's gradient by the router's weights, mean over the tokens and `DRAWS` draws, `[E, H]`."""
    router, generator = population.router.clone().requires_grad_(), torch.Generator().manual_seed(0)
    total = torch.zeros((), dtype=torch.float64)
    for _ in range(DRAWS if estimator.sampled else 1):
        keys = torch.randint(-(2**62), 2**62, population.tokens.shape[:1], generator=generator)
        noise = TokenKeys(keys if estimator.sampled else None)
        total = total + population.losses(router, estimator, top_k, eps, noise).mean()
    (gradient,) = torch.autograd.grad(total / (DRAWS if estimator.sampled else 1), router)
    return gradient


def compare_with_deployed(
    top_k: int, jitter_eps: float, *, num_experts: int = 8, num_tokens: int = 16_000, populations: int = 6
) -> Iterator[dict]:
    """Every estimator against the loss of its own inference, over populations of the widths `HIDDEN` in turn.

    Yields:
        A row for each estimator: `cosine` and `length` of the mean estimate relative to the deployed gradient, and
        `ceiling`, the cosine that the scatter between halves of the tokens would leave a perfect estimate. Medians
        over the populations, with `_low` and `_high` the smallest and largest.
    """
    drawn = [make_population(num_experts, top_k, num_tokens, HIDDEN[seed % len(HIDDEN)], seed)
             for seed in range(populations)]  # fmt: skip
    known: dict[str, list[torch.Tensor]] = {}
    for name, estimator in ROUTER_ESTIMATORS.items():
        if top_k > (estimator.max_top_k or top_k):
            continue
        rule, figures = estimator.infers_as or name, []
        if rule not in known:
            known[rule] = [deployed_gradient(one, ROUTER_ESTIMATORS[rule], top_k, jitter_eps).flatten(1)
                           for one in drawn]  # fmt: skip
        for population, halves in zip(drawn, known[rule], strict=True):
            estimate, whole = mean_estimate(population, estimator, top_k, jitter_eps).flatten(), halves.mean(dim=0)
            between = torch.cosine_similarity(halves[0], halves[1], dim=0).clamp(min=0)
            ceiling = (2 * between / (1 + between)).sqrt()
            figures.append((torch.cosine_similarity(estimate, whole, dim=0), estimate.norm() / whole.norm(), ceiling))
        values = torch.tensor(figures)
        spread = {"": values.quantile(0.5, dim=0), "_low": values.amin(dim=0), "_high": values.amax(dim=0)}
        yield {
            "top_k": top_k,
            "jitter_eps": jitter_eps,
            "estimator": name,
            "inference": rule,
            **{
                f"{figure}{suffix}": row[column].item()
                for column, figure in enumerate(FIGURES)
                for suffix, row in spread.items()
            },
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
