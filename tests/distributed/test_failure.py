"""Jobs that end before their time: a rank that dies, and a job that is killed while it saves. Real gloo processes."""

import multiprocessing
import os
import random
import re
import time
from multiprocessing import forkserver

import failure_runs
import pytest
import runs
import torch
from launch import ROOT, TIMEOUT, torchrun
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
    """The other rank waits for it in a collective, half an hour if nobody ends it."""
    with pytest.raises(AssertionError) as failure:
        torchrun(failure_runs.__file__, failure_runs.WORLD_SIZE, folder, kind)
    ended = time.time()
    assert ended - float((folder / f"{kind}-at").read_text()) < 120
    assert re.search(reason, str(failure.value)), failure.value


def test_the_launcher_repeats_what_a_recipe_says(tmp_path):
    config = ROOT / "recipes" / "configs" / "pretrain_debug.yaml"
    given = ["--config", config, "--output_dir", tmp_path / "out", "--train_data", "nowhere.jsonl"]
    with pytest.raises(AssertionError) as failure:
        torchrun(ROOT / "recipes" / "pretrain.py", 2, *given)
    output = str(failure.value)
    assert "ValueError: nowhere.jsonl: no such file or folder" in output.partition("Root Cause")[2], output


@pytest.fixture(scope="module")
def context():
    """Ranks with all imports done, forked from a clean process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["failure_runs"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "distributed"))))
        forkserver.ensure_running()
    return context


def start(context, folder, output_dir, resume=False):
    """The ranks of a run, started."""
    store = output_dir.parent / f"{output_dir.name}-store-{resume}"
    ranks = [
        context.Process(target=failure_runs.save_and_go_on, args=(rank, folder, output_dir, store, resume))
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
def finished(context, folder):
    """The weights after a run that nothing disturbed."""
    output_dir = folder / "undisturbed"
    finish(start(context, folder, output_dir))
    return weights(output_dir / "checkpoint-9")


def weights(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.slow
def test_a_job_killed_at_any_moment_resumes_from_the_newest_complete_checkpoint(context, folder, finished):
    """SIGKILL of all ranks at random moments: what has a checkpoint's name is complete, and the end is bit for bit."""
    generator = random.Random(0)
    interrupted = 0
    for number in range(30):
        output_dir = folder / f"killed-{number}"
        ranks = start(context, folder, output_dir)
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
        finish(start(context, folder, output_dir, resume=True))
        found = weights(output_dir / "end")
        assert found.keys() == finished.keys()
        assert all(torch.equal(found[name], finished[name]) for name in finished)
        if number >= 4 and interrupted >= 3:
            break
    assert interrupted >= 3, "too few of the moments were in a save"
