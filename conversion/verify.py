"""A conversion that proves itself: the model computed from the source and from the result, layer by layer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PhimoeForCausalLM, PhimoeForSequenceClassification, PhimoeModel, PreTrainedModel
from transformers.utils import logging

from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM, GrinMoeForSequenceClassification, GrinMoeModel, route
from modeling_grin.modeling_grinmoe import GrinMoePreTrainedModel
from modeling_grin.routing_grinmoe import inference_rule

from .checkpoint import Checkpoint
from .tensors import ConversionError

PROBE_SHAPE = (4, 64)  # sequences, tokens
# In float64, rounding sends no token to another expert: any difference is an error. (RoPE's tables are float32.)
DTYPE = torch.float64
TOLERANCE = 1e-6  # relative
SMALL = 5 * 10**8  # parameters, 4 GB of them: models up to this size are checked unless told otherwise
STOCK_CLASSES: dict[type, type[PreTrainedModel]] = {
    GrinMoeForCausalLM: PhimoeForCausalLM,
    GrinMoeForSequenceClassification: PhimoeForSequenceClassification,
    GrinMoeModel: PhimoeModel,
}

Layers = dict[str, torch.Tensor]
"""Module -> its output: embeddings, layers (of the last one the norm's), logits."""


def load_model(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> GrinMoePreTrainedModel:
    """Load the model of a checkpoint of any form, in `dtype`; by default one that holds all tensors as they are."""
    model = checkpoint.model_class._from_config(checkpoint.config, dtype=dtype or checkpoint.dtype)
    tensors = {name: tensor.read() for name, tensor in checkpoint.tensors.items()}
    if checkpoint.config.tie_word_embeddings:
        tensors |= {name: tensors[source] for name, source in model.all_tied_weights_keys.items()}
    model.load_state_dict(tensors)
    return model.eval()


class Calibration(NamedTuple):
    """Measurements of a model's routers on a text."""

    router_std: list[float]
    """Per layer: the standard deviation of a token's router logits about their mean."""
    near_tie_rate: float
    """The share of (token, layer) at which MaskedSoftmax keeps more than one expert, in any of the K choices."""
    load: torch.Tensor
    """Each expert's share of its layer's choices, `[layers, experts]`."""


@torch.inference_mode()
def calibrate(model: GrinMoePreTrainedModel, rows: Sequence[torch.Tensor]) -> Calibration:
    """Measure a model's routing on rows of token ids. Near-ties whose weight rounds to 1 do not count."""
    config, num_tokens = model.eval().config, sum(map(len, rows))
    layers, experts = config.num_hidden_layers, config.num_local_experts
    squares, choices = torch.zeros(layers, dtype=torch.float64), torch.zeros(layers, experts, dtype=torch.float64)
    near_ties = 0
    for row in rows:
        output = model.get_decoder()(row[None], output_router_logits=True, use_cache=False)
        for layer, logits in enumerate(output.router_logits):
            logits = logits.double()
            squares[layer] += (logits - logits.mean(dim=-1, keepdim=True)).square().mean(dim=-1).sum()
            routing = route(logits, config.num_experts_per_tok, config.router_jitter_noise,
                            estimator=config.router_estimator, training=False)  # fmt: skip
            choices[layer] += torch.bincount(routing.experts.flatten(), minlength=experts)
            if inference_rule(config) != "gshard":  # which has no keep set
                near_ties += int((routing.weights < 1).any(dim=-1).sum())
    load = choices / choices.sum(dim=1, keepdim=True)
    return Calibration((squares / num_tokens).sqrt().tolist(), near_ties / num_tokens / layers, load)


def random_tokens(config: GrinMoeConfig) -> torch.Tensor:
    """Draw the token ids that models are compared on, `[sequences, tokens]`."""
    length = min(PROBE_SHAPE[1], config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (PROBE_SHAPE[0], length), generator=generator)


@contextmanager
def without_bars() -> Iterator[None]:
    """Silence transformers' progress bars: the conversion has its own."""
    were_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            logging.enable_progress_bar()


@torch.no_grad()
def compute(model: PreTrainedModel, input_ids: torch.Tensor) -> Layers:
    """Return the outputs of a model's parts for `input_ids`."""
    model.config.expert_dropout = 0.0  # eager experts have none, and it acts in training alone
    model.set_experts_implementation("eager")  # grouped kernels have no float64
    output = model.to(DTYPE).eval()(input_ids=input_ids, use_cache=False, output_hidden_states=True)
    layers = [f"layers.{n}" for n in range(model.config.num_hidden_layers)]
    layers[-1] += " or norm"  # its output is normed
    return dict(zip(["embed_tokens", *layers], output.hidden_states, strict=True)) | {"logits": output[0]}


def compare_folder(checkpoint: Checkpoint, result: Path, target: str, dtype: torch.dtype | None) -> float:
    """Compare a converted folder, loaded as its users load it, with its source, rounded to `dtype` as the result is.

    transformers loads the source if it can, so that not only our own reader is compared with itself.
    """
    input_ids, dtype, model_class = random_tokens(checkpoint.config), dtype or checkpoint.dtype, checkpoint.model_class
    loaded_class = STOCK_CLASSES[model_class] if target == "phimoe" else model_class
    with without_bars():
        if checkpoint.is_standard:
            source = model_class.from_pretrained(checkpoint.path, config=checkpoint.config, dtype=dtype)
        else:
            source = load_model(checkpoint, dtype)
        before = compute(source, input_ids)
        return compare(before, compute(loaded_class.from_pretrained(result, dtype=dtype), input_ids))


def compare(before: Layers, after: Layers, tolerance: float = TOLERANCE) -> float:
    """Return the relative difference of the logits, in the maximum norm; refuse one beyond `tolerance` anywhere."""
    for name, expected in before.items():
        largest = (after[name] - expected).abs().max()
        difference = 0.0 if largest == 0 else (largest / expected.abs().max()).item()
        if not difference <= tolerance:  # NaN included
            relative = f"{difference:.2g} relative, and up to {tolerance:g} would be rounding"
            raise ConversionError(f"the result differs first in {name} ({relative}): nothing has been written")
    return difference
