"""The planner's communication and memory, against what real gloo processes send and hold."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from checkpoints import released_config, released_tensors, write_checkpoint
from communication import BATCH, LENGTH, VOCABULARY
from launch import launch

from modeling_grin import GrinMoeConfig
from modeling_grin.planning.memory import stage_memory, stages
from modeling_grin.planning.setting import Layout, Training, micro_batches
from modeling_grin.planning.time import communication

CONFIG = released_config(
    vocab_size=VOCABULARY, intermediate_size=32, num_hidden_layers=4, router_aux_loss_coef=0.01, torch_dtype="float32",
    eos_token_id=2, pad_token_id=2,
)  # fmt: skip
INTERLEAVED = "Interleaved1F1B"
SCRIPT = Path(__file__).with_name("communication.py")
NATIVE = {"fsdp": "fsdp_size", "tp": "tp_size", "dp_replicate": "dp_replicate_size"}


class Case(NamedTuple):
    layout: Layout
    kind: str
    sizes: dict[str, Any]
    """Of the engine."""
    checkpointing: bool
    micro_batches: int
    precision: str


def native(precision: str = "float32", checkpointing: bool = False, **sizes: int) -> Case:
    layout = Layout(**sizes)
    return Case(layout, "native", {NATIVE[key]: size for key, size in sizes.items()}, checkpointing, 2, precision)


def pipeline(precision: str = "float32", checkpointing: bool = False, **sizes: int) -> Case:
    layout = Layout(pp=2, **sizes)
    of_engine = {"pp_size": 2, "tp_size": layout.tp, "schedule": INTERLEAVED if layout.interleave > 1 else "1F1B"}
    return Case(layout, "pipeline", of_engine, checkpointing, 4, precision)


CASES = {
    "ddp-mixed": Case(Layout(dp_replicate=2), "ddp", {}, True, 2, "mixed"),
    "tp-mixed": native("mixed", checkpointing=True, tp=2),
    "fsdp-mixed-checkpointing": native("mixed", checkpointing=True, fsdp=2),
    "pp-interleaved": pipeline(interleave=2),
    "hsdp": native(dp_replicate=2, fsdp=2),
    "fsdp-pp-mixed": pipeline("mixed", fsdp=2),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """name -> each rank's counts and peak."""
    folder = tmp_path_factory.mktemp("communication")
    tensors = {name: tensor.float() for name, tensor in released_tensors(CONFIG).items()}
    (folder / "model").mkdir()
    write_checkpoint(folder / "model", CONFIG, tensors)
    cases = [
        {"name": name, "ranks": case.layout.devices, "kind": case.kind, "sizes": case.sizes,
         "checkpointing": case.checkpointing, "micro_batches": case.micro_batches, "mixed": case.precision == "mixed"}
        for name, case in CASES.items()
    ]  # fmt: skip
    (folder / "cases.json").write_text(json.dumps(cases))
    launch(SCRIPT, 1, folder, folder / "cases.json")
    return {
        name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(case.layout.devices)]
        for name, case in CASES.items()
    }


def planned(name):
    """The case's config, layout and training, as the planner takes them."""
    layout, _, _, checkpointing, number, precision = CASES[name]
    training = Training(BATCH, number * BATCH * layout.data_parallel, LENGTH, precision, checkpointing=checkpointing)
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
        if layout.pp > 1 and layout.data_parallel == 1:  # a sum over one rank, which no one gets
            assert actual.pop("counts")[0] == CASES[name].micro_batches * layout.interleave
        assert actual == expected, f"rank {rank}"


@pytest.mark.parametrize("name", CASES)
def test_memory_is_within_a_tenth_of_what_ranks_hold(name, measured):
    config, layout, training = planned(name)
    ends = stages(config, layout, training)
    for rank, result in enumerate(measured[name]):
        stage = ends[0 if rank // layout.tp % layout.pp == 0 else -1]
        expected = stage_memory(config, layout, training, stage)
        peak = result["peak"]
        assert expected.total() == pytest.approx(peak["Total"], rel=0.1), f"rank {rank}"
        assert expected.optimizer == pytest.approx(peak["OPT"], rel=0.002)  # and a step number for each parameter
        if layout.pp == 1 and layout.tp > 1:
            continue  # the tracker takes what DTensor makes of weights for weights
        state = expected.weights + expected.gradients + expected.optimizer + expected.buffers
        others = expected.activations + expected.communication
        assert others == pytest.approx(peak["Total"] - state, rel=0.15), f"rank {rank}"
        if layout.pp > 1 or layout.fsdp == 1:  # it does so with what FSDP2 has gathered
            assert (expected.weights, expected.gradients) == (peak["PARAM"], peak["GRAD"])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.kind == "pipeline"])
def test_pipelines_hold_what_they_receive_for_micro_batches_in_flight_only(name, measured):
    config, layout, training = planned(name)
    ends = stages(config, layout, training)
    # The interleaved schedule receives before it computes: an input and a gradient for each chunk.
    ahead = 2 * layout.interleave if layout.interleave > 1 else 0
    for rank, result in enumerate(measured[name]):
        in_flight = ends[0 if rank // layout.tp % layout.pp == 0 else -1].in_flight * layout.interleave
        assert 0 < result["buffers"] <= in_flight + ahead, f"rank {rank}"
