"""Conversions that end before their time: killed, interrupted, on a full disk. Real processes."""

import ctypes
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import write_release
from processes import call, get_context

from conversion import ConversionError, convert, writing

SIZES = {"hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 4, "num_local_experts": 8,
         "vocab_size": 999}  # fmt: skip
ARGUMENTS = {"to": "fused", "max_shard_size": "300KB", "check": False}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """4.7 MB."""
    return write_release(tmp_path_factory.mktemp("interruption") / "source", 3, **SIZES)[0]


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    destination = tmp_path_factory.mktemp("undisturbed") / "result"
    convert(source, destination, **ARGUMENTS)
    return digest(destination)


def incomplete(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.incomplete")


def run(source: Path, destination: Path, kill_at: tuple[str, int]) -> None:
    """Convert, and kill this process by SIGKILL at an audit event since the start, or after so many bytes."""
    event, left = kill_at

    def count(number: int) -> None:
        nonlocal left
        left -= number
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(name: str, args: tuple) -> None:
        if name == event or (name == "os.rename" and event == "publish" and args[1] == str(destination)):
            count(1)

    sys.addaudithook(hook)
    convert(source, destination, **ARGUMENTS, progress=lambda done, total: count(done) if event == "bytes" else None)


# What is there after the kill -> the moments: an audit event and its number, before which the process dies, or bytes.
KILLS = {
    "nothing": [("fcntl.flock", 1)],
    "begun": [("os.rename", 1), ("os.rename", 3), ("bytes", 250_000)],
    "files": [("os.rename", 4), ("bytes", 1_000_000), ("publish", 1)],
    "complete": [("shutil.rmtree", 1)],
}


@pytest.mark.parametrize(("left", "kill_at"), [(left, kill_at) for left, kills in KILLS.items() for kill_at in kills])
def test_killed_at_any_moment(source, expected, tmp_path, left, kill_at):
    """The destination is absent or whole, and what is left is continued."""
    destination = tmp_path / "result"
    process = get_context().Process(target=run, args=(source, destination, kill_at))
    process.start()
    process.join(600)
    assert process.exitcode == -signal.SIGKILL
    staging = incomplete(destination)
    assert destination.exists() == (left == "complete")
    done = {path: path.stat().st_mtime_ns for path in staging.glob("result/model-*.safetensors")}
    assert bool(done) == (left == "files")
    if left != "complete":
        if (staging / "plan.json").exists():  # else nothing was begun, and there is nothing to continue
            with pytest.raises(ConversionError, match="was interrupted: continue it with --resume"):
                convert(source, destination, **ARGUMENTS)
        convert(source, destination, **ARGUMENTS, resume=True)
        assert not staging.exists()
    assert digest(destination) == expected
    for path, written in done.items():  # not written once more
        assert (destination / path.name).stat().st_mtime_ns == written


def stop_after(nbytes: int):
    """A progress function that presses Ctrl-C."""
    done = 0

    def progress(written: int, total: int) -> None:
        nonlocal done
        done += written
        if done > nbytes:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("change", ["source", "dtype"])
def test_only_the_same_conversion_is_continued(source, tmp_path, change):
    mine = shutil.copytree(source, tmp_path / "source")
    with pytest.raises(KeyboardInterrupt):
        convert(mine, tmp_path / "result", **ARGUMENTS, progress=stop_after(1_500_000))
    assert list(incomplete(tmp_path / "result").glob("result/model-*.safetensors"))
    arguments = dict(ARGUMENTS)
    if change == "source":
        (mine / "config.json").touch()
    else:
        arguments["dtype"] = "float32"
    with pytest.raises(ConversionError, match=f"begun with another {change}: .*start anew"):
        convert(mine, tmp_path / "result", **arguments, resume=True)


def convert_on_full_disks(source: Path, folder: Path) -> None:
    """Print the errors, and what is left, on file systems that this process alone sees."""
    ctypes.CDLL(None).unshare(0x00020000)  # CLONE_NEWNS
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    for name, size in {"small": "2m", "filled": "6m"}.items():
        disk = folder / name
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)

        def fill(done: int, total: int, disk: Path = disk) -> None:  # something else takes the room meanwhile
            with (disk / "filler").open("ab", buffering=0) as filler:
                filler.write(bytes(500_000))

        try:
            convert(
                source, disk / "other", to="fused", check=False, **({"progress": fill} if name == "filled" else {})
            )
        except ConversionError as error:
            print(error, sorted(path.name for path in disk.iterdir()))


def test_full_disk(source, tmp_path):
    """File systems of their own: too small from the start, and filled by another meanwhile."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0:
        pytest.skip("no mounts may be made here")
    small, filled = call(convert_on_full_disks, source, tmp_path).splitlines()[-2:]  # after what imports say
    assert "other: the disk is full: [Errno 28] 0.00 GB are needed" in small and small.endswith(" []")
    assert "other: the disk is full: [Errno 28] No space" in filled and filled.endswith(" ['filler']")


def test_errors_leave_nothing(source, tmp_path):
    """Whatever is raised; and a folder that was there, and empty, is still there."""

    def fail(done: int, total: int) -> None:
        raise RuntimeError("of the caller")

    (tmp_path / "result").mkdir()
    with pytest.raises(RuntimeError, match="of the caller"):
        convert(source, tmp_path / "result", **ARGUMENTS, progress=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_two_at_once(source, expected, tmp_path):
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
    assert digest(tmp_path / "result") == expected


def test_one_that_comes_late(source, expected, tmp_path, monkeypatch):
    """Another makes the destination between opening the lock's file, which it then removes, and locking it."""
    destination, opened, flock = tmp_path / "result", [], writing.fcntl.flock

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
    assert written == [] and digest(destination) == expected


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
