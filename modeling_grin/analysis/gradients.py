"""How good a router-gradient estimator is: its bias and variance against the exact gradient, by enumeration.

A mixture-of-experts layer with one token: router logits z `[E]`, input x `[H]`, experts, and a loss f of the layer's
output. Training draws K experts in order and K points B, so every outcome can be listed with its probability, and both
an estimator's expectation and the gradient it estimates are sums instead of samples: float64, no Monte Carlo error.

The estimators are the ones that train (`ROUTER_ESTIMATORS` and `mix_outputs`), with the draws forced. How they draw is
in their records, which `check_record` holds against what they do.
Shapes: R outcomes, E experts, K = top_k, S slots of a mixture, H hidden size, P parameters of an expert.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch.func import jacrev, vmap

from ..routing_grinmoe import (
    ROUTER_ESTIMATORS,
    Mixture,
    Noise,
    RouterEstimator,
    Routing,
    RoutingNoise,
    TokenKeys,
    draw_noise,
    keep_set,
    mix_outputs,
)

Loss = Callable[[torch.Tensor], torch.Tensor]
"""f: layer outputs `[R, H]` -> losses `[R]`."""

FORCE = 1e6  # Gumbel noise that decides a draw
CHECKED_DRAWS = 2**15
STANDARD_ERRORS = 6  # that a frequency may be off: once in 10^9 for a right record


@dataclass(frozen=True, eq=False)
class Layer:
    """One token's view of a mixture-of-experts layer, float64."""

    router: torch.Tensor
    """`[E, H]`; z = router x."""
    expert_parameters: torch.Tensor
    """`[E, P]`: the flattened w1, w3 and transposed w2 of each SwiGLU expert, all `[F, H]`."""
    x: torch.Tensor
    """The layer's input, `[H]`."""

    @property
    def router_logits(self) -> torch.Tensor:
        """z, `[E]`."""
        return self.router @ self.x

    @staticmethod
    def expert(parameters: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """One expert's output `[H]` from its flat parameters `[P]`."""
        w1, w3, w2 = parameters.reshape(3, -1, x.shape[0])
        return (torch.nn.functional.silu(w1 @ x) * (w3 @ x)) @ w2

    @cache  # noqa: B019 - a layer is small, and many estimators ask
    def linearised(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The experts' outputs `[E, H]`, and their Jacobians by parameters `[E, H, P]` and by input `[E, H, H]`."""
        outputs = vmap(self.expert, in_dims=(0, None))(self.expert_parameters, self.x)
        by_parameters, by_input = vmap(jacrev(self.expert, argnums=(0, 1)), in_dims=(0, None))(
            self.expert_parameters, self.x
        )
        return outputs, by_parameters, by_input


def normal_draws(seed: int) -> Callable[..., torch.Tensor]:
    """A function of a shape that draws standard normal numbers, float64."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)


def random_layer(
    num_experts: int, *, hidden_size: int = 4, intermediate_size: int = 4, logit_scale: float = 1.0, seed: int = 0
) -> Layer:
    """A layer with normal weights whose router logits are `logit_scale` times a standard normal draw."""
    normal = normal_draws(seed)
    x, z = normal(hidden_size), logit_scale * normal(num_experts)
    router = normal(num_experts, hidden_size)
    router += torch.outer(z - router @ x, x) / (x @ x)  # so that router x = z
    return Layer(router, normal(num_experts, 3 * intermediate_size * hidden_size), x)


def direction(hidden_size: int, seed: int) -> torch.Tensor:
    """A random unit vector `[H]`."""
    a = normal_draws(seed)(hidden_size)
    return a / a.norm()


def polynomial_loss(coefficients: list[float], hidden_size: int = 4, seed: int = 1) -> Loss:
    """f(y) = sum_m coefficients[m] (a y)^(m + 1): along every ray a polynomial of that degree."""
    a = direction(hidden_size, seed)
    return lambda y: torch.stack([c * (y @ a) ** (m + 1) for m, c in enumerate(coefficients)]).sum(dim=0)


def curved_loss(curvature: float, hidden_size: int = 4, seed: int = 1) -> Loss:
    """f(y) = (exp(c a y) - 1) / c: slope 1 at the origin, curvature c relative to it; linear for c = 0."""
    a = direction(hidden_size, seed)
    return lambda y: torch.expm1(curvature * (y @ a)) / curvature if curvature else y @ a


@dataclass(frozen=True)
class Gradient:
    """A gradient in the three places that matter, each flat."""

    router_logits: torch.Tensor
    """`[E]`."""
    experts: torch.Tensor
    """`[E P]`."""
    input: torch.Tensor
    """`[H]`, through experts and router."""


def mixture_of(routing: Routing) -> Mixture:
    """Return the sum over experts that a layer computes for `routing`."""
    return routing.mixture or Mixture(routing.weights, routing.experts, routing.weights.detach())


def ordered_choices(
    z: torch.Tensor, top_k: int, jitter_eps: float, temperature: float
) -> Iterator[tuple[tuple[int, ...], tuple[torch.Tensor, ...]]]:
    """The ordered K-tuples of experts that can be drawn, each with its K conditional probabilities p_D."""

    def extend(taken: tuple[int, ...], probs: tuple[torch.Tensor, ...]):
        if len(taken) == top_k:
            yield taken, probs
            return
        available = torch.ones(1, len(z), dtype=torch.bool)
        available[0, list(taken)] = False
        kept = keep_set(z.detach()[None], available, jitter_eps)[0]
        p = (z / temperature).masked_fill(~kept, -torch.inf).softmax(dim=0)
        for expert in kept.nonzero().flatten().tolist():
            yield from extend((*taken, expert), (*probs, p[expert]))

    yield from extend((), ())


def exact_gradient(
    layer: Layer, loss: Loss, top_k: int, jitter_eps: float, *, equation: int = 4, temperature: float = 1.0
) -> Gradient:
    """The gradient of the expected loss, by summing over every ordered choice of experts.

    Args:
        equation: 4, the objective L = E_D f(sum_k p_k Expert_k(x)); or 7, the surrogate that SparseMixer-v2 optimises,
            in which the p inside f are detached.
        temperature: of MaskedSoftmax.
    """
    outputs, by_parameters, by_input = layer.linearised()
    z, outputs = layer.router_logits.requires_grad_(), outputs.requires_grad_()
    choices, probs = zip(*ordered_choices(z, top_k, jitter_eps, temperature), strict=True)
    p = torch.stack([torch.stack(row) for row in probs])  # [choices, K]
    weights = p.detach() if equation == 7 else p
    y = (weights.unsqueeze(-1) * outputs[torch.tensor(choices)]).sum(dim=1)
    expected = (p.prod(dim=1) * loss(y)).sum()
    dz, d_outputs = torch.autograd.grad(expected, (z, outputs))
    return Gradient(
        dz,
        torch.einsum("eh,ehp->ep", d_outputs, by_parameters).flatten(),
        layer.router.T @ dz + torch.einsum("eh,ehi->i", d_outputs, by_input),
    )


def uniform_cells(estimator: RouterEstimator) -> list[tuple[float, float]]:
    """The parts of [0, 1) in which uniform noise gives one B, by the estimator's record.

    Raises:
        ValueError: the record has no `end_probability`.
    """
    end = estimator.end_probability
    if end is None:
        raise ValueError(
            f"{estimator.function.__name__} is sampled and its record has no end_probability, without which its "
            "outcomes cannot be listed: give P(B = 1), or 1.0 if it has no B"
        )
    return [cell for cell in ((0.0, end), (end, 1.0)) if cell[0] < cell[1]]


def list_outcomes(
    z: torch.Tensor, top_k: int, jitter_eps: float, estimator: RouterEstimator, *, at_end_of_cell: bool = False
) -> tuple[torch.Tensor, Noise, torch.Tensor | None]:
    """Every draw that training can make, with its probability.

    Args:
        at_end_of_cell: take the last uniform number of each cell instead of the first.

    Returns:
        Probabilities `[R]`, which sum to 1; the noise that forces each outcome, `[K, R, E]` and `[K, R]`; and the
        experts that it forces, `[R, K]`. Where nothing is drawn, one outcome without them.
    """
    if not estimator.sampled:
        return torch.ones(1, dtype=torch.float64), TokenKeys(None), None
    probabilities, gumbel, uniform, forced = [], [], [], []
    cells = uniform_cells(estimator)
    for experts, probs in ordered_choices(z, top_k, jitter_eps, estimator.temperature):
        force = torch.zeros(top_k, len(z), dtype=torch.float64)
        force[range(top_k), list(experts)] = FORCE
        for drawn in itertools.product(cells, repeat=top_k):
            sizes = torch.tensor([end - start for start, end in drawn], dtype=torch.float64)
            places = [math.nextafter(end, 0) if at_end_of_cell else start for start, end in drawn]
            probabilities.append(torch.stack(probs).prod() * sizes.prod())
            gumbel.append(force)
            uniform.append(torch.tensor(places, dtype=torch.float64))
            forced.append(torch.tensor(experts))
    noise = RoutingNoise(torch.stack(gumbel, dim=1), torch.stack(uniform, dim=1))
    return torch.stack(probabilities), noise, torch.stack(forced)


@cache
def check_record(estimator: RouterEstimator, top_k: int) -> None:
    """Hold what an estimator's record says about its draws against what it does.

    Raises:
        ValueError: it does not draw the experts that its noise asks for; its weights change inside a cell of the
            uniform noise; or it does not draw as often as a softmax with its temperature does.
    """
    if not estimator.sampled:
        return
    name, eps = estimator.function.__name__, 10.0  # all experts are kept
    z = torch.tensor([1.0, 0.3, -0.4, 0.8, -1.5], dtype=torch.float64)
    routings = []
    for at_end_of_cell in (False, True):
        _, noise, forced = list_outcomes(z, top_k, eps, estimator, at_end_of_cell=at_end_of_cell)
        assert forced is not None
        routing = estimator(z.expand(len(forced), -1), top_k, eps, noise)
        if not torch.equal(routing.experts, forced):
            raise ValueError(f"{name} does not draw argmax(z / temperature + gumbel) for each choice")
        routings.append(routing.weights)
    if not torch.equal(*routings):
        end = estimator.end_probability
        raise ValueError(f"{name} changes its weights elsewhere than at its record's end_probability={end}")
    logits = z.expand(CHECKED_DRAWS, -1)
    drawn = estimator(logits, top_k, eps, draw_noise(logits, top_k, torch.Generator().manual_seed(0))).experts[:, 0]
    expected = (z / estimator.temperature).softmax(dim=0)
    error = (expected * (1 - expected) / CHECKED_DRAWS).sqrt()
    if ((drawn.bincount(minlength=len(z)) / CHECKED_DRAWS - expected).abs() > STANDARD_ERRORS * error).any():
        raise ValueError(
            f"{name} does not sample from softmax(z / {estimator.temperature:g}), its record's temperature"
        )


@dataclass(frozen=True)
class Moments:
    """Expectation and total variance (sum over components) of an estimator's gradient."""

    mean: Gradient
    variance: dict[str, float]


def estimator_moments(layer: Layer, loss: Loss, top_k: int, jitter_eps: float, estimator: RouterEstimator) -> Moments:
    """Compute the mean and the scatter of `estimator` over its draws, without sampling.

    Raises:
        ValueError: its draws cannot be listed, or are not as its record says.
    """
    check_record(estimator, top_k)
    z = layer.router_logits
    probabilities, noise, _ = list_outcomes(z, top_k, jitter_eps, estimator)
    outputs, by_parameters, by_input = layer.linearised()

    logits = z.expand(len(probabilities), -1).clone().requires_grad_()
    routing = estimator(logits, top_k, jitter_eps, noise)
    mixture = mixture_of(routing)
    chosen = outputs[mixture.experts].requires_grad_()  # [R, S, H]
    dz, d_chosen = torch.autograd.grad(loss(mix_outputs(chosen, mixture)).sum(), (logits, chosen))

    # Gradient by each expert's output, [R, E, H]; the experts' parameters and the input follow linearly.
    slots = mixture.experts.unsqueeze(-1).expand_as(d_chosen)
    d_outputs = d_chosen.new_zeros(len(probabilities), *outputs.shape).scatter_add(1, slots, d_chosen)
    d_input = dz @ layer.router + torch.einsum("reh,ehi->ri", d_outputs, by_input)
    gram = by_parameters @ by_parameters.mT  # [E, H, H]
    squares = {
        "router_logits": dz.square().sum(dim=-1),
        "experts": torch.einsum("reh,ehj,rej->r", d_outputs, gram, d_outputs),
        "input": d_input.square().sum(dim=-1),
    }
    mean = Gradient(
        probabilities @ dz,
        torch.einsum("r,reh,ehp->ep", probabilities, d_outputs, by_parameters).flatten(),
        probabilities @ d_input,
    )
    variance = {
        name: max((probabilities @ square).item() - getattr(mean, name).square().sum().item(), 0.0)
        for name, square in squares.items()
    }
    return Moments(mean, variance)


@dataclass(frozen=True)
class Quality:
    """How good an estimator is for one quantity."""

    bias: float
    """|E[estimate] - exact| / |exact|."""
    cosine: float
    """Between E[estimate] and the exact gradient."""
    variance: float
    """Total variance / |exact|^2."""
    length: float
    """|E[estimate]| / |exact|."""

    def signal_to_noise(self, batch: int) -> float:
        """|exact| over the root mean square error of the average over `batch` tokens that share the exact gradient."""
        return (self.bias**2 + self.variance / batch) ** -0.5 if self.bias or self.variance else float("inf")

    def scaled_signal_to_noise(self, batch: int) -> float:
        """The same after the best common factor, for optimizers that do not mind a gradient's length, as Adam."""
        square = self.length**2 + self.variance / batch
        error = 1 - (max(self.cosine, 0.0) * self.length) ** 2 / square if square else 1.0
        return error**-0.5 if error > 0 else float("inf")


def compare(moments: Moments, exact: Gradient) -> dict[str, Quality]:
    """`Quality` for `router_logits`, `experts` and `input`; NaN where the exact gradient is zero."""
    qualities = {}
    for name, variance in moments.variance.items():
        mean, target = getattr(moments.mean, name), getattr(exact, name)
        norm = target.norm()
        cosine = torch.nn.functional.cosine_similarity(mean, target, dim=0, eps=1e-300)
        figures = (mean - target).norm() / norm, cosine, variance / norm**2, mean.norm() / norm
        qualities[name] = Quality(*(figure.item() for figure in figures))
    return qualities


@dataclass(frozen=True)
class Setting:
    """One point of a sweep."""

    num_experts: int = 8
    top_k: int = 1
    jitter_eps: float = 0.5
    logit_scale: float = 1.0
    curvature: float = 0.5


SWEEPS: dict[str, tuple] = {
    "num_experts": (4, 8, 16, 32, 64),
    "top_k": (1, 2, 3),
    "jitter_eps": (0.05, 0.1, 0.2, 0.5, 1.0),
    "logit_scale": (0.25, 0.5, 1.0, 2.0, 4.0),
    "curvature": (0.0, 0.25, 0.5, 1.0, 2.0),
}


FIGURES = ("bias", "cosine", "length", "variance", "snr", "scaled_snr")


def listed_estimators(top_k: int) -> dict[str, RouterEstimator]:
    """The registered estimators that are defined for `top_k` and whose draws can be listed."""
    return {
        name: estimator
        for name, estimator in ROUTER_ESTIMATORS.items()
        if top_k <= (estimator.max_top_k or top_k) and not (estimator.sampled and estimator.end_probability is None)
    }


@torch.no_grad()
def share_with_choice(setting: Setting, num_tokens: int = 50_000) -> float:
    """The share of tokens with normal logits that sampling leaves a choice; the others have no router gradient."""
    generator = torch.Generator().manual_seed(0)
    z = setting.logit_scale * torch.randn(num_tokens, setting.num_experts, generator=generator)
    available, has_choice = torch.ones_like(z, dtype=torch.bool), torch.zeros(num_tokens, dtype=torch.bool)
    for _ in range(setting.top_k):  # before the first choice there is only one way
        kept = keep_set(z, available, setting.jitter_eps)
        has_choice |= kept.sum(dim=-1) > 1
        available = available.scatter(-1, z.masked_fill(~kept, -torch.inf).argmax(dim=-1, keepdim=True), False)
    return has_choice.float().mean().item()


def measure(setting: Setting, num_layers: int = 200, batch: int = 1024) -> list[dict]:
    """Every estimator at one setting, against Equations 4 and 7: quartiles over `num_layers` random layers.

    Layers on which only one choice is possible have no router gradient to estimate; others are drawn in their place.
    The share of layers with a choice is `share_with_choice`. Estimators whose draws cannot be listed are left out.

    Returns:
        One row per estimator, equation and quantity: the median of bias, cosine, length, variance, and the
        signal-to-noise ratio of an average over `batch` tokens, as it is and after the best common factor; with
        `_low` and `_high` their quartiles.

    Raises:
        ValueError: there are hardly any layers with a choice, because the keep set is too narrow.
    """
    loss = curved_loss(setting.curvature)
    layers = []
    for seed in range(100 * num_layers):
        layer = random_layer(setting.num_experts, logit_scale=setting.logit_scale, seed=seed)
        choices = ordered_choices(layer.router_logits, setting.top_k, setting.jitter_eps, temperature=1.0)
        if len(list(itertools.islice(choices, 2))) == 2:
            layers.append(layer)
        if len(layers) == num_layers:
            break
    else:
        raise ValueError(f"jitter_eps={setting.jitter_eps} leaves next to no layers with a choice; use a wider one")

    collected: dict[tuple[str, int, str], list[Quality]] = {}
    for layer in layers:
        arguments = (layer, loss, setting.top_k, setting.jitter_eps)
        exact: dict[tuple[int, float], Gradient] = {}
        for name, estimator in listed_estimators(setting.top_k).items():
            moments = estimator_moments(*arguments, estimator)
            for equation in (4, 7):
                key = equation, estimator.temperature
                if key not in exact:
                    exact[key] = exact_gradient(*arguments, equation=equation, temperature=estimator.temperature)
                for quantity, quality in compare(moments, exact[key]).items():
                    collected.setdefault((name, equation, quantity), []).append(quality)
    constants = {"choice": share_with_choice(setting), "batch": batch}
    quartiles, rows = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64), []
    for (name, equation, quantity), qualities in collected.items():
        columns = [
            (q.bias, q.cosine, q.length, q.variance, q.signal_to_noise(batch), q.scaled_signal_to_noise(batch))
            for q in qualities
        ]
        values = torch.tensor(columns, dtype=torch.float64).quantile(quartiles, dim=0, interpolation="nearest")
        measured = {
            f"{figure}{suffix}": value
            for suffix, row in zip(("", "_low", "_high"), values.tolist(), strict=True)
            for figure, value in zip(FIGURES, row, strict=True)
        }
        rows.append({**vars(setting), **constants, "estimator": name, "equation": equation, "quantity": quantity,
                     **measured})  # fmt: skip
    return rows


def sweep(variables: list[str], num_layers: int = 200, batch: int = 1024) -> Iterator[tuple[str, list[dict]]]:
    """`measure` along each of `variables`, one at a time around the default `Setting`: an iterator over the points.

    Raises:
        ValueError: a variable is not a key of `SWEEPS`.
    """
    if unknown := [variable for variable in variables if variable not in SWEEPS]:
        raise ValueError(f"over must be one of {', '.join(SWEEPS)}; got {', '.join(unknown)}")
    return (
        (variable, measure(replace(Setting(), **{variable: value}), num_layers, batch))
        for variable in variables
        for value in SWEEPS[variable]
    )


def plot_sweep(rows: list[dict], variable: str, path: str | Path, quantity: str = "router_logits") -> None:
    """Bias, variance and signal to noise along one sweep, each estimator against the objective it estimates."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    panels = figure.subplots(1, 3)
    columns = {
        "bias": "|bias| / |exact|",
        "variance": "variance / |exact|²",
        "scaled_snr": f"signal to noise up to scale, {rows[0]['batch']} tokens",
    }
    for axes, (column, label) in zip(panels, columns.items(), strict=True):
        for number, (name, estimator) in enumerate(ROUTER_ESTIMATORS.items()):
            equation = estimator.equation
            points = [
                (row[variable], row[column])
                for row in rows
                if (row["estimator"], row["equation"], row["quantity"]) == (name, equation, quantity)
            ]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    "o-" if equation == 4 else "s--",
                    color=colormaps["tab20"](number % 20),
                    markersize=3,
                    linewidth=5 if name == "sparsemixer_v2" else 1.5,  # it hides under its paper form
                    alpha=0.4 if name == "sparsemixer_v2" else 1,
                    label=f"{name} (Eq. {equation})",
                )
        axes.set(xlabel=variable, title=label)
        axes.set_yscale("symlog", linthresh=1e-3)
        if variable != "top_k" and 0.0 not in SWEEPS[variable]:
            axes.set_xscale("log", base=2)
        axes.set_xticks(SWEEPS[variable], labels=[f"{value:g}" for value in SWEEPS[variable]])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.suptitle(f"Gradient of the {quantity.replace('_', ' ')}")
    figure.savefig(path, dpi=130)
