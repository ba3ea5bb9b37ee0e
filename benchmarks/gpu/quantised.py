"""Layers in 4 bits (bitsandbytes' nf4): loading, memory, decoding and a LoRA step."""

import tempfile
import time
from collections.abc import Iterator
from functools import partial

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.gpu.device import DEVICE, Row, Sizes, build, milliseconds, peak_gigabytes, random_ids

LAYERS = 4


def measure(sizes: Sizes) -> Iterator[Row]:
    from peft import LoraConfig, get_peft_model

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        build(sizes.config(min(LAYERS, sizes.num_hidden_layers))).cpu().save_pretrained(folder)
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
        start = time.perf_counter()
        place = {"": 0} if DEVICE.type == "cuda" else "cpu"
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=nf4, dtype=torch.bfloat16, device_map=place
        )
        yield Row("loading in 4 bits", time.perf_counter() - start, "s")
    ids = random_ids(sizes.vocab_size, 1, min(sizes.lengths))
    with torch.no_grad():
        forward = partial(model.eval(), input_ids=ids[:, :1], use_cache=False)
        yield Row("decoding in 4 bits", milliseconds(forward), "ms")
        yield Row("memory in 4 bits", peak_gigabytes(forward), "GB")
    adapted = get_peft_model(model.train(), LoraConfig(r=8, target_modules=["q_proj", "v_proj", "w1", "w2", "w3"]))

    def step() -> None:
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        adapted.zero_grad()

    yield Row("QLoRA step", milliseconds(step, 3), "ms")
    yield Row("QLoRA memory", peak_gigabytes(step), "GB")
