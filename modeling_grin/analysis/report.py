"""Write a study of routing: pictures, tables and one HTML file. L layers, T tokens, K experts per token."""

import base64
import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..files import write_whole
from . import figures
from .figures import MIN_EXPECTED, SIGNIFICANT
from .regret import RoutingRegret
from .routing import RoutingComparison, RoutingCounts, RoutingSums, token_routing
from .specialization import Specialization, cluster, routing_similarity, specialization

DPI = 120
TOP = 12  # rows of the report's tables of experts and of pairs
ORDERS = ("clustered", "given")
ALL_SETS = "all sets"  # their sum, in the tables
TEMPLATE = "report.html"  # beside this file
PICTURES = ("expert_load", "expert_load_by_set", "similarity", "specialization", "layers", "pairs", "agreement",
            "load_difference", "regret")  # fmt: skip
TABLES = ("load", "layers", "pairs", "similarity", "specialization", "comparison", "load_difference", "regret")

Metrics = Mapping[str, Callable[[Any], torch.Tensor]]
"""Quantities `[L]` of what was counted for a set, by their titles."""
LAYER_CURVES: Metrics = {
    "share of tokens with a near-tie": RoutingSums.near_tie_rate,
    "router entropy (1: undecided)": RoutingSums.router_entropy,
    "balance loss (1: balanced)": RoutingSums.balance_loss,
    "busiest expert (1: fair share)": RoutingSums.load_max,
}
COMPARISON_CURVES: Metrics = {
    "share of tokens that go to the same experts": RoutingComparison.agreement,
    "share of choices that both models make": RoutingComparison.overlap,
    "cosine similarity of the loads": RoutingComparison.load_similarity,
}
REGRET_CURVES: Metrics = {
    "loss that the runner-up would add (0.001 nats)": lambda regret: 1e3 * regret.runner_up(),
    "loss that the best would save (0.001 nats)": lambda regret: 1e3 * regret.regret(),
    "share of tokens with a better expert": RoutingRegret.better,
    "share of tokens with a near-tie": RoutingRegret.near_tie_rate,
}


@dataclass
class TokenView:
    """Texts of a set whose tokens the report shows with their experts."""

    title: str
    starts: list[bool]  # whether a token begins another text
    pieces: list[str]  # the text of each token; "" for the first bytes of a character that a later token completes
    tokens: list[str]  # their names in the vocabulary
    special: list[bool]
    experts: list[list[list[int]]]  # [L][T][K]
    weights: list[list[list[float]]]  # [L][T][K]


@dataclass
class RoutingStudy:
    """The contents of a report."""

    model: str
    sets: dict[str, RoutingCounts]
    sources: Mapping[str, str] = field(default_factory=dict)  # of each set's texts
    against: str | None = None
    comparisons: dict[str, RoutingComparison] = field(default_factory=dict)  # of `model` with `against`, by set
    views: list[TokenView] = field(default_factory=list)
    order: str = "clustered"  # of the sets in the picture of similarities: clustered, or given
    regrets: dict[str, RoutingRegret] = field(default_factory=dict)  # by set


def view_tokens(
    title: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]
) -> TokenView:
    """Route texts, one forward pass each, and keep every token's experts.

    Args:
        rows: the ids of each text.
    """
    ids = [token_id for row in rows for token_id in row]
    routings = [token_routing(model, torch.tensor(row)) for row in rows]
    marked = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    layers = range(len(routings[0]))
    return TokenView(
        title=title,
        starts=[position == 0 and number > 0 for number, row in enumerate(rows) for position in range(len(row))],
        pieces=[piece for row in rows for piece in split_by_token(tokenizer, row)],
        tokens=tokenizer.convert_ids_to_tokens(ids),
        special=[token_id in marked for token_id in ids],
        experts=[torch.cat([routing[layer].experts for routing in routings]).tolist() for layer in layers],
        weights=[
            torch.cat([routing[layer].weights for routing in routings]).double().round(decimals=3).tolist()
            for layer in layers
        ],
    )


def split_by_token(tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int]) -> list[str]:
    """Split the decoded text into the piece that each token adds, however the tokenizer treats spaces and bytes."""
    pieces, done = [], ""
    for end in range(1, len(input_ids) + 1):
        text = tokenizer.decode(input_ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd"):  # a character whose other bytes are to come
            pieces.append("")
        else:
            pieces.append(text[len(done) :])
            done = text
    return pieces


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file, floats with 9 digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([f"{cell:.9g}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    write_whole(path, text.getvalue())


def write_figure(path: Path, figure: Figure) -> str:
    """Write a PNG, and return it as a data URL."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    write_whole(path, content.getvalue())
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def write_report(study: RoutingStudy, folder: str | Path) -> dict[str, Any]:
    """Write `report.html`, figures (PNG) and tables (CSV) to `folder`, and delete an earlier study's.

    Returns:
        The study's main figures, for JSON.

    Raises:
        ValueError: the order is unknown.
    """
    if study.order not in ORDERS:
        raise ValueError(f"order must be {' or '.join(ORDERS)}; got {study.order}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (TEMPLATE, *(f"{name}.png" for name in PICTURES), *(f"{name}.csv" for name in TABLES)):
        (folder / name).unlink(missing_ok=True)  # this study may have fewer of them
    total = reduce(add, study.sets.values())
    everything = {**study.sets, ALL_SETS: total} if len(study.sets) > 1 else study.sets
    pictures: dict[str, str] = {}
    sets = {name: describe_set(counts) for name, counts in study.sets.items()}
    summary: dict[str, Any] = {"model": study.model, "sets": sets}
    context: dict[str, Any] = {"study": study, "total": total, "pictures": pictures, "summary": summary,
                               "regret_columns": REGRET_COLUMNS}  # fmt: skip

    def draw(name: str, figure: Figure) -> None:
        pictures[name] = write_figure(folder / f"{name}.png", figure)

    write_count_tables(folder, everything)
    draw("expert_load", figures.draw_expert_load(total.load()))
    draw("layers", figures.draw_layers(curves_of(LAYER_CURVES, {name: c.sums for name, c in study.sets.items()})))
    if total.sums.choices[0].sum() > total.num_tokens:  # more than one expert to a token
        draw("pairs", figures.draw_pairs(total.pairs.double(), total.expected_pairs()))
        context["pairs"] = notable_pairs(total)
    if len(study.sets) > 1:
        draw("expert_load_by_set", figures.draw_loads({name: c.load() for name, c in study.sets.items()}))
        draw("similarity", similarity_figure(folder, study, summary))
        special = specialization(study.sets)
        draw("specialization", figures.draw_specialization(special.score, special.false_discovery))
        write_specialization(folder, special)
        summary["specialized_experts"] = (special.false_discovery < SIGNIFICANT).sum().item()
        summary["layer_specialization"] = special.layer_score.tolist()
        context["experts"] = specialized_experts(special)
        context["chunks"] = dict(zip(special.names, special.num_chunks, strict=True))
    if study.comparisons:
        changed = reduce(add, study.comparisons.values())
        draw("load_difference", figures.draw_load_difference(changed.load_difference()))
        curves = curves_of(COMPARISON_CURVES, study.comparisons)
        curves["share of choices that both models make"][figures.BY_CHANCE] = changed.overlap_by_chance()
        draw("agreement", figures.draw_layers(curves))
        write_comparison_tables(folder, study.comparisons, changed)
        summary["against"] = study.against
        summary["agreement"] = {name: c.agreement().tolist() for name, c in study.comparisons.items()}
        summary["overlap"] = {name: c.overlap().tolist() for name, c in study.comparisons.items()}
    if study.regrets:
        summary["regret"] = {name: regret.regret().tolist() for name, regret in study.regrets.items()}
        context["regrets"] = {name: describe_regret(regret) for name, regret in study.regrets.items()}
        draw("regret", figures.draw_layers(curves_of(REGRET_CURVES, study.regrets)))
        columns = "runner_up", "regret", "better", "near_tie_rate", "regret_of_near_ties"
        write_layers(folder / "regret.csv", study.regrets, lambda regret: regret.saved.shape[1], columns)
    context["routing"] = [
        {"tokens": view.tokens, "experts": view.experts, "weights": view.weights} for view in study.views
    ]
    loader = FileSystemLoader(Path(__file__).parent)
    template = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(TEMPLATE)
    write_whole(folder / TEMPLATE, template.render(context))
    return summary


def curves_of(metrics: Metrics, measured: Mapping[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """The curves of a picture: for each metric, a line per set."""
    return {title: {name: metric(one) for name, one in measured.items()} for title, metric in metrics.items()}


def write_layers(
    path: Path, measured: Mapping[str, Any], tokens: Callable[[Any], int], columns: Sequence[str]
) -> None:
    """Write a row for each set and layer: the tokens, and what the methods `columns` return."""
    rows = [
        (name, layer, tokens(one), *row)
        for name, one in measured.items()
        for layer, *row in by_layer(*(getattr(one, column)() for column in columns))
    ]
    write_table(path, ["set", "layer", "tokens", *columns], rows)


REGRET_COLUMNS = ("runner-up adds", "best saves", "worst layer", "some better", "near-ties", "best saves there")


def describe_regret(regret: RoutingRegret) -> list[str]:
    """A set's `REGRET_COLUMNS`, means over the layers; losses in units of a thousandth of a nat."""
    adds, saves, ties = (1e3 * nats for nats in (regret.runner_up(), regret.regret(), regret.regret_of_near_ties()))
    losses = adds.mean(), saves.mean(), saves.max(), ties.nanmean()
    shares = regret.better().mean(), regret.near_tie_rate().mean()
    *before, last = (f"{value:.2f}" for value in losses)
    return [*before, *(f"{share:.1%}" for share in shares), last]


def describe_set(counts: RoutingCounts) -> dict[str, float]:
    """The figures of a set: means over the layers, and the largest load of any layer."""
    sums = counts.sums
    return {
        "tokens": counts.num_tokens,
        "near_tie_rate": sums.near_tie_rate().mean().item(),
        "router_entropy": sums.router_entropy().mean().item(),
        "balance_loss": sums.balance_loss().mean().item(),
        "load_max_worst": sums.load_max().max().item(),
        "unused_experts": (sums.choices == 0).sum().item(),
    }


def similarity_figure(folder: Path, study: RoutingStudy, summary: dict[str, Any]) -> Figure:
    """Draw the similarities in the study's order, write their table and add them to the summary."""
    names, similarity = list(study.sets), routing_similarity(study.sets)
    tree = None
    if study.order == "clustered":
        tree, order = cluster(similarity)
        names, similarity = [names[i] for i in order], similarity[order][:, order]
    write_table(
        folder / "similarity.csv",
        ["set", *names],
        [[name, *row] for name, row in zip(names, similarity.tolist(), strict=True)],
    )
    summary["similarity"] = {"sets": names, "cosine": similarity.tolist()}
    return figures.draw_similarity(names, similarity, tree)


def by_layer(*columns: torch.Tensor) -> Iterator[tuple[Any, ...]]:
    """Rows of tensors `[L]`: the layer and its values."""
    return ((layer, *row) for layer, row in enumerate(zip(*(column.tolist() for column in columns), strict=True)))


def by_expert(*tables: torch.Tensor) -> Iterator[tuple[Any, ...]]:
    """Rows of tensors `[L, E]`: the layer, the expert and its values."""
    num_experts = tables[0].shape[1]
    return ((*divmod(index, num_experts), *row) for index, *row in by_layer(*(table.flatten() for table in tables)))


def write_count_tables(folder: Path, sets: Mapping[str, RoutingCounts]) -> None:
    """Write load.csv, layers.csv and pairs.csv: a row for each set and expert, layer, or pair."""
    loads, pairs = [], []
    for name, counts in sets.items():
        s, choices = counts.sums, counts.pairs.diagonal(dim1=1, dim2=2)
        loads += [(name, *row) for row in by_expert(choices, counts.load(), s.probs / counts.num_tokens)]
        first, second = torch.ones_like(counts.pairs[0]).triu(1).nonzero(as_tuple=True)
        both, expected = (table[:, first, second] for table in (counts.pairs, counts.expected_pairs()))
        names = list(zip(first.tolist(), second.tolist(), strict=True))
        pairs += [(name, layer, *names[number], *row) for layer, number, *row in by_expert(both, expected)]
    write_table(folder / "load.csv", ["set", "layer", "expert", "tokens", "load", "mean_prob"], loads)
    columns = "near_tie_rate", "router_entropy", "balance_loss", "load_max", "load_entropy"
    sums = {name: counts.sums for name, counts in sets.items()}
    write_layers(folder / "layers.csv", sums, lambda s: int(s.tokens[0]), columns)
    write_table(folder / "pairs.csv", ["set", "layer", "expert_a", "expert_b", "tokens", "expected_tokens"], pairs)


def find_largest(values: torch.Tensor) -> list[tuple[int, ...]]:
    """The positions of the `TOP` largest values above 0, in their order."""
    order = values.flatten().argsort(descending=True)[:TOP]
    positions = zip(*(index.tolist() for index in torch.unravel_index(order, values.shape)), strict=True)
    return [position for position in positions if values[position] > 0]


def notable_pairs(counts: RoutingCounts) -> list[dict[str, float]]:
    """The pairs of experts that are chosen together more often than independent choices would be."""
    expected = counts.expected_pairs().triu(diagonal=1)
    lift = torch.where(expected >= MIN_EXPECTED, counts.pairs / expected, 0)
    return [
        {"layer": at[0], "first": at[1], "second": at[2], "tokens": counts.pairs[at].item(),
         "expected": expected[at].item(), "lift": lift[at].item()}
        for at in find_largest(lift)
    ]  # fmt: skip


def write_specialization(folder: Path, special: Specialization) -> None:
    """Write specialization.csv: a row for each expert, with the sets' preferences in its last columns."""
    tables = (special.score, special.information, special.shuffled, special.deviations, special.p_value,
              special.false_discovery, *special.preference)  # fmt: skip
    names = ["score", "bits", "shuffled_bits", "z", "p_value", "false_discovery"]
    columns = ["layer", "expert", *names, *(f"preference:{name}" for name in special.names)]
    write_table(folder / "specialization.csv", columns, by_expert(*tables))


def specialized_experts(special: Specialization) -> list[dict[str, Any]]:
    """The experts with the highest scores, if chance does not explain them."""
    known = torch.where(special.false_discovery < SIGNIFICANT, special.score, 0)
    rows = []
    for layer, expert in find_largest(known):
        preference = special.preference[:, layer, expert]
        tables = (special.score, special.deviations, special.p_value)
        score, z, p_value = (values[layer, expert].item() for values in tables)
        rows.append({"layer": layer, "expert": expert, "score": score, "z": z, "p_value": p_value,
                     "set": special.names[preference.argmax()], "preference": preference.max().item()})  # fmt: skip
    return rows


def write_comparison_tables(
    folder: Path, comparisons: Mapping[str, RoutingComparison], changed: RoutingComparison
) -> None:
    """Write comparison.csv by set and layer, and load_difference.csv by set, layer and expert."""
    everything = {**comparisons, ALL_SETS: changed} if len(comparisons) > 1 else comparisons
    experts = [
        (name, *row)
        for name, c in everything.items()
        for row in by_expert(c.before.load(), c.after.load(), c.load_difference())
    ]
    methods = "agreement", "overlap", "overlap_by_chance", "load_similarity"
    write_layers(folder / "comparison.csv", everything, lambda c: c.before.num_tokens, methods)
    columns = ["load_before", "load_after", "difference"]
    write_table(folder / "load_difference.csv", ["set", "layer", "expert", *columns], experts)
