"""LoRA on every layout: the same training as in one process, one ordinary adapter, and resuming on any layout."""

import itertools

import cases as cases_module
import pytest
import sharded_runs
import torch
from cases import difference, run_cases
from checkpoints import released_config, released_tensors, write_checkpoint
from peft import PeftModel
from safetensors.torch import load_file

from modeling_grin import GrinMoeForCausalLM

TOLERANCE = 1e-5
FSDP2, TP = {"fsdp_size": 2}, {"tp_size": 2}
HSDP = {**FSDP2, "dp_replicate_size": 2}
LORA = {"seed": 7, "r": 3, "lora_alpha": 6, "router": True}
NOISE = {"router_jitter_noise": 0.1, "input_jitter_noise": 0.1}
# bfloat16 weights. Every expert takes every token: no pick can be another one because of rounding. grouped_mm takes
# rows of multiples of 16 bytes, on each rank.
ALL_EXPERTS = {"dtype": "bfloat16", "router_estimator": "gshard", "num_experts_per_tok": 6}
BF16 = {"bf16": True, "checkpoint": "wide", "max_steps": 1,
        "config": {**ALL_EXPERTS, "experts_implementation": "grouped_mm"}}  # fmt: skip
NF4 = {"quantization_config": {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float32"
}}  # fmt: skip
FOUR_BITS = {"checkpoint": "blocks", "config": NF4}
FOUR_BITS_BF16 = {**BF16, "checkpoint": "blocks", "config": {**ALL_EXPERTS, **NF4}}
SAVED = f"checkpoint-{sharded_runs.SAVED_AT}"
SAVING = {"save_strategy": "steps", "save_steps": sharded_runs.SAVED_AT}
# The first run's, whose checkpoint another one resumes.
RESUMED = {"fsdp2-resumed": ("fsdp2", FSDP2), "tp-from-fsdp2": ("fsdp2", TP), "fsdp2-from-one": ("one", FSDP2),
           "fsdp2-4bit-resumed": ("fsdp2-4bit", FSDP2)}  # fmt: skip


def resumed(before):
    """With adapters of another seed."""
    return {"resume_from": f"{before}-run/{SAVED}", "lora": {**LORA, "seed": 8}}


def cases(num_ranks):
    """name -> arguments of `sharded_runs.train`."""
    if num_ranks == 1:
        yield "one", {"layout": None, **SAVING}
        yield "one-bf16", {"layout": None, **BF16}
        yield "one-4bit-bf16", {"layout": None, **FOUR_BITS_BF16}
        yield "one-4bit", {"layout": None, **FOUR_BITS, **SAVING}
        yield "one-4bit-resumed", {"layout": None, **FOUR_BITS, **resumed("one-4bit")}
    elif num_ranks == 2:
        yield "ddp", {"layout": None}
        yield "ddp-4bit", {"layout": None, **FOUR_BITS}
        yield (
            "fsdp2-4bit",
            {"layout": {**FSDP2, "fsdp_cpu_offload": True}, "activation_checkpointing": True, **FOUR_BITS, **SAVING},
        )
        yield "fsdp2", {"layout": FSDP2, **SAVING}
        yield "tp", {"layout": TP, "saved": True}
        yield "fsdp2-recomputed", {"layout": {**FSDP2, "fsdp_cpu_offload": True}, "activation_checkpointing": True}
        for name, (before, layout) in RESUMED.items():
            yield name, {"layout": layout, **(FOUR_BITS if "4bit" in name else {}), **resumed(before)}
        yield "fsdp2-4bit-from-one", {"layout": FSDP2, "checkpoint": "published", **resumed("one-4bit")}
    else:
        yield "fsdp2_tp", {"layout": {**FSDP2, **TP}}
        yield "fsdp2_tp-bf16", {"layout": {**FSDP2, **TP, "fsdp_mixed_precision": True}, **BF16}
        yield "hsdp", {"layout": HSDP}
        yield "hsdp-4bit-bf16", {"layout": {**HSDP, "fsdp_mixed_precision": True}, **FOUR_BITS_BF16}


PIPELINE = {**sharded_runs.TRAINING, "checkpoint": "source", "lora": LORA}
STAGES_IN_4_BITS = {"checkpoint": "blocks", **NF4}
PIPELINES = {
    2: {"pipeline": {"layout": {"pp_size": 2}, "micro_batch": 4, **SAVING},
        "pipeline-resumed": {"layout": {"pp_size": 2}, "micro_batch": 4, "resume_from": f"pipeline-run/{SAVED}",
                             "lora": {**LORA, "seed": 8}},
        "pipeline-4bit": {"layout": {"pp_size": 2}, "micro_batch": 4, **STAGES_IN_4_BITS, **SAVING},
        "pipeline-4bit-resumed": {"layout": {"pp_size": 2}, "micro_batch": 4, **STAGES_IN_4_BITS,
                                  **resumed("pipeline-4bit")}},
    4: {"pipeline-data": {"layout": {"pp_size": 2}, "micro_batch": 2},
        "pipeline-tensor": {"layout": {"pp_size": 2, "tp_size": 2}, "micro_batch": 4},
        "pipeline-data-4bit": {"layout": {"pp_size": 2}, "micro_batch": 2, **STAGES_IN_4_BITS}},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where everything ran."""
    folder = tmp_path_factory.mktemp("lora")
    for name, sizes in (
        ("source", {}), ("wide", {"intermediate_size": 32}), ("blocks", {"hidden_size": 64, "intermediate_size": 64})
    ):  # fmt: skip
        config = released_config(torch_dtype="float32", router_aux_loss_coef=1.0, **sizes, **NOISE)
        write_checkpoint(folder / name, config, released_tensors(config, 3), num_shards=2)
    for num_ranks in (1, 2, 4):
        defaults = {"run": "train", "checkpoint": "source", "lora": LORA}
        run_cases("sharded_runs", folder, num_ranks, dict(cases(num_ranks)), **defaults)
        if num_ranks == 1:
            GrinMoeForCausalLM.from_pretrained(folder / "blocks", **NF4).save_pretrained(folder / "published")
        else:
            run_cases("pipeline_runs", folder, num_ranks, PIPELINES[num_ranks], run="train", **PIPELINE)
    return folder


def result(folder, name, rank=0):
    return torch.load(folder / f"{name}-{rank}.pt")


def moved(folder, found, checkpoint="source", config=None):
    """How far training has moved each adapter."""
    start = sharded_runs.adapt(GrinMoeForCausalLM.from_pretrained(folder / checkpoint, **(config or {})), **LORA)
    learnt = {name: parameter for name, parameter in start.named_parameters() if parameter.requires_grad}
    return cases_module.moved(found["parameters"], learnt)


def check_logs(actual, expected, steps=slice(None)):
    for mine, other in zip(actual["logs"], expected["logs"][steps], strict=True):
        for key in ("loss", "grad_norm"):
            assert mine[key] == pytest.approx(other[key], rel=TOLERANCE), key


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "tp", "fsdp2-recomputed", "fsdp2_tp", "hsdp"])
def test_a_layout_trains_as_one_process(folder, name):
    """Sampling, the balance loss, accumulation and clipping on."""
    actual, expected = result(folder, name), result(folder, "one")
    gradients = {key.replace("module.", "", 1): value for key, value in actual["gradients"].items()}
    assert len(expected["gradients"]) == 2 * 2 * (4 + 1 + 2)  # A and B in two layers: attention, router, experts
    assert difference(gradients, expected["gradients"]) < TOLERANCE
    assert difference(moved(folder, actual), moved(folder, expected)) < TOLERANCE
    check_logs(actual, expected)
    other = result(folder, name, rank=1)
    assert all(torch.equal(other["parameters"][key], actual["parameters"][key]) for key in actual["parameters"])


@pytest.mark.parametrize(("num_ranks", "name"), [(n, name) for n, cases in PIPELINES.items() for name in cases])
def test_a_pipeline_trains_as_one_process(folder, num_ranks, name):
    four_bits = FOUR_BITS if "4bit" in name else {}
    expected, parameters = result(folder, "one-4bit" if four_bits else "one"), {}
    for rank in range(num_ranks):
        own = result(folder, name, rank)
        for key, parameter in own["parameters"].items():
            assert torch.equal(parameters.setdefault(key, parameter), parameter), key
        logs = [entry for entry in own["logs"] if "loss" in entry]
        check_logs({"logs": logs}, expected)
    actual = moved(folder, {"parameters": parameters}, **four_bits)
    assert difference(actual, moved(folder, expected, **four_bits)) < TOLERANCE


def test_a_pipeline_saves_the_adapters_of_all_stages(folder):
    files = [folder / f"{name}-run" / SAVED / "adapter_model.safetensors" for name in ("one", "pipeline")]
    expected, actual = map(load_file, files)
    assert difference(actual, expected) < TOLERANCE


@pytest.mark.parametrize("name", ["ddp-4bit", "fsdp2-4bit", "one-4bit-resumed", "fsdp2-4bit-from-one"])
def test_experts_in_4_bits(folder, name):
    """And CPU offload, recomputation, published 4-bit files and resuming."""
    actual, expected = result(folder, name), result(folder, "one-4bit")
    assert sum(".experts.0.w1.lora_" in key for key in actual["parameters"]) == 4
    assert difference(moved(folder, actual, **FOUR_BITS), moved(folder, expected, **FOUR_BITS)) < TOLERANCE
    check_logs(actual, expected, slice(-len(actual["logs"]), None))


@pytest.mark.parametrize(("name", "one"), [("fsdp2_tp-bf16", "one-bf16"), ("hsdp-4bit-bf16", "one-4bit-bf16")])
def test_bfloat16_weights_and_mixed_precision(folder, name, one):
    actual, expected = result(folder, name), result(folder, one)
    assert difference(actual["gradients"], expected["gradients"]) < 0.05
    assert {tensor.dtype for tensor in actual["gradients"].values()} == {torch.float32}


def test_recomputation_runs_every_layer_twice(folder):
    assert result(folder, "fsdp2-recomputed")["forwards"] == 2 * result(folder, "fsdp2")["forwards"]


def test_a_layout_saves_an_ordinary_adapter(folder):
    saved = folder / "tp-saved"
    names = {path.name for path in saved.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not any("model" in name for name in names - {"adapter_model.safetensors"})
    model = PeftModel.from_pretrained(GrinMoeForCausalLM.from_pretrained(folder / "source"), saved)
    expected = result(folder, "tp")["parameters"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert load_file(saved / "adapter_model.safetensors").keys() == load_file(
        folder / "one-run" / SAVED / "adapter_model.safetensors"
    ).keys()  # fmt: skip


def test_the_same_layout_resumes_bit_for_bit(folder):
    for rank, four_bits in itertools.product((0, 1), ("", "-4bit")):
        actual, expected = (result(folder, f"fsdp2{four_bits}{form}", rank) for form in ("-resumed", ""))
        assert all(torch.equal(actual["parameters"][key], expected["parameters"][key]) for key in actual["parameters"])
        assert [entry["loss"] for entry in actual["logs"]] == [entry["loss"] for entry in expected["logs"]]


@pytest.mark.parametrize("name", ["tp-from-fsdp2", "fsdp2-from-one"])
def test_another_layout_resumes_to_the_same_end(folder, name):
    actual, expected = result(folder, name), result(folder, "one")
    assert difference(moved(folder, actual), moved(folder, expected)) < TOLERANCE
