"""Routing replay under tensor parallelism and FSDP2: every rank takes the given routes, as one process does."""

import json
from pathlib import Path

import runs
import sharded_runs
import torch
from checkpoints import released_config, released_tensors, write_checkpoint
from launch import launch


def test_every_layout_replays_the_same_routes(tmp_path):
    config = released_config(torch_dtype="float32", router_jitter_noise=0.1, router_sampling=False,
                             input_jitter_noise=0.0)  # fmt: skip
    write_checkpoint(tmp_path / "source", config, released_tensors(config))
    generator = torch.Generator().manual_seed(0)
    routes = torch.rand(2, runs.LENGTH, 2, 6, generator=generator).argsort(dim=-1)[..., :2]
    case = {"run": "replay", "checkpoint": "source", "routes": routes.tolist()}
    for num_ranks, layouts in ((1, {"one": None}), (2, {"tp": {"tp_size": 2}, "fsdp2": {"fsdp_size": 2}})):
        cases = [{"name": name, "layout": layout, **case} for name, layout in layouts.items()]
        (tmp_path / "cases.json").write_text(json.dumps(cases))
        if num_ranks == 1:
            sharded_runs.main(tmp_path, tmp_path / "cases.json")
        else:
            launch(Path(sharded_runs.__file__), num_ranks, tmp_path, tmp_path / "cases.json")
    expected = torch.load(tmp_path / "one-0.pt")
    assert torch.equal(expected["experts"].unflatten(0, (2, -1)), routes)
    for name in ("tp-0", "tp-1", "fsdp2-0", "fsdp2-1"):
        actual = torch.load(tmp_path / f"{name}.pt")
        assert torch.equal(actual["experts"], expected["experts"])
        for key, gradient in expected["gradients"].items():
            assert (actual["gradients"][key] - gradient).norm() <= 1e-5 * gradient.norm(), key
