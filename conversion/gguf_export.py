"""Export GRIN-MoE as a GGUF file, with weights rewritten so that stock llama.cpp computes the model.

llama.cpp's `phimoe` graph (src/models/phimoe.cpp, phi3.cpp) computes another function: RMSNorm with a bias instead of
LayerNorm, top-k weights that sum to 1 instead of weights of 1 each, and no sliding window.

- *Centring.* The mean over the hidden dimension is removed from everything that is added to the residual stream: from
  every embedding, and from the output dimension of `o_proj` and of each expert's down projection. A LayerNorm removes
  that mean anyway; without it, LayerNorm and RMSNorm are the same.
- *Router.* Its weights are multiplied by 2^-k: the choice stays, and the softmax of all choices tends to the same
  value, so that normalised weights are 1 / K each. The down projections are multiplied by K. If k is too small, the
  weights stay unequal; if it is too large, float32 rounding can change which experts win. At logits of standard
  deviation 2, k = 12 keeps both errors near 1e-4. Half of k is put on the norm before the router and removed from the
  experts' gate and up projections: backends that compute the router's product in half precision would make a router
  with all of 2^-12 subnormal.

Two differences remain. Near-ties, where the keep set of MaskedSoftmax has more than one expert, are computed as with
`router_jitter_noise` 0. Positions beyond the sliding window see keys that the model does not see, so the file's
context ends there.

Shapes: V vocab_size, H hidden_size, F intermediate_size, E num_local_experts, K num_experts_per_tok.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from gguf.constants import MODEL_TENSOR

from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM
from modeling_grin.routing_grinmoe import inference_rule

from .checkpoint import Checkpoint
from .gguf_vocabulary import add_vocabulary
from .tensors import ConversionError, StoredTensor
from .verify import Calibration
from .writing import Progress, check_space

ARCHITECTURE = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.PHIMOE]
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS, llama-hparams.h
ROUTER_SHIFT, ROUTER_STD = 12, 2.0  # k for logits of this standard deviation
CHUNK_ELEMENTS = 2**18  # folded and quantised at a time; in float64 they fit a processor's cache

# The types of the matrices; routers, norms and biases are always F32.
ROUNDED_TYPES = ("f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
FILE_TYPES = {"f32": LlamaFileType.ALL_F32}
FILE_TYPES |= {name: LlamaFileType[f"MOSTLY_{name.upper()}"] for name in ROUNDED_TYPES}

# Released modules by the tensors they become; `{n}` is the layer, `{e}` the expert.
MODULES = {
    MODEL_TENSOR.TOKEN_EMBD: "model.embed_tokens",
    MODEL_TENSOR.ATTN_NORM: "model.layers.{n}.input_layernorm",
    MODEL_TENSOR.ATTN_Q: "model.layers.{n}.self_attn.q_proj",
    MODEL_TENSOR.ATTN_K: "model.layers.{n}.self_attn.k_proj",
    MODEL_TENSOR.ATTN_V: "model.layers.{n}.self_attn.v_proj",
    MODEL_TENSOR.ATTN_OUT: "model.layers.{n}.self_attn.o_proj",
    MODEL_TENSOR.FFN_NORM: "model.layers.{n}.post_attention_layernorm",
    MODEL_TENSOR.FFN_GATE_INP: "model.layers.{n}.block_sparse_moe.gate",
    MODEL_TENSOR.FFN_GATE_EXP: "model.layers.{n}.block_sparse_moe.experts.{e}.w1",
    MODEL_TENSOR.FFN_DOWN_EXP: "model.layers.{n}.block_sparse_moe.experts.{e}.w2",
    MODEL_TENSOR.FFN_UP_EXP: "model.layers.{n}.block_sparse_moe.experts.{e}.w3",
    MODEL_TENSOR.OUTPUT_NORM: "model.norm",
    MODEL_TENSOR.OUTPUT: "lm_head",
}
WITHOUT_BIAS = {kind for kind, module in MODULES.items() if "embed" in module or "block_sparse_moe" in module}
# The dimension of a weight, or the first of a bias, that runs along the hidden states it adds to.
CENTRED = {MODEL_TENSOR.TOKEN_EMBD: 1, MODEL_TENSOR.ATTN_OUT: 0, MODEL_TENSOR.FFN_DOWN_EXP: 0}


@dataclass(frozen=True)
class GgufReport:
    """The contents of a GGUF file, and its differences from the model.

    Args:
        context_length: positions up to which the file computes what the model computes.
        router_shifts: k, per layer.
        quantization_error: by kind of tensor (`ffn_down_exps`, ...): the Frobenius norm of the error, relative to the
            weights' norm.
    """

    file_type: str
    context_length: int
    router_shifts: list[int]
    quantization_error: dict[str, float]
    near_tie_rate: float | None
    notes: list[str]

    def lines(self) -> list[str]:
        """Return the report as text."""
        near_ties = (
            "not measured (--calibration FILE does)"
            if self.near_tie_rate is None
            else f"{self.near_tie_rate:.2%} of (token, layer)"
        )
        errors = ", ".join(f"{kind} {error:.2g}" for kind, error in self.quantization_error.items() if error > 0)
        return [
            f"type {self.file_type}; relative quantisation error: {errors or 'none'}",
            f"context: {self.context_length} tokens; beyond them the file is another model (no sliding window)",
            f"near-ties, computed as with router_jitter_noise=0: {near_ties}",
            f"routers multiplied by 2^-k with k from {min(self.router_shifts)} to {max(self.router_shifts)}",
            *self.notes,
        ]


class Place(NamedTuple):
    """A tensor of the file, and its released tensors: one, or one per expert."""

    kind: MODEL_TENSOR
    layer: int | None
    parameter: str  # weight, bias
    sources: list[str]

    @property
    def name(self) -> str:
        return f"{gguf.TENSOR_NAMES[self.kind].format(bid=self.layer)}.{self.parameter}"


@dataclass
class Target:
    """A tensor to be written.

    Args:
        sources: one, or one per expert.
        factor: what to multiply by.
        squares: the sums of squares of the errors and of the values that have been stored so far.
    """

    place: Place
    sources: list[StoredTensor]
    factor: float
    type: GGMLQuantizationType
    squares: tuple[float, float] = (0.0, 0.0)

    @property
    def shape(self) -> tuple[int, ...]:
        """In torch's order: E first if it has one matrix per expert, the row length last."""
        shape = self.sources[0].shape
        return (len(self.sources), *shape) if "{e}" in MODULES[self.place.kind] else shape

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * size

    def folded(self, source: StoredTensor) -> Iterator[np.ndarray]:
        """Yield rows of a source to store: float32, folded in float64 if there is a mean to remove."""
        centred = CENTRED.get(self.place.kind)
        if centred is None:
            yield from ((part.float() * self.factor).numpy() for part in read_rows(source))
            return
        if centred == 0:
            mean = torch.stack([part.double().sum(dim=0) for part in read_rows(source)]).sum(dim=0) / source.shape[0]
        for part in read_rows(source):
            values = part.double()
            if centred == 1:
                mean = values.mean(dim=1, keepdim=True)
            yield ((values - mean) * self.factor).float().numpy()

    def data(self) -> Iterator[memoryview]:
        """Yield the bytes, chunk by chunk; each is read back, for its error."""
        for source in self.sources:
            for values in self.folded(source):
                values = values.reshape(1, -1)  # blocks follow one another all the same, and gguf loops over rows
                with np.errstate(all="ignore"):  # what overflows is found below
                    data = gguf.quantize(values, self.type)
                    stored = gguf.dequantize(data, self.type)
                    error, whole = float(np.linalg.norm(stored - values)), float(np.linalg.norm(values))
                if not math.isfinite(error):
                    largest = f"its largest value is {np.abs(values).max():.4g}"
                    raise ConversionError(f"{source.where} cannot be stored as {self.type.name}: {largest}")
                self.squares = self.squares[0] + error**2, self.squares[1] + whole**2
                yield np.ascontiguousarray(data).view(np.uint8).reshape(-1).data


def read_rows(source: StoredTensor) -> Iterator[torch.Tensor]:
    """Yield a tensor, some rows at a time; elements of a bias."""
    length, *row = source.shape
    size = math.prod(row)
    step = max(1, CHUNK_ELEMENTS // size)
    for start in range(0, length, step):
        shape = (min(step, length - start), *row)
        yield source.part(start * size, shape, source.where).read()


def list_places(config: GrinMoeConfig) -> Iterator[Place]:
    """Yield all tensors of a file, in its order."""
    around = [kind for kind, module in MODULES.items() if "{n}" not in module]
    inside = [kind for kind, module in MODULES.items() if "{n}" in module]
    layers = [(kind, layer) for layer in range(config.num_hidden_layers) for kind in inside]
    for kind, layer in [*((kind, None) for kind in around), *layers]:
        for parameter in ["weight"] if kind in WITHOUT_BIAS else ["weight", "bias"]:
            module = MODULES[kind]
            experts = range(config.num_local_experts) if "{e}" in module else [0]
            yield Place(kind, layer, parameter, [f"{module.format(n=layer, e=e)}.{parameter}" for e in experts])


def check_representable(config: GrinMoeConfig) -> None:
    """Raise ConversionError for the first field whose value llama.cpp's graph cannot represent."""
    heads = f"{config.hidden_size} / {config.num_attention_heads}"
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    rules = ["sparsemixer_v2", "sparsemixer_v2_star", *["gshard"] * (config.num_experts_per_tok > 1)]
    for field, is_other, reason in (
        ("head_dim", config.head_dim != config.hidden_size / config.num_attention_heads,
         f"has heads of hidden_size / num_attention_heads = {heads}"),
        ("hidden_act", config.hidden_act != "silu", "has silu in this architecture"),
        ("rope_parameters", rope_type != "default", "is only proven equal for rope_type='default'"),
        ("moe_output_scale", config.moe_output_scale, "has no scale of the mixture's output"),
        ("router_bias_update_rate", config.router_bias_update_rate, "has no selection bias"),
        ("num_local_experts", config.num_local_experts > MAX_EXPERTS, f"has at most {MAX_EXPERTS}"),
        ("router_estimator", inference_rule(config) not in rules,
         "normalises the experts' weights, which this one does not"),
    ):  # fmt: skip
        if is_other:
            raise ConversionError(f"{field}={getattr(config, field)!r} cannot be exported to GGUF: llama.cpp {reason}")


def context_length(config: GrinMoeConfig) -> int:
    """Count the positions up to which full attention equals the window, which has a query's own key besides."""
    if config.sliding_window is None:
        return config.max_position_embeddings
    return min(config.max_position_embeddings, config.sliding_window + 1)


def estimate_router_std(gate: torch.Tensor, norm_weight: torch.Tensor, norm_bias: torch.Tensor) -> float:
    """Estimate `Calibration.router_std` of one layer from its weights: `[E, H]`, `[H]`, `[H]`.

    The router reads `u * norm_weight + norm_bias`, in which u, normalised, has unit variance per element; the elements
    are taken as uncorrelated.
    """
    gate = gate.double()
    gate = gate - gate.mean(dim=0)
    variance = (gate * norm_weight.double()).square().sum(dim=1) + (gate @ norm_bias.double()).square()
    return variance.mean().sqrt().item()


def choose_router_shift(router_std: float, config: GrinMoeConfig) -> int:
    """Return k of one layer; 0 if llama.cpp's weights equal the model's: a single one is 1, GShard normalises."""
    if config.num_experts_per_tok == 1 or inference_rule(config) == "gshard":
        return 0
    return ROUTER_SHIFT + (round(math.log2(router_std / ROUTER_STD)) if 0 < router_std < math.inf else 0)


def choose_factor(place: Place, config: GrinMoeConfig, router_shifts: Sequence[int]) -> float:
    """Return what to multiply a tensor by; `router_shifts` are the layers' k."""
    shift = router_shifts[place.layer] if place.layer is not None else 0
    on_norm = shift // 2
    factors = {
        MODEL_TENSOR.FFN_NORM: 2.0**-on_norm,
        MODEL_TENSOR.FFN_GATE_INP: 2.0 ** (on_norm - shift),
        MODEL_TENSOR.FFN_GATE_EXP: 2.0**on_norm,
        MODEL_TENSOR.FFN_UP_EXP: 2.0**on_norm,
        MODEL_TENSOR.FFN_DOWN_EXP: 1.0 if inference_rule(config) == "gshard" else float(config.num_experts_per_tok),
    }
    return factors.get(place.kind, 1.0)


def choose_type(place: Place, row_length: int, file_type: str) -> GGMLQuantizationType:
    """Return F32 for routers, norms and biases, and F16 for rows that blocks do not divide, as llama.cpp does."""
    if place.parameter == "bias" or "norm" in MODULES[place.kind] or place.kind == MODEL_TENSOR.FFN_GATE_INP:
        return GGMLQuantizationType.F32
    wanted = GGMLQuantizationType[file_type.upper()]
    return GGMLQuantizationType.F16 if row_length % gguf.GGML_QUANT_SIZES[wanted][0] else wanted


def find_sources(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """Return the tensors that a file is made of: a tied head is the embedding, and missing biases are zeros."""
    if checkpoint.model_class is not GrinMoeForCausalLM:
        kind = checkpoint.model_class.__name__
        raise ConversionError(f"{checkpoint.path} holds a {kind}: llama.cpp has GrinMoeForCausalLM alone")
    sources = dict(checkpoint.tensors)
    if checkpoint.config.tie_word_embeddings:
        sources["lm_head.weight"] = sources["model.embed_tokens.weight"]
    wanted = [name for place in list_places(checkpoint.config) for name in place.sources]
    for name in sources.keys() - set(wanted):
        raise ConversionError(f"{sources[name].where} has no place in a GGUF file: llama.cpp has no such layer")
    for name in wanted:
        if name not in sources:
            length = sources[name.removesuffix("bias") + "weight"].shape[0]
            sources[name] = StoredTensor((length,), torch.float32, f"{name}, zeros", partial(torch.zeros, length))
    return sources


def relative_errors(targets: Sequence[Target]) -> dict[str, float]:
    """Return by kind of tensor: the Frobenius norm of the errors over the norm of the values."""
    sums: dict[str, np.ndarray] = {}
    for target in targets:
        kind = gguf.TENSOR_NAMES[target.place.kind].removeprefix("blk.{bid}.")
        sums[kind] = sums.get(kind, np.zeros(2)) + target.squares
    return {kind: math.sqrt(error / whole) if whole else 0.0 for kind, (error, whole) in sums.items()}


def export_gguf(
    checkpoint: Checkpoint,
    path: Path,
    *,
    file_type: str = "f16",
    calibration: Calibration | None = None,
    progress: Progress = lambda done, total: None,
) -> GgufReport:
    """Write a checkpoint as one GGUF file for llama.cpp; a few chunks are in memory at a time.

    Args:
        path: a temporary name, where a failure leaves a file that does not load.
        file_type: a key of `FILE_TYPES`.
        calibration: from `calibrate`, for the routers' k and the report; by default k is chosen from the weights.
        progress: called with the bytes that have been written since the last call, and with those in all.

    Raises:
        ConversionError: llama.cpp cannot represent the model or its tokenizer, or values are not finite in the type
            that they are stored as.
    """
    config = checkpoint.config
    if file_type not in FILE_TYPES:
        raise ConversionError(f"dtype must be one of {', '.join(FILE_TYPES)} for GGUF; got {file_type!r}")
    check_representable(config)
    sources = find_sources(checkpoint)
    if calibration is None:
        layers = [f"model.layers.{n}" for n in range(config.num_hidden_layers)]
        names = ["block_sparse_moe.gate.weight", "post_attention_layernorm.weight", "post_attention_layernorm.bias"]
        router_std = [estimate_router_std(*(sources[f"{layer}.{name}"].read() for name in names)) for layer in layers]
    else:
        router_std = calibration.router_std
    router_shifts = [choose_router_shift(std, config) for std in router_std]
    targets = []
    for place in list_places(config):
        tensors = [sources[name] for name in place.sources]
        kind = choose_type(place, tensors[0].shape[-1], file_type)
        targets.append(Target(place, tensors, choose_factor(place, config, router_shifts), kind))
    notes = write_header(path, checkpoint, targets, file_type)
    wanted = GGMLQuantizationType[file_type.upper()]
    unfit = [target.place.name for target in targets if target.type not in (wanted, GGMLQuantizationType.F32)]
    if unfit:
        notes.append(f"stored as F16, because rows are not a multiple of {wanted.name}'s blocks: {', '.join(unfit)}")
    write_tensors(path, targets, progress)
    near_tie_rate = None if calibration is None else calibration.near_tie_rate
    errors = relative_errors(targets)
    return GgufReport(file_type, context_length(config), router_shifts, errors, near_tie_rate, notes)


def write_header(path: Path, checkpoint: Checkpoint, targets: Sequence[Target], file_type: str) -> list[str]:
    """Write everything before the tensors; return notes about the tokenizer."""
    config = checkpoint.config
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    try:
        writer.add_file_type(FILE_TYPES[file_type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(context_length(config))
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base((config.rope_parameters or {}).get("rope_theta", config.default_theta))
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        name, notes = add_vocabulary(writer, checkpoint.path, config.vocab_size)
        writer.add_name(f"GRIN-MoE ({name} tokens)" if name else "GRIN-MoE")
        for target in targets:
            dtype = np.dtype(np.float32)
            writer.add_tensor_info(target.place.name, target.shape, dtype, target.nbytes, raw_dtype=target.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    return notes


def write_tensors(path: Path, targets: Sequence[Target], progress: Progress) -> None:
    """Write the tensors behind the header; each begins at a multiple of the alignment."""
    total = sum(target.nbytes for target in targets)
    check_space(path, total)
    with path.open("ab") as file:
        for target in targets:
            file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))
            for data in target.data():
                file.write(data)
                progress(len(data), total)
        file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))
