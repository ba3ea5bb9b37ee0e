"""The forms of a checkpoint: maps between the names in its files and the released tensors. Strict both ways.

The model's parameters follow from its config; a form only decides whether the experts of a layer are stacked.
Row-major stacking puts one expert's bytes after the other's, so that changing the form moves bytes and computes
nothing.

Shapes: E num_local_experts, F intermediate_size, H hidden_size.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from transformers import initialization as init

from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM, GrinMoeForSequenceClassification, GrinMoeModel
from modeling_grin.layout_grinmoe import EXPERT_WEIGHTS
from modeling_grin.modeling_grinmoe import GrinMoePreTrainedModel

from .tensors import DTYPE_NAMES, ConversionError, StoredTensor

Shape = tuple[int, ...]
Groups = Mapping[str, tuple[Shape, Mapping[str, Shape]]]
"""Name in a form -> the tensor's shape, and the released tensors that its memory holds, in this order."""


def list_groups(form: str, config: GrinMoeConfig, model_class: type[GrinMoePreTrainedModel]) -> Groups:
    """Return the tensors of a model in a form.

    Args:
        form: `hub`, the released names, or `fused`, where experts are stacked as in the model:
            `experts.gate_up_proj` [E, 2F, H], each w1 above its w3, and `experts.down_proj` [E, H, F], w2.
    """
    with torch.device("meta"), init.no_init_weights():
        model = model_class(config)
    tied = model.all_tied_weights_keys if config.tie_word_embeddings else {}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    fused = {name: (shape, released_parts(name, shape)) for name, shape in shapes.items()}
    if form == "fused":
        return fused
    return {part: (shape, {part: shape}) for _, parts in fused.values() for part, shape in parts.items()}


def released_parts(name: str, shape: Shape) -> dict[str, Shape]:
    """Return name -> shape of the released tensors that a parameter's memory holds, in this order."""
    module, _, attribute = name.rpartition(".")
    if attribute not in EXPERT_WEIGHTS:
        return {name: shape}
    parts = EXPERT_WEIGHTS[attribute]
    num_experts, rows, columns = shape
    return {
        f"{module}.{expert}.{part}.weight": (rows // len(parts), columns)
        for expert in range(num_experts)
        for part in parts
    }


def model_class_of(names: Iterable[str]) -> type[GrinMoePreTrainedModel]:
    """Return the class of model that tensors of these names belong to."""
    modules = {name.partition(".")[0] for name in names}
    if "score" in modules:
        return GrinMoeForSequenceClassification
    return GrinMoeForCausalLM if "model" in modules else GrinMoeModel


def remove_prefix(found: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Remove what wrappers put before every name: `module.`, or `model.` twice as in `{"model": state_dict}`."""
    embeddings = "embed_tokens.weight"
    anchor = next((name for name in found if name.endswith(embeddings)), embeddings)
    prefix = anchor.removesuffix(embeddings).removesuffix("model.")
    renamed = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    if len(renamed) < len(found):
        twice = next(name for name in found if f"{prefix}{name}" in found)
        raise ConversionError(f"{found[twice].where} is there twice: as {twice} and as {prefix}{twice}")
    return renamed


def check_fit(found: Mapping[str, StoredTensor], shapes: Mapping[str, Shape], where: str, what: str) -> None:
    """Raise ConversionError unless the tensors found at `where` have the names and shapes of `what`."""
    problems = [f"{name} is missing" for name in shapes if name not in found]
    for name, tensor in found.items():
        if name not in shapes:
            problems.append(f"{tensor.where} is not part of the model that the config describes")
        elif tensor.shape != shapes[name]:
            problems.append(f"{tensor.where} has shape {list(tensor.shape)}, the config says {list(shapes[name])}")
        elif tensor.dtype not in DTYPE_NAMES:
            problems.append(
                f"{tensor.where} has dtype {tensor.dtype}; it must be one of {', '.join(map(str, DTYPE_NAMES))}"
            )
    if problems:
        shown = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
        raise ConversionError(f"{where}: {len(problems)} tensor(s) do not fit {what}: {shown}")


def released_tensors(
    found: Mapping[str, StoredTensor], config: GrinMoeConfig, where: str
) -> tuple[str, dict[str, StoredTensor]]:
    """Return the form and the released tensors of the checkpoint at `where`, in the order of the model's parameters.

    `found` has the names that the files give them. The model of `config` must need each of them, and no other.
    """
    found = remove_prefix(found)
    layers, experts = config.num_hidden_layers, config.num_local_experts
    has_experts = experts <= len(found) or any(tensor.shape[:1] == (experts,) for tensor in found.values())
    if layers > len(found) or not has_experts:  # checked before the model, which may be absurdly large, is described
        sizes = f"num_hidden_layers={layers} and num_local_experts={experts}"
        raise ConversionError(f"{where}: the config says {sizes}, but there are only {len(found)} tensors")
    model_class = model_class_of(found)
    forms = {form: list_groups(form, config, model_class) for form in ("hub", "fused")}
    form = max(forms, key=lambda form: len(found.keys() & forms[form].keys()))  # knows most of the names
    groups = forms[form]
    head = found.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    check_fit(found, {name: shape for name, (shape, _) in groups.items()}, where, model_class.__name__)
    if head is not None:
        embeddings = next(tensor for name, tensor in found.items() if name.endswith("embed_tokens.weight"))
        if not torch.equal(head.read(), embeddings.read()):
            raise ConversionError(
                f"{where}: lm_head.weight differs from model.embed_tokens.weight: untie them in the config"
            )
    tensors: dict[str, StoredTensor] = {}
    for name, (_, parts) in groups.items():
        start = 0
        for part, shape in parts.items():
            stored = found[name]
            tensors[part] = stored if part == name else stored.part(start, shape, f"{part} of {stored.where}")
            start += math.prod(shape)
    return form, tensors
