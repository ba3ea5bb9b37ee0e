"""Jobs that end before their time: a rank that dies, and a job that is killed while it saves. Real gloo processes."""

import re
import signal
import time

import failure_runs
import launch
import pytest
import runs
import torch
from processes import ROOT, TIMEOUT, call, get_context, run
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from modeling_grin.training import last_complete_checkpoint

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={failure_runs.WORLD_SIZE}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failure")
    runs.make_model(**runs.RESUME_CONFIG).save_pretrained(folder / "start")
    return folder


def test_a_rank_that_dies_ends_the_job_with_its_error(folder):
    """The other rank waits for it in a collective, half an hour if nobody ends it."""
    with pytest.raises(AssertionError) as failure:
        run([*TORCHRUN, failure_runs.__file__, folder])
    ended = time.time()
    assert ended - float((folder / "failed-at").read_text()) < 120
    reason = r"Root Cause(?s:.)*rank +: 1 (?s:.)*ArithmeticError: the weights have left the room"
    assert re.search(reason, str(failure.value)), failure.value


def run_agent(recipe, *args):
    """torchrun's agent, on ranks that end before they would meet."""
    config = LaunchConfig(
        1, 1, 2, start_method="fork", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
    )
    elastic_launch(config, launch.main)("ddp", recipe, *args)


def test_the_launcher_repeats_what_a_recipe_says(tmp_path):
    config = ROOT / "recipes" / "configs" / "pretrain_debug.yaml"
    given = ["--config", str(config), "--output_dir", str(tmp_path / "out"), "--train_data", "nowhere.jsonl"]
    with pytest.raises(AssertionError) as failure:
        call(run_agent, "pretrain", *given)
    output = str(failure.value)
    assert "ValueError: nowhere.jsonl: no such file or folder" in output.partition("Root Cause")[2], output


def run_ranks_until_the_end(folder, output_dir, resume=False, moment=None):
    """The exit codes of a run's ranks; those that wait for a dead first rank are killed."""
    store = output_dir.parent / f"{output_dir.name}-store-{resume}"
    arguments = (folder, output_dir, store, resume, moment)
    ranks = [
        get_context().Process(target=failure_runs.save_and_go_on, args=(rank, *arguments))
        for rank in range(failure_runs.WORLD_SIZE)
    ]
    for rank in ranks:
        rank.start()
    ranks[0].join(TIMEOUT)
    for rank in ranks:
        if ranks[0].exitcode != 0:
            rank.kill()
        rank.join(TIMEOUT)
    return [rank.exitcode for rank in ranks]


def weights(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_a_job_killed_while_it_saves_resumes_from_the_newest_complete_checkpoint(folder):
    """SIGKILL of all ranks: what has a checkpoint's name is complete, and the end is bit for bit."""
    assert run_ranks_until_the_end(folder, folder / "undisturbed") == [0, 0]
    expected = weights(folder / "undisturbed" / "checkpoint-9")
    for moment in ("in the files", "all written"):
        output_dir = folder / moment.replace(" ", "_") / "run"
        output_dir.parent.mkdir()
        assert run_ranks_until_the_end(folder, output_dir, moment=moment)[0] == -signal.SIGKILL
        newest, incomplete = last_complete_checkpoint(output_dir)
        assert newest == str(output_dir / "checkpoint-2")
        assert list(incomplete) == [str(output_dir / "_incomplete" / "checkpoint-3")]
        assert run_ranks_until_the_end(folder, output_dir, resume=True) == [0, 0]
        found = weights(output_dir / "end")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
