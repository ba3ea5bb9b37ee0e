"""Conversions that end before their time: killed at random moments, interrupted, on a full disk. Real processes."""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
from checkpoints import released_config, released_tensors, write_checkpoint

import conversion
from conversion import ConversionError, convert, writing

ROOT = Path(__file__).parents[1]
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_local_experts": 8,
    "vocab_size": 999,
}
ARGUMENTS = {"to": "fused", "max_shard_size": "1MB", "check": False}


def write_source(folder: Path, seed: int = 0) -> Path:
    config = released_config(**SIZES)
    return write_checkpoint(folder, config, released_tensors(config, seed), num_shards=3)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """17 MB."""
    return write_source(tmp_path_factory.mktemp("interruption") / "source")


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    destination = tmp_path_factory.mktemp("undisturbed") / "result"
    convert(source, destination, **ARGUMENTS)
    return digest(destination)


def incomplete(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.incomplete")


def run(source: Path, destination: Path, begun) -> None:
    begun.set()
    convert(source, destination, **ARGUMENTS)


@pytest.fixture(scope="module")
def context():
    """Processes that have imported everything, forked from a clean one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([Path(__file__).stem])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests"))))
        forkserver.ensure_running()
    return context


def test_killed_at_any_moment(context, source, expected, tmp_path):
    """SIGKILL at random moments: the destination is absent or whole, and what is left is gone on with."""
    generator = random.Random(0)
    longest = 0.5  # seconds before a kill; follows what the machine does meanwhile
    left = {"nothing": 0, "complete": 0, "begun": 0, "files": 0}
    for number in range(200):
        destination = tmp_path / f"result-{number}"
        begun = context.Event()
        process = context.Process(target=run, args=(source, destination, begun))
        process.start()
        assert begun.wait(600)
        time.sleep(generator.uniform(0, longest))
        process.kill()
        process.join(600)
        staging = incomplete(destination)
        if destination.exists():
            assert digest(destination) == expected
            left["complete"] += 1
            longest *= 0.8
            shutil.rmtree(staging, ignore_errors=True)  # killed between renaming and tidying up
            continue
        if not staging.exists():
            left["nothing"] += 1
            longest *= 1.2
            continue
        done = {path: path.stat().st_mtime_ns for path in staging.glob("result/*.safetensors")}
        left["files" if done else "begun"] += 1
        if (staging / "plan.json").exists():  # else nothing was begun, and there is nothing to go on with
            with pytest.raises(ConversionError, match="was interrupted: go on with it by --resume"):
                convert(source, destination, **ARGUMENTS)
        convert(source, destination, **ARGUMENTS, resume=True)
        assert digest(destination) == expected
        assert not staging.exists()
        for path, written in done.items():  # not written once more
            assert (destination / path.name).stat().st_mtime_ns == written
        if number >= 40 and left["files"] >= 10:
            break
    assert left["files"] >= 10, left


def stop_after(nbytes: int):
    """A progress function that presses Ctrl-C."""
    done = 0

    def progress(written: int, total: int) -> None:
        nonlocal done
        done += written
        if done > nbytes:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("change", ["source", "arguments", "plan"])
def test_only_the_same_conversion_is_gone_on_with(source, tmp_path, change):
    mine = shutil.copytree(source, tmp_path / "source")
    with pytest.raises(KeyboardInterrupt):
        convert(mine, tmp_path / "result", **ARGUMENTS, progress=stop_after(6_000_000))
    assert list(incomplete(tmp_path / "result").glob("result/*.safetensors"))
    arguments = dict(ARGUMENTS)
    if change == "source":
        write_source(mine, seed=1)
    elif change == "arguments":
        arguments["dtype"] = "float32"
    else:
        (incomplete(tmp_path / "result") / "plan.json").write_text("{")
    named = {"source": "source", "arguments": "dtype", "plan": "source and to"}[change]
    with pytest.raises(ConversionError, match=f"begun with another {named}.*start anew"):
        convert(mine, tmp_path / "result", **arguments, resume=True)


def test_resume_without_anything_to_resume(source, tmp_path, expected):
    convert(source, tmp_path / "result", **ARGUMENTS, resume=True)
    assert digest(tmp_path / "result") == expected


def test_another_calibration_text_is_noticed(tmp_path, trained_tokenizer):
    """It decides which experts are kept."""
    config = released_config(**{**SIZES, "vocab_size": 1024})
    mine = write_checkpoint(tmp_path / "source", config, released_tensors(config))
    trained_tokenizer.save_pretrained(mine)
    text = tmp_path / "text"
    text.write_text("import this")
    arguments = {"to": "hub", "num_experts": 4, "calibration": text, "check": False}
    with pytest.raises(KeyboardInterrupt):
        convert(mine, tmp_path / "result", **arguments, progress=stop_after(1))
    text.write_text("import that")
    with pytest.raises(ConversionError, match="begun with another source"):
        convert(mine, tmp_path / "result", **arguments, resume=True)


FULL_DISK = """
import sys
from pathlib import Path
from conversion import ConversionError, convert, writing
source, disk, fill = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
filler = (disk / "filler").open("wb", buffering=0)
def progress(done, total):  # something else takes the room meanwhile
    if fill:
        filler.write(bytes(fill))
def stop(done, total):  # Ctrl-C in the middle, to go on where there is room for the rest, but not for all of it
    global written
    written += done
    if written > 9_000_000:
        raise KeyboardInterrupt
try:
    if fill < 0:
        written = 0
        try:
            convert(source, disk / "result", to="fused", check=False, max_shard_size="1MB", progress=stop)
        except KeyboardInterrupt:
            pass
        fill = 0
        convert(source, disk / "result", to="fused", check=False, max_shard_size="1MB", resume=True)
        print("gone on with")
    convert(source, disk / "other", to="fused", check=False, progress=progress)
except ConversionError as error:
    print(error)
filler.close()
print(sorted(path.name for path in disk.iterdir()))
"""


@pytest.mark.parametrize(
    ("size", "fill", "message"),
    [
        ("8m", 0, "the disk is too full: 0.02 GB are needed"),
        ("24m", 2_000_000, "other: the disk is full; nothing"),
        ("24m", -1, "gone on with"),
    ],
)
def test_full_disk(source, tmp_path, size, fill, message):
    """On a file system of its own, too small from the start or filled by another meanwhile."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size={size} tmpfs "$3" && exec "$0" -c "$1" "$2" "$3" "$4"'
    command = ["unshare", "--mount", "sh", "-c", mount, sys.executable, FULL_DISK, str(source), str(disk), str(fill)]
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0:
        pytest.skip("no mounts may be made here")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr
    assert message in result.stdout
    assert result.stdout.splitlines()[-1] == ("['filler', 'result']" if fill < 0 else "['filler']")


def test_errors_leave_nothing(source, tmp_path):
    """Whatever is raised; and a folder that was there, and empty, is still there."""

    def fail(done: int, total: int) -> None:
        raise RuntimeError("of the caller")

    (tmp_path / "result").mkdir()
    with pytest.raises(RuntimeError, match="of the caller"):
        convert(source, tmp_path / "result", **ARGUMENTS, progress=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_two_at_once(source, tmp_path):
    """The second is refused while the first runs."""
    seen = []

    def progress(done: int, total: int) -> None:
        if not seen:
            seen.append(None)
            for resume in (False, True):
                with pytest.raises(ConversionError, match="is being made by another process"):
                    convert(source, tmp_path / "result", **ARGUMENTS, resume=resume)
            seen.append("refused")

    convert(source, tmp_path / "result", **ARGUMENTS, progress=progress)
    assert seen == [None, "refused"]
    convert(source, tmp_path / "again", **ARGUMENTS)
    assert digest(tmp_path / "result") == digest(tmp_path / "again")


@pytest.mark.parametrize("moment", ["before it locks", "while it waits for the lock"])
def test_one_that_comes_late(source, tmp_path, monkeypatch, moment):
    """It passed the check of its destination before another made that: it says so at once, and leaves nothing."""
    destination, opened = tmp_path / "result", []

    def others_turn(function):
        def wrapper(*args, **kwargs):
            if not opened:
                opened.append(True)
                convert(source, destination, **ARGUMENTS)
            return function(*args, **kwargs)

        return wrapper

    if moment == "before it locks":
        monkeypatch.setattr(conversion.conversion, "staged", others_turn(conversion.conversion.staged))
    else:  # between opening the lock's file, which the other then removes, and locking it
        flock = writing.fcntl.flock

        def late_flock(lock, how):
            if not opened:
                opened.append(True)
                flock(lock, writing.fcntl.LOCK_UN)
                convert(source, destination, **ARGUMENTS)
            return flock(lock, how)

        monkeypatch.setattr(writing.fcntl, "flock", late_flock)
    written = []
    with pytest.raises(ConversionError, match=r"result has just been made by another process"):
        convert(source, destination, **ARGUMENTS, progress=lambda done, total: written.append(done))
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    assert written == []
    convert(source, tmp_path / "again", **ARGUMENTS)
    assert digest(destination) == digest(tmp_path / "again")


def test_what_a_kill_after_the_last_step_has_left_is_named(source, tmp_path):
    convert(source, tmp_path / "result", **ARGUMENTS)
    (incomplete(tmp_path / "result")).mkdir()
    with pytest.raises(ConversionError, match=r"result exists: .*\.result\.incomplete, which .* has left, can be del"):
        convert(source, tmp_path / "result", **ARGUMENTS)


def test_a_folder_that_a_kill_has_left_empty_is_no_hindrance(source, tmp_path, expected):
    incomplete(tmp_path / "result").mkdir()
    convert(source, tmp_path / "result", **ARGUMENTS)
    assert digest(tmp_path / "result") == expected and not incomplete(tmp_path / "result").exists()


@pytest.mark.parametrize("to", ["fused", "gguf"])
def test_a_destination_that_appears_meanwhile_is_kept(source, tmp_path, to):
    destination = tmp_path / ("result.gguf" if to == "gguf" else "result")

    def appear(done: int, total: int) -> None:
        if to == "gguf":
            destination.write_text("mine")
        else:
            destination.mkdir(exist_ok=True)
            (destination / "file").write_text("mine")

    with pytest.raises(ConversionError, match=r"has appeared meanwhile: move it away, and give .*result, which is"):
        convert(source, destination, to=to, check=False, progress=appear)
    assert (destination if to == "gguf" else destination / "file").read_text() == "mine"
    assert (incomplete(destination) / "result").exists()


def test_the_plan_is_json(source, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "result", **ARGUMENTS, progress=stop_after(0))
    plan = json.loads((incomplete(tmp_path / "result") / "plan.json").read_text())
    assert plan["to"] == "fused"
    assert conversion.inspect(source).files.keys() <= {name for name, *_ in plan["source"][0][1]}
