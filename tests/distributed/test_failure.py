"""Jobs that end before their time: a rank that dies, and a job that is killed while it saves. Real gloo processes."""

import random
import re
import time

import failure_runs
import pytest
import runs
import torch
from launch import run_ranks
from processes import ROOT, TIMEOUT, call, get_context, run
from safetensors.torch import load_file

from modeling_grin.training import last_complete_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failure")
    runs.make_model(**runs.RESUME_CONFIG).save_pretrained(folder / "start")
    return folder


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("raised", r"Root Cause(?s:.)*rank +: 1 (?s:.)*ArithmeticError: the weights have left the room"),
        # The other rank may come first here: its connection is closed before the launcher looks.
        ("killed", r"rank +: 1 (?s:.)*exitcode +: -9 (?s:.)*Signal 9 \(SIGKILL\)"),
    ],
)
def test_a_rank_that_dies_ends_the_job_with_its_error(folder, kind, reason):
    """The other rank waits for it in a collective, half an hour if nobody ends it.

    torchrun itself looks at all ranks before it tells of one; a forked launcher takes the first that it sees.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={failure_runs.WORLD_SIZE}"]
    with pytest.raises(AssertionError) as failure:
        run([*torchrun, failure_runs.__file__, folder, kind])
    ended = time.time()
    assert ended - float((folder / f"{kind}-at").read_text()) < 120
    assert re.search(reason, str(failure.value)), failure.value


def test_the_launcher_repeats_what_a_recipe_says(tmp_path):
    config = ROOT / "recipes" / "configs" / "pretrain_debug.yaml"
    given = ["--config", str(config), "--output_dir", str(tmp_path / "out"), "--train_data", "nowhere.jsonl"]
    with pytest.raises(AssertionError) as failure:
        call(run_ranks, "launch", 2, "ddp", "pretrain", *given)
    output = str(failure.value)
    assert "ValueError: nowhere.jsonl: no such file or folder" in output.partition("Root Cause")[2], output


def start(folder, output_dir, resume=False):
    """The ranks of a run, started."""
    store = output_dir.parent / f"{output_dir.name}-store-{resume}"
    ranks = [
        get_context().Process(target=failure_runs.save_and_go_on, args=(rank, folder, output_dir, store, resume))
        for rank in range(failure_runs.WORLD_SIZE)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def finish(ranks):
    for rank in ranks:
        rank.join(TIMEOUT)
    assert [rank.exitcode for rank in ranks] == [0] * len(ranks)


@pytest.fixture(scope="module")
def finished(folder):
    """The weights after a run that nothing disturbed."""
    output_dir = folder / "undisturbed"
    finish(start(folder, output_dir))
    return weights(output_dir / "checkpoint-9")


def weights(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_a_job_killed_at_any_moment_resumes_from_the_newest_complete_checkpoint(folder, finished):
    """SIGKILL of all ranks at random moments: what has a checkpoint's name is complete, and the end is bit for bit."""
    generator = random.Random(0)
    interrupted = 0
    for number in range(30):
        output_dir = folder / f"killed-{number}"
        ranks = start(folder, output_dir)
        deadline = time.monotonic() + TIMEOUT
        while not (output_dir / "checkpoint-2").is_dir() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.5))
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.join(TIMEOUT)
        steps = [int(path.name.removeprefix("checkpoint-")) for path in output_dir.glob("checkpoint-*")]
        newest, incomplete = last_complete_checkpoint(output_dir)
        assert newest == str(output_dir / f"checkpoint-{max(steps)}")  # at most the step after it is lost
        assert all("_incomplete" in path for path in incomplete)
        interrupted += bool(incomplete)
        finish(start(folder, output_dir, resume=True))
        found = weights(output_dir / "end")
        assert found.keys() == finished.keys()
        assert all(torch.equal(found[name], finished[name]) for name in finished)
        if number >= 1 and interrupted >= 2:
            break
    assert interrupted >= 2, "too few of the moments were in a save"
