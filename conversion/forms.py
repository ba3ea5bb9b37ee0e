"""The forms of a checkpoint, as maps between the names in its files and the released tensors. Strict both ways.

What the model's parameters are follows from its config; what a form calls them, from two things: whether it stacks
the experts of a layer, and how it spells two modules. Row-major stacking puts one expert's bytes after the other's, so
that changing the form of a checkpoint moves bytes and computes nothing.

Shapes: E num_local_experts, F intermediate_size, H hidden_size.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from transformers import initialization as init

from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM, GrinMoeForSequenceClassification, GrinMoeModel
from modeling_grin.checkpoint_grinmoe import EXPERT_WEIGHTS
from modeling_grin.modeling_grinmoe import GrinMoePreTrainedModel

from .tensors import ConversionError, StoredTensor

Shape = tuple[int, ...]
Groups = Mapping[str, tuple[Shape, Mapping[str, Shape]]]
"""Name in a form -> the tensor's shape, and the released tensors that its memory holds, in this order."""


DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # of weights that are not quantised


@dataclass(frozen=True)
class Form:
    """How a form's names differ from the released ones.

    Args:
        fused: experts are stacked, `experts.gate_up_proj` [E, 2F, H] (each w1 above its w3) and `experts.down_proj`
            [E, H, F] (w2), as the model has them.
        spelling: released part of a name -> this form's.
    """

    name: str
    fused: bool = False
    spelling: Mapping[str, str] = field(default_factory=dict)

    def groups(self, config: GrinMoeConfig, model_class: type[GrinMoePreTrainedModel]) -> Groups:
        """The tensors of this form for a model."""
        groups: dict[str, tuple[Shape, Mapping[str, Shape]]] = {}
        for name, shape in model_shapes(config, model_class).items():
            parts = released_parts(name, shape)
            if self.fused:
                groups[self.spell(name)] = shape, parts
            else:
                groups |= {self.spell(part): (part_shape, {part: part_shape}) for part, part_shape in parts.items()}
        return groups

    def spell(self, name: str) -> str:
        for released, ours in self.spelling.items():
            name = name.replace(released, ours)
        return name


HUB = Form("hub")  # the release, and the siblings' model type `phimoe`
FUSED = Form("fused", fused=True)
# What transformers' Phimoe calls its own modules: seen where training saves them as they are.
STOCK_MODULES = Form(
    "stock", True, {".block_sparse_moe.gate.": ".mlp.router.", ".block_sparse_moe.experts.": ".mlp.experts."}
)
FORMS = (HUB, FUSED, STOCK_MODULES)


def model_shapes(config: GrinMoeConfig, model_class: type[GrinMoePreTrainedModel]) -> dict[str, Shape]:
    """The parameters of a model, without those that are tied to another: name -> shape."""
    with torch.device("meta"), init.no_init_weights():
        model = model_class(config)
    tied = model.all_tied_weights_keys if config.tie_word_embeddings else {}
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def released_parts(name: str, shape: Shape) -> dict[str, Shape]:
    """The released tensors that a parameter's memory holds, in this order: name -> shape."""
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
    """The class of model that tensors of these names belong to."""
    modules = {name.partition(".")[0] for name in names}
    if "score" in modules:
        return GrinMoeForSequenceClassification
    return GrinMoeForCausalLM if "model" in modules else GrinMoeModel


def without_prefix(found: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """`found` without what wrappers put before every name (`module.`, and `model.` twice where a trainer saves
    `{"model": state_dict}`)."""
    embeddings = "embed_tokens.weight"
    anchor = next((name for name in found if name.endswith(embeddings)), embeddings)
    prefix = anchor.removesuffix(embeddings).removesuffix("model.")
    renamed = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    if len(renamed) < len(found):
        twice = next(name for name in found if f"{prefix}{name}" in found)
        raise ConversionError(f"{found[twice].where} is there twice: as {twice} and as {prefix}{twice}")
    return renamed


def released_tensors(
    found: Mapping[str, StoredTensor], config: GrinMoeConfig, where: str
) -> tuple[Form, type[GrinMoePreTrainedModel], dict[str, StoredTensor]]:
    """The released tensors of a checkpoint of whatever form.

    Args:
        found: the tensors by the names that the files give them.
        where: the checkpoint, for messages.

    Returns:
        The form, the class of model, and the tensors in the order of the model's parameters.

    Raises:
        ConversionError: a tensor is missing, mis-shaped, or one that the model of this config does not have.
    """
    found = without_prefix(found)
    if config.num_hidden_layers > len(found):  # before a model of so many layers is described
        raise ConversionError(
            f"{where}: the config says num_hidden_layers={config.num_hidden_layers}, but there are only {len(found)} "
            "tensors"
        )
    num_experts = config.num_local_experts
    if num_experts > len(found) and not any(tensor.shape[:1] == (num_experts,) for tensor in found.values()):
        raise ConversionError(f"{where}: the config says num_local_experts={num_experts}, but no layer has so many")
    model_class = model_class_of(found)
    # The form that knows most of the names.
    form, groups = max(
        ((form, form.groups(config, model_class)) for form in FORMS),
        key=lambda pair: len(found.keys() & pair[1].keys()),
    )
    problems = [f"{name} is missing" for name in groups if name not in found]
    problems += [
        f"{found[name].where} has shape {list(found[name].shape)}, the config says {list(shape)}"
        for name, (shape, _) in groups.items()
        if name in found and found[name].shape != shape
    ]
    problems += [
        f"{found[name].where} has dtype {found[name].dtype}, which is none of {', '.join(map(str, DTYPES))}"
        for name in groups
        if name in found and found[name].dtype not in DTYPES
    ]
    extra = [name for name in found if name not in groups]
    if config.tie_word_embeddings and "lm_head.weight" in extra and not problems:
        extra.remove("lm_head.weight")
        embeddings = next(tensor for name, tensor in found.items() if name.endswith("embed_tokens.weight"))
        if not torch.equal(found["lm_head.weight"].read(), embeddings.read()):
            problems.append(
                "lm_head.weight differs from model.embed_tokens.weight though the config ties them "
                "(tie_word_embeddings): set it to false if the head is meant"
            )
    problems += [f"{found[name].where} is not part of the model that the config describes" for name in extra]
    if problems:
        shown = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
        raise ConversionError(f"{where}: {len(problems)} tensor(s) do not fit {model_class.__name__}: {shown}")

    tensors: dict[str, StoredTensor] = {}
    for name, (_, parts) in groups.items():
        if len(parts) == 1:
            tensors[next(iter(parts))] = found[name]
            continue
        start = 0
        for part, shape in parts.items():
            tensors[part] = found[name].part(start, shape, f"{part} of {found[name].where}")
            start += math.prod(shape)
    return form, model_class, tensors
