"""Publishing: a folder goes to a Hub on the loopback and is loaded from there; what must not go up does not."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from checkpoints import fused, released_config, released_tensors, write_checkpoint
from hub_server import HubError, serve, sha256
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file

import modeling_grin
from grin_moe_cli import main
from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM, GrinMoeForSequenceClassification, GrinMoeTokenizer
from modeling_grin.files import PART
from modeling_grin.publishing.push import push

PACKAGE = Path(modeling_grin.__file__).parent
PICTURE = b"\x89PNG\r\n\x1a\n\0\0fake"
CARD = """---
license: mit
---
# Tiny

![loss](figures/loss.png) <img src='./figures/load.svg'> [page](https://example.org/x.png) [where](#top)
"""
TEXT = "def f(x):\n    return x  # <|end|> done"
HUB_TOKEN = "hf_" + "aB3" * 12  # put together here, as all examples below: no scanner of sources should find one

LOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

def load(way, **trust):
    model = AutoModelForCausalLM.from_pretrained("me/tiny", **trust)
    tokenizer = AutoTokenizer.from_pretrained("me/tiny", **trust)
    inputs = tokenizer(sys.argv[1], return_tensors="pt")
    with torch.no_grad():
        torch.save(model(**inputs).logits, f"{way}.pt")
    generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    print(json.dumps([type(model).__module__, inputs.input_ids[0].tolist(), generated[0].tolist()]))

sys.modules["modeling_grin"] = None  # `import modeling_grin` raises ImportError, installed or not
load("remote", trust_remote_code=True)
del sys.modules["modeling_grin"]
import modeling_grin
load("installed")
"""


@pytest.fixture(scope="module")
def clean(tmp_path_factory, trained_tokenizer):
    """The folder of a model: the release's layout and config, three shards, tokenizer, card, licence."""
    folder = tmp_path_factory.mktemp("clean") / "model"
    config = released_config(
        vocab_size=len(trained_tokenizer), bos_token_id=1, eos_token_id=3, pad_token_id=3, torch_dtype="float32"
    )
    write_checkpoint(folder, config, released_tensors(config, seed=7), num_shards=3)
    trained_tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "LlamaTokenizer"  # as the release says
    settings |= dict.fromkeys(("name_or_path", "special_tokens_map_file", "tokenizer_file"), str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 10]}')
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("MIT")
    (folder / "figures").mkdir()
    (folder / "figures" / "loss.png").write_bytes(PICTURE)
    (folder / "figures" / "load.svg").write_text("<svg/>")
    return folder


@pytest.fixture
def model(clean, tmp_path):
    """A copy of it that a test may spoil."""
    return shutil.copytree(clean, tmp_path / "model")


@pytest.fixture(scope="module")
def hub():
    with serve({"secret-of-me": "me", "secret-of-you": "you"}) as server:
        yield server
        assert not server.unknown, "requests that the server does not know"


@pytest.fixture(autouse=True)
def at_our_hub(hub, monkeypatch, tmp_path):
    """The client in this process talks to `hub`, as me; `hub` forgets what was set for the last test."""
    for name, value in environment(hub, tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    # transformers 5.24 keeps the client it made first, with the endpoint of that moment.
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    hub.before_upload = lambda oid: None


def environment(hub, home):
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": "secret-of-me",
        "HF_HOME": str(home / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


@pytest.fixture(scope="module")
def pushed(hub, clean, tmp_path_factory):
    """`clean` among what a run leaves, pushed by the command to me/tiny: the run's folder."""
    run = shutil.copytree(clean, tmp_path_factory.mktemp("run") / "model")
    for name in ("training_args.bin", "optimizer.pt", "trainer_state.json", ".env", "old_grinmoe.py", "notes.txt",
                 "checkpoint-5/model.safetensors", "runs/events", "figures/draft.txt",
                 "model-00001-of-00002.safetensors"):  # fmt: skip
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(f"token={HUB_TOKEN}")
    with pytest.MonkeyPatch.context() as patch:
        at_our_hub.__wrapped__(hub, patch, tmp_path_factory.mktemp("home"))
        assert command("push", run, "me/tiny", "--include", "notes.txt") == 1, "it holds a secret"
        (run / "notes.txt").write_text("notes")
        before = snapshot(run)
        assert command("push", run, "me/tiny", "--include", "notes.txt") == 0
    assert snapshot(run) == before, "the user's folder is not written to"
    return run


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}


def command(*arguments):
    """Run `grin-moe`; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["grin-moe", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
    return end.value.code


def weights(folder):
    return sorted(path.name for path in folder.glob("model*.safetensors"))


def oids(folder):
    return {sha256((folder / name).read_bytes()) for name in weights(folder)}


# Up, and down again


def test_what_goes_up(hub, pushed, clean, trained_tokenizer):
    repo, content = hub.repos["me/tiny"], hub.content("me/tiny")
    assert len(repo.commits) == 2, "the one that made the repository, and ours"
    expected = {path.relative_to(clean).as_posix(): path.read_bytes() for path in clean.rglob("*") if path.is_file()}
    expected |= {path.name: path.read_bytes() for path in PACKAGE.glob("*_grinmoe.py")} | {"notes.txt": b"notes"}
    del expected["config.json"], expected["tokenizer_config.json"]
    assert content.keys() == expected.keys() | {".gitattributes", "config.json", "tokenizer_config.json"}
    for name, data in expected.items():
        assert content[name] == data, name
    assert oids(clean) | {sha256(PICTURE)} == set(hub.received) and len(hub.received) == 4, "each once"


def test_config_and_code_are_those_of_save_pretrained(hub, pushed, clean, tmp_path):
    """What transformers writes for registered classes, and here without loading the weights."""
    with pytest.MonkeyPatch.context() as patch:
        for cls, auto in (
            (GrinMoeConfig, "AutoConfig"),
            (GrinMoeForCausalLM, "AutoModelForCausalLM"),
            (GrinMoeTokenizer, "AutoTokenizer"),
        ):
            patch.setattr(cls, "_auto_class", None)
            cls.register_for_auto_class(auto)
        GrinMoeForCausalLM.from_pretrained(clean).save_pretrained(tmp_path / "saved")
        GrinMoeTokenizer.from_pretrained(clean).save_pretrained(tmp_path / "saved")
    content = hub.content("me/tiny")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    sent = json.loads(content["config.json"])
    assert {name: sent.get(name) for name in saved} == saved
    assert "_name_or_path" not in sent, "it may be a path on the machine"
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    sent = json.loads(content["tokenizer_config.json"])
    assert sent.keys() <= saved.keys() and str(clean) not in str(sent), "nor a tokenizer's paths"
    assert {name: sent[name] for name in ("auto_map", "tokenizer_class")} == {
        name: saved[name] for name in ("auto_map", "tokenizer_class")
    }
    code = {path.name for path in (tmp_path / "saved").glob("*.py")}
    assert {name for name in content if name.endswith(".py")} == code


def test_loads_from_the_hub(hub, pushed, clean, tmp_path):
    """In another process, by remote code and by the package: the ids, the text, and the logits.

    The package's logits are equal bit by bit; remote code adds its experts in transformers' order.
    """
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    variables |= environment(hub, tmp_path) | {"CUDA_VISIBLE_DEVICES": ""}
    requests = len(hub.requests)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, TEXT], capture_output=True, text=True, cwd=tmp_path, env=variables, timeout=600
    )
    assert done.returncode == 0, done.stderr
    local, tokenizer = GrinMoeForCausalLM.from_pretrained(clean).eval(), GrinMoeTokenizer.from_pretrained(clean)
    inputs = tokenizer(TEXT, return_tensors="pt")
    expected = [inputs.input_ids[0].tolist(), local.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()]
    with torch.no_grad():
        logits = local(**inputs).logits
    ways = zip(("remote", "installed"), map(json.loads, done.stdout.splitlines()), strict=True)
    for way, (module, *found) in ways:
        assert ("transformers_modules" if way == "remote" else "modeling_grin.modeling_grinmoe") in module
        assert found == expected
        tolerance = 1e-5 if way == "remote" else 0.0
        torch.testing.assert_close(torch.load(tmp_path / f"{way}.pt"), logits, rtol=0, atol=tolerance)
    fetched = {path.split("/")[-1] for method, path in hub.requests[requests:] if method == "GET"}
    assert {*weights(clean), "modeling_grinmoe.py"} <= fetched, "and not from a folder"


def test_an_equal_folder_sends_nothing(hub, pushed, capsys):
    received, commits = len(hub.received), len(hub.repos["me/tiny"].commits)
    assert command("push", pushed, "me/tiny", "--include", "notes.txt", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["changed"], report["problems"], report["removed"]) == (False, [], [])
    assert report["commit"] == hub.repos["me/tiny"].branches["main"].oid
    assert len(hub.received) == received
    assert len(hub.repos["me/tiny"].commits) == commits


# Again, elsewhere, interrupted


def test_a_new_version_replaces_the_old_one(hub, model, capsys):
    """Old shards go: transformers would load a model.safetensors of the last version beside an index of this one."""
    push(model, "me/versions")
    api = HfApi()
    for name in ("thoughts.txt", "models/other.safetensors"):
        api.upload_file(path_or_fileobj=b"somebody's\0", path_in_repo=name, repo_id="me/versions")
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        api.upload_file(path_or_fileobj=b"an old adapter's\0", path_in_repo=name, repo_id="me/versions")
    tensors = {name: tensor for shard in weights(model) for name, tensor in load_file(model / shard).items()}
    for name in [
        *weights(model),
        "model.safetensors.index.json",
        "LICENSE",
        "figures/loss.png",
        "chat_template.jinja",
    ]:
        (model / name).unlink()
    tensors["model.norm.bias"] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (model / "README.md").write_text(CARD.split("![")[0])
    assert command("push", model, "me/versions") == 0
    assert "removed  model-00002-of-00003.safetensors" in capsys.readouterr().out
    content = hub.content("me/versions")
    stay = {".gitattributes", "thoughts.txt", "models/other.safetensors", "LICENSE", "figures/loss.png",
            "figures/load.svg"}  # fmt: skip
    code = {path.name for path in PACKAGE.glob("*_grinmoe.py")}
    assert content.keys() - code - stay == {
        "config.json", "generation_config.json", "model.safetensors", "README.md", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert stay | code <= content.keys()
    assert content["model.safetensors"] == (model / "model.safetensors").read_bytes()
    assert len(hub.repos["me/versions"].commits) == 8


def test_what_save_pretrained_pushes_is_what_it_saved(hub, model):
    """Over an older checkpoint; the repository is named after the folder, as ever."""
    old = weights(model)
    trained = GrinMoeForCausalLM.from_pretrained(model)
    torch.nn.init.ones_(trained.model.norm.bias)
    trained.save_pretrained(model, push_to_hub=True, max_shard_size="1GB")
    assert weights(model) == ["model.safetensors"] != old
    pushed = hub.content("me/model")
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors"} <= pushed.keys()
    assert all((model / name).read_bytes() == content for name, content in pushed.items() if name != ".gitattributes")


def test_a_repository_that_would_leave_files_out(hub, clean):
    api = HfApi()
    api.create_repo("me/ignoring")
    api.upload_file(path_or_fileobj=b"*.safetensors\n", path_in_repo=".gitignore", repo_id="me/ignoring")
    api.upload_file(path_or_fileobj=b"weights", path_in_repo="x.safetensors", repo_id="me/ignoring")
    assert "x.safetensors" not in hub.content("me/ignoring"), "the client says nothing"
    received = len(hub.received)
    with pytest.raises(ValueError, match=r"me/ignoring has a \.gitignore, which makes the Hub drop files"):
        push(clean, "me/ignoring")
    assert hub.content("me/ignoring").keys() == {".gitattributes", ".gitignore"} and len(hub.received) == received


@pytest.mark.parametrize("how", ["interrupted", "refused"])
def test_an_interrupted_upload_resumes(hub, clean, capsys, how):
    """One file arrives before a Ctrl-C, or before the storage refuses the others."""
    repo_id, first, lock, is_sent = f"me/{how}", [], threading.Lock(), threading.Event()
    received = len(hub.received)

    def only_the_first(oid):
        with lock:
            first[:] = first or [oid]
        if oid not in first:
            deadline = time.monotonic() + 60
            while first != hub.received[received:] and time.monotonic() < deadline:
                time.sleep(0.01)  # the client gives up at the first error; let the other file arrive
            with lock:
                if how == "interrupted" and not is_sent.is_set():
                    is_sent.set()
                    os.kill(os.getpid(), signal.SIGINT)
            raise HubError(403, "Request has expired")

    hub.before_upload = only_the_first
    if how == "refused":
        with pytest.raises(
            ValueError, match=r"^me/refused: Error while uploading '.*' .* 403.*same command to resume"
        ):
            push(clean, repo_id)
    else:
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
        assert command("push", clean, repo_id) != 0
        signal.signal(signal.SIGINT, handler)
        assert "interrupted: run the same command to resume" in capsys.readouterr().err
    assert first == hub.received[received:]
    assert len(hub.repos[repo_id].commits) == 1, "nobody sees half of a model"

    hub.before_upload = lambda oid: None
    assert push(clean, repo_id).changed
    assert sorted(hub.received[received:]) == sorted([*oids(clean), sha256(PICTURE)]), "each file once"
    assert weights(clean) == sorted(name for name in hub.content(repo_id) if name.startswith("model-"))


def test_another_push_meanwhile(hub, clean):
    """Is not mixed with this one: old shards have been looked for in what was there before."""
    push(clean, "me/busy", revision="main", card=False)

    def another_commit(oid):
        repo = hub.repos["me/busy"]
        repo.commit("main", repo.branches["main"].files)

    hub.before_upload = another_commit  # while the picture goes up
    with pytest.raises(ValueError, match=r"me/busy: .*412"):
        push(clean, "me/busy")
    assert "README.md" not in hub.content("me/busy")


def test_a_branch(hub, clean):
    report = push(clean, "me/branches", revision="step/100")
    repo = hub.repos["me/branches"]
    assert repo.branches["step/100"].oid == report.commit
    assert list(hub.content("me/branches")) == [".gitattributes"]
    assert len(hub.content("me/branches", "step/100")) == len(report.files) + 1
    assert not push(clean, "me/branches", revision="step/100").changed


def test_private(hub, pushed, clean):
    push(clean, "me/hidden", private=True)
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=False).model_info("me/hidden")
    HfApi(token=False).model_info("me/tiny")
    commits = len(hub.repos["me/tiny"].commits)
    with pytest.raises(ValueError, match="me/tiny is public: make it private"):
        push(clean, "me/tiny", private=True, revision="hidden")
    assert len(hub.repos["me/tiny"].commits) == commits
    assert set(hub.repos["me/tiny"].branches) == {"main"}
    push(clean, "me/hidden")  # an option left out changes nothing
    assert hub.repos["me/hidden"].private


def test_a_name_alone_is_ones_own(hub, clean):
    report = push(clean, "alone")
    assert (report.repo_id, report.url) == ("me/alone", f"{hub.endpoint}/me/alone")


def test_tokens(hub, clean, monkeypatch, capsys):
    repos, received = set(hub.repos), len(hub.received)
    with pytest.raises(ValueError, match=r"you/x: .*403"):
        push(clean, "you/x")
    monkeypatch.setenv("HF_TOKEN", "a-wrong-one")
    assert command("push", clean, "me/x") == 1
    shown = " ".join(capsys.readouterr().err.split())
    assert "error: me/x: " in shown and "401" in shown
    assert "a-wrong-one" not in shown
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match=r"me/x: .*`hf auth login`"):
        push(clean, "me/x")
    assert set(hub.repos) == repos
    assert len(hub.received) == received


def test_no_hub_there(clean, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        endpoint = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    message = r"^me/x: \[Errno \d+\] Connection refused; run the same command to resume"
    with pytest.raises(ValueError, match=message) as raised:
        push(clean, "me/x")
    assert str(raised.value).count("refused") == 1


def test_the_hub_checks_the_card_before_the_weights_go(hub, model):
    (model / "README.md").write_text("---\nlicense: [mit]\n---\n")
    tensors = {name: tensor + 1 for name, tensor in load_file(model / weights(model)[0]).items()}
    save_file(tensors, model / weights(model)[0])
    received = len(hub.received)
    with pytest.raises(ValueError, match=r'Invalid metadata in README.md.\n- "license" must be a string'):
        push(model, "me/invalid")
    assert len(hub.received) == received


def test_a_classifier(hub, model):
    config = json.loads((model / "config.json").read_text()) | {"num_labels": 3}
    tensors = {name: tensor for name, tensor in released_tensors(config).items() if not name.startswith("lm_head")}
    for name in weights(model):
        (model / name).unlink()
    (model / "model.safetensors.index.json").unlink()
    write_checkpoint(model, config, tensors | {"score.weight": torch.randn(3, config["hidden_size"])})
    push(model, "me/classifier")
    sent = json.loads(hub.content("me/classifier")["config.json"])
    name = GrinMoeForSequenceClassification.__name__
    assert sent["architectures"] == [name]
    assert sent["auto_map"] == {
        "AutoConfig": "configuration_grinmoe.GrinMoeConfig",
        "AutoModelForSequenceClassification": f"modeling_grinmoe.{name}",
    }


# What does not go up


def test_a_dry_run_contacts_nobody(hub, pushed, capsys):
    requests = len(hub.requests)
    arguments = ("push", pushed, "me/tiny", "--include", "notes.txt", "--dry-run")
    assert command(*arguments, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["skipped"] == [
        ".env", "checkpoint-5/", "figures/draft.txt", "model-00001-of-00002.safetensors", "old_grinmoe.py",
        "optimizer.pt", "runs/", "trainer_state.json", "training_args.bin",
    ]  # fmt: skip
    assert report["files"] == {
        name: len(data) for name, data in hub.content("me/tiny").items() if name != ".gitattributes"
    }
    assert (report["url"], report["commit"], report["changed"]) == (None, None, False)

    (pushed / "README.md").rename(pushed / "README.txt")
    assert command(*arguments) == 1
    (pushed / "README.txt").rename(pushed / "README.md")
    shown = capsys.readouterr().out
    assert re.search(r"file +tokenizer\.json +[\d.]+ kB", shown)
    assert re.search(r"skipped +checkpoint-5/", shown)
    assert "grin-moe card" in shown
    assert "nothing was sent" in shown
    assert len(hub.requests) == requests


def spoil_with_nan(model):
    path = model / weights(model)[0]
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[5] = float("nan")
    save_file(tensors, path)


def rewrite(model, change):
    """The same weights in another form."""
    tensors = {name: tensor for shard in weights(model) for name, tensor in load_file(model / shard).items()}
    for name in [*weights(model), "model.safetensors.index.json"]:
        (model / name).unlink()
    config = json.loads((model / "config.json").read_text())
    write_checkpoint(model, config, change(tensors, config))


def pickle(model):
    rewrite(model, lambda tensors, config: tensors)
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def add_tokens(model):
    tokenizer = GrinMoeTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["a new one"])
    tokenizer.save_pretrained(model)


def link(model, name, target):
    (model.parent / "pictures").mkdir()
    (model.parent / "pictures" / "loss.png").write_bytes(PICTURE)
    shutil.move(model / name, model.parent / "moved")  # bytes are made of it for the Hub
    (model / name).symlink_to(target)


SPOILS = {
    "a link": (lambda m: link(m, "LICENSE", "/etc/hostname"), r"1 file.* are links out of it: LICENSE \(to /etc/"),
    "a linked config": (lambda m: link(m, "config.json", "../moved"), r"links out of it: config.json \(to .*d\)"),
    "linked pictures": (lambda m: link(m, "figures", "../pictures"), r"1 file.* it: figures/loss.png \(to .*pict"),
    "a shard missing": (lambda m: (m / weights(m)[2]).unlink(), r"model-00003-of-00003.safetensors "),
    "NaN": (spoil_with_nan, r"holds 1 NaN or infinite values"),
    "being written": (lambda m: (m / f"{PART}x.json").touch(), r"\.part-x.json is still being written"),
    "fused": (lambda m: rewrite(m, fused), r"\(it is fused\): convert it by `grin-moe convert .*model NEW_FOLDER"),
    "prefix": (lambda m: rewrite(m, lambda t, c: {f"module.{n}": t[n] for n in t}), r"\(tensors or files have other"),
    "pickled": (pickle, r"weights in pickles, which can run code: `grin-moe convert .* --to hub --weights-only`"),
    "adapter": (lambda m: (m / "adapter_config.json").write_text("{}"), r"holds an adapter, not a model: merge it by"),
    "no config": (lambda m: (m / "config.json").unlink(), r"model has no config.json: give the folder of"),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), r"has no tokenizer.json: save the model's tokenizer"),
    "other tokenizer": (add_tokens, r"must have ids below vocab_size=1024; got 1024"),
    "settings": (lambda m: (m / "generation_config.json").write_text("{"), r"generation_config.json does not hold"),
    "no card": (lambda m: (m / "README.md").unlink(), r"has no README.md: write one with `grin-moe card .*--no-card"),
    "its metadata": (lambda m: (m / "README.md").write_text("---\na: [b\n---\n"), r"its metadata cannot be"),
}  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILS)
def test_what_is_refused(hub, model, spoil):
    change, message = SPOILS[spoil]
    change(model)
    requests = len(hub.requests)
    with pytest.raises(ValueError, match=message):
        push(model, "me/refused-folder")
    assert len(hub.requests) == requests
    report = push(model, "me/refused-folder", dry_run=True)
    assert len(report.problems) == 1
    assert re.search(message, report.problems[0])


def test_a_conversion_that_is_not_finished(model):
    unfinished = model.rename(model.with_name(".model.incomplete"))
    with pytest.raises(ValueError, match=r"\.model\.incomplete is still being written"):
        push(unfinished, "me/refused-folder")


def test_every_problem_is_named_at_once(hub, model):
    spoil_with_nan(model)
    (model / "README.md").unlink()
    (model / "LICENSE").write_text(f"MIT\n{HUB_TOKEN}\n")
    with pytest.raises(
        ValueError, match=r"(?s)model is not pushed:\n.*NaN.*\n.*no README.md.*\nLICENSE, line 2 holds"
    ):
        push(model, "me/refused-folder")


def test_what_a_card_lacks_is_noted(model, capsys):
    (model / "README.md").write_text("---\ntags: [x]\n---\n**TO FILL IN:** this, and **TO FILL IN:** that")
    notes = push(model, "me/x", dry_run=True).notes
    assert len(notes) == 2
    assert notes[0].startswith("README.md has 2 places") and notes[1].startswith("README.md names no license")
    assert command("push", model, "me/x", "--dry-run") == 0, "it is no reason to refuse"
    assert re.search(r"note +README\.md has 2 places", capsys.readouterr().out)
    (model / "README.md").write_text(CARD)
    assert push(model, "me/x", dry_run=True).notes == []


def test_without_a_card(hub, clean):
    report = push(clean, "me/cardless", card=False)
    assert report.skipped == ["README.md", "figures/"]
    assert not {"README.md", "figures/loss.png"} & hub.content("me/cardless").keys()


def test_names(clean, tmp_path):
    with pytest.raises(ValueError, match="Repo id must"):
        push(clean, "a/b/c", dry_run=True)
    with pytest.raises(ValueError, match="nowhere must be the folder of a checkpoint"):
        push(tmp_path / "nowhere", "me/x", dry_run=True)
    for pattern in ("../*", str(tmp_path)):
        assert "include must be patterns within" in push(clean, "me/x", include=[pattern], dry_run=True).problems[0]


SECRETS = [
    ("a Hugging Face token", HUB_TOKEN),
    ("a private key", "-----BEGIN " + "OPENSSH PRIVATE KEY-----"),
    ("a password in a URL", "https://me:" + "hunter2@example.org"),
]


@pytest.mark.parametrize(("kind", "secret"), SECRETS)
def test_secrets(model, kind, secret):
    """Found wherever text goes up; the line is named, the secret is not."""
    (model / "figures" / "load.svg").write_text(f"<svg>\n\n<!-- {secret} --></svg>")
    (model / "README.md").write_text(f"{CARD}\n{secret}\n")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"note": secret}))
    shard = model / weights(model)[1]
    save_file(load_file(shard), shard, metadata={"format": "pt", "note": secret})
    problems = push(model, "me/x", dry_run=True).problems
    where = {problem.split(" holds what looks like ")[0] for problem in problems}
    assert {"figures/load.svg, line 3", "README.md, line 8", f"{shard.name}, line 1"} < where
    assert any(place.startswith("config.json, line ") for place in where)
    assert all(f"looks like {kind}: remove it" in problem for problem in problems)
    assert not any(secret in problem or secret[4:] in problem for problem in problems)


def test_what_is_no_secret(model):
    """Text about secrets, and what reads a little like one."""
    about = """
    Set HF_TOKEN=hf_... or run `hf auth login`; hf_hub_download, https://user@example.org, "eos_token": "<|endoftext|>"
    """
    (model / "README.md").write_text(CARD + about)
    shard = model / weights(model)[1]
    shard.write_bytes(shard.read_bytes()[:-40] + f" {HUB_TOKEN}".encode())  # numbers, by chance
    assert push(model, "me/x", dry_run=True).problems == []


# The page


def test_the_commands_of_the_page(hub, model, monkeypatch, capsys):
    """Every `grin-moe` line of docs/publish.md, one after the other; the first one writes the card."""
    monkeypatch.chdir(model.parent)
    model.rename("GRIN-sft")
    Path("GRIN-sft", "README.md").unlink()
    page = (PACKAGE.parent / "docs" / "publish.md").read_text(encoding="utf-8")
    commands = re.findall(r"^grin-moe (.*?)(?:  +#.*)?$", page, re.MULTILINE)
    assert len(commands) >= 4
    for line in commands:
        assert command(*line.split()) == 0, capsys.readouterr()
    assert set(hub.repos["me/GRIN-sft"].branches) == {"main", "step-500"}
    assert hub.repos["me/GRIN-sft"].private
