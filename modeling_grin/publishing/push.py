"""A model's folder to the Hub: what goes up, what is refused, and the upload. Behind `grin-moe push`.

What goes up is a list of what is allowed, never all but something: a run's folder holds optimizer states, pickles and
whatever else its user has put there. Nothing is copied, and the folder is not written to.
"""

import json
import re
import shlex
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from rich.markdown import Markdown
from yaml import YAMLError

from conversion import Checkpoint, open_checkpoint
from conversion.conversion import CARRIED, config_for
from conversion.forms import model_class_of
from conversion.headers import (
    ADAPTER_CONFIG_FILE,
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    INDEX_FILE,
    PICKLE_SUFFIXES,
    WEIGHTS_FILE,
    read_generation_config,
    read_json,
)
from conversion.inspection import describe, verify_tensors
from conversion.pickles import find_dcp_folder, find_pickles

from .. import GrinMoeConfig, GrinMoeForCausalLM, GrinMoeForSequenceClassification, GrinMoeModel, __version__
from ..files import PART, describe_links
from ..tokenization_grinmoe import GrinMoeTokenizer
from . import TO_FILL_IN

CARD_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "README.md", "tokenizer.json", "tokenizer_config.json"
WEIGHTS, CODE = "model*.safetensors", "*_grinmoe.py"
# What a push says all of: files of these names that it does not bring are removed from the repository. Old shards
# beside new ones would be loaded in their place, and beside an adapter its base model.
ADAPTER = (ADAPTER_CONFIG_FILE, "adapter_model.*")
OWNED = (*(name for name in CARRIED if name[0].islower()), CONFIG_FILE, INDEX_FILE, WEIGHTS, *ADAPTER, CODE)
# What else goes up, where the card shows it or links to it: pictures and results.
CARD_SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".csv", ".json", ".jsonl"}
HTML_LINK = re.compile(r"\b(?:src|href)=[\"']([^\"']+)")
MACHINE_PATHS = ("name_or_path", "special_tokens_map_file", "tokenizer_file")  # settings of a tokenizer
UNFINISHED = (f"{PART}*", "*.part", "*.partial", "*.tmp", "*.incomplete")  # names of what is still being written

AUTO_CLASSES = {
    GrinMoeModel: "AutoModel",
    GrinMoeForCausalLM: "AutoModelForCausalLM",
    GrinMoeForSequenceClassification: "AutoModelForSequenceClassification",
}

# What follows a word that names a secret: 16 characters in quotes that begin no special token and no placeholder.
ASSIGNED = rb"[\\\"']*\s*[:=]\s*"
QUOTED = rb"[\\\"']*[\"'](?![<\[{$])[^\"'\n]{16}"

# What no file that goes up may hold: the forms that well-known services give their secrets, and words that name one.
SECRETS = {
    "a Hugging Face token": rb"\b(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----",
    "an AWS key": rb"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a GitHub token": rb"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{50})",
    "a GitLab or npm token": rb"\b(?:glpat-[A-Za-z0-9_-]{20}|npm_[A-Za-z0-9]{36})",
    "an API key": rb"\b(?:sk-[A-Za-z0-9_-]{32}|AIza[A-Za-z0-9_-]{35}|xox[abprs]-[A-Za-z0-9-]{20})",
    "a Weights & Biases key": rb"(?i)\bwandb[\w.(-]*(?:\s+login)?[\\\"']*[\s:=(]+[\\\"']*[0-9a-f]{40}\b",
    "a password in a URL": rb"\bhttps?://[^\s/:@\"']+:[^\s/:@\"']+@",
    "a line of .netrc": rb"\bmachine\s+\S+\s+login\s+\S+\s+password\s+\S",
    "a password or key": (
        rb"(?i)(?:password|passwd|secret|(?:api|access|private)[_-]?key)"
        rb"%b(?:%b|[a-z0-9/+_=-]{16})" % (ASSIGNED, QUOTED)
    ),
    # Without quotes one has a digit: `next_token = scores_of_experts` is code.
    "a token": (
        rb"(?i)(?:[_-]|hub|auth|access)token"
        rb"%b(?:%b|(?=[a-z/+_=-]*[0-9])[a-z0-9/+_=-]{16})" % (ASSIGNED, QUOTED)
    ),
}

Source = Path | bytes
"""A file of the folder, or what is made here: the bytes."""


@dataclass
class Push:
    """What a push sends, or would send.

    Args:
        repo_id: `OWNER/NAME`; the owner is known after the upload where only a name was given.
        files: what the repository holds then: name -> bytes.
        left: entries of the folder that stay behind -> why.
        problems: what stands against it, in sentences.
        notes: what the card lacks, which does not.
        removed: files of an earlier push that this one has not brought.
        url, commit: of the repository and its newest commit; None before the upload.
        changed: whether the upload has made a commit; an equal folder makes none.
    """

    folder: str
    repo_id: str
    files: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    url: str | None = None
    commit: str | None = None
    changed: bool = False


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    card: bool = True,
    dry_run: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Push:
    """Send a model's folder to the Hub, in one commit: weights, config, tokenizer, code and card, or nothing.

    The token is that of `hf auth login` or of the environment's HF_TOKEN. What has been interrupted is gone on with by
    the same call: files that have arrived are not sent again, and of an equal folder nothing is.

    Args:
        folder: a checkpoint in the released layout, with its tokenizer.
        repo_id: of a model repository, `OWNER/NAME` or a name of your own; made if it is not there.
        private: make the repository private; one that is there must be.
        revision: a branch, made if it is not there; by default the main one.
        card: send README.md and what it shows, and refuse a folder without; else leave it.
        dry_run: check everything, contact nobody, and return what has been found, `problems` among it.
        progress: called with the bytes of weights read for the check since the last call, and with those in all.

    Raises:
        ValueError: something stands against it, in the folder (all of it is named), the repository or the token; or
            the connection failed.
    """
    folder = Path(folder)
    validate_repo_id(repo_id)
    report = Push(str(folder), repo_id)
    sources = gather(folder, card, report, progress)
    if dry_run:
        return report
    if report.problems:
        raise ValueError("\n".join([f"{folder} is not pushed:", *report.problems]))
    with hub_errors(repo_id):
        upload(sources, private, revision, report)
    return report


def gather(folder: Path, card: bool, report: Push, progress: Callable[[int, int], None]) -> dict[str, Source]:
    """The files to send: name in the repository -> source. Fills the report's fields for a dry run."""
    problems = report.problems
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give that of a checkpoint")
    sources: dict[str, Source] = {}
    # Each part names what is wrong with it, so that one run tells everything. What is made for the Hub comes first,
    # and stays where the card links to the file that it is made of.
    for part in (
        lambda: weights_and_config(folder, problems, progress),
        lambda: tokenizer_files(folder),
        lambda: carried_files(folder),
        lambda: card_files(folder, report.notes) if card else {},
    ):
        try:
            sources = part() | sources
        except ValueError as error:
            problems.append(str(error))
    if problem := describe_links(folder, [path for path in sources.values() if isinstance(path, Path)]):
        problems.append(problem)
    sources |= {path.name: path for path in Path(__file__).parents[1].glob(CODE)}

    report.files = {name: size(source) for name, source in sorted(sources.items())}
    report.left = left_out(folder, sources)
    for path in (folder.resolve(), *folder.iterdir()):
        if any(fnmatch(path.name, pattern) for pattern in UNFINISHED):
            problems.append(f"{path} is the name of something half-written: let its writer end, or delete it")
    for name, source in sources.items():
        problems += find_secrets(name, source)
    return sources


def size(source: Source) -> int:
    return len(source) if isinstance(source, bytes) else source.stat().st_size


def weights_and_config(folder: Path, problems: list[str], progress: Callable[[int, int], None]) -> dict[str, Source]:
    """Weights, index and config.json of a checkpoint, every tensor read and found finite.

    Raises:
        ValueError: the checkpoint is damaged or incomplete, or not one that `from_pretrained` loads as GRIN-MoE.
    """
    to_hub = f"grin-moe convert {shlex.quote(str(folder))} NEW_FOLDER --to hub"
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        raise ValueError(f"{folder} holds an adapter, which is no model: merge it by `{to_hub}`, and push that")
    if find_dcp_folder(folder) or find_pickles(folder):
        raise ValueError(
            f"{folder} has its weights in pickles, which can run code: `{to_hub} --weights-only` reads the tensors"
        )
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder} has no {CONFIG_FILE}: it is not the folder of a model")
    checkpoint = open_checkpoint(folder)
    if checkpoint.form != "hub" or not checkpoint.is_standard:
        reason = f"it is {checkpoint.form}"
        if checkpoint.form == "hub":
            is_named = any((folder / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE))
            reason = "its tensors have a prefix" if is_named else f"its weights are not in {WEIGHTS_FILE} or an index"
        raise ValueError(f"{folder} is not in the released layout ({reason}): convert it by `{to_hub}`, and push that")
    found = describe(checkpoint)
    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    verify_tensors(checkpoint.tensors.values(), found, lambda done: progress(done, total))
    problems += found.problems
    names = [*found.files, *(name for name in (INDEX_FILE,) if (folder / name).is_file())]
    return {name: folder / name for name in names} | {CONFIG_FILE: as_json(hub_config(checkpoint))}


def hub_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config.json with which the travelling code loads: what `register_for_auto_class` makes `save_pretrained`
    write."""
    model_class = model_class_of(checkpoint.tensors)
    auto_map = {"AutoConfig": class_path(GrinMoeConfig), AUTO_CLASSES[model_class]: class_path(model_class)}
    values = {**config_for(checkpoint, "hub", None), "auto_map": auto_map}
    values.pop("_name_or_path", None)  # which may be a path on the machine
    return values


def class_path(cls: type) -> str:
    """Where a class is in the repository: file and name."""
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"


def as_json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def tokenizer_files(folder: Path) -> dict[str, Source]:
    """tokenizer.json as it is, and the settings with our class in them; the release's name another one.

    Raises:
        ValueError: there is no tokenizer, or none that can be read, or it is another model's.
    """
    if not (folder / TOKENIZER_FILE).is_file():
        raise ValueError(f"{folder} has no {TOKENIZER_FILE}: save the model's tokenizer there")
    try:
        largest = max(GrinMoeTokenizer.from_pretrained(folder).get_vocab().values())
    except Exception as error:  # the tokenizers package raises nothing more specific
        raise ValueError(f"{folder / TOKENIZER_FILE} cannot be read: {error}") from error
    if (folder / CONFIG_FILE).is_file():
        vocab_size = read_json(folder / CONFIG_FILE).get("vocab_size")
        if isinstance(vocab_size, int) and largest >= vocab_size:
            raise ValueError(
                f"{folder / TOKENIZER_FILE} has id {largest}, and the model vocab_size={vocab_size}: it is another "
                "model's tokenizer"
            )
    path = folder / TOKENIZER_CONFIG_FILE
    settings = read_json(path) if path.is_file() else {}
    settings = {name: value for name, value in settings.items() if name not in MACHINE_PATHS}
    settings |= {"tokenizer_class": GrinMoeTokenizer.__name__}
    settings |= {"auto_map": {"AutoTokenizer": [class_path(GrinMoeTokenizer), None]}}
    return {TOKENIZER_FILE: folder / TOKENIZER_FILE, TOKENIZER_CONFIG_FILE: as_json(settings)}


def carried_files(folder: Path) -> dict[str, Source]:
    """What else a checkpoint has beside its weights, generation settings and licence among it.

    Raises:
        ValueError: one cannot be read.
    """
    made = {CARD_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG_FILE}
    patterns = [pattern for pattern in CARRIED if pattern not in made]
    files = [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
    for path in files:
        if path.name == GENERATION_CONFIG_FILE:
            read_generation_config(path)
        elif path.suffix == ".json":
            read_json(path)
    return {path.name: path for path in files}


def links_of(text: str) -> Iterator[str]:
    """Addresses of the links and pictures of a Markdown text, those of its HTML among them; code has none."""
    for block in Markdown(text).parsed:
        for token in (block, *(block.children or [])):
            if token.type.startswith("html_"):
                yield from HTML_LINK.findall(token.content)
            elif address := token.attrGet("src") or token.attrGet("href"):
                yield str(address)


def card_files(folder: Path, notes: list[str]) -> dict[str, Source]:
    """The card, and the pictures and results of the folder that it shows. What a person should add is noted.

    Raises:
        ValueError: there is no card, its metadata are not YAML that can be read, or it shows what is not there.
    """
    path = folder / CARD_FILE
    if not path.is_file():
        command = f"grin-moe card {shlex.quote(str(folder))}"
        raise ValueError(f"{folder} has no {CARD_FILE}: write one with `{command}`, or give --no-card")
    try:
        card = ModelCard.load(path)
    except (ValueError, YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: its metadata cannot be read: {' '.join(str(error).split())}") from error
    if blanks := card.text.count(TO_FILL_IN):
        notes.append(f"{CARD_FILE} has {blanks} places for a person to fill in: look for {TO_FILL_IN}")
    if card.data.license is None:
        notes.append(f"{CARD_FILE} names no license, without which nobody may use the model")
    files: dict[str, Source] = {CARD_FILE: path}
    missing = []
    for address in links_of(card.text):
        link = urlsplit(address)
        name = unquote(link.path)
        if link.scheme or link.netloc or Path(name).suffix.lower() not in CARD_SUFFIXES:
            continue
        shown = PurePosixPath(name)
        if shown.is_absolute() or ".." in shown.parts or not (folder / shown).is_file():
            missing.append(name)
        else:
            files[str(shown)] = folder / shown
    if missing:
        raise ValueError(f"{path} shows what is not in the folder: {', '.join(missing)}")
    return files


def left_out(folder: Path, sources: dict[str, Source]) -> dict[str, str]:
    """Entries of the folder that are not sent -> why. A folder that nothing is sent of is one entry."""
    left = {}
    for entry in sorted(folder.iterdir()):
        sent_within = entry.is_dir() and any(name.startswith(f"{entry.name}/") for name in sources)
        for path in sorted(entry.rglob("*")) if sent_within else [entry]:
            name = path.relative_to(folder).as_posix()
            if name in sources or (sent_within and path.is_dir()):
                continue
            if path.is_dir():
                is_checkpoint = name.startswith("checkpoint-")
                left[f"{name}/"] = "a checkpoint of the run" if is_checkpoint else "not part of a model"
            elif name == CARD_FILE:
                left[name] = "as asked"
            elif path.suffix in PICKLE_SUFFIXES:
                left[name] = "a pickle, which can run code"
            elif path.suffix == ".py":
                left[name] = "code; this package's goes up"
            elif path.suffix == ".safetensors":
                left[name] = "weights that belong to no tensor of the model"
            else:
                left[name] = "not part of a model"
    return left


def read_text_of(path: Path) -> bytes:
    """A file's bytes; of safetensors those of the header, which has what the writer noted."""
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little")) if path.suffix == ".safetensors" else file.read()


def find_secrets(name: str, source: Source) -> Iterator[str]:
    """Where a file holds what looks like a secret, in sentences that do not repeat it."""
    data = source if isinstance(source, bytes) else read_text_of(source)
    for kind, pattern in SECRETS.items():
        for match in re.finditer(pattern, data):
            line = data.count(b"\n", 0, match.start()) + 1
            yield f"{name}, line {line} holds what looks like {kind}: take it out, and have it revoked if it is one"


def upload(sources: dict[str, Source], private: bool, revision: str | None, report: Push) -> None:
    """Make the repository and the branch if need be, and the commit."""
    api = HfApi(library_name="grin-moe", library_version=__version__)
    api.whoami()  # whether there is a token and the Hub knows it, before anything is asked of the repository
    url = api.create_repo(report.repo_id, private=private or None, exist_ok=True)
    report.repo_id, report.url = url.repo_id, str(url)
    if private and not api.model_info(url.repo_id).private:
        raise ValueError(f"{url.repo_id} is there and public: make it private in its settings, or push elsewhere")
    if revision is not None:
        api.create_branch(url.repo_id, branch=revision, exist_ok=True)
    before = api.model_info(url.repo_id, revision=revision)
    present = {file.rfilename for file in before.siblings or []}
    if ".gitignore" in present:
        raise ValueError(
            f"{url.repo_id} has a .gitignore, by which the Hub leaves files out of a commit: delete it there"
        )
    report.removed = sorted(
        name
        for name in present - sources.keys()
        if "/" not in name and any(fnmatch(name, pattern) for pattern in OWNED)
    )
    # One commit, unlike `upload_folder`, which may make several: nobody ever loads half of a model. Both go through
    # the same upload, which skips what has arrived; this one checks the card's metadata first. The parent is given so
    # that another push in the meantime is not mixed with this one.
    commit = api.create_commit(
        url.repo_id,
        [
            *(CommitOperationAdd(name, source) for name, source in sources.items()),
            *(CommitOperationDelete(name) for name in report.removed),
        ],
        commit_message="Upload model with grin-moe",
        revision=revision,
        parent_commit=before.sha,
    )
    report.commit, report.changed = commit.oid, commit.oid != before.sha


def is_of_the_connection(error: BaseException | None) -> bool:
    """Whether an error comes of a connection that was not made, was lost or timed out."""
    while error is not None and not isinstance(error, (ConnectionError, TimeoutError, socket.gaierror)):
        error = error.__cause__ or error.__context__
    return error is not None


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """What can go wrong with the Hub, as a ValueError of a sentence that says what to do."""
    try:
        yield
    except ValueError:
        raise
    except LocalTokenNotFoundError as error:
        raise ValueError(f"{repo_id}: there is no token for the Hub: run `hf auth login`, or set HF_TOKEN") from error
    except Exception as error:  # of many types: status codes, connections, xet
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status == 401:
            reason = "the Hub does not know the token: run `hf auth login`, or set HF_TOKEN to one that can write"
        elif status == 403:
            reason = "the token may not write there: give one that can, or another repository"
        elif status == 412:
            reason = "the repository has changed meanwhile: look what it holds, and push again"
        else:
            causes = [str(cause).strip().partition("\n")[0].rstrip(".") for cause in (error, error.__cause__) if cause]
            lost = "the Hub was not reached: " if is_of_the_connection(error) else ""
            reason = f"{lost}{'; '.join(dict.fromkeys(causes))}. The same command goes on: what has arrived is not "
            reason += "sent again"
        raise ValueError(f"{repo_id}: {reason}") from error
