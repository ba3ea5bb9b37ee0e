"""Count the kernel launches, bytes and host synchronisations of a layer at the released sizes, without a GPU.

The models run on torch's meta device, which has shapes and no data. Every call of an operator is counted with the
kernels that CUDA's implementation launches; views launch none, and a kernel of ours counts as one. A layer is the
difference between models of three layers and of two; what is left happens once a forward pass.

    python -m benchmarks.gpu.launches --json
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves
from transformers import AutoModel, DynamicCache, MistralConfig, PhimoeConfig

from benchmarks.measure import show
from conversion.phimoe_config import phimoe_config
from modeling_grin import GrinMoeConfig, gpu_kernels_grinmoe, masks_grinmoe

# Kernels that a call launches on CUDA, where it is not one. A stable sort of 16k numbers is a radix sort; index_put
# with accumulation sorts its indices; a scan has two passes; grouped_mm prepares its pointers first.
KERNELS = {
    **dict.fromkeys(("sort", "argsort"), 10),
    "index_put": 14,
    **dict.fromkeys(("cumsum", "cummax", "_grouped_mm", "topk"), 2),
    **dict.fromkeys(("native_layer_norm_backward", "_flash_attention_backward"), 3),
    **dict.fromkeys(("nonzero", "few_slots_experts"), 3),
    "embedding_dense_backward": 14,
    **dict.fromkeys(("empty", "empty_like", "new_empty", "empty_strided", "detach", "lift_fresh", "alias"), 0),
    **dict.fromkeys(("_unsafe_view", "_local_scalar_dense"), 0),
}
SYNCS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "few_slots_experts"}
GATHERING = {"index", "gather", "index_select"}  # read as much as they write
FLASH_BACKWARD = 3  # dot(do, o), the gradients, and their sum over the queries in float32
DECODED = 1000  # tokens in the cache


class Count(TorchDispatchMode):
    """Count the kernels launched, the bytes moved and the host's waits inside it, on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.num_bytes = 0

    def add(self, name: str, launches: int, *tensors: Any) -> None:
        self.launches[name] += launches
        if launches > 0 and name not in PRODUCTS:
            self.num_bytes += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__.removesuffix("_")
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        on_device = any(t.device.type == "meta" for t in tensors) or str(kwargs.get("device")) == "meta"
        is_copied = (
            name in ("_to_copy", "copy")
            and len({t.device.type for t in tensors} | {str(kwargs.get("device", "meta"))}) > 1
        )
        if on_device and (name in SYNCS or is_copied):
            self.syncs[name] += 1
        if name == "_local_scalar_dense" and on_device:
            return True  # "all tokens count", "not packed"
        outputs = function(*args, **kwargs)
        if on_device and not function.is_view:
            read = [outputs] if name in GATHERING else tensors
            self.add(name, KERNELS.get(name, 1), *read, *tree_leaves(outputs))
        return outputs


class Flash(torch.autograd.Function):
    """scaled_dot_product_attention as CUDA runs it without a mask: in one kernel."""

    @staticmethod
    def forward(ctx, query, key, value):
        ctx.save_for_backward(query, key, value)
        count: Any = _get_current_dispatch_mode()
        with unseen():
            output = torch.empty_like(query)
        count.add("flash attention", 1, query, key, value, output)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        count: Any = _get_current_dispatch_mode()
        with unseen():
            gradients = [torch.empty_like(t) for t in ctx.saved_tensors]
        count.add("flash attention", FLASH_BACKWARD, *ctx.saved_tensors, grad_output, grad_output, *gradients)
        return tuple(gradients)


@contextmanager
def unseen() -> Iterator[None]:
    """Run without a dispatch mode."""
    with _disable_current_modes():
        yield


@contextmanager
def counting() -> Iterator[Count]:
    """Count, with our kernels and flash attention in the places that they have on a GPU."""
    count = Count()

    def attend(query, key, value, attn_mask=None, **kwargs):
        assert attn_mask is None, "with a mask, CUDA leaves flash attention"
        return Flash.apply(query, key, value)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(nn.functional, "scaled_dot_product_attention", attend))
        stack.enter_context(mock.patch.object(gpu_kernels_grinmoe, "can_launch", return_value=True))
        stack.enter_context(mock.patch.object(masks_grinmoe, "can_use_flash", return_value=True))
        stack.enter_context(count)
        yield count


def configs(config: GrinMoeConfig) -> dict[str, Any]:
    """The models that are compared: ours, stock Phimoe, and a Mistral with as many active parameters."""
    sizes = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    width = config.num_experts_per_tok * config.intermediate_size
    shared = {name: getattr(config, name) for name in sizes}
    return {
        "ours": config,
        "phimoe": PhimoeConfig.from_dict({**phimoe_config(config), "sliding_window": None}),  # or it makes a mask
        "mistral": MistralConfig(intermediate_size=width, sliding_window=None, **shared),
    }


def build(config: Any, num_layers: int) -> Any:
    """Build the decoder with `num_layers` layers, in bfloat16 on the meta device."""
    config = type(config).from_dict({**config.to_dict(), "num_hidden_layers": num_layers})
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=torch.bfloat16)
    if not isinstance(config, GrinMoeConfig) and hasattr(config, "num_local_experts"):
        model.set_experts_implementation("grouped_mm")
    return model


Figures = dict[str, Counter[str]]


def train(model: Any, rows: int, length: int) -> Figures:
    """Count a forward and a backward pass."""
    model.train()
    if hasattr(model, "begin_step"):
        model.begin_step(0, num_tokens=rows * length)
    ids = torch.zeros(rows, length, dtype=torch.int64, device="meta")
    with counting() as forward:
        output = model(input_ids=ids, use_cache=False).last_hidden_state
    with counting() as backward:
        output.backward(torch.empty_like(output))
    return {"train_forward": figures(forward), "train_backward": figures(backward)}


def decode(model: Any, batch_size: int) -> Figures:
    """Count a step that generates a token, beside a cache."""
    model.eval()
    if hasattr(model.config, "num_local_experts") and not isinstance(model.config, GrinMoeConfig):
        model.set_experts_implementation("batched_mm")  # as `generate` does
    cache = DynamicCache(config=model.config)
    heads, width = model.config.num_key_value_heads, model.config.head_dim
    past = torch.empty(batch_size, heads, DECODED, width, dtype=torch.bfloat16, device="meta")
    for layer in range(model.config.num_hidden_layers):
        cache.update(past, past, layer)
    ids = torch.zeros(batch_size, 1, dtype=torch.int64, device="meta")
    with counting() as step, torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    return {"decode": figures(step)}


def figures(count: Count) -> Counter[str]:
    return count.launches + Counter(bytes=count.num_bytes, **{f"sync {name}": n for name, n in count.syncs.items()})


def per_layer(measure: Callable[[Any], Figures], config: Any) -> dict[str, tuple[Counter[str], Counter[str]]]:
    """Return each part's figures of a layer, and those that a pass has once."""
    two, three = (measure(build(config, number)) for number in (2, 3))
    found = {}
    for part in two:
        layer = Counter({name: three[part][name] - two[part][name] for name in three[part]})
        found[part] = layer, Counter({name: two[part][name] - 2 * layer[name] for name in two[part]})
    return found


def summarise(count: Counter[str]) -> dict[str, Any]:
    """Return the numbers of launches and syncs, the GB that are not operands of matrix products, and the launches."""
    names = {name: n for name, n in count.items() if n and name != "bytes" and not name.startswith("sync ")}
    return {
        "launches": sum(names.values()),
        "syncs": sum(n for name, n in count.items() if name.startswith("sync ")),
        "gigabytes": round(count["bytes"] / 1e9, 3),
        "by_operator": dict(sorted(names.items(), key=lambda item: -item[1])),
    }


def count_all(config: GrinMoeConfig, rows: int, length: int, batch_size: int) -> dict[str, dict[str, Any]]:
    """Return per model the launches of a layer in training and in decoding, its syncs, and all figures."""
    result: dict[str, dict[str, Any]] = {}
    for name, own in configs(config).items():
        parts = per_layer(partial(train, rows=rows, length=length), own)
        parts |= per_layer(partial(decode, batch_size=batch_size), own)
        layer = {part: summarise(figures[0]) for part, figures in parts.items()}
        result[name] = {
            **{part: own["launches"] for part, own in layer.items()},
            "syncs": sum(own["syncs"] for own in layer.values()),
            "layer": layer,
            "once": {part: summarise(figures[1]) for part, figures in parts.items()},
        }
    return result


COLUMNS = [
    "model",
    "training, forward",
    "backward",
    "GB",
    "decoding",
    "syncs",
    "once: forward",
    "backward",
    "decoding",
    "syncs",
]


def table(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    rows = []
    for name, own in found.items():
        layer, once = own["layer"], own["once"]
        gigabytes = sum(layer[part]["gigabytes"] for part in ("train_forward", "train_backward"))
        launches = [str(own["train_forward"]), str(own["train_backward"]), f"{gigabytes:.1f}", str(own["decode"])]
        of_pass = [str(part["launches"]) for part in once.values()]
        rows.append([name, *launches, str(own["syncs"]), *of_pass, str(sum(part["syncs"] for part in once.values()))])
    return rows


def main(
    rows: Annotated[int, typer.Option(min=1, help="rows of a training step")] = 4,
    length: Annotated[int, typer.Option(min=2, help="tokens in a row")] = 2048,
    batch_size: Annotated[int, typer.Option(min=1, help="sequences that are decoded together")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
    record: Annotated[bool, typer.Option(help="append the table to benchmarks/RESULTS.md")] = False,
) -> None:
    """Count a layer of ours, of stock Phimoe, and of a Mistral with as many active parameters.

    Example: python -m benchmarks.gpu.launches --batch-size 8 --json
    """
    found = count_all(GrinMoeConfig(router_aux_loss_coef=0.01), rows, length, batch_size)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    title = f"Kernel launches of a layer, counted: {rows} x {length} tokens, decoding {batch_size}"
    notes = "GB: read and written by a layer's forward and backward pass, without operands of matrix products."
    show(title, COLUMNS, table(found), record, notes)


if __name__ == "__main__":
    typer.run(main)
