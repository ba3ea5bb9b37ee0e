"""Write model cards: README.md from the files of a training run, by the template model_cards/template.md.

A run leaves `run.json` (`record.py`), trainer_state.json, config.json or adapter_config.json, and routing/layers.jsonl
(`RoutingCallback`). The card leaves out what a missing file would say, and a note names the file.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import torch
from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard_data import EvalResult, model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id
from markupsafe import Markup

from ..analysis.figures import draw_expert_load, draw_loss
from ..configuration_grinmoe import GrinMoeConfig
from ..files import replacing, write_whole
from ..planning.parameters import count_parameters
from . import TO_FILL_IN
from .forms import loss, number, parse_json, read_json
from .markdown import cell, code, escape, render
from .record import RUN_FILE

if TYPE_CHECKING:  # needs what only training installs
    from transformers import Trainer

# Beside the package, in the checkout as in the wheel.
TEMPLATE = Path(__file__).resolve().parents[2] / "model_cards" / "template.md"

TRAINER_STATE_FILE = "trainer_state.json"

DPI = 150

GRIN_MOE = "microsoft/GRIN-MoE"

LICENSE = re.compile(r"[a-z0-9.+-]+")  # the form of the Hub's names, which it checks when a card is pushed

LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")  # ISO 639-1 to 639-3, and the Hub's own

OF_THE_MODEL = ("model", "identity", "revision", "dtype", "attn_implementation", "experts_implementation")

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


# The fields of each file that the card reads; a file may lack all others.
SOURCE = {"name": str, "hub": bool, "config?": str, "split?": str, "rows?": int}
RUN = {
    "method?": str, "base_model?": SOURCE, "train_data?": SOURCE, "eval_data?": SOURCE, "eval_fraction?": number,
    "config?": dict, "hyperparameters": dict, "global_batch": int, "versions": dict,
    "parallelism": {"pipeline": int, "tensor": int, "fully sharded": bool},
    "hardware": {"device": str, "processes": int},
}  # fmt: skip
TRAINER_STATE = {
    "global_step": int,
    "epoch?": number,
    "log_history": [
        {"step": int, "train_runtime?": number, "num_tokens?": number, "loss?": loss,
         **{f"{key}?": loss for key in EVAL_LABELS}}
    ],
}  # fmt: skip
PER_LAYER = ("load_max", "dead_experts", "load_entropy", "near_tie_rate", "balance_loss")
ROUTING = {"step": int, "load": [[number]], **{key: [loss] for key in PER_LAYER}}
RESULTS = {
    "model-index": [
        {"results": [{"task": {"type": str}, "dataset": {"type": str, "name": str}, "metrics": [{"type": str}]}]}
    ],
    "rows": [
        {"row": str, "tasks": list, "shots": list, "metric": str, "filter": str, "unit": str, "score": number,
         "paper?": number, "settings": {"limit?": number}}
    ],
}  # fmt: skip


@dataclass
class Records:
    """The files of a model's folder; missing ones come from the run's folder."""

    folder: Path
    run_folder: Path
    notes: list[str] = field(default_factory=list)  # what is missing, and what to do about it

    def find(self, name: str) -> Path | None:
        """Find a file; None if both folders lack it."""
        return next((path / name for path in (self.folder, self.run_folder) if (path / name).is_file()), None)

    def read(self, name: str, what: str, form: dict[str, Any]) -> dict[str, Any]:
        """Read a JSON object; if the file is missing, return an empty one and note that the card lacks `what`."""
        path = self.find(name)
        if path is None:
            self.notes.append(f"no {name}, so the card lacks {what}")
            return {}
        return read_json(path, form)

    @cached_property
    def run(self) -> dict[str, Any]:
        return self.read(RUN_FILE, "data, hyper-parameters, hardware and versions", RUN)

    @cached_property
    def state(self) -> dict[str, Any]:
        return self.read(TRAINER_STATE_FILE, "loss curve and steps", TRAINER_STATE)

    @property
    def log(self) -> list[dict[str, Any]]:
        return self.state.get("log_history", [])

    @cached_property
    def adapter(self) -> dict[str, Any] | None:
        """The config of a LoRA's folder."""
        path = self.folder / "adapter_config.json"
        return read_json(path, dict) if path.is_file() else None

    @cached_property
    def config(self) -> GrinMoeConfig | None:
        """The model's config; of a LoRA, the base model's config in `run.json`."""
        if (self.folder / "config.json").is_file():
            return read_config(self.folder / "config.json", None)
        if self.adapter is None:
            raise ValueError(f"{self.folder} must be a model's folder, with config.json or adapter_config.json")
        return read_config(self.run_folder / RUN_FILE, self.run["config"]) if self.run.get("config") else None

    @cached_property
    def routing(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The first and last line of `RoutingCallback`'s layers.jsonl."""
        path = self.find("routing/layers.jsonl")
        text = "" if path is None else path.read_text(encoding="utf-8")
        lines = text.rpartition("\n")[0].splitlines()  # a killed run may leave half a line
        if not lines:
            self.notes.append("no routing/layers.jsonl, so the card lacks expert load (RoutingCallback writes it)")
            return None
        first, last = (parse_json(line, ROUTING, str(path)) for line in (lines[0], lines[-1]))
        for line in (first, last):
            sizes = {len(layer) for layer in line["load"]}
            counts = {len(line[key]) for key in PER_LAYER}
            if len(sizes) != 1 or counts != {len(line["load"])}:
                raise ValueError(f"{path} must have a load of each layer and expert, and every figure of each layer")
        return first, last


def read_config(path: Path, values: dict[str, Any] | None) -> GrinMoeConfig:
    """Read the config of a file, or of its `values`."""
    try:
        return GrinMoeConfig.from_pretrained(path) if values is None else GrinMoeConfig.from_dict(values)
    except Exception as error:  # of any type: transformers does not expect such values
        raise ValueError(f"{path} has no usable config: {' '.join(str(error).split())}") from error


# ---- Tables ----


def cell_text(value: Any) -> str:
    """Floats in four digits; other values escaped, except `Markup`."""
    return f"{value:.4g}" if isinstance(value, float) else cell(value)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Markup:
    """A Markdown table with numbers aligned right; empty without rows."""
    rows = list(rows)
    if not rows:
        return Markup()
    rules = [
        "---:" if all(isinstance(cell, float) or cell == "" for cell in column) else "---"
        for column in zip(*rows, strict=True)
    ]
    lines = [columns, rules, *([cell_text(cell) for cell in row] for row in rows)]
    return Markup("\n".join("| " + " | ".join(line) + " |" for line in lines))


def config_rows(records: Records) -> list[tuple[str, Any]]:
    config = records.config
    if config is None:
        return []
    total, active = count_parameters(config)
    sizes = [("parameters", f"{total:,}"), ("active parameters", f"{active:,}")]
    return [*sizes, *((code(name), getattr(config, name)) for name in CONFIG_FIELDS)]


def hyperparameter_rows(records: Records) -> list[tuple[str, Any]]:
    if not records.run:
        return []
    rows = [("sequences of an optimizer step (global batch)", records.run["global_batch"])]
    return [*rows, *((code(name), value) for name, value in records.run["hyperparameters"].items())]


def link(source: Mapping[str, Any], kind: str = "") -> Markup:
    """Link a source of `run.json`; `kind` is `datasets/` for data."""
    name = source["name"]
    if not source["hub"]:
        return Markup(f"{code(name)} (local)")
    return Markup(f"[{escape(name)}](https://huggingface.co/{kind}{quote(name)})")


def data_rows(records: Records) -> list[tuple[Any, ...]]:
    rows = []
    for use in ("train_data", "eval_data"):
        if source := records.run.get(use):
            held_out = records.run.get("eval_fraction")
            rest = f"{held_out:.4g} of the rows, held out" if use == "eval_data" and held_out else ""
            where = rest or ", ".join(str(source[key]) for key in ("config", "split") if source.get(key))
            rows.append((use.removesuffix("_data"), link(source, "datasets/"), where, f"{source.get('rows', '')}"))
    return rows


def training_rows(records: Records) -> list[tuple[str, Any]]:
    """Duration, hardware and versions."""
    rows: list[tuple[str, Any]] = []
    end = next((entry for entry in reversed(records.log) if entry.get("train_runtime") is not None), None)
    if records.state:
        rows += [("optimizer steps", records.state["global_step"]), ("epochs", records.state.get("epoch", ""))]
    counted = next((entry for entry in reversed(records.log) if entry.get("num_tokens") is not None), None)
    if counted:
        rows.append((f"tokens (at step {counted['step']})", f"{counted['num_tokens']:,.0f}"))
    if end:
        duration = timedelta(seconds=round(end["train_runtime"]))
        rows.append(("wall time since the (last) start", str(duration)))
    if records.run:
        hardware = records.run["hardware"]
        rows += [("device", hardware["device"]), ("processes", hardware["processes"])]
        layout = [f"{name} {size}" for name, size in records.run["parallelism"].items() if size > 1]
        layout += ["fully sharded"] if records.run["parallelism"]["fully sharded"] else []
        rows.append(("parallelism", ", ".join(layout) or "data parallel" if hardware["processes"] > 1 else "none"))
        rows += [(name, version) for name, version in records.run["versions"].items()]
    return rows


def held_out_rows(records: Records) -> list[tuple[str, float]]:
    """Figures of the run's last evaluation, which measured the saved weights."""
    last: dict[str, Any] = next((entry for entry in reversed(records.log) if entry.get("eval_loss") is not None), {})
    return [(label, last[key]) for key, label in EVAL_LABELS.items() if last.get(key) is not None]


def balance_table(records: Records) -> Markup:
    """Figures of the first and last log beside their value in perfect balance."""
    if records.routing is None:
        return Markup()
    columns = ("", *(f"step {line['step']}" for line in records.routing), "balanced")
    return table(columns, [
        (label, *(float(reduce(line[key])) for line in records.routing), balanced)
        for label, key, reduce, balanced in (
            ("load of the busiest expert over a fair share, mean over layers", "load_max", np.mean, "1"),
            ("the same, in the layer where it is largest", "load_max", np.max, "1"),
            ("dead experts, in all layers together", "dead_experts", np.sum, "0"),
            ("entropy of the load over log E", "load_entropy", np.mean, "1"),
            ("tokens with a near-tie", "near_tie_rate", np.mean, ""),
            ("load-balance loss, mean over layers", "balance_loss", np.mean, "1"),
        )
    ])  # fmt: skip


# ---- Evaluation ----


def read_results(path: str | Path) -> dict[str, Any]:
    """Read results.json of recipes/evaluate.py: the rows of its table, and the Hub's `model-index`.

    Raises:
        ValueError: the file is missing or has another form.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist: give results.json of recipes/evaluate.py")
    return read_json(Path(path), RESULTS)


def eval_results(path: Path) -> list[EvalResult]:
    """Read the Hub's `model-index` of a results file."""
    try:
        return model_index_to_eval_results(read_results(path)["model-index"])[1]
    except Exception as error:  # of many types, by the version of huggingface_hub
        raise ValueError(f"{path} must have the Hub's model-index; got {type(error).__name__} {error}") from error


def comparable(row: Mapping[str, Any]) -> str:
    """Everything asked of the harness except the model: equal for scores that can be compared."""
    return json.dumps({name: value for name, value in row["settings"].items() if name not in OF_THE_MODEL})


def in_unit(row: Mapping[str, Any]) -> float:
    """The score for the table: percentages with two decimals, other units in full."""
    return round(float(row["score"]), 2) if row["unit"] == "%" else float(row["score"])


def evaluation_table(rows: Sequence[Mapping[str, Any]], base_rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Scores beside the base model's and the paper's, if there are any."""
    of_base = {comparable(row): in_unit(row) for row in base_rows}
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
        "base model": [of_base.get(comparable(row), "") for row in rows],
        "GRIN-MoE, paper": ["" if row.get("paper") is None else float(row["paper"]) for row in rows],
    }
    used = {name: cells for name, cells in columns.items() if any(cell != "" for cell in cells)}
    return table(list(used), zip(*used.values(), strict=True))


# ---- Metadata ----


def check_repo_id(name: str, option: str) -> str:
    """Return `name`; raise ValueError if no repository of the Hub can have it."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{option} must be a name on the Hub, such as {GRIN_MOE}; got {name}: {error}") from error
    return name


@dataclass
class Card:
    """A written card."""

    path: str
    figures: list[str]
    notes: list[str]  # what it lacks, and what a person has to add


def find_base(records: Records, base_model: str | None) -> dict[str, Any] | None:
    """The model before training, as in `run.json`; None for a new model, or if no file tells."""
    if base_model is not None:
        return {"name": check_repo_id(base_model, "base_model"), "hub": True}
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
    results: list[EvalResult],
    license: str | None,
    language: Sequence[str],
) -> ModelCardData:
    """The card's YAML."""
    if license is None and base and base["name"] == GRIN_MOE:
        license = "mit"
    if license is None:
        records.notes.append("no license, without which nobody may use the model: give --license")
    elif not LICENSE.fullmatch(license):
        raise ValueError(f"license must be a name as on the Hub, such as mit, apache-2.0 or other; got {license}")
    if unknown := [code for code in language if not LANGUAGE.fullmatch(code)]:
        raise ValueError(f"language must be an ISO 639 code, such as en; got {unknown[0]}")
    method = records.run.get("method")
    data = [records.run.get("train_data")]
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
        datasets=[source["name"] for source in data if source and source["hub"]] or None,
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
        evaluation: a results file (`read_results`).
        base_evaluation: a results file of the base model, to compare with.
        repo_id: the model's name on the Hub; by default the snippets name the folder.
        base_model: the base model's name on the Hub, if the run does not tell.
        license: as the Hub names it; default: GRIN-MoE's, if the model was trained from it.
        language: ISO 639 codes.
        force: overwrite an existing card.

    Raises:
        ValueError: a card exists, the model is no language model, or the Hub would refuse a value.
    """
    folder = Path(folder)
    path = folder / "README.md"
    if path.exists() and not force:  # it may hold somebody's work
        raise ValueError(f"{path} exists: move it away, or overwrite it with --force")
    if run is not None and not Path(run).is_dir():
        raise ValueError(f"run must be the folder of a training run; got {run}")
    if base_evaluation is not None and evaluation is None:
        raise ValueError("base_evaluation needs evaluation, the model's own scores")
    records = Records(folder, Path(run) if run is not None else folder)
    config = records.config
    if config is not None and any("ForSequenceClassification" in name for name in config.architectures or ()):
        raise ValueError(
            f"{folder} is a sequence classifier; this card is for language models only: write {path} yourself"
        )
    name = folder.resolve().name if repo_id is None else check_repo_id(repo_id, "repo_id").rpartition("/")[2]
    rows = [] if evaluation is None else read_results(evaluation)["rows"]
    base_rows = [] if base_evaluation is None else read_results(base_evaluation)["rows"]
    limits = {limit for row in rows if (limit := row["settings"].get("limit")) is not None}
    if limits:
        records.notes.append("the evaluation was limited to some examples, so the metadata leave it out")
    results = [] if evaluation is None or limits else eval_results(Path(evaluation))
    base = find_base(records, base_model)
    metadata = make_metadata(records, base, name, results, license, language)
    if repo_id is None:
        records.notes.append("the snippets name the folder: give the name on the Hub with --repo-id")

    method = records.run.get("method")
    figures = {}
    if any(entry.get("loss") is not None for entry in records.log):
        label = "loss" if method == "DPO" else "loss (nats per token)"
        figures["loss"] = draw_loss(records.log, label)
    if records.routing is not None:
        last = records.routing[1]
        figures["expert_load"] = draw_expert_load(torch.tensor(last["load"]), f"Expert load, step {last['step']}")

    adapter = records.adapter
    text = render(
        TEMPLATE,
        card_data=Markup(metadata.to_yaml()),
        name=name,
        repo=repo_id or name,
        method=method,
        base=base,
        base_link=link(base) if base else None,
        grin_moe=GRIN_MOE,
        adapter=adapter,
        linear_experts=adapter is not None
        and re.search(r"\bw[123]\b", str(adapter.get("target_modules"))) is not None,
        config=config,
        to_fill_in=Markup(TO_FILL_IN),
        figures=figures,
        near_ties=None if records.routing is None else 100 * float(np.mean(records.routing[1]["near_tie_rate"])),
        config_table=table(("field", "value"), config_rows(records)),
        hyperparameters=table(("name", "value"), hyperparameter_rows(records)),
        data=table(("use", "source", "part", "rows"), data_rows(records)),
        training=table(("", ""), training_rows(records)),
        held_out=table(("on held-out data", "value"), held_out_rows(records)),
        balance=balance_table(records),
        evaluation=evaluation_table(rows, base_rows),
        beside_paper=any(row.get("paper") is not None for row in rows),
        limits=sorted(limits),
    )
    for figure, picture in figures.items():
        (folder / "figures").mkdir(exist_ok=True)
        with replacing(folder / "figures" / f"{figure}.png") as part:
            picture.savefig(part, dpi=DPI)
    write_whole(path, f"{text}\n")
    if blanks := text.count(TO_FILL_IN):
        records.notes.append(f"{blanks} places are for a person to fill in: look for {TO_FILL_IN}")
    return Card(str(path), [f"figures/{figure}.png" for figure in figures], records.notes)


def write_cards(trainer: "Trainer") -> None:
    """Write the cards of a run's model and of its merged model, where there are none."""
    folder = Path(trainer.args.output_dir)
    for model, run in ((folder, None), (folder / "merged", folder)):
        if trainer.is_world_process_zero() and model.is_dir() and not (model / "README.md").exists():
            write_card(model, run=run)
