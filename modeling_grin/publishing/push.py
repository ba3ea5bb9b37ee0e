"""Upload a model's folder to the Hub. Behind `grin-moe push`.

Uploads use an allow-list: a run's folder also holds optimizer states, pickles and whatever else its user put there.
Nothing is copied, and the folder is not written to.
"""

import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from conversion import inspect, open_checkpoint
from conversion.conversion import COMPANIONS, check_settings, config_for
from conversion.headers import ADAPTER_CONFIG_FILE, CONFIG_FILE, INDEX_FILE, read_config, read_json
from conversion.pickles import find_dcp_folder, find_pickles

from .. import __version__
from ..files import describe_links
from ..safetensors_header import read_header
from ..tokenization_grinmoe import GrinMoeTokenizer
from . import TO_FILL_IN

CARD_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "README.md", "tokenizer.json", "tokenizer_config.json"
WEIGHTS, CODE = "model*.safetensors", "*_grinmoe.py"
# Remote files of these names that are absent from the upload are deleted: transformers would load stale shards, or the
# base model of an old adapter.
ADAPTER = (ADAPTER_CONFIG_FILE, "adapter_model.*")
OWNED = (*(name for name in COMPANIONS if name[0].islower()), CONFIG_FILE, INDEX_FILE, WEIGHTS, *ADAPTER, CODE)
PICTURES = ("figures/*.png", "figures/*.jpg", "figures/*.jpeg", "figures/*.gif", "figures/*.webp", "figures/*.svg")
MACHINE_PATHS = ("name_or_path", "special_tokens_map_file", "tokenizer_file")  # settings of a tokenizer

# No uploaded file may hold these; the Hub scans uploads for other kinds.
SECRETS = {
    "a Hugging Face token": rb"\b(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----",
    "a password in a URL": rb"\bhttps?://[^\s/:@\"']+:[^\s/:@\"']+@",
}

Source = Path | bytes
"""A file of the folder, or the bytes of one that is made here."""


@dataclass
class Push:
    """The contents and the outcome of a push, or of a dry run.

    Args:
        repo_id: `OWNER/NAME`; if only a name was given, the upload adds the owner.
        files: contents of the repository after the push: name -> bytes.
        skipped: entries of the folder that are not sent.
        problems: sentences that say why the push is refused.
        notes: gaps in the card, which do not stop the push.
        removed: files of an earlier push that this one deletes.
        url, commit: the repository and its newest commit; None before the upload.
        changed: whether the upload made a commit; an unchanged folder makes none.
    """

    folder: str
    repo_id: str
    files: dict[str, int] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
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
    include: Sequence[str] = (),
    dry_run: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Push:
    """Send a model's folder to the Hub in one commit: weights, config, tokenizer, code and card.

    The token comes from `hf auth login` or from HF_TOKEN. Call again to resume: uploaded files are skipped, and an
    unchanged folder makes no commit.

    Args:
        folder: a checkpoint in the released layout, with its tokenizer.
        repo_id: a model repository, `OWNER/NAME` or a name of your own; created if it does not exist.
        private: create a private repository; refuse an existing public one.
        revision: a branch, created if it does not exist; default: the main branch.
        card: send README.md and figures/, and refuse a folder without a card.
        include: glob patterns of other files of the folder to send.
        dry_run: check everything, contact nobody, and return the findings, `problems` among them.
        progress: called with the bytes of weights checked since the last call, and with the total.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder has problems (all are named), the repository or the token is wrong, or the connection
            failed.
    """
    folder = Path(folder)
    validate_repo_id(repo_id)
    report = Push(str(folder), repo_id)
    problems = report.problems
    sources: dict[str, Source] = {}
    # Every part is tried, so that one run names all problems. Files made for the Hub come first: later ones of the
    # same name do not replace them.
    for part in (
        lambda: weights_and_config(folder, progress),
        lambda: tokenizer_files(folder),
        lambda: companion_files(folder),
        lambda: card_files(folder, report.notes) if card else {},
        lambda: included_files(folder, include),
    ):
        try:
            sources = part() | sources
        except ValueError as error:
            problems += [line for line in str(error).splitlines() if line not in problems]  # they may read one file
    if problem := describe_links(folder, [path for path in sources.values() if isinstance(path, Path)]):
        problems.append(problem)
    sources |= {path.name: path for path in Path(__file__).parents[1].glob(CODE)}
    for name, source in sources.items():
        problems += find_secrets(name, source)
        report.files[name] = len(source) if isinstance(source, bytes) else source.stat().st_size
    report.skipped = skipped_entries(folder, sources)
    if dry_run:
        return report
    if problems:
        raise ValueError("\n".join([f"{folder} is not pushed:", *problems]))
    try:
        upload(sources, private, revision, report)
    except ValueError:
        raise
    except Exception as error:  # of many types: no token, status codes, connections, xet
        raise ValueError(f"{repo_id}: {' '.join(str(error).split())}; run the same command to resume") from error
    return report


def weights_and_config(folder: Path, progress: Callable[[int, int], None]) -> dict[str, Source]:
    """Weights, index and config.json of a checkpoint, after every tensor was read and found finite.

    Raises:
        ValueError: the checkpoint is damaged or incomplete, or not one that `from_pretrained` loads as GRIN-MoE.
    """
    other = None
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        other = "holds an adapter, not a model"
    elif find_dcp_folder(folder) or find_pickles(folder):
        other = "has its weights in pickles, which can run code (add --weights-only)"
    else:
        checkpoint = open_checkpoint(folder)
        if checkpoint.form != "hub":
            other = f"is not in the released layout (it is {checkpoint.form})"
        elif not checkpoint.is_standard:
            other = "is not in the released layout (tensors or files have other names)"
    if other:
        command = f"grin-moe convert {shlex.quote(str(folder))} NEW_FOLDER --to hub"
        raise ValueError(f"{folder} {other}: convert it by `{command}` and push the result")
    found = inspect(folder, verify=True, progress=progress)
    if found.problems:
        raise ValueError("\n".join(found.problems))
    # config.json loads the uploaded code, as `save_pretrained` writes it after `register_for_auto_class`.
    auto_class = "AutoModel" + found.model.removeprefix("GrinMoe").removeprefix("Model")
    auto_map = {"AutoConfig": "configuration_grinmoe.GrinMoeConfig", auto_class: f"modeling_grinmoe.{found.model}"}
    values = {**config_for(checkpoint, "hub", None), "auto_map": auto_map}
    values.pop("_name_or_path", None)  # may be a path of this machine
    weights = {name: folder / name for name in found.files}
    return weights | find_files(folder, [INDEX_FILE]) | {CONFIG_FILE: as_json(values)}


def as_json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def tokenizer_files(folder: Path) -> dict[str, Source]:
    """tokenizer.json as it is, and its settings with this package's class; the release names another class.

    Raises:
        ValueError: the tokenizer is missing, cannot be read or belongs to another model.
    """
    path, settings_path = folder / TOKENIZER_FILE, folder / TOKENIZER_CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {TOKENIZER_FILE}: save the model's tokenizer there")
    try:
        largest = max(GrinMoeTokenizer.from_pretrained(folder).get_vocab().values())
    except Exception as error:  # the tokenizers package raises nothing more specific
        raise ValueError(f"{path} cannot be read: {error}") from error
    if (folder / CONFIG_FILE).is_file() and largest >= (vocab_size := read_config(folder).vocab_size):
        raise ValueError(
            f"{path} must have ids below vocab_size={vocab_size}; got {largest}; save this model's own tokenizer"
        )
    settings = read_json(settings_path) if settings_path.is_file() else {}
    settings = {name: value for name, value in settings.items() if name not in MACHINE_PATHS}
    settings |= {"tokenizer_class": "GrinMoeTokenizer"}
    settings |= {"auto_map": {"AutoTokenizer": ["tokenization_grinmoe.GrinMoeTokenizer", None]}}
    return {TOKENIZER_FILE: path, TOKENIZER_CONFIG_FILE: as_json(settings)}


def companion_files(folder: Path) -> dict[str, Source]:
    """The other small files of a checkpoint, such as generation settings and licence."""
    check_settings(folder)
    return find_files(folder, [pattern for pattern in COMPANIONS if pattern != CARD_FILE])


def find_files(folder: Path, patterns: Sequence[str]) -> dict[str, Source]:
    """Files of the folder by name."""
    files = (path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in files}


def included_files(folder: Path, patterns: Sequence[str]) -> dict[str, Source]:
    """Files of the folder that the user names.

    Raises:
        ValueError: a pattern leads out of the folder.
    """
    if outside := [pattern for pattern in patterns if Path(pattern).is_absolute() or ".." in Path(pattern).parts]:
        raise ValueError(f"include must name files below {folder}; got {outside[0]}")
    return find_files(folder, patterns)


def card_files(folder: Path, notes: list[str]) -> dict[str, Source]:
    """Find the card and its pictures, and note the gaps that a person should fill.

    Raises:
        ValueError: there is no card, or its metadata are not YAML.
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
    return find_files(folder, [CARD_FILE, *PICTURES])


def skipped_entries(folder: Path, sources: dict[str, Source]) -> list[str]:
    """Entries of the folder that are not sent. A folder of which nothing is sent is one entry."""
    sent = {name.partition("/")[0] for name in sources}
    whole = [
        f"{entry.name}/" if entry.is_dir() else entry.name for entry in folder.iterdir() if entry.name not in sent
    ]
    parts = [name for name in find_files(folder, [f"{entry}/**/*" for entry in sent]) if name not in sources]
    return sorted(whole + parts)


def find_secrets(name: str, source: Source) -> Iterator[str]:
    """Name the places of a file that look like a secret, without repeating it."""
    if isinstance(source, bytes):
        data = source
    elif source.suffix == ".safetensors":  # only the header, which holds the writer's notes
        data = json.dumps(read_header(source)).encode()
    else:
        data = source.read_bytes()
    for kind, pattern in SECRETS.items():
        for match in re.finditer(pattern, data):
            line = data.count(b"\n", 0, match.start()) + 1
            yield f"{name}, line {line} holds what looks like {kind}: remove it, and revoke it if it is real"


def upload(sources: dict[str, Source], private: bool, revision: str | None, report: Push) -> None:
    """Create the repository and the branch if they do not exist, and make the commit."""
    api = HfApi(library_name="grin-moe", library_version=__version__)
    api.whoami()  # fails without a valid token, before the repository is touched
    url = api.create_repo(report.repo_id, private=private or None, exist_ok=True)
    report.repo_id, report.url = url.repo_id, str(url)
    if private and not api.model_info(url.repo_id).private:
        raise ValueError(f"{url.repo_id} is public: make it private in its settings, or push elsewhere")
    if revision is not None:
        api.create_branch(url.repo_id, branch=revision, exist_ok=True)
    before = api.model_info(url.repo_id, revision=revision)
    present = {file.rfilename for file in before.siblings or []}
    if ".gitignore" in present:
        raise ValueError(
            f"{url.repo_id} has a .gitignore, which makes the Hub drop files from a commit: delete it there"
        )
    stale = (name for name in present - sources.keys() if "/" not in name)
    report.removed = sorted(name for name in stale if any(fnmatch(name, pattern) for pattern in OWNED))
    # One commit, so that nobody loads half of a model; `upload_folder` may make several. It skips uploaded files and
    # checks the card's metadata first. With the parent given, it fails if somebody else pushed in the meantime.
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
