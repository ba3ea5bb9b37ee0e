"""A conversion that proves itself: the model computed from the source and from the result, layer by layer."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import PhimoeForCausalLM, PhimoeForSequenceClassification, PhimoeModel, PreTrainedModel
from transformers.utils import logging

from modeling_grin import GrinMoeForCausalLM, GrinMoeForSequenceClassification, GrinMoeModel
from modeling_grin.modeling_grinmoe import GrinMoePreTrainedModel

from .checkpoint import Checkpoint
from .forms import model_class_of
from .tensors import ConversionError

PROBE_SHAPE = (4, 64)  # sequences, tokens
# In float64, rounding sends no token to another expert: what differs, differs. (RoPE's tables are float32.)
DTYPE = torch.float64
TOLERANCE = 1e-6  # relative
# Of down projections that are divided by a top-k that is no power of two, and rounded.
COPIES_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.2}
GGUF_TOLERANCE = 1e-5  # of weights in float32
GGUF_ROUTER_SHIFT = 20  # see `load_gguf`
SMALL = 5 * 10**8  # parameters, 4 GB of them: models up to this size are checked unless told otherwise
STOCK_CLASSES: dict[type, type[PreTrainedModel]] = {
    GrinMoeForCausalLM: PhimoeForCausalLM,
    GrinMoeForSequenceClassification: PhimoeForSequenceClassification,
    GrinMoeModel: PhimoeModel,
}

Layers = dict[str, torch.Tensor]
"""Module -> what it returned, in the order in which the model computes, the logits last."""


def load_model(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> GrinMoePreTrainedModel:
    """The model of a checkpoint of any form, filled with its released tensors.

    Args:
        dtype: to convert them to; by default one that holds them all as they are.
    """
    model_class = model_class_of(checkpoint.tensors)
    model = model_class._from_config(checkpoint.config, dtype=dtype or checkpoint.dtype)
    tensors = {name: tensor.read() for name, tensor in checkpoint.tensors.items()}
    if checkpoint.config.tie_word_embeddings:
        tensors |= {name: tensors[source] for name, source in model.all_tied_weights_keys.items()}
    model.load_state_dict(tensors)
    return model.eval()


@contextmanager
def watch(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """Collect what the embeddings, the decoder layers and the final norm return in one forward pass."""
    seen: dict[str, torch.Tensor] = {}
    decoder = model.get_decoder()
    layers = {f"layers.{n}": layer for n, layer in enumerate(decoder.layers)}
    modules: dict[str, nn.Module] = {"embed_tokens": decoder.embed_tokens, **layers, "norm": decoder.norm}

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: torch.Tensor | tuple) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def probe(checkpoint: Checkpoint) -> torch.Tensor:
    """Random tokens, `[sequences, tokens]`."""
    config = checkpoint.config
    length = min(PROBE_SHAPE[1], config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (PROBE_SHAPE[0], length), generator=generator)


@contextmanager
def without_bars() -> Iterator[None]:
    """Silence transformers' progress bars: there is one already."""
    were_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            logging.enable_progress_bar()


@torch.no_grad()
def compute(model: PreTrainedModel, input_ids: torch.Tensor) -> Layers:
    """What the parts of a model return for `input_ids`."""
    model.set_experts_implementation("eager")  # grouped kernels have no float64
    model = model.to(DTYPE).eval()
    with watch(model) as seen:
        output = model(input_ids=input_ids, use_cache=False)
    return {**seen, "logits": output[0]}


def compute_source(checkpoint: Checkpoint, dtype: torch.dtype | None, input_ids: torch.Tensor) -> Layers:
    """What the source computes, its numbers rounded to `dtype` as in the result.

    Where transformers can read the folder it does, so that it is not only our own reading that is compared.
    """
    if checkpoint.is_standard:
        model_class = model_class_of(checkpoint.tensors)
        with without_bars():
            model = model_class.from_pretrained(
                checkpoint.path, config=checkpoint.config, dtype=dtype or checkpoint.dtype
            )
    else:
        model = load_model(checkpoint, dtype)
    return compute(model, input_ids)


def compute_result(
    path: Path, target: str, model_class: type[GrinMoePreTrainedModel], dtype: torch.dtype, input_ids: torch.Tensor
) -> Layers:
    """What the converted checkpoint computes, loaded as its users load it, in `dtype`."""
    loaded_class = STOCK_CLASSES[model_class] if target == "phimoe" else model_class
    with without_bars():
        model = loaded_class.from_pretrained(path, dtype=dtype)
    return compute(model, input_ids)


def without_near_ties(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with a keep set of one expert."""
    config = copy.deepcopy(checkpoint.config)
    config.router_jitter_noise = 0.0
    return dataclasses.replace(checkpoint, config=config)


def compare_copies(dense: Checkpoint, mixture: Checkpoint) -> float:
    """`compare` a mixture of copies with the model of one expert, near-ties aside, in which it weights less.

    Returns:
        The relative difference of the logits with near-ties.
    """
    input_ids = probe(dense)
    divisor = mixture.config.num_experts_per_tok
    tolerance = TOLERANCE if divisor.bit_count() == 1 else COPIES_TOLERANCE[mixture.dtype]
    before = compute(load_model(dense, DTYPE), input_ids)
    compare(before, compute(load_model(without_near_ties(mixture), DTYPE), input_ids), tolerance)
    return compare(before, compute(load_model(mixture, DTYPE), input_ids), torch.inf)


def compare_gguf(checkpoint: Checkpoint, path: Path, input_ids: torch.Tensor, *, is_exact: bool) -> float:
    """`compare` what llama.cpp computes from a file, in torch, with the model without near-ties.

    Args:
        is_exact: whether the file is F32. If not, one is made beside it, and compared, because the difference of
            rounded weights says nothing of the folds.

    Returns:
        The relative difference of the logits, of the file's type.
    """
    from .gguf_export import context_length, export_gguf, load_gguf

    if not is_exact:
        unrounded = path.with_name(f"{path.name}.f32")
        export_gguf(checkpoint, unrounded, file_type="f32")
        compare_gguf(checkpoint, unrounded, input_ids, is_exact=True)
        unrounded.unlink()

    input_ids = input_ids[:, : context_length(checkpoint.config)]
    model = load_model(without_near_ties(checkpoint), DTYPE)
    shift = 0 if checkpoint.config.router_estimator == "gshard" else GGUF_ROUTER_SHIFT
    before, after = compute(model, input_ids), compute(load_gguf(path, DTYPE, router_shift=shift), input_ids)
    # Centring takes the mean out of the residual stream; it is not lost, because every norm takes it out.
    residual = [name for name in before if name not in ("norm", "logits")]
    before |= {name: before[name] - before[name].mean(dim=-1, keepdim=True) for name in residual}
    return compare(before, after, GGUF_TOLERANCE if is_exact else torch.inf)


def near_tie_rate(checkpoint: Checkpoint) -> float:
    """The share of (token, layer) of `probe` at which MaskedSoftmax keeps more than one expert in a choice."""
    from .gguf_export import calibrate

    return calibrate(load_model(checkpoint), list(probe(checkpoint))).near_tie_rate


def compare(before: Layers, after: Layers, tolerance: float = TOLERANCE) -> float:
    """The relative difference of the logits, in the maximum norm.

    Raises:
        ConversionError: something differs by more than `tolerance`; names the first module where it does.
    """
    for name, expected in before.items():
        largest = (after[name] - expected).abs().max()
        difference = 0.0 if largest == 0 else (largest / expected.abs().max()).item()
        if not difference <= tolerance:  # NaN, too
            raise ConversionError(
                f"the check failed: the converted model differs first in {name}, by {difference:.2g} (relative, up to "
                f"{tolerance:g} would be rounding); nothing has been written"
            )
    return difference
