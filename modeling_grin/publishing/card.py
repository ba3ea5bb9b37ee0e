"""Write model cards: README.md from the files of a training run, by the template model_cards/template.md.

A run leaves `run.json` (`record.py`), trainer_state.json, config.json or adapter_config.json, and routing/layers.jsonl
(`RoutingCallback`). The card leaves out what a missing file would say, and a note names the file.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard_data import EvalResult, model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id
from markupsafe import Markup
from matplotlib.figure import Figure

from ..analysis.figures import draw_expert_load, draw_loss
from ..configuration_grinmoe import GrinMoeConfig
from ..files import replacing, write_whole
from ..planning.parameters import count_parameters
from . import TO_FILL_IN
from .markdown import cell, code, escape, render
from .record import RUN_FILE

if TYPE_CHECKING:  # needs what only training installs
    from transformers import Trainer

# Beside the package, in the checkout as in the wheel.
TEMPLATE = Path(__file__).resolve().parents[2] / "model_cards" / "template.md"
STATE_FILE = "trainer_state.json"
DPI = 150
GRIN_MOE = "microsoft/GRIN-MoE"
LICENSE = re.compile(r"[a-z0-9.+-]+")  # the form of the Hub's names, which it checks when a card is pushed
LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")  # ISO 639-1 to 639-3, and the Hub's own
# Settings of an evaluation that say which model was asked; all others say what it was asked.
MODEL_SETTINGS = ("model", "identity", "revision", "dtype", "attn_implementation", "experts_implementation")
CONFIG_FIELDS = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_local_experts", "num_experts_per_tok",
    "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings",
    "sliding_window", "router_estimator", "router_aux_loss_coef", "router_jitter_noise", "input_jitter_noise",
    "router_sampling", "freeze_router", "expert_dropout",
)  # fmt: skip
EVAL_LABELS = {  # keys of a trainer's log, on held-out data
    "eval_loss": "loss",
    "eval_mean_token_accuracy": "accuracy of the next token",
    "eval_rewards/accuracies": "pairs whose chosen answer has the higher reward",
    "eval_rewards/margins": "margin of the rewards",
}
BALANCE_LABELS = (  # label, key of layers.jsonl, reduction over layers, value in perfect balance
    ("load of the busiest expert over a fair share, mean over layers", "load_max", np.mean, "1"),
    ("the same, in the layer where it is largest", "load_max", np.max, "1"),
    ("dead experts, in all layers together", "dead_experts", np.sum, "0"),
    ("entropy of the load over log E", "load_entropy", np.mean, "1"),
    ("tokens with a near-tie", "near_tie_rate", np.mean, ""),
    ("load-balance loss, mean over layers", "balance_loss", np.mean, "1"),
)


@dataclass
class Card:
    """A written card."""

    path: str
    figures: list[str]
    notes: list[str]  # what it lacks, and what a person has to add


@contextmanager
def errors_in(path: Path | None) -> Iterator[None]:
    """Name a file in errors about its contents: anybody may have written it, with values of any type."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(f"{path} is not as a run or an evaluation writes it ({reason})") from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    with errors_in(path):
        return dict(json.loads(path.read_text(encoding="utf-8")).items())


@dataclass
class Records:
    """The files of a model's folder; missing ones come from the run's folder."""

    folder: Path
    run_folder: Path
    notes: list[str] = field(default_factory=list)  # what is missing, and what to do about it

    def find(self, name: str) -> Path | None:
        """Find a file; None if both folders lack it."""
        return next((path / name for path in (self.folder, self.run_folder) if (path / name).is_file()), None)

    def read(self, name: str, what: str) -> dict[str, Any]:
        """Read a JSON object; if the file is missing, return an empty one and note that the card lacks `what`."""
        path = self.find(name)
        if path is None:
            self.notes.append(f"no {name}, so the card lacks {what}")
            return {}
        return read_object(path)

    @cached_property
    def run(self) -> dict[str, Any]:
        return self.read(RUN_FILE, "data, hyper-parameters, hardware and versions")

    @cached_property
    def state(self) -> dict[str, Any]:
        return self.read(STATE_FILE, "loss curve and steps")

    @cached_property
    def adapter(self) -> dict[str, Any] | None:
        """The config of a LoRA's folder."""
        path = self.folder / "adapter_config.json"
        return read_object(path) if path.is_file() else None

    @cached_property
    def config(self) -> GrinMoeConfig | None:
        """The model's config; of a LoRA, the base model's config in `run.json`."""
        path = self.folder / "config.json"
        values: dict[str, Any] | None = None
        if path.is_file():
            values = read_object(path)
        elif self.adapter is None:
            raise ValueError(f"{self.folder} must be a model's folder, with config.json or adapter_config.json")
        else:
            path, values = self.run_folder / RUN_FILE, self.run.get("config")
        with errors_in(path):
            return GrinMoeConfig.from_dict(values) if values else None


# ---- Tables ----


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Markup:
    """A Markdown table, numbers with four digits and aligned right; empty without rows."""
    rows = list(rows)
    if not rows:
        return Markup()
    rules = [
        "---:" if all(isinstance(value, float) or value == "" for value in column) else "---"
        for column in zip(*rows, strict=True)
    ]
    cells = [[f"{value:.4g}" if isinstance(value, float) else cell(value) for value in row] for row in rows]
    return Markup("\n".join("| " + " | ".join(line) + " |" for line in [columns, rules, *cells]))


def config_table(config: GrinMoeConfig | None) -> Markup:
    if config is None:
        return Markup()
    total, active = count_parameters(config)
    sizes = [("parameters", f"{total:,}"), ("active parameters", f"{active:,}")]
    return table(("field", "value"), [*sizes, *((code(name), getattr(config, name)) for name in CONFIG_FIELDS)])


def link(source: Mapping[str, Any], kind: str = "") -> Markup:
    """Link a source of `run.json`; `kind` is `datasets/` for data."""
    name = source["name"]
    if not source["hub"]:
        return Markup(f"{code(name)} (local)")
    return Markup(f"[{escape(name)}](https://huggingface.co/{kind}{quote(name)})")


def run_tables(run: Mapping[str, Any]) -> tuple[Markup, Markup, list[tuple[str, Any]]]:
    """Return the tables of data and of hyper-parameters, and rows on hardware and versions, from `run.json`."""
    if not run:
        return Markup(), Markup(), []
    data = []
    for use in ("train_data", "eval_data"):
        if source := run.get(use):
            held_out = run.get("eval_fraction")
            rest = f"{held_out:.4g} of the rows, held out" if use == "eval_data" and held_out else ""
            where = rest or ", ".join(str(source[key]) for key in ("config", "split") if source.get(key))
            data.append((use.removesuffix("_data"), link(source, "datasets/"), where, f"{source.get('rows', '')}"))
    given = [("sequences of an optimizer step (global batch)", run["global_batch"])]
    given += [(code(name), value) for name, value in run["hyperparameters"].items()]
    hardware, sizes = run["hardware"], dict(run["parallelism"])
    layout = ["fully sharded"] if sizes.pop("fully sharded") else []
    layout = [f"{name} {size}" for name, size in sizes.items() if size > 1] + layout
    parallelism = ", ".join(layout) or "data parallel" if hardware["processes"] > 1 else "none"
    rows = [("device", hardware["device"]), ("processes", hardware["processes"]), ("parallelism", parallelism)]
    return (
        table(("use", "source", "part", "rows"), data),
        table(("name", "value"), given),
        [*rows, *run["versions"].items()],
    )


def last_entry(state: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The last entry of a trainer's log with this key; empty if there is none."""
    return next((entry for entry in reversed(state.get("log_history", [])) if entry.get(key) is not None), {})


def state_rows(state: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Steps, tokens and duration."""
    rows: list[tuple[str, Any]] = []
    if state:
        rows += [("optimizer steps", state["global_step"]), ("epochs", state.get("epoch", ""))]
    if counted := last_entry(state, "num_tokens"):
        rows.append((f"tokens (at step {counted['step']})", f"{counted['num_tokens']:,.0f}"))
    if end := last_entry(state, "train_runtime"):
        duration = timedelta(seconds=round(end["train_runtime"]))
        rows.append(("wall time since the (last) start", str(duration)))
    return rows


def held_out_table(state: Mapping[str, Any]) -> Markup:
    """Figures of the run's last evaluation, which measured the saved weights."""
    last = last_entry(state, "eval_loss")
    rows = [(label, float(last[key])) for key, label in EVAL_LABELS.items() if last.get(key) is not None]
    return table(("on held-out data", "value"), rows)


class RoutingRecord(NamedTuple):
    """The first and last line of `RoutingCallback`'s layers.jsonl."""

    balance: Markup = Markup()  # figures of both
    near_ties: float | None = None  # percent of the tokens, in the last
    load: torch.Tensor | None = None  # [L, E], in the last
    step: int = 0


def read_routing(records: Records) -> RoutingRecord:
    """Read layers.jsonl, of which a killed run may leave half a line."""
    path = records.find("routing/layers.jsonl")
    lines = "" if path is None else path.read_text(encoding="utf-8").rpartition("\n")[0]
    if not lines:
        records.notes.append("no routing/layers.jsonl, so the card lacks expert load (RoutingCallback writes it)")
        return RoutingRecord()
    with errors_in(path):
        both = [json.loads(lines.splitlines()[number]) for number in (0, -1)]
        rows = [(label, *(float(reduce(line[key])) for line in both), balanced)
                for label, key, reduce, balanced in BALANCE_LABELS]  # fmt: skip
        balance = table(("", *(f"step {line['step']}" for line in both), "balanced"), rows)
        last = both[-1]
        load = torch.tensor(last["load"], dtype=torch.float64)
        if load.ndim != 2 or not load.numel():
            raise ValueError("`load` must have a share of each layer and expert")
        return RoutingRecord(balance, 100 * float(np.mean(last["near_tie_rate"])), load, last["step"])


# ---- Evaluation ----


class Scores(NamedTuple):
    """The contents of a results file."""

    table: Markup = Markup()
    limits: Sequence[float] = ()
    beside_paper: bool = False
    results: list[EvalResult] | None = None  # for the Hub's `model-index`; limited results stay out of it


def comparable(row: Mapping[str, Any]) -> str:
    """Everything asked of the harness except the model: equal for scores that can be compared."""
    return json.dumps({name: value for name, value in row["settings"].items() if name not in MODEL_SETTINGS})


def in_unit(row: Mapping[str, Any]) -> float:
    """The score for the table: percentages with two decimals, other units in full."""
    return round(float(row["score"]), 2) if row["unit"] == "%" else float(row["score"])


def read_scores(evaluation: Path | None, base_evaluation: Path | None) -> Scores:
    """Read results.json of recipes/evaluate.py, and the base model's, to set the scores beside one another.

    Raises:
        ValueError: a file is missing or has another form.
    """
    if evaluation is None:
        if base_evaluation is not None:
            raise ValueError("base_evaluation needs evaluation, the model's own scores")
        return Scores()
    for path in filter(None, (evaluation, base_evaluation)):
        if not path.is_file():
            raise ValueError(f"{path} does not exist: give results.json of recipes/evaluate.py")
    base_scores = {}
    if base_evaluation is not None:
        with errors_in(base_evaluation):
            base_scores = {comparable(row): in_unit(row) for row in read_object(base_evaluation)["rows"]}
    with errors_in(evaluation):
        found = read_object(evaluation)
        rows = found["rows"]
        columns = {
            "task": [row["row"] for row in rows],
            "shots": ["/".join(map(str, row["shots"])) for row in rows],
            "metric": [
                row["metric"]
                + f", {row['filter']}" * (row["filter"] != "none")
                + f" ({row['unit']})" * (row["unit"] != "%")
                for row in rows
            ],
            "this model": [in_unit(row) for row in rows],
            "base model": [base_scores.get(comparable(row), "") for row in rows],
            "GRIN-MoE, paper": ["" if row.get("paper") is None else float(row["paper"]) for row in rows],
        }
        used = {name: cells for name, cells in columns.items() if any(value != "" for value in cells)}
        limits = sorted({limit for row in rows if (limit := row["settings"].get("limit")) is not None})
        return Scores(
            table(list(used), zip(*used.values(), strict=True)),
            limits,
            "GRIN-MoE, paper" in used,
            None if limits else model_index_to_eval_results(found["model-index"])[1],
        )


# ---- Metadata ----


def find_base(records: Records, base_model: str | None) -> dict[str, Any] | None:
    """The model before training, as in `run.json`; None for a new model, or if no file tells."""
    if base_model is not None:
        return {"name": base_model, "hub": True}
    base = records.run.get("base_model")
    if base and not base["hub"]:
        records.notes.append(
            f"the base model, {base['name']}, was a local folder: name it on the Hub with --base-model"
        )
    elif base is None and records.adapter is not None:
        records.notes.append("no base model is recorded: name it with --base-model")
    return base


def make_metadata(
    records: Records,
    base: Mapping[str, Any] | None,
    name: str,
    results: list[EvalResult] | None,
    license: str | None,
    language: Sequence[str],
) -> ModelCardData:
    """The card's YAML."""
    method, data = records.run.get("method"), records.run.get("train_data")
    known: dict[str, Any] = {}
    if base and base["hub"]:
        is_quantized = getattr(records.config, "quantization_config", None) is not None
        known["base_model"] = base["name"]
        known["base_model_relation"] = "adapter" if records.adapter else "quantized" if is_quantized else "finetune"
    tags = ["grinmoe", "mixture-of-experts"]
    tags += ["lora"] * bool(records.adapter) + ([method.lower()] if method else [])
    return ModelCardData(
        language=list(language) or None,
        license=license,
        library_name="peft" if records.adapter else "transformers",
        pipeline_tag="text-generation",
        tags=tags + ["trl"] * (method in ("SFT", "DPO")),
        datasets=[data["name"]] if data and data["hub"] else None,
        model_name=name if results else None,
        eval_results=results or None,
        **known,
    )


def write_card(
    folder: str | Path,
    *,
    run: str | Path | None = None,
    evaluation: str | Path | None = None,
    base_evaluation: str | Path | None = None,
    repo_id: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    language: Sequence[str] = (),
    force: bool = False,
) -> Card:
    """Write a model's card, `folder`/README.md, and its pictures, `folder`/figures.

    Args:
        folder: of a model or LoRA adapter, such as a recipe's output_dir.
        run: folder of the training run, if `folder` lacks its files: a checkpoint, a merged or a converted model.
        evaluation: results.json of recipes/evaluate.py.
        base_evaluation: results.json of the base model, to compare with.
        repo_id: the model's name on the Hub; by default the snippets name the folder.
        base_model: the base model's name on the Hub, if the run does not tell.
        license: as the Hub names it; default: GRIN-MoE's, if the model was trained from it.
        language: ISO 639 codes.
        force: overwrite an existing card.

    Raises:
        ValueError: a card exists, the model is no language model, the Hub would refuse a value, or a file of the run
            has another form.
    """
    folder = Path(folder)
    path = folder / "README.md"
    if path.exists() and not force:  # it may hold somebody's work
        raise ValueError(f"{path} exists: move it away, or overwrite it with --force")
    if run is not None and not Path(run).is_dir():
        raise ValueError(f"run must be the folder of a training run; got {run}")
    if license is not None and not LICENSE.fullmatch(license):
        raise ValueError(f"license must be a name as on the Hub, such as mit, apache-2.0 or other; got {license}")
    if unknown := [code for code in language if not LANGUAGE.fullmatch(code)]:
        raise ValueError(f"language must be an ISO 639 code, such as en; got {unknown[0]}")
    for option, given in (("repo_id", repo_id), ("base_model", base_model)):
        try:
            validate_repo_id(given or GRIN_MOE)
        except HFValidationError as error:
            raise ValueError(
                f"{option} must be a name on the Hub, such as {GRIN_MOE}; got {given}: {error}"
            ) from error
    name = folder.resolve().name if repo_id is None else repo_id.rpartition("/")[2]
    scores = read_scores(*(None if results is None else Path(results) for results in (evaluation, base_evaluation)))
    records = Records(folder, Path(folder if run is None else run))
    config, adapter, notes = records.config, records.adapter, records.notes
    if config is not None and any("ForSequenceClassification" in name for name in config.architectures or ()):
        raise ValueError(
            f"{folder} is a sequence classifier; this card is for language models only: write {path} yourself"
        )
    if scores.limits:
        notes.append("the evaluation was limited to some examples, so the metadata leave it out")
    values, figures = describe_run(records)
    with errors_in(records.find(RUN_FILE)):
        base = find_base(records, base_model)
        if license is None and base and base["name"] == GRIN_MOE:
            license = "mit"
        metadata = make_metadata(records, base, name, scores.results, license, language)
        base_link = link(base) if base else None
    if license is None:
        notes.append("no license, without which nobody may use the model: give --license")
    if repo_id is None:
        notes.append("the snippets name the folder: give the name on the Hub with --repo-id")
    targets = str((adapter or {}).get("target_modules"))
    text = render(
        TEMPLATE,
        card_data=Markup(metadata.to_yaml()),
        name=name,
        repo=repo_id or name,
        base=base,
        base_link=base_link,
        grin_moe=GRIN_MOE,
        adapter=adapter,
        linear_experts=re.search(r"\bw[123]\b", targets) is not None,
        config=config,
        config_table=config_table(config),
        to_fill_in=Markup(TO_FILL_IN),
        figures=figures,
        evaluation=scores.table,
        beside_paper=scores.beside_paper,
        limits=scores.limits,
        **values,
    )
    for figure, picture in figures.items():
        (folder / "figures").mkdir(exist_ok=True)
        with replacing(folder / "figures" / f"{figure}.png") as part:
            picture.savefig(part, dpi=DPI)
    write_whole(path, f"{text}\n")
    if blanks := text.count(TO_FILL_IN):
        notes.append(f"{blanks} places are for a person to fill in: look for {TO_FILL_IN}")
    return Card(str(path), [f"figures/{figure}.png" for figure in figures], notes)


def describe_run(records: Records) -> tuple[dict[str, Any], dict[str, Figure]]:
    """Return the template's values and the pictures that come from the files of a run."""
    run, state, routing, figures = records.run, records.state, read_routing(records), {}
    with errors_in(records.find(RUN_FILE)):
        data, hyperparameters, rows = run_tables(run)
    with errors_in(records.find(STATE_FILE)):
        training = table(("", ""), [*state_rows(state), *rows])
        held_out = held_out_table(state)
        if last_entry(state, "loss"):
            label = "loss" if run.get("method") == "DPO" else "loss (nats per token)"
            figures["loss"] = draw_loss(state["log_history"], label)
    if routing.load is not None:
        figures["expert_load"] = draw_expert_load(routing.load, f"Expert load, step {routing.step}")
    values = {"method": run.get("method"), "data": data, "hyperparameters": hyperparameters, "training": training,
              "held_out": held_out, "balance": routing.balance, "near_ties": routing.near_ties}  # fmt: skip
    return values, figures


def write_cards(trainer: "Trainer") -> None:
    """Write the cards of a run's model and of its merged model, where there are none."""
    folder = Path(trainer.args.output_dir)
    for model, run in ((folder, None), (folder / "merged", folder)):
        if trainer.is_world_process_zero() and model.is_dir() and not (model / "README.md").exists():
            write_card(model, run=run)
