"""The planner's LoRA against real steps: weights, gradients, optimizer and activations, in 16, 32 and 4 bits."""

import pytest
import torch
from checkpoints import released_config, released_tensors, write_checkpoint
from peak_memory import peak_of_a_step
from transformers import BitsAndBytesConfig

from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM
from modeling_grin.lora import add_lora
from modeling_grin.planning.memory import memory
from modeling_grin.planning.plan import estimate, plan
from modeling_grin.planning.setting import GB, Assumptions, Layout, Training

WIDE = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 512}
DEEP = {"num_hidden_layers": 8}
CASES = [  # sizes, tokens of four sequences, precision, 4 bits, activation checkpointing
    ({}, 128, "float32", False, False),
    (DEEP, 256, "float32", False, True),
    (WIDE, 64, "float32", False, False),
    ({}, 128, "bfloat16", False, True),
    (WIDE, 64, "bfloat16", False, True),
    ({}, 128, "mixed", False, False),
    (WIDE, 64, "mixed", False, True),
    (DEEP, 128, "mixed", False, True),
    ({}, 128, "mixed", True, False),
    (WIDE, 64, "mixed", True, False),
    (WIDE, 128, "mixed", True, True),
    (DEEP, 128, "mixed", True, True),
]


def measure_peak(config, training, folder):
    """Bytes at the worst moment of a step's last micro-batch, when all state is there."""
    torch.manual_seed(0)
    mixed = training.precision == "mixed"
    dtype = torch.bfloat16 if mixed else getattr(torch, training.precision)
    if training.load_in_4bit:
        pytest.importorskip("bitsandbytes")
        values = config.to_dict() | {"torch_dtype": "bfloat16"}
        write_checkpoint(folder, values, released_tensors(values))
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                          bnb_4bit_compute_dtype=dtype)  # fmt: skip
        base = GrinMoeForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=dtype)
    else:
        config._experts_implementation = "grouped_mm"  # of accelerators
        base = GrinMoeForCausalLM(config).to(dtype)
    model = add_lora(base, r=training.lora_r).train()
    return peak_of_a_step(model, training)


@pytest.mark.parametrize(("sizes", "sequence", "precision", "four_bits", "checkpointing"), CASES)
def test_memory_is_within_a_tenth_of_a_real_step(tmp_path, sizes, sequence, precision, four_bits, checkpointing):
    base = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4}
    config = GrinMoeConfig(**released_config(**{**base, **sizes}, eos_token_id=2, pad_token_id=2))
    training = Training(4, 8, sequence, precision, checkpointing=checkpointing, lora_r=8, load_in_4bit=four_bits)
    expected, peak = memory(config, Layout(), training), measure_peak(config, training, tmp_path)
    # The tracker does not see the scales of 4-bit weights, which are no parameters.
    assert expected.weights == pytest.approx(peak["PARAM"], rel=0.02 if four_bits else 1e-12)
    assert expected.gradients == peak["GRAD"]
    assert expected.optimizer == pytest.approx(peak["OPT"], rel=0.001)
    assert expected.activations == pytest.approx(peak["ACT"], rel=0.1)
    assert expected.total() == pytest.approx(peak["Total"], rel=0.1)


def test_layouts_divide_the_base_and_repeat_the_adapters():
    config = GrinMoeConfig()
    one, eight = (memory(config, layout, Training(lora_r=16)) for layout in (Layout(), Layout(fsdp=8)))
    adapters = one.gradients
    assert one.optimizer == 2 * adapters and adapters == eight.gradients
    assert eight.weights - adapters == pytest.approx((one.weights - adapters) / 8)
    assert one.weights - adapters == pytest.approx(2 * 41.87e9, rel=1e-3)
    quantised = memory(config, Layout(), Training(lora_r=16, load_in_4bit=True))
    assert quantised.weights < 0.3 * one.weights
    halved = memory(config, Layout(fsdp=2), Training(lora_r=16, load_in_4bit=True))
    number = 32 * 4096 * (2 * (4096 + 1024) + 3 * 16 * 6400)  # of the matrices; embedding and head are bfloat16
    packed, scales, learnt, ends = 0.5 * number, 0.016 * number, quantised.gradients, 2 * 2 * 32064 * 4096
    assert quantised.weights == pytest.approx(learnt + packed + scales + ends, rel=1e-3)
    assert halved.weights == pytest.approx(learnt + packed / 2 + scales + ends / 2, rel=1e-3)
    assert halved.communication == pytest.approx(2 * packed / 32 + ends / 2, rel=0.01)  # two layers, and the head
    times = [
        estimate(config, Layout(), training, Assumptions()).seconds["compute"]
        for training in (Training(precision="bfloat16", lora_r=16), Training(precision="bfloat16"))
    ]
    assert 0.7 < times[0] / times[1] < 0.9  # 3 of 4 passes over the weights: none for their gradients


def test_what_fits_one_gpu():
    quantised = plan(GrinMoeConfig(), 1, Training(lora_r=16, load_in_4bit=True), Assumptions(memory=48 * GB))
    assert quantised.estimates[0].fits
    assert not plan(GrinMoeConfig(), 1, Training(lora_r=16), Assumptions(memory=80 * GB)).estimates[0].fits
    two = plan(GrinMoeConfig(), 2, Training(lora_r=16, load_in_4bit=True), Assumptions(memory=48 * GB))
    assert {str(e.layout) for e in two.estimates} == {"DDP=2", "FSDP2=2", "PP=2", "PP=2 x2"}
    assert "load_in_4bit cannot divide a matrix" in two.left_out["TP=2"]
    with pytest.raises(ValueError, match="lora_r must be at least 1; got 0"):
        Training(load_in_4bit=True)
