"""Count what a model's routers do, in one pass. L layers, E experts, K top-k, T tokens, C chunks.

Memory does not grow with the tokens: `RoutingCounts` holds about 2 C L E integers for each set of texts.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import add
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from ..balance_grinmoe import counted_tokens
from ..routing_grinmoe import Routing, keep_set, route

MAX_CHUNKS = 128  # of a set's texts: enough to shuffle, and 0.5 MB of counts at released sizes


class RoutingSums(NamedTuple):
    """Sums over tokens, per layer: the columns of tensors that are added up and all-reduced."""

    choices: torch.Tensor
    """Tokens that chose each expert, `[..., L, E]`."""
    probs: torch.Tensor
    """softmax(z), `[..., L, E]`."""
    entropy: torch.Tensor
    """Entropy of softmax(z) in nats, `[..., L]`."""
    near_ties: torch.Tensor
    """Tokens with a second expert in the keep set of the first choice, `[..., L]`."""
    other_draws: torch.Tensor
    """Choices other than the best remaining expert, `[..., L]`."""
    tokens: torch.Tensor
    """`[..., L]`."""

    @classmethod
    def from_columns(cls, columns: torch.Tensor) -> "RoutingSums":
        """Name the columns of `routing_sums`, `[..., L, 2E + 4]`."""
        num_experts = (columns.shape[-1] - 4) // 2
        choices, probs, others = columns.split([num_experts, num_experts, 4], dim=-1)
        return cls(choices, probs, *others.unbind(-1))

    def load(self) -> torch.Tensor:
        """Each expert's share of its layer's choices, `[..., L, E]`: rows sum to 1 (the paper's Figure 5)."""
        return self.choices / self.choices.sum(dim=-1, keepdim=True)

    def load_max(self) -> torch.Tensor:
        """Choices of the busiest expert relative to a fair share, `[..., L]`: 1 balanced, at most E / K."""
        return self.choices.shape[-1] * self.load().amax(dim=-1)

    def load_entropy(self) -> torch.Tensor:
        """Entropy of the load relative to log E, `[..., L]`: 1 balanced."""
        return torch.special.entr(self.load()).sum(dim=-1) / self._log_experts()

    def router_entropy(self) -> torch.Tensor:
        """Entropy of softmax(z), mean over tokens, relative to log E, `[..., L]`: 1 undecided."""
        return self.entropy / self.tokens / self._log_experts()

    def near_tie_rate(self) -> torch.Tensor:
        """Share of tokens with a second expert in the keep set of their first choice, `[..., L]`."""
        return self.near_ties / self.tokens

    def balance_loss(self) -> torch.Tensor:
        """E sum_i f_i E[softmax(z)_i], `[..., L]`: 1.0 when balanced."""
        return self.choices.shape[-1] * (self.load() * self.probs).sum(dim=-1) / self.tokens

    def _log_experts(self) -> float:
        return math.log(self.choices.shape[-1]) or 1.0  # a single expert has no entropy


def routing_columns(
    router_logits: tuple[torch.Tensor, ...],
    selected_experts: tuple[torch.Tensor, ...],
    counted: torch.Tensor,
    jitter_eps: float,
) -> torch.Tensor:
    """The columns of `RoutingSums` for each token, `[L, T, 2E + 4]`, float32, without waiting for the device.

    Args:
        router_logits: z of each layer, `[T, E]`.
        selected_experts: each layer's choices in their order, `[T, K]`.
        counted: bool `[T]`, False for padding, whose columns are 0.
        jitter_eps: r of the keep set.
    """
    device = router_logits[0].device  # all layers at once: a deep model needs no more kernels than a shallow one
    counted = counted.to(device).unsqueeze(-1)  # [T, 1]
    logits = torch.stack([layer.to(device) for layer in router_logits]).float()  # [L, T, E]
    logits = logits.masked_fill(~counted, 0)  # at padding, attention may leave NaN
    experts = torch.stack([layer.to(device) for layer in selected_experts])  # [L, T, K]

    log_probs = logits.log_softmax(dim=-1)
    probs = log_probs.exp()
    entropy = -(probs * log_probs).sum(dim=-1, keepdim=True)
    left = torch.ones_like(logits, dtype=torch.bool)
    near_tie = keep_set(logits, left, jitter_eps).sum(dim=-1, keepdim=True) > 1
    other_draws = torch.zeros_like(entropy)
    for expert in experts.split(1, dim=-1):
        best = logits.masked_fill(~left, -torch.inf).amax(dim=-1, keepdim=True)
        other_draws += logits.gather(-1, expert) < best  # experts that tie exactly are all the best
        left = left.scatter(-1, expert, False)
    columns = torch.cat([~left, probs, entropy, near_tie, other_draws, torch.ones_like(entropy)], dim=-1)
    return columns * counted


@torch.no_grad()
def routing_sums(
    router_logits: tuple[torch.Tensor, ...],
    selected_experts: tuple[torch.Tensor, ...],
    counted: torch.Tensor,
    jitter_eps: float,
) -> torch.Tensor:
    """`routing_columns` summed over the tokens of a forward pass, `[L, 2E + 4]`, float32."""
    return routing_columns(router_logits, selected_experts, counted, jitter_eps).sum(dim=1)


class RoutingCounts:
    """Counts of the routers' choices for some texts. Its size does not depend on the number of tokens."""

    def __init__(self, num_layers: int, num_experts: int):
        self._columns = torch.zeros(num_layers, 2 * num_experts + 4, dtype=torch.float64)
        self.num_tokens = 0
        """All tokens except padding."""
        self._text_start = 0
        self._chunks = torch.zeros(MAX_CHUNKS, num_layers, num_experts, dtype=torch.int64)
        self.chunk_tokens = 1
        """Tokens between the starts of two chunks; a power of two that grows with the texts."""
        self.pairs = torch.zeros(num_layers, num_experts, num_experts, dtype=torch.int64)
        """Tokens that chose both experts, `[L, E, E]`; on the diagonal, tokens that chose the expert."""

    @property
    def sums(self) -> RoutingSums:
        """Sums over all tokens, float64, in which the counts are exact."""
        return RoutingSums.from_columns(self._columns)

    def add(
        self,
        router_logits: tuple[torch.Tensor, ...],
        selected_experts: tuple[torch.Tensor, ...],
        counted: torch.Tensor,
        jitter_eps: float,
        starts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Count a forward pass. Arguments as for `routing_columns`, except `counted` `[batch, sequence]`.

        Args:
            starts: whether a row starts a text, bool `[batch]`; other rows continue the previous row's text. By
                default each row is a text.

        Returns:
            The experts that each token chose, bool `[L, T, E]` on the routers' device; none for padding.
        """
        columns = routing_columns(router_logits, selected_experts, counted.reshape(-1), jitter_eps)
        chosen = columns[..., : self.pairs.shape[-1]]
        self._columns += columns.sum(dim=1, dtype=torch.float64).cpu()
        self.pairs += (chosen.mT @ chosen).long().cpu()  # exact in float32 below 2^24 tokens of a forward pass
        rows = chosen.unflatten(1, counted.shape).sum(dim=2).long().cpu().transpose(0, 1)  # [batch, L, E]
        start_text = [True] * len(rows) if starts is None else starts.tolist()
        for row, num_tokens, starts_text in zip(rows, counted.sum(dim=-1).tolist(), start_text, strict=True):
            self._add_to_chunk(row, num_tokens, starts_text)
        return chosen > 0

    def _add_to_chunk(self, row: torch.Tensor, num_tokens: int, starts_text: bool) -> None:
        if starts_text:
            self._text_start = self.num_tokens
        while self._text_start // self.chunk_tokens >= MAX_CHUNKS:
            self._chunks = torch.cat([in_pairs(self._chunks), torch.zeros_like(self._chunks[::2])])
            self.chunk_tokens *= 2
        self._chunks[self._text_start // self.chunk_tokens] += row
        self.num_tokens += num_tokens

    def chunks(self, chunk_tokens: int | None = None) -> torch.Tensor:
        """Choices of each expert in chunks of consecutive texts, int64 `[C, L, E]`, C at most MAX_CHUNKS.

        A text belongs as a whole to the chunk in which it starts; a chunk without a start is left out. Chunks can be
        shuffled because neighbours stay together: neighbouring tokens and texts are alike, so that shuffling them one
        by one would understate chance.

        Args:
            chunk_tokens: a power of two, at least `self.chunk_tokens`, which is the default.

        Raises:
            ValueError: the counts are a sum.
        """
        if not len(self._chunks):
            raise ValueError("specialization needs the counts of each set; a sum of counts has no chunks")
        chunks, size = self._chunks, self.chunk_tokens
        while size < (chunk_tokens or size):
            chunks, size = in_pairs(torch.cat([chunks, torch.zeros_like(chunks[: len(chunks) % 2])])), 2 * size
        return chunks[chunks.sum(dim=(1, 2)) > 0]

    def load(self) -> torch.Tensor:
        """The share of each layer's choices that each expert gets, `[L, E]`, float64, rows sum to 1."""
        return self.sums.load()

    def expected_pairs(self) -> torch.Tensor:
        """Expected pairs if the choices of a token were independent, `[L, E, E]`, float64.

        A token chooses different experts, so this is quasi-independence and not the product of the loads: `w_i w_j`
        off the diagonal and 0 on it. Iterative proportional fitting finds the w that give every expert its real number
        of pairs.
        """
        pairs = self.pairs.double()
        wanted = pairs.sum(dim=-1) - pairs.diagonal(dim1=-2, dim2=-1)  # [L, E]
        weights = wanted.sqrt()
        for _ in range(1000):
            now = weights * (weights.sum(dim=-1, keepdim=True) - weights)
            weights = weights * torch.where(now > 0, wanted / now, 0).sqrt()
        expected = weights.unsqueeze(-1) * weights.unsqueeze(-2)
        return expected - torch.diag_embed(expected.diagonal(dim1=-2, dim2=-1))

    def __add__(self, other: "RoutingCounts") -> "RoutingCounts":
        """Counts of the texts of both, without chunks: these belong to one set."""
        total = RoutingCounts(*self.pairs.shape[:2])
        total._chunks = total._chunks[:0]
        total._columns, total.pairs = self._columns + other._columns, self.pairs + other.pairs
        total.num_tokens = self.num_tokens + other.num_tokens
        return total


def in_pairs(chunks: torch.Tensor) -> torch.Tensor:
    """Add neighbours in pairs, `[2C, L, E]` -> `[C, L, E]`."""
    return chunks.unflatten(0, (-1, 2)).sum(dim=1)


@contextmanager
def inference(*models: PreTrainedModel) -> Iterator[None]:
    """Put the models in eval mode, without gradients, and restore their mode afterwards."""
    were_training = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for model, was_training in zip(models, were_training, strict=True):
            model.train(was_training)


def model_inputs(
    model: PreTrainedModel, batch: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The batch on the model's device, and which of its tokens count, bool `[batch, sequence]`."""
    inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask") if key in batch}
    batch_size, length = inputs["input_ids"].shape
    return inputs, counted_tokens(inputs.get("attention_mask"), batch_size, length, model.device)


def run_routers(
    model: PreTrainedModel, batch: Mapping[str, torch.Tensor]
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], torch.Tensor, float, torch.Tensor | None]:
    """Run a batch, without the head, for the arguments of `RoutingCounts.add`."""
    inputs, counted = model_inputs(model, batch)
    decoder = model.get_decoder()  # also of a PEFT model
    outputs = decoder(**inputs, use_cache=False, output_router_logits=True, output_selected_experts=True)
    eps = model.config.router_jitter_noise
    return outputs.router_logits, outputs.selected_experts, counted, eps, batch.get("starts")


def empty_counts(model: PreTrainedModel) -> RoutingCounts:
    return RoutingCounts(model.config.num_hidden_layers, model.config.num_local_experts)


def check_counted(counts: RoutingCounts) -> None:
    if not counts.num_tokens:
        raise ValueError("`batches` must hold tokens; got no tokens, or padding alone")


def collect_routing(model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> RoutingCounts:
    """Count what the routers do in inference.

    Args:
        model: a GRIN-MoE model, with or without a head; its mode is restored.
        batches: model inputs, read once and not kept: `input_ids` and, if there is padding, `attention_mask`
            `[batch, sequence]`; `starts` `[batch]`, as in `RoutingCounts.add`, if a text may take several rows.

    Raises:
        ValueError: `batches` holds no token.
    """
    counts = empty_counts(model)
    with inference(model):
        for batch in batches:
            counts.add(*run_routers(model, batch))
    check_counted(counts)
    return counts


def expert_load(model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """Measure each expert's share of its layer's choices in inference.

    Args:
        model, batches: as in `collect_routing`, which counts more.

    Returns:
        `[L, E]`, float64 on the CPU, rows sum to 1; 1 / E everywhere is perfect balance.

    Raises:
        ValueError: `batches` holds no token.
    """
    return collect_routing(model, batches).load()


class RoutingComparison(NamedTuple):
    """Two models on the same tokens."""

    before: RoutingCounts
    after: RoutingCounts
    same_sets: torch.Tensor
    """Tokens with the same K experts in both models, in any order, int64 `[L]`."""
    shared_choices: torch.Tensor
    """Choices that both models made, int64 `[L]`: at most K per token."""

    def agreement(self) -> torch.Tensor:
        """Share of the tokens that go to the same experts, `[L]`."""
        return self.same_sets / self.before.sums.tokens

    def overlap(self) -> torch.Tensor:
        """Share of the choices that both models made, `[L]`."""
        return self.shared_choices / self.before.sums.choices.sum(dim=-1)

    def overlap_by_chance(self) -> torch.Tensor:
        """`overlap` if the models chose without regard to the token, each with its loads: K sum_i f_i f'_i, `[L]`."""
        top_k = self.before.sums.choices.sum(dim=-1) / self.before.sums.tokens
        return top_k * (self.before.load() * self.after.load()).sum(dim=-1)

    def load_difference(self) -> torch.Tensor:
        """Change of each expert's share of its layer's choices, `[L, E]`; rows sum to 0."""
        return self.after.load() - self.before.load()

    def load_similarity(self) -> torch.Tensor:
        """Cosine of each layer's loads before and after, `[L]`."""
        return torch.cosine_similarity(self.before.load(), self.after.load(), dim=-1)

    def __add__(self, other: "RoutingComparison") -> "RoutingComparison":  # type: ignore[override]
        return RoutingComparison(*map(add, self, other))


def compare_routing(
    before: PreTrainedModel, after: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]
) -> RoutingComparison:
    """Count the choices of two models for the same tokens, such as before and after fine-tuning.

    Args:
        before, after: models with equal numbers of layers, experts and experts per token; expert i is compared with
            expert i.
        batches: as in `collect_routing`.

    Raises:
        ValueError: the models differ in these numbers, or `batches` holds no token.
    """
    for field in ("num_hidden_layers", "num_local_experts", "num_experts_per_tok", "vocab_size"):
        values = [getattr(model.config, field) for model in (before, after)]
        if values[0] != values[1]:
            raise ValueError(f"{field} must be equal in both models; got {values[0]} and {values[1]}")
    counts = empty_counts(before), empty_counts(after)
    same, shared = torch.zeros(2, before.config.num_hidden_layers, dtype=torch.int64)
    with inference(before, after):
        for batch in batches:
            routings = [run_routers(model, batch) for model in (before, after)]
            chosen, others = (count.add(*routing).cpu() for count, routing in zip(counts, routings, strict=True))
            same += ((chosen == others).all(dim=-1) & chosen.any(dim=-1)).sum(dim=-1)
            shared += (chosen & others).sum(dim=(1, 2))
    check_counted(counts[0])
    return RoutingComparison(*counts, same, shared)


def token_routing(model: PreTrainedModel, input_ids: torch.Tensor) -> list[Routing]:
    """Route the tokens of one text, int64 `[T]`, in inference: each layer's `experts` and `weights` `[T, K]`."""
    with inference(model):
        router_logits, _, _, jitter_eps, _ = run_routers(model, {"input_ids": input_ids.unsqueeze(0)})
        top_k, estimator = model.config.num_experts_per_tok, model.config.router_estimator
        return [route(z.cpu(), top_k, jitter_eps, estimator=estimator, training=False) for z in router_logits]
