"""Sets of texts beside each other: how alike their routing is, and which experts are specialised.

S sets, L layers, E experts, C chunks of all sets together.
"""

from collections.abc import Mapping
from math import log, log2
from typing import NamedTuple

import torch
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from .routing import RoutingCounts


def routing_similarity(sets: Mapping[str, RoutingCounts]) -> torch.Tensor:
    """Cosine similarity of the sets' routing vectors, `[S, S]` float64 (the paper's section 5.3, Figure 6).

    A set's vector has L x E numbers: how often each expert of each layer was chosen. All layers see all tokens, so
    that the counts and the loads have the same cosines.
    """
    vectors = torch.stack([counts.load().flatten() for counts in sets.values()])
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    return (vectors @ vectors.T).clamp(max=1)


def cluster(similarity: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Clusters of sets by average linkage of 1 - similarity: scipy's linkage matrix, and an order of the sets in which
    neighbours are alike. At least two sets."""
    distance = (1 - similarity).fill_diagonal_(0).clamp(min=0)
    tree = linkage(squareform(distance.numpy(), checks=False), method="average", optimal_ordering=True)
    return torch.from_numpy(tree), leaves_list(tree).tolist()


class Specialization(NamedTuple):
    """How much an expert's tokens tell about the set they come from, beside what shuffled texts would tell.

    With f_s(e) the share of a layer's choices that expert e gets from set s, and all sets of equal weight whatever
    their size, q_s(e) = f_s(e) / sum_s' f_s'(e) is how probably a token that chose e comes from s, and

        I(e) = sum_s q_s(e) log2(S q_s(e))  bits

    is its divergence from a coin with S equal sides: 0 if the expert is used alike by all sets, log2 S if by a single
    one. Mean over experts, weighted by their mean load, it is the mutual information between set and expert. I is
    never negative, and above 0 for finite texts whatever the sets: so the same is computed with the chunks of text
    dealt anew to the sets, as many to each as it has, and

        score(e) = (I(e) - mean over shuffles of I(e)) / log2 S

    is near 0 where the sets are alike and reaches nearly 1 where an expert serves a single one.
    """

    names: list[str]
    information: torch.Tensor
    """I(e) in bits, `[L, E]`."""
    shuffled: torch.Tensor
    """Mean of I(e) over the shuffles, in bits, `[L, E]`."""
    score: torch.Tensor
    """`[L, E]`."""
    deviations: torch.Tensor
    """I(e) above the shuffles' mean, in their standard deviations (z-score), `[L, E]`; 0 where they have none."""
    p_value: torch.Tensor
    """(1 + shuffles with an I(e) at least as large) / (1 + shuffles), `[L, E]`."""
    false_discovery: torch.Tensor
    """The p-values adjusted for their number (Benjamini-Hochberg), `[L, E]`."""
    preference: torch.Tensor
    """f_s(e) / mean over sets of f_s(e), `[S, L, E]`: S if only this set uses the expert, 0 if it does not."""
    layer_score: torch.Tensor
    """The score of a layer's mutual information between set and expert, `[L]`."""
    num_chunks: list[int]
    """Of each set."""


def set_information(choices: torch.Tensor) -> torch.Tensor:
    """I(e) in bits, and in a last column the layer's mutual information: `[S, L, E]` -> `[L, E + 1]`."""
    num_sets = len(choices)
    load = choices / choices.sum(dim=-1, keepdim=True)
    total = load.sum(dim=0)
    from_set = torch.where(total > 0, load / total, 1 / num_sets)  # q
    nats = torch.special.xlogy(from_set, num_sets * from_set).sum(dim=0)
    information = (nats / log(2)).clamp(min=0)
    return torch.cat([information, (information * total / num_sets).sum(dim=-1, keepdim=True)], dim=-1)


def specialization(sets: Mapping[str, RoutingCounts], shuffles: int = 999, seed: int = 0) -> Specialization:
    """Which experts are used more by some sets than by others, beyond what chance explains.

    Whole chunks of texts are shuffled (`RoutingCounts.chunks`), those of all sets of the same number of tokens.

    Args:
        sets: at least two.
        shuffles: p-values are at least 1 / (shuffles + 1).

    Raises:
        ValueError: there are fewer than two sets, or one is a sum of counts.
    """
    from scipy.stats import false_discovery_control  # takes a second to import

    if len(sets) < 2:
        raise ValueError("specialization compares sets of texts: give at least two")
    size = max(counts.chunk_tokens for counts in sets.values())
    by_set = [counts.chunks(size) for counts in sets.values()]
    num_chunks = [len(chunks) for chunks in by_set]
    chunks = torch.cat(by_set).double()  # [C, L, E]
    labels = torch.arange(len(sets)).repeat_interleave(torch.tensor(num_chunks))  # [C]
    empty = torch.zeros(len(sets), *chunks.shape[1:], dtype=torch.float64)

    choices = empty.index_add(0, labels, chunks)
    observed = set_information(choices)
    total, squares, at_least = torch.zeros(3, *observed.shape, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(shuffles):
        order = torch.randperm(len(labels), generator=generator)
        information = set_information(empty.index_add(0, labels[order], chunks))
        total += information
        squares += (information - observed) ** 2  # of differences, so that no digits are lost
        at_least += information >= observed - 1e-12  # beyond rounding
    mean = total / shuffles
    variance = (squares / shuffles - (mean - observed) ** 2).clamp(min=0)
    deviations = torch.where(variance > 1e-24, (observed - mean) / variance.sqrt(), 0)
    score = (observed - mean) / log2(len(sets))
    p_value = (1 + at_least) / (1 + shuffles)

    load = choices / choices.sum(dim=-1, keepdim=True)
    average = load.mean(dim=0)
    experts = slice(None, -1)
    adjusted = torch.from_numpy(false_discovery_control(p_value[:, experts].flatten().numpy()))
    return Specialization(
        names=list(sets),
        information=observed[:, experts],
        shuffled=mean[:, experts],
        score=score[:, experts],
        deviations=deviations[:, experts],
        p_value=p_value[:, experts],
        false_discovery=adjusted.view(load.shape[1:]),
        preference=torch.where(average > 0, load / average, 1),
        layer_score=score[:, -1],
        num_chunks=num_chunks,
    )
