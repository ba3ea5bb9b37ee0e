"""Draw routing and losses. L layers, E experts, S sets of texts."""

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy.cluster.hierarchy import dendrogram

ANNOTATED = 256  # larger heatmaps show no numbers
SIGNIFICANT = 0.05  # share of false discoveries among the experts called specialised
MIN_EXPECTED = 5  # tokens of a pair; fewer tell nothing
NAMED_LINES = 10  # as many colours can be told apart
MEAN_PARTS = 50  # a running mean is over this part of a curve
SHARE = "share of the layer's choices"
BY_CHANCE = "by chance, all sets"  # a line to compare the others with


def draw_expert_load(load: torch.Tensor, title: str = "Expert load") -> Figure:
    """Draw `expert_load`'s `[L, E]` as a heatmap, white at 1 / E, red above, blue below."""
    figure, axes = heatmap(load, load_norm(load), "RdBu_r", SHARE, lambda share: f"{100 * share:.0f}", percent)
    axes.set_title(f"{title} (balanced: {100 / load.shape[1]:.3g} %)")
    return figure


def plot_expert_load(load: torch.Tensor, path: str | Path, title: str = "Expert load") -> None:
    """Write `draw_expert_load`'s heatmap of `[L, E]` to `path`."""
    draw_expert_load(load, title).savefig(path, dpi=150)


def draw_loss(log: Sequence[Mapping[str, Any]], label: str = "loss (nats per token)") -> Figure:
    """Draw training and validation loss of a trainer's `log_history` against the step.

    A long training curve is faint, under its running mean over a fiftieth of the logs.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for key, name, color in (("loss", "training", "tab:blue"), ("eval_loss", "validation", "tab:orange")):
        points = sorted({entry["step"]: entry[key] for entry in log if entry.get(key) is not None}.items())
        if not points:
            continue
        steps, losses = np.array(points).T
        window = len(losses) // MEAN_PARTS if key == "loss" else 1
        if window > 1:
            axes.plot(steps, losses, color=color, alpha=0.25, linewidth=0.8)
            losses = np.convolve(losses, np.full(window, 1 / window), "valid")
            steps = steps[(window - 1) // 2 :][: len(losses)]  # the middle of each window
            name = f"{name}, mean of {window} logs"
        axes.plot(steps, losses, color=color, marker="o" if len(losses) <= 50 else "", markersize=4, label=name)
    axes.set(xlabel="optimizer step", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    return figure


def draw_loads(loads: Mapping[str, torch.Tensor]) -> Figure:
    """Draw the load `[L, E]` of each set, side by side on one colour scale."""
    norm = load_norm(torch.stack(list(loads.values())))
    figure, panels = small_multiples(len(loads), next(iter(loads.values())), columns=4 if len(loads) <= 16 else 8)
    for axes, (name, load) in zip(panels, loads.items(), strict=True):
        image = axes.imshow(load.numpy(), cmap="RdBu_r", norm=norm, aspect="auto")
        axes.set_title(name)
    bar = figure.colorbar(image, ax=panels, format=percent, aspect=30, shrink=0.9)
    bar.set_label(SHARE)
    figure.suptitle(f"Expert load by set (white: balanced, {100 * norm.vcenter:.3g} %)")
    return figure


def draw_similarity(names: list[str], similarity: torch.Tensor, tree: torch.Tensor | None) -> Figure:
    """Draw cosines `[S, S]` of the sets' routing vectors (Figure 6), under their clustering tree if there is one."""
    num_sets = len(names)
    side = 1.5 + max(3.0, min(0.6, 12 / num_sets) * num_sets)
    figure = Figure(figsize=(side + 2.5, side + (1 if tree is None else 2)), layout="constrained")
    if tree is None:
        axes = figure.subplots()
        axes.set_title("Cosine similarity of routing vectors")
    else:
        top, axes = figure.subplots(2, 1, height_ratios=[1, 5])
        dendrogram(tree.numpy(), ax=top, no_labels=True, color_threshold=0, above_threshold_color="0.3")
        top.set_title("Cosine similarity of routing vectors, clustered")
        top.set_ylabel("distance\n(1 - cosine)")
        top.spines[["top", "right", "bottom"]].set_visible(False)
    norm = Normalize(similarity.min().item(), 1)
    image = axes.imshow(similarity.numpy(), cmap="viridis", norm=norm, aspect="auto")
    axes.set_xticks(range(num_sets), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(num_sets), names)
    write_cells(axes, similarity, lambda cosine: f"{cosine:.3f}", lambda cosine: norm(cosine) <= 0.6)
    figure.colorbar(image, ax=axes, label="cosine (darker: less alike)")
    return figure


def draw_specialization(score: torch.Tensor, false_discovery: torch.Tensor) -> Figure:
    """Draw the score of each expert `[L, E]`; a cross marks scores that shuffled texts explain."""
    norm = Normalize(0, max(score.max().item(), 0.01))
    label = "score (0: all sets alike, 1: one set)"
    figure, axes = heatmap(score.clamp(min=0), norm, "magma_r", label)
    layers, experts = (false_discovery >= SIGNIFICANT).nonzero(as_tuple=True)
    axes.scatter(experts, layers, c="0.4", marker="x", s=20, lw=1)
    axes.set_title("Specialisation (cross: chance would do)")
    return figure


def draw_layers(curves: Mapping[str, Mapping[str, torch.Tensor]]) -> Figure:
    """Draw curves over the layers, `[L]` each: a panel per quantity, a line per set."""
    rows = ceil(len(curves) / 2)
    figure = Figure(figsize=(11, 3.2 * rows + 0.4), layout="constrained")
    panels = list(figure.subplots(rows, 2, squeeze=False).flatten())
    for axes in panels[len(curves) :]:
        axes.set_axis_off()
    legend = {}
    for axes, (quantity, lines) in zip(panels, curves.items(), strict=False):
        for name, values in lines.items():
            style = {"color": "0.4", "ls": ":"} if name == BY_CHANCE else {"marker": "o", "ms": 3}
            few = len(lines) <= NAMED_LINES
            (legend[name],) = axes.plot(range(len(values)), values, lw=1.3, alpha=1 if few else 0.4, **style)
        axes.set(title=quantity, xlabel="layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if quantity.startswith("share"):
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    if len(legend) <= NAMED_LINES:
        figure.legend(legend.values(), legend.keys(), loc="outside upper center", ncols=6)
    return figure


def draw_pairs(pairs: torch.Tensor, expected: torch.Tensor) -> Figure:
    """Draw pairs of experts `[L, E, E]` relative to independent choices: a panel per layer."""
    known = expected >= MIN_EXPECTED
    lift = torch.where(known, (pairs / expected).log2(), torch.nan).clamp(-3, 3)
    figure, panels = small_multiples(len(pairs), pairs[0], vertical="expert", columns=8, cell=0.11)
    for layer, axes in enumerate(panels):
        axes.set_facecolor("0.75")
        image = axes.imshow(lift[layer].numpy(), cmap="PuOr_r", vmin=-3, vmax=3, aspect="auto", interpolation="none")
        axes.set_title(f"layer {layer}")
    bar = figure.colorbar(image, ax=panels, ticks=range(-3, 4), aspect=30, shrink=0.9, extend="both")
    bar.set_ticklabels(["1/8", "1/4", "1/2", "as expected", "x 2", "x 4", "x 8"])
    bar.set_label("relative to chance")
    figure.suptitle("Tokens that chose both experts (grey: the same one, or too few tokens to say)")
    return figure


def draw_load_difference(difference: torch.Tensor) -> Figure:
    """Draw the change of loads `[L, E]` between two models, in percentage points: red is more after."""
    points = 100 * difference
    largest = max(points.abs().max().item(), 0.1)
    label, norm = "percentage points (red: more after)", TwoSlopeNorm(0, -largest, largest)
    figure, axes = heatmap(points, norm, "RdBu_r", label, lambda value: f"{value:+.1f}")
    axes.set_title("Change of the expert load (share of the layer's choices)")
    return figure


def percent(share: float, position: int) -> str:
    """A label of a colour bar."""
    return f"{100 * share:.0f} %"


def load_norm(load: torch.Tensor) -> TwoSlopeNorm:
    """Colours of loads `[..., E]`: the middle is balance, the ends are 0 and at least twice the fair share."""
    balanced = 1 / load.shape[-1]
    return TwoSlopeNorm(balanced, vmin=0, vmax=max(2 * balanced, load.max().item()))


def write_cells(
    axes: Axes, values: torch.Tensor, form: Callable[[float], str], is_dark: Callable[[float], bool]
) -> None:
    """Write the numbers into a heatmap, unless it has too many cells."""
    if values.numel() <= ANNOTATED:
        for (row, column), value in np.ndenumerate(values.numpy()):
            color = "white" if is_dark(value) else "black"
            axes.text(column, row, form(value), ha="center", va="center", fontsize=8, color=color)


def heatmap(
    values: torch.Tensor, norm: Normalize, cmap: str, label: str, form: Callable | None = None, ticks: Any = None
) -> tuple[Figure, Axes]:
    """Draw `[L, E]`, legible at the released 32 x 16; `form` writes the cells of diverging colours."""
    num_layers, num_experts = values.shape
    width, height = (0.55, 0.4) if values.numel() <= ANNOTATED else (0.36, 0.25)
    figure = Figure(figsize=(2.5 + width * num_experts, 2 + height * num_layers), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="expert", ylabel="layer", xticks=range(num_experts), yticks=range(num_layers))
    image = axes.imshow(values.numpy(), cmap=cmap, norm=norm, aspect="auto")
    if form:
        write_cells(axes, values, form, lambda value: abs(norm(value) - 0.5) > 0.35)
    figure.colorbar(image, ax=axes, label=label, format=ticks)
    return figure, axes


def small_multiples(
    count: int, matrix: torch.Tensor, vertical: str = "layer", columns: int = 4, cell: float = 0.16
) -> tuple[Figure, list[Axes]]:
    """Make panels for `count` heatmaps of `matrix`'s shape, with cells of `cell` inches."""
    columns = min(columns, count)
    rows = ceil(count / columns)
    height, width = (max(1.3, cell * size) for size in matrix.shape)
    size = (max(7.5, columns * (width + 0.35) + 1.8), rows * (height + 0.45) + 1)  # at least as wide as the title
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    panels = list(grid.flatten())
    for axes in panels[count:]:
        axes.set_axis_off()
    for axes in panels[:count]:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    for axes in panels[max(0, count - columns) : count]:  # nothing below
        axes.tick_params(labelbottom=True)
    figure.supxlabel("expert")
    figure.supylabel(vertical)
    return figure, panels[:count]
