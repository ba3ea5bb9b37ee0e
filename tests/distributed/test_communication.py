"""The planner's communication and memory, against what real gloo processes send and hold."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
from checkpoints import released_config, released_tensors, write_checkpoint
from communication import BATCH, LENGTH, VOCABULARY
from launch import launch

from modeling_grin import GrinMoeConfig
from modeling_grin.analysis.planner import Layout, Training, communication, memory, micro_batches, stages

CONFIG = released_config(
    vocab_size=VOCABULARY,
    intermediate_size=32,
    num_hidden_layers=4,
    router_aux_loss_coef=0.01,
    torch_dtype="float32",
    eos_token_id=2,
    pad_token_id=2,
)
INTERLEAVED = "Interleaved1F1B"
SCRIPT = Path(__file__).with_name("communication.py")
# name -> the planner's layout, the engine, its sizes, activation checkpointing, micro-batches.
CASES = {
    "ddp": (Layout(dp_replicate=2), "ddp", {}, False, 2),
    "tp": (Layout(tp=2), "native", {"tp_size": 2}, False, 2),
    "tp-checkpointing": (Layout(tp=2), "native", {"tp_size": 2}, True, 2),
    "fsdp": (Layout(fsdp=2), "native", {"fsdp_size": 2}, False, 2),
    "fsdp-checkpointing": (Layout(fsdp=2), "native", {"fsdp_size": 2}, True, 2),
    "pp": (Layout(pp=2), "pipeline", {"pp_size": 2}, False, 4),
    "pp-interleaved": (Layout(pp=2, interleave=2), "pipeline", {"pp_size": 2, "schedule": INTERLEAVED}, False, 4),
    "hsdp": (Layout(dp_replicate=2, fsdp=2), "native", {"dp_replicate_size": 2, "fsdp_size": 2}, False, 2),
    "fsdp-tp": (Layout(fsdp=2, tp=2), "native", {"fsdp_size": 2, "tp_size": 2}, True, 2),
    "fsdp-tp-pp": (Layout(fsdp=2, tp=2, pp=2), "pipeline", {"pp_size": 2, "tp_size": 2}, True, 4),
}  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """name -> each rank's counts and peak."""
    folder = tmp_path_factory.mktemp("communication")
    tensors = {name: tensor.float() for name, tensor in released_tensors(CONFIG).items()}
    (folder / "model").mkdir()
    write_checkpoint(folder / "model", CONFIG, tensors)
    cases = [
        {"name": name, "ranks": layout.devices, "kind": kind, "sizes": sizes, "checkpointing": checkpointing,
         "micro_batches": number}
        for name, (layout, kind, sizes, checkpointing, number) in CASES.items()
    ]  # fmt: skip
    (folder / "cases.json").write_text(json.dumps(cases))
    launch(SCRIPT, 1, folder, folder / "cases.json")
    return {
        name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(layout.devices)]
        for name, (layout, *_) in CASES.items()
    }


def planned(name):
    """The case's config, layout and training, as the planner takes them."""
    layout, _, _, checkpointing, number = CASES[name]
    training = Training(
        BATCH, number * BATCH * layout.data_parallel, LENGTH, precision="float32", checkpointing=checkpointing
    )
    assert micro_batches(layout, training) == number
    return GrinMoeConfig(**CONFIG), layout, training


@pytest.mark.parametrize("name", CASES)
def test_calls_and_bytes_are_those_that_ranks_count(name, measured):
    config, layout, training = planned(name)
    ends = stages(config, layout, training)
    for rank, result in enumerate(measured[name]):
        stage = ends[0 if rank // layout.tp % layout.pp == 0 else -1]
        expected = defaultdict(lambda: [0, 0])
        for purpose, collective in communication(config, layout, training, stage).items():
            total = expected["counts" if purpose == "balance loss" else collective.operation]
            total[0] += collective.calls
            total[1] += collective.bytes
        actual = result["communication"]
        if layout.data_parallel == 1:  # a sum over one rank, which no one gets
            assert actual.pop("counts")[0] == CASES[name][-1] * layout.interleave
        assert actual == expected, f"rank {rank}"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[1] == "native"])
def test_memory_is_within_a_tenth_of_what_ranks_hold(name, measured):
    config, layout, training = planned(name)
    expected = memory(config, layout, training)
    for result in measured[name]:
        assert expected.total() == pytest.approx(result["peak"]["Total"], rel=0.1)
