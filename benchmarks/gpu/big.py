"""The whole model, 42B parameters of random weights (84 GB): prefill beside a dense model's, decoding, a LoRA step."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from transformers import CompileConfig

from benchmarks.gpu.device import DEVICE, Row, Sizes, build, milliseconds, peak_gigabytes, random_ids
from benchmarks.peers import build_dense

# GB that a token's step reads at the release's sizes, by batch; and tokens/s predicted, eager and compiled.
READ = {1: 13.0, 8: 55.0, 32: 82.0}
PREDICTED = {1: (200, 250), 8: (None, None), 32: (None, None)}
COPY_RATE = 4.3  # TB/s
PROMPT = 128
PREFILL_GOAL = 0.9  # times the speed of a dense model with as many active parameters


def decode(model: Any, sizes: Sizes, batch_size: int, compiled: bool) -> float:
    """Return tokens per second of `generate`, from the difference between many tokens and a few.

    `compiled`: with a static cache, whose steps `generate` compiles on a GPU.
    """
    ids = random_ids(sizes.vocab_size, batch_size, min(PROMPT, min(sizes.lengths)))
    settings: dict[str, Any] = {"do_sample": False, "attention_mask": torch.ones_like(ids)}
    if compiled:
        settings["cache_implementation"] = "static"
        settings["compile_config"] = CompileConfig(fullgraph=True, mode="reduce-overhead")

    def generate(number: int) -> None:
        # One length for the static cache, or the graph would be compiled again.
        settings["max_length"] = ids.shape[1] + sizes.new_tokens
        settings["stopping_criteria"] = [lambda tokens, scores: torch.full(
            (len(tokens),), tokens.shape[1] >= ids.shape[1] + number, device=tokens.device)]  # fmt: skip
        model.generate(ids, **settings)

    few = 2
    times = [milliseconds(partial(generate, number), 3) for number in (few, sizes.new_tokens)]
    return 1e3 * batch_size * (sizes.new_tokens - few) / (times[1] - times[0])


def lora_step(model: Any, sizes: Sizes) -> list[Row]:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model.train(), LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    adapted.gradient_checkpointing_enable()
    adapted.enable_input_require_grads()
    ids = random_ids(sizes.vocab_size, 1, min(sizes.lengths))

    def step() -> None:
        model.begin_step(0, num_tokens=ids.numel())
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        adapted.zero_grad()

    return [Row("LoRA on attention, step", milliseconds(step, 3), "ms"),
            Row("LoRA on attention, memory", peak_gigabytes(step), "GB")]  # fmt: skip


@torch.no_grad()
def prefill(model: Any, ids: torch.Tensor) -> float:
    """Return ms of a prompt's forward pass."""
    return milliseconds(partial(model, input_ids=ids, use_cache=False, logits_to_keep=1), 3)


def measure(sizes: Sizes) -> Iterator[Row]:
    config = sizes.config(sizes.num_hidden_layers)
    ids = random_ids(sizes.vocab_size, 1, min(sizes.lengths))
    with DEVICE:
        dense = prefill(build_dense(config, torch.bfloat16).eval(), ids)  # before ours, which leaves little room
    model = build(config).eval()
    ours, is_whole = prefill(model, ids), sizes == Sizes()
    yield Row(f"prefill of {ids.numel()} tokens", ours, "ms")
    yield Row(f"prefill of {ids.numel()} tokens, dense", dense, "ms")
    yield Row("prefill's speed over dense", dense / ours, "", PREFILL_GOAL if is_whole else None)
    for compiled in (False, True):
        for batch_size in READ:
            rate = decode(model.eval(), sizes, batch_size, compiled)
            kind = "compiled" if compiled else "eager"
            predicted = PREDICTED[batch_size][compiled] if is_whole else None
            yield Row(f"decoding, batch {batch_size}, {kind}", rate, "tokens/s", predicted)
            if is_whole:
                share = 100 * rate / batch_size * READ[batch_size] / 1e3 / COPY_RATE
                goal = {1: 60, 8: 50}.get(batch_size) if compiled else None
                yield Row(f"share of the bandwidth's bound, batch {batch_size}, {kind}", share, "%", goal)
    yield from lora_step(model, sizes)
