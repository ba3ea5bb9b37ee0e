"""Write model cards: README.md from the files of a training run, by the template model_cards/template.md.

A run leaves `run.json` (`record.py`), trainer_state.json, config.json or adapter_config.json, and routing/layers.jsonl
(`RoutingCallback`). The card leaves out what a missing file would say, and a note names the file.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import torch
from huggingface_hub import ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id
from markupsafe import Markup

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
DPI = 150
GRIN_MOE = "microsoft/GRIN-MoE"
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


# ---- Files: each gives values for the template ----


def read(path: Path, describe: Callable[..., Any], *more: Any) -> Any:
    """Return `describe(path, *more)`; an error names the file, which anybody may have written."""
    try:
        return describe(path, *more)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(f"{path} is not as a run or an evaluation writes it ({reason})") from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    return dict(json.loads(path.read_text(encoding="utf-8")).items())


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Markup:
    """A Markdown table, numbers with four digits and aligned right. Columns without a value are left out."""
    columns = [column for column in zip(header, *rows, strict=True) if any(value != "" for value in column[1:])]
    if not columns:
        return Markup()
    lines = [
        [f"{value:.4g}" if isinstance(value, float) else cell(value) for value in line]
        for line in zip(*columns, strict=True)
    ]
    are_numbers = [all(isinstance(value, float) or value == "" for value in column[1:]) for column in columns]
    lines.insert(1, ["---:" if is_number else "---" for is_number in are_numbers])
    return Markup("\n".join("| " + " | ".join(line) + " |" for line in lines))


def link(source: Mapping[str, Any], kind: str = "") -> Markup:
    """Link a source of `run.json`; `kind` is `datasets/` for data."""
    name = source["name"]
    if not source["hub"]:
        return Markup(f"{code(name)} (local)")
    return Markup(f"[{escape(name)}](https://huggingface.co/{kind}{quote(name)})")


def describe_config(config: GrinMoeConfig) -> Markup:
    """The table of sizes and settings."""
    total, active = count_parameters(config)
    sizes = [("parameters", f"{total:,}"), ("active parameters", f"{active:,}")]
    return table(("field", "value"), [*sizes, *((code(name), getattr(config, name)) for name in CONFIG_FIELDS)])


def describe_run(path: Path) -> dict[str, Any]:
    """Describe method, base model, data, hyper-parameters, hardware and versions by `run.json`."""
    run, data = read_object(path), []
    base, train_data, hardware = run.get("base_model"), run.get("train_data"), run["hardware"]
    for use in ("train", "eval"):
        if source := run.get(f"{use}_data"):
            part = ", ".join(str(source[key]) for key in ("config", "split") if source.get(key))
            if use == "eval" and run.get("eval_fraction"):
                part = f"{run['eval_fraction']:.4g} of the rows, held out"
            data.append((use, link(source, "datasets/"), part, f"{source.get('rows', '')}"))
    given = [(code(name), value) for name, value in run["hyperparameters"].items()]
    layout = [f"{name} {size}" for name, size in run["parallelism"].items() if size > 1]
    layout += ["fully sharded"] * bool(run["parallelism"]["fully sharded"])
    parallelism = ", ".join(layout) or "data parallel" if hardware["processes"] > 1 else "none"
    return {
        "method": run.get("method") and str(run["method"]),
        "base": base and {"name": str(base["name"]), "hub": bool(base["hub"])},
        "dataset": str(train_data["name"]) if train_data and train_data["hub"] else None,
        "config": GrinMoeConfig.from_dict(run["config"]) if run.get("config") else None,
        "data": table(("use", "source", "part", "rows"), data),
        "hyperparameters": table(
            ("name", "value"), [("sequences of an optimizer step (global batch)", run["global_batch"]), *given]
        ),
        "machine": [
            ("device", hardware["device"]), ("processes", hardware["processes"]), ("parallelism", parallelism),
            *run["versions"].items(),
        ],
    }  # fmt: skip


def describe_state(path: Path, method: str | None) -> dict[str, Any]:
    """Describe steps, tokens, time, loss and last evaluation, which measured the saved weights, by a trainer's log."""
    state = read_object(path)
    log = state.get("log_history", [])
    last = {key: entry for entry in log for key, value in entry.items() if value is not None}  # the last that has it
    progress = [("optimizer steps", state["global_step"]), ("epochs", state.get("epoch", ""))]
    if entry := last.get("num_tokens"):
        progress.append((f"tokens (at step {entry['step']})", f"{entry['num_tokens']:,.0f}"))
    if entry := last.get("train_runtime"):
        duration = timedelta(seconds=round(entry["train_runtime"]))
        progress.append(("wall time since the (last) start", str(duration)))
    held_out = [(label, float(last[key][key])) for key, label in EVAL_LABELS.items() if key in last]
    values: dict[str, Any] = {"progress": progress, "held_out": table(("on held-out data", "value"), held_out)}
    if "loss" in last:
        values["loss"] = draw_loss(log, "loss" if method == "DPO" else "loss (nats per token)")
    return values


def describe_routing(path: Path) -> dict[str, Any]:
    """Describe expert load at a run's first log and at its last one, of which a killed run may leave half a line."""
    lines = path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
    if not lines:
        return {}
    both = first, last = json.loads(lines[0]), json.loads(lines[-1])
    rows = [
        (label, *(float(reduce(line[key])) for line in both), balanced)
        for label, key, reduce, balanced in BALANCE_LABELS
    ]
    load = torch.tensor(last["load"], dtype=torch.float64)  # [L, E]
    return {
        "balance": table(("", f"step {first['step']}", f"step {last['step']}", "balanced"), rows),
        "near_ties": 100 * float(np.mean(last["near_tie_rate"])),
        "expert_load": draw_expert_load(load, f"Expert load, step {last['step']}"),
    }


def comparable(row: Mapping[str, Any]) -> str:
    """Everything asked of the harness except the model: equal for scores that can be compared."""
    return json.dumps({name: value for name, value in row["settings"].items() if name not in MODEL_SETTINGS})


def score_of(row: Mapping[str, Any]) -> float:
    """The score for the table: percentages with two decimals, other units in full."""
    return round(float(row["score"]), 2) if row["unit"] == "%" else float(row["score"])


def describe_scores(path: Path, base_scores: Mapping[str, float]) -> dict[str, Any]:
    """Set the scores of results.json beside the base model's and the paper's; `results` are the `model-index`."""
    found, rows = read_object(path), []
    for row in found["rows"]:
        of = f", {row['filter']}" if row["filter"] != "none" else ""
        unit = f" ({row['unit']})" if row["unit"] != "%" else ""
        base, shots = base_scores.get(comparable(row), ""), "/".join(map(str, row["shots"]))
        paper = "" if row.get("paper") is None else float(row["paper"])
        rows.append((row["row"], shots, f"{row['metric']}{of}{unit}", score_of(row), base, paper))
    limits = {row["settings"].get("limit") for row in found["rows"]} - {None}
    return {
        "evaluation": table(("task", "shots", "metric", "this model", "base model", "GRIN-MoE, paper"), rows),
        "beside_paper": any(row[-1] != "" for row in rows),
        "limits": sorted(limits),
        "results": None if limits else model_index_to_eval_results(found["model-index"])[1],
    }


def read_scores(evaluation: str | Path | None, base_evaluation: str | Path | None) -> dict[str, Any]:
    """Read results.json of recipes/evaluate.py, and the base model's, to set the scores beside one another."""
    if evaluation is None:
        if base_evaluation is not None:
            raise ValueError("base_evaluation needs evaluation, the model's own scores")
        return {}
    base_scores = {}
    if base_evaluation is not None:
        base_scores = read(
            Path(base_evaluation),
            lambda path: {comparable(row): score_of(row) for row in read_object(path)["rows"]},
        )
    return read(Path(evaluation), describe_scores, base_scores)


# ---- The card ----


def make_metadata(values: Mapping[str, Any], name: str, license: str | None, language: Sequence[str]) -> ModelCardData:
    """The card's YAML."""
    method, base, adapter, dataset = (values.get(key) for key in ("method", "base", "adapter", "dataset"))
    known: dict[str, Any] = {}
    if base and base["hub"]:
        is_quantized = getattr(values.get("config"), "quantization_config", None) is not None
        known["base_model"] = base["name"]
        known["base_model_relation"] = "adapter" if adapter else "quantized" if is_quantized else "finetune"
    tags = ["lora"] * bool(adapter) + ([method.lower()] if method else []) + ["trl"] * (method in ("SFT", "DPO"))
    return ModelCardData(
        language=list(language) or None,
        license=license,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["grinmoe", "mixture-of-experts", *tags],
        datasets=[dataset] if dataset else None,
        model_name=name if values.get("results") else None,
        eval_results=values.get("results") or None,
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
        ValueError: a card exists, the model is no language model, a name cannot be one on the Hub, or a file of the
            run is missing or has another form.
    """
    folder, run_folder = Path(folder), Path(folder if run is None else run)
    path = folder / "README.md"
    if path.exists() and not force:  # it may hold somebody's work
        raise ValueError(f"{path} exists: move it away, or overwrite it with --force")
    if run is not None and not run_folder.is_dir():
        raise ValueError(f"run must be the folder of a training run; got {run}")
    for given in filter(None, (repo_id, base_model)):
        validate_repo_id(given)
    values, notes = read_scores(evaluation, base_evaluation), []

    def add(name: str, lacks: str, describe: Callable[..., dict[str, Any]], *more: Any) -> None:
        found = next((place / name for place in (folder, run_folder) if (place / name).is_file()), None)
        if found is None:
            notes.append(f"no {name}, so the card lacks {lacks}")
        else:
            values.update(read(found, describe, *more))

    add(RUN_FILE, "data, hyper-parameters, hardware and versions", describe_run)
    add("trainer_state.json", "loss curve and steps", describe_state, values.get("method"))
    add("routing/layers.jsonl", "expert load (RoutingCallback writes it)", describe_routing)
    config_file, adapter_file = folder / "config.json", folder / "adapter_config.json"
    if adapter_file.is_file():
        values["adapter"] = read(adapter_file, read_object)
    if config_file.is_file():
        values["config"] = read(config_file, lambda path: GrinMoeConfig.from_dict(read_object(path)))
    elif "adapter" not in values:
        raise ValueError(f"{folder} must be a model's folder, with config.json or adapter_config.json")
    config: GrinMoeConfig | None = values.get("config")
    if config is not None and any("ForSequenceClassification" in name for name in config.architectures or ()):
        raise ValueError(
            f"{folder} is a sequence classifier; this card is for language models only: write it yourself"
        )

    if base_model is not None:
        values["base"] = {"name": base_model, "hub": True}
    base = values.get("base")
    if base:
        values["base_link"] = link(base)
        if base["name"] == GRIN_MOE:
            license = license or "mit"

    name = folder.resolve().name if repo_id is None else repo_id.rpartition("/")[2]
    targets = str(values.get("adapter", {}).get("target_modules"))
    text = render(
        TEMPLATE,
        card_data=Markup(make_metadata(values, name, license, language).to_yaml()),
        name=name,
        repo=repo_id or name,
        grin_moe=GRIN_MOE,
        linear_experts=re.search(r"\bw[123]\b", targets) is not None,
        config_table=describe_config(config) if config else "",
        to_fill_in=Markup(TO_FILL_IN),
        training=table(("", ""), [*values.get("progress", ()), *values.get("machine", ())]),
        **values,
    )
    figures = [name for name in ("loss", "expert_load") if name in values]
    for figure in figures:
        (folder / "figures").mkdir(exist_ok=True)
        with replacing(folder / "figures" / f"{figure}.png") as part:
            values[figure].savefig(part, dpi=DPI)
    write_whole(path, f"{text}\n")
    blanks = text.count(TO_FILL_IN)
    gaps = (
        (values.get("limits"), "the evaluation was limited to some examples, so the metadata leave it out"),
        (base and not base["hub"], "the base model was a local folder: name it on the Hub with --base-model"),
        ("adapter" in values and not base, "no base model is recorded: name it with --base-model"),
        (license is None, "no license, without which nobody may use the model: give --license"),
        (repo_id is None, "the snippets name the folder: give the name on the Hub with --repo-id"),
        (blanks, f"{blanks} places are for a person to fill in: look for {TO_FILL_IN}"),
    )
    notes += [text for is_open, text in gaps if is_open]
    return Card(str(path), [f"figures/{figure}.png" for figure in figures], notes)


def write_cards(trainer: "Trainer") -> None:
    """Write the cards of a run's model and of its merged model, where there are none."""
    folder = Path(trainer.args.output_dir)
    for model, run in ((folder, None), (folder / "merged", folder)):
        if trainer.is_world_process_zero() and model.is_dir() and not (model / "README.md").exists():
            write_card(model, run=run)
