"""Publishing: what goes up from a folder, to a stand-in for the Hub, and what must not go up does not."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch
from checkpoints import fused, released_config, released_tensors, write_checkpoint
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, RepoUrl
from safetensors.torch import load_file, save_file
from test_hub import AUTO_CLASSES, MODELS
from typer.testing import CliRunner

import modeling_grin
from grin_moe_cli import app
from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM, GrinMoeTokenizer
from modeling_grin.publishing import push as publishing
from modeling_grin.publishing.push import push

PACKAGE = Path(modeling_grin.__file__).parent
PICTURE = b"\x89PNG\r\n\x1a\n\0\0fake"
CARD = """---
license: mit
---
# Tiny

![loss](figures/loss.png) <img src='./figures/load.svg'> [page](https://example.org/x.png) [where](#top)
"""
HUB_TOKEN = "hf_" + "aB3" * 12  # put together here, as all examples below: no scanner of sources should find one


class Hub:
    """Repositories by name, with branches of files; `api` takes the calls of `HfApi`, and no others."""

    def __init__(self):
        self.repos: dict[str, SimpleNamespace] = {}
        self.error: Exception | None = None
        self.api = create_autospec(HfApi)
        for name in ("whoami", "create_repo", "create_branch", "model_info", "create_commit"):
            getattr(self.api.return_value, name).side_effect = getattr(self, name)

    def whoami(self):
        if self.error is not None:
            raise self.error

    def create_repo(self, repo_id, private=None, exist_ok=False):
        repo_id = repo_id if "/" in repo_id else f"me/{repo_id}"
        made = SimpleNamespace(private=bool(private), branches={"main": {}}, commits=[])
        assert exist_ok and self.repos.setdefault(repo_id, made)
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_branch(self, repo_id, branch, exist_ok=False):
        assert exist_ok
        self.repos[repo_id].branches.setdefault(branch, dict(self.repos[repo_id].branches["main"]))

    def model_info(self, repo_id, revision=None):
        repo = self.repos[repo_id]
        siblings = [SimpleNamespace(rfilename=name) for name in repo.branches[revision or "main"]]
        return SimpleNamespace(private=repo.private, sha=f"{len(repo.commits)}", siblings=siblings)

    def create_commit(self, repo_id, operations, commit_message, revision, parent_commit):
        assert parent_commit == self.model_info(repo_id).sha
        files = self.repos[repo_id].branches[revision or "main"]
        for operation in operations:
            if isinstance(operation, CommitOperationAdd):
                with operation.as_file() as file:
                    files[operation.path_in_repo] = file.read()
            else:
                del files[operation.path_in_repo]
        self.repos[repo_id].commits.append(commit_message)
        return CommitInfo(repo_id, commit_message, "", f"{len(self.repos[repo_id].commits)}")

    def content(self, repo_id, branch="main"):
        return self.repos[repo_id].branches[branch]


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


@pytest.fixture(scope="module", autouse=True)
def hub():
    """Stands for the Hub."""
    hub = Hub()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publishing, "HfApi", hub.api)
        yield hub


@pytest.fixture(scope="module")
def pushed(hub, clean, tmp_path_factory):
    """`clean` among what a run leaves, pushed by the command to me/tiny: the run's folder."""
    run = shutil.copytree(clean, tmp_path_factory.mktemp("run") / "model")
    for name in ("training_args.bin", "optimizer.pt", "trainer_state.json", ".env", "old_grinmoe.py", "notes.txt",
                 "checkpoint-5/model.safetensors", "runs/events", "figures/draft.txt",
                 "model-00001-of-00002.safetensors"):  # fmt: skip
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(f"token={HUB_TOKEN}")
    arguments = ("push", run, "me/tiny", "--include", "notes.txt")
    assert command(*arguments, expect=1), "it holds a secret"
    (run / "notes.txt").write_text("notes")
    before = snapshot(run)
    command(*arguments)
    assert snapshot(run) == before, "the user's folder is not written to"
    return run


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}


def command(*arguments, expect=0):
    """Run `grin-moe`; its output."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == expect, (result.output, result.exception)
    return result.output


def weights(folder):
    return sorted(path.name for path in folder.glob("model*.safetensors"))


# Which files are uploaded


def test_what_goes_up(hub, pushed, clean):
    content = hub.content("me/tiny")
    assert hub.repos["me/tiny"].commits == ["Upload model with grin-moe"], "nobody sees half of a model"
    expected = {path.relative_to(clean).as_posix(): path.read_bytes() for path in clean.rglob("*") if path.is_file()}
    expected |= {path.name: path.read_bytes() for path in PACKAGE.glob("*_grinmoe.py")} | {"notes.txt": b"notes"}
    del expected["config.json"], expected["tokenizer_config.json"]
    assert content.keys() == expected.keys() | {"config.json", "tokenizer_config.json"}
    for name, data in expected.items():
        assert content[name] == data, name


def test_config_and_code_are_those_of_save_pretrained(hub, pushed, clean, tmp_path, monkeypatch):
    """What transformers writes for registered classes, which test_hub.py loads where there is no `modeling_grin`."""
    for cls in (GrinMoeConfig, GrinMoeForCausalLM, GrinMoeTokenizer):
        monkeypatch.setattr(cls, "_auto_class", None)
        cls.register_for_auto_class(AUTO_CLASSES[cls])
    GrinMoeForCausalLM.from_pretrained(clean).save_pretrained(tmp_path)
    GrinMoeTokenizer.from_pretrained(clean).save_pretrained(tmp_path)
    content = hub.content("me/tiny")
    assert {name for name in content if name.endswith(".py")} == {path.name for path in tmp_path.glob("*.py")}
    sent, saved = json.loads(content["config.json"]), json.loads((tmp_path / "config.json").read_text())
    assert {name: sent.get(name) for name in saved} == saved
    assert "_name_or_path" not in sent, "it may be a path on the machine"
    name = "tokenizer_config.json"
    sent, saved = json.loads(content[name]), json.loads((tmp_path / name).read_text())
    assert sent.keys() <= saved.keys() and str(clean) not in str(sent), "nor a tokenizer's paths"
    assert all(sent[name] == saved[name] for name in ("auto_map", "tokenizer_class"))


@pytest.mark.parametrize("auto_class", MODELS)
def test_the_config_names_the_class_of_the_model(auto_class, tmp_path):
    model_class = MODELS[auto_class]
    model_class(GrinMoeConfig.from_dict(released_config())).save_pretrained(tmp_path)
    sent = json.loads(publishing.weights_and_config(tmp_path, lambda *_: None)["config.json"])
    assert sent["auto_map"][auto_class] == f"modeling_grinmoe.{model_class.__name__}"


def test_a_new_version_replaces_the_old_one(hub, model):
    """Old shards go: transformers would load a model.safetensors of the last version beside an index of this one."""
    push(model, "me/versions")
    stay = ("thoughts.txt", "models/other.safetensors")
    for name in (*stay, "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        hub.content("me/versions")[name] = b"somebody's"
    stay = {*stay, "LICENSE", "figures/loss.png", "figures/load.svg"}
    rewrite(model)
    for name in ("LICENSE", "figures/loss.png", "chat_template.jinja"):
        (model / name).unlink()
    (model / "README.md").write_text(CARD.split("![")[0])
    assert "removed  model-00002-of-00003.safetensors" in command("push", model, "me/versions")
    content = hub.content("me/versions")
    code = {path.name for path in PACKAGE.glob("*_grinmoe.py")}
    assert content.keys() - code - stay == {
        "config.json", "generation_config.json", "model.safetensors", "README.md", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert stay | code <= content.keys()
    assert content["model.safetensors"] == (model / "model.safetensors").read_bytes()


def test_private(hub, pushed, clean):
    push(clean, "hidden", private=True)
    assert hub.repos["me/hidden"].private
    with pytest.raises(ValueError, match="me/tiny is public: make it private"):
        push(clean, "me/tiny", private=True, revision="hidden")
    assert set(hub.repos["me/tiny"].branches) == {"main"}


def test_errors_of_the_hub_say_what_to_do(hub, clean, monkeypatch):
    monkeypatch.setattr(hub, "error", ConnectionRefusedError("refused"))
    with pytest.raises(ValueError, match=r"^me/x: refused; run the same command to resume"):
        push(clean, "me/x")


# What does not go up


def test_a_dry_run_contacts_nobody(hub, pushed, monkeypatch):
    monkeypatch.setattr(publishing, "HfApi", None)
    arguments = ("push", pushed, "me/tiny", "--include", "notes.txt", "--dry-run")
    report = json.loads(command(*arguments, "--json"))
    assert report["skipped"] == [
        ".env", "checkpoint-5/", "figures/draft.txt", "model-00001-of-00002.safetensors", "old_grinmoe.py",
        "optimizer.pt", "runs/", "trainer_state.json", "training_args.bin",
    ]  # fmt: skip
    assert report["files"] == {name: len(data) for name, data in hub.content("me/tiny").items()}
    assert (report["url"], report["commit"], report["changed"]) == (None, None, False)
    shown = command(*arguments)
    assert re.search(r"skipped +checkpoint-5/", shown) and "nothing was sent" in shown


def rewrite(model, change=lambda tensors, config: tensors):
    """The same weights in one file, or in another form."""
    tensors = {name: tensor for shard in weights(model) for name, tensor in load_file(model / shard).items()}
    for name in [*weights(model), "model.safetensors.index.json"]:
        (model / name).unlink()
    config = json.loads((model / "config.json").read_text())
    write_checkpoint(model, config, change(tensors, config))


def spoil_with_nan(model):
    path = model / weights(model)[0]
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[5] = float("nan")
    save_file(tensors, path)


def pickle(model):
    rewrite(model)
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def add_tokens(model):
    tokenizer = GrinMoeTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["a new one"])
    tokenizer.save_pretrained(model)


SPOILS = {
    "a link": (
        lambda m: (m / "LICENSE-2").symlink_to("/etc/hostname"),
        r"1 file.* are links out of it: .* \(to /etc/",
    ),
    "NaN": (spoil_with_nan, r"holds 1 NaN or infinite values"),
    "fused": (lambda m: rewrite(m, fused), r"\(it is fused\): convert it by `grin-moe convert .*model NEW_FOLDER"),
    "pickled": (pickle, r"pickles, which can run code \(add --weights-only\): convert it by `grin-moe .* hub`"),
    "adapter": (lambda m: (m / "adapter_config.json").write_text("{}"), r"holds an adapter, not a model: convert it"),
    "other tokenizer": (add_tokens, r"must have ids below vocab_size=1024; got 1024"),
    "no card": (lambda m: (m / "README.md").unlink(), r"has no README.md: write one with `grin-moe card .*--no-card"),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_what_is_refused(hub, model, spoil):
    change, message = SPOILS[spoil]
    change(model)
    with pytest.raises(ValueError, match=message):
        push(model, "me/refused-folder")
    assert "me/refused-folder" not in hub.repos
    report = push(model, "me/refused-folder", dry_run=True)
    assert len(report.problems) == 1 and re.search(message, report.problems[0])


@pytest.mark.parametrize("pattern", ["/etc/host*", "../*"])
def test_an_include_outside_the_folder_is_refused(model, pattern):
    report = push(model, "me/x", include=[pattern], dry_run=True)
    assert report.problems == [f"include must name files below {model}; got {pattern}"]


@pytest.mark.parametrize(
    ("kind", "secret"),
    [
        ("a Hugging Face token", HUB_TOKEN),
        ("a private key", "-----BEGIN " + "OPENSSH PRIVATE KEY-----"),
        ("a password in a URL", "https://me:" + "hunter2@example.org"),
    ],
)
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


# The page


def test_the_commands_of_the_page(hub, model, monkeypatch):
    """Every `grin-moe` line of docs/publish.md, one after the other; the first one writes the card."""
    monkeypatch.chdir(model.parent)
    model.rename("GRIN-sft")
    Path("GRIN-sft", "README.md").unlink()
    page = (PACKAGE.parent / "docs" / "publish.md").read_text(encoding="utf-8")
    commands = re.findall(r"^grin-moe (.*?)(?:  +#.*)?$", page, re.MULTILINE)
    assert len(commands) >= 4
    for line in commands:
        command(*line.split())
    assert set(hub.repos["me/GRIN-sft"].branches) == {"main", "step-500"}
    assert hub.repos["me/GRIN-sft"].private
