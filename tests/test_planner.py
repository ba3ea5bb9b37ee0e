"""The planner against real models: parameters, memory, FLOPs; against the paper's figures; and its command."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoints import released_config, released_tensors, write_checkpoint
from peak_memory import peak_of_a_step
from torch.utils.flop_counter import FlopCounterMode
from transformers import BitsAndBytesConfig
from typer.testing import CliRunner

from benchmarks import scaling
from grin_moe_cli import app
from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM, masks_grinmoe
from modeling_grin.lora import add_lora
from modeling_grin.planning.memory import Stage, memory, stages
from modeling_grin.planning.parameters import count_parameters, head_tensors
from modeling_grin.planning.plan import estimate, plan
from modeling_grin.planning.setting import GB, Assumptions, Layout, Training, assume
from modeling_grin.planning.time import Collective, communication, count_buckets, layer_flops, send_time

EMPTY = Path(__file__).parent  # a folder without config.json
SHAPES = {
    "released": {},
    "tiny": released_config(),
    "phi-tiny": {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 448},
    "tied, without biases": released_config(tie_word_embeddings=True, lm_head_bias=False, attention_bias=False),
    "scaled outputs": released_config(moe_output_scale=True),
}


def whole(config: GrinMoeConfig) -> Stage:
    return Stage(config.num_hidden_layers, True, True, 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_those_of_the_model(shape):
    config = GrinMoeConfig(**SHAPES[shape])
    with torch.device("meta"):
        model = GrinMoeForCausalLM(config)
    assert count_parameters(config)[0] == sum(parameter.numel() for parameter in model.parameters())
    groups = [tensor for group in whole(config).groups(config) for tensor in group if sum(tensor)]
    assert [sum(tensor) for tensor in groups] == [tensor.numel() for tensor in in_order(model)], "and in its order"


def in_order(model):
    """A layer's own parameters come before its children's; the planner lists them attention first."""
    order = ("embed_tokens", "input_layernorm", "self_attn", "post_attention_layernorm", "block_sparse_moe", "")
    named = list(model.named_parameters())

    def key(item):
        name = item[0]
        layer = int(name.split(".")[2]) if ".layers." in name else (-1 if "embed" in name else 10**6)
        return layer, next(number for number, part in enumerate(order) if part in name) if layer >= 0 else 0

    return [parameter for _, parameter in sorted(named, key=key)]


def measure_peak(config: GrinMoeConfig, training: Training, folder: Path) -> dict[str, int]:
    """Bytes at the worst moment of a step's last micro-batch, and of the optimizer, when all state is there."""
    torch.manual_seed(0)
    mixed = torch.bfloat16 if training.lora_r else torch.float32
    dtype = mixed if training.precision == "mixed" else getattr(torch, training.precision)
    if training.load_in_4bit:
        pytest.importorskip("bitsandbytes")
        values = config.to_dict() | {"torch_dtype": "bfloat16"}
        write_checkpoint(folder, values, released_tensors(values))
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                          bnb_4bit_compute_dtype=dtype)  # fmt: skip
        model = GrinMoeForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=dtype)
    else:
        config._experts_implementation = "grouped_mm"  # of accelerators
        model = GrinMoeForCausalLM(config).to(dtype)
    return peak_of_a_step((add_lora(model, r=training.lora_r) if training.lora_r else model).train(), training)


WIDE = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 512}
DEEP = {"num_hidden_layers": 8}
LORA = {"lora_r": 8}
QLORA = {"lora_r": 8, "load_in_4bit": True}
MEASURED = [  # sizes, sequences, tokens of each, precision, activation checkpointing, LoRA
    ({}, 2, 64, "float32", False, {}),
    ({}, 2, 64, "float32", True, {}),
    ({"num_local_experts": 32}, 2, 128, "float32", False, {}),
    ({"num_experts_per_tok": 1}, 4, 64, "float32", False, {}),
    ({}, 4, 128, "bfloat16", True, {}),
    ({}, 2, 64, "mixed", False, {}),
    ({"num_local_experts": 32}, 2, 128, "mixed", True, {}),
    (DEEP, 4, 128, "mixed", True, {}),
    (WIDE, 4, 64, "mixed", True, {}),
    ({"vocab_size": 4096, "num_hidden_layers": 1}, 1, 64, "mixed", True, {}),
    (
        {"vocab_size": 4096, "hidden_size": 128, "num_hidden_layers": 8, "num_local_experts": 2},
        1,
        16,
        "mixed",
        True,
        {},
    ),
    ({}, 4, 128, "float32", False, LORA),
    (DEEP, 4, 256, "float32", True, LORA),
    (WIDE, 4, 64, "float32", False, LORA),
    ({}, 4, 128, "bfloat16", True, LORA),
    (WIDE, 4, 64, "bfloat16", True, LORA),
    ({}, 4, 128, "mixed", False, LORA),
    (WIDE, 4, 64, "mixed", True, LORA),
    (DEEP, 4, 128, "mixed", True, LORA),
    ({}, 4, 128, "mixed", False, QLORA),
    (WIDE, 4, 64, "mixed", False, QLORA),
    (WIDE, 4, 128, "mixed", True, QLORA),
    (DEEP, 4, 128, "mixed", True, QLORA),
]


@pytest.mark.parametrize(("sizes", "micro_batch", "sequence", "precision", "checkpointing", "lora"), MEASURED)
def test_memory_is_within_a_tenth_of_a_real_step(
    tmp_path, sizes, micro_batch, sequence, precision, checkpointing, lora
):
    base = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4}
    config = GrinMoeConfig(**released_config(**{**base, **sizes}, eos_token_id=2, pad_token_id=2))
    training = Training(micro_batch, 2 * micro_batch, sequence, precision, checkpointing=checkpointing, **lora)
    expected, peak = memory(config, Layout(), training), measure_peak(config, training, tmp_path)
    # The tracker does not see the scales of 4-bit weights, which are no parameters.
    assert expected.weights == pytest.approx(peak["PARAM"], rel=0.02 if lora == QLORA else 1e-12)
    assert expected.gradients == peak["GRAD"]
    assert expected.optimizer == pytest.approx(peak["OPT"], rel=0.001)  # and a step number for each parameter
    assert expected.total() == pytest.approx(peak["Total"], rel=0.1)
    assert expected.activations == pytest.approx(peak["ACT"], rel=0.1)


@pytest.mark.parametrize(("precision", "sequence"), [("float32", 32), ("float32", 40), ("bfloat16", 40)])
def test_a_mask_is_counted_where_one_is_built(precision, sequence, monkeypatch):
    """Beyond the window's 32 keys, except in 16 bits, where torch's flash kernel has the window itself."""
    monkeypatch.setattr(masks_grinmoe, "can_use_flash", lambda config, embeds: embeds.dtype == torch.bfloat16)
    config = GrinMoeConfig(**released_config(sliding_window=31), attn_implementation="sdpa")
    embeds = torch.empty(1, sequence, 32, dtype=getattr(torch, precision))
    mask = masks_grinmoe.create_mask(config, embeds, None, None, None)
    assert (mask is None) == (precision == "bfloat16" or sequence == 32)
    planned, without = (memory(config, Layout(), Training(1, 1, length, precision)) for length in (sequence, 8))
    assert planned.buffers - without.buffers == (0 if mask is None else mask.nbytes)


def test_flops_are_those_of_a_forward_pass():
    config = GrinMoeConfig(**released_config(), attn_implementation="eager", experts_implementation="eager")
    config.sliding_window = None
    training = Training(micro_batch=2, sequence=64)
    model = GrinMoeForCausalLM(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(5, 100, (2, 64)))
    dense, experts = layer_flops(config, Layout(), training)
    # The planner counts the half of the scores that a causal kernel computes, eager attention all of them.
    scores = 2 * 2 * training.tokens * 64 * config.num_attention_heads * config.head_dim
    head = 2 * training.tokens * head_tensors(config)[2].sharded
    # Norms and biases are no matmuls; the planner takes them for some.
    expected = config.num_hidden_layers * (dense + experts + scores / 2) + head
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_buckets_are_those_of_ddp():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        sizes = torch.randint(1, 4_000_000, (30,), generator=generator).tolist()
        tensors = [torch.empty(size, device="meta") for size in sizes]
        buckets, _ = dist._compute_bucket_assignment_by_size(tensors, [2**20, 25 * 2**20])
        assert count_buckets(4 * size for size in sizes) == len(buckets)


def test_figure_3_limits():
    """32 experts with a pipeline only, 52 with tensor parallelism; 272 devices were not fitted to, and fit 200."""
    *fitted, large = scaling.LIMITS
    for layout in fitted:
        assert scaling.largest_num_experts(layout) == scaling.LIMITS[layout], layout
    assert large.devices == 272
    assert scaling.largest_num_experts(large) >= 200


@pytest.mark.parametrize("name", scaling.RELATIVE_THROUGHPUTS)
def test_table_3_relative_throughput(name):
    sizes, relative = scaling.RELATIVE_THROUGHPUTS[name]
    dense, mixture = scaling.dense_and_mixture(sizes)
    assert mixture / dense == pytest.approx(relative, rel=0.15)
    # One device's speed, which is not asked for, is in range too.
    assert (dense, mixture) == pytest.approx(scaling.TOKENS_PER_DEVICE[name], rel=0.3)


def test_table_3_sizes_are_what_it_says():
    small, released = GrinMoeConfig(**scaling.SMALL), GrinMoeConfig()
    for config, total, active in ((small, 10e9, 1.6e9), (released, 41.9e9, 6.6e9)):
        assert count_parameters(config) == pytest.approx((total, active), rel=0.01)


def test_pipeline_stages_hold_what_their_schedule_says():
    config, training = GrinMoeConfig(), Training(global_batch=64)
    assert [stage.in_flight for stage in stages(config, Layout(pp=8), training)] == [8, 7, 1]
    assert [stage.in_flight for stage in stages(config, Layout(pp=8), replace(training, global_batch=4))] == [4, 4, 1]
    # Of 8 devices with 2 stages, the first one warms up with 2 x 7 + 8 forward passes before it alternates.
    assert stages(config, Layout(pp=8, interleave=2), training)[0].in_flight == 23 / 2
    ends = stages(config, Layout(pp=34), training)
    assert [stage[:3] for stage in ends] == [(0, True, False), (1, False, False), (0, False, True)]


def test_bubble_is_that_of_the_schedule():
    """(p - 1) / (m + p - 1) of the time of a 1F1B pipeline with nothing to send; half of that if interleaved."""
    config, training = GrinMoeConfig(), Training(global_batch=16)
    free = Assumptions(latency=0, intra_bandwidth=1e30, inter_bandwidth=1e30)
    for interleave in (1, 2):
        seconds = estimate(config, Layout(pp=4, interleave=interleave), training, free).seconds
        assert seconds["bubble"] / seconds["compute"] == pytest.approx(3 / interleave / 16)


def test_time_of_a_collective():
    """A ring sends 2 (n - 1) / n of an all-reduce; a group that leaves its machine uses the slower links."""
    assumptions = Assumptions(intra_bandwidth=1e9, inter_bandwidth=1e8, bandwidth_efficiency=1, latency=0)
    assert send_time(Collective("all_reduce", 1, 10**9, 4, 1), assumptions) == pytest.approx(1.5)
    assert send_time(Collective("all_gather", 1, 10**9, 4, 2), assumptions) == pytest.approx(0.75)
    assert send_time(Collective("all_gather", 1, 10**9, 4, 4), assumptions) == pytest.approx(7.5)
    assert send_time(Collective("send", 3, 10**9, 8, 1), replace(assumptions, latency=1)) == pytest.approx(1 + 9)


def test_sharding_divides_what_it_shards():
    config, training = GrinMoeConfig(), Training(global_batch=64)
    alone = memory(config, Layout(), training)
    for layout in (Layout(fsdp=8), Layout(fsdp=8, ep=4)):
        assert memory(config, layout, training).weights == pytest.approx(alone.weights / 8)
    replicas = memory(config, Layout(dp_replicate=8), training)
    assert (replicas.weights, replicas.optimizer) == (alone.weights, alone.optimizer)
    # Experts stay where they are: all-to-alls of tokens in the place of gathered experts.
    config.router_aux_loss_coef = 0.01
    fsdp, ep = (communication(config, Layout(fsdp=8, ep=size), training) for size in (1, 8))
    expert_bytes = 2 * 8 * whole(config).parameters(config).experts * 2  # twice in each of 8 micro-batches
    assert fsdp["FSDP weights"].bytes - ep["FSDP weights"].bytes == expert_bytes
    assert ep["EP tokens"].calls == 8 * 32 * 6
    assert ep["EP tokens"].bytes == 8 * 32 * 6 * 4096 * 2 * 4096 * 2  # calls x tokens x K x H x bytes
    assert ep["balance loss"] == fsdp["balance loss"] == Collective("all_reduce", 8, 8 * 32 * 16 * 8, 8, 1)


def test_experts_are_dealt_out_whole():
    """Of 10 experts, the fullest of 4 ranks has 3, and all gather and scatter as if each of them had 3."""
    sizes = {"vocab_size": 128, "num_hidden_layers": 2, "num_local_experts": 10}
    config = GrinMoeConfig(**released_config(**sizes, eos_token_id=2, pad_token_id=2))
    training, layout = Training(global_batch=8, sequence=8, precision="float32"), Layout(fsdp=4)
    expert = 3 * config.intermediate_size * config.hidden_size + config.hidden_size  # and its row of the router
    others = sum(whole(config).parameters(config)) - 2 * 10 * expert
    needed = memory(config, layout, training)
    assert needed.weights == needed.gradients == needed.optimizer / 2 == 4 * (others / 4 + 2 * 3 * expert)
    gathered = communication(config, layout, training)["FSDP gradients"].bytes
    assert gathered == 2 * 4 * (others + 2 * 4 * 3 * expert)  # in each of 2 micro-batches
    # A rank without an expert is refused; in a pipeline it is filled up, to 12 of them.
    training = replace(training, global_batch=12)
    with pytest.raises(ValueError, match="num_local_experts=10 gives experts to 5 of fsdp_size=6 ranks"):
        estimate(config, Layout(fsdp=6), training, Assumptions())
    in_pipelines = [communication(GrinMoeConfig(**released_config(num_local_experts=n)), Layout(fsdp=6, pp=2),
                   training)["FSDP gradients"].bytes for n in (10, 12)]  # fmt: skip
    assert in_pipelines[0] == in_pipelines[1]


def test_plan_has_layouts_that_recipes_train_only():
    estimates, left_out = plan(GrinMoeConfig(), 64, Training(global_batch=64), Assumptions())
    found = {str(one.layout) for one in estimates}
    assert "DDP=4 FSDP2=16" in found, "groups of FSDP2 over several machines: recipes/accelerate/hsdp.yaml"
    assert not found & left_out.keys()
    for name, reason in {
        "FSDP2=64": "num_local_experts=16 gives experts to 16 of fsdp_size=64 ranks",
        "PP=64": "num_hidden_layers=32 layers do not make 64 pipeline stages",
        "FSDP2=8 PP=8 x2": "",
        "FSDP2=16 PP=4": "",
    }.items():
        assert name in found if not reason else reason in left_out[name], name
    few = plan(GrinMoeConfig(), 64, Training(global_batch=32), Assumptions()).left_out
    assert "makes 4 micro-batches, which the schedule cannot run on 8 stages" in few["FSDP2=8 PP=8"]
    for one in plan(GrinMoeConfig(num_hidden_layers=6), 64, Training(), Assumptions()).estimates:
        assert one.layout.pp in (1, 2, 4), "8 stages would be two for embedding and head"
        assert one.layout.pp == 1 or one.layout.dp_replicate == 1
    tied = plan(GrinMoeConfig(tie_word_embeddings=True), 16, Training(), Assumptions())
    assert {one.layout.pp for one in tied.estimates} == {1}


def test_plan_puts_the_fastest_that_fits_first():
    found = plan(GrinMoeConfig(), 64, Training(), Assumptions()).estimates
    fitting = [one for one in found if one.fits]
    assert found[: len(fitting)] == fitting
    assert 0 < len(fitting) < len(found)
    speeds = [one.tokens_per_second for one in fitting]
    assert speeds == sorted(speeds, reverse=True)
    for one in found:
        assert one.layout.devices == 64
        assert one.fits == (one.memory.total() <= 73 * GB)
        assert one.tokens_per_second * one.step_time == pytest.approx(1024 * 4096)
    kinds = [{key for key, size in vars(one.layout).items() if size > 1} for one in found]
    for kind in ({"dp_replicate"}, {"dp_replicate", "fsdp"}, {"dp_replicate", "fsdp", "ep"}, {"tp", "pp"},
                 {"fsdp", "tp"}, {"fsdp", "pp"}, {"fsdp", "tp", "pp", "interleave"}):  # fmt: skip
        assert kind in kinds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sequence", "0"], "sequence must be at least 1; got 0"),
        (["--precision", "int3"], "precision must be one of float32, bfloat16, mixed; got 'int3'"),
        (["--devices", "7", "--num-hidden-layers", "2", "--global-batch", "3"],
         "no layout of 7 devices is possible; DDP=7: global_batch must be a multiple of 7 (7 data-parallel ranks"),
        (["--config", str(EMPTY)], f"{EMPTY / 'config.json'} does not exist"),
        (["--assume", "speed=3"], "assume must be NAME=NUMBER with one of bandwidth_efficiency"),
        (["--assume", "memory=40"], "memory has its own option; use --memory instead of --assume memory=40"),
        (["--assume", "peak_flops=nan"], "peak_flops must be a number above 0; got nan"),
        (["--assume", "overlap=1.5"], "overlap must be a number at least 0 and at most 1; got 1.5"),
        (["--assume", "latency=-1"], "latency must be a number at least 0; got -1.0"),
        (["--memory", "7"], "memory must be above the reserve of 7 GB; got 7"),
        (["--assume", "overlap=much"], "; got 'overlap=much'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(arguments, message):
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(tp=3), "num_attention_heads=32 is not divisible by tp_size=3"),
        (Layout(tp=16), "num_key_value_heads=8 is not divisible by tp_size=16"),
        (Layout(pp=32, interleave=2), "num_hidden_layers=32 layers do not make 64 pipeline stages"),
        (Layout(tp=0), "tp must be at least 1; got 0"),
        (Layout(fsdp=12), "num_local_experts=16 gives experts to 8 of fsdp_size=12 ranks"),
        (Layout(fsdp=6, ep=3), "ep must divide num_local_experts=16 and fsdp=6; got 3"),
        (Layout(fsdp=3), "global_batch must be a multiple of 3 (3 data-parallel ranks x micro_batch=1); got 1024"),
    ],
)
def test_impossible_layouts_say_why(layout, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        estimate(GrinMoeConfig(), layout, Training(), Assumptions())


def test_command_reads_a_config_and_prints_json(tmp_path):
    GrinMoeConfig(**released_config()).save_pretrained(tmp_path)
    arguments = ["plan", "--config", tmp_path, "--num-local-experts", 4, "--devices", 2, "--memory", 16, "--json",
                 "--assume", "overlap=0.5", "--no-balance-loss"]  # fmt: skip
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert (printed["config"]["hidden_size"], printed["config"]["num_local_experts"]) == (32, 4)
    assert printed["training"] == vars(Training())
    assert printed["assumptions"] == vars(assume(["overlap=0.5"], memory=16 * GB))
    assert {one["layout"]["name"] for one in printed["layouts"]} == {
        "DDP=2", "FSDP2=2", "FSDP2=2 EP=2", "PP=2", "TP=2",
    }  # fmt: skip
    for one in printed["layouts"]:
        assert one["fits"] and one["balance_loss_share"] == 0
        assert sum(one["seconds"].values()) == pytest.approx(one["step_time"])
        parts = {"weights", "gradients", "optimizer", "activations", "communication", "buffers"}
        assert sum(one["memory"][part] for part in parts) == pytest.approx(one["memory"]["total"])


def test_layouts_divide_loras_base_and_repeat_the_adapters():
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
